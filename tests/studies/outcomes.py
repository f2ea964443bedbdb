"""What a study finds and leaves: prepared data, lines of results, pictures, tables that fit a terminal."""

import json
import os
from pathlib import Path


def prepared(name):
    """Return whether a data set is prepared in TFDS_DATA_DIR."""
    return any(Path(os.environ.get("TFDS_DATA_DIR", "/none"), name).glob("*/dataset_info.json"))


def read(folder):
    """Return the lines of results in a folder."""
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG")


def check_width(text, folder=None):
    """Check that no line is longer than 80 characters, apart from those that name the folder."""
    assert max(len(line) for line in text.splitlines() if str(folder) not in line) <= 80
