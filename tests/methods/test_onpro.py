"""OnPro's losses against published values, naive loops and finite differences; its replay batches row by row."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from clkit.errors import ArgumentError, BatchError, StateError
from clkit.methods import (
    MixedBatch,
    Mixing,
    OnlinePrototypes,
    ReservoirBuffer,
    instance_contrast,
    mixed_cross_entropy,
    prototype_contrast,
    rotate_views,
    variant_labels,
)
from clkit.methods.replay.contrast import draw_offset
from clkit.methods.replay.mixing import pair_counts, pair_probabilities


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(*values: tuple[float, ...]) -> Tensor:
    return normalize(torch.tensor(values, dtype=torch.float64), dim=1)


def drawn_rows(n: int, width: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(n, width, generator=seeded(seed), dtype=torch.float64), dim=1)


# -- prototypes

FIRST = rows((3, 4, 0), (0, 1, 0), (1, 0, 0), (0, 0.6, 0.8), (2, 1, 2), (1, 2, 2))
SECOND = rows((4, 3, 0), (0, 1, 1), (1, 0, 1), (0, 0.8, 0.6), (1, 2, 2), (2, 2, 1))
LABELS = torch.tensor([0, 0, 1, 1, 3, 3])


def naive_prototype_contrast(first: np.ndarray, second: np.ndarray, labels: list[int], temperature: float) -> float:
    classes = sorted(set(labels))
    units = []
    for view in (first, second):
        for c in classes:
            mean = np.mean([view[i] for i in range(len(labels)) if labels[i] == c], axis=0)
            units.append(mean / np.linalg.norm(mean))
    total = 0.0
    for i in range(len(units)):
        partner = (i + len(classes)) % len(units)
        others = sum(math.exp(units[i] @ units[j] / temperature) for j in range(len(units)) if j != i)
        total -= math.log(math.exp(units[i] @ units[partner] / temperature) / others)
    return total / len(units)


def test_golden_prototype_contrast() -> None:
    first = FIRST.clone().requires_grad_()
    loss, ids, means = prototype_contrast(first, SECOND, LABELS, 0.5)
    loss.backward()
    assert loss.item() == pytest.approx(1.507188058422, abs=1e-11)
    assert ids.tolist() == [0, 1, 3]
    own = torch.tensor([[0.3, 0.9, 0], [0.5, 0.3, 0.4], [0.5, 0.5, 2 / 3]], dtype=torch.float64)
    other = torch.stack([SECOND[i : i + 2].mean(0) for i in (0, 2, 4)])
    assert torch.allclose(means, (own + other) / 2, atol=1e-12)
    expected = [
        (0.0169661129, -0.0056553710, 0.0206455307),
        (0.0314913814, 0.0935083329, -0.1094954765),
        (0.0035832232, -0.0075482874, 0.0029737982),
    ]
    assert first.grad is not None
    assert torch.allclose(first.grad, torch.tensor(expected, dtype=torch.float64).repeat_interleave(2, 0), atol=1e-10)
    four = prototype_contrast(FIRST[:4], SECOND[:4], LABELS[:4], 0.5).loss
    assert four.item() == pytest.approx(0.914552128848, abs=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.integers(-5, 5), min_size=1, max_size=12),
    temperature=st.sampled_from([0.07, 0.5, 2.0]),
    seed=st.integers(0, 1000),
)
def test_prototype_contrast_is_the_naive_loop(labels: list[int], temperature: float, seed: int) -> None:
    first, second = drawn_rows(len(labels), 4, seed), drawn_rows(len(labels), 4, seed + 5000)
    loss, ids, _ = prototype_contrast(first, second, torch.tensor(labels), temperature)
    expected = naive_prototype_contrast(first.numpy(), second.numpy(), labels, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert ids.tolist() == sorted(set(labels))


def test_one_class_is_exactly_zero_without_a_gradient() -> None:
    for n in (1, 6):
        first, second = FIRST[:n].clone().requires_grad_(), SECOND[:n].clone().requires_grad_()
        loss = prototype_contrast(first, second, torch.full((n,), 4)).loss
        loss.backward()
        assert loss.item() == 0.0
        for rows_ in (first, second):
            assert rows_.grad is not None
            assert torch.equal(rows_.grad, torch.zeros(n, 3, dtype=torch.float64))


def test_no_rows_are_zero_with_a_graph() -> None:
    embeddings = torch.zeros(0, 4, requires_grad=True)
    loss, ids, means = prototype_contrast(embeddings, embeddings, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0.0
    assert ids.numel() == 0
    assert means.shape == (0, 4)


def test_a_prototype_of_length_zero_keeps_its_class() -> None:
    opposite = rows((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 1)).requires_grad_()
    labels = torch.tensor([0, 0, 1, 2])
    loss = prototype_contrast(opposite, opposite, labels, 0.5).loss
    loss.backward()
    zero = -math.log(1 / 5)  # similarity 0 with everybody
    other = -math.log(math.exp(2) / (math.exp(2) + 4))
    assert loss.item() == pytest.approx((zero + 2 * other) / 3, abs=1e-12)
    assert opposite.grad is not None
    assert float(opposite.grad.abs().max()) < 10


def test_gradients_of_prototypes_are_finite_differences() -> None:
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: prototype_contrast(a, b, LABELS, 0.3).loss, (first, second))


# -- instances

EMBEDDINGS = rows((1, 2), (2, 1), (1, 0), (0, 1), (1, 1), (2, 1), (1, -1), (-1, 2))
FEATURES = rows((1, 0, 2), (0, 1, 1), (1, 1, 0), (2, 1, 0), (1, 1, 1), (0, 2, 1), (2, 0, 1), (1, 2, 2))
VARIANTS = torch.tensor([0, 1, 0, 2])


def naive_instance_contrast(
    z: np.ndarray, f: np.ndarray, labels: list[int], form: str, offset: int, temperature: float, scale: float
) -> float:
    rows_, half = len(z), len(labels)
    labels = [*labels, *labels]
    epsilon = 1e-8
    cost = np.zeros((rows_, rows_))
    for i in range(rows_):
        a = [
            scale * (z[i] @ (f[j] / np.linalg.norm(f[j]))[offset : offset + z.shape[1]] + z[i] @ z[j])
            for j in range(rows_)
        ]
        e = [math.exp((value - max(a)) / temperature) for value in a]
        if form == "new":
            e[i] = 0.0
        cost[i] = [-math.log(value / (sum(e) + epsilon) + epsilon) for value in e]
    same = 0.0
    for i in range(rows_):
        positives = [j for j in range(rows_) if labels[j] == labels[i]]
        same += sum(cost[i, j] / (len(positives) + epsilon) for j in positives) / rows_
    if form == "memory":
        return same
    return float(np.mean([cost[i, (i + half) % rows_] for i in range(rows_)])) + 2 * same


@pytest.mark.parametrize(
    ("scale", "form", "value", "norm", "row"),
    [
        (1.0, "new", 29.0158405669, 10.56960758, (-3.44985853, 5.54082989)),
        (1.0, "memory", 6.8380114313, 4.60536912, (-1.23475634, 3.54266386)),
        (0.5, "new", 22.7077312298, 6.48703233, (-2.04732052, 3.49785262)),
        (0.5, "memory", 4.2035576174, 2.85629895, (-0.71305831, 2.00879071)),
    ],
)
def test_golden_instance_contrast(scale: float, form: str, value: float, norm: float, row: tuple[float, float]) -> None:
    z = EMBEDDINGS.clone().requires_grad_()
    loss = instance_contrast(z, FEATURES, VARIANTS, form=form, offset=1, scale=scale)
    loss.backward()
    assert z.grad is not None
    assert loss.item() == pytest.approx(value, abs=1e-9)
    assert z.grad.norm().item() == pytest.approx(norm, abs=1e-7)
    assert z.grad[0].tolist() == pytest.approx(row, abs=1e-7)


@settings(max_examples=30, deadline=None)
@given(
    labels=st.lists(st.integers(-3, 3), min_size=1, max_size=6),
    form=st.sampled_from(["new", "memory"]),
    offset=st.integers(0, 2),
    temperature=st.sampled_from([0.07, 0.5]),
    scale=st.sampled_from([0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_instance_contrast_is_the_naive_loop(
    labels: list[int], form: str, offset: int, temperature: float, scale: float, seed: int
) -> None:
    z = drawn_rows(2 * len(labels), 3, seed)
    f = torch.randn(2 * len(labels), 5, generator=seeded(seed + 5000), dtype=torch.float64)
    loss = instance_contrast(z, f, torch.tensor(labels), form=form, offset=offset, temperature=temperature, scale=scale)
    expected = naive_instance_contrast(z.numpy(), f.numpy(), labels, form, offset, temperature, scale)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_the_diagonal_of_new_rows_is_a_constant_without_a_gradient() -> None:
    """One image whose two views are alike: what is left is the diagonal's share and nothing to learn."""
    z = rows((1, 0), (1, 0)).requires_grad_()
    loss = instance_contrast(z, torch.ones(2, 2, dtype=torch.float64), torch.tensor([0]), form="new")
    loss.backward()
    assert loss.item() == pytest.approx(2 * -math.log(1e-8) / 2, abs=1e-6)
    assert z.grad is not None
    assert float(z.grad.abs().max()) < 1e-6


