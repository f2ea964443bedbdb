"""Stacked leaves: their layers are pruned as leaves of their own. The oracle is a list of the layers."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxprune as jp
from jaxprune.pruning.targets import kept_in_each
from jaxprune.tree.stacks import join_layers, layer_indices, split_layers
from tests.support.profile import examples

STACKS = [1, (0,), (1,), (-1,), (2,), 2, (0, 2), (-1, 0), (1, 3)]
"""What `stacked` may return: a number of leading axes, or the axes."""

STRUCTURES = [
    jp.structures.elements(),
    jp.structures.slices(axis=-1),
    jp.structures.slices(axis=0, norm=2),
    jp.structures.blocks((2, 3)),
    jp.structures.blocks((2,), axes=(0,)),
    jp.structures.nm(1, 2, axis=-2),
    jp.structures.nm(1, 2, axis=1),
]
SCOPES = ["global", "layerwise"]


class Both:
    """The same layers, once in a stacked leaf and once as leaves of their own; and a leaf without a stack."""

    def __init__(self, said, sizes, shape, seed=0):
        rng = np.random.default_rng(seed)
        count = said if isinstance(said, int) else len(said)
        self.sizes = tuple(sizes[:count])
        ndim = count + len(shape)
        self.axes = tuple(range(said)) if isinstance(said, int) else tuple(axis % ndim for axis in said)
        self.stacked = lambda path, leaf: said if path == "body/kernel" else 0
        self.indices = list(np.ndindex(*self.sizes))
        layers = {index: rng.normal(size=shape) * 2.0 ** sum(index) for index in self.indices}
        whole = np.empty((*self.sizes, *shape))
        for index, layer in layers.items():
            whole[index] = layer
        whole = jnp.asarray(np.moveaxis(whole, range(count), self.axes), jnp.float32)
        out = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
        self.params = {"body": {"kernel": whole}, "out": {"kernel": out}}
        names = [f"body{number:03}" for number in range(len(layers))]
        self.names = dict(zip(self.indices, names, strict=True))
        self.list = {self.names[i]: {"kernel": jnp.asarray(layers[i], jnp.float32)} for i in self.indices}
        self.list["out"] = {"kernel": out}

    def layer(self, array, index):
        """A layer of an array like the stacked leaf, by numpy alone."""
        return np.moveaxis(np.asarray(array), self.axes, range(len(self.axes)))[index]

    def targets(self, by_index, out):
        """Targets of the layers, as an array for the stack and by path for the list."""
        array = np.array([by_index[index] for index in self.indices]).reshape(self.sizes)
        listed = {f"{self.names[index]}/kernel": by_index[index] for index in self.indices}
        return {"body/kernel": array, "out/kernel": out}, listed | {"out/kernel": out}

    def check(self, stacked, listed):
        """Checks that trees like the params hold the same, layer by layer."""
        assert stacked["body"]["kernel"].shape == self.params["body"]["kernel"].shape
        for index in self.indices:
            np.testing.assert_array_equal(
                self.layer(stacked["body"]["kernel"], index), listed[self.names[index]]["kernel"]
            )
        np.testing.assert_array_equal(stacked["out"]["kernel"], listed["out"]["kernel"])

    def alike(self, scores=jp.scores.magnitude, stack=None, listed=None, **options):
        """Prune both, with options of one in `stack` and `listed`; check that they end alike."""
        masks = (
            jp.prune_once(self.params, scores, stacked=self.stacked, **options, **(stack or {})),
            jp.prune_once(self.list, scores, **options, **(listed or {})),
        )
        self.check(*masks)
        return masks


def once(params, sparsity=None, **options):
    return jp.prune_once(params, jp.scores.magnitude, sparsity, **options)


def gradual(sparsity, **options):
    return jp.pruner(jp.scores.magnitude, sparsity, **options)


def updated(pruner, params):
    """The masks after one update."""
    return pruner.update(pruner.init(params), params).masks


quiet = pytest.mark.filterwarnings("ignore")


@st.composite
def both(draw):
    said = draw(st.sampled_from(STACKS))
    sizes = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    shape = draw(st.sampled_from([(4, 6), (8, 4), (4, 4, 2)]))
    return Both(said, sizes, shape, draw(st.integers(0, 10**6)))


@quiet
@quiet
@examples(60)
@given(both(), st.sampled_from(STRUCTURES), st.sampled_from(SCOPES), st.floats(0, 0.99), st.integers(0, 3))
def test_layers_of_a_stack_end_as_layers_of_a_list(case, structure, scope, sparsity, floor):
    case.alike(structure=structure, scope=scope, floor=floor, sparsity=sparsity * structure.max_sparsity)


@pytest.mark.parametrize("structure", [STRUCTURES[0], STRUCTURES[5]])
@pytest.mark.parametrize("said", [1, (1,), (-1, 0)])
def test_layers_of_a_stack_under_jit(said, structure):
    case = Both(said, (2, 3), (4, 6))
    for score in (jp.scores.magnitude, jp.scores.lamp):  # read as they are ranked, and stored
        options = {"scores": score, "sparsity": 0.6 * structure.max_sparsity, "structure": structure}
        compiled = jax.jit(functools.partial(jp.prune_once, stacked=case.stacked, **options))
        case.check(compiled(case.params), jp.prune_once(case.list, **options))


@quiet
@examples(25)
@given(both(), st.sampled_from(STRUCTURES), st.sampled_from(["sparsity", "count", "threshold"]))
def test_a_target_for_each_layer(case, structure, kind):
    rng = np.random.default_rng(len(case.indices))
    draw = {
        "sparsity": lambda: float(rng.uniform(0, 0.9)) * structure.max_sparsity,
        "count": lambda: int(rng.integers(0, 3)),
        "threshold": lambda: float(rng.uniform(0, 3)),
    }[kind]
    array, listed = case.targets({index: draw() for index in case.indices}, draw())
    case.alike(stack={kind: array}, listed={kind: listed}, structure=structure, scope="layerwise", floor=0)


@quiet
@examples(25)
@given(both(), st.sampled_from(STRUCTURES), st.sampled_from(SCOPES))
def test_a_fraction_of_what_masks_have_left(case, structure, scope):
    options = {"structure": structure, "scope": scope, "sparsity": 0.4 * structure.max_sparsity}
    stack, listed = case.alike(of="remaining", **options)
    case.alike(of="remaining", stack={"masks": stack}, listed={"masks": listed}, **options)


@pytest.mark.parametrize("of", ["total", "remaining"])
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("said", "number"), [(1, 0), ((1,), 1), ((0, 2), 5), ((-1,), 3), (2, 0)])
def test_gradual_pruners_of_a_stack_and_of_a_list(said, number, scope, of):
    case, structure = Both(said, (3, 2), (4, 6)), STRUCTURES[number]
    schedule = jp.schedules.linear(0.7 * structure.max_sparsity, begin_step=1, end_step=4)
    options = {"structure": structure, "scope": scope, "of": of, "floor": 0}
    options["memory"] = 0.5 if of == "total" else 0.0
    pruners = [
        gradual(schedule, stacked=case.stacked, **options),
        gradual(schedule, **options),
    ]
    trees = [case.params, case.list]
    states = [pruner.init(params) for pruner, params in zip(pruners, trees, strict=True)]
    updates = [jax.jit(pruner.update) for pruner in pruners]
    for step in range(6):
        wobble = functools.partial(lambda step, w: w * (1 + 0.1 * jnp.sin(step * w)), step)
        trees = [jax.tree.map(wobble, params) for params in trees]
        states = [update(state, params) for update, state, params in zip(updates, states, trees, strict=True)]
        case.check(states[0].masks, states[1].masks)
    assert 0 < jp.metrics.sparsity(states[0].masks).prunable < 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        progress = [pruner.progress(state.masks) for pruner, state in zip(pruners, states, strict=True)]
    assert progress[0]._replace(stacks={}) == progress[1]
    assert progress[0].stacks == {"body/kernel": case.axes}


def test_schedules_for_each_layer_and_a_layer_by_its_name():
    case = Both(1, (3, 1), (4, 6))
    pruner = gradual({"body/kernel": [0.25, 0.5, 0.75]}, scope="layerwise", stacked=case.stacked)
    state = jax.jit(pruner.update)(pruner.init(case.params), case.params)
    assert state.masks["body"]["kernel"].sum((1, 2)).tolist() == [18, 12, 6]
    assert state.masks["out"]["kernel"].all()
    later = {"body/kernel": jp.schedules.one_shot(0.5, step=2), "body/kernel[1]": jp.schedules.one_shot(0, 2)}
    pruner = gradual(later, scope="layerwise", stacked=case.stacked)
    state = pruner.init(case.params)
    for kept in ([24, 24, 24], [12, 24, 12]):
        state = pruner.update(state, case.params)
        assert state.masks["body"]["kernel"].sum((1, 2)).tolist() == kept
    counts = {"body/kernel[2]": 5, "body/kernel": 1}
    masks = once(case.params, count=counts, scope="layerwise", stacked=case.stacked)
    assert masks["body"]["kernel"].sum((1, 2)).tolist() == [23, 23, 19]


def test_traced_targets_for_each_layer():
    case = Both((1,), (3, 1), (4, 6))

    def prune(counts):
        return once(case.params, count={"body/kernel": counts}, scope="layerwise", stacked=case.stacked)

    assert jax.jit(prune)(jnp.array([1, 2, 3]))["body"]["kernel"].sum((0, 2)).tolist() == [23, 22, 21]


def test_ties_go_by_layer_then_by_row_major_index():
    params = {"kernel": jnp.ones((2, 3, 2))}  # the layers along axis 1
    masks = once(params, count=5, floor=0, where=lambda *_: True, stacked=lambda path, leaf: (1,))
    assert np.moveaxis(np.asarray(masks["kernel"]), 1, 0).reshape(3, 4).tolist() == [
        [False, False, False, False],
        [False, True, True, True],
        [True, True, True, True],
    ]


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (3, TypeError, "stacked= needs a function of \\(path, leaf\\)"),
        (lambda path, leaf: "0", TypeError, "stacked\\('kernel', leaf\\) returned '0'"),
        (lambda path, leaf: (0.5,), TypeError, "must return how many leading axes"),
        (lambda path, leaf: True, TypeError, "must return how many leading axes"),
        (lambda path, leaf: 4, ValueError, "but the leaf is .*\\[2, 3, 4\\]"),
        (lambda path, leaf: -1, ValueError, "returned -1"),
        (lambda path, leaf: (0, -3), ValueError, "returned \\(0, -3\\)"),
    ],
)
def test_what_stacked_returns_is_checked(bad, error, message):
    params = {"kernel": jnp.ones((2, 3, 4))}
    for call in (
        lambda: once(params, 0.5, stacked=bad),
        lambda: gradual(0.5, stacked=bad).init(params),
        lambda: jp.distributions.erk(params, 0.5, stacked=bad),
        lambda: jp.distributions.uniform(params, 0.5, stacked=bad),
        lambda: jp.scores.lamp(params, stacked=bad),
        lambda: jp.budget(jp.metrics.nonzeros, params, at_most=12, stacked=bad),
        lambda: jp.rigl({"kernel": jnp.eye(12, 2).reshape(2, 3, 4) > 0}, every=1, end_step=9, stacked=bad),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("targets", "error", "message"),
    [
        (
            {"kernel": [0.1, 0.2]},
            ValueError,
            r"sparsity\['kernel'\] has shape \(2,\), but its stack has the shape \(3,\)",
        ),
        (
            {"kernel": np.full((3, 1), 0.1)},
            ValueError,
            r"has shape \(3, 1\), but its stack has the shape \(3,\)",
        ),
        (
            {"out/kernel": [0.1, 0.2]},
            ValueError,
            r"sparsity\['out/kernel'\] has shape \(2,\), but it is not stacked",
        ),
        ({"kernel": ["a", "b"]}, TypeError, r"sparsity\['kernel'\] is \['a', 'b'\]"),
        ({"kernel": [[0.1], [0.1, 0.2]]}, TypeError, "are an array of numbers"),
        ({"kernel": [0.1, 1.2, 0.3]}, ValueError, "1.2"),
        ({"kernel[3]": 0.5}, ValueError, r"names 'kernel\[3\]'"),
    ],
)
def test_targets_that_do_not_fit_a_stack(targets, error, message):
    params = {"kernel": jnp.ones((3, 2, 4)), "out": {"kernel": jnp.ones((2, 2))}}
    options = {"scope": "layerwise", "stacked": lambda path, leaf: int(path == "kernel")}
    with pytest.raises(error, match=message):
        once(params, targets, **options)
    with pytest.raises(error, match=message):
        updated(gradual(targets, **options), params)


def test_where_is_asked_with_the_whole_leaf():
    asked = []

    def where(path, leaf):
        asked.append((path, leaf.shape))
        return path == "body/kernel"

    case = Both((1,), (3, 1), (4, 6))
    masks = once(case.params, 0.5, where=where, stacked=case.stacked)
    assert masks["out"]["kernel"].all()
    assert set(asked) == {("body/kernel", (4, 3, 6)), ("out/kernel", (4, 6))}


def test_the_default_where_sees_one_layer():
    params = {"body": {"w": jnp.ones((3, 4, 5)), "g": jnp.ones((3, 5))}}
    stacked = lambda path, leaf: 1  # noqa: E731
    masks = once(params, 0.5, scope="layerwise", stacked=stacked)
    assert masks["body"]["g"].all() and masks["body"]["w"].sum((1, 2)).tolist() == [10] * 3
    assert list(jp.distributions.erk(params, 0.5, stacked=stacked)) == ["body/w"]
    pruner = gradual(0.5, scope="layerwise", stacked=stacked)
    assert updated(pruner, params)["body"]["g"].all() and pruner.progress(masks).size == 60
    table = jp.metrics.table(masks, asked=0.5, stacked=stacked)
    assert ["prunable", "30", "60", "0.5000"] in [line.split() for line in table.splitlines()]
    options = {"where": jp.matching("*"), "scope": "layerwise", "stacked": stacked}
    both = once(params, 0.4, **options)
    assert both["body"]["g"].sum(1).tolist() == [3] * 3


def test_nothing_changes_where_no_leaf_is_stacked():
    params = Both(1, (3, 1), (4, 6)).params

    def program(**options):
        return str(jax.make_jaxpr(lambda p: once(p, 0.5, scope="layerwise", **options))(params))

    assert program() == program(stacked=lambda path, leaf: 0) == program(stacked=lambda path, leaf: ())


def test_layers_are_not_copied_to_be_ranked():
    params = {"kernel": jax.ShapeDtypeStruct((8, 256, 256), jnp.float32)}

    def prune(params):
        return once(params, 0.5, stacked=lambda path, leaf: 1)

    temporary = jax.jit(prune).lower(params).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 8 * 256 * 256 * 2  # masks, one byte an entry, but no scores of four


# Coupled channels: each layer drops its own, and a stack keeps equally many in each.


@st.composite
def kept_and_alive(draw):
    number = draw(st.integers(1, 5))
    alive = draw(st.lists(st.integers(0, 12), min_size=number, max_size=number))
    alive = draw(st.sampled_from([alive, [alive[0]] * number]))
    return [draw(st.integers(0, most)) for most in alive], alive


@examples(300)
@given(kept_and_alive(), st.integers(0, 4), st.one_of(st.integers(1, 5), st.sampled_from([(3,), (2, 5, 6)])))
def test_how_many_each_layer_keeps(case, floor, multiple_of):
    kept, alive = map(np.array, case)
    got = int(kept_in_each(kept, alive, floor, multiple_of))
    assert got == int(
        jax.jit(kept_in_each, static_argnums=(2, 3))(*map(jnp.asarray, case), floor, multiple_of)
    )
    fewest, most = int(min(alive)), int(max(alive))
    wanted = max(round(sum(case[0]) / len(kept)), floor)  # Python rounds half to even
    steps = (multiple_of,) if isinstance(multiple_of, int) else multiple_of
    last = steps[-1] - (0, *steps)[-2]
    allowed = [0, *steps, *range(steps[-1] + last, 40, last)]  # continued by the last step
    up = next(n for n in allowed if n >= wanted)
    if up <= fewest:
        assert got == max(up, min(floor, most))
    elif fewest == most:
        assert got == fewest
    else:  # no layer can be brought back
        within = [n for n in allowed if floor <= n <= fewest]
        assert got == max(max(within, default=fewest), min(floor, most))
    if fewest >= floor:
        assert min(floor, fewest) <= got <= fewest


def scan_net(params, x):
    def layer(h, w):
        return h + jax.nn.relu(h @ w["up"] + w["bias"]) @ w["down"], None

    x, _ = jax.lax.scan(layer, x, {name: params[name] for name in ("up", "bias", "down")})
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


def scan_params(seed, layers=3, width=16):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    scale = jnp.asarray(2.0 ** rng.normal(size=(layers, 1, 1)), jnp.float32)
    return {
        "up": draw(layers, 8, width) * scale,
        "bias": draw(layers, width),
        "down": draw(layers, width, 8) * scale,
        "hidden": draw(8, 10),
        "out": draw(10, 3),
    }


X = jnp.asarray(np.random.default_rng(5).normal(size=(4, 8)), jnp.float32)
GROUPS = jp.channel_groups(scan_net, scan_params(0), X)
CHANNELS = jp.structures.channels(GROUPS)
(STACK,) = CHANNELS.families


def unit_scores(params):
    """By layer, and for the group without a stack, the mean of the norms of a unit's slices."""
    params = jax.tree.map(np.asarray, params)
    stack = (np.linalg.norm(params["up"], axis=1) + np.linalg.norm(params["down"], axis=2)) / 2
    alone = (np.linalg.norm(params["hidden"], axis=0) + np.linalg.norm(params["out"], axis=1)) / 2
    return stack, alone


