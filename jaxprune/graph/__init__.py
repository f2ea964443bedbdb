"""Structured pruning from a function's jaxpr: coupled channels, and the network without them."""

from jaxprune.graph.compaction import Compacted, NotRemoved, compact
from jaxprune.graph.engine.rules import Frame, Rule, elementwise, register_rule
from jaxprune.graph.groups import ChannelGroups, Group, Member, channel_groups
from jaxprune.graph.modules.nnx import CompactedModule, compact_module
from jaxprune.graph.modules.widths import linen_widths
from jaxprune.graph.plan import Plan
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
    "linen_widths",
    "register_rule",
    "residual_blocks",
]
