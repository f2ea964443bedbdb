"""The oracle of stacked networks: the same layers in a list, each with its own leaves."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

import jaxprune as jp
from jaxprune.tree.leaves import array_leaves as by_path
from tests.oracles.equivalence import assert_close, fast, is_float, with_gradient, without_units


def taken_apart(tree, stacks):
    """Return a tree with lists of layers (nested, for a second axis) in place of stacked leaves."""

    def layers(leaf, axes):
        if not axes:
            return leaf
        first, *rest = axes
        rest = [axis - (axis > first) for axis in rest]
        take = jax.lax.index_in_dim
        return [layers(take(leaf, n, first, keepdims=False), rest) for n in range(leaf.shape[first])]

    lists = [layers(jnp.asarray(leaf), stacks.get(path, ())) for path, leaf in by_path(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), lists)


def path_in_list(name):
    """Return the path in lists of layers for a name such as "up[1]" or "up[1,0]" in a stack."""
    return re.sub(r"\[([\d,]+)\]$", lambda found: "/" + found[1].replace(",", "/"), name)


def coupled(groups):
    """Return the contents of groups in a canonical order: whether they are removable, and their units."""
    return sorted(
        (
            group.removable,
            sorted((path_in_list(m.path), m.axis, m.divisor, m.indices.tolist()) for m in group.members),
        )
        for group in groups
    )


def half(rng, groups, params):
    """Return masks that remove half of the units of every removable group, as arrays by path."""
    choose = lambda group: rng.choice(group.units, group.units // 2, replace=False)  # noqa: E731
    return by_path(without_units(jp.ones_masks(params), groups, choose))


def put_together(masks, params, stacks):
    """Return masks of lists of layers as masks of stacked leaves."""
    joined = []
    for path, leaf in by_path(params).items():
        mask = np.ones(np.shape(leaf), bool)
        axes = stacks.get(path, ())
        for index in np.ndindex(*(leaf.shape[axis] for axis in axes)):
            place: list[Any] = [slice(None)] * leaf.ndim
            for axis, number in zip(axes, index, strict=True):
                place[axis] = number
            mask[tuple(place)] = masks["/".join([path, *map(str, index)])]
        joined.append(jnp.asarray(mask))
    return jax.tree.unflatten(jax.tree.structure(params), joined)


class Checked(NamedTuple):
    """What was compared: the stacked network and the list of layers."""

    groups: Any
    small: Any
    listed: Any
    masks: Any


def check(
    stacked_net,
    list_net,
    params,
    *inputs,
    stacked=None,
    seed=0,
    masks=None,
    alike=True,
    tied=False,
    gradients=True,
    **options,
):
    """Compact a stacked network, and compare it with a list of layers and with the masked network.

    Args:
      stacked_net, params, inputs: the network.
      list_net: the same function of params with lists in place of stacked leaves.
      stacked: which leaves are stacked; by default what `channel_groups` finds.
      seed: of masks and of other small params.
      masks: masks of the list of layers by path; by default half of the units of each of its groups.
      alike: whether the list must keep the same slices, which it does where layers keep equally many.
      tied: whether the groups must differ from those of the list, whose layers nothing ties.
      gradients: whether to compare gradients.
      **options: of `compact`.

    Raises:
      AssertionError: groups, kept slices, outputs or gradients differ.
    """
    rng = np.random.default_rng(seed)
    groups = jp.channel_groups(stacked_net, params, *inputs, stacked=stacked)
    list_params = taken_apart(params, groups.stacks)
    list_groups = jp.channel_groups(list_net, list_params, *inputs)
    assert (coupled(groups) != coupled(list_groups)) == tied

    list_masks = half(rng, list_groups, list_params) if masks is None else masks
    tree = jax.tree.structure(list_params)
    list_masks = jax.tree.unflatten(tree, [jnp.asarray(list_masks[path]) for path in by_path(list_params)])
    masks = put_together(by_path(list_masks), params, groups.stacks)
    options = {"verify": False, **options}
    small = jp.compact(stacked_net, params, masks, *inputs, stacked=stacked, **options)
    listed = jp.compact(list_net, list_params, list_masks, *inputs, **options)
    if alike:
        kept = {path_in_list(name): axes for name, axes in small.plan.by_layer().keep.items()}
        assert indices(kept) == indices(listed.keep)
    _compare(stacked_net, small, listed, jp.apply_masks(params, masks), inputs, rng, gradients)
    return Checked(groups, small, listed, masks)


def indices(keep):
    return {(path, axis): kept.tolist() for path, axes in keep.items() for axis, kept in axes.items()}


def _compare(function, small, listed, masked, inputs, rng, gradients):
    """Compare outputs with the masked network; for other params, outputs and gradients with the dense one."""
    other = jax.tree.map(lambda v: v + 0.3 * rng.normal(size=v.shape).astype(v.dtype), small.params)
    weights = [
        jnp.asarray(rng.normal(size=o.shape))
        for o in jax.tree.leaves(jax.eval_shape(function, masked, *inputs))
        if is_float(o)
    ]

    def everything(masked, small_params, list_params, other, dense):
        with_grads = weights if gradients else None
        return {
            "masked": function(masked, *inputs),
            "small": small.apply(small_params, *inputs),
            "listed": listed.apply(list_params, *inputs),
            "dense": with_gradient(function, inputs, with_grads)(dense),
            "moved": with_gradient(small.apply, inputs, with_grads)(other),
        }

    got = fast(everything)(masked, small.params, listed.params, other, small.expand(other))
    for array in jax.tree.leaves((got["masked"], got["dense"][0])):
        assert np.isfinite(array).all()
    assert_close(got["small"], got["masked"], "the masked network")
    assert_close(got["listed"], got["masked"], "the list of layers")
    assert_close(got["moved"][0], got["dense"][0], "other params")
    assert_close(got["moved"][1], small.shrink(got["dense"][1]), "gradients", 1e-10)


def size(jaxpr):
    """Return how many equations a jaxpr has, with those of its bodies, and how many of them are scans."""
    count = scans = 0
    for eqn in jaxpr.eqns:
        count, scans = count + 1, scans + (eqn.primitive.name == "scan")
        for inner in jaxprs_in_params(eqn.params):
            more, loops = size(inner)
            count, scans = count + more, scans + loops
    return count, scans
