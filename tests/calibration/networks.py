"""Networks with hooks written by hand: what each kernel reads, as explicit rows, for numpy.

A hook is a call `see(path, rows, *layer)` in the network: `rows()` returns the inputs of the product as an
array (..., columns). A leaf says by `reads` which of the columns each of its entries multiplies. That is all
that the statistics of `calibrate` depend on, however the network writes its product.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Leaf(NamedTuple):
    """What is known of a leaf.

    Attributes:
      reads: of the leaf's shape, the column that each entry multiplies; -1 if no product reads it. Columns
        are numbered through all layers: those of the first layer come first.
      contracted: the axes of the leaf that its product sums over.
      group: the axis of N:M groups, the last of `contracted` unless given.
      stack: the axes that count layers.
      refused: why it has no statistics, instead of all that.
    """

    reads: Any = None
    contracted: tuple[int, ...] = ()
    group: int | None = None
    stack: tuple[int, ...] = ()
    refused: str = ""


class Network(NamedTuple):
    """A network, and what it is known to read.

    Attributes:
      params, batches: as for `calibrate`.
      apply: the network.
      hooked: the same with hooks, `hooked(params, *batch, see)`.
      leaves: what is known of its leaves, by path.
    """

    params: Any
    batches: list[Any]
    apply: Callable[..., Any]
    hooked: Callable[..., Any]
    leaves: dict[str, Leaf]


NETWORKS: dict[str, Callable[[], Network]] = {}


def network(build):
    NETWORKS[build.__name__] = build
    return build


def nothing(path, rows, *layer, when=()):
    """The hook of a network that is not looked at; `when` picks the weights of the rows from the batch's."""


def hooked_once(params, batches, net, leaves):
    """Return a network that has one form with and without hooks."""
    return Network(params, batches, lambda p, *xs: net(p, *xs, see=nothing), net, leaves)


def along(shape, *axes):
    """Return the number of each entry along some axes, in the order in which these are given."""
    numbers = np.arange(math.prod(shape[axis] for axis in axes)).reshape([shape[axis] for axis in axes])
    numbers = np.transpose(numbers, np.argsort(axes))
    others = [axis for axis in range(len(shape)) if axis not in axes]
    return np.broadcast_to(np.expand_dims(numbers, others), shape)


def draw(seed, **shapes):
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=s) / math.sqrt(max(s[0], 1)), jnp.float32)
        for name, s in shapes.items()
    }


def inputs(*shape, seed=0, number=2):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(0.3, 1, size=shape), jnp.float32) for _ in range(number)]


def dense_leaf(shape, axis=0):
    return Leaf(along(shape, axis), (axis,))


# --- one product in many layouts


@network
def dense():
    """(in, out) with a bias, (out, in), a cast, a constant scale, a sign, a mask."""
    shapes = {"a": (5, 7), "b": (7,), "t": (6, 7), "s": (6, 4), "m": (4, 6), "out": (6, 3)}
    params, keep = draw(1, **shapes), np.arange(24).reshape(4, 6) % 3 > 0

    def net(p, x, see):
        see("a", lambda: x)
        x = jnp.tanh(x @ p["a"] + p["b"])
        see("t", lambda: x)
        x = jnp.tanh(x @ p["t"].T)
        x = jnp.round(x * 64) / 64  # which bfloat16 holds exactly: XLA may leave out the cast
        see("s", lambda: x)
        kernel = (-p["s"] / 2).astype(jnp.bfloat16)
        x = jnp.tanh(jnp.dot(x.astype(jnp.bfloat16), kernel, preferred_element_type=jnp.float32))
        see("m", lambda: x)
        x = jnp.tanh(x @ jnp.where(jnp.asarray(keep), p["m"], 0.0))
        see("out", lambda: x)
        return x @ p["out"]

    leaves = {
        "a": dense_leaf((5, 7)),
        "t": dense_leaf((6, 7), 1),
        "s": dense_leaf((6, 4)),
        "m": Leaf(np.where(keep, along((4, 6), 0), -1), (0,)),
        "out": dense_leaf((6, 3)),
    }
    return hooked_once(params, inputs(8, 5), net, leaves)


