"""What a study leaves: lines of results, pictures, and tables that fit a terminal."""

import json


def read(folder):
    """Return the lines of results in a folder."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def check_width(text, folder=None):
    """Check that no line is longer than 80 characters, apart from those that name the folder."""
    assert max(len(line) for line in text.splitlines() if str(folder) not in line) <= 80
