"""Of the whole zoo, every product of a param with data is found, or refused by name."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from jaxprune.calibration.statistics import chosen_parts
from jaxprune.calibration.survey import survey
from jaxprune.tracing.jaxprs import trace
from jaxprune.tree.leaves import array_leaves
from tests.calibration.networks import draw, inputs, patches
from tests.calibration.test_calibrate import close
from tests.zoo import ZOO

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def products(case):
    """Return by path the equations that multiply data by what is made of it: a walk of its own.

    Of each value it is known which params it is made of, and whether of data too.
    """
    paths = list(array_leaves(case.params))
    closed = jax.make_jaxpr(case.apply)(case.params, *case.inputs)
    inputs = [((path,), False) for path in paths]
    inputs += [((), True)] * (len(closed.in_avals) - len(inputs))
    found = {}

    def together(values):
        return tuple(sorted({p for some, _ in values for p in some})), any(data for _, data in values)

    def loop(body, fixed, carry, slices, place):
        while True:
            outputs = walk(body, [*fixed, *carry, *slices], place)
            wider = [together(pair) for pair in zip(carry, outputs, strict=False)]
            if wider == carry:
                return outputs
            carry = wider

    def walk(jaxpr, args, place):
        values = dict(zip(jaxpr.invars, args, strict=True))

        def read(atom):
            return ((), False) if hasattr(atom, "val") else values.get(atom, ((), False))

        for eqn in jaxpr.eqns:
            name, params, here = eqn.primitive.name, eqn.params, (*place, id(eqn))
            given = [read(atom) for atom in eqn.invars]
            if name in PRODUCTS and given[0][1] != given[1][1]:
                for path in given[1][0] if given[0][1] else given[0][0]:
                    found.setdefault(path, set()).add(here)
            inner = [v for v in jax.tree.leaves(list(params.values())) if hasattr(v, "eqns")]
            inner = [getattr(v, "jaxpr", v) for v in inner]
            if name == "scan":
                first, last = params["num_consts"], params["num_consts"] + params["num_carry"]
                outputs = loop(inner[0], given[:first], given[first:last], given[last:], here)
            elif name == "while":
                body, ends = params["body_jaxpr"].jaxpr, params["cond_nconsts"] + params["body_nconsts"]
                outputs = loop(body, given[params["cond_nconsts"] : ends], given[ends:], [], here)
            elif name == "cond":
                arms = [walk(arm, given[1:], (*here, n)) for n, arm in enumerate(inner)]
                outputs = [together([*each, given[0]]) for each in zip(*arms, strict=True)]
            elif inner and len(inner[0].invars) == len(given):
                outputs = walk(inner[0], given, here)
            else:
                outputs = [together(given)] * len(eqn.outvars)
            values.update(zip(eqn.outvars, outputs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    walk(closed.jaxpr, inputs, ())
    return found


@pytest.mark.parametrize("name", ZOO)
def test_every_product_is_found_or_refused_by_name(name):
    case = ZOO[name]()
    wanted, leaves = products(case), array_leaves(case.params)
    closed, inputs = trace(case.apply, (case.params, *case.inputs))
    parts, reasons = chosen_parts(survey(closed, inputs), leaves, lambda path, leaf: True)
    assert set(parts) <= set(wanted) <= {*parts, *reasons}
    for path, equations in wanted.items():
        if path in parts:
            assert sum(len(part.uses) for part in parts[path]) == len(equations)
        else:
            assert not reasons[path].startswith("no product")
    for path in set(reasons) - set(wanted):
        assert reasons[path].startswith("no product")


def shard_map(p, x):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))(
        x, p["w"]
    )


def weight_norm(p, x):
    return x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0))


# What cannot be calibrated: the function, the shapes of its params, and the beginnings of the reasons.
REFUSED = [
    (shard_map, {"w": (4, 4)}, {"w": "its product is inside 'shard_map'"}),
    (weight_norm, {"w": (4, 4), "g": (4,)}, {"w": "its kernel is made of g and w by 'mul'", "g": ""}),
    (
        lambda p, x: x @ (p["w"] + p["a"] @ p["b"]),
        {"w": (4, 4), "a": (4, 2), "b": (2, 4)},
        {"w": "its kernel is made of a and b", "a": "its kernel is made of a and b", "b": ""},
    ),
    (
        lambda p, x: x @ jnp.concatenate([p["w"], p["v"]], 1),
        {"w": (4, 4), "v": (4, 2)},
        {"w": "its kernel is made of w and v by 'concatenate'", "v": ""},
    ),
    (lambda p, x: x @ jnp.tanh(p["w"]), {"w": (4, 4)}, {"w": "its kernel is made of w by 'tanh'"}),
    (lambda p, x: x @ p["w"] @ p["w"].T, {"w": (4, 4)}, {"w": "products read its entries as different"}),
    (
        lambda p, x: lax.fori_loop(0, jnp.int32(x[0, 0]), lambda i, h: jnp.tanh(h @ p["w"]), x),
        {"w": (4, 4)},
        {"w": "its product is inside 'while'"},
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: next(iter(case[2].values())))
def test_what_cannot_be_calibrated_is_named(case):
    apply, shapes, wanted = case
    params = draw(0, **shapes)
    with pytest.raises(ValueError, match="no product of a leaf with data that can be calibrated") as error:
        jp.calibrate(apply, params, inputs(3, 4), where=lambda path, leaf: True)
    for path, why in wanted.items():
        assert f"{path}: {why}" in str(error.value), error.value


class Watched:
    """Records what the layers of a flax.linen network read, by path of the kernel."""

    def __init__(self):
        self.rows = {}

    def __call__(self, call, args, kwargs, context):
        module = context.module
        if context.method_name == "__call__" and isinstance(module, (nn.Dense, nn.DenseGeneral, nn.Conv)):
            x = np.asarray(args[0], np.float64)
            if isinstance(module, nn.Conv):
                x = self.of_convolution(module, x)
            else:
                axes: Any = module.axis if isinstance(module, nn.DenseGeneral) else -1
                axes = [axis % x.ndim for axis in (axes if isinstance(axes, tuple) else (axes,))]
                x = np.moveaxis(x, axes, range(-len(axes), 0))
                x = x.reshape(-1, *x.shape[-len(axes) :])
            self.rows.setdefault("/".join((*module.path, "kernel")), []).append(x)
        return call(*args, **kwargs)

    @staticmethod
    def of_convolution(module, x):
        nd = x.ndim - 2

        def each(value):
            return (value,) * nd if isinstance(value, int) or value is None else tuple(value)

        window, strides, dilation = (
            each(module.kernel_size),
            each(module.strides),
            each(module.kernel_dilation),
        )
        strides, dilation = (tuple(n or 1 for n in some) for some in (strides, dilation))
        pads = module.padding
        if isinstance(pads, str):
            spans = [(w - 1) * d + 1 for w, d in zip(window, dilation, strict=True)]
            pads = lax.padtype_to_pads(x.shape[1:-1], spans, strides, pads)
        rows = patches(x, window, strides, pads, (1,) * nd, dilation)
        return rows.reshape(-1, *window, x.shape[-1])


@pytest.mark.parametrize("name", ["lenet_linen", "siamese", "cross_attention", "wavenet", "vit_linen"])
def test_flax_linen_networks(name):
    case, watched = ZOO[name](), Watched()
    with nn.intercept_methods(watched):
        case.apply(case.params, *case.inputs)
    stats = jp.calibrate(case.apply, case.params, [case.inputs], where=lambda path, leaf: True)
    assert len(watched.rows) >= 3 and {p.removeprefix("params/") for p in stats.paths} >= set(watched.rows)
    for path, rows in watched.rows.items():
        path = next(each for each in stats.paths if each.removeprefix("params/") == path)
        squares = np.sum(np.concatenate(rows) ** 2, 0)
        got = np.asarray(stats.per_entry(path, "squares"))
        close(
            got, np.broadcast_to(squares.reshape(*squares.shape, *[1] * (got.ndim - squares.ndim)), got.shape)
        )
