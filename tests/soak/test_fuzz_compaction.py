"""Some of the random programs of `fuzz_compaction.py`, which has many more."""

import jax
import pytest

from tests.soak.fuzz_compaction import run_case

CASES = 40


# Programs that once failed: a layer asked its stack, which is only made of layers, and the stack its layers.
@pytest.mark.parametrize("seed", [1244, 1433])
def test_random_programs_that_once_failed(seed):
    with jax.enable_x64(True):
        assert run_case(seed, facts=seed % 4 == 0, gradients=seed % 2 == 0).removed


@pytest.mark.parametrize("first", range(0, CASES, 10))
def test_random_programs_are_what_their_masked_selves_are(first):
    with jax.enable_x64(True):
        outcomes = [run_case(n, facts=n % 4 == 0, gradients=n % 2 == 0) for n in range(first, first + 10)]
    # Else the cases would say little.
    assert sum(outcome.removed for outcome in outcomes) > 5
    assert sum(outcome.claims for outcome in outcomes) > 50
