"""`load`: reads what `save` wrote, and checks every bit of it."""

import mmap as memory_map
import os
import sys
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.files.opened import FileError, open_file
from jaxprune.io import trees
from jaxprune.io.coding import Pattern, decode, from_planes
from jaxprune.io.format import BITS, DTYPES, Entry, Header, channels, padded, read_head
from jaxprune.tree.checks import check_number
from jaxprune.tree.leaves import describe, is_array
from jaxprune.typing import Masks, Params


class Saved(NamedTuple):
    """The contents of a file.

    Attributes:
      params: the params, numpy arrays.
      masks: their masks; None if they were saved without masks.
      metadata: the dict that was saved with them.
    """

    params: Params
    masks: Masks | None
    metadata: dict[str, Any]


def load(
    path: str | os.PathLike[str], like: Any = None, *, mmap: bool = True, max_bytes: int = 1 << 33
) -> Saved:
    """Read a file that `save` wrote.

    The file is read once, and every byte is under a checksum. A leaf that is stored with all of its entries
    (one with few zeros) becomes a read-only view of the file, which the system maps into memory and shares
    between processes. Other leaves are decoded, and so are bools, 4-bit and quantized values. A mask that
    keeps everything is a read-only view of one True. Nothing in a file is ever executed, and a file that is
    damaged, or made to do harm, raises `FileError`. The arrays are numpy arrays:
    `jax.tree.map(jnp.asarray, params)` puts them on a device.

    Args:
      path: of the file.
      like: a tree of arrays or `jax.ShapeDtypeStruct` that gives the result its structure; paths, shapes
        and dtypes must be those of the file. Without it, params are nested dicts, with lists where the steps
        of a path were positions in a sequence (or in a node without names).
      mmap: map the file into memory, rather than read a copy. Whoever writes to the file in place, as
        `save` never does, then changes arrays that were loaded.
      max_bytes: how much memory the decoded leaves may take together, by default 8 GiB. A few bytes can say
        that a billion entries are pruned, so a stranger's file could ask for any amount.

    Raises:
      FileError: a ValueError: the file is damaged, not of this format, larger than `max_bytes`, does
        not match `like`, or is a pipe or a device; the message names the file and the leaf.
      OSError: the file cannot be read.
      TypeError: `path` is not a str or a `pathlib.Path`.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jaxprune as jp
      >>> file = os.path.join(tempfile.mkdtemp(), "params")
      >>> size = jp.io.save(file, {"layers": [{"w": jnp.eye(3)}]}, metadata={"step": 7})
      >>> jp.io.load(file).params["layers"][0]["w"].tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
      >>> jp.io.load(file).metadata
      {'step': 7}
    """
    check_number(max_bytes, "max_bytes", "of bytes")
    data = _contents(path, mmap)
    try:
        header = read_head(data)
        needed = sum(entry.decoded for _, entry in header.entries)
        if needed > max_bytes:
            raise FileError(
                f"decoded, it takes {needed} bytes, and max_bytes={max_bytes} are allowed. If you trust the "
                f"file, pass max_bytes={needed}"
            )
        if like is not None:
            _check_like(like, header)
        params, masks = {}, {}
        for offset, entry in header.entries:
            try:
                params[entry.path], masks[entry.path] = _decode(data[offset:], entry)
            except (ValueError, MemoryError) as error:
                raise FileError(f"{trees.show(entry.path)[:200]!r}: {error or 'out of memory'}") from None
    except FileError as error:
        raise FileError(f"{os.fspath(path)}: {error}.") from None
    masked = any(entry.mask for _, entry in header.entries)

    def tree(leaves: dict[trees.Path, Any]) -> Any:
        if like is None:
            return trees.build(leaves, header.hollow)
        found = [leaf for _, _, leaf in trees.match(like, leaves, "like")]
        return jax.tree.unflatten(jax.tree.structure(like), found)

    return Saved(tree(params), tree(masks) if masked else None, header.metadata)


