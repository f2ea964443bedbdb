"""What jaxprune promises of masks and of selection, over thousands of random examples of each property.

    python -m tests.soak.golden --examples 10000 --seed 0

Runs the properties of the tests with more examples than CI has time for, and counts those that differ: an
example that is drawn again, or that is the same by other draws, counts once. A property with cases, such as
structures and scopes, shares its examples out among them. The command fails where a property does not hold,
or had fewer examples than asked for.
"""

import argparse
import functools
import hashlib
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

_SELECTION, _MASKS, _PRUNE = "selection/test_selection.py", "tree/test_masks.py", "pruning/test_prune.py"
PROPERTIES = {
    f"{_SELECTION}::test_lowest_is_the_oracle": "the lowest go, ties by place, NaN last",
    f"{_SELECTION}::test_lowest_at_both_ends": "none of them, and all",
    f"{_SELECTION}::test_lowest_is_nested": "more removes a superset",
    f"{_SELECTION}::test_leaves_counted_in_parts": "also beyond what an int32 counts",
    f"{_SELECTION}::test_groups_floors_and_counts_of_all": "groups, floors, of all and of what is left",
    f"{_SELECTION}::test_removed_count_rounds_half_to_even_in_double_precision": "counts round to even",
    f"{_MASKS}::test_kept_entries_keep_their_bits_and_pruned_ones_are_zero": "0, or to the bit as it was",
    f"{_MASKS}::test_intersect_is_the_logical_and": "masks combine",
    f"{_MASKS}::test_packing_is_numpys_and_undone": "masks of one bit per entry",
    f"{_PRUNE}::test_prune_once_is_the_oracle": "structures, scopes, targets, of, floors, warnings",
    f"{_PRUNE}::test_masks_are_nested_over_levels": "masks nest over levels",
    f"{_PRUNE}::test_counts_are_exact": "the sparsity asked for is the one got, per leaf and in all",
}
"""By test what it says."""


class Counter:
    """A plugin of pytest that counts the different examples of each property."""

    def __init__(self):
        self.seen = defaultdict(set)
        self.seconds = defaultdict(float)
        self._drawn = []

    def pytest_collection_modifyitems(self, items):
        from hypothesis import strategies as st  # pytest wants to import hypothesis itself, first

        draw = st.DataObject.draw

        def drawn(data, strategy, label=None):
            self._drawn.append(draw(data, strategy, label))
            return self._drawn[-1]

        st.DataObject.draw = drawn
        for function in {item.obj for item in items}:
            function.hypothesis.inner_test = self._counted(function.__name__, function.hypothesis.inner_test)

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid.split("::")[1].split("[")[0]] += report.duration

    def _counted(self, name, test):
        @functools.wraps(test)
        def run(*args, **kwargs):
            self._drawn.clear()
            test(*args, **kwargs)
            self.seen[name].add(hashlib.blake2b(_bytes((args, kwargs, self._drawn)), digest_size=12).digest())

        return run


def _bytes(value):
    """What tells examples apart. Fixtures, which are of other kinds, do not."""
    if isinstance(value, np.ndarray):
        return repr((value.dtype, value.shape)).encode() + value.tobytes()
    if isinstance(value, dict):
        return _bytes(list(value.items()))
    if isinstance(value, (list, tuple)):
        return b"(%b)" % b",".join(map(_bytes, value))
    return repr(value).encode() if isinstance(value, (bool, int, float, str)) else b""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--examples", type=int, default=10_000, help="of each property, all different")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--match", default="", help="only properties whose test's name contains this")
    args = parser.parse_args()
    tests = Path(__file__).parents[1]
    chosen = [name for name in PROPERTIES if args.match in name]
    # Small ones are drawn more than once.
    os.environ["JAXPRUNE_EXAMPLES"] = str(args.examples + args.examples // 2)
    counter, start = Counter(), time.monotonic()
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--hypothesis-seed={args.seed}"]
        + [str(tests / name) for name in chosen],
        plugins=[counter],
    )
    few = 0
    print(f"\n{'property':84}{'examples':>9}{'seconds':>9}")
    for name in chosen:
        test = name.split("::")[1]
        number = len(counter.seen[test])
        few += number < args.examples
        print(
            f"{test.removeprefix('test_')}: {PROPERTIES[name]}"[:83].ljust(84)
            + f"{number:9}{counter.seconds[test]:9.0f}"
        )
    print(f"seed {args.seed}, {time.monotonic() - start:.0f} s")
    if few:
        print(
            f"{few} of {len(chosen)} properties had fewer than {args.examples} different examples",
            file=sys.stderr,
        )
    sys.exit(int(code) or bool(few))


if __name__ == "__main__":
    main()
