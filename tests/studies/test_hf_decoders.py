"""Decoders of Hugging Face's layout: the logits of transformers' own classes, files both ways, and errors.

The checkpoints and logits in tests/data/hf are made by `python -m experiments.hf.golden make`.
"""

import filecmp
import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

import jaxprune as jp
from experiments.hf.golden import CASES, TOLERANCE
from experiments.hf.gpt2 import GPT2
from experiments.hf.llama import LLAMA, QWEN2
from experiments.hf.opened import open_model, write_model

DATA = Path(__file__).parents[1] / "data" / "hf"


def golden(name: str) -> dict[str, np.ndarray]:
    """The tokens and logits that transformers gave."""
    return dict(np.load(DATA / f"{name}.npz"))


@functools.cache
def computed(name: str) -> np.ndarray:
    """The logits of a checkpoint as it is."""
    model = open_model(DATA / name)
    return logits(model, model.params, golden(name)["tokens"])


def logits(model: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(model.apply_fn)(params, tokens))


def copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(DATA / name, folder / name))


def with_settings(folder: Path, **changes: Any) -> Path:
    """Change config.json; None takes a setting out."""
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return folder


def cut(tree: Any, change: Callable[[str, Any], Any]) -> Any:
    """The tree with each leaf changed by its path."""
    leaves = [
        change(path, leaf) for path, leaf in zip(jp.leaf_paths(tree), jax.tree.leaves(tree), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def fewer_units(params: Any, kept: int) -> Any:
    """The first units of Llama's FFN."""

    def change(path, leaf):
        if path.endswith(("gate/weight", "up/weight")):
            return leaf[:kept]
        return leaf[:, :kept] if path.endswith("down/weight") else leaf

    return cut(params, change)


def fewer_heads(params: Any, heads: int, key_heads: int) -> Any:
    """The first entries of Llama's queries, and of its keys and values."""

    def change(path, leaf):
        if path.endswith("query/weight"):
            return leaf[:heads]
        if path.endswith(("key/weight", "value/weight")):
            return leaf[:key_heads]
        return leaf[:, :heads] if path.endswith("out/weight") else leaf

    return cut(params, change)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
    expected = golden(name)["logits"]
    assert abs(expected).max() > 2  # so that the tolerance is near the rounding of float32
    np.testing.assert_allclose(computed(name), expected, rtol=0, atol=TOLERANCE)


def test_logits_computed_in_bfloat16_differ_by_its_rounding():
    found, depth = computed("llama-bf16"), CASES["llama-bf16"].settings["num_hidden_layers"]
    # transformers rounds to 8 bits about 20 times per layer; each time changes the logits by 2^-8 of their
    # size at most, to first order.
    bound = 20 * depth * 2**-8 * abs(found).max()
    difference = abs(found - golden("llama-bf16")["logits_bfloat16"]).max()
    assert TOLERANCE < difference < bound


@pytest.mark.parametrize("name", ["llama", "gpt2-body"])
def test_stacked_layers_are_the_same_function(name):
    tokens = golden(name)["tokens"]
    model = open_model(DATA / name, stacked=True)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(model.params["layers"])} == {model.config.depth}
    np.testing.assert_allclose(
        logits(model, model.params, tokens), golden(name)["logits"], rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_written_as_it_was_read(name, stacked, tmp_path):
    model = open_model(DATA / name, stacked)
    write_model(tmp_path / "out", model, model.params)
    files = sorted(file.name for file in (DATA / name).iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == files
    assert filecmp.cmpfiles(DATA / name, tmp_path / "out", files, shallow=False) == (files, [], [])


def test_masks_write_zeros_and_leave_the_rest(tmp_path):
    model = open_model(DATA / "llama-bf16")
    masks = jp.prune_once(model.params, jp.scores.magnitude, sparsity=0.5)
    write_model(tmp_path / "out", model, model.params, masks)
    written = open_model(tmp_path / "out")
    expected = jp.apply_masks(model.params, masks)
    for path, leaf, other in zip(
        jp.leaf_paths(expected), jax.tree.leaves(expected), jax.tree.leaves(written.params), strict=True
    ):
        assert other.dtype == ml_dtypes.bfloat16
        assert np.asarray(leaf).tobytes() == other.tobytes(), path
    assert 0.4 < np.mean(written.params["layers"][0]["query"]["weight"] == 0) < 0.6


def test_a_smaller_network_is_read_as_the_same_function(tmp_path):
    model, tokens = open_model(DATA / "llama"), golden("llama")["tokens"]
    params = fewer_heads(fewer_units(model.params, 16), 12, 6)
    params = params | {"layers": params["layers"][1:]}
    write_model(tmp_path / "out", model, params, layers=(1,))
    written = open_model(tmp_path / "out")
    config = written.config
    assert (config.depth, config.hidden, config.heads, config.key_heads, config.head) == (1, 16, 2, 1, 6)
    np.testing.assert_array_equal(logits(written, written.params, tokens), logits(model, params, tokens))


def test_tensors_that_the_function_does_not_read_go_with_their_layer(tmp_path):
    model = open_model(DATA / "gpt2-body")
    assert sorted(model.extra) == [
        f"h.{number}.attn.{name}" for number in (0, 1) for name in ("bias", "masked_bias")
    ]
    write_model(tmp_path / "out", model, model.params | {"layers": model.params["layers"][1:]}, layers=[1])
    written = open_model(tmp_path / "out")
    assert sorted(written.extra) == ["h.0.attn.bias", "h.0.attn.masked_bias"]
    assert written.json == model.json | {"n_layer": 1}


def test_units_of_gpt2_are_said_by_n_inner():
    settings = {"vocab_size": 5, "n_embd": 4, "n_head": 2, "n_layer": 1, "n_inner": None}
    layer = {"qkv": {"weight": np.zeros((4, 12))}, "up": {"weight": np.zeros((4, 16))}}
    assert GPT2.with_sizes(settings, {"layers": [layer]}) == settings
    layer = layer | {"up": {"weight": np.zeros((4, 7))}}
    assert GPT2.with_sizes(settings, {"layers": [layer]}) == settings | {"n_inner": 7}
    layer = layer | {"qkv": {"weight": np.zeros((4, 6))}}
    with pytest.raises(ValueError, match="1 heads of 2 cannot be said by GPT-2"):
        GPT2.with_sizes(settings, {"layers": [layer]})


def test_old_and_new_settings_of_rotary_positions_are_one():
    sizes = {"vocab_size": 5, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2}
    scaling = {"type": "linear", "factor": 2}
    old = LLAMA.configure(sizes | {"rope_theta": 500, "rope_scaling": scaling})
    new = LLAMA.configure(
        sizes | {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 500}}
    )
    assert old == new
    assert LLAMA.configure(sizes).theta == 10_000


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"model_type": "mamba"}, r"'mamba'; known: llama, .*gpt2.*configure.*tensors.*apply"),
        ("llama", {"hidden_size": None}, "no 'hidden_size'"),
        ("llama", {"num_hidden_layers": 2.5}, "'num_hidden_layers' must be of type int, got 2.5"),
        ("llama", {"num_hidden_layers": 0}, "'num_hidden_layers' must be above 0"),
        ("llama", {"hidden_act": "mish"}, "'hidden_act' is 'mish', which is not implemented; known: 'silu'"),
        ("llama", {"num_key_value_heads": 3}, "must be a multiple of 'num_key_value_heads'"),
        ("llama", {"head_dim": 5}, "'head_dim' must be even"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn' in 'rope_parameters'"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "'partial_rotary_factor'"),
        ("llama", {"quantization_config": {"bits": 4}}, "the weights are packed"),
        ("llama", {"intermediate_size": 44}, r"is of shape \(40, 24\).*intermediate_size is 44, axis 0 40"),
        ("llama", {"num_hidden_layers": 3}, r"no tensor 'model.layers.2.*nearest names are: model.layers"),
        ("llama-tied", {"tie_word_embeddings": False}, "no tensor 'lm_head.weight'"),
        ("mistral", {"sliding_window": 4096}, "'sliding_window' must be null"),
        ("qwen2", {"use_sliding_window": True}, "'use_sliding_window' is True"),
        ("gpt2", {"n_head": 3}, r"'n_embd' \(32\) must be a multiple of 'n_head'"),
        ("gpt2", {"add_cross_attention": True}, "'add_cross_attention' is True"),
    ],
)
def test_what_is_not_this_function_is_refused(name, settings, message, tmp_path):
    folder = with_settings(copied(name, tmp_path), **settings)
    with pytest.raises(jp.io.FileError, match=message):
        open_model(folder)


