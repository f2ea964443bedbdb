"""What the study of channel pruning is built of: networks, and cutting them to a size.

A network is cut to a number of multiply-adds, found by bisection on the compacted network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxprune as jp
from experiments.data import datasets
from experiments.networks.large import Decoder, ResNet, ViT
from experiments.networks.small import LeNet
from experiments.training import steps
from experiments.training.steps import Apply, Examples
from jaxprune.graph import ChannelGroups, Group, Member

_CONTEXT = 128  # of the decoder, in characters


class Network(NamedTuple):
    """A network of the study, and how it is trained unless flags say otherwise.

    Attributes:
      dataset: what it learns.
      model: the flax module, from the number of classes or characters.
      optimizer: from a schedule of learning rates.
      epochs, lr: of the dense network; the peak of a one-cycle schedule.
      tune_epochs, tune_lr: of the pruned ones.
      batch_size: images, or pieces of text, per step.
      targets: how many times fewer multiply-adds the pruned ones have.
      augment: what is done to the images at random.
      spared: `spared(path, member)`, the members of groups that are not pruned.
    """

    dataset: str
    model: Callable[[int], Any]
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation]
    epochs: int
    lr: float
    tune_epochs: int
    tune_lr: float
    batch_size: int
    targets: tuple[float, ...] = (1.5, 2.0, 3.0)
    augment: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    spared: Callable[[str, Member], bool] | None = None


def _not_heads_or_hidden(path: str, member: Member) -> bool:
    """Return whether a group is no heads or hidden units: parts of heads and the residual stream stay."""
    in_heads = path.endswith(("/key/kernel", "/value/kernel")) and member.axis == 2
    return in_heads or path == "params/norm/scale"


def _adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, weight_decay=0.05, mask=steps.kernels)


_LENET = Network(
    "digits", lambda classes: LeNet(im2col=False), steps.sgd, 20, 0.05, 6, 0.02, 64, (2.0, 4.0, 8.0)
)
_RESNET = Network("cifar10", ResNet, steps.sgd, 15, 0.1, 3, 0.02, 128, augment=steps.crop_and_flip)
_VIT = _RESNET._replace(
    model=lambda classes: ViT(classes=classes),
    optimizer=_adamw,
    epochs=20,
    lr=1e-3,
    tune_epochs=4,
    tune_lr=5e-4,
    spared=_not_heads_or_hidden,
)
_DECODER = Network(
    "tiny_shakespeare",
    lambda characters: Decoder(characters, _CONTEXT),
    *(_adamw, 6, 2e-3, 2, 1e-3, 64),
    spared=_not_heads_or_hidden,
)
NETWORKS = {
    "lenet": _LENET,
    "resnet20": _RESNET._replace(model=lambda classes: ResNet(20, classes=classes)),
    "resnet56": _RESNET._replace(model=lambda classes: ResNet(56, classes=classes)),
    "vit": _VIT,
    "decoder": _DECODER,
}


class Task(NamedTuple):
    """A network with its data.

    Attributes:
      apply: the dense network.
      init: its first variables, from a key.
      train, test: the splits.
      note: where the data are from, to print beside every figure.
    """

    apply: Apply
    init: Callable[[jax.Array], Any]
    train: Examples
    test: Examples
    note: str


def load(network: Network, train: int | None, test: int | None) -> Task:
    """Read a network's data, all or the first so many images or characters, and makes the network."""
    if network.dataset == "tiny_shakespeare":
        text = datasets.load_shakespeare(train=train, validation=test)
        first, second = (steps.windows(ids, _CONTEXT) for ids in (text.train, text.validation))
        model, note = network.model(len(text.vocabulary)), text.note
    else:
        size = 28 if network.dataset == "digits" else None
        data = datasets.load(network.dataset, size=size, train=train, test=test)
        first, second = steps.colour_splits(data)
        model, note = network.model(10), data.note
    apply = steps.flax_apply(model)
    if isinstance(model, LeNet):  # without its dropout, which is for longer training of more images
        apply = partial(_in_evaluation_mode, apply)
    return Task(apply, steps.init(model, first), first, second, note)


def _in_evaluation_mode(apply: Apply, variables: Any, x: jax.Array, train: bool) -> Any:
    del train
    return apply(variables, x, False)


def evaluation(apply: Apply) -> Callable[[Any, jax.Array], jax.Array]:
    """Return `logits(variables, x)` in evaluation mode: what is analysed, compacted and timed."""
    return lambda variables, x: apply(variables, x, False)[0]


# --- how much to prune, and what


class Ranking(NamedTuple):
    """What units of coupled channels are pruned by.

    Attributes:
      scope: what is ranked together; see `jaxprune.prune_once`.
      scores: of the kernels. Units have their means over members, each the L2 norm of a slice, and
        groups are made comparable by their own means.
    """

    scope: str
    scores: Callable[..., Any] = jp.scores.magnitude


RANKINGS = {
    "global": Ranking("global"),
    "local": Ranking("layerwise"),
    "isomorphic": Ranking("isomorphic"),
    # In each group as many as "local": which units they are is all that differs.
    "random": Ranking("layerwise", jp.scores.random),
}


class Cut(NamedTuple):
    """What has to go for a number of multiply-adds.

    Attributes:
      masks: like the variables.
      macs: the multiply-adds, for one example, that are left.
      sparsity: the share of the units that was asked to go.
    """

    masks: Any
    macs: int
    sparsity: float


