r"""The file format, version 1: what the bytes of a file mean, and checks that they mean something.

    bytes 0-7    \x93JPRUNE\n
    8-11         version, 1
    12-15        CRC-32 of bytes 0-11, bytes 16-31 and the header
    16-23        length of the header
    24-31        length of the file
    32-          the header, JSON in UTF-8 padded with spaces to a multiple of 8
    then         a section for each leaf, in the header's order, padded with zeros to a multiple of 8

All integers are unsigned and little-endian. The header is
`{"metadata": {...}, "hollow": [[path, kind], ...], "leaves": [entry, ...]}`. An entry is

    path, dtype, shape
    crc          CRC-32 of the leaf's section, with its padding
    kept, k, unary   only if not every entry is stored: how many are, and how their positions are coded
                 (see `jaxprune.io.coding`): low bits of a gap, and bytes of the unary parts
    int8         true if values are integers of 8 bits, to be multiplied with scales
    mask         only in a file with masks: "kept" if the mask is True at the entries stored, "all" if
                 it is True everywhere

A section holds values, scales (float32), unary parts and low bits, one after another. Its length follows
from the entry, so a file holds no offsets: sections cannot overlap or lie elsewhere. The values are those
of the kept entries, or of all entries, in row-major order. Values of less than a byte lie in bit planes; a
bool leaf without a mask that stores its True entries alone needs no values. An entry that is not kept is +0.
"""

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxprune.files.opened import FileError
from jaxprune.io import trees
from jaxprune.io.coding import fits

MAGIC = b"\x93JPRUNE\n"
VERSION = 1
ALIGN = 8
LONGEST_HEADER = 1 << 26
_PREAMBLE = struct.Struct("<8sIIQQ")

