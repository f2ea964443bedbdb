"""RigL, SET and rewiring: against loops in numpy, in every structure, inside optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

EVERY = {"every": 10, "end_step": 100}


def oracle(weight, grad, mask, count):
    """One update of a leaf, entry by entry: the mask after it."""
    weight, grad = np.abs(weight).ravel(), np.abs(grad).ravel()
    kept = [i for i in range(mask.size) if mask.ravel()[i]]
    dropped = sorted(kept, key=lambda i: (weight[i], i))[:count]
    survivors = set(kept) - set(dropped)
    others = [i for i in range(mask.size) if i not in survivors]
    grown = sorted(others, key=lambda i: (-grad[i], i))[:count]
    after = np.zeros(mask.size, bool)
    after[list(survivors | set(grown))] = True
    return after.reshape(mask.shape)


def moved(pruner, params, grads, step=10, **inputs):
    state = pruner.init(params)._replace(step=jnp.asarray(step - 1))
    return pruner.update(state, params, grads, **inputs).masks


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from([(2, 7), (7, 2), (5, 6)]),  # few shapes, of which each is compiled once
    st.floats(0.1, 0.9),
    st.floats(0.05, 1.0),
    st.booleans(),
)
def test_an_update_is_the_papers(seed, shape, density, fraction, ties):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    if mask.all():
        mask[0, 0] = False
    draw = (lambda: rng.integers(-2, 3, mask.shape)) if ties else (lambda: rng.normal(size=mask.shape))
    weight, grad = (draw().astype(np.float32) for _ in range(2))
    params, grads = {"kernel": jnp.asarray(weight * mask)}, {"kernel": jnp.asarray(grad)}
    pruner = jp.rigl({"kernel": jnp.asarray(mask)}, fraction=fraction, **EVERY)
    after = moved(pruner, params, grads)["kernel"]
    part = np.float32(fraction / 2) * (1 + np.cos(np.float32(np.pi) * np.float32(0.1)))
    count = int(np.round(np.float32(part) * np.float32(mask.sum())))
    np.testing.assert_array_equal(after, oracle(weight * mask, grad, mask, count))
    assert after.sum() == mask.sum()
    # What was kept and not dropped is kept.
    survivors = sorted(np.abs(weight[mask]))[count:]
    assert np.isin(survivors, np.abs(weight[np.asarray(after)])).all()


def test_the_fraction_falls_along_the_cosine_and_stops_at_the_end():
    params = {"kernel": jnp.where(jnp.arange(2000) < 1000, 1.0 + jnp.arange(2000.0), 0.0).reshape(20, 100)}
    grads = {"kernel": (params["kernel"] == 0) * 1.0}
    pruner = jp.rigl({"kernel": params["kernel"] != 0}, every=10, end_step=100, fraction=0.3)
    for step in (1, 9, 10, 50, 55, 90, 100, 110):
        dropped = int((~moved(pruner, params, grads, step)["kernel"] & (params["kernel"] != 0)).sum())
        due = step % 10 == 0 and step < 100
        assert dropped == (round(1000 * 0.15 * (1 + np.cos(np.pi * step / 100))) if due else 0), step


def test_set_grows_uniformly_among_what_is_not_kept():
    mask = jnp.arange(10) < 4
    params = {"kernel": jnp.where(mask, jnp.arange(1.0, 11.0), 0.0)[None]}
    pruner = jp.set_({"kernel": mask[None]}, fraction=0.5, **EVERY)
    keys = jax.random.split(jax.random.key(0), 3000)
    after = jax.vmap(lambda key: moved(pruner, params, None, key=key)["kernel"][0])(keys)
    assert (after.sum(1) == 4).all()
    # Two of four (0.5 * .976 * 4 = 1.95) are dropped: entries 0 and 1, which may come again.
    assert after[:, 2:4].all()
    chance = np.delete(np.asarray(after.mean(0)), [2, 3])
    assert np.abs(chance - 2 / 8).max() < 5 * (0.25 * 0.75 / 3000) ** 0.5
    repeated = moved(pruner, params, None)["kernel"]
    np.testing.assert_array_equal(repeated, moved(pruner, params, None)["kernel"])


def sparse(params, sparsity, key=0, **options):
    masks = jp.prune_once(
        params, jp.scores.random, sparsity, key=jax.random.key(key), scope="layerwise", **options
    )
    return jp.apply_masks(params, masks), masks


PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (8, 12)), "bias": jnp.ones(12)},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (12, 4))},
}
GRADS = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), PARAMS)


@pytest.mark.parametrize(
    ("structure", "unit"),
    [
        (jp.structures.slices(axis=-1), lambda m: m.T),
        (jp.structures.slices(axis=-2), lambda m: m),
        (jp.structures.blocks((2, 2)), lambda m: m.reshape(m.shape[0] // 2, 2, -1, 2).transpose(0, 2, 1, 3)),
    ],
)
def test_whole_units_move(structure, unit):
    params, masks = sparse(PARAMS, 0.5, structure=structure)
    pruner = jp.rigl(masks, fraction=1.0, structure=structure, **EVERY)
    after = moved(pruner, params, GRADS)
    some = False
    for layer in ("a", "b"):
        before, now = (np.asarray(tree[layer]["kernel"]) for tree in (masks, after))
        units_now, units_before = unit(now), unit(before)
        inner = tuple(range(1 if units_now.ndim == 2 else 2, units_now.ndim))
        assert (units_now.any(inner) == units_now.all(inner)).all()
        assert units_now.any(inner).sum() == units_before.any(inner).sum()
        some |= bool((now != before).any())
        # The oracle on units: their L1 norms.
        w, g = (np.abs(np.asarray(tree[layer]["kernel"])) for tree in (params, GRADS))
        kept = units_before.any(inner)
        count = int(np.round(0.5 * (1 + np.cos(np.pi / 10)) * kept.sum()))
        expected = oracle(unit(w).sum(inner), unit(g).sum(inner), kept, count)
        np.testing.assert_array_equal(units_now.any(inner), expected)
    assert some
    assert bool(after["a"]["bias"].all())


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (1, 4), (3, 4)])
def test_nm_weights_move_inside_their_groups(n, m):
    structure = jp.structures.nm(n, m)
    params, masks = sparse(PARAMS, 1 - n / m, structure=structure)
    pruner = jp.rigl(masks, fraction=0.6, structure=structure, **EVERY)
    after = moved(pruner, params, GRADS)
    for layer in ("a", "b"):
        before, now = (np.asarray(tree[layer]["kernel"]) for tree in (masks, after))
        weight, grad = (np.abs(np.asarray(tree[layer]["kernel"])) for tree in (params, GRADS))
        groups = now.reshape(-1, m, now.shape[1])
        assert (groups.sum(1) == n).all()
        kept = before.sum()
        count = int(np.round(0.3 * (1 + np.cos(np.pi / 10)) * kept))
        dropped = np.sort(weight[before])[:count]
        survivors = before & ~np.isin(weight, dropped)
        assert now[survivors].all()
        # In each group as many grow as went, those of the largest gradient.
        expected = survivors.copy()
        for i in range(0, now.shape[0], m):
            for j in range(now.shape[1]):
                free = [r for r in range(i, i + m) if not survivors[r, j]]
                need = n - survivors[i : i + m, j].sum()
                for r in sorted(free, key=lambda r: -grad[r, j])[:need]:
                    expected[r, j] = True
        np.testing.assert_array_equal(now, expected)
        assert (now != before).any()


def test_a_dense_leaf_beside_sparse_ones_is_left_alone():
    params, masks = sparse(PARAMS, {"a/kernel": 0.7})
    after = moved(jp.rigl(masks, **EVERY), params, GRADS)
    assert bool(after["b"]["kernel"].all())
    assert (after["a"]["kernel"] != masks["a"]["kernel"]).any()


def test_leaves_that_where_leaves_out_keep_their_masks():
    params, masks = sparse(PARAMS, 0.5)
    after = moved(jp.rigl(masks, where=jp.matching("b/*"), **EVERY), params, GRADS)
    np.testing.assert_array_equal(after["a"]["kernel"], masks["a"]["kernel"])
    assert (after["b"]["kernel"] != masks["b"]["kernel"]).any()


def test_training_by_hand_equals_the_wrapper():
    """Adam and RigL written out: no step where masks move, moments 0 where weights grow."""
    params, masks = sparse(PARAMS, 0.6)
    target = jax.tree.map(lambda p: jax.random.normal(jax.random.key(3), p.shape), PARAMS)

    def loss(params):
        return sum(
            jnp.sum((p - t) ** 2) for p, t in zip(*map(jax.tree.leaves, (params, target)), strict=True)
        )

    pruner = jp.rigl(masks, every=5, end_step=40, fraction=0.5)
    tx = jp.wrap_optax(optax.adam(0.05), pruner)
    ours, opt_state = params, tx.init(params)
    update = jax.jit(tx.update)

    adam = optax.adam(0.05)
    theirs, their_masks, state = params, masks, adam.init(params)
    for step in range(1, 31):
        updates, opt_state = update(jax.grad(loss)(ours), opt_state, ours)
        ours = optax.apply_updates(ours, updates)

        grads = jax.grad(loss)(theirs)
        if step % 5 == 0:
            part = 0.25 * (1 + np.cos(np.pi * step / 40))
            new = jax.tree.map(
                lambda w, g, m, part=part: oracle(w, g, np.asarray(m), int(np.round(part * m.sum()))),
                *(jax.tree.map(np.asarray, tree) for tree in (theirs, grads, their_masks)),
            )
            stays = jax.tree.map(lambda a, b: jnp.asarray(a & b), new, their_masks)
            their_masks = new
            theirs = jp.apply_masks(theirs, stays)
            moments = {k: jp.apply_masks(getattr(state[0], k), stays) for k in ("mu", "nu")}
            state = (state[0]._replace(**moments), *state[1:])
        else:
            updates, state = adam.update(jp.apply_masks(grads, their_masks), state, theirs)
            theirs = jax.tree.map(lambda p, u, m: jnp.where(m, p + u, 0), theirs, updates, their_masks)
        jax.tree.map(np.testing.assert_array_equal, opt_state.pruner.masks, their_masks)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, theirs)
        jp.check_pruned(ours, opt_state.pruner.masks)
        assert jp.metrics.nonzeros(opt_state.pruner.masks) == jp.metrics.nonzeros(masks)
    assert int(opt_state.pruner.row) == 6
    assert int(optax.tree.get(opt_state.inner, "count")) == 24  # no step in the 6 updates of masks
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (their_masks, masks)), strict=True))


def test_gradients_that_are_not_finite_move_nothing_under_jit_and_raise_outside():
    params, masks = sparse(PARAMS, 0.5)
    pruner = jp.rigl(masks, **EVERY)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADS)
    after = jax.jit(lambda g: moved(pruner, params, g))(bad)
    jax.tree.map(np.testing.assert_array_equal, after, masks)
    with pytest.raises(ValueError, match=r"scores\['a/kernel'\] has 12 entries that are NaN or inf"):
        moved(pruner, params, bad)


@pytest.mark.parametrize("what", ["params", "grads"])
def test_a_score_that_is_not_finite_in_an_nm_group_moves_nothing_under_jit(what):
    structure = jp.structures.nm(2, 4)
    params, masks = sparse(PARAMS, 0.5, structure=structure)
    inputs = {"params": params, "grads": GRADS}
    kept = np.argwhere(np.asarray(masks["a"]["kernel"]))[0]
    bad = inputs[what]["a"]["kernel"].at[tuple(kept)].set(jnp.nan)
    inputs[what] = inputs[what] | {"a": inputs[what]["a"] | {"kernel": bad}}
    pruner = jp.rigl(masks, structure=structure, **EVERY)
    after = jax.jit(lambda inputs: moved(pruner, **inputs))(inputs)
    jax.tree.map(np.testing.assert_array_equal, after, masks)


def test_each_element_of_a_vmap_may_draw_its_own_numbers():
    params, masks = sparse(PARAMS, 0.5)
    keys = jax.random.split(jax.random.key(0), 3)

    def run(key):
        return moved(jp.set_(masks, seed=key, fraction=1.0, **EVERY), params, None)

    after = jax.jit(jax.vmap(run))(keys)["a"]["kernel"]
    assert (after[0] != after[1]).any()
    np.testing.assert_array_equal(after[2], run(keys[2])["a"]["kernel"])


def test_random_scores_for_dropping_and_growing_are_drawn_apart():
    # With the same numbers for both, what goes (the lowest) would never come again.
    mask = jnp.arange(200) < 100
    pruner = jp.rewiring(
        {"kernel": mask[None]}, grow=jp.scores.random, drop=jp.scores.random, fraction=1.0, **EVERY
    )
    kept = moved(pruner, {"kernel": jnp.ones((1, 200))}, None)["kernel"][0, :100]
    assert 30 < int(kept.sum()) < 70


def test_unsigned_scores_grow_the_largest():
    def rank(params, **_):
        return {"kernel": jnp.array([[0, 0, 0, 7, 9]], jnp.uint32)}

    params = {"kernel": jnp.array([[1.0, 2.0, 0.0, 0.0, 0.0]])}
    pruner = jp.rewiring({"kernel": params["kernel"] != 0}, grow=rank, fraction=0.6, **EVERY)
    assert moved(pruner, params, None)["kernel"].tolist() == [[False, True, False, False, True]]


def test_what_is_refused():
    _, masks = sparse(PARAMS, 0.5)
    with pytest.raises(ValueError, match="prune nothing of what where= takes in"):
        jp.rigl(jp.ones_masks(PARAMS), **EVERY)
    with pytest.raises(ValueError, match=r"end_step must be above every=10.*got 10"):
        jp.rigl(masks, every=10, end_step=10)
    with pytest.raises(ValueError, match="every must be an integer of 1 or more"):
        jp.set_(masks, every=0, end_step=10)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\]"):
        jp.rigl(masks, fraction=0.0, **EVERY)
    with pytest.raises(ValueError, match=r"masks\['a/kernel'\] is not made of whole units of slices"):
        jp.rigl(masks, structure=jp.structures.slices(axis=-1), **EVERY)
    with pytest.raises(ValueError, match=r"masks\['a/kernel'\] is not made of whole units of nm\(2, 4"):
        jp.rigl(masks, structure=jp.structures.nm(2, 4), **EVERY)
    pruner = jp.rigl(masks, **EVERY)
    with pytest.raises(ValueError, match="needs params"):
        pruner.update(pruner.init(PARAMS), None)
    with pytest.raises(ValueError, match="gradient_magnitude needs gradients"):
        moved(pruner, PARAMS, None)
    with pytest.raises(TypeError, match="bool"):
        jp.rigl(PARAMS, **EVERY)
