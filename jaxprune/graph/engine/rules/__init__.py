"""The rules, one file for each class of primitives. To add one, see `base.Rule` and `register_rule`."""

from jaxprune.graph.engine.rules import (  # noqa: F401  # each registers its rules
    calls,
    choices,
    collectives,
    contractions,
    indexing,
    linalg,
    others,
    per_reader,
    ragged,
    reductions,
    shapes,
    slices,
    wrappers,
)
from jaxprune.graph.engine.rules.base import (  # noqa: F401
    Frame,
    Rule,
    has_rule,
    learn_changes,
    learn_region,
    link_region,
    register_rule,
    rule_for,
)
from jaxprune.graph.engine.rules.elementwise import elementwise  # noqa: F401
