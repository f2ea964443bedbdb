"""Compacted networks in one file: read by another process, which never sees the dense params."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "up": {"kernel": jax.random.normal(KEYS[0], (5, 8)), "bias": jax.random.normal(KEYS[1], (8,))},
    "down": [jax.random.normal(KEYS[2], (8, 3))],
}
X = jax.random.normal(KEYS[3], (4, 5))


def apply_fn(params, x):
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]) @ params["down"][0]


def small_network():
    """Return a network that lost three of its eight units, and has single zeros besides."""
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), PARAMS)
    masks["up"]["kernel"][:, [1, 4, 6]] = False
    masks["up"]["bias"][[1, 4, 6]] = False
    masks["up"]["kernel"][2, 3] = masks["down"][0][7, 1] = False
    return jp.compact(apply_fn, PARAMS, masks, X)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.structure(one) == jax.tree.structure(other)


def test_all_of_it_comes_back(tmp_path):
    small = small_network()
    assert small.params["up"]["kernel"].shape == (5, 5)
    size = jp.io.save_compacted(tmp_path / "small", small)
    assert size == (tmp_path / "small").stat().st_size
    loaded = jp.io.load_compacted(tmp_path / "small", apply_fn)
    same(loaded.params, small.params)
    same(loaded.masks, small.masks)
    assert not loaded.masks["up"]["kernel"].all()
    x = jnp.concatenate([X, X])
    np.testing.assert_array_equal(loaded.apply(loaded.params, x), small.apply(small.params, x))
    same(loaded.expand(loaded.params), small.expand(small.params))
    state = optax.adam(0.1).init(PARAMS)
    same(loaded.shrink(state), small.shrink(state))
    assert {p: {a: k.tolist() for a, k in each.items()} for p, each in loaded.keep.items()} == {
        p: {a: k.tolist() for a, k in each.items()} for p, each in small.keep.items()
    }
    same(jp.io.load(tmp_path / "small").params, small.params)


def test_stacked_layers_and_blocks_that_were_taken_out(tmp_path):
    def stacked(params, x):
        return jax.lax.scan(lambda x, w: (x + jnp.tanh(x @ w["a"]) @ w["b"], None), x, params)[0]

    params = {"a": jnp.ones((3, 5, 4)), "b": jnp.ones((3, 4, 5)) / 9}
    masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
    for layer, unit in enumerate((0, 2, 3)):
        masks["a"][layer, :, unit] = False
    small = jp.compact(stacked, params, masks, X)
    jp.io.save_compacted(tmp_path / "small", small)
    loaded = jp.io.load_compacted(tmp_path / "small", stacked)
    assert loaded.params["a"].shape == (3, 5, 3) and loaded.plan.stacks == small.plan.stacks
    np.testing.assert_array_equal(loaded.apply(loaded.params, X), small.apply(small.params, X))


ELSEWHERE = """
    import sys
    import equinox as eqx, flax.linen as nn, jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    import jaxprune as jp

    X = jnp.linspace(-1, 1, 20).reshape(4, 5)

    def linen():
        model = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)])
        return model.apply, lambda: model.init(jax.random.key(0), X)

    def of_nnx():
        def make():
            rngs = nnx.Rngs(0)
            return nnx.Sequential(nnx.Linear(5, 8, rngs=rngs), nnx.tanh, nnx.Linear(8, 3, rngs=rngs))
        graph, _ = nnx.split(nnx.eval_shape(make))
        return lambda state, x: nnx.merge(graph, state)(x), lambda: nnx.state(make())

    def equinox():
        def make():
            return eqx.nn.MLP(5, 3, 8, 1, jnp.tanh, key=jax.random.key(0))
        static = eqx.filter(eqx.filter_eval_shape(make), lambda x: not isinstance(x, jax.ShapeDtypeStruct))
        arrays = lambda: eqx.filter(make(), eqx.is_array)
        return lambda params, x: jax.vmap(eqx.combine(params, static))(x), arrays

    for number, library in enumerate((linen, of_nnx, equinox)):
        apply_fn, make = library()
        file = f"{sys.argv[2]}/{number}"
        if sys.argv[1] == "save":
            params = make()
            groups = jp.channel_groups(apply_fn, params, X)
            structure = jp.structures.channels(groups)
            masks = jp.prune_once(params, jp.scores.magnitude, 0.5, structure=structure)
            small = jp.compact(apply_fn, params, masks, X)
            jp.io.save_compacted(file, small)
        else:
            small = jp.io.load_compacted(file, apply_fn, like=jax.eval_shape(make))
        print(sum(leaf.size for leaf in jax.tree.leaves(small.params)), small.apply(small.params, X).tolist())
