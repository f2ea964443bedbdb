"""What the pages say, runs: their code, their commands, their recipes; and the site of them builds."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from experiments.run import settings
from tests.contracts import public
from tests.support.commands import command_module, study_names

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# The marks that a block of Python may carry in a comment above it; blocks of other libraries may not run.
TORCH, ALONE = "needs: torch", "run alone"
LIBRARIES = ("jaxpruner", "torch_pruning", "keras", "transformers")
MARKS = {TORCH, ALONE, *(f"not run: {name}" for name in LIBRARIES)}

# The tests that run a small version of what the pages' commands start.
SMALL = {
    "calibration/test_calibration_benchmark.py": "benchmarks.calibration benchmarks.solvers",
    "studies/test_experiments.py": "dynamic_sparse gradual lenet lottery_ticket pruning_at_init",
    **{
        f"studies/test_{name}.py": name
        for name in ("channel_pruning", "deployment", "distributed", "one_shot", "pretrained", "report")
    },
    **{f"studies/test_{name}_study.py": name for name in ("distillation", "recipe")},
    "studies/test_large.py": "hf.large",
    "studies/test_real_models.py": "real_models",
    "studies/test_hf_command.py": "hf.small",
    "studies/test_sensitivity_study.py": "sensitivity benchmarks.sensitivity_cost",
    "studies/test_benchmarks.py": "benchmarks benchmarks.compaction benchmarks.compile benchmarks.eager "
    "benchmarks.files benchmarks.gpu benchmarks.graph benchmarks.grouping benchmarks.latency "
    "benchmarks.lottery benchmarks.main_study benchmarks.memory benchmarks.python_calls "
    "benchmarks.selection benchmarks.sweep benchmarks.train_step",
    "sparse/test_convolutions.py": "benchmarks.convolutions",
    "sparse/test_sparse_inference.py": "benchmarks.sparse_inference",
}


class Block(NamedTuple):
    """A fenced block: its language, the comment right above it, its text and its first line's number."""

    language: str
    mark: str
    text: str
    line: int


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page, of one language or all; every fence is closed."""
    found: list[Block] = []
    above, begun = "", None
    inside: list[str] = []
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if begun is not None:
            if line == "```":
                found.append(begun._replace(text="\n".join([*inside, ""])))
                begun, above, inside = None, "", []
            else:
                inside.append(line)
        elif line.lstrip().startswith("```"):
            assert re.fullmatch(r"```\w*", line), f"{page}:{number}: {line}"
            begun = Block(line[3:], above, "", number + 1)
        else:
            mark = re.fullmatch(r"<!-- (.*) -->", line)
            above = mark[1] if mark else ""
    assert begun is None, f"{page}: a block that does not end: {begun}"
    return [block for block in found if language in (None, block.language)]


def prose(page: str) -> list[str]:
    """The lines of a page outside its blocks."""
    text = (ROOT / page).read_text()
    return re.sub(r"(?ms)^```.*?^```$", "```", text).splitlines()


@pytest.mark.parametrize("page", PAGES)
def test_nothing_escapes(page):
    known = {"python", "bash", "yaml", "text"}
    assert {block.language for block in blocks(page)} <= known, "a block of another language, or of none"
    for before, line in zip(["", *prose(page)], prose(page), strict=False):
        assert not (line.startswith("    ") and not before.strip()), f"indented code escapes: {line}"


def test_marks_are_those_known():
    assert {block.mark for page in PAGES for block in blocks(page, "python")} <= {"", *MARKS}
    others = {block.mark for page in PAGES for block in blocks(page) if block.language != "python"}
    assert others <= {"", "test command"}
    for page in PAGES:
        for block in blocks(page, "python"):
            ast.parse(block.text)
            if block.mark.startswith("not run: "):
                # The reader is told as well: the line above the mark.
                *_, told = filter(None, (ROOT / page).read_text().splitlines()[: block.line - 3])
                assert told.endswith("(not run)"), f"{page}:{block.line}"


def execute(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marks: set[str]) -> int:
    """Runs the Python of a page in order, in an empty folder, in a module of its own; how many blocks."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    ran = [block for block in blocks(page, "python") if block.mark in marks]
    for block in ran:
        exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), vars(module))
    return len(ran)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.mark == "" for block in blocks(page, "python"))]
)
def test_code_runs(page, tmp_path, monkeypatch):
    assert execute(page, tmp_path, monkeypatch, {""})


def test_code_beside_torch_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="torch is not installed")
    pages = [page for page in PAGES if any(block.mark == TORCH for block in blocks(page, "python"))]
    assert pages == ["docs/from/torch-prune.md"]
    assert execute(pages[0], tmp_path, monkeypatch, {"", TORCH})


