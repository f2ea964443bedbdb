"""The axis graph against brute force: the same constraints, written out slice by slice."""

from itertools import product as pairs

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.graph.engine.axes import AxisGraph, outer_and

SETTINGS = settings(deadline=None, max_examples=300, derandomize=True)


class Drawn:
    """A graph, and the list of constraints that were added to it."""

    def __init__(self, sizes):
        self.graph, self.sizes, self.constraints = AxisGraph(), list(sizes), []
        for size in sizes:
            self.graph.node(size)

    def add(self, kind, *args):
        """Add a constraint."""
        getattr(self.graph, kind)(*args)
        self.constraints.append((kind, *args))

    def pinned(self):
        """Return the slices that are kept without a seed, before anything follows from them."""
        pinned = {node for kind, node, *_ in self.constraints if kind == "pin"}
        return {(n, i) for n, s in enumerate(self.sizes) if s <= 1 or n in pinned for i in range(s)}

    def implications(self):
        """Return pairs of sets of slices: if all of the first set are kept, all of the second are."""
        result = []
        for kind, *args in self.constraints:
            if kind == "same":
                a, b = args
                result += [({(a, i)}, {(b, i)}) for i in range(self.sizes[a])]
                result += [({(b, i)}, {(a, i)}) for i in range(self.sizes[a])]
            elif kind == "link":
                a, ia, b, ib = args
                for i, j in zip(ia.tolist(), ib.tolist(), strict=True):
                    result += [({(a, i)}, {(b, j)}), ({(b, j)}, {(a, i)})]
            elif kind == "cover":
                superset, subset = args
                result += [({(subset, i)}, {(superset, i)}) for i in range(self.sizes[subset])]
            elif kind == "product":
                product, factors = args
                places = pairs(*(range(self.sizes[f]) for f in factors))
                for flat, place in enumerate(places):
                    parts = set(zip(factors, place, strict=True))
                    result += [(parts, {(product, flat)}), ({(product, flat)}, parts)]
        return result

    def closure(self, kept):
        """Return the least set that contains some slices and what follows from them."""
        kept, changed = set(kept), True
        while changed:
            changed = False
            for given_, then in self.implications():
                if given_ <= kept and not then <= kept:
                    kept |= then
                    changed = True
        return kept

    def solved(self, kept):
        """Return a solution as a set of slices."""
        result = set()
        for node, size in enumerate(self.sizes):
            state = kept.state(node)
            result |= {(node, i) for i in range(size) if state is True or state[i]}
            # The three methods of `Solution` agree.
            assert kept.full(node) == (state is True)
            assert (kept.indices(node) is None) == (state is True)
            if state is not True:
                assert not state.all()
                assert kept.indices(node).tolist() == np.flatnonzero(state).tolist()
        return result


@st.composite
def graphs(draw, products=True, covers=True):
    drawn = Drawn(draw(st.lists(st.integers(1, 6), min_size=2, max_size=7)))
    nodes = st.integers(0, len(drawn.sizes) - 1)
    for _ in range(draw(st.integers(0, 8))):
        kinds = ["same", "link", *(["product", "pin"] if products else []), *(["cover"] if covers else [])]
        kind = draw(st.sampled_from(kinds))
        a, b = draw(nodes), draw(nodes)
        if kind in ("same", "cover") and drawn.sizes[a] == drawn.sizes[b]:
            drawn.add(kind, a, b)
        elif kind == "link":
            places = st.tuples(st.integers(0, drawn.sizes[a] - 1), st.integers(0, drawn.sizes[b] - 1))
            ia, ib = np.array(draw(st.lists(places, min_size=1, max_size=6))).T
            drawn.add("link", a, ia, b, ib)
        elif kind == "product":
            factors = draw(st.lists(nodes, min_size=1, max_size=3))
            size = int(np.prod([drawn.sizes[f] for f in factors]))
            if size <= 36:
                drawn.sizes.append(size)
                drawn.add("product", drawn.graph.node(size), factors)
        elif kind == "pin" and draw(st.booleans()):
            drawn.add("pin", a, f"pin {len(drawn.constraints)}")
    return drawn


@st.composite
def seeds(draw, drawn):
    result = []
    for _ in range(draw(st.integers(0, 3))):
        node = draw(st.integers(0, len(drawn.sizes) - 1))
        size = drawn.sizes[node]
        state = np.array(draw(st.lists(st.booleans(), min_size=size, max_size=size)), bool)
        result.append((node, True if draw(st.integers(0, 5)) == 0 else state))
    return result


