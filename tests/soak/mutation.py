"""Changes jaxprune in small ways, and runs the tests of what was changed: they must fail.

    python -m tests.soak.mutation selection masks schedules
    python -m tests.soak.mutation graph --sample 150 --seed 0

cosmic-ray, of the extra "mutation", makes the mutants: another operator or comparison, a number one higher or
lower, a `not` more, a loop that never runs, a decorator less. Each is written into a copy of the project, and
the tests of its module run there until one fails. A mutant that passes them all has survived, and is either
an entry of `mutation_survivors.toml`, which says why it changes nothing that matters, or a test is missing.
The command fails on a survivor without an entry, and on an entry without a survivor if the whole module was
run.

Annotations are left as they are, what is written in two ways counts once, and of the many operators that
could stand in place of one the nearest do (`--operators all` takes all). Each mutant has a process of its
own, forked from one that has imported JAX and not yet used it, and compiled programs are kept between them.
"""

import argparse
import ast
import compileall
import difflib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
SURVIVORS = Path(__file__).with_name("mutation_survivors.toml")

# By module the tests that are to notice, in stages: first a few that are quick and notice most. Of a package
# they are for each module in it.
SELECTION = "tests/selection/test_selection.py"
TESTS = {
    "masks": [["tests/tree/test_masks.py", "jaxprune/masks.py"]],
    "selection": [
        [f"{SELECTION}::test_groups_floors_and_counts_of_all", f"{SELECTION}::test_lowest_is_the_oracle"],
        [SELECTION, "-k=ties or parts or raises or specs or float32 or stored or removed_count"],
    ],
    "schedules": [["tests/test_schedules.py", "jaxprune/schedules.py"]],
    "ordering": [[SELECTION, "-k=ordered_bits or dtype"], [SELECTION]],
    "search": [
        ["tests/selection/test_search.py"],
        [f"{SELECTION}::test_groups_floors_and_counts_of_all", f"{SELECTION}::test_lowest_is_the_oracle"],
        [SELECTION, "-k=ties or parts or raises or specs or stored or double_precision"],
    ],
    "sources": [
        ["tests/selection/test_sources.py"],
        [f"{SELECTION}::test_groups_floors_and_counts_of_all", f"{SELECTION}::test_leaves_counted_in_parts"],
        [SELECTION, "-k=ties or raises or specs or stored or more_entries"],
    ],
    "wide": [["tests/selection/test_big_counts.py"], [SELECTION, "-k=parts"]],
    "graph": [
        ["tests/graph/test_graph_axes.py", "tests/graph/test_groups.py"],
        ["tests/graph/test_compaction.py"],
        ["tests/graph/test_graph_rules.py"],
    ],
}

NEAREST = (
    "Add_Sub Sub_Add Mul_FloorDiv Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul RShift_LShift LShift_RShift "
    "BitOr_BitAnd BitAnd_BitOr BitXor_BitAnd Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Lt_LtE Lt_GtE LtE_Lt LtE_Gt "
    "Gt_GtE Gt_LtE GtE_Gt GtE_Lt Delete_USub Delete_Invert Delete_Not"
)
"""Which operators stand in place of which, as cosmic-ray names them."""


PAIRS = [(ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.Lt, ast.GtE), (ast.Gt, ast.LtE), (ast.In, ast.NotIn)]
INVERSE = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
"""By comparison what is true where it is not, as far as scalars go."""


class Mutant(NamedTuple):
    """A change of one module: its path, the changed text, and the lines that differ."""

    path: Path
    text: str
    old: str
    new: str
    line: int


def mutants_of(path, everything=False):
    """All mutants of a module that compile and are not the same program."""
    from cosmic_ray import plugins  # of the extra "mutation", which pytest does without
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    text = path.read_text()
    tree, seen = get_ast(text), {_meaning(text)}
    hidden = _annotations(ast.parse(text))
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if kind.arguments() or not (everything or _is_near(name)):
            continue
        at = [where for node in ast_nodes(tree) for where in kind().mutation_positions(node)]
        for number, (start, _) in enumerate(at):
            if any(first <= start < last for first, last in hidden):
                continue
            changed = mutate_code(text, kind(), number)
            try:
                if (meaning := _meaning(changed)) in seen:
                    continue
            except SyntaxError:
                continue
            seen.add(meaning)
            old, new = _difference(text, changed)
            yield Mutant(path, changed, old, new, start[0])


class _Plainly(ast.NodeTransformer):
    """Writes `not (a < b)` as `a >= b`, and `not not a` as `a`."""

    def visit_UnaryOp(self, node):
        inner = self.generic_visit(node).operand
        if isinstance(node.op, ast.Not):
            if isinstance(inner, ast.Compare) and len(inner.ops) == 1:
                return ast.Compare(inner.left, [INVERSE[type(inner.ops[0])]()], inner.comparators)
            if isinstance(inner, ast.UnaryOp) and isinstance(inner.op, ast.Not):
                return inner.operand
        return node


def _meaning(text):
    """The same of programs that differ only in how a `not` is written."""
    return ast.dump(_Plainly().visit(ast.parse(text)))


def _is_near(name):
    _, _, change = name.partition("_")
    return not change or change in NEAREST.split()


def _annotations(tree):
    nodes = [
        n
        for node in ast.walk(tree)
        for n in (getattr(node, "annotation", None), getattr(node, "returns", None))
    ]
    return [
        ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes if isinstance(n, ast.AST)
    ]


def _difference(before, after):
    lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm=""))[3:]
    return tuple(" ".join(line[1:].strip() for line in lines if line[0] == sign).strip() for sign in "-+")


