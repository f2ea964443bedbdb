"""The list of mutants that survive is of lines that there are, and says why."""

from tests.soak import mutation


def test_survivors_are_of_lines_that_there_are():
    entries = mutation.explained()
    for (module, old, new), why in entries.items():
        lines = " ".join(
            line.strip() for path in mutation.paths_of(module) for line in path.read_text().splitlines()
        )
        assert old in lines, f"no line of {module} is {old!r}"
        assert old != new and why.endswith(".")


def test_programs_that_mean_the_same_are_one_mutant():
    same = ["if a < b: pass", "if not a >= b: pass", "if not not a < b: pass", "if (a<b):\n  pass"]
    assert len(set(map(mutation._meaning, same))) == 1
    assert (
        len(set(map(mutation._meaning, ["a < b", "a <= b", "not a", "a", "a < b < c", "not a < b < c"]))) == 6
    )
