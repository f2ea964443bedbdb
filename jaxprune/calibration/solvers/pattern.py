"""What a solver may remove from a matrix, and the masks that remove exactly that."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune.selection import lowest
from jaxprune.selection.sort_keys import ordered_bits
from jaxprune.structures.base import Structure
from jaxprune.tree.checks import shown

MAX_INPUTS = 2**16 - 1
"""The most inputs of a matrix: its Gram matrix takes 17 GB, and `shares` counts in 32 bits."""


class Pattern(NamedTuple):
    """What is removed as a whole from a matrix of outputs x inputs, and from where a count takes it.

    Attributes:
      kind: "elements": single entries; "nm": of each m neighbouring inputs of an output all but n; "blocks":
        rectangles that tile the matrix from its corner.
      per_output: whether each output (row; with "blocks" each row of blocks) gives the same number;
        otherwise the matrix gives it as a whole.
      n: how many of m inputs stay, for "nm".
      m: the size of a group, for "nm".
      block: the sides of a block, outputs x inputs, for "blocks".
    """

    kind: Literal["elements", "nm", "blocks"] = "elements"
    per_output: bool = False
    n: int = 0
    m: int = 0
    block: tuple[int, int] = (1, 1)

    @property
    def sides(self) -> tuple[int, int]:
        """The sides of a unit, outputs x inputs: (1, m) for "nm", whose groups are decided one by one."""
        return {"elements": (1, 1), "nm": (1, self.m), "blocks": self.block}[self.kind]


Solver = Callable[[jax.Array, jax.Array, jax.Array, Pattern], tuple[jax.Array, jax.Array]]
"""`solver(weight, gram, counts, pattern) -> (weight, mask)`; see `jaxprune.solvers`.

