"""Checks of pruning on eight devices, run in a process of its own by test_sharding."""

import traceback
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune as jp
from tests.oracles import brute_force
from tests.support import hlo

KINDS = (AxisType.Auto, AxisType.Explicit)
# By rows, by columns, both, both on one axis, one axis of three, a vector, whole.
SPECS = {
    "a": P("data", None),
    "b": P(None, "tensor"),
    "c": P("data", "tensor"),
    "d": P(("data", "tensor"), None),
    "e": P(None, None, ("tensor", "data")),
    "f": P("data"),
    "g": P(),
}
SHAPES = {"a": (8, 3), "c": (4, 4), "d": (16, 2), "e": (2, 3, 8), "f": (12,), "g": (3, 3)}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)


def put(tree, specs, mesh):
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}


def with_ties(shapes, seed=1):
    """Integers from few, so that most scores tie, across leaves and shards."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-3, 4, size=shape).astype(np.float32) for name, shape in shapes.items()}


def everything(path, leaf):
    return True


def lowest(params, count):
    """Masks without the `count` lowest by (magnitude, leaf, index), by numpy."""
    gone = brute_force.lowest(
        [np.abs(leaf) for leaf in params.values()],
        [np.ones(leaf.shape, bool) for leaf in params.values()],
        count,
    )
    assert not any(leaf.all() for leaf in gone)  # else the floor would matter
    return {name: ~leaf for name, leaf in zip(params, gone, strict=True)}


def size_of(params):
    return sum(leaf.size for leaf in params.values())


def assert_same(masks, wanted):
    assert masks.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(np.asarray(masks[name]), np.asarray(wanted[name]), err_msg=name)


def assert_shardings(masks, params):
    for name, leaf in params.items():
        assert masks[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim), (name, masks[name].sharding)


# --- the checks, each for a kind of mesh axes


def in_an_optimizer(kind):
    """Masks get their params' shardings, keep them, and are numpy's: in total, by layer, of what remains."""
    mesh, host = mesh_of(kind), with_ties(SHAPES)
    half = brute_force.half_even(0.5, size_of(host))
    left = half + brute_force.half_even(0.5, size_of(host) - half)
    to_half, halves = jp.schedules.linear(0.5, begin_step=0, end_step=2), jp.schedules.constant(0.5)
    by_layer = {n: lowest({n: leaf}, brute_force.half_even(0.5, leaf.size))[n] for n, leaf in host.items()}
    ways = [
        (halves, "global", "remaining", lowest(host, left)),
        (to_half, "global", "total", lowest(host, half)),
        (to_half, "layerwise", "total", by_layer),
    ]
    for schedule, scope, of, wanted in ways if kind == AxisType.Auto else ways[:1]:
        every = 2 if of == "remaining" else 1
        pruner = jp.pruner(jp.scores.magnitude, schedule, where=everything, scope=scope, of=of, every=every)
        tx = jp.wrap_optax(optax.sgd(0.1, momentum=0.9), pruner)

        @jax.jit
        def step(params, opt_state, tx=tx):
            updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, params), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        with jax.set_mesh(mesh):
            first = params = put(host, SPECS, mesh)
            opt_state = jax.jit(tx.init)(params)
            assert_shardings(opt_state.pruner.masks, first)
            for _ in range(2 * every):
                params, opt_state = step(params, opt_state)
        assert_same(opt_state.pruner.masks, wanted)
        for tree in (params, opt_state.pruner.masks, opt_state.inner[0].trace):
            assert_shardings(tree, first)
        jp.check_pruned(params, opt_state.pruner.masks)
    with jax.set_mesh(mesh):
        summed = jp.pruner(jp.scores.magnitude, 0.5, where=everything, memory=1.0)
        assert_shardings(jax.jit(summed.init)(first).scores, first)
        # Without jit too.
        own = {name: host[name] for name in ("c", "f")}
        wanted = lowest(own, brute_force.half_even(0.5, size_of(own)))
        own = {name: first[name] for name in own}
        assert_same(jp.prune_once(own, jp.scores.magnitude, 0.5, where=everything), wanted)


# Every leaf is larger than anything that may be moved.
LARGE = {"a": (64, 32), "b": (32, 64), "c": (48, 64), "d": (64, 32), "e": (4, 16, 64)}
MOST = 512


def moves_numbers_only(kind):
    """A mask update, alone and in a train step, moves counts; no leaf, and it sorts nothing."""
    mesh, host = mesh_of(kind), with_ties(LARGE)
    assert min(leaf.size for leaf in host.values()) > MOST
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.5, begin_step=0, end_step=2))
    own = {f"{name}/kernel": leaf for name, leaf in host.items()}
    specs = {f"{name}/kernel": SPECS[name] for name in host}
    with jax.set_mesh(mesh):
        params = put(own, specs, mesh)
        state = jax.jit(pruner.init)(params)
        text = jax.jit(pruner.update).lower(state, params).compile().as_text()
        assert hlo.moved(text)  # it does move something, or this reads the text wrongly
        hlo.check_small(text, MOST)
        hlo.check_small(hlo.branches(text), MOST)
        assert hlo.moved(hlo.branches(text))
        for scope in ("global", "layerwise"):
            once = partial(jp.prune_once, scores=jp.scores.magnitude, sparsity=0.5, scope=scope)
            hlo.check_small(jax.jit(once).lower(params).compile().as_text(), MOST)


def train_step_moves_what_it_did(kind):
    """Of FSDP and tensor parallelism: pruning adds to the step's collectives counts and no leaf."""
    if kind == AxisType.Explicit:
        return  # the products would have to say how they are sharded
    mesh = mesh_of(kind)
    specs = {"up/kernel": P("data", "tensor"), "down/kernel": P("tensor", "data")}
    rng = np.random.default_rng(0)
    host = {name: rng.normal(size=(64, 64)).astype(np.float32) for name in specs}
    pruner = jp.pruner(jp.scores.magnitude, jp.schedules.linear(0.5, begin_step=0, end_step=2))
    adam = optax.adam(1e-3)

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["up/kernel"]) @ params["down/kernel"] - x) ** 2)

    def compiled(tx, params, opt_state, x):
        def step(params, opt_state, x):
            updates, opt_state = tx.update(jax.grad(loss)(params, x), opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
        made = jax.jit(step, donate_argnums=(0, 1), out_shardings=shardings)
        return made.lower(params, opt_state, x).compile().as_text()

    params = put(host, specs, mesh)
    x = jax.device_put(jnp.ones((8, 64)), NamedSharding(mesh, P("data")))
    texts = {}
    for name, tx in (
        ("masked", jp.keep_masked(adam, jp.prune_once(params, jp.scores.magnitude, 0.5))),
        ("pruned", jp.wrap_optax(adam, pruner)),
    ):
        shardings = optax.tree.map_params(
            tx,
            lambda leaf, own: own.sharding,
            jax.eval_shape(tx.init, params),
            params,
            transform_non_params=lambda leaf: NamedSharding(mesh, P()),
        )
        texts[name] = compiled(tx, params, jax.jit(tx.init, out_shardings=shardings)(params), x)
    large = {name: sorted(pair for pair in hlo.moved(text) if pair[1] > MOST) for name, text in texts.items()}
    assert large["masked"]  # FSDP gathers params
    assert large["pruned"] == large["masked"], large
    hlo.check_small(hlo.branches(texts["pruned"]), MOST)
    assert hlo.moved(hlo.branches(texts["pruned"]))
    assert "input_output_alias" in texts["pruned"]  # the state is donated


def the_reader_sees_a_gather(kind):
    """What reads programs finds a kernel that is gathered, on a condition or not, and a sort."""
    mesh = mesh_of(kind)
    kernel = jax.device_put(jnp.ones((64, 32)), NamedSharding(mesh, P("data", None)))

    def gathered(x):
        return (
            jax.sharding.reshard(x, P())
            if kind == AxisType.Explicit
            else jax.lax.with_sharding_constraint(x, P())
        )

    def on_condition(x, due):
        return jax.lax.cond(
            due, lambda x: jnp.cumsum(gathered(x) * 2, axis=0)[:3], lambda x: gathered(x)[:3], x
        )

    with jax.set_mesh(mesh):
        texts = [
            jax.jit(gathered).lower(kernel).compile().as_text(),
            hlo.branches(jax.jit(on_condition).lower(kernel, True).compile().as_text()),
            jax.jit(lambda x: jnp.sort(x, axis=1)).lower(kernel).compile().as_text(),
        ]
    for text, why in zip(texts, ("all-gather", "all-gather", "sorts"), strict=True):
        with pytest.raises(AssertionError, match=why):
            hlo.check_small(text, MOST)


STRUCTURES = {
    "nm(2, 4)": (jp.structures.nm(2, 4), jp.structures.nm(2, 32)),
    "nm(2, 4, axis=-1)": (jp.structures.nm(2, 4, axis=-1), jp.structures.nm(2, 64, axis=-1)),
    "blocks((4, 4))": (jp.structures.blocks((4, 4)), jp.structures.blocks((3, 5))),
    "slices(axis=-1)": (jp.structures.slices(axis=-1), None),
}


def structures(kind):
    """Groups within shards stay there; where shards cut groups, the axis is named."""
    mesh = mesh_of(kind)
    host = with_ties({"kernel": (64, 64)})
    for structure, straddling in STRUCTURES.values():
        once = partial(jp.prune_once, scores=jp.scores.magnitude, sparsity=0.25, structure=structure)
        wanted = once(host)
        with jax.set_mesh(mesh):
            params = put(host, {"kernel": P("data", "tensor")}, mesh)
            program = jax.jit(once).lower(params).compile()
            hlo.check_small(program.as_text(), MOST)
            masks = program(params)
            assert_same(masks, wanted)
            assert_shardings(masks, params)
            if straddling is None:
                continue
            cut = partial(once, structure=straddling)
            # A traced function does not see automatic axes, and XLA moves what it has to.
            if kind == AxisType.Auto:
                assert_same(jax.jit(cut)(params), cut(host))
            for way in [cut, jax.jit(cut)] if kind == AxisType.Explicit else [cut]:
                with pytest.raises(
                    ValueError, match=r"params\['kernel'\].* axis [01] is sharded over '(data|tensor)'"
                ):
                    way(params)


def models_of_their_own(kind):
    """In a shard_map every device prunes its own network; nothing is moved."""
    mesh = mesh_of(kind)
    host = with_ties({"kernel": (8, 6, 5), "other/kernel": (8, 7)})

    def prune(params):
        own = jax.tree.map(lambda leaf: leaf[0], params)
        masks = jp.prune_once(own, jp.scores.magnitude, sparsity=0.5, where=everything)
        return jax.tree.map(lambda mask: mask[None], masks)

    every = P(("data", "tensor"))
    with jax.set_mesh(mesh):
        params = put(host, dict.fromkeys(host, every), mesh)
        program = jax.jit(jax.shard_map(prune, in_specs=every, out_specs=every)).lower(params).compile()
        masks = jax.tree.map(np.asarray, program(params))
    assert not hlo.moved(program.as_text())
    for number in range(8):
        own = {name: leaf[number] for name, leaf in host.items()}
        assert_same(
            {n: mask[number] for n, mask in masks.items()},
            lowest(own, brute_force.half_even(0.5, size_of(own))),
        )


def one_network_in_parts(kind):
    """In a shard_map that says how leaves are sharded, the lowest are those of the whole leaves."""
    mesh = mesh_of(kind)
    host = with_ties({"both": (12, 4), "one": (16,), "rows": (8, 6), "whole": (3, 5)})
    specs = {"both": P("data", "tensor"), "one": P("tensor"), "rows": P(("data", "tensor")), "whole": P()}
    scores = {name: np.abs(leaf) for name, leaf in host.items()}
    alive = {name: np.random.default_rng(2).random(leaf.shape) < 0.8 for name, leaf in host.items()}

    def choose(scores, alive, count):
        gone = jp.selection.lowest(list(scores.values()), list(alive.values()), count, list(specs.values()))
        return dict(zip(scores, gone, strict=True))

    with jax.set_mesh(mesh):
        here = put(scores, specs, mesh), put(alive, specs, mesh)
        program = jax.jit(jax.shard_map(choose, in_specs=(specs, specs, P()), out_specs=specs))
        for count in (0, 1, 37, 60, 90):
            got = jax.tree.map(np.asarray, program(*here, jnp.int32(count)))
            wanted = brute_force.lowest(list(scores.values()), list(alive.values()), count)
            assert_same(got, dict(zip(scores, wanted, strict=True)))
        text = program.lower(*here, jnp.int32(5)).compile().as_text()
    assert "all-gather" not in text


def parts_of_unequal_size(kind):
    """Axes that the devices do not divide, as XLA may shard them inside a program."""
    if kind == AxisType.Explicit:
        return  # explicit shardings are even
    mesh, host = mesh_of(kind), with_ties({"a": (7, 5), "b": (3, 9)})

    @jax.jit
    def prune(params):
        params = {
            name: jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, P("data", "tensor")))
            for name, leaf in params.items()
        }
        return jp.prune_once(params, jp.scores.magnitude, sparsity=0.5, where=everything)

    assert_same(prune(host), lowest(host, brute_force.half_even(0.5, size_of(host))))