def plain_instance_contrast(z: Tensor, f: Tensor, labels: Tensor, form: str, temperature: float) -> Tensor:
    """With all of its matrices, each made by itself, for autograd to differentiate."""
    both = torch.cat([labels, labels])
    scores = z @ normalize(f, dim=1)[:, 1 : 1 + z.shape[1]].T + z @ z.T
    weights = ((scores - scores.detach().max(dim=1, keepdim=True).values) / temperature).exp()
    if form == "new":
        weights = weights * (1 - torch.eye(len(z), dtype=z.dtype))
    costs = -(weights / (weights.sum(dim=1, keepdim=True) + 1e-8) + 1e-8).log()
    same = (both[:, None] == both).to(z.dtype)
    total = (same * costs / (same.sum(dim=1, keepdim=True) + 1e-8)).sum() / len(z)
    partners = costs[torch.arange(len(z)), torch.arange(len(z)).roll(len(labels))]
    return total if form == "memory" else partners.mean() + 2 * total


@pytest.mark.parametrize("form", ["new", "memory"])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_gradients_of_instances_are_those_of_the_plain_matrices(form: str, temperature: float) -> None:
    labels = torch.randint(-2, 9, (40,), generator=seeded())
    z, f = drawn_rows(80, 6), 3 * torch.randn(80, 9, generator=seeded(1), dtype=torch.float64)
    gradients = []
    for loss_of in (
        lambda z, f: instance_contrast(z, f, labels, form=form, offset=1, temperature=temperature),
        lambda z, f: plain_instance_contrast(z, f, labels, form, temperature),
    ):
        leaves = z.clone().requires_grad_(), f.clone().requires_grad_()
        gradients.append(torch.autograd.grad(3 * loss_of(*leaves), leaves))
    for ours, plain in zip(*gradients, strict=True):
        assert float((ours - plain).norm() / plain.norm()) < 1e-11


