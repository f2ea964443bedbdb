"""The same sweeps as plain loops with torch.nn.utils.prune; no JAX in here."""

import importlib
import itertools
import time
from typing import Any


class TorchSweep:
    """A perceptron of each seed and data, in a worker process."""

    def __init__(self, widths: tuple[int, ...], batch: int, seeds: int, levels: tuple[float, ...]):
        """Make them, of PyTorch's own initialisation."""
        torch: Any = importlib.import_module("torch")
        self.torch, self.prune = torch, importlib.import_module("torch.nn.utils.prune")
        torch.manual_seed(0)
        self.levels = levels
        self.x, self.y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
        self.models = []
        for _ in range(seeds):
            layers: list[Any] = []
            for m, n in itertools.pairwise(widths):
                layers += [torch.nn.Linear(m, n), torch.nn.ReLU()]
            self.models.append(torch.nn.Sequential(*layers[:-1]))

    def measure(self, way: str) -> float:
        """Return the seconds of a sweep, "tensors" or "seeds"."""
        began = time.perf_counter()
        with self.torch.no_grad():
            getattr(self, way)()
        return time.perf_counter() - began

    def tensors(self) -> list[float]:
        """Return one tensor at a time, at each level."""
        model = self.models[0]
        return [self._point(model, [layer], level) for layer in model[::2] for level in self.levels]

    def seeds(self) -> list[float]:
        """Return each seed at each level of global sparsity."""
        return [self._point(model, model[::2], level) for model in self.models for level in self.levels]

    def _point(self, model: Any, layers: Any, level: float) -> float:
        """Prune, evaluates and puts back what was there."""
        own = [(layer, "weight") for layer in layers]
        dense = [layer.weight.detach().clone() for layer in layers]
        self.prune.global_unstructured(own, pruning_method=self.prune.L1Unstructured, amount=level)
        accuracy = (model(self.x).argmax(1) == self.y).float().mean().item()
        for layer, weight in zip(layers, dense, strict=True):
            self.prune.remove(layer, "weight")
            layer.weight.copy_(weight)
        return accuracy
