"""Groups of coupled channels: the values that `channel_groups` returns."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from jaxprune.graph import grouptable
from jaxprune.graph.blocktrees import below
from jaxprune.tree.stacks import Stacks
from jaxprune.typing import Where


class Member(NamedTuple):
    """An axis of a param on which the units of a group have slices.

    Attributes:
      path: the param's path; for a layer of a stacked param such as "layers/up[0]".
      axis: the axis, from 0, of that layer.
      indices: int array, units x slices: the slices of each unit.
      shape: the param's shape, or the layer's.
      divisor: whether the function divides by these slices, or would otherwise be NaN where they
        are zero. The masks of a pruned unit leave them alive, since the rest of the unit makes them
        harmless, and `compact` drops them with it.
    """

    path: str
    axis: int
    indices: np.ndarray
    shape: tuple[int, ...]
    divisor: bool = False


class Group(NamedTuple):
    """Units of coupled channels that can replace each other: the channels of a layer, say.

    Attributes:
      name: the path and axis of its first kernel, or of its first member.
      units: how many units there are.
      members: the axes of params on which they have slices.
      kind: groups of equal kind have members of the same names and axes, whatever their sizes.
      why_not: why no unit can be removed; None if units can.
      weights: the paths of the members that the function uses as the weights of a product, which
        take part by default; None if that is not known.
      stack: for a group in one layer of stacked params, the common name of its counterparts in all
        layers, such as `"layers/up[*][1]"`, of which `compact` keeps equal numbers of units; else None.
      residual: whether the units lie on a residual stream, which all blocks add to: see
        `ChannelGroups.inner`.
    """

    name: str
    units: int
    members: tuple[Member, ...]
    kind: str
    why_not: str | None = None
    weights: tuple[str, ...] | None = None
    stack: str | None = None
    residual: bool = False

    @property
    def removable(self) -> bool:
        """Whether a unit whose slices are all zero can be taken out."""
        return self.why_not is None


class Whole(NamedTuple):
    """Axes of params that stay whole for one reason.

    Attributes:
      members: the paths and axes.
      why: the reason.
    """

    members: tuple[tuple[str, int], ...]
    why: str


@dataclass(frozen=True)
class ChannelGroups:
    """All groups of a function; printing it gives a table.

    Attributes:
      groups: the groups, in the order of the params.
      whole: the axes of params that are in no group, and why.
      stacks: by path, the axes of stacked params that count layers.
    """

    groups: tuple[Group, ...]
    whole: tuple[Whole, ...]
    stacks: Stacks = field(default_factory=dict)

    def removable(self) -> tuple[Group, ...]:
        """Return the groups that units can be removed from."""
        return tuple(group for group in self.groups if group.removable)

    def under(self, prefix: str) -> "ChannelGroups":
        """Return the groups for a part of the params: paths without a prefix, members elsewhere left out.

        For functions of `{"params": ..., "batch_stats": ...}` whose optimizer sees the params alone:
        `groups.under("params")`.

        Raises:
          ValueError: no path has the prefix.
        """
        start = prefix.rstrip("/") + "/"
        groups = []
        for group in self.groups:
            members = tuple(
                m._replace(path=m.path.removeprefix(start)) for m in group.members if m.path.startswith(start)
            )
            if members:
                group = group._replace(
                    name=group.name.removeprefix(start),
                    members=members,
                    weights=group.weights and tuple(below(prefix, dict.fromkeys(group.weights))),
                    stack=group.stack and group.stack.removeprefix(start),
                )
                if group.removable and all(member.divisor for member in members):
                    group = group._replace(why_not=f"the function divides by all that lies under {prefix!r}")
                groups.append(group)
        if not groups:
            paths = sorted({member.path for group in self.groups for member in group.members})
            raise ValueError(
                f"no member of a group lies under {prefix!r}; their paths are {', '.join(paths)}."
            )
        return ChannelGroups(tuple(groups), (), below(prefix, self.stacks))

    def without(self, where: Where) -> "ChannelGroups":
        """Return the groups without those that have a member that `where(path, member)` matches.

        Raises:
          ValueError: nothing matches.
        """
        kept = tuple(g for g in self.groups if not any(where(m.path, m) for m in g.members))
        if len(kept) == len(self.groups):
            raise ValueError(f"without({getattr(where, '__name__', where)}) matches no member of a group.")
        return replace(self, groups=kept)

    def inner(self) -> "ChannelGroups":
        """Return the groups inside blocks: heads and hidden units alone, the residual stream whole.

        A stream is what residual connections add to: the width of a transformer, or of a stage of a
        ResNet. A channel of it is one unit that all blocks read and write, so that removing it narrows every
        block; the groups inside a block concern that block alone. A network without residual connections has
        inner groups only.

        Raises:
          ValueError: all groups lie on a stream.

        Example:
          >>> import jax.numpy as jnp, jaxprune as jp
          >>> params = {"embed": jnp.ones((2, 3)), "up": jnp.ones((3, 4)), "down": jnp.ones((4, 3))}
          >>> def apply_fn(params, x):
          ...     x = x @ params["embed"]
          ...     return jnp.sum(x + jnp.tanh(x @ params["up"]) @ params["down"])
          >>> groups = jp.channel_groups(apply_fn, params, jnp.ones((1, 2)))
          >>> [group.name for group in groups], [group.name for group in groups.inner()]
          (['down[1]', 'up[1]'], ['up[1]'])
        """
        inner = tuple(group for group in self.groups if not group.residual)
        if self.groups and not inner:
            raise ValueError("inner() leaves nothing: every group lies on a residual stream.")
        return replace(self, groups=inner)

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        return grouptable.table(self)
