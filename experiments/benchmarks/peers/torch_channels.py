"""ResNet-20 in PyTorch, its channels cut by torch-pruning; no JAX in here."""

import importlib
import statistics
import time
from typing import Any


class TorchChannels:
    """The dense network and a pruned copy, in a worker process."""

    def __init__(self, widths: tuple[int, ...], batch: int, share: float):
        """Make both; half of each group of coupled channels goes, by L2 norms."""
        self.torch: Any = importlib.import_module("torch")
        tp: Any = importlib.import_module("torch_pruning")
        self.torch.manual_seed(0)
        self.x = self.torch.randn(batch, 3, 32, 32)
        self.dense, self.small = (self._resnet20(widths).eval() for _ in range(2))
        self.cut = self._seconds(lambda: self._prune(tp, share))
        count = tp.utils.count_ops_and_params
        self.macs = [count(model, self.x[:1])[0] for model in (self.dense, self.small)]

    def measure(self, rounds: int) -> dict[str, Any]:
        """Return the ratio of MACs, speed-ups by round, and the time to prune in dense forward passes."""
        times: dict[str, list[float]] = {"dense": [], "small": []}
        with self.torch.no_grad():
            for number in range(-2, rounds):
                for name, model in (("dense", self.dense), ("small", self.small)):
                    taken = self._seconds(lambda model=model: model(self.x))
                    if number >= 0:
                        times[name].append(taken)
        return {
            "macs_ratio": self.macs[0] / self.macs[1],
            "speed_up": [one / two for one, two in zip(times["dense"], times["small"], strict=True)],
            "cost": self.cut / statistics.median(times["dense"]),
        }

    def _prune(self, tp: Any, share: float) -> None:
        tp.pruner.MagnitudePruner(
            self.small,
            self.x[:1],
            importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=[self.small.head],
        ).step()

    @staticmethod
    def _seconds(function: Any) -> float:
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    def _resnet20(self, widths: tuple[int, ...]) -> Any:
        """Return the network of `experiments.networks.large.ResNet(20)`, with projections."""
        nn = self.torch.nn

        def conv(m: int, n: int, side: int, stride: int) -> Any:
            return nn.Sequential(nn.Conv2d(m, n, side, stride, side // 2, bias=False), nn.BatchNorm2d(n))

        class Block(nn.Module):
            def __init__(self, m: int, n: int, stride: int):
                super().__init__()
                self.one, self.two = conv(m, n, 3, stride), conv(n, n, 3, 1)
                self.shortcut = conv(m, n, 1, stride) if m != n or stride > 1 else nn.Identity()

            def forward(self, x: Any) -> Any:
                return nn.functional.relu(self.two(nn.functional.relu(self.one(x))) + self.shortcut(x))

        class Network(nn.Module):
            def __init__(self):
                super().__init__()
                self.stem, blocks, before = conv(3, widths[0], 3, 1), [], widths[0]
                for stage, width in enumerate(widths):
                    for number in range(3):
                        blocks.append(Block(before, width, 2 if stage and not number else 1))
                        before = width
                self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(before, 10)

            def forward(self, x: Any) -> Any:
                x = self.blocks(nn.functional.relu(self.stem(x)))
                return self.head(x.mean((2, 3)))

        return Network()
