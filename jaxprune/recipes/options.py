"""Names and options of a recipe, resolved against the functions they stand for.

The signatures of the functions say what may be written: a score, a schedule or an option that is added to
the library can be used in a recipe at once, and none can go stale.
"""

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxprune.recipes.document import Node, RecipeError, unknown
from jaxprune.tree.checks import shown
from jaxprune.tree.stacks import Stacked
from jaxprune.tree.where import all_of, any_of, kernels, matching, not_
from jaxprune.typing import ScoreFn, Where

REDUCTIONS = {function.__name__: function for function in (jnp.max, jnp.mean, jnp.min, jnp.prod, jnp.sum)}
"""The functions that a recipe may name where an option is a reduction."""

_MAX_PATTERN = 300
_COMBINED = {"all_of": all_of, "any_of": any_of}


class Call(NamedTuple):
    """A function with its options, to be called once its other arguments are known.

    Attributes:
      function: a function of the library, or one of the caller's.
      options: keyword arguments; an option that is a `Call` itself is called first.
      inputs: the names of the arguments that only Python can give, such as `loss_fn`.
      node: where it is written.
      called: False for a score, which is the function itself with the options bound to it.
    """

    function: Callable[..., Any]
    options: Mapping[str, Any]
    inputs: tuple[str, ...]
    node: Node
    called: bool = True

    @property
    def needs(self) -> set[str]:
        """The names of all inputs that must be given, by its options too."""
        inner = [value.needs for value in self.options.values() if isinstance(value, Call)]
        return set(self.inputs).union(*inner)

    def make(self, given: Mapping[str, Any]) -> Any:
        """Call the function with its options and with the inputs it takes, `given` by name.

        `where` and `stacked` are passed to functions that take them, unless the recipe says otherwise.
        """
        if missing := [name for name in self.inputs if given.get(name) is None]:
            calls = ", ".join(f"{name}=..." for name in missing)
            self.node.fail(
                f"{self.function.__name__} needs {' and '.join(missing)}, which a recipe cannot hold: pass "
                f"{calls} to the recipe's pruner."
            )
        options = {key: v.make(given) if isinstance(v, Call) else v for key, v in self.options.items()}
        taken = {key: given[key] for key in self.inputs}
        if not self.called:
            return _bound(self.function, options)
        for name in ("where", "stacked"):
            if name in given and name in inspect.signature(self.function).parameters:
                taken[name] = given[name]
        return attempt(self.node, lambda: self.function(**taken | options))


def attempt(node: Node, make: Callable[[], Any]) -> Any:
    """Return `make()`, turning its ValueError or TypeError into a RecipeError that names the line and key."""
    try:
        return make()
    except RecipeError:
        raise
    except (ValueError, TypeError, OverflowError) as error:
        node.fail(str(error))


def named(
    node: Node, functions: Mapping[str, Callable[..., Any]], what: str, hidden: Sequence[str] = ()
) -> Call:
    """Return a function by name, with options: `name`, `{name: {option: value}}` or `{name: value}`.

    In the last form the value is that of the first option. Parameters that are `hidden` cannot be written,
    because the caller gives them. `what` is the kind of functions, in the plural, for messages.
    """
    if isinstance(node.value, dict):
        if len(node.value) != 1:
            node.fail(f"expected one of the {what} with its options, got {node.described()}.")
        ((name, inner),) = node.value.items()
    else:
        name, inner = node.text(), None
    if name not in functions:
        (inner or node).fail(unknown(name, functions, what))
    function = functions[name]
    options, inputs, is_score = _parameters(function, hidden)
    here = inner or node
    if inner is None or inner.value is None:
        written: dict[str, Node] = {}
    elif isinstance(inner.value, dict):
        written = inner.fields(options, what=f"options of {name}")
    else:
        if not options:
            inner.fail(f"{name} has no options, got {inner.described()}.")
        written = {next(iter(options)): inner}
    required = [key for key, parameter in options.items() if parameter.default is parameter.empty]
    if missing := [key for key in required if key not in written]:
        here.fail(f"{name} needs {' and '.join(missing)}: write {{{name}: {{{missing[0]}: ...}}}}.")
    values = {key: read(value, options[key].annotation) for key, value in written.items()}
    return Call(function, values, tuple(inputs), here, called=not is_score)


