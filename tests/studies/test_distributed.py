"""The study of sharded training: one device, several, and several processes give the same masks."""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.distributed import sharded_training, study
from experiments.distributed.launch import launch
from experiments.run import settings
from tests.studies.outcomes import check_width

TINY = (
    "--steps 6 --batch-size 4 --parts 2 --context 8 --dim 16 --depth 1 --heads 2 --hidden 16 --mask-updates 2"
)


def test_masks_do_not_depend_on_devices_or_processes(tmp_path, capsys):
    out = tmp_path / "check"
    flags = f"{TINY} --devices 2 --processes 2 --reproducible --check --sparsity 0.75 --out {out}"
    study.main(flags.split())
    table = capsys.readouterr().out
    check_width(table)
    assert "masks of the same params: the same to the bit" in table
    config = settings.parse(study.Config, flags.split())
    lines = [study.line_of(out / layout.name) for layout in study.layouts(config)]
    assert [(line["devices"], line["processes"]) for line in lines] == [(1, 1), (2, 1), (2, 2)]
    for line in lines:
        # A kernel is 16 x 16: of the attention 4, of the MLP 3; and the head's, of each character a column.
        kernels = {path: size for path, size in line["layers"].items() if path.endswith("kernel")}
        total = sum(size for _, size in kernels.values())
        assert total == 7 * 16 * 16 + kernels["head/kernel"][1]
        assert sum(kept for kept, _ in kernels.values()) == total - round(0.75 * total)
        assert line["programs"] == 1
        for name in ("first_params", "last_params", "last_masks", "probe_first.jp", "probe_last.jp"):
            assert line[name] == lines[0][name], (line["devices"], line["processes"], name)
    assert lines[0]["first_params"] != lines[0]["last_params"]
    # The settings repeat a run.
    repeated = settings.parse(study.Config, ["--recipe", str(out / "processes" / "recipe.yaml")])
    assert repeated.steps == 6
    assert repeated.processes == 2


def sleeper(file):
    script = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    return [sys.executable, "-c", script]


def ends(file, how):
    """Ends in some way, when the other process is there."""
    wait = f"import os, sys, time\nwhile not os.path.exists({str(file)!r}): time.sleep(.02)\n"
    return [sys.executable, "-c", wait + how]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("sys.exit('the disk is full')", r"process 1 of 2 ended with code 1.*\n.*the disk is full"),
        ("os.kill(os.getpid(), 9)", "process 1 of 2 was killed by SIGKILL; the others were stopped"),
    ],
    ids=["fails", "killed"],
)
def test_one_process_that_fails_ends_all(tmp_path, how, said):
    file, begun = tmp_path / "pid", time.monotonic()
    with pytest.raises(SystemExit, match=said):
        launch([sleeper(file), ends(file, how)])
    assert time.monotonic() - begun < 300
    with pytest.raises(ProcessLookupError):
        os.kill(int(file.read_text()), 0)


def test_settings_become_flags():
    config = study.Config(fsdp=4, tensor=2, reproducible=True, lr=1e-4, probe="a folder", out="x")
    assert settings.parse(study.Config, study.as_flags(config)) == config


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"fsdp": 2}, "--fsdp 2 times --tensor 1 is not the number of devices, 1"),
        ({"reproducible": True, "parts": 6}, "--parts 6 must be a power of 2"),
        ({"reproducible": True, "parts": 128}, "--parts 128 must be .* divide the batch"),
        ({"heads": 3}, r"--dim 64 cannot be shared out to 3 heads \(--heads\)"),
        ({"context": 10**6}, "--context 1000000 is too long for the text: it must be below"),
        ({"coordinator": "a:1"}, "needs both --coordinator and --process-id"),
        (
            {"devices": 3, "processes": 2, "process_id": 0, "coordinator": "a:1"},
            "--devices 3 cannot be shared",
        ),
    ],
    ids=["mesh", "parts", "batch", "heads", "context", "cluster", "devices"],
)
def test_what_cannot_be_is_said(changed, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        study.main(study.as_flags(study.Config(**changed, out=str(tmp_path / "out"))))


def test_params_that_the_mesh_does_not_divide():
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "tensor"))
    params = {"block1": {"up": {"kernel": jnp.ones((8, 6))}, "norm": {"scale": jnp.ones(8)}}}
    specs = sharded_training.param_specs(params, mesh)["block1"]
    assert (specs["up"]["kernel"], specs["norm"]["scale"]) == (P("data", "tensor"), P(None))
    params["block1"]["up"]["kernel"] = jnp.ones((8, 5))
    with pytest.raises(ValueError, match=r"axis 1 of block1/up/kernel, of shape \(8, 5\).* 2 devices"):
        sharded_training.param_specs(params, mesh)


def test_batches_are_pieces_of_the_text():
    ids = np.arange(100, dtype=np.uint8)
    mesh = sharded_training.make_mesh(1, 1)
    x, y = sharded_training.feed(ids, np.array([3, 50, 7]), 4, mesh)
    np.testing.assert_array_equal(x, [[3, 4, 5, 6], [50, 51, 52, 53], [7, 8, 9, 10]])
    np.testing.assert_array_equal(y, x + 1)
    assert x.dtype == jnp.int32


def test_reproducible_gradients_are_the_gradients():
    rng = np.random.default_rng(0)
    params = {"up/kernel": rng.normal(size=(6, 4)), "scale": rng.normal(size=4)}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    x, y = rng.integers(0, 6, size=(2, 8, 5))

    def loss(params, x, y):
        return jnp.mean((params["up/kernel"][x] * params["scale"] - y[..., None]) ** 2)

    mesh = sharded_training.make_mesh(1, 1)
    specs = {"up/kernel": P("data", None), "scale": P(None)}
    for parts in (1, 4, 8):
        gradients = jax.jit(sharded_training.reproducible_gradients(loss, mesh, specs, parts))
        value, grads = gradients(params, x, y)
        wanted_value, wanted = jax.value_and_grad(loss)(params, x, y)
        np.testing.assert_allclose(value, wanted_value, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), grads, wanted)


def test_the_text_that_comes_with_python():
    text = sharded_training.load_text("python_help")
    assert len(text.train) > 10 * len(text.validation) > 100_000
    said = "".join(text.vocabulary[i] for i in text.train[:100])
    assert said.startswith('The "assert" statement')
    assert max(text.train.max(), text.validation.max()) < len(text.vocabulary)


def test_fingerprints_tell_bits_paths_and_shapes():
    mask = np.zeros((2, 9), bool)
    other = mask.copy()
    other[1, 8] = True
    trees = [{"a": mask}, {"a": other}, {"b": mask}]
    trees += [{"a": mask.reshape(9, 2)}, {"a": mask.astype(np.float32)}]
    assert len(set(map(sharded_training.fingerprint, trees))) == len(trees)
    assert sharded_training.fingerprint({"a": jnp.asarray(mask)}) == sharded_training.fingerprint({"a": mask})
