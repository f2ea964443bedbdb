"""The public names of jaxprune, found by inspection."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jaxprune as jp


def modules() -> dict[str, Any]:
    """Return the public modules by name."""
    return {name: getattr(jp, name) for name in jp.__all__ if inspect.ismodule(getattr(jp, name))}


def names(module: Any) -> list[str]:
    """Return the public names of a module: its `__all__`, else the functions and classes that it defines."""
    if "__all__" in vars(module):
        return list(module.__all__)
    return [
        name
        for name, member in vars(module).items()
        if name[0] != "_" and getattr(member, "__module__", None) == module.__name__
        if inspect.isfunction(member) or inspect.isclass(member)
    ]


def members() -> Iterator[tuple[str, Any]]:
    """Yield every public name and what it stands for; those of public modules as `module.name`."""
    yield from ((name, getattr(jp, name)) for name in jp.__all__ if not inspect.ismodule(getattr(jp, name)))
    for name, module in modules().items():
        yield from ((f"{name}.{inner}", getattr(module, inner)) for inner in names(module))


def functions() -> dict[str, Callable[..., Any]]:
    """Return the public functions by name; one with several names has the first."""
    found = {}
    for name, member in members():
        if inspect.isfunction(member) and member not in found.values():
            found[name] = member
    return found


def makers() -> Iterator[str]:
    """Yield the names of public functions and of methods of public classes that return a `Pruner`."""
    for name, member in members():
        if inspect.isclass(member):
            methods = inspect.getmembers(member, inspect.isfunction)
            yield from (f"{name}.{inner}" for inner, f in methods if inner[0] != "_" and gives_a_pruner(f))
        elif inspect.isfunction(member) and gives_a_pruner(member):
            yield name


def gives_a_pruner(function: Callable[..., Any]) -> bool:
    returns = inspect.signature(function).return_annotation
    assert returns is not inspect.Signature.empty, f"{function.__qualname__} does not say what it returns"
    return "Pruner" in str(getattr(returns, "__name__", returns)).replace("PrunerState", "")