def widths(masks):
    """How many units each layer keeps, and the group without a stack; all members must agree."""
    up, down = np.asarray(masks["up"]).any(1), np.asarray(masks["down"]).any(2)
    np.testing.assert_array_equal(up, down)
    np.testing.assert_array_equal(up, np.asarray(masks["bias"]))
    return up.sum(1).tolist(), int(np.asarray(masks["hidden"]).any(0).sum())


@quiet
@examples(20)
@given(st.integers(0, 10**6), st.sampled_from(["global", "isomorphic", "layerwise"]), st.floats(0.05, 0.9))
def test_stacks_keep_equally_many_and_each_layer_its_best(seed, scope, sparsity):
    params = scan_params(seed)
    masks = once(params, sparsity, structure=CHANNELS, scope=scope)
    stack, alone = unit_scores(params)
    if scope == "layerwise":
        kept, hidden = 16 - round(sparsity * 16), 10 - round(sparsity * 10)
    elif scope == "isomorphic":
        kept, hidden = round((48 - round(sparsity * 48)) / 3), 10 - round(sparsity * 10)
    else:
        every = np.concatenate([stack.ravel(), alone])
        lowest = np.argsort(every)
        # The best unit of each group stays.
        best = {int(row * 16 + stack[row].argmax()) for row in range(3)} | {48 + int(alone.argmax())}
        gone = [unit for unit in lowest if unit not in best][: round(sparsity * 58)]
        hidden = 10 - sum(unit >= 48 for unit in gone)
        kept = round((48 - sum(unit < 48 for unit in gone)) / 3)
    assert widths(masks) == ([max(kept, 1)] * 3, hidden)
    for row in range(3):
        expected = np.zeros(16, bool)
        expected[np.argsort(stack[row])[-max(kept, 1) :]] = True
        np.testing.assert_array_equal(np.asarray(masks["up"][row]).any(0), expected)


