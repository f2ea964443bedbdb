"""The oracles of compaction: every claim of `Facts` is checked on values, and the small network is compared.

Everything is evaluated in float64, so that a difference is a mistake and not rounding.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import compact
from jaxprune.graph.engine.program import TracedNetwork
from jaxprune.graph.engine.solving import zero_slices
from jaxprune.tracing.jaxprs import scan_split
from jaxprune.tree.leaves import array_leaves
from jaxprune.tree.masks import apply_masks
from jaxprune.tree.stacks import join_layers, split_layers

TOLERANCE = 1e-12

# These programs run once or twice.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Mismatch(AssertionError):
    """Two things that should be equal are not."""


def is_float(array):
    return jnp.issubdtype(array.dtype, jnp.inexact)


def assert_close(got, expected, what, tolerance=TOLERANCE, where_finite=False):
    """Check that arrays are equal up to rounding, relative to the largest entry; exactly if not floats."""
    for path, (a, b) in enumerate(zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(f"{what} {path}: {a.dtype}{a.shape} and {b.dtype}{b.shape}")
        if jnp.issubdtype(a.dtype, jax.dtypes.extended):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        a, b = np.asarray(a), np.asarray(b)
        if is_float(a):
            finite = np.isfinite(b)
            scale = max(1.0, np.abs(b[finite]).max(initial=0.0))
            a, b = (a[finite], b[finite]) if where_finite else (a, b)
            right = np.allclose(a, b, rtol=0.0, atol=tolerance * scale, equal_nan=True)
        else:
            right = np.array_equal(a, b)
        if not right:
            raise Mismatch(f"{what} {path}:\n{a}\nis not\n{b}")


# Facts: every value is computed, in bodies too, and compared with what is claimed about it.


def check_facts(function, params, masks, inputs, rng, nans=False):
    """Check every claim of the facts about every value.

    Args:
      function, params, inputs: as for `TracedNetwork`; the params are masked.
      masks: their masks.
      rng: draws the tangents and cotangents that derivatives are tried on.
      nans: whether entries with a known value may be NaN.

    Raises:
      Mismatch: a claim is wrong.

    Returns:
      How many claims were checked.
    """
    network = TracedNetwork(function, params, inputs)
    masks = {path: np.asarray(mask) for path, mask in array_leaves(masks).items()}
    facts = network.facts(zero_slices(split_layers(masks, network.stacks)))
    seen = _Seen(facts, rng)

    def run(leaves):
        seen.run(network.region, leaves)
        return [array for _, _, array in seen.values]

    # Where a loop ends depends on values, so that it has to be run one op at a time.
    evaluate = run if "while" in op_names(network.region) else fast(run)
    arrays = evaluate([*jax.tree.leaves(params), *jax.tree.leaves(inputs)])
    pairs = zip(seen.values, arrays, strict=True)
    return sum(_check(facts.of(value), np.asarray(array), where, nans) for (value, where, _), array in pairs)


def op_names(region):
    """Return the names of the primitives in a region and its bodies."""
    names = {op.name for op in region.ops}
    return names.union(*(op_names(inner) for op in region.ops for inner in op.regions.values()))


def _check(known, array, where, nans):
    """Check the claims about an array, and return how many there are."""
    claims, wild = 0, np.isnan(array) & nans if is_float(array) else np.zeros(array.shape, bool)
    if known.fill is not None:
        claims += 1
        same = (array == known.fill) | ((known.fill != known.fill) & (array != array))
        if not (same | wild).all():
            raise Mismatch(f"{where}: {array} is claimed to be {known.fill} everywhere")
    for axis, zero in enumerate(known.zero):
        if zero is not None:
            claims += 1
            slices = np.compress(zero, np.where(wild, 0, array), axis)
            if (slices != 0).any():
                raise Mismatch(f"{where}: slices {zero} of axis {axis} are claimed to be zero: {slices}")
    for axis, alike in enumerate(known.alike):
        if alike is not None and not wild.any():
            claims += 1
            slices = np.compress(alike, array, axis)
            if slices.size:
                first = np.broadcast_to(slices.take([0], axis), slices.shape)
                assert_close(slices, first, f"{where}: alike along {axis}", 1e-11)
    return claims


class _Seen:
    """An interpreter of regions that records each value and its array."""

    def __init__(self, facts, rng):
        self.facts, self.rng, self.values = facts, rng, []

    def note(self, value, array, where):
        if not jnp.issubdtype(value.dtype, jax.dtypes.extended):
            self.values.append((value, where, array))
        return array

    def run(self, region, args):
        env = {}

        def read(value):
            if id(value) not in env:
                if value.source is not None:
                    return read(value.source)
                if value.layers:
                    return jnp.stack([read(layer) for layer in value.layers], value.along)
                env[id(value)] = self.note(value, value.constant, "a constant")
            return env[id(value)]

        def write(values, arrays, where):
            for value, array in zip(values, arrays, strict=True):
                if value.layers:  # facts about a stack are facts about its layers
                    write(value.layers, jnp.moveaxis(array, value.along, 0), where)
                else:
                    env[id(value)] = self.note(value, array, where)

        write(region.inputs, args, "an input of a region")
        for op in region.ops:
            write(op.outputs, self.apply(op, [read(value) for value in op.inputs]), str(op))
        return [read(value) for value in region.outputs]

    def apply(self, op, args):
        if not op.regions:
            return op.bind(*args)
        return {
            "cond": self.cond,
            "scan": self.scan,
            "while": self.loop,
            "custom_jvp_call": self.jvp,
            "custom_vjp_call": self.vjp,
            "shard_map": lambda op, args: op.bind(*args),  # its body needs the mesh, and is not interpreted
        }.get(op.name, self.body)(op, args)

    def body(self, op, args):
        return self.run(op.regions["body"], args)

    def cond(self, op, args):
        every = [self.run(branch, args[1:]) for branch in op.regions.values()]
        index = jnp.clip(args[0], 0, len(every) - 1)
        return [jnp.stack(outputs)[index] for outputs in zip(*every, strict=True)]

    def scan(self, op, args):
        consts, carried = scan_split(op.params)
        carry, xs, ys = args[consts : consts + carried], args[consts + carried :], []
        rounds = range(op.params["length"])
        for n in reversed(rounds) if op.params["reverse"] else rounds:
            out = self.run(op.regions["body"], [*args[:consts], *carry, *(x[n] for x in xs)])
            carry = out[:carried]
            ys.append(out[carried:])
        ys = ys[::-1] if op.params["reverse"] else ys
        return [*carry, *(jnp.stack(y) for y in zip(*ys, strict=True))]

    def loop(self, op, args):
        of_condition, of_body = op.params["cond_nconsts"], op.params["body_nconsts"]
        consts, body_consts = args[:of_condition], args[of_condition : of_condition + of_body]
        carry = args[of_condition + of_body :]
        while self.run(op.regions["condition"], [*consts, *carry])[0]:
            carry = self.run(op.regions["body"], [*body_consts, *carry])
        return carry

    def jvp(self, op, args):
        moving = [(v, a) for v, a in zip(op.inputs, args, strict=True) if is_float(v)]
        self.run(op.regions["jvp"], [*args, *(self.tangent(v, a) for v, a in moving)])
        return self.body(op, args)

    def vjp(self, op, args):
        outputs = self.body(op, args)
        cotangents = [self.draw(o) for o in outputs if is_float(o)]
        self.run(op.regions["vjp"], [*args, *cotangents])
        return outputs

    def draw(self, like):
        return self.rng.normal(size=np.shape(like)).astype(like.dtype)

    def tangent(self, value, array):
        """Draw a tangent; it is zero where the value is zero whatever the live params are."""
        if value.layers:
            rows = zip(value.layers, jnp.moveaxis(array, value.along, 0), strict=True)
            return jnp.stack([self.tangent(layer, row) for layer, row in rows], value.along)
        tangent = self.draw(array)
        for axis, zero in enumerate(self.facts.of(value).zero):
            if zero is not None:
                np.moveaxis(tangent, axis, 0)[zero] = 0
        return tangent if self.facts.of(value).fill is None else 0 * tangent


# Compaction: the small network is compared with the masked one, and for other params with the dense one.


def with_gradient(function, inputs, weights):
    """Return a function of params that gives outputs, and the gradient of a weighted sum of float outputs.

    Without weights the gradient is zero.
    """

    def loss(params):
        outputs = function(params, *inputs)
        floats = [o for o in jax.tree.leaves(outputs) if is_float(o)]
        terms = [jnp.sum(jnp.real(o) * w) for o, w in zip(floats, weights, strict=True)]
        return sum(terms, jnp.zeros(())), outputs

    def run(params):
        if weights is None:
            return function(params, *inputs), jax.tree.map(jnp.zeros_like, params)
        (_, outputs), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return outputs, grads

    return run


def fast(function):
    """Return a function compiled with little optimization, because it runs only a few times."""
    compiled = []

    def call(*args):
        if not compiled:
            compiled.append(jax.jit(function).lower(*args).compile(compiler_options=QUICK))
        return compiled[0](*args)

    return call


class Dense:
    """Some functions of the same params, to be compared with their compacted forms.

    They are compiled together, once, because compiling takes most of the time.
    """

    def __init__(self, functions, params, inputs, weights):
        self.functions, self.params, self.inputs, self.weights = functions, params, inputs, weights
        self.run = fast(lambda many: self.each(functions, many))

    def each(self, functions, many):
        triples = zip(functions, self.weights, many, strict=True)
        return [with_gradient(f, self.inputs, weights)(params) for f, weights, params in triples]

    def check(self, many_masks, rng, stacked=None):
        """Compact each function under its masks and compare; `stacked` as for `compact`.

        Raises:
          Mismatch: a small network differs from the masked one, or for other params from the function.

        Returns:
          The `Compacted` of each function.
        """
        pairs = list(zip(self.functions, many_masks, strict=True))
        options = {"stacked": stacked, "verify": False}
        smalls = [compact(f, self.params, masks, *self.inputs, **options) for f, masks in pairs]
        masked = [apply_masks(self.params, masks) for masks in many_masks]
        moved = [jax.tree.map(partial(_moved, rng), small.params) for small in smalls]
        expanded = [expand(small, params) for small, params in zip(smalls, moved, strict=True)]
        points = (("masked", masked, [small.params for small in smalls]), ("perturbed", expanded, moved))

        def cut(many):
            return self.each([small.apply for small in smalls], many)

        try:
            _compare(smalls, self.run, fast(cut), points)
        except Mismatch:
            # With little optimization, XLA may compute the operand of an extremum twice, to different bits,
            # so that the gradient is wrong, that of the dense function too. Then compile normally.
            dense = jax.jit(lambda many: self.each(self.functions, many))
            _compare(smalls, dense, jax.jit(cut), points)
        return smalls


def _compare(smalls, dense, cut, points):
    """Compare the outputs and gradients of small functions with those of the dense ones."""
    for what, dense_params, small_params in points:
        expected, got = dense(dense_params), cut(small_params)
        for n, small in enumerate(smalls):
            assert_close(got[n][0], expected[n][0], f"{what}: output {n}")
            grads, dense_grads = got[n][1], shrink(small, expected[n][1])
            if what == "masked":
                # Masked entries are left out: a kept one may be zero because of slices that were dropped.
                grads, dense_grads = (masked_only(small.masks, g) for g in (grads, dense_grads))
            assert_close(grads, dense_grads, f"{what}: gradient of output {n}", 1e-10, where_finite=True)


def _moved(rng, leaf):
    return np.asarray(leaf) + rng.normal(size=leaf.shape).astype(leaf.dtype)


# What a plan does, in plain numpy.


def blocks(small, path):
    """Yield, for each layer of a param, its indices in the dense array and in the small one."""
    plan, shape = small.plan, small.plan.shapes[path]
    stack, keep = plan.stacks.get(path, ()), small.keep.get(path, {})
    left = [keep.get(axis, np.arange(shape[axis])) for axis in stack]
    for index in np.ndindex(*map(len, left)):
        dense, compacted = [], []
        for axis, size in enumerate(shape):
            if axis in stack:
                place = index[stack.index(axis)]
                dense.append([left[stack.index(axis)][place]])
                compacted.append([place])
            else:
                kept = keep[axis][index] if axis in keep else np.arange(size)
                dense.append(kept)
                compacted.append(np.arange(len(kept)))
        yield np.ix_(*dense), np.ix_(*compacted)


def shrink(small, tree):
    """Return the small leaves of dense ones."""
    cut = {}
    for path, leaf in tree.items():
        leaf = np.asarray(leaf)
        cut[path] = np.zeros(small.plan.small_shape(path), leaf.dtype)
        for dense, compacted in blocks(small, path):
            cut[path][compacted] = leaf[dense]
    return cut


def expand(small, tree):
    """Return dense leaves with the small ones in place and zeros elsewhere."""
    full = {}
    for path, leaf in tree.items():
        full[path] = np.zeros(small.plan.shapes[path], leaf.dtype)
        for dense, compacted in blocks(small, path):
            full[path][dense] = np.asarray(leaf)[compacted]
    return full


def masked_only(masks, tree):
    return {path: np.where(masks[path], leaf, 0) for path, leaf in tree.items()}


def removed(small):
    """Whether any slice was removed."""
    return bool(small.keep)


# Masks.


def random_masks(rng, params, pattern):
    """Return masks of a pattern: some `slices`, `ragged` entries and slices, `all`, one `leaf`, or `none`."""
    leaves, treedef = jax.tree.flatten(params)
    masks = [np.ones(np.shape(leaf), bool) for leaf in leaves]
    if pattern == "all":
        masks = [np.zeros_like(mask) for mask in masks]
    elif pattern == "leaf":
        masks[rng.integers(len(masks))][...] = False
    elif pattern != "none":
        for mask in masks:
            if pattern == "ragged":
                mask &= rng.random(mask.shape) < 0.7
            for axis in range(mask.ndim):
                if rng.random() < 0.5:
                    np.moveaxis(mask, axis, 0)[rng.random(mask.shape[axis]) < 0.4] = False
    return treedef.unflatten([jnp.asarray(mask) for mask in masks])


def zero_units(rng, masks, groups, share=0.5):
    """Return masks that also remove some units of every removable group."""
    leaves, treedef = jax.tree_util.tree_flatten_with_path(masks)
    dense = {jax.tree_util.keystr(p, simple=True, separator="/"): np.array(m) for p, m in leaves}
    arrays = split_layers(dense, groups.stacks)
    for group in groups.removable():
        removed = rng.random(group.units) < share
        removed[rng.integers(group.units)] = True
        for member in (member for member in group.members if not member.divisor):
            np.moveaxis(arrays[member.path], member.axis, 0)[member.indices[removed].ravel()] = False
    joined = join_layers(arrays, groups.stacks, {path: mask.shape for path, mask in dense.items()})
    return treedef.unflatten([jnp.asarray(joined[path]) for path in dense])
