"""What of jaxprune is public, found by inspection."""

import inspect
from collections.abc import Iterator
from typing import Any

import jaxprune as jp


def functions() -> Iterator[str]:
    """The names of all public functions, and of those of public modules."""
    for name in jp.__all__:
        value = getattr(jp, name)
        if inspect.ismodule(value):
            own = getattr(value, "__all__", None) or defined_in(value)
            yield from (f"{name}.{inner}" for inner in own if inspect.isfunction(getattr(value, inner)))
        elif inspect.isfunction(value):
            yield name


def makers() -> Iterator[str]:
    """The names of all public functions, and methods of public classes, that return a `Pruner`."""
    owners = {"": jp} | {
        f"{name}.": getattr(jp, name) for name in jp.__all__ if inspect.ismodule(getattr(jp, name))
    }
    for prefix, owner in owners.items():
        for name in jp.__all__ if owner is jp else defined_in(owner):
            member = getattr(owner, name)
            if inspect.isclass(member):
                methods = inspect.getmembers(member, inspect.isfunction)
                found = [f"{prefix}{name}.{m}" for m, f in methods if m[0] != "_" and gives_a_pruner(f)]
                yield from found
            elif inspect.isfunction(member) and gives_a_pruner(member):
                yield f"{prefix}{name}"


def defined_in(module: Any) -> list[str]:
    """The public functions and classes of a module, or of the package it is."""
    inside = module.__name__ if not hasattr(module, "__path__") else f"{module.__name__}."
    return [
        name
        for name, member in inspect.getmembers(module, lambda m: inspect.isfunction(m) or inspect.isclass(m))
        if name[0] != "_" and f"{member.__module__}.".startswith(inside)
    ]


def gives_a_pruner(function: Any) -> bool:
    returns = inspect.signature(function).return_annotation
    assert returns is not inspect.Signature.empty, f"{function.__qualname__} does not say what it returns"
    return "Pruner" in str(getattr(returns, "__name__", returns)).replace("PrunerState", "")
