"""Selects among more entries than an int32 counts, for real: a command, as it takes 8 GB and minutes.

    python -m tests.soak.big_selection

Two leaves of 1.2 and 2.4 billion int8 scores are ranked together. How many of each value go is
counted by numpy, leaf by leaf, and the places of ties by the definition.
"""

import jax.numpy as jnp
import numpy as np

from jaxprune.selection.exact import lowest

SHAPES = ((30_000, 40_000), (60_000, 40_000))  # the second is counted row by row


def main() -> None:
    """Compares a selection of 3 billion of 3.6 billion with what numpy counts."""
    rng = np.random.default_rng(0)
    scores = []
    for rows, columns in SHAPES:
        block = rng.integers(-20, 21, (rows // 100, columns), np.int8)
        scores.append(np.tile(block, (100, 1)))
    count = 3_000_000_017
    got = [np.asarray(mask) for mask in lowest([jnp.asarray(s) for s in scores], [None, None], count)]
    counts = [
        np.bincount(s[: len(s) // 100].ravel().view(np.uint8) ^ 128, minlength=256) * 100 for s in scores
    ]
    value = int(np.searchsorted(np.cumsum(sum(counts)), count, side="right")) - 128
    left = count - int(sum(c[: value + 128].sum() for c in counts))
    print(f"{sum(s.size for s in scores):,} entries; {count:,} go: all below {value}, and {left:,} of it")
    for mask, s, name in zip(got, scores, ("first", "second"), strict=True):
        ties = 0
        for begin in range(0, len(s), 1000):
            at, chosen = s[begin : begin + 1000] == value, mask[begin : begin + 1000]
            order = np.cumsum(at.ravel()).reshape(at.shape) + ties
            expected = (s[begin : begin + 1000] < value) | (at & (order <= left))
            if not np.array_equal(chosen, expected):
                raise SystemExit(f"the {name} leaf differs from row {begin} on.")
            ties += int(at.sum())
        left = max(0, left - ties)
    total = sum(int(mask.sum()) for mask in got)
    print(f"{total:,} went, the first of their ties" if total == count else f"{total:,} went instead")


if __name__ == "__main__":
    main()
