"""Sensitivity analysis, against pruning and evaluating one tensor at a time."""

import contextlib
import csv
import dataclasses
import gc
import io
import itertools
import json
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune as jp
from tests.oracles import brute_force
from tests.sizing.problem import STRUCTURES, X, drawn, network, pruning

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9)


# Of whole numbers all sums are exact, whatever their order; and the figure shows every weight.
@jax.jit
def evaluate(params):
    return jnp.sum(network(params) * jnp.array([1.0, 2.0, 5.0]))


SPECS = {
    "elements": brute_force.Spec(),
    "filters": brute_force.Spec("slices", axes=(-1,), norm=1),
    "blocks": brute_force.Spec("blocks", axes=(-2, -1), sides=(2, 2), norm=1),
}


def prune_once(params, *args, **kwargs):
    """As one program, which compiles sooner than its many operations."""
    return jax.jit(lambda params: jp.prune_once(params, *args, **kwargs))(params)


NAMES = ("a/kernel", "head/kernel")


def units_left(mask, spec):
    """Return, by unit, whether any of its entries is left."""
    return np.array([any(mask[index] for index in unit) for unit in brute_force.units(mask.shape, spec)])


@pytest.mark.parametrize("structure", STRUCTURES)
@given(seed=st.integers(0, 10**6), few=st.booleans(), floor=st.integers(0, 1), masked=st.booleans())
@settings(deadline=None, max_examples=10, derandomize=True)
def test_it_equals_pruning_each_tensor_alone(structure, seed, few, floor, masked):
    params, spec = drawn(seed, few), SPECS[structure]
    rng = np.random.default_rng(seed)
    before = jax.tree.map(lambda leaf: rng.random(leaf.shape) < (0.7 if masked else 2), params)
    found = jp.sensitivity(
        evaluate,
        params,
        levels=LEVELS,
        structure=STRUCTURES[structure],
        floor=floor,
        masks=before if masked else None,
    )
    assert found.dense == float(evaluate(jp.apply_masks(params, before)))
    assert [(p.name, p.sparsity) for p in found.points] == [(n, level) for n in NAMES for level in LEVELS]
    for point in found.points:
        layer, leaf = point.name.split("/")
        units = units_left(before[layer][leaf], spec)
        gone = brute_force.half_even(point.sparsity, units.size) - int((~units).sum())
        counts = dict.fromkeys(NAMES, 0) | {point.name: max(gone, 0)}
        masks = pruning(structure, floor)(params, before, counts)
        figure = float(evaluate(jp.apply_masks(params, masks)))
        assert (point.metric, point.drop) == (figure, found.dense - figure)
        left = units_left(np.asarray(masks[layer][leaf]), spec)
        assert (point.kept, point.size) == (left.sum(), left.size)
        assert point.achieved == pytest.approx(1 - left.mean())
        assert ("nothing was removed" in point.notes) == (left.sum() == units.sum())
        assert any("floor=1 kept" in note for note in point.notes) == (units.sum() - gone < floor)
        assert any("nothing is left" in note for note in point.notes) == (units.any() and not left.any())


def test_a_handful_of_programs():
    widths = (4, *[5] * 9, 3)
    rng = np.random.default_rng(0)
    params = {
        f"fc{n}": {"kernel": jnp.asarray(rng.normal(size=pair)), "bias": jnp.zeros(pair[1])}
        for n, pair in enumerate(itertools.pairwise(widths))
    }
    traced = []

    def evaluate(params, x):
        traced.append(1)
        for layer in params.values():
            x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
        return x.mean()

    data, again = (jnp.asarray(rng.normal(size=(7, 4))) for _ in range(2))
    levels = tuple(np.arange(1, 11) / 11)
    for at_once in (1, 4):
        with compilations() as programs:
            found = jp.sensitivity(evaluate, params, data, levels=levels, at_once=at_once)
        assert len(found.points) == 100
        assert 1 <= len(programs) <= 5, programs
    times, negative = len(traced), jax.tree.map(jnp.negative, params)
    with compilations() as programs:  # as for another seed, or on other data
        jp.sensitivity(evaluate, negative, again, levels=levels)
    assert (programs, len(traced)) == ([], times)


def test_the_evaluated_function_is_not_kept_alive():
    def evaluate(params):
        return params["a"]["kernel"].sum()

    jp.sensitivity(evaluate, drawn(0), levels=(0.5,))
    alive = weakref.ref(evaluate)
    del evaluate
    gc.collect()
    assert alive() is None


@contextlib.contextmanager
def compilations():
    """Collect the names of the programs that are compiled meanwhile."""
    names = []

    def listen(event, seconds, **about):
        if event.endswith("/backend_compile_duration"):
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("at_once", [3, 100])
def test_several_at_once_are_the_same(at_once):
    params = drawn(11)
    one, several = (jp.sensitivity(evaluate, params, at_once=n) for n in (1, at_once))
    assert one == several


