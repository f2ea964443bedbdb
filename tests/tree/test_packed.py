"""Packed masks are masks: every function that takes masks gives what it gives for bool ones."""

import os
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune as jp
from tests.support.profile import examples

X = jax.random.normal(jax.random.key(0), (4, 3))


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


class Two(NamedTuple):
    up: Any
    out: Any


PARAMS = Two(up={"kernel": normal(1, 3, 5), "bias": normal(2, 5)}, out={"kernel": normal(3, 5, 2)})


def network(params, x):
    return jax.nn.relu(x @ params.up["kernel"] + params.up["bias"]) @ params.out["kernel"]


def loss(params, batch):
    return jnp.mean(network(params, batch) ** 2)


GRADS = jax.grad(loss)(PARAMS, X)
GROUPS = jp.channel_groups(network, PARAMS, X)
WIDE = jp.prune_once(
    PARAMS, jp.scores.magnitude, 0.4, structure=jp.structures.channels(GROUPS)
)  # two channels of five
FINE = jp.prune_once(PARAMS, jp.scores.magnitude, sparsity=0.5)
PRUNER = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.6, end_step=4))


def some_packed(masks):
    """Only the first leaf packed."""
    leaves, treedef = jax.tree.flatten(masks)
    return treedef.unflatten([jp.pack_masks(leaves[0]), *leaves[1:]])


def train(tx, steps=3):
    params: Any = PARAMS
    state: Any = tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params, jp.unpack_masks(state)


def saved(write, read):
    def call(masks, folder):
        path = os.path.join(folder, "file")
        write(path, masks)
        return read(path)

    return call


def state_after(pruner):
    return pruner.update(pruner.init(PARAMS), PARAMS, GRADS)


def printed(summary):
    return str(summary), summary.rows


def sparse(fast):
    return fast.apply(fast.params, X)


# What takes masks, as functions of the masks (and of a folder).
USES = {
    "apply_masks": lambda m, _: jp.apply_masks(PARAMS, m),
    "apply_masks under jit": lambda m, _: jax.jit(jp.apply_masks)(PARAMS, m),
    "check_masks": lambda m, _: jp.check_masks(m, PARAMS),
    "check_pruned": lambda m, _: jp.check_pruned(jp.apply_masks(PARAMS, FINE), m),
    "intersect": lambda m, _: jp.intersect(m, WIDE),
    "intersect, second": lambda m, _: jp.intersect(WIDE, m),
    "prune_once": lambda m, _: jp.prune_once(
        PARAMS, jp.scores.magnitude, sparsity=0.2, of="remaining", masks=m
    ),
    "prune_once under jit": lambda m, _: jax.jit(
        lambda m: jp.prune_once(PARAMS, jp.scores.magnitude, sparsity=0.7, masks=m)
    )(m),
    "keep_masked": lambda m, _: train(jp.keep_masked(optax.adam(0.1), m)),
    "rigl": lambda m, _: state_after(jp.rigl(m, every=1, end_step=9)),
    "set_": lambda m, _: state_after(jp.set_(m, every=1, end_step=9)),
    "wrap_optax of rigl": lambda m, _: train(
        jp.wrap_optax(optax.adam(0.1), jp.rigl(m, every=2, end_step=9), packed=True)
    ),
    "rewind": lambda m, _: jp.rewind((PARAMS, optax.adam(0.1).init(PARAMS)), m),
    "shuffled_masks": lambda m, _: jp.shuffled_masks(jax.random.key(1), m, within=-1),
    "straight_through": lambda m, _: jax.grad(lambda p: loss(jp.straight_through(p, m, 0.1), X))(PARAMS),
    "budget": lambda m, _: jp.budget(jp.metrics.nonzeros, PARAMS, at_most=12, masks=m),
    "sensitivity": lambda m, _: str(jp.sensitivity(lambda p: loss(p, X), PARAMS, levels=(0.6, 0.8), masks=m)),
    "optimal_brain_surgeon": lambda m, _: jp.optimal_brain_surgeon(
        loss, PARAMS, 1, X, masks=m, damping=100.0
    ),
    "compact": lambda m, _: sparse(jp.compact(network, PARAMS, m, X)),
    "compact's masks": lambda m, _: jp.compact(network, PARAMS, m, X).masks,
    "sparsify": lambda m, _: sparse(jp.sparsify(network, PARAMS, m, X, choose={"up/kernel": "csr"})),
    "metrics.sparsity": lambda m, _: jp.metrics.sparsity(m),
    "metrics.sparsity under jit": lambda m, _: jax.jit(jp.metrics.sparsity)(m),
    "metrics.density": lambda m, _: jp.metrics.density(m),
    "metrics.compression": lambda m, _: jp.metrics.compression(m),
    "metrics.nonzeros": lambda m, _: jp.metrics.nonzeros(m),
    "metrics.table": lambda m, _: jp.metrics.table(m, asked=0.5),
    "metrics.collapsed": lambda m, _: jp.metrics.collapsed(
        jax.tree.map(jnp.zeros_like, m)  # bits that are 0 keep nothing
    ),
    "metrics.overlap": lambda m, _: jp.metrics.overlap(m, WIDE),
    "metrics.overlap, second": lambda m, _: jp.metrics.overlap(WIDE, m),
    "metrics.macs": lambda m, _: jp.metrics.macs(network, PARAMS, X, masks=m),
    "metrics.summary": lambda m, _: printed(jp.metrics.summary(network, PARAMS, X, masks=m)),
    "io.save": saved(lambda path, m: jp.io.save(path, PARAMS, m), lambda path: jp.io.load(path, PARAMS)),
    "io.save_safetensors": saved(
        lambda path, m: jp.io.save_safetensors(path, PARAMS, m),
        lambda path: jp.io.load_safetensors(path, PARAMS).params,
    ),
    "pack_masks": lambda m, _: jp.unpack_masks(jp.pack_masks(m)),
}