@network
def heads():
    """Attention by einsum, with kernels (d, heads, k) and (heads, k, d), and a repeated kernel of keys."""
    params = draw(2, q=(6, 4, 3), k=(6, 2, 3), v=(6, 2, 3), o=(4, 3, 6), out=(6, 2))

    def net(p, x, see):
        for name in "qkv":
            see(name, lambda: x)
        q = jnp.einsum("btd,dhk->bthk", x, p["q"])
        k = jnp.einsum("btd,dhk->bthk", x, jnp.repeat(p["k"], 2, axis=1))
        v = jnp.repeat(jnp.einsum("btd,dhk->bthk", x, p["v"]), 2, axis=2)
        weights = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k))
        y = jnp.einsum("bhqs,bshk->bqhk", weights, v)
        see("o", lambda: y.reshape(*y.shape[:2], 12))
        y = x + jnp.einsum("bthk,hkd->btd", y, p["o"])
        see("out", lambda: y)
        return y @ p["out"]

    leaves = {name: Leaf(along(params[name].shape, 0), (0,)) for name in "qkv"}
    leaves |= {"o": Leaf(along((4, 3, 6), 0, 1), (0, 1)), "out": dense_leaf((6, 2))}
    return hooked_once(params, inputs(2, 5, 6), net, leaves)


def _fused(cut):
    params = draw(3, qkv=(6, 18), o=(6, 6))

    def net(p, x, see):
        see("qkv", lambda: x)
        q, k, v = cut(p["qkv"], x)
        y = jax.nn.softmax(q @ k.mT) @ v
        see("o", lambda: y)
        return y @ p["o"]

    leaves = {"qkv": dense_leaf((6, 18)), "o": dense_leaf((6, 6))}
    return hooked_once(params, inputs(2, 5, 6), net, leaves)


@network
def fused_by_slices():
    return _fused(lambda w, x: [x @ w[:, 6 * n : 6 * n + 6] for n in range(3)])


@network
def fused_by_split():
    return _fused(lambda w, x: [x @ part for part in jnp.split(w, 3, axis=1)])


@network
def fused_by_reshape():
    def cut(w, x):
        w = w.reshape(6, 3, 2, 3)
        return [jnp.einsum("btd,dhk->bthk", x, w[:, n]).reshape(x.shape) for n in range(3)]

    return _fused(cut)


@network
def fused_outputs():
    return _fused(lambda w, x: jnp.split(x @ w, 3, axis=-1))


@network
def shared_leaves():
    """A leaf used twice, and a table that is looked up and, transposed, multiplied."""
    params = draw(4, table=(9, 6), w=(6, 6))

    def net(p, ids, see):
        x = p["table"][ids]
        for _ in range(2):
            before = x
            see("w", lambda before=before: before)
            x = jnp.tanh(x @ p["w"])
        see("table", lambda: x)
        return x @ p["table"].T

    ids = [jnp.asarray(np.random.default_rng(n).integers(0, 9, (2, 5))) for n in range(2)]
    return hooked_once(params, ids, net, {"w": dense_leaf((6, 6)), "table": Leaf(along((9, 6), 1), (1,))})


# --- convolutions


