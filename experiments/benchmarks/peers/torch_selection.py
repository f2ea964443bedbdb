"""Global magnitude masks in PyTorch; no JAX in here."""

import importlib
import time
from typing import Any

import numpy as np


class TorchSelection:
    """The same kernels, in a worker process."""

    def __init__(self, shapes: list[tuple[int, ...]], seed: int, sparsity: float):
        """Make the kernels."""
        self.torch: Any = importlib.import_module("torch")
        self.prune = importlib.import_module("torch.nn.utils.prune")
        rng = np.random.default_rng(seed)
        draw = [rng.standard_normal(shape, dtype=np.float32) for shape in shapes]
        self.kernels = [self.torch.from_numpy(kernel) for kernel in draw]
        self.sparsity = sparsity

    def seconds(self, way: str) -> float:
        """Return the seconds that masks take: by `global_unstructured`, or a threshold by `topk`."""
        layers = []
        for kernel in self.kernels:
            layer = self.torch.nn.Module()
            layer.weight = self.torch.nn.Parameter(kernel, requires_grad=False)
            layers.append((layer, "weight"))
        began = time.perf_counter()
        if way == "torch.topk":
            scores = self.torch.cat([kernel.abs().ravel() for kernel in self.kernels])
            keep = len(scores) - round(self.sparsity * len(scores))
            least = self.torch.topk(scores, keep, sorted=False).values.min()
            _ = [kernel.abs() >= least for kernel in self.kernels]
        else:
            method = self.prune.L1Unstructured
            self.prune.global_unstructured(layers, pruning_method=method, amount=self.sparsity)
        return time.perf_counter() - began