def same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.mark.parametrize("use", USES)
def test_every_use_of_masks_takes_packed_ones(use, tmp_path):
    masks = WIDE if "compact" in use else FINE
    expected = USES[use](masks, tmp_path)
    for pack in (jp.pack_masks, some_packed):
        same(USES[use](pack(masks), tmp_path), expected)


def test_kept_masks_stay_packed_in_the_state():
    tx = jp.keep_masked(optax.adam(0.1), some_packed(FINE))
    state: Any = tx.init(PARAMS)
    first, *others = jax.tree.leaves(state.masks, is_leaf=lambda x: isinstance(x, jp.PackedMask))
    assert isinstance(first, jp.PackedMask) and all(leaf.dtype == bool for leaf in others)


def test_packed_masks_in_other_containers_find_their_params():
    by_name = {"up": FINE.up, "out": FINE.out}
    tx = jp.keep_masked(optax.sgd(0.1), jp.pack_masks(by_name))
    same(train(tx)[0], train(jp.keep_masked(optax.sgd(0.1), FINE))[0])


@given(hnp.arrays(bool, st.tuples(st.integers(0, 3), st.integers(0, 9))), st.booleans())
@examples(15)
def test_a_batch_of_packed_masks_is_a_batch_of_masks(mask, scalar):
    mask = mask[0, 0] if scalar and mask.size else mask
    batch = jnp.stack([jnp.asarray(mask), ~jnp.asarray(mask)])
    packed = jax.vmap(jp.pack_masks)({"w": batch})
    np.testing.assert_array_equal(jp.unpack_masks(packed)["w"], batch)
    each = jax.vmap(jp.unpack_masks)(packed)
    np.testing.assert_array_equal(each["w"], batch)
    shapes = jax.eval_shape(jp.unpack_masks, packed)["w"]
    assert (shapes.shape, shapes.dtype) == (batch.shape, bool)
    abstract = jp.unpack_masks(jax.eval_shape(lambda: packed))["w"]
    assert (abstract.shape, abstract.dtype) == (batch.shape, bool)


def packed_state():
    tx = jp.wrap_optax(optax.adam(0.1), PRUNER, packed=True)
    return tx, tx.update(GRADS, tx.init(PARAMS), PARAMS)[1]


def test_a_state_with_packed_masks_is_rewound():
    _, state = packed_state()
    plain = jp.rewind(jp.unpack_masks(state), FINE)
    again = jp.rewind(state, jp.pack_masks(FINE))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    same(jp.unpack_masks(again), plain)
    same(again.pruner.masks, jp.pack_masks(FINE))


