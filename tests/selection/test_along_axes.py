"""The lowest scores of each row: against sorting row by row, on the host and compiled."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.selection.along_axes import _lowest_compiled, lowest_along

CASES = {
    "in x out": ((7, 5), (0,)),
    "out x in": ((5, 7), (1,)),
    "heads read": ((3, 4, 5), (0, 1)),
    "heads written": ((6, 2, 3), (0,)),
    "middle": ((2, 6, 3), (1,)),
    "first and last": ((3, 4, 3), (0, 2)),
    "one row": ((3, 4), (0, 1)),
    "one input": ((4, 1), (1,)),
}


def by_hand(scores, alive, axes, count, floor, includes_pruned):
    """Sort each row in Python."""
    removed = np.zeros(scores.shape, bool)
    others = [axis for axis in range(scores.ndim) if axis not in axes]
    for outer in itertools.product(*(range(scores.shape[axis]) for axis in others)):
        row = []
        for inner in itertools.product(*(range(scores.shape[axis]) for axis in axes)):
            index = dict(zip((*others, *axes), (*outer, *inner), strict=True))
            row.append(tuple(index[axis] for axis in range(scores.ndim)))
        left = [index for index in row if alive[index]]
        number = count - (len(row) - len(left)) if includes_pruned else count
        number = max(min(number, len(left) - floor), 0)
        for index in sorted(left, key=lambda index: (np.isnan(scores[index]), scores[index]))[:number]:
            removed[index] = True
    return removed


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, np.float32) for name in CASES), ("heads read", np.float16), ("in x out", np.int32)],
)
def test_the_lowest_of_each_row(name, dtype):
    (shape, axes), rng = CASES[name], np.random.default_rng(len(name))
    for trial in range(6):
        scores = rng.integers(-2, 3, shape).astype(dtype)  # mostly ties
        if trial % 2 and dtype != np.int32:
            scores = np.where(rng.random(shape) < 0.2, np.nan, rng.normal(size=shape)).astype(dtype)
        alive = None if trial == 0 else rng.random(shape) < 0.8
        size = int(np.prod([shape[axis] for axis in axes]))
        count, floor, includes = int(rng.integers(0, size + 1)), trial % 3, trial in (0, 3, 5)
        expected = by_hand(
            scores, np.ones(shape, bool) if alive is None else alive, axes, count, floor, includes
        )
        given = jnp.asarray(scores), None if alive is None else jnp.asarray(alive)
        np.testing.assert_array_equal(lowest_along(*given, axes, count, floor, includes), expected)
        compiled = _lowest_compiled(*given, jnp.int32(count), axes, floor, includes)
        np.testing.assert_array_equal(compiled, expected)


def test_a_count_for_each_row():
    scores = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    counts = np.arange(12).reshape(3, 4, 1) % 6
    found = lowest_along(jnp.asarray(scores), None, (2,), counts, 0, False)
    assert found.sum(2).tolist() == (np.arange(12).reshape(3, 4) % 6).tolist()
    compiled = jax.jit(lambda s, c: lowest_along(s, None, (2,), c, 0, False))(scores, counts)
    np.testing.assert_array_equal(found, compiled)
    first = jnp.moveaxis(jnp.asarray(scores), 2, 0)
    other = jax.jit(lambda s, c: lowest_along(s, None, (0,), c, 0, False))(first, np.moveaxis(counts, 2, 0))
    np.testing.assert_array_equal(found, np.moveaxis(np.asarray(other), 0, 2))


def test_under_vmap():
    scores = jax.random.randint(jax.random.key(0), (3, 6, 4), 0, 3)
    each = [lowest_along(s, None, (0,), 3, 0, False) for s in scores]
    np.testing.assert_array_equal(jax.vmap(lambda s: lowest_along(s, None, (0,), 3, 0, False))(scores), each)


def test_nothing_in_it():
    for shape in ((0, 3), (3, 0)):
        for axes in ((0,), (1,)):
            assert lowest_along(jnp.zeros(shape), None, axes, 0, 0, True).shape == shape
            assert (
                jax.jit(lambda s, a=axes: lowest_along(s, None, a, 0, 0, True))(jnp.zeros(shape)).shape
                == shape
            )
