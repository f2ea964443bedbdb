"""jaxprune beside torch.nn.utils.prune: the same masks, on tensors without ties.

What torch does is stated in numpy, in `oracles/brute_force.py`. Where torch is installed, it is asked too.
"""

import importlib
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.oracles import brute_force

try:
    torch: Any = importlib.import_module("torch")
    prune: Any = importlib.import_module("torch.nn.utils.prune")
except ImportError:
    torch = prune = None

# Some amounts take all there is, and torch says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:layer collapse")
needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")

AMOUNTS = [0.0, 0.1, 0.25, 0.3, 0.5, 0.77, 0.9, 0.99, 3, 5]


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32)


def module(*weights):
    """A torch module with parameters p0, p1, ..., if torch is there."""
    made = torch.nn.Module() if torch else None
    for i, w in enumerate(weights) if torch else ():
        made.register_parameter(f"p{i}", torch.nn.Parameter(torch.tensor(w)))
    return made


def torch_masks(made):
    names = sorted(name for name, _ in made.named_buffers())
    return [getattr(made, name).numpy().astype(bool) for name in names]


def ours(weights, amount, masks=None, structure=None, scores=jp.scores.magnitude, **given):
    """The masks of jaxprune for torch's amount: a number of units, or a fraction of those left."""
    params = {f"p{i}": w for i, w in enumerate(weights)}
    masks = None if masks is None else {f"p{i}": jnp.asarray(m) for i, m in enumerate(masks)}
    target = {"count": amount} if isinstance(amount, int) else {"sparsity": amount, "of": "remaining"}
    options = {"masks": masks, "structure": structure, "where": lambda path, leaf: True, "floor": 0}
    after = jp.prune_once(params, scores, **target, **options, **given)
    return [np.asarray(mask) for mask in after.values()]


def assert_equal(*masks):
    first, *others = masks
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("amount", AMOUNTS)
@pytest.mark.parametrize("shape", [(12,), (7, 9), (4, 3, 2, 5)], ids=str)
def test_l1_unstructured_iterated(shape, amount):
    w = normal(*shape)
    made, got, stated = module(w), None, None
    for i in range(3):
        if isinstance(amount, int) and amount * (i + 1) > w.size:
            break
        got = ours([w], amount, got)
        stated = brute_force.torch_l1_unstructured(w, amount, stated)
        assert_equal(got, [stated])
        if torch:
            prune.l1_unstructured(made, "p0", amount)
            assert_equal(got, torch_masks(made))


def test_twelve_entries_at_a_half():
    w = normal(3, 4)
    first = ours([w], 0.5)
    assert [int(first[0].sum()), int(ours([w], 0.5, first)[0].sum())] == [6, 3]


@pytest.mark.parametrize("amount", [0.3, 0.5, 1])
@pytest.mark.parametrize("n", [1, 2, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(6, 5), (5, 4, 3, 2)], ids=str)
def test_ln_structured_iterated(shape, n, amount):
    w = normal(*shape)
    for dim in range(-1, len(shape)):
        made, got, stated = module(w), None, None
        for _ in range(2):
            got = ours([w], amount, got, jp.structures.slices(dim, norm=n))
            stated = brute_force.torch_ln_structured(w, amount, n, dim, stated)
            assert_equal(got, [stated])
            if torch:
                prune.ln_structured(made, "p0", amount, n=n, dim=dim)
                assert_equal(got, torch_masks(made))


@pytest.mark.parametrize("amount", [*AMOUNTS, 11])
def test_global_unstructured_iterated(amount):
    weights = [normal(6, 7), normal(4, 3, 3, 3), normal(11)]
    made, got, stated = module(*weights), None, None
    for _ in range(3):
        got = ours(weights, amount, got)
        stated = brute_force.torch_global_unstructured(weights, amount, stated)
        assert_equal(got, stated)
        if torch:
            prune.global_unstructured(
                [(made, f"p{i}") for i in range(3)], pruning_method=prune.L1Unstructured, amount=amount
            )
            assert_equal(got, torch_masks(made))