def test_a_function_that_cannot_be_traced():
    params = drawn(12)

    def counted(params):  # as a loop over files
        return sum(float(row.sum()) for row in np.asarray(network(params)))

    with pytest.raises(TypeError, match=r"evaluate cannot be traced: it looks at values.*or pass jit=F"):
        jp.sensitivity(counted, params)
    found = jp.sensitivity(counted, params, jit=False, levels=LEVELS)
    same = jp.sensitivity(lambda params: network(params).sum(), params, levels=LEVELS)
    assert found == same


GROUPED = {"p": (4, 3), "q": (4, 3), "r": (3, 2)}


def coupled(params, x):
    """Two layers whose outputs are added: their channels can only go together."""
    return (x @ params["p"] + x @ params["q"]) @ params["r"]


def test_coupled_channels_go_together():
    rng = np.random.default_rng(1)
    params = {name: jnp.asarray(rng.integers(1, 9, shape), jnp.float32) for name, shape in GROUPED.items()}
    # The channel that "p" can do without is the one that "q" lives from.
    params["p"], params["q"] = params["p"].at[:, 0].set(0), params["q"].at[:, 0].set(90)
    structure = jp.structures.channels(jp.channel_groups(coupled, params, X))

    def metric(params):
        return coupled(params, X).sum()

    found = jp.sensitivity(metric, params, levels=(0.3, 0.6), structure=structure)
    assert list(found.pools) == ["p[1]"]
    for point in found.points:
        masks = prune_once(params, jp.scores.magnitude, point.sparsity, structure=structure)
        assert point.metric == float(metric(jp.apply_masks(params, masks)))
        assert (point.kept, point.size) == (int(masks["r"].any(axis=1).sum()), 3)
    targets = jp.distributions.from_sensitivity(found, tolerance=float("inf"))
    masks = prune_once(params, jp.scores.magnitude, targets, scope="layerwise", structure=structure)
    assert int(masks["p"].any(axis=0).sum()) == 1
    # Widths that are rounded up are told as they are.
    wide = jp.structures.channels(jp.channel_groups(coupled, params, X), multiple_of=2)
    (point,) = jp.sensitivity(metric, params, levels=(0.6,), structure=wide).points
    assert (point.kept, point.sparsity, point.achieved) == (2, 0.6, pytest.approx(1 / 3))


def test_sets_are_pruned_at_one_ratio():
    params = drawn(13)
    found = jp.sensitivity(evaluate, params, levels=(0.5,), together={"both": ["a/*", "head/kernel"]})
    assert found.pools == {"both": NAMES}
    (point,) = found.points
    masks = prune_once(params, jp.scores.magnitude, 0.5, scope="layerwise")
    assert (point.metric, point.kept, point.size) == (float(evaluate(jp.apply_masks(params, masks))), 21, 42)
    some = jp.sensitivity(evaluate, params, levels=(0.5,), together={"one": "head/*"})
    assert some.pools == {"one": ("head/kernel",), "a/kernel": ("a/kernel",)}
    targets = jp.distributions.from_sensitivity(found, tolerance=float("inf"))
    assert targets == dict.fromkeys(NAMES, 0.5)


def test_names_of_groups_are_not_read_as_patterns():
    params = {name: jnp.ones(shape) for name, shape in GROUPED.items()}
    structure = jp.structures.channels(jp.channel_groups(coupled, params, X))
    found = jp.sensitivity(
        lambda p: coupled(p, X).sum(), params, structure=structure, together={"set": "p[1]"}
    )
    assert found.pools == {"set": ("p[1]",)}


def test_any_score_and_several_figures():
    params, key = drawn(14), jax.random.key(3)
    grads = jax.jit(jax.grad(lambda p: (network(p) ** 2).sum()))(params)

    @jax.jit
    def figures(params):
        out = network(params)
        return {"accuracy": (out.argmax(-1) == 0).mean(), "loss": jnp.square(out).mean()}

    for kwargs in (
        {"scores": jp.scores.taylor, "grads": grads},
        {"scores": jp.scores.random, "key": key},
        {"scores": jax.tree.map(jnp.negative, params)},
        {"scores": lambda p, *, start, power, **_: jax.tree.map(lambda a, b: abs(a - b) ** power, p, start)}
        | {"start": grads, "power": 2},
    ):
        found = jp.sensitivity(figures, params, levels=(0.5,), metric="loss", maximize=False, **kwargs)
        both = prune_once(params, sparsity=0.5, scope="layerwise", **kwargs)
        for point, layer in zip(found.points, ("a", "head"), strict=True):
            masks = jp.ones_masks(params) | {layer: both[layer]}
            figure = figures(jp.apply_masks(params, masks))
            assert point.metric == pytest.approx(float(figure["loss"]), rel=1e-6)
            assert point.others == {"accuracy": pytest.approx(float(figure["accuracy"]))}
            assert point.drop == point.metric - found.dense
    assert found.others.keys() == {"accuracy"}
    with pytest.raises(ValueError, match=r"returns accuracy, loss; metric= must say which .* got None"):
        jp.sensitivity(figures, params)


