"""Recipes of studies: the settings that repeat a run, and what each of its methods prunes by.

A run leaves `recipe.yaml` beside its results. `--recipe` of the same study takes its settings from there;
flags given beside it win. What the pruners of a study follow is in `recipes/`, a file for each, which
`jaxprune.recipes.load` reads and `experiments.recipe` runs on other data and networks.
"""

import dataclasses
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.run.limits import problem
from jaxprune.recipes import Recipe
from jaxprune.recipes.document import Node, from_yaml, to_yaml
from jaxprune.recipes.options import read
from jaxprune.recipes.recipe import VERSION, check_version, read_text

_KEYS = ("version", "study", "config", "prune", "calibrate", "distillation", "stop")


def study_of(config: type) -> str:
    """Return the name of the study a config belongs to: its module's, as in `gradual`.

    Example:
      >>> from experiments.gradual import Config
      >>> study_of(Config)
      'gradual'
    """
    module = config.__module__
    if module == "__main__":
        module = getattr(sys.modules["__main__"].__spec__, "name", None) or Path(sys.argv[0]).stem
    return module.removeprefix("experiments.").removesuffix(".study").removesuffix(".command")


def study_text(study: str, config: Any, recipe: Mapping[str, Any] | None = None) -> str:
    """Return `recipe.yaml`: the study, all its settings, and the recipe that it was given, if it was."""
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if not is_file(f)}
    settings.pop("fresh", None)  # to repeat a run is not to start over each time
    pruning = {
        key: value for key, value in (recipe or {}).items() if key not in ("version", "study", "config")
    }
    return to_yaml({"version": VERSION, "study": study, "config": settings, **pruning})


def plain_settings(text: str) -> dict[str, Any]:
    """Return what `study_text` wrote, in one dict: two runs with the same are the same.

    Raises:
      RecipeError: it is something else.
    """
    data = from_yaml(text, "recipe.yaml").plain()
    return {key: value for key, value in data.items() if key != "config"} | data["config"]


def save_method(folder: str | Path, name: str, recipe: Recipe) -> None:
    """Write what a method of a study prunes by, as `recipes/NAME.yaml`."""
    path = Path(folder) / "recipes" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe.to_yaml(), encoding="utf-8")


def is_file(field: dataclasses.Field) -> bool:
    """Return whether a field of a config is the file of a recipe, which is given without a flag."""
    return field.name == "recipe"


def settings(path: str, config: type) -> dict[str, Any]:
    """Return the settings in a recipe of a study, checked against the fields of its config.

    Raises:
      RecipeError: what is wrong, with the line and the key; a recipe of another study among it.
      OSError: the file cannot be read.
    """
    study, root = study_of(config), from_yaml(read_text(path), path)
    fields = root.fields(_KEYS)
    check_version(fields)
    takes_recipes = any(map(is_file, dataclasses.fields(config)))
    if "study" not in fields and "config" not in fields:
        if takes_recipes:
            return {}
        root.fail(
            f"it has no settings of a study; what it prunes by is run by python -m experiments.recipe {path}"
        )
    written = _get(root, fields, "study").text()
    if written != study:
        wanted = "" if written == "recipe" else "--recipe "
        fields["study"].fail(f"this is of another study: run python -m experiments.{written} {wanted}{path}")
    if not takes_recipes and (
        extra := [key for key in ("prune", "calibrate", "distillation", "stop") if key in fields]
    ):
        fields[extra[0]].fail(f"the study {study} has its own pruning: this would not be used.")
    hints = typing.get_type_hints(config)
    names = [f.name for f in dataclasses.fields(config) if not is_file(f)]
    nodes = _get(root, fields, "config").fields(names, what="settings")
    found = {name: read(node, hints[name]) for name, node in nodes.items()}
    stated = typing.get_type_hints(config, include_extras=True)
    for name, value in found.items():
        if wrong := problem(stated[name], value):
            nodes[name].fail(f"{wrong}.")
    return found


def _get(root: Node, fields: dict[str, Node], key: str) -> Node:
    if key not in fields:
        root.fail(f"{key} must be given as well; got {root.described()}.")
    return fields[key]
