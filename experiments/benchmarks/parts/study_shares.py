"""What the founding study's command spends its time on, measured in a process of its own."""

import contextlib
import io
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


class Shares:
    """Runs the study with a clock in its parts; a second belongs to the innermost of them."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._parts = ["everything else"]
        self._since = time.perf_counter()

    def measure(self, words: list[str]) -> dict[str, float]:
        """Return the seconds of each part of the command with these flags; compiling is one for all parts."""
        self._since = time.perf_counter()
        with self._part("imports"):
            import jax

            from experiments import lenet
            from experiments.data import datasets
            from experiments.run.results import Results
            from experiments.training import loops
            from jaxprune.recipes import Recipe
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        whole: tuple[tuple[Any, str, str], ...] = (
            (datasets, "load", "data"),
            (loops, "run_epochs", "training"),
            (lenet, "without_dead_channels", "compaction"),
            (lenet, "file_bytes", "sizes of files"),
            (Results, "add", "results"),
            (lenet, "plot", "plot"),
        )
        for owner, name, part in whole:
            setattr(owner, name, self._timed(getattr(owner, name), part))
        # These return what is to be timed.
        loops.answerer = self._returning(loops.answerer, "evaluation")
        lenet.timer = self._returning(lenet.timer, "timed passes")
        pruner = Recipe.pruner

        def timed_pruner(*args: Any, **given: Any) -> Any:
            with self._part("masks"):
                made = pruner(*args, **given)
            return made._replace(
                init=self._timed(made.init, "masks"), update=self._timed(made.update, "masks")
            )

        Recipe.pruner = timed_pruner
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            lenet.main(words)
        self._charge()
        return dict(self.spent)

    def _charge(self) -> None:
        now = time.perf_counter()
        self.spent[self._parts[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self._charge()
        self._parts.append(name)
        try:
            yield
        finally:
            self._charge()
            self._parts.pop()

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            with self._part(part):
                return function(*args, **given)

        return call

    def _returning(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        return lambda *args, **given: self._timed(function(*args, **given), part)

    def _compiled(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs  # which program it was
        if event in COMPILING:
            self.spent[self._parts[-1]] -= duration_secs
            self.spent["compiling"] += duration_secs