@quiet
def test_stacks_under_jit_and_what_compact_makes_of_them():
    params = scan_params(1)

    def prune(params):
        return once(params, 0.4, structure=CHANNELS)

    masks = prune(params)
    for one, other in zip(jax.tree.leaves(masks), jax.tree.leaves(jax.jit(prune)(params)), strict=True):
        np.testing.assert_array_equal(one, other)
    (kept, *_), hidden = widths(masks)
    small = jp.compact(scan_net, params, masks, X)
    assert small.params["up"].shape == (3, 8, kept) and small.params["out"].shape == (hidden, 3)
    expected = scan_net(jp.apply_masks(params, masks), X)
    np.testing.assert_allclose(small.apply(small.params, X), expected, rtol=1e-4, atol=1e-5)


def test_what_a_stack_keeps_beside_what_was_asked_for_is_said():
    params = scan_params(2)
    where = jp.matching("up", "down")
    options = {"structure": CHANNELS, "where": where}
    with pytest.warns(
        UserWarning, match=r"\[\*\].*: 33 units are kept where the target asks for 34, .* 3 layers: 11"
    ):
        once(params, count=14, **options)
    once(params, count=15, **options)  # without a warning
    once(params, count=5, scope="layerwise", **options)
    pruner = gradual(14 / 48, **options)
    masks = updated(pruner, params)
    assert pruner.progress(masks)[1:4] == (33, 48, 14)
    lines = [line.split() for line in jp.metrics.table(masks, asked=pruner).splitlines()]
    assert ["units", "33", "48", "0.3125"] in lines and ["(asked)", "0.2917"] in lines
    assert ["up[1]", "8x16", "88", "128", "0.3125"] in lines