def test_a_score_that_cannot_be_compiled():
    params = drawn(17)

    def in_numpy(params, *, exponents, **_):
        return jax.tree.map(lambda leaf: jnp.asarray(abs(np.asarray(leaf)) ** sum(exponents)), params)

    for exponents in ([1, 1], (1, 1)):  # one of them cannot be hashed
        found = jp.sensitivity(evaluate, params, levels=LEVELS, scores=in_numpy, exponents=exponents)
        assert found == jp.sensitivity(evaluate, params, levels=LEVELS)


def test_n_of_m_groups():
    params, structure = drawn(15), jp.structures.nm(1, 2)
    found = jp.sensitivity(evaluate, params, levels=(0.25, 0.5), structure=structure)
    assert [(p.kept, p.size, p.achieved) for p in found.points] == [
        (6, 12, 0.25),
        (0, 12, 0.5),
        (5, 9, pytest.approx(0.5 * 4 / 9)),
        (0, 9, 0.5),
    ]
    targets = {"a/kernel": 0.5}
    masks = prune_once(params, jp.scores.magnitude, targets, structure=structure, scope="layerwise")
    assert found.of("a/kernel")[1].metric == float(evaluate(jp.apply_masks(params, masks)))
    with pytest.raises(ValueError, match=r"nm\(1, 2, axis=-2\) removes at most 0.5 of the entries"):
        jp.sensitivity(evaluate, params, structure=structure)


@pytest.fixture(scope="module")
def result():
    return jp.sensitivity(evaluate, drawn(16), levels=(0.01, 0.5, 0.9, 0.99), metric="total", floor=0)


def test_the_table(result):
    text = str(result).splitlines()
    assert max(map(len, text)) <= 80
    assert text[0].startswith("total with one pruned alone; with nothing pruned ")
    cells = {line.split()[0]: line.split()[1:] for line in text[1:4]}
    assert cells["pruned"] == ["1%", "50%", "90%", "99%"]
    for name in NAMES:
        assert [float(x) for x in cells[name]] == pytest.approx([p.metric for p in result.of(name)], abs=0.1)
    assert text[4:] == [
        "a/kernel at 1%: nothing was removed",
        "a/kernel at 99%: nothing is left (layer collapse)",
        "head/kernel at 1%: nothing was removed",
        "head/kernel at 99%: nothing is left (layer collapse)",
    ]


def test_a_long_table_is_cut_to_80_columns():
    point = jp.sensitivity(evaluate, drawn(16), levels=(0.5,)).points[0]
    names = [f"params/encoder/layers/block_{i}/self_attention/query_projection/kernel" for i in (1, 10)]
    levels = [level / 20 for level in range(1, 20)]
    points = [point._replace(name=n, sparsity=x, metric=1e-7, notes=("as",)) for n in names for x in levels]
    found = jp.Sensitivity(tuple(points), 1.0, "m", True, {n: (n,) for n in names}, {})
    text = str(found).splitlines()
    assert max(map(len, text)) <= 80
    for end in ("_1/self_attention/query_projection/kernel", "10/self_attention/query_projection/kernel"):
        assert sum(end in line for line in text) > 3


def test_csv_and_dict(result, tmp_path):
    assert result.to_csv(tmp_path / "found.csv") == (tmp_path / "found.csv").read_text()
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    for row, point in zip(rows, result.points, strict=True):
        assert (row["name"], float(row["total"]), float(row["drop"])) == (
            point.name,
            point.metric,
            point.drop,
        )
        assert (int(row["kept"]), int(row["size"])) == (point.kept, point.size)
        assert (float(row["sparsity"]), float(row["achieved"])) == (point.sparsity, point.achieved)
    assert rows[0]["notes"] == "nothing was removed"
    as_dict = json.loads(json.dumps(result.to_dict()))
    assert as_dict["dense"] == {"total": result.dense}
    assert [point["metric"] for point in as_dict["points"]] == [point.metric for point in result.points]
    assert as_dict["pools"] == {name: [name] for name in NAMES}


def test_the_plot(result, tmp_path, monkeypatch):
    result.plot(tmp_path / "found.png")
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxprune\[plots\]'"):
        result.plot(tmp_path / "other.png")


