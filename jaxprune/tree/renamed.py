"""Names of earlier releases: reaching one raises an error that says what to write."""

from collections.abc import Callable, Mapping
from typing import Any


def renamed(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a module that lost names.

    Args:
      module: the module's full name.
      names: by the name that is gone, what to write instead.

    Example:
      >>> import jaxprune as jp
      >>> try:
      ...     jp.graph.compact
      ... except AttributeError as error:
      ...     print(error)
      jaxprune.graph.compact is gone since 0.2: write jaxprune.compact.
    """

    def getattr_(name: str) -> Any:
        if name in names:
            raise AttributeError(f"{module}.{name} is gone since 0.2: write {names[name]}.")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return getattr_
