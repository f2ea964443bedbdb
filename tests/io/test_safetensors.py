"""safetensors of other programs, read and written: beside the format's own library, and beside damage."""

import errno
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.io import tensors
from jaxprune.io.layout import INDEX
from jaxprune.io.tensor_header import NAMES
from tests.io.test_io import FLOATS, leaf, random_leaf, same_bits


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def llama(rng, dtype="bfloat16"):
    """Return tensors named as in a decoder's file."""
    tensors = {"model.embed_tokens.weight": (8, 4), "lm_head.weight": (8, 4), "model.norm.weight": (4,)}
    for i in range(2):
        tensors |= {f"model.layers.{i}.{n}.weight": (4, 4) for n in ("self_attn.q_proj", "mlp.up_proj")}
    return {name: random_leaf(rng, dtype, shape, 0.9) for name, shape in tensors.items()}


def write(file, tensors, metadata=None):
    """Write a file by the format's own library."""
    safetensors.numpy.save_file(tensors, file, metadata=metadata)


def shards(folder, rng):
    """Write two shards and an index as transformers does; return the tensors."""
    tensors = llama(rng)
    folder.mkdir(exist_ok=True)
    places = {}
    for number in (1, 2):
        name = f"model-0000{number}-of-00002.safetensors"
        held = {key: array for at, (key, array) in enumerate(sorted(tensors.items())) if at % 2 == number - 1}
        write(folder / name, held, {"format": "pt"})
        places |= dict.fromkeys(held, name)
    total = sum(array.nbytes for array in tensors.values())
    sizes = {"total_parameters": 7, "total_size": total}  # 7: where nothing is resized, theirs stays
    index = {"metadata": sizes | {"by": "x"}, "weight_map": dict(sorted(places.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return tensors


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def by_path(params):
    return dict(zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True))


# --- reading and writing ------------------------------------------------------------------------------------


def test_our_own_files_in_and_out(file):
    names = ["bool", "int8", "uint8", "int16", "int32", "int64", "uint64", *FLOATS, "complex64"]
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (), (0, 2)]
    params = {
        "layer": {n: [random_leaf(rng, n, shape, 0.8) for shape in shapes] for n in [*names, "float8_e4m3fn"]}
    }
    size = jp.io.save_safetensors(file, params, metadata={"step": "7"})
    assert size == file.stat().st_size
    got = jp.io.load_safetensors(file, like=params)
    assert got.metadata == {"step": "7"}
    jax.tree.map(same_bits, got.params, params)
    assert jp.leaf_paths(jp.io.load_safetensors(file).params) == jp.leaf_paths(params)

    masks = {"w": np.array([True, False]), "b": np.ones(1, bool)}
    jp.io.save_safetensors(file, {"w": np.array([-1.0, np.nan], np.float32), "b": leaf(-0.0)}, masks)
    theirs = safetensors.numpy.load_file(file)
    same_bits(theirs["w"], np.array([-1.0, 0.0], np.float32))
    same_bits(theirs["b"], leaf(-0.0))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_files_of_the_formats_own_library_come_back_to_the_byte(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tensors")
    part = st.text("abcé_0", min_size=1, max_size=3)
    names = data.draw(
        st.lists(st.lists(part, min_size=2, max_size=3).map(".".join), unique=True, min_size=1, max_size=6)
    )
    names = [f"{name}.leaf{at}" for at, name in enumerate(names)]
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    dtypes = sorted(set(NAMES.values()) - {"float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"})
    tensors = {
        name: random_leaf(rng, data.draw(st.sampled_from(dtypes)), data.draw(st.sampled_from(SHAPES)), 0.9)
        for name in names
    }
    metadata = data.draw(st.none() | st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    write(folder / "a.safetensors", tensors, metadata)
    got = jp.io.load_safetensors(folder / "a.safetensors")
    leaves = by_path(got.params)
    assert leaves.keys() == {name.replace(".", "/") for name in tensors}
    for name, array in tensors.items():
        same_bits(leaves[name.replace(".", "/")], array)
    assert got.metadata == (metadata or {})
    jp.io.save_safetensors(folder / "b.safetensors", got.params, layout=got.layout)
    theirs = safetensors.deserialize((folder / "b.safetensors").read_bytes())
    assert sorted(theirs, key=str) == sorted(
        safetensors.deserialize((folder / "a.safetensors").read_bytes()), key=str
    )
    again = jp.io.load_safetensors(folder / "b.safetensors")
    assert (again.metadata, again.layout.names) == (got.metadata, got.layout.names)


SHAPES = [(), (0,), (3,), (2, 3), (2, 0, 1)]


def test_one_file_and_shards_come_back_as_the_same_bytes(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "model.safetensors", llama(rng, "float16"), {"format": "pt"})
    shards(tmp_path / "many", rng)
    for name in ("one", "many"):
        got = jp.io.load_safetensors(tmp_path / name)
        size = jp.io.save_safetensors(tmp_path / "out" / name, got.params, layout=got.layout)
        assert bytes_of(tmp_path / "out" / name) == bytes_of(tmp_path / name)
        assert size == sum(map(len, bytes_of(tmp_path / name).values()))
    index = tmp_path / "many" / INDEX
    jax.tree.map(same_bits, jp.io.load_safetensors(index).params, jp.io.load_safetensors(index.parent).params)


def test_tensors_that_the_index_leaves_out_are_read_and_written(tmp_path):
    tensors = shards(tmp_path / "in", np.random.default_rng(0))
    content = json.loads((tmp_path / "in" / INDEX).read_text())
    del content["weight_map"]["lm_head.weight"]
    (tmp_path / "in" / INDEX).write_text(json.dumps(content))
    got = jp.io.load_safetensors(tmp_path / "in")
    same_bits(got.params["lm_head"]["weight"], tensors["lm_head.weight"])
    jp.io.save_safetensors(tmp_path / "out", got.params, layout=got.layout)
    again = json.loads((tmp_path / "out" / INDEX).read_text())
    assert again["weight_map"].keys() == tensors.keys()


def test_a_folder_is_read_as_transformers_reads_it_and_never_shows_older_weights(tmp_path):
    shards(tmp_path / "many", np.random.default_rng(0))
    (tmp_path / "one").mkdir()
    write(tmp_path / "one" / "model.safetensors", {"a.w": np.ones(2, np.float32)})
    write(tmp_path / "other.safetensors", {"a.w": np.ones(2, np.float32)})
    many, one = (jp.io.load_safetensors(tmp_path / name) for name in ("many", "one"))
    other = jp.io.load_safetensors(tmp_path / "other.safetensors")
    before = bytes_of(tmp_path / "one"), bytes_of(tmp_path / "many")
    for saved, folder, first in ((many, "one", "model.safetensors"), (other, "many", INDEX)):
        with pytest.raises(ValueError, match=f"{folder} holds {first}, which would be read in place of"):
            jp.io.save_safetensors(tmp_path / folder, saved.params, layout=saved.layout)
    assert (bytes_of(tmp_path / "one"), bytes_of(tmp_path / "many")) == before
    jp.io.save_safetensors(tmp_path / "many", one.params, layout=one.layout)  # goes before the index
    same_bits(jp.io.load_safetensors(tmp_path / "many").params["a"]["w"], np.ones(2, np.float32))


def test_kernels_and_where_see_the_names(tmp_path):
    shards(tmp_path, np.random.default_rng(0))
    params = jp.io.load_safetensors(tmp_path).params
    same_bits(params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"], by_path(params)[UP])
    masks = jp.prune_once(
        params, jp.scores.random, 0.5, key=jax.random.key(0), where=jp.matching("*/up_proj/*")
    )
    pruned = [path for path, mask in by_path(masks).items() if not np.asarray(mask).all()]
    assert UP in pruned and all("up_proj" in path for path in pruned)


UP = "model/layers/0/mlp/up_proj/weight"


def test_only_pruned_entries_change_and_the_files_read_from_may_be_replaced(tmp_path):
    tensors = shards(tmp_path, np.random.default_rng(0))
    got = jp.io.load_safetensors(tmp_path)
    masks = jax.tree.map(lambda a: np.ones(a.shape, bool), got.params)
    layer = masks["model"]["layers"]["0"]["mlp"]["up_proj"]
    layer["weight"] = np.random.default_rng(1).random((4, 4)) < 0.5
    jp.io.save_safetensors(tmp_path, got.params, masks, layout=got.layout)
    after = {}
    for file in tmp_path.glob("*.safetensors"):
        after |= safetensors.numpy.load_file(file)
    assert after.keys() == tensors.keys()
    for name, array in tensors.items():
        wanted = array.copy()
        if name.replace(".", "/") == UP:
            wanted[~layer["weight"]] = 0
        same_bits(after[name], wanted)
    for path, array in by_path(got.params).items():  # what was loaded is what it was
        same_bits(array, tensors[path.replace("/", ".")])


def test_layers_that_are_left_out_and_other_shapes(tmp_path):
    tensors = shards(tmp_path / "in", np.random.default_rng(0))
    got = jp.io.load_safetensors(tmp_path / "in")
    names = {n: n.replace("layers.1", "layers.0") for n in tensors if "layers.0" not in n}
    params = dict(
        got.params, model=dict(got.params["model"], layers={"0": got.params["model"]["layers"]["1"]})
    )
    params["lm_head"] = {"weight": jnp.ones((3, 4), jnp.bfloat16)}
    jp.io.save_safetensors(tmp_path / "out", params, layout=got.layout.renamed(names))
    again = jp.io.load_safetensors(tmp_path / "out")
    assert set(again.layout.names.values()) == set(names.values())
    same_bits(
        again.params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"],
        tensors["model.layers.1.mlp.up_proj.weight"],
    )
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    total = sum(array.nbytes for array in by_path(params).values())
    entries = sum(array.size for array in by_path(params).values())
    assert index["metadata"] == {"total_parameters": entries, "total_size": total, "by": "x"}
    assert index["weight_map"].keys() == set(names.values())
    with pytest.raises(ValueError, match=r"given nothing, which the layout does not hold"):
        got.layout.renamed({"nothing": "x"})
    with pytest.raises(ValueError, match="two tensors the same name"):
        got.layout.renamed(dict.fromkeys(list(names)[:2], "x"))


def test_loading_maps_the_file_and_saving_holds_no_copy(file):
    code = (
        "import sys, numpy as np, jaxprune as jp\n"
        "from pathlib import Path\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "a = np.zeros((100, 100), np.float32)\n"
        "jp.io.save_safetensors(sys.argv[2], {'a': a}, {'a': a == 0})\n"  # what is imported at a first call
        "before = peak()\n"
        "got = jp.io.load_safetensors(sys.argv[1])\n"
        "assert got.params['w0'].shape == (2_000_000,) and not got.params['w0'].flags.writeable\n"
        "print(peak() - before)\n"
        "params = {n: np.broadcast_to(np.float32(1), (2_000_000,)) for n in got.params}\n"
        "masks = {n: np.broadcast_to(True, (2_000_000,)) for n in got.params}\n"
        "jp.io.save_safetensors(sys.argv[2], params, masks)\n"
        "print(peak() - before)\n"
    )
    jp.io.save_safetensors(file, {f"w{i}": np.zeros(2_000_000, np.float32) for i in range(16)})
    options = [sys.executable, "-c", code, file, file.with_name("out")]
    loading, saving = map(
        int, subprocess.run(options, capture_output=True, text=True, check=True).stdout.split()
    )
    assert loading < 4_000  # KiB, of a file of 125,000
    assert saving < 50_000


# --- what is refused ----------------------------------------------------------------------------------------


def test_a_file_that_does_not_fit_like(file):
    write(file, {"layer.0.weight": np.ones((2, 3), np.float32)})
    assert jp.io.load_safetensors(file).params["layer"]["0"]["weight"].shape == (2, 3)
    same = {"layer.0.weight": jnp.zeros((2, 3))}
    assert jp.io.load_safetensors(file, like=same).params["layer.0.weight"].sum() == 6
    with pytest.raises(jp.io.FileError, match=r"Missing from like: layer/0/weight. Only in like: w"):
        jp.io.load_safetensors(file, like={"w": leaf(1)})
    with pytest.raises(
        jp.io.FileError, match=r"'layer.0.weight' is float32\[2, 3\], but float32\[1\] in like"
    ):
        jp.io.load_safetensors(file, like={"layer.0.weight": leaf(1)})
    with pytest.raises(TypeError, match=r"params\['w'\] is int4\[2\]; safetensors holds bool"):
        jp.io.save_safetensors(file, {"w": jnp.ones(2, jnp.int4)})
    with pytest.raises(TypeError, match="metadata of safetensors is strings by strings"):
        jp.io.save_safetensors(file, {"w": leaf(1)}, metadata={"step": 7})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"__metadata__": leaf(1)}, r"params\['__metadata__'\]: the name of its tensor is"),
        ({"\ud800": leaf(1)}, "the name of its tensor holds half of a surrogate pair"),
        ({"/".join("a" * 101): leaf(1)}, "the name of its tensor has 101 parts, and 100 are allowed"),
        ({"a.b": leaf(1), "a": {"b": leaf(2)}}, r"params\['a/b'\] and params\['a.b'\] would be read as one"),
    ],
)
def test_names_that_could_not_be_read_again(file, params, message):
    with pytest.raises(ValueError, match=message):
        jp.io.save_safetensors(file, params)
    with pytest.raises(TypeError, match="metadata of safetensors is strings by strings, in Unicode"):
        jp.io.save_safetensors(file, {"a": leaf(1)}, metadata={"\ud800": "x"})
    assert not file.exists()