The library's own take the structure in place of the pattern as well, where they are called by hand.
"""


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply in full float32, also where a device would round the factors by default."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def as_pattern(pattern: Pattern | Structure) -> Pattern:
    """Return a pattern, or the pattern of a structure whose units lie in a matrix of outputs x inputs.

    Raises:
      TypeError: it is neither.
      ValueError: a structure of other units.

    Example:
      >>> import jaxprune as jp
      >>> from jaxprune.calibration.solvers.pattern import as_pattern
      >>> as_pattern(jp.structures.nm(2, 4)).kind
      'nm'
    """
    if isinstance(pattern, Pattern):
        return pattern
    if not isinstance(pattern, Structure):
        raise TypeError(f"a solver takes a jaxprune.solvers.Pattern, or a structure, got {shown(pattern)}.")
    if pattern.elementwise:
        return Pattern()
    if pattern.n_of_m is not None:
        n, m, _ = pattern.n_of_m
        return Pattern("nm", n=n, m=m)
    if pattern.tiles.keys() == {-2, -1}:
        return Pattern("blocks", block=(pattern.tiles[-2], pattern.tiles[-1]))
    raise ValueError(
        f"{pattern.name} is no pattern of a matrix: pass elements(), nm(n, m) or blocks((a, b))."
    )


def check_problem(
    name: str, weight: jax.Array, gram: jax.Array, counts: jax.Array, pattern: Pattern | Structure
) -> Pattern:
    """Check the shapes and dtypes of what a solver is given, and return the pattern."""
    pattern = as_pattern(pattern)
    shapes = f"weight {weight.shape}, gram {gram.shape}, counts {counts.shape}"
    fits = weight.ndim == 3 and gram.shape == (weight.shape[0], *2 * weight.shape[2:])
    if not fits or counts.shape != weight.shape[:1]:
        raise ValueError(
            f"{name} takes a batch of matrices, weight (B, out, in), gram (B, in, in) and counts (B,), got "
            f"{shapes}. A single matrix is a batch of one: weight[None], gram[None], counts[None]."
        )
    if not weight.dtype == gram.dtype == jnp.float32 or not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(
            f"{name} takes float32 matrices and integer counts, got {weight.dtype}, {gram.dtype} and "
            f"{counts.dtype}: cast them with .astype(...)."
        )
    inputs = weight.shape[2]
    if pattern.kind == "nm" and (not 0 < pattern.n < pattern.m or inputs % pattern.m):
        raise ValueError(
            f"{name} keeps {pattern.n} of every {pattern.m} of {inputs} inputs: n:m needs 0 < n < m, and an "
            "m that divides the number of inputs."
        )
    if inputs > MAX_INPUTS:
        raise ValueError(f"{name} takes matrices of at most {MAX_INPUTS} inputs, got {inputs}.")
    return pattern


def pattern_mask(scores: jax.Array, counts: jax.Array, pattern: Pattern) -> jax.Array:
    """Remove the units of lowest score: exactly `counts` of them, and of equal ones those of lower index.

    Args:
      scores: (B, out, in), of any real dtype. The score of a block is the sum over its entries.
      counts: (B,), how many units to remove from each matrix, or from each of its outputs if
        `pattern.per_output`. For "nm", 0 removes nothing, and any other count all but n of each group.
      pattern: what a unit is.

    Returns:
      A bool array like `scores`, True where an entry is kept.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxprune.calibration.solvers.pattern import Pattern, pattern_mask
      >>> scores = jnp.array([[[3.0, 1.0, 2.0, 1.0]]])
      >>> pattern_mask(scores, jnp.array([1]), Pattern()).tolist()
      [[[True, False, True, True]]]
      >>> pattern_mask(scores, jnp.array([1]), Pattern("nm", n=2, m=4)).tolist()
      [[[True, False, True, False]]]
    """
    if pattern.kind == "nm":
        kept = ~lowest_in_groups(scores, pattern.n, pattern.m)
        return kept | (counts == 0)[:, None, None]
    pooled = sum_over_units(scores, pattern)
    return spread_over_units(~lowest_units(pooled, counts, pattern.per_output), pattern, scores.shape)


def lowest_in_groups(scores: jax.Array, n: int, m: int) -> jax.Array:
    """Mark the m - n lowest of each m neighbours along the last axis, of equal ones the first."""
    groups = scores.reshape(*scores.shape[:-1], -1, m)
    # An entry goes if fewer than m - n entries go before it: the lower, and the equal at a lower index. This
    # is a strict order, so exactly m - n of a group go; m * m comparisons fuse where a sort would not.
    keys = ordered_bits(groups)
    mine, other = keys[..., :, None], keys[..., None, :]
    index = jnp.arange(m)
    before = (other < mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return (jnp.sum(before, axis=-1, dtype=jnp.int32) < m - n).reshape(scores.shape)


def lowest_units(
    scores: jax.Array, counts: jax.Array, per_output: bool, candidates: jax.Array | None = None
) -> jax.Array:
    """Mark the lowest of (B, rows, columns) of units: `counts` (B,) of each matrix, or of each of its rows.

    `candidates`, a bool array that broadcasts to the scores, says which may be marked.
    """
    batch, rows, columns = scores.shape
    shape = (batch * rows, columns) if per_output else (batch, rows * columns)
    counts = jnp.repeat(counts, rows) if per_output else counts
    flat = scores.reshape(shape)
    if candidates is None:
        chosen = jax.vmap(lambda s, k: lowest([s], [None], k)[0])(flat, counts)
    else:
        alive = jnp.broadcast_to(candidates, scores.shape).reshape(shape)
        chosen = jax.vmap(lambda s, a, k: lowest([s], [a], k)[0])(flat, alive, counts)
    return chosen.reshape(scores.shape)


def sum_over_units(values: jax.Array, pattern: Pattern) -> jax.Array:
    """Sum (B, out, in) over each unit; blocks at the far edges are smaller."""
    tall, wide = pattern.sides
    if (tall, wide) == (1, 1):
        return values
    window, padding = (1, tall, wide), ((0, 0), (0, -values.shape[1] % tall), (0, -values.shape[2] % wide))
    zero = jnp.zeros((), values.dtype)
    return lax.reduce_window(values, zero, lax.add, window, window, padding)


def spread_over_units(units: jax.Array, pattern: Pattern, shape: tuple[int, ...]) -> jax.Array:
    """Give each entry of a (B, out, in) array the value of its unit."""
    tall, wide = pattern.sides
    if (tall, wide) == (1, 1):
        return units
    return jnp.repeat(jnp.repeat(units, tall, axis=1), wide, axis=2)[:, : shape[1], : shape[2]]


def shares(counts: jax.Array, part: jax.Array | int, whole: int) -> jax.Array:
    """Return `floor(counts * part / whole)`, without the product, which 32 bits may not hold.

    With count = q whole + r the floor is q part + floor(r part / whole), where r part < whole^2 < 2^32.
    """
    quotient, rest = counts // whole, (counts % whole).astype(jnp.uint32)
    of_rest = rest * jnp.asarray(part).astype(jnp.uint32) // jnp.uint32(whole)
    return quotient * jnp.asarray(part).astype(counts.dtype) + of_rest.astype(counts.dtype)
