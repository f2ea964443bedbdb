"""Bits: which entries of a leaf are kept, and values narrower than a byte.

The positions of kept entries are coded by their gaps, the numbers of dropped entries before each kept
one, as Rice did: a gap g is g >> k in unary (that many zero bits, then a one) and its k low bits as they
are. With k = 0 that is a bitmask that ends after the last kept entry. With the best k, places at random
take at most 5 % more than their entropy, which no code can go below, and 3 % from 80 % sparsity on. The
unary parts lie together, then the low bits, bit by bit, so that numpy codes and decodes them without a
loop over entries.
"""

from typing import NamedTuple

import numpy as np


class Pattern(NamedTuple):
    """Which entries are kept, coded.

    Attributes:
      kept: how many there are.
      k: how many low bits of each gap lie apart.
      unary: the unary parts, lowest bit of a byte first.
      low: the low bits: all lowest ones, then the next.
    """

    kept: int
    k: int
    unary: bytes | memoryview
    low: bytes | memoryview


def planes(values: np.ndarray, bits: int) -> bytes:
    r"""Unsigned integers, the given number of bits of each: all lowest bits, then the next.

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
    """What `planes` coded.

    Args:
      data: uint8, `bits` times the bytes that `count` bits take.
      bits: of each integer.
      count: how many there are.
      dtype: of the integers.

    Raises:
      ValueError: a bit after the last one is set.
    """
    values = np.zeros(count, dtype)
    for bit, plane in enumerate(data.reshape(bits, -(-count // 8))):
        ones = np.unpackbits(plane, bitorder="little")
        if ones[count:].any():
            raise ValueError("bits beyond the last value are set")
        values |= ones[:count].astype(dtype) << dtype(bit)
    return values


def encode(keep: np.ndarray) -> Pattern:
    """Codes the positions of the True entries in the fewest bytes.

    Args:
      keep: flat bool array.

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
    if 2 * kept >= keep.size:  # the only k that fits, or the best: with k = 1 it takes 2 bits for each kept
        return _bitmask(keep, kept)
    places = np.flatnonzero(keep)
    gaps = np.diff(places, prepend=-1).astype(np.uint32 if keep.size < 2**32 else np.uint64) - np.uint8(1)

    def size(k: int) -> int:
        unary = kept + int((gaps >> np.uint8(k)).sum(dtype=np.uint64))
        return -(-unary // 8) + k * -(-kept // 8)

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
    """Whether so many kept entries, coded with k in so many unary bytes, can lie among `size` entries.

    It also keeps all sums in `decode` below twice `size`.
    """
    if not (0 <= kept <= size and 0 <= k < 64):
        return False
    if kept == 0:
        return k == 0 and unary == 0
    longest = kept + ((size - kept) >> k)
    return kept << k <= size and -(-kept // 8) <= unary <= -(-longest // 8)


def decode(pattern: Pattern, size: int) -> np.ndarray:
    """The positions of the kept entries in ascending order, for a pattern that `fits`.

    Raises:
      ValueError: the bits say other than `kept`, or run past `size`.
    """
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
    # Before anything is shifted or summed: where the last entry comes to lie, without overflow.
    dropped = ((int(ends[-1]) + 1 - pattern.kept) << pattern.k) + int(low.sum())
    if dropped + pattern.kept > size:
        raise ValueError(f"the gaps run past the last of {size} entries")
    gaps = ((np.diff(ends, prepend=-1) - 1) << pattern.k) + low.astype(np.int64)
    return np.cumsum(gaps + 1) - 1
