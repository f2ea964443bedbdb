"""Hostile files: valid ones with other bytes, or with another header and checksums that fit it."""

import copy
import json
import struct
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp
from tests.oracles import plain_file as plain

LIMIT = 1 << 20
VALUES = [-1, 0, 1, 2, 3, 7, 8, 63, 64, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.0, 0.5, "1", "",
          None, True, [], [0], {}, "float32", "bool", "int4", "object", "all", "kept"]  # fmt: skip


def whole_file(file):
    """Write a small file with a leaf of every form, and return its bytes."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((6, 5)).astype(np.float32)
    params = {
        "gaps": {"kernel": rng.standard_normal((20, 7)).astype(np.float16)},
        "bits": [kernel, rng.integers(0, 9, 9).astype(np.uint8)],
        "bool": rng.random((3, 5)) < 0.5,
        "few": np.arange(999) % 40 == 0,
        "int8": {"kernel": rng.standard_normal((9, 3)).astype(np.float32)},
        "narrow": rng.integers(-8, 8, 11).astype(plain.dtype_of("int4")),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float64(0.1),
        "none": None,
    }
    masks = {
        "gaps": {"kernel": rng.random((20, 7)) < 0.1},
        "bits": [rng.random((6, 5)) < 0.6, np.ones(9, bool)],
        "bool": rng.random((3, 5)) < 0.5,
        "few": np.ones(999, bool),
        "int8": {"kernel": rng.random((9, 3)) < 0.5},
        "narrow": rng.random(11) < 0.5,
        "empty": np.ones((0, 4), bool),
        "scalar": np.ones((), bool),
        "none": None,
    }
    jp.io.save(file, params, masks, int8=jp.matching("int8/*"), metadata={"note": "x"})
    return file.read_bytes()


def outcome(file, data, watched):
    """Load a file, which must be refused or hold exactly what the file format's description says."""
    file.write_bytes(data)
    # The limit, and the file some times over: as text, lists, bits and positions.
    with watched(LIMIT + 200 * len(data)):
        got = tried(file, jp.io.load, max_bytes=LIMIT, mmap=False)
    if got is None:
        return "refused"
    wanted = plain.read(data)
    header, _ = plain.split(data)
    for entry in header["leaves"]:
        leaf, mask = (at(tree, entry["path"]) for tree in (got.params, got.masks or got.params))
        items, kept = wanted[json.dumps(entry["path"])]
        assert leaf.dtype.name == entry["dtype"]
        assert list(leaf.shape) == entry["shape"]
        assert leaf.tobytes() == items or np.isnan(leaf.astype(np.float64)).any()
        assert kept is None or mask.reshape(-1).tolist() == kept
    return "accepted"


def tried(file, load, **options):
    """Return what a file holds, or None if it is refused with an error that names it."""
    said = ""
    try:
        return load(file, **options)
    except jp.io.FileError as error:
        said = str(error)
    assert said.startswith(f"{file}: "), said
    return None


def at(tree, path):
    for step in path:
        tree = tree[step[0] if isinstance(step, list) else step]
    return tree


def repaired(header, rest):
    """Return the header with the checksums of all leaves whose sections can be found made right."""
    for entry in header["leaves"]:
        try:
            length = plain.section_length(entry)
        except (TypeError, KeyError, AttributeError, ValueError, IndexError):
            break
        if type(length) is not int or not 0 <= length < 2**20:
            break
        entry["crc"], rest = zlib.crc32(rest[:length]), rest[length:]
    return header


def mutated_bytes(rng, whole):
    """Return the bytes cut short, or with a piece removed, inserted, overwritten, moved or zeroed."""
    data = bytearray(whole)
    a, b = sorted(rng.integers(0, len(data), 2).tolist())
    kind = rng.integers(6)
    if kind == 0:  # cut short
        del data[a:]
    elif kind == 1:  # a piece goes
        del data[a:b]
    elif kind == 2:  # a piece comes
        data[a:a] = rng.bytes(int(rng.integers(1, 40)))
    elif kind == 3:  # a piece is overwritten
        data[a : a + 16] = rng.bytes(len(data[a : a + 16]))
    elif kind == 4:  # a piece is written elsewhere
        data[a : a + 24] = data[b : b + 24]
    else:  # zeros, as after a crash
        data[a:b] = bytes(b - a)
    return bytes(data)


