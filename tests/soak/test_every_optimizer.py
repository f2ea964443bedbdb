"""Some of the pairs of `every_optimizer.py`, which runs all of them: each optimizer in one kind of pruner."""

import pytest

from tests.contracts.optimizers import NOT_OPTIMIZERS, OPTIMIZERS, exported
from tests.contracts.pruner_kinds import kinds
from tests.contracts.public import makers
from tests.soak.every_optimizer import UNGUARDED, dealt, run_pair


def test_the_table_names_every_optimizer_of_optax():
    named = {name.split()[0] for name in OPTIMIZERS} | NOT_OPTIMIZERS.keys()
    assert set(exported()) == named
    assert UNGUARDED.keys() <= OPTIMIZERS.keys()


def test_the_table_has_all_that_makes_a_pruner():
    assert {kind.by for kind in kinds().values()} == {*makers(), "keep_masked"}


def test_every_kind_and_form_is_dealt():
    assert {kind for kind, _ in dealt().values()} == kinds().keys()
    assert {form for _, form in dealt().values()} == {"inside", "around"}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_is_zero_and_the_rest_trains_as_if_alone_through_bursts_and_restarts(name):
    place = list(OPTIMIZERS).index(name)
    kind, form = dealt()[name]
    # Orbax is slow, so the states of only some pairs go through it.
    run_pair(name, kind, form, orbax=place < 24)
