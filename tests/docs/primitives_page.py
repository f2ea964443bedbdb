"""The page docs/concepts/primitives.md, made from the rules by `python -m tests.docs.primitives_page`.

Every primitive that JAX has is in it: those that it makes public, and those of its own modules that
can stand in a jaxpr.
"""

import importlib
import sys
from pathlib import Path

import jax
from jax.extend.core import Primitive

from jaxprune.graph.engine import tracing
from jaxprune.graph.engine.rules import base, per_reader

PAGE = Path(__file__).parents[2] / "docs" / "concepts" / "primitives.md"
HEAD = """# Primitives

What compaction does with each primitive of JAX. This page is made from the rules by
`python -m tests.docs.primitives_page` (with jax {version}), and a test holds it against them.

- **Exact**: what is proved unnecessary along an axis can be removed; nothing else is kept for this primitive.
- **Conservative**: some axes are kept whole although that is not always necessary. The sentence says which.
- **Without a rule**: its inputs are kept whole, and its outputs are cut afterwards. That is safe, and the
  table of groups names the op and its line. [A rule of your own](../extend/rule.md) takes three functions.

What is not proved unnecessary is kept. So is every axis whose size is symbolic, or that has one slice.
"""
# Modules that have primitives and are not imported by `import jax`.
_MODULES = (
    *("jax.scipy.special", "jax.scipy.linalg", "jax.custom_batching", "jax.custom_derivatives", "jax.random"),
    *("jax.ad_checkpoint", "jax.export", "jax.sharding"),
)
# Modules whose primitives stand in no ordinary jaxpr; some are imported by other libraries only.
_ELSEWHERE = ("jax._src.pallas", "jax._src.cudnn", "jax._src.hijax", "jax.experimental")
_INLINED = "inlined: its body is analysed as if written in its place"


def primitives() -> set[str]:
    """The names of JAX's primitives."""
    for module in _MODULES:
        importlib.import_module(module)
    modules = [
        module
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "jax" and not name.startswith(_ELSEWHERE)
    ]
    found = (value for module in modules for value in list(vars(module).values()))
    # A name with a dot is of a function that was wrapped in a primitive when it was first called.
    return {value.name for value in found if isinstance(value, Primitive) and "." not in value.name}


def status(name: str) -> tuple[str, str]:
    """How a primitive is treated, and what about that is conservative."""
    if name in tracing.INLINED:
        return "exact", _INLINED
    if not base.has_rule(name):
        return "without a rule", ""
    note = base.rule_for(name).conservative
    return ("conservative", note) if note else ("exact", "")


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD.format(version=jax.__version__)]
    found = {name: status(name) for name in primitives() - {per_reader.NAME}}
    notes: dict[str, list[str]] = {}
    for name, (kind, note) in sorted(found.items()):
        if kind == "conservative":
            notes.setdefault(note, []).append(name)

    def listed(names: list[str]) -> str:
        return ", ".join(f"`{name}`" for name in names)

    exact = sorted(name for name, (kind, note) in found.items() if kind == "exact" and not note)
    inlined = sorted(name for name, (kind, note) in found.items() if note == _INLINED)
    without = sorted(name for name, (kind, _) in found.items() if kind == "without a rule")
    parts += [
        f"## Exact ({len(exact) + len(inlined)})\n\n{listed(exact)}\n\n"
        f"Inlined, as if written in their place: {listed(inlined)}\n",
        f"## Conservative ({sum(map(len, notes.values()))})\n\n| primitives | what stays |\n| --- | --- |",
        "\n".join(
            f"| {listed(names)} | {note} |" for note, names in sorted(notes.items(), key=lambda n: n[1])
        ),
        f"\n## Without a rule ({len(without)})\n\n{listed(without)}",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
