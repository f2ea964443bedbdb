"""The README's code runs, in order, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_in_order(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    assert len(blocks("python")) >= 3
    for block in blocks("python"):
        # A row of examples: masks made one after another on purpose.
        exec(compile(block, "README.md", "exec"), namespace)
    assert "0.9000" in capsys.readouterr().out


def test_the_two_commands_name_what_exists():
    study, tests = blocks("bash")
    assert "python -m experiments.lenet --dataset digits" in study
    assert "pytest" in tests
    for command in (study, tests):
        assert command.startswith("python3 -m venv")
        assert "-c constraints.txt" in command
    assert (ROOT / "constraints.txt").exists()
    assert (ROOT / "experiments" / "lenet.py").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_modules_that_the_pages_name_exist(name):
    import jaxprune as jp

    for dotted in set(re.findall(r"\bjp\.(\w+)", (ROOT / name).read_text())):
        assert hasattr(jp, dotted), dotted
