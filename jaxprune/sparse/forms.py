"""The forms that a kernel can be stored in, each with its product.

A kernel is a matrix of (outputs, inputs) here. A form packs it, in numpy, into a few arrays, and multiplies
rows of inputs by these: (rows, inputs) -> (rows, outputs). The kernels of all steps of a scan are packed
together, each into arrays of the same shapes, filled up to the longest where they differ. Each form is the
fastest one somewhere in
`python -m experiments.benchmarks.sparse_inference --layers 1`, with 2048 x 2048 kernels on a CPU:

- `windows` for one row of inputs or few: gathers from windows of the inputs, by indices of one byte.
- `csr` for 8 rows of inputs or more, and few scattered entries. XLA's product of compressed rows on a CPU
  runs on one thread, with the rows of inputs as its innermost axis; so activations are transposed to
  (inputs, rows), and XLA leaves them transposed between two such kernels.
- `padded` for many rows at about 90 % sparsity: gathers of whole rows of inputs, and sums.
- `blocks` where whole blocks are zero: dense products of the other blocks; for one row, where at least half
  of the blocks are zero.
- `compact` where whole rows or columns are zero: one dense product of the others.

N:M sparsity has equally many entries in each row, so that `padded` stores it without padding. `BCOO` and
segment sums were the fastest nowhere.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_BLOCK_SIZES = (64, 32, 16)
_WASTE = 2  # the most entries stored for each nonzero, since rows are filled up to the longest
_BLOCK_WASTE = 4  # the same for blocks, whose entries cost far less
_FEW_ROWS = 8  # below this many rows of inputs, `blocks` multiplies all blocks at once
_TURN = 4  # entries of each output that a step of `padded` sums, so that sums are read and written less often
_GROUP = 1024  # the fixed cost of such a step, in rows of the kernel
_WINDOW = 256  # inputs that a step of `windows` reads from: as many as an index of one byte can tell apart
_STEP = 300  # the fixed cost of such a step, in entries
_LANES = 32  # the most lanes of an output: each is a term of one sum in the program
_LANE = 2  # the cost of adding a lane of each output, in entries an output
_NEAR = 3600  # lanes whose sums, entries and indices of a step, 9 bytes in all, fit a first cache of 32 KB
_FAR = 1.25  # the cost of an entry where there are more lanes than that
_WINDOW_WASTE = 4  # the most entries stored for each nonzero, of one byte less than elsewhere and the fastest


class Form(NamedTuple):
    """A way to store a kernel.

    Attributes:
      name: its name in `choose` and in reports.
      pack_stack: from matrices of (steps, outputs, inputs) to arrays with the steps as their first axis, or
        to a text that says why the form does not suit.
      product: `product(arrays, x, outputs, dtype, precision)`, from the arrays of one matrix and (rows,
        inputs) to (rows, outputs), summed in `dtype`.
      looped: the names of the arrays that the product runs along by `each_row`. In a scan over a stack they
        are given as `OfStack`.
    """

    name: str
    pack_stack: Callable[[np.ndarray], Any]
    product: Callable[[Any, Any, int, Any, Any], Any]
    looped: tuple[str, ...] = ()

    def pack(self, matrix: np.ndarray) -> Any:
        """Return the arrays of a matrix of (outputs, inputs), or the text; those of a stack if it is one."""
        if matrix.ndim == 3:
            return self.pack_stack(matrix)
        arrays = self.pack_stack(matrix[None])
        return arrays if isinstance(arrays, str) else of_step(arrays, 0)


class OfStack(NamedTuple):
    """The array of one step of a stack, not yet read.

    A slice of a stack that goes into a loop or a call is a copy, which takes about as long as a product of
    few rows. So a product that is a loop itself reads its slices from the stack, one in each round.

    Attributes:
      stack: the arrays of all steps, along the first axis.
      step: the number of the step.
    """

    stack: Any
    step: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.stack.shape[1:]

    def row(self, number: Any) -> Any:
        """Return `array[number]`."""
        start = self.step, number, *(0 for _ in self.shape[1:])
        return lax.dynamic_slice(self.stack, start, (1, 1, *self.shape[1:]), allow_negative_indices=False)[
            0, 0
        ]


def _is_of_stack(value: Any) -> bool:
    return isinstance(value, OfStack)


def read(array: Any) -> Any:
    """Return an array, of a stack or not."""
    if not _is_of_stack(array):
        return array
    return lax.dynamic_index_in_dim(array.stack, array.step, keepdims=False, allow_negative_indices=False)


def each_row(body: Callable[[Any, Any], Any], init: Any, arrays: Any) -> Any:
    """Return `lax.scan(body, init, arrays)`; some of the arrays may be of a stack."""
    leaves, tree = jax.tree.flatten(arrays, is_leaf=_is_of_stack)
    lengths = [leaf.shape[0] for leaf in leaves if _is_of_stack(leaf)]
    if not lengths:
        return lax.scan(body, init, arrays)

    def step(carry: Any, given: Any) -> Any:
        number, rows = given
        pairs = zip(leaves, rows, strict=True)
        rows = [leaf.row(number) if _is_of_stack(leaf) else row for leaf, row in pairs]
        return body(carry, tree.unflatten(rows))

    plain = [None if _is_of_stack(leaf) else leaf for leaf in leaves]
    return lax.scan(step, init, (jnp.arange(lengths[0], dtype=jnp.int32), plain))


def of_step(arrays: Any, step: int) -> Any:
    """Return the arrays of one step of a stack."""
    return jax.tree.map(lambda array: array[step], arrays)


def _place(counts: np.ndarray, *group: np.ndarray) -> np.ndarray:
    """Return which entry of its group each entry is, given the groups' sizes, and the group of each entry."""
    sizes = counts.ravel()
    first = (np.cumsum(sizes) - sizes).reshape(counts.shape)
    return np.arange(len(group[0])) - first[group]


