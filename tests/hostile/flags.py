"""Hostile flags: random and mutated arguments of every command of the experiments."""

import contextlib
import dataclasses
import io
import math
import re
import typing
from pathlib import Path

import numpy as np
import yaml

from experiments.run import saved_recipes, settings
from tests.support.commands import benchmark_names, command_module, study_names

HERE = Path(__file__).parents[2] / "experiments"
CONFIGS = [name for name in (*study_names(), *benchmark_names()) if name != "report"]

NUMBERS = "0 -1 1 2 1.5 0.5 1e3 nan inf -inf 1e400 -0 2147483648 0x10 1_000 ١٢ ½ 1e-400 -- , 1, 1,2 1,1 0,,1"
NUMBERS = [*NUMBERS.split(), "9" * 20, "9" * 5000, " 3 ", "3 4", "0.5,0.5", "0.5,1.5"]
TEXTS = "digits mnist cifar lenet é /etc/passwd /etc/passwd/x /dev/null . .. ~ - /proc/self/mem %s {0}"
TEXTS = [*TEXTS.split(), "", " ", "a\0b", "\n", "\x1b[2J", "\u202e", "\udcff", "x" * 300, "a/" * 3000]
# What no flag of these names may be, whatever it declares.
POSITIVE = re.compile(
    r"(^|_)(epochs|batch_size|rounds|steps|levels|lr|width|layers|leaves|millions|train_size)$"
)
SHARE = re.compile(r"^(sparsity|sparsities|amounts|share|units)$")


def config_of(name):
    """Return the config of a command; None if it has none."""
    return getattr(command_module(name), "Config", None)


def arguments(rng, config, files):
    """Return a few flags with values, some of them right."""
    fields, argv = dataclasses.fields(config), []
    for _ in range(rng.integers(0, 5)):
        field = fields[rng.integers(len(fields))]
        name = f"--{field.name.replace('_', '-')}"
        pool = NUMBERS if rng.integers(3) else TEXTS
        value = pool[rng.integers(len(pool))]
        kind = rng.integers(10)
        if kind == 0:
            wrong = [name[:-1], name + "s", "--x", "-x", name.upper(), "--", "--no-fresh", "-h"]
            name = wrong[rng.integers(8)]
        if kind == 1:
            argv.append(name)
        elif kind == 2:
            argv.append(f"{name}={value}")
        elif kind == 3:
            argv += ["--recipe", str(files[rng.integers(len(files))])]
        elif kind < 6 and field.default not in (None, dataclasses.MISSING, True, False):
            default = field.default
            argv += [name, ",".join(map(str, default)) if isinstance(default, tuple) else str(default)]
        else:
            argv += [name, value]
    if rng.integers(20) == 0:
        argv.insert(0, TEXTS[rng.integers(len(TEXTS))])
    if saved_recipes.is_file(fields[0]) and rng.integers(4):
        argv.insert(0, str(files[rng.integers(len(files))]))
    return argv


def recipe_files(folder, rng, own):
    """Return what `--recipe` may be given: mutated settings of this command and others, and no settings."""
    made = []
    for number, name in enumerate([own, *rng.choice(CONFIGS, 3)]):
        config = config_of(name)
        if config is None:
            continue
        settings = {
            field.name: field.default
            for field in dataclasses.fields(config)
            if not saved_recipes.is_file(field)
        }
        key = list(settings)[rng.integers(len(settings))]
        values = [0, -1, 10**30, math.nan, math.inf, None, [], [1, 1], {}, "", "a\0b", "\x1b", True, "x" * 99]
        settings[key] = values[rng.integers(len(values))]
        data = {"version": 1, "study": str(name), "config": settings}
        if rng.integers(4) == 0:
            data["config"][["epochs ", "x", "out"][rng.integers(3)]] = 1
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        path = folder / f"{number}.yaml"
        path.write_text(yaml.safe_dump({**data, "config": plain}))
        made.append(path)
    (folder / "bytes.yaml").write_bytes(rng.bytes(99))
    return [*made, folder / "bytes.yaml", folder, folder / "none", "/dev/zero", "a\0b", "x" * 5000, ""]


def check_accepted(config, value):
    """Return what a study would run with makes sense, judged by the names and types of its flags alone."""
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        if saved_recipes.is_file(field):
            continue
        own = getattr(value, field.name)
        items = own if isinstance(own, tuple) else () if own is None else (own,)
        for item in items:
            kinds = (int, float, str, bool)
            assert isinstance(item, kinds), f"{field.name} is {item!r}"
            if isinstance(item, str):
                assert item.isprintable(), f"{field.name} is {item!r}"
                assert item.strip(), f"{field.name} is {item!r}"
                continue
            assert math.isfinite(item), f"{field.name} is {item!r}"
            assert isinstance(item, float) or abs(item) < 2**31, f"{field.name} is {item!r}"
            if POSITIVE.search(field.name) and not isinstance(item, bool):
                zero = "tune_epochs" in field.name or hints[field.name] == tuple[float, ...]
                assert item > 0 or (zero and item == 0), f"{field.name} is {item!r}"
            if SHARE.match(field.name):
                assert 0 <= item < 1, f"{field.name} is {item!r}"
        if field.name == "seeds" and isinstance(own, tuple):
            assert own, "no seeds"
        if isinstance(own, tuple) and field.name != "widths":
            assert len(set(own)) == len(own), f"{field.name} is {own!r}"


def refused_with(call):
    """Return how a command ended; None if it went on."""
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            result = call()
    except SystemExit as error:
        said = err.getvalue() + (error.code if isinstance(error.code, str) else "")
        return error.code, said.strip() or out.getvalue()
    return None, result


def case(number, folder, watched):
    """Return random flags of a random command."""
    rng = np.random.default_rng(number)
    name = CONFIGS[rng.integers(len(CONFIGS))]
    config = config_of(name)
    if config is None:
        return "no flags"
    files = recipe_files(folder, rng, name)
    argv = arguments(rng, config, files)
    with watched(32 << 20):
        code, said = refused_with(lambda: settings.parse(config, argv, "doc"))
    if code is None:
        check_accepted(config, said)
        return "accepted"
    if code == 0:
        assert {"-h", "--help"} & set(argv), f"{argv}: ended well"
        return "helped"
    assert code == 2 or isinstance(code, str), f"{argv}: status {code}"
    assert said, f"{argv}: nothing said"
    ours = said.startswith("error: argument --")
    assert code != 2 or ours or "For full helptext" in said, f"{argv}: {said}"
    # tyro repeats, in a box, what it does not know; what is ours is one short sentence.
    assert len(said) < (500 if ours else 4000 + 2 * sum(map(len, argv))), f"{len(said)} characters"
    assert not ours or "\n" not in said, said
    main = command_module(name).main
    before = sorted(folder.iterdir())
    again, _ = refused_with(lambda: main(argv))
    assert again == code, f"{argv}: main ended with {again}, not {code}"
    assert sorted(folder.iterdir()) == before, f"{argv}: something was written"
    return "refused"