def slices(drawn, of_seeds):
    return {
        (node, i) for node, state in of_seeds for i in range(drawn.sizes[node]) if state is True or state[i]
    }


@SETTINGS
@given(st.data())
def test_a_solution_is_the_least_closed_set(data):
    drawn = data.draw(graphs())
    wanted = data.draw(seeds(drawn))
    expected = drawn.closure(drawn.pinned() | slices(drawn, wanted))
    before = [None if s is True else s.copy() for _, s in wanted]
    assert drawn.solved(drawn.graph.solve(wanted, never_empty=False)) == expected
    assert drawn.solved(drawn.graph.always_kept()) == drawn.closure(drawn.pinned())
    # Solving leaves neither the seeds nor the graph changed.
    assert all(b is None or (b == s).all() for b, (_, s) in zip(before, wanted, strict=True))
    assert drawn.solved(drawn.graph.solve(wanted, never_empty=False)) == expected


@SETTINGS
@given(st.data())
def test_never_empty_adds_first_slices_until_each_axis_has_one(data):
    drawn = data.draw(graphs())
    wanted = data.draw(seeds(drawn))
    least = drawn.solved(drawn.graph.solve(wanted, never_empty=False))
    kept = drawn.solved(drawn.graph.solve(wanted))
    assert {node for node, _ in kept} == set(range(len(drawn.sizes)))
    assert least <= kept
    assert drawn.closure(kept) == kept
    empty = set(range(len(drawn.sizes))) - {node for node, _ in least}
    assert kept <= drawn.closure(least | {(node, 0) for node in empty})


@SETTINGS
@given(st.data())
def test_more_seeds_keep_a_superset(data):
    drawn = data.draw(graphs())
    few, more = data.draw(seeds(drawn)), data.draw(seeds(drawn))
    for never_empty in (False, True):
        kept = drawn.solved(drawn.graph.solve([*few, *more], never_empty))
        least = drawn.solved(drawn.graph.solve(few, never_empty=False))
        assert least <= kept


@SETTINGS
@given(st.data())
def test_a_reason_is_given_for_exactly_the_slices_that_always_stay(data):
    drawn = data.draw(graphs())
    always = drawn.closure(drawn.pinned())
    reasons = {args[-1] for kind, *args in drawn.constraints if kind == "pin"} | {"it has one slice"}
    for node, size in enumerate(drawn.sizes):
        whys = [drawn.graph.why_pinned(node, i) for i in range(size)]
        assert [why is not None for why in whys] == [(node, i) in always for i in range(size)]
        assert set(whys) - {None} <= reasons
        assert drawn.graph.why_pinned(node) == next((why for why in whys if why is not None), None)


@SETTINGS
@given(st.data())
def test_units_are_the_connected_components(data):
    drawn = data.draw(graphs(covers=False))
    # Pin all but one factor of each product, as the caller has to.
    while free := drawn.graph.free_products():
        with pytest.raises(ValueError, match="pin all but one factor"):
            drawn.graph.units()
        always = drawn.graph.always_kept()
        drawn.add("pin", next(f for f in free[0].factors if not always.full(f)), "one factor")
    labels = drawn.graph.units()
    always = drawn.closure(drawn.pinned())
    everything = {(n, i) for n, size in enumerate(drawn.sizes) for i in range(size)}
    component = {place: {place} for place in everything - always}
    for given_, then in drawn.implications():
        joined = set().union(*(component[place] for place in (given_ | then) - always), set())
        for place in joined:
            component[place] = joined
    label_of = {
        (node, i): label
        for node in range(len(drawn.sizes))
        for i, label in enumerate(labels.get(drawn.graph.find(node), np.full(drawn.sizes[node], -1)).tolist())
    }
    for place in everything:
        assert (label_of[place] == -1) == (place in always)
    for a in component:
        for b in component:
            assert (label_of[a] == label_of[b]) == (component[a] is component[b])


