"""Pictures of masks, as small PNGs: bright is kept, dark is removed."""

import io
import math
from pathlib import Path
from typing import NamedTuple

import jax
import matplotlib as mpl
import numpy as np

import jaxprune as jp
from experiments.report.read import Line, natural

mpl.use("Agg")
from matplotlib.image import imsave

_MOST_CELLS = 96  # of a side; larger kernels are averaged over blocks
_MOST_BYTES = 1 << 30  # of masks in a file
_MOST_TILES = 1024  # filters drawn one by one
_SIDE = 220  # pixels that the longer side is enlarged to, more or less


class Picture(NamedTuple):
    """A view of a kernel.

    Attributes:
      path: the kernel.
      caption: what is seen, with the fraction kept.
      png: the image.
      width: in pixels.
    """

    path: str
    caption: str
    png: bytes
    width: int


def load(line: Line) -> dict[str, np.ndarray]:
    """The masks of two and more axes that a line names, by path, in natural order.

    Raises:
      ValueError: the file is not there, is not below the line's folder, or is damaged; it says so.
    """
    assert line.masks is not None
    name = Path(line.masks)
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(
            f"the masks of {line.file}, line {line.number}, are not below its folder: {line.masks}"
        )
    try:
        tree = jp.io.load(line.file.parent / name, max_bytes=_MOST_BYTES).params
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise ValueError(f"the masks of {line.file}, line {line.number}, cannot be read: {reason}") from None
    leaves = dict(zip(jp.leaf_paths(tree), jax.tree.leaves(tree), strict=True))
    found = {
        path: leaf for path, leaf in leaves.items() if leaf.dtype == bool and leaf.ndim >= 2 and leaf.size
    }
    return {path: found[path] for path in sorted(found, key=natural)}


def pictures(masks: dict[str, np.ndarray]) -> list[Picture]:
    """A picture of each kernel; of the first one, if its inputs may be pixels, also of these."""
    made = []
    for index, (path, mask) in enumerate(masks.items()):
        text = f"{path}, {' x '.join(map(str, mask.shape))}: {mask.mean():.2%} kept"
        if index == 0 and mask.ndim == 2 and (pixels := input_pixels(mask)) is not None:
            image, scale = _to_own_maximum(pixels)
            made.append(_picture(path, f"{path}, its input pixels: 0 to {scale:.1%} kept", image))
        if mask.ndim == 4 and mask.shape[2] * mask.shape[3] <= _MOST_TILES and min(mask.shape[:2]) > 1:
            made.append(
                _picture(path, f"{text}; a filter for each input (down) and output (across)", filters(mask))
            )
            continue
        image = blocks(mask)
        if image.shape != mask.reshape(-1, mask.shape[-1]).shape:
            image, scale = _to_own_maximum(image)
            text += f"; points are averages, 0 to {scale:.0%}"
        if len(image) > 3 * image.shape[1]:
            image, text = image.T, f"{text}; on its side"
        made.append(_picture(path, text, image))
    return made


def input_pixels(mask: np.ndarray) -> np.ndarray | None:
    """(inputs, outputs) -> (side, side), the fraction kept of each pixel; None if they form no square.

    Three inputs in a row may be the colours of one pixel.

    Example:
      >>> input_pixels(np.repeat(np.eye(3, dtype=bool).reshape(9, 1), 5, axis=1)).tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    for channels in (1, 3):
        side = math.isqrt(len(mask) // channels)
        if side >= 3 and side * side * channels == len(mask):
            return mask.mean(axis=1).reshape(side, side, channels).mean(axis=-1)
    return None


def filters(mask: np.ndarray) -> np.ndarray:
    """(height, width, in, out) -> tiles, a row for each input and a column for each output; gaps are NaN."""
    h, w, inputs, outputs = mask.shape
    tiles = np.full((inputs, h + 1, outputs, w + 1), np.nan)
    tiles[:, :h, :, :w] = mask.transpose(2, 0, 3, 1)
    return tiles.reshape(inputs * (h + 1), outputs * (w + 1))[:-1, :-1]


def blocks(mask: np.ndarray, most: int = _MOST_CELLS) -> np.ndarray:
    """(..., out) -> the kernel as a matrix, averaged over blocks so that no side is longer than `most`.

    Blocks are as equal as can be, and every entry is in one.

    Example:
      >>> blocks(np.array([[True, False], [True, True], [False, False]]), most=2).tolist()
      [[1.0, 0.5], [0.0, 0.0]]
    """
    matrix = mask.reshape(-1, mask.shape[-1]).astype(float)
    for axis in (0, 1):
        parts = min(most, matrix.shape[axis])
        # np.array_split's way: the first blocks are one longer, where it does not come out even.
        short, longer = divmod(matrix.shape[axis], parts)
        lengths = np.full(parts, short) + (np.arange(parts) < longer)
        starts = np.cumsum(lengths) - lengths
        sums = np.add.reduceat(matrix, starts, axis=axis)
        matrix = sums / (lengths[:, None] if axis == 0 else lengths)
    return matrix


def _to_own_maximum(image: np.ndarray) -> tuple[np.ndarray, float]:
    most = float(image.max())
    return (image / most, most) if most else (image, 1.0)


def _picture(path: str, caption: str, image: np.ndarray) -> Picture:
    times = max(1, round(_SIDE / max(image.shape)))
    large = np.kron(image, np.ones((times, times)))
    colours = mpl.colormaps["cividis"].with_extremes(bad="#808080")
    file = io.BytesIO()
    imsave(file, colours(large), format="png")
    return Picture(path, caption, file.getvalue(), large.shape[1])