def _take(array: Any, indices: Any, axis: int) -> Any:
    """Return slices of an array by indices that are known to be inside."""
    where = (slice(None),) * axis + (indices,)
    return jnp.asarray(array).at[where].get(mode="promise_in_bounds")


def _alike(x: Any, values: Any, dtype: Any) -> tuple[Any, Any]:
    """Return two operands with one dtype: that of the sums, if theirs differ."""
    return (x, values) if x.dtype == values.dtype else (x.astype(dtype), values.astype(dtype))


def _matmul(x: Any, values: Any, dtype: Any, precision: Any) -> Any:
    return lax.dot_general(*_alike(x, values, dtype), (((1,), (0,)), ((), ())), precision, dtype)


def _csr_pack(stack: np.ndarray) -> Any:
    step, rows, columns = np.nonzero(stack)
    ends = np.cumsum(np.count_nonzero(stack, axis=2), axis=1)
    totals = np.bincount(step, minlength=len(stack))
    shape = len(stack), int(totals.max(initial=0))
    indices, values = np.zeros(shape, np.int32), np.zeros(shape, stack.dtype)
    entry = step, _place(totals, step)
    indices[entry], values[entry] = columns, stack[step, rows, columns]
    # Entries behind the end of the last row, which fill up a step that has fewer, belong to no row: the
    # product does not read them.
    return {"values": values, "indices": indices, "starts": np.pad(ends, ((0, 0), (1, 0))).astype(np.int32)}


def _csr_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    del precision  # BCSR multiplies in the precision of the dtype
    from jax.experimental import sparse  # it takes as long to import as all of jaxprune

    if not arrays["values"].size or not x.shape[0]:
        return jnp.zeros((x.shape[0], outputs), dtype)
    parts = arrays["values"].astype(dtype), arrays["indices"], arrays["starts"]
    return (sparse.BCSR(parts, shape=(outputs, x.shape[1])) @ x.astype(dtype).T).T


def _padded_pack(stack: np.ndarray) -> Any:
    steps, outputs, _ = stack.shape
    counts = np.count_nonzero(stack, axis=2)
    order = np.argsort(counts, axis=1, kind="stable")
    # Sorted by their counts, rows that share a loop are about equally long. One loop is best for rows of the
    # same length; the more they differ, the more loops pay.
    splits = [np.array_split(order, groups, axis=1) for groups in (1, 2, 4, 8, 16)]
    splits[0] = [np.tile(np.arange(outputs), (steps, 1))]

    def longest(own: np.ndarray) -> int:
        return np.take_along_axis(counts, own, 1).max(initial=0)

    costs = [sum(longest(own) * (own.shape[1] + _GROUP) for own in split) for split in splits]
    groups = splits[int(np.argmin(costs))]
    packed = [_padded_group(np.take_along_axis(stack, own[..., None], 1)) for own in groups]
    stored = sum(group["values"].size for group in packed)
    if stored > max(_WASTE * counts.sum(), _TURN * steps * outputs):
        return f"rows of very different lengths: {stored / max(counts.sum(), 1):.1f} x padding"
    places = np.argsort(np.concatenate(groups, axis=1), axis=1).astype(np.int32)
    return {"groups": packed, "places": places if len(groups) > 1 else None}