@quiet
def test_a_threshold_keeps_equally_many_too():
    params = scan_params(3)
    stack, _ = unit_scores(params)
    bound = float(np.quantile(stack, 0.4))
    above = (stack >= bound).sum(1)
    assert len(set(above)) > 1
    options = {"structure": CHANNELS, "threshold": bound, "where": jp.matching("up", "down")}
    equal = once(params, **options)
    own = once(params, scope="layerwise", **options)
    assert widths(equal)[0] == [max(round(above.sum() / 3), 1)] * 3
    assert widths(own)[0] == [max(n, 1) for n in above]


@quiet
def test_floors_and_multiples_of_stacks():
    params = scan_params(4)
    for options, allowed in (
        ({"min_width": 7}, range(7, 17)),
        ({"multiple_of": 4}, (4, 8, 12, 16)),
        ({"min_width": 5, "multiple_of": 4}, (8, 12, 16)),
        ({"multiple_of": (3, 10)}, (3, 10, 16)),
    ):
        structure = jp.structures.channels(GROUPS, **options)
        for sparsity in (0.2, 0.5, 0.8, 0.95):
            masks = once(params, sparsity, structure=structure)
            stack, _ = widths(masks)
            assert len(set(stack)) == 1 and stack[0] in allowed
    named = jp.structures.channels(GROUPS, min_width={CHANNELS.families[STACK].names[0]: 9})
    assert widths(once(params, 0.9, structure=named))[0] == [9] * 3


