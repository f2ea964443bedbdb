"""A compacted network in one file, and back."""

import subprocess
import sys
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune as jp
from tests.oracles import plain_file as plain

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)), jnp.float32)


class Dense(nn.Module):
    """Two layers of linen."""

    @nn.compact
    def __call__(self, x):
        """Return the outputs."""
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)


def of_linen():
    """Return the function and the params of two layers of linen."""
    return Dense().apply, Dense().init(jax.random.key(0), X)


def of_nnx():
    """Return the function and the state of two layers of nnx."""

    def make():
        rngs = nnx.Rngs(0)
        return nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))

    graph, state = nnx.split(make())
    return lambda state, x: nnx.merge(graph, state)(x), state


def of_equinox():
    """Return the function and the arrays of two layers of equinox."""
    arrays, rest = eqx.partition(eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0)), eqx.is_array)
    return lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays


def of_haiku():
    """Return the function and the params of two layers of haiku."""

    def layers(x):
        x = jax.nn.relu(hk.Linear(8)(x))
        return hk.Linear(3)(x)

    network = hk.without_apply_rng(hk.transform(layers))
    return network.apply, network.init(jax.random.key(0), X)


def of_numbers():
    """Return the function and the params of two layers in a list, in bf16, with a number among the inputs."""
    params = [{"w": jnp.ones((6, 8), jnp.bfloat16)}, {"w": jnp.arange(24.0).reshape(8, 3)}]
    return lambda p, x, train=False: jax.nn.relu(x @ p[0]["w"]) @ p[1]["w"], params


LIBRARIES = {f.__name__.removeprefix("of_"): f for f in (of_linen, of_nnx, of_equinox, of_haiku, of_numbers)}


def compacted(name):
    """Return a network without two hidden units, and with one more entry masked."""
    apply_fn, params = LIBRARIES[name]()
    hidden = next(
        p for p, leaf in zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True) if leaf.ndim == 2
    )
    axis = 0 if name == "equinox" else 1

    def mask(path, leaf):
        keep = np.ones(leaf.shape, bool)
        of_first = path.rpartition("/")[0] == hidden.rpartition("/")[0]
        if of_first:
            keep[([1, 4],) if leaf.ndim == 1 or axis == 0 else (slice(None), [1, 4])] = False
        if path == hidden:
            keep[0, 0] = False
        return jnp.asarray(keep)

    leaves = [mask(p, leaf) for p, leaf in zip(jp.leaf_paths(params), jax.tree.leaves(params), strict=True)]
    masks = jax.tree.unflatten(jax.tree.structure(params), leaves)
    return apply_fn, params, jp.compact(apply_fn, params, masks, X)


def same(first, second):
    """Check that two trees have the same bits, whatever their containers."""
    one, two = (dict(zip(jp.leaf_paths(t), jax.tree.leaves(t), strict=True)) for t in (first, second))
    assert one.keys() == two.keys()
    for path, leaf in one.items():
        assert leaf.dtype == two[path].dtype
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(two[path]), err_msg=path)


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_was_saved_comes_back(name, tmp_path):
    apply_fn, params, small = compacted(name)
    assert jp.io.save_compacted(tmp_path / "small", small) == (tmp_path / "small").stat().st_size
    like = jax.eval_shape(lambda: params) if name in ("equinox", "nnx") else None
    loaded = jp.io.load_compacted(tmp_path / "small", apply_fn, like=like)
    same(loaded.params, small.params)
    same(loaded.masks, small.masks)
    same(loaded.keep, small.keep)
    assert loaded.plan.shapes == small.plan.shapes
    assert loaded.not_removed == small.not_removed
    assert loaded.inputs == small.inputs
    x = jnp.concatenate([X, X])
    np.testing.assert_array_equal(loaded.apply(loaded.params, x), small.apply(small.params, x))
    np.testing.assert_allclose(
        loaded.apply(loaded.params, x), apply_fn(loaded.expand(loaded.params), x), rtol=1e-5
    )
    same(loaded.shrink(loaded.expand(loaded.params)), small.params)
    if like is not None:
        assert jax.tree.structure(loaded.params) == jax.tree.structure(small.params)