def test_the_gradient_of_instances_can_be_asked_for_again() -> None:
    z = EMBEDDINGS.clone().requires_grad_()
    loss = instance_contrast(z, FEATURES, VARIANTS, form="new")
    first, again, graph = (torch.autograd.grad(loss, z, retain_graph=True, create_graph=i == 2)[0] for i in range(3))
    assert torch.equal(first, again)
    assert torch.equal(first, graph)
    with torch.no_grad():
        assert torch.equal(instance_contrast(z, FEATURES, VARIANTS, form="new"), loss)


def test_offsets_are_uniform_below_the_difference_and_nothing_is_drawn_for_equal_widths() -> None:
    generator = seeded()
    offsets = [draw_offset(7, 4, generator) for _ in range(300)]
    assert set(offsets) == {0, 1, 2}
    before = generator.get_state()
    assert draw_offset(4, 4, generator) == draw_offset(3, 4, generator) == 0
    assert torch.equal(generator.get_state(), before)


def test_variant_labels_follow_the_rows_of_rotated_views() -> None:
    labels = torch.tensor([2, 0, 4])
    images = labels[:, None, None, None].expand(3, 1, 4, 4)
    ids = variant_labels(labels, 16, 5)
    assert torch.equal(ids % 5, rotate_views(images)[:, 0, 0, 0])
    assert (ids // 5).tolist() == [k for k in range(16) for _ in range(3)]


def test_mixed_rows_are_classes_of_their_own() -> None:
    """Floats would have to be compared for it: (1 - share) a + share b misses a even where a = b."""
    share = torch.tensor([0.3, 0.7, 0.0, 0.3, 1.0])
    batch = MixedBatch(torch.zeros(5, 1), torch.tensor([1, 1, 1, 2, 0]), torch.tensor([2, 1, 2, 1, 3]), share)
    assert batch.mixed.tolist() == [True, False, False, True, True]
    ids = variant_labels(batch.first, 4, 4, batch.mixed)
    for k in range(4):
        block = ids[5 * k : 5 * k + 5]
        assert block[1] == block[2] == 1 + 4 * k
    own = ids[batch.mixed.repeat(4)]
    assert own.unique().numel() == 12
    assert int(own.min()) >= 16
    assert not MixedBatch.pure(torch.zeros(2, 1), torch.tensor([0, 1])).mixed.any()


def test_equality_of_labels_decides_not_their_size() -> None:
    """Labels 0, 1.3, 0, 2 as a float-comparing implementation has them: fresh ids give the same loss."""
    fresh = variant_labels(VARIANTS, 1, 3, torch.tensor([False, True, False, False]))
    assert fresh.tolist() == [0, 4, 0, 2]
    loss = instance_contrast(EMBEDDINGS, FEATURES, fresh, form="memory", offset=1)
    assert loss.item() == pytest.approx(6.8380114313, abs=1e-9)


# -- cross-entropy


def test_golden_mixed_cross_entropy() -> None:
    logits = torch.tensor([[2.0, 0, -1], [0, 1, 0]], dtype=torch.float64)
    share = torch.tensor([0.25, 0.4], dtype=torch.float64)
    loss = mixed_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([2, 1]), share)
    assert loss.item() == pytest.approx(0.7356453667, abs=1e-10)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_pure_rows_are_ordinary_cross_entropy(share: float) -> None:
    logits = torch.randn(6, 4, generator=seeded(), dtype=torch.float64)
    a, b = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 2, 1, 1, 0])
    expected = torch.nn.functional.cross_entropy(logits, b if share else a)
    shares = torch.full((6,), share, dtype=torch.float64)
    assert torch.allclose(mixed_cross_entropy(logits, a, b, shares), expected, rtol=1e-14)


