"""Bits: which entries of a leaf are kept, and values of less than a byte.

The positions of kept entries are coded by their gaps, the numbers of dropped entries before each kept one,
with Rice's code: a gap g is g >> k in unary (that many zero bits, then a one), and the k low bits of g.

Why this code. If each entry is kept with probability p, independently, a gap is g with probability
p (1 - p) ** g, and g >> k is geometric too: it is at least n with probability q ** n, where
q = (1 - p) ** (2 ** k). The unary part has 1 + q / (1 - q) = 1 / (1 - q) bits on average, so that an entry,
kept or not, takes

    b(p, k) = p (k + 1 / (1 - q)) bits.

No code takes less than the entropy H(p) = -p log2(p) - (1 - p) log2(1 - p). With k = 0 it is q = 1 - p and
b = 1: a bitmask, which ends after the last kept entry. k = 1 takes over below p = 0.382, where b(p, 1) = 1 as
well and b / H = 1 / 0.960. With the best k the excess is at most 5 % from 40 % sparsity on, and 3 % from 80 %
on. (Below 40 % a bitmask is one bit beside 19 or more of float32 values.) An arithmetic code would save these
few percent of a small part of the file, but needs a loop over entries in Python. Here the unary parts lie
together, then the lowest bits of all gaps, then the next bits, so that numpy codes and decodes whole arrays.
"""

from typing import NamedTuple

import numpy as np


class Pattern(NamedTuple):
    """The positions of the kept entries, coded.

    Attributes:
      kept: how many entries are kept.
      k: how many low bits of each gap are stored apart from its unary part.
      unary: the unary parts, lowest bit of a byte first.
      low: the low bits: the lowest bits of all gaps, then the next bits.
    """

    kept: int
    k: int
    unary: bytes | memoryview
    low: bytes | memoryview


def planes(values: np.ndarray, bits: int) -> bytes:
    r"""Return unsigned integers bit by bit: the lowest bits of all, then the next bits, up to `bits` of each.

    Example:
      >>> import numpy as np
      >>> planes(np.array([1, 2, 3], np.uint8), 2)
      b'\x05\x06'
    """
    one = values.dtype.type(1)
    return b"".join(
        np.packbits(((values >> values.dtype.type(bit)) & one).astype(bool), bitorder="little").tobytes()
        for bit in range(bits)
    )


def from_planes(data: np.ndarray, bits: int, count: int, dtype: type = np.uint8) -> np.ndarray:
    """Return the integers that `planes` coded."""
    values = np.zeros(count, dtype)
    for bit, plane in enumerate(data.reshape(bits, -(-count // 8))):
        ones = np.unpackbits(plane, bitorder="little")
        if ones[count:].any():
            raise ValueError("bits beyond the last value are set")
        values |= ones[:count].astype(dtype) << dtype(bit)
    return values


def encode(keep: np.ndarray) -> Pattern:
    """Code the positions of the True entries with the k that takes the fewest bytes.

    Example:
      >>> import numpy as np
      >>> keep = np.arange(1000) % 50 == 0
      >>> pattern = encode(keep)
      >>> pattern.kept, pattern.k, len(pattern.unary) + len(pattern.low)
      (20, 5, 20)
      >>> decode(pattern, keep.size)[:4].tolist()
      [0, 50, 100, 150]
    """
    kept = int(np.count_nonzero(keep))
    if kept == 0:
        return Pattern(0, 0, b"", b"")
    # Where half of the entries are kept, or more, k = 0 is best: with k = 1 each kept entry takes 2 bits at
    # least, and so all take no less than the bitmask of keep.size bits.
    if 2 * kept >= keep.size:
        return _bitmask(keep, kept)
    places = np.flatnonzero(keep)
    gaps = np.diff(places, prepend=-1).astype(np.uint32 if keep.size < 2**32 else np.uint64) - np.uint8(1)

    def size(k: int) -> int:
        unary = kept + int((gaps >> np.uint8(k)).sum(dtype=np.uint64))
        return -(-unary // 8) + k * -(-kept // 8)

    # For random positions the best 2 ** k is about log(2) times the mean gap, below size / kept. A larger k
    # is not tried, and `fits` refuses it, so that sums stay small in `decode`.
    best = min(range((keep.size // kept).bit_length()), key=size)
    if best == 0:
        return _bitmask(keep, kept)
    ends = np.cumsum((gaps >> np.uint8(best)).astype(np.int64) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, bool)
    unary[ends] = True
    return Pattern(kept, best, np.packbits(unary, bitorder="little").tobytes(), planes(gaps, best))


def _bitmask(keep: np.ndarray, kept: int) -> Pattern:
    last = keep.size - int(np.argmax(keep[::-1]))
    return Pattern(kept, 0, np.packbits(keep[:last], bitorder="little").tobytes(), b"")


def fits(kept: int, k: int, unary: int, size: int) -> bool:
    """Return whether `kept` entries among `size` can be coded with k low bits in `unary` bytes.

    This also keeps all sums in `decode` below twice `size`: the unary parts have at most `longest` bits, one
    for each kept entry and one for each 2 ** k dropped entries.
    """
    if not (0 <= kept <= size and 0 <= k < 64):
        return False
    if kept == 0:
        return k == 0 and unary == 0
    longest = kept + ((size - kept) >> k)
    return kept << k <= size and -(-kept // 8) <= unary <= -(-longest // 8)


def decode(pattern: Pattern, size: int) -> np.ndarray:
    """Return the kept positions, ascending, for a pattern that `fits`; wrong bits raise ValueError."""
    ones = np.unpackbits(np.frombuffer(pattern.unary, np.uint8), bitorder="little").view(bool)
    ends = np.flatnonzero(ones)
    if len(ends) != pattern.kept:
        raise ValueError(f"{len(ends)} entries are marked as kept, not {pattern.kept}")
    if len(ends) and not ones[-8:].any():
        raise ValueError("bytes follow the last mark")
    if pattern.k == 0:
        if len(ends) and ends[-1] >= size:
            raise ValueError(f"an entry after the last of {size} is marked as kept")
        return ends
    low = from_planes(np.frombuffer(pattern.low, np.uint8), pattern.k, pattern.kept, np.uint64)
    # Checked in Python's integers before numpy shifts or sums anything: the position of the last kept entry.
    dropped = ((int(ends[-1]) + 1 - pattern.kept) << pattern.k) + int(low.sum())
    if dropped + pattern.kept > size:
        raise ValueError(f"the gaps run past the last of {size} entries")
    gaps = ((np.diff(ends, prepend=-1) - 1) << pattern.k) + low.astype(np.int64)
    return np.cumsum(gaps + 1) - 1
