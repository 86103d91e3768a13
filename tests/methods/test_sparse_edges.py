"""Sparse training at its edges, and against the mistakes that published code makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clkit.errors import ArgumentError, ConfigurationError
from clkit.methods import Growth, Initial, Prune, PruneSchedule, SparseTopology
from clkit.methods._connections import lowest_active
from clkit.surgery.masks import maskable_weights

ONCE = PruneSchedule(update_every=1, rule="constant", fraction=0.5, stop=1.0)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


def made(weights: dict[str, Tensor], density: float = 0.5, **options: Any) -> SparseTopology:
    return SparseTopology(weights, density, **{"initial": "uniform", "schedule": ONCE, **options})


def step(topology: SparseTopology, *weights: Tensor, gradient: Callable[[Tensor], Tensor] = torch.ones_like) -> bool:
    """One step of plain descent."""
    optimizer = torch.optim.SGD(list(weights), lr=0.01)
    for weight in weights:
        weight.grad = gradient(weight)
    topology.after_backward()
    optimizer.step()
    return topology.after_step(optimizer)


# ---- capacity


def test_where_candidates_are_short_the_strongest_that_left_are_taken_back() -> None:
    """A dropped connection of an earlier task is no candidate where only unused ones grow."""
    weight = parameter(1, 40)
    topology = made({"w": weight}, density=lambda task: 0.6 if task == 0 else 0.8)
    topology.begin_task(10)
    topology.end_task()
    topology.begin_task(10)
    mask, used = topology.mask(1)["w"].flatten(), topology.mask(0)["w"].flatten()
    values = weight.detach().flatten().clone()
    active = mask.nonzero().squeeze(1)
    leave = active[values[active].abs().argsort()[:16]]
    come = [at for at in range(40) if not used[at] and (not mask[at] or at in leave)]
    assert 0 < len(come) < 16  # the case is the one of this test
    back = sorted((at for at in leave.tolist() if used[at]), key=lambda at: -abs(float(values[at])))[: 16 - len(come)]
    step(topology, weight, gradient=torch.zeros_like)
    expected = {*active.tolist()} - {*leave.tolist()} | {*come} | {*back}
    assert set(topology.mask(1)["w"].flatten().nonzero().squeeze(1).tolist()) == expected


def test_disjoint_masks_end_as_the_user_says() -> None:
    def third(on_capacity: Any) -> tuple[SparseTopology, Tensor]:
        weight = parameter(10, 10)
        topology = made({"w": weight}, 0.4, reuse="none", on_capacity=on_capacity)
        for _ in range(2):
            topology.begin_task(1)
            topology.end_task()
        return topology, weight

    topology, weight = third("raise")
    before = weight.detach().clone()
    with pytest.raises(ArgumentError, match="asks for 40 unused connections of 'w', and 20 of its"):
        topology.begin_task(1)
    assert topology.tasks == 2
    assert not topology.running
    assert torch.equal(weight, before)
    for choice, active, reused in (("reuse", 40, 20), ("shrink", 20, 0)):
        topology, _ = third(choice)
        topology.begin_task(1)
        assert topology.reports[-1].active == active
        assert topology.reports[-1].reused == reused


def test_a_layer_in_which_nothing_is_free_is_left_alone() -> None:
    dense, sparse = parameter(2, 2), parameter(20, 20)
    topology = made({"dense": dense, "sparse": sparse}, 0.3, initial=Initial("erk"))
    topology.begin_task(10)
    assert topology.densities(0)["dense"] == 1.0
    step(topology, dense, sparse)
    topology.end_task()
    first = dense.detach().clone()
    topology.begin_task(10)
    assert topology.locked() == ["dense"]
    moved = topology.mask(1)["sparse"]
    step(topology, dense, sparse)
    assert torch.equal(dense, first)
    assert not torch.equal(topology.mask(1)["sparse"], moved)


# ---- draws


def grown(device: str = "cpu", seed: int = 0, growth: str = "random") -> list[Tensor]:
    """The masks of two tasks, before and after they moved."""
    weights = [nn.Parameter(parameter(16, 8, seed=number).detach().to(device)) for number in range(2)]
    topology = made({"one": weights[0], "two": weights[1]}, 0.3, growth=growth, grow_from="any", seed=seed)
    found = []
    for task in range(2):
        topology.begin_task(10)
        found += topology.mask(task).values()
        step(topology, *weights, gradient=lambda w: torch.arange(w.numel(), device=w.device).view(w.shape).sin())
        found += topology.mask(task).values()
        topology.end_task()
    return [mask.cpu() for mask in found]


@pytest.mark.parametrize("growth", ["random", "unfired"])
def test_draws_depend_on_the_seed_the_task_and_the_layer_alone(growth: str) -> None:
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  the global state is what must not matter
    one = grown(growth=growth)
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002  the same
    state = torch.get_rng_state()
    assert all(torch.equal(*pair) for pair in zip(one, grown(growth=growth), strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(*pair) for pair in zip(one, grown(growth=growth, seed=1), strict=True))
    first, other, *_ = one
    assert not torch.equal(first, other)  # two layers of a shape
    assert not torch.equal(first, one[4])  # two tasks


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="masks on two devices need a second one")
@pytest.mark.parametrize("growth", ["random", "unfired", "gradient", "momentum"])
def test_masks_on_another_device_are_the_same(growth: str) -> None:
    assert all(torch.equal(*pair) for pair in zip(grown(growth=growth), grown("cuda", growth=growth), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_weights_of_other_widths_are_masked_alike(dtype: torch.dtype) -> None:
    """What clears gradients works on their bits, so on each width, and lets no NaN through."""
    weight = nn.Parameter(parameter(16, 16).detach().to(dtype))
    topology = made({"w": weight}, 0.25, schedule=PruneSchedule("constant", update_every=2, stop=1.0))
    for task in range(2):
        topology.begin_task(4)
        for number in range(4):
            mask = topology.mask(task)["w"]
            blocked = ~mask | topology.mask(0)["w"] if task else ~mask
            spoiled = torch.where(blocked, torch.nan, 1.0)
            due = number % 2 == 1  # then every gradient is ranked, and has to be finite
            assert step(topology, weight, gradient=lambda w: (torch.ones(16, 16) if due else spoiled).to(dtype)) == due  # noqa: B023  at once
            assert weight.grad is not None
            assert torch.equal(weight.grad != 0, ~blocked)
            assert int(topology.mask(task)["w"].sum()) == 64
            assert weight[~topology.mask(task)["w"]].count_nonzero() == 0
        topology.end_task()


# ---- gradients


def test_a_layer_without_a_gradient_grows_at_random() -> None:
    used, unused = parameter(8, 8), parameter(8, 8)
    topology = made({"used": used, "unused": unused})
    topology.begin_task(10)
    optimizer = torch.optim.SGD([used, unused], lr=0.01)
    used.grad = torch.randn(8, 8)
    before = topology.mask(0)["unused"]
    topology.after_backward()
    optimizer.step()
    topology.after_step(optimizer)
    assert int(topology.mask(0)["unused"].sum()) == int(before.sum())
    assert not torch.equal(topology.mask(0)["unused"], before)


def test_what_is_not_finite_is_never_ranked_and_never_kept() -> None:
    weight = parameter(8, 8)
    topology = made({"w": weight})
    topology.begin_task(10)
    with pytest.raises(ArgumentError, match="cannot be ranked: a weight or gradient is not finite"):
        step(topology, weight, gradient=lambda w: torch.full_like(w, torch.nan))
    with pytest.raises(ConfigurationError, match="task 0 diverged: weights of 'w' are not finite"):
        topology.end_task()
    assert topology.tasks == 0


def test_a_step_is_taken_before_the_topology_moves() -> None:
    """Both happen: what is active before and after an update has moved by its gradient."""
    weight = parameter(8, 8)
    topology = made({"w": weight})
    topology.begin_task(10)
    before, mask = weight.detach().clone(), topology.mask(0)["w"]
    assert step(topology, weight)
    both = mask & topology.mask(0)["w"]
    assert torch.equal(weight.detach()[both], (before - 0.01)[both])


def test_momentum_growth_explores_under_plain_momentum_descent() -> None:
    """An optimizer's own buffer is 0 where nothing is active, so growth by it finds nothing; this one is dense."""
    weight, generator = parameter(40, 40), torch.Generator().manual_seed(3)
    topology = made({"w": weight}, 0.1, growth=Growth("momentum"))
    topology.begin_task(40)
    optimizer = torch.optim.SGD([weight], lr=0.01, momentum=0.9)
    for _ in range(40):
        weight.grad = torch.randn(40, 40, generator=generator)
        topology.after_backward()
        optimizer.step()
        topology.after_step(optimizer)
    assert topology.reports[0].explored > 0.3