# numpy holds each of these in a byte, with its bits lowest; a file holds the bits alone.
_BELOW_A_BYTE = {"bool": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}
# These are stored as numpy holds them in memory, little-endian. So "+0 to the bit" is all bytes 0 in every
# float format but float8_e8m0fnu, which has no zero: its byte 0 is 2 ** -127, and comes back as that.
_WHOLE_BYTES = (
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
    *("float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz", "float8_e4m3fn", "float8_e4m3fnuz"),
    *("float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(bool if name == "bool" else getattr(jnp, name))
    for name in (*_BELOW_A_BYTE, *_WHOLE_BYTES)
    if name == "bool" or hasattr(jnp, name)
}
"""The dtypes that a file can hold, by name."""

BITS = {name: _BELOW_A_BYTE.get(name, 8 * dtype.itemsize) for name, dtype in DTYPES.items()}
"""The bits that a value of each dtype takes in a file."""

QUANTIZABLE = ("float16", "bfloat16", "float32", "float64")


class Entry(NamedTuple):
    """A leaf in the header; see the module.

    Attributes:
      path: its steps, as in `jaxprune.io.trees`.
      dtype, shape: of the leaf.
      crc: CRC-32 of its section.
      kept: how many entries are stored; None if all are.
      k, unary: how their positions are coded.
      int8: whether values are quantized.
      mask: "kept", "all", or None for a file without masks.
    """

    path: trees.Path
    dtype: str
    shape: tuple[int, ...]
    crc: int = 0
    kept: int | None = None
    k: int = 0
    unary: int = 0
    int8: bool = False
    mask: str | None = None

    @property
    def size(self) -> int:
        """The number of entries of the leaf."""
        return math.prod(self.shape)

    @property
    def stored(self) -> int:
        """The number of entries whose values are stored."""
        return self.size if self.kept is None else self.kept

    @property
    def bits(self) -> int:
        """The bits of a value."""
        if self.int8:
            return 8
        # Bools stored because they are True need no values. With a mask, the entries stored are those
        # that it keeps, True or False.
        return (
            0 if self.dtype == "bool" and self.kept is not None and self.mask != "kept" else BITS[self.dtype]
        )

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        """Bytes of the values, scales, unary parts and low bits."""
        values = self.bits // 8 * self.stored if self.bits >= 8 else self.bits * -(-self.stored // 8)
        scales = 4 * channels(self.shape) if self.int8 else 0
        return values, scales, self.unary, self.k * -(-(self.kept or 0) // 8)

    @property
    def decoded(self) -> int:
        """Bytes that reading the leaf allocates; 0 if it is a view of the file."""
        array = 0 if self.kept is None and self.bits >= 8 and not self.int8 else self.size
        return array * DTYPES[self.dtype].itemsize + (self.size if self.mask == "kept" else 0)


class Header(NamedTuple):
    """A file without its sections: entries with the offset of each section, hollow nodes, metadata."""

    entries: list[tuple[int, Entry]]
    hollow: dict[trees.Path, str]
    metadata: dict[str, Any]


def channels(shape: Sequence[int]) -> int:
    """Return how many scales a quantized leaf has: one for each index of its last axis if it has two axes."""
    return shape[-1] if len(shape) >= 2 else 1


def padded(length: int) -> int:
    """Return a length rounded up to a multiple of `ALIGN`."""
    return -(-length // ALIGN) * ALIGN


def to_json(value: Any) -> str:
    """Return JSON without spaces, in ASCII."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def write_entry(entry: Entry) -> dict[str, Any]:
    """Return an entry as JSON takes it."""
    out: dict[str, Any] = {
        "path": [list(step) if isinstance(step, tuple) else step for step in entry.path],
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "crc": entry.crc,
    }
    if entry.kept is not None:
        out |= {"kept": entry.kept, "k": entry.k, "unary": entry.unary}
    if entry.int8:
        out["int8"] = True
    if entry.mask is not None:
        out["mask"] = entry.mask
    return out


def write_head(entries: Sequence[Entry], hollow: Mapping[trees.Path, str], metadata: Any) -> bytes:
    """Return the bytes of a file before its sections; refuse what `read_head` would refuse."""
    nodes = [[write_entry(Entry(path, "bool", ()))["path"], kind] for path, kind in hollow.items()]
    parts = {"metadata": metadata, "hollow": nodes, "leaves": [write_entry(entry) for entry in entries]}
    text = to_json(parts).encode("ascii")
    try:
        _read_parts(json.loads(text))
    except FileError as error:  # two paths that read back as the same, say
        raise ValueError(f"the params cannot be saved: {error}.") from None
    text += b" " * (padded(len(text)) - len(text))
    if len(text) > LONGEST_HEADER:
        raise ValueError(f"the header would take {len(text)} bytes; {LONGEST_HEADER} are allowed.")
    length = _PREAMBLE.size + len(text) + sum(padded(sum(entry.lengths)) for entry in entries)
    head = _PREAMBLE.pack(MAGIC, VERSION, 0, len(text), length)
    crc = zlib.crc32(text, zlib.crc32(head[16:], zlib.crc32(head[:12])))
    return _PREAMBLE.pack(MAGIC, VERSION, crc, len(text), length) + text


def read_head(data: memoryview) -> Header:
    """Read and check all but the sections; allocate no more than the bytes of the file account for."""
    if len(data) < _PREAMBLE.size or bytes(data[:8]) != MAGIC:
        raise FileError(f"not a file of jaxprune ({len(data)} bytes)")
    _, version, crc, header, length = _PREAMBLE.unpack(data[: _PREAMBLE.size])
    if version != VERSION:
        raise FileError(f"of format version {version}; this jaxprune reads version {VERSION}")
    if length != len(data):
        raise FileError(f"{len(data)} bytes long, but was written with {length}: cut short, or added to")
    if header > min(len(data) - _PREAMBLE.size, LONGEST_HEADER) or header % ALIGN:
        raise FileError(f"a header of {header} bytes does not fit")
    text = bytes(data[_PREAMBLE.size : _PREAMBLE.size + header])
    if zlib.crc32(text, zlib.crc32(data[16:32], zlib.crc32(data[:12]))) != crc:
        raise FileError("the header's checksum is wrong: the file is damaged")
    try:
        parts = json.loads(
            text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite
        )
        found = _read_parts(parts)
    except (ValueError, RecursionError) as error:
        raise FileError(f"the header cannot be read: {error}") from None
    offset, entries = _PREAMBLE.size + header, []
    for entry in found.entries:
        entries.append((offset, entry[1]))
        offset += padded(sum(entry[1].lengths))
    if offset != len(data):
        raise FileError(f"the header describes {offset} bytes, but the file has {len(data)}")
    return found._replace(entries=entries)


def _read_parts(parts: Any) -> Header:
    _need(isinstance(parts, dict) and parts.keys() == {"metadata", "hollow", "leaves"}, "it has other parts")
    metadata, hollow, leaves = parts["metadata"], parts["hollow"], parts["leaves"]
    _need(isinstance(metadata, dict) and isinstance(hollow, list) and isinstance(leaves, list), "wrong types")
    nodes: dict[trees.Path, str] = {}
    for node in hollow:
        _need(isinstance(node, list) and len(node) == 2, "a hollow node is malformed")
        path, kind = _path(node[0]), node[1]
        _need(
            path not in nodes and isinstance(kind, str) and kind in trees.HOLLOW, "a hollow node is malformed"
        )
        nodes[path] = kind
    entries = [_entry(leaf) for leaf in leaves]
    by_path = {entry.path: None for entry in entries}
    _need(len(by_path) == len(entries), "a path occurs twice")
    _need(len({entry.mask is None for entry in entries}) <= 1, "only some leaves have masks")
    trees.build(by_path, nodes)
    return Header([(0, entry) for entry in entries], nodes, metadata)


def _entry(leaf: Any) -> Entry:
    required, optional = {"path", "dtype", "shape", "crc"}, {"int8", "mask"}
    _need(isinstance(leaf, dict), "a leaf is malformed")
    sparse = {"kept", "k", "unary"} if "kept" in leaf else set()
    _need(required | sparse <= leaf.keys() <= required | sparse | optional, "a leaf has other keys")
    path = _path(leaf["path"])
    name = trees.show(path)[:200]
    dtype, shape, mask = leaf["dtype"], leaf["shape"], leaf.get("mask")
    _need(isinstance(dtype, str) and dtype in DTYPES, f"{name!r} has an unknown dtype, {dtype!r:.40}")
    _need(isinstance(shape, list) and len(shape) <= 32 and all(map(_count, shape)), f"{name!r} has no shape")
    # With each size at least 1, as numpy wants it: strides are products too.
    extent = math.prod(max(size, 1) for size in shape)
    _need(extent < 2**57, f"{name!r} has a shape that no machine holds")
    _need(all(_count(leaf[key]) for key in ("crc", *sparse)), f"{name!r} has wrong numbers")
    _need(leaf.get("int8", True) is True and mask in (None, "kept", "all"), f"{name!r} is malformed")
    entry = Entry(
        path, dtype, tuple(shape), leaf["crc"], leaf.get("kept"), leaf.get("k", 0), leaf.get("unary", 0),
        "int8" in leaf, mask,
    )  # fmt: skip
    _need(not entry.int8 or dtype in QUANTIZABLE, f"{name!r} cannot be quantized")
    if entry.kept is not None:
        _need(
            fits(entry.kept, entry.k, entry.unary, entry.size),
            f"{name!r}: the kept entries do not fit its shape",
        )
    else:
        _need(mask != "kept", f"{name!r} has a mask but no places")
    return entry


def _path(steps: Any) -> trees.Path:
    _need(isinstance(steps, list) and len(steps) <= trees.DEEPEST, "a path is too long, or none")

    def step(given: Any) -> Any:
        if isinstance(given, str) or _count(given):
            return given
        _need(isinstance(given, list) and len(given) == 1 and type(given[0]) is int, "a path is malformed")
        return (given[0],)

    return tuple(map(step, steps))


def _count(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _need(condition: bool, what: str) -> None:
    if not condition:
        raise FileError(what)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    _need(len(out) == len(pairs), "a key occurs twice")
    return out


def _no_number(text: str) -> Any:
    raise FileError(f"{text[:40]} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)
