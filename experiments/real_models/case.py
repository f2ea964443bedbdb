"""What a model of the real-model command is, and what the files that build them share."""

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

OURS = "ours"


class Case(NamedTuple):
    """A model that is ready to be pruned.

    Attributes:
      apply: `apply(params, *inputs)`, pure, in evaluation mode.
      params: a pytree of floating arrays.
      inputs: example inputs.
      state: from the output to the part of it that is new values of params; see `jaxprune.compact`.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    state: Callable[[Any], Any] | None = None


class Model(NamedTuple):
    """A model by name, not yet built.

    Attributes:
      name: "library/model".
      packages: the distributions it needs. The first is the one whose code it is.
      build: `build(rng)`; the imports of the packages are in it.
      kind: what sort of network it is: "image", "language", "graph", ...
      ours: whether the network is written in this repository, of the library's layers at most.
      note: what differs from the library's own: a shim, a smaller input.
    """

    name: str
    packages: tuple[str, ...]
    build: Callable[[np.random.Generator], Case]
    kind: str
    ours: bool = False
    note: str = ""

    @property
    def library(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]

    def versions(self) -> dict[str, str]:
        """Return the versions of its packages.

        Raises:
          PackageNotFoundError: one of them is not installed.
        """
        return {package: version(package) for package in self.packages}

    def missing(self) -> tuple[str, ...]:
        """Return the packages that are not installed."""
        return tuple(package for package in self.packages if not _installed(package))


def _installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


def module(name: str) -> Any:
    """Import a module of a library that is perhaps not installed."""
    return importlib.import_module(name)


@contextmanager
def old_names(function: str, **renamed: str) -> Iterator[None]:
    """Let a function of `jax.numpy` take keywords by names that JAX has given up: old="new"."""
    current = getattr(jnp, function)

    @wraps(current)
    def shimmed(*args: Any, **keywords: Any) -> Any:
        return current(*args, **{renamed.get(name, name): value for name, value in keywords.items()})

    setattr(jnp, function, shimmed)
    try:
        yield
    finally:
        setattr(jnp, function, current)


# --- random numbers


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Return standard normal float32 inputs."""
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def tokens(rng: np.random.Generator, size: int, *shape: int) -> jax.Array:
    """Return tokens from 2 on, since libraries take the first two for padding and the start."""
    return jnp.asarray(rng.integers(2, size, size=shape), jnp.int32)


def is_floating(leaf: Any) -> bool:
    """Return whether a leaf is an array of real or complex numbers."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def moved(tree: Any, rng: np.random.Generator, scale: float = 0.2) -> Any:
    """Return a tree with every floating leaf moved at random, so that nothing is zero or one by accident.

    Entries that are not zero are multiplied by exp(scale * normal): variances stay positive. Zeros
    become normal / 20.
    """

    def one(leaf: Any) -> Any:
        if not is_floating(leaf):
            return leaf
        value = np.asarray(leaf)
        value = value.astype(np.promote_types(value.dtype, np.float32))
        factor = np.exp(scale * rng.standard_normal(value.shape, np.float32))
        added = 0.05 * rng.standard_normal(value.shape, np.float32)
        return jnp.asarray(np.where(value == 0, added, value * factor), leaf.dtype)

    return jax.tree.map(one, tree)


def draw(rng: np.random.Generator, tree: Any) -> Any:
    """Return random float32 leaves for a tree of tuples that are shapes; matrices by their fan-in."""

    def one(shape: tuple[int, ...]) -> jax.Array:
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values *= 1.5 / math.sqrt(math.prod(shape[:-1]))
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(one, tree, is_leaf=_is_shape)


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(n, int) for n in node)


# --- libraries of modules


def split_floating(tree: Any) -> tuple[Any, Any]:
    """Return a tree's floating leaves, and the others; None where a leaf is in the other tree."""
    return (
        jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, tree),
        jax.tree.map(lambda leaf: None if is_floating(leaf) else leaf, tree),
    )


