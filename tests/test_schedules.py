import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp

sparsities = st.floats(0, 0.99)
steps = st.integers(0, 1000)


@given(sparsities, sparsities, steps, st.integers(1, 1000))
@settings(deadline=None, max_examples=200)
def test_cubic_follows_zhu_and_gupta(a, b, begin, span):
    initial, final = sorted((a, b))
    schedule = jp.schedules.cubic(final, begin_step=begin, end_step=begin + span, initial_sparsity=initial)
    assert schedule(begin) == pytest.approx(initial, abs=1e-12)
    assert schedule(begin + span) == final  # to the bit
    assert schedule(begin + span + 7) == final
    assert begin == 0 or schedule(begin - 1) == 0
    for t in range(begin, begin + span + 1, max(1, span // 7)):
        expected = final + (initial - final) * (1 - (t - begin) / span) ** 3
        assert schedule(t) == pytest.approx(expected, abs=1e-12)
    if span % 2 == 0:
        assert schedule(begin + span // 2) == pytest.approx(final - (final - initial) / 8, abs=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        jp.schedules.constant(0.7),
        jp.schedules.one_shot(0.7, step=5),
        jp.schedules.linear(0.7, begin_step=2, end_step=9, initial_sparsity=0.1),
        jp.schedules.cubic(0.7, begin_step=2, end_step=9),
        jp.schedules.geometric(0.3),
        jp.schedules.geometric(0.3, stop=0.7),
    ],
)
def test_monotone_in_range_and_the_same_for_numbers_arrays_and_tracers(schedule):
    counts = np.arange(0, 15)
    one_by_one = np.array([float(schedule(int(t))) for t in counts])
    np.testing.assert_array_equal(schedule(counts), one_by_one)
    np.testing.assert_allclose(jax.jit(schedule)(jnp.arange(0, 15)), one_by_one, atol=1e-6)
    assert (np.diff(one_by_one) >= 0).all()
    assert ((one_by_one >= 0) & (one_by_one < 1)).all()


def test_begin_and_end_at_the_same_step_is_one_shot():
    for make in (jp.schedules.linear, jp.schedules.cubic):
        schedule = make(0.6, begin_step=4, end_step=4)
        assert [float(schedule(t)) for t in (3, 4, 5)] == [0, 0.6, 0.6]


def test_a_step_may_be_the_first_and_one_apart():
    assert [float(jp.schedules.one_shot(0.7, step=0)(t)) for t in (0, 1)] == [0.7, 0.7]
    assert [float(jp.schedules.linear(0.6, begin_step=3, end_step=4)(t)) for t in (3, 4)] == [0, 0.6]


def test_by_default_a_schedule_begins_at_0_with_nothing_pruned():
    for make in (jp.schedules.linear, jp.schedules.cubic):
        schedule, explicit = make(0.6, end_step=4), make(0.6, begin_step=0, end_step=4, initial_sparsity=0.0)
        assert (schedule.begin_step, schedule.end_step) == (0, 4)
        np.testing.assert_array_equal(schedule(np.arange(6)), explicit(np.arange(6)))
    own = jp.schedules.Schedule(lambda t: 0.1 * t)
    assert (own.begin_step, own.end_step) == (0, None)
    assert [float(own(t)) for t in (-1, 0, 2)] == [0, 0, 0.2]
    with pytest.raises(AttributeError):
        own.begin_step = 3  # type: ignore[misc]


def test_a_line_may_be_flat():
    assert jp.schedules.linear(0.5, end_step=5, initial_sparsity=0.5)(np.arange(7)).tolist() == [0.5] * 7


def test_geometric_stops_and_never_reaches_one():
    assert float(jp.schedules.geometric(0.5, stop=0.9)(10)) == 0.9
    assert float(jp.schedules.geometric(0.5)(10_000)) < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jp.schedules.constant(1.0), r"sparsity must be in \[0, 1\).*got 1.0"),
        (lambda: jp.schedules.constant(-0.1), r"got -0.1"),
        (lambda: jp.schedules.constant(float("nan")), r"got nan"),
        (lambda: jp.schedules.linear(0.5, end_step=5, initial_sparsity=0.6), "must not fall.*0.6.*0.5"),
        (lambda: jp.schedules.linear(0.5, end_step=5, initial_sparsity=1.5), "initial_sparsity must be"),
        (lambda: jp.schedules.cubic(0.5, begin_step=9, end_step=5), "begin_step=9, end_step=5"),
        (lambda: jp.schedules.cubic(0.5, begin_step="a", end_step=5), "begin_step=a, end_step=5"),
        (lambda: jp.schedules.cubic(0.5, begin_step=1, end_step="a"), "begin_step=1, end_step=a"),
        (lambda: jp.schedules.cubic(0.5, begin_step=-1, end_step=5), "begin_step=-1"),
        (lambda: jp.schedules.one_shot(0.5, step=-1), "begin_step=-1"),
        (lambda: jp.schedules.geometric(0.0), r"rate in \(0, 1\).*got 0.0"),
        (lambda: jp.schedules.geometric(1.0), r"got 1.0"),
        (lambda: jp.schedules.geometric(0.2, stop=1.0), r"stop must be in \[0, 1\)"),
    ],
)
def test_out_of_range_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_sparsity_that_is_not_a_number_is_an_error():
    with pytest.raises(TypeError, match=r"must be a number in .*'most'"):
        jp.schedules.constant("most")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=rf"got '{'x' * 199}\.$"):
        jp.schedules.constant("x" * 1000)  # type: ignore[arg-type]
