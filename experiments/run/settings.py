"""A study's settings: a frozen dataclass whose fields are its command-line flags."""

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from experiments.run import saved_recipes
from experiments.run.limits import Bound, FlagError, Limits, flag_name, shown
from jaxprune.recipes import RecipeError

C = TypeVar("C")


def parse(config: type[C], argv: Sequence[str] | None = None, description: str | None = None) -> C:
    """Reads flags into a config: field `batch_size: int = 60` becomes `--batch-size 60`.

    Fields are int, float, str, `Literal[...]`, tuples of one of these (`--seeds 0,1,2`), or any of
    them `| None`; a bool that is False by default is a flag without a value. What a value may be is
    declared beside the field, see `flag`; any other ends the command with a sentence that says so.

    `--recipe FILE` takes the settings that an earlier run left in its `recipe.yaml`; flags beside it
    win. A config with a field made by `recipe_file` takes that file without a flag.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {getattr(sys.modules['__main__'].__spec__, 'name', None) or Path(sys.argv[0]).stem}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    fields = dataclasses.fields(typing.cast("Any", config))
    hints = typing.get_type_hints(config)
    files = [field for field in fields if saved_recipes.is_file(field)]
    for field in files:
        parser.add_argument(field.name, metavar="RECIPE", help=field.metadata["help"])
    if not files:
        text = "take the settings from the recipe.yaml of an earlier run; flags given beside it win"
        parser.add_argument("--recipe", metavar="FILE", help=text)
    for field in fields:
        if field in files:
            continue
        text, name = field.metadata["help"], flag_name(field.name)
        if hints[field.name] is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(name, action=action, default=field.default, help=text)
            continue
        kind, read = _reader(hints[field.name])
        value = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        parser.add_argument(
            name,
            type=read,
            default=field.default,
            help=text if field.default is None else f"{text} (default: {value})",
            metavar=kind,
        )
    recipe = getattr(parser.parse_args(argv), files[0].name if files else "recipe")
    if recipe is not None:
        try:
            parser.set_defaults(**saved_recipes.settings(recipe, config))
        except (RecipeError, OSError) as error:
            raise SystemExit(str(error)) from None
    given = vars(parser.parse_args(argv))
    for field in fields:
        if given[field.name] == []:  # what argparse makes of `--epochs=--`
            parser.error(f"argument {flag_name(field.name)}: expected one argument")
    parsed = config(**{field.name: given[field.name] for field in fields})
    if wrong := _problem(parsed):
        parser.error(f"argument {wrong}")
    return parsed


def check_limits(config: Any) -> None:
    """Checks the fields of a config that was made in Python, as `parse` checks flags.

    Raises:
      FlagError: a value that is beyond what is declared beside its field.

    Example:
      >>> from experiments.gradual import Config
      >>> check_limits(Config(sparsities=(0.5, 1.0)))
      Traceback (most recent call last):
      experiments.run.limits.FlagError: --sparsities: must be 0 or more and below 1, got 1.0
    """
    if wrong := _problem(config):
        raise FlagError(wrong)


def _problem(config: Any) -> str | None:
    """The first flag whose value is beyond its limits, and what is wrong with it."""
    hints, values = typing.get_type_hints(type(config)), vars(config)
    fields = [field for field in dataclasses.fields(config) if not saved_recipes.is_file(field)]
    limits = {field.name: field.metadata["limits"] for field in fields}
    limits = {name: each._replace(among=_choices(hints[name]) or each.among) for name, each in limits.items()}
    by_itself = ((name, each.problem(values[name])) for name, each in limits.items())
    beside = ((name, each.beside(values[name], values)) for name, each in limits.items())
    return next((f"{flag_name(name)}: {wrong}" for name, wrong in chain(by_itself, beside) if wrong), None)


def recipe_file(text: str) -> Any:
    """The field of a config that is the file of a recipe, with its help; the first of its fields."""
    return dataclasses.field(metadata={"help": text, "file": True})


def flag(
    default: Any,
    text: str,
    *,
    at_least: Bound = None,
    above: Bound = None,
    at_most: Bound = None,
    below: Bound = None,
    among: Sequence[str] = (),
    repeats: bool = False,
    empty: bool = False,
    path: Literal["folder", "file"] | None = None,
) -> Any:
    """A field of a config with its help, and what its value may be.

    The limits of a tuple are those of each item. Whatever is declared, numbers are finite, whole ones
    below 2^31, and texts are printable and not empty.

    Args:
      default: the value where the flag is not given.
      text: what `--help` says of it.
      at_least, above, at_most, below: bounds of a number; the name of another field for its value,
        as in `flag(3, "of these ...", below="epochs")`.
      among: the texts that are allowed.
      repeats: whether a tuple may have the same item twice.
      empty: whether a tuple may have no items.
      path: whether a text is a folder, or a file, to write to, which must be possible then.
    """
    limits = Limits(at_least, above, at_most, below, tuple(among), repeats, empty, path)
    return dataclasses.field(default=default, metadata={"help": text, "limits": limits})


def _choices(hint: Any) -> tuple[str, ...]:
    """The texts that a type allows; none if it is no `Literal`, nor has one."""
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return next(filter(None, map(_choices, typing.get_args(hint))), ())


def _reader(hint: Any) -> tuple[str, Callable[[str], Any]]:
    """What a value of a type is called, and how it is read."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return _reader(next(a for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return f"{{{','.join(arguments)}}}", str
    if origin is tuple:
        name, read = _reader(arguments[0])
        return f"{name},...", lambda text: tuple(map(read, text.split(","))) if text else ()

    def scalar(text: str) -> Any:
        try:
            return hint(text)
        except ValueError:
            wanted = "a whole number" if hint is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {shown(text)}") from None

    return hint.__name__, scalar
