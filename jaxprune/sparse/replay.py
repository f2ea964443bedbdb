"""A network with some of its kernels in other forms, run by replaying its jaxpr."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxprune.sparse.choice import Chosen, Kernel
from jaxprune.sparse.layers import layer, sparse
from jaxprune.tracing.dataflow import Product, Visitor, materialised, param, visit_products
from jaxprune.tracing.jaxprs import abstract, binder, of_first, split_static, trace
from jaxprune.tree.checks import check_function
from jaxprune.tree.leaves import is_array
from jaxprune.tree.paths import leaf_paths


class SparseParams(NamedTuple):
    """The params of a sparse network: a pytree, to be passed through `jit` as an argument.

    Attributes:
      leaves: by path, the masked params that the network still reads dense.
      kernels: by path, the arrays of the kernels stored in another form.
    """

    leaves: dict[str, Any]
    kernels: dict[str, Any]


class Network:
    """A function of params that can be run with some of its kernels in other forms."""

    def __init__(self, function: Callable[..., Any], treedef: Any, leaves: dict[str, Any]):
        check_function(function, "sparsify", "apply_fn(params, *inputs)")
        self.function, self.treedef, self.leaves = function, treedef, leaves
        self.shapes = treedef.unflatten([abstract(leaf) for leaf in leaves.values()])

    def traced(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Return the function for inputs of some shapes, as `run(leaves, arrays, visitor)`.

        With `arrays=None` it only visits the equations, and returns None.
        """
        trees = []

        def flat(*arguments: Any) -> list[Any]:
            out, tree = jax.tree.flatten(self.function(*arguments))
            trees.append(tree)
            return out

        closed, order = trace(flat, (self.shapes, *inputs))

        def run(leaves: Mapping[str, Any], arrays: Mapping[str, Any] | None, visitor: Visitor) -> Any:
            def value(name: str) -> Any:
                path = of_first(name)
                if path is not None:
                    return param(path, lambda: leaves[path])
                first, _, rest = name.partition("/")
                number = f"{int(first) - 1}" + (f"/{rest}" if rest else "")
                return None if arrays is None else arrays[number]

            outputs = visit_products(closed, [value(name) for name in order], visitor)
            if arrays is None:
                return None
            return trees[-1].unflatten([jnp.asarray(materialised(output)) for output in outputs])

        run.traced = any(isinstance(const, Tracer) for const in closed.consts)  # type: ignore[attr-defined]
        return run

    def stored(
        self, kernels: Mapping[str, Kernel], chosen: Mapping[str, Chosen], inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], SparseParams]:
        """Return the function of `SparseParams`, and the `SparseParams`."""
        forms = {key: (kernels[key].label, one.form) for key, one in chosen.items() if one.arrays is not None}
        stored = {kernels[key].label: jax.tree.map(jnp.asarray, chosen[key].arrays) for key in forms}
        apply = _applied(self, forms)
        read: set[str] = set()
        everything = SparseParams(self.leaves, stored)
        traced = self.traced(inputs)

        def watched(params: SparseParams, arrays: Any) -> Any:
            return traced(_Watched(params.leaves, read), arrays, _visitor(params.kernels, forms))

        jax.eval_shape(watched, everything, split_static(inputs)[0])
        # A param with a kernel in another form is left out, unless something still reads it dense.
        whole = {path for path in self.leaves if path not in {kernels[key].path for key in forms}}
        leaves = {path: leaf for path, leaf in self.leaves.items() if path in read | whole}
        return apply, SparseParams(leaves, stored)


class _Watched(dict):
    """Leaves by path; it notes which are read."""

    def __init__(self, leaves: Mapping[str, Any], read: set[str]):
        super().__init__(leaves)
        self._read = read

    def __getitem__(self, path: str) -> Any:
        self._read.add(path)
        return super().__getitem__(path)


class _Left(dict):
    """Leaves by path, without those stored in a sparse form alone."""

    def __missing__(self, path: str) -> Any:
        raise ValueError(
            f"for inputs of these shapes the function reads params[{path!r}] in another way than for those "
            "that sparsify saw, and it is stored in a sparse form alone. Call sparsify with inputs like "
            f"these, or choose 'dense' for {path!r}."
        )


def _visitor(stored: Mapping[str, Any], forms: Mapping[str, tuple[str, str]]) -> Visitor:
    def product(product: Product, other: Any) -> list[Any] | None:
        made = layer(product)
        if isinstance(made, str) or made.key not in forms:
            return None
        label, form = forms[made.key]
        return [sparse(made, form, stored[label], other)]

    return Visitor(product, lambda eqn, args: binder(eqn)(*map(materialised, args)))


def _applied(network: Network, forms: Mapping[str, tuple[str, str]]) -> Callable[..., Any]:
    programs: dict[Any, tuple[Callable[..., Any], list[tuple[int, str]]]] = {}

    def apply(params: SparseParams, *inputs: Any) -> Any:
        if not isinstance(params, SparseParams):
            raise TypeError(
                f"apply takes the .params of what sparsify returned, got a {type(params).__name__}."
            )
        leaves, treedef = jax.tree.flatten(inputs)
        key = (treedef, tuple(_signature(leaf) for leaf in leaves), jnp.result_type(float))
        if key not in programs:
            traced, arrays = network.traced(inputs), split_static(inputs)[0]

            def run(params: SparseParams, arrays: Any) -> Any:
                return traced(_Left(params.leaves), arrays, _visitor(params.kernels, forms))

            if (
                traced.traced
            ):  # it closes over values of the trace around it, so it is good for this call only
                return run(params, arrays)
            names = [(number, name) for number, name in enumerate(leaf_paths(inputs)) if name in arrays]
            programs[key] = jax.jit(run), names
        program, names = programs[key]
        return program(params, {name: leaves[number] for number, name in names})

    return apply


def _signature(leaf: Any) -> Any:
    if is_array(leaf) or (isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)):
        struct = abstract(leaf)
        return struct.shape, struct.dtype, struct.weak_type
    return leaf
