"""Masked against compacted on every model of the zoo, outputs and gradients.

The tests check each model once; `python -m tests.soak.zoo_check` checks all of them in float32 and
float64, with 30 % and with 70 % of every group's units gone, and prints the largest errors.
"""

import argparse
import sys
from typing import NamedTuple

from tests.support.quick import compile_quickly

if __name__ == "__main__":
    compile_quickly()

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from jaxprune.graph.equivalence import with_state
from tests.oracles.equivalence import QUICK, without_units
from tests.zoo import ZOO, Case


class Errors(NamedTuple):
    """The largest differences between the masked and the small network, relative to the largest entry."""

    output: float
    gradient: float  # by the small params
    removed: float  # the fraction of all params that is gone


def random_masks(params, groups, fraction, rng):
    """Masks without a fraction of the units of every group that can lose some, but for one."""

    def choose(group):
        return rng.choice(group.units, min(round(group.units * fraction), group.units - 1), replace=False)

    return without_units(jp.ones_masks(params), groups, choose)


def cast(tree, dtype):
    def one(leaf):
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(one, tree)


def compare(case: Case, fraction: float, dtype, split="major", seed=0) -> Errors:
    """Compacts a model with random units gone, and compares it with the masked one.

    The comparison is made at the masked params, and again at other values of the small ones.
    """
    rng = np.random.default_rng(seed)
    params, inputs = cast(case.params, dtype), cast(case.inputs, dtype)
    groups = jp.channel_groups(case.apply, params, *inputs, state=case.state, split=split)
    masks = random_masks(params, groups, fraction, rng)
    small = jp.compact(case.apply, params, masks, *inputs, state=case.state, verify=False)

    shapes = jax.eval_shape(case.apply, params, *inputs)
    weights = jax.tree.map(lambda s: rng.standard_normal(s.shape), shapes)
    # What is new values of params is as small as these.
    weights = _shrunk(small, case, weights)

    def scalar(outputs):
        parts = jax.tree.map(lambda o, w: jnp.sum(o.astype(dtype) * w.astype(dtype)), outputs, weights)
        return sum(jax.tree.leaves(parts))

    def dense(s):
        outputs = _shrunk(small, case, case.apply(small.expand(s), *inputs))
        return scalar(outputs), outputs

    def compacted(s):
        outputs = small.apply(s, *inputs)
        return scalar(outputs), outputs

    def with_gradient(f, s):
        return jax.value_and_grad(f, has_aux=True, allow_int=True)(s)

    try:
        jax.eval_shape(lambda s: with_gradient(dense, s), small.params)
    except ValueError:  # a while loop has no reverse derivative

        def with_gradient(f, s):
            return f(s), s

    run = (
        jax.jit(lambda s: [with_gradient(f, s) for f in (dense, compacted)])
        .lower(small.params)
        .compile(compiler_options=QUICK)
    )
    output = gradient = 0.0
    for scale in (0.0, 0.3):
        # By a factor, so that variances stay positive.
        factors = jax.tree.map(
            lambda leaf, k=scale: np.exp(k * rng.standard_normal(leaf.shape)), small.params
        )
        s = jax.tree.map(lambda leaf, factor: leaf * jnp.asarray(factor, leaf.dtype), small.params, factors)
        ((_, a), grad_a), ((_, b), grad_b) = run(s)
        output = max(output, difference(a, b))
        gradient = max(gradient, difference(grad_a, grad_b))
    before, after = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (params, small.params))
    return Errors(output, gradient, 1 - after / before)


def _shrunk(small, case, outputs):
    """A function's output with what is new values of params cut to the small shapes."""
    if case.state is None:
        return outputs
    return with_state(outputs, case.state, small.shrink(case.state(outputs)))


def difference(a, b):
    """The largest difference of two trees of arrays, relative to the largest entry.

    Of the whole tree: the gradient by a key's bias is 0 but for rounding, since a softmax does not
    see it.
    """
    most = apart = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape
        if x.dtype == jax.dtypes.float0 or not x.size:
            continue
        x, y = x.astype(np.float64), y.astype(np.float64)
        finite = np.isfinite(x)
        assert np.array_equal(x[~finite], y[~finite], equal_nan=True)
        x, y = np.where(finite, x, 0), np.where(finite, y, 0)
        most, apart = max(most, float(np.abs(x).max())), max(apart, float(np.abs(x - y).max()))
    return apart / max(most, 1e-30)


def tolerance(name, dtype):
    """What rounding may do: one order more than seen, and what the issue of exactness asks for."""
    if "bf16" in name:
        return 0.05
    return 1e-12 if dtype == jnp.float64 and "f32" not in name else 1e-5


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="models; by default all")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.3, 0.7])
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)
    failed = []
    print(f"{'model':<24}{'dtype':<9}{'units gone':>10}{'params gone':>12}{'output':>10}{'gradient':>10}")
    for name in args.names or ZOO:
        for dtype in (jnp.float32, jnp.float64):
            for fraction in args.fractions:
                errors = compare(ZOO[name](), fraction, dtype)
                print(
                    f"{name:<24}{jnp.dtype(dtype).name:<9}{fraction:>10.0%}{errors.removed:>12.0%}"
                    f"{errors.output:>10.1e}{errors.gradient:>10.1e}",
                    flush=True,
                )
                if max(errors[:2]) > tolerance(name, dtype):
                    failed.append((name, jnp.dtype(dtype).name, fraction))
    print("failed:", failed or "none")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
