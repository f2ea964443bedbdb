"""Structures: which entries are pruned together. Entries are pooled into units, and units are pruned."""

from typing import TYPE_CHECKING

from jaxprune.structures.base import Norm
from jaxprune.structures.coupled import channels
from jaxprune.structures.depth import layers
from jaxprune.structures.leafwise import blocks, elements, nm, slices
from jaxprune.tree.renamed import renamed

__all__ = ["Norm", "blocks", "channels", "elements", "layers", "nm", "slices"]

if not TYPE_CHECKING:  # a type checker would take any name
    __getattr__ = renamed(
        "jaxprune.structures", {"Structure": "jaxprune.Structure", "Units": "jaxprune.Units"}
    )
