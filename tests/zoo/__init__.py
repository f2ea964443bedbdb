"""Small models on which structured compaction is tested: `ZOO[name]()` builds one."""

from . import plain, sequence, vision  # noqa: F401  # each enters its cases in ZOO
from .common import ZOO, Case

__all__ = ["ZOO", "Case"]
