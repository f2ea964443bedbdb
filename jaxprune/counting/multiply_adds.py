"""Multiply-adds, counted on a function's jaxpr."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.counting.products import PRODUCTS
from jaxprune.tracing.jaxprs import (
    CALLS,
    binder,
    called_jaxpr,
    close,
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
      path: the param it multiplies by (the largest, if the operand is made of several); None if both
        operands depend on data, or on constants alone.
      source: the line of the user's code, as "file:line".
      total: its multiply-adds, over all steps of the loops it is in.
      unpadded: those of `total` that read an entry of the input, not padding.
    """

    kind: str
    path: str | None
    source: str
    total: int
    unpadded: int


class Macs(NamedTuple):
    """The multiply-adds of one call of a function.

    Attributes:
      total: one for each output entry and each place of the window it is summed over, padding
        included: what papers print.
      unpadded: without the products with padding, and with the holes that a transposed convolution
        puts between the entries of its input: what has to be computed.
      operations: the matrix products and convolutions, in the order they come.
      notes: what is a bound and not a count, and what is not counted, each with its line.
    """

    total: int
    unpadded: int
    operations: tuple[Operation, ...]
    notes: tuple[str, ...]

    def by_path(self) -> dict[str | None, int]:
        """The total of each param; None stands for products of two values that depend on data."""
        counts: dict[str | None, int] = {}
        for operation in self.operations:
            counts[operation.path] = counts.get(operation.path, 0) + operation.total
        return counts


def macs(function: Callable[..., Any], *arguments: Any, masks: Masks | None = None, **keywords: Any) -> Macs:
    """The multiply-adds of a function's matrix products and convolutions.

    One multiplication with its addition counts as one, as in most papers on pruning; FLOPs are twice
    that. A product of `(m, k)` and `(k, n)` has `m * k * n`; a convolution has
    `outputs * kernel places * input channels / groups`, its outputs being as many as its strides,
    padding and dilation truly leave. Elementwise work, sums and pooling do not count.

    The function is traced, not run. Nested `jit`, `remat` and custom derivatives count as what they
    call, the body of a scan once for each step (under masks: with the params of that step). Bounded,
    and said in `notes`: of the branches of a `cond` the dearest counts, of a `while` loop one round,
    of ragged products all rows, in a `shard_map` every shard. Kernels of `pallas_call` and calls out of
    XLA do not count, which `notes` says as well.

    Args:
      function: a function of pytrees of arrays.
      *arguments: arrays or `jax.ShapeDtypeStruct`; the first is the params. Bools and strings are
        static.
      masks: a tree like the first argument. Products with an entry that is zero because the masks
        prune what it is made of are not counted then.
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
    counter = _Counter(masked=masks is not None)
    counter.walk(closed, [_known(name, leaf, kept.get(name)) for name, leaf in inputs.items()])
    operations = tuple(Operation(*found) for found in counter.found.values())
    total, unpadded = sum(o.total for o in operations), sum(o.unpadded for o in operations)
    return Macs(total, unpadded, operations, tuple(dict.fromkeys(counter.notes)))


class _Known(NamedTuple):
    """A value made of params and constants alone.

    Attributes:
      leaves: the sizes and paths of the params.
      values: gives the value twice, of generic params and of these masked; None where it is out of
        reach. Generic, so that what is zero is zero because of the masks, not by chance.
    """

    leaves: frozenset[tuple[int, str]]
    values: Callable[[], tuple[Any, Any]] | None


def _known(name: str, leaf: Any, mask: Any) -> _Known | None:
    """What is known of an input: of a leaf of the first argument its path, and its mask if there is one."""
    path = of_first(name)
    if path is None or not is_array(leaf):
        return None
    here = frozenset({(math.prod(leaf.shape), path)})
    if mask is None or not jnp.issubdtype(leaf.dtype, jnp.number):
        return _Known(here, None)

    def values() -> tuple[Any, Any]:
        whole = (1 + np.random.default_rng(0).random(leaf.shape, np.float32)).astype(leaf.dtype)
        return whole, whole if np.all(mask) else np.where(mask, whole, np.zeros_like(whole))

    return _Known(here, values)


class _Counter:
    """Walks a jaxpr and collects its products.

    Attributes:
      masked: whether entries that the masks prune are left out.
      found: the fields of each `Operation`, by the equations one goes through to get to it.
      notes: what is bounded or not counted.
    """

    def __init__(self, masked: bool):
        self.masked = masked
        self.found: dict[tuple[int, ...], list[Any]] = {}
        self.notes: list[str] = []

    def walk(
        self,
        closed: "ClosedJaxpr",
        inputs: Sequence[_Known | None],
        stack: tuple[int, ...] = (),
        called_at: str = "",
        times: int = 1,
    ) -> list[_Known | None]:
        """Counts the products of a jaxpr that runs `times` times; what is known of its outputs."""
        jaxpr = closed.jaxpr
        env: dict[Any, _Known | None] = dict(zip(jaxpr.invars, inputs, strict=True))
        env.update((var, _constant(const)) for var, const in zip(jaxpr.constvars, closed.consts, strict=True))

        def read(atom: Any) -> _Known | None:
            return _constant(atom.val) if hasattr(atom, "val") else env[atom]

        for eqn in jaxpr.eqns:
            source = place(eqn, called_at)
            known = [read(atom) for atom in eqn.invars]
            inside = (*stack, id(eqn))
            outputs = self.equation(eqn, known, inside, source, times)
            env.update(zip(eqn.outvars, outputs or _outputs(eqn, known), strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(
        self, eqn: "JaxprEqn", known: list[_Known | None], stack: tuple[int, ...], source: str, times: int
    ) -> list[_Known | None] | None:
        """Counts the products of an equation; what is known of its outputs, if a call says."""
        name, params = eqn.primitive.name, eqn.params
        if name in PRODUCTS:
            leaves = frozenset().union(*(k.leaves for k in known if k is not None))
            path = max(leaves)[1] if leaves else None
            total, unpadded = PRODUCTS[name](eqn, [self.alive(k, eqn, source) for k in known])
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
            local = [k and _Known(k.leaves, None) for k in known]
            self.walk(close(params["jaxpr"]), local, stack, source, times * shards)
        elif name in _UNCOUNTED:
            self.notes.append(f"{name} at {source}: not counted")
        else:
            for inner in map(close, _jaxprs(params)):
                self.walk(inner, [None] * len(inner.jaxpr.invars), (*stack, id(inner)), source, times)
        return None

    def scan(
        self, eqn: "JaxprEqn", known: list[_Known | None], stack: tuple[int, ...], source: str, times: int
    ) -> None:
        """The body once for each step; under masks with the step's own slices of the params."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        consts, carried = scan_split(eqn.params)
        fixed = [*known[:consts], *_unchanged(body, consts, known[consts : consts + carried])]
        rows = known[consts + carried :]
        if self.masked and any(k is not None and k.leaves for k in rows):
            for step in range(length):
                self.walk(body, [*fixed, *(k and _row(k, step) for k in rows)], stack, source, times)
        else:
            self.walk(body, [*fixed, *rows], stack, source, times * length)

    def branches(
        self, eqn: "JaxprEqn", known: list[_Known | None], stack: tuple[int, ...], source: str, times: int
    ) -> None:
        """The dearest branch."""
        counters = []
        for branch in eqn.params["branches"]:
            counter = _Counter(self.masked)
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
        """All multiply-adds so far."""
        return sum(fields[3] for fields in self.found.values())

    def alive(self, known: _Known | None, eqn: "JaxprEqn", source: str) -> np.ndarray | None:
        """Which entries of an operand the masks leave; None for all."""
        if not self.masked or known is None or not known.leaves:
            return None
        if known.values is None:
            paths = ", ".join(sorted(path for _, path in known.leaves))
            self.notes.append(f"{eqn.primitive.name} at {source}: counted as if {paths} were not masked")
            return None
        whole, masked = known.values()
        return None if whole is masked else np.asarray((masked != 0) | (whole == 0))