def _contents(path: str | os.PathLike[str], mmap: bool) -> memoryview:
    with open_file(path) as file:
        if not mmap:
            return memoryview(file.read())
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return memoryview(b"")
        return memoryview(memory_map.mmap(file.fileno(), 0, access=memory_map.ACCESS_READ))


def _check_like(like: Any, header: Header) -> None:
    """Check paths, shapes and dtypes before any leaf is read."""
    try:
        pairs = trees.match(like, {entry.path: entry for _, entry in header.entries}, "like")
    except ValueError as error:
        raise FileError(f"its leaves are not those of like; {error}") from None
    for where, leaf, entry in pairs:
        name = trees.show(where)
        if not is_array(leaf):
            raise TypeError(f"like[{name!r}] is a {type(leaf).__name__}, which has no shape and dtype.")
        got = f"{entry.dtype}[{', '.join(map(str, entry.shape))}]"
        if got != describe(leaf):
            raise FileError(f"{name!r} is {got}, but {describe(leaf)} in like")


def _decode(data: memoryview, entry: Entry) -> tuple[np.ndarray, np.ndarray | None]:
    """Return a leaf and its mask, given the bytes from its offset on."""
    lengths = entry.lengths
    used = sum(lengths)
    section = data[: padded(used)]
    if zlib.crc32(section) != entry.crc:
        raise FileError("its checksum is wrong: the file is damaged")
    if any(section[used:]):
        raise FileError("the padding after it is not zero")
    ends = np.cumsum(lengths).tolist()
    values, scales, unary, low = (section[end - size : end] for end, size in zip(ends, lengths, strict=True))
    whole = np.broadcast_to(np.True_, entry.shape) if entry.mask == "all" else None
    if entry.kept is None and not entry.int8:
        return _values(values, entry).reshape(entry.shape), whole
    array = np.zeros(entry.shape, DTYPES[entry.dtype])
    keep = np.zeros(entry.shape, bool) if entry.mask == "kept" else None
    if entry.kept is None:
        places: Any = np.arange(entry.size) if channels(entry.shape) > 1 else slice(None)
    else:
        places = decode(Pattern(entry.kept, entry.k, unary, low), entry.size)
    array.reshape(-1)[places] = (
        _scaled(values, scales, places, entry) if entry.int8 else _values(values, entry)
    )
    if keep is not None:
        keep.reshape(-1)[places] = True
    return array, whole if keep is None else keep


def _values(data: memoryview, entry: Entry) -> np.ndarray:
    """Return the stored values of a leaf that is not quantized."""
    dtype = DTYPES[entry.dtype]
    if entry.bits == 0:
        return np.ones(entry.stored, bool)
    if entry.stored == 0:
        return np.zeros(0, dtype)
    if entry.bits < 8:
        bits = from_planes(np.frombuffer(data, np.uint8), BITS[entry.dtype], entry.stored)
        return bits.view(dtype)
    values = np.frombuffer(data, dtype)
    return values if sys.byteorder == "little" else values.byteswap()


def _scaled(data: memoryview, scales: memoryview, places: Any, entry: Entry) -> np.ndarray:
    """Return the values of a quantized leaf, in the leaf's dtype."""
    scale = np.frombuffer(scales, "<f4")
    if not (np.isfinite(scale).all() and (scale >= 0).all()):
        raise FileError("its scales are not finite and positive")
    per_value = scale[places % len(scale)] if len(scale) > 1 else scale
    dtype = DTYPES[entry.dtype]
    largest = min(_largest(dtype), _largest(np.dtype(np.float32)))
    with np.errstate(over="ignore"):  # as in `dequantize`: infinity is clipped in the next line
        product = np.frombuffer(data, np.int8).astype(np.float32) * per_value
    return np.clip(product, -largest, largest).astype(dtype)


def _largest(dtype: np.dtype) -> float:
    return float(jax.numpy.finfo(dtype).max)