def test_params_that_do_not_fit_the_layout(tmp_path):
    shards(tmp_path / "in", np.random.default_rng(0))
    params, _, layout = jp.io.load_safetensors(tmp_path / "in")
    less = {"model": params["model"], "extra": leaf(1)}
    with pytest.raises(ValueError, match=r"missing from params: lm_head/weight; only in params: extra"):
        jp.io.save_safetensors(tmp_path / "out", less, layout=layout)
    wide = jax.tree.map(lambda a: a.astype(np.float32), params)
    with pytest.raises(
        ValueError, match=r"weight'\] is float32\[8, 4\], but bfloat16 in the checkpoint\. Cast"
    ):
        jp.io.save_safetensors(tmp_path / "out", wide, layout=layout)
    with pytest.raises(ValueError, match=r"the layout is of 2 files and an index, and .*one file"):
        jp.io.save_safetensors(tmp_path / "out.safetensors", params, layout=layout)
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / INDEX).unlink(),
            "holds 2 safetensors files and no",
        ),
        (
            lambda folder: next(folder.glob("*1-of*")).unlink(),
            "it names model-00001-of-00002.safetensors, which",
        ),
        (
            lambda folder: os.truncate(next(folder.glob("*2-of*")), 300),
            r"model-00002.*(cut short|not a safe)",
        ),
        (
            lambda folder: edit(folder, "lm_head.weight", "../x"),
            r"lm_head.weight' lies in '../x', which is not",
        ),
        (
            lambda folder: edit(folder, "ghost", "model-00001-of-00002.safetensors"),
            "it has no ghost, which the",
        ),
        (lambda folder: edit(folder, None, None), "it has no weight_map"),
        (
            lambda folder: (folder / INDEX).write_text('{"weight_map": {}, "weight_map": {}}'),
            "index.json: it cannot be read: a key occurs twice",
        ),
        (
            lambda folder: write(next(folder.glob("*1-of*")), llama(np.random.default_rng(0))),
            "00002-of-00002.*is a second tensor of the path",
        ),
    ],
)
def test_a_damaged_folder(tmp_path, damage, message):
    shards(tmp_path, np.random.default_rng(0))
    damage(tmp_path)
    with pytest.raises(jp.io.FileError, match=message):
        jp.io.load_safetensors(tmp_path)


