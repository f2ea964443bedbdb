"""The table that printing `ChannelGroups` gives."""

import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxprune.tree.tables import shorten

if TYPE_CHECKING:
    from jaxprune.graph.groups import ChannelGroups, Member

_WIDTH, _MEMBERS = 79, 32  # of a line, and where its members start


def table(groups: "ChannelGroups") -> str:
    """Return a table of groups and their members, and the reasons why the rest stays whole."""
    lines = [f"{'group':<25}{'units':>5}  members"]
    for group in groups.groups:
        members = _listing(
            [f"{m.path}[{m.axis}]{_times(m)}{'(divisor)' if m.divisor else ''}" for m in group.members]
        )
        wrapped = textwrap.wrap(members, _WIDTH - _MEMBERS, break_on_hyphens=False)
        lines.append(f"{shorten(group.name, 24):<24}{group.units:>6}  {wrapped[0]}")
        lines += [" " * _MEMBERS + line for line in wrapped[1:]]
        if group.why_not is not None:
            lines += textwrap.wrap(
                f"not removable: {group.why_not}", _WIDTH, initial_indent="  ", subsequent_indent="    "
            )
    for whole in groups.whole:
        names = _listing([f"{path}[{axis}]" for path, axis in whole.members])
        lines += textwrap.wrap(f"Whole: {names}: {whole.why}.", _WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def _listing(names: Sequence[str]) -> str:
    """Return names in order, with one entry and a count for those that differ in numbers of their path alone.

    The layers of a bare list have nothing but numbers, so that each has its own entry.
    """
    patterns = [_starred(name) for name in names]
    count = Counter(patterns)
    shown = []
    for name, pattern in zip(names, patterns, strict=True):
        if count[pattern] < 3:
            shown.append(name)
        elif (line := f"{pattern} ({count[pattern]})") not in shown:
            shown.append(line)
    return " ".join(shown)


def _starred(name: str) -> str:
    """Return a path and its axis with "*" for the numbers in the path, if a name is left then."""
    path, bracket, axis = name.rpartition("[")
    starred = re.sub(r"\d+", "*", path)
    return f"{starred}{bracket}{axis}" if re.search(r"[^\W\d_]", starred) else name


def _times(member: "Member") -> str:
    return f" x{member.indices.shape[1]}" if member.indices.shape[1] > 1 else ""
