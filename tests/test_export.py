import importlib.util
import subprocess
import sys
from importlib.metadata import version

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from jax import lax

import jaxprune as jp
from jaxprune.export import _compare, _window_max

needs_onnx = pytest.mark.skipif(
    importlib.util.find_spec("jax2onnx") is None or importlib.util.find_spec("onnxruntime") is None,
    reason="jax2onnx or onnxruntime is not installed",
)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.relu(nn.Dense(64, name="hidden")(x)))


class Conv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (5, 5), padding="VALID", name="hidden")(x)
        x = nn.relu(nn.max_pool(x, (2, 2), (2, 2)))
        return jax.nn.log_softmax(nn.Dense(5)(x.reshape(x.shape[0], -1)))


class Block(nn.Module):
    """A transformer's block: LayerNorm, attention, gelu."""

    @nn.compact
    def __call__(self, x):
        heads = (x.shape[0], x.shape[1], 2, 4)
        y = nn.LayerNorm()(x)
        q, k, v = (nn.Dense(8, name=name)(y).reshape(heads) for name in ("q", "k", "v"))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
        x = x + nn.Dense(8, name="o")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16, name="hidden")(nn.LayerNorm()(x))))


NETS = {"mlp": (MLP(), (2, 6)), "conv": (Conv(), (2, 12, 12, 1)), "block": (Block(), (2, 5, 8))}


def random(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def variants():
    """By net and variant: the function, params, example inputs, and outputs for batches of 1 and 3."""
    out = {}
    for name, (net, shape) in NETS.items():
        x = random(shape)
        leaves, treedef = jax.tree.flatten(jax.eval_shape(net.init, jax.random.key(0), x))
        params = treedef.unflatten([random(leaf.shape, seed) / 3 for seed, leaf in enumerate(leaves)])
        masks = jax.tree.map(lambda leaf: np.ones(leaf.shape, bool), params)
        for leaf in jax.tree.leaves(masks["params"]["hidden"]):
            leaf[..., ::2] = False
        masked = jp.apply_masks(params, masks)
        small = jp.compact(net.apply, params, masks, x, verify=False)
        apply = jax.jit(net.apply)
        wanted = [{n: apply(p, random((n, *shape[1:]), n)) for n in (1, 3)} for p in (params, masked)]
        out[name, "dense"] = net.apply, params, x, wanted[0]
        out[name, "masked"] = net.apply, masked, x, wanted[1]
        out[name, "compacted"] = small.apply, small.params, x, wanted[1]
    return out


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


# StableHLO


@pytest.mark.parametrize("net", list(NETS))
def test_a_program_of_any_batch_comes_back_from_its_file(variants, tmp_path, net):
    sizes = {}
    for variant in ("dense", "masked", "compacted"):
        apply, params, x, wanted = variants[net, variant]
        for frozen in (True, False):
            program = jp.export.stablehlo(apply, params, x, frozen=frozen)
            file = tmp_path / "program"
            assert program.save(file) == file.stat().st_size
            loaded = jp.export.load(file)
            assert loaded.frozen is frozen
            sizes[variant, frozen] = file.stat().st_size
            for batch, output in wanted.items() if variant == "compacted" else [(3, wanted[3])]:
                given = random((batch, *x.shape[1:]), batch)
                close(loaded(given) if frozen else loaded(params, given), output)
    # Zeros take as much as anything else; what is gone takes nothing.
    assert abs(sizes["masked", True] - sizes["dense", True]) < 200
    assert sizes["compacted", True] < sizes["dense", True]


def test_params_are_arguments_of_any_container(variants):
    apply, params, x, _ = variants["mlp", "dense"]
    program = jp.export.stablehlo(apply, params, x)
    assert program.exported.in_avals[-1].shape[1:] == (6,)
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    close(jax.jit(program)(freeze(other), x), apply(other, x))
    with pytest.raises(ValueError, match=r"Missing: params/hidden/bias.*Not in it: none"):
        program({"params": {"hidden": {"kernel": x}, "Dense_0": params["params"]["Dense_0"]}}, x)
    with pytest.raises(
        ValueError, match=r"params\['params/hidden/bias'\] is float32\[63\]; the program takes"
    ):
        program(jax.tree.map(lambda leaf: leaf[:-1] if leaf.shape == (64,) else leaf, params), x)
    with pytest.raises(TypeError, match=r"takes 2 arguments \(params, input 0\), got 1"):
        program(x)
    with pytest.raises(ValueError, match="shape"):
        program(params, x[:, :-1])


def test_modules_of_nnx_and_equinox():
    x = random((2, 3))
    graph, state = nnx.split(nnx.Linear(3, 4, rngs=nnx.Rngs(0)))
    arrays, rest = equinox.partition(equinox.nn.Linear(3, 4, key=jax.random.key(0)), equinox.is_array)
    for apply, params in (
        (lambda state, x: nnx.merge(graph, state)(x), state),
        (lambda arrays, x: jax.vmap(equinox.combine(arrays, rest))(x), arrays),
    ):
        close(jp.export.stablehlo(apply, params, x)(params, x), apply(params, x))


def test_inputs_in_containers_and_static_ones(tmp_path):
    def apply(params, double, data, scale, mode):
        y = (data["x"] + data["y"]) * params["w"] * scale
        return {"out": [2 * y if double else y], "mode": y.sum() if mode == "sum" else None}

    params, data = {"w": jnp.arange(3.0)}, {"x": random((2, 3)), "y": random((2, 1), 1)}
    program = jp.export.stablehlo(apply, params, True, data, 2.0, "sum")
    program.save(tmp_path / "program")
    bigger = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), data)
    got = jp.export.load(tmp_path / "program")(params, bigger, 3.0)
    close(got["out"][0], apply(params, True, bigger, 3.0, "sum")["out"][0])
    with pytest.raises(TypeError, match="takes 3 arguments"):
        program(params, True, data, 2.0, "sum")
    with pytest.raises(TypeError, match="is True, but the program takes arrays alone"):
        program(params, data, True)
    with pytest.raises(TypeError, match="input 1 mixes arrays with static values"):
        jp.export.stablehlo(apply, params, True, data | {"train": False}, 2.0, "sum")


