"""Networks as files that run elsewhere: StableHLO by `jax.export`, ONNX by jax2onnx.

Both take a function and params: `apply_fn` with dense params or with `jp.apply_masks(params, masks)`, or
`small.apply` and `small.params` of a compacted network. Both formats are dense, so the file of a masked
network is as large as that of the dense one; only a compacted network has a smaller file.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import jax.export  # jax does not import it by itself
import jax.numpy as jnp
import numpy as np

from jaxprune.files.atomic import replacing
from jaxprune.files.opened import FileError, open_file
from jaxprune.files.sealed import seal, unseal
from jaxprune.tracing.jaxprs import CALLS, abstract, binder, called_jaxpr, interpret, split_static
from jaxprune.tree.checks import check_function, shown
from jaxprune.tree.leaves import array_leaves, describe, is_concrete
from jaxprune.typing import Params

__all__ = ["Program", "load", "onnx", "stablehlo"]


class Program:
    """An exported function: `program(params, *inputs)`, or `program(*inputs)` if params are frozen.

    It may be called under `jit`. Params may be another kind of tree than those it was exported with, as
    long as paths, shapes and dtypes are the same.

    Attributes:
      exported: the `jax.export.Exported` behind it, which takes the params as a flat dict by path.
      frozen: whether the params are constants of the program.
    """

    def __init__(self, exported: jax.export.Exported):
        self.exported = exported
        arguments, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        self.frozen = len(arguments) == 1
        self._params, self._inputs = ({}, *arguments) if self.frozen else arguments

    def __call__(self, *arguments: Any) -> Any:
        """Run the program.

        Raises:
          TypeError: the number of inputs is wrong, or an input is not an array: static values were fixed when
            the program was exported.
          ValueError: the paths, shapes or dtypes of params, or the shapes of inputs, are not the program's.
        """
        wanted = len(self._inputs) + (not self.frozen)
        if len(arguments) != wanted:
            names = [*(() if self.frozen else ("params",)), *(f"input {n}" for n in range(len(self._inputs)))]
            raise TypeError(
                f"the program takes {wanted} arguments ({', '.join(names)}), got {len(arguments)}. "
                "What was no array when it was exported is part of it."
            )
        inputs = arguments if self.frozen else arguments[1:]
        for number, leaf in enumerate(jax.tree.leaves(inputs)):
            if isinstance(leaf, (bool, str)) or callable(leaf):
                raise TypeError(
                    f"leaf {number} of the inputs is {leaf!r}, but the program takes arrays alone."
                )
        if self.frozen:
            return self.exported.call(inputs)
        leaves = array_leaves(arguments[0])
        if leaves.keys() != self._params.keys():
            missing = ", ".join(sorted(self._params.keys() - leaves.keys())) or "none"
            extra = ", ".join(sorted(leaves.keys() - self._params.keys())) or "none"
            raise ValueError(f"params are not those of the program. Missing: {missing}. Not in it: {extra}.")
        for path, leaf in leaves.items():
            if describe(leaf) != describe(self._params[path]):
                raise ValueError(
                    f"params[{path!r}] is {describe(leaf)}; the program takes {describe(self._params[path])}."
                )
        return self.exported.call(leaves, inputs)

    def to_bytes(self) -> bytes:
        """Return the program as bytes: those of `jax.export`, and a checksum that its `deserialize` ignores.

        Raises:
          ImportError: flatbuffers is not installed.
          ValueError: inputs or outputs are in containers that `jax.export` does not know.
        """
        _need_flatbuffers()
        return seal(bytes(self.exported.serialize()))

    def save(self, path: str | os.PathLike[str]) -> int:
        """Write the bytes to a file, all or none, and return their number."""
        data = self.to_bytes()
        with replacing(path) as new:
            new.write_bytes(data)
        return len(data)


def stablehlo(
    apply_fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    frozen: bool = False,
    batch: str | None = "b",
    platforms: Sequence[str] | None = None,
) -> Program:
    """Export a function as StableHLO, which later versions of JAX, TensorFlow and others run.

    Args:
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      params: a pytree of arrays.
      *inputs: examples, arrays or `jax.ShapeDtypeStruct`, in containers or not. Bools, strings and
        functions are static: they become part of the program, which takes the other inputs alone.
      frozen: make params constants of the program, which then takes the inputs alone. Otherwise the
        program takes params too, and its file does not hold them.
      batch: a name for the first axis of every array among the inputs, which may then have any size;
        None for the sizes of the examples.
      platforms: where the program will run, as in `("cpu", "cuda", "tpu")`; by default where it is exported.

    Raises:
      ValueError: first axes of different sizes; or the function cannot be traced without knowing the
        size of the batch.
      TypeError: an input mixes static values with arrays.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxprune as jp
      >>> params = {"w": jnp.ones((3, 2))}
      >>> program = jp.export.stablehlo(lambda params, x: x @ params["w"], params, jnp.ones((1, 3)))
      >>> file = os.path.join(tempfile.mkdtemp(), "program")
      >>> size = program.save(file)
      >>> jp.export.load(file)(params, jnp.ones((5, 3))).shape
      (5, 2)
    """
    arrays, function = _arrays_alone(apply_fn, inputs)
    specs = _specs(arrays, batch)
    leaves, treedef = array_leaves(params), jax.tree.structure(params)

    def by_path(leaves: dict[str, Any], inputs: Any) -> Any:
        return function(treedef.unflatten([leaves[path] for path in paths]), inputs)

    paths = list(leaves)
    several = isinstance(platforms, Sequence) and all(isinstance(each, str) for each in platforms)
    if platforms is not None and (isinstance(platforms, str) or not several):
        raise TypeError(f"platforms must be a list such as ['cpu', 'cuda'], or None, got {shown(platforms)}.")
    export = jax.export.export(
        jax.jit((lambda inputs: by_path(leaves, inputs)) if frozen else by_path), platforms=platforms
    )
    arguments = (specs,) if frozen else ({path: abstract(leaf) for path, leaf in leaves.items()}, specs)
    return Program(_traced_with_batch(batch, lambda: export(*arguments)))


def load(path: str | os.PathLike[str]) -> Program:
    """Read a program that `Program.save` wrote. It is a program: load only files that you trust.

    Every byte is under a checksum, so a damaged file is refused. The checksum does not tell who wrote the
    file, and when the program is called, XLA compiles and runs it.

    Raises:
      ImportError: flatbuffers is not installed.
      FileError: a ValueError: the file is damaged, or not a program.
      OSError: the file cannot be read.
    """
    _need_flatbuffers()
    name = os.fspath(path)
    with open_file(path) as file:
        data = bytearray(file.read())
    try:
        return Program(jax.export.deserialize(unseal(data)))
    except FileError as error:
        raise FileError(f"{name}: {error}.") from None
    except Exception as error:  # the parser of jax.export may raise anything
        raise FileError(f"{name}: not an exported program ({type(error).__name__}: {error}).") from None


def _need_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ImportError("files of jax.export need flatbuffers: pip install 'jaxprune[export]'") from None


def onnx(
    apply_fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    batch: str | None = "b",
    path: str | os.PathLike[str] | None = None,
    verify: bool = True,
) -> bytes:
    """Export a function as ONNX, with the params as its constants.

    JAX traces the function first, and jax2onnx is given primitives alone, so that flax, equinox and plain
    functions, dense or compacted, are all the same to it. Calls are inlined, and the axes that a maximum over
    windows leaves alone are merged into one, since onnxruntime pools over three axes at most.

    jax2onnx replaces functions of jax in the whole process (`jnp.cumsum`, when it first converts). They are
    put back when the export ends; other threads that run during it may call those of jax2onnx.

    Args:
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      params: a pytree of arrays.
      *inputs: examples, as for `stablehlo`.
      batch: as for `stablehlo`.
      path: a file to write the model to, all of it or nothing.
      verify: run the model under onnxruntime, on the inputs and (with a symbolic batch) on twice as
        many, and compare its outputs with those of the function. Inputs without values are not verified.

    Returns:
      The model as bytes. `onnxruntime.InferenceSession(model)` takes them; inputs are in the order of
      `jax.tree.leaves(inputs)`, outputs in that of the output's leaves.

    Raises:
      ImportError: jax2onnx or onnxruntime is not installed.
      NotImplementedError: jax2onnx or onnxruntime cannot do something in the function; the message says what.
      RuntimeError: the outputs of the model are not those of the function.
      ValueError, TypeError: as for `stablehlo`.
    """
    convert, runtime = _packages()
    arrays, function = _arrays_alone(apply_fn, inputs)
    leaves, treedef = jax.tree.flatten(_specs(arrays, batch))

    def flat(*leaves: Any) -> list[Any]:
        return jax.tree.leaves(function(params, treedef.unflatten(leaves)))

    closed = _traced_with_batch(batch, lambda: jax.make_jaxpr(flat)(*leaves))
    try:
        with _side_effects_undone():
            model = convert(lambda *given: _replay(closed, given), inputs=leaves)
        model = model.SerializeToString()
    except Exception as error:  # another package may raise anything
        raise NotImplementedError(
            f"jax2onnx cannot convert the function ({type(error).__name__}: {error}). "
            "jp.export.stablehlo can."
        ) from error
    if verify and is_concrete(arrays, params):
        _compare(runtime, model, function, params, arrays)
        if batch is not None:
            _compare(runtime, model, function, params, jax.tree.map(_twice, arrays))
    if path is not None:
        with replacing(path) as new:
            new.write_bytes(model)
    return model


def _packages() -> tuple[Callable[..., Any], Any]:
    try:
        with _side_effects_undone():
            import onnxruntime
            from jax2onnx import to_onnx
    except ImportError as error:
        raise ImportError(f"ONNX files need more packages ({error}): pip install 'jaxprune[onnx]'") from None
    return to_onnx, onnxruntime


@contextmanager
def _side_effects_undone() -> Iterator[None]:
    """Undo the side effects of jax2onnx on the process.

    It logs and warns about itself (deprecations of jax, plugins that do not load), and it replaces functions
    of jax for good when it loads its plugins, at the first conversion: `jnp.cumsum` by one that takes fewer
    arguments. Other versions may replace others, so the public modules of jax are compared and restored.

    A separate process would be cleaner, but nothing can be handed to it: jaxprs do not pickle, and a program
    of `jax.export` is one primitive, `call_exported`, which jax2onnx does not convert.
    """
    loggers = [logging.getLogger(name) for name in ("jax2onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    public = [
        (module, dict(vars(module)))
        for name, module in list(sys.modules.items())
        if (name == "jax" or name.startswith("jax.")) and isinstance(module, ModuleType)
    ]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for module, before in public:
            for name, value in before.items():
                if vars(module).get(name) is not value:
                    setattr(module, name, value)


def _arrays_alone(
    apply_fn: Callable[..., Any], inputs: Sequence[Any]
) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """Return the inputs that are arrays, and the function of params and a tuple of these."""
    check_function(apply_fn, "an exported program", "apply_fn(params, *inputs)")
    moving = []
    for number, given in enumerate(inputs):
        arrays, _ = split_static((given,))
        if arrays and len(arrays) < len(jax.tree.leaves(given)):
            raise TypeError(f"input {number} mixes arrays with static values; pass these as separate inputs.")
        if arrays:
            moving.append(number)

    def function(params: Params, arrays: Sequence[Any]) -> Any:
        every = list(inputs)
        for number, array in zip(moving, arrays, strict=True):
            every[number] = array
        return apply_fn(params, *every)

    return tuple(inputs[number] for number in moving), function


def _specs(inputs: Any, batch: str | None) -> Any:
    """Return shapes and dtypes of the inputs, with a symbol for the first axis of each."""
    specs = jax.tree.map(abstract, inputs)
    if batch is not None and not (isinstance(batch, str) and batch.isidentifier()):
        raise ValueError(f"batch must be the name of a size such as 'b', or None, got {shown(batch)}.")
    if batch is None:
        return specs
    sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(specs) if leaf.shape})
    if len(sizes) > 1:
        raise ValueError(
            f"the first axes of the inputs have the sizes {', '.join(map(str, sizes))}, so not all are the "
            "batch. Pass batch=None, and jax.ShapeDtypeStruct with symbolic sizes where you want them."
        )
    (symbol,) = jax.export.symbolic_shape(batch)
    return jax.tree.map(
        lambda leaf: leaf.update(shape=(symbol, *leaf.shape[1:])) if leaf.shape else leaf, specs
    )


def _traced_with_batch(batch: str | None, trace: Callable[[], Any]) -> Any:
    try:
        return trace()
    except Exception as error:
        if batch is None or not ("symbolic" in str(error) or "Inconclusive" in type(error).__name__):
            raise
        raise ValueError(
            f"the function cannot be traced with a batch of any size {batch!r} ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}). Pass batch=None for that of the examples."
        ) from error


def _replay(closed: Any, inputs: Sequence[Any]) -> list[Any]:
    """Apply a jaxpr, with calls inlined and maxima over windows as ONNX takes them."""

    def handle(eqn: Any, given: list[Any]) -> list[Any]:
        if eqn.primitive.name in CALLS:
            return _replay(called_jaxpr(eqn), given)
        if eqn.primitive.name == "reduce_window_max":
            return [_window_max(given[0], eqn)]
        return binder(eqn)(*given)

    return interpret(closed, inputs, handle)


def _window_max(x: jax.Array, eqn: Any) -> Any:
    """Apply `reduce_window_max` with the axes that it leaves alone merged into the first one.

    jax2onnx pools over every axis, and onnxruntime over three at most.
    """
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    settings = {name: tuple(eqn.params[name]) for name in names}
    padding = tuple(map(tuple, eqn.params["padding"]))
    alone = [
        axis for axis in range(x.ndim)
        if all(values[axis] == 1 for values in settings.values()) and padding[axis] == (0, 0)
    ]  # fmt: skip
    moving = [axis for axis in range(x.ndim) if axis not in alone]
    if x.ndim <= 3 or not moving:
        return binder(eqn)(x)[0]
    order = [*alone, *moving]
    front = [x.shape[axis] for axis in alone]
    rows = jnp.transpose(x, order).reshape(-1, *(x.shape[axis] for axis in moving))
    # The primitive itself, rather than lax.reduce_window: it takes no initial value, so padding never wins.
    pooled = eqn.primitive.bind(
        rows,
        padding=((0, 0), *(padding[axis] for axis in moving)),
        **{name: (1, *(values[axis] for axis in moving)) for name, values in settings.items()},
    )
    return jnp.transpose(pooled.reshape(*front, *pooled.shape[1:]), np.argsort(order).tolist())


def _twice(leaf: Any) -> Any:
    leaf = np.asarray(leaf)
    return np.concatenate([leaf, leaf]) if leaf.ndim else leaf


def _compare(runtime: Any, model: bytes, function: Any, params: Params, inputs: Any) -> None:
    """Run a model beside its function; outputs may differ by a thousandth of the largest."""
    wanted = list(map(np.asarray, jax.tree.leaves(jax.jit(function)(params, inputs))))
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # do not log errors, which are raised as well
    try:
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        leaves = map(np.asarray, jax.tree.leaves(inputs))
        got = session.run(None, dict(zip(names, leaves, strict=True)))
    except Exception as error:  # another package may raise anything
        raise NotImplementedError(f"onnxruntime cannot run the model that jax2onnx made: {error}") from error
    for number, (ours, theirs) in enumerate(zip(wanted, got, strict=True)):
        theirs = np.asarray(theirs)
        if ours.shape != theirs.shape:
            raise RuntimeError(
                f"output {number} of the ONNX model has shape {theirs.shape}, not {ours.shape}."
            )
        difference = np.abs(theirs.astype(np.float64) - ours.astype(np.float64))
        largest = np.abs(ours.astype(np.float64)).max(initial=0.0)
        if not difference.max(initial=0.0) <= 1e-3 * largest + 1e-6:
            raise RuntimeError(
                f"output {number} of the ONNX model differs by {difference.max():.3g} from the function's, "
                f"whose largest is {largest:.3g}. This is a bug in jax2onnx or in jaxprune; "
                "jp.export.stablehlo gives the function itself."
            )
