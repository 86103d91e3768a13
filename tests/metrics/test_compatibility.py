"""Compatibility of models: published matrices, retrieval against naive loops and scikit-learn, the objects."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import KFold
from torch import Tensor
from two_ranks import drive, driven, enter_group

from clkit import metrics as M
from clkit.errors import ArgumentError, BatchError
from clkit.metrics import compatibility as C
from clkit.metrics import retrieval
from clkit.metrics.flips import negative_flip_rate

NAN = float("nan")
HOC = [
    [0.58892],
    [0.597, 0.6156],
    [0.6305, 0.65276, 0.69314],
    [0.63336, 0.65298, 0.70626, 0.72374],
    [0.65006, 0.67872, 0.70754, 0.72114, 0.73828],
    [0.6408, 0.67188, 0.71166, 0.72712, 0.74704, 0.76194],
    [0.6314, 0.6635, 0.72096, 0.73496, 0.75232, 0.76652, 0.77164],
]
REPLAY = [
    [0.6342],
    [0.61556, 0.63092],
    [0.11708, 0.1123, 0.72734],
    [0.1143, 0.1053, 0.69232, 0.703],
    [0.0908, 0.07756, 0.09296, 0.08552, 0.74464],
    [0.08512, 0.07364, 0.10338, 0.09524, 0.7226, 0.72312],
    [0.09718, 0.08578, 0.0975, 0.09748, 0.70352, 0.7063, 0.71544],
]
CLASSES = [
    M.CompatibilityMatrix,
    M.AverageCompatibility,
    M.AverageMultiModelAccuracy,
    M.MultiModelAccuracyCurve,
    M.BackwardCompatibility,
    M.ForwardCompatibility,
]
OF = dict(
    zip(
        CLASSES,
        [
            lambda matrix: matrix,
            C.average_compatibility,
            C.average_multi_model_accuracy,
            C.multi_model_accuracy_curve,
            C.backward_compatibility,
            C.forward_compatibility,
        ],
        strict=True,
    )
)


def square(rows: list[list[float]], above: float | None = None) -> list[list[float | None]]:
    return [[*row, *[above] * (len(rows) - len(row))] for row in rows]


# ---- the matrix


@pytest.mark.parametrize("above", [None, 0.0, 0.99])
def test_published_matrix_of_the_simplex(above: float | None) -> None:
    matrix = square(HOC, above)  # what stands above the diagonal is not read
    assert C.average_compatibility(matrix) == pytest.approx(20 / 21)
    assert C.average_multi_model_accuracy(matrix) == pytest.approx(0.68899071, abs=5e-9)
    assert C.backward_compatibility(matrix) == pytest.approx(0.02467333, abs=5e-9)
    assert C.forward_compatibility(matrix) == pytest.approx(-0.01893667, abs=5e-9)
    curve = 100 * C.multi_model_accuracy_curve(matrix).numpy()
    assert curve.round(2).tolist() == [58.89, 60.05, 62.97, 64.94, 66.60, 67.86, 68.90]


def test_published_matrix_of_a_learned_classifier() -> None:
    assert C.average_compatibility(square(REPLAY)) == 0.0
    assert C.average_multi_model_accuracy(square(REPLAY)) == pytest.approx(0.35178929, abs=5e-9)


def test_a_tie_is_incompatible_unless_asked_otherwise() -> None:
    matrix = square([[0.5], [0.5, 0.6], [0.4, 0.7, 0.7]])
    assert C.average_compatibility(matrix) == pytest.approx(1 / 3)
    assert C.average_compatibility(matrix, strict=False) == pytest.approx(2 / 3)


def test_a_score_of_zero_counts_and_there_is_one_unit() -> None:
    # the published code drops zeros (0.55) and takes a perfect matrix for percents
    assert C.average_multi_model_accuracy([[0.5, None], [0.0, 0.6]]) == pytest.approx(1.1 / 3)
    assert C.average_multi_model_accuracy([[1.0, None], [1.0, 1.0]]) == 1.0
    assert C.average_compatibility([[0.0, None], [0.1, 0.0]]) == 1.0


def test_one_model_and_none() -> None:
    assert math.isnan(C.average_compatibility([[0.7]]))
    assert math.isnan(C.backward_compatibility([[0.7]]))
    assert math.isnan(C.forward_compatibility([[0.7]]))
    assert C.average_multi_model_accuracy([[0.7]]) == 0.7
    assert C.multi_model_accuracy_curve([[0.7]]).tolist() == [0.7]
    empty = torch.zeros(0, 0)
    assert math.isnan(C.average_multi_model_accuracy(empty))
    assert C.multi_model_accuracy_curve(empty).shape == (0,)


def test_a_missing_entry_makes_the_value_nan() -> None:
    matrix = [[0.5, None, None], [None, 0.6, None], [0.4, 0.7, 0.7]]
    for function in (C.average_compatibility, C.average_multi_model_accuracy, C.forward_compatibility):
        assert math.isnan(function(matrix))
    assert C.backward_compatibility(matrix) == pytest.approx((0.4 - 0.5 + 0.7 - 0.6) / 2)  # does not need it
    assert C.multi_model_accuracy_curve(matrix)[0] == 0.5
    assert C.multi_model_accuracy_curve(matrix)[1:].isnan().all()
    with pytest.raises(ArgumentError, match=r"matrix has shape \(1, 2\): it must have a row and a column"):
        C.average_compatibility([[0.5, 0.6]])


# ---- scores, against loops


def sides(seed: int, classes: tuple[int, ...] = (0, 1, 2, 3), width: int = 6) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overlapping classes, all of them in the gallery, of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(classes)
    centres = torch.randn(len(ids), width, generator=generator, dtype=torch.float64)

    def part(rows: int) -> tuple[Tensor, Tensor]:
        at = torch.cat([torch.arange(len(ids)), torch.randint(len(ids), (rows,), generator=generator)])
        noise = torch.randn(len(at), width, generator=generator, dtype=torch.float64)
        return 3 * (centres[at] + 1.2 * noise), ids[at]

    return *part(30), *part(20)


def cosines(queries: Tensor, gallery: Tensor) -> Any:
    q, g = queries.numpy(), gallery.numpy()
    return q @ g.T / np.linalg.norm(q, axis=1)[:, None] / np.linalg.norm(g, axis=1)[None]


def naive_identification(queries: Tensor, wanted: Tensor, gallery: Tensor, labels: Tensor) -> float:
    unit = gallery.numpy() / np.linalg.norm(gallery.numpy(), axis=1, keepdims=True)
    templates = {c: unit[labels.numpy() == c].mean(axis=0) for c in set(labels.tolist())}
    templates = {c: each / np.linalg.norm(each) for c, each in templates.items()}
    right = [max(templates, key=lambda c: q @ templates[c]) == y for q, y in zip(queries.numpy(), wanted, strict=True)]
    return float(np.mean(right))


def naive_recall(queries: Tensor, wanted: Tensor, gallery: Tensor, labels: Tensor, k: int) -> float:
    order = np.argsort(-cosines(queries, gallery), axis=1)[:, :k]
    return float(np.mean([(labels.numpy()[row] == int(y)).any() for row, y in zip(order, wanted, strict=True)]))


def naive_map(queries: Tensor, wanted: Tensor, gallery: Tensor, labels: Tensor) -> float:
    scores = cosines(queries, gallery)
    return float(
        np.mean([average_precision_score(labels.numpy() == int(y), s) for s, y in zip(scores, wanted, strict=True)])
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("classes", [(0, 1, 2, 3), (7, 40, 2**40, 3)])
@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_scores_are_those_of_loops_whatever_the_ids_and_blocks(
    seed: int, classes: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # published code takes the number of a template for its class, and gets 0 where ids are not 0 ... n - 1
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    given = sides(seed, classes)
    assert retrieval.identification(*given) == naive_identification(*given)
    assert 0.2 < retrieval.identification(*given) < 1
    for k in (1, 3, 5):
        assert retrieval.recall_at_k(*given, k=k) == naive_recall(*given, k)
    assert retrieval.mean_average_precision(*given) == pytest.approx(naive_map(*given), abs=1e-12)


def test_order_of_the_gallery_does_not_matter_even_with_ties() -> None:
    queries, wanted, gallery, labels = sides(0)
    gallery, labels = torch.cat([gallery, gallery]), torch.cat([labels, labels.flip(0)])  # same rows, other classes
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    for score in (retrieval.identification, retrieval.recall_at_k, retrieval.mean_average_precision):
        shuffled = score(queries, wanted, gallery[order], labels[order])
        assert score(queries, wanted, gallery, labels) == pytest.approx(shuffled, abs=1e-14)


def test_features_that_say_nothing_score_nothing() -> None:
    # a collapsed model: all rows are equally near, so no class may profit from its place in the gallery
    rows, ids = torch.ones(4, 3), torch.arange(4)
    for features in (rows, torch.zeros(4, 3)):
        assert retrieval.identification(features, ids, features, ids) == 0.0
        assert retrieval.recall_at_k(features, ids, features, ids, k=3) == 0.0
        assert retrieval.recall_at_k(features, ids, features, ids, k=4) == 1.0
        assert retrieval.mean_average_precision(features, ids, features, ids) == 0.25


def test_scores_of_ties_are_those_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-1, 2, (20, 3), generator=generator).double() + 0.1
    gallery = torch.randint(-1, 2, (40, 3), generator=generator).double() + 0.1
    labels = torch.arange(40) % 3
    wanted = torch.arange(20) % 3
    found = retrieval.average_precisions(queries, wanted, gallery, labels)
    unit_q, unit_g = (each / each.norm(dim=1, keepdim=True) for each in (queries, gallery))
    scores = (unit_q @ unit_g.T).numpy()
    expected = [average_precision_score(labels.numpy() == int(y), s) for s, y in zip(scores, wanted, strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_unlabelled_rows_are_left_out_and_half_precision_is_read() -> None:
    queries, wanted, gallery, labels = sides(1)
    more = torch.cat([queries, queries[:3]]), torch.cat([wanted, torch.tensor([-1, -1, -1])])
    store = torch.cat([gallery, -gallery[:3]]), torch.cat([labels, torch.tensor([-1, -1, -1])])
    for score in (retrieval.identification, retrieval.recall_at_k, retrieval.mean_average_precision):
        value = score(queries, wanted, gallery, labels)
        assert score(*more, *store) == value
        assert score(queries.half(), wanted, gallery.half(), labels.int()) == pytest.approx(value, abs=0.03)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert score(queries.float(), wanted, gallery.float(), labels) == pytest.approx(value, abs=1e-6)


HOSTILE: list[tuple[dict[int, Any], str]] = [
    ({0: torch.ones(34)}, "queries must be floating-point features"),
    ({2: torch.ones(24, 6).long()}, "gallery must be floating-point features"),
    ({2: torch.ones(24, 5)}, "queries are 6 wide and the gallery 5"),
    ({0: torch.full((34, 6), NAN)}, r"queries has rows \[0, 1, .* not finite"),
    ({1: torch.zeros(33).long()}, "query_labels has 33 entries for 34 rows"),
    ({1: torch.zeros(34)}, "query_labels has shape .*float32"),
    ({3: torch.full((24,), -2)}, "gallery_labels contains -2"),
    ({1: torch.full((34,), 9)}, r"query_labels has classes \[9\], of which the gallery has no row"),
    ({1: torch.full((34,), -1)}, "queries has no labelled rows"),
]


@pytest.mark.parametrize(("changes", "says"), HOSTILE)
def test_sides_that_do_not_fit_are_refused(changes: dict[int, Any], says: str) -> None:
    given = [changes.get(place, side) for place, side in enumerate(sides(0))]
    for score in (retrieval.identification, retrieval.recall_at_k, retrieval.mean_average_precision):
        with pytest.raises(BatchError, match=says):
            score(*given)
    if "labelled" not in says:  # to a metric such a batch is one that counts nothing
        for name in ("verification", "map"):
            metric = M.CompatibilityMatrix(models=1, score=name)  # type: ignore[arg-type]  # a name in a loop
            with pytest.raises(BatchError, match=says):
                metric.update(*given, 0, 0)


@pytest.mark.parametrize("block", [1, 100, 2**24])
def test_the_formal_criterion_as_two_shares(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "_BLOCK", block)
    old, labels = sides(3)[:2]
    new = old + torch.randn(old.shape, generator=torch.Generator().manual_seed(0)).double()
    new[:5], labels[7] = old[:5], -1  # an unchanged feature satisfies either wish
    after, before = cosines(new, old), cosines(old, old)
    found: dict[bool, list[bool]] = {True: [], False: []}
    for i in range(len(old)):
        for j in range(len(old)):
            if i != j and labels[i] >= 0 <= labels[j]:
                same = bool(labels[i] == labels[j])
                nearer = after[i, j] - before[i, j]
                found[same].append(i < 5 or (nearer >= 0 if same else nearer <= 0))
    assert retrieval.pairwise_compatibility(new, old, labels) == (np.mean(found[True]), np.mean(found[False]))
    one_class = retrieval.pairwise_compatibility(new[:2], old[:2], torch.tensor([4, 4]))
    assert one_class[0] == 1.0
    assert math.isnan(one_class[1])
    with pytest.raises(BatchError, match="query_labels has 3 entries for 2 rows"):
        retrieval.pairwise_compatibility(new[:2], old[:3], labels[:3])


# ---- verification


def naive_verification(first: Any, second: Any, same: Any) -> float:
    """The protocol as a loop over folds and thresholds."""
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (first, second)]
    distances = ((unit[0] - unit[1]) ** 2).sum(axis=1)
    accuracies = []
    for train, test in KFold(10, shuffle=False).split(distances):
        rates = [((distances[train] < t) == same[train]).mean() for t in np.arange(0, 4, 0.001)]
        threshold = np.arange(0, 4, 0.001)[int(np.argmax(rates))]
        accuracies.append(((distances[test] < threshold) == same[test]).mean())
    return float(np.mean(accuracies))


@pytest.mark.parametrize("number", [400, 406])  # folds of equal and of unequal size
def test_verification_is_that_of_a_loop(number: int) -> None:
    queries, wanted, gallery, labels = sides(2)
    pairs = retrieval.draw_pairs(wanted, labels, number)
    first, second = queries[pairs.query], gallery[pairs.gallery]
    value = retrieval.verification(first, second, pairs.same)
    assert value == pytest.approx(naive_verification(first.numpy(), second.numpy(), pairs.same.numpy()), abs=1e-12)
    assert 0.5 < value < 1


def test_drawn_pairs_are_balanced_uniform_and_of_their_kind() -> None:
    wanted, labels = torch.tensor([5, 9, -1, 5]), torch.tensor([9, -1, 5, 5, 2])
    pairs = retrieval.draw_pairs(wanted, labels, 20_000)
    assert torch.equal(wanted[pairs.query] == labels[pairs.gallery], pairs.same)
    assert pairs.same.view(10, -1).float().mean(dim=1).tolist() == [0.5] * 10
    assert not {2} & set(pairs.query.tolist())
    assert not {1} & set(pairs.gallery.tolist())
    for kind, expected in (
        (True, {(0, 2): 1 / 6, (0, 3): 1 / 6, (3, 2): 1 / 6, (3, 3): 1 / 6, (1, 0): 1 / 3}),
        (False, {(q, g): 1 / 6 for q in (0, 3) for g in (0, 4)} | {(1, g): 1 / 9 for g in (2, 3, 4)}),
    ):
        found = list(
            zip(pairs.query[pairs.same == kind].tolist(), pairs.gallery[pairs.same == kind].tolist(), strict=True)
        )
        assert set(found) == set(expected)
        for pair, share in expected.items():
            assert found.count(pair) / len(found) == pytest.approx(share, abs=0.015)
    again = retrieval.draw_pairs(wanted, labels, 20_000)
    assert all(torch.equal(one, other) for one, other in zip(pairs, again, strict=True))
    assert not torch.equal(retrieval.draw_pairs(wanted, labels, 20_000, seed=1).query, pairs.query)


def test_pairs_that_cannot_be_drawn_or_verified() -> None:
    ids = torch.tensor([1, 2])
    with pytest.raises(BatchError, match="no pair of one class"):
        retrieval.draw_pairs(ids, torch.tensor([3]))
    with pytest.raises(BatchError, match="no pair of two classes"):
        retrieval.draw_pairs(ids[:1], ids[:1])
    with pytest.raises(ArgumentError, match="number must be an even integer of at least 2, got 3"):
        retrieval.draw_pairs(ids, ids, 3)
    with pytest.raises(ArgumentError, match="folds must be an integer from 2 to the 4 pairs, got 10"):
        retrieval.verification(torch.ones(4, 2), torch.ones(4, 2), torch.ones(4, dtype=torch.bool))
    with pytest.raises(BatchError, match=r"first, second and same must be"):
        retrieval.verification(torch.ones(4, 2), torch.ones(4, 3), torch.ones(4, dtype=torch.bool))
    with pytest.raises(ArgumentError, match="k must be an integer of at least 1, got 0"):
        retrieval.recall_at_k(*sides(0), k=0)


# ---- the objects


def features_of(model: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries and gallery by one of several models of the same images: a later one has less noise."""
    queries, wanted, gallery, labels = sides(seed)
    generator = torch.Generator().manual_seed(100 + model)
    noise = [torch.randn(each.shape, generator=generator).double() for each in (queries, gallery)]
    return queries + 4 / (1 + model) * noise[0], wanted, gallery + 4 / (1 + model) * noise[1], labels


