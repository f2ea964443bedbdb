"""Tracing a function, and walking the jaxpr that comes of it.

`interpret` is the loop of every walk in the library but that of the constraint graph (`graph.engine`). The
values that it carries are the caller's: arrays, where an array is 0, what an array is made of.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax import lax
from jax.sharding import AxisType

from jaxprune.tree.checks import check_function
from jaxprune.tree.leaves import is_array
from jaxprune.tree.paths import leaf_paths

if TYPE_CHECKING:  # importing it takes longer than all of jaxprune
    from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

# Primitives that call one jaxpr, once, on their inputs.
CALLS = (
    *("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"),
    *("custom_jvp_call", "custom_vjp_call"),
)
_OWN = str(Path(__file__).parents[1]) + "/"
_STDLIB = str(Path(os.__file__).parent) + "/"
_JAX = str(Path(jax.__file__).parent) + "/"


def split_static(inputs: Sequence[Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """Return the arrays and numbers among some inputs by path, and a function that replaces them.

    Paths are sorted as JAX sorts the keys of a dict, so that the values are in the order in which a function
    traced with the dict takes them (the input "10" before "2").

    Bools (`train=True`), strings and functions are static: they stay where they are.
    """
    leaves, treedef = jax.tree.flatten(tuple(inputs))
    names = leaf_paths(tuple(inputs)) if leaves else []
    moving = {
        name: leaf
        for name, leaf in sorted(zip(names, leaves, strict=True), key=lambda pair: pair[0])
        if is_array(leaf) or (isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool))
    }

    def rebuild(arrays: dict[str, Any]) -> Any:
        return treedef.unflatten([arrays.get(name, leaf) for name, leaf in zip(names, leaves, strict=True)])

    return moving, rebuild


def trace(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple["ClosedJaxpr", dict[str, Any]]:
    """Return the jaxpr of a function, and its inputs by path in the jaxpr's order.

    Paths are those in the tuple of arguments; `of_first` turns them into paths in the first argument.
    """
    check_function(function, "tracing", "of arrays")
    arrays, rebuild = split_static(arguments)
    shapes = {name: abstract(leaf) for name, leaf in arrays.items()}
    return jax.make_jaxpr(lambda arrays: function(*rebuild(arrays)))(shapes), arrays


def of_first(name: str) -> str | None:
    """Return the path in the first argument, given one in the tuple of arguments; None in the others."""
    first, _, rest = name.partition("/")
    return rest if first == "0" else None


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """Return the shape and dtype of a leaf, with its sharding if axes of the mesh are explicit."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else struct_of(jax.typeof(leaf))


def explicit_sharding(leaf: Any) -> Any:
    """Return how an array or a `ShapeDtypeStruct` is sharded over explicit axes of a mesh, or None."""
    has_its_own = hasattr(leaf, "sharding") and not isinstance(leaf, jax.Array)
    aval = leaf if has_its_own else jax.typeof(leaf)
    sharding = struct_of(aval).sharding
    return sharding if sharding is not None and any(sharding.spec) else None


def struct_of(aval: Any) -> jax.ShapeDtypeStruct:
    """Return an abstract value as a `ShapeDtypeStruct`, with its sharding if mesh axes are explicit."""
    sharding, weak = getattr(aval, "sharding", None), bool(getattr(aval, "weak_type", False))
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        sharding = None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak, sharding=sharding)


def binder(eqn: "JaxprEqn") -> Callable[..., list[Any]]:
    """Return `bind(*inputs, **changed_params)`, which applies an equation's primitive to new inputs.

    It returns a list, even if the primitive has one output.
    """

    def bind(*args: Any, **changed: Any) -> list[Any]:
        bound = eqn.primitive.get_bind_params({**eqn.params, **changed})
        subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # older jax: a pair
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*subfuns, *args, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    return bind


Handle = Callable[["JaxprEqn", list[Any]], Iterable[Any]]
"""`handle(eqn, values)` returns a value for each output of an equation, given those of its inputs."""


def _itself(value: Any) -> Any:
    return value


def interpret(
    closed: "ClosedJaxpr",
    inputs: Iterable[Any],
    handle: Handle,
    constant: Callable[[Any], Any] = _itself,
    literal: Callable[[Any], Any] | None = None,
) -> list[Any]:
    """Walk a jaxpr, and return the values of its outputs.

    A value is whatever the caller wants to know of an array, and `handle` makes those of an equation's
    outputs. Calls, branches and loops are equations as well: a `handle` that wants to see inside calls
    `interpret` on `called_jaxpr(eqn)`, or uses `scan_with` and `switch_with`.

    Args:
      closed: the jaxpr.
      inputs: the values of its inputs.
      handle: see `Handle`.
      constant: from an array that the jaxpr holds to its value; by default the array.
      literal: from a literal, which has `val` and `aval`, to its value; by default `constant(literal.val)`.

    Example:
      >>> import jax
      >>> from jaxprune.tracing.jaxprs import binder, interpret
      >>> closed = jax.make_jaxpr(lambda x: 2 * x + 1)(3.0)
      >>> interpret(closed, [5.0], lambda eqn, values: binder(eqn)(*values))
      [Array(11., dtype=float32, weak_type=True)]
      >>> interpret(closed, ["x"], lambda eqn, values: [(eqn.primitive.name, *values)], str)
      [('add', ('mul', '2.0', 'x'), '1.0')]
    """
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.invars, inputs, strict=True))
    values.update(zip(jaxpr.constvars, map(constant, closed.consts), strict=True))
    return run_equations(jaxpr.eqns, values, jaxpr.outvars, handle, literal or (lambda it: constant(it.val)))


