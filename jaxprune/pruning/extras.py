"""Extra keyword arguments of a score: which names it reads, and the error for the others."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxprune.tree.checks import closest, name_of

_NOT_EXTRA = ("params", "grads", "key")


def named_by(*scores: Any) -> frozenset[str] | None:
    """Return the names of the extra arguments that some scores read; None if a signature cannot be read.

    A score reads what its signature names, and what the score that it wraps names (`functools.wraps`,
    `functools.partial`, `jax.jit`). A bare `**_` names nothing.

    Example:
      >>> def score(params, *, batch, **_): ...
      >>> sorted(named_by(score))
      ['batch']
    """
    names: set[str] = set()
    for score in scores:
        while score is not None:
            try:
                parameters = inspect.signature(score, follow_wrapped=False).parameters.values()
            except (TypeError, ValueError):
                return None
            kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
            names |= {each.name for each in parameters if each.kind in kinds}
            score = getattr(getattr(score, "func", score), "__wrapped__", None)
    return frozenset(names - set(_NOT_EXTRA))


def _is_score(score: Callable[..., Any], extra: Mapping[str, Any]) -> bool:
    """Return whether a function can be called as a score with the extra arguments that it names."""
    named = {name: value for name, value in extra.items() if name in (named_by(score) or ())}
    try:
        inspect.signature(score, follow_wrapped=False).bind(None, grads=None, key=None, **named)
    except TypeError:
        return False
    except ValueError:
        pass  # no signature to look at
    return True


def check_extra(
    scores: Any, extra: Mapping[str, Any], caller: str | Callable[..., Any], others: Iterable[str] = ()
) -> None:
    """Check that a score reads every extra argument, so that a misspelled option is not swallowed.

    `scores` is a score, a tuple of them, or None for a tree of values. `others` names arguments that the
    caller takes beside those of its signature; the message suggests the one that may have been meant.
    """
    if not extra:
        return
    several = scores if isinstance(scores, tuple) else () if scores is None else (scores,)
    names = named_by(*several)
    unknown = [name for name in extra if names is not None and name not in names]
    if names is None or not unknown or not all(_is_score(score, extra) for score in several):
        return
    own = () if isinstance(caller, str) else inspect.signature(caller).parameters
    who = caller if isinstance(caller, str) else caller.__name__
    where = f"and scores is a tree, not a score function, so {unknown[0]} would not be used"
    if several:
        where = "nor does " + " or ".join(f"the score {name_of(score)}" for score in several)
        where += f", which reads {', '.join(sorted(names))}" if names else ""
    raise unread(unknown[0], who, where, [*own, *others, *names])


def unread(name: str, who: str, where: str, known: Iterable[str]) -> TypeError:
    """Return the error for an argument that nothing reads, with the name that may have been meant."""
    close = closest(name, [each for each in known if each != "extra"])
    hint = f" Did you mean {close!r}?" if close else ""
    return TypeError(f"{who} takes no argument {name!r}, {where}.{hint}")