def edit(folder, name, file):
    index = folder / INDEX
    content = json.loads(index.read_text())
    if name is None:
        del content["weight_map"]
    else:
        content["weight_map"][name] = file
    index.write_text(json.dumps(content))


def test_an_empty_folder_and_things_that_are_no_files(tmp_path):
    with pytest.raises(jp.io.FileError, match="holds no safetensors file and no"):
        jp.io.load_safetensors(tmp_path)
    with pytest.raises(FileNotFoundError):
        jp.io.load_safetensors(tmp_path / "nothing")
    with pytest.raises(jp.io.FileError, match="not a file, but a pipe or a device"):
        jp.io.load_safetensors("/dev/null")
    with pytest.raises(TypeError, match=r"a path must be a str or a pathlib\.Path, got 3"):
        jp.io.load_safetensors(3)


def entry(dtype="F32", shape=(2,), begin=0, end=8, **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end], **more}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(shape=(3,))}, "is F32 of shape .3., so of 12 bytes, but has 8"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, "'b' overlaps 'a'"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, "'b' leaves a hole after 'a'"),
        ({"a": entry(begin=4, end=12)}, "'a' leaves a hole after the header"),
        ({"a": entry(begin=8, end=0)}, "but has -8"),
        ({"a": entry(begin=-8, end=0)}, "has data_offsets"),
        ({"a": entry(shape=(2**40, 2**40))}, "a shape that no machine holds"),
        ({"a": entry(shape=(-2,))}, "has the shape"),
        ({"a": entry(shape=(1,) * 65)}, "has 65 axes"),
        ({"a": entry(dtype="F3")}, "is of dtype F3, which is not read"),
        ({"a": entry(dtype=3)}, "has a dtype that is no text"),
        ({"a": entry(extra=1)}, "is described by"),
        ({"a": 1}, "is not described by an object"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "its __metadata__ is not texts by text"),
        ([], "its header is a list"),
        (b'{"a": 1, "a": 2}', "a key occurs twice"),
        ({"a": entry(), "\ud800": entry(shape=(0,), begin=8)}, "name holds half of a surrogate pair"),
        ({".".join("a" * 50_000): entry()}, "name has 50000 parts, and 100 are allowed"),
        (b"[" * 100_000, "its header cannot be read"),
        (b"\xff", "its header cannot be read"),
        ({"a": entry(), "a.b": entry(shape=(0,), begin=8)}, "'a/b' is a tensor, and so is"),
        ({"a.b": entry(), "a/b": entry(shape=(0,), begin=8)}, "is a second tensor of the path 'a/b'"),
        ({"a": entry("BOOL", (8,))}, "'a' is of bools, and has bytes"),
        ({}, "describes 10 bytes, but it has 18: something was added"),
    ],
)
def test_a_hostile_header(file, header, message):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\7" * 8)
    with pytest.raises(jp.io.FileError, match=message) as raised:
        jp.io.load_safetensors(file)
    assert "model.safetensors: " in str(raised.value)


