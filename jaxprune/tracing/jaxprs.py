"""What walking a jaxpr takes: applying an equation, where it came from, arguments split into arrays."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
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
_OWN = str(Path(__file__).parent) + "/"
_STDLIB = str(Path(os.__file__).parent) + "/"
_JAX = str(Path(jax.__file__).parent) + "/"


def split_static(inputs: Sequence[Any]) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """The arrays and numbers among some inputs by path, and how to put others in their place.

    Paths are sorted as JAX sorts the keys of a dict: the values are in the order in which a function
    that is traced with the dict takes them (the input "10" before "2").

    What is neither (a bool such as `train=True`, a string, a function) stays as it is.
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
    """The jaxpr of a function, and its inputs by path in the jaxpr's order.

    Paths are those of the tuple of arguments; see `of_first` for those of the first.
    """
    check_function(function, "tracing", "of arrays")
    arrays, rebuild = split_static(arguments)
    shapes = {name: abstract(leaf) for name, leaf in arrays.items()}
    return jax.make_jaxpr(lambda arrays: function(*rebuild(arrays)))(shapes), arrays


def of_first(name: str) -> str | None:
    """From a path in a tuple of arguments to that in the first of them; None for the others."""
    first, _, rest = name.partition("/")
    return rest if first == "0" else None


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf, and on a mesh with explicit axes how it is sharded."""
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else struct_of(jax.typeof(leaf))


def explicit_sharding(leaf: Any) -> Any:
    """How an array, or what has a shape, is sharded over explicit axes of a mesh; None where it is not."""
    has_its_own = hasattr(leaf, "sharding") and not isinstance(leaf, jax.Array)
    aval = leaf if has_its_own else jax.typeof(leaf)
    sharding = struct_of(aval).sharding
    return sharding if sharding is not None and any(sharding.spec) else None


def struct_of(aval: Any) -> jax.ShapeDtypeStruct:
    """An abstract value as a `jax.ShapeDtypeStruct`, with its sharding where axes of a mesh are explicit."""
    sharding, weak = getattr(aval, "sharding", None), bool(getattr(aval, "weak_type", False))
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or AxisType.Explicit not in mesh.axis_types:
        sharding = None
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=weak, sharding=sharding)


def binder(eqn: "JaxprEqn") -> Callable[..., list[Any]]:
    """Applies an equation's primitive to new inputs, perhaps with other parameters; gives a list."""

    def bind(*args: Any, **changed: Any) -> list[Any]:
        bound = eqn.primitive.get_bind_params({**eqn.params, **changed})
        subfuns, params = bound if isinstance(bound, tuple) else ((), bound)  # older jax: a pair
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*subfuns, *args, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    bind.has_effects = bool(eqn.effects)  # type: ignore[attr-defined]
    return bind


def called_jaxpr(eqn: "JaxprEqn") -> "ClosedJaxpr":
    """The jaxpr that an equation of one of `CALLS` calls."""
    return close(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])


def inner_jaxprs(eqn: "JaxprEqn") -> Iterator["Jaxpr"]:
    """The jaxprs among the params of an equation: what it calls, the branches, the body of a loop."""
    for param in eqn.params.values():
        for each in param if isinstance(param, (tuple, list)) else (param,):
            jaxpr = getattr(each, "jaxpr", each)
            if hasattr(jaxpr, "eqns"):
                yield jaxpr


def close(jaxpr: "Jaxpr | ClosedJaxpr") -> "ClosedJaxpr":
    """A jaxpr that holds its constants, of one that may have none."""
    from jax.extend.core import ClosedJaxpr

    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, ())


def scan_split(params: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants of its body, and how many are carried round."""
    if "ft_in" in params:  # jax 0.12
        consts, carried, _ = params["ft_in"].unpack()
        return len(list(consts)), len(list(carried))
    return params["num_consts"], params["num_carry"]


def place(eqn: "JaxprEqn", called_at: str = "") -> str:
    """Where an equation comes from, as "file:line".

    That is the innermost line outside Python, JAX's own and installed packages that led to it; else the
    place of the call that it is in; else the line of the installed package; else, for what JAX keeps
    no line of (a jaxpr that was loaded from a file), the shapes of its inputs, as "<float32[3,4]>".
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
    """Whether an equation calls a jitted function of JAX's own (`jnp.var`, `jax.nn.relu`).

    Its jaxpr is cached, so the lines in it are those of whoever called it first.
    """
    info = getattr(getattr(eqn.params.get("jaxpr"), "jaxpr", None), "debug_info", None)
    file = getattr(info, "func_filename", None)
    return file is not None and file.startswith(_JAX)


def _is_installed(file: str) -> bool:
    return "site-packages" in file or "dist-packages" in file
