"""Reports: their numbers are the lines', any lines make one, and a browser shows it."""

import dataclasses
import html.parser
import itertools
import json
import re
import string
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from experiments.report import command, groups
from experiments.report import masks as masks_of
from experiments.report import read as reading
from experiments.report.design import Axis, Design
from experiments.run.results import Results, layers
from tests.support.browser import Browser, NoBrowser


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 0.1


VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """A page taken apart; every tag that is opened must be closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.tags, self.links, self.text = [], [], Counter(), [], []
        self.tables, self.headings = [], []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.ids += [value for key, value in attrs if key == "id"]
        self.links += [value for key, value in attrs if key in ("href", "src", "xlink:href", "action")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if re.fullmatch("h[1-6]", tag):
            self.headings.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if self.open and re.fullmatch("h[1-6]", self.open[-1]):
            self.headings[-1] += data

    def table(self, *heads):
        """The table whose first heads these are, as dicts."""
        found = [t for t in self.tables if tuple(t[0][: len(heads)]) == heads]
        assert len(found) == 1, [t[0] for t in self.tables]
        return [dict(zip(found[0][0], row, strict=True)) for row in found[0][1:]]


def write(file, lines):
    file.parent.mkdir(exist_ok=True, parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def made(folder, *results, markdown=False):
    """The page of results, and its Markdown."""
    out = folder / "report.html"
    command.report(results, out, out.with_suffix(".md") if markdown else None)
    page = Page(out.read_text())
    return (page, out.with_suffix(".md").read_text()) if markdown else page


DESIGN = Design(
    factors=("method",),
    levels=("sparsity",),
    figures=("accuracy", "params"),
    percent=("sparsity", "accuracy"),
    baseline={"method": "dense"},
    axes=(Axis("compression (parameters)", "params", "dense / x"), Axis("sparsity", "sparsity", "x")),
)


def study(seeds=(0, 1, 2), methods=("small", "large"), levels=(0.5, 0.9), **config):
    """Lines as a study's, with figures drawn at random."""
    rng = np.random.default_rng(0)
    common = {
        "study": "toy",
        "config": {"dataset": "digits", "seeds": list(seeds), "lr": 0.1, **config},
        "design": DESIGN.as_json(),
    }
    runs = [("dense", 0.0), *((method, level) for method in methods for level in levels)]
    return [
        {
            "method": method,
            "sparsity": level,
            "seed": seed,
            "accuracy": float(rng.uniform(0.5, 1)),
            "params": round(1000 * (1 - level)),
            "loss": float(rng.normal()),
            **common,
            "versions": {"jax": "1.2.3", "device": "cpu"},
            "command": "python -m toy",
        }
        for method, level in runs
        for seed in seeds
    ]


