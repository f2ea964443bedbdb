"""Compiled programs that are found again by what they compute, in place of the function that they come from.

The layers of a network are often alike: the jaxpr of one differs from that of the next in its variables
alone. So a program is looked up by the text of its jaxpr. A network of many equal layers compiles as many
programs as one of two, and a second run with the same shapes compiles none.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.tracing.jaxprs import nested_jaxprs

_SMALL = 4096
"""The most entries of a constant that is compared by its content."""


class Programs:
    """The programs compiled so far, those used last.

    Args:
      most: how many are kept.
    """

    def __init__(self, most: int = 256):
        self._most = most
        self._compiled: OrderedDict[Any, tuple[Callable[..., Any], Any]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._compiled)

    def compiled(
        self, function: Callable[..., Any], *example: Any, donate: bool = False
    ) -> Callable[..., Any]:
        """Return a compiled function of arguments like the example.

        Arrays that the function closes over become inputs of the program. With `donate` the program may write
        what it returns over its first argument, which must not be used any more.
        """
        from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*example)
        treedef = jax.tree.structure(shapes)
        # Constants inside the jaxprs of equations are not part of the text, and numbers may be rounded in it.
        every = list(nested_jaxprs(closed))
        inner = [const for one in every for const in one.consts][len(closed.consts) :]
        atoms: Any = [atom for one in every for eqn in one.jaxpr.eqns for atom in eqn.invars]
        atoms += [atom for one in every for atom in one.jaxpr.outvars]
        numbers = [np.asarray(atom.val) for atom in atoms if hasattr(atom, "val")]
        key = (str(closed.jaxpr), tuple(map(_identity, numbers)), tuple(map(_identity, inner)), donate)
        if key not in self._compiled:
            jaxpr = closed.jaxpr  # without the arrays, which would be kept as long as the program

            def run(first: Any, consts: Any, rest: Any) -> Any:
                return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*first, *rest)

            run.__name__ = function.__name__  # the name of the program in profiles
            self._compiled[key] = jax.jit(run, donate_argnums=0 if donate else ()), inner
            if len(self._compiled) > self._most:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        run, _ = self._compiled[key]
        consts = list(closed.consts)

        def call(*arguments: Any) -> Any:
            first, *rest = arguments
            return treedef.unflatten(run(jax.tree.leaves(first), consts, jax.tree.leaves(rest)))

        return call


def _identity(const: Any) -> Any:
    """Return what tells a constant from others: its content if it is small, else itself."""
    concrete = isinstance(const, (np.ndarray, jax.Array)) and not isinstance(const, Tracer)
    if concrete and const.size <= _SMALL and not jnp.issubdtype(const.dtype, jax.dtypes.extended):
        array = np.asarray(const)
        return array.dtype.name, array.shape, array.tobytes()
    return id(const)  # the program keeps it, so that no other can have the same number


PROGRAMS = Programs()
"""Those of all runs in this process."""