class Result(NamedTuple):
    passed: bool
    seconds: float
    report: str


def run_tests(copy, tests, seconds=None):
    """Runs tests in a copy of the project, in a process of its own.

    Args:
      copy: the folder.
      tests: stages of files or names of tests, from there. The first that fails ends the run.
      seconds: of CPU, after which the process is ended, which counts as a failure; None lets it write what it
        compiles.
    """
    log, start = copy / "log.txt", time.monotonic()
    child = os.fork()
    if not child:
        try:
            _run_in_child(copy, tests, seconds, log)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(3)
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if seconds and time.monotonic() - start > 10 * seconds:  # it may wait, and use no CPU
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.05)
    return Result(os.waitstatus_to_exitcode(status) == 0, used.ru_utime + used.ru_stime, log.read_text())


def _run_in_child(copy, tests, seconds, log):
    import pytest
    from hypothesis import Phase, settings

    os.setpgid(0, 0)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if seconds:
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 1, int(seconds) + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (2**33, 2**33))
    os.chdir(copy)
    sys.path[:] = [
        str(copy),
        str(copy / "tests"),
        *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "tests"),
    ]
    # A failure is not made smaller: that it fails is enough.
    settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
    settings.load_profile("mutants")
    args = [
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-p",
        "no:cov",
        "-Wignore:Module already imported",
    ]
    code = next((code for stage in tests if (code := pytest.main([*args, *stage]))), 0)
    sys.stdout.flush()
    os._exit(int(code))


def copied(into):
    """A copy of the project, for one process to change."""
    for name in ("jaxprune", "tests", "experiments"):
        shutil.copytree(ROOT / name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, into / name)
    compileall.compile_dir(into / "jaxprune", quiet=2)
    return into


def explained():
    """By module, old and new line, why a survivor changes nothing that matters."""
    entries = tomllib.loads(SURVIVORS.read_text()).get("survivor", [])
    return {(entry["module"], entry["old"], entry["new"]): entry["why"] for entry in entries}


def paths_of(name):
    path = Path("jaxprune") / name
    return sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path.with_suffix(".py")]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("modules", nargs="+", metavar="module", choices=TESTS, help=", ".join(TESTS))
    parser.add_argument("--sample", type=int, help="as many mutants of each, drawn at random; else all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--operators", choices=["nearest", "all"], default="nearest")
    parser.add_argument("--match", default="", help="only mutants of lines that contain this")
    parser.add_argument("--new", action="store_true", help="only mutants that have no entry yet")
    parser.add_argument("--list", action="store_true", help="list the mutants, and run nothing")
    args = parser.parse_args()
    known, left = explained(), []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        # Programs that a mutant does not change are compiled once.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(folder) / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        for module in ("chex", "flax", "hypothesis.extra.numpy", "ml_dtypes", "optax", "pytest"):
            __import__(module)  # and JAX
        copy = None if args.list else copied(Path(folder) / "copy")
        for name in args.modules:
            mutants = [m for path in paths_of(name) for m in mutants_of(path, args.operators == "all")]
            mutants = [m for m in mutants if args.match in m.old]
            if args.new:
                mutants = [m for m in mutants if (name, m.old, m.new) not in known]
            if args.sample and args.sample < len(mutants):
                mutants = random.Random(args.seed).sample(mutants, args.sample)
            if args.list:
                print(*(f"{m.path.name}:{m.line}: {m.old} -> {m.new}" for m in mutants), sep="\n")
                continue
            left += run_module(name, mutants, copy, known)
            whole = not (args.sample or args.match or args.new) and args.operators == "nearest"
            if whole:
                left += [f"{key}: an entry without a survivor" for key in known if key[0] == name]
    if left:
        sys.exit("\n".join([f"{len(left)} to explain, or to kill by a test:", *left]))


def run_module(name, mutants, copy, known):
    """Runs all mutants of a module. Entries that are found are taken out of those known."""
    first = run_tests(copy, TESTS[name])
    if not first.passed:
        sys.exit(f"the tests of {name} fail as it is:\n{first.report}")
    again = run_tests(copy, TESTS[name], 10 * first.seconds)
    print(
        f"{name}: {len(mutants)} mutants, tests take {first.seconds:.0f} s, then {again.seconds:.0f} s",
        flush=True,
    )
    killed, alive, met, start = 0, [], set(), time.monotonic()
    for number, mutant in enumerate(mutants, 1):
        relative = mutant.path.relative_to(ROOT)
        target = copy / relative
        shutil.rmtree(target.parent / "__pycache__", ignore_errors=True) if number == 1 else None
        target.write_text(mutant.text)
        try:
            result = run_tests(copy, TESTS[name], 3 * first.seconds + 20)
        finally:
            shutil.copy(mutant.path, target)
        key = (name, mutant.old, mutant.new)
        if not result.passed:
            killed += 1
        elif key in known:
            met.add(key)
        else:
            alive.append(f"{relative}:{mutant.line}: {mutant.old}\n    -> {mutant.new}")
            print(alive[-1], flush=True)
        if number % 20 == 0:
            print(f"  {number} of {len(mutants)}, {time.monotonic() - start:.0f} s", flush=True)
    for key in met:
        del known[key]
    rate = killed / max(len(mutants), 1)
    print(
        f"{name}: {killed} of {len(mutants)} killed ({rate:.0%}), {len(met)} explained, {len(alive)} not",
        flush=True,
    )
    return alive


if __name__ == "__main__":
    main()
