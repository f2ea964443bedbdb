"""One table of a network: the entries that each layer keeps, and the multiply-adds it computes."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.counting.multiply_adds import Macs, macs
from jaxprune.counting.sizes import nonzeros, ratio
from jaxprune.counting.xla import Cost, cost
from jaxprune.graph.compaction import compact
from jaxprune.tree.calls import check_call
from jaxprune.tree.checks import shown
from jaxprune.tree.leaves import array_leaves, is_concrete
from jaxprune.tree.masks import like_params
from jaxprune.tree.tables import csv_table, markdown_table, shape_text, shorten, text_lines
from jaxprune.tree.where import check_where, kernels
from jaxprune.typing import Masks, Params, Where


class Row(NamedTuple):
    """A layer, by its param, or a total.

    Attributes:
      path: the param's path; or "other params", "no params", "prunable", "whole model".
      shape: the param's shape; None for a total.
      size, kept: all entries, and those that the masks keep.
      macs: multiply-adds of the dense network.
      masked: multiply-adds under the masks, if zeros cost nothing; None without masks.
      small: multiply-adds of the compacted network; None if there is none.
    """

    path: str
    shape: tuple[int, ...] | None
    size: int
    kept: int
    macs: int
    masked: int | None
    small: int | None

    @property
    def sparsity(self) -> float:
        """The fraction of entries removed."""
        return 1 - self.kept / self.size if self.size else 0.0


class Summary(NamedTuple):
    """The result of `summary`; printing it gives a table of at most 80 columns.

    Attributes:
      rows: a `Row` for each layer, then the totals.
      compression: entries of the model over entries kept, see `metrics.compression`.
      speed_up: dense multiply-adds over those under the masks: the theoretical speed-up, which needs
        hardware that skips zeros.
      small_compression, small_speed_up: the same for the compacted network, which needs no such hardware.
      dense, masked, small: the full counts, with each operation, and notes on which counts are bounds.
      xla: XLA's analysis of the dense and of the compacted network, if it was asked for.
      notes: which counts are bounds, and why there is no compacted network.
    """

    rows: tuple[Row, ...]
    compression: float
    speed_up: float
    small_compression: float | None
    small_speed_up: float | None
    dense: Macs
    masked: Macs | None
    small: Macs | None
    xla: tuple[Cost, Cost | None] | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return rows and totals as plain Python values, for JSON."""
        return {
            "rows": [row._asdict() | {"sparsity": row.sparsity} for row in self.rows],
            "compression": self.compression,
            "speed_up": self.speed_up,
            "small_compression": self.small_compression,
            "small_speed_up": self.small_speed_up,
            "macs": self.dense.total,
            "macs_unpadded": self.dense.unpadded,
            "xla": None if self.xla is None else [each and each._asdict() for each in self.xla],
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """Return the rows as CSV, with exact counts."""
        return csv_table(_HEADS, *map(_exact, self.rows))

    def to_markdown(self) -> str:
        """Return the rows as a Markdown table, with exact counts."""
        return markdown_table(len(_HEADS) - 2, _HEADS, *map(_exact, self.rows))

    def __str__(self) -> str:
        lines = text_lines(
            "{:<24}{:<14}{:>9}{:>9}{:>8}{:>8}{:>8}",
            ("param", "shape", "kept", "sparsity", "MACs", "masked", "small"),
            *(
                (
                    shorten(row.path, 23),
                    _shape(row.shape),
                    _unit(row.kept),
                    f"{row.sparsity:.2%}",
                    *map(_unit, (row.macs, row.masked, row.small)),
                )
                for row in self.rows
            ),
        )
        if self.masked is not None:
            lines.append(
                f"masked: {self.compression:.2f} x fewer entries, {self.speed_up:.2f} x fewer MACs, no faster"
            )
        if self.small_compression is not None:
            lines.append(
                f"small: {self.small_compression:.2f} x fewer entries, {self.small_speed_up:.2f} x fewer MACs"
            )
        lines.append(f"MACs: {self.dense.total:,} for these inputs, {self.dense.unpadded:,} without padding")
        for name, found in zip(("dense", "small"), self.xla or (), strict=False):
            if found is not None:
                lines.append(
                    f"XLA, {name}: {_unit(found.flops)} FLOPs, {_unit(found.peak_memory)}B at most in memory"
                )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def summary(
    apply_fn: Callable[..., Any],
    params: Params,
    *inputs: Any,
    masks: Masks | None = None,
    where: Where = kernels,
    compacted: Any = True,
    xla: bool = False,
    **keywords: Any,
) -> Summary:
    """Count entries and multiply-adds of each layer: dense, under masks, compacted.

    A layer is a param that is prunable or that a product multiplies by. The other params share one row, and
    products of two values that depend on data (attention) another.

    Args:
      apply_fn: a pure function `apply_fn(params, *inputs)`.
      params: arrays, or `jax.ShapeDtypeStruct`.
      *inputs: example inputs; counts are for the whole batch.
      masks: bool masks like `params`; without them zeros in prunable params count as pruned entries, and
        only the dense function is counted.
      where: which leaves count as prunable.
      compacted: True to compact the network by the masks (`compact`, without verification) and count that as
        well; False not to; or a `Compacted` made before.
      xla: also compile, and ask XLA for FLOPs and memory.
      **keywords: none; those of the function go in by `functools.partial(apply_fn, train=False)`.

    Raises:
      ValueError: masks that do not mirror `params`.
      TypeError: `apply_fn` or `where` is not a function, `compacted` is neither a bool nor a `Compacted`, or
        there is another keyword.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"hidden": jnp.ones((3, 4)), "out": jnp.ones((4, 2))}
      >>> masks = jp.ones_masks(params) | {"hidden": jnp.ones((3, 4), bool).at[:, :2].set(False)}
      >>> def apply_fn(params, x):
      ...     return jnp.tanh(x @ params["hidden"]) @ params["out"]
      >>> print(jp.metrics.summary(apply_fn, params, jnp.ones((5, 3)), masks=masks))
      param                   shape              kept sparsity    MACs  masked   small
      hidden                  3x4                   6   50.00%      60      30      30
      out                     4x2                   8    0.00%      40      40      20
      prunable                                     14   30.00%     100      70      50
      whole model                                  14   30.00%     100      70      50
      masked: 1.43 x fewer entries, 1.43 x fewer MACs, no faster
      small: 2.00 x fewer entries, 2.00 x fewer MACs
      MACs: 100 for these inputs, 100 without padding
    """
    options = ("masks", "where", "compacted", "xla")
    check_call("summary(apply_fn, params, *inputs)", apply_fn, (params, *inputs), keywords, options)
    leaves = array_leaves(params)
    check_where(where)
    if masks is not None:
        masks = like_params(masks, params)
    if not isinstance(compacted, bool) and not (hasattr(compacted, "apply") and hasattr(compacted, "params")):
        raise TypeError(
            f"compacted must be True, False, or what jaxprune.compact gave, got {shown(compacted)}."
        )
    dense, under, small = macs(apply_fn, params, *inputs), None, None
    notes = list(dense.notes)
    if masks is not None:
        under = macs(apply_fn, params, *inputs, masks=masks)
        notes += under.notes
        if compacted is True:
            small = _compacted(apply_fn, params, masks, inputs, notes)
        elif compacted is not False:
            small = compacted
    smaller = macs(small.apply, small.params, *inputs) if small is not None else None
    kept = _kept(leaves, masks, where)
    counts = [None if found is None else found.by_path() for found in (dense, under, smaller)]

    def row(name: str, paths: list[str | None], shape: Any = None) -> Row:
        own = [path for path in paths if path is not None]
        each = [None if c is None else sum(c.get(path, 0) for path in paths) for c in counts]
        size = sum(math.prod(leaves[path].shape) for path in own)
        return Row(name, shape, size, sum(kept[path] for path in own), each[0] or 0, each[1], each[2])

    named = dense.by_path()
    listed = [path for path, leaf in leaves.items() if where(path, leaf) or path in named]
    others = [path for path in leaves if path not in listed]
    rows = [row(path, [path], tuple(leaves[path].shape)) for path in listed]
    if others:
        rows.append(row(f"{len(others)} other params", list(others)))
    if None in named:
        rows.append(row("no params", [None]))
    prunable: list[str | None] = [path for path in listed if where(path, leaves[path])]
    rows += [row("prunable", prunable), row("whole model", [*leaves, None])]
    whole = rows[-1]
    analyses = None
    if xla:
        analyses = cost(apply_fn, params, *inputs), small and cost(small.apply, small.params, *inputs)
    entries = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(small.params)) if small else None
    return Summary(
        tuple(rows),
        ratio(whole.size, whole.kept),
        ratio(dense.total, dense.total if under is None else under.total),
        None if entries is None else ratio(whole.size, entries),
        None if smaller is None else ratio(dense.total, smaller.total),
        dense,
        under,
        smaller,
        analyses,
        tuple(dict.fromkeys(notes)),
    )


