"""A study's settings: a frozen dataclass that checks itself, and whose fields are command-line flags.

    @dataclass(frozen=True)
    class Config(Settings):
        seeds: Seeds = (0, 1, 2)  # the runs that figures are averaged over
        epochs: Count = 13  # the budget of every method
        tune_epochs: Natural = 3  # epochs of these for fine-tuning

        def __post_init__(self):
            super().__post_init__()
            self.at_most("tune_epochs", "epochs")

The types say what a value may be, the comments are what `--help` says.
"""

import dataclasses
import operator
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from experiments.run.limits import FlagError, OneOf, Range, Writable, find, flag_name, problem, unwritable

Count = Annotated[int, Range(at_least=1)]
Natural = Annotated[int, Range(at_least=0)]
BatchSize = Annotated[int, Range(at_least=1, at_most=100_000)]
Positive = Annotated[float, Range(above=0)]
Sparsity = Annotated[float, Range(at_least=0, below=1)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
Seeds = tuple[Natural, ...]
Folder = Annotated[str, Writable("folder")]
File = Annotated[str, Writable("file")]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The base of every study's `Config`: values beyond what the types allow are refused.

    Attributes:
      repeats: whether a run leaves a `recipe.yaml` that repeats it.

    Raises:
      FlagError: a value that is not allowed.

    Example:
      >>> from experiments.gradual import Config
      >>> Config(sparsities=(0.5, 1.0))
      Traceback (most recent call last):
      experiments.run.limits.FlagError: --sparsities: must be 0 or more and below 1, got 1.0
    """

    repeats = True

    def __post_init__(self):
        """Check each field by itself; a study adds what holds between fields."""
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            if wrong := problem(hint, getattr(self, name)):
                raise FlagError(f"{flag_name(name)}: {wrong}")

    def at_most(self, name: str, other: str) -> None:
        """Refuse a field, or an item of it, above another field; None goes with anything."""
        self._compare(operator.le, "at most", name, other)

    def below(self, name: str, other: str) -> None:
        """Refuse a field, or an item of it, that is not below another field; None goes with anything."""
        self._compare(operator.lt, "below", name, other)

    def _compare(self, holds: Callable[[Any, Any], bool], words: str, name: str, other: str) -> None:
        value, bound = getattr(self, name), getattr(self, other)
        for item in value if isinstance(value, tuple) else (value,):
            if None not in (item, bound) and not holds(item, bound):
                raise FlagError(
                    f"{flag_name(name)}: must be {words} {bound} ({flag_name(other)}), got {item}"
                )


C = TypeVar("C", bound=Settings)


def parse(
    config: type[C], argv: Sequence[str] | None = None, description: str | None = None, word: str = ""
) -> C:
    """Read flags into a config: field `batch_size: int = 60` becomes `--batch-size 60`.

    Tuples are written with commas, `--seeds 0,1,2`, and a bool is a flag without a value. `--recipe FILE`
    takes the settings that an earlier run left in its `recipe.yaml`; flags beside it win. A config with a
    field `recipe` of its own takes that file without a flag. `word` is what stands before the flags, if a
    command has several.

    Raises:
      SystemExit: of status 2 with one sentence that names the flag, what was got and what is allowed.
    """
    import tyro

    from experiments.run import saved_recipes
    from jaxprune.recipes import RecipeError

    program = getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).stem
    program = f"{program.removesuffix('.__main__')} {word}".rstrip()
    text = "take the settings from the recipe.yaml of an earlier run; flags given beside it win"
    own = [field.name for field in dataclasses.fields(config)]
    option = dataclasses.field(default=None, metadata={"help": text})
    recipe = ("recipe", tyro.conf.Positional[str]) if "recipe" in own else ("recipe", str | None, option)
    # The same fields without the checks, which come once all flags are read. Under the same name in the same
    # module tyro finds the comments of the class it stands for.
    flags = dataclasses.make_dataclass(
        config.__name__,
        [recipe] if config.repeats else [],
        bases=(config,),
        frozen=True,
        namespace={"__post_init__": lambda self: None, "__module__": config.__module__},
    )

    def read(**default: Any) -> Any:
        return tyro.cli(
            flags,
            prog=f"python -m {program}",
            description=description,
            args=None if argv is None else list(argv),
            registry=_registry(),
            **({"default": flags(**default)} if default else {}),
        )

    found = read()
    try:
        if (
            config.repeats
            and found.recipe is not None
            and (earlier := saved_recipes.settings(found.recipe, config))
        ):
            found = read(**earlier, **({"recipe": found.recipe} if "recipe" in own else {}))
        made = config(**{name: getattr(found, name) for name in own})
        for name, hint in typing.get_type_hints(config, include_extras=True).items():
            path, value = find(hint, Writable), getattr(made, name)
            if path and value is not None and (wrong := unwritable(value, path.kind)):
                raise FlagError(f"{flag_name(name)}: {wrong}")
    except FlagError as error:
        fail(str(error))
    except (RecipeError, OSError) as error:
        raise SystemExit(str(error)) from None
    return made


def fail(message: str) -> typing.NoReturn:
    """End the command with status 2 and a sentence about a flag."""
    print(f"error: argument {message}", file=sys.stderr)
    raise SystemExit(2)


def _registry() -> Any:
    """Return how tyro reads values: a text for each field, which is kept as it is where it cannot be read.

    `Settings` refuses such a text later, and knows the name of the flag.
    """
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: Any) -> Any:
        if info.type is bool:
            return None  # a flag without a value
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=_metavar(info.type),
            instance_from_str=lambda texts: _read(info.type, texts[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [
                ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            ],
        )

    return registry


def _read(hint: Any, text: str) -> Any:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Annotated, types.UnionType, typing.Union):
        return _read(parts[0], text)
    if origin is tuple:
        return tuple(_read(parts[0], item) for item in text.split(",")) if text else ()
    try:
        return hint(text) if hint in (int, float) else text
    except ValueError:
        return text


def _metavar(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        return f"{_metavar(parts[0])},..."
    if origin is typing.Literal:
        return f"{{{','.join(parts)}}}"
    if chosen := find(hint, OneOf):
        return f"{{{','.join(chosen.choices)}}}"
    return _metavar(parts[0]) if parts else getattr(hint, "__name__", str(hint)).upper()
