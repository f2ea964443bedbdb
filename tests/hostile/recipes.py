"""Hostile recipes: random and mutated texts, trees of real keys and odd values, and texts made to do harm."""

import copy
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import yaml

import jaxprune as jp
from tests.recipes.errors import GOOD, UNFIT, WRONG, score

HERE = Path(__file__).parents[1]
PARAMS = {"a": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}, "b": {"kernel": jnp.ones((8, 4))}}
X = jnp.ones((2, 4))
LARGEST_MESSAGE = 2000
PEAK = 8 << 20  # bytes that a recipe of a few kilobytes may take; the longest take LONGEST
LONGEST = 200 << 20


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


GIVEN = {"apply_fn": apply_fn, "x": X, "loss_fn": lambda params, batch: apply_fn(params, batch).sum()}

VALID = [
    *(path.read_text() for path in sorted((HERE.parent / "experiments" / "recipes").glob("*.yaml"))),
    *re.findall(r'recipes\.parse\("""\n(.*?)"""', (HERE.parent / "README.md").read_text(), re.DOTALL),
    *(GOOD, GOOD + "  structure: {nm: {n: 2, m: 4}}\n  where: {all_of: [kernels, {not: x/*}]}\n"),
    GOOD.replace("0.5", "{cubic: {sparsity: {erk: 0.9}, end_step: 90}}")
    + "  scope: layerwise\ndistillation: {temperature: 4, alpha: 0.9}\nstop: {accuracy: 0.9, macs: 100}\n",
    score("{obs: {damping: 1e-3}}") + "  rewire: {rigl: {every: 3, end_step: 9}}\n",
    score("{over_batches: {score: snip}}") + "  structure: {channels: {min_width: {a: 2}}}\n",
    *(text for text, *_ in UNFIT),
]
NAMES = """
    version study config prune distillation stop score sparsity structure scope where of every floor memory
    seed rewire all_of any_of not per_path cubic linear geometric one_shot constant erk uniform begin_step
    end_step step rate nm blocks slices channels n m axis norm normalize multiple_of rigl set fraction macs
    accuracy temperature alpha fisher chunk over_batches bn_scale stop initial_sparsity elements movement
    synflow grasp lamp obs random power
"""
PATTERNS = "magnitude kernels * */kernel [ [!a] layerwise global isomorphic remaining"
KEYS = [
    *(*NAMES.split(), "a/kernel", "b/kernel", "", "__class__", "__init__", "a.b", "<<", "? "),
    *("kernel\x1b[2J", "\u202e", "é"),
]
WORDS = [*KEYS, *PATTERNS.split()]
NUMBERS = [
    *(0, 1, -1, 2, 3, 4, 5, 8, 100, 2**31, 2**63, 2**64, 10**20, 10**299, 10**310, -(10**400)),
    *(0.0, -0.0, 0.5, 0.9, 1.0, 1.5, 1e-300, 5e-324, 1e308, float("inf"), float("-inf"), float("nan")),
]
SCALARS = [
    *(*NUMBERS, *WORDS, None, True, False),
    *("1e3", "0x10", ".inf", ".nan", "1_000", "~", "on", "12:30", "!!str x"),
]


def random_tree(rng, depth=0):
    """Nested dicts and lists of the keys and values that recipes have, and of some they do not."""
    kind = rng.integers(6) if depth < 4 else 5
    if kind < 2:
        keys = rng.choice(len(KEYS), rng.integers(0, 4), replace=False)
        return {KEYS[key]: random_tree(rng, depth + 1) for key in keys}
    if kind == 2:
        return [random_tree(rng, depth + 1) for _ in range(rng.integers(0, 4))]
    return SCALARS[rng.integers(len(SCALARS))]