"""


def test_a_fresh_process_reads_networks_of_three_libraries(tmp_path):
    def run(what):
        code = textwrap.dedent(ELSEWHERE)
        command = [sys.executable, "-c", code, what, str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    saved = run("save")
    assert [int(line.split()[0]) for line in saved.splitlines()] == [39, 39, 39]  # of 75
    assert run("load") == saved


# --- what is refused ----------------------------------------------------------------------------------------


def test_what_is_no_compacted_network(tmp_path):
    with pytest.raises(TypeError, match="save_compacted takes what compact returned, got a dict"):
        jp.io.save_compacted(tmp_path / "small", PARAMS)
    jp.io.save(tmp_path / "plain", PARAMS)
    with pytest.raises(jp.io.FileError, match=r"plain: it holds no compacted network\. Read it with"):
        jp.io.load_compacted(tmp_path / "plain", apply_fn)
    with pytest.raises(AttributeError, match=r"save_compacted\(file, small\) writes the network"):
        small_network().save(tmp_path / "plan")


def test_another_function_or_structure(tmp_path):
    jp.io.save_compacted(tmp_path / "small", small_network())
    with pytest.raises(TypeError, match=r"load_compacted needs a function apply_fn\(params"):
        jp.io.load_compacted(tmp_path / "small", PARAMS)
    wider = jax.tree.map(jnp.zeros_like, PARAMS) | {"down": [jnp.zeros((9, 3))]}
    with pytest.raises(jp.io.FileError, match=r"'down/0' has the dense shape \(8, 3\), but \(9, 3\) in like"):
        jp.io.load_compacted(tmp_path / "small", apply_fn, like=wider)

    def other(params, x):  # a unit without weights takes part in the softmax
        h = jax.nn.softmax(x @ params["up"]["kernel"] + params["up"]["bias"])
        return h @ params["down"][0]

    loaded = jp.io.load_compacted(tmp_path / "small", other)
    dense = jax.tree.map(np.asarray, loaded.expand(loaded.params))
    np.testing.assert_allclose(loaded.apply(loaded.params, X), other(dense, X), atol=1e-6)
    loaded = jp.io.load_compacted(tmp_path / "small", lambda params, x: x @ params["across"])
    with pytest.raises(KeyError, match="across"):
        loaded.apply(loaded.params, X)


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.pop("keep"),
        lambda plan: plan["shapes"].update({"up/bias": [5]}),
        lambda plan: plan["shapes"].update({"up/bias": "8"}),
        lambda plan: plan["keep"].update({"up/bias": {"0": [[1, 2], [3]]}}),
        lambda plan: plan["keep"]["up/bias"].update({"0": [1, 2, 3, 4, 9]}),
        lambda plan: plan["keep"].update({"up/bias": {"x": [1]}}),
        lambda plan: plan["keep"].update({"up/bias": {"0": [2**70]}}),
        lambda plan: plan.update(keep=[]),
        lambda plan: plan.update(removed=3),
        lambda plan: plan.update(removed=["down/0"]),
        lambda plan: plan.update(removed=[3]),
        lambda plan: plan["divisors"].update({"up/bias": [3]}),
    ],
)
def test_a_plan_that_does_not_fit(tmp_path, change):
    jp.io.save_compacted(tmp_path / "small", small_network())
    saved = jp.io.load(tmp_path / "small")
    plan = json.loads(json.dumps(saved.metadata["compacted"]))
    change(plan)
    jp.io.save(tmp_path / "other", saved.params, saved.masks, metadata={"compacted": plan})
    with pytest.raises(jp.io.FileError, match=r"other: "):
        jp.io.load_compacted(tmp_path / "other", apply_fn)


def test_damaged_files(tmp_path):
    file = tmp_path / "small"
    jp.io.save_compacted(file, small_network())
    whole, rng = file.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(data[: rng.integers(len(data))] if rng.random() < 0.2 else data))
        with pytest.raises(jp.io.FileError):
            jp.io.load_compacted(file, apply_fn)