def _padded_group(stack: np.ndarray) -> dict[str, np.ndarray]:
    """Return the n-th entries of all rows side by side: (steps, turns, entries in a turn, rows)."""
    counts = np.count_nonzero(stack, axis=2)
    step, rows, columns = np.nonzero(stack)
    place = _place(counts, step, rows)
    shape = (len(stack), -(-int(counts.max(initial=0)) // _TURN), _TURN, stack.shape[1])
    indices, values = np.zeros(shape, np.int32), np.zeros(shape, stack.dtype)
    entry = (step, place // _TURN, place % _TURN, rows)
    indices[entry], values[entry] = columns, stack[step, rows, columns]
    return {"indices": indices, "values": values}


def _padded_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    del outputs, precision
    turned = x.astype(dtype).T

    def turn(total: Any, entries: Any) -> Any:
        # Unrolled: XLA fuses it into one loop over the sums, which reads and writes them once.
        for index, value in zip(*entries, strict=True):
            total = total + value.astype(dtype)[:, None] * _take(turned, index, 0)
        return total, None

    def group(entries: Any) -> Any:
        turns = entries["indices"], entries["values"]
        return each_row(turn, jnp.zeros((turns[0].shape[2], x.shape[0]), dtype), turns)[0]

    sums = [group(entries) for entries in arrays["groups"]]
    if arrays["places"] is None:
        return sums[0].T
    return _take(jnp.concatenate(sums), arrays["places"], 0).T


# The form for one row of inputs. What it costs is reading the input of each entry, one by one: XLA has no
# gather instruction emitted, and puts eight inputs into a vector. Where their indices come as a vector of
# 16 or 32 bits, each has to be moved from the vector unit to an address, one a cycle. Eight indices of one
# byte fit one register instead, and are shifted out of it; and as a byte cannot point outside of 256 inputs,
# none is clamped. That is .20 ns an entry in place of .33, where a loop in C takes .27 (4.1 GHz).
#
# So the product runs in steps. Each step multiplies one entry in each of many lanes, and reads all their
# inputs from one window of 256, which moves along the inputs. A lane holds entries of one output; an output
# with many entries has several lanes, which are added up in the end.
#
# Which entry goes in which step? The windows stand first, as dense as the entries are. Then each output, on
# its own, takes at each step the first of its entries that are in the window, as many as it has lanes:
# windows move in one direction, so the entry that comes first among the columns is also the first to leave
# the window, and taking the earliest deadline first uses every lane that can be used. If an entry is missed
# all the same, the output gets one more lane.


def _windows_pack(stack: np.ndarray) -> Any:
    kernels, outputs, inputs = stack.shape
    counts = np.count_nonzero(stack, axis=2)
    entries: list[Any] = [np.nonzero(matrix) for matrix in stack]
    longest = counts.max(initial=1)
    best: Any = None
    for steps in sorted(m << n for n in range(3, 20) for m in (2, 3)):
        even = -(-counts // steps)  # lanes, if no entry is missed
        if steps >= 4 * max(longest, 8) or even.max(initial=0) > _LANES:
            continue
        if best is not None and _windows_cost(steps, even) >= best[0]:
            continue
        placed = (_window_starts(columns, steps, inputs) for _, columns in entries)
        found = [starts for starts in placed if starts is not None]
        if len(found) < kernels:
            continue
        parts = zip(entries, counts, found, strict=True)
        filled = [_lanes(rows, columns, count, starts, inputs) for (rows, columns), count, starts in parts]
        lanes = np.stack([lanes for lanes, _ in filled])
        cost = _windows_cost(steps, lanes)
        if lanes.max(initial=0) <= _LANES and (best is None or cost < best[0]):
            best = cost, np.stack(found), lanes, [taken for _, taken in filled]
    if best is None:
        return "too many entries close together"
    _, starts, lanes, taken = best
    first = np.cumsum(lanes, axis=1) - lanes
    stored = -(-(int(lanes.sum(1).max()) + 1) // 16) * 16  # the last lane is all zeros
    left = int(counts.sum())
    if starts.size * stored > max(_WINDOW_WASTE * left, 16 * starts.size, 64 * counts.size):
        return f"entries too far apart: {starts.size * stored / max(left, 1):.1f} x padding"
    indices = np.zeros((*starts.shape, stored), np.uint8)
    values = np.zeros(indices.shape, stack.dtype)
    for n, (rows, columns) in enumerate(entries):
        # In the order of `np.nonzero`, an output's entries are in the order of the steps.
        step = np.repeat(np.tile(np.arange(starts.shape[1]), outputs), np.diff(taken[n], axis=1).ravel())
        entry = n, step, first[n][rows] + _place(counts[n], rows) - taken[n][rows, step]
        indices[entry], values[entry] = columns - starts[n][step], stack[n, rows, columns]
    own = np.arange(lanes.max(initial=0))[:, None]
    narrow = np.uint16 if stored <= 2**16 else np.int32  # the gather of the sum takes half the time by uint16
    return {
        "indices": indices,
        "values": values,
        "starts": starts.astype(np.int32),
        "lanes": np.where(own < lanes[:, None], first[:, None] + own, stored - 1).astype(narrow),
    }


def _windows_cost(steps: int, lanes: np.ndarray) -> float:
    """Return the time that a product takes, in that of an entry, from the lanes of (kernels, outputs)."""
    total = int(lanes.sum(1).max())
    entry = 1 if total <= _NEAR else _FAR
    return steps * (entry * total + _STEP) + _LANE * lanes.shape[1] * int(lanes.max(initial=0))


def _window_starts(columns: np.ndarray, steps: int, inputs: int) -> np.ndarray | None:
    """Return where the window of each step starts, in ascending order; None if they cannot hold all columns.

    The windows are centred on quantiles of the entries' columns, except where this would leave out a column.
    """
    filled = np.bincount(columns, minlength=inputs)
    quantiles = (np.arange(steps) + 0.5) / steps * len(columns)
    centres = np.searchsorted(np.cumsum(filled), quantiles)
    starts = np.clip(centres - _WINDOW // 2, 0, max(inputs - _WINDOW, 0))
    used, end = np.flatnonzero(filled), 0
    for step in range(steps):
        missing = np.searchsorted(used, end)  # the first column that no window before holds
        if missing < len(used):
            starts[step] = min(starts[step], used[missing])
        end = starts[step] + _WINDOW
    return starts if end > used.max(initial=0) else None


def _lanes(
    rows: np.ndarray, columns: np.ndarray, counts: np.ndarray, starts: np.ndarray, inputs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the lanes of each output, and how many of its entries it has taken before each step."""
    outputs, steps = len(counts), len(starts)

    def before(ends: np.ndarray) -> np.ndarray:
        """Return for each output and step how many entries are in columns before `ends[step]`."""
        step = np.searchsorted(ends, np.arange(inputs), side="right")  # the first that counts a column
        found = np.bincount(rows * (steps + 1) + step[columns], minlength=outputs * (steps + 1))
        return np.cumsum(found.reshape(outputs, steps + 1), axis=1)[:, :steps]

    reached, left = before(starts + _WINDOW), before(starts)
    lanes = -(-counts // steps)
    taken = np.zeros((outputs, steps + 1), np.int64)
    rest = np.flatnonzero(counts)
    while len(rest):
        missed = np.zeros(len(rest), bool)
        for step in range(steps):
            missed |= taken[rest, step] < left[rest, step]
            taken[rest, step + 1] = np.minimum(taken[rest, step] + lanes[rest], reached[rest, step])
        missed |= taken[rest, steps] < counts[rest]
        rest = rest[missed]
        lanes[rest] += 1
    return lanes, taken


def _windows_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    del precision
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, max(0, _WINDOW - x.shape[1]))))

    def step(total: Any, entries: Any) -> Any:
        index, value, start = entries
        window = lax.dynamic_slice_in_dim(x, start, _WINDOW, 1)
        return total + value.astype(dtype) * _take(window, index, 1), None

    steps = arrays["indices"], arrays["values"], arrays["starts"]
    total = each_row(step, jnp.zeros((x.shape[0], steps[0].shape[1]), dtype), steps)[0]
    product = jnp.zeros((x.shape[0], outputs), dtype)
    for lane in arrays["lanes"]:
        product = product + _take(total, lane, 1)
    return product


def _blocks_pack(stack: np.ndarray) -> Any:
    tiled = [_tiles(stack, size) for size in _BLOCK_SIZES if not any(n % size for n in stack.shape[1:])]
    least = min((_blocks_stored(tiles) for tiles in tiled), default=math.inf)
    if not 0 < least <= min(_BLOCK_WASTE * np.count_nonzero(stack), 0.95 * stack.size):
        return f"no whole blocks of {', '.join(map(str, _BLOCK_SIZES))} that are zero"
    tiles = next(tiles for tiles in tiled if _blocks_stored(tiles) <= 1.25 * least)  # larger ones are faster
    alive = tiles.any(axis=(3, 4))
    counts = alive.sum(2)
    step, rows, columns = np.nonzero(alive)
    entry = step, rows, _place(counts, step, rows)
    size, shape = tiles.shape[3], (*counts.shape, int(counts.max()))
    indices, values = np.zeros(shape, np.int32), np.zeros((*shape, size, size), stack.dtype)
    indices[entry] = columns
    values[entry] = tiles[step, rows, columns].swapaxes(1, 2)  # (inputs, outputs) of a block
    return {"indices": indices, "values": values.reshape(*counts.shape, -1, size)}


def _tiles(stack: np.ndarray, size: int) -> np.ndarray:
    """Return matrices as (steps, rows of blocks, blocks, rows of a block, columns of a block)."""
    outputs, inputs = (n // size for n in stack.shape[1:])
    return stack.reshape(len(stack), outputs, size, inputs, size).swapaxes(2, 3)


def _blocks_stored(tiles: np.ndarray) -> int:
    """Return the number of entries stored: each row of blocks is filled up to the longest."""
    counts = tiles.any(axis=(3, 4)).sum(2)
    return counts.size * int(counts.max(initial=0)) * tiles.shape[3] ** 2


def _blocks_product(arrays: Any, x: Any, outputs: int, dtype: Any, precision: Any) -> Any:
    indices, values = arrays["indices"], arrays["values"]
    rows, size = x.shape[0], values.shape[2]
    tiles = x.reshape(rows, x.shape[1] // size, size)
    if rows < _FEW_ROWS:  # all blocks at once: XLA's batched product is a plain loop on a CPU
        indices, values = read(indices), read(values)
        chosen = _take(tiles, indices, 1).reshape(rows, *values.shape[:2])
        numbers = (((2,), (1,)), ((1,), (0,)))
        product = lax.dot_general(*_alike(chosen, values, dtype), numbers, precision, dtype)
        return product.swapaxes(0, 1).reshape(rows, outputs)

    def one(_: Any, block: Any) -> Any:
        index, value = block
        chosen = _take(tiles, index, 1).reshape(rows, value.shape[0])
        return None, _matmul(chosen, value, dtype, precision)

    _, product = each_row(one, None, (indices, values))
    return product.swapaxes(0, 1).reshape(rows, outputs)


def alive_first(alive: np.ndarray) -> np.ndarray:
    """Return, for each row of bools, which are True, ascending: equally many of each row.

    A row with fewer than the row with the most is filled up with some that are False.
    """
    most = int(alive.sum(1).max(initial=0))
    return np.sort(np.argsort(~alive, axis=1, kind="stable")[:, :most], axis=1).astype(np.int32)


def places_of(rows: np.ndarray, outputs: int) -> np.ndarray:
    """Return for each output its place among `rows`; outputs that are not there read a zero behind them."""
    places = np.full((len(rows), outputs), rows.shape[1], np.int32)
    np.put_along_axis(places, rows, np.arange(rows.shape[1], dtype=np.int32)[None], 1)
    return places


def _compact_pack(stack: np.ndarray) -> Any:
    steps, outputs, inputs = stack.shape
    rows, columns = (alive_first(np.any(stack, axis)) for axis in (2, 1))
    if rows.shape[1] * columns.shape[1] > 0.95 * outputs * inputs:
        return "no whole rows or columns that are zero"
    part = stack[np.arange(steps)[:, None, None], rows[:, None], columns[..., None]]
    return {
        "inputs": columns if columns.shape[1] < inputs else None,
        "places": places_of(rows, outputs) if rows.shape[1] < outputs else None,
        "values": np.ascontiguousarray(part),
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
        Form("padded", _padded_pack, _padded_product, ("indices", "values")),
        Form("windows", _windows_pack, _windows_product, ("indices", "values")),
        Form("blocks", _blocks_pack, _blocks_product, ("indices", "values")),
        Form("compact", _compact_pack, _compact_product),
    )
}


def stored_entries(arrays: Any) -> int:
    """Return how many values of a kernel a form stores, in all steps of a stack, padding included."""
    groups = arrays.get("groups", [arrays])
    return sum(math.prod(group["values"].shape) for group in groups)