def test_what_a_batch_of_any_size_needs():
    def apply(params, x, y):
        return x @ params["w"] + y

    params = {"w": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match=r"first axes of the inputs have the sizes 1, 2, so not all"):
        jp.export.stablehlo(apply, params, jnp.ones((2, 3)), jnp.ones((1, 3)))
    program = jp.export.stablehlo(apply, params, jnp.ones((2, 3)), jnp.ones((1, 3)), batch=None)
    assert program(params, jnp.ones((2, 3)), jnp.ones((1, 3))).tolist() == [[4.0] * 3] * 2
    (size,) = jax.export.symbolic_shape("n")
    some = jax.ShapeDtypeStruct((size, 3), jnp.float32)
    program = jp.export.stablehlo(apply, params, some, jnp.ones((1, 3)), batch=None)
    assert program(params, jnp.ones((5, 3)), jnp.ones((1, 3))).shape == (5, 3)

    def odd(params, x):
        return x.sum() if x.shape[0] > 3 else x.reshape(-1)

    with pytest.raises(ValueError, match=r"cannot be traced with a batch of any size 'b'.*Pass batch=None"):
        jp.export.stablehlo(odd, params, jnp.ones((2, 3)))
    with pytest.raises(ZeroDivisionError):  # what is wrong with the function itself is said as it is
        jp.export.stablehlo(lambda params, x: x / (1 // 0), params, jnp.ones((2, 3)))


def test_platforms_are_those_asked_for(variants, tmp_path):
    apply, params, x, _ = variants["mlp", "compacted"]
    program = jp.export.stablehlo(apply, params, x, frozen=True, platforms=("cpu", "cuda", "tpu"))
    program.save(tmp_path / "program")
    assert jp.export.load(tmp_path / "program").exported.platforms == ("cpu", "cuda", "tpu")
    close(program(x), apply(params, x))


def test_what_is_no_program_is_said(tmp_path):
    file = tmp_path / "program"
    params, x = {"w": jnp.ones((3, 2))}, jnp.ones((1, 3))
    program = jp.export.stablehlo(lambda params, x: x @ params["w"], params, x)
    unsealed = program.exported.serialize()
    for data in (b"", b"text", bytes(200), np.random.default_rng(0).bytes(1000), unsealed):
        file.write_bytes(data)
        with pytest.raises(jp.io.FileError, match="program: not an exported program"):
            jp.export.load(file)
    program.save(file)
    whole = file.read_bytes()
    assert jax.export.deserialize(bytearray(whole)).fun_name == program.exported.fun_name
    for index in range(0, len(whole) - 20, 7):
        file.write_bytes(whole[:index] + bytes([whole[index] ^ 1 << index % 8]) + whole[index + 1 :])
        with pytest.raises(jp.io.FileError, match="checksum is wrong: the file is damaged"):
            jp.export.load(file)
    with pytest.raises(jp.io.FileError, match="not a file, but a pipe or a device"):
        jp.export.load("/dev/zero")
    with pytest.raises(FileNotFoundError):
        jp.export.load(tmp_path / "none")


# ONNX


def run(model, *inputs):
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]
    return session.run(None, dict(zip(names, map(np.asarray, inputs), strict=True)))


@needs_onnx
@pytest.mark.parametrize("net", list(NETS))
def test_onnx_computes_the_same(variants, tmp_path, net):
    sizes = {}
    for variant in ("dense", "masked", "compacted"):
        apply, params, x, wanted = variants[net, variant]
        try:
            model = jp.export.onnx(apply, params, x, path=tmp_path / "onnx", verify=variant == "compacted")
        except NotImplementedError as error:
            if "No plugins registered" not in str(error) or version("jax2onnx") >= "0.13":
                raise
            pytest.skip(f"jax2onnx {version('jax2onnx')}: {error}")
        assert (tmp_path / "onnx").read_bytes() == model
        sizes[variant] = len(model)
        for batch, output in wanted.items():
            (got,) = run(model, random((batch, *x.shape[1:]), batch))
            close(got, output)
    assert sizes["compacted"] < sizes["dense"] == sizes["masked"]


@needs_onnx
def test_onnx_leaves_jax_as_it_is():
    """Importing jax2onnx replaces jnp.cumsum: in a process of its own, where nothing has imported it."""
    code = """
import jax, jax.numpy as jnp, jaxprune as jp
before = {m: dict(vars(m)) for m in (jax, jax.numpy, jax.lax, jax.nn)}
jp.export.onnx(lambda params, x: x @ params["w"], {"w": jnp.ones((3, 2))}, jnp.ones((1, 3)))
changed = [n for m, names in before.items() for n, v in names.items() if vars(m)[n] is not v]
assert not changed, changed
assert jnp.cumsum(jnp.ones((2, 3)), 0).shape == (2, 3)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@needs_onnx
def test_onnx_of_several_inputs_and_outputs():
    def apply(params, data, double, bias):
        y = data["a"] @ params["w"]
        return {"second": y + bias, "first": (2 * y if double else y).max(-1)}

    params, data = {"w": random((3, 4))}, {"a": random((2, 3))}
    model = jp.export.onnx(apply, params, data, True, random((2, 4), 1))
    given = random((3, 3), 2), random((3, 4), 3)
    wanted = apply(params, {"a": given[0]}, True, given[1])
    for got, leaf in zip(run(model, *given), jax.tree.leaves(wanted), strict=True):
        close(got, leaf)
    fixed = jp.export.onnx(apply, params, data, False, random((1, 4), 1), batch=None)
    close(run(fixed, data["a"], np.zeros((1, 4), np.float32))[1], data["a"] @ params["w"])


@needs_onnx
def test_what_onnx_cannot_do_is_said(tmp_path):
    def calls_python(params, x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x) + params["w"]

    params, x = {"w": jnp.ones(3)}, jnp.ones((2, 3))
    with pytest.raises(NotImplementedError, match=r"jax2onnx cannot convert the function.*pure_callback"):
        jp.export.onnx(calls_python, params, x, path=tmp_path / "model.onnx", batch=None)
    assert not list(tmp_path.iterdir())

    import onnxruntime

    model = jp.export.onnx(lambda params, x: x + params["w"], params, x, verify=False)
    _compare(onnxruntime, model, lambda params, inputs: inputs[0] + 1, params, (x,))
    with pytest.raises(RuntimeError, match=r"output 0 of the ONNX model differs by 1 from the function's"):
        _compare(onnxruntime, model, lambda params, inputs: inputs[0], params, (x,))
    with pytest.raises(RuntimeError, match=r"has shape \(2, 3\), not \(3,\)"):
        _compare(onnxruntime, model, lambda params, inputs: inputs[0][0], params, (x,))


@pytest.mark.parametrize(
    ("shape", "window", "strides", "padding"),
    [
        ((2, 6, 8, 3), (1, 2, 2, 1), (1, 2, 2, 1), "VALID"),
        ((2, 6, 8, 3), (1, 3, 1, 1), (1, 2, 1, 1), "SAME"),
        ((2, 3, 6, 8), (1, 1, 3, 2), (1, 1, 1, 2), "SAME"),
        ((2, 5, 6, 4, 3), (1, 2, 1, 3, 1), (1, 1, 2, 1, 1), "VALID"),
        ((6, 8), (2, 2), (2, 2), "VALID"),
    ],
)
def test_windows_over_their_own_axes_alone(shape, window, strides, padding):
    def pool(x):
        return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)

    x = random(shape)
    (eqn,) = jax.make_jaxpr(pool)(x).eqns
    assert eqn.primitive.name == "reduce_window_max"
    rewritten = jax.make_jaxpr(lambda x: _window_max(x, eqn))(x)
    (inner,) = [e for e in rewritten.eqns if e.primitive.name == "reduce_window_max"]
    assert len(inner.params["window_dimensions"]) <= 4
    np.testing.assert_array_equal(_window_max(x, eqn), pool(x))
