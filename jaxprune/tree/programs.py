"""One function of many arrays, compiled to few programs where it is called outside `jit`."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import jax
import numpy as np
from jax.errors import JAXIndexError, JAXTypeError

from jaxprune.tree.leaves import is_concrete

_ENTRIES = 2**22
"""The most entries that the arrays of calls in one program have together, as far as calls are not larger
themselves: a program holds the temporaries of all its calls, and new memory costs time at each run."""


def map_compiled(
    function: Callable[..., Any], static: Sequence[tuple[Any, ...]], arrays: Sequence[tuple[Any, ...]]
) -> list[Any]:
    """Return `function(*s, *a)` for each `s` of `static` and `a` of `arrays`, which are pytrees of arrays.

    Arrays that have values are computed with in compiled programs, which later calls use again. Calls whose
    static arguments, shapes and dtypes are equal are of one kind. A program has one call of each of its
    kinds, so that each kind is compiled once. Kinds with equally many calls share a program, unless their
    arrays are large, and it runs as often: equal layers take one program, one run for each layer.

    Traced arrays, and a function that reads values (`numpy.median`), run without `jit`.
    """
    calls = list(zip(static, arrays, strict=True))
    if is_concrete(arrays) and all(map(_is_hashable, static)):
        try:
            return _in_programs(function, calls)
        except (JAXTypeError, JAXIndexError):
            pass  # the function reads values
    return [function(*s, *a) for s, a in calls]


def _in_programs(function: Callable[..., Any], calls: Sequence[tuple[tuple[Any, ...], Any]]) -> list[Any]:
    alike: defaultdict[tuple[Any, ...], list[int]] = defaultdict(list)
    for number, (s, a) in enumerate(calls):
        leaves, treedef = jax.tree.flatten(a)
        alike[s, treedef, tuple(map(_signature, leaves))].append(number)
    # A program runs on one set of devices, so kinds on other devices need another.
    shared: defaultdict[Hashable, list[list[int]]] = defaultdict(list)
    for (_, _, signatures), numbers in alike.items():
        devices = frozenset(device for *_, s in signatures if s is not None for device in s.device_set)
        shared[len(numbers), devices].append(numbers)
    results: dict[int, Any] = {}
    for kinds in chain.from_iterable(map(partial(_small_sets, calls), shared.values())):
        for numbers in zip(*kinds, strict=True):
            of_round = [calls[number] for number in numbers]
            outputs = _program(function, tuple(s for s, _ in of_round), [a for _, a in of_round])
            results |= zip(numbers, outputs, strict=True)
    return [results[number] for number in range(len(calls))]


def _small_sets(
    calls: Sequence[tuple[tuple[Any, ...], Any]], kinds: Sequence[list[int]]
) -> Iterator[list[list[int]]]:
    """Yield sets of kinds that share a program: one kind, or several of at most `_ENTRIES` together."""
    some: list[list[int]] = []
    entries = 0
    for numbers in kinds:
        size = sum(map(np.size, jax.tree.leaves(calls[numbers[0]][1])))
        if some and entries + size > _ENTRIES:
            yield some
            some, entries = [], 0
        some.append(numbers)
        entries += size
    yield some


@partial(jax.jit, static_argnums=(0, 1))
def _program(
    function: Callable[..., Any], static: tuple[tuple[Any, ...], ...], arrays: list[Any]
) -> list[Any]:
    return [function(*s, *a) for s, a in zip(static, arrays, strict=True)]


def _signature(leaf: Any) -> tuple[Any, ...]:
    """Return what programs differ by: shape, dtype, whether the type is weak, and sharding."""
    if isinstance(leaf, jax.Array):
        return leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), leaf.sharding
    return np.shape(leaf), np.result_type(leaf), False, None


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