def test_what_a_task_trains_is_its_own_connections() -> None:
    """As many gradients are left as connections belong to no earlier task."""
    one, other = parameter(20, 20), parameter(10, 20, seed=1)
    topology = made({"one": one, "other": other}, 0.4)
    for task in range(3):
        topology.begin_task(10)
        one.grad, other.grad = torch.ones(20, 20), torch.ones(10, 20)
        topology.after_backward()
        report = topology.reports[task]
        assert int(one.grad.sum() + other.grad.sum()) == report.active - report.reused
        topology.end_task()
    assert report.reused > 0


def test_the_first_update_of_a_fresh_connection_is_that_of_adam_late_in_its_count() -> None:
    """The step count belongs to the tensor: 2.5 times the learning rate after a thousand steps, as the page says."""
    weight = parameter(10, 10)
    topology = made({"w": weight}, 0.3, schedule=PruneSchedule(update_every=1000, stop=1.0), growth="random")
    topology.begin_task(2000)
    optimizer = torch.optim.Adam([weight], lr=1e-3)
    for _ in range(1000):
        weight.grad = torch.ones(10, 10)
        topology.after_backward()
        optimizer.step()
        before = topology.mask(0)["w"]
        topology.after_step(optimizer)
    came = topology.mask(0)["w"] & ~before
    assert int(came.sum()) > 0
    assert weight[came].count_nonzero() == 0
    weight.grad = torch.ones(10, 10)
    topology.after_backward()
    optimizer.step()
    corrected = (0.1 / (1 - 0.9**1001)) / (0.001 / (1 - 0.999**1001)) ** 0.5
    assert 2.4 < corrected < 2.6
    assert weight.detach()[came].tolist() == pytest.approx([-1e-3 * corrected] * int(came.sum()), rel=1e-4)