def test_code_that_comes_before_jax_runs(tmp_path):
    found = [block for page in PAGES for block in blocks(page, "python") if block.mark == ALONE]
    for block in found:
        subprocess.run([sys.executable, "-c", block.text], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("page", "number"), [(page, number) for page in PAGES for number in range(len(blocks(page, "yaml")))]
)
def test_recipes_run(page, number):
    recipe = jp.recipes.parse(blocks(page, "yaml")[number].text)
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        "hidden": {"kernel": jax.random.normal(keys[0], (20, 64)), "bias": jnp.zeros(64)},
        "out": {"kernel": jax.random.normal(keys[1], (64, 1)), "bias": jnp.zeros(1)},
    }

    def apply_fn(params, x):
        h = jnp.tanh(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return h @ params["out"]["kernel"] + params["out"]["bias"]

    def pruned():
        if recipe.calibrates:
            return recipe.prune_layers(apply_fn, params, [jax.random.normal(keys[0], (80, 20))]).masks
        pruner = recipe.pruner(params, apply_fn=apply_fn, x=jnp.ones((4, 20)))

        def update(_, state):
            return pruner.update(state, params, grads=params)

        steps = recipe.end_step or 2
        return jax.jit(lambda: jax.lax.fori_loop(0, steps, update, pruner.init(params)).masks)()

    masks = pruned()
    assert jp.metrics.sparsity(masks).prunable > 0.1
    assert recipe == jp.recipes.parse(recipe.to_yaml())


# Commands


def commands(page: str) -> Iterator[list[str]]:
    """The commands of a page: in blocks, and those in its text that start Python."""
    text = "\n".join(prose(page)).replace("```", "")
    inline = [code for code in re.findall(r"`([^`]+)`", text) if re.match(r"(\S*python|uv run|bash) ", code)]
    for line in [line for block in blocks(page, "bash") for line in block.text.splitlines()] + inline:
        words = shlex.split(line, comments=True)
        while "&&" in words:
            at = words.index("&&")
            yield words[:at]
            words = words[at + 1 :]
        while words and "=" in words[0]:  # what the environment is given
            words = words[1:]
        if words:
            yield words


@pytest.mark.parametrize("page", [page for page in PAGES if any(True for _ in commands(page))])
def test_commands_are_taken(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        if words[0] == "uv":
            extra = words.index("--extra") + 1 if "--extra" in words else None
            assert extra is None or words[extra] in PROJECT["optional-dependencies"]
            words = words[words.index(next(w for w in words if w in ("python", "pytest"))) :]
        program, *rest = words
        name = Path(program).name
        if name == "pip":
            check_pip(rest)
        elif name in ("ruff", "pyright", "pytest"):
            assert f"{name}[nodejs]" in str(PROJECT) or name in str(PROJECT)
        elif name == "bash":
            assert (ROOT / rest[0]).is_file(), words
        elif name in ("python", "python3"):
            check_python(rest)
        else:
            raise AssertionError(f"{page} has a command of which this test knows nothing: {words}")


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    assert not any(word.startswith("http") for word in words)
    if "-e" in words:
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[words.index("-e") + 1])
        # The libraries of the real models need older versions of some packages than the tests.
        assert extras is not None, words
        pins = "experiments/real_models/constraints.txt" if extras[1] == "models" else "constraints.txt"
        assert words[words.index("-c") + 1] == pins
        assert set((extras[1] or "test").split(",")) <= PROJECT["optional-dependencies"].keys()


def check_python(words: list[str]) -> None:
    if words[0] == "-m" and words[1].startswith("tests."):
        check_script(ROOT / f"{words[1].replace('.', '/')}.py", words[2:])
        return
    assert words[0] == "-m", words
    if words[1].startswith("experiments"):
        check_study(words[1], words[2:])
    else:
        assert words[1] in ("venv", "pytest", "mkdocs"), words


def check_script(script: Path, flags: list[str]) -> None:
    """A script of the tests declares the flags it is given."""
    declared = {
        argument.value
        for call in ast.walk(ast.parse(script.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    given = {flag for flag in flags if flag.startswith("--")}
    assert given <= declared, f"{script.name} does not take {given - declared}"
    assert not flags or declared


def check_study(name: str, flags: list[str]) -> None:
    """A study's own settings take the flags."""
    module = command_module(name.removeprefix("experiments."))
    if flags and flags[0] in getattr(module, "COMMANDS", ()):
        module, flags = module.COMMANDS[flags[0]], flags[1:]
    assert callable(module.main)
    if "--recipe" in flags:  # of an earlier run
        at = flags.index("--recipe")
        assert flags[at + 1].endswith("recipe.yaml")
        flags = flags[:at] + flags[at + 2 :]
    if hasattr(module, "Config"):
        settings.parse(module.Config, flags)
    else:
        assert not {flag for flag in flags if flag.startswith("-")} - {"--help"}, f"{name} has no flags"


def test_each_study_runs_small_in_the_tests():
    named = {
        words[words.index("-m") + 1].removeprefix("experiments.")
        for page in PAGES
        for words in commands(page)
        if "-m" in words and words[words.index("-m") + 1].startswith("experiments.")
    }
    assert named >= set(study_names()), "a study that no page names"
    assert named == set(" ".join(SMALL.values()).split())
    for file, names in SMALL.items():
        text = (ROOT / "tests" / file).read_text()
        for name in names.split():
            assert name.rpartition(".")[2] in text, f"tests/{file} does not run a small {name}"


def test_a_flag_that_is_none_is_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        check_python(["-m", "experiments.lenet", "--learning-rates", "1"])
    with pytest.raises(AssertionError):
        check_python(["-m", "tests.soak.fuzz_compaction", "--number", "1"])
    with pytest.raises(AssertionError):
        check_pip(["install", "-c", "constraints.txt", "-e", ".[nothing]"])


def test_the_two_commands_are_whole():
    study, *_ = (block.text for block in blocks("README.md", "bash"))
    (tests,) = (block.text for block in blocks("README.md", "bash") if block.mark == "test command")
    assert "python -m experiments.lenet --dataset digits" in study
    assert "pytest" in tests
    for command in (study, tests):
        assert command.startswith("python3 -m venv")
        assert "-c constraints.txt" in command
    assert (ROOT / "constraints.txt").exists()


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    for dotted in set(re.findall(r"\bjp((?:\.[a-z_]\w*)+)", (ROOT / page).read_text())):
        found = jp
        for name in dotted[1:].split("."):
            assert hasattr(found, name), f"jp{dotted}"
            found = getattr(found, name)
            if not isinstance(found, types.ModuleType):
                break
    for name in re.findall(r"\btests/[\w/]+\.(?:py|sh)\b", (ROOT / page).read_text()):
        assert (ROOT / name).is_file(), name


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def build(config: Path, folder: Path) -> subprocess.CompletedProcess:
    # Nothing leads anywhere: the build needs no network.
    away = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return subprocess.run(
        # Not --quiet: warnings that are not logged are not counted.
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", config, "-d", folder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | away | {"NO_MKDOCS_2_WARNING": "1"},
    )


def test_every_public_name_has_its_place(site):
    raw = (site / "objects.inv").read_bytes().split(b"zlib.\n", 1)[1]
    listed = {}
    for line in zlib.decompress(raw).decode().splitlines():
        name, role, _, where, _ = line.split(" ", 4)
        listed[name] = role, where
    for name, member in public.members():
        path = f"jaxprune.{name}"
        # A page may have a name where it is defined, too.
        if inspect.isfunction(member) or inspect.isclass(member):
            home = f"{member.__module__}.{member.__qualname__}"
        elif name == "graph.elementwise":
            home = "jaxprune.graph.engine.rules.elementwise.elementwise"
        else:
            home = path
        where = listed.get(home, listed.get(path))
        assert where is not None, f"{path} is on no page of docs/api"
        assert where[0] != "py:module", f"{path} is on its page as a module"
        assert where[1].startswith("api/"), where


def test_the_site_fetches_nothing(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(
            r'<(?:script|img|iframe|link rel="(?:stylesheet|preconnect)")[^>]*"(https?:[^"]*)', text
        )
        assert not fetched, f"{page.name}: {fetched}"
    assert (site / "search" / "search_index.js").stat().st_size > 100_000


def test_links_read_on_a_forge():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", "\n".join(prose(page))):
            if not target.startswith("https://"):
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"


def test_a_broken_page_fails_the_build(tmp_path):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "assets").symlink_to(ROOT / "docs" / "assets")
    whole = (ROOT / "mkdocs.yml").read_text()
    head, _, rest = whole.partition("nav:\n")
    config = tmp_path / "mkdocs.yml"
    config.write_text(head + "nav: [index.md]\n" + rest.partition("\n\n")[2].replace("[.]", f"[{ROOT}]"))
    page = docs / "index.md"
    for text, *named in (
        ("[there](there.md) [here](#no-such-place)", "there.md", "no-such-place"),
        ("::: jaxprune.no_such_name", "jaxprune.no_such_name"),
    ):
        page.write_text(f"# Page\n\n{text}\n")
        done = build(config, tmp_path / "site")
        assert done.returncode
        assert all(name in done.stdout + done.stderr for name in named)
