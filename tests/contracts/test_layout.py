"""The library's rooms: imports point one way, and names say where things are."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

import jaxprune as jp
from tests.contracts import public

ROOT = Path(jp.__file__).parent

ORDER = (
    *("typing", "tree", "tracing", "selection", "counting", "schedules", "files", "quantization"),
    *("graph.engine", "graph", "graph.modules", "io", "scores", "structures", "pruning", "sizing.result"),
    *("distributions", "sizing", "training", "calibration", "metrics", "penalties", "l0", "lora"),
    *("distillation", "sparse", "export", "recipes", "plots"),
)
"""The rooms, each of which may import those before it."""

UPWARD = {"jaxprune.sizing.result -> plots": "`Sensitivity.plot` imports it when it is called"}
"""The imports that point the other way, and why."""

SAME_NAME = {"jaxprune.graph.engine.rules.elementwise": "the module of the rule `elementwise`"}
"""The modules that their package hides behind another thing of that name, and why."""


def modules() -> Iterator[str]:
    """Yield the names of all modules of the library, without the package itself."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        if name := ".".join(parts).removesuffix(".__init__").removeprefix("jaxprune").lstrip("."):
            yield f"jaxprune.{name}"


def room_of(module: str) -> str:
    """Return the room that a module, or a name in it, lies in."""
    inside = module.removeprefix("jaxprune.") + "."
    return max((room for room in ORDER if inside.startswith(f"{room}.")), key=len, default="")


def imported(module: str) -> Iterator[str]:
    """Yield what a module imports from jaxprune, anywhere in its code: in functions and for types too."""
    for node in ast.walk(ast.parse(inspect.getsource(importlib.import_module(module)))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("jaxprune"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxprune"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_lies_in_a_room():
    strangers = sorted(module for module in modules() if not room_of(module))
    assert not strangers, (
        f"{', '.join(strangers)}: give it a room, or the room a place in ORDER of {__file__}."
    )


def test_imports_point_one_way():
    upward = set()
    for module in modules():
        room = room_of(module)
        for name in imported(module):
            other = room_of(name)
            # A package's `__init__` gathers the public names of the rooms inside it.
            gathers = module == f"jaxprune.{room}" and other.startswith(f"{room}.")
            if other and ORDER.index(other) > ORDER.index(room) and not gathers:
                upward.add(f"{module} -> {other}")
    assert upward == UPWARD.keys(), (
        "a room imports a later one; move what is shared down, or say why in UPWARD"
    )


def test_no_module_hides_behind_a_name_of_its_package():
    """`import jaxprune.a.b` and the attribute `jaxprune.a.b` are the same thing."""
    hidden = set()
    for module in modules():
        package, _, name = module.rpartition(".")
        if getattr(importlib.import_module(package), name, None) is not importlib.import_module(module):
            hidden.add(module)
    assert hidden == SAME_NAME.keys()


def test_no_module_has_the_name_of_a_function_that_the_package_exports():
    functions = {name for name in public.functions() if "." not in name}
    same = sorted(module for module in modules() if module.rpartition(".")[2] in functions)
    assert not same, f"{', '.join(same)}: name it for what it holds, not for its function."


@pytest.mark.parametrize("name", public.modules())
def test_a_public_module_lists_its_names(name):
    module = public.modules()[name]
    assert module.__all__ == sorted(module.__all__), "the names of __all__ are in the order of the alphabet"
    assert all(hasattr(module, inner) for inner in module.__all__)


def test_dir_shows_public_names_only():
    assert {name for name in dir(jp) if not name.startswith("__")} == set(jp.__all__)


def test_the_tests_lie_in_the_same_rooms():
    tests = ROOT.parent / "tests"
    rooms = {path.stem for path in ROOT.iterdir() if path.is_dir() or path.suffix == ".py"}
    found = {path.name for path in tests.iterdir() if any(path.glob("test_*.py"))}
    found |= {path.stem.removeprefix("test_") for path in tests.glob("test_*.py")}
    # Files and numbers of 8 bits are tested where they are written, types where they are used.
    missing = rooms - found - {"__init__", "__pycache__", "typing", "files", "quantization", "plots"}
    assert not missing, (
        f"{sorted(missing)}: there is no folder tests/ROOM with tests, and no tests/test_ROOM.py"
    )
    strangers = found - rooms - {"contracts", "docs", "hostile", "soak", "studies"}
    assert not strangers, f"tests of {sorted(strangers)} lie in no room of the library"