def test_a_folder_without_settings_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(jp.io.FileError, match="no JSON"):
        open_model(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(jp.io.FileError, match="must hold an object, got list"):
        open_model(tmp_path)


def test_what_config_json_cannot_say_is_refused(tmp_path):
    model = open_model(DATA / "llama")
    params, out = model.params, tmp_path / "out"
    uneven = params | {"layers": [params["layers"][0], fewer_units(params, 8)["layers"][1]]}
    with pytest.raises(ValueError, match=r"differ in the size of 'gate': 40, 8. .* one 'intermediate_size'"):
        write_model(out, model, uneven)
    with pytest.raises(ValueError, match="hold 1 of 2 layers; say which"):
        write_model(out, model, params | {"layers": params["layers"][:1]})
    with pytest.raises(ValueError, match=r"layers must be 2 increasing numbers from 0 to 1.*got \(1, 0\)"):
        write_model(out, model, params, layers=(1, 0))
    with pytest.raises(ValueError, match=r"'layers/0/down/weight'\] is of shape .*intermediate_size is 8"):
        write_model(
            out, model, cut(params, lambda path, leaf: leaf[:8] if "gate" in path or "up" in path else leaf)
        )
    with pytest.raises(ValueError, match="params have adapter, which the files"):
        write_model(out, model, params | {"adapter": np.zeros(3)})
    with pytest.raises(ValueError, match="params have no 'norm/weight'"):
        write_model(out, model, {key: value for key, value in params.items() if key != "norm"})
    five = {"hidden_size": 20, "num_attention_heads": 5, "num_key_value_heads": 5, "num_hidden_layers": 1}
    five |= {"vocab_size": 5, "intermediate_size": 8}
    layer = {"query": np.zeros((12, 20)), "key": np.zeros((12, 20)), "gate": np.zeros((8, 20))}
    smaller = {"layers": [{name: {"weight": leaf} for name, leaf in layer.items()}]}
    with pytest.raises(ValueError, match=r"3 heads do not divide the width 20.*Keep 1 or 2 or 4 or 5 heads"):
        LLAMA.with_sizes(five, smaller)
    assert QWEN2.with_sizes(five | {"model_type": "qwen2"}, smaller)["num_attention_heads"] == 3
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_not_replaced(tmp_path):
    folder = copied("qwen2", tmp_path)
    model = open_model(folder)
    with pytest.raises(FileExistsError, match="is the folder of the model itself"):
        write_model(folder, model, model.params)
    with pytest.raises(FileExistsError, match="holds more than a checkpoint"):
        write_model(tmp_path, model, model.params)
    assert [file.name for file in tmp_path.iterdir()] == ["qwen2"]


def test_a_checkpoint_is_replaced_whole_or_stays(tmp_path, monkeypatch):
    model, out = open_model(DATA / "qwen2"), copied("qwen2", tmp_path)
    zeros = jax.tree.map(np.zeros_like, model.params)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            write_model(out, model, zeros)
    assert [file.name for file in tmp_path.iterdir()] == ["qwen2"]
    assert open_model(out).params["norm"]["weight"].any()
    write_model(out, model, zeros)
    assert [file.name for file in tmp_path.iterdir()] == ["qwen2"]
    assert not open_model(out).params["norm"]["weight"].any()


def test_text_beyond_the_positions_of_gpt2_is_refused():
    model = open_model(DATA / "gpt2")
    with pytest.raises(ValueError, match="49 tokens are more than the 48 positions"):
        model.apply_fn(model.params, np.zeros((1, 49), np.int32))


@pytest.mark.parametrize(("name", "stacked"), [("llama-tied", True), ("gpt2", False)])
def test_every_product_is_calibrated(name, stacked):
    model, tokens = open_model(DATA / name, stacked), golden(name)["tokens"]
    found = str(jp.calibrate(model.apply_fn, model.params, [(tokens,)]))
    layers = "qkv out up down" if name == "gpt2" else "query key value out gate up down"
    for number in range(model.config.depth):
        for layer in layers.split():
            path = f"layers/{layer}/weight[{number}]" if stacked else f"layers/{number}/{layer}/weight"
            assert path in found


@pytest.mark.parametrize(
    ("name", "units"), [("llama", {40, 2}), ("llama-bf16", {40, 4}), ("gpt2-body", {96, 4})]
)
def test_units_and_heads_are_found_in_each_layer(name, units):
    model, tokens = open_model(DATA / name), golden(name)["tokens"]
    groups = jp.channel_groups(model.apply_fn, model.params, tokens).inner()
    found = [group.units for group in groups]
    assert set(found) == units and len(found) == 4
