"""Hostile results: lines, and the masks beside them, mutated until a report can hardly be made of them."""

import copy
import itertools
import json
import re
from html.parser import HTMLParser

import numpy as np

import jaxprune as jp
from experiments.report import command

TAG = "x-hostile"
MARKUP = [
    *(f"<{TAG}>", f'"><{TAG} onload=alert(1)>', f"</style></title></script><{TAG}>", f"]]><{TAG}>"),
    *(f"&lt;{TAG}&gt;", f"<!--<{TAG}>", f"[a](javascript:{TAG})", f"![a](//{TAG})", f"`<{TAG}>`"),
    *("javascript:alert(1)", "|", "# a", "---", "$\\frac{a}{b}$", "\\", "%s {0}", " ", "", "é" * 300),
    *("\0", "\x1b[2J", "\u202e", "\ud800", "\ufffe", "x" * 10_000),
]
NUMBERS = [
    *(0, 1, -1, 0.5, 1e308, -1e308, 5e-324, 1e-300, 2**53, 2**63, 2**64, 10**400, True, False),
    *(float("nan"), float("inf"), -float("inf"), -0.0),
]
MASKS = [
    *(f"masks/{name}.jp" for name in ("one", "none", "damaged", "huge", "empty", "dense")),
    *("../line.jsonl", "/etc/passwd", "/dev/zero", "masks", "", ".", "\0", f"<{TAG}>", "x" * 5000),
]
OTHER = [
    *(None, [], {}, [[]], [None], [1, "a"], [1e400] * 3),
    *({"a": {"b": {"c": 1}}}, {"a/b": 3}, {"a/b": [3, 2]}, {"": ""}),
]
FIELDS = """
    method sparsity seed accuracy macs layers widths masks config versions command study note level nonzero
    params speed_up compression seconds layers.a a.b bits
"""
FIELDS = [*FIELDS.split(), f"<{TAG}>", "", "\0", "é"]
# What a page is made of; nothing else may be in it, whatever the lines say.
TAGS = """
    html head meta link title style body main h1 h2 h3 h4 p pre code nav ul li a div figure figcaption table
    thead tbody tr th td img svg rect g path defs use text clippath
"""


class Reader(HTMLParser):
    """Fails at whatever a page may not hold."""

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS.split(), f"<{tag}> in the page"
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} in <{tag}>"
            if name in ("href", "xlink:href"):
                assert value.startswith(("#", "data:,")), f"{name}={value[:80]} in <{tag}>"
            if name == "src":
                assert value.startswith("data:image/png;base64,"), f"src={value[:80]}"


def lines():
    """Results as a study writes them."""
    made = [
        {
            "method": method,
            "sparsity": sparsity,
            "seed": seed,
            "accuracy": 0.9 - sparsity / 3,
            "macs": int(1000 * (1 - sparsity)),
            "note": "as it was",
            "layers": {"a/kernel": [int(100 * (1 - sparsity)), 100], "b/kernel": [3, 30]},
            "study": "gradual",
            "config": {"dataset": "digits", "lr": 1e-3, "seeds": [0, 1]},
            "versions": {"jax": "0.1"},
            "command": "python -m experiments.gradual",
        }
        for method, sparsity, seed in itertools.product(("one", "two"), (0.5, 0.9), (0, 1))
    ]
    made[0]["masks"] = "masks/one.jp"
    return made


def prepare(folder):
    """Return the masks beside the lines."""
    masks = folder / "masks"
    masks.mkdir(exist_ok=True)
    jp.io.save(masks / "one.jp", {"a": {f"<{TAG}>": np.eye(6, 5) > 0}, "b": np.ones((3, 3, 2, 2), bool)})
    jp.io.save(masks / "empty.jp", {"a": np.zeros((0, 3), bool), "b": np.zeros((4, 4), bool)})
    jp.io.save(masks / "dense.jp", {"a": np.ones((3, 4), np.float32)})
    jp.io.save(masks / "huge.jp", {"a": np.zeros((40_000, 1000), bool), "b": np.zeros((1, 200_000), bool)})
    (masks / "damaged.jp").write_bytes((masks / "one.jp").read_bytes()[:-9])


def pick(rng, pool):
    return pool[rng.integers(len(pool))]


def value(rng):
    return pick(rng, [MARKUP, NUMBERS, MASKS, OTHER][rng.integers(4)])


def mutated(rng, line):
    """Return the line with fields removed, added, or of other values."""
    line = copy.deepcopy(line)
    for _ in range(rng.integers(0, 3)):
        kind, key = rng.integers(6), pick(rng, FIELDS)
        if kind == 0:
            line.pop(key, None)
        elif kind == 1 and isinstance(line.get("layers"), dict):
            line["layers"][pick(rng, ["a/kernel", f"<{TAG}>", ""])] = pick(
                rng, [*OTHER, *NUMBERS, [1, 2], [0, 0]]
            )
        elif kind == 2:
            outer = pick(rng, ["config", "versions", "method"])
            line[outer] = {pick(rng, FIELDS): value(rng)}
        elif kind == 3:
            line["masks"] = pick(rng, MASKS)
        else:
            line[key] = value(rng)
    return line


def text_of(rng, line):
    """Return the line as JSON, perhaps torn or changed once more."""
    text = json.dumps(line)
    kind = rng.integers(30)
    if kind == 0:
        text = text[: rng.integers(len(text))]
    elif kind == 1:
        text = pick(
            rng, ["[" * 100_000, '{"a":' * 5000, "null", "[]", "3", '"a"', "{}", "{]", '{"a": 1, "a": 2}']
        )
    elif kind == 2:
        text = text.replace("digits", "9" * 5000).replace("0.9", "9" * 5000)
    data = text.encode()
    return rng.bytes(30) if kind == 3 else data


def case(number, folder, watched):
    """Return a report of random results: a page that shows them as text, or a message."""
    rng = np.random.default_rng(number)
    every = [mutated(rng, line) if rng.integers(2) else line for line in lines()]
    if rng.integers(3) == 0:  # the same in all lines
        key, same = pick(rng, FIELDS), value(rng)
        every = [line | {key: same} for line in every]
    data = b"\n".join(text_of(rng, line) for line in every[: rng.integers(1, len(every) + 1)])
    results = folder / "line.jsonl"
    results.write_bytes(data + b"\n" * int(rng.integers(2)))
    page = folder / "out" / "page.html"
    try:
        with watched(None, writes=folder):
            command.report([results], page, page.with_suffix(".md"))
    except command.ReportError as error:
        said = str(error)
        assert said.strip(), "refused without a word"
        assert len(said) < 2000, f"{len(said)} characters: {said[:200]}"
        assert said.isprintable(), f"not printable: {said!r}"
        return "refused"
    check_page(page.read_text())
    check_markdown(page.with_suffix(".md").read_text())
    return "a page"


def check_page(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert "Content-Security-Policy" in text


def check_markdown(text):
    outside = re.sub(r"^(`{3,})bash\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in outside, outside[max(0, outside.index("<") - 99) :][:200]
    assert "](javascript:" not in outside, "a link that runs"
