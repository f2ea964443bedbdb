"""Structured pruning from a function's jaxpr: coupled channels, and the network without them."""

from typing import TYPE_CHECKING, Any

from jaxprune.graph.compaction import Compacted, compact
from jaxprune.graph.engine.rules import Frame, Rule, elementwise, register_rule
from jaxprune.graph.grouping import channel_groups
from jaxprune.graph.groups import ChannelGroups, Group, Member
from jaxprune.graph.modules.nnx import CompactedModule, compact_module
from jaxprune.graph.plan import Plan
from jaxprune.graph.reasons import NotRemoved
from jaxprune.graph.report import Report
from jaxprune.graph.residual import Block, ResidualBlocks, residual_blocks

__all__ = [
    "Block",
    "ChannelGroups",
    "Compacted",
    "CompactedModule",
    "Frame",
    "Group",
    "Member",
    "NotRemoved",
    "Plan",
    "Report",
    "ResidualBlocks",
    "Rule",
    "channel_groups",
    "compact",
    "compact_module",
    "elementwise",
    "register_rule",
    "residual_blocks",
]


if not TYPE_CHECKING:  # a type checker would take any name

    def __getattr__(name: str) -> Any:
        advice = ""
        if name == "linen_widths":
            advice = (
                ". Construct the linen network with the widths of the small params, such as nn.Dense("
                "small.params['params']['Dense_0']['kernel'].shape[-1]), and compare it with small.apply"
            )
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{advice}.")