def test_gradient_of_mixed_cross_entropy() -> None:
    logits = torch.randn(4, 3, generator=seeded(), dtype=torch.float64, requires_grad=True)
    share = torch.rand(4, generator=seeded(), dtype=torch.float64)
    a, b = torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda x: mixed_cross_entropy(x, a, b, share), logits)


# -- precision and refusals, all losses

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "prototypes": lambda z, f: prototype_contrast(z[:4], z[4:], VARIANTS).loss,
    "new": lambda z, f: instance_contrast(z, f, VARIANTS, form="new"),
    "memory": lambda z, f: instance_contrast(z, f, VARIANTS, form="memory"),
    "cross-entropy": lambda z, f: mixed_cross_entropy(f, torch.arange(8) % 3, torch.arange(8) % 2, f[:, 0].sigmoid()),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_losses_are_float32_or_float64_inside_autocast(name: str, dtype: torch.dtype) -> None:
    z, f = drawn_rows(8, 12).to(dtype), drawn_rows(8, 16, 1).to(dtype)
    exact = LOSSES[name](z.double(), f.double())
    with torch.autocast("cpu", torch.bfloat16):
        loss = LOSSES[name](z, f)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # the share of the cross-entropy above is itself of the low dtype
    tolerance = 2e-3 if name == "cross-entropy" and dtype in (torch.bfloat16, torch.float16) else 3e-6
    assert loss.item() == pytest.approx(exact.item(), rel=1e-13 if dtype == torch.float64 else tolerance)


def test_losses_of_no_rows_are_zero_with_a_graph() -> None:
    z, f = torch.zeros(0, 2, requires_grad=True), torch.zeros(0, 3, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    for form in ("new", "memory"):
        loss = instance_contrast(z, f, none, form=form)
        assert loss.item() == 0.0
        loss.backward()
    loss = mixed_cross_entropy(f, none, none, torch.zeros(0))
    assert loss.item() == 0.0
    loss.backward()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: prototype_contrast(FIRST, SECOND, LABELS.float()), "labels must be integer"),
        (lambda: prototype_contrast(FIRST, SECOND, LABELS[:3]), r"labels must have shape \(6,\)"),
        (lambda: prototype_contrast(FIRST, SECOND[:, :2], LABELS), "second must be"),
        (lambda: prototype_contrast(FIRST[0], SECOND, LABELS), "first must be"),
        (lambda: instance_contrast(EMBEDDINGS, FEATURES, VARIANTS, form="new", offset=2), "offset=2"),
        (lambda: instance_contrast(EMBEDDINGS, FEATURES[:, :1], VARIANTS, form="new"), "project to at most"),
        (lambda: instance_contrast(EMBEDDINGS[:7], FEATURES[:7], VARIANTS[:3], form="new"), "two views"),
        (lambda: instance_contrast(EMBEDDINGS, FEATURES[:7], VARIANTS, form="new"), r"shape \(8, D\)"),
        (lambda: instance_contrast(EMBEDDINGS, FEATURES, VARIANTS.repeat(2), form="new"), "labels must have shape"),
        (lambda: mixed_cross_entropy(FEATURES[:4], VARIANTS, VARIANTS + 1, torch.zeros(4)), "3 outputs, got 3"),
        (lambda: mixed_cross_entropy(FEATURES[:4], VARIANTS - 1, VARIANTS, torch.zeros(4)), "first.*got -1"),
        (lambda: mixed_cross_entropy(FEATURES[:4], VARIANTS, VARIANTS, torch.zeros(3)), "share"),
    ],
)
def test_batches_that_do_not_fit_are_refused(call: Callable[[], object], match: str) -> None:
    with pytest.raises(BatchError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: prototype_contrast(FIRST, SECOND, LABELS, 0.0), "temperature"),
        (lambda: instance_contrast(EMBEDDINGS, FEATURES, VARIANTS, form="old"), "form"),
        (lambda: instance_contrast(EMBEDDINGS, FEATURES, VARIANTS, form="new", scale=0), "scale"),
        (lambda: OnlinePrototypes(Mixing(base_rate=1.2)), "base_rate"),
        (lambda: OnlinePrototypes(Mixing(probability=math.nan)), "probability"),
        (lambda: OnlinePrototypes(Mixing(alpha=0)), "alpha"),
        (lambda: OnlinePrototypes(Mixing(pair_rule="sorted")), "pair_rule"),
        (lambda: OnlinePrototypes(Mixing(pure_class="last")), "pure_class"),
        (lambda: OnlinePrototypes(Mixing(probability_rule="twice")), "probability_rule"),
        (lambda: pair_counts(torch.zeros(0), 3, seeded()), "probabilities"),
        (lambda: pair_counts(torch.tensor([math.nan, 0.5]), 3, seeded()), "probabilities"),
    ],
)
def test_options_are_checked(call: Callable[[], object], match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        call()


# -- pairs

MEANS = torch.tensor([[0.9, 0.1, 0], [0.8, 0.3, 0.1], [0, 0.9, 0.2], [-0.5, 0.1, 0.7]], dtype=torch.float64)


def test_golden_pairs() -> None:
    pairs, probabilities = pair_probabilities(MEANS.float())  # the published digits are those of float32 means
    assert pairs.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    expected = [0.8385445656, 0.0320858998, 0.0267908741, 0.0382529979, 0.0282445126, 0.0360811500]
    assert probabilities.tolist() == pytest.approx(expected, abs=1e-10)
    generator = seeded()
    before = generator.get_state()
    assert pair_counts(probabilities, 16, generator).tolist() == [13, 1, 0, 1, 0, 1]
    assert torch.equal(generator.get_state(), before)  # nothing to repair


def test_coincident_means_share_everything() -> None:
    _, probabilities = pair_probabilities(torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]]))
    assert probabilities.tolist() == [0.5, 0, 0, 0, 0, 0.5]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=30),
    total=st.integers(0, 80),
    rule=st.sampled_from(["round", "multinomial"]),
    seed=st.integers(0, 1000),
)
def test_counts_always_add_up(weights: list[float], total: int, rule: str, seed: int) -> None:
    probabilities = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    counts = pair_counts(probabilities, total, seeded(seed), rule=rule)
    assert int(counts.sum()) == total
    assert int(counts.min()) >= 0
    assert counts.shape == probabilities.shape
    if rule == "round":  # at most half of the pairs need a repair, so that one round is enough
        repairs = counts.numpy() - np.round(probabilities.numpy() * total)
        assert set(repairs) <= {0, 1} or set(repairs) <= {0, -1}


