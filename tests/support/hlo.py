"""What a compiled program moves between devices, read off its text."""

import math
import re

COLLECTIVES = "all-gather all-to-all collective-permute all-reduce reduce-scatter ragged-all-to-all"
_COLLECTIVE = re.compile(rf"= (.*?) ({COLLECTIVES.replace(' ', '|')}|collective-broadcast)(?:-start)?\(")
_SHAPE = re.compile(r"\b[a-z]\w*\[([\d,]*)\]")
_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"\b(?:branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+))"
)


def moved(text):
    """Return each collective as (kind, entries of its result), of a tuple the largest."""
    found = []
    for match in _COLLECTIVE.finditer(text):
        sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in _SHAPE.findall(match[1])]
        found.append((match[2], max(sizes)))
    return found


def check_small(text, most):
    """Raise AssertionError if a collective's result has more entries than `most`, or anything is sorted."""
    large = [(kind, size) for kind, size in moved(text) if size > most]
    assert not large, f"moves more than {most} entries: {large}"
    assert not re.search(r"\bsort\(", text), "sorts"


def branches(text):
    """Return the part of a program that runs on a condition: all computations that its branches reach."""
    computations, name = {}, None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            name = head[1]
            computations[name] = []
        elif name is not None:
            computations[name].append(line)
    bodies = {name: "\n".join(lines) for name, lines in computations.items()}

    def of_branches(part):
        """Return the computations that the branches in a part of the program call."""
        names = ",".join(name for groups in _BRANCHES.findall(part) for name in groups if name)
        return [name.strip().lstrip("%") for name in names.split(",") if name]

    todo, reached = of_branches(text), set()
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            todo += _CALLED.findall(bodies[name]) + of_branches(bodies[name])
    return "\n".join(bodies[name] for name in sorted(reached))
