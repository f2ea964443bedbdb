"""How well a network predicts a text."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

_LARGEST = math.log(np.finfo(np.float64).max)


def in_batches(windows: np.ndarray, size: int) -> Sequence[np.ndarray]:
    """Return windows in batches of at most `size`."""
    return [windows[start : start + size] for start in range(0, len(windows), size)]


class Perplexity:
    """The perplexity of networks of one function on a text: compiled once for params of the same shapes."""

    def __init__(self, apply_fn: Callable[[Any, Any], jax.Array], windows: np.ndarray, batch: int):
        """Keep the windows of the text, (n, length), of which `batch` go through the network at a time."""
        self.windows, self.batch = windows, min(batch, len(windows))

        @jax.jit
        def losses(params: Any, tokens: jax.Array) -> jax.Array:
            logits = apply_fn(params, tokens)[:, :-1].astype(jnp.float32)
            each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
            return each.mean(axis=-1)

        self._losses = losses

    def __call__(self, params: Any) -> float:
        """Return `exp(mean -log p(token | those before it in its window))`, over all tokens but the first.

        As one number for each token that it is undecided between: 1 of a network that is always right, the
        size of the vocabulary of one that knows nothing.
        """
        total = 0.0
        for tokens in in_batches(self.windows, self.batch):
            # The last batch is filled up, so that it needs no program of its own.
            full = np.concatenate([tokens, self.windows[: self.batch - len(tokens)]])
            total += float(np.asarray(self._losses(params, full), np.float64)[: len(tokens)].sum())
        mean = total / len(self.windows)
        return math.inf if mean > _LARGEST else math.exp(mean)