# ---- what leaves


def test_equal_weights_leave_by_their_number_not_by_a_threshold() -> None:
    weight = nn.Parameter(torch.ones(10, 10))
    topology = made({"w": weight})
    topology.begin_task(10)
    step(topology, weight, gradient=torch.zeros_like)
    assert int(topology.mask(0)["w"].sum()) == 50


def test_set_lets_the_smallest_of_both_signs_leave() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(0.1, 1, 60), -rng.uniform(0.1, 1, 40)]).astype(np.float32)
    rng.shuffle(values)
    left = lowest_active(Prune("set"), torch.from_numpy(values), None, torch.arange(100), 30).tolist()
    positive = sorted(np.flatnonzero(values > 0), key=lambda at: values[at])[:18]
    negative = sorted(np.flatnonzero(values < 0), key=lambda at: -values[at])[:12]
    assert set(left) == {*positive, *negative}


def test_taylor_scores_read_the_gradient_of_reused_connections_too() -> None:
    """With gradients that are cut off before, every reused connection would score 0 and leave first."""
    weight = parameter(20, 20)
    topology = made({"w": weight}, prune=Prune("taylor"), grow_from="any", schedule=PruneSchedule(update_every=1))
    for task in range(2):
        topology.begin_task(40)
        for number in range(8 if task else 1):
            generator = torch.Generator().manual_seed(number)
            step(topology, weight, gradient=lambda w: torch.randn(w.shape, generator=generator))  # noqa: B023  at once
        if task == 0:
            topology.end_task()
    report = topology.reports[1]
    assert report.reused > 0.3 * report.active


@pytest.mark.parametrize("name", ["random_unfired", "momentum_neuron", "Gradient", ""])
def test_an_unknown_rule_is_refused_before_it_prunes_without_growing(name: str) -> None:
    for rule in ("growth", "prune", "schedule", "initial"):
        with pytest.raises(ArgumentError, match="rule must be one of"):
            made({"w": parameter(4, 4)}, **{rule: name})


def test_growth_fills_up_where_scores_are_zero() -> None:
    """Active ones are no candidates, however low the scores of others are."""
    weight = parameter(10, 10)
    topology = made({"w": weight}, 0.1)
    topology.begin_task(10)
    for _ in range(3):
        step(topology, weight, gradient=torch.zeros_like)
        assert int(topology.mask(0)["w"].sum()) == 10


# ---- the network around


