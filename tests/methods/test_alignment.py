"""Losses between a new and an old model against naive loops in float64, and the map that needs no training.

Run as a program, ``test_alignment.py FOLDER NAME ...``, this file is what two ranks run.
"""

from __future__ import annotations

import copy
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from two_ranks import drive, driven, enter_group

from clkit.errors import ArgumentError, BatchError
from clkit.methods import HOCLoss, SimplexHead, align, distillation_weight, feature_distillation, hoc_total
from clkit.metrics.compatibility import average_multi_model_accuracy
from clkit.metrics.retrieval import identification

NEW = [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]
OLD = [[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [-1.0, 1.0]]
LABELS = [0, 0, 1, 2]
MODES = pytest.mark.parametrize("mode", ["unit", "exclude"])


def naive(new: Any, old: Any, labels: list[int], mode: str, mu: float = 10.0) -> float:
    """The loss as a double loop over pairs."""
    new, old = np.asarray(new, np.float64), np.asarray(old, np.float64)
    total, rows = 0.0, 0
    for n in range(len(old)):
        terms = []
        for m in range(len(new)):
            cosine = old[n] @ new[m] / (np.linalg.norm(old[n]) * np.linalg.norm(new[m]))
            if labels[n] != labels[m]:
                terms.append(math.exp(mu * cosine))
            elif mode == "unit":
                terms.append(1.0)
        if terms:
            own = old[n] @ new[n] / (np.linalg.norm(old[n]) * np.linalg.norm(new[n]))
            total += -mu * own + math.log(sum(terms))
            rows += 1
    return total / max(rows, 1)


def drawn(seed: int, rows: int = 12, width: int = 5, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new, old = torch.randn(2, rows, width, generator=generator, dtype=torch.float64)
    return new, old, torch.randint(classes, (rows,), generator=generator)


# ---- HOC


@pytest.mark.parametrize(("mode", "value"), [("unit", 0.7333390666221142), ("exclude", 0.7326690144489201)])
def test_golden_values(mode: Any, value: float) -> None:
    new, old, labels = torch.tensor(NEW).double(), torch.tensor(OLD).double(), torch.tensor(LABELS)
    found = float(HOCLoss(same_class=mode)(new, old, labels))
    assert found == pytest.approx(naive(NEW, OLD, LABELS, mode), abs=1e-14)
    assert found == pytest.approx(value, abs=1e-7)  # that of rows which were scaled to length 1 in float32


@MODES
@pytest.mark.parametrize("seed", range(5))
def test_value_is_that_of_a_double_loop_and_gradient_that_of_differences(mode: Any, seed: int) -> None:
    new, old, labels = drawn(seed)
    loss = HOCLoss(mu=3.0, same_class=mode)
    assert float(loss(new, old, labels)) == pytest.approx(naive(new, old, labels.tolist(), mode, 3.0), abs=1e-12)
    assert torch.autograd.gradcheck(lambda z: loss(z, old, labels), new.clone().requires_grad_())


@MODES
def test_scale_of_the_features_does_not_matter_and_the_old_model_gets_no_gradient(mode: Any) -> None:
    new, old, labels = drawn(0)
    old.requires_grad_()
    new.requires_grad_()
    value = HOCLoss(same_class=mode)(7 * new, 0.1 * old, labels)
    value.backward()
    assert value.item() == pytest.approx(HOCLoss(same_class=mode)(new, old, labels).item(), abs=1e-12)
    assert old.grad is None
    assert new.grad.abs().sum() > 0


def test_old_and_new_cannot_change_places() -> None:
    new, old, labels = drawn(3, rows=8, width=4, classes=4)
    one, other = float(HOCLoss()(new, old, labels)), float(HOCLoss()(old, new, labels))
    assert one == pytest.approx(naive(new, old, labels.tolist(), "unit"))
    assert abs(one - other) > 0.01


def test_features_on_their_vertices_have_the_closed_form() -> None:
    labels = torch.arange(64) % 8
    rows = SimplexHead(100).prototypes()[labels]
    value = float(HOCLoss()(rows, rows, labels))
    assert value == pytest.approx(-10 + math.log(56 * math.exp(-10 / 99) + 8), abs=1e-12)
    assert value == pytest.approx(-5.9289, abs=5e-5)


def test_pairs_of_a_class_count_one_each() -> None:
    # each same-class pair adds exp(0), the positive too: leaving them out is another number
    new, old, labels = drawn(1, rows=64, width=32, classes=8)
    unit, exclude = (float(HOCLoss(same_class=mode)(new, old, labels)) for mode in ("unit", "exclude"))
    assert 0.01 < unit - exclude < 0.2


@pytest.mark.warns("all 4 rows of a batch are of one class")
@MODES
def test_a_batch_of_one_class(mode: Any) -> None:
    new, old, _ = drawn(2, rows=4)
    new.requires_grad_()
    loss = HOCLoss(same_class=mode)
    value = loss(new, old, torch.zeros(4, dtype=torch.int64))
    value.backward()
    assert torch.isfinite(new.grad).all()
    expected = naive(new.detach(), old, [0] * 4, mode)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    if mode == "exclude":
        assert value.item() == 0.0
        assert not new.grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        loss(new, old, torch.zeros(4, dtype=torch.int64))


@pytest.mark.warns("all 1 rows of a batch are of one class")
def test_a_batch_of_one_row() -> None:
    new, old, _ = drawn(5, rows=1)
    cosine = float(new[0] @ old[0] / new[0].norm() / old[0].norm())
    assert float(HOCLoss()(new, old, torch.tensor([3]))) == pytest.approx(-10 * cosine, abs=1e-12)


def test_zero_features_and_no_rows_are_finite() -> None:
    new, old, labels = drawn(6)
    for rows in (new, old):
        rows[0] = 0
    new.requires_grad_()
    for value in (HOCLoss()(new, old, labels), feature_distillation(new, old)):
        value.backward()
        assert torch.isfinite(value)
        assert torch.isfinite(new.grad).all()
    none = torch.zeros(0, 3)
    assert float(HOCLoss()(none, none, torch.zeros(0, dtype=torch.int64))) == 0.0
    assert float(feature_distillation(none, none)) == 0.0


def test_computed_in_float32_under_autocast() -> None:
    new, old, labels = drawn(7, rows=32, width=64)
    exact = float(HOCLoss()(new, old, labels))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = HOCLoss()(new.float(), old.float(), labels)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(exact, abs=1e-5)
    narrow = HOCLoss()(new.half(), old.half(), labels)
    assert narrow.dtype == torch.float32
    assert float(narrow) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(
    ("new", "old", "labels", "says"),
    [
        (
            torch.ones(2, 3),
            torch.ones(2, 4),
            torch.zeros(2).long(),
            r"old must be .* of shape \(2, 3\), got .*\(2, 4\)",
        ),
        (torch.ones(2, 3), torch.ones(1, 3), torch.zeros(2).long(), r"old must be .* of shape \(2, 3\)"),
        (torch.ones(3), torch.ones(3), torch.zeros(3).long(), "new must be floating-point numbers"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.zeros(3).long(), r"labels must have shape \(2,\), got \(3,\)"),
        (torch.ones(2, 3), torch.ones(2, 3), torch.tensor([0.3, 0.7]), "labels must be integers, got torch.float32"),
    ],
)
def test_batches_that_do_not_fit_are_refused(new: Tensor, old: Tensor, labels: Tensor, says: str) -> None:
    with pytest.raises(BatchError, match=says):
        HOCLoss()(new, old, labels)


def test_totals_and_settings() -> None:
    assert float(hoc_total(torch.tensor(3.0), torch.tensor(-1.0))) == pytest.approx(0.1 * 3 - 0.9)
    assert float(hoc_total(torch.tensor(3.0), torch.tensor(-1.0), lam=1.0)) == 3.0
    with pytest.raises(ArgumentError, match=r"lam must be a number from 0 to 1, got 1\.5"):
        hoc_total(torch.tensor(3.0), torch.tensor(1.0), lam=1.5)
    with pytest.raises(ArgumentError, match="mu must be a finite number above 0"):
        HOCLoss(mu=0.0)
    with pytest.raises(ArgumentError, match="same_class must be one of 'unit', 'exclude', got 'mask'"):
        HOCLoss(same_class="mask")  # type: ignore[arg-type]  # what is refused


# ---- feature distillation


def test_feature_distillation_is_that_of_a_loop() -> None:
    new, old, _ = drawn(8)
    cosines = [float(a @ b / a.norm() / b.norm()) for a, b in zip(new, old, strict=True)]
    assert float(feature_distillation(3 * new, old)) == pytest.approx(1 - np.mean(cosines), abs=1e-12)
    old.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: feature_distillation(z, old), new.clone().requires_grad_())
    assert feature_distillation(old, old.detach() + 1).requires_grad  # the new side has a graph
    assert not feature_distillation(new, old).requires_grad  # the old one none


def test_weight_of_the_distillation() -> None:
    assert distillation_weight(10, 50) == pytest.approx(5 * math.sqrt(0.2))
    assert distillation_weight(5, 5, base=10.0) == 10.0
    with pytest.raises(ArgumentError, match="old_classes must be an integer of at least 1, got 0"):
        distillation_weight(10, 0)


# ---- what they are for


def multi_model_accuracy(seed: int, *, aligned: bool) -> float:
    """AM over all ten classes of the models after five tasks of two classes each, with 20 rows a class to replay."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    centres = torch.randn(10, 32, generator=generator)

    def points(ids: Tensor) -> Tensor:
        return centres[ids] + torch.randn(len(ids), 32, generator=generator)

    ids = torch.arange(10).repeat(40)
    queries, gallery = points(ids), points(ids)
    head = SimplexHead(32, in_features=64)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), head)
    memory: list[tuple[Tensor, Tensor]] = []
    models: list[nn.Module] = []
    for task in range(5):
        y = torch.arange(2 * task, 2 * task + 2).repeat(150)
        x = points(y)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
        sources = [(x, y), tuple(map(torch.cat, zip(*memory, strict=True))) if memory else (x, y)]
        for _ in range(100):
            drawn = [torch.randint(len(each[0]), (32,), generator=generator) for each in sources]
            inputs, labels = (torch.cat([each[k][at] for each, at in zip(sources, drawn, strict=True)]) for k in (0, 1))
            features, logits = model(inputs)
            loss = F.cross_entropy(logits, labels)
            if models and aligned:
                loss = hoc_total(loss, HOCLoss()(features, models[-1](inputs)[0], labels))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        memory += [(x[y == c][:20], y[y == c][:20]) for c in (2 * task, 2 * task + 1)]
        models.append(copy.deepcopy(model).requires_grad_(False))
    matrix = [
        [identification(new(queries)[0], ids, old(gallery)[0], ids) if j <= i else None for j, old in enumerate(models)]
        for i, new in enumerate(models)
    ]
    return average_multi_model_accuracy(matrix)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_contrastive_term_raises_the_accuracy_between_models(seed: int) -> None:
    assert multi_model_accuracy(seed, aligned=True) > multi_model_accuracy(seed, aligned=False)


# ---- Procrustes


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(("wide_old", "wide_new"), [(6, 6), (6, 4), (4, 6)])
def test_align_is_the_best_map_with_orthonormal_rows_or_columns(wide_old: int, wide_new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(40, wide_old, generator=generator, dtype=torch.float64)
    new = torch.randn(40, wide_new, generator=generator, dtype=torch.float64)
    R = align(old, new)
    assert R.shape == (wide_new, wide_old)
    assert R.dtype == torch.float64
    short = min(wide_old, wide_new)
    square = R @ R.T if wide_new <= wide_old else R.T @ R
    torch.testing.assert_close(square, torch.eye(short, dtype=torch.float64), rtol=0, atol=1e-12)
    # optimality, by the polar factor of the cross product: R = U V^T of an SVD of its own
    U, _, V = np.linalg.svd(unit(new).numpy().T @ unit(old).numpy(), full_matrices=False)
    np.testing.assert_allclose(R.numpy(), U @ V, atol=1e-10)
    fit = float((unit(new) @ R * unit(old)).sum())
    for seed in range(20):
        other = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)).double())[0]
        assert fit >= float((unit(new) @ other[:wide_new, :wide_old] * unit(old)).sum())


def test_align_makes_a_rotated_model_searchable_again() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(10, 32, generator=generator)
    ids = torch.arange(200) % 10
    old = centres[ids] + 0.3 * torch.randn(200, 32, generator=generator)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    new = 5 * old @ turn
    gallery, queries = unit(old[:100]), new[100:]

    def accuracy(rows: Tensor) -> float:
        return float((ids[(unit(rows) @ gallery.T).argmax(dim=1)] == ids[100:]).float().mean())

    assert accuracy(queries) < 0.4
    assert accuracy(unit(queries) @ align(old[:100], new[:100])) > 0.95


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (torch.ones(3, 2), torch.ones(2, 2), r"new must be .* of shape \(3, D\)"),
        (torch.ones(0, 2), torch.ones(0, 2), "must have rows of the same images, got none"),
        (torch.ones(2, 2), torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), r"rows \[0\] are not finite"),
        (torch.ones(2), torch.ones(2), "old must be floating-point numbers"),
    ],
)
def test_rows_that_cannot_be_aligned_are_refused(old: Tensor, new: Tensor, says: str) -> None:
    with pytest.raises(BatchError, match=says):
        align(old, new)


# ---- two processes


def scenario(name: str, folder: Path) -> dict[str, Any]:
    rank = enter_group()
    new, old, labels = drawn(9)
    own = slice(0, 5) if rank == 0 else slice(5, 12)  # unequal parts
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    contrast = HOCLoss(same_class=name, gather=True)  # type: ignore[arg-type]  # a name that a parameter gives
    loss = contrast(new[own] @ weight, old[own], labels[own])
    loss.backward()
    dist.all_reduce(weight.grad)
    return {"loss": loss.detach(), "gradient": weight.grad / 2}


@MODES
def test_gathered_batches_have_the_loss_and_the_gradient_of_one(mode: Any, tmp_path: Path) -> None:
    new, old, labels = drawn(9)
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    loss = HOCLoss(same_class=mode)(new @ weight, old, labels)
    loss.backward()
    for rank in driven(__file__, tmp_path, [mode])[mode]:
        torch.testing.assert_close(rank["loss"], loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(rank["gradient"], weight.grad, rtol=0, atol=1e-12)


if __name__ == "__main__":
    sys.exit(drive(scenario))