def mutated_under_checksums(rng, header, rest):
    """Return a file with another header or other bits, and with checksums that are right."""
    changed, sections = copy.deepcopy(header), bytearray(rest)
    if rng.integers(2):
        entry = changed["leaves"][rng.integers(len(changed["leaves"]))]
        key = [*entry, "mask", "int8", "kept", "shape", "extra"][rng.integers(len(entry) + 5)]
        value = VALUES[rng.integers(len(VALUES))]
        if key in ("shape", "path") and isinstance(entry[key], list) and entry[key] and rng.integers(4):
            entry[key][rng.integers(len(entry[key]))] = value
        elif isinstance(entry.get(key), int) and rng.integers(2):
            entry[key] = int(entry[key]) + int(rng.integers(-2, 3))
        elif key in entry and not rng.integers(6):
            del entry[key]
        else:
            entry[key] = value
    else:
        index = rng.integers(len(sections))
        sections[index] ^= 1 << rng.integers(8)
    return plain.join(repaired(changed, bytes(sections)), bytes(sections))


# safetensors


def tensors_file():
    """Return a small safetensors file, put together by hand."""
    tensors = {
        "a/kernel": ("F32", [2, 3], np.arange(6, dtype=np.float32).tobytes()),
        "b": ("BF16", [4], bytes(8)),
        "flags": ("BOOL", [3], b"\1\0\1"),
        "empty": ("I64", [0, 2], b""),
    }
    header, body = {"__metadata__": {"note": "x"}}, b""
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    return header, body


def join_tensors(header, body):
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + body


def mutated_tensors(rng):
    """Return the file with other bytes or another header."""
    header, body = tensors_file()
    if rng.integers(3) == 0:
        return mutated_bytes(rng, join_tensors(header, body))
    name = list(header)[rng.integers(len(header))]
    odd = ["F32", "BOOL", "F4", "U8", [0, 3], [3, 0], [[1]], "\ud800", "\0", [2**32, 2**32], [2**40], [-1]]
    values = [*VALUES, *odd]
    entry, value = header[name], values[rng.integers(len(values))]
    kind = rng.integers(5)
    if kind == 0:
        key = list(entry)[rng.integers(len(entry))]
        entry[key] = value
    elif kind == 1:
        header[str(value) if rng.integers(2) else "__metadata__"] = entry if rng.integers(2) else value
    elif kind == 2:
        header[name] = value
    elif kind == 3:
        entry["shape" if name != "__metadata__" else "x"] = rng.integers(0, 4, rng.integers(0, 5)).tolist()
    else:
        body = bytes(rng.integers(0, 256, len(body), dtype=np.uint8))
    return join_tensors(header, body)


def tensors_outcome(file, data, watched):
    """Load safetensors, which must equal what is read here by hand, or be refused by name."""
    file.write_bytes(data)
    with watched(4 * LIMIT):
        got = tried(file, jp.io.load_safetensors)
    if got is None:
        return "refused"
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert got.metadata == (header.pop("__metadata__", None) or {})
    paths = {name: name.replace(".", "/") for name in header}
    arrays = dict(zip(jp.leaf_paths(got.params), jax.tree.leaves(got.params), strict=True))
    assert arrays.keys() == set(paths.values())
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        array = arrays[paths[name]]
        assert list(array.shape) == entry["shape"]
        assert array.tobytes() == data[8 + length + begin : 8 + length + end]
        if array.dtype == bool:
            assert set(array.view(np.uint8).ravel().tolist()) <= {0, 1}
    return "accepted"


# Exported programs


def program_bytes():
    """Return a small exported program."""
    return jp.export.stablehlo(
        lambda params, x: jnp.tanh(x @ params["w"]), {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
    ).to_bytes()


def program_outcome(file, data, whole, watched):
    """Load a program: only the unchanged one is read, unless the checksum was made right again."""
    file.write_bytes(data)
    with watched(16 * LIMIT):
        got = tried(file, jp.export.load)
    if got is None:
        return "refused"
    assert data == whole or data[-20:] != whole[-20:], "a damaged program was read"
    return "accepted"


class Files:
    """The valid files that all cases are made of."""

    def __init__(self, folder):
        self.params = whole_file(folder / "whole")
        self.parts = plain.split(self.params)
        self.program = program_bytes()
        # Whatever is imported at the first call is imported now.
        (folder / "program").write_bytes(self.program)
        (folder / "tensors").write_bytes(join_tensors(*tensors_file()))
        jp.export.load(folder / "program")
        jp.io.load_safetensors(folder / "tensors")

    def case(self, number, folder, watched):
        """One hostile file of one of the three formats."""
        rng = np.random.default_rng(number)
        file, kind = folder / "file", rng.integers(6)
        if kind == 0:
            return outcome(file, mutated_bytes(rng, self.params), watched)
        if kind < 3:
            return outcome(file, mutated_under_checksums(rng, *self.parts), watched)
        if kind == 3:
            return tensors_outcome(file, mutated_tensors(rng), watched)
        if kind == 4:
            return program_outcome(file, mutated_bytes(rng, self.program), self.program, watched)
        inner = mutated_bytes(rng, self.program[:-20])
        seal = struct.pack("<8sQI", self.program[-20:-12], len(inner), zlib.crc32(inner))
        return program_outcome(file, inner + seal, self.program, watched)
