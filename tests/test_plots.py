"""Pictures: what is drawn is what was given; without matplotlib a sentence says what to do."""

import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

NAMES = ["small", "_hidden", "$\\frac$", "large"]
RUNS = np.array([[0.98, 0.96], [0.9, 0.8], [0.5, 0.7]])


def png(figure):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=50)
    assert file.getvalue().startswith(b"\x89PNG")


def labels(figure):
    return [text.get_text().strip() for text in figure.legends[0].get_texts()]


def test_a_line_is_the_mean_over_runs_with_one_standard_deviation():
    lines = {name: ([2, 10, 50], RUNS) for name in NAMES}
    figure = jp.plots.curves(lines, x="compression", y="accuracy", percent=True, log=True)
    (axes,) = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_xscale()) == ("compression", "accuracy", "log")
    assert labels(figure) == NAMES
    for line, band in zip(axes.lines, axes.collections, strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * RUNS.mean(axis=1))
        corners = band.get_paths()[0].vertices[:, 1]
        mean, sd = 100 * RUNS.mean(axis=1), 100 * RUNS.std(axis=1)
        np.testing.assert_allclose([corners.min(), corners.max()], [min(mean - sd), max(mean + sd)])
    png(figure)


def test_means_with_a_spread_are_the_same_as_their_runs():
    given = jp.plots.curves({"a": ([1, 2, 3], RUNS.mean(axis=1), RUNS.std(axis=1))}, x="x", y="y")
    runs = jp.plots.curves({"a": ([1, 2, 3], RUNS)}, x="x", y="y")
    bands = [figure.axes[0].collections[0].get_paths()[0].vertices for figure in (given, runs)]
    np.testing.assert_allclose(*bands)


def test_points_that_are_not_joined_have_bars():
    axes = jp.plots.curves({"a": ([1, 2, 3], RUNS)}, x="x", y="y", connect=False).axes[0]
    assert axes.lines[0].get_linestyle() == "None"
    assert len(axes.containers) == 1


def test_panels_share_their_legend_where_their_lines_are_called_the_same():
    lines = {"a": ([1, 2], [0.1, 0.2]), "b": ([1, 2], [0.3, 0.1])}
    figure = jp.plots.panels({"x": lines, "z": lines}, y="y", baseline={"dense": [0.4, 0.6]}, title="title")
    assert labels(figure) == ["a", "b", "dense"]
    assert all(axes.get_legend() is None for axes in figure.axes)
    assert [axes.lines[-1].get_ydata()[0] for axes in figure.axes] == [0.5, 0.5]
    other = jp.plots.panels({"x": lines, "z": {"c": lines["a"]}}, y="y")
    assert [len(axes.get_legend().get_texts()) for axes in other.axes] == [2, 1]
    png(figure)
    png(other)


@pytest.mark.parametrize("values", [[10], [1.1, 1.2], [2, 30], [1, 1e4], [1e-3, 1e6]])
def test_a_logarithmic_axis_has_round_ticks(values):
    axes = jp.plots.curves({"a": (values, [0.5] * len(values))}, x="x", y="y", log=True).axes[0]
    low, high = axes.get_xlim()
    assert low < min(values) and max(values) < high
    assert 1 <= len(axes.get_xticks()) <= 12
    assert all(low <= tick <= high for tick in axes.get_xticks())


def test_many_lines_and_none_are_drawn():
    png(jp.plots.curves({str(i): ([1, 2], [i, 0]) for i in range(20)}, x="x", y="y"))
    png(jp.plots.curves({}, x="x", y="y"))


def test_layers_are_bars_of_what_is_removed():
    figure = jp.plots.layers({"a": 0.25, "b": jnp.array([True, False, False, False]), "$_": np.float32(1)})
    assert [bar.get_width() for bar in figure.axes[0].patches] == [25, 75, 100]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "$_"]
    png(figure)


def test_masks_are_pictures_of_every_kernel():
    rng = np.random.default_rng(0)
    masks = {
        "conv10": rng.random((3, 2, 5, 4)) < 0.5,
        "conv2": {"kernel": rng.random((75, 7)) < 0.5, "bias": np.ones(7, bool)},
        "fc": rng.random((300, 200)) < 0.1,
    }
    found = dict(jp.plots.mask_images(masks))
    assert [caption.split(",")[0] for caption in found] == ["conv2/kernel", "conv2/kernel", "conv10", "fc"]
    pixels, first, filters, blocks = found.values()
    # 75 inputs may be 5 x 5 pixels of 3 colours.
    mask = masks["conv2"]["kernel"]
    expected = np.array([[mask.reshape(5, 5, 3, 7)[i, j].mean() for j in range(5)] for i in range(5)])
    np.testing.assert_allclose(pixels, expected / expected.max())
    np.testing.assert_array_equal(first, mask.T)
    assert filters.shape == (5 * 4 - 1, 4 * 3 - 1)
    for i, o in np.ndindex(5, 4):
        tile = filters[4 * i : 4 * i + 3, 3 * o : 3 * o + 2]
        np.testing.assert_array_equal(tile, masks["conv10"][:, :, i, o])
    assert np.isnan(filters).sum() == filters.size - masks["conv10"].size
    rows, columns = (np.array_split(np.arange(n), 96) for n in (300, 200))
    expected = np.array([[masks["fc"][np.ix_(r, c)].mean() for c in columns] for r in rows])
    np.testing.assert_allclose(blocks, expected / expected.max())
    figure = jp.plots.masks(masks)
    assert sum(bool(axes.images) for axes in figure.axes) == 4
    png(figure)
    with pytest.raises(ValueError, match="no leaf has two or more axes"):
        jp.plots.masks({"bias": jnp.ones(3, bool)})


def test_a_sensitivity_is_a_line_for_each_name():
    params = {name: jax.random.normal(jax.random.key(0), (8, 4)) for name in ("a", "b")}

    def total(params):
        return sum(jnp.abs(leaf).sum() for leaf in params.values())

    result = jp.sensitivity(total, params, levels=(0.25, 0.5), where=lambda path, leaf: True)
    figure = jp.plots.sensitivity(result)
    for line, name in zip(figure.axes[0].lines, ("a", "b"), strict=False):
        assert list(line.get_xdata()) == [point.achieved for point in result.of(name)]
        assert list(line.get_ydata()) == [point.metric for point in result.of(name)]
    png(figure)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: jp.plots.curves({}, x="x", y="y"),
        lambda: jp.plots.layers({"a": 0.5}),
        lambda: jp.plots.masks({"a": jnp.ones((2, 2), bool)}),
    ],
)
def test_without_matplotlib_a_sentence_says_what_to_install(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxprune\[plots\]'"):
        draw()


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import sys, jaxprune; assert 'matplotlib' not in sys.modules; jaxprune.plots.layers({'a': 0.5})"
    code += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
