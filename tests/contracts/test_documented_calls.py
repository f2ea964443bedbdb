"""The public contract: the calls that every user makes, as they are documented."""

import importlib.metadata
import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        return nn.Dense(4)(nn.LayerNorm()(x))


@pytest.fixture
def problem():
    model = Mlp()
    x = jax.random.normal(jax.random.key(1), (32, 16))
    y = jax.random.randint(jax.random.key(2), (32,), 0, 4)
    params = model.init(jax.random.key(0), x)["params"]

    def loss_fn(params, batch):
        x, y = batch
        logits = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return params, loss_fn, (x, y)


def removed(masks):
    return sum(int((~leaf).sum()) for leaf in jax.tree.leaves(masks))


TOTAL = 16 * 16 + 16 * 4


def test_one_shot(problem):
    params, loss_fn, batch = problem
    grads = jax.grad(loss_fn)(params, batch)
    my_scores = jax.tree.map(lambda w: w**2, params)

    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.9)
    assert removed(masks) == round(0.9 * TOTAL)
    masks = jp.prune_once(params, jp.scores.taylor, grads=grads, sparsity=0.5, scope="layerwise")
    assert {name: removed(masks[name]) for name in masks} == {"Dense_0": 128, "Dense_1": 32, "LayerNorm_0": 0}
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.2, of="remaining", masks=masks)
    assert removed(masks) == 160 + round(0.2 * 160)
    masks = jp.prune_once(params, jp.scores.magnitude, count=100)
    assert removed(masks) == 100
    masks = jp.prune_once(params, my_scores, sparsity=0.9)
    assert removed(masks) == round(0.9 * TOTAL)
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=jp.structures.nm(2, 4))
    assert (masks["Dense_0"]["kernel"].reshape(4, 4, 16).sum(1) == 2).all()
    masks = jp.prune_once(
        params, jp.scores.magnitude, sparsity=0.3, structure=jp.structures.slices(axis=-1, norm=1)
    )
    assert sum(int((~masks[d]["kernel"].any(0)).sum()) for d in ("Dense_0", "Dense_1")) == round(0.3 * 20)
    masks = jp.prune_once(
        params, jp.scores.random, key=jax.random.key(0), sparsity=0.9, where=jp.matching("*/kernel")
    )
    assert removed(masks) == round(0.9 * TOTAL)
    masks = jp.prune_once(
        params, jp.scores.magnitude, sparsity=jp.distributions.erk(params, 0.9), scope="layerwise"
    )
    assert removed(masks) == pytest.approx(0.9 * TOTAL, abs=1)
    pruned = jp.apply_masks(params, masks)
    assert jp.metrics.sparsity(pruned).prunable == pytest.approx(0.9, abs=0.01)


def test_gradual_inside_an_optax_optimizer(problem):
    params, loss_fn, batch = problem
    pruner = jp.pruner(
        jp.scores.magnitude,
        sparsity=jp.schedules.cubic(0.9, begin_step=10, end_step=80),
        scope="global",
        where=jp.kernels,
        every=10,
    )
    tx = jp.wrap_optax(optax.adamw(1e-3), pruner)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    opt_state = tx.init(params)

    @jax.jit
    def train_step(params, opt_state, batch):
        grads = jax.grad(loss_fn)(params, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(80):
        params, opt_state = train_step(params, opt_state, batch)
    masks = optax.tree.get(opt_state, "masks")
    jp.check_pruned(params, masks)
    assert removed(masks) == round(0.9 * TOTAL)
    assert jp.metrics.nonzeros(params) == 16 + 4 + 32 + TOTAL - round(0.9 * TOTAL)

    tx = jp.keep_masked(optax.adam(1e-3), masks)
    updates, _ = tx.update(jax.grad(loss_fn)(params, batch), tx.init(params), params)
    jp.check_pruned(optax.apply_updates(params, updates), masks)


def run_python(code):
    return subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_import_is_clean_and_brings_no_framework():
    result = run_python(
        "import sys, jaxprune\n"
        "heavy = {'flax', 'orbax', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'tqdm', 'equinox'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
        "print(jaxprune.__version__)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.splitlines() == ["[]", importlib.metadata.version("jaxprune")]


def test_import_adds_little_to_importing_jax_and_optax():
    # One process, so that the machine's noise meets both: the share of jaxprune in the whole.
    code = (
        "import time; a = time.perf_counter(); import jax, optax; b = time.perf_counter()\n"
        "import jaxprune; c = time.perf_counter(); print((c - a) / (b - a))"
    )
    # With compiled modules, as every run but the first has them.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # The least of a few, because the machine may be busy.
    assert any(float(subprocess.check_output([sys.executable, "-c", code], env=env)) < 1.2 for _ in range(4))


def test_every_public_name_exists_and_is_documented():
    for name in jp.__all__:
        assert getattr(jp, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        jp.prune_everything  # noqa: B018


def test_structured(problem):
    params, _loss_fn, (x, _) = problem
    x2 = jnp.concatenate([x, x])

    def apply_fn(params, x):
        return Mlp().apply({"params": params}, x)

    opt_state = optax.adam(1e-3).init(params)
    groups = jp.channel_groups(apply_fn, params, x)
    masks = jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, structure=jp.structures.channels(groups))
    small = jp.compact(apply_fn, params, masks, x)
    y = small.apply(small.params, x2)
    assert small.params["Dense_0"]["kernel"].shape == (16, 8)
    assert jnp.allclose(y, apply_fn(jp.apply_masks(params, masks), x2), atol=1e-5)
    opt_state = small.shrink(opt_state)
    assert opt_state[0].mu["Dense_1"]["kernel"].shape == (8, 4)
    params = small.expand(small.params)
    jp.check_pruned(params, masks)