def combine(first: Any, second: Any) -> Any:
    """Return the tree that `split_floating` took apart."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def from_linen(
    rng: np.random.Generator,
    model: Any,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    args: tuple[Any, ...] = (),
    **keywords: Any,
) -> Case:
    """Return a flax.linen model: of all its floating variables, or of its params where it has no others.

    `call(variables, *inputs)` stands in for `model.apply`. `init` and `apply` take `args` and the
    keywords after the inputs.
    """

    def init(key: jax.Array, *xs: Any) -> Any:
        keys = dict(zip(("params", "dropout", "noise"), jax.random.split(key, 3), strict=True))
        return model.init(keys, *xs, *args, **keywords)

    variables = jax.jit(init)(jax.random.key(0), *inputs)
    return variables_case(
        rng, variables, call or (lambda v, *xs: model.apply(v, *xs, *args, **keywords)), inputs
    )


def variables_case(
    rng: np.random.Generator, variables: Any, call: Callable[..., Any], inputs: tuple[Any, ...]
) -> Case:
    """Return a function of flax's variables, as one of their floating leaves."""
    floating, others = split_floating(dict(variables))
    floating = moved(floating, rng)
    if set(variables) == {"params"}:
        return Case(
            lambda params, *xs: call(combine({"params": params}, others), *xs), floating["params"], inputs
        )
    return Case(lambda params, *xs: call(combine(params, others), *xs), floating, inputs)


def from_nnx(
    rng: np.random.Generator, model: Any, *inputs: Any, call: Callable[..., Any] | None = None
) -> Case:
    """Return a flax.nnx module; its floating variables are the params, the others stay what they are."""
    nnx = module("flax.nnx")
    graph, params, others = nnx.split(model, lambda path, leaf: is_floating(leaf), ...)

    def apply(params: Any, *xs: Any) -> Any:
        merged = nnx.merge(graph, params, others, copy=True)  # its state is made anew in each call
        return merged(*xs) if call is None else call(merged, *xs)

    return Case(apply, moved(params, rng), inputs)


def from_equinox(
    rng: np.random.Generator,
    model: Any,
    *inputs: Any,
    call: Callable[..., Any] | None = None,
    batched: bool = True,
) -> Case:
    """Return an equinox model, mapped over the leading axis of the inputs unless it is not `batched`.

    `call(model, *inputs)` stands in for `model(*inputs)`; a model is the module, or any pytree.
    """
    eqx = module("equinox")
    params, static = eqx.partition(model, is_floating)
    call = call or (lambda model, *xs: model(*xs))

    def apply(params: Any, *xs: Any) -> Any:
        whole = eqx.combine(params, static)
        if batched:
            return jax.vmap(lambda *one: call(whole, *one))(*xs)
        return call(whole, *xs)

    return Case(apply, moved(params, rng), inputs)


def from_haiku(
    rng: np.random.Generator, function: Callable[..., Any], *inputs: Any, modes: bool = False
) -> Case:
    """Return a function that uses haiku's modules; state, such as that of BatchNorm, is among the params.

    With `modes` the function takes, after the inputs, whether it is in training mode: a call in training mode
    makes the state.
    """
    hk = module("haiku")
    first = hk.transform_with_state(lambda *xs: function(*xs, True) if modes else function(*xs))
    transformed = hk.transform_with_state(lambda *xs: function(*xs, False) if modes else function(*xs))
    params, state = jax.jit(first.init)(jax.random.key(0), *inputs)
    key = jax.random.key(1)
    floating, others = split_floating({"params": params, "state": state})
    if not jax.tree.leaves(state):
        return Case(
            lambda params, *xs: transformed.apply(params, {}, key, *xs)[0], moved(params, rng), inputs
        )

    def apply(params: Any, *xs: Any) -> Any:
        whole = combine(params, others)
        return transformed.apply(whole["params"], whole["state"], key, *xs)[0]

    return Case(apply, moved(floating, rng), inputs)
