"""A recipe's text as a tree of nodes that know their line and key, and what is wrong in it.

YAML is read as events, never as objects: nothing is constructed, nothing recurses, and what a recipe
has no use for (tags, anchors and aliases, several documents) is refused. Scalars are read by the core
schema of YAML 1.2, in which `1e-3` is a number and `on` a text; in YAML 1.1, PyYAML's, it is the other
way round.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

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
    """What is wrong in a recipe; the message begins with the line, if there is one, and the key."""


class Node(NamedTuple):
    """A value in a recipe.

    Attributes:
      value: a dict of nodes, a list of nodes, a `Text` of YAML, or a Python scalar.
      key: where it is, as in `prune[0].sparsity`; empty for the whole.
      place: the file and the line, as in `recipe.yaml:3`, or the name of a dict's recipe.
    """

    value: Any
    key: str
    place: str

    def fail(self, problem: str) -> NoReturn:
        """Raises a `RecipeError` that says where."""
        raise RecipeError(f"{self.place}: {self.key}: {problem}" if self.key else f"{self.place}: {problem}")

    @property
    def is_null(self) -> bool:
        """Whether there is nothing here."""
        if isinstance(self.value, Text):
            return self.value.plain and self.value.text in _NULLS
        return self.value is None

    def described(self) -> str:
        """What is here, for a message."""
        if isinstance(self.value, dict):
            return f"a mapping of {', '.join(map(_short, self.value)) or 'nothing'}"
        if isinstance(self.value, list):
            return f"a list of {len(self.value)}"
        return "nothing" if self.is_null else _short(self.plain())

    def plain(self) -> Any:
        """The value as plain data, scalars by the rules of YAML 1.2."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        if not isinstance(self.value, Text):
            number = _item(self.value)
            return self.value if number is None else number
        if not self.value.plain:
            return self.value.text
        text = self.value.text
        if self.is_null:
            return None
        if text in _BOOLS:
            return _BOOLS[text]
        number = _number(text)
        return text if number is None else number

    # What is wanted here, or an error.

    def mapping(self, what: str = "a mapping") -> dict[str, "Node"]:
        """The nodes by key."""
        if not isinstance(self.value, dict):
            self.fail(f"expected {what}, got {self.described()}.")
        return self.value

    def text(self) -> str:
        """A text; in YAML what looks like a number needs quotes to be one."""
        text = self.plain()
        if not isinstance(text, str):
            quotes = isinstance(self.value, Text) and not self.is_null
            self.fail(f"expected a text, got {self.described()}.{' Put it in quotes.' * quotes}")
        return text

    def boolean(self) -> bool:
        """True or false."""
        plain = self.plain()
        if not isinstance(plain, bool):
            self.fail(f"expected true or false, got {self.described()}.")
        return plain

    def number(self) -> int | float:
        """A number that is not NaN; or a text that reads as one, as other readers of YAML make of 1e-3."""
        value = self.plain()
        if isinstance(value, str):
            value = _number(value.strip())
        if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
            value = math.inf if value > 0 else -math.inf
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            hint = ""
            if isinstance(self.value, Text) and re.fullmatch(r"[-+]?[0-9][0-9_:.,%xob]*", self.value.text):
                hint = " Write plain decimals, such as 10, 0.9 or 1e-3."
            self.fail(f"expected a number, got {self.described()}.{hint}")
        return value

    def integer(self) -> int:
        """A whole number; of 1e3 as well."""
        value = self.number()
        if isinstance(value, float):
            if not value.is_integer():
                self.fail(f"expected a whole number, got {self.described()}.")
            value = int(value)
        return value

    def fields(
        self, allowed: Iterable[str], required: Iterable[str] = (), what: str = "keys"
    ) -> dict[str, "Node"]:
        """The nodes by key, of which each must be allowed and some must be there."""
        nodes, allowed = self.mapping(), list(allowed)
        for key, node in nodes.items():
            if key not in allowed:
                node.fail(unknown(key, allowed, what))
        if missing := [key for key in required if key not in nodes]:
            self.fail(f"{', '.join(missing)} must be given; got {self.described()}.")
        return nodes


class Text(NamedTuple):
    """A scalar of YAML as it is written; plain if it has no quotes."""

    text: str
    plain: bool


