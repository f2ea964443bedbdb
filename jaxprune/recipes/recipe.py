"""`Recipe`, and its readers from a file, a text or a dict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxprune import distillation
from jaxprune.calibration.layerwise import PrunedLayers
from jaxprune.recipes.calibrating import Calibration, read_calibration
from jaxprune.recipes.document import MAX_CHARACTERS, Node, RecipeError, from_python, from_yaml, to_yaml
from jaxprune.recipes.options import Call, attempt, named, read
from jaxprune.recipes.sections import Section, combined, inputs, read_section
from jaxprune.schedules import check_sparsity
from jaxprune.tree.leaves import array_leaves
from jaxprune.typing import Params, Pruner, ScoreFn

VERSION = 1
_KEYS = ("version", "study", "config", "prune", "calibrate", "distillation", "stop")


class Stop(NamedTuple):
    """When pruning stops, before its schedule ends.

    Attributes:
      sparsity: the pruner itself stops here, to the unit; see `jaxprune.pruner`.
      macs: multiply-adds of one example; pruning stops when there are no more than these.
      accuracy: in (0, 1]; pruning stops when the accuracy falls below it.
    """

    sparsity: float | None = None
    macs: int | None = None
    accuracy: float | None = None

    def reached(self, *, macs: int | None = None, accuracy: float | None = None) -> str | None:
        """Return a reason to stop, or None. Call it between levels, or now and then in training.

        A `sparsity` needs no call: the pruner removes nothing beyond it. If the reason is the accuracy, keep
        the masks of the call before.

        Args:
          macs: the multiply-adds of the pruned network.
          accuracy: of the pruned network, on examples that are not those of the final figure.

        Returns:
          A sentence, or None.

        Raises:
          ValueError: a figure that the rule needs is missing.

        Example:
          >>> import jaxprune as jp
          >>> stop = jp.recipes.Stop(accuracy=0.97)
          >>> stop.reached(accuracy=0.98) is None
          True
          >>> stop.reached(accuracy=0.9612)
          'accuracy 0.9612 is below 0.97'
        """
        if missing := [
            name
            for name, limit, figure in (("macs", self.macs, macs), ("accuracy", self.accuracy, accuracy))
            if limit is not None and figure is None
        ]:
            raise ValueError(f"the stopping rule looks at {' and '.join(missing)}: pass {missing[0]}=...")
        if self.accuracy is not None and accuracy is not None and not accuracy >= self.accuracy:
            return f"accuracy {accuracy:.4g} is below {self.accuracy:g}"
        if self.macs is not None and macs is not None and macs <= self.macs:
            return f"{macs:,} MACs are at most {self.macs:,}"
        return None


@dataclass(frozen=True)
class Recipe:
    """What to prune, how much and when.

    Attributes:
      data: the recipe as plain data: `parse(recipe.data)` is the same recipe.
      stop: when to stop pruning.
      distillation: the options of `jaxprune.distillation.objective`, or None.
    """

    data: dict[str, Any]
    stop: Stop = field(compare=False)
    distillation: dict[str, Any] | None = field(compare=False)
    _sections: tuple[Section, ...] = field(compare=False, repr=False)
    _calibration: Calibration | None = field(default=None, compare=False, repr=False)

    @property
    def calibrates(self) -> bool:
        """Whether it prunes a trained network by `prune_layers`, and has no pruner."""
        return self._calibration is not None

    @property
    def end_step(self) -> int | None:
        """The step at which pruning inside an optimizer ends; None for a recipe of levels."""
        ends = [section.end_step for section in self._sections if section.end_step is not None]
        return max(ends, default=None)

    @property
    def once(self) -> bool:
        """Whether one update prunes everything, as for a plain number; else there are levels or steps."""
        return all(section.once for section in self._sections)

    def where(self, path: str, leaf: Any) -> bool:
        """Return whether a leaf takes part, in any section."""
        if self._calibration is not None:
            return self._calibration.where(path, leaf)
        return any(section.where(path, leaf) for section in self._sections)

    def pruner(self, params: Params, *, key: jax.Array | None = None, **given: Any) -> Pruner:
        """Return the pruner of the recipe, for `wrap_optax`, `lottery_ticket`, `prune_rounds`.

        Args:
          params: the params to prune, which the recipe is checked against. Shapes are enough, unless it
            rewires masks.
          key: for the first masks of rewired sections, in place of their seeds.
          **given: what a text cannot hold and scores or structures need: `loss_fn`, `apply_fn`, `x`,
            `groups` (for `channels`; made from `apply_fn` and `x` if these are given). Inputs that nothing
            needs are not used.

        Returns:
          A `Pruner`, which follows all sections.

        Raises:
          RecipeError: it does not fit the params: a path or pattern matches nothing, two sections take in
            the same leaf, a structure does not fit a shape, an input is missing.
          TypeError: an argument that no recipe uses.

        Example:
          >>> import jax.numpy as jnp, jaxprune as jp
          >>> recipe = jp.recipes.parse({"prune": {"score": "magnitude", "sparsity": {"geometric": 0.5}}})
          >>> params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
          >>> masks = jp.prune_rounds(params, recipe.pruner(params), 2)
          >>> int(masks["kernel"].sum())
          2
        """
        if wrong := [name for name in given if name not in inputs()]:
            raise TypeError(f"a recipe's pruner takes {', '.join(inputs())} and key; got {', '.join(wrong)}.")
        if self._calibration is not None:
            self._calibration.node.fail(
                "it prunes a trained network, and has no pruner: call "
                "recipe.prune_layers(apply_fn, params, batches)."
            )
        by_leaf: dict[str, Section] = {}
        for section in self._sections:
            for path, leaf in array_leaves(params).items():
                if not section.where(path, leaf):
                    continue
                if path in by_leaf:
                    other = by_leaf[path].node
                    section.node.fail(
                        f"it takes in {path}, which {other.key} ({other.place}) takes in as well."
                    )
                by_leaf[path] = section
        parts = [(s.pruner(params, given, self.stop.sparsity, key), s.where) for s in self._sections]
        return combined(parts)

    def prune_layers(
        self, apply_fn: Callable[..., Any], params: Params, batches: Sequence[Any], **given: Any
    ) -> PrunedLayers:
        """Prune a trained network as the section `calibrate` says; see `jaxprune.prune_layers`.

        Args:
          apply_fn: a pure function `apply_fn(params, *batch)`.
          params: trained.
          batches: a list of batches.
          **given: other arguments of `jaxprune.prune_layers`, such as `weights`, `checkpoint` and `progress`.

        Raises:
          RecipeError: the recipe has no such section, or does not fit the params.

        Example:
          >>> import jax, jax.numpy as jnp, jaxprune as jp
          >>> calibrate = {"solver": {"sparsegpt": {"block": 4}}, "sparsity": 0.5}
          >>> recipe = jp.recipes.parse({"calibrate": calibrate})
          >>> params = {"a": jax.random.normal(jax.random.key(0), (4, 8)), "b": jnp.ones((8, 1))}
          >>> apply_fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
          >>> x = jax.random.normal(jax.random.key(1), (32, 4))
          >>> recipe.prune_layers(apply_fn, params, [x]).masks["a"].sum().item()
          16
        """
        if self._calibration is None:
            raise RecipeError(
                "this recipe has no section calibrate, so it does not prune layer by layer: use "
                "recipe.pruner(params)."
            )
        return self._calibration.run(apply_fn, params, batches, given)

    def to_yaml(self) -> str:
        """Return the recipe as YAML, from which `parse` reads the same recipe.

        Example:
          >>> import jaxprune as jp
          >>> prune = {"score": "magnitude", "sparsity": {"linear": {"sparsity": 0.8, "end_step": 9}}}
          >>> print(jp.recipes.parse({"prune": prune}).to_yaml(), end="")
          version: 1
          prune:
            score: magnitude
            sparsity:
              linear: {sparsity: 0.8, end_step: 9}
        """
        return to_yaml(self.data)


def load(path: str | Path, scores: Mapping[str, ScoreFn] | None = None) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
      path: of the file.
      scores: score functions of your own, by the names that the recipe calls them.

    Raises:
      RecipeError: what is wrong, with the line and the key.
      OSError: the file cannot be read.
      ImportError: PyYAML is not installed.
    """
    return _parse(read_text(path), str(path), scores)


