"""What numpy computes outside `jit` is what XLA computes under it, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from jaxprune.tree import host
from jaxprune.tree.host import on_host
from tests.support.devices import on_eight_devices

SHAPES = ((), (0, 3), (1,), (5,), (8,), (2, 3, 11))
DTYPES = (
    *(jnp.float32, jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.complex64),
    *(jnp.int4, jnp.int8, jnp.int32, jnp.uint16, jnp.bool_),
)


def bits(array):
    array = np.asarray(array)
    return array.shape, str(array.dtype), array.tobytes()


def same_bits(eager, traced):
    assert jax.tree.structure(eager) == jax.tree.structure(traced)
    assert list(map(bits, jax.tree.leaves(eager))) == list(map(bits, jax.tree.leaves(traced)))


def params_and_masks(dtype):
    draw = np.random.RandomState(3)
    params, masks = {}, {}
    for number, shape in enumerate(SHAPES):
        values = draw.normal(0, 2, shape)
        if np.issubdtype(dtype, np.floating):
            values = np.where(
                draw.rand(*shape) < 0.3, draw.choice([np.nan, np.inf, -np.inf, -0.0], shape), values
            )
        params[f"p{number}"] = jnp.asarray(values).astype(dtype)
        masks[f"p{number}"] = jnp.asarray(draw.rand(*shape) < 0.5)
    return params, masks


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_numpy_and_xla_give_the_same_bits(dtype):
    params, masks = params_and_masks(dtype)
    assert on_host(params, masks)
    calls = {
        "ones": (jp.ones_masks, params),
        "applied": (jp.apply_masks, params, masks),
        "packed": (jp.pack_masks, masks),
        "both": (jp.intersect, masks, jax.tree.map(jnp.logical_not, masks)),
        "alone": (jp.intersect, masks),
    }
    for function, *arguments in calls.values():
        same_bits(function(*arguments), jax.jit(function)(*arguments))
    packed = jp.pack_masks(masks)
    same_bits(jp.unpack_masks(packed), jax.jit(jp.unpack_masks)(packed))
    same_bits(jp.unpack_masks(packed), masks)


def test_params_of_128_bits():
    with jax.enable_x64(True):
        params = {"w": jnp.array([1 + 2j, jnp.nan, -0.0j])}
        masks = {"w": jnp.array([True, False, True])}
        assert params["w"].dtype == jnp.complex128
        same_bits(jp.apply_masks(params, masks), jax.jit(jp.apply_masks)(params, masks))


def test_pruned_entries_that_are_not_zero_are_counted_by_both(monkeypatch):
    params, masks = (
        {"w": jnp.array([0.0, 3.0, jnp.nan, -0.0])},
        {"w": jnp.array([False, False, False, False])},
    )
    for limit in (host.MAX_ENTRIES, 0):
        monkeypatch.setattr(host, "MAX_ENTRIES", limit)
        with pytest.raises(ValueError, match="has 2 pruned entries"):
            jp.check_pruned(params, masks)


def test_what_numpy_may_not_read(monkeypatch):
    def traced(x):
        assert not on_host(x)
        return x

    jax.jit(traced)(jnp.ones(3))
    assert on_host({"a": jnp.ones(3), "b": np.ones(3)}, [])
    assert not on_host(jax.random.key(0))
    assert not on_host(jnp.ones(3), jax.ShapeDtypeStruct((3,), jnp.float32))
    assert not on_host(jnp.full((3,), 1.0))  # a weak type, which numpy has not
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))  # where shardings are part of types
    assert not on_host(jax.device_put(jnp.ones(3), NamedSharding(mesh, PartitionSpec("x"))))
    monkeypatch.setattr(host, "MAX_ENTRIES", 3)
    assert on_host(jnp.ones(3), np.ones(3))
    assert not on_host(jnp.ones(4)) and not on_host(np.ones(4))


def test_masks_that_are_computed_share_no_memory():
    params, masks = {"w": jnp.ones((64, 64))}, {"w": jnp.ones((64, 64), bool)}
    made = [jp.ones_masks(params), jp.intersect(masks), jp.apply_masks(params, masks)]
    state = jp.keep_masked(optax.sgd(0.1), masks).init(params)
    for tree in made:
        jax.jit(lambda tree: jax.tree.map(lambda x: ~x if x.dtype == bool else -x, tree), donate_argnums=0)(
            tree
        )
    jax.jit(lambda state: jax.tree.map(lambda x: x, state), donate_argnums=0)(state)
    assert bool(masks["w"].all()) and float(params["w"].sum()) == 64 * 64


ON_DEVICES = """
import jax, jax.numpy as jnp, numpy as np, jaxprune as jp
from jax.sharding import NamedSharding, PartitionSpec
from jaxprune.tree.host import like_computed, on_host

devices = jax.devices()
mesh = jax.make_mesh((8,), ("x",))
put = {"third": devices[2], "all": NamedSharding(mesh, PartitionSpec("x"))}
for name, place in put.items():
    params = {"w": jax.device_put(jnp.arange(16.0), place)}
    masks = jp.prune_once(params, jp.scores.magnitude, 0.5, where=lambda path, leaf: True)
    masks = {"w": jax.device_put(masks["w"], place)}
    assert on_host(params) == (name == "third")
    for tree in (jp.ones_masks(params), jp.apply_masks(params, masks), jp.intersect(masks, masks)):
        assert tree["w"].sharding.device_set == params["w"].sharding.device_set, (name, tree["w"].sharding)
        assert tree["w"].committed
    assert jp.apply_masks(params, masks)["w"].tolist() == [0.0] * 8 + list(range(8, 16))
assert not jp.ones_masks({"w": jnp.ones(3)})["w"].committed
assert like_computed(np.ones(3)).devices() == {devices[0]}
with jax.set_mesh(mesh):
    assert len(like_computed(np.ones(8)).devices()) == 8
"""


def test_masks_lie_where_their_params_lie():
    on_eight_devices(ON_DEVICES)