def test_a_state_with_packed_masks_shrinks_and_expands():
    _, state = packed_state()
    small = jp.compact(network, PARAMS, jp.pack_masks(WIDE), X)
    shrunk = small.shrink(state)
    same(jp.unpack_masks(shrunk), small.shrink(jp.unpack_masks(state)))
    assert shrunk.pruner.masks.up["kernel"].shape == (3, 3)
    back = small.expand(shrunk)
    same(jp.unpack_masks(back), small.expand(small.shrink(jp.unpack_masks(state))))
    # It trains on.
    tx = jp.wrap_optax(optax.adam(0.1), PRUNER, packed=True)
    jax.eval_shape(tx.update, small.shrink(GRADS), shrunk, small.params)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.h, self.o = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.o(nnx.relu(self.h(x)))


def trained(make, jit):
    net = Net(nnx.Rngs(0))
    opt = nnx.Optimizer(net, make(nnx.state(net, nnx.Param)), wrt=nnx.Param)

    def step(net, opt, x):
        opt.update(net, nnx.grad(lambda net: jnp.mean(net(x) ** 2))(net))

    step = nnx.jit(step) if jit else step
    for number in range(3):
        step(net, opt, normal(number, 4, 8))
    return net, opt


def optimizer(kind, packed, params):
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5)
    masks = jp.pack_masks(masks) if packed else masks
    if kind == "fixed":
        return jp.keep_masked(optax.adam(0.1), masks)
    if kind == "moving":
        pruner = jp.rigl(masks, every=2, end_step=9)
    else:
        pruner = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.7, begin_step=1, end_step=3))
    return jp.wrap_optax(optax.adam(0.1), pruner, packed=packed)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", ["gradual", "fixed", "moving"])
def test_nnx_optimizers_train_with_packed_masks_as_with_bool_ones(kind, jit):
    (net, opt), (plain, _) = (trained(partial(optimizer, kind, packed), jit) for packed in (True, False))
    params = nnx.state(net, nnx.Param)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
        nnx.to_pure_dict(params),
        nnx.to_pure_dict(nnx.state(plain, nnx.Param)),
    )
    state = nnx.as_pure(opt.opt_state)
    masks = state.masks if kind == "fixed" else state.pruner.masks
    with pytest.raises(
        ValueError, match=r"'h/bias' is a packed mask .* jaxprune.unpack_masks\(masks, params\)"
    ):
        jp.metrics.sparsity(masks)
    with pytest.raises(ValueError, match="has lost its shape"):
        jp.unpack_masks(masks)
    for again in (masks, jp.unpack_masks(masks, params)):
        jp.check_pruned(params, again)  # the params say the shapes
    zeros = sum(int((leaf == 0).sum()) for path, leaf in flat(params).items() if "kernel" in path)
    removed = jp.metrics.sparsity(jp.unpack_masks(masks, params)).prunable
    assert zeros == round(removed * 66) > 0


def flat(params):
    return dict(zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True))


def test_a_param_called_bits_is_no_packed_mask():
    params = {"q": {"bits": jnp.arange(4, dtype=jnp.uint8)}, "kernel": jnp.ones((2, 2))}
    assert jp.metrics.nonzeros(params) == 7
    masks = jp.prune_once({"bits": jnp.ones((2, 9))}, jp.scores.magnitude, sparsity=0.5)
    assert jp.metrics.sparsity(jp.pack_masks(masks)).prunable == 0.5
    assert jp.unpack_masks(params, params)["q"]["bits"] is params["q"]["bits"]


def test_packed_masks_of_other_shapes_or_paths_are_refused_as_bool_ones_are():
    with pytest.raises(
        ValueError, match=r"masks\['w'\] has shape \(3,\), but params\['w'\] has shape \(4,\)"
    ):
        jp.apply_masks({"w": jnp.ones(4)}, jp.pack_masks({"w": jnp.ones(3, bool)}))
    with pytest.raises(ValueError, match=r"Missing: w\. Not in params: v\."):
        jp.apply_masks({"w": jnp.ones(4)}, jp.pack_masks({"v": jnp.ones(4, bool)}))


def test_packed_masks_shrink_by_themselves_and_start_a_pruner():
    packed = jp.pack_masks(WIDE)
    small = jp.compact(network, PARAMS, WIDE, X)
    state: Any = small.shrink(jp.keep_masked(optax.adam(0.1), packed).init(PARAMS))
    for shrunk in (small.shrink(packed), state.masks):
        same(jp.unpack_masks(shrunk), small.masks)
    start = jp.pruner(jp.scores.magnitude, 0.8, masks=packed, where=lambda *_: True).init(PARAMS)
    same(start.masks, WIDE)