def parse(source: str | Mapping[str, Any], scores: Mapping[str, ScoreFn] | None = None) -> Recipe:
    r"""Read a recipe from a YAML text or from a dict.

    Args:
      source: the text, or the same as dicts, lists, numbers and texts.
      scores: score functions of your own, by the names that the recipe calls them.

    Raises:
      RecipeError: what is wrong, with the line and the key.
      ImportError: `source` is a text, and PyYAML is not installed.
      TypeError: `scores` is not a dict.

    Example:
      >>> import jaxprune as jp
      >>> try:
      ...     jp.recipes.parse("prune:\n  score: magnitude\n  sparcity: 0.9")
      ... except jp.recipes.RecipeError as error:
      ...     print(str(error).partition(" Allowed")[0])
      recipe:3: prune.sparcity: unknown "sparcity". Did you mean sparsity?
    """
    return _parse(source, "recipe", scores)


def _parse(source: Any, name: str, scores: Mapping[str, ScoreFn] | None = None) -> Recipe:
    if isinstance(source, str):
        return _read(from_yaml(source, name), scores)
    if not isinstance(source, Mapping):
        raise RecipeError(f"{name}: expected a YAML text or a dict, got {type(source).__name__}.")
    return _read(from_python(source, name), scores)


def read_text(path: str | Path) -> str:
    """Return the text of a file, of which no more is read than a recipe may have."""
    most = 4 * MAX_CHARACTERS  # bytes: a character of UTF-8 takes 4 at most
    try:
        with Path(path).open("rb") as file:
            data = file.read(most + 1)
    except ValueError as error:
        raise RecipeError(f"{str(path)!r} is not a path: {error}.") from None
    if len(data) > most:
        raise RecipeError(f"{path}: more than {most:,} bytes, too many for a recipe.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: this is not text: {error}.") from None