def unknown(key: str, allowed: Iterable[str], what: str) -> str:
    """Says that a key or name is not allowed, what is, and what may have been meant."""
    allowed = list(allowed)
    near = difflib.get_close_matches(key[:60], allowed, n=1, cutoff=0.6)
    meant = f" Did you mean {near[0]}?" if near else ""
    return f"unknown {_short(key)}.{meant} Allowed {what}: {', '.join(allowed) or 'none'}."


def from_python(value: Any, name: str) -> Node:
    """The tree of plain Python data: dicts with texts for keys, lists, numbers, texts, bools, None."""
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
    """The tree of a YAML text.

    Args:
      text: one document.
      name: of the file, for messages.

    Raises:
      RecipeError: it is no YAML, or has what a recipe may not have.
      ImportError: PyYAML is not installed.
    """
    yaml = _import_yaml()
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            f"{name}: {len(text):,} characters are no recipe; at most {MAX_CHARACTERS:,} are read."
        )
    root: Node | None = None
    # The collections that are open, each with the key that waits for its value, in mappings.
    open_: list[tuple[Node, Node | None]] = []
    count = documents = 0

    def place(event: Any) -> str:
        return f"{name}:{event.start_mark.line + 1}"

    def add(new: Any, event: Any) -> None:
        nonlocal root, count
        count += 1
        key = ""
        if open_:
            parent, waiting = open_[-1]
            if isinstance(parent.value, list):
                key = f"{parent.key}[{len(parent.value)}]"
            elif waiting is None:
                if not isinstance(new, Text):
                    Node(None, parent.key, place(event)).fail(
                        "a key must be a text, got a mapping or a list."
                    )
                here = Node(None, _join(parent.key, new.text), place(event))
                if new.text in parent.value:
                    here.fail(f"the key is there already, at {parent.value[new.text].place}.")
                open_[-1] = (parent, here._replace(value=new.text))
                return
            else:
                key = waiting.key
        own = Node(new, key, place(event))
        # The line of a value is that of its key: an empty value has none of its own.
        if open_ and isinstance(open_[-1][0].value, dict):
            parent, waiting = open_[-1]
            assert waiting is not None
            own = own._replace(place=waiting.place)
            parent.value[waiting.value] = own
            open_[-1] = (parent, None)
        elif open_:
            open_[-1][0].value.append(own)
        else:
            root = own
        _check_size(own, count, len(open_) + 1)
        if not isinstance(new, Text):
            open_.append((own, None))

    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            at = Node(None, open_[-1][0].key if open_ else "", place(event))
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                at.fail(f"anchors and aliases (&{event.anchor}, *{event.anchor}) are not read: write it out.")
            if getattr(event, "tag", None) is not None:
                at.fail(f"tags ({_short(event.tag)}) are not read.")
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    at.fail("a second document begins; a recipe is one.")
            elif isinstance(event, yaml.ScalarEvent):
                add(Text(event.value, event.style is None), event)
            elif isinstance(event, yaml.MappingStartEvent):
                add({}, event)
            elif isinstance(event, yaml.SequenceStartEvent):
                add([], event)
            elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
                open_.pop()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}: this is no YAML: {problem}.") from None
    except (ValueError, OverflowError) as error:
        if isinstance(error, RecipeError):
            raise
        # Of PyYAML itself, as for an escape that is no character.
        raise RecipeError(f"{name}: this is no YAML: {error}.") from None
    if root is None:
        raise RecipeError(f"{name}: it is empty.")
    return root


def to_yaml(data: Any) -> str:
    """Plain data as YAML, which `from_yaml` reads back as the same data.

    Raises:
      ImportError: PyYAML is not installed.
    """
    yaml = _import_yaml()

    class Dumper(yaml.SafeDumper):
        """One that also quotes what YAML 1.2 takes for a number, and never writes aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            del data
            return True

    def text(dumper: Any, value: str) -> Any:
        odd = Text(value, True)
        quoted = not isinstance(Node(odd, "", "").plain(), str)
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="'" if quoted else None)

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
    # Counted before anything is done with what is in it; dicts that hold themselves end here too.
    if depth > _MAX_DEPTH or count > _MAX_NODES:
        what = (
            f"more than {_MAX_DEPTH} levels deep"
            if depth > _MAX_DEPTH
            else f"more than {_MAX_NODES:,} values"
        )
        raise RecipeError(f"{node.place}: {node.key[:80]}: {what} is no recipe.")


def _item(value: Any) -> int | float | None:
    """A number of numpy as Python's; None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "dtype") and value.dtype.kind in "iuf":
        return value.item()
    return None


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
    """A value in a message: cut where it is long, and without what a terminal would not show."""
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
