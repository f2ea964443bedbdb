"""A recipe as a tree of nodes that know their line and key, read from YAML or from plain Python data.

PyYAML composes the nodes and constructs no objects. What a recipe has no use for (tags, anchors and aliases,
a second document) is refused while it composes, and so are depth and number of nodes beyond any recipe's:
a hostile text costs no more than a long one. Scalars follow the core schema of YAML 1.2, in which `1e-3` is a
number and `on` a text; in YAML 1.1, which PyYAML follows, it is the other way round.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

from jaxprune.tree.checks import closest

MAX_CHARACTERS = 200_000
_MAX_DEPTH = 30
_MAX_NODES = 10_000
_MAX_DIGITS = 300  # of whole numbers; those beyond are infinite

# A leading zero is octal in YAML 1.1 and decimal in 1.2, so it is neither here; nor is 1_000 a number.
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITY = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NULLS = ("", "~", "null", "Null", "NULL")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class RecipeError(ValueError):
    """A recipe is wrong; the message begins with the file, the line if it has lines, and the key."""


class Node(NamedTuple):
    """A value in a recipe.

    Attributes:
      value: a dict of nodes, a list of nodes, or a Python scalar.
      key: where it is, as in `prune[0].sparsity`; empty for the root.
      place: the file and the line, as in `recipe.yaml:3`, or the name of a dict's recipe.
      written: a scalar of YAML as it is written; None for Python data.
    """

    value: Any
    key: str
    place: str
    written: str | None = None

    def fail(self, problem: str) -> NoReturn:
        """Raise a `RecipeError` that says where the problem is."""
        raise RecipeError(f"{self.place}: {self.key}: {problem}" if self.key else f"{self.place}: {problem}")

    def described(self) -> str:
        """Return what is here, for a message."""
        if isinstance(self.value, dict):
            return f"a mapping of {', '.join(map(_short, self.value)) or 'nothing'}"
        if isinstance(self.value, list):
            return f"a list of {len(self.value)}"
        return "nothing" if self.value is None else _short(self.plain())

    def plain(self) -> Any:
        """Return the value as plain data."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        number = _item(self.value)
        return self.value if number is None else number

    # Each returns the value as one type, or fails.

    def mapping(self, what: str = "a mapping") -> dict[str, "Node"]:
        """Return the nodes by key."""
        if not isinstance(self.value, dict):
            self.fail(f"expected {what}, got {self.described()}.")
        return self.value

    def text(self) -> str:
        """Return a text; in YAML, one that looks like a number needs quotes."""
        text = self.plain()
        if not isinstance(text, str):
            quotes = self.written is not None and text is not None
            self.fail(f"expected a text, got {self.described()}.{' Put it in quotes.' * quotes}")
        return text

    def boolean(self) -> bool:
        """Return true or false."""
        plain = self.plain()
        if not isinstance(plain, bool):
            self.fail(f"expected true or false, got {self.described()}.")
        return plain

    def number(self) -> int | float:
        """Return a number that is not NaN. A text that reads as one will do: 1e-3 is a text in YAML 1.1."""
        value = self.plain()
        if isinstance(value, str):
            value = _number(value.strip())
        if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
            value = math.inf if value > 0 else -math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            hint = ""
            if re.fullmatch(r"[-+]?[0-9][0-9_:.,%xob]*", self.written or ""):
                hint = " Write plain decimals, such as 10, 0.9 or 1e-3."
            self.fail(f"expected a number, got {self.described()}.{hint}")
        return value

    def integer(self) -> int:
        """Return a whole number; 1e3 is one too."""
        value = self.number()
        if isinstance(value, float):
            if not value.is_integer():
                self.fail(f"expected a whole number, got {self.described()}.")
            value = int(value)
        return value

    def fields(
        self, allowed: Iterable[str], required: Iterable[str] = (), what: str = "keys"
    ) -> dict[str, "Node"]:
        """Return the nodes by key; each key must be allowed, and the required ones must be there."""
        nodes, allowed = self.mapping(), list(allowed)
        for key, node in nodes.items():
            if key not in allowed:
                node.fail(unknown(key, allowed, what))
        if missing := [key for key in required if key not in nodes]:
            self.fail(f"{', '.join(missing)} must be given; got {self.described()}.")
        return nodes


def unknown(key: str, allowed: Iterable[str], what: str) -> str:
    """Say that a key or name is not allowed, what is, and what may have been meant."""
    allowed = list(allowed)
    near = closest(key, allowed)
    meant = f" Did you mean {near}?" if near else ""
    return f"unknown {_short(key)}.{meant} Allowed {what}: {', '.join(allowed) or 'none'}."


def from_python(value: Any, name: str) -> Node:
    """Return the tree of plain Python data: dicts with texts for keys, lists, numbers, texts, bools, None."""
    count = 0

    def node(value: Any, key: str, depth: int) -> Node:
        nonlocal count
        count += 1
        own = Node(value, key, name)
        _check_size(own, count, depth)
        if isinstance(value, Mapping):
            if wrong := [k for k in value if not isinstance(k, str)]:
                own._replace(value=None).fail(f"keys must be texts, got {_short(wrong[0])}.")
            return own._replace(value={k: node(v, _join(key, k), depth + 1) for k, v in value.items()})
        if isinstance(value, (list, tuple)):
            return own._replace(value=[node(v, f"{key}[{i}]", depth + 1) for i, v in enumerate(value)])
        if not (value is None or isinstance(value, (bool, int, float, str))) and _item(value) is None:
            own.fail(
                f"expected plain data (a mapping, list, text, number, bool or None), got {_short(value)}."
            )
        return own

    return node(value, "", 1)