def read(node: Node, hint: Any) -> Any:
    """Return the value of a node as a type; for a union, as its alternative of the same `_shape`."""
    kinds = [kind for kind in _alternatives(hint) if _is_data(kind)]
    if node.value is None and type(None) in kinds:
        return None
    by_shape: dict[str, Any] = {}  # of alternatives of one shape the first
    for kind in kinds:
        if kind is not type(None):
            by_shape.setdefault(_shape(kind), kind)
    if isinstance(node.value, (dict, list)):
        written = "mapping" if isinstance(node.value, dict) else "list"
    else:
        written = "name" if isinstance(_as_number(node), str) else "scalar"
    # If no alternative has the shape of what is written, reading it as another says what was expected.
    shapes = (written, "scalar", "name", "list", "mapping")
    return _read_as(node, next(by_shape[shape] for shape in shapes if shape in by_shape))


def read_where(node: Node) -> Where:
    """Return a predicate: `kernels`, a pattern, a list of these, or `all_of`, `any_of`, `not` of some."""
    if isinstance(node.value, list):
        if not node.value:
            node.fail("an empty list takes in no leaf.")
        return any_of(*map(read_where, node.value))
    if isinstance(node.value, dict):
        if len(node.value) != 1:
            node.fail(f"expected one of all_of, any_of and not, got {node.described()}.")
        ((name, inner),) = node.value.items()
        if name == "not":
            return not_(read_where(inner))
        if name not in _COMBINED:
            inner.fail(unknown(name, [*_COMBINED, "not"], "keys"))
        if not isinstance(inner.value, list) or not inner.value:
            inner.fail(f"expected a list of predicates, got {inner.described()}.")
        return _COMBINED[name](*map(read_where, inner.value))
    pattern = node.text()
    if len(pattern) > _MAX_PATTERN:
        node.fail(f"a pattern of {len(pattern):,} characters; at most {_MAX_PATTERN} are read.")
    return kernels if pattern == kernels.__name__ else matching(pattern)


def read_stacked(node: Node) -> Stacked:
    """Return which leaves are stacked, from patterns with a number of leading axes, or a list of axes."""
    by_pattern: dict[str, int | tuple[int, ...]] = {}
    for pattern, inner in node.mapping('a mapping such as {"layers/*": 1}').items():
        several = isinstance(inner.value, list)
        by_pattern[pattern] = tuple(each.integer() for each in inner.value) if several else inner.integer()
    if not by_pattern:
        node.fail("it is empty, so no leaf would be stacked.")

    def stacked(path: str, leaf: Any) -> int | tuple[int, ...]:
        return next((axes for pattern, axes in by_pattern.items() if matching(pattern)(path, leaf)), 0)

    return stacked


def check_patterns(node: Node, leaves: Sequence[str]) -> None:
    """Check that every pattern of a predicate matches a leaf, even if others beside it do."""
    if isinstance(node.value, (list, dict)):
        for inner in node.value if isinstance(node.value, list) else node.value.values():
            check_patterns(inner, leaves)
        return
    if (pattern := node.text()) != kernels.__name__:
        check_pattern(node, pattern, leaves)


def check_pattern(node: Node, pattern: str, leaves: Sequence[str]) -> None:
    """Check that a pattern matches a leaf."""
    if not any(matching(pattern)(path, None) for path in leaves):
        node.fail(f"{pattern!r} matches no leaf. The leaves are: {', '.join(leaves)}.")


def read_score(node: Node, scores: Mapping[str, ScoreFn] | None = None) -> Call:
    """Return a score by name, from `jaxprune.scores` or from those of the caller."""
    if scores is not None and not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a dict of scores by name, got {shown(scores)}.")
    own = dict(scores or {})
    call = named(node, public_scores() | own, "scores", hidden=("stacked",))  # which a pruner passes on
    return call._replace(called=False, inputs=()) if call.function in own.values() else call