def check_version(nodes: Mapping[str, Node]) -> None:
    """Check the version of the format, if it is given."""
    if "version" in nodes and (version := nodes["version"].integer()) != VERSION:
        nodes["version"].fail(f"this jaxprune reads recipes of version {VERSION}, got {version}.")


def _read(root: Node, scores: Mapping[str, ScoreFn] | None) -> Recipe:
    nodes = root.fields(_KEYS)
    check_version(nodes)
    if "calibrate" in nodes:
        for name in ("prune", "distillation", "stop"):
            if name in nodes:
                nodes[name].fail("it cannot stand beside calibrate, which prunes a trained network at once.")
        calibration = read_calibration(nodes["calibrate"])
        return Recipe({"version": VERSION, **root.plain()}, Stop(), None, (), calibration)
    if "prune" not in nodes:
        if "study" in nodes:
            name = nodes["study"].text()
            nodes["study"].fail(
                f"this is the recipe of a whole study: run it by python -m experiments.{name} --recipe FILE."
            )
        root.fail(f"prune must be given, or calibrate; got {root.described()}.")
    prune = nodes["prune"]
    if isinstance(prune.value, list) and not prune.value:
        prune.fail("an empty list prunes nothing.")
    parts = prune.value if isinstance(prune.value, list) else [prune]
    sections = tuple(read_section(part, scores) for part in parts)
    stop = _read_stop(nodes["stop"], sections) if "stop" in nodes else Stop()
    teaching = _read_distillation(nodes["distillation"]) if "distillation" in nodes else None
    return Recipe({"version": VERSION, **root.plain()}, stop, teaching, sections)


def _read_stop(node: Node, sections: tuple[Section, ...]) -> Stop:
    hints = {"sparsity": float, "macs": int, "accuracy": float}
    fields = node.fields(hints)
    values: dict[str, Any] = {name: read(each, hints[name]) for name, each in fields.items()}
    stop = Stop(**values)
    if stop.macs is not None and stop.macs < 1:
        fields["macs"].fail(f"expected a number of multiply-adds, 1 or more, got {stop.macs}.")
    if stop.accuracy is not None and not 0 < stop.accuracy <= 1:
        fields["accuracy"].fail(f"expected an accuracy in (0, 1] (97 % is 0.97), got {stop.accuracy}.")
    if stop.sparsity is not None:
        _check_stop(stop.sparsity, fields["sparsity"], sections)
    return stop


def _check_stop(sparsity: float, node: Node, sections: tuple[Section, ...]) -> None:
    attempt(node, lambda: check_sparsity(sparsity))
    if len(sections) > 1:
        node.fail(
            "with several sections under prune it is not clear which one stops: end their schedules instead."
        )
    section = next(iter(sections))
    if section.rewire is not None:
        node.fail("rewired masks have the same sparsity all the time.")
    last = section.targets.ends
    ends = len(last) == len(section.targets.each) and section.options.get("of", "total") == "total"
    if ends and max(last) < sparsity:
        node.fail(f"it is never reached: {section.targets.node.key} ends at {max(last):g}.")


def _read_distillation(node: Node) -> dict[str, Any]:
    # Read as if it were written `objective: {...}`; the caller gives apply_fn and teacher.
    objective = {"objective": distillation.objective}
    node.mapping("a mapping such as {temperature: 4, alpha: 0.9}")
    call: Call = named(node._replace(value={"objective": node}), objective, "losses", ("apply_fn", "teacher"))
    stand_in: Any = len  # any function will do: only the options are checked
    attempt(node, lambda: distillation.objective(stand_in, stand_in, **call.options))
    return dict(call.options)
