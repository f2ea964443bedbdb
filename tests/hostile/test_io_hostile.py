"""Files that were damaged, or made to do harm, end in one clear error."""

import tracemalloc
import zlib

import numpy as np
import pytest

import jaxprune as jp
from tests.hostile.files import mutated_bytes, mutated_under_checksums, outcome, whole_file
from tests.hostile.watch import watched
from tests.oracles import plain_file as plain


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A small file with a leaf of every form."""
    file = tmp_path_factory.mktemp("hostile") / "whole"
    data = whole_file(file)
    header, _ = plain.split(data)
    forms = {(entry.get("k"), entry["mask"], entry.get("int8", False)) for entry in header["leaves"]}
    assert {(2, "kept", False), (4, "all", False), (0, "kept", False), (None, "all", False)} <= forms
    assert any(int8 for _, _, int8 in forms)
    return data


def refused(file, data, message=None, **options):
    """Load a file that must be refused with a short error that names it."""
    file.write_bytes(data)
    with pytest.raises(jp.io.FileError, match=message) as info:
        jp.io.load(file, **options)
    assert str(info.value).startswith(f"{file}: ")
    assert len(str(info.value)) < 1000
    assert info.value.__cause__ is None


def test_every_flipped_bit_is_found(tmp_path, whole):
    file = tmp_path / "flipped"
    rng = np.random.default_rng(0)
    for index in range(len(whole)):
        data = bytearray(whole)
        data[index] ^= 1 << rng.integers(8)
        refused(file, data, mmap=False)


def test_random_mutations_are_found(tmp_path, whole):
    file = tmp_path / "mutated"
    rng = np.random.default_rng(1)
    for number in range(500):
        if (data := mutated_bytes(rng, whole)) != whole:
            refused(file, data, mmap=bool(number % 2))


def test_mutations_under_right_checksums_are_refused_or_read_as_described(tmp_path, whole):
    file = tmp_path / "hostile"
    rng = np.random.default_rng(2)
    header, rest = plain.split(whole)
    outcomes = [outcome(file, mutated_under_checksums(rng, header, rest), watched) for _ in range(500)]
    assert 65 < outcomes.count("accepted") < 400  # other values, mostly: which no checksum can tell


def leaf(**changes):
    entry = {"path": ["w"], "dtype": "float32", "shape": [2], "crc": 0} | changes
    return {key: value for key, value in entry.items() if value is not ...}


def made(*leaves, rest=b"", hollow=(), **more):
    return plain.join({"metadata": {}, "hollow": list(hollow), "leaves": list(leaves)} | more, rest)


def section(data):
    data = data + bytes(-len(data) % 8)
    return {"rest": data}, zlib.crc32(data)


def test_what_a_header_may_not_say(tmp_path):
    file = tmp_path / "header"
    rest, crc = section(np.ones(2, np.float32).tobytes())
    file.write_bytes(made(leaf(crc=crc), **rest))
    assert jp.io.load(file).params["w"].tolist() == [1, 1]  # this is how one is made by hand
    sparse = {"crc": crc, "kept": 1, "k": 0, "unary": 1}
    cases = [
        (made(leaf(crc=crc)), "describes"),
        (made(leaf(crc=crc), rest=rest["rest"] + bytes(8)), "describes"),
        (made(leaf(crc=crc, shape=[3]), **rest), "describes"),
        (made(leaf(crc=crc, shape=[2**40, 2**40]), **rest), "'w' has a shape that no machine holds"),
        (made(leaf(crc=crc, shape=[0, 2**62]), **rest), "no machine holds"),
        (made(leaf(crc=crc, shape=[-2, -1]), **rest), "'w' has no shape"),
        (made(leaf(crc=crc, shape=[1] * 40), **rest), "'w' has no shape"),
        (made(leaf(crc=crc, shape=[True, 2]), **rest), "'w' has no shape"),
        (made(leaf(crc=crc, dtype="object"), **rest), "'w' has an unknown dtype, 'object'"),
        (made(leaf(crc=crc, dtype="__class__"), **rest), "unknown dtype"),
        (made(leaf(crc=-1), **rest), "'w' has wrong numbers"),
        (made(leaf(crc=1), **rest), "'w': its checksum is wrong"),
        (made(leaf(crc=crc, path=["w"] * 101), **rest), "a path is too long"),
        (made(leaf(crc=crc, path="w"), **rest), "a path is too long, or none"),
        (made(leaf(crc=crc, path=[1.5]), **rest), "a path is malformed"),
        (made(leaf(crc=crc, path=[[1, 2]]), **rest), "a path is malformed"),
        (made(leaf(crc=crc, path=[True]), **rest), "a path is malformed"),
        (made(leaf(crc=crc), leaf(crc=crc), rest=2 * rest["rest"]), "a path occurs twice"),
        (made(leaf(crc=crc), leaf(crc=crc, path=["w", "v"]), rest=2 * rest["rest"]), "within"),
        (made(leaf(crc=crc, path=["w", "v"]), leaf(crc=crc), rest=2 * rest["rest"]), "within"),
        (made(leaf(crc=crc, path=[0]), leaf(crc=crc, path=[[0]]), rest=2 * rest["rest"]), "are the same"),
        (made(leaf(crc=crc), hollow=[[["w"], "none"]], **rest), "a path occurs twice"),
        (made(leaf(crc=crc), hollow=[[["v"], "object"]], **rest), "a hollow node is malformed"),
        (made(leaf(crc=crc), hollow=[["v", "none"]], **rest), "a path is too long, or none"),
        (made(leaf(crc=crc), hollow=[[["v"], []]], **rest), "a hollow node is malformed"),
        (made(leaf(crc=crc, mask="kept"), **rest), "'w' has a mask but no places"),
        (made(leaf(crc=crc, mask="some"), **rest), "'w' is malformed"),
        (made(leaf(crc=crc, mask="all"), leaf(crc=crc, path=["v"]), rest=2 * rest["rest"]), "only some"),
        (made(leaf(crc=crc, int8=True, dtype="int32"), **rest), "'w' cannot be quantized"),
        (made(leaf(crc=crc, int8=1), **rest), "'w' is malformed"),
        (made(leaf(crc=crc, offset=0), **rest), "a leaf has other keys"),
        (made(leaf(crc=crc, k=1), **rest), "a leaf has other keys"),
        (made(leaf(dtype=...), **rest), "a leaf has other keys"),
        (made([1, 2], **rest), "a leaf is malformed"),
        (made(leaf(**sparse | {"kept": 3}), **rest), "the kept entries do not fit"),
        (made(leaf(**sparse | {"kept": None}), **rest), "wrong numbers"),
        (made(leaf(**sparse | {"k": 2**40}), **rest), "the kept entries do not fit"),
        (made(leaf(**sparse | {"unary": 2**40}), **rest), "the kept entries do not fit"),
        (made(leaf(**sparse | {"unary": 0}), **rest), "the kept entries do not fit"),
        (made(leaf(**sparse | {"kept": 0}), **rest), "the kept entries do not fit"),
        (plain.join({"leaves": []}, b""), "it has other parts"),
        (plain.join([], b""), "it has other parts"),
        (made(leaf(crc=crc), metadata=[], **rest), "wrong types"),
        (made(leaf(crc=crc), leaves={}, **rest), "wrong types"),
        (plain.join(b"[" * 100_000, b""), "header cannot be read"),
        (plain.join(b'{"metadata":{},"metadata":{},"hollow":[],"leaves":[]}', b""), "a key occurs twice"),
        (plain.join(b'{"metadata":{"a":NaN},"hollow":[],"leaves":[]}', b""), "NaN is not JSON"),
        (plain.join(b'{"metadata":{"a":1e999},"hollow":[],"leaves":[]}', b""), "1e999 is not JSON"),
        (plain.join(b'{"metadata":{},"hollow":[],"leaves":[' + b"9" * 5000 + b"]}", b""), "cannot be read"),
        (plain.join(b'{"metadata":"\xff\xfe","hollow":[],"leaves":[]}', b""), "cannot be read"),
        (plain.join(b"", b""), "cannot be read"),
    ]
    for data, message in cases:
        refused(file, data, message, mmap=False)
        refused(file, data, message, like={"w": np.ones(2, np.float32)})


def test_what_a_section_may_not_hold(tmp_path):
    file = tmp_path / "section"

    def case(message, data, **entry):
        rest, crc = section(data)
        refused(file, made(leaf(crc=crc, **entry), **rest), message)

    def good(wanted, data, **entry):
        rest, crc = section(data)
        file.write_bytes(made(leaf(crc=crc, **entry), **rest))
        got = jp.io.load(file).params["w"]
        assert got.tolist() == wanted

    one = np.float32(1).tobytes()
    bitmask = {"shape": [10], "kept": 2, "k": 0, "unary": 2}
    good([0, 1, 0, 0, 0, 0, 0, 0, 1, 0], 2 * one + b"\x02\x01", **bitmask)
    case("'w': 1 entries are marked as kept, not 2", 2 * one + b"\x02\x00", **bitmask)
    case("'w': 3 entries are marked as kept, not 2", 2 * one + b"\x03\x01", **bitmask)
    case("'w': an entry after the last of 10 is marked", 2 * one + b"\x02\x04", **bitmask)
    case("'w': bytes follow the last mark", 2 * one + b"\x03\x00", **bitmask)
    # Gaps 1 and 5 of 8: k = 1, quotients 0 and 2, low bits 1 and 1.
    gaps = {"shape": [8], "kept": 2, "k": 1, "unary": 1}
    good([0, 1, 0, 0, 0, 0, 0, 1], 2 * one + b"\x09\x03", **gaps)
    case("'w': the gaps run past the last of 8 entries", 2 * one + b"\x11\x03", **gaps)
    case("'w': bits beyond the last value are set", 2 * one + b"\x09\x07", **gaps)
    rest, _ = section(2 * one + b"\x09\x03")
    spoiled = bytearray(rest["rest"])
    spoiled[-1] = 1
    refused(file, made(leaf(crc=zlib.crc32(spoiled), **gaps), rest=bytes(spoiled)), "the padding after it")
    good([True, True, False], b"\x03", shape=[3], dtype="bool")
    case("'w': bits beyond the last value are set", b"\x0b", shape=[3], dtype="bool")
    scale = np.float32([0.5]).tobytes()
    good([1.0, -64.0], b"\x02\x80" + scale, int8=True)
    for bad in np.float32([np.nan, np.inf, -1.0]):
        case("'w': its scales are not finite and positive", b"\x02\x80" + bad.tobytes(), int8=True)


def test_lengths_that_lie(tmp_path, whole):
    file = tmp_path / "lengths"
    for header in (0, 8, 2**20, 2**40, 2**64 - 1):
        refused(file, whole[:16] + header.to_bytes(8, "little") + whole[24:])
    for length in (0, len(whole) - 1, 2**63):
        refused(file, whole[:24] + length.to_bytes(8, "little") + whole[32:], "was written with")
    refused(file, whole[:8] + (2).to_bytes(4, "little") + whole[12:], "format version 2; this jaxprune reads")
    refused(file, b"", "not a file of jaxprune")
    refused(file, b"PK\x03\x04" + whole[4:], "not a file of jaxprune")
    refused(file, whole + b"\0", "cut short, or added to")


def test_a_few_bytes_cannot_ask_for_all_memory(tmp_path):
    file = tmp_path / "bomb"
    pruned = {"kept": 0, "k": 0, "unary": 0}
    huge = made(leaf(shape=[2**40], **pruned, mask="kept"))
    assert len(huge) < 300
    tracemalloc.start()
    refused(file, huge, r"takes 5497558138880 bytes, and max_bytes=8589934592 are allowed.*pass max_bytes")
    many = made(*(leaf(path=[str(index)], shape=[2**30], **pruned) for index in range(100)))
    refused(file, many, "max_bytes=8589934592")
    refused(file, made(leaf(shape=[300], **pruned)), "takes 1200 bytes, and max_bytes=1000", max_bytes=1000)
    # Masks that are True everywhere take nothing.
    file.write_bytes(made(leaf(shape=[2**20], dtype="bool", mask="all", **pruned)))
    assert jp.io.load(file).masks["w"].all()
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_a_sparse_leaf_is_within_the_limit_that_it_states(tmp_path):
    file = tmp_path / "sparse"
    params = {"w": np.zeros(10_000, np.float32), "dense": np.ones(10_000, np.float32)}
    params["w"][::100] = 1
    jp.io.save(file, params, {"w": params["w"] != 0, "dense": np.ones(10_000, bool)})
    needed = 10_000 * (4 + 1)  # the leaf and its mask; the dense one is a view
    assert jp.io.load(file, max_bytes=needed).params["w"].sum() == 100
    with pytest.raises(jp.io.FileError, match=f"max_bytes={needed}"):
        jp.io.load(file, max_bytes=needed - 1)
