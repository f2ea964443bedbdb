"""Prune a decoder that somebody else has trained, from its Hugging Face folder to another such folder.

The checkpoint is calibrated on windows of a text, pruned layer by layer without training it, judged by its
perplexity on another part of the text, and written with the names, dtypes and files that it had.

    python -m experiments.one_shot hf --checkpoint FOLDER --text FILE --out FOLDER
    ... --structure 2:4                     # two of each four neighbours stay
    ... --hidden-units 0.5 --heads 0.5      # taken out: the written network is smaller
    ... --layers 4                          # the four layers that change least are taken out
    ... --recover 600                       # what stays is tuned for the dense network's predictions

`config.json` says which architecture it is. The text is read by the folder's own tokenizer.json, or is a file
of token ids. Nothing is downloaded.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jaxprune as jp
from experiments.hf import methods, removal, tokens
from experiments.hf.methods import METHODS
from experiments.hf.opened import Model, open_model, write_model
from experiments.hf.perplexity import Perplexity, in_batches
from experiments.run import stopping
from experiments.run.limits import FlagError, OneOf, Range
from experiments.run.settings import Count, Folder, Natural, Positive, Settings, Sparsity, parse
from experiments.show import tables

_LENGTH = 2048
"""The longest window by default, that of the published perplexities; many contexts are far longer."""


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the command."""

    repeats = False
    checkpoint: str  # the folder of config.json and the safetensors
    text: str  # text, or token ids as .npy, to calibrate on and, its last tenth, to be judged on
    out: Folder  # the folder to write; it must not exist
    eval_text: str | None = None  # another text to be judged on
    # how entries are pruned (default: alps-dense)
    method: Annotated[str, OneOf(tuple(METHODS))] | None = None
    structure: str = "entries"  # entries, or n:m, such as 2:4
    sparsity: Annotated[float, Range(above=0, below=1)] | None = None  # of entries (default: 0.5)
    hidden_units: Sparsity = 0.0  # the share of each layer's hidden units to take out
    heads: Sparsity = 0.0  # the share of each layer's key heads to take out, with the queries that read them
    layers: Natural = 0  # how many whole layers to take out
    recover: Natural = 0  # steps of tuning what stays
    recover_lr: Positive = 1e-3  # of Adam, at the start of a cosine
    recover_by_block: bool = False  # in the memory of one layer; the steps are those of each
    samples: Count = 128  # windows to calibrate on
    # of a window (default: the context, at most 2048)
    length: Annotated[int, Range(at_least=2)] | None = None
    batch: Count = 8  # windows that go through the network at a time
    eval_samples: Count = 256  # the most windows to be judged on
    seed: Natural = 0  # of the places of the windows
    checkpoint_dir: Folder | None = None  # keeps solved layers, so that a stopped run resumes

    def __post_init__(self):
        """Check the fields, and how they go together."""
        super().__post_init__()
        if self.structure != "entries":
            self._check_group()
        if self.removes:
            for name in ("method", "sparsity"):
                if getattr(self, name) is not None:
                    raise FlagError(
                        f"--{name}: is of entries, and does not go with --hidden-units, --heads, --layers: "
                        "prune the entries of the folder that is written, by another command"
                    )
            if self.structure != "entries":
                raise FlagError("--structure: does not go with --hidden-units, --heads and --layers")
        if self.recover and self.samples < 2 * self.batch:
            raise FlagError(
                f"--recover: takes at least two batches of {self.batch} windows; got --samples {self.samples}"
            )
        if self.recover_by_block and not self.recover:
            raise FlagError("--recover-by-block: takes --recover, the steps of each block")
        if self.checkpoint_dir is not None and self.removes and not (self.hidden_units or self.heads):
            raise FlagError("--checkpoint-dir: no layer is solved, so there is nothing to keep")

    def _check_group(self) -> None:
        if not (found := re.fullmatch(r"(\d{1,3}):(\d{1,3})", self.structure)):
            raise FlagError(f"--structure: must be entries or n:m, such as 2:4; got {self.structure}")
        n, m = map(int, found.groups())
        if not 0 < n < m:
            raise FlagError(f"--structure: of each {m} entries 1 to {m - 1} stay, got {n}")
        if self.sparsity is not None:
            raise FlagError(f"--sparsity: is {1 - n / m:g} with --structure {self.structure}; leave it out")

    @property
    def group(self) -> tuple[int, int] | None:
        """The n and m of n:m; None for entries."""
        if self.structure == "entries":
            return None
        n, m = map(int, self.structure.split(":"))
        return n, m

    @property
    def removes(self) -> bool:
        """Whether hidden units, heads or layers are taken out."""
        return bool(self.hidden_units or self.heads or self.layers)


