"""What becomes of one model: grouped, pruned, compacted, checked. Run in a process of its own.

python -m experiments.real_models.measure haiku/MLP 0.3 0 12
"""

import json
import math
import os
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from experiments.real_models.case import Case, Model, is_floating, moved
from jaxprune.graph import Group
from jaxprune.graph.equivalence import with_state

_COMPILER = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TOLERANCE = 1e-4  # relative to the largest output, in float32
HALF_TOLERANCE = 0.05  # where the network computes in 16 bits
_MARK = "result: "


class _StageError(Exception):
    """An exception, with the stage of the measurement in which it came."""

    def __init__(self, stage: str):
        super().__init__(stage)
        self.stage = stage


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    except Exception as error:
        raise _StageError(name) from error
    finally:
        seconds[name] = round(time.perf_counter() - start, 2)


def measure(model: Model, fraction: float = 0.3, seed: int = 0) -> dict[str, Any]:
    """Prune a fraction of the units of every removable group, those with the lowest L2 norms, and compare.

    Returns:
      The figures. `status` is "ok"; "wrong" if an error is above the tolerance; "refused" if no group is
      removable; "failed" with `stage` and `reason` where jaxprune raised an exception; "broken" where the
      model's own code did; "memory" where there was not enough.
    """
    line: dict[str, Any] = {"model": model.name, "kind": model.kind, "ours": model.ours, "note": model.note}
    seconds: dict[str, float] = {}
    line |= {"packages": model.versions(), "fraction": fraction, "seed": seed, "seconds": seconds}
    try:
        rng = np.random.default_rng(zlib.crc32(f"{model.name} {seed}".encode()))
        with _stage("build", seconds):
            case = model.build(rng)
        with _stage("call", seconds):
            jax.block_until_ready(jax.tree.leaves(jax.eval_shape(case.apply, case.params, *case.inputs)))
        line |= _figures(case, fraction, rng, seconds)
    except _StageError as error:
        cause = error.__cause__
        assert cause is not None
        status = "broken" if error.stage in ("build", "call") else "failed"
        if out_of_memory(f"{type(cause).__name__}: {cause}"):
            status = "memory"
        line |= {"status": status, "stage": error.stage, "reason": _said(cause)}
    return line


def _figures(
    case: Case, fraction: float, rng: np.random.Generator, seconds: dict[str, float]
) -> dict[str, Any]:
    apply, params, inputs, state = case
    size = _size(params)
    with _stage("groups", seconds):
        groups = jp.channel_groups(apply, params, *inputs, state=state)
    removable = groups.removable()
    line: dict[str, Any] = {
        "params": size,
        "groups": len(groups.groups),
        "removable": len(removable),
        "refusals": [[group.name, str(group.why_not)] for group in groups.groups if not group.removable],
        "whole": _counted([whole.why for whole in groups.whole]),
        "share": 1 - _left(params, removable, lambda group: np.ones(group.units, bool)) / size,
    }
    if not removable:
        reasons = [why for _, why in line["refusals"]] or list(line["whole"])
        return line | {"status": "refused", "reason": reasons[0] if reasons else "it has no params"}
    with _stage("prune", seconds):
        structure = jp.structures.channels(groups)
        # Whole numbers, as quantized weights are, give no scores; the scales beside them do.
        whole = not all(map(is_floating, jax.tree.leaves(params)))
        where: dict[str, Any] = {"where": lambda _, leaf: is_floating(leaf)} if whole else {}
        prune = partial(
            jp.prune_once,
            **where,
            scores=jp.scores.magnitude,
            sparsity=fraction,
            structure=structure,
            scope="layerwise",
        )
        masks = jax.jit(prune)(params)  # op by op every shape would be compiled for itself
        arrays = dict(zip(jp.leaf_paths(masks), map(np.asarray, jax.tree.leaves(masks)), strict=True))
        stacks = dict(getattr(groups, "stacks", {}))
        line["expected"] = _left(params, removable, lambda group: _dead(group, arrays, stacks)) / size
    with _stage("compact", seconds):
        small = jp.compact(apply, params, masks, *inputs, state=state, verify=False)
        line["ratio"] = _size(small.params) / size
        line["stayed"] = [str(stayed) for stayed in small.not_removed]
    with _stage("macs", seconds):
        shapes = [jax.eval_shape(lambda p=p: p) for p in (params, small.params)]
        dense, left = (
            jp.metrics.macs(f, s, *inputs).total for f, s in zip((apply, small.apply), shapes, strict=True)
        )
        line |= {"macs": dense, "macs_ratio": left / dense if dense else None}
    with _stage("check", seconds):
        line |= _errors(case, jp.apply_masks(params, masks), small, rng)
    worst = max(line["error"], line["error_moved"])
    line["status"] = "ok" if worst <= line["tolerance"] else "wrong"
    return line