def fed(metric: Any, models: int = 3, batch: int = 1000) -> Any:
    for i in range(models):
        queries, wanted = features_of(i)[:2]
        for j in range(i + 1):
            gallery, labels = features_of(j)[2:]
            for q, y in zip(queries.split(batch), wanted.split(batch), strict=True):
                metric.update(q, y, gallery, labels, query_model=i, gallery_model=j)
    return metric


SCORES: dict[str, Any] = {
    "identification": retrieval.identification,
    "recall": lambda *given: retrieval.recall_at_k(*given, k=3),
    "map": retrieval.mean_average_precision,
}


def matrix_by(score: Any, models: int = 3) -> Tensor:
    matrix = torch.full((models, models), NAN, dtype=torch.float64)
    for i in range(models):
        for j in range(i + 1):
            matrix[i, j] = score(*features_of(i)[:2], *features_of(j)[2:])
    return matrix


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("metric_class", CLASSES)
def test_objects_are_their_functions_whatever_the_batches(metric_class: type[Any], score: str) -> None:
    expected = torch.as_tensor(OF[metric_class](matrix_by(SCORES[score])), dtype=torch.float64)
    for batch in (1000, 7):
        metric = fed(metric_class(models=5, score=score, k=3), batch=batch)  # room for two more models
        torch.testing.assert_close(metric.compute(), expected, rtol=0, atol=1e-12, equal_nan=True)
    twin = pickle.loads(pickle.dumps(metric))
    torch.testing.assert_close(twin.half().compute(), metric.compute(), rtol=0, atol=0, equal_nan=True)
    metric.reset()
    assert not metric.counts.any()


