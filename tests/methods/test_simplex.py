"""The d-Simplex head: its vertices, logits without a matrix, and which class has which vertex."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.errors import ArgumentError, BatchError, CapacityError, SignatureError, StateError
from clkit.methods import ClassAllocator, SimplexHead
from clkit.methods._polytopes import vertices
from clkit.metrics.retrieval import identification

DIMS = [1, 2, 3, 9, 99, 511, 1023, 2047, 4096]


# ---- vertices


def by_construction(d: int) -> Any:
    """The simplex as the authors build it: unit vectors and one more, their mean taken off, scaled to length 1."""
    corners = np.vstack([np.eye(d), np.full((1, d), (1 - math.sqrt(1 + d)) / d)])
    corners -= corners.mean(axis=0)
    return corners / np.linalg.norm(corners, axis=1, keepdims=True)


@pytest.mark.parametrize("d", DIMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_vertices_have_the_properties_of_a_simplex(d: int, dtype: torch.dtype) -> None:
    drawn = np.random.default_rng(d).choice(d, min(d, 60), replace=False).tolist()
    whole = SimplexHead(d + 1).prototypes(dtype=dtype).double()
    some = SimplexHead(d + 1).prototypes([*drawn, d], dtype=dtype).double()
    assert torch.equal(some, whole[[*drawn, d]])
    gram = whole @ whole.T if d <= 1023 else some @ whole.T  # 140 GFLOP in the largest
    expected = torch.full_like(gram, -1 / d)
    expected[torch.arange(len(gram)), torch.arange(d + 1) if d <= 1023 else torch.tensor([*drawn, d])] = 1.0
    tolerance = 1e-13 if dtype == torch.float64 else 1e-7
    assert (gram - expected).abs().max() <= tolerance
    assert (whole.norm(dim=1) - 1).abs().max() <= tolerance
    assert whole.sum(dim=0).abs().max() <= tolerance
    if d <= 1023:
        assert (whole.T @ whole - (d + 1) / d * torch.eye(d).double()).abs().max() <= 10 * tolerance


@pytest.mark.parametrize("d", [1, 2, 3, 9, 99, 511, 1023])
def test_vertices_are_in_the_authors_orientation(d: int) -> None:
    np.testing.assert_allclose(SimplexHead(d + 1).prototypes().numpy(), by_construction(d), atol=1e-13)


def test_golden_rows() -> None:
    assert SimplexHead(2).prototypes().tolist() == [[1.0], [-1.0]]
    golden = [[0.965925826, -0.258819045], [-0.258819045, 0.965925826], [-0.707106781, -0.707106781]]
    np.testing.assert_allclose(SimplexHead(3).prototypes().numpy(), golden, atol=1e-9)
    cube = np.full((4, 3), -0.192450090) + np.eye(4, 3) * (0.962250449 + 0.192450090)
    cube[3] = -0.577350269
    np.testing.assert_allclose(SimplexHead(4).prototypes().numpy(), cube, atol=1e-9)


def test_two_heads_have_the_same_bits_whatever_the_random_state() -> None:
    # prototypes by a QR of random numbers, as elsewhere, would differ between runs
    torch.manual_seed(1)
    first = SimplexHead(100, in_features=7)
    torch.manual_seed(2)
    second = SimplexHead(100, in_features=7)
    assert torch.equal(first.prototypes(), second.prototypes())
    assert not torch.equal(first.junction.weight, second.junction.weight)
    assert first.signature() == second.signature()
    first.check_compatible(second)


@pytest.mark.parametrize(("polytope", "d"), [("orthoplex", 50), ("cube", 7)])
def test_other_polytopes(polytope: Any, d: int) -> None:
    head = SimplexHead(99, polytope=polytope)
    rows = head.prototypes()
    assert rows.shape == (99, d)
    cosines = rows @ rows.T
    allowed = [1.0, 0.0, -1.0] if polytope == "orthoplex" else [(d - 2 * m) / d for m in range(d + 1)]
    away = (cosines[..., None] - torch.tensor(allowed, dtype=torch.float64)).abs().amin(dim=-1)
    assert away.max() < 1e-12
    assert torch.equal(cosines.argmax(dim=1), torch.arange(99))  # all distinct
    z = torch.randn(5, d, dtype=torch.float64)
    torch.testing.assert_close(head(z)[1], z @ rows.T, rtol=0, atol=1e-12)


# ---- logits


@pytest.mark.parametrize("d", DIMS)
def test_logits_and_gradients_are_those_of_the_matrix(d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    z = torch.randn(16, d, generator=generator)
    matrix = vertices("simplex", d + 1, torch.arange(d + 1))
    weights = torch.randn(16, d + 1, generator=generator)
    own, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    features, logits = SimplexHead(d + 1)(own)
    assert features is own
    (logits * weights).sum().backward()
    expected = exact @ matrix.T
    (expected * weights.double()).sum().backward()
    assert (logits.double() - expected).abs().max() <= 1e-5
    assert (own.grad.double() - exact.grad).abs().max() <= 1e-5


def test_logits_are_more_exact_than_a_float32_product() -> None:
    z = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    head = SimplexHead(4097)
    exact = z.double() @ head.prototypes().T
    implicit = (head(z)[1].double() - exact).abs().max()
    product = (z @ head.prototypes(dtype=torch.float32).T - exact).abs().max()
    assert implicit < product


def test_cross_entropy_at_a_vertex_has_its_closed_form() -> None:
    K, r = 1024, 10.0
    z = r * SimplexHead(K).prototypes([0, 512, K - 1])
    loss = F.cross_entropy(SimplexHead(K)(z)[1], torch.tensor([0, 512, K - 1]))
    assert float(loss) == pytest.approx(math.log(1 + (K - 1) * math.exp(-r * (1 + 1 / (K - 1)))), abs=1e-12)
    assert float(loss) == pytest.approx(0.045, abs=5e-4)


def test_logits_are_not_held_within_one() -> None:
    # heads that normalise features and have no scale have a loss that stalls near log K
    logits = SimplexHead(1024)(20 * SimplexHead(1024).prototypes([3], dtype=torch.float32))[1]
    assert float(logits[0, 3]) == pytest.approx(20, rel=1e-5)


def test_a_zero_feature_has_finite_logits_and_embedding() -> None:
    head = SimplexHead(8)
    z = torch.zeros(2, 7, requires_grad=True)
    logits, embedded = head(z)[1], head.embed(z)
    (logits.sum() + embedded.sum()).backward()
    assert torch.equal(logits, torch.zeros(2, 8))
    assert torch.equal(embedded, torch.zeros(2, 7))
    assert torch.isfinite(z.grad).all()


class Explicit(nn.Module):
    """The head with a matrix."""

    def __init__(self, K: int) -> None:
        super().__init__()
        self.register_buffer("matrix", SimplexHead(K).prototypes(dtype=torch.float32))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return z, z @ self.matrix.T


def test_training_is_that_with_a_matrix() -> None:
    losses: list[list[float]] = []
    for head in (SimplexHead(32), Explicit(32)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 31))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        losses.append([])
        for _ in range(30):
            x = torch.randn(16, 8)
            loss = F.cross_entropy(head(network(x))[1], x[:, :4].argmax(dim=1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
        losses[-1] += network[2].weight.detach().flatten().tolist()
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_leaves_the_vertices_alone(dtype: torch.dtype) -> None:
    head = SimplexHead(512, in_features=16)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=dtype):
        features, logits = head(x)
    assert features.dtype == logits.dtype == torch.float32
    exact = features.double() @ head.prototypes().T
    assert (logits.double() - exact).abs().max() < 1e-5  # bf16 vertices would be off by 6 % of 1/d
    cast = copy.deepcopy(head).to(dtype)
    assert cast.junction.weight.dtype == dtype
    features, logits = cast(x.to(dtype))
    assert (logits.double() - features.double() @ head.prototypes().T).abs().max() < 1e-5
    assert torch.equal(cast.prototypes(), head.prototypes())


def test_nothing_to_train_and_nothing_stored_but_the_junction() -> None:
    bare, joined = SimplexHead(100), SimplexHead(100, in_features=16)
    assert not list(bare.parameters())
    assert not list(bare.buffers())
    assert not bare.state_dict()
    assert list(joined.state_dict()) == ["junction.weight"]
    assert joined.junction.bias is None
    assert not list(joined.buffers())
    before = joined.prototypes()
    optimizer = torch.optim.AdamW(joined.parameters(), lr=0.1, weight_decay=0.5)
    averaged = torch.optim.swa_utils.AveragedModel(joined)
    for _ in range(3):
        joined(torch.randn(4, 16))[1].square().sum().backward()
        optimizer.step()
        averaged.update_parameters(joined)
    twin = SimplexHead(100, in_features=16)
    twin.load_state_dict(joined.state_dict())
    for each in (joined, twin, averaged.module, joined.half()):
        assert torch.equal(each.prototypes(), before)


@pytest.mark.parametrize(
    ("in_features", "junction", "has"),
    [(None, "auto", 0), (31, "auto", 0), (8, "auto", 1), (31, True, 1), (64, True, 1)],
)
def test_a_junction_where_the_width_needs_one(in_features: Any, junction: Any, has: int) -> None:
    head = SimplexHead(32, in_features, junction=junction)
    assert len(list(head.parameters())) == has
    assert head(torch.randn(2, in_features or 31))[0].shape == (2, 31)


def test_the_head_compiles_to_one_graph() -> None:
    head = SimplexHead(64, in_features=8)
    x = torch.randn(4, 8)
    compiled = torch.compile(head, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x)[1], head(x)[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_vertices": 1}, "num_vertices must be an integer of at least 2, got 1"),
        ({"num_vertices": 2.5}, "num_vertices must be an integer, got 2.5"),
        ({"in_features": 0}, "in_features must be"),
        ({"in_features": 5, "junction": False}, r"in_features=5 is not d=15.*junction='auto'"),
        ({"polytope": "sphere"}, "polytope must be one of 'simplex'"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        SimplexHead(**{"num_vertices": 16, **options})


def test_inputs_of_another_form_are_refused() -> None:
    head = SimplexHead(16, in_features=4)
    for wrong in (torch.randn(2, 5), torch.randn(4), torch.ones(2, 4, dtype=torch.int64), [1.0]):
        with pytest.raises(BatchError, match=r"inputs must be floating-point numbers of shape \(B, 4\)"):
            head(wrong)
    assert head(torch.randn(0, 4))[1].shape == (0, 16)
    with pytest.raises(ArgumentError, match="rows must be from 0 to 15"):
        head.prototypes([16])
    with pytest.raises(ArgumentError, match=r"dtype must be torch.float32 or torch.float64, got torch.bfloat16"):
        head.prototypes(dtype=torch.bfloat16)


class Rotated(SimplexHead):
    """Another orientation under the same name."""

    def logits(self, features: Tensor) -> Tensor:
        return super().logits(features.flip(1))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (SimplexHead(33), "'axis-simplex-v1/33' cannot be compared with one of 'axis-simplex-v1/32'"),
        (SimplexHead(62, polytope="orthoplex"), "axis-orthoplex-v1/62"),  # of the same dimension
        (Rotated(32), "a Rotated claims the vertices 'axis-simplex-v1/32', but its logits are others"),
    ],
)
def test_heads_of_other_vertices_are_refused(other: SimplexHead, says: str) -> None:
    with pytest.raises(SignatureError, match=says):
        SimplexHead(32).check_compatible(other)
    assert issubclass(SignatureError, ValueError)


# ---- what it is for


def trained_on_blobs(head: nn.Module, seed: int, classes: Tensor, centres: Tensor) -> nn.Module:
    """A small network that learned noisy points round some centres from its own random start."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model = nn.Sequential(network, head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3)
    for _ in range(200):
        ids = classes[torch.randint(len(classes), (128,), generator=generator)]
        points = centres[ids] + torch.randn(128, 32, generator=generator)
        out = model(points)
        loss = F.cross_entropy(out[1] if isinstance(out, tuple) else out, ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("K", [32, pytest.param(512, marks=pytest.mark.slow)])
def test_models_that_never_met_search_each_others_galleries(K: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centres, classes = torch.randn(10, 32, generator=generator), torch.arange(10)
    ids = classes.repeat(40)
    queries, gallery = (centres[ids] + torch.randn(400, 32, generator=generator) for _ in range(2))
    fixed = [trained_on_blobs(SimplexHead(K, in_features=64), seed, classes, centres) for seed in (1, 2)]
    cross = identification(fixed[0](queries)[0], ids, fixed[1](gallery)[0], ids)
    own = identification(fixed[1](queries)[0], ids, fixed[1](gallery)[0], ids)
    assert cross >= 0.95
    assert own >= 0.95
    if K == 32:
        learned = [trained_on_blobs(nn.Linear(64, 10), seed, classes, centres) for seed in (1, 2)]
        assert identification(learned[0][0](queries), ids, learned[1][0](gallery), ids) <= 0.3
        assert identification(learned[1][0](queries), ids, learned[1][0](gallery), ids) >= 0.95


# ---- allocation


def test_both_sides_are_those_of_the_published_scenario() -> None:
    server, client = ClassAllocator(1024), ClassAllocator(1024)
    assert server.allocate(range(600)).tolist() == list(range(600))
    client.reserve(server.allocate(range(600)))
    assert client.allocate(range(100), side="high").tolist() == [1023 - y for y in range(100)]
    assert client.free == 1024 - 700
    labels = torch.tensor([[0, 99], [5, 5]])
    assert client.rows(labels).tolist() == [[1023, 924], [1018, 1018]]
    assert torch.equal(client.classes_of(client.rows(labels)), labels)
    assert client.classes_of(torch.tensor([0, 599, 600])).tolist() == [-1, -1, -1]


Calls = st.lists(st.tuples(st.lists(st.integers(0, 2**62), max_size=6), st.sampled_from(["low", "high"])), max_size=8)


@settings(max_examples=100, deadline=None)
@given(Calls, st.sets(st.integers(0, 23), max_size=4))
def test_rows_are_distinct_deterministic_and_never_move(calls: Any, reserved: set[int]) -> None:
    allocator, twin = ClassAllocator(24), ClassAllocator(24)
    for each in (allocator, twin):
        each.reserve(reserved)
    known: dict[int, int] = {}
    for classes, side in calls:
        new = len(set(classes) - known.keys())
        if new > 24 - len(known) - len(reserved):
            before = allocator.state_dict()
            with pytest.raises(CapacityError, match=rf"^{new} new classes .* of 24 vertices {len(known)} are used"):
                allocator.allocate(classes, side)
            assert all(np.array_equal(before[key], value) for key, value in allocator.state_dict().items())
            continue
        rows = allocator.allocate(classes, side).tolist()
        assert twin.allocate(torch.tensor(classes, dtype=torch.int64), side).tolist() == rows
        for class_id, row in zip(classes, rows, strict=True):
            assert known.setdefault(class_id, row) == row
    assert len(set(known.values())) == len(known)
    assert not set(known.values()) & reserved
    assert allocator.classes == sorted(known)
    loaded = ClassAllocator(24)
    loaded.load_state_dict(allocator.state_dict())
    ids = torch.tensor(sorted(known), dtype=torch.int64)
    assert loaded.rows(ids).tolist() == [known[each] for each in sorted(known)]
    assert loaded.reserved == sorted(reserved)


def test_too_many_classes_say_what_there_is() -> None:
    allocator = ClassAllocator(10)
    allocator.allocate(range(7))
    allocator.reserve([9])
    with pytest.raises(CapacityError, match=r"3 new classes .* of 10 vertices 7 are used, 1 reserved and 2 free"):
        allocator.allocate([1, 100, 101, 102])
    assert allocator.classes == list(range(7))
    assert allocator.allocate([100, 101]).tolist() == [7, 8]


def allocated(*classes: int, side: Any = "low", K: int = 8) -> ClassAllocator:
    allocator = ClassAllocator(K)
    allocator.allocate(classes, side)
    return allocator


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one.reserve([7, 1]), r"rows \[1\] are already the vertices of classes \[6\]"),
        (lambda one: one.reserve([8]), "rows must be from 0 to 7"),
        (
            lambda one: one.join(allocated(5, 7)),
            r"class 7 has vertex 1 in the other allocation; here it has None, and ",
        ),
        (lambda one: one.join(allocated(6, 5)), "class 6 has vertex 0 in the other allocation; here it has 1"),
        (lambda one: one.join(allocated(5, K=9)), "an allocation of 9 vertices cannot join one of 8"),
        (lambda one: one.join(allocated(9, side="high")), "vertex 7 belongs to others"),
        (lambda one: one.allocate([-1]), "classes must be integers from 0, got -1"),
        (lambda one: one.allocate([True]), "classes must be integers from 0, got True"),
        (lambda one: one.allocate(torch.tensor([0.5])), "classes must be integers from 0, got 0.5"),
        (lambda one: one.allocate([3], side="middle"), "side must be 'low' or 'high', got 'middle'"),
    ],
)
def test_what_is_refused_changes_nothing(change: Callable[[ClassAllocator], object], says: str) -> None:
    allocator = allocated(5, 6)
    allocator.reserve([7])
    with pytest.raises(ArgumentError, match=says):
        change(allocator)
    assert (allocator.classes, allocator.reserved, allocator.free) == ([5, 6], [7], 5)
    assert allocator.rows(torch.tensor([5, 6])).tolist() == [0, 1]


