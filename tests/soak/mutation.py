"""Changes a module in small ways, one at a time, and runs the tests of its room, which must fail.

    python -m tests.soak.mutation jaxprune/selection/exact.py
    python -m tests.soak.mutation jaxprune/graph/groups.py --sample 50 --seed 0
    python -m tests.soak.mutation jaxprune/tree/masks.py --tests tests/tree/test_masks.py

cosmic-ray, of the extra "mutation", makes the mutants in a copy of the project: another operator or
comparison, a number one higher or lower, a `not` more, a loop that never runs, a decorator less. The command
prints the place and the diff of each mutant that passes the tests, and exits with 1 if there is any. Such a
mutant changes nothing that matters, as docs/trust.md says of some kinds, or a test is missing.
"""

import argparse
import ast
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

NEAREST = """
    Add_Sub Sub_Add Mul_FloorDiv Div_Mul FloorDiv_Mul Mod_FloorDiv Pow_Mul RShift_LShift LShift_RShift
    BitOr_BitAnd BitAnd_BitOr BitXor_BitAnd Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is Lt_LtE Lt_GtE LtE_Lt
    LtE_Gt Gt_GtE Gt_LtE GtE_Gt GtE_Lt Delete_USub Delete_Invert Delete_Not
"""
"""Of the many operators that cosmic-ray puts in the place of another, those that are hardest to notice."""


def mutations(path: Path) -> Iterator[Any]:
    """Yield cosmic-ray's mutations of a module, leaving out annotations and programs that occur twice."""
    from cosmic_ray import plugins  # of the extra "mutation", which pytest does without
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.work_item import MutationSpec

    text = path.read_text()
    tree, seen, hidden = get_ast(text), {ast.dump(ast.parse(text))}, annotations(text)
    for name in sorted(plugins.operator_names()):
        operator, change = plugins.get_operator(name), name.partition("_")[2]
        if operator.arguments() or (change and change not in NEAREST.split()):
            continue
        places = [place for node in ast_nodes(tree) for place in operator().mutation_positions(node)]
        for number, (start, end) in enumerate(places):
            if any(first <= start < last for first, last in hidden):
                continue
            try:
                program = ast.dump(ast.parse(mutate_code(text, operator(), number)))
            except SyntaxError:
                continue
            if program not in seen:
                seen.add(program)
                yield MutationSpec(path, name, number, start, end)


def annotations(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return where the annotations of a module begin and end, as (line, column)."""
    fields = [(node, name) for node in ast.walk(ast.parse(text)) for name in ("annotation", "returns")]
    nodes = [found for node, name in fields if isinstance(found := getattr(node, name, None), ast.expr)]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def tests_of(module: Path) -> list[str]:
    """Return the tests of a module's room, after the examples in its docstrings, which are quick."""
    room = module.with_suffix("").parts[1]
    places = Path("tests", room), Path("tests", f"test_{room}.py")
    tests = [path for path in places if (ROOT / path).exists()]
    if not tests:
        raise SystemExit(f"{module}: there is no tests/{room} and no tests/test_{room}.py; pass --tests.")
    return [str(path) for path in (module, *tests)]


def copy_project(folder: Path) -> None:
    """Copy what the tests need."""
    for name in ("jaxprune", "tests", "experiments"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)


def main() -> None:
    """Run the mutants of one module from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("module", type=Path, help="its path, such as jaxprune/selection/exact.py")
    parser.add_argument("--tests", nargs="+", help="what pytest is to run (default: the tests of the room)")
    parser.add_argument("--sample", type=int, help="run so many mutants, drawn at random (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw (default: 0)")
    args = parser.parse_args()
    if args.module.parts[:1] != ("jaxprune",) or not (ROOT / args.module).is_file():
        parser.error(f"module: there is no {args.module}; pass a path such as jaxprune/selection/exact.py")
    from cosmic_ray.mutating import mutate_and_test

    options = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command = shlex.join([*options, *(args.tests or tests_of(args.module))])
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        folder = Path(name)
        copy_project(folder)
        os.chdir(folder)
        # The copy is imported, and the programs that a mutant does not change are compiled once.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [name, os.environ.get("PYTHONPATH")]))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        chosen = list(mutations(args.module))
        if args.sample is not None and args.sample < len(chosen):
            chosen = random.Random(args.seed).sample(chosen, args.sample)
        started = time.monotonic()
        if subprocess.run(shlex.split(command), check=False).returncode:
            sys.exit("the tests fail without a mutant")
        seconds, survived = time.monotonic() - started, 0
        for mutation in chosen:
            result = mutate_and_test([mutation], command, 3 * seconds + 20)
            place = f"{args.module}:{mutation.start_pos[0]}:{mutation.start_pos[1]} {mutation.operator_name}"
            print(f"{'killed' if result.is_killed else 'survived':<9}{place}", flush=True)
            if not result.is_killed:
                survived += 1
                print(result.diff, flush=True)
    print(f"{args.module}: {len(chosen) - survived} of {len(chosen)} mutants killed, {survived} survived")
    sys.exit(bool(survived))


if __name__ == "__main__":
    main()
