"""Compaction of sharded params, run in a process with eight devices by test_compaction."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune as jp
from tests.soak.zoo_check import random_masks
from tests.zoo import ZOO


def check(explicit):
    """Compacts a sharded network, and prints the shardings of its small kernels."""
    case = ZOO["autoencoder"]()
    groups = jp.channel_groups(case.apply, case.params, *case.inputs)
    masks = random_masks(case.params, groups, 0.5, np.random.default_rng(0))
    expected = jp.compact(case.apply, case.params, masks, *case.inputs)
    mesh = jax.make_mesh(
        (2, 4), ("a", "b"), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 2
    )

    def put(leaf):
        # Dense kernels by rows: some small ones still divide, some do not any more.
        spec = PartitionSpec("a") if leaf.ndim == 2 and leaf.shape[0] % 2 == 0 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    params = jax.tree.map(put, case.params)
    if explicit:  # the function itself would have to say how its products are sharded
        got = expected.shrink(params)
    else:
        small = jp.compact(case.apply, params, masks, *case.inputs)
        got = small.params
        output = jax.jit(small.apply)(small.params, *case.inputs)
        np.testing.assert_allclose(output, expected.apply(expected.params, *case.inputs), atol=1e-5)
    cut = jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf, 0), expected.params, expected.masks)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(cut), strict=True):
        np.testing.assert_array_equal(np.asarray(a) * (np.asarray(b) != 0), np.asarray(b))
    kernels = [leaf for leaf in jax.tree.leaves(got) if leaf.ndim == 2]
    print(len([k for k in kernels if "a" in k.sharding.spec]) if explicit else len(kernels))