def test_verification_as_the_score_of_a_matrix() -> None:
    matrix = fed(M.CompatibilityMatrix(models=3, score="verification", pairs=200, seed=3), models=2).compute()

    def score(queries: Tensor, wanted: Tensor, gallery: Tensor, labels: Tensor) -> float:
        pairs = retrieval.draw_pairs(wanted, labels, 200, seed=3)
        return retrieval.verification(queries[pairs.query], gallery[pairs.gallery], pairs.same)

    torch.testing.assert_close(matrix, matrix_by(score, 2), rtol=0, atol=1e-12, equal_nan=True)


def test_strict_is_an_argument() -> None:
    rows, ids = torch.eye(2), torch.tensor([0, 1])
    for strict, value in ((True, 0.0), (False, 1.0)):
        metric = M.AverageCompatibility(models=2, strict=strict)
        for i, j in ((0, 0), (1, 0), (1, 1)):
            metric.update(rows, ids, rows, ids, i, j)
        assert float(metric.compute()) == value


def test_one_model_has_a_matrix_of_one_entry() -> None:
    metric = fed(M.CompatibilityMatrix(models=3), models=1)
    assert metric.compute().shape == (1, 1)
    assert fed(M.MultiModelAccuracyCurve(models=3), models=1).compute().shape == (1,)
    assert math.isnan(float(fed(M.AverageCompatibility(models=3), models=1).compute()))


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ((0, 1), "gallery_model is 1 and query_model 0"),
        ((3, 0), "query_model is 3: it must be an integer from 0, below models=3"),
        ((1, -1), "gallery_model is -1"),
        ((True, 0), "query_model is True"),
    ],
)
def test_a_refused_update_changes_nothing(places: tuple[Any, Any], says: str) -> None:
    metric = fed(M.CompatibilityMatrix(models=3))
    before = metric.compute()
    with pytest.raises(BatchError, match=says):
        metric.update(*sides(0), *places)
    with pytest.raises(BatchError, match="not finite"):
        metric.update(sides(0)[0] * NAN, *sides(0)[1:], 2, 1)
    torch.testing.assert_close(metric.compute(), before, rtol=0, atol=0, equal_nan=True)


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ArgumentError, match="models must be an integer from 1 to 10000000, got 0"):
        M.CompatibilityMatrix(models=0)
    with pytest.raises(ArgumentError, match=r"score must be one of 'identification', .*, got 'accuracy'"):
        M.AverageCompatibility(models=2, score="accuracy")  # type: ignore[arg-type]  # what is refused
    with pytest.raises(ArgumentError, match="k must be an integer from 1 to 10000000, got 0"):
        M.CompatibilityMatrix(models=2, score="recall", k=0)