@given(seed=st.integers(0, 10**6), tolerance=st.floats(0, 300), interpolate=st.booleans())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_targets_keep_each_tensor_alone_within_tolerance(seed, tolerance, interpolate):
    params = drawn(seed)
    found = jp.sensitivity(evaluate, params, levels=LEVELS)
    if all(found.of(name)[0].drop > tolerance for name in NAMES) and not (interpolate and tolerance):
        with pytest.raises(ValueError, match="nothing stays within tolerance"):
            jp.distributions.from_sensitivity(found, tolerance, interpolate=interpolate)
        return
    targets = jp.distributions.from_sensitivity(found, tolerance, interpolate=interpolate)
    assert list(targets) == list(NAMES)
    for name, target in targets.items():
        passed = [0.0]
        for point in found.of(name):
            if point.drop > tolerance:
                break
            passed.append(point.sparsity)
        if not interpolate:
            assert target == passed[-1]
            # As prune_once prunes this tensor alone.
            size = found.of(name)[0].size
            counts = dict.fromkeys(NAMES, 0) | {name: brute_force.half_even(target, size)}
            masks = pruning("elements", 1)(params, jp.ones_masks(params), counts)
            assert found.dense - float(evaluate(jp.apply_masks(params, masks))) <= tolerance
        elif len(passed) > len(LEVELS):
            assert target == passed[-1]
        else:
            level = LEVELS[len(passed) - 1]
            x = [p.sparsity for p in found.of(name) if p.sparsity in (passed[-1], level)]
            y = [p.drop for p in found.of(name) if p.sparsity in x]
            x, y = ([0.0, *x], [0.0, *y]) if len(x) == 1 else (x, y)
            assert x[0] <= target <= x[1]
            assert target == pytest.approx(np.interp(tolerance, y, x))


def test_targets_of_nothing_are_refused(result):
    with pytest.raises(ValueError, match="tolerance must be 0 or more, got -1"):
        jp.distributions.from_sensitivity(result, tolerance=-1)
    lost = dataclasses.replace(result, points=tuple(p._replace(drop=float("nan")) for p in result.points))
    with pytest.raises(ValueError, match="nothing stays within tolerance=5 of total="):
        jp.distributions.from_sensitivity(lost, tolerance=5)


def with_nan(params):
    return params | {"head": params["head"] | {"kernel": params["head"]["kernel"].at[1, 1].set(jnp.nan)}}


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"levels": ()}, ValueError, r"levels must be one or more sparsities in \(0, 1\), rising"),
        ({"levels": (0.5, 0.5)}, ValueError, "rising"),
        ({"levels": (0.0, 0.5)}, ValueError, "rising"),
        ({"levels": (0.5, 1.0)}, ValueError, r"levels must be in \[0, 1\)"),
        ({"evaluate": 3}, TypeError, "a function evaluate\\(params\\), got 3"),
        ({"evaluate": network}, TypeError, r"one real number, .* 'metric' is float32\[5, 3\]"),
        ({"evaluate": lambda p: {"m": "x"}, "metric": "m", "jit": False}, TypeError, "'m' is str"),
        ({"at_once": 0}, ValueError, "at_once must be an integer of 1 or more"),
        ({"at_once": 2, "jit": False}, ValueError, "leave out jit=False"),
        ({"floor": -1}, ValueError, "floor must be an integer of 0 or more"),
        ({"where": jp.matching("conv*")}, ValueError, "matches no leaf"),
        ({"params": with_nan(drawn(0))}, ValueError, r"scores\['head/kernel'\] has 1 entries that are NaN"),
        ({"structure": jp.structures.slices(axis=3)}, ValueError, r"slices\(axis=3\) on params"),
        ({"params": drawn(0) | {"activation": jnp.tanh}}, TypeError, "'activation'.* not an array"),
        ({"together": {"s": "conv*"}}, ValueError, r"together\['s'\] names 'conv\*', which is none of a/k"),
        ({"together": {"s": "a/*", "t": "*"}}, ValueError, "names 'a/kernel' twice, in 's' and in 't'"),
        ({"together": {"a/kernel": "head/*"}}, ValueError, "a set named as 'a/kernel'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors(kwargs, error, match):
    with pytest.raises(error, match=match):
        jp.sensitivity(**{"evaluate": evaluate, "params": drawn(0)} | kwargs)


def test_it_is_refused_under_jit():
    with pytest.raises(
        TypeError, match="sensitivity counts and ranks on the host, so it cannot run under jit"
    ):
        jax.jit(lambda p: jp.sensitivity(evaluate, p).dense)(drawn(0))


def test_an_unknown_name(result):
    with pytest.raises(KeyError, match="there is no 'conv'; the names are a/kernel, head/kernel"):
        result.of("conv")
