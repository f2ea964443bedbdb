"""magika in the study of networks that others have trained: its own weights, on files of Python's library."""

import importlib.util
import json
import shutil
import sys
import sysconfig
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from experiments.data.datasets import DataUnavailable
from experiments.pretrained import magika, network, study
from experiments.run.limits import FlagError
from tests.studies.outcomes import check_width, read

installed = {each.name.lower() for each in metadata.distributions()}
pytestmark = pytest.mark.skipif(
    not installed.issuperset({"magika", "onnx"}), reason="needs the extra `pretrained`: magika and onnx"
)
PREFIX = "jax2tf_get_logits_/pjit_get_logits_/MagikaV2/"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of two types, some of them the same, short or full of white space."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    for number in range(20):
        lines = [f"def f{number}(x{place}):\n    return x{place}\n\n" for place in range(1 + 30 * number)]
        (folder / f"m{number}.py").write_text("\n \t" * (number % 3) + "".join(lines))
        found = {f"key{key}": rng.integers(0, 99, 4).tolist() for key in range(1 + 20 * number)}
        (folder / f"d{number}.json").write_text(json.dumps(found, indent=2) + "\n" * (number % 4))
    (folder / "same.py").write_bytes((folder / "m3.py").read_bytes())
    (folder / "short.py").write_text("x = 1")
    (folder / "white.py").write_text(" " * 5000 + "x = 1")
    (folder / "link.json").symlink_to(folder / "d1.json")
    (folder / "header.h").write_text("int f(void);\n")
    return folder


@pytest.fixture(scope="module")
def params():
    return magika.read_params()


@pytest.fixture(scope="module")
def model():
    import onnx

    found = onnx.load(network.file_of("magika", f"{magika.MODEL}/model.onnx"))
    found.graph.output.append(onnx.helper.make_tensor_value_info(f"{PREFIX}Dense_1/AddV2:0", 1, None))
    return found


@pytest.fixture(scope="module")
def tokens():
    """Files of Python's library, small and large, and one that is no text."""
    library = sysconfig.get_path("stdlib")
    paths = [f"{library}/{name}.py" for name in ("this", "argparse", "bisect", "__future__")]
    return np.stack([magika.tokens_of(path) for path in (*paths, sys.executable)])


def doubled(model):
    """Return the model of the file in double precision."""
    import onnx

    found = onnx.ModelProto()
    found.CopyFrom(model)
    for array in found.graph.initializer:
        if array.data_type == onnx.TensorProto.FLOAT:
            values = onnx.numpy_helper.to_array(array).astype(np.float64)
            array.CopyFrom(onnx.numpy_helper.from_array(values, array.name))
    for node in found.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == onnx.TensorProto.FLOAT:
                attribute.i = onnx.TensorProto.DOUBLE
    return found


@pytest.fixture(scope="module")
def exact(model, tokens):
    """Probabilities and logits of the file's model in double precision, computed by onnx in numpy."""
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class GlobalMaxPool(OpRun):
        """The one that comes with onnx takes the maximum over the channels where the input has three axes."""

        def _run(self, x):
            return (x.max(axis=2, keepdims=True),)

    return ReferenceEvaluator(doubled(model), new_ops=[GlobalMaxPool]).run(None, {"bytes": tokens})


