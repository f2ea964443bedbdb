"""Scores that need the network but no data: how much can flow from input to output."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.scores.common import in_float32, with_nan_elsewhere
from jaxprune.tree.checks import check_function, shown
from jaxprune.tree.dtypes import promote_to_float32
from jaxprune.tree.leaves import array_leaves, describe, is_array, is_concrete
from jaxprune.tree.stacks import Stacked, join_layers, layer_shape, split_layers, stacks_of
from jaxprune.tree.where import kernels, selected
from jaxprune.typing import Params, ScoreFn, Scores, Where

_ADDED = re.compile(r"bias|beta|offset|^b\d*$|pos_?emb|position", re.IGNORECASE)
_MULTIPLIED = re.compile(r"scale|gamma|kernel|^w|^g\d*$", re.IGNORECASE)


def synflow(
    apply_fn: Callable[[Params, Any], Any],
    x: Any,
    *,
    where: Where = kernels,
    biases: Where | None = None,
    rescale: bool = True,
) -> ScoreFn:
    """Synaptic flow: `|w| * dR/d|w|`, where R is the sum of the outputs for `|w|` and an input of ones.

    In a ReLU network with all weights positive, R is the sum over all paths of the products of their weights,
    and the score of a weight is the sum over the paths through it. So flow is conserved: the scores of the
    weights into a hidden neuron sum to those of the weights out of it. Pruning in one go may cut the network
    through. The paper prunes over 100 rounds, with new scores in each:
    `jp.pruner(score, jp.schedules.geometric(...))`, with the masks applied between updates.

    This holds for positively homogeneous networks: ReLU and linear layers, average or max pooling, norms with
    fixed statistics. Let `apply_fn` return the logits, in eval mode. With a softmax, or a norm that divides
    by a statistic of its input (layer norm), R does not have this meaning.

    Biases add to the flow without being on a path from the input, so they are set to 0; the paper's code
    takes `|b|`. Other leaves that are not scored, such as the scales of norms, are at their absolute value.

    R is a product over depth, which soon leaves the range of float32. So each leaf is divided by a constant
    chosen such that its layer neither raises nor lowers the flow by much. If R is homogeneous of degree 1 in
    each leaf, as it is where every path crosses every leaf once and biases are 0, dividing a leaf by c
    divides R, and every `w dR/dw` of every leaf, by the same c: the ranking over all leaves is unchanged.
    With skip connections some paths miss some leaves, and the ranking differs from the paper's;
    `rescale=False` gives the paper's.

    Args:
      apply_fn: `apply_fn(params, x) -> outputs`, an array or a tree of them.
      x: an input of the network: an array, a `jax.ShapeDtypeStruct`, or a tree of these, each with
        a leading batch axis. Only shapes and dtypes are used, with a batch of 1.
      where: the leaves that are scored.
      biases: which of the other leaves are added rather than multiplied, a function of (path, leaf). By
        default those with the name of such a param (bias, beta, offset, b, positional embeddings), and
        leaves of one axis without the name of a multiplied one (scale, gamma, kernel, w, g).
      rescale: whether leaves are divided by constants as described above.

    Returns:
      A score `score(params, *, stacked=None, **extra)`, NaN for the leaves left out; under `jit` NaN
      throughout if R is 0 or overflows. The layers of a stacked leaf are divided by separate constants.

    Raises:
      TypeError: `apply_fn` is not a function, or inputs or scored leaves are not real floating-point.
      ValueError: `x` is empty; on use, `where` matches nothing, or (not under `jit`) R is 0 or not finite.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w1"]) @ params["w2"]
      >>> params = {"w1": jnp.array([[1.0, -2.0]]), "w2": jnp.array([[3.0], [1.0]])}
      >>> score = jp.scores.synflow(apply_fn, jnp.zeros((8, 1)), rescale=False)
      >>> score(params)["w1"].tolist(), score(params)["w2"].tolist()
      ([[3.0, 2.0]], [[3.0], [2.0]])

    References:
      Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic
      flow", NeurIPS 2020.
    """
    check_function(apply_fn, "scores.synflow", "apply_fn(params, x)")
    if biases is not None:
        check_function(biases, "scores.synflow", "biases(path, leaf)")
    if not jax.tree.leaves(x):
        raise ValueError(f"scores.synflow needs x, inputs of the network, for their shapes; got {shown(x)}.")
    for leaf in jax.tree.leaves(x):
        if not is_array(leaf):
            raise TypeError(f"scores.synflow needs arrays in x, got {shown(leaf)}.")
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or not leaf.shape:
            raise TypeError(
                f"scores.synflow feeds ones through the network, so x must be real floating-point with a "
                f"leading batch axis, got {describe(leaf)}. For tokens, let apply_fn start at "
                "their embeddings."
            )
    ones = jax.tree.map(lambda leaf: jnp.ones((1, *leaf.shape[1:]), leaf.dtype), x)
    added = _is_added if biases is None else biases

    def score(params: Params, *, stacked: Stacked | None = None, **extra: Any) -> Scores:
        del extra
        by_path = array_leaves(params)
        chosen = selected(params, where)
        inexact = {path: leaf for path, leaf in by_path.items() if jnp.issubdtype(leaf.dtype, jnp.inexact)}
        stacks = {} if stacked is None else stacks_of(stacked, inexact)
        if complex_paths := [p for p in chosen if not jnp.issubdtype(by_path[p].dtype, jnp.floating)]:
            path = complex_paths[0]
            raise TypeError(
                f"params[{path!r}] is {describe(by_path[path])}; scores.synflow needs real leaves. Leave "
                "it out with where=..."
            )

        def linearized(path, leaf):
            if not jnp.issubdtype(leaf.dtype, jnp.inexact):
                return leaf
            layer = jax.ShapeDtypeStruct(layer_shape(leaf.shape, stacks.get(path, ())), leaf.dtype)
            if path not in chosen and added(path, layer if biases is None else leaf):
                return jnp.zeros_like(leaf)
            size = jnp.abs(leaf)
            if not rescale:
                return size
            layers = {name: _even_gain(x) for name, x in split_layers({path: size}, stacks).items()}
            return join_layers(layers, stacks, {p: by_path[p].shape for p in stacks})[path]

        params, inputs = in_float32(apply_fn, params, ones)
        positive = {path: linearized(path, leaf) for path, leaf in array_leaves(params).items()}

        def total(scored):
            leaves = list((positive | scored).values())
            outputs = apply_fn(jax.tree.unflatten(jax.tree.structure(params), leaves), inputs)
            sums = [jnp.sum(promote_to_float32(output)) for output in jax.tree.leaves(outputs)]
            return jnp.sum(jnp.stack(sums))

        flow, slopes = jax.value_and_grad(total)({path: positive[path] for path in chosen})
        sound = jnp.isfinite(flow) & (flow > 0)
        if is_concrete(sound) and not sound:
            raise ValueError(
                f"scores.synflow: the sum of the outputs is {float(flow):g}, so no weight has a "
                "share of it to be ranked by. If 0, no path leads from input to output (or biases= took in a "
                "scale); if not finite, it overflows: pass rescale=True, or use float64."
            )
        return with_nan_elsewhere(
            {
                path: jnp.where(
                    sound,
                    jnp.abs(promote_to_float32(positive[path]) * promote_to_float32(slopes[path])),
                    jnp.nan,
                )
                for path in chosen
            },
            params,
        )

    return score


def _is_added(path: str, leaf: Any) -> bool:
    name = path.rsplit("/", 1)[-1]
    return bool(_ADDED.search(name)) or (len(leaf.shape) <= 1 and not _MULTIPLIED.search(name))


def _even_gain(size: jax.Array) -> jax.Array:
    """Scale a leaf of magnitudes such that flows neither grow nor shrink with depth."""
    # A kernel with the sum s multiplies the mean of the flow by s / outputs. Divided by s and multiplied by
    # sqrt(inputs * outputs), it multiplies the mean by sqrt(inputs / outputs). The outputs of a layer are the
    # inputs of the next, so over a network these factors cancel but for its first inputs and last outputs.
    # Libraries place the axes of inputs and outputs differently: the two largest axes are taken for them.
    total = jnp.sum(promote_to_float32(size))
    channels = sorted(size.shape)[-2:] if size.ndim >= 2 else (size.size, size.size)
    gain = (channels[0] * channels[1]) ** 0.5 / jnp.where(total == 0, jnp.ones_like(total), total)
    return (promote_to_float32(size) * gain).astype(size.dtype)
