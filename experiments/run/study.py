"""What studies of several seeds share: settings, the folder of results, and a progress bar."""

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm

from experiments.report.design import Design
from experiments.run.results import Results
from experiments.training import loops


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


def at(index: int, tree: Any) -> Any:
    """Return one seed's part of a tree with a leading seed axis."""
    return jax.tree.map(operator.itemgetter(index), tree)
