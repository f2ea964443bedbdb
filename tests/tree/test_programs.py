import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.tree import programs
from jaxprune.tree.programs import map_compiled

TRACES = []


def scaled(factor, array, other):
    TRACES.append((factor, array.shape))
    return factor * array if other is None else factor * array + other


def calls_of_layers(layers):
    static = [(2,), (3,)] * layers + [(2,)]
    arrays = [(jnp.full((4, 2), float(n)), None) for n in range(2 * layers)] + [(np.ones(5), np.ones(5))]
    return static, arrays


@pytest.mark.parametrize("layers", [1, 6])
def test_each_kind_is_compiled_once(layers):
    static, arrays = calls_of_layers(layers)
    jax.clear_caches()
    TRACES.clear()
    found = map_compiled(scaled, static, arrays)
    expected = [np.full((4, 2), (2, 3)[n % 2] * n) for n in range(2 * layers)] + [np.full(5, 3.0)]
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)
    assert sorted(TRACES) == [(2, (4, 2)), (2, (5,)), (3, (4, 2))]
    TRACES.clear()
    map_compiled(scaled, static, arrays)
    assert not TRACES


def test_large_arrays_do_not_share_a_program(monkeypatch):
    sizes = []
    monkeypatch.setattr(
        programs, "_program", lambda f, s, a: sizes.append(len(s)) or [f(*s[i], *a[i]) for i in range(len(s))]
    )
    arrays = [(jnp.ones(size), None) for size in (3, 4, 5, 9, 1)]
    for limit, expected in ((100, [5]), (8, [2, 1, 1, 1]), (1, [1] * 5)):
        sizes.clear()
        monkeypatch.setattr(programs, "_ENTRIES", limit)
        map_compiled(scaled, [(2,)] * 5, arrays)
        assert sizes == expected


def test_traced_arrays_are_computed_with_where_they_are():
    static, arrays = calls_of_layers(2)
    TRACES.clear()
    jax.make_jaxpr(lambda arrays: map_compiled(scaled, static, arrays))(arrays)
    assert len(TRACES) == len(static)


def test_functions_that_read_values_and_arguments_without_a_hash():
    middle = map_compiled(lambda array: np.median(array), [(), ()], [(jnp.arange(5.0),), (jnp.arange(7.0),)])
    assert middle == [2.0, 3.0]
    added = map_compiled(lambda numbers, array: array + sum(numbers), [([1, 2],)], [(jnp.ones(2),)])
    assert added[0].tolist() == [4.0, 4.0]
    assert map_compiled(scaled, [], []) == []


def test_errors_of_the_function_are_raised():
    with pytest.raises(TypeError, match="cannot reshape"):
        map_compiled(lambda array: array.reshape(2), [()], [(jnp.ones(3),)])
