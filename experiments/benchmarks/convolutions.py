"""What the forms of a convolution's kernel do to its time, against XLA's dense convolution.

Each convolution stands for those of a network: the stem and the stages of ResNet-20 without half of its
channels, 3 x 3 kernels of larger networks, depthwise ones. Some have all their entries, others are pruned at
random or lose channels. Each form of `jp.sparsify` that suits it is timed alone.

    python -m experiments.benchmarks.convolutions
    python -m experiments.benchmarks.convolutions --sparsities 0.95,0.99 --kinds large

All calls are compiled, warm and taken in turn; figures are medians, as ratios to dense: 2.0 is twice
as fast. A percentage is the part of the kernel that is zero, "channels" says that half of its output
and input channels are. A dash is a form that does not suit, or whose patches would not fit into 256 MB.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
from jax import lax

import jaxprune as jp
from experiments.benchmarks.parts.machine import machine
from experiments.run.limits import OneOf
from experiments.run.settings import Count, Settings, Sparsity, parse
from experiments.show.tables import titled

FORMS = ("wide2", "wide4", "wide8", "shifted", "compact", "padded", "product", "csr")


class Shape(NamedTuple):
    """A convolution over square images, with "SAME" padding."""

    images: int
    side: int
    inputs: int
    outputs: int
    window: int = 3
    stride: int = 1
    groups: int = 1

    def __str__(self) -> str:
        sides = f"{self.images}x{self.side}x{self.side}"
        groups = " depthwise" if self.groups > 1 else ""
        stride = f"/{self.stride}" if self.stride > 1 else ""
        return f"{sides} {self.window}x{self.window}{stride} {self.inputs}-{self.outputs}{groups}"


KINDS = {
    "small": (
        Shape(64, 32, 3, 8),
        Shape(64, 32, 8, 8),
        Shape(64, 32, 8, 16, stride=2),
        Shape(64, 16, 16, 16),
        Shape(64, 32, 16, 16),
        Shape(64, 16, 32, 32),
        Shape(64, 8, 64, 64),
        Shape(64, 28, 1, 6, window=5),
    ),
    "large": (Shape(16, 32, 64, 64), Shape(8, 16, 256, 256), Shape(1, 16, 256, 256)),
    "depthwise": (
        Shape(16, 32, 64, 64, groups=64),
        Shape(16, 16, 128, 128, stride=2, groups=128),
        Shape(1, 16, 256, 256, window=5, groups=256),
    ),
    "tiny": (Shape(2, 8, 4, 4), Shape(2, 8, 4, 4, groups=4)),
}


@dataclass(frozen=True)
class Config(Settings):
    """Flags of the benchmark."""

    kinds: tuple[Annotated[str, OneOf(tuple(KINDS))], ...] = ("small", "large", "depthwise")
    sparsities: tuple[Sparsity, ...] = (0.9, 0.95, 0.98)  # of the kernels of large ones, at random
    channels: Sparsity = 0.5  # of the output and of the input channels of large ones that are zero
    rounds: Count = 9  # measurements of each


SMALL = Config(kinds=("tiny",), rounds=2)


def case(shape: Shape, what: str, mask: np.ndarray, rounds: int) -> dict[str, Any]:
    """Return the speed-up of each form of one convolution."""
    x = jax.random.normal(jax.random.key(0), (shape.images, shape.side, shape.side, shape.inputs))
    params = {"w": jax.random.normal(jax.random.key(1), mask.shape)}
    masks = {"w": jax.numpy.asarray(mask)}

    def apply_fn(params: Any, x: Any) -> Any:
        strides, numbers = (shape.stride,) * 2, ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, params["w"], strides, "SAME", dimension_numbers=numbers, feature_group_count=shape.groups
        )

    masked = jp.apply_masks(params, masks)
    want = np.asarray(apply_fn(masked, x))
    calls: dict[str, tuple[Any, ...]] = {"dense": (apply_fn, masked, x)}
    patches = 4 * want.size // shape.outputs * mask[..., 0].size
    for form in FORMS:
        if form in ("csr", "product") and patches > 2**28:
            continue
        try:
            fast = jp.sparsify(apply_fn, params, masks, x, choose={"w": form})
        except ValueError:  # this form does not suit
            continue
        np.testing.assert_allclose(fast.apply(fast.params, x), want, rtol=1e-3, atol=1e-3)
        calls[form] = (fast.apply, fast.params, x)
    times = jp.metrics.latency(calls, rounds)
    gains = {form: times["dense"].median / times[form].median for form in calls}
    return {"convolution": str(shape), "zero": what, "seconds": times["dense"].median, **gains}


def run(config: Config) -> list[dict[str, Any]]:
    """Return a line for each convolution and mask."""
    rng = np.random.default_rng(0)
    lines = []
    for kind in config.kinds:
        for shape in KINDS[kind]:
            size = (shape.window, shape.window, shape.inputs // shape.groups, shape.outputs)
            cases = {"": np.ones(size, bool)}
            if kind == "large":
                alive = [rng.permutation(n) >= config.channels * n for n in size[2:]]
                cases = {"channels": np.broadcast_to(np.outer(*alive), size)}
                cases |= {f"{part:.0%}": rng.random(size) >= part for part in config.sparsities}
            lines += [case(shape, what, mask, config.rounds) for what, mask in cases.items()]
    return lines


def rows(lines: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the table."""
    table: list[tuple[str, ...]] = [("convolution", *FORMS)]
    for line in lines:
        gains = (f"{line[form]:.2f}" if form in line else "-" for form in FORMS)
        zero = f", {line['zero']}" if line["zero"] else ""
        table.append((line["convolution"] + zero, *gains))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark from the command line."""
    config = parse(Config, argv, __doc__)
    lines = run(config)
    print(machine())
    print(titled("times as fast as XLA's dense convolution", rows(lines), lines))


if __name__ == "__main__":
    main()
