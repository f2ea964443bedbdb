"""Every optimizer that optax exports, with what it needs to run, and a small network to run it on."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib


class Case(NamedTuple):
    """How to run one optimizer."""

    make: Callable[[], Any]  # with a learning rate at which the small network moves in ten steps
    needs: tuple[str, ...] = ()  # extra arguments of its `update`
    per_example: bool = False  # its gradients carry a leading batch axis
    pair: bool = False  # it trains an `optax.LookaheadParams`
    dtypes: tuple[Any, ...] = (jnp.float32, jnp.bfloat16)  # of the params it is run on
    weak: bool = False  # its state is weakly typed until the first step, so that optax retraces the second


def _sam(**options: Any) -> Any:
    return contrib.sam(optax.sgd(0.1), optax.chain(contrib.normalize(), optax.sgd(0.05)), **options)


def _deprecated(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return make()


def _dpsgd() -> Any:
    # It passes on an argument that optax itself deprecates.
    return contrib.dpsgd(0.1, l2_norm_clip=1.0, noise_multiplier=0.5, seed=0, momentum=0.9)


_LINE_SEARCH = ("value", "grad", "value_fn")

# The key is the exported name; what follows a space is a variant, which runs in one type only.
OPTIMIZERS: dict[str, Case] = {
    "adabelief": Case(lambda: optax.adabelief(0.02)),
    "adadelta": Case(lambda: optax.adadelta(1.0, eps=1e-3, weight_decay=1e-2)),
    "adafactor": Case(lambda: optax.adafactor(0.1)),
    "adafactor factored": Case(
        lambda: optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9, weight_decay_rate=1e-2)
    ),
    "adagrad": Case(lambda: optax.adagrad(0.1)),
    "adam": Case(lambda: optax.adam(0.02)),
    "adamax": Case(lambda: optax.adamax(0.02)),
    "adamaxw": Case(lambda: optax.adamaxw(0.02, weight_decay=0.1)),
    "adamw": Case(lambda: optax.adamw(0.02, weight_decay=0.1)),
    "adan": Case(lambda: optax.adan(0.02, weight_decay=0.1)),
    "amsgrad": Case(lambda: optax.amsgrad(0.02)),
    "fromage": Case(lambda: optax.fromage(0.02)),
    "lamb": Case(lambda: optax.lamb(0.02, weight_decay=0.1)),
    "lars": Case(lambda: optax.lars(0.5, weight_decay=0.1, trust_coefficient=0.1)),
    "lbfgs": Case(lambda: optax.lbfgs(memory_size=3), needs=_LINE_SEARCH, weak=True),
    "lbfgs backtracking": Case(
        lambda: optax.lbfgs(memory_size=3, linesearch=optax.scale_by_backtracking_linesearch(10)),
        needs=_LINE_SEARCH,
        weak=True,
    ),
    "lion": Case(lambda: optax.lion(0.02, weight_decay=0.1)),
    "lookahead": Case(lambda: optax.lookahead(optax.adam(0.02), 3, 0.5), pair=True),
    "lookahead reset": Case(lambda: optax.lookahead(optax.adam(0.02), 2, 0.5, reset_state=True), pair=True),
    "nadam": Case(lambda: optax.nadam(0.02)),
    "nadamw": Case(lambda: optax.nadamw(0.02, weight_decay=0.1)),
    "noisy_sgd": Case(lambda: optax.noisy_sgd(0.1, eta=0.1, key=0)),
    "novograd": Case(lambda: optax.novograd(0.02, weight_decay=0.1)),
    "optimistic_adam": Case(lambda: _deprecated(lambda: optax.optimistic_adam(0.02))),
    "optimistic_adam_v2": Case(lambda: optax.optimistic_adam_v2(0.02)),
    "optimistic_gradient_descent": Case(lambda: optax.optimistic_gradient_descent(0.1)),
    "polyak_sgd": Case(lambda: optax.polyak_sgd(1.0), needs=("value",)),
    "radam": Case(lambda: optax.radam(0.02)),
    "rmsprop": Case(lambda: optax.rmsprop(0.02, momentum=0.9, centered=True)),
    "rprop": Case(lambda: optax.rprop(0.02)),
    "sgd": Case(lambda: optax.sgd(0.1)),
    "sgd nesterov": Case(lambda: optax.sgd(0.1, momentum=0.9, nesterov=True)),
    "sign_sgd": Case(lambda: optax.sign_sgd(0.02)),
    "signum": Case(lambda: optax.signum(0.02)),
    "sm3": Case(lambda: optax.sm3(0.1)),
    "yogi": Case(lambda: optax.yogi(0.02)),
    "contrib.acprop": Case(lambda: contrib.acprop(0.02)),
    "contrib.ademamix": Case(lambda: contrib.ademamix(0.02, weight_decay=0.1)),
    "contrib.adopt": Case(lambda: contrib.adopt(0.02)),
    "contrib.cocob": Case(lambda: contrib.cocob(weight_decay=1e-2)),
    "contrib.dadapt_adamw": Case(lambda: contrib.dadapt_adamw(estim_lr0=1e-2, weight_decay=0.1)),
    "contrib.dog": Case(lambda: contrib.dog(init_step=("learning_rate", 0.1), weight_decay=1e-2)),
    "contrib.dowg": Case(lambda: contrib.dowg(init_estim_sq_dist=0.1, weight_decay=1e-2)),
    "contrib.dpsgd": Case(lambda: _deprecated(_dpsgd), per_example=True),
    "contrib.galore": Case(lambda: contrib.galore(0.02, rank=2, update_proj_gap=3, weight_decay=0.1)),
    "contrib.madgrad": Case(lambda: contrib.madgrad(0.02, weight_decay=1e-2)),
    "contrib.mechanize": Case(lambda: contrib.mechanize(optax.adam(0.1), s_init=0.1)),
    "contrib.momo": Case(lambda: contrib.momo(0.5, weight_decay=1e-2), needs=("value",)),
    "contrib.momo_adam": Case(lambda: contrib.momo_adam(0.02, weight_decay=1e-2), needs=("value",)),
    "contrib.muon": Case(lambda: contrib.muon(0.02, weight_decay=0.1)),
    "contrib.prodigy": Case(lambda: contrib.prodigy(estim_lr0=1e-2, weight_decay=0.1)),
    "contrib.reduce_on_plateau": Case(
        lambda: optax.chain(optax.adam(0.02), contrib.reduce_on_plateau(patience=1)), needs=("value",)
    ),
    "contrib.sam": Case(_sam),
    "contrib.sam opaque": Case(lambda: _sam(opaque_mode=True), needs=("grad_fn",)),
    "contrib.schedule_free": Case(lambda: contrib.schedule_free(optax.adam(0.02, b1=0.0), 0.02)),
    "contrib.schedule_free_adamw": Case(lambda: contrib.schedule_free_adamw(0.02, weight_decay=0.1)),
    "contrib.schedule_free_sgd": Case(lambda: contrib.schedule_free_sgd(0.1, weight_decay=0.1)),
    "contrib.simplified_ademamix": Case(lambda: contrib.simplified_ademamix(1e-3, weight_decay=0.1)),
    "contrib.sophia": Case(
        lambda: contrib.sophia(0.02, weight_decay=0.1, update_interval=2), needs=("obj_fn",)
    ),
    "contrib.split_real_and_imaginary": Case(
        lambda: contrib.split_real_and_imaginary(optax.adam(0.02)),
        dtypes=(jnp.complex64,),  # its update makes complex64 of the parts, and no complex bfloat16 exists
    ),
}

NOT_OPTIMIZERS: dict[str, str] = {
    **dict.fromkeys(
        (
            *("adaptive_grad_clip", "add_decayed_weights", "add_noise", "centralize", "clip", "ema", "scale"),
            *("clip_by_block_rms", "clip_by_global_norm", "keep_params_nonnegative", "trace", "zero_nans"),
            *("normalize_by_update_norm", "contrib.differentially_private_aggregate", "contrib.normalize"),
        ),
        "a piece of the optimizers above, which sets no step size",
    ),
    **dict.fromkeys(
        (
            *("apply_if_finite", "chain", "conditionally_mask", "conditionally_transform", "flatten"),
            *("inject_hyperparams", "inject_stateful_hyperparams", "masked", "multi_transform"),
            *("named_chain", "partition", "selective_transform"),
        ),
        "wraps an optimizer",
    ),
    **dict.fromkeys(("stateless", "stateless_with_tree_map"), "makes a transform from a function"),
    **dict.fromkeys(("freeze", "identity", "measure_with_ema", "set_to_zero", "snapshot"), "trains nothing"),
    "apply_every": "accumulates updates, as MultiSteps does better",
    "with_extra_args_support": "changes a signature only",
    "contrib.hutchinson_estimator_diag_hessian": "a piece of sophia: its updates are a Hessian's diagonal",
    "contrib.schedule_free_eval_params": "reads params off a state",
}


for _name in [name for name in OPTIMIZERS if " " in name]:
    OPTIMIZERS[_name] = OPTIMIZERS[_name]._replace(dtypes=(jnp.float32,))


def exported() -> Iterator[str]:
    """Return the names of what optax exports that makes a gradient transformation.

    In `optax.contrib` these are all its functions, since some carry no annotation.
    """
    for module, prefix in ((optax, ""), (contrib, "contrib.")):
        for name, member in inspect.getmembers(module, callable):
            if name.startswith(("_", "scale_by_")) or inspect.isclass(member):
                continue
            try:
                returns = inspect.signature(member).return_annotation
            except ValueError:
                continue
            if module is contrib or "GradientTransformation" in str(returns):
                yield prefix + name


def make_params(dtype: Any = jnp.float32, seed: int = 0) -> dict[str, Any]:
    """Return the params of a network 6-8-4: 80 weights, 12 biases."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        values = rng.normal(size=shape) + 1j * rng.normal(size=shape)
        values = values if jnp.issubdtype(dtype, jnp.complexfloating) else values.real
        return jnp.asarray(values / np.sqrt(shape[0]), dtype)

    return {"hidden": {"kernel": draw(6, 8), "bias": draw(8)}, "out": {"kernel": draw(8, 4), "bias": draw(4)}}


