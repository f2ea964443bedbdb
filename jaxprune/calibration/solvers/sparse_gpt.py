"""SparseGPT and GPTQ: one sweep over the columns, in which later weights make up for earlier ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from jaxprune.calibration.solvers.factors import check_damping, damped_factor
from jaxprune.calibration.solvers.grids import searched_scale
from jaxprune.calibration.solvers.pattern import (
    Pattern,
    Solver,
    check_problem,
    lowest_in_groups,
    lowest_units,
    matmul,
    shares,
    spread_over_units,
    sum_over_units,
)
from jaxprune.quantization import check_bits, nearest_codes
from jaxprune.tree.checks import as_integer

_AT_ONCE = 16
"""About how many columns are swept before a product takes what they changed to the rest of the block."""


def sparsegpt(block: int | None = None, damping: float = 0.01, bits: int | None = None) -> Solver:
    """Make SparseGPT: prune column by column, and let the columns to the right make up for each change.

    With `H = X^T X + damping mean(diag X^T X) I`, where a dead input's diagonal is 1, and `H^-1 = U^T U` (U
    upper triangular), it takes the columns from left to right in blocks. When it comes to a block, it removes
    the units of the block with the least `w^2 / U_jj^2` (of a block of weights the least sum). Then column by
    column

        e_j = (w_j - q_j) / U_jj,    w_k <- w_k - e_j U_jk  for all k > j,

    where `q_j` is 0 for the entries that are removed and `w_j` for those kept. This is the change of the
    other weights that raises the layer's squared error least. For "nm" the entries of a group are chosen
    when the sweep reaches the group.

    Counts are exact. With C columns in all (of units), `counts` to remove and c_b columns up to the end of
    block b, `floor(counts c_b / C)` units are gone after it: each block removes the fraction asked for, but
    for a remainder of less than one unit, and the last block ends at `counts`. It is so for each row if
    `pattern.per_output`.

    With `bits`, kept weights are rounded in the same sweep: `q_j` is the nearest of the `2^bits - 1` values
    `i s`, `|i| < 2^(bits - 1)`, with a step s for each output. With nothing to prune, this is GPTQ. Without
    `bits` a matrix whose count is 0 comes back as it is, to the bit.

    Args:
      block: how many columns are chosen from at once, rounded down to whole units; by default the lesser of
        128 and a quarter of the columns. In the published code it is 128, which in a narrow layer chooses
        most of the mask before anything has been made up for.
      damping: a fraction of the mean diagonal of `X^T X`; see `damped_factor` for where it is raised.
      bits: 2 to 8, or None for weights that are not rounded.

    Returns:
      A solver, for all patterns.

    Raises:
      TypeError: `block` or `bits` is not an integer.
      ValueError: `block`, `bits` or `damping` out of range; when the solver is called, a problem of other
        shapes.

    Example:
      >>> import jax, jax.numpy as jnp, jaxprune as jp
      >>> x = jax.random.normal(jax.random.key(0), (64, 8)) @ jax.random.normal(jax.random.key(1), (8, 8))
      >>> weight = jax.random.normal(jax.random.key(2), (1, 4, 8))
      >>> solver = jp.solvers.sparsegpt()
      >>> solved, mask = solver(weight, (x.T @ x)[None], jnp.array([16]), jp.solvers.Pattern())
      >>> int((solved == 0).sum()), bool(((solved != 0) == mask).all())
      (16, True)

    References:
      Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
      ICML 2023, arXiv:2301.00774. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative
      Pre-trained Transformers", ICLR 2023, arXiv:2210.17323.
    """
    block = None if block is None else as_integer(block, "block", at_least=1, what="columns")
    damping = check_damping(damping, "sparsegpt")
    bits = None if bits is None else check_bits(bits)

    def solve(
        weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Pattern
    ) -> tuple[jax.Array, jax.Array]:
        pattern = check_problem("sparsegpt", weight, gram, counts, pattern)
        root, _ = damped_factor(gram, damping)
        width = _columns_at_once(block, weight.shape[2], pattern)
        grid = None
        if bits is not None:
            importance = jnp.diagonal(root, axis1=1, axis2=2) ** 2
            grid = _Grid(searched_scale(weight, importance, bits), bits)
        return _sweep(weight, root, counts, pattern, width, grid)

    return solve


def _columns_at_once(block: int | None, columns: int, pattern: Pattern) -> int:
    width = pattern.sides[1]
    asked = min(128, columns // 4) if block is None else min(block, columns)
    return max(asked // width, 1) * width


class _Grid(NamedTuple):
    """A uniform grid for each output: the scale (B, out), and the bits of a code."""

    scale: jax.Array
    bits: int


def _sweep(
    weight: jax.Array,
    root: jax.Array,
    counts: jax.Array,
    pattern: Pattern,
    width: int,
    grid: _Grid | None,
) -> tuple[jax.Array, jax.Array]:
    # Everything is transposed, (B, in, out): a column of the matrix is then contiguous.
    #
    # Let D = W0 - W be what the sweep has changed by the time it comes to a block, in all columns. The
    # columns done have the errors E of the docstring, so D = E U and, with R = U^-1, D R = E, which is 0 in
    # columns that are still to come. Of the block's columns b, with P those before it, this says
    #
    #     D_P R_Pb + D_b R_bb = 0,  so  W_b = W0_b - D_b = W0_b + (D_P R_Pb) U_bb,
    #
    # since U_bb = R_bb^-1. Thus the sweep needs R, which is a Cholesky factor of H itself, and the inverses
    # of its diagonal blocks; H is never inverted. Within the block the updates are those of the docstring.
    inputs = weight.shape[2]
    steps = -(-inputs // width)
    beyond = steps * width - inputs
    # The columns beyond the last are 0 and cannot be chosen. R is the identity there.
    dense = jnp.pad(weight.swapaxes(1, 2), ((0, 0), (0, beyond), (0, 0)))
    if beyond:
        root = jnp.pad(root, ((0, 0), (0, beyond), (0, beyond)))
        root = root + jnp.diag((jnp.arange(steps * width) >= inputs).astype(root.dtype))
    factors = _inverses_of_diagonal_blocks(root, width)
    all_units, units_at_once = -(-inputs // pattern.sides[1]), width // pattern.sides[1]

    def sweep_block(step: jax.Array, state: _Swept) -> _Swept:
        start = step * width
        own = lax.dynamic_slice_in_dim(dense, start, width, 1)
        columns = lax.dynamic_slice_in_dim(root, start, width, 2)
        factor = lax.dynamic_index_in_dim(factors, step, 1, keepdims=False)
        made_up = matmul(factor.swapaxes(1, 2), matmul(columns.swapaxes(1, 2), state.change))
        now = own + made_up
        if pattern.kind == "nm":
            kept = jnp.broadcast_to((counts == 0)[:, None, None], now.shape)
        else:
            done, after = step * units_at_once, jnp.minimum((step + 1) * units_at_once, all_units)
            quota = shares(counts, after, all_units) - shares(counts, done, all_units)
            exist = done + jnp.arange(units_at_once) < all_units
            kept = _kept_of_block(now, factor, quota, pattern, exist)
        solved, kept = _sweep_columns(now, kept, factor, pattern, grid)
        return _Swept(
            *(
                lax.dynamic_update_slice_in_dim(whole, part, start, 1)
                for whole, part in zip(state, (solved, kept, own - solved), strict=True)
            )
        )

    start = _Swept(dense, jnp.ones(dense.shape, bool), jnp.zeros_like(dense))
    swept = lax.fori_loop(0, steps, sweep_block, start)
    return swept.weight[:, :inputs].swapaxes(1, 2), swept.kept[:, :inputs].swapaxes(1, 2)


class _Swept(NamedTuple):
    """How far a sweep has come, (B, in, out): the weights, the mask, and by how much they fell."""

    weight: jax.Array
    kept: jax.Array
    change: jax.Array


def _inverses_of_diagonal_blocks(root: jax.Array, width: int) -> jax.Array:
    """Return (B, in / width, width, width)."""
    batch, steps = root.shape[0], root.shape[1] // width
    blocks = jnp.diagonal(root.reshape(batch, steps, width, steps, width), axis1=1, axis2=3)
    blocks = jnp.moveaxis(blocks, -1, 1)
    return solve_triangular(blocks, jnp.broadcast_to(jnp.eye(width, dtype=root.dtype), blocks.shape))


def _kept_of_block(
    weight: jax.Array, factor: jax.Array, quota: jax.Array, pattern: Pattern, exist: jax.Array
) -> jax.Array:
    """Choose from (B, columns, out); `exist` says which columns of units there are."""
    diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
    scores = ((weight / diagonal[:, :, None]) ** 2).swapaxes(1, 2)
    removed = lowest_units(sum_over_units(scores, pattern), quota, pattern.per_output, exist)
    return spread_over_units(~removed, pattern, scores.shape).swapaxes(1, 2)


def _sweep_columns(
    weight: jax.Array, kept: jax.Array, factor: jax.Array, pattern: Pattern, grid: _Grid | None
) -> tuple[jax.Array, jax.Array]:
    """Sweep (B, columns, out); for "nm" choose on the way, unless the mask keeps everything already."""
    # A rank-one update of all columns of the block for each column would be bound by memory. So a few columns
    # are swept first, and their errors then reach the other columns as one product.
    width = weight.shape[1]
    unit = pattern.m if pattern.kind == "nm" else 1
    few = max(size for size in range(unit, max(_AT_ONCE, unit) + 1, unit) if width % size == 0)

    def sweep_few(step: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        weight, kept = state
        start = step * few
        rows = lax.dynamic_slice_in_dim(factor, start, few, 1)
        own = lax.dynamic_slice_in_dim(rows, start, few, 2)
        part = _Few(
            lax.dynamic_slice_in_dim(weight, start, few, 1),
            lax.dynamic_slice_in_dim(kept, start, few, 1),
            jnp.zeros((weight.shape[0], few, weight.shape[2]), weight.dtype),
        )
        done = lax.fori_loop(
            0, few // unit, lambda at, part: _sweep_unit(at * unit, part, own, pattern, grid), part
        )
        # Rows of U are 0 before their diagonal, so columns that are done change by exactly 0.
        weight = weight - matmul(rows.swapaxes(1, 2), done.errors)
        weight = lax.dynamic_update_slice_in_dim(weight, done.weight, start, 1)
        return weight, lax.dynamic_update_slice_in_dim(kept, done.kept, start, 1)

    return lax.fori_loop(0, width // few, sweep_few, (weight, kept))


class _Few(NamedTuple):
    """A few columns that are being swept, (B, columns, out)."""

    weight: jax.Array
    kept: jax.Array
    errors: jax.Array


def _sweep_unit(start: jax.Array, few: _Few, factor: jax.Array, pattern: Pattern, grid: _Grid | None) -> _Few:
    """Sweep the columns of one unit."""
    weight, kept, errors = few
    diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
    unit = pattern.m if pattern.kind == "nm" else 1
    if pattern.kind == "nm":
        group = lax.dynamic_slice_in_dim(weight, start, unit, 1)
        scores = (group / lax.dynamic_slice_in_dim(diagonal, start, unit, 1)[:, :, None]) ** 2
        stay = ~lowest_in_groups(scores.swapaxes(1, 2), pattern.n, pattern.m).swapaxes(1, 2)
        stay = stay | lax.dynamic_slice_in_dim(kept, start, unit, 1)
        kept = lax.dynamic_update_slice_in_dim(kept, stay, start, 1)
    for inside in range(unit):
        at = start + inside
        column, keep = (lax.dynamic_index_in_dim(x, at, 1, keepdims=False) for x in (weight, kept))
        pivot = lax.dynamic_index_in_dim(diagonal, at, 1)
        rounded = column if grid is None else nearest_codes(column, grid.scale, grid.bits) * grid.scale
        rounded = jnp.where(keep, rounded, 0)
        error = (column - rounded) / pivot
        row = lax.dynamic_index_in_dim(factor, at, 1, keepdims=False)
        later = jnp.where(jnp.arange(row.shape[1]) > at, row, 0)
        weight = weight - later[:, :, None] * error[:, None, :]
        weight = lax.dynamic_update_index_in_dim(weight, rounded, at, 1)
        errors = lax.dynamic_update_index_in_dim(errors, error, at, 1)
    return _Few(weight, kept, errors)