class Cutter:
    """Prunes a network to a number of multiply-adds."""

    def __init__(
        self,
        apply: Apply,
        variables: Any,
        example: jax.Array,
        spared: Callable[[str, Member], bool] | None = None,
        multiple_of: int = 1,
    ):
        """Read the network's groups of coupled channels off its function.

        Only the shapes of `variables` matter; `example` has a leading axis; `Network` explains `spared`. What
        stays of each group is rounded up to a multiple of `multiple_of` units.
        """
        self._logits, self._example = evaluation(apply), example
        self._shapes = jax.eval_shape(lambda: variables)
        groups = jp.channel_groups(self._logits, variables, example, split="major")
        if spared is not None:
            groups = groups.without(spared)
        self.groups = ChannelGroups(groups.removable(), groups.whole, groups.stacks)
        self.macs = jp.metrics.macs(self._logits, self._shapes, example).total
        self._structure = jp.structures.channels(self.groups, normalize=jnp.mean, multiple_of=multiple_of)

    def cut(self, name: str, variables: Any, most: float, key: jax.Array | None = None) -> Cut:
        """Prune as few units as leave at most so many multiply-adds.

        With rankings of several groups, one unit more may be one more in several of them.

        Raises:
          ValueError: it cannot be done with one unit of each group left.
        """
        scope, scores = RANKINGS[name]
        found = jp.budget(
            self._macs_of,
            variables,
            at_most=most,
            scores=scores,
            scope=scope,
            structure=self._structure,
            key=key,
        )
        return Cut(found.masks, int(found.value), found.sparsity)

    def _macs_of(self, masks: Any) -> int:
        """Return the multiply-adds of the compacted network, of which only the shapes are worked out."""

        def small_logits(variables: Any, x: jax.Array) -> jax.Array:
            small = jp.compact(self._logits, variables, masks, self._example, verify=False)
            return small.apply(small.params, x)

        return jp.metrics.macs(small_logits, self._shapes, self._example).total

    def widths(self, plan: jp.Plan) -> dict[str, list[int]]:
        """Return how many units of each group stay, and of how many."""

        def left(group: Group) -> int:
            path, axis, indices, *_ = group.members[0]
            kept = plan.keep.get(path, {}).get(axis)
            return group.units if kept is None else int(np.isin(indices, kept).any(axis=1).sum())

        return {group.name: [left(group), group.units] for group in self.groups}


# --- what is left


class Small(NamedTuple):
    """A compacted network, to be trained on.

    Attributes:
      compacted: what `jaxprune.compact` returned for its function in evaluation mode.
      apply: the function on small variables, in both modes.
    """

    compacted: jp.Compacted
    apply: Apply


def compact(apply: Apply, variables: Any, masks: Any, example: jax.Array) -> Small:
    """Return the network without what the masks remove, its training mode included.

    The caller compares it with the masked one.
    """
    small = jp.compact(evaluation(apply), variables, masks, example, verify=False)
    # In training BatchNorm's statistics are outputs too, as narrow as the params they stand for.
    training = small.bind(
        lambda variables, x: apply(variables, x, True), state=lambda out: {"batch_stats": out[1]}
    )

    def small_apply(variables: Any, x: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        if train:
            return training(variables, x)
        return small.apply(variables, x), variables["batch_stats"]

    return Small(small, small_apply)


def coupled_lasso(groups: ChannelGroups, params: Any) -> jax.Array:
    """Return the sum over units of coupled channels of sqrt(size) times their L2 norm.

    It is `jaxprune.penalties.group_lasso`, but of all the slices that go together.
    """

    def squares(slices: jax.Array, axis: tuple[int, ...]) -> jax.Array:
        return jnp.sum(jnp.square(slices), axis=axis)

    leaves = dict(zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True))
    ones = {path: jnp.ones(leaf.shape, bool) for path, leaf in leaves.items()}
    structure = jp.structures.channels(groups, norm=squares, reduce=jnp.sum)
    pooled = structure.pool(leaves, ones).scores
    total = jnp.zeros(())
    for group in groups:
        size = sum(math.prod(m.shape) // m.shape[m.axis] * m.indices.shape[1] for m in group.members)
        # The root has no derivative at 0, where a pruned unit is.
        gone = pooled[group.name] == 0
        norms = jnp.where(gone, 0, jnp.sqrt(jnp.where(gone, 1, pooled[group.name])))
        total += math.sqrt(size) * jnp.sum(norms)
    return total


def penalised(groups: ChannelGroups, weight: float) -> optax.GradientTransformation:
    """Add to the gradients those of `weight` times the coupled lasso."""

    def add(grads: Any, params: Any) -> Any:
        own = jax.grad(partial(coupled_lasso, groups))(params)
        return jax.tree.map(lambda grad, extra: grad + weight * extra, grads, own)

    return optax.stateless(add)


def speed_up(calls: Mapping[str, tuple[Any, ...]], rounds: int) -> float | None:
    """Return how many times as fast the compiled call "small" is as "dense": medians, in turn."""
    if not rounds:
        return None
    times = jp.metrics.latency(calls, rounds=rounds, compiled=False)
    return times["dense"].median / times["small"].median


def shares(epochs: int, rounds: int) -> Sequence[int]:
    """Return epochs spread over rounds, at least one each where there are enough."""
    return [len(part) for part in np.array_split(np.arange(epochs), min(rounds, max(1, epochs)))]
