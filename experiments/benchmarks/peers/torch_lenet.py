"""The founding study's training in PyTorch: a plain loop with torch.nn.utils.prune; no JAX in here."""

import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np


class TorchStudy:
    """Trains LeNet, prunes it in three ways and tunes it, one network after another.

    Batches are picked by index from normalised float32 images in memory, and denormal numbers count as zero,
    as in XLA. Times leave out whatever is not an epoch of training: normalising, pruning, evaluation.
    """

    def __init__(
        self,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        seeds: tuple[int, ...],
        amounts: tuple[float, ...],
        rounds: int,
        epochs: int,
        tune_epochs: int,
        settings: dict[str, Any],
    ):
        """Take the data and what the study is asked for.

        Args:
          train, test: images, normalised float32 (n, 28, 28, 1), and labels, int64 (n,).
          seeds, amounts, rounds, tune_epochs: as `experiments.lenet` has them.
          epochs: of dense training.
          settings: batch_size, lr, momentum and cosine of dense training, tune_batch_size and tune_lr.
        """
        self.torch: Any = importlib.import_module("torch")
        self.prune: Any = importlib.import_module("torch.nn.utils.prune")
        self.torch.set_flush_denormal(True)
        (self.x, self.y), (self.x_test, self.y_test) = (
            (self.torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), self.torch.from_numpy(y))
            for x, y in (train, test)
        )
        self.seeds, self.amounts, self.rounds = seeds, amounts, rounds
        self.epochs, self.tune_epochs, self.settings = epochs, tune_epochs, settings
        self.seconds = self.cpu_seconds = 0.0

    def version(self) -> str:
        """Return PyTorch's version."""
        return self.torch.__version__

    def trial(self, threads: int, fused: bool, epochs: int) -> float:
        """Return the seconds that some epochs of a pruned network take."""
        self._begin(threads)
        model = self._model(0)
        self._prune("l1", model, 0.5)
        self._train(model, epochs, fused, tune=True)
        return self.seconds

    def measure(self, threads: int, fused: bool) -> tuple[float, float, dict[str, list[float]]]:
        """Return the seconds that all epochs of the study take, the processors' seconds, and accuracies.

        The accuracies are of the dense networks ("dense") and of each method at each amount ("l1 0.5").
        """
        self._begin(threads)
        found: dict[str, list[float]] = {}
        for seed in self.seeds:
            dense = self._model(seed)
            self._train(dense, self.epochs, fused, tune=False)
            found.setdefault("dense", []).append(self._accuracy(dense))
            weights = dense.state_dict()
            for method in ("random", "l1", "structured"):
                for amount in self.amounts:
                    model = self._model(seed)
                    model.load_state_dict(weights)
                    for _ in range(self.rounds):
                        self._prune(method, model, amount)
                        self._train(model, self.tune_epochs, fused, tune=True)
                    found.setdefault(f"{method} {amount:g}", []).append(self._accuracy(model))
        return self.seconds, self.cpu_seconds, found

    def _begin(self, threads: int) -> None:
        """Set the clock to zero, once threads and allocator have woken up."""
        self.torch.set_num_threads(threads)
        self._train(self._model(0), 1, False, tune=True)
        self.seconds = self.cpu_seconds = 0.0

    def _model(self, seed: int) -> Any:
        self.torch.manual_seed(seed)
        nn = self.torch.nn
        return nn.Sequential(
            *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Conv2d(10, 20, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Dropout(), nn.Linear(50, 10)),
        )

    def _prune(self, method: str, model: Any, amount: float) -> None:
        conv1, conv2, fc1, fc2 = (layer for layer in model if hasattr(layer, "bias"))
        prune = self.prune
        if method == "structured":
            for layer in (conv1, conv2, fc1):
                prune.ln_structured(layer, "weight", amount, n=1, dim=0)
            return
        choose: Callable[..., Any] = prune.l1_unstructured if method == "l1" else prune.random_unstructured
        for layer in (conv1, conv2, fc1, fc2):
            choose(layer, "weight", amount)

    def _train(self, model: Any, epochs: int, fused: bool, tune: bool) -> None:
        """Train for some epochs, and add their time."""
        torch, settings = self.torch, self.settings
        size, batch = len(self.y), settings["tune_batch_size" if tune else "batch_size"]
        began, cpu_began = time.perf_counter(), time.process_time()
        rate = settings["tune_lr" if tune else "lr"]
        optimizer = torch.optim.SGD(model.parameters(), rate, settings["momentum"], fused=fused or None)
        decay = None
        if settings["cosine"] and not tune:
            steps = epochs * -(-size // batch)
            decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(epochs):
            for index in torch.randperm(size).split(batch):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(self.x[index]), self.y[index]).backward()
                optimizer.step()
                if decay is not None:
                    decay.step()
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += time.process_time() - cpu_began

    def _accuracy(self, model: Any) -> float:
        model.eval()
        with self.torch.no_grad():
            return float((model(self.x_test).argmax(1) == self.y_test).float().mean())
