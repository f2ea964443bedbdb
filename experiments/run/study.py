"""What studies of several seeds share: settings, the folder of results, and a progress bar."""

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from tqdm import tqdm

from experiments.data import datasets
from experiments.report.design import Design
from experiments.run import settings
from experiments.run.results import Results, layers
from experiments.run.settings import Count, Seeds
from experiments.training import loops


@dataclass(frozen=True)
class Settings(settings.Settings):
    """Flags of the studies on digits or MNIST."""

    dataset: Literal["digits", "mnist"] = "digits"  # digits is embedded; mnist is downloaded once
    seeds: Seeds = (0, 1, 2)  # the runs that figures are averaged over
    train_size: Count | None = None  # use this many training images only
    test_size: Count | None = None  # use this many test images only

    @property
    def data(self) -> str:
        """The data set's name in tables and figures."""
        return {"mnist": "MNIST", "digits": "digits"}[self.dataset]

    def load(self, size: int | None = None) -> tuple[loops.Split, loops.Split]:
        """Return the training and test images, of so many pixels each way."""
        found = datasets.load(self.dataset, size=size, train=self.train_size, test=self.test_size)
        return loops.splits(found)


class Study:
    """The base of a study: its subclasses load the data and compile the programs.

    Attributes:
      config: its settings.
      results: where lines go; see `running`.
      bar: how far it is.
    """

    def __init__(self, config: Any, name: str, design: Design, out: str | None = None):
        self.config = config
        self.results = Results(out or config.out, name, config, design=design, resume=not config.fresh)
        self.bar = tqdm(disable=True)

    @contextlib.contextmanager
    def running(self, total: int, unit: str) -> Iterator[None]:
        """Take the folder of results and show the bar, while the study runs."""
        with self.results, tqdm(total=total, unit=unit) as self.bar:
            yield

    def keys(self, purpose: int) -> jax.Array:
        """Return a key for each seed."""
        return loops.seed_keys(self.config.seeds, purpose)

    def missing(self, title: str, cost: int, **fields: Any) -> bool:
        """Return whether no line has these fields; if one has, move the bar by what the line has cost."""
        self.bar.set_description(title)
        done = self.results.done(**fields)
        self.bar.update(cost if done else 0)
        return not done

    def once(self, name: str, epochs: int, make: Callable[[], Any]) -> Any:
        """Return what is trained once, in so many epochs; see `Results.once`."""
        before = self.bar.n
        self.bar.set_description(name)
        params = self.results.once(name, make)
        self.bar.update(before + epochs - self.bar.n)
        return params

    def add(self, of_seed: Callable[[int], dict[str, Any]], **same: Any) -> None:
        """Write a line for each seed: what is the same for all, the seed, and `of_seed(index)`."""
        seeds = enumerate(self.config.seeds)
        self.results.add([same | {"seed": seed} | of_seed(index) for index, seed in seeds])

    def add_masked(
        self,
        masks: Any,
        of_seed: Callable[[int, Any], dict[str, Any]],
        last: bool,
        method: str,
        **same: Any,
    ) -> None:
        """Write a line for each seed, with what its masks leave of each layer.

        Args:
          masks: with a leading seed axis.
          of_seed: the figures, from the number of the seed and its masks.
          last: whether no level of the method is sparser: then the first seed's masks are kept.
          method: its name.
          **same: what is the same for all seeds.
        """

        def line(index: int) -> dict[str, Any]:
            own = at(index, masks)
            found = of_seed(index, own) | {"layers": layers(own)}
            if index == 0 and last:
                found["masks"] = self.results.keep_masks(method, own)
            return found

        self.add(line, method=method, **same)


def at(index: int, tree: Any) -> Any:
    """Return one seed's part of a tree with a leading seed axis."""
    return jax.tree.map(operator.itemgetter(index), tree)


def stack(trees: Sequence[Any]) -> Any:
    """Return trees alike as one with a leading axis, of which `at` gives each back."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