def make_batch(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.normal(size=(16, 6)), dtype), jnp.asarray(rng.normal(size=(16, 4)), dtype)


def loss_fn(params: Any, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Return the mean squared error of the network."""
    x, y = batch
    hidden = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    out = hidden @ params["out"]["kernel"] + params["out"]["bias"]
    return jnp.mean(jnp.abs(out - y) ** 2)


def make_step(tx: Any, case: Case = OPTIMIZERS["adam"], loss_fn: Callable[..., Any] = loss_fn) -> Any:
    """Return a training step, `step(params, opt_state, batch) -> params, opt_state, loss`, to be jitted."""

    def step(params, opt_state, batch):
        def objective(params):
            return loss_fn(params, batch)

        fast = params.fast if case.pair else params
        value, grads = jax.value_and_grad(objective)(fast)
        extra = {
            "value": value,
            "grad": grads,
            "value_fn": objective,
            "obj_fn": objective,
            "grad_fn": lambda params, _: jax.grad(objective)(params),
        }
        if case.per_example:
            alone = jax.tree.map(lambda leaf: leaf[:, None], batch)
            grads = jax.vmap(jax.grad(loss_fn), (None, 0))(fast, alone)
        grads = jax.tree.map(jnp.conj, grads)  # the convention of JAX; no change if they are real
        updates, opt_state = tx.update(grads, opt_state, params, **{name: extra[name] for name in case.needs})
        return optax.apply_updates(params, updates), opt_state, value

    return step


def host(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def networks(params: Any) -> list[Any]:
    """Return the params, or both halves of a lookahead pair, as a list."""
    return [params.fast, params.slow] if isinstance(params, optax.LookaheadParams) else [params]


def mask_of(path: Any, leaf: Any, masks: Any) -> Any:
    """Return the mask for a leaf of a state that carries a param's path at the end of its own, else None.

    Such leaves are moments, iterates and memories.
    """
    for name, mask in jax.tree_util.tree_leaves_with_path(masks):
        like = leaf.shape[-mask.ndim :] == mask.shape and jnp.issubdtype(leaf.dtype, jnp.inexact)
        if like and jax.tree_util.keystr(path).endswith(jax.tree_util.keystr(name)):
            return np.asarray(mask)
    return None


def assert_state_zero_where_pruned(state: Any, masks: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if (mask := mask_of(path, leaf, masks)) is not None:
            assert (np.asarray(leaf)[..., ~mask] == 0).all(), jax.tree_util.keystr(path)


def assert_as_new_where_pruned(state: Any, new: Any, masks: Any) -> None:
    for (path, leaf), fresh in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(new), strict=True
    ):
        if (mask := mask_of(path, leaf, masks)) is not None:
            np.testing.assert_array_equal(np.asarray(leaf)[..., ~mask], np.asarray(fresh)[..., ~mask])