def test_a_fresh_process_loads_three_libraries_without_dense_params(tmp_path):
    names = ("linen", "nnx", "equinox")
    for name in names:
        _, _, small = compacted(name)
        jp.io.save_compacted(tmp_path / name, small)
        np.save(tmp_path / f"{name}.npy", small.apply(small.params, X))
    code = f"""
import equinox as eqx, flax.linen as nn, jax, jax.numpy as jnp, numpy as np
from flax import nnx
import jaxprune as jp
from tests.io.test_compacted import X, Dense
def nnx_model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
graph, _ = nnx.split(nnx.eval_shape(nnx_model))
model = eqx.filter_eval_shape(eqx.nn.MLP, 6, 3, 8, 1, key=jax.random.key(0))
is_struct = lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct)
arrays, rest = eqx.partition(model, is_struct)
calls = {{
    "linen": (Dense().apply, None),
    "nnx": (lambda state, x: nnx.merge(graph, state)(x), None),
    "equinox": (lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x), arrays),
}}
for name, (apply_fn, like) in calls.items():
    loaded = jp.io.load_compacted({str(tmp_path)!r} + "/" + name, apply_fn, like=like)
    got = loaded.apply(loaded.params, X)
    np.testing.assert_array_equal(got, np.load({str(tmp_path)!r} + f"/{{name}}.npy"))
print("all equal")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(jp.__file__).parents[1]
    )
    assert done.stdout == "all equal\n", done.stderr


@pytest.fixture
def file(tmp_path):
    """Return the file of a small network of linen."""
    jp.io.save_compacted(tmp_path / "small", compacted("linen")[2])
    return tmp_path / "small"


def test_stacked_layers_and_whole_blocks_come_back(tmp_path):
    def scan(params, x):
        return jax.lax.scan(lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None), x, params)[0]

    params = {"up": jnp.ones((3, 4, 6)), "down": jnp.ones((3, 6, 4))}
    masks = jp.ones_masks(params)
    for layer, unit in enumerate([0, 2, 5]):
        masks["up"] = masks["up"].at[layer, :, unit].set(False)
    x = jnp.ones((2, 4))
    small = jp.compact(scan, params, masks, x)
    jp.io.save_compacted(tmp_path / "a", small)
    loaded = jp.io.load_compacted(tmp_path / "a", scan)
    assert loaded.params["up"].shape == (3, 4, 5)
    same(loaded.keep, small.keep)
    same(loaded.apply(loaded.params, x), small.apply(small.params, x))

    def residual(params, x):
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer["w"])
        return x

    params = {"layers": [{"w": jnp.full((4, 4), n)} for n in (1.0, 2.0, 3.0)]}
    masks = jp.ones_masks(params)
    masks["layers"][1]["w"] = jnp.zeros((4, 4), bool)
    small = jp.compact(residual, params, masks, x)
    jp.io.save_compacted(tmp_path / "b", small)
    loaded = jp.io.load_compacted(tmp_path / "b", residual)
    assert loaded.plan.removed == small.plan.removed == ("layers/1",)
    same(loaded.apply(loaded.params, x), small.apply(small.params, x))
    same(loaded.expand(loaded.params), small.expand(small.params))


def test_static_inputs_keys_and_state(tmp_path):
    def noisy(params, batch, train, rate, key):
        x = batch["x"] @ params["a"]
        x = x * jax.random.normal(key, x.shape[:1])[:, None] * rate if train else x
        return jnp.tanh(x) @ params["b"], {"a": params["a"]}

    params = {"a": jnp.ones((6, 4)).at[:, 1].set(0), "b": jnp.ones((4, 2))}
    masks = jp.ones_masks(params) | {"a": params["a"] != 0}
    inputs = ({"x": X}, True, 0.5, jax.random.key(0))
    small = jp.compact(noisy, params, masks, *inputs, state=lambda out: out[1])
    jp.io.save_compacted(tmp_path / "a", small)
    loaded = jp.io.load_compacted(tmp_path / "a", noisy, state=lambda out: out[1])
    assert loaded.inputs == small.inputs
    same(loaded.apply(loaded.params, *inputs), small.apply(small.params, *inputs))
    with pytest.raises(jp.io.FileError, match="apply_fn is not the function"):
        jp.io.load_compacted(tmp_path / "a", noisy)  # whose new values of params are small


@pytest.mark.parametrize(
    ("apply_fn", "message"),
    {
        "other outputs": (lambda p, x: (Dense().apply(p, x), 1.0), r"its outputs are .*, and were .*2, 3"),
        "more inputs": (lambda p, x, y: x, r"it raises TypeError: .*'y'"),
        "other params": (lambda p, x: x @ p["kernel"], r"it raises KeyError: 'kernel'"),
        "needs what was dropped": (
            lambda p, x: Dense().apply(p, x) + p["params"]["Dense_0"]["bias"][4],
            r"the plan drops slice 4 of params\['params/Dense_0/bias'\]",
        ),
    }.values(),
)
def test_another_function_is_refused(file, apply_fn, message):
    with pytest.raises(
        jp.io.FileError, match=rf"small: apply_fn is not the function that was compacted.*{message}"
    ):
        jp.io.load_compacted(file, apply_fn)


def test_other_params_in_like_are_refused(file):
    params = Dense().init(jax.random.key(0), jnp.ones((1, 7)))
    with pytest.raises(
        jp.io.FileError, match=r"'params/Dense_0/kernel' has the dense shape \(6, 8\).*\(7, 8\) in l"
    ):
        jp.io.load_compacted(file, Dense().apply, like=params)
    half = jax.tree.map(jnp.bfloat16, Dense().init(jax.random.key(0), X))
    with pytest.raises(jp.io.FileError, match=r"is float32\[6\], but bfloat16\[6\] in like"):
        jp.io.load_compacted(file, Dense().apply, like=half)


def test_other_things_are_refused(tmp_path, file):
    params = {"w": jnp.ones((2, 2))}
    jp.io.save(tmp_path / "params", params)
    with pytest.raises(jp.io.FileError, match=r"params: holds no compacted network.*io\.load"):
        jp.io.load_compacted(tmp_path / "params", Dense().apply)
    with pytest.raises(TypeError, match="apply_fn"):
        jp.io.load_compacted(file, params)
    with pytest.raises(TypeError, match=r"what jaxprune\.compact returns"):
        jp.io.save_compacted(tmp_path / "x", params)
    abstract = jp.compact(
        lambda p, x: x @ p["w"], jax.eval_shape(lambda: params), jp.ones_masks(params), jnp.ones((1, 2))
    )
    with pytest.raises(TypeError, match="holds no values"):
        jp.io.save_compacted(tmp_path / "x", abstract)
    assert not (tmp_path / "x").exists()
    with pytest.raises(AttributeError, match=r"save_compacted.*plan\.save"):
        abstract.save("x")


def changed(data, change):
    """Return a file with other metadata, under right checksums."""
    header, rest = plain.split(data)
    change(header["metadata"])
    return plain.join(header, rest)


def test_mutations_end_in_file_errors(tmp_path, file):
    data, rng, target = file.read_bytes(), np.random.default_rng(0), tmp_path / "mutated"
    for _ in range(60):
        new = bytearray(data)
        new[rng.integers(len(new))] ^= 1 << int(rng.integers(8))
        target.write_bytes(new)
        with pytest.raises(jp.io.FileError):
            jp.io.load_compacted(target, Dense().apply)
    for end in rng.integers(0, len(data), 10):
        target.write_bytes(data[:end])
        with pytest.raises(jp.io.FileError):
            jp.io.load_compacted(target, Dense().apply)


def set_shape(value):
    """Return a change of the metadata: another dense shape of the first kernel."""
    return lambda metadata: metadata["shapes"].update({"params/Dense_0/kernel": value})


HOSTILE = {
    "huge": set_shape([6, 1 << 40]),
    "negative": set_shape([6, -8]),
    "not numbers": set_shape(["a", "b"]),
    "null": set_shape(None),
    "fewer axes": set_shape([8]),
    "other size": set_shape([6, 9]),
    "no shapes": lambda m: m.pop("shapes"),
    "shapes of others": lambda m: m.update(shapes={"x": [1]}),
    "a list of shapes": lambda m: m.update(shapes=[1]),
    "divisors": lambda m: m["divisors"].update({"params/Dense_1/kernel": [1]}),
    "stacks": lambda m: m["stacks"].update({"params/Dense_1/kernel": [0]}),
    "stacks elsewhere": lambda m: m["stacks"].update({"params/Dense_1/kernel": [7]}),
    "many layers": lambda m: (m["shapes"].update(x=[1 << 32, 1 << 32]), m["stacks"].update(x=[0, 1])),
    "removed": lambda m: m.update(removed=["params/Dense_1"]),
    "removed numbers": lambda m: m.update(removed=[1]),
    "not removed": lambda m: m.update(not_removed=[[1]]),
    "inputs": lambda m: m.update(inputs=[{"array": ["float32", [-1]]}]),
    "input dtype": lambda m: m.update(inputs=[{"array": ["object", [1]]}]),
    "input kind": lambda m: m.update(inputs=[{"call": "x"}]),
    "inputs nested": lambda m: m.update(inputs=[{"value": [1]}]),
    "outputs": lambda m: m.update(outputs=7),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_plan_under_right_checksums_is_refused(tmp_path, file, change):
    (tmp_path / "hostile").write_bytes(changed(file.read_bytes(), change))
    with pytest.raises(jp.io.FileError, match="hostile: ") as info:
        jp.io.load_compacted(tmp_path / "hostile", Dense().apply)
    assert len(str(info.value)) < 1000
