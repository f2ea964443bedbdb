"""Compaction on meshes with explicit axes, the default of `jax.make_mesh`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.graph.engine.placing import small_sharding
from tests.support.devices import on_eight_devices


@pytest.mark.parametrize("kind", ["Mlp", "Attention", "Stack"])
def test_eight_devices_give_the_bits_of_one(kind):
    code = f"from tests.graph import explicit_compaction as e; e.check(e.{kind})"
    (line,) = on_eight_devices(code).splitlines()
    assert int(line.rpartition(" ")[2]) > 0, "every small size divided: nothing was replicated"


def test_what_the_devices_divide_stays_sharded():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,)).abstract_mesh
    sharding = NamedSharding(mesh, P("x"))
    assert small_sharding(sharding, (4, 6), (3, 5)).spec == P("x", None)
    wide = NamedSharding(jax.sharding.AbstractMesh((2, 3, 2), ("x", "y", "z")), P("x", ("y", "z")))
    assert small_sharding(wide, (6, 12), (4, 12)).spec == P("x", ("y", "z"))
    assert small_sharding(wide, (6, 12), (3, 6)).spec == P(None, ("y", "z"))
    assert small_sharding(wide, (6, 12), (3, 8)).spec == P(None, None)


def test_a_reshard_is_followed():
    params = {"a": jnp.ones((8, 16)), "b": jnp.ones((16, 3))}

    def function(p, x):
        h = jax.nn.relu(jnp.einsum("bi,io->bo", x, p["a"], out_sharding=P(None, "x")))
        return jnp.einsum("bo,oc->bc", jax.sharding.reshard(h, P()), p["b"], out_sharding=P())

    masks = {name: np.ones(leaf.shape, bool) for name, leaf in params.items()}
    masks["a"][:, 3:6] = False
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        (group,) = jp.channel_groups(function, params, jnp.ones((4, 8)))
        assert group.units == 16
        small = jp.compact(function, params, masks, jnp.ones((4, 8)))
        assert small.params["b"].shape == (13, 3)
        np.testing.assert_array_equal(small.apply(small.params, jnp.ones((4, 8))), np.full((4, 3), 8 * 13.0))
