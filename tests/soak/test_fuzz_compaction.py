"""Some of the random programs of `fuzz_compaction.py`, which has many more."""

import jax
import pytest

from tests.soak.fuzz_compaction import run_case

CASES = 40


@pytest.mark.parametrize("first", range(0, CASES, 10))
def test_random_programs_are_what_their_masked_selves_are(first):
    with jax.enable_x64(True):
        outcomes = [run_case(n, facts=n % 4 == 0, gradients=n % 2 == 0) for n in range(first, first + 10)]
    # Else the cases would say little.
    assert sum(outcome.removed for outcome in outcomes) > 5
    assert sum(outcome.claims for outcome in outcomes) > 50
