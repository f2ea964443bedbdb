"""The score of residual blocks by what they change of their input, against running the blocks one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.structures.test_depth import (
    IDENTITIES,
    PARAMS,
    PREFIXES,
    STACKED,
    X,
    in_stack,
    of_indices,
    of_list,
    of_scan,
    pre_norm,
)


def by_hand(block_fn):
    """Return the influence of each block, in numpy."""
    x, found = X @ PARAMS["in"]["kernel"], []
    for block in PARAMS["blocks"]:
        y = block_fn(block, x)
        a, b = np.asarray(x, np.float64), np.asarray(y, np.float64)
        cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        found.append(1 - cosine.mean())
        x = y
    return found


@pytest.mark.parametrize("name", ["pre-norm", "remat", "two sums", "a learned gate", "conditioned"])
def test_influence_of_blocks(name):
    block_fn = IDENTITIES[name]
    expected = by_hand(block_fn)
    blocks = jp.residual_blocks(of_list(block_fn), PARAMS, X, prefixes=PREFIXES)
    scores = jp.scores.block_influence(of_list(block_fn), blocks)(PARAMS, batch=X)
    for block, number in zip(scores["blocks"], expected, strict=True):
        for leaf in jax.tree.leaves(block):
            np.testing.assert_allclose(leaf, number, rtol=1e-4, atol=1e-6)
    assert np.isnan(scores["in"]["kernel"]).all() and scores["out"]["bias"].dtype == jnp.float32
    for kind in (of_scan, of_indices):
        blocks = jp.residual_blocks(kind(block_fn), STACKED, X, stacked=in_stack)
        scores = jp.scores.block_influence(kind(block_fn), blocks)(STACKED, batch=(X,))
        for leaf in jax.tree.leaves(scores["blocks"]):
            each = np.moveaxis(np.asarray(leaf), 0, -1)
            np.testing.assert_allclose(each, np.broadcast_to(expected, each.shape), rtol=1e-4, atol=1e-6)


def test_the_block_that_changes_least_goes():
    apply_fn = of_scan(pre_norm)
    blocks = jp.residual_blocks(apply_fn, STACKED, X, stacked=in_stack)
    score, structure = jp.scores.block_influence(apply_fn, blocks), jp.structures.layers(blocks)
    where = jp.matching("blocks/*")

    def prune(params, x):
        return jp.prune_once(params, score, count=1, structure=structure, where=where, batch=x)

    masks = prune(STACKED, X)
    kept = [i for i in range(4) if masks["blocks"]["up"]["kernel"][i].any()]
    assert kept == sorted(np.argsort(by_hand(pre_norm))[1:])
    jax.tree.map(np.testing.assert_array_equal, masks, jax.jit(prune)(STACKED, X))
    pruner = jp.pruner(score, 0.25, structure=structure, where=where)
    state = pruner.update(pruner.init(STACKED), STACKED, batch=X)
    jax.tree.map(np.testing.assert_array_equal, masks, state.masks)


def test_a_block_that_changes_nothing():
    params = {**PARAMS, "blocks": [PARAMS["blocks"][0], jax.tree.map(jnp.zeros_like, PARAMS["blocks"][1])]}
    apply_fn = of_list(pre_norm)
    blocks = jp.residual_blocks(apply_fn, params, X, prefixes=PREFIXES[:2])
    score = jp.scores.block_influence(apply_fn, blocks)
    assert abs(score(params, batch=X)["blocks"][1]["scale"][0]) < 1e-6
    nothing = score(params | {"in": {"kernel": jnp.zeros((5, 6))}}, batch=X)["blocks"]
    assert nothing[1]["scale"][0] < 1e-6 and nothing[0]["scale"][0] == 1


def test_what_it_refuses():
    apply_fn = of_list(pre_norm)
    blocks = jp.residual_blocks(apply_fn, PARAMS, X, prefixes=PREFIXES)
    with pytest.raises(TypeError, match=r"needs blocks=jaxprune\.residual_blocks.*got \['blocks/0'"):
        jp.scores.block_influence(apply_fn, PREFIXES)
    with pytest.raises(TypeError, match=r"scores\.block_influence needs a function"):
        jp.scores.block_influence(PARAMS, blocks)
    score = jp.scores.block_influence(apply_fn, blocks)
    with pytest.raises(ValueError, match=r"block_influence needs data: pass batch="):
        score(PARAMS)
    shorter = {**PARAMS, "blocks": PARAMS["blocks"][:3]}
    with pytest.raises(ValueError, match=r"no leaves of the blocks blocks/3"):
        score(shorter, batch=X)
    other = jp.scores.block_influence(lambda params, x: x @ params["in"]["kernel"], blocks)
    with pytest.raises(ValueError, match=r"the block 'blocks/0' passes nothing on in this function"):
        other(PARAMS, batch=X)
