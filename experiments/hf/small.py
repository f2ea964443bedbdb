"""A small decoder of the Llama architecture, trained on Tiny Shakespeare, as a Hugging Face folder.

A checkpoint to try `python -m experiments.one_shot hf` on, made in minutes:

    python -m experiments.hf.small --out small

The folder has `config.json`, `model.safetensors` and a `tokenizer.json` of one token a character, and beside
them the text it is pruned with and judged on: `train.txt` and `validation.txt`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

import jaxprune as jp
from experiments.data import datasets
from experiments.hf.llama import LLAMA
from experiments.hf.opened import tree_of
from experiments.run import stopping
from experiments.run.limits import FlagError
from experiments.run.settings import BatchSize, Count, Folder, Natural, Positive, Settings, parse
from experiments.training.steps import one_cycle

ABOUT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
"""Its config.json, but for the size of the vocabulary."""


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the command."""

    repeats = False
    out: Folder  # the folder to write; it must not exist
    steps: Count = 2000  # of training
    batch: BatchSize = 32  # windows of a step
    lr: Positive = 4e-3  # at the peak of one cycle
    seed: Natural = 0
    train_size: Count | None = None  # use this many characters only


def first_params(config: Any, key: jax.Array) -> Any:
    """Return random params of a decoder; the products that write to the residual stream start smaller."""
    shapes, leaves = LLAMA.shapes(config), {}
    for path, own in zip(shapes, jax.random.split(key, len(shapes)), strict=True):
        scale = 0.02 / (2 * config.depth) ** 0.5 if path.split("/")[-2] in ("out", "down") else 0.02
        noise = scale * jax.random.normal(own, shapes[path])
        leaves[path] = jnp.ones(shapes[path]) if noise.ndim == 1 else noise
    return tree_of(leaves, config.depth)


def train(config: Any, text: np.ndarray, flags: Config) -> Any:
    """Return the params of a decoder that has learned to predict the next character of a text."""
    text_, length = jnp.asarray(text), config.context
    tx = optax.adamw(one_cycle(flags.lr, flags.steps), b2=0.99, weight_decay=0.1)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        logits = LLAMA.apply(config, params, tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple[Any, Any, jax.Array]:
        starts = jax.random.randint(key, (flags.batch, 1), 0, len(text) - length)
        value, grads = jax.value_and_grad(loss)(params, text_[starts + jnp.arange(length + 1)])
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    first, key = jax.random.split(jax.random.key(flags.seed))
    params = first_params(config, first)
    state = tx.init(params)
    for number in (bar := trange(flags.steps, unit="step")):
        params, state, value = step(params, state, jax.random.fold_in(key, number))
        if number % 50 == 0:
            bar.set_postfix(loss=f"{float(value):.3f}", refresh=False)
    return params


def write(folder: Path, params: Any, about: dict[str, Any], vocabulary: str) -> None:
    """Write a folder as `transformers` does: the config, the params and the tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    names = LLAMA.names(LLAMA.configure(about))
    leaves = dict(zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True))
    tensors = {name: leaves[path] for path, name in names.items()}
    jp.io.save_safetensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(about, indent=2))
    # One token a character: no merges, and nothing that splits words.
    ids = {character: number for number, character in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()  # type: ignore[assignment]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def run(flags: Config) -> None:
    """Train the network and write the folder.

    Raises:
      FlagError: the folder exists.
    """
    folder = Path(flags.out)
    if folder.exists():
        raise FlagError(f"--out: {flags.out} exists already: give another folder, which is made")
    text = datasets.load_shakespeare(train=flags.train_size)
    about = ABOUT | {"vocab_size": len(text.vocabulary)}
    params = train(LLAMA.configure(about), text.train.astype(np.int32), flags)
    folder.mkdir(parents=True)
    write(folder, params, about, text.vocabulary)
    for name, split in (("train", text.train), ("validation", text.validation)):
        (folder / f"{name}.txt").write_text("".join(text.vocabulary[number] for number in split))
    print(f"Wrote {folder}: {sum(leaf.size for leaf in jax.tree.leaves(params)):,} params, {text.note}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = parse(Config, argv, __doc__)
    with stopping.exit_with_message(flags.out):
        run(flags)


if __name__ == "__main__":
    main()