def stacked_layers(kind):
    """Stacks are sharded over their layers or within them, and so are their masks."""
    leaf = with_ties({"w": (4, 8, 6)}, 3)["w"]
    for axis, spec in ((0, P("data")), (0, P(None, "data", "tensor")), (2, P("data", None, "tensor"))):
        prune = partial(
            jp.prune_once,
            scores=jp.scores.magnitude,
            sparsity=0.4,
            where=everything,
            stacked=lambda path, leaf, axis=axis: (axis,),
        )
        expected = prune({"w": jnp.asarray(leaf)})
        mesh = mesh_of(kind)
        with jax.set_mesh(mesh):
            params = put({"w": leaf}, {"w": spec}, mesh)
            for masks in (prune(params), jax.jit(prune)(params)):
                np.testing.assert_array_equal(masks["w"], expected["w"])
                assert masks["w"].sharding.is_equivalent_to(params["w"].sharding, 3)


CHECKS = (
    in_an_optimizer,
    moves_numbers_only,
    train_step_moves_what_it_did,
    the_reader_sees_a_gather,
    structures,
    models_of_their_own,
    one_network_in_parts,
    parts_of_unequal_size,
    stacked_layers,
)


def run():
    """Runs every check, and prints a line for each: "ok", or what was wrong."""
    warnings.simplefilter("error")
    assert jax.device_count() == 8
    for kind in KINDS:
        for check in CHECKS:
            try:
                check(kind)
            except Exception:
                traceback.print_exc()
                print(f"{check.__name__} {kind.name} FAILED", flush=True)
            else:
                print(f"{check.__name__} {kind.name} ok", flush=True)
