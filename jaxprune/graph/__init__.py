"""Structured pruning from a function's jaxpr: coupled channels, and the network without them."""

from jaxprune.graph.blocks import Block, ResidualBlocks, residual_blocks
from jaxprune.graph.compaction import Compacted, Stayed, compact
from jaxprune.graph.groups import ChannelGroups, Group, Member, channel_groups
from jaxprune.graph.modules import CompactedModule, compact_module
from jaxprune.graph.plan import Plan
from jaxprune.graph.report import Report
from jaxprune.graph.rules import Frame, Rule, elementwise, register_rule
from jaxprune.graph.widths import linen_widths

__all__ = [
    "Block",
    "ChannelGroups",
    "Compacted",
    "CompactedModule",
    "Frame",
    "Group",
    "Member",
    "Plan",
    "Report",
    "ResidualBlocks",
    "Rule",
    "Stayed",
    "channel_groups",
    "compact",
    "compact_module",
    "elementwise",
    "linen_widths",
    "register_rule",
    "residual_blocks",
]
