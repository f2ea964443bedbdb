"""Sparse perceptrons in SciPy and in PyTorch, each for a process of its own; no JAX in here."""

import importlib
import math
import time
import warnings
from typing import Any

import numpy as np


class Peer:
    """A perceptron with relu between its layers, whose kernels are compressed sparse rows.

    Activations are (features, batch) from layer to layer, which is what products of compressed rows are
    fast for; the input is turned first, and the output last.
    """

    def __init__(self, library: str, kernels: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray):
        """Take masked kernels of (inputs, outputs), biases, and x of (batch, inputs); "scipy" or "torch"."""
        self.run = (_scipy if library == "scipy" else _torch)(kernels, biases, x)
        self.run()

    def output(self) -> np.ndarray:
        """Return what the network gives."""
        return np.asarray(self.run())

    def measure(self) -> float:
        """Return the seconds of a call, over as many in a row as take about two milliseconds."""
        start = time.perf_counter()
        self.run()
        repeats = max(1, math.ceil(2e-3 / max(time.perf_counter() - start, 1e-9)))
        start = time.perf_counter()
        for _ in range(repeats):
            self.run()
        return (time.perf_counter() - start) / repeats


def _scipy(kernels: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray) -> Any:
    sparse: Any = importlib.import_module("scipy.sparse")
    layers = [(sparse.csr_matrix(w.T), b[:, None]) for w, b in zip(kernels, biases, strict=True)]

    def run() -> np.ndarray:
        h = np.ascontiguousarray(x.T)
        for number, (kernel, bias) in enumerate(layers):
            h = kernel @ (np.maximum(h, 0) if number else h) + bias
        return np.ascontiguousarray(h.T)

    return run


def _torch(kernels: list[np.ndarray], biases: list[np.ndarray], x: np.ndarray) -> Any:
    torch: Any = importlib.import_module("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that compressed rows are in beta
        layers = [
            (torch.tensor(w.T.copy()).to_sparse_csr(), torch.tensor(b)[:, None])
            for w, b in zip(kernels, biases, strict=True)
        ]
    given = torch.tensor(x)

    def run() -> Any:
        with torch.inference_mode():
            h = given.T.contiguous()
            for number, (kernel, bias) in enumerate(layers):
                h = kernel @ (h.relu() if number else h) + bias
            return h.T.contiguous()

    return run
