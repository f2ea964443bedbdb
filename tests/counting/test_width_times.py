"""Which widths pay: the choice on made-up times, and one measurement."""

from itertools import pairwise

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given

import jaxprune as jp
from jaxprune.counting.width_times import worth_rounding_up_to


@given(st.dictionaries(st.integers(1, 40), st.floats(0.5, 8), min_size=1), st.sampled_from([0.0, 0.05, 0.5]))
def test_rounding_up_costs_at_most_the_tolerance(times, tolerance):
    good = worth_rounding_up_to(times, tolerance)
    assert list(good) == sorted(good) and good[-1] == max(times)
    for width, time in times.items():
        following = min(n for n in good if n >= width)
        assert times[following] <= (1 + tolerance) * time
    # None can be left out: rounding it up to the next one would cost more.
    assert all(times[high] > (1 + tolerance) * times[low] for low, high in pairwise(good))


def test_steps_are_found():
    def steps(width):
        return -(-width // 16)

    times = {width: steps(width) * (1 + 0.02 * (width % 3)) for width in range(1, 97)}
    assert worth_rounding_up_to(times, 0.05) == (16, 32, 48, 64, 80, 96)
    assert worth_rounding_up_to(dict.fromkeys(range(1, 9), 1.0), 0) == (8,)


def test_measuring_a_layer_and_a_function():
    widths = jp.metrics.good_widths(12, rows=8, inputs=16, every=6, rounds=2)
    assert [width for width, _ in widths.times] == [6, 12] and all(seconds > 0 for _, seconds in widths.times)
    assert widths.widths == worth_rounding_up_to(dict(widths.times), 0.05)
    assert widths.what == "8 rows of 16 inputs, float32" and widths.device and hash(widths)
    seen = []

    def network(width):
        seen.append(width)
        return lambda x: jax.lax.fori_loop(0, 3000 * (width // 3), lambda _, x: jnp.sin(x), x), 1.0

    steps = jp.metrics.good_widths(5, call=network, tolerance=0.5, rounds=9)
    assert seen == [1, 2, 3, 4, 5] and steps.what == "network"
    assert steps.widths == (2, 5)  # 0 and 3000 steps: far apart on any machine


def test_wrong_arguments():
    good_widths = jp.metrics.good_widths
    for wrong in ({}, {"rows": 2}, {"rows": 2, "inputs": 2, "call": lambda width: ()}):
        with pytest.raises(TypeError, match="pass one"):
            good_widths(4, **wrong)
    with pytest.raises(ValueError, match="most must be an integer of 1 or more"):
        good_widths(0, rows=2, inputs=2)
    with pytest.raises(ValueError, match="every must be an integer"):
        good_widths(4, rows=2, inputs=2, every=5)
    with pytest.raises(ValueError, match="tolerance must be a number of 0 or more"):
        good_widths(4, rows=2, inputs=2, tolerance=-1)
    with pytest.raises(TypeError, match="tuples"):
        good_widths(1, call=lambda width: width)
