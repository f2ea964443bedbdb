"""The axis graph: which slices of which axes have to stay. Plain numpy, free of jax.

A node is one axis of one value. Constraints say how the kept slices of nodes hang together:

- `same(a, b)`: slice i of one stays exactly if slice i of the other does;
- `link(a, ia, b, ib)`: slice `ia[n]` of a stays exactly if slice `ib[n]` of b does;
- `product(m, factors)`: m is the row-major product of the factors, and slice (i, j, ...) of it
  stays exactly if slice i of the first, j of the second, ... all do;
- `cover(a, b)`: slice i of a stays if slice i of b does, but it may stay without;
- `pin(a, why)`: all slices stay.

`AxisGraph.solve` takes seeds, slices that have to stay, and returns the least set of slices that
holds them and obeys all constraints. More seeds are therefore always safe.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Vector = np.ndarray
"""A bool vector with one entry for each slice of an axis."""

State = Vector | Literal[True]
"""Which slices of an axis stay: a `Vector` with a False in it, or True for all of them."""


class Link(NamedTuple):
    """Slice `ia[n]` of node a stays exactly if slice `ib[n]` of node b does."""

    a: int
    ia: np.ndarray
    b: int
    ib: np.ndarray


class Product(NamedTuple):
    """Node `whole` is the row-major product of the nodes `factors`."""

    whole: int
    factors: tuple[int, ...]


class Cover(NamedTuple):
    """Slice i of node `whole` stays if slice i of node `part` does."""

    whole: int
    part: int
    may_tie: bool


Constraint = Link | Product | Cover


class Solution:
    """A solution: for every node of the graph it came from, the slices that stay."""

    def __init__(self, find: Callable[[int], int], states: dict[int, State]):
        self._find, self._states = find, states

    def state(self, node: int) -> State:
        """True where all slices of the node stay, else which of them."""
        return self._states[self._find(node)]

    def full(self, node: int) -> bool:
        """Whether all slices of the node stay."""
        return self.state(node) is True

    def indices(self, node: int) -> np.ndarray | None:
        """The slices that stay, in order; None for all of them."""
        state = self.state(node)
        return None if state is True else np.flatnonzero(state)


class AxisGraph:
    """Nodes and constraints; grown by the calls below, then solved as often as one likes.

    A size may be anything that is not an `int` (a symbolic dimension): such a node is pinned.

    Example:
      >>> import numpy as np
      >>> from jaxprune.graph.axes import AxisGraph
      >>> graph = AxisGraph()
      >>> heads, width, flat = graph.node(2), graph.node(3), graph.node(6)
      >>> graph.product(flat, [heads, width])
      >>> graph.pin(width, "all of it is read")
      >>> seed = np.array([False, False, False, False, True, False])
      >>> graph.solve([(flat, seed)]).state(flat).tolist()
      [False, False, False, True, True, True]
    """

    def __init__(self) -> None:
        self.sizes: list[Any] = []
        self._parent: list[int] = []
        self._links: list[Link] = []
        self._products: list[Product] = []
        self._covers: list[Cover] = []
        self._pins: dict[int, Any] = {}
        self._touching: dict[int, list[Constraint]] | None = None
        self._pinned: dict[int, State] | None = None

    def copy(self) -> "AxisGraph":
        """A graph of its own with the same nodes and constraints, to pin more in."""
        other = AxisGraph()
        other.sizes, other._parent = list(self.sizes), list(self._parent)
        other._links, other._products = list(self._links), list(self._products)
        other._covers = list(self._covers)
        other._pins = dict(self._pins)
        return other

    def node(self, size: Any) -> int:
        """A new node. Nodes of size 1, and of a size that is no integer, are pinned."""
        index = len(self.sizes)
        self.sizes.append(size)
        self._parent.append(index)
        if not isinstance(size, (int, np.integer)):
            self.pin(index, "its size is symbolic")
        elif size <= 1:
            self.pin(index, "it has one slice")
        return index

    def find(self, node: int) -> int:
        """The node that stands for all that are `same` as this one."""
        root = node
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[node] != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def same(self, a: int, b: int) -> None:
        """Two nodes keep the same slices.

        Raises:
          ValueError: they have different sizes.
        """
        ra, rb = self.find(a), self.find(b)
        if ra == rb:
            return
        if self.sizes[ra] != self.sizes[rb]:
            raise ValueError(f"axes of sizes {self.sizes[ra]} and {self.sizes[rb]} cannot be the same.")
        low, high = min(ra, rb), max(ra, rb)
        self._parent[high] = low
        if high in self._pins:
            self._pins.setdefault(low, self._pins.pop(high))
        self._forget()

    def link(self, a: int, ia: np.ndarray, b: int, ib: np.ndarray) -> None:
        """Slice `ia[n]` of a stays exactly if slice `ib[n]` of b does."""
        self._links.append(Link(a, np.asarray(ia), b, np.asarray(ib)))
        self._forget()

    def product(self, whole: int, factors: Sequence[int]) -> None:
        """A node is the row-major product of others.

        Raises:
          ValueError: the sizes do not multiply.
        """
        if len(factors) == 1:
            return self.same(whole, factors[0])
        if self.sizes[whole] != np.prod([self.sizes[factor] for factor in factors], dtype=np.int64):
            sizes = [self.sizes[factor] for factor in factors]
            raise ValueError(f"an axis of size {self.sizes[whole]} is not the product of {sizes}.")
        self._products.append(Product(whole, tuple(factors)))
        self._forget()
        return None

    def cover(self, whole: int, part: int, may_tie: bool = False) -> None:
        """Slice i of `whole` stays if slice i of `part` does: several parts may differ.

        Args:
          whole, part: the nodes.
          may_tie: whether the two may be made the same where that serves better; see `covers`.

        Raises:
          ValueError: they have different sizes.
        """
        if self.sizes[whole] != self.sizes[part]:
            sizes = self.sizes[whole], self.sizes[part]
            raise ValueError(f"an axis of size {sizes[1]} cannot be part of one of size {sizes[0]}.")
        self._covers.append(Cover(whole, part, may_tie))
        self._forget()

    def covers(self) -> list[Cover]:
        """The covers that may be tied, and are not."""
        return [c for c in self._covers if c.may_tie and self.find(c.whole) != self.find(c.part)]

    def pin(self, node: int, why: Any) -> None:
        """All slices of a node stay; `why` is kept for `why_pinned`."""
        self._pins.setdefault(self.find(node), why)
        self._forget()

    def why_pinned(self, node: int, index: int | None = None) -> Any:
        """Why a slice of a node stays whatever the seeds are, or None if it need not.

        Args:
          node: the node.
          index: the slice; None asks whether any slice has to stay.
        """
        state = self._pinned_states()[self.find(node)]
        if index is not None and state is not True and not state[index]:
            return None
        return self._why.get(self.find(node))

    def always_kept(self) -> Solution:
        """What stays whatever the seeds are."""
        return Solution(self.find, self._pinned_states())

    def solve(self, seeds: Iterable[tuple[int, State]], never_empty: bool = True) -> Solution:
        """The least set of slices that holds the pins and the seeds and obeys all constraints.

        Args:
          seeds: nodes and which of their slices have to stay.
          never_empty: an axis of which nothing would stay keeps its first slice.

        Returns:
          The solution.
        """
        states: dict[int, State] = {
            root: True if s is True else s.copy() for root, s in self._pinned_states().items()
        }
        work = [root for node, state in seeds if self._add(states, root := self.find(node), state)]
        self._close(states, work)
        if never_empty:
            for root in list(states):
                state = states[root]
                if state is not True and not state.any():
                    state[0] = True
                    self._close(states, [root])
        return Solution(self.find, states)

    def free_products(self) -> list[Product]:
        """The products of which two or more factors could lose slices."""
        states = self._pinned_states()

        def free(node: int) -> bool:
            return states[self.find(node)] is not True

        return [p for p in self._products if sum(map(free, p.factors)) > 1]

    def components(self, covers: bool = True) -> Callable[[int], int]:
        """A function that numbers nodes: two have the same number if constraints join them.

        Args:
          covers: whether a cover joins its nodes.
        """
        joined = AxisGraph()
        joined.sizes, joined._parent = [0] * len(self.sizes), list(self._parent)
        for link in self._links:
            joined.same(link.a, link.b)
        for product in self._products:
            for factor in product.factors:
                joined.same(product.whole, factor)
        for cover in self._covers if covers else ():
            joined.same(cover.whole, cover.part)
        return joined.find

    def units(self) -> dict[int, np.ndarray]:
        """Which slices can only go together.

        Returns:
          For each root node that can lose slices a vector of labels: slices of one label, of
          whatever node, form a unit; -1 marks slices that always stay. A cover joins none: pin its
          `whole`, which goes with no unit alone.

        Raises:
          ValueError: there are `free_products`, which make the answer ambiguous.
        """
        if ambiguous := self.free_products():
            raise ValueError(f"pin all but one factor of each product first; there are {len(ambiguous)}.")
        states = self._pinned_states()
        labels, start = {}, 0
        for root, state in states.items():
            if state is not True:
                labels[root] = np.where(state, -1, start + np.arange(len(state)))
                start += len(state)
        work = list(labels)
        while work:
            root = work.pop()
            for constraint in self._touching_root(root):
                for other in self._lower_labels(constraint, labels):
                    if other not in work:
                        work.append(other)
        return labels

    # Everything below works on roots and on the states of one solution.

    def _forget(self) -> None:
        self._touching = self._pinned = None

    def _touching_root(self, root: int) -> list[Constraint]:
        if self._touching is None:
            self._touching = {}
            for link in self._links:
                for node in {self.find(link.a), self.find(link.b)}:
                    self._touching.setdefault(node, []).append(link)
            for product in self._products:
                for node in {self.find(n) for n in (product.whole, *product.factors)}:
                    self._touching.setdefault(node, []).append(product)
            for cover in self._covers:
                self._touching.setdefault(self.find(cover.part), []).append(cover)
        return self._touching.get(root, [])

    def _pinned_states(self) -> dict[int, State]:
        if self._pinned is None:
            roots = {self.find(node) for node in range(len(self.sizes))}
            self._why = dict(self._pins)
            states: dict[int, State] = {
                root: True if root in self._pins else np.zeros(self.sizes[root], bool) for root in roots
            }
            self._close(states, list(self._pins), self._why)
            self._pinned = states
        return self._pinned

    def _add(self, states: dict[int, State], root: int, more: State) -> bool:
        """Adds slices to those kept of a root; whether any was new."""
        state = states[root]
        if state is True:
            return False
        if more is True or (more | state).all():
            states[root] = True
            return True
        if not (more & ~state).any():
            return False
        states[root] = state | more
        return True

    def _close(self, states: dict[int, State], work: list[int], why: dict[int, Any] | None = None) -> None:
        """Keeps what the constraints ask for, starting from the roots that changed."""
        while work:
            root = work.pop()
            for constraint in self._touching_root(root):
                for other, state in self._asked(constraint, root, states):
                    if self._add(states, other, state):
                        work.append(other)
                        if why is not None:
                            why.setdefault(other, why.get(root))

    def _asked(self, constraint: Constraint, root: int, states: dict[int, State]) -> list[tuple[int, State]]:
        """What a constraint asks of the other nodes, given what is kept of one root."""
        if isinstance(constraint, Cover):
            return [(self.find(constraint.whole), states[root])]
        if isinstance(constraint, Link):
            asked = []
            for here, i, there, j in (constraint, Link(*constraint[2:], *constraint[:2])):
                here, there = self.find(here), self.find(there)
                if here == root and states[there] is not True:
                    state, more = states[here], np.zeros(self.sizes[there], bool)
                    more[j[np.ones(len(i), bool) if state is True else state[i]]] = True
                    asked.append((there, more))
            return asked
        whole, factors = self.find(constraint.whole), [self.find(f) for f in constraint.factors]
        asked = []
        if whole == root and not all(states[f] is True for f in factors):
            state = states[whole]
            if state is True:
                asked += [(f, True) for f in factors]
            else:
                grid = state.reshape([self.sizes[f] for f in factors])
                axes = range(len(factors))
                asked += [(f, grid.any(axis=tuple(a for a in axes if a != n))) for n, f in enumerate(factors)]
        if root in factors and states[whole] is not True:
            if all(states[f] is True for f in factors):
                asked.append((whole, True))
            else:
                vectors = [np.ones(self.sizes[f], bool) if (s := states[f]) is True else s for f in factors]
                asked.append((whole, outer_and(vectors)))
        return asked

    def _lower_labels(self, constraint: Constraint, labels: dict[int, np.ndarray]) -> list[int]:
        """Gives what a constraint joins the lowest of its labels; the roots that changed."""
        if isinstance(constraint, Cover):
            return []
        if isinstance(constraint, Link):
            a, b = self.find(constraint.a), self.find(constraint.b)
            if a not in labels or b not in labels:
                return []
            before = labels[a].copy(), labels[b].copy()
            free = labels[a][constraint.ia] >= 0
            ia, ib = constraint.ia[free], constraint.ib[free]
            lowest = np.minimum(labels[a][ia], labels[b][ib])
            np.minimum.at(labels[a], ia, lowest)
            np.minimum.at(labels[b], ib, lowest)
            pairs = zip((a, b), before, strict=True)
            return [root for root, old in pairs if not np.array_equal(old, labels[root])]
        whole, factors = self.find(constraint.whole), [self.find(f) for f in constraint.factors]
        free_factors = [n for n, f in enumerate(factors) if f in labels]
        if whole not in labels or not free_factors:
            return []
        (n,) = free_factors
        factor, sizes = factors[n], [self.sizes[f] for f in factors]
        others = tuple(a for a in range(len(factors)) if a != n)
        lowest = np.minimum(labels[factor], labels[whole].reshape(sizes).min(axis=others))
        spread = np.broadcast_to(np.expand_dims(lowest, others), sizes).ravel()
        changed = []
        for root, new in ((factor, lowest), (whole, spread)):
            if not np.array_equal(labels[root], new):
                labels[root] = new.copy()
                changed.append(root)
        return changed


def outer_and(vectors: Sequence[Vector]) -> Vector:
    """The row-major outer product of bool vectors."""
    result = np.ones(1, bool)
    for vector in vectors:
        result = (result[:, None] & vector[None, :]).ravel()
    return result