def test_importance_scores():
    w, importance = normal(6, 8), normal(6, 8, seed=1)
    got = ours([w], 0.4, scores={"p0": np.abs(importance)})
    assert_equal(got, [brute_force.torch_l1_unstructured(w, 0.4, importance_scores=importance)])
    columns = ours([w], 0.5, structure=jp.structures.slices(1, norm=2), scores={"p0": importance})
    assert_equal(columns, [brute_force.torch_ln_structured(w, 0.5, 2, 1, importance_scores=importance)])
    if torch is None:
        return
    made = module(w)
    prune.l1_unstructured(made, "p0", 0.4, importance_scores=torch.tensor(importance))
    assert_equal(got, torch_masks(made))
    made = module(w)
    prune.ln_structured(made, "p0", 0.5, n=2, dim=1, importance_scores=torch.tensor(importance))
    assert_equal(columns, torch_masks(made))
    weights, scores = [w, normal(5)], [importance, normal(5, seed=1)]
    made = module(*weights)
    prune.global_unstructured(
        [(made, "p0"), (made, "p1")],
        importance_scores={(made, f"p{i}"): torch.tensor(s) for i, s in enumerate(scores)},
        pruning_method=prune.L1Unstructured,
        amount=0.6,
    )
    by_path = {f"p{i}": np.abs(s) for i, s in enumerate(scores)}
    assert_equal(torch_masks(made), ours(weights, 0.6, scores=by_path))


@pytest.mark.filterwarnings("ignore:.*because no more are left")  # five rows at a time
@pytest.mark.parametrize("amount", [0.1, 0.3, 0.5, 0.7, 5])
def test_random_amounts_iterated(amount):
    """Which entries go differs; how many does not."""
    w, rows = normal(10, 7), jp.structures.slices(0)
    made, made_rows, got, got_rows, left = module(w), module(w), None, None, [70, 10]
    for i in range(3):
        drawn = {"scores": jp.scores.random, "key": jax.random.key(i)}
        got, got_rows = ours([w], amount, got, **drawn), ours([w], amount, got_rows, rows, **drawn)
        gone = [amount if isinstance(amount, int) else brute_force.half_even(amount, n) for n in left]
        left = [max(n - g, 0) for n, g in zip(left, gone, strict=True)]
        assert [got[0].sum(), got_rows[0].any(1).sum()] == left
        if torch and (isinstance(amount, float) or i < 2):
            prune.random_unstructured(made, "p0", amount)
            prune.random_structured(made_rows, "p0", amount, dim=0)
            assert [torch_masks(made)[0].sum(), torch_masks(made_rows)[0].any(1).sum()] == left


@needs_torch
def test_custom_from_mask_and_remove():
    w, mask = normal(4, 5), np.random.default_rng(0).random((4, 5)) < 0.5
    made = module(w)
    prune.custom_from_mask(made, "p0", torch.tensor(mask))
    prune.l1_unstructured(made, "p0", 3)
    got = ours([w], 3, [mask])
    assert_equal(torch_masks(made), got)
    prune.remove(made, "p0")
    pruned = jp.apply_masks({"p0": jnp.asarray(w)}, {"p0": jnp.asarray(got[0])})
    np.testing.assert_array_equal(made.p0.detach().numpy(), pruned["p0"])


@needs_torch
def test_a_module_of_layers():
    """Linear and Conv2d by type, as torch users do, against `kernels` on the same layout."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 6))
    params = {
        name: {
            "kernel": jnp.asarray(layer.weight.detach().numpy()),
            "bias": jnp.asarray(layer.bias.detach().numpy()),
        }
        for name, layer in (("0", net[0]), ("2", net[2]))
    }
    chosen = [(layer, "weight") for layer in net if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))]
    masks = None
    for _ in range(2):
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.35)
        masks = jp.prune_once(params, jp.scores.magnitude, 0.35, of="remaining", masks=masks)
        for name, layer in (("0", net[0]), ("2", net[2])):
            np.testing.assert_array_equal(masks[name]["kernel"], layer.weight_mask.numpy().astype(bool))
            assert masks[name]["bias"].all()


@needs_torch
def test_count_beyond_what_is_left_raises_there_and_warns_here():
    w = normal(12)
    made, got = module(w), ours([w], 8)
    prune.l1_unstructured(made, "p0", 8)
    with pytest.raises(ValueError, match="should be smaller than"):
        prune.l1_unstructured(made, "p0", 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not ours([w], 8, got)[0].any()
    missed, collapse = (str(warning.message) for warning in caught)
    assert "no more are left" in missed and "layer collapse" in collapse
