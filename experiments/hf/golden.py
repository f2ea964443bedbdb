"""Compare decoders with transformers' own classes: the command of the maintainers that makes tests/data/hf.

    python -m experiments.hf.golden make --out tests/data/hf
    python -m experiments.hf.golden compare

`make` writes small checkpoints with random weights, each by `save_pretrained`, and beside them their logits,
which the tests compare ours with. `compare` does so live, and lets transformers load what `write_model`
wrote: a network pruned to 2:4, and one with half of the FFN's units, half of the key heads with their
queries, and the last layer removed.

Both need the extra `peers` beside jax: pip install -e '.[peers]', which the environment of the tests does not
have, since it holds transformers 4, if any.
"""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from tqdm import tqdm

import jaxprune as jp
from experiments.hf.opened import Model, open_model, write_model
from experiments.show import tables

DATA = "tests/data/hf"
TOLERANCE = 1e-5
"""Of logits in float32, the largest of which are 2.5 to 3.8 here."""

_LENGTH = 40


class Case(NamedTuple):
    """A checkpoint that is made.

    Attributes:
      kind: the "model_type" of transformers.
      settings: of its config.
      dtype: of the weights.
      shard: the largest file.
      body: save the network without its head, whose names leave out a prefix, and with buffers that older
        versions of transformers kept in the file.
    """

    kind: str
    settings: Mapping[str, Any]
    dtype: str = "float32"
    shard: str = "1GB"
    body: bool = False


_SIZES = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_GPT2 = {
    "vocab_size": 40,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 48,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CASES = {
    "llama": Case("llama", _SIZES, shard="20KB"),
    "llama-tied": Case(
        "llama",
        _SIZES
        | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
        | {"hidden_size": 16, "head_dim": 8, "rope_parameters": _LLAMA3},
    ),
    "llama-bf16": Case(
        "llama",
        _SIZES
        | {"num_key_value_heads": 4}
        | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        dtype="bfloat16",
    ),
    "mistral": Case("mistral", _SIZES | {"hidden_size": 16, "head_dim": 8, "sliding_window": None}),
    "qwen2": Case("qwen2", _SIZES | {"hidden_size": 16, "intermediate_size": 24}),
    "gpt2": Case("gpt2", _GPT2 | {"n_inner": 40, "tie_word_embeddings": False}),
    "gpt2-body": Case("gpt2", _GPT2 | {"n_embd": 24}, body=True),
}


def make(out: str = DATA) -> None:
    """Write the checkpoints and their logits.

    Args:
      out: the folder.
    """
    _quiet()
    for name, case in CASES.items():
        folder = Path(out) / name
        shutil.rmtree(folder, ignore_errors=True)
        network = _made(case)
        (network.transformer if case.body else network).save_pretrained(folder, max_shard_size=case.shard)
        if case.body:
            _add_buffers(folder, network.config)
        tokens = np.random.default_rng(0).integers(0, network.config.vocab_size, (2, _LENGTH), np.int32)
        found: dict[str, Any] = {"tokens": tokens, "logits": _theirs(folder, "float32", tokens)}
        if case.dtype != "float32":
            found[f"logits_{case.dtype}"] = _theirs(folder, case.dtype, tokens)
        np.savez_compressed(folder.with_suffix(".npz"), **found)
        print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1000:.0f} kB")


def _made(case: Case) -> Any:
    """Return a network of transformers with random weights, large enough that its layers matter."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(case.kind, **case.settings)
    network = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in network.named_parameters():
        scales = weight.ndim == 1 and not name.endswith("bias")
        weight.data.normal_(1.0 if scales else 0.0, 0.2)
    return network.to(getattr(torch, case.dtype)).eval()


def _add_buffers(folder: Path, config: Any) -> None:
    """Add the causal masks that transformers kept in the file of GPT-2 before version 4.31."""
    import torch  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    for number in range(config.n_layer):
        square = torch.ones(1, 1, config.n_positions, config.n_positions, dtype=torch.uint8)
        tensors[f"h.{number}.attn.bias"] = torch.tril(square)
        tensors[f"h.{number}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, file, metadata={"format": "pt"})


def _quiet() -> None:
    import transformers  # pyright: ignore[reportMissingImports]

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


def _theirs(folder: str | Path, dtype: str, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of transformers, in float32, for a folder all of whose tensors it knows."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True
    )
    unknown = [name for name in report["unexpected_keys"] if not name.endswith(("attn.bias", "masked_bias"))]
    if unknown or report["missing_keys"] or report["mismatched_keys"]:
        raise SystemExit(f"{folder}: transformers reports {report}")
    with torch.no_grad():
        return network.eval()(torch.from_numpy(tokens).long()).logits.float().numpy()


def compare(data: str = DATA) -> None:
    """Compare our logits with those of transformers, for the checkpoints and for what we wrote.

    Args:
      data: the folder that `make` wrote.

    Raises:
      SystemExit: of status 1 if logits differ by more than 1e-5.
    """
    _quiet()
    rows = [("checkpoint", "network", "entries", "kept", "largest logit", "difference")]
    differences = []
    for name in tqdm(CASES):
        model = open_model(Path(data) / name)
        tokens = np.load(Path(data) / f"{name}.npz")["tokens"]
        networks = {
            "dense": model.params,
            "2:4": _two_of_four(model, tokens),
            "smaller": _smaller(model, tokens),
        }
        for title, params in networks.items():
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "written"
                write_model(out, model, params, layers=range(len(params["layers"])))
                theirs = _theirs(out, "float32", tokens)
            # Our function reads the numbers of heads and units off the weights: it takes the smaller ones.
            ours = np.asarray(model.apply_fn(params, tokens))
            differences.append(float(abs(ours - theirs).max()))
            leaves = jax.tree.leaves(params)
            entries = sum(leaf.size for leaf in leaves)
            kept = sum(int(np.count_nonzero(leaf)) for leaf in leaves) / entries
            figures = (f"{entries:,}", f"{kept:.1%}", f"{abs(theirs).max():.2f}", f"{differences[-1]:.1e}")
            rows.append((name, title, *figures))
    print(tables.text(rows, labels=2))
    if max(differences) > TOLERANCE:
        raise SystemExit(f"Logits differ by {max(differences):.1e}, more than {TOLERANCE:.0e}.")


def _two_of_four(model: Model, tokens: np.ndarray) -> Any:
    """Return the params pruned to two of each four inputs, layer by layer."""
    structure = jp.structures.nm(2, 4)
    solver = jp.solvers.sparsegpt()
    return jp.prune_layers(
        model.apply_fn, model.params, [(tokens,)], solver, sparsity=0.5, structure=structure
    ).params


def _smaller(model: Model, tokens: np.ndarray) -> Any:
    """Return the params with half of the units and of the key heads, and without the last layer.

    The heads of GPT-2 stay, because its config.json cannot say them.
    """
    groups = jp.channel_groups(model.apply_fn, model.params, tokens).inner()
    chosen = [group for group in groups if "qkv" not in group.name]
    structure = jp.structures.channels(chosen)
    masks = jp.prune_once(model.params, jp.scores.magnitude, sparsity=0.5, structure=structure)
    small = jp.compact(model.apply_fn, model.params, masks, tokens).params
    return small | {"layers": small["layers"][:-1]}


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict(
        {"make": make, "compare": compare}, prog="python -m experiments.hf.golden"
    )