def test_repairs_take_distinct_pairs_and_only_full_ones() -> None:
    even = torch.full((4,), 0.25, dtype=torch.float64)
    for seed in range(20):
        added = pair_counts(even, 6, seeded(seed))  # 1.5 rounds to 2: two too many
        assert sorted(added.tolist()) == [1, 1, 2, 2]
        few = pair_counts(even, 1, seeded(seed))  # all round to zero
        assert sorted(few.tolist()) == [0, 0, 0, 1]
        # 1.5 three times rounds to one too many, and there is nothing to take from the last two
        several = pair_counts(torch.tensor([0.3, 0.3, 0.3, 0.05, 0.05], dtype=torch.float64), 5, seeded(seed))
        assert sorted(several.tolist()) == [0, 0, 1, 2, 2]
        assert several[3:].tolist() == [0, 0]


def test_rounding_forgets_the_distances_of_many_classes_and_the_multinomial_rule_does_not() -> None:
    probabilities = torch.cat([torch.tensor([0.02]), torch.full((98,), 0.01)]).double()
    for rule, expected in (("round", 7 / 99), ("multinomial", 0.14)):
        generator, first = seeded(), 0
        for _ in range(3000):
            first += int(pair_counts(probabilities, 7, generator, rule=rule)[0])
        assert first / 3000 == pytest.approx(expected, abs=0.022)


# -- replay batches


