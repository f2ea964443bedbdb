"""What groups of lines are called, and which are the baselines of the others."""

from collections.abc import Callable
from typing import Any

from experiments.report import groups
from experiments.report.groups import Figure, Group, Part


def level(part: Part, name: str, value: Any) -> str:
    """Return a level as text, in percent if its name and values say so."""
    if value is not None and name in part.percent:
        return f"{100 * value:.6g}"
    return groups.show(value)


def levels(part: Part, group: Group, skip: int = 0) -> str:
    """Return all levels of a group but the first few, as text: "sparsity 98 %"."""
    named = list(zip(part.levels, group.levels, strict=True))[skip:]
    percent = {name: " %" * (name in part.percent) for name, _ in named}
    return ", ".join(f"{name} {level(part, name, value)}{percent[name]}" for name, value in named)


def namer(part: Part) -> Callable[[tuple], str]:
    """Return `name(factors)`, which leaves out the factors that all pruned groups have in common."""
    pruned = list(dict.fromkeys(group.factors for group in part.groups if not group.baseline))
    telling = [len({factors[i] for factors in pruned}) > 1 for i in range(len(part.factors))]

    def name(factors: tuple) -> str:
        kept = [x for x, tells in zip(factors, telling, strict=True) if tells or not any(telling)]
        return ", ".join(groups.show(x) for x in kept if x is not None) or "all"

    return name


def label(part: Part, group: Group) -> str:
    """Return a group by its factors and levels."""
    return ", ".join(filter(None, [namer(part)(group.factors), levels(part, group)]))


def baselines(part: Part, figure: str) -> dict[str, Figure]:
    """Return a figure of each group where nothing is pruned, by what tells these apart."""
    own = [group for group in part.groups if group.baseline and group.figure(figure).found]
    found = {}
    for group in own:
        values = [(x, {other.factors[i] for other in own}) for i, x in enumerate(group.factors)]
        telling = [groups.show(x) for x, others in values if len(others) > 1 and x is not None]
        rest = [groups.show(x) for x in group.levels] if len({g.levels for g in own}) > 1 else []
        found[", ".join([*telling, *rest])] = group.figure(figure)
    return found


def own_method(group: Group) -> bool:
    """Return whether a group is the baseline as a method of its own, without levels to vary."""
    return group.baseline and groups.BASELINE in group.factors
