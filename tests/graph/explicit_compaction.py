"""Compaction on a mesh with explicit axes, run in a process with eight devices by test_graph_sharding."""

from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from tests.oracles.equivalence import without_units

TOKENS, WIDTH, HEADS, HIDDEN = 8, 16, 8, 32


class Net:
    """A function that says how its products are sharded, on a mesh; on none it says nothing."""

    def __init__(self, on_mesh):
        self.on_mesh = on_mesh

    def einsum(self, spec, *operands, out):
        return jnp.einsum(spec, *operands, **({"out_sharding": out} if self.on_mesh else {}))

    def reshard(self, x, spec):
        return jax.sharding.reshard(x, spec) if self.on_mesh else x


class Mlp(Net):
    shapes = MappingProxyType({"a": (WIDTH, HIDDEN), "c": (HIDDEN,), "b": (HIDDEN, WIDTH)})
    specs = MappingProxyType({"a": P("data", "model"), "c": P("model"), "b": P("model", None)})

    def __call__(self, p, x):
        h = self.einsum("td,dh->th", x, p["a"], out=P("data", "model"))
        h = jax.nn.gelu(h + p["c"])
        return self.einsum("th,hd->td", h, p["b"], out=P("data", None))


class Attention(Net):
    shapes = MappingProxyType(dict.fromkeys("qkv", (WIDTH, HEADS, 4)) | {"o": (HEADS, 4, WIDTH)})
    specs = MappingProxyType(dict.fromkeys("qkv", P(None, "model", None)) | {"o": P("model", None, None)})

    def __call__(self, p, x):
        slopes = jnp.arange(HEADS)[:, None, None] * -0.1 * jnp.arange(TOKENS)
        for _ in range(2):
            q, k, v = (self.einsum("td,dhw->thw", x, p[n], out=P(None, "model", None)) for n in "qkv")
            scores = self.einsum("qhw,khw->hqk", q, k, out=P("model", None, None))
            scores = jax.nn.softmax(scores + self.reshard(slopes, P("model", None, None)))
            mixed = self.einsum("hqk,khw->qhw", scores, v, out=P(None, "model", None))
            flat = mixed.reshape(TOKENS, HEADS * 4)
            out = p["o"].reshape(HEADS * 4, WIDTH)
            x = x + self.einsum("td,dm->tm", flat, out, out=P(None, None))
        return x


class Stack(Net):
    """Layers under a scan, with a gate whose halves are cut from one product."""

    shapes = MappingProxyType({"up": (3, WIDTH, 2 * HIDDEN), "down": (3, HIDDEN, WIDTH)})
    specs = MappingProxyType({"up": P(None, None, "model"), "down": P(None, "model", None)})

    def __call__(self, p, x):
        def layer(x, w):
            h = self.einsum("td,dh->th", x, w["up"], out=P(None, "model"))
            h = self.reshard(h, P("data", None))
            gate, h = jnp.split(h, 2, axis=-1)
            h = self.reshard(jax.nn.silu(gate) * h, P(None, "model"))
            return x + self.einsum("th,hd->td", h, w["down"], out=P(None, None)), None

        return lax.scan(jax.checkpoint(layer), x, p)[0]


def loss(apply):
    return lambda p, x: jnp.sum(jnp.sin(apply(p, x)))


def check(kind):
    """Compacts on a mesh of eight devices, and on one device without a mesh: the same bits."""
    cut = 0
    for share in (0.25, 0.5, 0.4):
        rng = np.random.default_rng(int(share * 100))
        plain, told = kind(False), kind(True)
        host = {n: rng.normal(size=s).astype(np.float32) / 4 for n, s in kind.shapes.items()}
        x = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
        one = {n: jnp.asarray(leaf) for n, leaf in host.items()}
        groups = jp.channel_groups(plain, one, x)
        # As many units of each layer of a stack, but other ones.
        choose = lambda g, rng=rng, share=share: rng.permutation(g.units)[: round(share * g.units) - 1]  # noqa: E731
        masks = without_units(jp.ones_masks(one), groups, choose)
        expected = jp.compact(plain, one, masks, x)
        mesh = jax.make_mesh((2, 4), ("data", "model"))
        with jax.set_mesh(mesh):
            params = {n: jax.device_put(leaf, NamedSharding(mesh, kind.specs[n])) for n, leaf in host.items()}
            given = jax.device_put(x, NamedSharding(mesh, P()))
            found = jp.channel_groups(told, params, given)
            assert list(map(told_of, found)) == list(map(told_of, groups))
            small = jp.compact(told, params, masks, given)
            assert {n: set(k) for n, k in small.keep.items()} == {n: set(k) for n, k in expected.keep.items()}
            for path, axes in small.keep.items():
                for axis, kept in axes.items():
                    np.testing.assert_array_equal(kept, expected.keep[path][axis])
            for n, leaf in small.params.items():
                np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected.params[n]))
                # A small param is sharded as the dense one was, but for what does not divide any more.
                for axis, (size, name) in enumerate(zip(leaf.shape, kind.specs[n], strict=True)):
                    parts = 1 if name is None else mesh.shape[name]
                    assert jax.typeof(leaf).sharding.spec[axis] == (name if size % parts == 0 else None)
                    cut += name is not None and size % parts > 0

            got, grads = jax.jit(jax.value_and_grad(loss(small.apply)))(small.params, given)
            output = jax.jit(small.apply)(small.params, given)
            wide = jax.jit(told)(small.expand(small.params), given)
            for n, leaf in grads.items():
                assert jax.typeof(leaf).sharding == jax.typeof(small.params[n]).sharding, n
        wanted, plain_grads = jax.value_and_grad(loss(expected.apply))(expected.params, x)
        right = np.asarray(expected.apply(expected.params, x))
        for found in (output, wide):
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-6 * np.abs(right).max())
        np.testing.assert_allclose(got, wanted, rtol=1e-5)
        for n, leaf in grads.items():
            largest = np.abs(plain_grads[n]).max()
            np.testing.assert_allclose(leaf, plain_grads[n], rtol=0, atol=1e-5 * largest)
    print(kind.__name__, "replicated axes:", cut)


def told_of(group):
    members = [(m.path, m.axis, m.indices.tolist()) for m in group.members]
    return group.name, group.units, group.removable, members