# ---- figures


def cells(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_the_matrix_is_drawn_with_what_is_incompatible_in_brackets() -> None:
    metric = fed(M.CompatibilityMatrix(models=3))
    matrix = metric.compute().numpy()
    figure, axes = metric.plot()
    expected = []
    for i in range(3):
        for j in range(i + 1):
            text = f"{100 * matrix[i, j]:.1f}".replace("100.0", "100")
            expected.append(f"({text})" if i > j and matrix[i, j] <= matrix[j, j] else text)
    assert cells(axes) == expected
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("gallery of model", "queries of model")
    assert np.isnan(np.ma.filled(axes.images[0].get_array(), np.nan)[0, 1])
    assert M.CompatibilityMatrix(models=2).plot(figure.add_subplot())[0] is figure


@pytest.mark.parametrize("metric_class", CLASSES[1:])
def test_numbers_are_drawn_over_the_models(metric_class: type[Any]) -> None:
    _, axes = fed(metric_class(models=3)).plot()
    heights = np.asarray(axes.lines[0].get_ydata())
    of = C.average_multi_model_accuracy if metric_class is M.MultiModelAccuracyCurve else OF[metric_class]
    matrix = matrix_by(retrieval.identification)
    expected = [100 * of(matrix[:number, :number]) for number in (1, 2, 3)]
    np.testing.assert_allclose(heights, expected, atol=1e-9)
    assert axes.get_xlabel() == "number of models"


# ---- flips


def test_negative_flips_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, targets = torch.randint(4, (3, 200), generator=generator)
    targets[:20] = -1
    kept = [(o, n, t) for o, n, t in zip(old.tolist(), new.tolist(), targets.tolist(), strict=True) if t >= 0]
    expected = sum(o == t != n for o, n, t in kept) / len(kept)
    assert negative_flip_rate(old, new, targets) == pytest.approx(expected, abs=1e-15)
    metric = M.NegativeFlipRate()
    for part in zip(old.split(33), new.split(33), targets.split(33), strict=True):
        metric.update(*part)
    assert float(metric.compute()) == pytest.approx(expected, abs=1e-15)
    answers = [(o == t, n == t) for o, n, t in kept]
    assert cells(metric.plot()[1]) == [str(answers.count((was, now))) for was in (False, True) for now in (False, True)]


def test_flips_of_nothing_and_of_what_does_not_fit() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert math.isnan(negative_flip_rate(none, none, none))
    three = torch.tensor([0, 1, 2])
    for given, says in (
        ((three, three[:2], three), "new has 2 entries and targets 3"),
        ((three - 1, three, three), "old contains -1"),
        ((three, three, three - 2), "targets contains -2"),
        ((three.float(), three, three), "old has shape .*float32"),
    ):
        with pytest.raises(BatchError, match=says):
            negative_flip_rate(*given)


# ---- two processes


def scenario(name: str, folder: Path) -> dict[str, Any]:
    rank = enter_group()
    metric = M.CompatibilityMatrix(models=4, score=name)  # type: ignore[arg-type]  # a name that a parameter gives
    flips = M.NegativeFlipRate()
    part = slice(0, 10) if rank == 0 else slice(10, 100)
    for i in range(3):
        for j in range(i + 1):
            queries, wanted = features_of(i)[:2]
            metric.update(queries[part], wanted[part], *features_of(j)[2:], i, j)
    flips.update(torch.tensor([0, rank]), torch.tensor([1, 1]), torch.tensor([0, 0]))
    return {"matrix": metric.compute(), "flips": flips.compute()}


@pytest.mark.parametrize("score", ["identification", pytest.param("map", marks=pytest.mark.slow)])
def test_two_processes_with_parts_of_the_queries_are_one(score: str, tmp_path: Path) -> None:
    for rank in driven(__file__, tmp_path, [score])[score]:
        torch.testing.assert_close(rank["matrix"], matrix_by(SCORES[score]), rtol=0, atol=1e-12, equal_nan=True)
        assert float(rank["flips"]) == 0.75


if __name__ == "__main__":
    sys.exit(drive(scenario))