def test_targets_of_stacks_of_channels():
    params = scan_params(5)
    names = CHANNELS.families[STACK].names
    options = {"structure": CHANNELS, "scope": "layerwise"}
    masks = once(params, {STACK: 0.5}, **options)
    assert widths(masks) == ([8] * 3, 10)
    masks = once(params, count={STACK: [1, 2, 3], names[1]: 4}, **options)
    assert widths(masks) == ([15, 12, 13], 10)
    with pytest.raises(ValueError, match=r"has shape \(2,\), but its stack has the shape \(3,\)"):
        once(params, {STACK: [0.5, 0.5]}, **options)


def test_what_is_pruned_of_a_layer_never_comes_back():
    params = scan_params(6)
    names = CHANNELS.families[STACK].names
    start = once(params, count={names[0]: 9}, structure=CHANNELS, scope="layerwise")
    with pytest.warns(UserWarning, match="equally many in each of its 3 layers: 7"):
        masks = once(params, 0.25, structure=CHANNELS, masks=start)
    assert widths(masks)[0] == [7] * 3
    assert all(not (new & ~old).any() for new, old in zip(*map(jax.tree.leaves, (masks, start)), strict=True))


@pytest.mark.parametrize("of", ["total", "remaining"])
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_gradual_pruners_of_stacks_are_monotone_and_come_to_rest(of, multiple_of):
    structure = jp.structures.channels(GROUPS, multiple_of=multiple_of)
    target = 0.6 if of == "total" else 0.2
    pruner = gradual(
        jp.schedules.linear(target, begin_step=1, end_step=7) if of == "total" else target,
        structure=structure,
        of=of,
        stop=0.6 if of == "remaining" else None,
    )
    params, update = scan_params(7), jax.jit(pruner.update)
    state = pruner.init(params)
    seen = []
    for step in range(14):
        params = jax.tree.map(
            functools.partial(lambda step, w: w * (1 + 0.2 * jnp.cos(step * w)), step), params
        )
        before, state = state.masks, update(state, params)
        assert all(
            not (n & ~o).any() for n, o in zip(*map(jax.tree.leaves, (state.masks, before)), strict=True)
        )
        (first, *others), alone = widths(state.masks)
        assert others == [first] * 2 and (first % multiple_of == 0 or first == 16)
        seen.append((first, alone))
    assert seen[-1] == seen[-5] and seen[-1][0] < seen[0][0]
    kept, size, asked = pruner.progress(state.masks)[1:4]
    assert size == 58
    if multiple_of == 1 and of == "total":
        assert asked == round(0.6 * 58) and abs(size - kept - asked) <= 2
    # Another pruner with the same target finds nothing left to do.
    again = gradual(0.6, structure=structure)
    if of == "total" and multiple_of == 1:
        assert widths(again.update(state, params).masks) == ([seen[-1][0]] * 3, seen[-1][1])


@pytest.mark.parametrize("scope", ["global", "layerwise"])
def test_a_state_goes_on_after_compaction(scope):
    params = scan_params(8)
    schedule = jp.schedules.linear(0.5, begin_step=1, end_step=5)
    pruner = gradual(schedule, structure=CHANNELS, scope=scope)
    state = pruner.init(params)
    for _ in range(3):
        state = pruner.update(state, params)
    small = jp.compact(scan_net, params, state.masks, X)
    groups = jp.channel_groups(small.apply, small.params, X)
    on = gradual(schedule, structure=jp.structures.channels(groups), scope=scope)
    smaller, shrunk = small.params, small.shrink(state)
    for _ in range(3):
        state, shrunk = pruner.update(state, params), on.update(shrunk, smaller)
    assert widths(shrunk.masks) == widths(state.masks)


