"""`python -m experiments.one_shot`, and `python -m experiments.one_shot hf` for a Hugging Face checkpoint."""

import sys
from collections.abc import Sequence

from experiments.hf import command
from experiments.one_shot import study
from experiments.one_shot.study import Config, run

__all__ = ["COMMANDS", "Config", "main", "run"]

COMMANDS = {"hf": command}
"""The commands beside the study itself, by the word that they begin with."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the study, or the command that the first word names."""
    words = sys.argv[1:] if argv is None else list(argv)
    if words and words[0] in COMMANDS:
        COMMANDS[words[0]].main(words[1:])
    else:
        study.main(words)


if __name__ == "__main__":
    main()