class Pruned(NamedTuple):
    """A decoder after pruning, in the shapes of the dense one.

    Attributes:
      params: for the same function.
      masks: True where an entry is kept.
      gone: the layers that are masked as a whole.
    """

    params: Any
    masks: Any
    gone: Sequence[int] = ()


def run(config: Config) -> dict[str, float]:
    """Prune the checkpoint, write the result, and return its perplexities by stage.

    Raises:
      FlagError: flags that do not fit the checkpoint or the text.
      ValueError: a checkpoint that cannot be read, or a network that cannot be pruned as asked.
    """
    _check_folders(config)
    model = open_model(config.checkpoint)
    asked = removal.plan(model, config.hidden_units, config.heads, config.layers)
    data = _windows(config, model)
    batches = in_batches(data.calibration, config.batch)
    perplexity = Perplexity(model.apply_fn, data.held_out, config.batch)
    print(_said(config, model, data))

    found = {"dense": perplexity(model.params)}
    if config.removes:
        pruned = _masked_units(config, model, asked, batches)
    else:
        pruned = _masked_entries(config, model, batches)
    found["pruned"] = perplexity(pruned.params)
    if config.recover:
        pruned = _recovered(config, model, pruned, batches)
        found["recovered"] = perplexity(pruned.params)
    rows = [("", "perplexity"), *((stage, f"{value:.4f}") for stage, value in found.items())]
    print(f"\n{tables.text(rows)}")
    jp.check_pruned(pruned.params, pruned.masks)
    print(f"\n{_written(config, model, pruned, batches[0])}")
    return found


def _check_folders(config: Config) -> None:
    if Path(config.out).exists():
        same = Path(config.checkpoint).exists() and Path(config.out).samefile(config.checkpoint)
        what = "is the checkpoint itself" if same else "exists already"
        raise FlagError(f"--out: {config.out} {what}: give another folder, which is made")


def _windows(config: Config, model: Model) -> tokens.Windows:
    context, vocabulary = model.config.context, model.config.vocab
    length = config.length or min(context, _LENGTH)
    if length > context:
        raise FlagError(f"--length: must be at most {context}, the network's context; got {length}")
    text = tokens.read("--text", config.text, config.checkpoint, vocabulary)
    others = None
    if config.eval_text is not None:
        others = tokens.read("--eval-text", config.eval_text, config.checkpoint, vocabulary)
    return tokens.windows(text, others, config.samples, length, config.seed, config.eval_samples)


def _said(config: Config, model: Model, data: tokens.Windows) -> str:
    size = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    samples, length = data.calibration.shape
    return "\n".join(
        [
            f"{config.checkpoint}: {model.json['model_type']}, {model.config.depth} layers of width "
            f"{model.config.width}, {size:,} params",
            f"calibrated on {samples} windows of {length} tokens of {config.text}",
            f"judged on {len(data.held_out)} of {config.eval_text or 'its last tenth'}",
        ]
    )