def test_every_number_of_a_table_is_that_of_the_lines(tmp_path):
    lines = study()
    page, markdown = made(tmp_path, write(tmp_path / "toy.jsonl", lines), markdown=True)

    def expected(figure, factor, digits, **keys):
        own = [factor * x[figure] for x in lines if all(x[k] == v for k, v in keys.items())]
        return f"{np.mean(own):,.{digits}f} ± {np.std(own):,.{digits}f}"

    rows = page.table("method", "sparsity, %", "accuracy, %")
    assert [row["method"] for row in rows] == ["dense", "small", "small", "large", "large"]
    assert [row["sparsity, %"] for row in rows] == ["0", "50", "90", "50", "90"]
    for row in rows:
        keys = {"method": row["method"], "sparsity": float(row["sparsity, %"]) / 100}
        assert row["accuracy, %"] == expected("accuracy", 100, 2, **keys)
        digits = len(row["loss"].split()[0].partition(".")[2])
        assert digits >= 3
        assert row["loss"] == expected("loss", 1, digits, **keys)
        assert row["params"] == f"{next(x['params'] for x in lines if x['sparsity'] == keys['sparsity']):,}"
    by_method = page.table("sparsity, %", "small", "large")
    assert [row["sparsity, %"] for row in by_method] == ["50", "90"]
    for row in by_method:
        for method in ("small", "large"):
            sparsity = float(row["sparsity, %"]) / 100
            assert row[method] == expected("accuracy", 100, 2, method=method, sparsity=sparsity)
    said = " ".join(page.text)
    assert f"Nothing pruned: accuracy {expected('accuracy', 100, 2, method='dense')} %." in said
    assert "15 lines, 3 seeds (0, 1, 2); on cpu." in said
    assert "python -m toy" in said
    assert "jax 1.2.3" in said
    # The Markdown has the same rows.
    found = [line.split("|")[1:-1] for line in markdown.splitlines() if line.startswith("|")]
    assert all(list(row.values()) in [[cell.strip() for cell in cells] for cells in found] for row in rows)
    paths = str(tmp_path)
    assert max(len(line) for line in markdown.splitlines() if paths not in line and line[:1] != "!") <= 80
    for picture in re.findall(r"\]\((.*?)\)", markdown):
        assert picture.startswith("#") or (tmp_path / picture).stat().st_size
    pictures = sorted(p.name for p in (tmp_path / "report_pictures").iterdir())
    assert pictures == ["section-1-curve-1.svg", "section-1-curve-2.svg"]


def test_the_same_results_make_the_same_bytes(tmp_path):
    file = write(tmp_path / "toy.jsonl", study())
    pages = tmp_path / "a.html", tmp_path / "b.html"
    for page in pages:
        command.report([file], page)
    assert pages[0].read_bytes() == pages[1].read_bytes()


def parted(lines):
    read = [reading._line(reading.Path("x.jsonl"), 1, json.dumps(line).encode()) for line in lines]
    return groups.parts(reading.Section("x", {}, read))


