"""The page of primitives says what the rules say."""

import re

import jax
import pytest

from jaxprune.graph import Rule, elementwise, register_rule
from jaxprune.graph.engine.rules import base
from tests.docs import primitives_page as pages


def listed():
    text = pages.PAGE.read_text(encoding="utf-8")
    return text, set(re.findall(r"`([\w-]+)`", text.partition("## Exact")[2]))


def test_the_page_is_what_the_rules_say():
    text, names = listed()
    if f"with jax {jax.__version__})" not in text:
        pytest.skip("the page is of another version of JAX, which has other primitives")
    assert text == pages.page(), "run python -m tests.docs.primitives_page"
    assert names == pages.primitives() - {"per_reader"}


def test_every_rule_of_this_version_is_listed():
    _, names = listed()
    known = {name for name in base._RULES if name in pages.primitives()}
    assert known - names == set()


def test_a_new_rule_changes_the_page(monkeypatch):
    monkeypatch.setattr(base, "_RULES", dict(base._RULES))
    assert pages.status("pure_callback") == ("without a rule", "")
    register_rule("pure_callback", rule=elementwise)
    assert pages.status("pure_callback") == ("exact", "")
    register_rule("pure_callback", rule=Rule(*elementwise[:3], conservative="its rows stay whole"))
    assert pages.status("pure_callback") == ("conservative", "its rows stay whole")
    assert "| `pure_callback` | its rows stay whole |" in pages.page()
    assert pages.status("jit") == ("exact", pages._INLINED)
