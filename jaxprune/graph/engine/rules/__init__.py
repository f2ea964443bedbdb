"""The rules, a file for each class of primitive. To add one, see `base.Rule` and `register_rule`."""

from jaxprune.graph.engine.rules import (
    calls,
    choices,
    collectives,
    contractions,
    indexing,
    layers,
    linalg,
    others,
    ragged,
    reductions,
    shapes,
    slices,
    wrappers,
)
from jaxprune.graph.engine.rules.base import Frame, Rule, has_rule, register_rule, rule_for
from jaxprune.graph.engine.rules.calls import link_region
from jaxprune.graph.engine.rules.elementwise import elementwise

__all__ = [
    "Frame",
    "Rule",
    "calls",
    "choices",
    "collectives",
    "contractions",
    "elementwise",
    "has_rule",
    "indexing",
    "layers",
    "linalg",
    "link_region",
    "others",
    "ragged",
    "reductions",
    "register_rule",
    "rule_for",
    "shapes",
    "slices",
    "wrappers",
]