def run_equations(
    eqns: Sequence["JaxprEqn"],
    values: Mapping[Any, Any],
    outputs: Sequence[Any],
    handle: Handle,
    literal: Callable[[Any], Any] = lambda it: it.val,
) -> list[Any]:
    """Walk some equations of a jaxpr, given the values of the variables they read; see `interpret`.

    A value is dropped before the next equation once nothing reads it any more, as in JAX's own evaluation:
    otherwise all intermediate arrays of a network would be held at once.
    """
    last = {var: n for n, eqn in enumerate(eqns) for var in eqn.invars if not hasattr(var, "val")}
    last.update((var, len(eqns)) for var in outputs if not hasattr(var, "val"))
    env = {var: value for var, value in values.items() if var in last}

    def read(atom: Any) -> Any:
        return literal(atom) if hasattr(atom, "val") else env[atom]

    for number, eqn in enumerate(eqns):
        made = handle(eqn, [read(atom) for atom in eqn.invars])
        env.update(pair for pair in zip(eqn.outvars, made, strict=True) if pair[0] in last)
        for atom in eqn.invars:
            if not hasattr(atom, "val") and last[atom] == number:
                env.pop(atom, None)  # it may be read twice by one equation
    return [read(atom) for atom in outputs]


def scan_with(
    eqn: "JaxprEqn", inputs: Sequence[Any], body: Callable[[list[Any]], tuple[Sequence[Any], Any]]
) -> tuple[list[Any], Any]:
    """Run a scan with another body, and stack what that returns besides along a new first axis.

    `body` goes from the inputs of one step (constants, carry, slices) to the outputs of the scan's own body,
    and any tree of arrays besides. JAX may trace it twice.
    """
    consts, carried = scan_split(eqn.params)

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], tuple[list[Any], Any]]:
        outputs, extra = body([*inputs[:consts], *carry, *slices])
        return list(outputs[:carried]), (list(outputs[carried:]), extra)

    carry, (stacked, extras) = lax.scan(
        step,
        list(inputs[consts : consts + carried]),
        list(inputs[consts + carried :]),
        length=eqn.params["length"],
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return [*carry, *stacked], extras


def switch_with(
    eqn: "JaxprEqn", inputs: Sequence[Any], branch: Callable[["ClosedJaxpr", Sequence[Any]], Any]
) -> Any:
    """Run a `cond` with other branches: `branch(closed, inputs)` in place of each branch, a `ClosedJaxpr`."""
    run = [lambda *given, b=b: branch(close(b), given) for b in eqn.params["branches"]]
    return lax.switch(inputs[0], run, *inputs[1:])


def called_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """Return the jaxpr that an equation of one of `CALLS` calls."""
    return close(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])


def inner_jaxprs(eqn: "JaxprEqn") -> Iterator["ClosedJaxpr"]:
    """Yield the jaxprs among the params of an equation: what it calls, its branches, the body of a loop."""
    for param in jax.tree.leaves(list(eqn.params.values())):
        if hasattr(param, "eqns"):
            yield close(param)


def nested_jaxprs(closed: "ClosedJaxpr") -> Iterator["ClosedJaxpr"]:
    """Yield a jaxpr and all jaxprs inside its equations, at any depth."""
    yield closed
    for eqn in closed.jaxpr.eqns:
        for inner in inner_jaxprs(eqn):
            yield from nested_jaxprs(inner)


def close(jaxpr: "Jaxpr | ClosedJaxpr") -> "ClosedJaxpr":
    """Return a jaxpr as a `ClosedJaxpr`; an open one has no constants."""
    from jax.extend.core import ClosedJaxpr

    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """Return how many of a scan's inputs are constants of its body, and how many are its carry."""
    if "ft_in" in params:  # jax 0.12
        consts, carried, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carried))
    return params["num_consts"], params["num_carry"]


def place(eqn: "JaxprEqn", called_at: str = "") -> str:
    """Return where an equation comes from, as "file:line".

    The first of these that exists: the innermost line of the user's own code; the place of the call that the
    equation is in; the innermost line of an installed package other than JAX; and, where JAX keeps no lines
    (a jaxpr loaded from a file), the shapes of the inputs, as "<float32[3,4]>".
    """
    traceback = eqn.source_info.traceback
    frames = [] if traceback is None else traceback.frames
    outside = [frame for frame in frames if not frame.file_name.startswith((_OWN, _STDLIB, "<frozen"))]
    for frame in outside:
        if not _is_installed(frame.file_name):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    if called_at:
        return called_at
    for frame in outside:
        if not frame.file_name.startswith(_JAX):
            return f"{Path(frame.file_name).name}:{frame.line_num}"
    return f"<{' '.join(str(atom.aval) for atom in eqn.invars)}>"


def is_library_call(eqn: "JaxprEqn") -> bool:
    """Return whether an equation calls a jitted function of JAX itself (`jnp.var`, `jax.nn.relu`).

    Its jaxpr is cached, so the lines in it are those of whoever called it first.
    """
    info = getattr(getattr(eqn.params.get("jaxpr"), "jaxpr", None), "debug_info", None)
    file = getattr(info, "func_filename", None)
    return file is not None and file.startswith(_JAX)


def _is_installed(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file