def from_yaml(text: str, name: str) -> Node:
    """Return the tree of a YAML text."""
    yaml = _import_yaml()
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"{name}: {len(text):,} characters, too many for a recipe; at most {MAX_CHARACTERS:,} are read."
        )

    def place(it: Any) -> str:
        return f"{name}:{it.start_mark.line + 1}"

    class Loader(yaml.SafeLoader):
        """Composes nodes, and refuses what a recipe has no use for before it composes it."""

        count = 0
        keys: tuple[str, ...] = ()  # of the nodes that are being composed, from the outermost

        def __init__(self, text: str):
            super().__init__(text)
            self.seen: dict[tuple[int, str], str] = {}  # by mapping and key, the key's place

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Compose the next node: an item at `index`, the value of the key `index`, or a key (None)."""
            event, above = self.peek_event(), self.keys
            at = Node(None, above[-1] if above else "", place(event))
            if isinstance(event, yaml.AliasEvent) or event.anchor:
                at.fail(f"anchors and aliases (&{event.anchor}, *{event.anchor}) are not read: write it out.")
            if event.tag is not None:
                at.fail(f"tags ({_short(event.tag)}) are not read.")
            self.count += 1
            if index is None and parent is not None:
                if not isinstance(event, yaml.ScalarEvent):
                    at.fail("a key must be a text, got a mapping or a list.")
                at, pair = at._replace(key=_join(at.key, event.value)), (id(parent), event.value)
                if pair in self.seen:
                    at.fail(f"the key is there already, at {self.seen[pair]}.")
                self.seen[pair] = at.place
                return super().compose_node(parent, index)
            if isinstance(index, int):
                at = at._replace(key=f"{at.key}[{index}]")
            elif index is not None:  # the line of a value is that of its key: an empty value has none
                at = at._replace(key=_join(at.key, index.value), place=place(index))
            _check_size(at, self.count, len(above) + 1)
            self.keys = (*above, at.key)
            node = super().compose_node(parent, index)
            self.keys = above
            return node

    def convert(it: Any, key: str, at: str) -> Node:
        if isinstance(it, yaml.ScalarNode):
            return Node(_scalar(it.value) if it.style is None else it.value, key, at, it.value)
        if isinstance(it, yaml.SequenceNode):
            return Node([convert(v, f"{key}[{n}]", place(v)) for n, v in enumerate(it.value)], key, at)
        return Node({k.value: convert(v, _join(key, k.value), place(k)) for k, v in it.value}, key, at)

    try:
        loader = Loader(text)
        if not loader.check_node():
            raise RecipeError(f"{name}: it is empty.")
        root = loader.get_node()
        if loader.check_node():
            Node(None, "", place(loader.peek_event())).fail("a second document begins; a recipe is one.")
        return convert(root, "", place(root))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}: this is not YAML: {problem}.") from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, RecipeError):
            raise
        # From PyYAML, for example at an escape that is no character.
        raise RecipeError(f"{name}: this is not YAML: {error}.") from None


def to_yaml(data: Any) -> str:
    """Return plain data as YAML, which `from_yaml` reads back as the same data."""
    yaml = _import_yaml()

    class Dumper(yaml.SafeDumper):
        """Also quotes a text that YAML 1.2 takes for a number, and never writes aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            del data
            return True

    def text(dumper: Any, value: str) -> Any:
        style = None if isinstance(_scalar(value), str) else "'"
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(
        data, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True
    )


def _import_yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            "recipes in YAML need PyYAML: pip install 'jaxprune[recipes]'. A dict needs nothing."
        ) from None
    return yaml


def _check_size(node: Node, count: int, depth: int) -> None:
    # Checked before anything inside a node is looked at; so dicts that hold themselves end here, too.
    if depth > _MAX_DEPTH or count > _MAX_NODES:
        deep, many = f"more than {_MAX_DEPTH} levels deep", f"more than {_MAX_NODES:,} values"
        what = deep if depth > _MAX_DEPTH else many
        raise RecipeError(f"{node.place}: {node.key[:80]}: {what}, too many for a recipe.")


def _item(value: Any) -> int | float | None:
    """Return a number of numpy as one of Python; None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "dtype") and value.dtype.kind in "iuf":
        return value.item()
    return None


def _scalar(text: str) -> Any:
    """Return a plain scalar of YAML 1.2: null, a bool, a number, or else a text."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    number = _number(text)
    return text if number is None else number


def _number(text: str) -> int | float | None:
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < _MAX_DIGITS else -math.inf if text[0] == "-" else math.inf
    if _NUMBER.fullmatch(text):
        return float(text)
    if _INFINITY.fullmatch(text):
        return -math.inf if text[0] == "-" else math.inf
    return None


def _join(key: str, name: str) -> str:
    plain = re.fullmatch(r"[A-Za-z_][\w-]*", name)
    shown = name if plain else _short(name)
    return f"{key}.{shown}" if key else shown


def _short(value: Any) -> str:
    """Return a value for a message: cut where it is long, with characters escaped that do not print."""
    if isinstance(value, str):
        text = json.dumps(value[:80], ensure_ascii=False)
    else:
        try:
            text = repr(value)
        except ValueError:  # Python writes no numbers of thousands of digits
            text = "of too many digits"
        if not isinstance(value, (bool, int, float)):
            text = f"{type(value).__name__} {text}"
    text = text if len(text) <= 80 else f"{text[:77]}..."
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