def test_elements_go_on_after_compaction():
    params = scan_params(9)
    stacked = lambda path, leaf: int(path in ("up", "down", "bias"))  # noqa: E731
    masks = once(params, 0.5, structure=CHANNELS, scope="layerwise")
    pruner = gradual(jp.schedules.one_shot(0.75, 1), masks=masks, scope="layerwise", stacked=stacked)
    small = jp.compact(scan_net, params, masks, X)
    state = pruner.update(small.shrink(pruner.init(params)), small.params)
    assert state.masks["up"].shape == (3, 8, 8)
    assert state.masks["up"].sum((1, 2)).tolist() == [32] * 3  # a quarter of the 8 x 16 that there were


@quiet
def test_budgets_of_stacks():
    params = scan_params(10)
    found = jp.budget(jp.metrics.nonzeros, params, at_most=500, structure=CHANNELS)
    (first, *others), _ = widths(found.masks)
    assert others == [first] * 2 and found.value <= 500
    same = once(params, found.sparsity, structure=CHANNELS)
    assert widths(same) == widths(found.masks)
    curves = jp.sensitivity(
        lambda p: jnp.sum(scan_net(p, X) ** 2),
        params,
        levels=(0.5,),
        structure=CHANNELS,
        together={"all": STACK},
    )
    assert [point.kept for point in curves.of("all")] == [24]