def public_scores() -> dict[str, Callable[..., Any]]:
    """Return the scores, and the functions that make scores, by name."""
    from jaxprune import scores

    return {name: getattr(scores, name) for name in scores.__all__}


def inputs_of(functions: Iterable[Callable[..., Any]]) -> set[str]:
    """Return the names of the arguments of functions that only Python can give."""
    return {name for function in functions for name in _parameters(function, ())[1]}


def defined_in(module: types.ModuleType, accepts: Callable[[inspect.Signature], bool]) -> dict[str, Any]:
    """Return the public functions of a module whose signature is accepted, by name."""
    return {
        name: function
        for name, function in vars(module).items()
        if inspect.isfunction(function)
        and function.__module__ == module.__name__
        and not name.startswith("_")
        and accepts(inspect.signature(function))
    }


def _parameters(
    function: Callable[..., Any], hidden: Sequence[str]
) -> tuple[dict[str, inspect.Parameter], list[str], bool]:
    """Return the options of a function, its inputs, and whether it is a score, not a maker of scores."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name not in hidden and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
    is_score = "params" in parameters and "params" not in hidden
    options, inputs = {}, []
    for name, parameter in parameters.items():
        kinds = [kind for kind in _alternatives(parameter.annotation) if kind is not type(None)]
        required = parameter.default is parameter.empty
        # A function that must be given is the caller's, as loss_fn; one with a default is a reduction.
        functions = all(_shape(kind) == "name" and kind != Where and kind is not ScoreFn for kind in kinds)
        if any(map(_is_data, kinds)) and not (required and functions):
            options[name] = parameter
        elif required and not is_score:
            inputs.append(name)
    return options, inputs, is_score


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(kind for part in typing.get_args(hint) for kind in _alternatives(part))
    return (hint,)


def _is_data(kind: Any) -> bool:
    """Return whether a recipe can hold values of a type."""
    if kind in (type(None), bool, int, float, str) or kind is ScoreFn:
        return True
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Literal, Callable):
        return True
    if origin in (tuple, list, Sequence):
        return all(map(_is_data, _alternatives(parts[0])))
    return origin in (dict, Mapping) and parts[0] is str and any(map(_is_data, _alternatives(parts[1])))


def _shape(kind: Any) -> str:
    """Return how a value of a type is written: as a mapping, a list, a name or a scalar."""
    if kind == Stacked:
        return "mapping"
    if kind is ScoreFn or typing.get_origin(kind) is Callable:
        return "name"
    shapes = {tuple: "list", list: "list", Sequence: "list", dict: "mapping", Mapping: "mapping"}
    return shapes.get(typing.get_origin(kind), "scalar")


def _read_as(node: Node, kind: Any) -> Any:
    scalars = {bool: node.boolean, int: node.integer, float: node.number, str: node.text}
    if kind in scalars:
        return float(node.number()) if kind is float else scalars[kind]()
    if kind == Where:
        return read_where(node)
    if kind == Stacked:
        return read_stacked(node)
    if kind is ScoreFn:
        return read_score(node)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Callable:
        name = node.text()
        if name not in REDUCTIONS:
            node.fail(unknown(name, REDUCTIONS, "reductions"))
        return REDUCTIONS[name]
    if origin is typing.Literal:
        if node.plain() not in parts:
            node.fail(unknown(node.text(), map(str, parts), "values"))
        return node.plain()
    if origin in (dict, Mapping):
        return {key: read(value, parts[1]) for key, value in node.mapping().items()}
    if not isinstance(node.value, list):
        node.fail(f"expected a list, got {node.described()}.")
    return tuple(read(item, parts[0]) for item in node.value)


def _as_number(node: Node) -> Any:
    """Return the plain value, numbers in quotes as numbers."""
    plain = node.plain()
    if isinstance(plain, str):
        try:
            return node.number()
        except ValueError:
            return plain
    return plain


def _bound(score: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Return a score with some options bound; without options, the score itself."""
    if not options:
        return score

    def bound(params: Any, **inputs: Any) -> Any:
        return score(params, **inputs | dict(options))

    bound.__name__ = score.__name__
    bound.__wrapped__ = score  # so that the extra arguments of the score are known to be read
    return bound
