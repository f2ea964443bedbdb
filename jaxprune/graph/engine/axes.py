"""The axis graph: which slices of which axes have to be kept. Plain numpy, free of jax.

A node is one axis of one value. Constraints relate the kept slices of nodes:

- `same(a, b)`: slice i of a is kept exactly if slice i of b is;
- `link(a, ia, b, ib)`: slice `ia[n]` of a is kept exactly if slice `ib[n]` of b is;
- `product(flat, factors)`: `flat` is the row-major product of the factors, and its slice (i, j, ...) is
  kept exactly if slice i of the first factor, slice j of the second, ... are all kept;
- `cover(superset, subset)`: slice i of `superset` is kept if slice i of `subset` is, but not only then;
- `pin(a, why)`: all slices of a are kept.

`AxisGraph.solve` takes seeds, slices that have to be kept, and returns the least set of slices that
contains them and satisfies all constraints.

Why there is a least set, and why the order in which it is computed does not matter
-----------------------------------------------------------------------------------
Write a[i] for "slice i of node a is kept". Every constraint is a set of implications whose premises and
conclusions are such statements, none of them negated (Horn clauses):

    same, link       a[i] -> b[j]              b[j] -> a[i]
    product          f[i] and g[j] -> m[i, j]  m[i, j] -> f[i]   m[i, j] -> g[j]
    cover            b[i] -> a[i]
    pin, seed        -> a[i]

Call a set of slices closed if it satisfies all of them. The intersection of two closed sets is closed: if
the premises of a clause lie in both sets, its conclusion lies in both. So the intersection of all closed
sets is itself closed, and no closed set is smaller: it is the solution, and the only one.

`_propagate` finds it. It starts with the pins and the seeds and adds a conclusion only when its premises are
there, so by induction every slice that it adds lies in every closed set. It ends, since slices are only ever
added, and when it ends nothing is left to add: the set is closed. A closed set that lies in all closed sets
is the least one, in whatever order the clauses were applied. For the same reason more pins or seeds can only
enlarge the solution, so it is always safe to add some.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Vector = np.ndarray
"""A bool vector with one entry for each slice of an axis."""

State = Vector | Literal[True]
"""Which slices of an axis are kept: a `Vector` with a False in it, or True for all of them."""


class Link(NamedTuple):
    """Slice `ia[n]` of node a is kept exactly if slice `ib[n]` of node b is."""

    a: int
    ia: np.ndarray
    b: int
    ib: np.ndarray


class Product(NamedTuple):
    """Node `flat` is the row-major product of the nodes `factors`."""

    flat: int
    factors: tuple[int, ...]


class Cover(NamedTuple):
    """Slice i of node `superset` is kept if slice i of node `subset` is."""

    superset: int
    subset: int
    may_tie: bool


Constraint = Link | Product | Cover


class Solution:
    """For every node of a graph, the slices that are kept."""

    def __init__(self, find: Callable[[int], int], states: dict[int, State]):
        self._find, self._states = find, states

    def state(self, node: int) -> State:
        """Return True if all slices of the node are kept, else a vector of those that are."""
        return self._states[self._find(node)]

    def full(self, node: int) -> bool:
        """Whether all slices of the node are kept."""
        return self.state(node) is True

    def indices(self, node: int) -> np.ndarray | None:
        """Return the kept slices, in order; None for all of them."""
        state = self.state(node)
        return None if state is True else np.flatnonzero(state)


class AxisGraph:
    """Nodes and constraints: add them by the methods below, and solve as often as needed.

    A size need not be an `int`; a node whose size is not (a symbolic dimension) is pinned.

    Example:
      >>> import numpy as np
      >>> from jaxprune.graph.engine.axes import AxisGraph
      >>> graph = AxisGraph()
      >>> heads, width, flat = graph.node(2), graph.node(3), graph.node(6)
      >>> graph.product(flat, [heads, width])
      >>> graph.pin(width, "an output reads all of it")
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
        """Return a graph with the same nodes and constraints, to which more can be added."""
        other = AxisGraph()
        other.sizes, other._parent = list(self.sizes), list(self._parent)
        other._links, other._products = list(self._links), list(self._products)
        other._covers = list(self._covers)
        other._pins = dict(self._pins)
        return other

    def node(self, size: Any) -> int:
        """Add a node. A node of size 1, or whose size is not an integer, is pinned."""
        index = len(self.sizes)
        self.sizes.append(size)
        self._parent.append(index)
        if not isinstance(size, (int, np.integer)):
            self.pin(index, "its size is symbolic")
        elif size <= 1:
            self.pin(index, "it has one slice")
        return index

    def find(self, node: int) -> int:
        """Return the root of a node: the node that stands for all that are the `same`."""
        root = node
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[node] != root:
            self._parent[node], node = root, self._parent[node]
        return root

    def same(self, a: int, b: int) -> None:
        """Make two nodes keep the same slices; ValueError if their sizes differ."""
        ra, rb = self.find(a), self.find(b)
        if ra == rb:
            return
        if self.sizes[ra] != self.sizes[rb]:
            raise ValueError(f"axes of sizes {self.sizes[ra]} and {self.sizes[rb]} cannot be the same.")
        low, high = min(ra, rb), max(ra, rb)
        self._parent[high] = low
        if high in self._pins:
            self._pins.setdefault(low, self._pins.pop(high))
        self._invalidate()

    def link(self, a: int, ia: np.ndarray, b: int, ib: np.ndarray) -> None:
        """Keep slice `ia[n]` of a exactly if slice `ib[n]` of b is kept."""
        self._links.append(Link(a, np.asarray(ia), b, np.asarray(ib)))
        self._invalidate()

    def product(self, flat: int, factors: Sequence[int]) -> None:
        """Make a node the row-major product of others; ValueError if their sizes multiply to another."""
        if len(factors) == 1:
            return self.same(flat, factors[0])
        if self.sizes[flat] != np.prod([self.sizes[factor] for factor in factors], dtype=np.int64):
            sizes = [self.sizes[factor] for factor in factors]
            raise ValueError(f"an axis of size {self.sizes[flat]} is not the product of {sizes}.")
        self._products.append(Product(flat, tuple(factors)))
        self._invalidate()
        return None

    def cover(self, superset: int, subset: int, may_tie: bool = False) -> None:
        """Keep slice i of `superset` if slice i of `subset` is kept; a superset may have several subsets.

        With `may_tie`, the two may be made the same where that serves better; see `readers.tie_readers`.
        """
        if self.sizes[superset] != self.sizes[subset]:
            sizes = self.sizes[superset], self.sizes[subset]
            raise ValueError(f"an axis of size {sizes[0]} cannot cover one of size {sizes[1]}.")
        self._covers.append(Cover(superset, subset, may_tie))
        self._invalidate()

    def untied_covers(self) -> list[Cover]:
        """Return the covers whose nodes may be tied, and are not yet."""
        return [c for c in self._covers if c.may_tie and self.find(c.superset) != self.find(c.subset)]

    def pin(self, node: int, why: Any) -> None:
        """Keep all slices of a node; `why_pinned` returns `why`."""
        self._pins.setdefault(self.find(node), why)
        self._invalidate()

    def why_pinned(self, node: int, index: int | None = None) -> Any:
        """Return why a node, or one slice of it, is kept whatever the seeds are; None if it need not be."""
        state = self._pinned_states()[self.find(node)]
        if index is not None and state is not True and not state[index]:
            return None
        return self._why.get(self.find(node))

    def always_kept(self) -> Solution:
        """Return the solution without seeds: what is kept whatever the seeds are."""
        return Solution(self.find, self._pinned_states())

    def solve(self, seeds: Iterable[tuple[int, State]], never_empty: bool = True) -> Solution:
        """Return the least set of slices that contains pins and seeds and satisfies all constraints.

        With `never_empty`, an axis that would lose all of its slices keeps the first.
        """
        states: dict[int, State] = {
            root: True if s is True else s.copy() for root, s in self._pinned_states().items()
        }
        work = [root for node, state in seeds if self._add(states, root := self.find(node), state)]
        self._propagate(states, work)
        if never_empty:
            for root in list(states):
                state = states[root]
                if state is not True and not state.any():
                    state[0] = True
                    self._propagate(states, [root])
        return Solution(self.find, states)

    def free_products(self) -> list[Product]:
        """Return the products of which two or more factors could lose slices."""
        states = self._pinned_states()

        def free(node: int) -> bool:
            return states[self.find(node)] is not True

        return [p for p in self._products if sum(map(free, p.factors)) > 1]

    def components(self, covers: bool = True) -> Callable[[int], int]:
        """Return a function that numbers nodes: two have the same number if constraints join them.

        A cover joins its nodes only with `covers`.
        """
        joined = AxisGraph()
        joined.sizes, joined._parent = [0] * len(self.sizes), list(self._parent)
        for link in self._links:
            joined.same(link.a, link.b)
        for product in self._products:
            for factor in product.factors:
                joined.same(product.flat, factor)
        for cover in self._covers if covers else ():
            joined.same(cover.superset, cover.subset)
        return joined.find

    def units(self) -> dict[int, np.ndarray]:
        """Return which slices can only be removed together; there must be no `free_products`.

        Returns:
          For each root that can lose slices, a vector of labels: slices with the same label, of whatever
          nodes, form a unit; -1 marks slices that are always kept. A cover joins no units: pin its
          `superset`, which belongs to no unit.
        """
        # With one free factor f (the others are pinned, so that their slices can be left out of the
        # premises) a product says f[i] <-> m[i, j] for all j. Then, but for covers, every clause is an
        # equivalence of two slices, and what can only be removed together are the connected components of
        # these equivalences. Each slice starts with a label of its own, and the lowest label spreads along
        # equivalences until nothing changes.
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
                for other in self._spread_labels(constraint, labels):
                    if other not in work:
                        work.append(other)
        return labels

    # Everything below works on roots and on the states of one solution.

    def _invalidate(self) -> None:
        self._touching = self._pinned = None

    def _touching_root(self, root: int) -> list[Constraint]:
        if self._touching is None:
            self._touching = {}
            for link in self._links:
                for node in {self.find(link.a), self.find(link.b)}:
                    self._touching.setdefault(node, []).append(link)
            for product in self._products:
                for node in {self.find(n) for n in (product.flat, *product.factors)}:
                    self._touching.setdefault(node, []).append(product)
            for cover in self._covers:
                self._touching.setdefault(self.find(cover.subset), []).append(cover)
        return self._touching.get(root, [])

    def _pinned_states(self) -> dict[int, State]:
        if self._pinned is None:
            roots = {self.find(node) for node in range(len(self.sizes))}
            self._why = dict(self._pins)
            states: dict[int, State] = {
                root: True if root in self._pins else np.zeros(self.sizes[root], bool) for root in roots
            }
            self._propagate(states, list(self._pins), self._why)
            self._pinned = states
        return self._pinned

    def _add(self, states: dict[int, State], root: int, more: State) -> bool:
        """Add slices to those kept of a root; return whether any was new."""
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

    def _propagate(
        self, states: dict[int, State], work: list[int], why: dict[int, Any] | None = None
    ) -> None:
        """Add what follows from the constraints, starting at the roots that changed.

        Only constraints that touch a changed root can have new consequences, so no others are looked at.
        """
        while work:
            root = work.pop()
            for constraint in self._touching_root(root):
                for other, state in self._implied(constraint, root, states):
                    if self._add(states, other, state):
                        work.append(other)
                        if why is not None:
                            why.setdefault(other, why.get(root))

    def _implied(
        self, constraint: Constraint, root: int, states: dict[int, State]
    ) -> list[tuple[int, State]]:
        """Return the slices of other nodes that a constraint asks for, given what is kept of one root."""
        implied: list[tuple[int, State]] = []
        if isinstance(constraint, Cover):
            return [(self.find(constraint.superset), states[root])]
        if isinstance(constraint, Link):
            for here, i, there, j in (constraint, Link(*constraint[2:], *constraint[:2])):
                here, there = self.find(here), self.find(there)
                if here == root and states[there] is not True:
                    state, more = states[here], np.zeros(self.sizes[there], bool)
                    more[j[np.ones(len(i), bool) if state is True else state[i]]] = True
                    implied.append((there, more))
            return implied
        flat, factors = self.find(constraint.flat), [self.find(f) for f in constraint.factors]
        if flat == root and not all(states[f] is True for f in factors):
            state = states[flat]
            if state is True:
                implied.extend((f, True) for f in factors)
            else:
                # Slice i of a factor has to be kept if any slice (..., i, ...) of the product is.
                grid = state.reshape([self.sizes[f] for f in factors])
                for n, factor in enumerate(factors):
                    others = tuple(a for a in range(len(factors)) if a != n)
                    implied.append((factor, np.asarray(grid.any(axis=others))))
        if root in factors and states[flat] is not True:
            if all(states[f] is True for f in factors):
                implied.append((flat, True))
            else:
                vectors = [np.ones(self.sizes[f], bool) if (s := states[f]) is True else s for f in factors]
                implied.append((flat, outer_and(vectors)))
        return implied

    def _spread_labels(self, constraint: Constraint, labels: dict[int, np.ndarray]) -> list[int]:
        """Give the slices that a constraint joins their lowest label; return the roots that changed."""
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
        flat, factors = self.find(constraint.flat), [self.find(f) for f in constraint.factors]
        free_factors = [n for n, f in enumerate(factors) if f in labels]
        if flat not in labels or not free_factors:
            return []
        (n,) = free_factors
        factor, sizes = factors[n], [self.sizes[f] for f in factors]
        others = tuple(a for a in range(len(factors)) if a != n)
        lowest = np.minimum(labels[factor], labels[flat].reshape(sizes).min(axis=others))
        spread = np.broadcast_to(np.expand_dims(lowest, others), sizes).ravel()
        changed = []
        for root, new in ((factor, lowest), (flat, spread)):
            if not np.array_equal(labels[root], new):
                labels[root] = new.copy()
                changed.append(root)
        return changed


def outer_and(vectors: Sequence[Vector]) -> Vector:
    """Return the row-major outer product of bool vectors."""
    result = np.ones(1, bool)
    for vector in vectors:
        result = (result[:, None] & vector[None, :]).ravel()
    return result
