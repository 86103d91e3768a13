"""The figures show the numbers that the metrics compute, and read in grey."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure

from clkit import metrics as M
from clkit.errors import ArgumentError
from clkit.metrics import figures
from clkit.report.run_figures import plot_memory_balance, plot_prototype_similarity

NAN = float("nan")


def texts(axes: Any) -> dict[tuple[int, int], str]:
    """Text of each cell, by row and column."""
    cells = {}
    for text in axes.texts:
        column, row = text.get_position()
        cells[int(row), int(column)] = text.get_text()
    return cells


def shaded(axes: Any) -> np.ndarray[Any, Any]:
    """Values of the heat map, NaN where blank."""
    return np.asarray(np.ma.filled(axes.images[0].get_array(), np.nan))


def heights(line: Any) -> np.ndarray[Any, Any]:
    return np.asarray(line.get_ydata())


def labels(ticks: Any) -> list[str]:
    return [tick.get_text() for tick in ticks]


def lightness(colours: Any) -> np.ndarray[Any, Any]:
    rgb = np.atleast_2d(np.asarray(colours))[:, :3]
    return np.asarray(rgb @ [0.299, 0.587, 0.114])


def fed(metric: Any, upto: int = 3) -> Any:
    """Three experiences of two classes, all evaluated at all stages; accuracies 100 % fresh, 50 % otherwise."""
    for stage in range(upto + 1):
        metric.stage = stage
        for experience in range(3):
            targets = torch.tensor([experience, experience, experience + 10, experience + 10])
            wrong = torch.tensor([0, 0, 0, 0]) if experience == stage - 1 else torch.tensor([0, 1, 0, 1])
            metric.update(targets + 100 * wrong, targets, experience)
    return metric


def test_accuracy_matrix_has_percent_in_the_lower_triangle_only() -> None:
    # The future was evaluated too; it is left blank all the same.
    figure, axes = figures.plot_accuracy_matrix([[1.0, 0.3, 0.2], [0.0, 0.955, 0.1], [0.5, NAN, 0.75]], title="nmc")
    assert texts(axes) == {
        (0, 0): "100",
        (1, 0): "0.0",
        (1, 1): "95.5",
        (2, 0): "50.0",
        (2, 2): "75.0",
    }
    np.testing.assert_array_equal(shaded(axes), [[1.0, NAN, NAN], [0.0, 0.955, NAN], [0.5, NAN, 0.75]])
    assert axes.get_xlabel() == "evaluated on experience"
    assert axes.get_ylabel() == "after learning experience"
    assert axes.get_title() == "nmc"
    assert labels(axes.get_xticklabels()) == labels(axes.get_yticklabels()) == ["1", "2", "3"]
    assert isinstance(figure, Figure)


def test_accuracy_matrix_in_grey_only_gets_darker_and_a_zero_is_not_blank() -> None:
    _, axes = figures.plot_accuracy_matrix([[1.0]])
    (image,) = axes.images
    shades = lightness(image.to_rgba(np.linspace(0, 1, 101)[None])[0])
    assert (np.diff(shades) <= 1e-9).all()
    assert shades[0] - shades[-1] > 0.5
    assert shades[0] < 0.95  # white is for cells that were not evaluated
    assert image.get_clim() == (0.0, 1.0)


@pytest.mark.parametrize("value", [0.0, 0.3, 0.5, 0.6, 0.8, 1.0])
def test_numbers_stand_out_from_their_cell(value: float) -> None:
    _, axes = figures.plot_accuracy_matrix([[value]])
    background = lightness(axes.images[0].to_rgba(np.array([[value]]))[0])[0]
    number = 1.0 if axes.texts[0].get_color() == "white" else 0.0
    assert abs(background - number) > 0.4


def test_many_experiences_have_no_numbers_and_fewer_labels() -> None:
    twelve, thirteen = np.full((12, 12), 0.5), np.full((13, 13), 0.5)
    assert len(figures.plot_accuracy_matrix(twelve)[1].texts) == 78
    _, axes = figures.plot_accuracy_matrix(thirteen)
    assert not axes.texts
    assert len(axes.get_xticks()) < 13


def test_matrix_with_one_stage_of_many_and_with_one_fixed_test_set() -> None:
    _, axes = figures.plot_accuracy_matrix([[0.5, None, None]])
    assert texts(axes) == {(0, 0): "50.0"}
    _, axes = figures.plot_accuracy_matrix([[0.5], [0.75]], names=["test set"])
    assert texts(axes) == {(0, 0): "50.0", (1, 0): "75.0"}
    assert labels(axes.get_xticklabels()) == ["test set"]
    assert labels(axes.get_yticklabels()) == ["1", "2"]


def test_matrix_takes_names_of_all_experiences() -> None:
    names = ["classes 0-1", "classes 2-3", "classes 4-5"]
    _, axes = figures.plot_accuracy_matrix([[0.5, NAN, NAN], [0.5, 0.5, NAN]], names=names)
    assert labels(axes.get_xticklabels()) == names
    assert labels(axes.get_yticklabels()) == names[:2]
    with pytest.raises(ArgumentError, match="names has 2 entries: give one for each of the 3 columns"):
        figures.plot_accuracy_matrix([[0.5, NAN, NAN]], names=names[:2])


def test_curves_are_percent_with_gaps_and_names() -> None:
    curves: dict[str, Any] = {"module": [1.0, None, 0.5], "nmc": torch.tensor([0.9, 0.8])}
    _, axes = figures.plot_accuracy_over_time(curves, names=["a", "b", "c"], title="digits")
    first, second = axes.lines
    np.testing.assert_array_equal(first.get_xdata(), [1, 2, 3])
    np.testing.assert_array_equal(heights(first), [100, NAN, 50])
    np.testing.assert_allclose(heights(second), [90, 80], rtol=1e-6)
    legend: Any = axes.get_legend()
    assert labels(legend.get_texts()) == ["module", "nmc"]
    assert labels(axes.get_xticklabels()) == ["a", "b", "c"]
    assert axes.get_ylim() == (0, 100)
    assert "%" in axes.get_ylabel()
    assert axes.get_xlabel() == "after learning experience"
    assert axes.get_title() == "digits"


def test_curves_are_told_apart_without_colour() -> None:
    curves = {str(index): [1.0, 0.5] for index in range(8)}
    _, axes = figures.plot_accuracy_over_time(curves)
    styles = [(line.get_marker(), line.get_linestyle()) for line in axes.lines]
    assert len(set(styles)) == len(styles)
    for one, next_one in pairwise(styles):
        assert one[0] != next_one[0]
        assert one[1] != next_one[1]


def test_malformed_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"matrix has 1 dimensions \(shape \(2,\)\)"):
        figures.plot_accuracy_matrix([1.0, 0.5])
    with pytest.raises(ArgumentError, match=r"curves\['nmc'\] has 2 dimensions"):
        figures.plot_accuracy_over_time({"nmc": [[1.0]]})
    with pytest.raises(ArgumentError, match="names has 1 entries: the longest curve has 2 stages"):
        figures.plot_accuracy_over_time({"nmc": [1.0, 0.5]}, names=["a"])
    with pytest.raises(ArgumentError, match="classes has 1 entries"):
        figures.plot_class_accuracy([[1.0, 0.5]], classes=[3])


def test_confusion_matrix_shades_shares_and_writes_counts() -> None:
    _, axes = figures.plot_confusion_matrix(torch.tensor([[3, 1], [0, 0]]), classes=[3, 900])
    assert texts(axes) == {(0, 0): "3", (0, 1): "1"}  # class 900 has no samples: blank
    np.testing.assert_array_equal(shaded(axes), [[0.75, 0.25], [NAN, NAN]])
    assert labels(axes.get_xticklabels()) == ["3", "900"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")


def test_nothing_evaluated_yet_is_an_empty_frame(tmp_path: Path) -> None:
    for figure, _ in (
        figures.plot_accuracy_matrix(np.zeros((0, 0))),
        figures.plot_accuracy_matrix([[None]]),
        figures.plot_accuracy_over_time({}),
        figures.plot_accuracy_over_time({"nmc": []}),
        figures.plot_confusion_matrix(np.zeros((0, 0)), []),
    ):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 0


# --- what a replay memory holds ---------------------------------------------------------------------------------------


def test_memory_balance_is_a_stair_of_classes_in_their_order_of_arrival() -> None:
    counts = {0: {9: 4}, 1: {9: 2, 4: 2}, 3: {4: 2, 9: 1, 1: 1}, 4: {4: 0, 1: 3}}
    figure, axes = plot_memory_balance(counts, title="er")
    (mesh,) = (part for part in axes.collections if isinstance(part, QuadMesh))
    rows = np.asarray(np.ma.filled(mesh.get_array(), np.nan))
    np.testing.assert_array_equal(rows, [[4, 2, 1, NAN], [NAN, 2, 2, NAN], [NAN, NAN, 1, 3]])
    assert labels(axes.get_xticklabels()) == ["1", "2", "4", "5"]
    assert labels(axes.get_yticklabels()) == ["9", "4", "1"]
    assert axes.get_ylim() == (2.5, -0.5)  # the first class above
    assert (axes.get_xlabel(), axes.get_title()) == ("after experience", "er")
    (scale,) = [other for other in figure.axes if other is not axes]
    assert scale.get_ylabel() == "rows in memory"
    assert labels(scale.get_yticklabels())[-1] == "4"


def test_memory_balance_in_grey_only_gets_darker_and_one_row_is_not_blank() -> None:
    _, axes = plot_memory_balance({rows: {0: rows} for rows in range(1, 102)})
    (mesh,) = (part for part in axes.collections if isinstance(part, QuadMesh))
    shades = lightness(mesh.to_rgba(mesh.get_array())[0])
    assert (np.diff(shades) <= 1e-9).all()
    assert shades[0] < 0.95
    assert shades[0] - shades[-1] > 0.5
    assert shades[4] - shades[9] > 0.05  # five rows and ten can be told apart beside a hundred


def test_memory_balance_of_100_classes_and_experiences_can_be_read(tmp_path: Path) -> None:
    few, axes = plot_memory_balance({e: dict.fromkeys(range(e + 1), 3) for e in range(100)})
    assert len(axes.get_yticks()) == 10
    assert not axes.lines
    few.savefig(tmp_path / "figure.png")
    few.draw_without_rendering()
    for ticks in (few.axes[0].get_yticklabels(), few.axes[0].get_xticklabels()):
        boxes = [tick.get_window_extent() for tick in ticks]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_similarities_are_cosines_and_a_mean_without_direction_is_blank() -> None:
    means = [[2.0, 0.0], [3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]]
    _, axes = plot_prototype_similarity(torch.tensor([3, 8, 9, 70]), torch.tensor(means), title="after 2")
    expected = [[1, 0.6, NAN, -1], [0.6, 1, NAN, -0.6], [NAN] * 4, [-1, -0.6, NAN, 1]]
    np.testing.assert_allclose(shaded(axes), expected, atol=1e-7)
    assert texts(axes)[1, 3] == "\N{MINUS SIGN}0.60"
    assert (2, 2) not in texts(axes)
    assert labels(axes.get_xticklabels()) == labels(axes.get_yticklabels()) == ["3", "8", "9", "70"]
    assert axes.get_title() == "after 2"


@pytest.mark.parametrize(("smallest", "lowest"), [(0.3, 0.0), (0.0, 0.0), (-0.2, -0.5), (-0.7, -1.0), (-1.0, -1.0)])
def test_the_palest_shade_is_the_lowest_cosine_there_can_be(smallest: float, lowest: float) -> None:
    _, axes = plot_prototype_similarity([0, 1], [[1.0, 0.0], [smallest, (1 - smallest**2) ** 0.5]])
    assert axes.images[0].get_clim() == (lowest, 1.0)
    background = lightness(axes.images[0].to_rgba(np.array([[smallest, 1.0]]))[0])
    assert background[0] > background[1]
    for (row, column), text in zip(texts(axes), axes.texts, strict=True):
        number = 1.0 if text.get_color() == "white" else 0.0
        assert abs(background[int(row == column)] - number) > 0.4


def test_a_memory_that_holds_nothing_is_an_empty_frame(tmp_path: Path) -> None:
    for figure, _ in (
        plot_memory_balance({}),
        plot_memory_balance({0: {}, 1: {}}),
        plot_prototype_similarity([], np.zeros((0, 0))),
        plot_prototype_similarity([3], [[0.0]]),
    ):
        figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").stat().st_size > 0


def test_malformed_prototypes_are_refused() -> None:
    with pytest.raises(ArgumentError, match="ids has 1 entries"):
        plot_prototype_similarity([1], [[1.0], [2.0]])
    with pytest.raises(ArgumentError, match="means has 1 dimensions"):
        plot_prototype_similarity([1], [1.0])


def test_figures_of_a_memory_take_axes() -> None:
    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert plot_memory_balance({0: {0: 1}}, ax=right) == (mine, right)
    assert plot_prototype_similarity([0], [[1.0]], ax=left) == (mine, left)
    assert left.images
    assert right.collections


# --- plot() of the metrics --------------------------------------------------------------------------------------------


def test_plots_of_the_tables_show_what_compute_gives() -> None:
    _, axes = fed(M.AccuracyMatrix()).plot()
    assert texts(axes) == {(0, 0): "100", (1, 0): "50.0", (1, 1): "100", (2, 0): "50.0", (2, 1): "50.0", (2, 2): "100"}
    seen = fed(M.AccuracySeen())
    np.testing.assert_allclose(heights(seen.plot()[1].lines[0]), 100 * seen.compute().numpy())
    classes = fed(M.PerClassAccuracy())
    _, axes = classes.plot()
    np.testing.assert_array_equal(shaded(axes), classes.compute().numpy())
    assert (
        labels(axes.get_xticklabels()) == [str(label) for label in classes.classes] == ["0", "1", "2", "10", "11", "12"]
    )
    confusion = fed(M.StreamConfusionMatrix())
    confusion.stage = 1
    _, axes = confusion.plot()
    assert sum(int(text) for text in texts(axes).values()) == int(confusion.compute().sum()) == 12


@pytest.mark.parametrize(
    "metric_class",
    [
        M.AverageIncrementalAccuracy,
        M.FinalAccuracy,
        M.AverageAccuracy,
        M.Forgetting,
        M.BackwardTransfer,
        M.ForwardTransfer,
        M.AMCA,
    ],
)
def test_the_plot_of_a_number_is_its_history(metric_class: type[Any]) -> None:
    _, axes = fed(metric_class()).plot()
    history = [100 * float(fed(metric_class(), upto).compute()) for upto in (1, 2, 3)]
    np.testing.assert_allclose(heights(axes.lines[0]), history)
    assert np.isfinite(history[-1])
    assert "%" in axes.get_ylabel()
    assert axes.get_legend() is None


@pytest.mark.parametrize("metric_class", [M.AccuracyMatrix, M.AccuracySeen, M.StreamConfusionMatrix, M.Forgetting])
def test_plots_take_axes_and_leave_nothing_open(metric_class: type[Any], tmp_path: Path) -> None:
    metric = fed(metric_class())
    before = pyplot.get_fignums()
    figure, axes = metric.plot()
    assert pyplot.get_fignums() == before
    assert axes.figure is figure
    figure.savefig(tmp_path / "figure.png")

    mine = Figure()
    left, right = mine.subplots(1, 2)
    assert metric.plot(ax=right) == (mine, right)
    assert not left.has_data()
    assert right.has_data()
    mine.savefig(tmp_path / "mine.png")


def test_a_colour_scale_says_what_the_shades_mean() -> None:
    figure, axes = fed(M.AccuracyMatrix()).plot()
    (scale,) = [other for other in figure.axes if other is not axes]
    assert scale.get_ylabel() == "accuracy (%)"
    assert labels(scale.get_yticklabels()) == ["0", "25", "50", "75", "100"]
    assert any(isinstance(part, QuadMesh) for part in scale.collections)
