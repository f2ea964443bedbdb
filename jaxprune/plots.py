"""Pictures of pruning: curves, masks, sensitivities, layers. Each function returns a matplotlib `Figure`.

Matplotlib is imported when something is drawn; if it is missing, an ImportError says how to install it. No
window is opened, and pyplot is not touched: save the figure with `figure.savefig(path)`, or let a notebook
show it.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxprune.sizing.result import Sensitivity
from jaxprune.tree.checks import as_integer
from jaxprune.tree.paths import leaf_paths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curves", "layers", "mask_colours", "mask_images", "masks", "panels", "sensitivity"]

Line = tuple[Any, ...]
"""`(x, y)` or `(x, y, spread)`; a `y` of shape (points, runs) is shown as its mean and standard deviation."""

# Okabe and Ito's colours, which colour-blind readers tell apart, with a marker each.
STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#000000", "x"),
    ("#56B4E9", "P"),
    ("#8A6D00", "*"),
)
_GREY = "#808080"
_MOST_CELLS = 96  # along a side; larger kernels are averaged over blocks
_MOST_TILES = 1024  # filters drawn one by one


def curves(lines: Mapping[str, Line], *, x: str, y: str, **options: Any) -> "Figure":
    """Draw a line for each name, with a band of one standard deviation over runs.

    Args:
      lines: by name `(x, y)` with `y` of shape (points,) or (points, runs), or `(x, mean, spread)`.
      x, y: the labels of the axes.
      **options: of `panels`: `title`, `baseline`, `percent`, `log`, `connect`.

    Example:
      >>> import jaxprune as jp
      >>> accuracies = [[0.98, 0.97], [0.96, 0.97], [0.90, 0.92]]  # a row per sparsity, a column per seed
      >>> figure = jp.plots.curves(
      ...     {"magnitude": ([2, 10, 50], accuracies)},
      ...     x="compression", y="accuracy (%)", baseline={"dense": [0.98, 0.99]}, percent=True, log=True,
      ... )
      >>> [text.get_text() for text in figure.legends[0].get_texts()]
      ['magnitude', 'dense']
    """
    return panels({x: lines}, y=y, **options)


def panels(
    panels: Mapping[str, Mapping[str, Line]],
    *,
    y: str,
    title: str | None = None,
    baseline: Mapping[str, Any] | None = None,
    percent: bool = False,
    log: bool = False,
    connect: bool = True,
) -> "Figure":
    """Draw `curves` side by side, against different quantities: they share the vertical axis.

    Args:
      panels: by the label of their horizontal axis the lines, as `curves` takes them.
      y: the label of the vertical axis.
      title: above all panels.
      baseline: by name the figure of a dense network, or one for each run: drawn as level lines.
      percent: multiply figures by 100.
      log: whether the horizontal axes are logarithmic, as compressions need.
      connect: whether to join the points of a line; if not, the spread is drawn as bars.

    Example:
      >>> import jaxprune as jp
      >>> lines = {"magnitude": ([2, 10], [0.97, 0.95]), "random": ([2, 10], [0.95, 0.80])}
      >>> figure = jp.plots.panels({"compression": lines, "speed-up": lines}, y="accuracy")
      >>> [axes.get_xlabel() for axes in figure.axes]
      ['compression', 'speed-up']
    """
    names = [list(lines) for lines in panels.values()]
    shared = all(own == names[0] for own in names)
    labels = [*(names[0] if shared else ()), *(baseline or ())]
    columns = min(4, max(1, 80 * len(names) // (max(map(len, labels), default=0) + 7)), len(labels) or 1)
    height = 3.5 + 0.24 * math.ceil(len(labels) / columns) + (0.3 if title else 0)
    factor = 100 if percent else 1
    with _new_figure(5.4 * max(1, len(names)), height) as (mpl, figure):
        all_axes: Any = figure.subplots(1, max(1, len(names)), sharey=True, squeeze=False)[0]
        for axes, (label, lines) in zip(all_axes, panels.items(), strict=False):
            for index, (name, line) in enumerate(lines.items()):
                _line(mpl, axes, index, name, line, factor, connect)
            for index, (name, values) in enumerate((baseline or {}).items()):
                level, dashes = factor * np.mean(values), ("--", ":", "-.")[index % 3]
                axes.axhline(level, color=_GREY, linestyle=dashes, linewidth=1, label=_label(name))
            if log:
                _log_axis(axes, [value for line in lines.values() for value in line[0]])
            axes.set_xlabel(label)
            _plain(axes)
            if not shared:
                axes.legend(fontsize="small")
        all_axes[0].set_ylabel(y)
        if title:
            figure.suptitle(title, fontsize="medium")
        if shared and labels:
            handles = all_axes[0].get_legend_handles_labels()
            figure.legend(
                *handles, loc="outside lower center", ncols=columns, frameon=False, fontsize="small"
            )
    return figure


def sensitivity(result: Sensitivity) -> "Figure":
    """Draw the metric against the sparsity that each tensor, or group, reaches when it alone is pruned.

    Args:
      result: of `jaxprune.sensitivity`.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> params = {"a": jnp.arange(1.0, 5.0).reshape(2, 2), "b": jnp.ones((3, 2))}
      >>> total = lambda params: sum(leaf.sum() for leaf in params.values())
      >>> result = jp.sensitivity(total, params, levels=(0.5,), where=lambda path, leaf: True)
      >>> figure = jp.plots.sensitivity(result)
      >>> [text.get_text() for text in figure.legends[0].get_texts()]
      ['a', 'b', 'nothing pruned']
    """
    with _new_figure(7.2, 4.4) as (mpl, figure):
        axes = figure.subplots()
        # Layers come in the order of the network, so their colours do too; there may be any number.
        colours = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(result.pools)))
        for index, name in enumerate(result.pools):
            x, y = zip(*((point.achieved, point.metric) for point in result.of(name)), strict=True)
            marker = "os^Dv<>P*X"[index % 10]
            axes.plot(x, y, color=colours[index], marker=marker, markersize=4, label=_label(name))
        axes.axhline(result.dense, color=_GREY, linestyle="--", linewidth=1, label="nothing pruned")
        axes.set_xlabel("sparsity of what is pruned, alone")
        axes.set_ylabel(result.metric)
        _plain(axes)
        columns = -(-len(result.pools) // 24)
        figure.legend(loc="outside right upper", fontsize="small", frameon=False, ncols=columns)
    return figure


def layers(sparsities: Mapping[str, Any], *, x: str = "removed, %") -> "Figure":
    """Draw a bar for each layer: the fraction of it that is removed.

    Args:
      sparsities: by path a fraction, or a bool mask.
      x: the label of the horizontal axis.

    Example:
      >>> import jax.numpy as jnp, jaxprune as jp
      >>> figure = jp.plots.layers({"conv/kernel": 0.25, "fc/kernel": jnp.array([True, False])})
      >>> [text.get_text() for text in figure.axes[0].texts]
      ['25.0', '50.0']
    """
    values = [100 * (1 - np.mean(x) if np.asarray(x).dtype == bool else x) for x in sparsities.values()]
    with _new_figure(5.4, 0.8 + 0.26 * max(2, len(values))) as (_, figure):
        axes = figure.subplots()
        bars = axes.barh(range(len(values)), values, color=STYLES[0][0], height=0.7)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize="small")
        axes.set_yticks(range(len(values)), list(sparsities))
        axes.invert_yaxis()
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel(x)
        _plain(axes, "x")
    return figure


def masks(masks: Any, *, columns: int = 3) -> "Figure":
    r"""Draw each kernel's mask: bright is kept, dark is removed.

    Args:
      masks: a pytree of bool arrays; leaves of fewer than two axes are left out.
      columns: how many pictures stand side by side.

    Raises:
      ValueError: no leaf has two or more axes.

    Example:
      >>> import jax, jaxprune as jp
      >>> params = {"fc": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}
      >>> figure = jp.plots.masks(jp.prune_once(params, jp.scores.magnitude, sparsity=0.75))
      >>> figure.axes[0].get_title()
      'fc/kernel, 6 x 4\n25.00% kept'
    """
    pictures = mask_images(masks)
    if not pictures:
        raise ValueError("masks: no leaf has two or more axes, so there is no kernel to draw.")
    columns = min(as_integer(columns, "columns", at_least=1), len(pictures))
    rows = -(-len(pictures) // columns)
    colours = mask_colours()
    shapes = [min(1.2, len(image) / image.shape[1]) for _, image in pictures]
    heights = [0.6 + 3.2 * max(shapes[row * columns : (row + 1) * columns]) for row in range(rows)]
    with _new_figure(3.4 * columns, sum(heights)) as (_, figure):
        all_axes: Any = figure.subplots(rows, columns, squeeze=False, height_ratios=heights).ravel()
        for axes in all_axes:
            axes.set_axis_off()
            axes.set_anchor("N")
        for axes, (caption, image) in zip(all_axes, pictures, strict=False):
            axes.imshow(image, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
            axes.set_title("\n".join(caption.replace("; ", ": ").split(": ")), fontsize="small")
    return figure


def mask_images(masks: Any) -> list[tuple[str, np.ndarray]]:
    """Return the pictures that `masks` draws, as arrays with captions.

    A kernel of a convolution is a grid of its filters, a row for each input and a column for each output.
    Any other kernel is a matrix with its outputs across, averaged over blocks if it is large. If the inputs
    of the first kernel may be the pixels of a square image, each pixel is shown too, with the fraction of its
    weights that is kept.

    Args:
      masks: a pytree of bool arrays; leaves of fewer than two axes are left out.

    Returns:
      Captions, which begin with the path, and images: from 0 (removed) to 1 (kept), NaN in gaps.

    Example:
      >>> import numpy as np, jaxprune as jp
      >>> [(caption, image)] = jp.plots.mask_images({"kernel": np.array([[True, False]])})
      >>> caption, image.tolist()
      ('kernel, 1 x 2: 50.00% kept', [[1.0, 0.0]])
    """
    leaves = zip(leaf_paths(masks), map(np.asarray, jax.tree.leaves(masks)), strict=True)
    kernels = [(path, mask) for path, mask in leaves if mask.dtype == bool and mask.ndim >= 2 and mask.size]
    made = []
    for index, (path, mask) in enumerate(sorted(kernels, key=lambda kernel: _natural(kernel[0]))):
        text = f"{path}, {' x '.join(map(str, mask.shape))}: {mask.mean():.2%} kept"
        if index == 0 and mask.ndim == 2 and (pixels := _input_pixels(mask)) is not None:
            image, scale = _to_own_maximum(pixels)
            made.append((f"{path}, its input pixels: 0 to {scale:.1%} kept", image))
        if mask.ndim == 4 and mask.shape[2] * mask.shape[3] <= _MOST_TILES and min(mask.shape[:2]) > 1:
            made.append((f"{text}; a filter for each input (down) and output (across)", _filters(mask)))
            continue
        image = _blocks(mask)
        if image.shape != mask.reshape(-1, mask.shape[-1]).shape:
            image, scale = _to_own_maximum(image)
            text += f"; points are averages, 0 to {scale:.0%}"
        if len(image) > 3 * image.shape[1]:
            image, text = image.T, f"{text}; on its side"
        made.append((text, image))
    return made


def mask_colours() -> Any:
    """Return the colour map of masks, a function that turns an image of `mask_images` into RGBA.

    Example:
      >>> import numpy as np, jaxprune as jp
      >>> jp.plots.mask_colours()(np.array([[0.0, 1.0]])).shape
      (1, 2, 4)
    """
    return _matplotlib().colormaps["cividis"].with_extremes(bad=_GREY)


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ImportError(
            "pictures are drawn with matplotlib, which is not installed: pip install 'jaxprune[plots]'."
        ) from None
    return matplotlib


@contextmanager
def _new_figure(width: float, height: float) -> Iterator[tuple[Any, Any]]:
    """Yield matplotlib and a figure, which needs neither pyplot nor a window; a "$" in a name is text."""
    mpl = _matplotlib()
    from matplotlib.figure import Figure

    with mpl.rc_context({"text.parse_math": False}):
        yield mpl, Figure(figsize=(width, height), layout="constrained")


def _line(mpl: Any, axes: Any, index: int, name: str, line: Line, factor: float, connect: bool) -> None:
    x, y = line[0], np.asarray(line[1], float)
    mean = factor * (y.mean(axis=1) if y.ndim == 2 else y)
    spread = factor * np.asarray(line[2] if len(line) > 2 else y.std(axis=1) if y.ndim == 2 else 0 * y)
    colour, marker = STYLES[index % len(STYLES)]
    if colour == "#000000":  # black is the colour of text, whatever that is on this page
        colour = mpl.rcParams["text.color"]
    dashes = ("-", "--")[index // len(STYLES) % 2] if connect else "none"
    axes.plot(x, mean, color=colour, marker=marker, markersize=5, linestyle=dashes, label=_label(name))
    if not connect:
        axes.errorbar(x, mean, spread, fmt="none", ecolor=colour, alpha=0.5)
    elif (spread > 0).any():
        axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.2, linewidth=0)


def _label(name: str) -> str:
    """Return a label that matplotlib does not hide: it leaves out those that begin with "_"."""
    return f" {name}" if name.startswith("_") else name


def _plain(axes: Any, grid: str = "both") -> None:
    axes.grid(alpha=0.3, axis=grid)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _log_axis(axes: Any, values: Sequence[float]) -> None:
    """Make the horizontal axis logarithmic, with round ticks."""
    from matplotlib.ticker import MaxNLocator

    if not len(values):
        return
    low, high = min(values) / 1.1, max(values) * 1.1
    axes.set_xlim(low, high)  # first: a single point has no range of its own
    axes.set_xscale("log")
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        ticks = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
        if len(ticks) >= 4:
            break
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(5).tick_values(low, high) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts "conv10" after "conv2"."""
    parts = re.split(r"(\d+)", text)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _input_pixels(mask: np.ndarray) -> np.ndarray | None:
    """(inputs, outputs) -> (side, side), the fraction kept of each pixel; None if they form no square.

    Three inputs in a row may be the colours of one pixel.
    """
    for channels in (1, 3):
        side = math.isqrt(len(mask) // channels)
        if side >= 3 and side * side * channels == len(mask):
            return mask.mean(axis=1).reshape(side, side, channels).mean(axis=-1)
    return None


def _filters(mask: np.ndarray) -> np.ndarray:
    """(height, width, in, out) -> tiles, a row for each input and a column for each output; gaps are NaN."""
    h, w, inputs, outputs = mask.shape
    tiles = np.full((inputs, h + 1, outputs, w + 1), np.nan)
    tiles[:, :h, :, :w] = mask.transpose(2, 0, 3, 1)
    return tiles.reshape(inputs * (h + 1), outputs * (w + 1))[:-1, :-1]


def _blocks(mask: np.ndarray, most: int = _MOST_CELLS) -> np.ndarray:
    """(..., out) -> the kernel as a matrix, averaged over blocks so that no side is longer than `most`.

    Blocks are as equal as possible, and every entry is in exactly one.
    """
    matrix = mask.reshape(-1, mask.shape[-1]).astype(float)
    for axis in (0, 1):
        parts = min(most, matrix.shape[axis])
        # np.array_split's way: the first blocks are one longer, where it does not come out even.
        short, longer = divmod(matrix.shape[axis], parts)
        lengths = np.full(parts, short) + (np.arange(parts) < longer)
        sums = np.add.reduceat(matrix, np.cumsum(lengths) - lengths, axis=axis)
        matrix = sums / (lengths[:, None] if axis == 0 else lengths)
    return matrix


def _to_own_maximum(image: np.ndarray) -> tuple[np.ndarray, float]:
    most = float(image.max())
    return (image / most, most) if most else (image, 1.0)
