"""Structures: which entries are pruned together. Entries are pooled into units, and units are pruned."""

from jaxprune.structures.base import Norm, Structure, Units
from jaxprune.structures.coupled import channels
from jaxprune.structures.depth import layers
from jaxprune.structures.leafwise import blocks, elements, nm, slices

__all__ = ["Norm", "Structure", "Units", "blocks", "channels", "elements", "layers", "nm", "slices"]
