"""What jaxprune promises, in numpy and loops: slow, and simple enough to be obviously right.

Nothing here imports jax or jaxprune. Trees are flat dicts of numpy arrays in leaf order.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spec:
    """A structure: `kind` is elements, slices, blocks or nm; the rest is what that kind needs."""

    kind: str = "elements"
    axes: tuple[int, ...] = ()
    sides: tuple[int, ...] = ()
    norm: float | str = 1
    n: int = 0
    m: int = 0

    @property
    def max_sparsity(self):
        return 1 - self.n / self.m if self.kind == "nm" else 1.0


def half_even(fraction, size):
    return int(np.rint(np.float64(fraction) * np.float64(size)))


def lowest(scores, alive, count):
    """Return bool arrays that mark the `count` lowest scores alive; the first of equal ones, and NaN last."""
    flat = np.concatenate([s.ravel() for s in scores])
    order = [i for i in np.argsort(flat, kind="stable") if np.concatenate([a.ravel() for a in alive])[i]]
    chosen = np.zeros(flat.size, bool)
    chosen[order[:count]] = True
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(chosen, ends), scores, strict=True)]


def units(shape, spec):
    """Return the entries of each unit, with the units in the order of their first entries."""
    members = {}
    for index in np.ndindex(*shape):
        members.setdefault(_unit_of(index, spec), []).append(index)
    return list(members.values())


def _unit_of(index, spec):
    axes = [a % len(index) for a in spec.axes]
    if spec.kind == "slices":
        return tuple(index[a] for a in sorted(axes))
    if spec.kind == "blocks":
        side = dict(zip(axes, spec.sides, strict=True))
        return tuple(i // side.get(a, 1) for a, i in enumerate(index))
    if spec.kind == "nm":
        return tuple(i // spec.m if a in axes else i for a, i in enumerate(index))
    return index


def _norm(values, norm):
    sizes = [abs(v) for v in values]
    if norm == "sum":
        return math.fsum(values)
    if norm == 0:
        return sum(size != 0 for size in sizes)
    if norm == math.inf:
        return max(sizes)
    if norm == -math.inf:
        return min(sizes)
    return math.fsum(size**norm for size in sizes) ** (1 / norm)


def _look_at(members, scores, mask, spec):
    """Return a unit's score, whether it can be pruned, and the entries that pruning it removes."""
    left = [index for index in members if mask[index]]
    if spec.kind == "nm":
        ascending = sorted(left, key=lambda index: float(scores[index]))  # stable, like all sorts here
        goes = ascending[: max(len(left) - spec.n, 0)]
        return math.fsum(float(scores[index]) for index in goes), bool(goes), goes
    values = [float(scores[index]) if mask[index] else 0.0 for index in members]
    if spec.kind == "elements":
        return values[0], bool(left), left
    values += [0.0] * (math.prod(spec.sides) - len(values) if spec.kind == "blocks" else 0)
    return _norm(values, spec.norm), bool(left), left


def prune_once(scores, masks, spec, kind, value, of="total", scope="global", floor=1):
    """Return the masks after pruning, and whether a warning is due.

    Args:
      scores, masks: the leaves that take part.
      kind: "sparsity", "count" or "threshold"; `value` is one, or a dict by path.
    """
    floor = 0 if spec.kind == "nm" else floor
    looks = {
        path: [
            _look_at(members, scores[path], masks[path], spec) for members in units(masks[path].shape, spec)
        ]
        for path in scores
    }
    alive = {path: sum(able for _, able, _ in looks[path]) for path in looks}
    total = {path: len(looks[path]) for path in looks}

    def by_path(default):
        if isinstance(value, dict):
            return {path: value.get(path, default) for path in looks}
        return dict.fromkeys(looks, value)

    def ask(fraction, paths):
        size = sum(total[path] if of == "total" else alive[path] for path in paths)
        gone = sum(total[path] - alive[path] for path in paths) if of == "total" else 0
        return half_even(min(fraction / spec.max_sparsity, 1.0), size) - gone

    together = tuple(looks)
    if kind == "threshold":
        bounds = by_path(-math.inf)
        asked = {
            (path,): sum(able and score < np.float32(bounds[path]) for score, able, _ in looks[path])
            for path in looks
        }
    elif scope == "global":
        asked = {together: value if kind == "count" else ask(value, together)}
    elif kind == "count":
        asked = {(path,): number for path, number in by_path(0).items()}
    else:
        asked = {(path,): ask(fraction, [path]) for path, fraction in by_path(0.0).items()}

    def choose(paths, number, floor):
        candidates = []  # (score, leaf, position in the leaf)
        for leaf, path in enumerate(paths):
            ranked = sorted((look[0], leaf, at) for at, look in enumerate(looks[path]) if look[1])
            candidates += ranked[: max(len(ranked) - floor, 0)]
        return [(paths[leaf], at) for _, leaf, at in sorted(candidates)[: max(number, 0)]]

    warned = False
    after = {path: masks[path].copy() for path in masks}
    for paths, number in asked.items():
        taken = choose(paths, number, floor)
        loose = choose(paths, number, 0)
        warned |= number < 0 or number > len(taken)
        warned |= any(sum(p == path for p, _ in loose) > sum(p == path for p, _ in taken) for path in paths)
        for path, at in taken:
            for index in looks[path][at][2]:
                after[path][index] = False
    return after, warned


# torch.nn.utils.prune: an amount is an int, or a float, a fraction of what is left.


def _torch_amount(amount, left):
    return amount if isinstance(amount, int) else half_even(amount, left)


def torch_global_unstructured(tensors, amount, masks=None, importance_scores=None):
    """Prune the lowest |score| over all tensors together."""
    scores = tensors if importance_scores is None else importance_scores
    masks = [np.ones(t.shape, bool) for t in tensors] if masks is None else [m.copy() for m in masks]
    left = [
        (abs(float(scores[t][index])), t, index)
        for t in range(len(tensors))
        for index in np.ndindex(*tensors[t].shape)
        if masks[t][index]
    ]
    for _, t, index in sorted(left)[: _torch_amount(amount, len(left))]:
        masks[t][index] = False
    return masks


def torch_l1_unstructured(tensor, amount, mask=None, importance_scores=None):
    scores = None if importance_scores is None else [importance_scores]
    return torch_global_unstructured([tensor], amount, None if mask is None else [mask], scores)[0]


def torch_ln_structured(tensor, amount, n, dim, mask=None, importance_scores=None):
    """Prune slices along `dim` by the norm of what is left in them; the amount is of the slices left."""
    scores = tensor if importance_scores is None else importance_scores
    mask = np.ones(tensor.shape, bool) if mask is None else mask.copy()
    rows, kept = np.moveaxis(scores, dim, 0), np.moveaxis(mask, dim, 0)
    left = [i for i in range(len(rows)) if kept[i].any()]
    norm = {i: np.linalg.norm(np.where(kept[i], rows[i], 0).ravel().astype(np.float64), n) for i in left}
    for i in sorted(left, key=lambda i: norm[i])[: _torch_amount(amount, len(left))]:
        kept[i] = False  # a view of `mask`
    return mask
