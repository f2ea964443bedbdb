"""A study's settings: a frozen dataclass whose fields are its command-line flags."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

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
