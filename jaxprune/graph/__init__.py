"""Structured pruning from a function's jaxpr: coupled channels, and the network without them.

`jaxprune.channel_groups`, `jaxprune.compact` and `jaxprune.residual_blocks` are the way in. This module has
the classes that they return, and what a rule for a further primitive is made of.
"""

from typing import TYPE_CHECKING

from jaxprune.graph.engine.rules import Frame, Rule, elementwise, register_rule
from jaxprune.graph.groups import ChannelGroups, Group, Member
from jaxprune.graph.reasons import NotRemoved
from jaxprune.graph.report import Report
from jaxprune.graph.residual import Block, ResidualBlocks
from jaxprune.tree.renamed import renamed

__all__ = [
    "Block",
    "ChannelGroups",
    "Frame",
    "Group",
    "Member",
    "NotRemoved",
    "Report",
    "ResidualBlocks",
    "Rule",
    "elementwise",
    "register_rule",
]

if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = renamed(
        "jaxprune.graph",
        {
            **{
                name: f"jaxprune.{name}"
                for name in (
                    *("Compacted", "CompactedModule", "Plan", "channel_groups", "compact", "compact_module"),
                    "residual_blocks",
                )
            },
            "Stayed": "jaxprune.graph.NotRemoved",
            "linen_widths": (
                "the widths of the small params, such as nn.Dense("
                "small.params['params']['Dense_0']['kernel'].shape[-1]), and compare with small.apply"
            ),
        },
    )