@SETTINGS
@given(st.data())
def test_units_can_be_dropped_one_at_a_time(data):
    """Keeping all slices but those of one unit is a solution."""
    drawn = data.draw(graphs(products=False, covers=False))
    labels = drawn.graph.units()
    for dropped in {label for vector in labels.values() for label in vector.tolist()} - {-1}:
        seeds = [(root, vector != dropped) for root, vector in labels.items()]
        kept = drawn.graph.solve(seeds, never_empty=False)
        for root, vector in labels.items():
            state = kept.state(root)
            assert (vector != dropped).tolist() == (
                np.ones(len(vector), bool) if state is True else state
            ).tolist()


@SETTINGS
@given(st.data())
def test_a_copy_is_independent(data):
    drawn = data.draw(graphs())
    before = drawn.solved(drawn.graph.always_kept())
    other = drawn.graph.copy()
    assert drawn.solved(other.always_kept()) == before
    for node in range(len(drawn.sizes)):
        other.pin(node, "the copy's")
    extra = other.node(5)
    other.link(extra, np.arange(2), 0, np.zeros(2, int))
    assert drawn.solved(drawn.graph.always_kept()) == before
    assert len(drawn.graph.sizes) == len(drawn.sizes)
    assert all(other.always_kept().full(node) for node in range(len(drawn.sizes)))
    # And the other way round.
    another = drawn.graph.copy()
    for node in range(len(drawn.sizes)):
        drawn.graph.pin(node, "the first one's")
    assert drawn.solved(another.always_kept()) == before


def test_a_constraint_added_after_a_solution_counts_in_the_next():
    graph = AxisGraph()
    a, b, c = graph.node(3), graph.node(3), graph.node(3)
    one = np.array([False, True, False])
    assert graph.solve([(a, one)], never_empty=False).indices(b).tolist() == []
    graph.same(a, b)
    assert graph.solve([(a, one)], never_empty=False).indices(b).tolist() == [1]
    graph.link(b, np.arange(3), c, np.array([2, 1, 0]))
    graph.link(c, np.array([0]), c, np.array([1]))
    assert graph.solve([(a, one)], never_empty=False).indices(c).tolist() == [0, 1]
    graph.pin(c, "late")
    assert graph.why_pinned(a) is None or graph.always_kept().full(a)
    assert graph.always_kept().full(c)


def test_sizes_that_do_not_fit_are_refused():
    graph = AxisGraph()
    a, b = graph.node(2), graph.node(3)
    with pytest.raises(ValueError, match="sizes 2 and 3 cannot be the same"):
        graph.same(a, b)
    with pytest.raises(ValueError, match=r"size 3 is not the product of \[2, 2\]"):
        graph.product(b, [a, a])
    with pytest.raises(ValueError, match="cannot be the same"):
        graph.product(b, [a])


def test_a_cover_joins_no_units_and_may_be_tied():
    graph = AxisGraph()
    shared, first, second = (graph.node(2) for _ in range(3))
    graph.cover(shared, first, may_tie=True)
    graph.cover(shared, second)
    labels = graph.units()
    assert len({label for vector in labels.values() for label in vector.tolist()}) == 6
    assert graph.components()(first) == graph.components()(second)
    assert graph.components(covers=False)(first) != graph.components(covers=False)(shared)
    assert [(c.superset, c.subset) for c in graph.untied_covers()] == [(shared, first)]
    graph.same(shared, first)
    assert not graph.untied_covers()
    with pytest.raises(ValueError, match="size 2 cannot cover one of size 3"):
        graph.cover(shared, graph.node(3))


def test_a_symbolic_size_is_pinned():
    class Symbol:
        pass

    graph = AxisGraph()
    node = graph.node(Symbol())
    assert graph.why_pinned(node) == "its size is symbolic"
    assert graph.solve([]).full(node)


def test_components_join_what_constraints_join():
    graph = AxisGraph()
    a, b, c, d, e = (graph.node(n) for n in (2, 3, 6, 3, 4))
    graph.product(c, [a, b])
    graph.link(d, np.arange(2), e, np.arange(2))
    number = graph.components()
    assert number(a) == number(b) == number(c) != number(d) == number(e)


def test_an_axis_without_slices_is_full():
    graph = AxisGraph()
    node = graph.node(0)
    assert graph.solve([]).full(node)
    assert graph.solve([(node, np.zeros(0, bool))]).indices(node) is None


def test_outer_and_is_row_major():
    assert outer_and([]).tolist() == [True]
    a, b = np.array([True, False]), np.array([False, True, True])
    assert outer_and([a, b]).tolist() == [False, True, True, False, False, False]