def _masked_entries(config: Config, model: Model, batches: Sequence[np.ndarray]) -> Pruned:
    """Prune single entries, or all but n of each m."""
    sparsity = None if config.group else config.sparsity or 0.5
    method = config.method or "alps-dense"
    with _progress(model) as progress:
        done = methods.prune(
            model.apply_fn,
            model.params,
            batches,
            method,
            sparsity,
            config.group,
            config.checkpoint_dir,
            progress,
        )
    print(f"\n{done.report}")
    return Pruned(done.params, done.masks)


def _masked_units(
    config: Config, model: Model, asked: removal.Removal, batches: Sequence[np.ndarray]
) -> Pruned:
    """Prune layers, and then hidden units and heads of the others."""
    pruned = Pruned(model.params, jp.ones_masks(model.params))
    if asked.layers:
        masks, influence, gone = removal.without_layers(model, batches, asked.layers)
        pruned = Pruned(jp.apply_masks(model.params, masks), masks, gone)
        rows = [("layer", "influence", "")]
        rows += [(str(i), f"{x:.4f}", "taken out" * (i in gone)) for i, x in enumerate(influence)]
        print(f"\n{tables.text(rows)}")
    if asked.groups:
        with _progress(model) as progress:
            done = removal.without_units(
                model, pruned.params, batches, asked, pruned.gone, config.checkpoint_dir, progress
            )
        print(f"\n{done.report}")
        pruned = Pruned(done.params, jp.intersect(pruned.masks, done.masks), pruned.gone)
    return pruned


def _recovered(config: Config, model: Model, pruned: Pruned, batches: Sequence[np.ndarray]) -> Pruned:
    """Tune what the masks keep, for the predictions of the dense network on the calibration windows."""
    full = [tokens for tokens in batches if len(tokens) == config.batch]
    with tqdm(unit="evaluation", desc="recover", leave=False) as bar:

        def progress(evaluation: Any) -> None:
            bar.set_postfix_str(f"{evaluation.block} step {evaluation.step}: {evaluation.held_out:.4g}")
            bar.update()

        done = jp.recover(
            model.apply_fn,
            pruned.params,
            pruned.masks,
            full,
            optax.adam(optax.cosine_decay_schedule(config.recover_lr, config.recover)),
            teacher=model.params,
            steps=config.recover,
            loss=jp.distillation.soft_targets,
            by_block=config.recover_by_block,
            seed=config.seed,
            progress=progress,
        )
    print(f"\n{done.report}")
    return pruned._replace(params=done.params)


def _written(config: Config, model: Model, pruned: Pruned, tokens: np.ndarray) -> str:
    """Write the folder, and return what is in it."""
    if not config.removes:
        write_model(config.out, model, pruned.params, pruned.masks)
        zero = jp.metrics.sparsity(pruned.masks).model
        return f"Wrote {config.out}\n{zero:.1%} of all params are zero; the files are as large as they were"
    small = jp.compact(model.apply_fn, pruned.params, pruned.masks, tokens).params
    kept = [number for number in range(model.config.depth) if number not in pruned.gone]
    write_model(config.out, model, small, layers=kept)
    written = open_model(config.out)
    differ = jnp.abs(written.apply_fn(written.params, tokens) - model.apply_fn(pruned.params, tokens))
    before, after = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (model.params, small))
    return (
        f"Wrote {config.out}\n{after:,} params of {before:,}; "
        f"logits differ from the masked network's by at most {float(differ.max()):.1g}"
    )


@contextlib.contextmanager
def _progress(model: Model) -> Iterator[Callable[[Any], None]]:
    """Show which layer of the decoder is solved: a function of the row of what has been."""
    with tqdm(total=model.config.depth, unit="layer", leave=False) as bar:

        def progress(row: Any) -> None:
            bar.set_postfix_str(f"{row.name}, error {row.error:.3f}", refresh=False)
            bar.update(int(row.name.split("/")[1]) - bar.n)

        yield progress


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    config = parse(Config, argv, __doc__, "hf")
    with stopping.exit_with_message(config.out):
        try:
            run(config)
        except FlagError:
            raise
        except (ValueError, FileNotFoundError) as error:
            raise SystemExit(str(error)) from error