def patches(x, window, strides, pads, image_dilation, dilation):
    """Return the rows of a convolution of (batch, space..., channels): (batch, places, window * channels)."""
    x = np.asarray(x, np.float64)
    space = x.shape[1:-1]
    grown = np.zeros(
        (len(x), *[(n - 1) * d + 1 for n, d in zip(space, image_dilation, strict=True)], x.shape[-1])
    )
    grown[(slice(None), *[slice(None, None, d) for d in image_dilation])] = x
    grown = np.pad(grown, ((0, 0), *pads, (0, 0)))
    spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
    counts = [(n - s) // t + 1 for n, s, t in zip(grown.shape[1:-1], spans, strides, strict=True)]
    rows = []
    for place in np.ndindex(*counts):
        begin = [p * t for p, t in zip(place, strides, strict=True)]
        cut = [slice(b, b + s, d) for b, s, d in zip(begin, spans, dilation, strict=True)]
        rows.append(grown[(slice(None), *cut)].reshape(len(x), -1))
    return np.stack(rows, 1)


def convolution(
    name, shape, channels, kernel, *, strides, pads, image_dilation=None, dilation=None, groups=1, first=False
):
    """Enter a network of one convolution and a dense layer.

    `shape` is that of the image's space, `kernel` (window..., channels / groups, outputs). With `first` the
    layout is that of NCHW and OIHW, else NHWC and HWIO.
    """

    def build():
        nd = len(shape)
        ones = (1,) * nd
        grown, spread = image_dilation or ones, dilation or ones
        window, inner, outputs = kernel[:nd], kernel[nd], kernel[nd + 1]
        letters = "DHW"[-nd:]
        layout = (f"N{letters}C", f"{letters}IO", f"N{letters}C")
        leaf_shape, images = kernel, (2, *shape, channels)
        if first:
            layout = (f"NC{letters}", f"OI{letters}", f"NC{letters}")
            leaf_shape, images = (outputs, inner, *window), (2, channels, *shape)
        params = draw(5, w=leaf_shape, out=(outputs, 3))

        def net(p, x, see):
            last = jnp.moveaxis(x, 1, -1) if first else x
            see("w", lambda: patches(last, window, strides, pads, grown, spread))
            y = lax.conv_general_dilated(
                x, p["w"], strides, pads, grown, spread, layout, feature_group_count=groups
            )
            y = jnp.mean(jax.nn.relu(jnp.moveaxis(y, 1, -1) if first else y), axis=tuple(range(1, nd + 1)))
            see("out", lambda: y)
            return y @ p["out"]

        position = along(kernel, *range(nd))
        index = np.indices(kernel)
        reads = position * channels + index[nd] + index[nd + 1] // (outputs // groups) * inner
        summed, group = tuple(range(nd + 1)), nd
        if first:
            reads = np.moveaxis(reads, (nd + 1, nd), (0, 1))
            summed, group = tuple(range(1, nd + 2)), 1
        leaves = {"w": Leaf(reads, summed, group), "out": dense_leaf((outputs, 3))}
        return hooked_once(params, inputs(*images), net, leaves)

    NETWORKS[f"convolution_{name}"] = build


convolution("plain", (5, 6), 4, (3, 2, 4, 6), strides=(1, 1), pads=((1, 1), (0, 1)))
convolution("first", (5, 6), 4, (3, 2, 4, 6), strides=(2, 1), pads=((1, 1), (0, 1)), first=True)
convolution("grouped", (6, 6), 4, (3, 3, 2, 6), strides=(2, 2), pads=((0, 0), (0, 0)), groups=2)
convolution(
    "grouped_first", (6, 6), 4, (3, 3, 2, 6), strides=(2, 2), pads=((0, 0),) * 2, groups=2, first=True
)
convolution("depthwise", (6, 6), 4, (3, 3, 1, 8), strides=(1, 1), pads=((1, 1), (1, 1)), groups=4)
convolution("dilated", (7, 7), 3, (2, 3, 3, 4), strides=(1, 2), pads=((0, 0), (2, 2)), dilation=(2, 2))
convolution(
    "transposed", (4, 4), 3, (3, 3, 3, 4), strides=(1, 1), pads=((2, 1), (2, 1)), image_dilation=(2, 2)
)
convolution("line", (9,), 3, (3, 3, 4), strides=(2,), pads=((2, 0),))
convolution("solid", (3, 4, 3), 2, (2, 2, 2, 2, 4), strides=(1, 1, 1), pads=((0, 0), (1, 0), (0, 0)))


# --- experts and ensembles


@network
def experts():
    """By einsum: all experts read all tokens, then each its own hidden values."""
    params = draw(6, up=(3, 5, 4), down=(3, 4, 5), out=(5, 2))

    def net(p, x, see):
        see("up", lambda: x)
        y = jax.nn.relu(jnp.einsum("btd,edh->bteh", x, p["up"]))
        see("down", lambda: y.reshape(*y.shape[:2], 12))
        y = jnp.einsum("bteh,ehd->btd", y, p["down"])
        see("out", lambda: y)
        return y @ p["out"]

    leaves = {
        "up": Leaf(along((3, 5, 4), 1), (1,)),
        "down": Leaf(along((3, 4, 5), 0, 1), (0, 1)),
        "out": dense_leaf((5, 2)),
    }
    return hooked_once(params, inputs(2, 6, 5), net, leaves)


@network
def experts_apart():
    """By einsum over dispatched tokens: each expert has rows of its own."""
    params = draw(7, up=(3, 5, 4), down=(3, 4, 5), out=(5, 2))

    def net(p, x, see):
        x = x.reshape(3, 4, 5)
        for e in range(3):
            see("up", lambda e=e: x[e], e, when=slice(4 * e, 4 * e + 4))
        y = jax.nn.relu(jnp.einsum("etd,edh->eth", x, p["up"]))
        for e in range(3):
            see("down", lambda e=e: y[e], e, when=slice(4 * e, 4 * e + 4))
        y = jnp.einsum("eth,ehd->etd", y, p["down"])
        y = y.reshape(12, 5)
        see("out", lambda: y)
        return y @ p["out"]

    leaves = {name: Leaf(along(params[name].shape, 0, 1), (1,)) for name in ("up", "down")}
    return hooked_once(params, inputs(12, 5), net, leaves | {"out": dense_leaf((5, 2))})


@network
def ragged():
    params = draw(8, up=(3, 5, 4), out=(4, 2))

    def net(p, x, see):
        sizes = jnp.asarray([3, 2, 5], jnp.int32)
        ends = [0, 3, 5, 10]
        for e in range(3):
            rows = slice(ends[e], ends[e + 1])
            see("up", lambda rows=rows: x[rows], e, when=rows)
        y = jax.nn.relu(lax.ragged_dot(x, p["up"], sizes))
        see("out", lambda: y)
        return y @ p["out"]

    return hooked_once(
        params, inputs(10, 5), net, {"up": Leaf(along((3, 5, 4), 0, 1), (1,)), "out": dense_leaf((4, 2))}
    )


@network
def ensemble():
    """Three networks beside each other by `vmap`, on the same data."""
    params = draw(9, a=(3, 5, 4), b=(3, 4, 4), out=(3, 4, 2))

    def one(p, x):
        x = jnp.tanh(x @ p["a"])
        return jnp.tanh(x @ p["b"]) @ p["out"]

    def hooked(p, x, see):
        outs = []
        for m in range(3):
            each = jax.tree.map(lambda w, m=m: w[m], p)
            see("a", lambda: x, *(() if m == 0 else (None,)))
            y = jnp.tanh(x @ each["a"])
            see("b", lambda y=y: y, m)
            z = jnp.tanh(y @ each["b"])
            see("out", lambda z=z: z, m)
            outs.append(z @ each["out"])
        return jnp.stack(outs)

    leaves = {"a": Leaf(along((3, 5, 4), 1), (1,))}
    leaves |= {name: Leaf(along(params[name].shape, 0, 1), (1,)) for name in ("b", "out")}
    return Network(params, inputs(6, 5), jax.vmap(one, (0, None)), hooked, leaves)


# --- loops


def _layers(axis=0, wrap=lambda f: f, reverse=False, unrolled=False):
    """A stack of residual layers under a scan; with `axis`, that along which the leaves count layers."""
    params = draw(10, up=(3, 5, 4), down=(3, 4, 5), out=(5, 2))
    shapes = {name: list(params[name].shape) for name in ("up", "down")}
    for name in ("up", "down"):
        params[name] = jnp.moveaxis(params[name], 0, axis)

    def layer(h, up, down):
        return h + jnp.tanh(h @ up) @ down

    wrapped = wrap(layer)

    def apply(p, x):
        up, down = (jnp.moveaxis(p[name], axis, 0) for name in ("up", "down"))
        if unrolled:
            for i in range(3):
                x = wrapped(x, up[i], down[i])
        else:
            x, _ = lax.scan(lambda h, w: (wrapped(h, *w), None), x, (up, down), reverse=reverse)
        return x @ p["out"]

    def hooked(p, x, see):
        order = (2, 1, 0) if reverse else (0, 1, 2)
        for i in order:
            up, down = (jnp.take(p[name], i, axis) for name in ("up", "down"))
            see("up", lambda x=x: x, i)
            y = jnp.tanh(x @ up)
            see("down", lambda y=y: y, i)
            x = x + y @ down
        see("out", lambda: x)
        return x @ p["out"]

    leaves = {"out": dense_leaf((5, 2))}
    for name, shape in shapes.items():
        reads = np.moveaxis(along(tuple(shape), 0, 1), 0, axis)
        contracted = 0 if axis else 1
        if axis == 2:
            contracted = 0
        leaves[name] = Leaf(reads, (contracted,), None, () if unrolled else (axis,))
    return Network(params, inputs(6, 5), apply, hooked, leaves)


@jax.custom_vjp
def _custom(h, up, down):
    return h + jnp.tanh(h @ up) @ down


_custom.defvjp(lambda *args: (_custom(*args), args), lambda args, g: jax.vjp(lambda *a: a[0], *args)[1](g))

NETWORKS["scan"] = _layers
NETWORKS["scan_reversed"] = lambda: _layers(reverse=True)
NETWORKS["scan_axis_1"] = lambda: _layers(1)
NETWORKS["scan_axis_2"] = lambda: _layers(2)
NETWORKS["scan_remat"] = lambda: _layers(wrap=jax.checkpoint)
NETWORKS["scan_custom_vjp"] = lambda: _layers(wrap=lambda f: _custom)
NETWORKS["unrolled_slices"] = lambda: _layers(unrolled=True)


@network
def nested_scans():
    """Groups of layers: a leaf with two axes that count layers."""
    params = draw(11, w=(2, 3, 4, 4), out=(4, 2))

    def apply(p, x):
        def layer(h, w):
            return jnp.tanh(h @ w), None

        x, _ = lax.scan(lambda h, w: lax.scan(layer, h, w), x, p["w"])
        return x @ p["out"]

    def hooked(p, x, see):
        for i, j in np.ndindex(2, 3):
            see("w", lambda x=x: x, i, j)
            x = jnp.tanh(x @ p["w"][i, j])
        see("out", lambda: x)
        return x @ p["out"]

    leaves = {"w": Leaf(along((2, 3, 4, 4), 0, 1, 2), (2,), None, (0, 1)), "out": dense_leaf((4, 2))}
    return Network(params, inputs(5, 4), apply, hooked, leaves)


@network
def repeated():
    """One kernel in all steps of a scan."""
    params = draw(15, w=(4, 4), out=(4, 2))

    def apply(p, x):
        return lax.scan(lambda h, _: (jnp.tanh(h @ p["w"]), None), x, length=3)[0] @ p["out"]

    def hooked(p, x, see):
        for _ in range(3):
            see("w", lambda x=x: x)
            x = jnp.tanh(x @ p["w"])
        see("out", lambda: x)
        return x @ p["out"]

    leaves = {"w": dense_leaf((4, 4)), "out": dense_leaf((4, 2))}
    return Network(params, inputs(5, 4), apply, hooked, leaves)


@network
def stacked_recurrent():
    """Two recurrent layers under a scan over layers, each with a scan over time."""
    params = draw(12, x=(2, 4, 4), h=(2, 4, 4), out=(4, 2))

    def apply(p, xs):
        def layer(xs, p):
            def step(h, x):
                h = jnp.tanh(x @ p["x"] + h @ p["h"])
                return h, h

            return lax.scan(step, jnp.zeros(xs.shape[1:]), xs)[1], None

        ys, _ = lax.scan(layer, xs.swapaxes(0, 1), {"x": p["x"], "h": p["h"]})
        return ys.swapaxes(0, 1) @ p["out"]

    def hooked(p, xs, see):
        for i in range(2):
            h, ys = jnp.zeros((xs.shape[0], 4)), []
            for t in range(xs.shape[1]):
                x = xs[:, t]
                see("x", lambda x=x: x, i, when=(slice(None), t))
                see("h", lambda h=h: h, i, when=(slice(None), t))
                h = jnp.tanh(x @ p["x"][i] + h @ p["h"][i])
                ys.append(h)
            xs = jnp.stack(ys, 1)
        see("out", lambda: xs)
        return xs @ p["out"]

    leaves = {name: Leaf(along((2, 4, 4), 0, 1), (1,), None, (0,)) for name in "xh"}
    return Network(params, inputs(3, 5, 4), apply, hooked, leaves | {"out": dense_leaf((4, 2))})


def _rnn(p, h, x):
    h = jnp.tanh(x @ p["x"] + h @ p["h"] + p["b"])
    return h, h


def _gru(p, h, x):
    (zx, rx, nx), (zh, rh, nh) = jnp.split(x @ p["x"] + p["b"], 3, -1), jnp.split(h @ p["h"], 3, -1)
    z = jax.nn.sigmoid(zx + zh)
    h = z * h + (1 - z) * jnp.tanh(nx + jax.nn.sigmoid(rx + rh) * nh)
    return h, h


def _lstm(p, carry, x):
    h, c = carry
    i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


def _recurrent(cell, gates, start, state, reverse=False):
    params = draw(13, x=(3, 4 * gates), h=(4, 4 * gates), b=(4 * gates,), out=(4, 2))

    def apply(p, xs):
        _, ys = lax.scan(lambda c, x: cell(p, c, x), start(xs), xs.swapaxes(0, 1), reverse=reverse)
        return ys.swapaxes(0, 1) @ p["out"]

    def hooked(p, xs, see):
        carry, ys = start(xs), {}
        for t in range(xs.shape[1])[:: -1 if reverse else 1]:
            x, before = xs[:, t], state(carry)
            see("x", lambda x=x: x, when=(slice(None), t))
            see("h", lambda before=before: before, when=(slice(None), t))
            carry, ys[t] = cell(p, carry, x)
        y = jnp.stack([ys[t] for t in range(xs.shape[1])], 1)
        see("out", lambda: y)
        return y @ p["out"]

    leaves = {
        "x": dense_leaf((3, 4 * gates)),
        "h": dense_leaf((4, 4 * gates)),
        "out": dense_leaf((4, 2)),
    }
    return Network(params, inputs(3, 5, 3), apply, hooked, leaves)


def _zeros(xs):
    return jnp.zeros((xs.shape[0], 4), jnp.float32)


NETWORKS["rnn"] = lambda: _recurrent(_rnn, 1, _zeros, lambda h: h)
NETWORKS["rnn_reversed"] = lambda: _recurrent(_rnn, 1, _zeros, lambda h: h, reverse=True)
NETWORKS["gru"] = lambda: _recurrent(_gru, 3, _zeros, lambda h: h)
NETWORKS["lstm"] = lambda: _recurrent(_lstm, 4, lambda xs: (_zeros(xs), _zeros(xs)), lambda c: c[0])


@network
def branches():
    """A cond and a switch that the batches take differently."""
    params = draw(14, a=(4, 4), b=(4, 4), c=(4, 4), d=(4, 4), e=(4, 4), out=(4, 2))

    def forward(p, x, see, choose):
        def by(name):
            def branch(x):
                see(name, lambda: x)
                return jnp.tanh(x @ p[name])

            return branch

        x = choose([by("b"), by("a")], jnp.int32(jnp.mean(x) > 0), x)
        x = choose([by("c"), by("d"), by("e")], jnp.int32(jnp.sum(x > 0)) % 3, x)
        see("out", lambda: x)
        return x @ p["out"]

    def apply(p, x):
        return forward(p, x, nothing, lambda arms, number, x: lax.switch(number, arms, x))

    def hooked(p, x, see):
        return forward(p, x, see, lambda arms, number, x: arms[int(number)](x))

    batches = [x - n % 2 for n, x in enumerate(inputs(3, 4, number=8))]
    return Network(params, batches, apply, hooked, {name: dense_leaf(params[name].shape) for name in params})
