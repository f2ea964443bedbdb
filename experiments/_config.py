"""A study's settings: a frozen dataclass whose fields are its command-line flags."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments import _recipes
from jaxprune.recipes import RecipeError

C = TypeVar("C")


def parse(config: type[C], argv: Sequence[str] | None = None, description: str | None = None) -> C:
    """Reads flags into a config: field `batch_size: int = 60` becomes `--batch-size 60`.

    Fields are int, float, str, `Literal[...]`, tuples of one of these (`--seeds 0,1,2`), or any of
    them `| None`; a bool that is False by default is a flag without a value.
    The help of a field is its metadata `{"help": ...}`, see `flag`.

    `--recipe FILE` takes the settings that an earlier run left in its `recipe.yaml`; flags beside it
    win. A config with a field made by `recipe_file` takes that file without a flag.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {getattr(sys.modules['__main__'].__spec__, 'name', None) or Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fields = dataclasses.fields(typing.cast("Any", config))
    hints = typing.get_type_hints(config)
    files = [field for field in fields if _recipes.is_file(field)]
    for field in files:
        parser.add_argument(field.name, metavar="RECIPE", help=field.metadata["help"])
    if not files:
        text = "take the settings from the recipe.yaml of an earlier run; flags given beside it win"
        parser.add_argument("--recipe", metavar="FILE", help=text)
    for field in fields:
        if field in files:
            continue
        if hints[field.name] is bool:
            name = f"--{field.name.replace('_', '-')}"
            action = argparse.BooleanOptionalAction
            parser.add_argument(name, action=action, default=field.default, help=field.metadata["help"])
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
    recipe = getattr(parser.parse_args(argv), files[0].name if files else "recipe")
    if recipe is not None:
        try:
            parser.set_defaults(**_recipes.settings(recipe, config))
        except (RecipeError, OSError) as error:
            raise SystemExit(str(error)) from None
    given = vars(parser.parse_args(argv))
    return config(**{field.name: given[field.name] for field in fields})


def recipe_file(text: str) -> Any:
    """The field of a config that is the file of a recipe, with its help; the first of its fields."""
    return dataclasses.field(metadata={"help": text, "file": True})


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