def test_the_function_is_that_of_the_file_and_nearer_to_it_than_the_runtime(model, exact, params, tokens):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString())
    theirs = session.run([f"{PREFIX}Dense_1/AddV2:0"], {"bytes": tokens})[0]
    own = np.asarray(magika.apply_fn(params, tokens))
    np.testing.assert_allclose(own, exact[1], rtol=0, atol=5e-5)
    # The file takes a variance as E[x^2] - E[x]^2, which cancels where few of the bytes differ.
    np.testing.assert_allclose(theirs, exact[1], rtol=0, atol=2e-2)
    assert np.abs(own - exact[1]).max() < np.abs(theirs - exact[1]).max()
    np.testing.assert_array_equal(own.argmax(-1), theirs.argmax(-1))
    names = [magika.read_labels()[place] for place in own.argmax(-1)]
    assert names == ["python"] * 4 + ["elf"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 784_214


def test_bytes_are_read_as_the_package_reads_them(files):
    """The package's function is made of its source: to import the package needs its other dependencies."""
    source = network.file_of("magika", "magika/magika.py").read_text()
    seekable = network.file_of("magika", "magika/types/seekable.py")
    spec = importlib.util.spec_from_file_location("seekable", seekable)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    start = source.index("    @staticmethod\n    def _extract_features_from_seekable")
    end = source.index("    def _get_model_outputs_from_features")
    names = {"Seekable": module.Seekable, "ModelFeatures": dict, "List": list}
    exec("class Magika:\n" + source[start:end], names)
    config = json.loads(network.file_of("magika", f"{magika.MODEL}/config.min.json").read_text())
    sizes = [config[f"{name}_size"] for name in ("beg", "mid", "end")]
    more = [config[name] for name in ("padding_token", "block_size", "use_inputs_at_offsets")]
    seen = 0
    for path in [*sorted(files.iterdir()), network.file_of("magika", f"{magika.MODEL}/model.onnx")]:
        with open(path, "rb") as file:
            wanted = names["Magika"]._extract_features_from_seekable(module.Seekable(file), *sizes, *more)
        own = magika.tokens_of(path)
        if wanted["beg"][config["min_file_size_for_dl"] - 1] == config["padding_token"]:
            assert own is None
        else:
            np.testing.assert_array_equal(own, wanted["beg"] + wanted["end"])
            seen += 1
    assert seen >= 40


def test_an_extension_means_the_type_that_the_package_gives_it():
    known = json.loads(network.file_of("magika", "magika/config/content_types_kb.min.json").read_text())
    labels = set(magika.read_labels())
    for name, extensions in magika.EXTENSIONS.items():
        assert name in labels
        for extension in {*extensions} - {"so", "cxx"}:
            owners = {other for other, about in known.items() if extension in about["extensions"]}
            assert owners & labels == {name}, extension


def test_files_differ_and_no_set_has_one_of_another(files):
    found = magika.Files([str(files), str(files)], 20)
    assert found.counts == {"json": 20, "python": 23}
    rows = found.tokens.reshape(-1, 2048)
    assert len(np.unique(rows, axis=0)) == len(rows) == 40
    again = magika.Files([str(files)], 20)
    assert again.fingerprint == found.fingerprint != magika.Files([str(files)], 19).fingerprint
    loaded = magika.load(5, 2, 3, [str(files)])
    sets = [found.tokens[:5], *(batch for draw in range(5) for (batch,) in loaded.calibration(draw).batches)]
    rows = np.concatenate([each.reshape(-1, 2048) for each in sets])
    assert len(np.unique(rows, axis=0)) == len(rows) == 2 * (5 + 5 * 2)
    with pytest.raises(FlagError, match="--draws: 5 calibration sets at most, got 6"):
        loaded.calibration(5)


def test_the_convolution_is_calibrated_on_each_of_its_places(files):
    loaded = magika.load(1, 1, 1, [str(files)])
    batches, _ = loaded.calibration(0)
    ((layer,),) = [jp.calibrate(loaded.apply_fn, loaded.params, batches).layers("conv/kernel")]
    assert int(layer.rows[0]) == 2 * 508


def test_the_study(files, tmp_path, capsys):
    own_files = tmp_path / "files"
    shutil.copytree(files, own_files, symlinks=True)
    flags = f"--network magika --files {own_files} --draws 1 --test-size 2 --examples 1 --more 1 --no-times"
    flags = f"{flags} --parts entries --sparsities 0.5 --methods magnitude --out {tmp_path}/out".split()
    study.main(flags)
    printed = capsys.readouterr().out
    check_width(printed, tmp_path)
    assert "json 20, python 23" in " ".join(printed.split())
    dense, line = read(tmp_path / "out")
    assert dense["changed"] == dense["gap"] == 0
    kept = {path: left for path, (left, _) in line["layers"].items()}
    assert kept["conv/kernel"] * 2 == 5 * 256 * 512
    assert kept["head/kernel"] == 512 * 214

    # The figures are those of the file's weights with the smallest half of the kernel set to 0 by numpy.
    params = jax.tree.map(np.array, magika.read_params())
    kernel = params["conv"]["kernel"]
    kernel.flat[np.argsort(np.abs(kernel), axis=None, kind="stable")[: kernel.size // 2]] = 0
    tested = magika.Files([str(files)], 7).tokens[:2].reshape(-1, 2048)
    truth = np.array([magika.read_labels().index(name) for name in ("json", "python")] * 2)
    own, before = (
        magika.apply_fn(each, jnp.asarray(tested)).argmax(-1) for each in (params, magika.read_params())
    )
    assert line["error"] == np.mean(own != truth)
    assert line["changed"] == np.mean(own != before)
    assert "magika" not in sys.modules

    other = ["3" if flag == "2" else flag for flag in flags]
    with pytest.raises(SystemExit, match="--fresh"):
        study.main(other)
    for path in own_files.glob("*.py"):
        path.write_text(f"# {path.stem}\n{path.read_text()}")
    with pytest.raises(SystemExit, match=r"results of other data.*--fresh"):
        study.main(flags)


def test_what_cannot_be_judged_is_refused(files, monkeypatch):
    with pytest.raises(DataUnavailable, match=r"No type has 40 different files in .*Give more folders"):
        magika.Files([str(files)], 40)
    with pytest.raises(FlagError, match="--files: g2p reads no files"):
        study.Config(files=("/usr/share",))
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(DataUnavailable, match=r"onnx is not installed.*jaxprune\[pretrained\]"):
        magika.read_params()
