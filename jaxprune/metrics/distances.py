"""How alike two masks are."""

import math
from typing import NamedTuple

import numpy as np

from jaxprune.tree.leaves import array_leaves, is_concrete
from jaxprune.tree.masks import bool_masks, like_params
from jaxprune.tree.where import check_where, kernels, selected
from jaxprune.typing import Masks, Where


class Overlap(NamedTuple):
    """How many entries two masks have in common.

    Attributes:
      both: entries that both masks keep.
      either: entries that at least one mask keeps.
      size: all entries.
      overlap: `both` over the smaller of the two counts; 1 if one mask contains the other.
      jaccard: `both / either`; 1 if the masks are equal.
      hamming: the fraction of entries in which the masks differ.
      chance: the mean of `both` over random masks that keep as many entries in each leaf.
      deviation: the standard deviation of `both` over these.
      chance_jaccard: `chance / (kept by the first + kept by the second - chance)`.
    """

    both: int
    either: int
    size: int
    overlap: float
    jaccard: float
    hamming: float
    chance: float
    deviation: float
    chance_jaccard: float


def overlap(masks: Masks, others: Masks, where: Where = kernels) -> dict[str, Overlap]:
    """Compare two masks leaf by leaf and together, beside the overlap of random masks.

    If two random masks keep a and b of the n entries of a leaf, they share `a b / n` on average, with
    variance `a b (n - a) (n - b) / (n^2 (n - 1))` (hypergeometric). Two pruned networks that share little
    more than that do not have the same subnetwork, though perhaps the same density in each layer.

    Args:
      masks, others: two masks of the same params.
      where: which leaves are compared.

    Returns:
      An `Overlap` for each leaf by its path, and for all of them under "prunable". A ratio with a divisor of
      0 is 1, since empty masks are equal.

    Raises:
      ValueError: masks that do not mirror each other, or a `where` that matches nothing.
      TypeError: a mask is not bool, or is traced.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> a = {"kernel": jnp.array([[True, True, False, False]])}
      >>> b = {"kernel": jnp.array([[True, False, True, False]])}
      >>> found = jp.metrics.overlap(a, b)["prunable"]
      >>> found.both, round(found.jaccard, 3), found.chance
      (1, 0.333, 1.0)
    """
    masks = bool_masks(masks)
    others = like_params(bool_masks(others), masks)
    if not is_concrete(masks, others):
        raise TypeError("overlap counts on the host: call it outside of jit, on masks that have values.")
    check_where(where)
    first, second = array_leaves(masks), array_leaves(others)
    # If `where` matches nothing, `selected` raises; asked first, it would refuse leaves that are bool.
    paths = [path for path, leaf in first.items() if where(path, leaf)] or selected(masks, where)
    counts = {}
    for path in paths:
        a, b = np.asarray(first[path]), np.asarray(second[path])
        counts[path] = (*(int(np.count_nonzero(kept)) for kept in (a, b, a & b)), a.size)
    return {path: _overlap([counts[path]]) for path in paths} | {"prunable": _overlap(list(counts.values()))}


def _overlap(counts: list[tuple[int, ...]]) -> Overlap:
    one, other, both, size = (sum(column) for column in zip(*counts, strict=True))
    either = one + other - both
    chance = sum(a * b / n for a, b, _, n in counts if n)
    variance = sum(a * b * (n - a) * (n - b) / (n * n * (n - 1)) for a, b, _, n in counts if n > 1)

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 1.0

    return Overlap(
        both,
        either,
        size,
        ratio(both, min(one, other)),
        ratio(both, either),
        (either - both) / size if size else 0.0,
        chance,
        math.sqrt(variance),
        ratio(chance, one + other - chance),
    )