def test_two_allocations_of_the_same_classes_join() -> None:
    first, second = allocated(5, 6), allocated(5, 6, 9)
    second.reserve([7])
    first.join(second)
    assert (first.classes, first.reserved) == ([5, 6, 9], [7])
    assert first.rows(torch.tensor([9])).tolist() == [2]


def test_labels_without_a_vertex_are_refused() -> None:
    with pytest.raises(BatchError, match=r"labels \[-1, 4\] have no vertex"):
        allocated(5).rows(torch.tensor([5, 4, -1, 4]))
    with pytest.raises(BatchError, match=r"labels \[0\] have no vertex"):
        ClassAllocator(4).rows(torch.tensor([0]))
    with pytest.raises(BatchError, match=r"labels must be integer class ids, got torch\.float32"):
        allocated(5).rows(torch.tensor([5.0]))
    assert ClassAllocator(4).rows(torch.zeros(0, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"format": 2}, "use the clkit release that wrote it"),
        ({"num_vertices": 9}, "num_vertices must be 8, .* has 9; build it with the saved num_vertices"),
        ({"classes": torch.tensor([6, 5])}, "classes must be an int64 tensor of shape .* with sorted, distinct ids"),
        ({"rows": torch.tensor([0, 8])}, "its values go from 0 to 8"),
        ({"rows": torch.tensor([1, 1])}, "that is of distinct rows"),
        ({"rows": torch.tensor([0])}, r"rows must be an int64 tensor of shape \(2,\)"),
        ({"reserved": torch.tensor([1])}, r"rows \[1\] are used and reserved"),
        ({"more": 1}, "has the unknown 'more'"),
    ],
)
def test_damaged_allocations_are_refused(changes: dict[str, Any], says: str) -> None:
    state = {**allocated(5, 6).state_dict(), **changes}
    allocator = allocated(3)
    with pytest.raises(StateError, match=says):
        allocator.load_state_dict(state)
    assert allocator.classes == [3]
