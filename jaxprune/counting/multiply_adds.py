"""Multiply-adds, counted on the jaxpr of a function."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.counting.products import MACS_OF
from jaxprune.tracing.dataflow import ConstValue, const_outputs, constant, passed_on
from jaxprune.tracing.jaxprs import (
    CALLS,
    called_jaxpr,
    close,
    inner_jaxprs,
    interpret,
    of_first,
    place,
    scan_split,
    split_static,
    trace,
)
from jaxprune.tree.calls import check_call
from jaxprune.tree.leaves import is_array
from jaxprune.tree.masks import like_params
from jaxprune.typing import Masks

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn


class Operation(NamedTuple):
    """One matrix product or convolution.

    Attributes:
      kind: the primitive, "dot_general" say.
      path: the param that it multiplies by (the largest, if the operand is made of several); None if both
        operands depend on data, or on constants alone.
      source: the line of the user's code, as "file:line".
      total: its multiply-adds, over all steps of the loops it is in.
      unpadded: those of `total` that read an entry of the input rather than padding.
    """

    kind: str
    path: str | None
    source: str
    total: int
    unpadded: int


class Macs(NamedTuple):
    """The multiply-adds of one call of a function.

    Attributes:
      total: one for each output entry and each term of its sum, padding included, as papers print it.
      unpadded: without the products with padding, and with the zeros that a transposed convolution puts
        between the entries of its input: what has to be computed.
      operations: the matrix products and convolutions, in the order in which they run.
      notes: what is bounded rather than counted, and what is not counted, each with its line.
    """

    total: int
    unpadded: int
    operations: tuple[Operation, ...]
    notes: tuple[str, ...]

    def by_path(self) -> dict[str | None, int]:
        """Return the total of each param; None stands for products of two values that depend on data."""
        counts: dict[str | None, int] = {}
        for operation in self.operations:
            counts[operation.path] = counts.get(operation.path, 0) + operation.total
        return counts


def macs(function: Callable[..., Any], *arguments: Any, masks: Masks | None = None, **keywords: Any) -> Macs:
    """Count the multiply-adds of a function's matrix products and convolutions.

    One multiplication with its addition counts as one, as in most papers on pruning; FLOPs are twice
    that. A product of `(m, k)` and `(k, n)` has `m * k * n`; a convolution has
    `outputs * kernel places * input channels / groups`, with as many outputs as its strides, padding and
    dilation leave. Elementwise work, sums and pooling do not count.

    The function is traced, not run. Nested `jit`, `remat` and custom derivatives count as what they
    call, the body of a scan once for each step (under masks: with the params of that step). Some counts are
    bounds, and `notes` says which: the dearest branch of a `cond`, one round of a `while` loop, all rows of a
    ragged product, every shard of a `shard_map`. Kernels of `pallas_call` and calls out of XLA do not count,
    which `notes` says as well.

    Args:
      function: a function of pytrees of arrays.
      *arguments: arrays or `jax.ShapeDtypeStruct`; the first is the params. Bools and strings are
        static.
      masks: a tree like the first argument. With masks, products with an entry that is zero because the
        masks prune the params it is made of do not count.
      **keywords: none; those of the function go in by `functools.partial(function, train=False)`.

    Returns:
      A `Macs`, for the whole batch.

    Raises:
      ValueError: masks that do not mirror the first argument.
      TypeError: not a function, or one that cannot be called with the arguments; a keyword.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params, x = {"kernel": jnp.ones((3, 2))}, jnp.ones((5, 3))
      >>> jp.metrics.macs(lambda params, x: x @ params["kernel"], params, x).total
      30
      >>> masks = {"kernel": jnp.array([[True, False], [True, True], [False, False]])}
      >>> jp.metrics.macs(lambda params, x: x @ params["kernel"], params, x, masks=masks).total
      15

    References:
      Blalock et al. 2020, "What is the state of neural network pruning?", on how papers count.
    """
    if not arguments:
        raise ValueError("macs needs the function's arguments, or their shapes: macs(function, params, x).")
    check_call("macs(function, params, *inputs)", function, arguments, keywords, ("masks",))
    if masks is not None:
        masks = like_params(masks, arguments[0])
    closed, inputs = trace(function, arguments)
    kept = {} if masks is None else split_static([masks])[0]
    sizes = {
        path: math.prod(leaf.shape)
        for name, leaf in inputs.items()
        if (path := of_first(name)) is not None and is_array(leaf)
    }
    counter = _Counter(sizes, masked=masks is not None)
    counter.walk(closed, [_known(name, leaf, kept.get(name)) for name, leaf in inputs.items()])
    operations = tuple(Operation(*found) for found in counter.found.values())
    total, unpadded = sum(o.total for o in operations), sum(o.unpadded for o in operations)
    return Macs(total, unpadded, operations, tuple(dict.fromkeys(counter.notes)))


def _known(name: str, leaf: Any, mask: Any) -> ConstValue | None:
    """Return the `ConstValue` of an input, if it is a leaf of the first argument.

    Under a mask it has two versions, generic values and these masked, so that an entry computed from them is
    0 in the second alone because of the mask, and not by chance. Without one it cannot be computed.
    """
    path = of_first(name)
    if path is None or not is_array(leaf):
        return None
    if mask is None or not jnp.issubdtype(leaf.dtype, jnp.number):
        return ConstValue((path,), None)

    def versions() -> tuple[Any, ...]:
        generic = (1 + np.random.default_rng(0).random(leaf.shape, np.float32)).astype(leaf.dtype)
        kept = np.asarray(mask)
        return (generic,) if kept.all() else (generic, np.where(kept, generic, np.zeros_like(generic)))

    return ConstValue((path,), versions)


_UNCOUNTED = (
    *("pallas_call", "ffi_call", "pure_callback", "io_callback", "cholesky", "eig", "eigh", "fft", "lu"),
    *("householder_product", "qr", "geqrf", "schur", "svd", "triangular_solve", "tridiagonal_solve"),
    *("scaled_dot", "scaled_matmul_wrapper", "dot_product_attention_fwd_wrapper"),
)


class _Counter:
    """Walks a jaxpr and collects its products.

    The walk knows a `ConstValue` of what is made of params and constants alone, and None of data.

    Attributes:
      sizes: by path, the number of entries of a param.
      masked: whether entries that the masks prune are left out.
      found: the fields of each `Operation`, by the equations that lead to it from the outermost.
      notes: what is bounded or not counted.
    """

    def __init__(self, sizes: Mapping[str, int], masked: bool):
        self.sizes, self.masked = sizes, masked
        self.found: dict[tuple[int, ...], list[Any]] = {}
        self.notes: list[str] = []

    def walk(
        self,
        closed: "ClosedJaxpr",
        inputs: Sequence[ConstValue | None],
        stack: tuple[int, ...] = (),
        called_at: str = "",
        times: int = 1,
    ) -> list[ConstValue | None]:
        """Count the products of a jaxpr that runs `times` times; return what is known of its outputs."""

        def handle(eqn: "JaxprEqn", known: list[ConstValue | None]) -> Sequence[ConstValue | None]:
            outputs = self.equation(eqn, known, (*stack, id(eqn)), place(eqn, called_at), times)
            if outputs is not None:
                return outputs
            inputs = [k for k in known if k is not None]
            return const_outputs(eqn, inputs) if len(inputs) == len(known) else [None] * len(eqn.outvars)

        return interpret(closed, inputs, handle, constant)

    def equation(
        self, eqn: "JaxprEqn", known: list[ConstValue | None], stack: tuple[int, ...], source: str, times: int
    ) -> list[ConstValue | None] | None:
        """Count the products of an equation; of a call, return what is known of its outputs."""
        name, params = eqn.primitive.name, eqn.params
        if name in MACS_OF:
            paths = [path for k in known if k is not None for path in k.paths]
            path = max(paths, key=lambda path: (self.sizes[path], path), default=None)
            total, unpadded = MACS_OF[name](eqn, [self.alive(k, eqn, source) for k in known])
            fields = self.found.setdefault(stack, [name, path, source, 0, 0])
            fields[3] += times * total
            fields[4] += times * unpadded
            if name == "ragged_dot_general":
                self.notes.append(f"{name} at {source}: all rows count, whatever the group sizes")
        elif name in CALLS:
            return self.walk(called_jaxpr(eqn), known, stack, source, times)
        elif name == "scan":
            self.scan(eqn, known, stack, source, times)
        elif name == "while":
            consts = params["cond_nconsts"], params["body_nconsts"]
            carry = known[sum(consts) :]
            of_body = [*known[consts[0] : sum(consts)], *_unchanged(params["body_jaxpr"], consts[1], carry)]
            of_condition = [*known[: consts[0]], *of_body[consts[1] :]]
            before = self.total()
            self.walk(params["cond_jaxpr"], of_condition, (*stack, 0), source, times)
            self.walk(params["body_jaxpr"], of_body, (*stack, 1), source, times)
            if self.total() > before:
                self.notes.append(f"while loop at {source}: one round counts")
        elif name == "cond":
            self.branches(eqn, known, stack, source, times)
        elif name == "shard_map":
            manual = params.get("manual_axes", params.get("newly_manual_axes", ()))
            shards = math.prod(params["mesh"].shape[axis] for axis in manual)
            local = [k and ConstValue(k.paths, None) for k in known]
            self.walk(close(params["jaxpr"]), local, stack, source, times * shards)
        elif name in _UNCOUNTED:
            self.notes.append(f"{name} at {source}: not counted")
        else:
            for number, inner in enumerate(inner_jaxprs(eqn)):  # a primitive that this module does not know
                self.walk(inner, [None] * len(inner.jaxpr.invars), (*stack, number), source, times)
        return None

    def scan(
        self, eqn: "JaxprEqn", known: list[ConstValue | None], stack: tuple[int, ...], source: str, times: int
    ) -> None:
        """Count the body once for each step; under masks with that step's slices of the params."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carried = scan_split(eqn.params)
        fixed = [*known[:consts], *_unchanged(body, consts, known[consts : consts + carried])]
        rows = known[consts + carried :]
        if self.masked and any(k is not None and k.paths for k in rows):
            for step in range(length):
                self.walk(body, [*fixed, *(_row(k, step) for k in rows)], stack, source, times)
        else:
            self.walk(body, [*fixed, *rows], stack, source, times * length)

    def branches(
        self, eqn: "JaxprEqn", known: list[ConstValue | None], stack: tuple[int, ...], source: str, times: int
    ) -> None:
        """Count the dearest branch."""
        counters = []
        for branch in eqn.params["branches"]:
            counter = _Counter(self.sizes, self.masked)
            counter.walk(branch, known[1:], stack, source, times)
            counters.append(counter)
        dearest = max(counters, key=_Counter.total)
        if len({counter.total() for counter in counters}) > 1:
            self.notes.append(f"cond at {source}: the dearest of its branches counts")
        for key, fields in dearest.found.items():
            into = self.found.setdefault(key, [*fields[:3], 0, 0])
            into[3] += fields[3]
            into[4] += fields[4]
        self.notes += dearest.notes

    def total(self) -> int:
        """Return all multiply-adds so far."""
        return sum(fields[3] for fields in self.found.values())

    def alive(self, known: ConstValue | None, eqn: "JaxprEqn", source: str) -> np.ndarray | None:
        """Return which entries of an operand the masks leave; None for all."""
        if not self.masked or known is None or not known.paths:
            return None
        if known.versions is None:
            paths = ", ".join(sorted(known.paths))
            self.notes.append(f"{eqn.primitive.name} at {source}: counted as if {paths} were not masked")
            return None
        with jax.ensure_compile_time_eval():
            generic, *masked = known.versions()
        return np.asarray((masked[0] != 0) | (generic == 0)) if masked else None


def _row(known: ConstValue | None, step: int) -> ConstValue | None:
    """Return the slice of one step of what a scan runs along."""
    versions = None if known is None else known.versions
    if known is None or versions is None:
        return known
    return ConstValue(known.paths, lambda: tuple(array[step] for array in versions()))


def _unchanged(
    body: "ClosedJaxpr", consts: int, carry: Sequence[ConstValue | None]
) -> list[ConstValue | None]:
    """Return what is known of a loop's carry in every round: only what its body passes on unchanged."""
    same = passed_on(body, consts, len(carry))
    return [k if yes else None for k, yes in zip(carry, same, strict=True)]
