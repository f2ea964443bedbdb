"""Train steps in PyTorch, dense and with torch.nn.utils.prune; no JAX in here."""

import importlib
import itertools
import time
from typing import Any


class TorchSteps:
    """Two copies of a perceptron, one of them pruned, in a worker process."""

    def __init__(self, widths: tuple[int, ...], batch: int, sparsity: float):
        """Make them; Adam is the fused one, which is the quickest on a CPU."""
        torch: Any = importlib.import_module("torch")
        self.torch, self.prune = torch, importlib.import_module("torch.nn.utils.prune")
        torch.set_flush_denormal(True)
        torch.manual_seed(0)
        self.x, self.y = torch.randn(batch, widths[0]), torch.randint(widths[-1], (batch,))
        self.models, self.adams = {}, {}
        for way in ("torch dense", "torch"):
            layers: list[Any] = []
            for m, n in itertools.pairwise(widths):
                layers += [torch.nn.Linear(m, n), torch.nn.ReLU()]
            model = torch.nn.Sequential(*layers[:-1])
            if way == "torch":
                self._remove(model, sparsity)
            self.models[way] = model
            self.adams[way] = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def plain(self, way: str, count: int) -> float:
        """Return the seconds of a step; what is pruned is multiplied by its masks in each forward pass."""
        began = time.perf_counter()
        for _ in range(count):
            self._step(way)
        return (time.perf_counter() - began) / count

    def update(self, way: str) -> float:
        """Return the seconds of a step in which a little more is pruned, globally."""
        began = time.perf_counter()
        self._remove(self.models[way], 0.01)
        self._step(way)
        return time.perf_counter() - began

    def _step(self, way: str) -> None:
        self.adams[way].zero_grad()
        self.torch.nn.functional.cross_entropy(self.models[way](self.x), self.y).backward()
        self.adams[way].step()

    def _remove(self, model: Any, amount: float) -> None:
        own = [(layer, "weight") for layer in model[::2]]
        self.prune.global_unstructured(own, pruning_method=self.prune.L1Unstructured, amount=amount)
