"""A study's settings: a frozen dataclass whose fields are its command-line flags."""

import argparse
import dataclasses
import json
import platform
import sys
import types
import typing
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax

C = TypeVar("C")


def parse(config: type[C], argv: Sequence[str] | None = None, description: str | None = None) -> C:
    """Reads flags into a config: field `batch_size: int = 60` becomes `--batch-size 60`.

    Fields are int, float, str, `Literal[...]`, tuples of one of these (`--seeds 0,1,2`), or any of
    them `| None`; a bool that is False by default is a flag without a value.
    The help of a field is its metadata `{"help": ...}`, see `flag`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {getattr(sys.modules['__main__'].__spec__, 'name', None) or Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(typing.cast("Any", config)):
        if hints[field.name] is bool:
            name = f"--{field.name.replace('_', '-')}"
            parser.add_argument(name, action="store_true", help=field.metadata["help"])
            continue
        kind, choices = _reader(hints[field.name])
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "" if field.default is None else f" (default: {shown})"
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            choices=choices,
            default=field.default,
            help=field.metadata["help"] + default,
            metavar=None if choices else kind.__name__,
        )
    return config(**vars(parser.parse_args(argv)))


def flag(default: Any, text: str) -> Any:
    """A field of a config with its help."""
    return dataclasses.field(default=default, metadata={"help": text})


class Results:
    """A folder of results: `results.jsonl`, one line per figure, and plots beside it.

    Every line holds the study, the whole config and the versions, so that a line moved elsewhere
    still says what it is. An earlier run's lines in the same folder are replaced.
    """

    def __init__(self, folder: str | Path, study: str, config: Any):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "results.jsonl"
        self._common = {"study": study, "config": dataclasses.asdict(config), "versions": versions()}
        self._file = self.path.open("w", encoding="utf-8")

    def write(self, **figures: Any) -> None:
        """Appends a line and flushes it, so that a killed run leaves what it had."""
        self._file.write(json.dumps(figures | self._common) + "\n")
        self._file.flush()

    def __enter__(self) -> "Results":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def versions() -> dict[str, str]:
    """The versions and the device that a figure depends on."""
    packages = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy")
    found = {package: version(package) for package in packages}
    return found | {"python": platform.python_version(), "device": jax.devices()[0].device_kind}


def _reader(hint: Any) -> tuple[Any, tuple | None]:
    """How to read a flag of a type, and the values it may take."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _reader(next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return str, arguments
    if origin is tuple:
        item, _ = _reader(arguments[0])

        def items(text: str) -> tuple:
            return tuple(item(part) for part in text.split(",") if part)

        items.__name__ = f"{item.__name__},..."
        return items, None
    return hint, None
