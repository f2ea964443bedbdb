"""The commands of the experiments, by the name after `python -m experiments.`."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

_FOLDER = Path(__file__).parents[2] / "experiments"


def study_names() -> list[str]:
    """Return each study: a module at the top, or a folder that runs."""
    modules = {path.stem for path in _FOLDER.glob("[!_]*.py")}
    return sorted(modules | {path.parent.name for path in _FOLDER.glob("*/__main__.py")} - {"benchmarks"})


def benchmark_names() -> list[str]:
    """Return each benchmark, and what runs all of them."""
    modules = sorted(path.stem for path in (_FOLDER / "benchmarks").glob("[!_]*.py"))
    return ["benchmarks", *(f"benchmarks.{name}" for name in modules)]


def command_module(name: str) -> ModuleType:
    """Return the module that `python -m experiments.NAME` runs."""
    module = importlib.import_module(f"experiments.{name}")
    return importlib.import_module(f"{module.__name__}.__main__") if hasattr(module, "__path__") else module