class Shelf:
    """A memory whose row n is the image (label, n)."""

    def __init__(self, labels: list[int], dtype: torch.dtype = torch.float32) -> None:
        self.labels = torch.tensor(labels)
        numbers = torch.arange(len(labels))
        self.images = torch.stack([self.labels, numbers], dim=1).to(dtype).reshape(-1, 1, 1, 2)
        self.asked: list[int] = []

    def classes(self) -> list[int]:
        return sorted(set(self.labels.tolist()))

    def sample_classes(self, class_ids: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.asked += class_ids.tolist()
        chosen = []
        for class_id in class_ids.tolist():
            own = torch.nonzero(self.labels == class_id).flatten()
            chosen.append(int(own[torch.randint(len(own), (), generator=generator)]))
        at = torch.tensor(chosen, dtype=torch.int64)
        return self.images[at], self.labels[at]


FULL = [0] * 12 + [2] * 9 + [5] * 8 + [9] * 3
KNOWN = torch.tensor([0, 2, 5, 9])


def mixed(seed: int = 0, *, labels: list[int] | None = None, size: int | None = None, ids: Tensor = KNOWN, **options):
    """A batch from a whole shelf as sample, and the shelf."""
    shelf = Shelf(FULL if labels is None else labels)
    prototypes = OnlinePrototypes(Mixing(**options))
    if len(ids):
        prototypes.keep(ids, MEANS[: len(ids)])
    return prototypes.mix(shelf.images, shelf.labels, shelf, seeded(seed), size=size), shelf


def check_rows(batch: MixedBatch, size: int, *, own_labels: bool = True) -> None:
    """Size, ranges, and that an image is the mixture that labels and share say."""
    assert len(batch.images) == len(batch.first) == len(batch.second) == len(batch.share) == size
    assert batch.first.dtype == batch.second.dtype == torch.int64
    assert float(batch.share.min()) >= 0
    assert float(batch.share.max()) <= 1
    expected = (1 - batch.share) * batch.first + batch.share * batch.second
    assert torch.allclose(batch.images[:, 0, 0, 0], expected, atol=1e-5)
    assert set(batch.first.tolist()) | set(batch.second.tolist()) <= {0, 2, 5, 9}


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 70),
    base_rate=st.sampled_from([0.0, 0.5, 0.75, 0.9, 1.0]),
    probability=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    pair_rule=st.sampled_from(["round", "multinomial"]),
    pure_class=st.sampled_from(["first", "either"]),
    probability_rule=st.sampled_from(["squared", "once"]),
    known=st.sampled_from([2, 3, 4]),
)
def test_every_batch_is_whole(seed: int, size: int, known: int, base_rate: float, **options: object) -> None:
    batch, shelf = mixed(seed, size=size, ids=KNOWN[:known], base_rate=base_rate, **options)
    check_rows(batch, size)
    base = min(int(size * base_rate), len(FULL))
    assert len(shelf.asked) == 2 * (size - base)
    assert set(batch.first[base:].tolist()) <= set(KNOWN[:known].tolist())


def test_base_rows_are_distinct_rows_mixed_with_distinct_partners() -> None:
    batch, shelf = mixed(1, base_rate=1.0, probability=1.0, size=20, probability_rule="once")
    check_rows(batch, 20)
    assert not shelf.asked
    assert float(batch.share.max()) < 0.6
    assert float(batch.share.min()) > 0
    numbers = torch.arange(len(FULL), dtype=torch.float64)
    # undo the mixture: every row has exactly one (row, partner) that explains it, rows and partners permute one set
    found = []
    for image, share in zip(batch.images[:, 0, 0].double(), batch.share.double(), strict=True):
        explained = (1 - share) * numbers[:, None] + share * numbers
        near = (explained - image[1]).abs() < 1e-4
        ids = (1 - share) * shelf.labels[:, None] + share * shelf.labels
        near &= (ids - image[0]).abs() < 1e-4
        found.append({tuple(pair) for pair in torch.nonzero(near).tolist()})
    assert all(found)
    unique = [next(iter(pairs)) for pairs in found if len(pairs) == 1]
    assert len(unique) > 10
    assert len({row for row, _ in unique}) == len({partner for _, partner in unique}) == len(unique)


@pytest.mark.parametrize(("rule", "share"), [("squared", 0.36), ("once", 0.6)])
def test_share_of_mixed_base_rows(rule: str, share: float) -> None:
    prototypes = OnlinePrototypes(Mixing(base_rate=1.0, probability_rule=rule))
    images, labels, generator = torch.rand(48, 1), torch.arange(48), seeded()
    shares = torch.stack([prototypes.mix(images, labels, Shelf([0]), generator).share for _ in range(1500)])
    per_batch = (shares > 0).double().mean(dim=1)
    assert per_batch.mean().item() == pytest.approx(share, abs=0.035)
    assert (per_batch == 0).double().mean().item() == pytest.approx(0.4 if rule == "squared" else 0.0, abs=0.05)
    uniform = shares[shares > 0]
    assert uniform.mean().item() == pytest.approx(0.3, abs=0.01)
    assert 0.59 < float(uniform.max()) < 0.6


@pytest.mark.parametrize(("rule", "share"), [("first", 0.0), ("either", 0.5)])
def test_class_of_images_that_were_not_mixed(rule: str, share: float) -> None:
    prototypes = OnlinePrototypes(Mixing(base_rate=0.0, probability=0.0, pure_class=rule))
    prototypes.keep(torch.tensor([2, 5]), MEANS[:2])
    shelf = Shelf(FULL)
    batch = prototypes.mix(shelf.images, shelf.labels, shelf, seeded(), size=2000)
    assert torch.equal(batch.images[:, 0, 0, 0], batch.first.float())  # an image of the class it is labelled with
    assert (batch.first == 5).double().mean().item() == pytest.approx(share, abs=0.04)
    assert not batch.mixed.any()
    prototypes = OnlinePrototypes(Mixing(base_rate=0.0, probability=1.0, pure_class=rule))
    prototypes.keep(torch.tensor([2, 5]), MEANS[:2])
    batch = prototypes.mix(shelf.images, shelf.labels, shelf, seeded(), size=50)
    assert set(batch.first.tolist()) == {2}  # mixed ones stay in order
    check_rows(batch, 50)


