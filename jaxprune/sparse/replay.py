"""A network with some of its kernels in other forms, run by replaying its jaxpr."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.sparse.choice import Chosen, Kernel
from jaxprune.sparse.forms import OfStack, read
from jaxprune.sparse.layers import layer, sparse
from jaxprune.tracing.dataflow import (
    ConstValue,
    Loop,
    Product,
    Visitor,
    const_after_scan,
    inside_scan,
    materialised,
    param,
    visit_products,
)
from jaxprune.tracing.jaxprs import (
    abstract,
    binder,
    of_first,
    place,
    scan_split,
    scan_with,
    split_static,
    trace,
)
from jaxprune.tree.checks import check_function
from jaxprune.tree.leaves import is_array
from jaxprune.tree.paths import leaf_paths


class SparseParams(NamedTuple):
    """The params of a sparse network: a pytree, to be passed through `jit` as an argument.

    Attributes:
      leaves: by path, the masked params that the network still reads dense.
      kernels: by path, the arrays of the kernels stored in another form; those of a scan with its steps as
        their first axis.
    """

    leaves: dict[str, Any]
    kernels: dict[str, Any]


class Network:
    """A function of params that can be run with some of its kernels in other forms."""

    def __init__(self, function: Callable[..., Any], treedef: Any, leaves: dict[str, Any]):
        check_function(function, "sparsify", "apply_fn(params, *inputs)")
        self.function, self.treedef, self.leaves = function, treedef, leaves
        self.shapes = treedef.unflatten([abstract(leaf) for leaf in leaves.values()])

    def traced(self, inputs: Sequence[Any]) -> "Traced":
        """Return the function for inputs of some shapes."""
        trees = []

        def flat(*arguments: Any) -> list[Any]:
            out, tree = jax.tree.flatten(self.function(*arguments))
            trees.append(tree)
            return out

        closed, order = trace(flat, (self.shapes, *inputs))
        return Traced(closed, tuple(order), trees[-1])

    def stored(
        self, kernels: Mapping[str, Kernel], chosen: Mapping[str, Chosen], inputs: Sequence[Any]
    ) -> tuple[Callable[..., Any], SparseParams]:
        """Return the function of `SparseParams`, and the `SparseParams`."""
        forms = {key: (kernels[key].label, one.form) for key, one in chosen.items() if one.arrays is not None}
        stored = {kernels[key].label: jax.tree.map(jnp.asarray, chosen[key].arrays) for key in forms}
        traced = self.traced(inputs)
        read, _ = _survey(traced.closed, traced.inputs(self.leaves, None), forms)
        # A param with a kernel in another form is left out, unless something still reads it dense.
        whole = {path for path in self.leaves if path not in {kernels[key].path for key in forms}}
        leaves = {path: leaf for path, leaf in self.leaves.items() if path in read | whole}
        return _applied(self, forms), SparseParams(leaves, stored)


class Traced(NamedTuple):
    """A function of params, traced for inputs of some shapes.

    Attributes:
      closed: its jaxpr.
      order: its inputs by path, in the order of the jaxpr.
      tree: the structure of what it returns.
    """

    closed: Any
    order: tuple[str, ...]
    tree: Any

    @property
    def holds_tracers(self) -> bool:
        """Whether it closes over values of a trace around it."""
        return any(isinstance(const, Tracer) for const in self.closed.consts)

    def inputs(self, leaves: Mapping[str, Any], arrays: Mapping[str, Any] | None) -> list[Any]:
        """Return the inputs of the jaxpr: const values of the leaves, and the arrays, or None for each."""

        def value(name: str) -> Any:
            path = of_first(name)
            if path is not None:
                return param(path, lambda: leaves[path])
            first, _, rest = name.partition("/")
            number = f"{int(first) - 1}" + (f"/{rest}" if rest else "")
            return None if arrays is None else arrays[number]

        return [value(name) for name in self.order]

    def run(self, params: SparseParams, arrays: Mapping[str, Any], forms: "Forms") -> Any:
        """Return the outputs, with kernels in other forms."""
        visitor = _visitor(params.kernels, forms)
        outputs = visit_products(self.closed, self.inputs(_Left(params.leaves), arrays), visitor)
        return self.tree.unflatten([jnp.asarray(materialised(output)) for output in outputs])


Forms = Mapping[str, tuple[str, str]]
"""By the key of its layer, the label and the form of each kernel that is not dense."""


class _Left(dict):
    """Leaves by path, without those stored in a sparse form alone."""

    def __missing__(self, path: str) -> Any:
        raise ValueError(
            f"for inputs of these shapes the function reads params[{path!r}] in another way than for those "
            "that sparsify saw, and it is stored in a sparse form alone. Call sparsify with inputs like "
            f"these, or choose 'dense' for {path!r}."
        )


def _survey(
    closed: Any, inputs: Sequence[Any], forms: Forms, unread: Collection[int] = ()
) -> tuple[set[str], set[str]]:
    """Return the paths of what a jaxpr reads dense, and the keys of the kernels that it reads in other forms.

    Nothing is computed: its inputs are const values and None for data. `unread` are numbers of outputs that
    nobody reads.
    """
    read: set[str] = set()
    kernels: set[str] = set()

    def product(found: Product, data: Any) -> list[Any] | None:
        del data
        made = layer(found)
        if isinstance(made, str) or made.key not in forms:
            return None
        kernels.add(made.key)
        return [None] * len(found.eqn.outvars)

    def other(eqn: Any, args: list[Any]) -> list[Any]:
        if eqn.primitive.name == "scan":
            inside, taken = _survey_scan(eqn, args, forms)
            if taken:
                read.update(inside)
                kernels.update(taken)
                return const_after_scan(eqn, args)
        read.update(_paths(args))
        return [None] * len(eqn.outvars)

    outputs = visit_products(closed, inputs, Visitor(product, other))
    read.update(_paths([output for number, output in enumerate(outputs) if number not in unread]))
    return read, kernels


def _survey_scan(eqn: Any, args: Sequence[Any], forms: Forms) -> tuple[set[str], set[str]]:
    """Return the same of a scan whose body is entered."""
    unread = [number for number, known in enumerate(const_after_scan(eqn, args)) if known is not None]
    inside = inside_scan(eqn, args, [None] * len(args), loop=Loop(eqn.params["length"]))
    read, kernels = _survey(eqn.params["jaxpr"], inside, forms, unread)
    # What a carry starts from is read, if the body changes it: it is no const value there.
    starts = [arg for arg, known in zip(args, inside, strict=True) if known is None]
    return read | set(_paths(starts)), kernels


def _paths(values: Sequence[Any]) -> list[str]:
    return [path for value in values if isinstance(value, ConstValue) for path in value.paths]


def _visitor(stored: Mapping[str, Any], forms: Forms) -> Visitor:
    def product(product: Product, other: Any) -> list[Any] | None:
        made = layer(product)
        if isinstance(made, str) or made.key not in forms:
            return None
        label, form = forms[made.key]
        arrays = _this_step(stored[label], product.kernel.loops, made.forms[form].looped)
        return [sparse(made, form, arrays, other)]

    def other(eqn: Any, args: list[Any]) -> list[Any]:
        outputs = _scan(eqn, args, visitor, forms) if eqn.primitive.name == "scan" else None
        return binder(eqn)(*map(materialised, args)) if outputs is None else outputs

    visitor = Visitor(product, other)
    return visitor


def _this_step(arrays: Any, loops: Sequence[Loop], looped: Collection[str]) -> Any:
    """Return the arrays of a kernel in the present step of the loops that it depends on.

    Those with the names `looped` are left for the product to read.
    """
    if not loops:
        return arrays
    index: Any = np.int32(0)
    for loop in loops:
        index = index * np.int32(loop.length) + loop.index

    def of_step(path: Any, array: Any) -> Any:
        known = OfStack(array, index)
        return known if path[-1].key in looped else read(known)

    return jax.tree_util.tree_map_with_path(of_step, arrays)


def _scan(eqn: Any, args: list[Any], visitor: Visitor, forms: Forms) -> list[Any] | None:
    """Run a scan with the kernels of its body in other forms; return None if it has none of them.

    What the body no longer reads is not among its inputs, since the params may no longer have it. The kernels
    of all steps are constants of the body, which reads those of its step by the step's number.
    """
    names = [
        arg.without_value((str(number),)) if isinstance(arg, ConstValue) else None
        for number, arg in enumerate(args)
    ]
    read, kernels = _survey_scan(eqn, names, forms)
    if not kernels:
        return None
    unread = [isinstance(arg, ConstValue) and str(number) not in read for number, arg in enumerate(args)]
    given = [None if absent else materialised(arg) for absent, arg in zip(unread, args, strict=True)]
    length, first = eqn.params["length"], scan_split(eqn.params)[0]
    passed = const_after_scan(eqn, args)

    def body(values: list[Any]) -> tuple[list[Any], None]:
        *values, index = values
        inside = inside_scan(eqn, args, values, loop=Loop(length, index))
        outputs = visit_products(eqn.params["jaxpr"], inside, visitor, place(eqn))
        numbered = enumerate(zip(passed, outputs, strict=True), start=first)
        # A carry that is passed on has no value if nothing in the body reads it.
        return [materialised(out) if known is None else values[n] for n, (known, out) in numbered], None

    outputs, _ = scan_with(eqn, [*given, np.arange(length, dtype=np.int32)], body)
    return [out if known is None else known for known, out in zip(passed, outputs, strict=True)]


def _applied(network: Network, forms: Forms) -> Callable[..., Any]:
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
            if traced.holds_tracers:  # it is good for this call only
                return traced.run(params, arrays, forms)
            names = [(number, name) for number, name in enumerate(leaf_paths(inputs)) if name in arrays]
            programs[key] = jax.jit(partial(traced.run, forms=forms)), names
        program, names = programs[key]
        return program(params, {name: leaves[number] for number, name in names})

    return apply


def _signature(leaf: Any) -> Any:
    if is_array(leaf) or (isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool)):
        struct = abstract(leaf)
        return struct.shape, struct.dtype, struct.weak_type
    return leaf
