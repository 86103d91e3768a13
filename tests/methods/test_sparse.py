"""Dynamic sparse training: golden densities, and every invariant after every step of every rule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clkit.errors import ArgumentError
from clkit.methods import SparseTopology
from clkit.methods._connections import highest
from clkit.methods._densities import layer_counts, layer_densities
from clkit.methods.sparse import Growth, Initial, Prune, PruneSchedule

LINEAR = [(128, 64), (64, 128), (20, 64)]
MIXED = [(16, 3, 3, 3), (32, 16, 3, 3), (32, 32)]


@pytest.mark.parametrize(
    ("shapes", "density", "cap", "scale", "shares", "counts"),
    [
        (LINEAR, 0.2, 1.0, 7.548717948717949, [0.176923076923, 0.176923076923, 0.495384615385], [1450, 1449, 634]),
        (LINEAR, 0.1, 1.0, 3.774358974358974, [0.088461538462, 0.088461538462, 0.247692307692], [725, 724, 317]),
        (LINEAR, 0.5, 1.0, 19.666666666666668, [0.4609375, 0.4609375, 1.0], [3776, 3776, 1280]),
        (LINEAR, 0.3, 0.5, None, [0.284375, 0.284375, 0.5], [2330, 2329, 640]),
        (MIXED, 0.2, 1.0, 8.481118881118882, [0.490805490805, 0.099388111888, 0.530069930070], [212, 458, 543]),
        (MIXED, 0.5, 1.0, 29.185185185185187, [1.0, 0.342013888889, 1.0], [432, 1576, 1024]),
    ],
)
def test_densities_are_those_of_the_page(
    shapes: list[Any], density: float, cap: float, scale: float | None, shares: list[float], counts: list[int]
) -> None:
    found = layer_densities(shapes, density, Initial("erk", max_layer_density=cap))
    assert found == pytest.approx(shares, abs=1e-12)
    assert layer_counts([math.prod(shape) for shape in shapes], found, density) == counts
    if scale is not None:
        assert scale_of(shapes, found, cap) == pytest.approx(scale, rel=1e-14)


def scale_of(shapes: list[Any], shares: list[float], cap: float = 1.0) -> float:
    """What the ratios of layers below the cap are multiplied by, which is the same for all of them."""
    scales = [share * math.prod(shape) / sum(shape) for shape, share in zip(shapes, shares, strict=True) if share < cap]
    assert scales == pytest.approx([scales[0]] * len(scales), rel=1e-12)
    return scales[0]


def test_densities_at_their_limits() -> None:
    assert layer_densities(MIXED, 1.0, Initial("erk")) == [1.0, 1.0, 1.0]
    assert layer_densities(MIXED, 0.4, Initial("uniform")) == pytest.approx([0.4, 0.4, 0.4], rel=1e-14)
    # kernels count in the ratios, so they say the same as Erdős–Rényi's for linear layers alone
    plain = [0.2 * sum(map(math.prod, LINEAR)) * (a + b) / (a * b) / sum(map(sum, LINEAR)) for a, b in LINEAR]
    assert layer_densities(LINEAR, 0.2, Initial("erk")) == pytest.approx(plain, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "density", "scale", "dense", "stem", "total"),
    [
        ("resnet18", 0.2, 280.401413, 8, 9408, 2_233_382),
        ("resnet18", 0.1, 131.677352, 3, 9408, 1_116_691),
        ("resnet18", 0.05, 64.232761, 1, 5203, 558_346),
        ("mobilenetv2_100", 0.1, 8.459184, 2, None, 218_976),
        ("vit_tiny_patch16_224", 0.1, 14.709423, 0, None, 545_587),
    ],
)
def test_densities_of_timm_networks(
    name: str, density: float, scale: float, dense: int, stem: int | None, total: int
) -> None:
    import timm

    network = timm.create_model(name, num_classes=0)
    layers = {path: each for path, each in network.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}
    shapes = [tuple(each.weight.shape) for each in layers.values()]
    shares = layer_densities(shapes, density, Initial("erk"))
    assert shares.count(1.0) == dense
    assert scale_of(shapes, shares) == pytest.approx(scale, abs=5e-7)
    counts = layer_counts([math.prod(shape) for shape in shapes], shares, density)
    assert sum(counts) == total
    assert stem in (None, counts[0])
    for shape, share, count in zip(shapes, shares, counts, strict=True):
        assert abs(count - share * math.prod(shape)) < 1
    if name == "resnet18" and density == 0.2:
        pinned = {path for path, share in zip(layers, shares, strict=True) if share == 1.0}
        downsampling = {f"layer{number}.0.downsample.0" for number in (2, 3, 4)}
        first = {f"layer1.{block}.conv{number}" for block in (0, 1) for number in (1, 2)}
        assert pinned == {"conv1"} | downsampling | first
    if name.startswith("vit"):
        assert len(shapes) == 49
        assert min(shares) == pytest.approx(0.02264, abs=5e-6)


def test_a_small_layer_keeps_a_connection() -> None:
    shares = layer_densities([(100, 100), (2, 2)], 1e-3, Initial("uniform"))
    assert layer_counts([10_000, 4], shares, 1e-3) == [9, 1]
    with pytest.raises(ArgumentError, match=r"density=0.0001 gives 1 of 10,004 connections, and 2 layers need 2"):
        layer_counts([10_000, 4], layer_densities([(100, 100), (2, 2)], 1e-4, Initial("uniform")), 1e-4)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), "many"])
def test_densities_that_cannot_be_are_refused(density: Any) -> None:
    with pytest.raises(ArgumentError, match="density must be"):
        SparseTopology({"weight": torch.ones(4, 4)}, density)
    with pytest.raises(ArgumentError, match=r"density=0.6 is above max_layer_density=0.5"):
        SparseTopology({"weight": torch.ones(4, 4)}, 0.6, initial=Initial(max_layer_density=0.5))


def test_both_schedules() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000, eta_min=0.005)
    for step in range(1001):
        share = PruneSchedule().fraction_at(step, 1000)
        assert share == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        cosine.step()
    assert PruneSchedule().fraction_at(0, 1000) == 0.5
    assert PruneSchedule().fraction_at(1000, 1000) == 0.005
    rigl = PruneSchedule("rigl", fraction=0.3, stop=0.75)
    assert rigl.fraction_at(0, 1000) == 0.3
    assert rigl.fraction_at(375, 1000) == pytest.approx(0.15)
    assert not rigl.is_due(750, 1000)  # nothing is left to move at its end
    due = [step for step in range(1, 1001) if PruneSchedule(update_every=100).is_due(step, 1000)]
    assert due == [100, 200, 300, 400, 500, 600, 700]
    for stop, steps, every in ((0.75, 10, 3), (1.0, 12, 3), (0.5, 7, 1), (0.0, 9, 1)):
        schedule = PruneSchedule(update_every=every, stop=stop)
        assert sum(schedule.is_due(step, steps) for step in range(steps + 1)) == math.floor(stop * steps / every)


def test_ranks_settle_ties_by_position() -> None:
    generator = np.random.default_rng(0)
    for number in (0, 1, 7, 50):
        scores = torch.from_numpy(generator.integers(0, 5, 50).astype(np.float32))
        order = np.argsort(-scores.numpy(), kind="stable")[:number]
        assert highest(scores, number).tolist() == sorted(order.tolist())
    with pytest.raises(ArgumentError, match="not finite"):
        highest(torch.tensor([1.0, float("nan")]), 1)


# ---- invariants, after every step

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.001, momentum=0.5, centered=True, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1, foreach=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1, initial_accumulator_value=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
}
MORE = {"adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1)}
GRID = list(
    itertools.product(
        ("gradient", "random", "momentum", "unfired"),
        ("magnitude", "set", "taylor", "mest"),
        ("free", "any"),
        ("random", "prefer_free", "none", "all"),
        ("original", "zeros", "rescaled"),
        OPTIMIZERS,
        (1, 3),
    )
)
SAMPLE = np.random.default_rng(0).choice(len(GRID), 48, replace=False).tolist()


def _network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 24),
        nn.ReLU(),
        nn.Linear(24, 5),
    )


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: each.weight for name, each in network.named_modules() if isinstance(each, nn.Conv2d | nn.Linear)}


def _assert_invariants(case: tuple[Any, ...], tasks: int = 3, steps: int = 12) -> None:
    growth, prune, grow_from, reuse, fresh_init, optimizer_name, accumulation = case
    network = _network()
    weights = _weights(network)
    density = 0.3
    topology = SparseTopology(
        weights,
        density,
        # with a cap, so that disjoint masks of three tasks fit
        initial=lambda task: Initial(("erk", "uniform")[task % 2], max_layer_density=0.32),
        growth=Growth(growth, accumulate=2),
        prune=Prune(prune, "free" if reuse == "none" else "all"),
        schedule=PruneSchedule(update_every=3, stop=0.9),
        grow_from=grow_from if reuse != "none" else "free",
        reuse=reuse,
        fresh_init=fresh_init,
    )
    total = sum(weight.numel() for weight in weights.values())
    bank = {name: weight.detach().clone() for name, weight in weights.items()}
    kept: list[dict[str, Tensor]] = []
    masks: list[dict[str, Tensor]] = []
    for task in range(tasks):
        topology.begin_task(steps)
        counts = {name: int(mask.sum()) for name, mask in topology.mask(task).items()}
        if reuse in ("random", "prefer_free", "none"):
            assert sum(counts.values()) == math.floor(density * total + 0.5)
        used = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        for each in masks:
            used = {name: used[name] | each[name] for name in used}
        optimizer = (OPTIMIZERS | MORE)[optimizer_name](network.parameters())
        generator = torch.Generator().manual_seed(task)
        for step in range(1, steps + 1):
            optimizer.zero_grad()
            for _ in range(accumulation if step < steps else 1):  # the last one has a remainder only
                x = torch.randn(8, 3, 6, 6, generator=generator)
                y = torch.randint(0, 5, (8,), generator=generator)
                nn.functional.cross_entropy(network(x), y).backward()
            topology.after_backward()
            norm = nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            assert torch.isfinite(norm)
            optimizer.step()
            before = topology.mask(task)
            live = {name: weight.detach().clone() for name, weight in weights.items()}
            moved = topology.after_step(optimizer)
            assert moved == (step % 3 == 0 and step <= 0.9 * steps)
            for name, mask in topology.mask(task).items():
                weight = weights[name].detach()
                assert int(mask.sum()) == counts[name]
                assert weight[~mask].count_nonzero() == 0
                assert not torch.signbit(weight[~mask]).any()
                held = mask & used[name]
                assert torch.equal(weight[held], bank[name][held])
                new = mask & ~before[name] & ~used[name]
                assert weight[new].count_nonzero() == 0
                both = mask & before[name] & ~used[name]
                assert torch.equal(weight[both], live[name][both])
                for value in optimizer.state[weights[name]].values():
                    if value.shape == weight.shape:
                        assert value[~mask | used[name]].count_nonzero() == 0
        topology.end_task()
        masks.append(topology.mask(task))
        trained = {name: masks[-1][name] & ~used[name] for name in used}
        bank = {name: torch.where(trained[name], weights[name].detach(), bank[name]) for name in bank}
        kept.append({name: weight.detach().clone() for name, weight in weights.items()})
        for earlier in range(task + 1):
            for name, weight in topology.export(earlier).items():
                assert torch.equal(weight, kept[earlier][name])
        if reuse == "none" and task:
            assert not any((masks[task][name] & used[name]).any() for name in used)


@pytest.mark.parametrize("index", SAMPLE)
def test_every_invariant_after_every_step(index: int) -> None:
    _assert_invariants(GRID[index])


def test_every_invariant_with_the_other_elementwise_optimizer() -> None:
    _assert_invariants(("gradient", "magnitude", "any", "random", "original", "adadelta", 1))


@pytest.mark.slow
def test_every_invariant_on_the_whole_grid() -> None:
    for case in GRID:
        _assert_invariants(case, steps=6)
    print(f"{len(GRID)} combinations")


def test_connections_that_came_late_are_counted_apart() -> None:
    """What comes at the last step is in the mask and 0: both numbers are told, also while another task is shown."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(20, 20))
    topology = SparseTopology(
        {"w": weight}, 0.2, growth="random", schedule=PruneSchedule("constant", 0.5, stop=1.0, update_every=1)
    )
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for _ in range(2):
        topology.begin_task(1)
        weight.square().sum().backward()
        topology.after_backward()
        optimizer.step()
        topology.after_step(optimizer)
        report = topology.reports[-1]
        assert report.active == 80
        assert report.nonzero == int((weight != 0).sum()) < 80
        if topology.task:
            with topology.activated(0):
                assert topology.reports[-1] == report
        topology.end_task()
        assert topology.reports[-1] == report
        assert int(topology.export(topology.task)["w"].count_nonzero()) == report.nonzero