GOLDEN = [(0, 2)] * 13 + [(0, 5)] + [(2, 5)] + [(5, 9)]  # the counts 13, 1, 0, 1, 0, 1 of the pairs of KNOWN


def test_pairs_come_as_often_as_they_are_counted_each_with_rows_and_shares_of_its_own() -> None:
    prototypes = OnlinePrototypes(Mixing(base_rate=0.0, probability=0.6))
    prototypes.keep(KNOWN, MEANS.float())
    shelf, generator, coins, shares, of_first = Shelf(FULL), seeded(), [], [], set()
    for _ in range(800):
        batch = prototypes.mix(shelf.images[:16], shelf.labels[:16], shelf, generator)
        check_rows(batch, 16)
        assert list(zip(batch.first.tolist(), batch.second.tolist(), strict=True)) == GOLDEN
        on = batch.share > 0
        assert len(set(on[:13].tolist())) == 1  # one coin for the pair
        assert not on[0] or len(batch.share[:13].unique()) == 13  # and a share for each row
        shares += batch.share[on].tolist()
        of_first |= {(row, int(number)) for row, number in enumerate(batch.images[:, 0, 0, 1]) if not on[row]}
        coins.append([float(on[row]) for row in (0, 13, 14, 15)])
    assert of_first == {(row, n) for row, (c, _) in enumerate(GOLDEN) for n in range(len(FULL)) if FULL[n] == c}
    assert np.mean(shares) == pytest.approx(0.5, abs=0.02)
    assert np.var(shares) == pytest.approx(0.25 / 1.8, abs=0.005)  # 1 / (4 (2 alpha + 1))
    tossed = np.array(coins)
    assert tossed.mean(axis=0) == pytest.approx(0.6, abs=0.07)
    assert np.abs(np.corrcoef(tossed.T) - np.eye(4)).max() < 0.15  # each pair has a coin of its own


def test_what_replaces_a_class_is_drawn_once_for_a_pair() -> None:
    prototypes, instead = OnlinePrototypes(Mixing(base_rate=0.0)), []
    prototypes.keep(torch.tensor([0, 2, 5]), torch.tensor([[0.0, 0], [1, 1], [0, 1e-3]]))  # nearly all: the pair 0, 5
    shelf = Shelf([0] * 4 + [2] * 4)
    for seed in range(60):
        batch = prototypes.mix(shelf.images, shelf.labels, shelf, seeded(seed), size=8)
        assert set(batch.first.tolist()) == {0}
        assert len(set(batch.second.tolist())) == 1
        instead.append(int(batch.second[0]))
    assert 15 < instead.count(0) < 45
    assert set(instead) == {0, 2}


def test_a_class_that_left_the_memory_is_replaced_by_one_they_share() -> None:
    taken = set()
    for seed in range(30):
        batch, shelf = mixed(seed, labels=[0] * 4 + [2] * 4 + [7] * 4, base_rate=0.0, size=12)
        assert set(shelf.asked) <= {0, 2}  # 5 and 9 are gone, 7 has no prototype
        assert len(batch.images) == 12
        taken |= {(int(a), int(b)) for a, b in zip(batch.first, batch.second, strict=True)}
    assert taken == {(0, 0), (0, 2), (2, 0), (2, 2)}


@pytest.mark.parametrize("ids", [KNOWN[:0], KNOWN[:1], torch.tensor([3, 4])])
def test_without_pairs_all_rows_are_mixed_among_themselves(ids: Tensor) -> None:
    """No prototypes, one, and two whose classes the memory lacks."""
    batch, shelf = mixed(3, ids=ids, size=20, probability=1.0)
    check_rows(batch, 20)
    assert not shelf.asked
    assert len(mixed(3, ids=ids, size=60)[0].images) == len(FULL)


def test_small_samples_and_coincident_prototypes() -> None:
    shelf = Shelf([0, 0, 2])
    prototypes = OnlinePrototypes(Mixing(base_rate=0.75))
    prototypes.keep(torch.tensor([0, 2]), torch.ones(2, 3))
    batch = prototypes.mix(shelf.images, shelf.labels, shelf, seeded(), size=64)
    check_rows(batch, 64)
    assert len(shelf.asked) == 2 * (64 - 3)


def test_with_a_reservoir() -> None:
    memory = ReservoirBuffer(24)
    for start in range(0, 60, 10):
        labels = torch.tensor([0, 2, 5, 9]).repeat(15)[start : start + 10]
        memory.add(labels.float().reshape(-1, 1, 1, 1).expand(-1, 1, 1, 2), labels)
    kept = memory.state_dict()["generator"].clone()
    prototypes = OnlinePrototypes(Mixing(probability=1.0))
    prototypes.keep(KNOWN, MEANS)
    sample = memory.sample(16, seeded())
    batch = prototypes.mix(sample.data, sample.label, memory, seeded(1), size=32)
    check_rows(batch, 32)
    assert bool(batch.mixed[24 - 8 :].any())
    assert torch.equal(memory.state_dict()["generator"], kept)  # reading does not change what will be kept


