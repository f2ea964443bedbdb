"""Read and write the file format in plain loops as its description says, without jaxprune."""

import json
import struct
import zlib

import jax.numpy as jnp  # for dtypes that numpy does not have
import numpy as np

NARROW = {"bool": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def dtype_of(name):
    return np.dtype(bool if name == "bool" else getattr(jnp, name))


def split(data):
    """Return the header as a dict, and the bytes of the sections."""
    magic, version, _, header, length = struct.unpack("<8sIIQQ", data[:32])
    assert (magic, version, length) == (b"\x93JPRUNE\n", 1, len(data))
    return json.loads(data[32 : 32 + header]), data[32 + header :]


def join(header, sections):
    """Return a file with a header (a dict, or the bytes of JSON), sections, and checksums that are right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rest = struct.pack("<QQ", len(text), 32 + len(text) + len(sections))
    crc = zlib.crc32(struct.pack("<8sI", b"\x93JPRUNE\n", 1) + rest + text)
    return struct.pack("<8sII", b"\x93JPRUNE\n", 1, crc) + rest + text + sections


def lengths(entry):
    """Return how many bytes values, scales, unary parts and low bits take."""
    size = int(np.prod(entry["shape"], dtype=object))
    kept = entry.get("kept", size)
    if entry.get("int8"):
        values = kept
    elif entry["dtype"] in NARROW:
        values = NARROW[entry["dtype"]] * -(-kept // 8)
        if entry["dtype"] == "bool" and "kept" in entry and entry.get("mask") != "kept":
            values = 0
    else:
        values = kept * dtype_of(entry["dtype"]).itemsize
    shape = entry["shape"]
    scales = 4 * (shape[-1] if len(shape) > 1 else 1) if entry.get("int8") else 0
    return values, scales, entry.get("unary", 0), entry.get("k", 0) * -(-entry.get("kept", 0) // 8)


def section_length(entry):
    total = sum(lengths(entry))
    return total + -total % 8


def bit(data, index):
    return data[index // 8] >> index % 8 & 1


def positions(entry, unary, low):
    found, gap, place = [], 0, -1
    for index in range(8 * len(unary)):
        if not bit(unary, index):
            gap += 1
            continue
        kept, k = entry["kept"], entry["k"]
        number = len(found)
        planes = [low[j * -(-kept // 8) : (j + 1) * -(-kept // 8)] for j in range(k)]
        place += 1 + (gap << k) + sum(bit(plane, number) << j for j, plane in enumerate(planes))
        found.append(place)
        gap = 0
    assert len(found) == entry["kept"]
    return found


def read(data):
    """Return by path, as JSON, the bytes of the leaf (a byte per sub-byte number), and its mask or None."""
    header, rest = split(data)
    out = {}
    for entry in header["leaves"]:
        section, rest = rest[: section_length(entry)], rest[section_length(entry) :]
        assert zlib.crc32(section) == entry["crc"]
        parts, start = [], 0
        for length in lengths(entry):
            parts.append(section[start : start + length])
            start += length
        assert not any(section[start:])
        size = int(np.prod(entry["shape"], dtype=object))
        where = positions(entry, *parts[2:]) if "kept" in entry else list(range(size))
        out[json.dumps(entry["path"])] = _leaf(entry, size, where, parts[0], parts[1])
    assert not rest
    return out


def _leaf(entry, size, where, values, scales):
    dtype = dtype_of(entry["dtype"])
    items = bytearray(size * dtype.itemsize)
    for number, place in enumerate(where):
        if entry.get("int8"):
            quantized = np.float32(struct.unpack_from("b", values, number)[0])
            channel = place % (len(scales) // 4)
            item = (quantized * np.float32(struct.unpack_from("<f", scales, 4 * channel)[0])).astype(dtype)
            item = item.tobytes()
        elif entry["dtype"] in NARROW:
            width = NARROW[entry["dtype"]]
            stride = -(-len(where) // 8)
            planes = [values[j * stride : (j + 1) * stride] for j in range(width)]
            item = bytes([sum(bit(p, number) << j for j, p in enumerate(planes)) if values else 1])
        else:
            item = values[number * dtype.itemsize : (number + 1) * dtype.itemsize]
        items[place * dtype.itemsize : (place + 1) * dtype.itemsize] = item
    mask = entry.get("mask")
    if mask is None:
        return bytes(items), None
    return bytes(items), [mask == "all" or place in set(where) for place in range(size)]
