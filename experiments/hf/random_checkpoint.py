"""A decoder of random weights as a Hugging Face folder, written tensor by tensor to hold no more than one."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from experiments.hf.architecture import Tensor
from experiments.hf.llama import LLAMA

_SHARD = 2**29
"""The most bytes of a file, unless one tensor has more."""


def _settings(width: int, hidden: int, layers: int, heads: int, key_heads: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


SIZES = {
    "1b": _settings(2048, 5632, 20, 32, 4, 32000),  # TinyLlama's, with 20 of its 22 layers
    "20m": _settings(512, 2048, 5, 8, 2, 1024),
    "tiny": _settings(32, 96, 2, 4, 2, 64),
}
"""config.json by name."""


def num_params(settings: dict[str, Any]) -> int:
    """Return how many numbers the network has."""
    return sum(int(np.prod(shape)) for shape in LLAMA.shapes(LLAMA.configure(settings)).values())


def make(folder: Path, settings: dict[str, Any], seed: int = 0) -> None:
    """Write config.json and safetensors in bfloat16, complete or not at all.

    Matrices are uniform with variance 1 / inputs, so that activations neither grow nor fade; norms are 1.
    """
    new = folder.with_name(folder.name + ".partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    shards = _shards(LLAMA.tensors(LLAMA.configure(settings)))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for number, (name, tensors) in enumerate(zip(names, shards, strict=True)):
        _write_shard(new / name, tensors, np.random.default_rng([seed, number]))
    weights = {tensor.name: name for name, each in zip(names, shards, strict=True) for tensor in each}
    total = sum(_size(tensor) for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    (new / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (new / "config.json").write_text(json.dumps(settings, indent=2))
    new.rename(folder)


def _size(tensor: Tensor) -> int:
    return 2 * int(np.prod(tensor.shape))


def _shards(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(_size, shards[-1])) + _size(tensor) > _SHARD:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def _write_shard(file: Path, tensors: Sequence[Tensor], rng: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + _size(tensor)
        header[tensor.name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            out.write(_values(tensor, rng).astype(ml_dtypes.bfloat16).tobytes())


def _values(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    spread = np.float32((3 / tensor.shape[-1]) ** 0.5)
    return (2 * rng.random(tensor.shape, np.float32) - 1) * spread