def test_stacks_that_are_known_and_said_must_agree():
    params = scan_params(11)
    layers = lambda path, leaf: int(path in GROUPS.stacks)  # noqa: E731
    options = {"structure": CHANNELS, "scope": "layerwise"}
    same = once(params, 0.5, stacked=layers, **options)
    assert widths(same) == widths(once(params, 0.5, **options))
    for wrong, message in (
        (
            lambda path, leaf: 0,
            r"stacked= says that the axes \(\) of params\['.*'\] count layers.* has \(0,\)",
        ),
        (
            lambda path, leaf: int(path in (*GROUPS.stacks, "hidden")),
            r"the axes \(0,\) of params\['hidden'\].* has \(\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            once(params, 0.5, stacked=wrong, **options)
        with pytest.raises(ValueError, match=message):
            gradual(0.5, stacked=wrong, **options).init(params)
    listed = jp.structures.channels(GROUPS.removable())  # groups alone do not know the stacks' axes
    with pytest.raises(
        ValueError, match=r"layers of leaves that are not known to be stacked. Pass channels\(...\) the Ch"
    ):
        once(params, 0.5, structure=listed)
    masks = once(params, 0.5, structure=listed, scope="layerwise", stacked=layers)
    assert widths(masks) == widths(same)


def test_groups_of_other_params_are_told_by_the_stack():
    params = scan_params(12) | {"up": jnp.ones(())}
    with pytest.raises(ValueError, match=r"params\['up'\] has the shape \(\), but the groups have layers"):
        once(params, 0.5, structure=CHANNELS)


def test_default_where_takes_a_stacked_leaf_as_its_layers():
    params = {name.replace("up", "embedding"): leaf for name, leaf in scan_params(13).items()}

    def net(p, x):
        return scan_net({name.replace("embedding", "up"): leaf for name, leaf in p.items()}, x)

    groups = jp.channel_groups(net, params, X)
    masks = once(params, 0.5, structure=jp.structures.channels(groups), scope="layerwise")
    stack, _ = unit_scores({name.replace("embedding", "up"): leaf for name, leaf in params.items()})
    for row in range(3):  # an embedding by its name, a weight by its use
        expected = np.argsort(stack[row])[-8:]
        assert set(np.flatnonzero(np.asarray(masks["embedding"][row]).any(0))) == set(expected)


# Scores, distributions, and what else takes stacks.


@pytest.mark.parametrize("score", [jp.scores.lamp, jp.scores.normalized_magnitude])
@pytest.mark.parametrize("said", STACKS)
def test_scores_that_normalise_by_layer(score, said):
    case = Both(said, (2, 3), (4, 6))
    case.check(score(case.params, stacked=case.stacked), score(case.list))
    _, masks = case.alike(score, sparsity=0.6)
    case.check(updated(jp.pruner(score, 0.6, stacked=case.stacked), case.params), masks)


def test_a_score_that_was_told_its_stacks_keeps_them():
    case = Both(1, (3, 1), (4, 6))
    whole = functools.partial(jp.scores.lamp, stacked=lambda path, leaf: 0)
    masks = jp.prune_once(case.params, whole, 0.4, stacked=case.stacked)
    expected = jp.prune_once(case.params, jp.scores.lamp(case.params), 0.4, stacked=case.stacked)
    np.testing.assert_array_equal(masks["body"]["kernel"], expected["body"]["kernel"])


@pytest.mark.parametrize("said", [1, (1,), (0, 2)])
def test_scores_of_channels(said):
    case = Both(said, (2, 3), (4, 6))
    rng = np.random.default_rng(3)
    case.check(jp.scores.fpgm(case.params, stacked=case.stacked), jp.scores.fpgm(case.list))
    shape = (*case.sizes, 7, 6)
    outputs = np.maximum(rng.normal(size=shape), 0).astype(np.float32)
    listed = {f"{name}/kernel": outputs[index] for index, name in case.names.items()}
    for score in (jp.scores.apoz, jp.scores.mean_activation):
        stacked = score(case.params, activations={"body/kernel": outputs}, stacked=case.stacked)
        case.check(stacked, score(case.list, activations=listed))
    scales = rng.normal(size=(*case.sizes, 6)).astype(np.float32)
    params = case.params | {"bn": jnp.asarray(scales)}
    layers = case.list | {"bn" + name: jnp.asarray(scales[index]) for index, name in case.names.items()}
    of_stack = jp.scores.bn_scale({"body/kernel": "bn"})
    of_list = jp.scores.bn_scale({f"{name}/kernel": "bn" + name for name in case.names.values()})
    says = lambda path, leaf: len(case.sizes) if path == "bn" else case.stacked(path, leaf)  # noqa: E731
    case.check(of_stack(params, stacked=says), of_list(layers))
    filters = jp.structures.slices(axis=-1, norm=math.inf)
    where = jp.matching("body*/kernel")
    options = {"count": 5, "structure": filters, "where": where}
    case.check(
        jp.prune_once(params, of_stack, stacked=says, **options), jp.prune_once(layers, of_list, **options)
    )


def test_activations_and_scales_that_are_not_of_each_layer():
    params = {"kernel": jnp.ones((3, 4, 6)), "scale": jnp.ones(6)}
    stacked = lambda path, leaf: int(path == "kernel")  # noqa: E731
    with pytest.raises(ValueError, match=r"activations\['kernel'\] is float32\[2, 6\].* is a stack"):
        jp.scores.apoz(params, activations={"kernel": jnp.ones((2, 6))}, stacked=stacked)
    masks = jp.prune_once(  # one scale for all layers is a scale for each
        params,
        jp.scores.bn_scale({"kernel": "scale"}),
        count=3,
        structure=jp.structures.slices(norm=math.inf),
        where=jp.matching("kernel"),
        stacked=stacked,
    )
    assert masks["kernel"].any(1).sum() == 15


def test_synflow_evens_out_each_layer():
    rng = np.random.default_rng(0)
    layers = [jnp.asarray(rng.normal(size=(6, 6)) * 4.0**i, jnp.float32) for i in range(3)]
    stack, flat = {"kernel": jnp.stack(layers)}, {f"l{i}": {"kernel": layers[i]} for i in range(3)}

    def net(kernels, x):
        for kernel in kernels:
            x = x + jax.nn.relu(x @ kernel)
        return x

    of_stack = jp.scores.synflow(lambda p, x: net(p["kernel"], x), jnp.ones((2, 6)))
    of_list = jp.scores.synflow(
        lambda p, x: net([p[f"l{i}"]["kernel"] for i in range(3)], x), jnp.ones((2, 6))
    )
    got, expected = of_stack(stack, stacked=lambda path, leaf: 1)["kernel"], of_list(flat)
    for i in range(3):
        np.testing.assert_allclose(got[i], expected[f"l{i}"]["kernel"], rtol=1e-5)


@pytest.mark.parametrize("said", STACKS)
def test_distributions_of_stacks_and_of_lists(said):
    case = Both(said, (2, 3), (8, 4))
    for distribution in (jp.distributions.erk, jp.distributions.uniform):
        stack = distribution(case.params, 0.8, stacked=case.stacked)
        flat = distribution(case.list, 0.8)
        assert stack["out/kernel"] == pytest.approx(flat["out/kernel"], rel=1e-12)
        assert all(stack["body/kernel"] == pytest.approx(flat[f"{n}/kernel"]) for n in case.names.values())
        _, masks = case.alike(stack={"sparsity": stack}, listed={"sparsity": flat}, scope="layerwise")
        pruner = gradual(stack, scope="layerwise", stacked=case.stacked)
        case.check(updated(pruner, case.params), masks)
    stack, flat = (
        jp.distributions.sigma(case.params, 1.0, stacked=case.stacked),
        jp.distributions.sigma(case.list, 1.0),
    )
    for index, name in case.names.items():
        assert float(stack["body/kernel"][index]) == float(flat[f"{name}/kernel"])
    case.alike(stack={"threshold": stack}, listed={"threshold": flat})


@pytest.mark.parametrize("structure", [None, jp.structures.nm(2, 4, axis=0), jp.structures.slices(axis=-1)])
@pytest.mark.parametrize("said", [1, (1,), (0, 2)])
def test_masks_of_layers_move_for_themselves(said, structure):
    case = Both(said, (2, 2), (8, 6))
    case.params, case.list = (
        case.params | {"out": {"kernel": jnp.ones((8, 4))}},
        case.list | {"out": {"kernel": jnp.ones((8, 4))}},
    )
    sparsity = 0.5 if structure is not None and structure.max_sparsity < 1 else 0.4
    options = {"every": 1, "end_step": 10, "fraction": 0.5, "structure": structure}
    states = []
    starts = case.alike(sparsity=sparsity, structure=structure, scope="layerwise")
    for masks, params, stacked in zip(starts, (case.params, case.list), (case.stacked, None), strict=True):
        pruner = jp.rigl(masks, stacked=stacked, **options)
        state, grads = pruner.init(params), jax.tree.map(lambda w: jnp.cos(7 * w), params)
        for _ in range(3):
            state = jax.jit(pruner.update)(state, params, grads)
        states.append(state.masks)
    case.check(*states)


def test_budget_and_sensitivity_of_layers():
    case = Both((1,), (3, 1), (4, 6))
    stack = jp.budget(jp.metrics.nonzeros, case.params, at_most=50, scope="layerwise", stacked=case.stacked)
    flat = jp.budget(jp.metrics.nonzeros, case.list, at_most=50, scope="layerwise")
    case.check(stack.masks, flat.masks)
    assert list(stack.removed) == [*(f"body/kernel[{i}]" for i in range(3)), "out/kernel"]
    assert list(stack.removed.values()) == list(flat.removed.values())
    stack = jp.budget(jp.metrics.nonzeros, case.params, at_most=50, stacked=case.stacked)
    case.check(stack.masks, jp.budget(jp.metrics.nonzeros, case.list, at_most=50).masks)
    erk = functools.partial(jp.distributions.erk, case.params, stacked=case.stacked)
    found = jp.budget(
        jp.metrics.nonzeros,
        case.params,
        at_most=50,
        scope="layerwise",
        distribution=erk,
        stacked=case.stacked,
    )
    assert found.value <= 50

    def total(tree):
        return sum(jnp.sum(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree))

    found = jp.sensitivity(total, case.params, levels=(0.25, 0.5), stacked=case.stacked)
    other = jp.sensitivity(total, case.list, levels=(0.25, 0.5))
    assert [p.kept for p in found.points] == [p.kept for p in other.points]
    np.testing.assert_allclose([p.drop for p in found.points], [p.drop for p in other.points], rtol=1e-4)
    together = jp.sensitivity(
        total, case.params, levels=(0.5,), together={"body": "body/kernel"}, stacked=case.stacked
    )
    assert together.pools["body"] == tuple(f"body/kernel[{i}]" for i in range(3))
    targets = jp.distributions.from_sensitivity(found, tolerance=found.points[0].drop * 1.01)
    masks = once(case.params, targets, scope="layerwise", stacked=case.stacked)
    assert masks["body"]["kernel"].sum((0, 2)).tolist()[0] == 18


def test_tables_name_layers():
    case = Both((1,), (3, 1), (4, 6))
    pruner = gradual(0.5, scope="layerwise", stacked=case.stacked)
    masks = updated(pruner, case.params)
    for table in (
        jp.metrics.table(masks, asked=pruner),
        jp.metrics.table(masks, asked=0.5, stacked=case.stacked),
        jp.metrics.table(masks, asked=0.5, structure=jp.structures.slices(0), stacked=case.stacked),
    ):
        lines = [line.split() for line in table.splitlines()]
        assert ["body/kernel", "4x3x6", "36", "72", "0.5000"] in lines
        for i in range(3):
            assert [f"body/kernel[{i}]", "4x6", "12", "24", "0.5000"] in lines
    assert ["units", "16", "16", "0.0000"] in lines
    with pytest.raises(TypeError, match="a pruner knows its own"):
        jp.metrics.table(masks, asked=pruner, stacked=case.stacked)


def test_a_recipe_says_which_leaves_are_stacked():
    case = Both((1,), (3, 1), (4, 6))
    text = 'prune: {score: lamp, sparsity: {erk: 0.5}, scope: layerwise, stacked: {"body/*": [1]}}'
    pruner = jp.recipes.parse(text).pruner(case.params)
    masks = updated(pruner, case.params)
    targets = jp.distributions.erk(case.list, 0.5)
    case.check(masks, jp.prune_once(case.list, jp.scores.lamp, targets, scope="layerwise"))
    assert pruner.progress(masks).stacks == {"body/kernel": (1,)}
    half = "prune: {score: magnitude, sparsity: 0.5, scope: layerwise, "
    rewired = half + 'stacked: {"body/*": [1]}, rewire: {set: {every: 1, end_step: 5}}}'
    pruner = jp.recipes.parse(rewired).pruner(case.params)
    state = pruner.init(case.params)
    state = pruner.update(pruner.update(state, case.params), case.params)
    assert state.masks["body"]["kernel"].sum((0, 2)).tolist() == [12, 12, 12]
    params, channels = scan_params(14), half + "structure: channels, stacked: {up: 1, down: 1, bias: 1}}"
    pruner = jp.recipes.parse(channels).pruner(params, apply_fn=scan_net, x=X)
    assert widths(updated(pruner, params)) == ([8] * 3, 5)
    for bad, message in (
        ("stacked: {}", "no leaf would be stacked"),
        ("stacked: 1", "expected a mapping"),
        ('stacked: {"head/*": 1}', "'head/\\*' matches no leaf"),
        ('stacked: {"body/*": 4}', "but the leaf is"),
    ):
        with pytest.raises(jp.recipes.RecipeError, match=message):
            jp.recipes.parse(text.replace('stacked: {"body/*": [1]}', bad)).pruner(case.params)


@examples(40)
@given(both())
def test_split_and_join_are_inverses(case):
    leaves = {"body/kernel": case.params["body"]["kernel"], "out/kernel": case.params["out"]["kernel"]}
    for by_path in (leaves, {path: np.asarray(leaf) for path, leaf in leaves.items()}):
        split = split_layers(by_path, {"body/kernel": case.axes})
        names = [
            f"body/kernel[{','.join(map(str, i))}]"
            for i in layer_indices(leaves["body/kernel"].shape, case.axes)
        ]
        assert list(split) == [*names, "out/kernel"]
        joined = join_layers(split, {"body/kernel": case.axes}, {"body/kernel": leaves["body/kernel"].shape})
        for path, leaf in by_path.items():
            np.testing.assert_array_equal(joined[path], leaf)