def test_a_network_in_another_layout_has_the_same_masks_and_keeps_its_strides() -> None:
    def masks(layout: torch.memory_format) -> tuple[Tensor, Tensor]:
        weight = nn.Parameter(parameter(8, 4, 3, 3).detach().to(memory_format=layout))
        topology = made({"w": weight})
        topology.begin_task(5)
        step(topology, weight, gradient=lambda w: torch.arange(w.numel()).view(w.shape).float().sin())
        assert weight.is_contiguous(memory_format=layout)
        return topology.mask(0)["w"].contiguous(), weight.detach().contiguous()

    for one, other in zip(masks(torch.contiguous_format), masks(torch.channels_last), strict=True):
        assert torch.equal(one, other)


def test_a_compiled_network_is_compiled_once() -> None:
    """Weights are written in place, so that neither a graph nor what holds a tensor has to be made anew."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    network = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    weights = {"0.weight": network[0].weight}
    where = network[0].weight.data_ptr()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, backend=counter)
    topology = made(weights)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, 8)
    for _ in range(2):
        topology.begin_task(4)
        for _ in range(3):
            optimizer.zero_grad()
            compiled(images).square().sum().backward()
            topology.after_backward()
            optimizer.step()
            topology.after_step(optimizer)
        topology.end_task()
    compiled(images).square().sum().backward()
    with topology.activated(0):
        given = compiled(images)
        assert torch.equal(given, network(images))
    assert not torch.equal(given, compiled(images))
    assert counter.frame_count == 1
    assert network[0].weight.data_ptr() == where
    torch._dynamo.reset()


def test_tied_weights_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
            self.two.weight = self.one.weight

    assert list(maskable_weights(Tied(), ["head"])) == ["one.weight"]


def test_what_is_masked_is_chosen_by_type() -> None:
    import timm

    vit = timm.create_model("test_vit", num_classes=3)
    masked = maskable_weights(vit, ["head"], exclude=["blocks.0.mlp*"])
    linear = [f"{name}.weight" for name, each in vit.named_modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    assert list(masked) == [name for name in linear if name != "head.weight" and not name.startswith("blocks.0.mlp")]
    assert not any("norm" in name or "pos_embed" in name or "token" in name for name in masked)
    vit.patch_embed.requires_grad_(False)
    assert "patch_embed.proj.weight" not in maskable_weights(vit, ["head"])
    with pytest.raises(ConfigurationError, match=r"exclude='blok\*' matches no layer"):
        maskable_weights(vit, ["head"], exclude=["blok*"])
    with pytest.raises(ConfigurationError, match="no layer 'heads' to be a head, did you mean 'head'"):
        maskable_weights(vit, ["heads"])


def test_a_weight_that_is_computed_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    torch.nn.utils.prune.l1_unstructured(network[0], "weight", amount=0.5)
    with pytest.raises(ConfigurationError, match="the layer '0' computes its weight from other tensors"):
        maskable_weights(network, ["1"])
    with pytest.raises(ConfigurationError, match="the layer '0' computes its weight"):
        maskable_weights(nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))), [])


def test_averaged_weights_are_put_back_under_the_mask() -> None:
    """An average over the steps across an update is denser than the task."""
    weight = parameter(20, 20)
    topology = made({"w": weight}, 0.2)
    topology.begin_task(10)
    mean, generator = torch.zeros_like(weight), torch.Generator().manual_seed(1)
    for _ in range(5):
        step(topology, weight, gradient=lambda w: 1000 * torch.randn(w.shape, generator=generator))
        mean += weight.detach() / 5
    assert int(mean.count_nonzero()) > int(topology.mask(0)["w"].sum())
    weight.data.copy_(mean)
    topology.clean()
    assert torch.equal(weight.detach(), torch.where(topology.mask(0)["w"], mean, 0))


def test_weights_that_somebody_else_writes_are_noticed_and_what_was_learned_is_safe() -> None:
    weight = parameter(10, 10)
    topology = made({"w": weight})
    topology.begin_task(1)
    topology.end_task()
    learned = weight.detach().clone()
    topology.begin_task(1)
    weight.data.add_(1.0)
    with pytest.raises(ConfigurationError, match="'w': something else than an optimizer's step changed weights"):
        topology.end_task()
    assert torch.equal(topology.export(0)["w"], learned)


def test_blocks_of_two_tasks_do_not_cross() -> None:
    weight = parameter(10, 10)
    topology = made({"w": weight})
    for _ in range(2):
        topology.begin_task(1)
        topology.end_task()
    refused = pytest.raises(ConfigurationError, match="task 1 cannot be shown inside of a block")
    with topology.activated(0), refused, topology.activated(1):
        pass
    with pytest.raises(ArgumentError, match="task 7 was not trained to its end; 2 tasks were"):
        topology.export(7)
