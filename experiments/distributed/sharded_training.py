"""What the study of sharded training is built of: the text, the mesh, the step, and masks' fingerprints.

Params, optimizer state and masks are sharded over the mesh axis "data" (fully sharded data parallelism,
FSDP) and, of matrices inside the blocks, over "tensor" as well. The batch is sharded over "data".
"""

import hashlib
import pydoc_data.topics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from experiments.data import datasets
from experiments.run.limits import FlagError

_VALIDATION = 0.05  # of Python's help

# --- the text


def load_text(dataset: str) -> datasets.Text:
    """Return Tiny Shakespeare, or Python's own help topics, which need no download."""
    if dataset == "tiny_shakespeare":
        return datasets.load_shakespeare()
    topics = pydoc_data.topics.topics
    text = "".join(topics[name] for name in sorted(topics))
    codes = np.frombuffer(text.encode("ascii", "ignore"), np.uint8)
    vocabulary, ids = np.unique(codes, return_inverse=True)
    ids, split = ids.astype(np.uint8), round(len(ids) * (1 - _VALIDATION))
    note = "the help topics of this Python"  # another version's differ a little
    return datasets.Text(ids[:split], ids[split:], vocabulary.tobytes().decode("ascii"), note)


def feed(ids: np.ndarray, starts: np.ndarray, context: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Return a batch, sharded over "data": pieces of a text, and what follows each character.

    The pieces begin at `starts`, the same in all processes, and are `context` long. Each process reads only
    the pieces that its own devices take.
    """
    sharding = NamedSharding(mesh, P("data"))

    def rows(shift: int, index: Any) -> np.ndarray:
        return ids[starts[index[0], None] + shift + np.arange(context)].astype(np.int32)

    shape = (len(starts), context)
    x, y = (jax.make_array_from_callback(shape, sharding, partial(rows, shift)) for shift in (0, 1))
    return x, y


# --- shardings


def make_mesh(data: int, tensor: int) -> Mesh:
    """Return all devices of all processes as a mesh; XLA works out what the params' shardings leave open."""
    return jax.make_mesh((data, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)


# By the end of the path: which axis FSDP shards, and which axis tensor parallelism does. Heads and hidden
# units are split over "tensor", so that a block needs two sums over devices and no more.
_RULES: dict[str, tuple[int, int | None]] = {
    "query/kernel": (0, 1),
    "key/kernel": (0, 1),
    "value/kernel": (0, 1),
    "out/kernel": (2, 0),
    "gate/kernel": (0, 1),
    "up/kernel": (0, 1),
    "down/kernel": (1, 0),
    "head/kernel": (0, None),
    "embed/embedding": (1, None),
    "position": (1, None),
}


def param_specs(params: Any, mesh: Mesh) -> Any:
    """Return how each param is sharded; what has no rule, the norms' scales, is not.

    Raises:
      FlagError: an axis that the mesh does not divide.
    """

    def spec(path: str, leaf: Any) -> P:
        axes: list[str | None] = [None] * leaf.ndim
        for end, chosen in _RULES.items():
            for name, axis in zip(("data", "tensor"), chosen, strict=True):
                if f"/{path}".endswith(f"/{end}") and axis is not None:
                    if leaf.shape[axis] % mesh.shape[name]:
                        raise FlagError(
                            f"axis {axis} of {path}, of shape {leaf.shape}, cannot be sharded over "
                            f"{mesh.shape[name]} devices ({name}); choose a mesh or sizes that divide"
                        )
                    axes[axis] = name
        return P(*axes)

    specs = map(spec, jp.leaf_paths(params), jax.tree.leaves(params))
    return jax.tree.unflatten(jax.tree.structure(params), list(specs))


def on_mesh(specs: Any, mesh: Mesh) -> Any:
    """Return the shardings of specs on a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P))


def put(tree: Any, shardings: Any) -> Any:
    """Shard arrays that every process holds in full: each device gets its part."""

    def one(leaf: np.ndarray, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    return jax.tree.map(one, tree, shardings)


def gather(tree: Any) -> Any:
    """Return the arrays whole, as numpy, in every process."""
    return jax.tree.map(np.asarray, multihost_utils.process_allgather(tree, tiled=True))


# --- the step


class State(NamedTuple):
    """What training carries from step to step; the step is given it for good.

    Attributes:
      params: the network's.
      opt_state: of `wrap_optax`, with the masks in it.
    """

    params: Any
    opt_state: Any


Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]
"""`loss(params, x, y)`, the mean over a batch."""

Gradients = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, Any]]
"""`gradients(params, x, y) -> loss, grads`."""


def start(init: Callable[[], Any], tx: optax.GradientTransformation, mesh: Mesh) -> tuple[State, Any]:
    """Return the first state, each shard made on its device, and the params' specs.

    The masks are sharded like the params without being told. Adam's moments are not, being plain
    zeros: `optax.tree.map_params` says which leaves of its state mirror which params.
    """
    specs = param_specs(jax.eval_shape(init), mesh)
    shardings = on_mesh(specs, mesh)
    params = jax.jit(init, out_shardings=shardings)()
    opt_shardings = optax.tree.map_params(
        tx,
        lambda leaf, sharding: sharding,
        jax.eval_shape(tx.init, params),
        shardings,
        transform_non_params=lambda leaf: NamedSharding(mesh, P()),
    )
    return State(params, jax.jit(tx.init, out_shardings=opt_shardings)(params)), specs


def stepper(
    gradients: Gradients, tx: optax.GradientTransformation, state: State, literal: bool = False
) -> Any:
    """Return `step(state, x, y) -> state, loss`, compiled once; it takes over the state's memory.

    Args:
      gradients: of the loss of a batch: `jax.value_and_grad(loss)`, or `reproducible_gradients`.
      tx: the optimizer, of `wrap_optax`.
      state: the first, whose shardings the next ones keep.
      literal: compiled without rewriting arithmetic, such as x / y to x * (1 / y), which XLA's CPU
        compiler does in other places for one device than for several.
    """

    def step(state: State, x: jax.Array, y: jax.Array) -> tuple[State, jax.Array]:
        value, grads = gradients(state.params, x, y)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), opt_state), value

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    options = {"xla_disable_hlo_passes": "algsimp"} if literal else None
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)


def reproducible_gradients(loss: Loss, mesh: Mesh, specs: Any, parts: int) -> Gradients:
    """Return gradients that do not depend, to the bit, on how many devices there are.

    Floating-point sums depend on their order. So the batch is cut into as many parts whatever the
    number of devices; each part's gradient is worked out whole on one device, from params gathered
    there, by the same operations; and gradients of parts are added in pairs, pairs of pairs and so on.
    A device adds those of its own parts; then all exchange what they have, each gets all summands of
    the shard it keeps (as much as a reduce-scatter moves), and goes on adding in the same order.

    Args:
      loss: of a batch.
      mesh: the devices; its axis "tensor" has to be 1, for a product whose terms lie on several
        devices is summed by XLA.
      specs: how each param is sharded over "data".
      parts: a power of 2 that the number of devices divides.

    Returns:
      `gradients(params, x, y) -> loss, grads`.
    """
    devices = mesh.shape["data"]

    def sharded_axis(spec: P) -> int | None:
        return spec.index("data") if "data" in spec else None

    def gathered(param: jax.Array, spec: P) -> jax.Array:
        axis = sharded_axis(spec)
        return param if axis is None else lax.all_gather(param, "data", axis=axis, tiled=True)

    def summed(grad: jax.Array, spec: P) -> jax.Array:
        axis = sharded_axis(spec)
        if axis is None:
            return _in_pairs(lax.all_gather(grad, "data"))
        shards = jnp.stack(jnp.split(grad, devices, axis))
        return _in_pairs(lax.all_to_all(shards, "data", 0, 0, tiled=True))

    def on_device(params: Any, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Any]:
        params = jax.tree.map(gathered, params, specs)
        x, y = (array.reshape(parts // devices, -1, array.shape[-1]) for array in (x, y))
        found = lax.map(lambda part: jax.value_and_grad(loss)(params, *part), (x, y))
        values, grads = jax.tree.map(_in_pairs, found)
        values, grads = summed(values, P()), jax.tree.map(summed, grads, specs)
        return jax.tree.map(lambda total: total / parts, (values, grads))

    return jax.shard_map(
        on_device, mesh=mesh, in_specs=(specs, P("data"), P("data")), out_specs=(P(), specs), check_vma=False
    )


def _in_pairs(terms: jax.Array) -> jax.Array:
    """Return the sum over the first axis, a power of 2 long, of neighbours, then of neighbouring sums."""
    while len(terms) > 1:
        terms = terms[::2] + terms[1::2]
    return terms[0]


# --- what comes out


def check_shardings(state: State, shardings: Any) -> None:
    """Raise AssertionError unless params lie where they belong, and their masks where they do."""
    for tree in (state.params, optax.tree.get(state.opt_state, "masks")):
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.sharding, sharding)


def fingerprint(tree: Any) -> str:
    """Return the SHA-256 of whole arrays with their paths and shapes; of bool arrays, of packed bits.

    Example:
      >>> a, b = {"kernel": np.array([True, False])}, {"kernel": np.array([False, True])}
      >>> fingerprint(a) == fingerprint(a), fingerprint(a) == fingerprint(b)
      (True, False)
    """
    digest = hashlib.sha256()
    for path, leaf in zip(jp.leaf_paths(tree), jax.tree.leaves(tree), strict=True):
        digest.update(f"{path} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update((np.packbits(leaf) if leaf.dtype == bool else np.ascontiguousarray(leaf)).tobytes())
    return digest.hexdigest()


def prober(shardings: Any) -> Callable[[Any], str]:
    """Return `probe(params)`, a fingerprint of masks made in several ways from the same params.

    Of the params as they are and rounded to few values, so that most scores tie and the order of
    entries decides; of all together by `prune_once`, and by layer by a pruner's updates, compiled.
    """
    halves = jp.pruner(jp.scores.magnitude, jp.schedules.geometric(0.5), scope="layerwise")
    start, update = jax.jit(halves.init), jax.jit(halves.update)
    once = jax.jit(partial(jp.prune_once, scores=jp.scores.magnitude, sparsity=0.5))

    def probe(params: Any) -> str:
        masks = []
        for tree in (params, jax.tree.map(lambda leaf: np.round(leaf * 64) / np.float32(64), params)):
            placed = put(tree, shardings)
            state = update(update(start(placed), placed), placed)
            masks.append(gather((once(placed), state.masks)))
        return fingerprint(masks)

    return probe
