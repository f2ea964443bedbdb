"""What the study needs to know of a network that somebody else has trained, and where its files are."""

from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.datasets import DataUnavailable
from experiments.one_shot.methods import Channels


class Calibration(NamedTuple):
    """What a network is calibrated on: no labels.

    Attributes:
      batches: each a tuple of the arguments behind the params.
      weights: for each batch how much each of its rows counts, 0 for padding; None if all count once.
    """

    batches: Sequence[tuple[Any, ...]]
    weights: Sequence[Any] | None = None


class Pretrained(NamedTuple):
    """A trained network with what it is calibrated and judged on.

    Attributes:
      name: on the command line.
      title: in tables and figures.
      note: where the weights and the data come from, to print beside every figure.
      figure: what `evaluate` counts, as a share of the units: "phoneme error rate".
      params: the trained params.
      apply_fn: the function that is calibrated and pruned, `apply_fn(params, *batch)`.
      calibration: the calibration set of a draw, counted from 0; no example is in two of them.
      evaluate: from params to an array (examples, 2 or 3): the errors and the units of each test example,
        which no calibration set has; with 3 columns also whether the answer is not the dense network's.
      channels: units that can be removed, by name.
      recover_rate: the learning rate that its survivors are tuned with, at first.
      more: a larger calibration set of a draw, to tune more survivors on; None if there is none.
      data: what there is in the test set, to print with the results.
    """

    name: str
    title: str
    note: str
    figure: str
    params: Any
    apply_fn: Callable[..., Any]
    calibration: Callable[[int], Calibration]
    evaluate: Callable[[Any], np.ndarray]
    channels: Mapping[str, Channels]
    recover_rate: float
    more: Callable[[int], Calibration] | None = None
    data: str = ""


def file_of(package: str, name: str) -> Path:
    """Return a file of an installed package, which is not imported: importing it may look at the network.

    Raises:
      DataUnavailable: the package is not installed, or has no such file.
    """
    install = "Install it with: pip install 'jaxprune[pretrained]'"
    try:
        found = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        raise DataUnavailable(f"The package {package} is not installed. {install}") from None
    path = Path(str(found.locate_file(name)))
    if not path.is_file():
        raise DataUnavailable(f"The package {package} {found.version} has no file {name}. {install}")
    return path
