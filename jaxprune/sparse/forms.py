"""The forms that a kernel can be stored in, each with its product.

A kernel is a matrix of (outputs, inputs) here. A form packs it, in numpy, into a few arrays, and multiplies
rows of inputs by these: (rows, inputs) -> (rows, outputs). Each form is the fastest one somewhere in
`python -m experiments.benchmarks.sparse_inference --layers 1`, with 2048 x 2048 kernels on a CPU:

- `csr` for 8 rows of inputs or more, and few scattered entries. XLA's product of compressed rows on a CPU
  runs on one thread, with the rows of inputs as its innermost axis; so activations are transposed to
  (inputs, rows), and XLA leaves them transposed between two such kernels.
- `padded` for one row or few, and for many rows at about 90 % sparsity: gathers and sums that XLA compiles,
  on all threads.
- `blocks` where whole blocks are zero: dense products of the other blocks; for one row, where at least half
  of the blocks are zero.
- `compact` where whole rows or columns are zero: one dense product of the others.

N:M sparsity has equally many entries in each row, so that `padded` stores it without padding. `BCOO` and
segment sums were the fastest nowhere.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

_BLOCK_SIZES = (64, 32, 16)
_WASTE = 2  # the most entries stored for each nonzero, since rows are filled up to the longest
_BLOCK_WASTE = 4  # the same for blocks, whose entries cost far less
_FEW_ROWS = 8  # below this many rows of inputs, a step of the loop sums one entry of each output
_TURN = 4  # otherwise it sums so many, so that the sums are read and written less often
_GROUP = 1024  # the fixed cost of a step of the loop, in rows of the kernel


class Form(NamedTuple):
    """A way to store a kernel.

    Attributes:
      name: its name in `choose` and in reports.
      pack: from a matrix of (outputs, inputs) to arrays, or to a text that says why the form does not suit.
      product: `product(arrays, x, outputs, dtype, precision)`, from (rows, inputs) to (rows, outputs),
        summed in `dtype`.
    """

    name: str
    pack: Callable[[np.ndarray], Any]
    product: Callable[[Any, Any, int, Any, Any], Any]


def _take(array: Any, indices: Any, axis: int) -> Any:
    """Return slices of an array by indices that are known to be inside."""
    where = (slice(None),) * axis + (indices,)
    return jnp.asarray(array).at[where].get(mode="promise_in_bounds")


def _alike(x: Any, values: Any, dtype: Any) -> tuple[Any, Any]:
    """Return two operands with one dtype: that of the sums, if theirs differ."""
    return (x, values) if x.dtype == values.dtype else (x.astype(dtype), values.astype(dtype))


def _matmul(x: Any, values: Any, dtype: Any, precision: Any) -> Any:
    return lax.dot_general(*_alike(x, values, dtype), (((1,), (0,)), ((), ())), precision, dtype)


def _csr_pack(matrix: np.ndarray) -> Any:
    rows, columns = np.nonzero(matrix)
    ends = np.cumsum(np.bincount(rows, minlength=len(matrix)))
    starts = np.concatenate([[0], ends]).astype(np.int32)
    return {"values": matrix[rows, columns], "indices": columns.astype(np.int32), "starts": starts}


def _csr_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    del precision  # BCSR multiplies in the precision of the dtype
    from jax.experimental import sparse  # it takes as long to import as all of jaxprune

    if not arrays["values"].size or not x.shape[0]:
        return jnp.zeros((x.shape[0], outputs), dtype)
    parts = arrays["values"].astype(dtype), arrays["indices"], arrays["starts"]
    return (sparse.BCSR(parts, shape=(outputs, x.shape[1])) @ x.astype(dtype).T).T


def _padded_pack(matrix: np.ndarray) -> Any:
    counts = np.count_nonzero(matrix, axis=1)
    order = np.argsort(counts, kind="stable")
    # Sorted by their counts, rows that share a loop are about equally long. One loop is best for rows of the
    # same length; the more they differ, the more loops pay.
    splits = [np.array_split(order, groups) for groups in (1, 2, 4, 8, 16)]
    splits[0] = [np.arange(len(matrix))]
    costs = [sum(counts[own].max(initial=0) * (len(own) + _GROUP) for own in split) for split in splits]
    groups = splits[int(np.argmin(costs))]
    packed = [_padded_group(matrix[own], counts[own]) for own in groups]
    stored = sum(group["values"].size for group in packed)
    if stored > max(_WASTE * counts.sum(), _TURN * len(matrix)):
        return f"rows of very different lengths: {stored / max(counts.sum(), 1):.1f} x padding"
    places = np.argsort(np.concatenate(groups)).astype(np.int32)
    return {"groups": packed, "places": places if len(groups) > 1 else None}


def _padded_group(matrix: np.ndarray, counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the n-th entries of all rows side by side: (turns, entries in a turn, rows)."""
    rows, columns = np.nonzero(matrix)
    place = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    shape = (-(-int(counts.max(initial=0)) // _TURN), _TURN, len(matrix))
    indices, values = np.zeros(shape, np.int32), np.zeros(shape, matrix.dtype)
    entry = (place // _TURN, place % _TURN, rows)
    indices[entry], values[entry] = columns, matrix[rows, columns]
    return {"indices": indices, "values": values}


def _padded_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    del outputs, precision
    turned = x.astype(dtype).T

    def one(total: Any, entry: Any) -> Any:
        index, value = entry
        return total + value.astype(dtype)[:, None] * _take(turned, index, 0), None

    def turn(total: Any, entries: Any) -> Any:
        # Unrolled: XLA fuses it into one loop over the sums, which reads and writes them once.
        for entry in zip(*map(tuple, entries), strict=True):
            total, _ = one(total, entry)
        return total, None

    def group(entries: Any) -> Any:
        turns = entries["indices"], entries["values"]
        rows = turns[0].shape[2]
        total = jnp.zeros((rows, x.shape[0]), dtype)
        if x.shape[0] < _FEW_ROWS:
            return lax.scan(one, total, [jnp.reshape(array, (-1, rows)) for array in turns])[0]
        return lax.scan(turn, total, turns)[0]

    sums = [group(entries) for entries in arrays["groups"]]
    if arrays["places"] is None:
        return sums[0].T
    return _take(jnp.concatenate(sums), arrays["places"], 0).T


def _blocks_pack(matrix: np.ndarray) -> Any:
    tiled = [_tiles(matrix, size) for size in _BLOCK_SIZES if not any(n % size for n in matrix.shape)]
    least = min((_blocks_stored(tiles) for tiles in tiled), default=math.inf)
    if not 0 < least <= min(_BLOCK_WASTE * np.count_nonzero(matrix), 0.95 * matrix.size):
        return f"no whole blocks of {', '.join(map(str, _BLOCK_SIZES))} that are zero"
    tiles = next(tiles for tiles in tiled if _blocks_stored(tiles) <= 1.25 * least)  # larger ones are faster
    alive = tiles.any(axis=(2, 3))
    counts = alive.sum(1)
    rows, columns = np.nonzero(alive)
    place = np.arange(len(rows)) - (np.cumsum(counts) - counts)[rows]
    size, shape = tiles.shape[2], (len(tiles), int(counts.max()))
    indices, values = np.zeros(shape, np.int32), np.zeros((*shape, size, size), matrix.dtype)
    indices[rows, place] = columns
    values[rows, place] = tiles[rows, columns].swapaxes(1, 2)  # (inputs, outputs) of a block
    return {"indices": indices, "values": values.reshape(len(tiles), -1, size)}


def _tiles(matrix: np.ndarray, size: int) -> np.ndarray:
    """Return a matrix as (rows of blocks, blocks, rows of a block, columns of a block)."""
    outputs, inputs = (n // size for n in matrix.shape)
    return matrix.reshape(outputs, size, inputs, size).swapaxes(1, 2)


def _blocks_stored(tiles: np.ndarray) -> int:
    """Return the number of entries stored: each row of blocks is filled up to the longest."""
    return len(tiles) * int(tiles.any(axis=(2, 3)).sum(1).max()) * tiles.shape[2] ** 2


def _blocks_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    indices, values = arrays["indices"], arrays["values"]
    rows, size = x.shape[0], values.shape[2]
    tiles = x.reshape(rows, x.shape[1] // size, size)
    if rows < _FEW_ROWS:  # all blocks at once: XLA's batched product is a plain loop on a CPU
        chosen = _take(tiles, indices, 1).reshape(rows, *values.shape[:2])
        numbers = (((2,), (1,)), ((1,), (0,)))
        product = lax.dot_general(*_alike(chosen, values, dtype), numbers, precision, dtype)
        return product.swapaxes(0, 1).reshape(rows, outputs)

    def one(_: Any, block: Any) -> Any:
        index, value = block
        chosen = _take(tiles, index, 1).reshape(rows, value.shape[0])
        return None, _matmul(chosen, value, dtype, precision)

    _, product = lax.scan(one, None, (indices, values))
    return product.swapaxes(0, 1).reshape(rows, outputs)


def _compact_pack(matrix: np.ndarray) -> Any:
    rows, columns = (np.flatnonzero(np.any(matrix, axis)).astype(np.int32) for axis in (1, 0))
    if len(rows) * len(columns) > 0.95 * matrix.size:
        return "no whole rows or columns that are zero"
    places = np.full(len(matrix), len(rows), np.int32)  # outputs that are zero read a zero behind the product
    places[rows] = np.arange(len(rows))
    return {
        "inputs": columns if len(columns) < matrix.shape[1] else None,
        "places": places if len(rows) < matrix.shape[0] else None,
        "values": np.ascontiguousarray(matrix[np.ix_(rows, columns)].T),
    }


def _compact_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    if not arrays["values"].size:
        return jnp.zeros((x.shape[0], outputs), dtype)
    if arrays["inputs"] is not None:
        x = _take(x, arrays["inputs"], 1)
    product = _matmul(x, arrays["values"], dtype, precision)
    if arrays["places"] is None:
        return product
    return _take(jnp.pad(product, ((0, 0), (0, 1))), arrays["places"], 1)


FORMS = {
    form.name: form
    for form in (
        Form("csr", _csr_pack, _csr_product),
        Form("padded", _padded_pack, _padded_product),
        Form("blocks", _blocks_pack, _blocks_product),
        Form("compact", _compact_pack, _compact_product),
    )
}


def stored_entries(arrays: Any) -> int:
    """Return how many values of a kernel a form stores, padding included."""
    groups = arrays.get("groups", [arrays])
    return sum(math.prod(group["values"].shape) for group in groups)
