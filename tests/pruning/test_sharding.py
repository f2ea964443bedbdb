"""Pruning of params that lie on several devices: shardings, masks to the bit, and what is moved."""

import pytest

from tests.pruning import sharding
from tests.support import hlo
from tests.support.devices import on_eight_devices

CONDITIONAL = """
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%small (x: f32[8]) -> f32[8] {
  ROOT %r = f32[8]{0} all-reduce(%x), to_apply=%add
}

%large (x: f32[8]) -> f32[8] {
  %g = (f32[8]{0}, bf16[64,32]{1,0}) all-gather-start(%x), dimensions={0}
  ROOT %d = bf16[64,32]{1,0} all-gather-done(%g)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %outside = f32[1000]{0} all-to-all(%y), dimensions={0}
  ROOT %c = f32[8] conditional(%i, %x, %x), branch_computations={%small, %large}
}
"""


def test_collectives_are_read_off_a_program():
    assert hlo.moved(CONDITIONAL) == [("all-reduce", 8), ("all-gather", 2048), ("all-to-all", 1000)]
    inside = hlo.branches(CONDITIONAL)
    assert sorted(hlo.moved(inside)) == [("all-gather", 2048), ("all-reduce", 8)]
    hlo.check_small(inside, 2048)
    with pytest.raises(AssertionError, match="all-gather"):
        hlo.check_small(inside, 2047)
    with pytest.raises(AssertionError, match="sorts"):
        hlo.check_small("%s = f32[8]{0} sort(%x), dimensions={0}", 8)


def test_on_eight_devices():
    printed = on_eight_devices("from tests.pruning import sharding; sharding.run()")
    wanted = [f"{check.__name__} {kind.name} ok" for kind in sharding.KINDS for check in sharding.CHECKS]
    assert printed.splitlines() == wanted