_UNCOUNTED = (
    *("pallas_call", "ffi_call", "pure_callback", "io_callback", "cholesky", "eig", "eigh", "fft", "lu"),
    *("householder_product", "qr", "geqrf", "schur", "svd", "triangular_solve", "tridiagonal_solve"),
    *("scaled_dot", "scaled_matmul_wrapper", "dot_product_attention_fwd_wrapper"),
)


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The jaxprs among the parameters of a primitive that this module has not heard of."""
    return [leaf for leaf in jax.tree.leaves(list(params.values())) if hasattr(leaf, "eqns")]


def _constant(value: Any) -> _Known:
    return _Known(frozenset(), lambda: (value, value))


def _outputs(eqn: "JaxprEqn", known: Sequence[_Known | None]) -> list[_Known | None]:
    """What is known of an equation's outputs: something, if all of its inputs are known."""
    inputs = [k for k in known if k is not None]
    if len(inputs) < len(known):
        return [None] * len(eqn.outvars)
    bind, given = binder(eqn), [k.values for k in inputs if k.values is not None]
    leaves = frozenset[tuple[int, str]]().union(*(k.leaves for k in inputs))
    if len(given) < len(inputs):
        return [_Known(leaves, None)] * len(eqn.outvars)

    @cache
    def both() -> tuple[list[Any], list[Any]]:
        pairs = [values() for values in given]
        with jax.ensure_compile_time_eval():
            whole = bind(*(pair[0] for pair in pairs))
            if all(whole is masked for whole, masked in pairs):
                return whole, whole
            return whole, bind(*(pair[1] for pair in pairs))

    def output(n: int) -> _Known:
        return _Known(leaves, lambda: (both()[0][n], both()[1][n]))

    return list(map(output, range(len(eqn.outvars))))


def _row(known: _Known, step: int) -> _Known:
    """One step's slice of what a scan runs along."""
    values = known.values
    if values is None:
        return known

    def row() -> tuple[Any, Any]:
        whole, masked = values()
        own = whole[step]
        return own, own if whole is masked else masked[step]

    return _Known(known.leaves, row)


def _unchanged(body: "ClosedJaxpr", consts: int, carry: Sequence[_Known | None]) -> list[_Known | None]:
    """What is known of a loop's carry in every round: of what the body hands on as it was."""
    given, handed_on = body.jaxpr.invars[consts:], body.jaxpr.outvars
    return [k if given[n] is handed_on[n] else None for n, k in enumerate(carry)]
