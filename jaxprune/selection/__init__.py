"""Exact selection: the lowest of many scores, without sorting, copying or concatenating them."""

from jaxprune.selection.exact import lowest, removed_count

__all__ = ["lowest", "removed_count"]