# --- what is counted


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _left(params: Any, groups: Sequence[Group], dead: Callable[[Group], np.ndarray]) -> int:
    """Return how many entries of the params stay without the units of groups that `dead` marks.

    Counted by leaf, as the product over its axes of the slices that are in no dead unit. It uses no
    plan: what `compact` reaches is held against it. Leaves that no group has count whole.
    """
    gone: dict[str, dict[int, np.ndarray]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for group in groups:
        marked = dead(group)
        for member in group.members:
            shapes[member.path] = tuple(member.shape)
            axes = gone.setdefault(member.path, {})
            slices = axes.setdefault(member.axis, np.zeros(member.shape[member.axis], bool))
            slices[np.asarray(member.indices)[marked].ravel()] = True
    left = _size(params)
    for path, axes in gone.items():
        shape = shapes[path]
        kept = [n - int(axes[axis].sum()) if axis in axes else n for axis, n in enumerate(shape)]
        left += math.prod(kept) - math.prod(shape)
    return left


def _dead(group: Group, masks: dict[str, np.ndarray], stacks: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Return which units of a group the masks remove: those whose slices are all masked."""
    dead = np.ones(group.units, bool)
    for member in group.members:
        if member.divisor:
            continue
        mask = _of_layer(masks, member.path, stacks)
        alive = np.asarray(mask.any(axis=tuple(axis for axis in range(mask.ndim) if axis != member.axis)))
        dead &= ~alive[np.asarray(member.indices)].any(axis=1)
    return dead


def _of_layer(masks: dict[str, np.ndarray], path: str, stacks: dict[str, tuple[int, ...]]) -> np.ndarray:
    """Return the mask of a leaf, or of one layer of a leaf that stacks them: "path[2]"."""
    if path in masks:
        return masks[path]
    name, _, rest = path.rpartition("[")
    place: list[Any] = [slice(None)] * masks[name].ndim
    for axis, number in zip(stacks[name], rest.rstrip("]").split(","), strict=True):
        place[axis] = int(number)
    return masks[name][tuple(place)]


def _counted(reasons: Sequence[str]) -> dict[str, int]:
    """Return how often each reason is given, the most frequent first."""
    counts = {reason: reasons.count(reason) for reason in dict.fromkeys(reasons)}
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


# --- what is compared


def _errors(case: Case, masked: Any, small: jp.Compacted, rng: np.random.Generator) -> dict[str, Any]:
    """Return the compacted model against the masked one, and against the dense one at random small params."""
    apply, _, inputs, state = case

    def both(dense: Any, params: Any) -> tuple[Any, Any]:
        outputs = apply(dense, *inputs)
        if state is not None:  # what is new values of params is as small as these
            outputs = with_state(outputs, state, small.shrink(state(outputs)))
        return outputs, small.apply(params, *inputs)

    arguments = masked, small.params
    compiled = jax.jit(both).lower(*arguments).compile(compiler_options=_COMPILER)
    error, finite, half = difference(*compiled(*arguments))
    others = moved(small.params, rng)
    error_moved, *_ = difference(*compiled(small.expand(others), others))
    leaves = [*jax.tree.leaves(small.params), *jax.tree.leaves(inputs)]
    half |= any(is_floating(leaf) and jnp.finfo(leaf.dtype).bits < 32 for leaf in leaves)
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    return {"error": error, "error_moved": error_moved, "finite": finite, "tolerance": tolerance}


def difference(first: Any, second: Any) -> tuple[float, bool, bool]:
    """Compare two trees of arrays.

    Entries that are not finite have to be the same in both, or the difference is infinite.

    Returns:
      The largest difference relative to the largest entry of all; whether all is finite; whether there are
      numbers of 16 bits.
    """
    largest = apart = 0.0
    finite, half = True, False
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if a.shape != b.shape:
            raise ValueError(f"outputs of shapes {a.shape} and {b.shape}")
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) or not a.size:
            continue
        half |= jnp.issubdtype(a.dtype, jnp.floating) and jnp.finfo(a.dtype).bits < 32
        wide = np.complex128 if jnp.issubdtype(a.dtype, jnp.complexfloating) else np.float64
        x, y = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
        known = np.isfinite(x)
        finite &= bool(known.all())
        if not np.isfinite(y[known]).all() or not np.array_equal(x[~known], y[~known], equal_nan=True):
            return math.inf, finite, half
        if known.any():
            largest = max(largest, float(np.abs(x[known]).max()))
            apart = max(apart, float(np.abs(x[known] - y[known]).max()))
    return (apart / largest if largest else apart), finite, half


# --- in a process of its own


def _said(error: BaseException) -> str:
    """Return an exception in a line, and the line of code it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    place = f" [{'/'.join(Path(last.filename).parts[-2:])}:{last.lineno}]" if last else ""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}{place}"


def out_of_memory(text: str) -> bool:
    """Return whether an exception, or a process's last words, say that memory was not enough."""
    return any(word in text for word in ("MemoryError", "bad_alloc", "RESOURCE_EXHAUSTED", "Out of memory"))


def read(output: str) -> dict[str, Any] | None:
    """Return the figures that a process printed; None if it did not come so far."""
    lines = [line for line in output.splitlines() if line.startswith(_MARK)]
    return json.loads(lines[-1].removeprefix(_MARK)) if lines else None


def arguments(name: str, fraction: float, seed: int, memory: float) -> list[str]:
    """Return the command that measures a model and prints its figures."""
    return [
        sys.executable,
        "-m",
        "experiments.real_models.measure",
        name,
        str(fraction),
        str(seed),
        str(memory),
    ]


def environment() -> dict[str, str]:
    """Return the environment of a model's process: Keras on JAX, the CPU, quick compilation."""
    fixed = {
        "KERAS_BACKEND": "jax",
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_OFFLINE": "1",
        "USE_TF": "0",
        "USE_TORCH": "0",
    }
    return {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | dict(os.environ) | fixed


def main(argv: Sequence[str]) -> None:
    """Measure the model of a name and prints a line of JSON."""
    from experiments.real_models.catalog import MODELS

    name, fraction, seed, memory = argv
    limit_memory(float(memory))
    (model,) = (model for model in MODELS if model.name == name)
    line = measure(model, float(fraction), int(seed))
    print(f"\n{_MARK}{json.dumps(line)}", flush=True)


def limit_memory(gigabytes: float) -> None:
    """Let this process have so much memory; what asks for more ends in a MemoryError or its death."""
    import resource

    most = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


if __name__ == "__main__":
    main(sys.argv[1:])
