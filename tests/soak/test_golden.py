"""What `golden.py` counts, and that it knows all properties."""

import ast
from pathlib import Path

import numpy as np
import pytest

from tests.soak import golden


def test_examples_that_are_alike_count_once():
    counter = golden.Counter()
    run = counter._counted("any", lambda *drawn, fixture: None)
    for drawn in [
        (np.zeros(2), 1),
        (np.zeros(2), 1),  # again
        (np.zeros((2, 1)), 1),
        (np.zeros(2, bool), 1),
        (np.zeros(2), True),
        ([np.zeros(2)], 1),
        ({"a": np.zeros(2)}, 1),
        ({"b": np.zeros(2)}, 1),
    ]:
        run(*drawn, fixture=object())
    assert len(counter.seen["any"]) == 7


def test_an_example_that_fails_does_not_count():
    counter = golden.Counter()
    with pytest.raises(ZeroDivisionError):
        counter._counted("any", lambda x: 1 / x)(0)
    assert not counter.seen["any"]


@pytest.mark.parametrize(
    "file", ["tree/test_masks.py", "pruning/test_prune.py", "selection/test_selection.py"]
)
def test_every_property_is_run(file):
    tree = ast.parse((Path(__file__).parents[1] / file).read_text())
    drawn = {
        f"{file}::{node.name}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and {"SETTINGS", "examples"}
        & {n.id for d in node.decorator_list for n in ast.walk(d) if hasattr(n, "id")}
    }
    assert drawn == {name for name in golden.PROPERTIES if name.startswith(file)}
