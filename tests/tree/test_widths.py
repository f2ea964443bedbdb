"""Rounding up to widths: the same as counting on to the next one."""

import json

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import jaxprune as jp
from jaxprune.tree.widths import as_multiple, round_down, round_up

multiples = st.one_of(
    st.integers(1, 9),
    st.lists(st.integers(1, 30), min_size=1, max_size=5, unique=True).map(sorted).map(tuple),
)


def is_one(width, multiple):
    """Return whether a width is a multiple, one of the widths, or some last steps beyond the largest."""
    if isinstance(multiple, int):
        return width % multiple == 0
    if width in (0, *multiple):
        return True
    step = multiple[-1] - (multiple[-2] if len(multiple) > 1 else 0)
    return width > multiple[-1] and (width - multiple[-1]) % step == 0


@settings(max_examples=20, deadline=None)
@given(multiples)
def test_rounding_counts_on_to_the_next(multiple):
    counts = np.arange(60)
    up = [next(n for n in range(count, 200) if is_one(n, multiple)) for count in counts]
    down = [next(n for n in range(count, -1, -1) if is_one(n, multiple)) for count in counts]
    for array in (counts, jnp.asarray(counts, jnp.int32)):
        found = round_up(array, multiple), round_down(array, multiple)
        assert [each.dtype for each in found] == [array.dtype] * 2
        np.testing.assert_array_equal(found, (up, down))
    if isinstance(multiple, tuple):
        assert [jp.metrics.Widths(multiple).round_up(count) for count in (0, 31)] == [0, up[31]]


def test_rounding_of_traced_counts():
    both = jax.jit(lambda n: (round_up(n, (4, 12)), round_down(n, (4, 12)), round_up(n, 5)))
    assert [int(n) for n in both(13)] == [20, 12, 15]


def test_widths_are_values():
    widths = jp.metrics.Widths((4, 12), ((4, 1e-6), (12, 0.25)), "a layer", "cpu", 0.05)
    assert widths == jp.metrics.Widths.from_json(widths.to_json()) and len({widths, widths}) == 1
    assert str(widths) == "widths 4, 12 (a layer; cpu)" and str(jp.metrics.Widths([4])) == "widths 4"
    assert as_multiple(widths, "m") == as_multiple([4, np.int64(12)], "m") == (4, 12)
    with pytest.raises(AttributeError):
        widths.widths = (1,)
    for wrong in ("", "[]", "{}", "3", json.dumps({"widths": [4], "times": [], "color": 1})):
        with pytest.raises(ValueError, match="expected the text that Widths"):
            jp.metrics.Widths.from_json(wrong)
    for field, value in {"widths": [4, 2], "times": [[4, "x"]], "what": 3, "tolerance": None}.items():
        text = json.dumps(json.loads(widths.to_json()) | {field: value})
        with pytest.raises(ValueError, match="expected the text that Widths"):
            jp.metrics.Widths.from_json(text)
    for wrong in ([], [8, 8], [8, 4], [0, 4]):
        with pytest.raises(ValueError, match="must be"):
            jp.metrics.Widths(wrong)
    for wrong in ("8", [2.5], [True, 3], None):
        with pytest.raises(TypeError, match="must be an integer"):
            as_multiple(wrong, "multiple_of")
