"""The lottery-ticket run as a plain PyTorch loop with torch.nn.utils.prune; no JAX in here."""

import importlib
import time
from typing import Any

import numpy as np


class TorchLoop:
    """Trains, prunes and rewinds LeNet-300-100 in PyTorch, one seed after another.

    What a plain loop may have done beforehand, it has: images are normalised float32 rows, the
    order of each seed's batches is drawn, and denormal numbers count as zero, as in XLA.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        weights: list[dict[str, np.ndarray]],
        orders: np.ndarray,
        rates: dict[str, float],
        levels: int,
        lr: float,
    ):
        """Take the data and what each seed begins from.

        Args:
          images: float32 (n, pixels), normalised.
          labels: int64 (n,).
          weights: for each seed "fc1/kernel" (in, out), "fc1/bias" and so on.
          orders: int64 (seeds, steps, batch), the images of each step of a level.
          rates: fractions pruned of each kernel's remaining weights, in the order of the layers.
          levels: how often to prune.
          lr: learning rate of Adam.
        """
        self.torch: Any = importlib.import_module("torch")
        self.prune: Any = importlib.import_module("torch.nn.utils.prune")
        self.torch.set_flush_denormal(True)
        self.x, self.y = self.torch.from_numpy(images), self.torch.from_numpy(labels)
        self.weights = [{name: self.torch.tensor(value.T) for name, value in one.items()} for one in weights]
        self.orders = self.torch.from_numpy(orders)
        self.rates, self.levels, self.lr = rates, levels, lr

    def version(self) -> str:
        """Return PyTorch's version."""
        return self.torch.__version__

    def trial(self, threads: int, adam: dict[str, bool], steps: int) -> float:
        """Return the seconds that a few steps of the dense network and of a pruned one take."""
        return self._timed(threads, adam, lambda: self._seed(0, adam, min(self.levels, 1), steps))

    def measure(self, threads: int, adam: dict[str, bool]) -> float:
        """Return the seconds that the runs of all seeds take, one after another."""

        def run():
            for seed in range(len(self.weights)):
                self._seed(seed, adam, self.levels, None)

        return self._timed(threads, adam, run)

    def outcome(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return masks by kernel, and trained params: (seeds, levels + 1, ...), in JAX's layout."""
        seeds = [self._seed(seed, {}, self.levels, None) for seed in range(len(self.weights))]
        masks, params = (
            {
                key: np.stack([[level[part][key] for level in one] for one in seeds])
                for key in seeds[0][0][part]
            }
            for part in (0, 1)
        )
        return masks, params

    def _timed(self, threads: int, adam: dict[str, bool], run: Any) -> float:
        self.torch.set_num_threads(threads)
        self._seed(0, adam, min(self.levels, 1), 5)  # the pool of threads, the allocator
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    def _seed(self, seed: int, adam: dict[str, bool], levels: int, steps: int | None) -> list[tuple]:
        """Return the run of one seed; what each level's masks and trained params were."""
        torch, nn, start = self.torch, self.torch.nn, self.weights[seed]
        layers = {name.split("/")[0]: rate for name, rate in self.rates.items()}
        modules = []
        for name in layers:
            outputs, inputs = start[f"{name}/kernel"].shape
            modules += [nn.Linear(inputs, outputs), nn.ReLU()]
        model = nn.Sequential(*modules[:-1])
        linear = dict(zip(layers, model[::2], strict=True))

        def rewind() -> None:
            with torch.no_grad():
                for name, layer in linear.items():
                    getattr(layer, "weight_orig", layer.weight).copy_(start[f"{name}/kernel"])
                    layer.bias.copy_(start[f"{name}/bias"])

        def state() -> tuple:
            masks = {
                f"{n}/kernel": getattr(m, "weight_mask", torch.ones_like(m.weight)) for n, m in linear.items()
            }
            params = {f"{n}/kernel": m.weight * masks[f"{n}/kernel"] for n, m in linear.items()}
            params |= {f"{n}/bias": m.bias for n, m in linear.items()}
            masks, params = (
                {key: value.detach().numpy().T.copy() for key, value in tree.items()}
                for tree in (masks, params)
            )
            return {key: mask != 0 for key, mask in masks.items()}, params

        rewind()
        states = []
        for level in range(levels + 1):
            optimizer = torch.optim.Adam(model.parameters(), lr=self.lr, **adam)
            for index in self.orders[seed][:steps]:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(self.x[index]), self.y[index]).backward()
                optimizer.step()
            with torch.no_grad():
                model(self.x[:1])  # the hooks bring `weight` up to the last step
            states.append(state())
            if level < levels:
                for name, layer in linear.items():
                    self.prune.l1_unstructured(layer, "weight", layers[name])
                rewind()
        return states
