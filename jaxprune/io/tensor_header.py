"""The header of a safetensors file: where each tensor lies, checked before anything is read.

    8 bytes      length of the header, unsigned and little-endian
    the header   a JSON object, padded with spaces: {"__metadata__": {text: text}, name: entry, ...}
    the data     the tensors, one after another

An entry is `{"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}`, counted from the beginning of
the data. The tensors fill the data: none overlaps another, and nothing lies between them.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxprune.files.opened import FileError
from jaxprune.io.format import DTYPES
from jaxprune.io.trees import DEEPEST

# By the format's name of a dtype, that of numpy and JAX.
NAMES = {
    "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
CODES = {name: code for code, name in NAMES.items()}

_LONGEST = 100_000_000  # bytes of a header, as in the format's own library
_LARGEST = 2**63  # no offset reaches it


class Tensor(NamedTuple):
    """An entry of the header.

    Attributes:
      dtype: numpy's name of it.
      shape: of the tensor.
      begin, end: its bytes, from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """A header that was checked.

    Attributes:
      tensors: by name, in the header's order.
      metadata: texts by text; None if the file has none.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] | None


def read_header(data: memoryview) -> Header:
    """Read the header of a file, and check that its tensors fill the rest of the file.

    Raises:
      FileError: what is wrong; it does not name the file.
    """
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > len(data) - 8:
        raise FileError(
            f"not a safetensors file, or one that was cut short: it has {len(data)} bytes, and should begin "
            "with the length of its header and the header"
        )
    if length > _LONGEST:
        raise FileError(f"a header of {length} bytes; {_LONGEST} are allowed")
    try:
        entries = json.loads(bytes(data[8 : 8 + length]).decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FileError(f"its header cannot be read: {error}") from None
    if not isinstance(entries, dict):
        raise FileError(f"its header is a {type(entries).__name__}, not an object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not is_metadata(metadata):
        raise FileError("its __metadata__ is not texts by text")
    for name in entries:
        if wrong := wrong_name(name):
            raise FileError(f"a tensor's name {wrong}")
    start = 8 + length
    tensors = {name: _tensor(name, entry, start) for name, entry in entries.items()}
    _check_places(tensors, start, len(data))
    return Header(tensors, metadata)


def write_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Any) -> bytes:
    """Return the bytes before the data, for tensors (dtype, shape) that lie one after another."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    begin = 0
    for name, (dtype, shape) in tensors.items():
        end = begin + size_of(dtype, shape)
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many bytes a tensor takes."""
    return math.prod(shape) * DTYPES[dtype].itemsize


def is_metadata(value: Any) -> bool:
    """Return whether a value can be the metadata of a file."""
    return isinstance(value, dict) and all(
        isinstance(text, str) and _is_unicode(text) for pair in value.items() for text in pair
    )


def wrong_name(name: str) -> str | None:
    """Return why a tensor cannot have a name, as the end of a sentence; None if it can."""
    if name == "__metadata__":
        return "is '__metadata__', which the format keeps for the metadata"
    if not _is_unicode(name):
        return f"holds half of a surrogate pair: {name[:200]!r}"
    if (depth := len(name.replace(".", "/").split("/"))) > DEEPEST:
        return f"has {depth} parts, and {DEEPEST} are allowed: {name[:60]!r}..."
    return None


def _is_unicode(text: str) -> bool:
    """Return whether a text can be written as UTF-8, which half of a surrogate pair cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _tensor(name: str, entry: Any, start: int) -> Tensor:
    def need(condition: bool, wrong: str) -> None:
        if not condition:
            raise FileError(f"{name[:200]!r} {wrong}")

    need(isinstance(entry, dict), "is not described by an object")
    need(entry.keys() == {"dtype", "shape", "data_offsets"}, f"is described by {sorted(entry)}"[:200])
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    need(isinstance(code, str), "has a dtype that is no text")
    need(code in NAMES, f"is of dtype {code[:40]}, which is not read")
    need(isinstance(shape, list) and all(map(_is_size, shape)), f"has the shape {shape!r:.100}")
    need(len(shape) <= 64, f"has {len(shape)} axes, and numpy holds 64")
    # With each size at least 1, as numpy wants it: strides are products too.
    need(math.prod(max(size, 1) for size in shape) < 2**57, "has a shape that no machine holds")
    need(
        isinstance(offsets, list) and len(offsets) == 2 and all(map(_is_size, offsets)),
        f"has data_offsets {offsets!r:.100}",
    )
    begin, end = offsets
    size = size_of(NAMES[code], tuple(shape))
    need(end - begin == size, f"is {code} of shape {shape}, so of {size} bytes, but has {end - begin}")
    return Tensor(NAMES[code], tuple(shape), start + begin, start + end)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _check_places(tensors: Mapping[str, Tensor], start: int, length: int) -> None:
    """Check that tensors fill a file from `start` to its end."""
    at, before = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if tensor.begin != at:
            how = "overlaps" if tensor.begin < at else "leaves a hole after"
            raise FileError(f"{name[:200]!r} {how} {before}")
        at, before = tensor.end, f"{name[:200]!r}"
    if at != length:
        raise FileError(
            f"its header describes {at} bytes, but it has {length}: "
            + ("it was cut short" if at > length else "something was added")
        )


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dict, for `object_pairs_hook`; FileError if a key occurs twice."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise FileError("a key occurs twice")
    return out
