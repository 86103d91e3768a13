"""What DST refuses by name before anything is learned or lost, and what it survives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from small_runs import quiet_trainer
from sparse_runs import DIGITS, Net, outputs, run, said_by_dst, stream
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from clkit.callbacks import AEFOCL, DST, NMC
from clkit.callbacks._masking_rules import optimizer_of
from clkit.data import ClassIncremental, StreamDataModule, TaskIncremental
from clkit.errors import ArgumentError, ConfigurationError, StateError
from clkit.methods import Prune, PruneSchedule
from clkit.strategies import GradientFreeStrategy

PLAIN = DataLoader(TensorDataset(DIGITS[:64], torch.arange(64) % 10), batch_size=8)


def quick(**options: Any) -> DST:
    return DST(**{"density": 0.2, "schedule": PruneSchedule(update_every=1), "table": False, **options})


def fit(folder: Path, *callbacks: Any, module: Any = None, loader: Any = PLAIN, **options: Any) -> pl.Trainer:
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **{"max_epochs": 1, **options})
    trainer.fit(module or Net(), loader)
    return trainer


# ---- optimizers


class Twice(torch.optim.Adafactor):
    """Derived from one that is refused, under a name of its own."""


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (torch.optim.Rprop, "keeps a step size of each weight"),
        (torch.optim.LBFGS, "keeps a history of all weights together"),
        (torch.optim.Adafactor, "keeps sums over rows and columns"),
        (Twice, "keeps sums over rows and columns"),
    ],
)
def test_an_optimizer_that_is_not_elementwise_is_refused(tmp_path: Path, make: Any, why: str) -> None:
    module = Net(lambda parameters: make(parameters, lr=0.01))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match=f"DST cannot train with {make.__name__}, which {why}.*use one of"):
        fit(tmp_path, quick(), module=module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.warns("does not know the optimizer Mine")
def test_an_optimizer_of_the_users_own_is_taken_and_said(tmp_path: Path) -> None:
    class Mine(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure()
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.01 * parameter.grad
            return loss

    dst = quick()
    fit(tmp_path, dst, module=Net(Mine))
    assert dst.tasks == 1


def test_a_fused_optimizer_that_hides_its_scale_is_refused(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    fused = torch.optim.Adam([weight], fused=True)
    assert fused._step_supports_amp_scaling

    class Plugin:
        scaler: Any = object()

    class Trainer:
        optimizers = (fused,)
        precision_plugin: Any = Plugin()

    with pytest.raises(ConfigurationError, match=r"a fused Adam and precision='16-mixed'.*fused=False"):
        optimizer_of("DST", Trainer(), {"w": weight})  # type: ignore[arg-type]  # what of a trainer is looked at
    Plugin.scaler = None
    assert optimizer_of("DST", Trainer(), {"w": weight}) is fused  # type: ignore[arg-type]  # the same


@pytest.mark.parametrize("parts", [("head",), ("body.0", "body.4")], ids=["none", "two"])
def test_masked_weights_have_one_optimizer(tmp_path: Path, parts: tuple[str, ...]) -> None:
    class Split(Net):
        automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.get_submodule(part).parameters(), lr=0.1) for part in parts]

    with pytest.raises(ConfigurationError, match=r"masks 2 weights, and (none|2) of the module's optimizers"):
        fit(tmp_path, quick(), module=Split())


# ---- what stands beside it


class Averaging(WeightAveraging):
    def should_update(self, step_idx: Any = None, epoch_idx: Any = None) -> bool:
        return True


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (ModelPruning("l1_unstructured", amount=0.5), "DST and ModelPruning would both mask weights"),
        (Averaging(), "Averaging averages weights over the steps"),
        (StochasticWeightAveraging(1e-2), "StochasticWeightAveraging averages weights"),
        (AEFOCL(graft="fit_end"), "DST keeps a classifier for each task, and AEFOCL with graft='fit_end'.*\"never\""),
        (NMC(graft="experience_end"), "a row of the accuracy matrix would mix both"),
    ],
)
def test_other_callbacks_that_mask_or_average_are_refused(tmp_path: Path, other: Any, said: str) -> None:
    for order in (lambda dst: [dst, other], lambda dst: [other, dst]):
        with pytest.raises(ConfigurationError, match=said):
            fit(tmp_path, *order(quick()))


def test_two_of_them_on_one_layer_are_refused(tmp_path: Path) -> None:
    class Second(DST):
        """Another state key."""

    with pytest.raises(
        ConfigurationError, match=r"mask of .*Second would change 'body.0', which already holds the mask"
    ):
        fit(tmp_path, quick(), Second(0.2, schedule="rigl", table=False))


@pytest.mark.parametrize("strategy", [GradientFreeStrategy(), GradientFreeStrategy(warmup_epochs=1)])
def test_a_strategy_that_does_not_train_the_network_is_refused(tmp_path: Path, strategy: Any) -> None:
    with pytest.raises(ConfigurationError, match="GradientFreeStrategy does not train the network in all of them"):
        fit(tmp_path, quick(), strategy=strategy)


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_split_the_network_are_refused(kind: type[Any]) -> None:
    class Trainer:
        strategy = kind.__new__(kind)  # not all can be made without what they need

    with pytest.raises(ConfigurationError, match=rf"DST cannot mask weights under {kind.__name__}.*strategy=\"ddp\""):
        DST().setup(Trainer(), Net(), "fit")  # type: ignore[arg-type]  # what of a trainer is looked at


# ---- tasks and densities


def test_a_wrong_rule_and_a_head_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="growth='rigl': rule must be one of 'gradient'"):
        DST(growth="rigl")
    with pytest.raises(ConfigurationError, match=r"the head 'body\.2', a ReLU that has no weights"):
        fit(tmp_path, quick(head="body.2"), module=Net())


def test_layers_without_sizes_are_named_before_anything_is_masked(tmp_path: Path) -> None:
    class Lazy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.body[4] = nn.LazyLinear(24)

    with pytest.raises(
        ConfigurationError, match=r"cannot mask body\.4\.weight, body\.4\.bias: .* run one before the fit"
    ):
        fit(tmp_path, quick(), module=Lazy())
    module = Lazy()
    module(DIGITS[:2])
    fit(tmp_path, quick(), module=module)


@pytest.mark.parametrize("data", [True, False], ids=["a stream", "two fits"])
def test_tasks_that_share_their_last_layer_are_said_once(data: bool, tmp_path: Path) -> None:
    dst, module = quick(head=[]), Net()

    def train() -> None:
        if data:
            run(tmp_path, dst, module=module, data=stream(stop_after=2, epochs_per_experience=1))
        else:
            fit(tmp_path, dst, module=module)
            fit(tmp_path, dst, module=module)

    with pytest.warns(UserWarning, match=r"no layer is a head of its own for each task.*head='…'") as warned:
        train()
    assert len(said_by_dst(warned)) == 1
    assert "head.weight" in dst.topology.names


def test_a_task_that_was_never_trained_is_named(tmp_path: Path) -> None:
    dst, module = quick(), Net()
    for ask in (lambda: dst.export(0), lambda: dst.activate(0, module).__enter__()):
        with pytest.raises(ArgumentError, match="task 0 was not trained to its end; 0 tasks were"):
            ask()
    fit(tmp_path, dst, module=module)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for ask in (lambda: dst.export(1), lambda: dst.activate(-1).__enter__()):
        with pytest.raises(ArgumentError, match="1 tasks were, counted from 0"):
            ask()
    wrong: Any = "1"  # as a user may write
    for ask in (lambda: dst.export(wrong), lambda: dst.activate(wrong).__enter__()):
        with pytest.raises(ArgumentError, match="task must be the index of a task, an integer from 0, got '1'"):
            ask()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"density": 0.0}, "density must be"),
        ({"density": 1.5}, "density must be"),
        ({"density": 20.0}, r"density must be a share above 0 and up to 1 \(20 % is 0.2\), got 20.0"),
        ({"density": 0.6, "pattern": "2:4", "grow_from": "any"}, "density=0.6 does not go with pattern='2:4'"),
        ({"growth": "random_unfired"}, "rule must be one of"),
        ({"reuse": "sometimes"}, "reuse must be one of"),
        (
            {"reuse": lambda task: "all", "pattern": "2:4", "prune": Prune(scope="free")},
            "pattern='2:4' does not go with reuse='all': .* use reuse='prefer_free' or 'random'",
        ),
        ({"density": lambda task: 1 / 0}, "density as a function of the task fails for task 0: division by zero"),
        ({"side_state": "frozen"}, "side_state must be"),
        ({"steps_per_task": 0}, "steps_per_task must be"),
    ],
)
def test_wrong_arguments_are_refused_by_the_constructor(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        DST(**options)


def test_a_density_that_leaves_a_layer_empty_is_refused_and_the_rest_is_kept(tmp_path: Path) -> None:
    asked = {0: 0.2, 1: 1e-4}
    dst, module = quick(density=asked.__getitem__), Net()
    fit(tmp_path, dst, module=module)
    learned = outputs(dst, module, 0)
    with pytest.raises(
        ArgumentError,
        match=r"task 1 cannot begin: density=0.0001 gives 1 of 6,984.*2 layers need 2,.*at least 0.000286",
    ):
        fit(tmp_path, dst, module=module)
    assert dst.tasks == 1
    assert torch.equal(outputs(dst, module, 0), learned)
    asked[1] = 0.2  # the next fit begins the task that could not begin
    fit(tmp_path, dst, module=module)
    assert dst.tasks == 2
    assert torch.equal(outputs(dst, module, 0), learned)


@pytest.mark.warns(r"a density of 0.0005 leaves a single connection to body.0, so hardly.*exclude=\['body.0'\]")
def test_a_layer_with_a_single_connection_is_said(tmp_path: Path) -> None:
    """72 and 6,912 connections: one of the first, which a share of 0.0005 would leave without any."""
    dst = quick(density=0.0005, initial="uniform")
    fit(tmp_path, dst)
    assert [int(mask.sum()) for mask in dst.topology.mask(0).values()] == [1, 2]


def test_a_stream_that_does_not_go_on_where_it_stands_is_refused(tmp_path: Path) -> None:
    dst, module = quick(), Net()
    fit(tmp_path, dst, module=module)
    fit(tmp_path, dst, module=module)
    assert dst.tasks == 2
    with pytest.raises(ConfigurationError, match="experience 1 begins, and DST has learned 2 tasks: each experience"):
        quiet_trainer(tmp_path, callbacks=[dst]).fit(module, datamodule=stream())


def test_settings_and_networks_of_another_run_are_refused(tmp_path: Path) -> None:
    dst = quick()
    trainer = fit(tmp_path, dst)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again: dict[str, Any] = {"max_epochs": 2}
    with pytest.raises(StateError, match=r"density.*use the settings of the saved run"):
        quiet_trainer(tmp_path, callbacks=[quick(density=0.3)], **again).fit(
            Net(), PLAIN, ckpt_path=str(tmp_path / "end.ckpt"), weights_only=True
        )
    wide = Net()
    wide.body[4] = nn.Linear(8 * 36, 30)
    fresh = quick()
    fresh.load_state_dict(dst.state_dict())
    with pytest.raises(ConfigurationError, match=r"they differ in \['body.4.weight'\]"):
        fit(tmp_path, fresh, module=wide)


# ---- the number of steps


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([(DIGITS[i], i % 10) for i in range(64)])


def test_steps_that_are_not_known_are_asked_for(tmp_path: Path) -> None:
    endless = DataLoader(Endless(), batch_size=8)
    with pytest.raises(ConfigurationError, match="neither max_epochs nor max_steps of the trainer ends the fit"):
        fit(tmp_path, quick(), max_epochs=-1, max_time="00:01:00:00")
    with pytest.raises(ConfigurationError, match="the loader does not say how many batches it has; set steps_per_task"):
        fit(tmp_path, quick(), loader=endless)
    for options, steps in (({"steps_per_task": 12}, 12), ({}, 7)):
        dst = quick(**options)
        fit(tmp_path, dst, loader=endless, max_steps=-1 if options else 7)
        assert dst.topology.steps == steps


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 16), (3, 6)])
def test_steps_are_counted_as_the_optimizer_makes_them(tmp_path: Path, accumulate: int, steps: int) -> None:
    dst = quick()
    trainer = fit(tmp_path, dst, max_epochs=2, accumulate_grad_batches=accumulate)
    assert trainer.global_step == dst.topology.step == dst.topology.steps == steps


@pytest.mark.parametrize(
    ("epochs", "said", "advised"),
    [
        (8, r"every 100 optimizer steps \(update_every\), which is 0 times in the 64 steps of task 0 \(exp", 9),
        (1, r"0 times in the 8 steps of task 0 \(experience 1\); use schedule=PruneSchedule\(update_every=1\)", 1),
    ],
)
def test_updates_that_hardly_come_are_said_once_with_what_is_enough(
    epochs: int, said: str, advised: int, tmp_path: Path
) -> None:
    dst, module = DST(0.2, table=False), Net()

    def train_twice() -> None:
        for _ in range(2):
            fit(tmp_path, dst, module=module, max_epochs=epochs)

    with pytest.warns(UserWarning, match=said) as warned:
        train_twice()
    (text,) = said_by_dst(warned)
    assert f"update_every={advised})" in text
    fit(tmp_path, quick(schedule=PruneSchedule(update_every=advised)), max_epochs=epochs)  # says nothing


@pytest.mark.warns("0 times in the 4 steps of task 0 .*; train a task for more epochs, so that they find their place")
def test_a_task_that_is_too_short_for_any_topology_is_said(tmp_path: Path) -> None:
    fit(tmp_path, DST(0.2, steps_per_task=4, table=False))


@pytest.mark.warns("every 40 optimizer steps .* 1 time in the 64 steps of task 0")
def test_a_single_update_is_said_as_one(tmp_path: Path) -> None:
    fit(tmp_path, quick(schedule=PruneSchedule(update_every=40)), max_epochs=8)


@pytest.mark.warns("every 1 optimizer step .* 0 times in the 1 step of task 0")
def test_a_single_step_is_said_as_one(tmp_path: Path) -> None:
    fit(tmp_path, quick(steps_per_task=1))


# ---- gradients


def test_steps_that_a_scaler_leaves_out_do_not_count(tmp_path: Path) -> None:
    """An infinite gradient makes the scaler leave a step out: no step is counted, nothing moves."""
    from lightning.pytorch.plugins import MixedPrecision

    class Spoiled(Net):
        def on_after_backward(self) -> None:
            if self.trainer.global_step in (2, 5):
                self.body[0].weight.grad[0] = torch.inf

    class NoAutocast(MixedPrecision):
        def autocast_context_manager(self) -> Any:  # of fp16 there is little on a CPU
            return torch.autocast("cpu", enabled=False)

    dst = quick()
    plugin = NoAutocast("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    trainer = fit(tmp_path, dst, module=Spoiled(), plugins=[plugin])
    assert trainer.global_step == 8  # Lightning counts them
    assert dst.topology.step == 6
    assert dst.tasks == 1


def test_gradients_are_clipped_by_the_norm_of_what_is_trained(tmp_path: Path) -> None:
    norms: list[tuple[float, float]] = []

    class Clipped(Net):
        def on_before_optimizer_step(self, optimizer: Any) -> None:  # after the callbacks, before the clipping
            parameters = [p.grad for p in self.parameters() if p.grad is not None]
            whole = torch.cat([each.flatten() for each in parameters]).norm()
            mask = dst.topology.mask(dst.topology.task)
            own = [
                p.grad[mask[name]] if name in mask else p.grad.flatten()
                for name, p in self.named_parameters()
                if p.grad is not None
            ]
            norms.append((float(whole), float(torch.cat(own).norm())))

    dst = quick()
    fit(tmp_path, dst, module=Clipped(), gradient_clip_val=0.5)
    assert len(norms) == 8
    assert all(whole == pytest.approx(own, rel=1e-5) for whole, own in norms)


# ---- capacity


@pytest.mark.warns(r"capacity runs low: task [12] \(experience [23]\) can train [\d,]+ of its [\d,]+ conn.*Use reuse=")
def test_little_capacity_is_said_once_with_its_numbers(tmp_path: Path) -> None:
    run(tmp_path, quick(density=0.6), data=stream(epochs_per_experience=1, stop_after=3))


@pytest.mark.warns(
    r"task 1 \(experience 2\) can train no connection: all 6,984 of its mask belong to earlier.*need a larger"
)
def test_a_task_without_any_connection_of_its_own_trains_its_head(tmp_path: Path) -> None:
    dst, module = quick(density=1.0), Net()
    _, seen, _ = run(tmp_path, dst, module=module, data=stream(stop_after=2))
    assert dst.reports[1].reused == dst.reports[1].active
    assert torch.equal(seen.rows[0][0], seen.rows[1][0])
    assert not torch.equal(seen.rows[1][0], seen.rows[1][1])


@pytest.mark.warns("3 times in the 4 steps of task 0")
@pytest.mark.parametrize("scenario", [ClassIncremental, TaskIncremental])
def test_that_the_task_of_a_sample_is_known_is_said_where_the_stream_does_not_give_it(
    scenario: type[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = StreamDataModule("digits", scenario(experiences=5), batch_size=60, stop_after=2)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        run(tmp_path, quick(), data=data)
    said = [each.message for each in caplog.records if "accuracies are those of known tasks" in each.message]
    assert len(said) == int(scenario is ClassIncremental)