ROLES = {
    # Seeds have other accuracies and the same densities; the level comes first, and is enough.
    "ticket": (
        [
            {"method": m, "level": k, "density": 0.8**k, "seed": s, "accuracy": s / 7 + k / 5}
            for m in "ab"
            for k in (0, 1, 2)
            for s in (3, 4)
        ],
        [(["method"], ["level"], ["density", "accuracy"])],
    ),
    "one seed": (
        [{"method": m, "target": t, "seed": 0, "loss": ord(m) / t} for m in "ab" for t in (2, 4)],
        [(["method"], ["target"], ["loss"])],
    ),
    # A name that nobody knows, told by the lines alone.
    "unknown": (
        [{"who": w, "zeta": z, "seed": s, "omega": s + z} for w in "ab" for z in (1, 5) for s in (1, 2)],
        [(["who"], ["zeta"], ["omega"])],
    ),
    "without seeds": (
        [{"way": w, "result": x} for w, x in zip("aabb", (0.3, 0.1, 0.2, 0.7), strict=True)],
        [(["way"], [], ["result"])],
    ),
    "counting": (
        [{"iteration": i, "loss": 1 / (1 + i)} for i in range(9)],
        [([], ["iteration"], ["loss"])],
    ),
    # Each seed has a text of its own, so it says nothing of the design.
    "text of a seed": (
        [{"method": m, "id": f"{m}{s}", "seed": s, "accuracy": s / 5} for m in "ab" for s in (0, 1)],
        [(["method"], [], ["accuracy"])],
    ),
    "kinds of lines": (
        [
            {"what": "agreement", "way": w, "masks": ord(w) / 99} for w in "ab"
        ]
        + [{"what": "speed", "way": w, "over": o, "ratios": [1.5, ord(w) / 9]} for w in "ab" for o in "ab"],
        [(["way"], [], ["masks"]), (["way", "over"], [], ["ratios"])],
    ),
    # The dense network has no criterion, and is the baseline of those that have one.
    "less said of the dense one": (
        [{"method": "dense", "seed": s, "accuracy": 0.9 + s / 50} for s in (0, 1)]
        + [{"method": m, "by": b, "seed": s, "accuracy": s / 9} for m in "ab" for b in "cd" for s in (0, 1)],
        [(["method", "by"], [], ["accuracy"])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_factors_levels_and_figures_are_told_apart(name):
    lines, expected = ROLES[name]
    assert [(part.factors, part.levels, part.figures) for part in parted(lines)] == expected


def test_a_study_declares_the_roles_of_its_fields():
    """What is declared holds, whatever the values look like: here they are whole, and differ by seed."""
    design = Design(("figure", "method"), ("sparsity",), ("accuracy",), baseline={"method": "dense"})
    drops = [{"figure": "drop", "layer": "fc1", "sparsity": 1, "seed": s, "drop": s} for s in (0, 1)]
    ends = [
        {"figure": "end", "method": m, "id": f"{m}{s}", "accuracy": 7}
        | {"sparsity": s, "seed": s, "loss": 3 * s}
        for m, s in itertools.product(("dense", "small"), (0, 1))
    ]
    lines = [drops[0] | {"design": design.as_json()}, *drops[1:], *ends]
    drop, end = parted(lines)
    assert (drop.factors, drop.levels, drop.figures) == ([], [], ["drop"])
    assert (end.factors, end.levels, end.figures) == (["method"], ["sparsity"], ["accuracy", "loss"])
    assert end.remarks == ["id"]
    assert [group.baseline for group in end.groups] == [True, True, False, False]


def test_runs_whose_settings_differ_are_not_averaged(tmp_path):
    lines = [
        *study(seeds=(0, 1), lr=0.1, out="a", methods=("small",)),
        *study(seeds=(2, 3), lr=0.1, out="b", methods=("small",)),
        *study(seeds=(0, 1), lr=0.5, out="c", methods=("small",)),
        *study(seeds=(0, 1), dataset="mnist", methods=("small",)),
    ]
    page = made(tmp_path, write(tmp_path / "runs" / "one.jsonl", lines))
    assert page.headings.count("toy: digits") == page.headings.count("toy: mnist") == 1
    rows = page.table("method", "lr", "sparsity, %", "lines")
    dense = [row for row in rows if row["method"] == "dense"]
    assert [(row["lr"], row["lines"]) for row in dense] == [("0.1", "4"), ("0.5", "2")]
    expected = [("6", "0, 1", "0.1", "a"), ("6", "2, 3", "0.1", "b"), ("6", "0, 1", "0.5", "c")]
    assert [tuple(row.values()) for row in page.table("lines", "seeds", "lr", "out")] == expected


def test_what_is_missing_or_not_finite_is_said(tmp_path):
    figures = {"a0": (0.5, 1), "a1": (0.7, float("nan")), "b0": (None, float("inf")), "b1": (0.1, 2)}
    lines = [
        {"method": key[0], "seed": int(key[1]), "accuracy": a, "loss": b, "note": "of noise"}
        | {"design": DESIGN.as_json()}
        for key, (a, b) in figures.items()
    ]
    lines += [dict(lines[0]), {"method": "c", "seed": 0, "accuracy": float("nan"), "note": "of noise"}]
    page = made(tmp_path, write(tmp_path / "x.jsonl", lines))
    rows = {row["method"]: row for row in page.table("method", "lines")}
    mean, sd = np.mean([50, 70, 50]), np.std([50, 70, 50])
    assert rows["a"]["accuracy, %"] == f"{mean:.2f} ± {sd:.2f}"
    assert rows["b"]["accuracy, %"] == "10.00 [1/2]"
    assert rows["c"]["accuracy, %"] == "-"
    assert (rows["a"]["loss"], rows["b"]["loss"], rows["c"]["loss"]) == ("1.000 [2/3]", "2.000 [1/2]", "-")
    said = " ".join(page.text)
    assert "1 of the lines repeat a seed of their row" in said
    assert "Note: of noise" in said


def test_layers_are_shown_where_each_method_is_sparsest(tmp_path):
    lines = study(seeds=(0, 1))
    for line in lines:
        kept = 100 - round(100 * line["sparsity"]) + line["seed"]
        line["layers"] = {"conv10/kernel": [kept, 110], "conv2/kernel": [2 * kept, 440]}
    page = made(tmp_path, write(tmp_path / "toy.jsonl", lines))
    rows = page.table("layer", "weights", "small", "large")
    assert [row["layer"] for row in rows] == ["conv2/kernel", "conv10/kernel"]
    removed = {
        "conv10/kernel": np.mean([1 - 10 / 110, 1 - 11 / 110]),
        "conv2/kernel": np.mean([1 - 20 / 440, 1 - 22 / 440]),
    }
    for row in rows:
        assert row["small"] == row["large"] == f"{100 * removed[row['layer']]:.2f}"
    widths = re.findall(r'<rect width="([\d.]+)" height="8"/>', (tmp_path / "report.html").read_text())
    assert widths == [f"{100 * removed[row['layer']]:.2f}" for row in rows for _ in range(2)]


def test_masks_that_a_study_keeps_are_pictures(tmp_path):
    rng = np.random.default_rng(0)
    tree = {
        "fc1": {"kernel": jnp.asarray(rng.random((64, 30)) < 0.2), "bias": jnp.ones(30, bool)},
        "conv": {"kernel": jnp.asarray(rng.random((3, 3, 2, 8)) < 0.5)},
    }

    with Results(tmp_path / "run", "toy", Config()) as results:
        file = results.keep_masks("small", tree)
        results.write(method="small", seed=0, accuracy=0.5, layers=layers(tree), masks=file)
        results.write(method="large", seed=0, accuracy=0.6, masks="masks/gone.jp")
        results.write(method="other", seed=0, accuracy=0.7, masks="../../secret")
    line = reading.read([tmp_path / "run"])[0][0]
    assert line.layers["layers"] == {
        "conv/kernel": [int(tree["conv"]["kernel"].sum()), 144],
        "fc1/kernel": [int(tree["fc1"]["kernel"].sum()), 1920],
    }
    loaded = masks_of.load(line)
    assert list(loaded) == ["conv/kernel", "fc1/kernel"]
    jax.tree.map(np.testing.assert_array_equal, loaded["fc1/kernel"], np.asarray(tree["fc1"]["kernel"]))
    page = made(tmp_path, tmp_path / "run")
    said = " ".join(page.text)
    assert page.tags["img"] == 2
    assert f"fc1/kernel, 64 x 30: {np.mean(loaded['fc1/kernel']):.2%} kept" in said
    assert "line 2, cannot be read: there is no such file." in said
    assert "line 3, are not below its folder: ../../secret." in said


def failure(capsys, tmp_path, *arguments):
    with pytest.raises(SystemExit) as caught:
        command.main([*map(str, arguments), "--out", str(tmp_path / "out" / "r.html")])
    assert caught.value.code == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


WRONG = {
    "not JSON": (b'{"a": 1}\nhello\n{"a": 2}\n', "line 2: not a JSON object"),
    "a list": (b'{"a": 1}\n[1]\n', "line 2: not a JSON object (got a list)"),
    "a number, torn": (b'{"a": 1}\n1', "line 2: not a JSON object (got a int)"),
    "not UTF-8": (b'{"a": "\xff"}\n', "line 1: not a JSON object"),
    "deep": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "line 1: not a JSON object"),
    "empty": (b"", "has no line of results"),
    "blank": (b"\n \n", "has no line of results"),
    "torn at once": (b'{"a": 1', "has no line of results"),
}


@pytest.mark.parametrize("name", WRONG)
def test_results_that_are_none_are_refused(name, tmp_path, capsys):
    content, message = WRONG[name]
    file = tmp_path / "x.jsonl"
    file.write_bytes(content)
    error = failure(capsys, tmp_path, file)
    assert str(file) in error
    assert message in error
    assert "Traceback" not in error


def test_folders_and_files_that_are_not_there(tmp_path, capsys):
    assert "there is no such file" in failure(capsys, tmp_path, tmp_path / "none")
    (tmp_path / "folder").mkdir()
    assert "no .jsonl file" in failure(capsys, tmp_path, tmp_path / "folder")
    (tmp_path / "folder" / "results.jsonl").touch()
    assert "nothing to show" in failure(capsys, tmp_path, tmp_path / "folder")
    file = write(tmp_path / "x.jsonl", [{"a": 1}])
    with pytest.raises(reading.ReportError, match="one of the results"):
        command.report([file], file)
    with pytest.raises(reading.ReportError, match="cannot be written"):
        command.report([file], file / "r.html")


def test_a_torn_last_line_is_left_out_and_said(tmp_path, capsys):
    file = write(tmp_path / "run" / "results.jsonl", [{"method": "a", "accuracy": 0.5}])
    file.write_bytes(file.read_bytes() + b'{"method": "a", "accur')
    (tmp_path / "run" / "other.jsonl").touch()
    command.main([str(tmp_path / "run"), str(file), "--out", str(tmp_path / "r.html"), "--markdown", ""])
    said = capsys.readouterr().out
    assert "the last line is torn" in said
    assert "Wrote 1 lines in 1 section" in said
    text = " ".join(Page((tmp_path / "r.html").read_text()).text)
    assert "the last line is torn" in text
    assert "other.jsonl has no line of results." in text
    assert not (tmp_path / "r.md").exists()


HOSTILE = "<script>document.title = 'run'</script>"
KNOWN = "method seed sparsity accuracy layers masks config kept macs params $x_1^"
names = st.sampled_from(KNOWN.split()) | st.text(
    st.characters() | st.sampled_from("<&\"'|`$_\\\0"), max_size=6
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.sampled_from(["dense", "a", HOSTILE, "]]>", "|", "$\\frac", "_x", 10**400, 0.5, 0, 1])
    | st.text(max_size=5)
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
ragged = st.lists(st.dictionaries(names, values, max_size=6), min_size=1, max_size=8)


@given(ragged)
@example(
    [{"method": m, "sparsity": x, "accuracy": y} for m in "ab" for x, y in ((0.5, 1e308), (0.9, -1e308))]
)
@example([{"config": {"study": [None]}, "layers": {"": [1, 1]}, "seed": "x", "widths": {"a": [0, 3]}}])
@settings(deadline=None, max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_lines_make_a_valid_page(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("ragged")
    file = write(folder / "x.jsonl", lines)
    page, _ = made(folder, file, markdown=True)
    # Every line is in one row.
    sections = reading.sections(reading.read([file])[0])
    rows = [group for section in sections for part in groups.parts(section) for group in part.groups]
    assert sorted(line.number for row in rows for line in row.lines) == list(range(1, len(lines) + 1))
    assert page.tags["script"] == 0
    assert all(link.startswith(("#", "data:")) for link in page.links)
    shown = "".join(page.text)
    assert not set(shown) & set(map(chr, range(32))) - set("\n\t\r")
    assert f"{len(lines):,} line" in shown


def test_ten_thousand_lines_make_a_small_page(tmp_path):
    rng = np.random.default_rng(0)
    lines = [
        {"method": m, "step": k, "seed": s, **{f"figure_{i}": float(rng.normal()) for i in range(8)}}
        for m in string.ascii_lowercase[:5]
        for k in range(400)
        for s in range(5)
    ]
    page = made(tmp_path, write(tmp_path / "x.jsonl", lines))
    assert (tmp_path / "report.html").stat().st_size < 2e6
    assert len(page.table("method", "step", "figure_0")) == 400
    assert "the first 400 of 2,000 rows" in " ".join(page.text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    try:
        found = Browser(tmp_path_factory.mktemp("browser"))
    except NoBrowser as reason:
        pytest.skip(str(reason))
    yield found
    found.close()


def test_a_browser_shows_it_whole_and_runs_nothing(browser, tmp_path):
    lines = study(methods=("small", "large", HOSTILE, '"><img src=x onerror="document.title=1">'))
    tree = {"fc1/kernel": np.random.default_rng(0).random((784, 30)) < 0.1}
    with Results(tmp_path / HOSTILE.replace("/", "|"), HOSTILE, Config(), design=DESIGN) as results:
        file = results.keep_masks("small", tree)
        said = ("study", "config", "versions", "command", "design")
        for line in lines:
            own = {key: value for key, value in line.items() if key not in said}
            masks = {"masks": file} if line["sparsity"] == 0.9 else {}
            results.write(**own, layers=layers(tree), **masks)
        results.write(method="javascript:alert(1)", seed=0, sparsity=0.5, accuracy=0.5, **{"long " * 40: 1.5})
    write(tmp_path / "other.jsonl", study(study=HOSTILE))
    made(tmp_path, tmp_path)
    for width in (390, 1280):
        browser.open(tmp_path / "report.html", width, dark=width == 390)
        assert browser.run("document.title").startswith("Results of ")
        # Nothing is wider than the window but tables, which scroll in their boxes.
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        boxes = """[...document.querySelectorAll("h1, h2, p, figure, pre, nav")]
                   .every(x => x.getBoundingClientRect().right <= innerWidth)"""
        assert browser.run(boxes)
        sizes = """[...document.querySelectorAll("img, svg")].map(x => {
                   const box = x.getBoundingClientRect();
                   return [x.tagName, box.width, box.height, x.tagName != "IMG" || x.naturalWidth > 0]; })"""
        pictures = browser.run(sizes)
        assert Counter(name.lower() for name, *_ in pictures)["img"] == 2 * 3 * 4
        assert all(wide > 0 and high > 0 and loaded for _, wide, high, loaded in pictures)
        named = """[...document.querySelectorAll("img, svg:not([aria-hidden])")]
                   .every(x => x.alt || x.getAttribute("aria-label"))"""
        assert browser.run(named)
        curves = """[...document.querySelectorAll("svg[role=img]")].map(x => [...x.querySelectorAll("path")])
                    .map(paths => paths.filter(x => x.getBoundingClientRect().width > 50).length)"""
        assert all(count >= 4 for count in browser.run(curves))
        assert len(browser.run(curves)) == 4
        # Curves are drawn in the colour of the text, which the scheme chooses.
        ink = browser.run("getComputedStyle(document.querySelector('svg[role=img] text')).fill")
        assert ink == browser.run("getComputedStyle(document.body).color")
        assert (ink == "rgb(232, 232, 230)") == (width == 390)
        assert browser.run("document.querySelectorAll('h2').length") == 2
        assert browser.run("document.querySelectorAll('table').length") >= 6
        links = """[...document.querySelectorAll("a")].map(x => x.getAttribute("href"))
                   .every(x => document.querySelector(x))"""
        assert browser.run(links)
        # What is called like a script is text.
        assert browser.run("document.scripts.length") == 0
        assert browser.run("document.querySelectorAll('style').length") == 1
        assert browser.run("[...document.querySelectorAll('*')].every(x => !x.onerror && !x.onload)")
        assert HOSTILE in browser.run("document.body.innerText")
        requests = browser.requests()
        assert requests[0] == (tmp_path / "report.html").as_uri()
        assert all(url.startswith("data:") for url in requests[1:])
        assert browser.complaints() == []


def test_a_copy_of_results_is_noticed(tmp_path):
    lines = study(methods=("small",))
    for name in ("one", "copy"):
        write(tmp_path / "runs" / name / "results.jsonl", lines)
    page = made(tmp_path, tmp_path / "runs")
    assert "9 of the lines say what lines of other files say: given twice, they count twice." in " ".join(
        page.text
    )
