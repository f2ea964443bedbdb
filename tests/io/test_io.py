import json
import math
import os
import resource
import signal
import stat
import subprocess
import sys
import tracemalloc
from collections import namedtuple

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.io.format import DTYPES
from tests.oracles import plain_file as plain

FLOATS = ["float16", "bfloat16", "float32", "float64"]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, -1e-42, 1e-310, 1.5, 3.0e38]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "params.jaxprune"


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("io")


def random_leaf(rng, dtype, shape, density):
    """Any bits that the dtype has, NaN with payloads and all; the rest +0."""
    size = math.prod(shape)
    dtype = DTYPES[dtype]
    raw = rng.integers(0, 256, size * dtype.itemsize, dtype=np.uint8)
    if dtype.name in plain.NARROW:
        raw &= 2 ** plain.NARROW[dtype.name] - 1
    keep = rng.random(size) < density
    raw = np.where(np.repeat(keep, dtype.itemsize), raw, 0).astype(np.uint8)
    return raw.view(dtype).reshape(shape)


def same_bits(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert one.tobytes() == other.tobytes()


def model(rng, sparsity, sizes=((784, 1024), (1024, 256), (256, 10))):
    """Weights and biases, and masks of exactly so many weights."""
    params, masks = {}, {}
    for index, shape in enumerate(sizes):
        kernel, bias = rng.standard_normal(shape, np.float32), rng.standard_normal(shape[1], np.float32)
        order = rng.permutation(kernel.size).reshape(shape)
        params[f"fc{index}"] = {"kernel": kernel, "bias": bias}
        masks[f"fc{index}"] = {
            "kernel": order >= round(sparsity * kernel.size),
            "bias": np.ones(bias.shape, bool),
        }
    return params, masks


# The files themselves


@settings(max_examples=60, deadline=None)
@given(
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=1, max_size=4),
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    density=st.sampled_from([0.0, 0.02, 0.2, 0.6, 0.95, 1.0]),
    masked=st.booleans(),
    mmap=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_bit_comes_back(folder, dtypes, shape, density, masked, mmap, seed):
    rng = np.random.default_rng(seed)
    params = {f"{i}": random_leaf(rng, dtype, shape, density) for i, dtype in enumerate(dtypes)}
    keep = rng.random()
    masks = {key: rng.random(shape) < keep for key in params} if masked else None
    file = folder / "any"
    assert jp.io.save(file, params, masks) == file.stat().st_size
    got = jp.io.load(file, mmap=mmap)
    assert got.params.keys() == params.keys()
    oracle = plain.read(file.read_bytes())
    for key, leaf in params.items():
        wanted = leaf if masks is None else np.where(masks[key], leaf, np.zeros((), leaf.dtype))
        same_bits(got.params[key], wanted)
        items, kept = oracle[json.dumps([key])]
        assert items == wanted.tobytes()
        if masks is None:
            assert kept is None
        else:
            np.testing.assert_array_equal(got.masks[key], masks[key])
            assert kept == masks[key].reshape(-1).tolist()
    assert masked or got.masks is None


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(1, 30_000),
    sparsity=st.sampled_from([0.5, 0.8, 0.9, 0.98, 0.999, 1.0]),
    run=st.sampled_from([1, 16, 500]),
    seed=st.integers(0, 2**32 - 1),
)
def test_larger_leaves_and_runs_come_back(folder, size, sparsity, run, seed):
    rng = np.random.default_rng(seed)
    mask = np.repeat(rng.random(-(-size // run)) >= sparsity, run)[:size]
    leaf = rng.standard_normal(size).astype(np.float32)
    jp.io.save(folder / "large", {"w": leaf}, {"w": mask})
    got = jp.io.load(folder / "large")
    np.testing.assert_array_equal(got.masks["w"], mask)
    same_bits(got.params["w"], np.where(mask, leaf, np.float32(0)))
    same_bits(jp.io.load(folder / "large").masks["w"], mask)


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values_survive(file, dtype):
    with np.errstate(over="ignore"):
        leaf = np.array(SPECIAL * 3 + [0.0] * 300).astype(DTYPES[dtype])
    payload = leaf.copy()
    bits = payload.view(f"u{payload.dtype.itemsize}")
    bits[0] |= 1  # a NaN with a payload
    jp.io.save(file, {"w": payload, "scalar": payload[5], "empty": payload[:0].reshape(0, 3)})
    got = jp.io.load(file).params
    same_bits(got["w"], payload)
    same_bits(got["scalar"], np.asarray(payload[5]))
    assert np.signbit(np.float64(got["scalar"]))
    same_bits(got["empty"], payload[:0].reshape(0, 3))
    assert plain.split(file.read_bytes())[0]["leaves"][2]["kept"] < 40  # and yet the zeros went


def test_jax_arrays_and_foreign_layouts(file):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    params = {
        "jax": jnp.asarray(array, jnp.bfloat16),
        "big": array.astype(">f4"),
        "fortran": np.asfortranarray(array),
        "strided": array[::2, ::-1],
        "numpy": np.float64(0.1),
        "complex": (array + 1j * array).astype(np.dtype(">c8")),
    }
    jp.io.save(file, params, jax.tree.map(lambda x: np.ones(x.shape, bool), params))
    got = jp.io.load(file).params
    for key, leaf in params.items():
        np.testing.assert_array_equal(got[key], np.asarray(leaf))
        assert got[key].dtype.isnative
    oracle = plain.read(file.read_bytes())
    assert oracle['["big"]'][0] == array.astype("<f4").tobytes()
    assert oracle['["complex"]'][0] == (array + 1j * array).astype("<c8").tobytes()


def test_what_masks_prune_is_plus_zero_whatever_it_was(file):
    params = {"w": np.array([np.nan, -1.0, np.inf, -0.0, -0.0], np.float32), "b": np.ones(2, np.float32)}
    masks = {"w": np.array([False, False, False, False, True]), "b": np.ones(2, bool)}
    jp.io.save(file, params, masks)
    got = jp.io.load(file)
    same_bits(got.params["w"], np.array([0.0, 0.0, 0.0, 0.0, -0.0], np.float32))
    jp.check_masks(got.masks, got.params)
    assert got.masks["b"].all()


def test_masks_alone_are_a_bit_an_entry_or_less(file):
    rng = np.random.default_rng(0)
    masks = {
        "half": rng.random(80_000) < 0.5,
        "few": rng.random(80_000) < 0.02,
        "all": np.ones((40, 2000), bool),
    }
    size = jp.io.save(file, masks)
    assert size < 10_000 + 0.16 * 10_000 + 10_000 + 600
    got = jp.io.load(file)
    for key, mask in masks.items():
        same_bits(got.params[key], mask)
    assert got.masks is None


# How small


def entropy(sparsity):
    """Bits an entry that no code of random places can do without."""
    return -sparsity * math.log2(sparsity) - (1 - sparsity) * math.log2(1 - sparsity)


@pytest.mark.parametrize(("sparsity", "gate"), [(0.5, 0.54), (0.9, 0.14), (0.98, 0.055)])
def test_size_beside_dense_safetensors(file, tmp_path, sparsity, gate):
    params, masks = model(np.random.default_rng(0), sparsity)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) >= 1_000_000
    ratio = jp.io.save(file, params, masks) / jp.io.save_safetensors(tmp_path / "dense", params)
    assert ratio <= gate
    # Values, and what their places must take: within 1 % (and some biases, and the header).
    assert ratio <= 1.01 * (1 - sparsity + entropy(sparsity) / 32) + 0.002
    got = jp.io.load(file, like=params)
    jax.tree.map(same_bits, got.params, jp.apply_masks(params, masks))
    jax.tree.map(np.testing.assert_array_equal, got.masks, masks)
    if sparsity == 0.9:  # and quantized besides, a quarter of the values
        assert jp.io.save(file, params, masks, int8=True) <= 0.045 * os.path.getsize(tmp_path / "dense")


def test_a_leaf_is_stored_in_its_smallest_form(file):
    rng = np.random.default_rng(0)

    def form(density):
        leaf = np.where(rng.random(4000) < density, 1.0, 0.0).astype(np.float32)
        jp.io.save(file, {"w": leaf})
        (entry,) = plain.split(file.read_bytes())[0]["leaves"]
        return entry.get("k", "dense")

    assert form(0.01) == 6
    assert form(0.1) == 3
    assert form(0.5) == 0  # a bitmask
    assert form(0.99) == "dense"
    assert form(0.0) == 0


# Trees

Point = namedtuple("Point", "x y")


class Pair(equinox.Module):
    left: jax.Array
    rest: list


def leaf(value):
    return np.array([value], np.float32)


@pytest.mark.parametrize(
    "tree",
    [
        {"a/b": leaf(1), "a": {"b": leaf(2)}, "a.b": leaf(3), "..": {"/etc": leaf(4)}, "": leaf(5)},
        {"0": leaf(1), "1": {0: leaf(2), -7: leaf(3)}, "2": [leaf(4), [leaf(5)]]},
        {"a": {}, "b": None, "c": [], "d": (), "e": [None, leaf(1), {}], "f": {"g": {}}},
        {"é\u4e2d\U0001f600": leaf(1), "\n\"\\": leaf(2), "\ud800": leaf(3), "__class__": leaf(4)},
        [leaf(1), {"w": leaf(2)}],
        {10: leaf(1), 2: leaf(2)},
        {0: leaf(1), 1: leaf(2)},
        leaf(1),
    ],
    ids=["slashes", "integers", "hollow", "names", "list", "unsorted", "places", "bare"],
)  # fmt: skip
def test_trees_come_back_as_they_were(file, tree):
    jp.io.save(file, tree, jax.tree.map(lambda x: x > 1, tree))
    got = jp.io.load(file)

    def check(a, b, value):
        if isinstance(a, (dict, list)):
            assert type(a) is type(b)
            assert len(a) == len(b)
            for key in a if isinstance(a, dict) else range(len(a)):
                check(a[key], b[key], value)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(value(a), b)
        else:
            assert a == b

    check(tree, jp.io.load(file, like=tree).params, lambda x: np.where(x > 1, x, 0))
    check(jax.tree.map(lambda x: x, tree), got.params, lambda x: np.where(x > 1, x, 0))
    check(jax.tree.map(lambda x: x, tree), got.masks, lambda x: x > 1)


def test_the_callers_containers_come_back(file):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Dense(3)(x))

    linen = Net().init(jax.random.key(0), jnp.ones((1, 2)))
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    params = {
        "linen": linen,
        "frozen": freeze({"a": {"b": jnp.ones(2)}}),
        "nnx": state,
        "equinox": Pair(jnp.arange(3.0), [jnp.ones(1)]),
        "point": Point(jnp.zeros(2), (jnp.ones(2), None)),
        "optimizer": optax.adam(1e-3).init({"w": jnp.ones(3)}),
    }
    jp.io.save(file, params)
    for like in (params, jax.eval_shape(lambda: params)):
        got = jp.io.load(file, like=like).params
        assert jax.tree.structure(got) == jax.tree.structure(params)
        jax.tree.map(same_bits, got, params)
    bare = jp.io.load(file).params
    assert bare["nnx"].keys() == {"kernel", "bias"}  # no "value" after them
    assert bare["point"].keys() == {"x", "y"}
    assert isinstance(bare["point"]["y"], list)
    assert bare["equinox"]["left"].tolist() == [0, 1, 2]


def test_like_names_what_differs(file):
    jp.io.save(file, {"a": leaf(1), "b": {"c": np.ones((2, 3))}})
    cases = [
        ({"a": leaf(1), "b": {"d": leaf(1)}}, r"missing from like: b/c; only in like: b/d"),
        (
            {"a": leaf(1), "b": {"c": np.ones((3, 2))}},
            r"'b/c' is float64\[2, 3\], but float64\[3, 2\] in like",
        ),
        ({"a": leaf(1), "b": {"c": np.ones((2, 3), np.float32)}}, r"'b/c' is float64\[2, 3\], but float32"),
        ({"a": None, "b": {"c": np.ones((2, 3))}}, r"missing from like: a; only in like: none"),
    ]
    for like, message in cases:
        with pytest.raises(jp.io.FileError, match=message):
            jp.io.load(file, like=like)
    with pytest.raises(TypeError, match=r"like\['a'\] is a float"):
        jp.io.load(file, like={"a": 1.0, "b": {"c": np.ones((2, 3))}})


def test_what_cannot_be_saved_is_said(file):
    w = {"w": np.ones(2, np.float32)}
    deep = np.ones(1)
    for _ in range(101):
        deep = [deep]
    cases = [
        (({},), ValueError, "no leaves"),
        (({"a": {"w": 1.0}},), TypeError, r"params\['a/w'\] is a float, not an array"),
        (({"w": jax.random.key(0)},), TypeError, r"params\['w'\] is key<fry>\[?\]?.*key_data"),
        (({"w": np.ones((1,) * 33)},), ValueError, "the params cannot be saved: 'w' has no shape"),
        (({"w": np.ones((0, 2**58), np.int8)},), ValueError, "a shape that no machine holds"),
        (({"w": np.array(["x"])},), TypeError, r"params\['w'\] is of dtype <U1; files hold bool"),
        (({True: w["w"], False: w["w"]},), TypeError, "key False, a bool"),
        (({(1, 2): w["w"]},), TypeError, r"key \(1, 2\), a tuple"),
        ((deep,), ValueError, "nested 101 deep"),
        ((w, {"v": np.ones(2, bool)}), ValueError, "missing from masks: w; only in masks: v"),
        ((w, {"w": np.ones(3, bool)}), ValueError, r"masks\['w'\] has shape \(3,\), its param has \(2,\)"),
        ((w, w), TypeError, r"masks\['w'\] is float32\[2\], but masks are bool"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            jp.io.save(file, *arguments)
    with pytest.raises(TypeError, match=r"params\['w'\].*Save outside of jit"):
        jax.jit(lambda x: jp.io.save(file, {"w": x}))(jnp.ones(2))
    for metadata in ({"a": (1,)}, {1: "a"}, {"a": np.nan}, {"a": {1, 2}}, ["a"], {"a": np.float32(1)}):
        with pytest.raises(TypeError, match="metadata must be a dict that JSON gives back"):
            jp.io.save(file, w, metadata=metadata)
    assert not os.listdir(file.parent)


def test_metadata_comes_back(file):
    metadata = {"step": 7, "name": "é\ud800", "nested": {"list": [1, 2.5, None, True, {}]}, "int8": "x"}
    jp.io.save(file, {"w": np.ones(2)}, metadata=metadata)
    assert jp.io.load(file).metadata == metadata
    jp.io.save(file, {"w": np.ones(2)})
    assert jp.io.load(file).metadata == {}


# Reading without copying, writing at once


def test_dense_leaves_are_views_of_the_file(file):
    leaf = np.random.default_rng(0).standard_normal((1000, 1000), np.float32)
    jp.io.save(file, {"w": leaf}, {"w": np.ones(leaf.shape, bool)})
    tracemalloc.start()
    got = jp.io.load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # of 4,000,000
    assert not got.params["w"].flags.writeable
    assert got.params["w"].flags.aligned
    same_bits(got.params["w"], leaf)
    # A later save leaves what was loaded alone.
    jp.io.save(file, {"w": np.zeros((1000, 1000), np.float32)})
    same_bits(got.params["w"], leaf)
    assert not jp.io.load(file).params["w"].any()


def test_a_full_disk_leaves_the_old_file(file):
    jp.io.save(file, {"w": leaf(1)})
    before = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            jp.io.save(file, {"w": np.ones(100_000)})
        with pytest.raises(Exception, match="File too large"):
            jp.io.save_safetensors(file, {"w": np.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]


def test_a_killed_save_leaves_the_old_file(file):
    jp.io.save(file, {"w": leaf(1)})
    before = file.read_bytes()
    code = (
        "import os, signal, sys\n"
        "from jaxprune.files.atomic import replacing\n"
        "with replacing(sys.argv[1]) as new, new.open('wb') as out:\n"
        "    out.write(b'half'); out.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(file)], check=False, capture_output=True, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert file.read_bytes() == before
    assert len(os.listdir(file.parent)) == 2  # the half is beside it


def test_permissions_links_and_folders(tmp_path):
    umask = os.umask(0o027)
    try:
        jp.io.save(tmp_path / "new", {"w": leaf(1)})
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    (tmp_path / "link").symlink_to("new")
    jp.io.save(str(tmp_path / "link"), {"w": leaf(2)})
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o604
    assert jp.io.load(tmp_path / "new").params["w"] == 2
    with pytest.raises(IsADirectoryError):
        jp.io.save(tmp_path, {"w": leaf(1)})
    with pytest.raises(FileNotFoundError):
        jp.io.save(tmp_path / "none" / "file", {"w": leaf(1)})
    with pytest.raises(FileNotFoundError):
        jp.io.load(tmp_path / "none")


# Integers of 8 bits


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(FLOATS),
    shape=st.sampled_from([(), (7,), (6, 4), (3, 3, 5), (0, 3), (3, 0)]),
    exponent=st.integers(-45, 38),
    seed=st.integers(0, 2**32 - 1),
)
def test_quantized_values_are_within_half_a_scale(folder, dtype, shape, exponent, seed):
    rng = np.random.default_rng(seed)
    dtype = DTYPES[dtype]
    largest = min(float(jnp.finfo(dtype).max), 3.4e38)
    values = np.clip(rng.standard_normal(shape) * 10.0**exponent, -largest, largest).astype(dtype)
    mask = rng.random(shape) < 0.7
    jp.io.save(folder / "int8", {"w": values}, {"w": mask}, int8=lambda path, leaf: path == "w")
    got = jp.io.load(folder / "int8").params["w"]
    assert got.dtype == dtype
    assert not got[~mask].any()
    exact = np.where(mask, values, np.zeros((), dtype)).astype(np.float64)
    axes = tuple(range(len(shape) - 1)) if len(shape) > 1 else None
    scale = np.maximum(np.abs(exact).max(axis=axes, initial=0) / 127, 2.0**-125)
    # Half a scale; float32's rounding of 127 scales; and that of the leaf's own dtype.
    bound = scale / 2 * (1 + 1e-4) + float(jnp.finfo(dtype).eps) / 2 * np.abs(exact) * 1.01
    bound += float(jnp.finfo(dtype).smallest_subnormal)
    assert (np.abs(got.astype(np.float64) - exact) <= bound).all()
    # The pure function gives the same bits.
    if dtype != np.float64:
        pure = jp.quantization.as_int8(
            {"w": jnp.asarray(np.where(mask, values, np.zeros((), dtype)))}, lambda *_: True
        )
        same_bits(got, np.asarray(pure["w"]))


def test_quantized_kernels_by_default(file):
    rng = np.random.default_rng(0)
    params, masks = model(rng, 0.5, sizes=((20, 30), (30, 10)))
    full = jp.io.save(file, params, masks)
    assert jp.io.save(file, params, masks, int8=True) < 0.6 * full
    got = jp.io.load(file, like=params)
    jp.check_masks(got.masks, params)
    for name, layer in params.items():
        same_bits(got.params[name]["bias"], layer["bias"])
        kept = masks[name]["kernel"]
        np.testing.assert_array_equal(got.masks[name]["kernel"], kept)
        assert (got.params[name]["kernel"] != np.where(kept, layer["kernel"], 0)).any()
    pure = jp.quantization.as_int8(jp.apply_masks(params, masks))
    jax.tree.map(same_bits, pure, got.params)
    assert jax.jit(jp.quantization.quantize)(params["fc0"]["kernel"]).values.dtype == jnp.int8


def test_what_cannot_be_quantized_is_said(file):
    params = {"a": {"kernel": np.ones((2, 2), np.float32), "count": np.ones(2, np.int32)}}
    bad = {"a": {"kernel": np.array([[1.0, np.nan]], np.float32)}}
    with pytest.raises(ValueError, match=r"params\['a/kernel'\] has 1 values that are not finite"):
        jp.io.save(file, bad, int8=True)
    # Where a mask takes it out it does no harm.
    jp.io.save(file, bad, {"a": {"kernel": np.array([[True, False]])}}, int8=True)
    assert jp.io.load(file).params["a"]["kernel"].tolist() == [[1.0, 0.0]]
    with pytest.raises(ValueError, match="not finite in float32"):
        jp.io.save(file, {"kernel": np.full((2, 2), 1e300)}, int8=True)
    with pytest.raises(TypeError, match=r"params\['a/count'\].*only leaves of dtype float16"):
        jp.io.save(file, params, int8=lambda path, leaf: True)
    with pytest.raises(ValueError, match=r"int8 matches no leaf.*a/count, a/kernel"):
        jp.io.save(file, params, int8=lambda path, leaf: False)
    with pytest.raises(TypeError, match="int8 must be a bool or a function"):
        jp.io.save(file, params, int8=8)
    with pytest.raises(TypeError, match="quantize takes floating-point arrays, got int32"):
        jp.quantization.quantize(jnp.arange(3))
