"""What a value of a jaxpr is made of: params and constants alone, or data.

A product of a kernel with data is one whose first operand comes from params alone (a param itself, or a param
transposed, cast, masked) and whose second depends on the inputs. Three parts of the library look for such
products and share this module: `metrics.macs` to name the param of each product and to count what masks leave
of it, `sparsify` to replace the product, and statistics of the data that a layer reads.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxprune.tracing.jaxprs import CALLS, binder, called_jaxpr, interpret, place, scan_split
from jaxprune.tracing.leaf_views import LeafView, of_leaf, slice_of_scan, view_after

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, JaxprEqn

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
"""The primitives that multiply matrices; their first two inputs are the operands."""


class Loop:
    """A scan whose body is being visited.

    Attributes:
      length: how many steps it has.
      index: the number of the step, an int32 scalar of the trace of the body; None if the body is only looked
        at, for all steps at once.
    """

    def __init__(self, length: int, index: Any = None):
        self.length, self.index = length, index


class ConstValue:
    """A value made of params and constants alone, computed when it is asked for.

    Attributes:
      paths: the params it is made of.
      versions: returns the array; several arrays if the params come in several versions (dense and masked);
        None if it cannot be computed. In the body of a scan that is only looked at, one for each step.
      loops: the scans from whose steps it depends, because it is made of slices that they take.
    """

    loops: tuple[Loop, ...] = ()

    def __init__(
        self,
        paths: Iterable[str],
        versions: Callable[[], tuple[Any, ...]] | None,
        described: Callable[[], tuple[Any, ...]] = tuple,
        viewed: Callable[[], LeafView | str | None] | None = None,
    ):
        self.paths, self.versions, self._described = tuple(paths), versions, described
        self._viewed = viewed

    def value(self) -> Any:
        """Return the array, in the first version."""
        assert self.versions is not None
        return self.versions()[0]

    def without_value(self, paths: Iterable[str]) -> "ConstValue":
        """Return a value with the same key that cannot be computed, and is said to be made of other paths."""
        known = ConstValue(paths, None, self._described)
        known.loops = self.loops
        return known

    @cached_property
    def key(self) -> str:
        """The same text for values that are computed in the same way, in whatever trace."""
        return hashlib.sha256(repr(self._described()).encode()).hexdigest()

    @cached_property
    def view(self) -> LeafView | str | None:
        """The value as a view of one leaf, or the reason why it is none; None for a constant."""
        if self._viewed is None:
            return f"its kernel is made of {' and '.join(self.paths)}" if self.paths else None
        return self._viewed()


def param(path: str, value: Callable[[], Any], shape: Sequence[int] | None = None) -> ConstValue:
    """Return the `ConstValue` of a param; its shape is needed for `view` alone."""
    viewed = None if shape is None else lambda: of_leaf(path, shape)
    return ConstValue((path,), lambda: (value(),), lambda: ("param", path), viewed)


def constant(value: Any) -> ConstValue:
    """Return the `ConstValue` of an array that a jaxpr holds."""

    def described() -> tuple[Any, ...]:
        array = np.asarray(value)
        return "constant", array.shape, array.dtype.name, hashlib.sha256(array.tobytes()).hexdigest()

    return ConstValue((), lambda: (value,), described)


def literal(it: Any) -> ConstValue:
    """Return the `ConstValue` of a literal."""

    def described() -> tuple[Any, ...]:
        value = np.asarray(it.val)
        return "literal", value.dtype.name, value.tolist(), getattr(it.aval, "weak_type", False)

    return ConstValue((), lambda: (it.val,), described)


def _constant_or_data(value: Any) -> Any:
    """Return an array that a jaxpr holds as a `ConstValue`, or unchanged if it is traced: it may be data."""
    if isinstance(value, Tracer) or not hasattr(value, "dtype"):
        return value
    if jnp.issubdtype(value.dtype, jax.dtypes.extended):  # a random key, which numpy cannot hold
        return value
    return constant(value)


def const_outputs(
    eqn: "JaxprEqn", args: Sequence[ConstValue], stamp: Callable[[Sequence[str]], Any] | None = None
) -> list[ConstValue]:
    """Return the outputs of an equation of const values, computed at most once.

    Where an input has one version, it stands for all; where all have one, so have the outputs. With several
    loops there is a version for each combination of their steps, those of the last loop fastest. `stamp` is
    that of a `Visitor`.
    """
    bind, sources = binder(eqn), [arg.versions for arg in args]
    loops = tuple(dict.fromkeys(loop for arg in args for loop in arg.loops))
    last: list[Any] = []

    def computed() -> list[list[Any]]:
        now = None if stamp is None else stamp(tuple(paths))
        if last and last[0] == now:
            return last[1]
        given = [versions() for versions in sources if versions is not None]
        several = max(map(len, given), default=1)
        if len(loops) > 1 and several > 1:
            several = math.prod(loop.length for loop in loops)
        which = [
            [0] * several if len(arrays) == 1 else _versions_of(arg.loops, loops, several)
            for arg, arrays in zip(args, given, strict=True)
        ]
        pairs = list(zip(given, which, strict=True))
        last[:] = now, [bind(*(arrays[own[v]] for arrays, own in pairs)) for v in range(several)]
        return last[1]

    def described() -> tuple[Any, ...]:
        steps = [[loops.index(loop) for loop in arg.loops] for arg in args]
        return eqn.primitive.name, sorted(eqn.params.items(), key=str), [arg.key for arg in args], steps

    paths = dict.fromkeys(path for arg in args for path in arg.paths)

    def output(number: int) -> ConstValue:
        versions = None if None in sources else lambda: tuple(made[number] for made in computed())
        viewed = [arg.value for arg in args]
        value = ConstValue(
            paths,
            versions,
            lambda: (*described(), number),
            lambda: view_after(eqn, number, viewed, [arg.view for arg in args]),
        )
        value.loops = loops
        return value

    return [output(number) for number in range(len(eqn.outvars))]


def _versions_of(own: Sequence[Loop], loops: Sequence[Loop], several: int) -> Sequence[int]:
    """Return, for each combination of the steps of `loops`, the version of a value that depends on `own`."""
    if own == loops or not own:
        return range(several)
    steps = np.indices([loop.length for loop in loops]).reshape(len(loops), -1)
    places = tuple(steps[loops.index(loop)] for loop in own)
    which: Any = np.ravel_multi_index(places, tuple(loop.length for loop in own))
    return which.tolist()


def materialised(value: ConstValue | Any) -> Any:
    """Return the array of a value, const or not."""
    return value.value() if isinstance(value, ConstValue) else value


class Product(NamedTuple):
    """An equation that multiplies a kernel, which is a `ConstValue`, by data.

    Attributes:
      eqn: the equation, a JaxprEqn.
      side: which of its two operands is the kernel.
      kernel: the kernel.
      source: the line of the user's code that it comes from.
      stack: what tells it from all other products of the trace: the equations around it, outermost first,
        and its own, by `id`.
      others: its inputs behind the operands, the sizes of groups of a ragged product.
    """

    eqn: Any
    side: int
    kernel: ConstValue
    source: str
    stack: tuple[int, ...] = ()
    others: tuple[Any, ...] = ()


class Visitor(NamedTuple):
    """What to do with the equations that depend on data, in the order in which they run.

    Attributes:
      product: `product(found, data)` returns the outputs of a `Product`, or None to leave it to `other`.
      other: `other(eqn, inputs)` returns the outputs of another equation, whose inputs may be const values.
        It is given loops and branches as one equation; to see the products inside, it calls
        `visit_products` on `inside_scan`, or on the jaxpr of a branch.
      stamp: for params that change while the jaxpr runs: `stamp(paths)` returns another value once one of
        these has changed, so that what is made of them is computed again. None if they never do.
    """

    product: Callable[[Product, Any], list[Any] | None]
    other: Callable[["JaxprEqn", list[Any]], list[Any]]
    stamp: Callable[[Sequence[str]], Any] | None = None


def visit_products(
    closed: "ClosedJaxpr",
    inputs: Sequence[Any],
    visitor: Visitor,
    called_at: str = "",
    stack: tuple[int, ...] = (),
) -> list[Any]:
    """Run a jaxpr by a visitor, on const values and data, and return its outputs.

    Calls are entered. An equation whose inputs are all const is not run: its outputs are const too. `stack`
    is the beginning of the `stack` of each product.
    """

    def handle(eqn: "JaxprEqn", args: list[Any]) -> list[Any]:
        name, source = eqn.primitive.name, place(eqn, called_at)
        const = [isinstance(arg, ConstValue) for arg in args]
        if name in CALLS:
            return visit_products(called_jaxpr(eqn), args, visitor, source, (*stack, id(eqn)))
        if all(const) and not eqn.effects:
            return const_outputs(eqn, args, visitor.stamp)
        outputs = None
        if name in PRODUCTS and const[:2].count(True) == 1:
            side = const.index(True)
            found = Product(eqn, side, args[side], source, (*stack, id(eqn)), tuple(args[2:]))
            outputs = visitor.product(found, args[1 - side])
        return visitor.other(eqn, args) if outputs is None else outputs

    return interpret(closed, inputs, handle, _constant_or_data, literal)


def passed_on(body: "ClosedJaxpr", consts: int, carried: int) -> list[bool]:
    """Return which carried values the body of a loop passes on unchanged, so that all rounds have the first.

    The inputs of the body are `consts` constants, then `carried` carried values; its outputs begin with the
    carry.
    """
    given, outputs = body.jaxpr.invars[consts : consts + carried], body.jaxpr.outvars[:carried]
    return [before is after for before, after in zip(given, outputs, strict=True)]


def inside_scan(
    eqn: "JaxprEqn",
    args: Sequence[Any],
    values: Sequence[Any],
    loop: Loop | None = None,
    level: int = 0,
) -> list[Any]:
    """Return the inputs of the body of a scan in one step, given those of the scan, and the step's arrays.

    In the body a slice of a const value is const too, of the same params. So is a constant of the body, and a
    carry that the body passes on; any other carry holds data from the second step on. If `loop` is given,
    what is made of slices has it among its `loops`. `level` says how many scans are around this one, for the
    views of slices.
    """
    consts, carried = scan_split(eqn.params)
    passed = passed_on(eqn.params["jaxpr"], consts, carried)

    def inside(number: int, arg: Any, value: Any) -> Any:
        sliced = number >= consts + carried
        if not isinstance(arg, ConstValue) or not (number < consts or sliced or passed[number - consts]):
            return value

        def viewed() -> LeafView | str | None:
            return slice_of_scan(arg.view, level) if sliced and isinstance(arg.view, LeafView) else arg.view

        described = (lambda: ("slice", arg.key)) if sliced else arg._described
        known = ConstValue(arg.paths, lambda: (value,), described, viewed)
        known.loops = (*arg.loops, loop) if sliced and loop is not None else arg.loops
        return known

    return [inside(number, *pair) for number, pair in enumerate(zip(args, values, strict=True))]


def every_step(eqn: "JaxprEqn", args: Sequence[Any]) -> list[Any]:
    """Return the inputs of the body of a scan for all its steps at once: const values, and None for data.

    A slice has as many versions as what it is cut from has in all steps.
    """
    loop = Loop(eqn.params["length"])

    def of_all(arg: Any, known: Any) -> Any:
        if not isinstance(known, ConstValue):
            return None
        source = arg.versions
        if known.loops != arg.loops and source is not None:
            steps = range(loop.length)
            known.versions = lambda: tuple(array[step] for array in source() for step in steps)
        else:
            known.versions = source
        return known

    inside = inside_scan(eqn, args, [None] * len(args), loop=loop)
    return [of_all(*pair) for pair in zip(args, inside, strict=True)]


def const_after_scan(eqn: "JaxprEqn", args: Sequence[Any]) -> list[ConstValue | None]:
    """Return the outputs of a scan that are const, because its body passes a carry on; else None."""
    consts, carried = scan_split(eqn.params)
    passed = passed_on(eqn.params["jaxpr"], consts, carried)
    before = zip(passed, args[consts : consts + carried], strict=True)
    known = [arg if yes and isinstance(arg, ConstValue) else None for yes, arg in before]
    return known + [None] * (len(eqn.outvars) - carried)
