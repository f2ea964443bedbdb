"""What a pass of a selection reads of a leaf, on one device or in parts on several, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.selection import lazy_scores
from jaxprune.selection.lazy_scores import stored_scores

SCORES = np.array([[3.0, -1.0, 3.0], [0.5, 3.0, -1.0]], np.float32)
ALIVE = np.array([[True, True, False], [True, True, False]])


@pytest.mark.parametrize("alive", [None, ALIVE])
@pytest.mark.parametrize("wanted", [3.0, -1.0, 0.5, 2.0])
def test_entries_with_a_key(alive, wanted):
    key = lazy_scores.ordered_bits(jnp.float32(wanted))
    found = lazy_scores.entries_at(stored_scores(SCORES, alive), key)
    np.testing.assert_array_equal(found, (wanted == SCORES) & (True if alive is None else alive))


@pytest.mark.parametrize("most", [2**31 - 1, 11, 4, 3, 1])
@pytest.mark.parametrize("shape", [(2, 3, 4), (6, 4), (5,), ()])
def test_rows_and_places(shape, most, monkeypatch):
    monkeypatch.setattr(lazy_scores, "MAX_COUNT", most)
    row, place = lazy_scores.positions(stored_scores(jnp.zeros(shape), None))
    sizes = [int(np.prod(shape[axis:])) for axis in range(len(shape) + 1)]
    length = next(size for size in sizes if size <= most)
    number = np.arange(sizes[0]).reshape(shape)
    np.testing.assert_array_equal(np.zeros(shape) if row is None else row, number // length)
    np.testing.assert_array_equal(place, number % length)


def test_parts_of_leaves_on_devices_know_their_places():
    """Devices of a mesh of 2 x 3, in axes that `vmap` names; the second axis of the leaf is on none."""
    whole = np.arange(8.0 * 2 * 9).reshape(8, 2, 9)
    parts = whole.reshape(2, 4, 2, 3, 3).transpose(0, 3, 1, 2, 4)

    def on_device(part):
        source = stored_scores(part, None, names=(("rows",), (), ("columns",)))
        assert source.shape == whole.shape
        bounds = lazy_scores.ordered_bits(jnp.array([-1.0, 5.0, 1000.0]))
        counts = lazy_scores.count_on_all_devices(source, lazy_scores.read_keys(source), bounds, False)
        return *lazy_scores.positions(source), counts

    on_devices = jax.vmap(jax.vmap(on_device, axis_name="columns"), axis_name="rows")
    row, place, counts = on_devices(parts.astype(np.float32))
    assert row is None
    np.testing.assert_array_equal(place, parts.astype(int))
    np.testing.assert_array_equal(counts, np.broadcast_to([0, 5, whole.size, whole.size], (2, 3, 4)))


def test_a_loop_in_a_shard_map_adds_counts_to_zero():
    mesh = jax.make_mesh((1, 1), ("rows", "columns"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def on_device(a, b):
        # Counts of the first are summed over its devices; the second is ranked on each by itself.
        both = [stored_scores(a, None, (("rows",),)), stored_scores(b, None)]
        bounds = lazy_scores.ordered_bits(jnp.array([0.5, 1.5]))
        each = [
            lazy_scores.count_on_all_devices(each, lazy_scores.read_keys(each), bounds, False)
            for each in both
        ]
        return jax.lax.fori_loop(0, 2, lambda _, total: total + sum(each)[1], lazy_scores.zero_of(both))[None]

    specs = (jax.P("rows"), jax.P("columns"))
    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=jax.P("columns"))
    np.testing.assert_array_equal(jax.jit(mapped)(jnp.arange(3.0), jnp.arange(4.0)), [8])