def test_same_generator_same_batch_and_global_states_stay() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002  the global one
    first, again, other = (mixed(seed)[0] for seed in (1, 1, 2))
    after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()  # noqa: NPY002  the global one
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first.images, other.images)
    assert torch.equal(before[0], after[0])
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.float16, torch.float32)]
)
def test_dtypes_of_a_batch(dtype: torch.dtype, share: torch.dtype) -> None:
    shelf, prototypes = Shelf(FULL, torch.float64), OnlinePrototypes(Mixing(probability=1.0))
    prototypes.keep(KNOWN, MEANS)
    batch = prototypes.mix(shelf.images.to(dtype), shelf.labels.int(), shelf, seeded())
    assert batch.images.dtype == dtype
    assert batch.share.dtype == share
    assert batch.first.dtype == torch.int64
    assert MixedBatch.pure(shelf.images.to(dtype), shelf.labels).share.dtype == share


def test_images_that_cannot_be_mixed_are_refused() -> None:
    shelf, prototypes = Shelf(FULL), OnlinePrototypes()
    with pytest.raises(BatchError, match="floating-point"):
        prototypes.mix(shelf.images.to(torch.uint8), shelf.labels, shelf, seeded())
    with pytest.raises(BatchError, match="labels"):
        prototypes.mix(shelf.images, shelf.labels[1:], shelf, seeded())


# -- what is kept


def test_nothing_kept_needs_a_gradient_or_follows_its_source() -> None:
    first = FIRST.clone().requires_grad_()
    _, ids, means = prototype_contrast(first, SECOND, LABELS)
    assert not means.requires_grad
    prototypes = OnlinePrototypes()
    live = means.clone().requires_grad_()
    prototypes.keep(ids, live)
    assert not prototypes.means.requires_grad
    kept = prototypes.means.clone()
    with torch.no_grad():
        live.zero_()
        ids.zero_()
    assert torch.equal(prototypes.means, kept)
    assert prototypes.ids.tolist() == [0, 1, 3]
    assert len(prototypes) == 3
    with torch.inference_mode():
        prototypes.keep(KNOWN, MEANS.clone())
    assert not prototypes.means.is_inference()


def test_state_goes_through_a_file_and_gives_the_same_batch() -> None:
    prototypes, loaded, shelf = OnlinePrototypes(), OnlinePrototypes(), Shelf(FULL)
    prototypes.keep(KNOWN, MEANS)
    file = io.BytesIO()
    torch.save(prototypes.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loaded.ids, KNOWN)
    assert torch.equal(loaded.means, MEANS)
    batches = [p.mix(shelf.images, shelf.labels, shelf, seeded(4)) for p in (prototypes, loaded)]
    assert all(torch.equal(x, y) for x, y in zip(*batches, strict=True))
    prototypes.state_dict()["means"].zero_()
    assert torch.equal(prototypes.means, MEANS)


def test_reset_and_the_state_of_nothing() -> None:
    prototypes, loaded = OnlinePrototypes(), OnlinePrototypes()
    prototypes.keep(KNOWN, MEANS)
    loaded.keep(KNOWN, MEANS)
    prototypes.reset()
    assert len(prototypes) == 0
    loaded.load_state_dict(prototypes.state_dict())
    assert len(loaded) == 0


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ({"ids": KNOWN}, "has no 'means'"),
        ({"ids": KNOWN, "means": MEANS, "more": MEANS}, "unknown 'more'"),
        ({"ids": KNOWN.flip(0), "means": MEANS}, "sorted"),
        ({"ids": KNOWN, "means": MEANS[:3]}, r"shape \(4, 3\)"),
        ({"ids": KNOWN, "means": MEANS.long()}, "floating-point"),
        ({"ids": KNOWN, "means": MEANS / 0}, "finite values"),
    ],
)
def test_states_that_do_not_fit_change_nothing(state: dict[str, object], match: str) -> None:
    prototypes = OnlinePrototypes()
    prototypes.keep(KNOWN[:2], MEANS[:2])
    with pytest.raises(StateError, match=match):
        prototypes.load_state_dict(state)
    assert torch.equal(prototypes.ids, KNOWN[:2])
    assert torch.equal(prototypes.means, MEANS[:2])


def test_means_that_are_not_finite_are_not_kept() -> None:
    prototypes = OnlinePrototypes()
    prototypes.keep(KNOWN, MEANS)
    with pytest.raises(BatchError, match="not all finite"):
        prototypes.keep(KNOWN[:2], torch.tensor([[1.0], [math.nan]]))
    assert torch.equal(prototypes.means, MEANS)
