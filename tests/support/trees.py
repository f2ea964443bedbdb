"""The sorts of trees that params come in.

Every sort holds the leaves of one plain dict, in the order in which the dict has them. What differs is
the containers and the paths, whose alphabetical order is not the order of the leaves: a function that
goes by the order of names, or by a dict that JAX has sorted by name, treats such a tree differently.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict

import jaxprune as jp

Build = Callable[[Sequence[dict[str, Any]]], Any]
"""From two to four layers, each a dict from "bias", "kernel" and perhaps "scale" to a leaf, to a tree."""


def _renamed(layer: dict[str, Any]) -> dict[str, Any]:
    """Return a layer under names whose alphabetical order is not that of its leaves."""
    names = {"bias": "offset", "kernel": "kernel", "scale": "gamma"}
    return {names[name]: leaf for name, leaf in layer.items()}


def _scattered(layers: Sequence[Any], nothing: Callable[[], Any]) -> list[Any]:
    """Return the layers at indices of one digit and of two, so that "10" sorts before "2"."""
    places = {2: (2, 10), 3: (2, 9, 10), 4: (2, 9, 10, 11)}[len(layers)]
    return [layers[places.index(n)] if n in places else nothing() for n in range(places[-1] + 1)]


class Layer(NamedTuple):
    offset: Any
    kernel: Any
    gamma: Any = None


class Net(NamedTuple):
    stem: Any
    mid: Any
    late: Any = None
    head: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DataLayer:
    offset: Any
    kernel: Any
    gamma: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class DataNet:
    stem: Any
    mid: Any
    late: Any = None
    head: Any = None


class EquinoxLayer(eqx.Module):
    offset: Any
    kernel: Any
    gamma: Any = None
    activation: str = eqx.field(static=True, default="tanh")


class EquinoxNet(eqx.Module):
    stem: Any
    mid: Any
    late: Any = None
    head: Any = None


class NnxLayer(nnx.Module):
    def __init__(self, **leaves: Any):
        for name, leaf in leaves.items():
            setattr(self, name, nnx.Param(leaf))


class NnxNet(nnx.Module):
    def __init__(self, layers: Sequence[dict[str, Any]]):
        self.layers = nnx.List(_scattered([NnxLayer(**layer) for layer in layers], NnxLayer))


@jax.tree_util.register_pytree_node_class
class Unnamed:
    """A node that gives JAX no names for its children."""

    def __init__(self, *children: Any):
        self.children = children

    def tree_flatten(self) -> tuple[Any, None]:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Any) -> Any:
        return cls(*children)


def _mixed(layers: Sequence[dict[str, Any]]) -> Any:
    first, second, *rest = map(_renamed, layers)
    inside = OrderedDict(
        tail=OrderedDict(second), rest={2 + 8 * n: DataLayer(**x) for n, x in enumerate(rest)}
    )
    return Unnamed(OrderedDict([("z", FrozenDict({"Z10": [EquinoxLayer(**first)]})), ("B", inside)]))


SORTS: dict[str, Build] = {
    "a list of eleven layers or more": lambda layers: _scattered(layers, dict),
    "an nnx state with an nnx.List": lambda layers: nnx.state(NnxNet(layers)),
    "an equinox module": lambda layers: EquinoxNet(*(EquinoxLayer(**_renamed(layer)) for layer in layers)),
    "a NamedTuple": lambda layers: Net(*(Layer(**_renamed(layer)) for layer in layers)),
    "a dataclass": lambda layers: DataNet(*(DataLayer(**_renamed(layer)) for layer in layers)),
    "an OrderedDict": lambda layers: OrderedDict(
        zip(("stem", "mid", "late", "head"), (OrderedDict(_renamed(layer)) for layer in layers), strict=False)
    ),
    # A natural order would have 2 before 10, and one that ignores case "a" before "L". Paths are in another
    # order than keys, because "-" sorts before "/": "Layer10-b/kernel" < "Layer10/kernel".
    "a dict of capital letters and digits": lambda layers: dict(
        zip(("Layer10", "Layer10-b", "Layer2", "a"), layers, strict=False)
    ),
    "a nested mixture": _mixed,
}


def _names(number: int) -> dict[str, Any]:
    """Return the plain dict with so many leaves, each leaf its path."""
    wide, narrow = {5: "ab", 10: ("ab", "cd")}[number]
    layers = dict.fromkeys(wide, ("bias", "kernel", "scale")) | dict.fromkeys(narrow, ("bias", "kernel"))
    return {layer: {name: f"{layer}/{name}" for name in names} for layer, names in layers.items()}


@cache
def _structure(sort: str, number: int) -> Any:
    with jax.disable_jit():
        numbered = jax.tree.structure(_names(number)).unflatten(map(jnp.array, range(number)))
        tree = SORTS[sort](list(numbered.values()))
    assert [int(leaf) for leaf in jax.tree.leaves(tree)] == list(range(number)), sort
    return jax.tree.structure(tree)


def of_sort(sort: str | None, tree: Any) -> Any:
    """Return a plain dict's leaves in a tree of a sort; for None, the dict itself."""
    leaves = jax.tree.leaves(tree)
    return tree if sort is None else _structure(sort, len(leaves)).unflatten(leaves)


def plain(tree: Any) -> dict[str, Any]:
    """Return the plain dict that a tree of any sort, or a list of its leaves, was made from."""
    leaves = jax.tree.leaves(tree)
    return jax.tree.structure(_names(len(leaves))).unflatten(leaves)


def by_role(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree of any sort, by their paths in the plain dict."""
    leaves = jax.tree.leaves(tree)
    return dict(zip(jax.tree.leaves(_names(len(leaves))), leaves, strict=True))


def path_of(tree: Any, role: str) -> str:
    """Return the path in a tree of any sort of the leaf that has a path in the plain dict."""
    return dict(zip(by_role(tree), jp.leaf_paths(tree), strict=True))[role]
