"""Compiled programs that are found again by what they compute, in place of the function that they come from.

The layers of a network are often alike: the jaxpr of one differs from that of the next in its variables alone. So a
program is looked up by the text of its jaxpr, and a network of many equal layers compiles as many programs as one of
two.
"""

from collections.abc import Callable
from typing import Any

import jax

from jaxprune.tracing.jaxprs import nested_jaxprs


class Programs:
    """The programs compiled so far."""

    def __init__(self):
        self._compiled: dict[Any, tuple[Callable[..., Any], Any]] = {}

    def __len__(self) -> int:
        return len(self._compiled)

    def compiled(self, function: Callable[..., Any], *example: Any) -> Callable[..., Any]:
        """Return a compiled function of arguments like the example.

        Arrays that the function closes over become inputs of the program.
        """
        from jax.extend.core import jaxpr_as_fun

        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*example)
        treedef = jax.tree.structure(shapes)
        # Constants inside the jaxprs of equations are not part of the text, and are told apart by identity.
        inner = [const for one in nested_jaxprs(closed) for const in one.consts][len(closed.consts) :]
        key = (str(closed.jaxpr), tuple(map(id, inner)))
        if key not in self._compiled:

            def run(consts: Any, arrays: Any) -> Any:
                return jaxpr_as_fun(closed.replace(consts=consts))(*arrays)

            run.__name__ = function.__name__  # the name of the program in profiles
            self._compiled[key] = jax.jit(run), inner
        run, _ = self._compiled[key]
        consts = list(closed.consts)

        def call(*arguments: Any) -> Any:
            return treedef.unflatten(run(consts, jax.tree.leaves(arguments)))

        return call