def mutated_tree(rng, tree):
    """The tree with a few of its nodes replaced, removed, renamed or added to."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.integers(1, 4)):
        at = tree
        for _ in range(rng.integers(0, 5)):
            inner = [
                v for v in (at.values() if isinstance(at, dict) else at) if isinstance(v, (dict, list)) and v
            ]
            if not inner:
                break
            at = inner[rng.integers(len(inner))]
        places = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not places:
            continue
        place, kind = places[rng.integers(len(places))], rng.integers(5)
        if kind == 0 and isinstance(at, dict):
            at[KEYS[rng.integers(len(KEYS))]] = at.pop(place)
        elif kind == 1:
            del at[place]
        elif kind == 2 and isinstance(at, dict):
            at[KEYS[rng.integers(len(KEYS))]] = random_tree(rng, 2)
        elif kind == 3:
            at[place] = SCALARS[rng.integers(len(SCALARS))]
        else:
            at[place] = random_tree(rng, 2)
    return tree


def odd_objects(rng, tree):
    """The tree with something in it that is no plain data."""
    loop = []
    loop.append({"prune": loop})
    odd = [
        *(10**5000, -(10**4400), b"bytes", {1, 2}, object(), len, jp.scores.magnitude, jp.recipes, int, ...),
        *(np.float32(0.5), np.float64("nan"), np.arange(3), np.int64(3), np.bool_(True), jnp.ones(())),
        *(jnp.ones(2), "\ud800", "\0", "x" * 100_000, 1j, loop, {1: 2}, {None: 0.5}, {"a": {10**5000: 1}}),
        *((1, 2), range(3)),
    ]
    spoiled = copy.deepcopy(tree)
    at = spoiled
    while inner := [
        v for v in (at.values() if isinstance(at, dict) else at) if isinstance(v, (dict, list)) and v
    ]:
        if rng.integers(3) == 0:
            break
        at = inner[rng.integers(len(inner))]
    places = list(at) if isinstance(at, dict) else list(range(len(at)))
    at[places[rng.integers(len(places))]] = odd[rng.integers(len(odd))]
    return spoiled


PIECES = [
    *("[", "]", "{", "}", "*a", "#", "'", '"', ".inf", ".nan", "1e400", "0o7", "on", "null"),
    *("  ", "\n", ": ", "- ", "&a ", "!!python/object/apply:os.system ['true']", "!x ", "---\n", "...\n"),
    *("%YAML 1.1\n", "? ", "|\n", ">\n", '"\\x9b\\ud800"', "<<: *a", ", ", "\t", "\r", "\0", "\x85"),
    *("\u2028", "\ufeff", "\x1b[31m", "9" * 400, "prune:\n"),
]


def mutated_text(rng, text):
    """The text with pieces cut out, doubled, put elsewhere or put in."""
    for _ in range(rng.integers(1, 5)):
        a, b = sorted(rng.integers(0, len(text) + 1, 2).tolist())
        kind = rng.integers(6)
        if kind == 0:
            text = text[:a] + text[min(b, a + 12) :]
        elif kind == 1:
            text = text[:b] + text[a:b] + text[b:]
        elif kind in (2, 3):
            text = text[:a] + PIECES[rng.integers(len(PIECES))] + text[a:]
        elif kind == 4:
            text = text[:a] + WORDS[rng.integers(len(WORDS))] + text[min(b, a + 9) :]
        else:
            lines = text.split("\n")
            line = lines.pop(rng.integers(len(lines)))
            lines.insert(rng.integers(len(lines) + 1), "  " * rng.integers(3) + line)
            text = "\n".join(lines)
    return text


def random_text(rng):
    """Characters, or bytes, or pieces of YAML, in any order."""
    kind = rng.integers(3)
    if kind == 0:
        return "".join(map(chr, rng.integers(0, 0xD800, rng.integers(0, 60))))
    if kind == 1:
        return rng.bytes(int(rng.integers(0, 80)))
    return "".join([*PIECES, *WORDS, "\n  "][i] for i in rng.integers(0, len(PIECES) + len(WORDS) + 1, 20))


def bombs():
    """Texts made to do harm, by what harm."""
    laughs = "".join(f"x{i}: &x{i} [{', '.join([f'*x{i - 1}'] * 9)}]\n" for i in range(1, 30))
    return {
        "billion laughs": "x0: &x0 lol\n" + laughs,
        "a cycle": "prune: &a [*a]\n",
        "brackets": "[" * 100_000,
        "braces": "{" * 100_000,
        "blocks": "".join(" " * i + "a:\n" for i in range(600)),
        "dashes": "- " * 100_000,
        "question marks": "? " * 90_000,
        "a long text": "prune: " + "a" * 190_000,
        "a long quoted text": 'prune: "' + "\\x41" * 45_000 + '"',
        "a long key": "a" * 190_000 + ": 1",
        "many keys": "".join(f"k{i}: 1\n" for i in range(20_000)),
        "many items": "[" + "1," * 90_000 + "]",
        "many spaces": " " * 190_000,
        "many comments": "#\n" * 90_000,
        "many documents": "---\n" * 40_000,
        "a long number": "prune: {sparsity: " + "9" * 190_000 + ", score: magnitude}",
        "a long fraction": "prune: {sparsity: 0." + "9" * 190_000 + ", score: magnitude}",
        "a tag that calls": "prune: !!python/object/apply:os.system ['touch hostile']\n",
        "a tag that makes": "!!python/object/new:subprocess.Popen [['touch', 'hostile']]\n",
        "a module": "prune: {score: !!python/name:os.system , sparsity: 0.5}",
        "a directive": "%YAML 9.9\n---\nprune: 1",
        "a surrogate": "prune: \ud800",
        "a null byte": "prune: \0",
        "a merge": "a: &a {score: magnitude}\nprune: {<<: *a, sparsity: 0.5}",
        "too long": "a: 1\n" * 100_000,
        "a pattern": GOOD + "  where: '" + "*a" * 40 + "*b'\n",
        "a pattern of brackets": GOOD + "  where: '" + "[" * 3000 + "'\n",
        "nots": GOOD + "  where: " + "{not: " * 25 + "kernels" + "}" * 25 + "\n",
        "many steps": "prune: {score: magnitude, sparsity: {cubic: {sparsity: .5, end_step: 2000000000}}}\n",
        "levels without end": "prune: {score: magnitude, sparsity: {geometric: 1e-9}}\n",
        "a huge structure": GOOD + "  structure: {nm: {n: 1, m: 1000000000000}}\n",
        "huge blocks": GOOD + "  structure: {blocks: [1000000000, 1000000000]}\n",
        "a huge seed": GOOD + "  seed: 9" + "0" * 250 + "\n",
    }


def files(folder):
    """Files that are no recipes, by name, with what is to be raised."""
    made = {
        "bytes": bytes(range(256)),
        "utf-16": GOOD.encode("utf-16"),
        "utf-32": GOOD.encode("utf-32"),
        "latin-1": b"prune: \xe9\n",
        "nul": b"prune: \0\n",
        "empty": b"",
        "huge": b"a: 1\n" * 2_000_000,
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return [*(folder / name for name in made), "/dev/zero", "a\0b"], [folder, folder / "none", "x" * 5000]


def check_error(error, name):
    """The message says where, and can be printed anywhere."""
    message = str(error)
    assert re.match(rf"{re.escape(name)}(:\d+)?: ", message), f"no place: {message!r}"
    assert len(message) < LARGEST_MESSAGE, f"{len(message)} characters: {message[:200]!r}"
    assert message.isprintable(), f"not printable: {message!r}"


def outcome(source, watched):
    """Reads a recipe, and makes its pruner: what comes of it, once that is checked."""
    size = len(source) if isinstance(source, (str, bytes)) else 0
    try:
        with watched(PEAK + 1000 * min(size, 200_000)):
            recipe = jp.recipes.parse(source)
    except jp.recipes.RecipeError as error:
        check_error(error, "recipe")
        return "refused"
    with watched(LONGEST):
        assert recipe.end_step is None or recipe.end_step >= 0
        assert jp.recipes.parse(recipe.to_yaml()) == jp.recipes.parse(recipe.data) == recipe
        try:
            pruner = recipe.pruner(PARAMS, **GIVEN)
        except jp.recipes.RecipeError as error:
            check_error(error, "recipe")
            return "does not fit"
    assert isinstance(pruner, jp.Pruner)
    return "accepted"


def case(number, folder, watched):
    """One random recipe."""
    rng = np.random.default_rng(number)
    text = VALID[rng.integers(len(VALID))]
    kind = rng.integers(8)
    if kind == 0:
        source = random_text(rng)
    elif kind in (1, 2):
        source = mutated_text(rng, text)
    elif kind == 3:
        source = mutated_text(rng, WRONG[rng.integers(len(WRONG))][0])
    elif kind == 4:
        source = random_tree(rng)
    elif kind == 5:
        source = odd_objects(rng, yaml.safe_load(text))
    else:
        source = mutated_tree(rng, yaml.safe_load(text))
        if kind == 7:
            source = yaml.safe_dump(source, allow_unicode=bool(rng.integers(2)))
    if not isinstance(source, bytes):
        return outcome(source, watched)
    file = folder / "recipe"
    file.write_bytes(source)
    try:
        with watched(PEAK):
            jp.recipes.load(file)
    except jp.recipes.RecipeError as error:
        check_error(error, str(file))
        return "refused"
    return "accepted"
