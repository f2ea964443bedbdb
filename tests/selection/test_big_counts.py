"""Counts in two halves, against Python's integers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.selection import big_counts

INTEGERS = st.lists(st.integers(-(2**44), 2**44), min_size=5, max_size=5)
SETTINGS = settings(deadline=None, max_examples=30, derandomize=True)


@given(INTEGERS, INTEGERS)
@SETTINGS
def test_arithmetic_and_order(a, b):
    x, y = big_counts.big(a), big_counts.big(b)
    a, b = np.array(a), np.array(b)
    for got, expected in [
        (x + y, a + b),
        (x - y, a - b),
        (big_counts.minimum(x, y), np.minimum(a, b)),
        (big_counts.maximum(x, y), np.maximum(a, b)),
        (big_counts.total(x), a.sum(keepdims=True)),
        (big_counts.prefix_sums(x), np.concatenate([[0], np.cumsum(a)])),
        (big_counts.where(a > 0, x, y), np.where(a > 0, a, b)),
        (big_counts.stack([x, y]), np.stack([a, b], axis=-1)),
        (big_counts.pick(x, 2), a[2]),
        (big_counts.zeros_like(x), np.zeros(5)),
    ]:
        np.testing.assert_array_equal(big_counts.to_numpy(got), expected)
        low = np.asarray(got.low)
        assert low.dtype == np.int32 and (low >= 0).all() and (low < 2**16).all()
    np.testing.assert_array_equal(x < y, a < b)
    assert not (x < x).any()


@given(st.lists(st.integers(-(2**28), 2**28), min_size=5, max_size=5))
@SETTINGS
def test_plain_counts_are_added_up_alike(a):
    x = big_counts.as_int32(big_counts.big(a))
    np.testing.assert_array_equal(x, a)
    np.testing.assert_array_equal(big_counts.total(x), [sum(a)])
    np.testing.assert_array_equal(big_counts.prefix_sums(x), np.concatenate([[0], np.cumsum(a)]))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=3, max_size=3))
@SETTINGS
def test_of_int32_arrays(values):
    np.testing.assert_array_equal(big_counts.to_numpy(big_counts.big(jnp.array(values, jnp.int32))), values)


def test_of_anything_that_counts():
    assert big_counts.to_numpy(big_counts.big(2**40 + 7)) == 2**40 + 7
    assert big_counts.to_numpy(big_counts.big(np.int64(-3))) == -3
    assert big_counts.to_numpy(5) == 5
    again = big_counts.big(12)
    assert big_counts.big(again) is again


@given(st.lists(st.integers(-(2**28), 2**28), min_size=6, max_size=6))
@SETTINGS
def test_sums_of_rows_and_over_devices(values):
    counts = np.array(values).reshape(2, 3)
    before = np.concatenate([np.zeros((2, 1), int), counts.cumsum(axis=1)], axis=1)
    for make in (big_counts.big, big_counts.as_int32):
        rows = make(counts)
        np.testing.assert_array_equal(
            big_counts.to_numpy(big_counts.total(rows)), counts.sum(1, keepdims=True)
        )
        np.testing.assert_array_equal(big_counts.to_numpy(big_counts.prefix_sums(rows)), before)
        everywhere = jax.vmap(
            lambda row: big_counts.sum_over_devices(row, ("devices",)), axis_name="devices"
        )(rows)
        np.testing.assert_array_equal(big_counts.to_numpy(everywhere), [counts.sum(0)] * 2)
        assert type(everywhere) is type(rows)


def test_counts_do_not_change_and_are_not_compared_as_a_whole():
    count = big_counts.big([1, 2])
    assert count == count and count != big_counts.big([1, 2])
    with pytest.raises(dataclasses.FrozenInstanceError):
        count.high = 0


FRACTIONS = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, 1.0, 0.5, 0.25, 0.1, 0.3, 1 / 3, 0.9, 2.0**-74, 2.0**-48, 1 - 2.0**-53]),
    st.integers(0, 1000).map(lambda n: n / 1000),
)


@given(st.lists(st.tuples(FRACTIONS, st.integers(0, 2**47 - 1)), min_size=5, max_size=5))
@SETTINGS
def test_products_round_twice_as_float64_does(pairs):
    fractions, counts = np.array([part for part, _ in pairs]), [count for _, count in pairs]
    got = jax.jit(big_counts.rounded_product)(big_counts.fraction(fractions), big_counts.big(counts))
    expected = [round(float(part) * count) for part, count in pairs]
    np.testing.assert_array_equal(big_counts.to_numpy(got), expected)


def test_the_sum_of_many_counts_carries():
    total = jax.jit(big_counts.sum_all)(jnp.full((300, 400), 2**30 + 5, jnp.int32))
    assert big_counts.to_numpy(total) == 300 * 400 * (2**30 + 5)
