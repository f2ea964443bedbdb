"""One page of any results: tables, curves, sparsity of layers, masks, commands.

    python -m experiments.report results/lenet results/gradual
    python -m experiments.report results --out results/all.html

RESULTS are JSON-lines files, or folders, of which all .jsonl files are read.
The studies of this project write them, but any will do: a line is a JSON object
of numbers and text. Lines are put together by their `study` and, if they have a
`config`, its data set and network; `versions` and `command` are shown as they
are. A study declares in each line's `design` which fields say what was run and
which what came out:

- `seed` is the replicate;
- factors are text such as "method": curves and rows;
- levels are numbers such as "sparsity": rows, and what curves are drawn against;
- figures are shown as mean and standard deviation over the seeds.

Settings that differ between the configs are factors or levels too. Lines of
unknown origin get a plain default: text that differs is a factor, a number that
is needed to tell lines of one seed apart is a level, the others are figures.
A field `layers` of {path: [kept, size]} gives the sparsity of each layer, and
`masks`, the name of a file that a study wrote beside its lines, pictures.

It writes one HTML file that needs nothing else, asks for nothing and runs no
script; and beside it the same as Markdown, with its pictures in a folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.report import content, html, read
from experiments.report.markdown import document
from experiments.report.read import ReportError
from experiments.run.limits import problem, unwritable


def report(results: Sequence[str | Path], out: str | Path, markdown: str | Path | None = None) -> str:
    """Read results and writes a report of them.

    Args:
      results: files and folders.
      out: the HTML file; folders above it are made.
      markdown: the Markdown file, if there is to be one; its pictures go to a folder beside it.

    Returns:
      What was written, in words.

    Raises:
      ReportError: results that no report can be made of, or a file that cannot be written.
    """
    lines, notes = read.read(results)
    sections = read.sections(lines)
    title = content.title_of([str(one) for one in results])
    blocks = content.content(sections, notes)
    written = {Path(out): html.page(title, blocks).encode()}
    if markdown is not None:
        folder = Path(markdown).with_name(f"{Path(markdown).stem}_pictures")
        text, files = document(title, blocks, folder.name)
        written[Path(markdown)] = text.encode()
        written |= {folder / name: data for name, data in files.items()}
    sources = {file.resolve() for file in {line.file for line in lines}}
    for file, data in written.items():
        if file.resolve() in sources:
            raise ReportError(f"{file} is one of the results; give another name to write to.")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        except OSError as error:
            raise ReportError(f"{file} cannot be written: {error.strerror}.") from None
    said = "".join(f"{note}\n" for note in notes)
    where = " and ".join(map(str, list(written)[: 1 if markdown is None else 2]))
    several = "s" * (len(sections) != 1)
    return f"{said}Wrote {len(lines):,} lines in {len(sections)} section{several} to {where}"


def main(argv: Sequence[str] | None = None) -> None:
    """Make a report from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="JSON-lines files, and folders of them")
    parser.add_argument(
        "--out", default="results/report.html", help="the page (default: results/report.html)"
    )
    parser.add_argument(
        "--markdown", help="the same as Markdown (default: beside the page, as .md; '' for none)"
    )
    chosen = parser.parse_args(argv)

    def check(flag: str, file: str) -> None:
        if wrong := problem(str, file) or unwritable(file, "file"):
            parser.error(f"argument {flag}: {wrong}")

    check("--out", chosen.out)
    markdown = str(Path(chosen.out).with_suffix(".md")) if chosen.markdown is None else chosen.markdown
    if markdown:
        check("--markdown", markdown)
    try:
        print(report(chosen.results, chosen.out, markdown or None))
    except ReportError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
