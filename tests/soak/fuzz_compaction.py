"""Random programs under random masks: compacted, and compared with themselves.

`python -m tests.soak.fuzz_compaction --cases 5000 --seed 0` prints how many cases lost slices and stops
at the first mistake, which `--seed N --cases 1` makes again. The tests run some cases too.
"""

import argparse
import math
import re
import sys
import time
from collections import Counter
from functools import partial
from typing import Any, NamedTuple

from tests.support.quick import compile_quickly

if __name__ == "__main__":
    compile_quickly()

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune import channel_groups, compact
from tests.oracles.equivalence import (
    Dense,
    Mismatch,
    assert_close,
    check_facts,
    random_masks,
    removed,
    zero_units,
)

SIZES = (1, 2, 3, 4, 6)
LARGEST = 240  # entries of a value


class Step(NamedTuple):
    """One line of a program: a function of some of the values so far."""

    function: Any
    operands: tuple[int, ...]
    name: str


class Program:
    """A random function of params and inputs, as a list of steps.

    The values are the inputs, then the params (which steps may add), then what the steps give.
    """

    def __init__(self, rng):
        self.rng = rng
        self.shapes: list[tuple[int, ...]] = []
        self.places: list[tuple[str, Any]] = []
        self.params: dict[str, np.ndarray] = {}
        self.inputs: list[np.ndarray] = []
        self.steps: list[Step] = []
        self.outputs: list[int] = []
        self.stacks: dict[int, Stack] = {}

    def value(self, shape, place):
        self.shapes.append(tuple(shape))
        self.places.append(place)
        return len(self.shapes) - 1

    def input(self, *shape):
        self.inputs.append(self.rng.normal(size=shape))
        return self.value(shape, ("input", len(self.inputs) - 1))

    def param(self, *shape):
        name = f"p{len(self.params)}"
        scale = 1 / math.sqrt(max(1, math.prod(shape[:-1])))
        self.params[name] = scale * self.rng.normal(size=shape)
        return self.value(shape, ("param", name))

    def step(self, function, *operands):
        """Appends a step, if it can be done and gives one float array that is not too large."""
        out = jax.eval_shape(function, *(jax.ShapeDtypeStruct(self.shapes[n], float) for n in operands))
        if not 0 < math.prod(out.shape) <= LARGEST or len(out.shape) > 4 or out.dtype != float:
            raise ValueError("not a shape to go on with")
        self.steps.append(Step(function, operands, getattr(function, "__name__", "step")))
        return self.value(out.shape, ("step", len(self.steps) - 1))

    def stacked(self, path, leaf):
        """Along which axes a param is stacked."""
        del leaf
        along = {name: axis for s in self.stacks.values() for name, axis in zip(s.names, s.axes, strict=True)}
        return (along[path],) if path in along else ()

    def taken_apart(self, params):
        """Params with lists of layers in place of stacked ones."""
        return {
            path: [*np.moveaxis(np.asarray(leaf), axes[0], 0)] if (axes := self.stacked(path, leaf)) else leaf
            for path, leaf in params.items()
        }

    def one_by_one(self, params, *inputs):
        """The same function of lists of layers."""
        return self(params, *inputs, alone=True)

    def __call__(self, params, *inputs, alone=False):
        made: list[Any] = []
        values: list[Any] = []
        done = 0
        for kind, key in self.places:
            if kind == "step":
                step = self.steps[done]
                operands = [values[n] for n in step.operands]
                if alone and done in self.stacks:
                    stack = self.stacks[done]
                    operands[-len(stack.names) :] = [params[name] for name in stack.names]
                    made.append(stack.alone(*operands))
                else:
                    made.append(step.function(*operands))
                done += 1
                values.append(made[-1])
            elif kind == "input":
                values.append(inputs[key])
            else:
                leaf = params[key]
                along = self.stacked(key, leaf)
                values.append(jnp.stack(leaf, along[0]) if alone and along else leaf)
        return [values[n] for n in self.outputs]

    # What steps are drawn from.

    def pick(self, rank=0):
        """A value of some rank or more: a late one more often than an early one."""
        fit = [n for n, shape in enumerate(self.shapes) if len(shape) >= rank]
        return fit[-1 - min(int(self.rng.geometric(0.35)) - 1, len(fit) - 1)]

    def axis(self, n):
        return int(self.rng.integers(len(self.shapes[n])))

    def like(self, n):
        """A value of the same shape, or a new param that broadcasts to it."""
        same = [m for m, shape in enumerate(self.shapes) if shape == self.shapes[n] and m != n]
        if same and self.rng.random() < 0.6:
            return int(self.rng.choice(same))
        shape = self.shapes[n][int(self.rng.integers(len(self.shapes[n]))) :]
        return self.param(*(1 if self.rng.random() < 0.15 else size for size in shape))

    def one_of(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def size(self):
        return int(self.rng.choice(SIZES))


@jax.custom_jvp
def bent(x):
    return jnp.where(x > 0, jnp.sin(x), 0.1 * x)


@bent.defjvp
def _bent_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return bent(x), t * (1 + bent(x)) * 0.5


@jax.custom_vjp
def scaled(x, scale):
    return x * scale


def _scaled_forward(x, scale):
    return x * scale, (x, scale)


def _scaled_backward(residuals, g):
    x, scale = residuals
    return 0.5 * g * scale, jnp.tanh(g * x)


scaled.defvjp(_scaled_forward, _scaled_backward)


UNARY = (
    *(jnp.tanh, jnp.sin, jnp.cos, jax.nn.relu, jax.nn.gelu, jax.nn.softplus, jnp.square, jnp.negative, bent),
    lambda x: x * jax.nn.sigmoid(x),
    lambda x: jnp.clip(x, -0.5, 0.7),
    lambda x: jnp.clip(x, 0.1, 0.7),
    lambda x: jnp.where(x > 0.1, x, 0.2 * x),
    lambda x: jnp.where(x > 0.1, x, 1.0),
    lambda x: jnp.exp(-jnp.square(x)),
    lambda x: jnp.expm1(-jnp.abs(x)),
    lambda x: x / (1 + jnp.abs(x)),
    lambda x: 1 / (1 + x * x),
    lambda x: jnp.sqrt(x * x + 0.1),
    lambda x: (x > 0.1) * 1.0,
    lambda x: jnp.floor(x) * 0.5,
    lambda x: x**3 * 0.1,
    lambda x: lax.optimization_barrier(x),
    lambda x: x * jnp.zeros(()),
    lambda x: x + jnp.arange(float(x.size)).reshape(x.shape) / x.size,
    lambda x: x * (jnp.arange(x.shape[-1]) % 2),
    lambda x: x * jax.random.bernoulli(jax.random.key(3), 0.6, x.shape),
    jax.checkpoint(lambda x: jnp.tanh(x) * jnp.cos(x)),
    jax.jit(lambda x: jnp.sin(x) + jax.jit(jnp.square)(x)),
)

BINARY = (
    *(jnp.add, jnp.add, jnp.subtract, jnp.multiply, jnp.multiply, jnp.maximum, jnp.minimum),
    lambda x, y: x / (1 + y * y),
    lambda x, y: jnp.where(x > y, x, y * 0.5),
    lambda x, y: jnp.where(y > 0, x, 0.0),
    lambda x, y: lax.cond(jnp.sum(x) > 0, lambda x, y: x * y, lambda x, y: jnp.sin(x) + 0 * y, x, y),
    lambda x, y: lax.switch(
        jnp.int32(jnp.sum(x)) % 3, [lambda: x * 1.0 + 0 * y, lambda: x - y, lambda: x * y]
    ),
    lambda x, y: scaled(x, jnp.broadcast_to(y, x.shape)),
    lambda x, y: jnp.hypot(x, y + 2.0),
    lambda x, y: jax.grad(lambda x: jnp.sum(jnp.tanh(x * y) * x))(x),
)


def unary(g):
    return g.step(g.one_of(*UNARY), g.pick())


def binary(g):
    n = g.pick(1)
    return g.step(g.one_of(*BINARY), n, g.like(n))


def layer(g):
    """A product with a new param along a random axis."""
    n = g.pick(1)
    axis, width = g.axis(n), g.size()
    at = int(g.rng.integers(len(g.shapes[n])))

    def product(x, w):
        return jnp.moveaxis(jnp.tensordot(x, w, ((axis,), (0,))), -1, at)

    return g.step(product, n, g.param(g.shapes[n][axis], width))


def several(g):
    """Several contracted axes, and perhaps batch axes."""
    n = g.pick(2)
    letters = "abcd"[: len(g.shapes[n])]
    sizes = dict(zip(letters, g.shapes[n], strict=True)) | {"z": g.size()}
    chosen = [c for c in g.rng.permutation(list(letters)) if g.rng.random() < 0.8]
    right = "".join([*chosen, "z"])
    out = "".join(c for c in g.rng.permutation(list(letters + "z")) if c == "z" or g.rng.random() < 0.6)
    return g.step(partial(jnp.einsum, f"{letters},{right}->{out}"), n, g.param(*(sizes[c] for c in right)))


def attention(g):
    n = g.pick(2)

    def attend(x, q, k, v):
        logits = (x @ q) @ jnp.swapaxes(x @ k, -1, -2)
        return jax.nn.softmax(logits, -1) @ (x @ v)

    size, width = g.shapes[n][-1], g.size()
    return g.step(attend, n, g.param(size, width), g.param(size, width), g.param(size, g.size()))


def gram(g):
    n = g.pick(2)
    return g.step(lambda x: jnp.tensordot(x, x, ((0,), (0,))) / 4, n)


def convolution(g):
    n = g.pick(2)
    if len(g.shapes[n]) == 2:
        n = g.step(lambda x: x[None], n)
    n = g.step(lambda x: x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x, n)
    channels = g.shapes[n][-1]
    groups = int(g.rng.choice([d for d in range(1, channels + 1) if channels % d == 0]))
    kernel = g.param(g.one_of(1, 2, 3), channels // groups, groups * g.one_of(1, 2, 3))
    options = {
        "window_strides": (g.one_of(1, 1, 2),),
        "padding": g.one_of("SAME", "VALID", [(1, 0)], [(0, 2)]),
        "feature_group_count": groups,
        "dimension_numbers": ("NWC", "WIO", "NWC"),
    }
    if not isinstance(options["padding"], str):
        options |= {"lhs_dilation": (g.one_of(1, 2),), "rhs_dilation": (g.one_of(1, 2),)}
    if g.rng.random() < 0.3:
        options["dimension_numbers"] = ("NCW", "OIW", "NCW")
        return g.step(
            lambda x, w: lax.conv_general_dilated(x.swapaxes(1, 2), w.transpose(2, 1, 0), **options),
            n,
            kernel,
        )
    return g.step(lambda x, w: lax.conv_general_dilated(x, w, **options), n, kernel)


def reduction(g):
    n = g.pick(1)
    rank = len(g.shapes[n])
    axes = tuple(sorted(int(a) for a in g.rng.choice(rank, g.one_of(1, 1, rank), replace=False)))
    one, keep = axes[:1], bool(g.rng.random() < 0.3)
    run = g.one_of(
        partial(jnp.sum, axis=axes, keepdims=keep),
        partial(jnp.mean, axis=axes, keepdims=keep),
        partial(jnp.max, axis=axes, keepdims=keep),
        partial(jnp.min, axis=axes, keepdims=keep),
        partial(jnp.var, axis=axes, keepdims=keep),
        partial(jnp.prod, axis=one, keepdims=keep),
        partial(jax.nn.logsumexp, axis=axes, keepdims=keep),
        lambda x: jnp.linalg.norm(x.ravel() + 0.1),
        lambda x: jnp.argmax(x, axis=one[0]) * 0.5,
        lambda x: jnp.any(x > 0.3, axis=axes, keepdims=keep) * 1.0,
        lambda x: jnp.all(x > -1.0, axis=axes, keepdims=keep) * 1.0,
    )
    return g.step(run, n)


def normalisation(g):
    n = g.pick(1)
    rank = len(g.shapes[n])
    axes = tuple(int(a) for a in g.rng.choice(rank, g.one_of(1, 1, rank), replace=False))

    def layer_norm(x):
        mean = x.mean(axes, keepdims=True)
        return (x - mean) * lax.rsqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 0.1)

    def fast_norm(x):
        var = (x * x).mean(axes, keepdims=True) - x.mean(axes, keepdims=True) ** 2
        return (x - x.mean(axes, keepdims=True)) / jnp.sqrt(var + 0.5)

    return g.step(
        g.one_of(
            layer_norm,
            fast_norm,
            lambda x: x / jnp.sqrt((x * x).mean(axes, keepdims=True) + 0.1),
            lambda x: jax.nn.softmax(x, axes),
            lambda x: x - x.max(axes, keepdims=True),
        ),
        n,
    )


def group_norm(g):
    n = g.pick(1)
    size = g.shapes[n][-1]
    groups = int(g.rng.choice([d for d in range(1, size + 1) if size % d == 0]))

    def norm(x, scale):
        parts = x.reshape(*x.shape[:-1], groups, size // groups)
        parts = (parts - parts.mean(-1, keepdims=True)) / jnp.sqrt(parts.var(-1, keepdims=True) + 0.1)
        return parts.reshape(x.shape) * scale

    return g.step(norm, n, g.param(size))


def along(g):
    """Cumulative ops, sorting, Fourier transforms, windows."""
    n = g.pick(1)
    axis = g.axis(n)
    size = g.shapes[n][axis]

    def pool(x, operator, initial, padding, stride):
        sizes, strides, pads = [1] * x.ndim, [1] * x.ndim, [(0, 0)] * x.ndim
        sizes[axis], strides[axis], pads[axis] = 2, stride, padding
        out = lax.reduce_window(x, initial, operator, sizes, strides, pads)
        return jnp.where(jnp.isfinite(out), out, 3.0)

    padding, stride = g.one_of((0, 0), (1, 0), (0, 1)), g.one_of(1, 2)
    return g.step(
        g.one_of(
            partial(jnp.cumsum, axis=axis),
            partial(jnp.cumprod, axis=axis),
            lambda x: lax.cummax(x, axis, reverse=True),
            lambda x: lax.cumlogsumexp(x, axis),
            partial(jnp.sort, axis=axis),
            lambda x: jnp.argsort(x, axis=axis) * 0.5,
            lambda x: jnp.moveaxis(lax.top_k(jnp.moveaxis(x, axis, -1), min(2, size))[0], -1, axis),
            lambda x: jnp.real(jnp.fft.fft(x, axis=axis)),
            lambda x: pool(x, lax.max, -jnp.inf, padding, stride),
            lambda x: pool(x, lax.add, 0.0, padding, stride),
            lambda x: pool(x, lax.min, jnp.inf, (2, 2), stride),
        ),
        n,
    )


def indexing(g):
    n = g.pick(1)
    axis = g.axis(n)
    size = g.shapes[n][axis]
    places = g.rng.integers(-size, size, size=g.one_of(1, 2, 4))
    wild = g.rng.integers(-size - 1, size + 2, size=3)
    unknown = jnp.asarray  # a constant to the trace, but an op makes it
    runtime = g.input() if g.rng.random() < 0.5 else None

    def moved(x):
        return jnp.moveaxis(x, axis, 0)

    def index(s):
        return jnp.int32(jnp.abs(s) * 3) % size

    simple = (
        lambda x: jnp.take(x, places, axis=axis),
        lambda x: moved(x)[unknown(places)[::-1]],
        lambda x: moved(x).at[wild].get(mode="fill", fill_value=0.0),
        lambda x: moved(x).at[wild].get(mode="fill", fill_value=0.7),
        lambda x: moved(x).at[wild].get(mode="clip"),
        lambda x: moved(x).at[places].set(0.5),
        lambda x: moved(x).at[places].add(moved(x)[0]),
        lambda x: moved(x).at[places[:1]].multiply(0.5, unique_indices=True),
        lambda x: jnp.take_along_axis(x, jnp.argsort(x, axis=axis), axis=axis),
        lambda x: moved(x)[jnp.array([places, places])],
    )
    if runtime is None:
        return g.step(g.one_of(*simple), n)
    at_runtime = (
        lambda x, s: moved(x)[index(s)],
        lambda x, s: moved(x)[(index(s) + jnp.arange(2)) % size],
        lambda x, s: moved(x).at[index(s)].set(0.0),
        lambda x, s: moved(x).at[index(s)].add(1.0),
        lambda x, s: lax.dynamic_slice_in_dim(x, index(s), max(1, size - 1), axis),
        lambda x, s: lax.dynamic_update_slice_in_dim(x, lax.slice_in_dim(x, 0, 1, axis=axis), index(s), axis),
        lambda x, s: jnp.roll(x, index(s), axis),
        lambda x, s: lax.fori_loop(0, 2, lambda i, h: jnp.sin(h) + 0.1 * i * s, x),
        lambda x, s: lax.stop_gradient(
            lax.while_loop(
                lambda c: c[0] < index(s), lambda c: (c[0] + 1, jnp.cos(c[1]) * c[1].sum()), (0, x)
            )[1]
        ),
    )
    return g.step(g.one_of(*at_runtime), n, runtime)


def lookup(g):
    """An embedding: rows of a param at places known only at run time."""
    table = g.param(g.one_of(3, 5), g.size())
    index = g.input(g.one_of(2, 3))
    rows = g.shapes[table][0]
    mode = g.one_of("clip", "wrap", "fill", "promise_in_bounds")

    def rows_of(t, s):
        return t.at[jnp.int32(jnp.abs(s) * 3) % rows].get(mode=mode)

    return g.step(rows_of, table, index)


def reshape(g):
    n = g.pick(1)
    shape = list(g.shapes[n])
    for _ in range(g.one_of(1, 2)):
        if g.rng.random() < 0.5 and len(shape) > 1:
            at = int(g.rng.integers(len(shape) - 1))
            shape[at : at + 2] = [shape[at] * shape[at + 1]]
        else:
            at = int(g.rng.integers(len(shape)))
            factor = int(g.rng.choice([d for d in range(1, shape[at] + 1) if shape[at] % d == 0]))
            shape[at : at + 1] = [factor, shape[at] // factor]
    return g.step(partial(jnp.reshape, shape=tuple(shape)), n)


def rearrangement(g):
    n = g.pick(1)
    axis, rank = g.axis(n), len(g.shapes[n])
    size = g.shapes[n][axis]
    order = tuple(int(a) for a in g.rng.permutation(rank))
    start = int(g.rng.integers(size))
    config = [(0, 0, 0)] * rank
    config[axis] = g.one_of((1, 0, 0), (0, 2, 1), (-1, 1, 0), (2, -1, 1))
    filler = g.one_of(0.0, 0.0, 0.5)
    cut = int(g.rng.integers(1, size + 1))
    return g.step(
        g.one_of(
            partial(jnp.transpose, axes=order),
            partial(jnp.transpose, axes=order),
            lambda x: lax.slice_in_dim(x, start, size, axis=axis),
            lambda x: lax.slice_in_dim(x, 0, size, 2, axis),
            lambda x: jnp.flip(x, axis),
            lambda x: jnp.roll(x, 1, axis),
            lambda x: jnp.tile(x, (1,) * (rank - 1) + (2,)),
            lambda x: jnp.repeat(x, 2, axis),
            lambda x: lax.pad(x, jnp.float64(filler), config),
            lambda x: jnp.expand_dims(x, axis),
            lambda x: jnp.squeeze(x),
            lambda x: jnp.broadcast_to(x, (2, *x.shape)),
            lambda x: jnp.split(x, [cut], axis)[0],
            lambda x: jnp.concatenate(jnp.split(x, [cut], axis)[::-1], axis),
            lambda x: jnp.stack([x, jnp.zeros_like(x), jnp.cos(x)], axis),
            lambda x: sum(jnp.unstack(x, axis=axis)),
            lambda x: jnp.concatenate([jnp.zeros_like(x), x], axis),
        ),
        n,
    )


def gated(g):
    """Both halves of an axis, one of which gates the other."""
    n = g.pick(1)
    half = g.shapes[n][-1] // 2

    def gate(x):
        a, b = x[..., :half], x[..., half : 2 * half]
        return jnp.tanh(a) * b

    return g.step(gate, n)


def joined(g):
    n = g.pick(1)
    axis = g.axis(n)
    shape = g.shapes[n]

    def fits(other):
        return len(other) == len(shape) and all(
            a == b for k, (a, b) in enumerate(zip(shape, other, strict=True)) if k != axis
        )

    others = [m for m, other in enumerate(g.shapes) if fits(other)]
    return g.step(lambda x, y: jnp.concatenate([x, y], axis), n, int(g.rng.choice(others)))


def scan(g):
    """A recurrent step along the first axis."""
    n = g.pick(2)
    width = g.shapes[n][-1]
    reverse, policy = bool(g.rng.random() < 0.3), g.rng.random() < 0.3

    def recurrent(xs, w, b):
        def step(carry, x):
            new = jnp.tanh(carry @ w + x * b)
            return new, (new * 2.0, new.sum())

        body = jax.checkpoint(step) if policy else step
        last, (ys, sums) = lax.scan(body, jnp.zeros(xs.shape[1:]), xs, reverse=reverse)
        return ys + last + sums[(...,) + (None,) * (ys.ndim - 1)] * 0.1

    return g.step(recurrent, n, g.param(width, width), g.param(width))


class Stack(NamedTuple):
    """The params of a step that are stacked, each along an axis, and the step on lists of layers."""

    names: tuple[str, ...]
    axes: tuple[int, ...]
    alone: Any


def layers(g):
    """Layers of equal shapes, stacked along any axis, run through by a loop, by indices or side by side."""
    n = g.pick(1)
    width, hidden, count = g.shapes[n][-1], g.one_of(2, 3, 4, 6), g.one_of(2, 2, 3)
    act, way = (
        g.one_of(jnp.tanh, bent, jax.nn.relu),
        g.one_of("scan", "scan", "remat", "fori", "index", "vmap"),
    )
    mixed = g.one_of("table", "shared", "divided", "gated", "plain", "plain")
    reverse, casts, twice = (bool(g.rng.random() < share) for share in (0.3, 0.2, 0.15))
    shapes = [(width, hidden), (hidden,), (hidden, width)]
    axes = [int(g.rng.integers(len(shape) + 1)) for shape in shapes]
    if way in ("fori", "index", "vmap") or g.rng.random() < 0.4:
        axes = [0] * len(shapes)
    slopes = g.rng.normal(size=hidden) * (g.rng.random(hidden) < 0.8)

    def one(h, w, shared):
        up, scale, down = w
        a = h @ up
        if mixed == "table":
            a = a + jnp.asarray(slopes) * h.sum(-1, keepdims=True)
        elif mixed == "shared":
            a = a * jnp.cos(shared)
        elif mixed == "divided":
            a = a / (2 + scale) / (1 + scale * scale)
        elif mixed == "gated":
            a = a * jnp.tanh(scale)
        return h + (act(a) + (scale if mixed != "divided" else 0)) @ down * 0.5

    order = range(count)[::-1] if reverse else range(count)

    def alone(x, shared, *stacks):
        if way == "vmap":
            return sum(one(x, w, shared) for w in zip(*stacks, strict=True)) / count
        for number in (*order, *order) if twice else order:
            x = one(x, [stack[number] for stack in stacks], shared)
        return x

    def at_index(number, h, shared, stacks):
        number = count - 1 - number if reverse else number
        return one(h, [w[number] for w in stacks], shared)

    def run(x, shared, *stacks):
        stacks = [
            jnp.moveaxis(w, axis, 0) * (1.5 if casts else 1.0) for w, axis in zip(stacks, axes, strict=True)
        ]
        body = lambda h, w: (one(h, w, shared), None)  # noqa: E731
        if way == "vmap":
            return jax.vmap(lambda *w: one(x, w, shared))(*stacks).mean(0)
        for _ in range(1 + twice):
            if way in ("scan", "remat"):
                step = jax.checkpoint(body) if way == "remat" else body
                x = lax.scan(step, x, stacks, reverse=reverse)[0]
            elif way == "fori":
                x = lax.fori_loop(0, count, partial(at_index, shared=shared, stacks=stacks), x)
            else:
                for number in order:
                    x = one(x, [w[number] for w in stacks], shared)
        return x

    stacks = [g.param(*shape[:axis], count, *shape[axis:]) for shape, axis in zip(shapes, axes, strict=True)]
    shared = g.param(hidden)
    names = tuple(g.places[stack][1] for stack in stacks)
    made = g.step(run, n, shared, *stacks)
    scaled_up = lambda x, shared, *lists: alone(  # noqa: E731
        x, shared, *([leaf * 1.5 for leaf in w] if casts else w for w in lists)
    )
    g.stacks[len(g.steps) - 1] = Stack(names, tuple(axes), scaled_up)
    return made


def tables(g):
    """A table that several layers read: of constants, of data that was spread, or a param that they share."""
    n = g.pick(2)
    size = g.shapes[n][-1]
    kind = g.one_of("constant", "random", "spread", "param", "looked up")
    spots = g.rng.integers(3, size=size)
    seed = int(g.rng.integers(9))

    def table(x, shared):
        if kind == "constant":
            return jnp.sin(jnp.arange(float(size))) * (jnp.arange(size) % 2)
        if kind == "random":
            return jnp.broadcast_to(jax.random.normal(jax.random.key(seed), (size,)), x.shape) * 0.5
        if kind == "spread":
            return jnp.broadcast_to(jnp.cos(x.sum(-1, keepdims=True) + 0.1), x.shape)
        return jnp.tanh(shared) if kind == "param" else shared[spots].reshape(size)

    def one(h, table, mix):
        if mix == "add":
            return jnp.tanh(h + table)
        if mix == "mul":
            return h * table + jnp.square(table) * h
        if mix == "branch":
            return lax.cond(jnp.sum(table) > 0, lambda h: h * table, lambda h: h + table * table, h)
        return bent(h * table) + jax.checkpoint(lambda h: jnp.cos(h) * table)(h)

    mixes = [g.one_of("add", "mul", "branch", "custom") for _ in range(2)]

    def layers(x, shared, first, second):
        read = table(x, shared)
        return one(x @ first, read, mixes[0]).sum(-1) * 0.1 + jnp.sum(
            one(x @ second, read, mixes[1]) * 0.1, axis=-1
        )

    shared = (3,) if kind == "looked up" else (size,)
    return g.step(layers, n, g.param(*shared), g.param(size, size), g.param(size, size))


def ragged(g):
    """Experts: rows in groups, the hidden units of each with their own weights."""
    n = g.pick(2)
    *rest, width = g.shapes[n]
    rows, hidden, out, experts = math.prod(rest), g.size(), g.size(), g.one_of(1, 2, 3)
    sizes = g.rng.multinomial(int(g.rng.integers(rows + 1)), [1 / experts] * experts).astype(np.int32)
    act, wild = g.one_of(jnp.tanh, jax.nn.relu, jnp.cos), bool(g.rng.random() < 0.3)

    def product(x, up, down):
        h = x.reshape(rows, width)
        told = sizes if not wild else jnp.roll(sizes, jnp.int32(jnp.sum(h) > 0))
        h = lax.ragged_dot(act(lax.ragged_dot(h, up, told)), down, told)
        return h.reshape(*rest, out)

    return g.step(product, n, g.param(experts, width, hidden), g.param(experts, hidden, out))


def with_jvp(wrapped, function):
    """A function in a wrapping that has no derivative of its own."""
    run = jax.custom_jvp(wrapped)
    run.defjvp(partial(jax.jvp, function))
    return run


def composed(function, name):
    return with_jvp(lax.composite(function, name), function)


def batched(function):
    wrapped = jax.custom_batching.custom_vmap(function)

    @wrapped.def_vmap
    def _(size, batched, *args):
        return jax.vmap(function, tuple(0 if each else None for each in batched))(*args), True

    return with_jvp(wrapped, function)


def wrapping(g):
    """Functions in a wrapping."""
    n = g.pick(1)
    m, axis = g.like(n), g.axis(n)
    norm = composed(lambda x: x - x.mean(axis, keepdims=True), "fuzz.centre")
    return g.step(
        g.one_of(
            lambda x, y: batched(lambda x, y: jnp.sin(x) * y)(x, jnp.broadcast_to(y, x.shape)),
            lambda x, y: norm(x) * y,
            lambda x, y: composed(lambda x, y: jnp.tanh(x) * y + y, "fuzz.gate")(x, y),
            lambda x, y: jax.vmap(lambda x: x - lax.pmean(x, "i"), axis, axis, axis_name="i")(x) + 0 * y,
            lambda x, y: composed(jax.checkpoint(lambda x: jnp.cos(x) * jnp.sin(x)), "fuzz.cos")(x) * y,
        ),
        n,
        m,
    )


def without_rule(g):
    n = g.pick(2)

    def inverse(x):
        m = jnp.tensordot(x, x, ((0,), (0,))).reshape(x[0].size, x[0].size)
        return jnp.linalg.inv(m + 2.0 * jnp.eye(len(m))) @ x[0].reshape(-1, 1)

    return g.step(inverse, n)


KINDS = (
    [unary] * 4
    + [binary] * 5
    + [layer] * 6
    + [several] * 3
    + [reduction, reduction, normalisation, normalisation, group_norm, convolution, convolution]
    + [along, indexing, indexing, lookup, reshape, reshape, rearrangement, rearrangement, rearrangement]
    + [gated, joined, joined, scan, layers, layers, layers, attention, gram, without_rule]
    + [tables, tables, ragged, wrapping]
)


def draw_program(rng):
    """A program of some steps; its outputs are read through a new param more often than not."""
    g = Program(rng)
    for _ in range(g.one_of(1, 1, 2)):
        g.input(*(g.one_of(1, 2, 3, 4) for _ in range(g.one_of(1, 2, 2, 3))))
    layer(g)
    wanted = len(g.steps) + int(rng.integers(3, 13))
    while len(g.steps) < wanted:
        attempt(g, g.one_of(*KINDS))
    read = {n for step in g.steps for n in step.operands}
    ends = [n for n in range(len(g.shapes)) if n not in read and g.places[n][0] == "step"]
    for n in ends[-3:]:
        g.outputs.append(finish(g, n))
    return g


def attempt(g, kind):
    """A step of a kind, if it fits what there is."""
    marks = len(g.shapes), len(g.params), len(g.inputs), len(g.steps)
    try:
        return kind(g)
    except (TypeError, ValueError, IndexError, ZeroDivisionError, NotImplementedError):
        del g.shapes[marks[0] :], g.places[marks[0] :], g.inputs[marks[2] :], g.steps[marks[3] :]
        for name in list(g.params)[marks[1] :]:
            del g.params[name]
        for number in [number for number in g.stacks if number >= marks[3]]:
            del g.stacks[number]
        return None


def finish(g, n):
    """Reads the axes of a value, so that it need not stay whole."""
    for _ in range(len(g.shapes[n])):
        if not g.shapes[n] or g.rng.random() < 0.3:
            continue
        axis = g.axis(n)
        if g.rng.random() < 0.7:
            n = g.step(partial(_contract, axis), n, g.param(g.shapes[n][axis], g.one_of(1, 2)))
        else:
            n = g.step(partial(g.one_of(jnp.sum, jnp.sum, jnp.var, jnp.max), axis=axis), n)
    return n


def _contract(axis, x, w):
    return jnp.moveaxis(jnp.tensordot(x, w, ((axis,), (0,))), -1, axis)


class Outcome(NamedTuple):
    removed: bool  # whether slices went
    claims: int  # how many facts were looked at


def run_case(seed, facts=True, gradients=True):
    """Draw a program and masks until it is finite, and raise Mismatch if the small network is wrong.

    With `facts`, every value is checked against what is claimed of it, which takes a while.
    """
    rng = np.random.default_rng(seed)
    while True:
        try:
            program = draw_program(rng)
        except ValueError:  # an output is too large to be read
            continue
        if not (program.outputs and program.params):
            continue
        inputs = [jnp.asarray(x) for x in program.inputs]
        weights = [
            jnp.asarray(rng.normal(size=o.shape)) for o in jax.eval_shape(program, program.params, *inputs)
        ]
        dense = Dense([program], program.params, inputs, [weights if gradients else None])
        outputs, grads = dense.run([program.params])[0]
        leaves = [np.asarray(leaf) for leaf in (*outputs, *jax.tree.leaves(grads))]
        if all(np.isfinite(leaf).all() and np.abs(leaf).max(initial=0.0) < 1e4 for leaf in leaves):
            break
    stacked = program.stacked if program.stacks and rng.random() < 0.7 else None
    masks = draw_masks(rng, program, inputs, stacked)
    claims = 0
    if facts:
        masked = {path: np.where(masks[path], leaf, 0) for path, leaf in program.params.items()}
        claims = check_facts(program, masked, masks, inputs, rng)
    small = dense.check([masks], rng, stacked=stacked)[0]
    if program.stacks:
        check_layers(program, masks, small, inputs)
    return Outcome(removed(small), claims)


def check_layers(program, masks, small, inputs):
    """Raise Mismatch if a layer kept less in a stack than in a list of layers, or the outputs differ."""
    params, alone = program.taken_apart(program.params), program.taken_apart(masks)
    listed = compact(program.one_by_one, params, alone, *inputs, verify=False)
    assert_close(
        listed.apply(listed.params, *inputs), small.apply(small.params, *inputs), "one by one: output"
    )
    in_stack = small.plan.by_layer()
    read = Counter(n for step in program.steps for n in step.operands)
    if any(
        read[n] > 1
        for n, (kind, key) in enumerate(program.places)
        if kind == "param" and program.stacked(key, 0)
    ):
        return  # a list that is stacked to be read otherwise is not taken apart
    for path, axes in listed.keep.items():
        name = re.sub(r"/(\d+)$", r"[\1]", path)
        for axis, needed in axes.items():
            kept = in_stack.keep.get(name, {}).get(axis, ())
            if 0 < len(kept) < len(needed):  # none of a layer that went as a whole
                raise Mismatch(f"{name} keeps {kept} along axis {axis} in the stack, {needed} alone")


def draw_masks(rng, program, inputs, stacked=None):
    pattern = rng.choice(["units", "units", "units", "slices", "slices", "ragged", "leaf", "all"])
    masks = random_masks(rng, program.params, "none" if pattern == "units" else str(pattern))
    if pattern in ("units", "slices"):
        masks = zero_units(rng, masks, channel_groups(program, program.params, *inputs, stacked=stacked))
    return masks


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; each case has one of its own")
    parser.add_argument("--go-on", action="store_true", help="go on after a mistake, and list them all")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    cut, claims, wrong, start = 0, 0, [], time.monotonic()
    for done, seed in enumerate(range(args.seed, args.seed + args.cases), 1):
        try:
            outcome = run_case(seed, facts=seed % 4 == 0, gradients=seed % 2 == 0)
            cut += outcome.removed
            claims += outcome.claims
        except Exception as error:
            if not args.go_on:
                print(f"seed {seed}:", file=sys.stderr)
                raise
            wrong.append(seed)
            print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        if done % 50 == 0:
            jax.clear_caches()  # or the compiled programs fill the memory
            took = time.monotonic() - start
            print(
                f"{done} cases, {cut} lost slices, {claims} claims, {len(wrong)} wrong, {took:.0f} s",
                flush=True,
            )
    print(f"{args.cases} cases: {cut} lost slices, {claims} claims looked at, {len(wrong)} wrong {wrong}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