def _compacted(apply_fn: Any, params: Any, masks: Any, inputs: Any, notes: list[str]) -> Any:
    """Return the compacted network, or None and a note that says why."""
    try:
        return compact(apply_fn, params, masks, *inputs, verify=False)
    except (ValueError, TypeError, NotImplementedError) as error:
        notes.append(f"not compacted: {error}")
        return None


def _kept(leaves: dict[str, Any], masks: Masks | None, where: Where) -> dict[str, int]:
    """Return how many entries of each leaf are kept; without masks, the nonzeros of prunable leaves."""
    if masks is not None:
        return {path: int(np.count_nonzero(mask)) for path, mask in array_leaves(masks, "masks").items()}
    return {
        path: nonzeros(leaf) if where(path, leaf) and is_concrete(leaf) else math.prod(leaf.shape)
        for path, leaf in leaves.items()
    }


_HEADS = ["param", "shape", "size", "kept", "sparsity", "MACs", "MACs masked", "MACs compacted"]


def _exact(row: Row) -> list[str]:
    counts = [row.size, row.kept, f"{row.sparsity:.6f}", row.macs, row.masked, row.small]
    return [row.path, _shape(row.shape), *("" if count is None else str(count) for count in counts)]


def _shape(shape: tuple[int, ...] | None) -> str:
    return "" if shape is None else shape_text(shape)


def _unit(count: int | None) -> str:
    """Return a count in at most 7 characters."""
    if count is None:
        return "-"
    if count < 100_000:
        return f"{count:,}"
    for unit, size in (("K", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12), ("P", 1e15)):
        if count < 999.95 * size or unit == "P":
            return f"{count / size:.1f}{unit}" if count >= 99.995 * size else f"{count / size:.2f}{unit}"
    raise AssertionError