def test_every_truncation_is_refused(file):
    write(file, {"layer.0.weight": np.ones((2, 3), np.float32)})
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        with pytest.raises(jp.io.FileError, match=r"model\.safetensors: "):
            jp.io.load_safetensors(file)
    file.write_bytes((2**63).to_bytes(8, "little") + whole[8:])
    with pytest.raises(jp.io.FileError, match="cut short"):
        jp.io.load_safetensors(file)


# --- a disk that is full ------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path):
    shards(tmp_path, np.random.default_rng(0))
    before = bytes_of(tmp_path)
    code = (
        "import resource, signal, sys, jax, numpy as np, jaxprune as jp\n"
        "got = jp.io.load_safetensors(sys.argv[1])\n"
        "large = jax.tree.map(lambda a: np.zeros((100_000, *a.shape[1:]), a.dtype), got.params)\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try:\n    jp.io.save_safetensors(sys.argv[1], large, layout=got.layout)\n"
        "except OSError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert bytes_of(tmp_path) == before


@pytest.mark.parametrize("fails_at", [0, 1, 4])
def test_a_write_that_fails_in_any_file_changes_no_file(tmp_path, monkeypatch, fails_at):
    shards(tmp_path / "in", np.random.default_rng(0))
    before = bytes_of(tmp_path / "in")
    got = jp.io.load_safetensors(tmp_path / "in")
    params = jax.tree.map(lambda a: a + 1, got.params)
    chunks, calls = tensors._chunks, []

    def full(*leaf):
        calls.append(leaf)
        if len(calls) > fails_at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return chunks(*leaf)

    monkeypatch.setattr(tensors, "_chunks", full)
    for folder in (tmp_path / "in", tmp_path / "new" / "out"):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            jp.io.save_safetensors(folder, params, layout=got.layout)
    assert bytes_of(tmp_path / "in") == before
    assert [file.name for file in tmp_path.iterdir()] == ["in"]
