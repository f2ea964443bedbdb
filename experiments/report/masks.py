"""Pictures of masks, as small PNGs: bright is kept, dark is removed."""

import io
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from matplotlib.image import imsave

import jaxprune as jp
from experiments.report.read import Line, natural
from jaxprune import plots

_MOST_BYTES = 1 << 30  # of masks in a file
_SIDE = 220  # pixels that the longer side is enlarged to, more or less


class Picture(NamedTuple):
    """A view of a kernel.

    Attributes:
      caption: what is seen, with the fraction kept.
      png: the image.
      width: in pixels.
    """

    caption: str
    png: bytes
    width: int


def load(line: Line) -> dict[str, np.ndarray]:
    """Return the masks of two and more axes that a line names, by path, in natural order.

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
    """Return the pictures of `jaxprune.plots.mask_images` as PNGs."""
    found = []
    for caption, image in plots.mask_images(masks):
        times = max(1, round(_SIDE / max(image.shape)))
        large = np.kron(image, np.ones((times, times)))
        file = io.BytesIO()
        imsave(file, plots.mask_colours()(large), format="png")
        found.append(Picture(caption, file.getvalue(), large.shape[1]))
    return found
