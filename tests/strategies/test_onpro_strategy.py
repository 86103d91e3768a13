"""Replay learning in a trainer: one forward a step, each row offered once, nothing drawn or left behind that is not."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.precision import MixedPrecision
from onpro_runs import (
    BATCHES,
    SAMPLES,
    Lit,
    Net,
    Offers,
    Watch,
    batch,
    dataset,
    equal,
    er,
    images_of,
    lit,
    loader,
    onpro,
    stream,
    values,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, NMC, FeatureCallback, StreamEvaluation
from clkit.errors import ArgumentError, BatchError, ConfigurationError
from clkit.strategies import ERStrategy, OnProStrategy, SCRStrategy
from clkit.testing._compare import changed

Make = Callable[..., Any]


# ---- one forward a step


def rows_of_a_run(variants: int, capacity: int, replay: int, per_class: int) -> Iterator[int]:
    """Images through the network in each step of the stream, from the published table of views."""
    seen_classes, memory, stored = (2, 5, 6), 0, 0
    for experience, sizes in enumerate(BATCHES):
        for number, size in enumerate(sizes):
            stored = min(capacity, memory)
            if experience == 0:
                sample = min(replay, stored) if number else 0
                yield 2 * variants * size + size + 2 * sample
            else:
                wanted = min(replay, per_class * seen_classes[experience])
                sample = min(wanted, stored)
                mixed = sample if number == 0 else wanted
                yield 2 * variants * (size + mixed) + mixed + 2 * sample
            memory += size


@pytest.mark.parametrize(("rotation", "variants"), [("none", 1), ("rot4", 4), ("rot16", 16)])
def test_one_forward_a_step_of_the_published_number_of_images(make_trainer: Make, rotation: Any, variants: int) -> None:
    module, calls = lit(), []
    module.net.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    # one batch of the second experience alone has all of its classes, so the limit by class is not reached
    strategy = onpro(rotation=rotation, capacity=9, replay_batch=11, replay_per_class=99)
    make_trainer(strategy=strategy, limit_val_batches=0).fit(module, datamodule=stream())
    assert calls == list(rows_of_a_run(variants, capacity=9, replay=11, per_class=99))


def test_the_replay_batch_grows_with_the_classes_seen(make_trainer: Make) -> None:
    module, calls = lit(), []
    module.net.register_forward_hook(lambda m, args, out: calls.append(len(args[0])))
    strategy = onpro(capacity=50, replay_batch=9, replay_per_class=2)
    trainer = make_trainer(strategy=strategy, max_epochs=1)
    trainer.fit(module, loader(batch(0, 1, 0, 1, 0, 1), batch(0, 1)))
    trainer.fit_loop.max_epochs = 2
    calls.clear()
    trainer.fit(module, loader(batch(2), batch(3), batch(4)))
    # three classes with the batch's own: 6 images; four: 8; five: no more than 9, of which 8 are stored and 2 new
    assert calls == [2 * (1 + m) + m + 2 * m for m in (6, 8, 9)]


@pytest.mark.warns("the backbone still trains")
def test_the_extra_pass_of_heads_comes_apart(make_trainer: Make) -> None:
    module, calls = lit(), []
    module.net.register_forward_hook(lambda m, args, out: calls.append((m.training, torch.is_grad_enabled())))
    trainer = make_trainer(strategy=onpro(), callbacks=[NMC(), AEFOCL()], limit_val_batches=0)
    trainer.fit(module, datamodule=stream())
    assert calls == [(False, False), (True, True)] * 12


def test_heads_read_the_batch_itself_from_the_one_forward_of_a_network_without_modes(make_trainer: Make) -> None:
    """No batch statistics, no dropout: the incoming images pass as they are, and no second pass is paid."""
    module, calls, seen = lit(norm=False), [], []
    module.net.register_forward_hook(lambda m, args, out: calls.append(m.training))

    class Read(FeatureCallback):
        def learn(self, features: Tensor, targets: Tensor) -> None:
            seen.append(features.clone())

    class Before(pl.Callback):
        def __init__(self) -> None:
            self.features: list[Tensor] = []

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            net = copy.deepcopy(pl_module.net)
            net.fc = nn.Identity()
            with torch.no_grad():
                self.features.append(net(batch[0]))

    before = Before()
    trainer = make_trainer(strategy=onpro(rotation="rot4"), callbacks=[before, Read()], limit_val_batches=0)
    trainer.fit(module, datamodule=stream())
    assert calls.count(True) == 12 + 12  # the step's, and that of `Before`, whose copies carry the hook
    assert len(seen) == 12
    for features, wanted in zip(seen, before.features, strict=True):
        assert torch.allclose(features, wanted.double(), rtol=1e-5, atol=1e-6)


# ---- each row offered once


class LBFGS(Lit):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.net.parameters(), lr=0.01, max_iter=3)


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [
        (Lit, {}, 12),
        (Lit, {"accumulate_grad_batches": 3}, 12),
        (LBFGS, {}, 12),
        (Lit, {"max_steps": 7}, 7),
        (Lit, {"limit_train_batches": 3}, 8),
        (Lit, {"overfit_batches": 2}, 6),
        (Lit, {"gradient_clip_val": 0.1, "val_check_interval": 1}, 12),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value) if isinstance(value, dict) else "",
)
def test_each_row_is_offered_once_as_it_came(
    make_trainer: Make, kind: type[Lit], options: dict[str, Any], steps: int
) -> None:
    strategy, watch = onpro(), Watch()
    offers = Offers(strategy)
    make_trainer(strategy=strategy, callbacks=[watch], **options).fit(lit(kind), datamodule=stream())
    assert len(offers.images) == len(watch.images) == steps
    assert all(torch.equal(one, two) for one, two in zip(offers.images, watch.images, strict=True))
    assert offers.labels == watch.labels
    assert strategy.memory is not None
    assert strategy.memory.n_seen == len(watch.labels)


def test_rows_know_their_experience(make_trainer: Make) -> None:
    strategy = onpro(capacity=100)
    make_trainer(strategy=strategy).fit(lit(), datamodule=stream())
    assert strategy.memory is not None
    classes_of = {0: {0, 1}, 1: {2, 3, 4}, 2: {5}}
    found: dict[int, set[int]] = {}
    rows = strategy.memory.sample(100)
    for label, experience in zip(rows.label.tolist(), rows.experience.tolist(), strict=True):
        found.setdefault(experience, set()).add(label)
    assert found == classes_of
    assert torch.bincount(rows.label).tolist() == list(SAMPLES)


def test_a_closure_that_is_called_again_sees_the_same_views_and_draws(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import clkit.methods.replay.contrast as used

    module, calls, offsets = lit(LBFGS), [], []
    module.net.register_forward_hook(lambda m, args, out: calls.append((module.trainer.fit_loop.total_batch_idx, args)))

    def contrast(*args: Any, **options: Any) -> Tensor:
        offsets.append((module.trainer.fit_loop.total_batch_idx, options["form"], options["offset"]))
        return original(*args, **options)

    original = used.instance_contrast
    monkeypatch.setattr(used, "instance_contrast", contrast)
    make_trainer(strategy=onpro(dim=3), limit_val_batches=0).fit(module, datamodule=stream())
    views: dict[int, list[Tensor]] = {}
    for step, (images,) in calls:
        views.setdefault(step, []).append(images)
    assert len(views) == 12
    assert all(len(each) > 1 for each in views.values())
    assert all(torch.equal(each[0], other) for each in views.values() for other in each[1:])
    assert len({(step, form) for step, form, _ in offsets}) == len(set(offsets))
    assert len({offset for *_, offset in offsets}) > 2


@pytest.mark.warns("the stream has a single experience")
def test_a_step_that_the_scaler_skips_still_fills_the_memory(make_trainer: Make) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100, growth_interval=1000)
    strategy, module, watch, projector = onpro(), lit(norm=False), Watch(), Projector()
    scales: list[float] = []

    class Scales(pl.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            scales.append(scaler.get_scale())

    offers = Offers(strategy)
    start = values(module)
    trainer = make_trainer(
        strategy=strategy, callbacks=[watch, projector, Scales()], plugins=[MixedPrecision("16-mixed", "cpu", scaler)]
    )
    trainer.fit(module, datamodule=stream(stop_after=1))
    assert scales == [2.0**99, 2.0**98, 2.0**97, 2.0**96]
    assert equal(values(module), start)
    assert strategy.projector is not None
    assert equal(values(strategy.projector), projector.start)
    assert offers.labels == watch.labels
    assert len(offers.labels) == 17


# ---- randomness


def noisy(image: Tensor) -> Tensor:
    """Draws from all global generators, as foreign transforms do."""
    shift = float(np.random.rand()) + random.random()  # noqa: NPY002  as users write it
    return image + torch.randn_like(image) + shift


class GlobalStates(pl.Callback):
    """The global random states around each step."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []

    @staticmethod
    def now() -> Any:
        numpy = np.random.get_state()  # noqa: NPY002  the global generator is what must be left alone
        return torch.get_rng_state().tolist(), random.getstate(), [str(numpy[0]), numpy[1].tolist(), *numpy[2:]]

    def on_train_batch_start(self, *args: Any) -> None:
        self.before.append(self.now())

    def on_train_batch_end(self, *args: Any) -> None:
        self.after.append(self.now())


@pytest.mark.parametrize("transform", [None, noisy], ids=["own", "foreign"])
def test_a_step_leaves_the_global_random_states_alone(make_trainer: Make, transform: Any) -> None:
    states = GlobalStates()
    make_trainer(strategy=onpro(transform=transform, rotation="rot4"), callbacks=[states]).fit(
        lit(), datamodule=stream()
    )
    assert len(states.before) == 12
    assert states.before == states.after


@pytest.mark.parametrize("transform", [None, pytest.param(noisy, marks=pytest.mark.slow)], ids=["own", "foreign"])
def test_draws_follow_the_strategys_seed_alone(make_trainer: Make, transform: Any) -> None:
    def run(seed: int, start: int) -> dict[str, Tensor]:
        module = lit()
        for plant in (torch.manual_seed, random.seed, np.random.seed):
            plant(start)
        make_trainer(strategy=onpro(transform=transform, seed=seed)).fit(module, datamodule=stream())
        return values(module)

    assert equal(run(0, 1), run(0, 2))
    assert not equal(run(0, 1), run(3, 1))


@pytest.mark.parametrize(
    ("transform", "error", "match"),
    [
        ("flip", ArgumentError, r"transform must be a function or None, got 'flip'"),
        (lambda image: image[:, :2], BatchError, r"transform must give images of the shape .*\(3, 4, 4\), got \(3, 2"),
        (lambda image: image.numpy(), BatchError, r"transform must give.*got ndarray"),
    ],
)
def test_a_wrong_transform_is_named(make_trainer: Make, transform: Any, error: type[Exception], match: str) -> None:
    module = lit()
    start = values(module)
    with pytest.raises(error, match=match):
        make_trainer(strategy=onpro(transform=transform)).fit(module, datamodule=stream())
    assert equal(values(module), start)


# ---- a module that has never heard of it


class TwoGroups(Lit):
    def configure_optimizers(self) -> Any:
        body = [*self.net.conv.parameters(), *self.net.norm.parameters()]
        groups = [{"params": body, "lr": 0.25}, {"params": list(self.net.fc.parameters()), "lr": 0.0}]
        return torch.optim.SGD(groups, lr=9.0)


class Scheduled(Lit):
    """Schedules that know how many groups there are."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__(**options)
        self.kind = kind

    def configure_optimizers(self) -> Any:
        groups = [{"params": list(part.parameters())} for part in (self.net.conv, self.net.fc)]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        schedules: dict[str, Callable[[], Any]] = {
            "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, [0.1, 0.2], total_steps=12),
            "lambdas": lambda: torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _: 0.5, lambda _: 1.0]),
        }
        interval = "step" if self.kind == "one cycle" else "epoch"
        return [optimizer], [{"scheduler": schedules[self.kind](), "interval": interval}]


class Manual(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class TwoOptimizers(Manual):
    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net.conv, self.net.fc)]


class NoOptimizer(Lit):
    def configure_optimizers(self) -> Any:
        return None


class NoForward(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("the strategy computes the loss")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)


class Projector(pl.Callback):
    """The projector at the start of training, its gradient before each step, and the steps in the end."""

    steps = 0

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.gradients: list[Tensor] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.start = values(pl_module.replay_projector)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        self.gradients.append(pl_module.replay_projector.layers[0].weight.grad.clone())

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.steps = trainer.global_step


@pytest.mark.parametrize(
    "make",
    [
        Lit,
        TwoGroups,
        *(lambda kind=kind: Scheduled(kind) for kind in ("one cycle", "lambdas")),
        Manual,
        NoForward,
    ],
    ids=["own network", "two groups", "one cycle", "lambdas", "manual", "no forward"],
)
def test_the_projector_of_a_foreign_module_trains_and_goes(make_trainer: Make, make: Callable[[], Any]) -> None:
    module, strategy, projector = lit(make), onpro(), Projector()
    start, automatic = values(module), module.automatic_optimization
    make_trainer(strategy=strategy, callbacks=[projector]).fit(module, datamodule=stream())
    assert projector.steps == 12
    assert strategy.projector is not None
    trained = values(strategy.projector)
    assert all(not torch.equal(trained[name], projector.start[name]) for name in trained)
    assert list(module.state_dict()) == list(start)
    assert not torch.equal(module.net.conv.weight, start["net.conv.weight"])
    assert module.automatic_optimization is automatic
    assert type(module.net.norm) is nn.BatchNorm2d


def test_the_projector_has_the_settings_of_the_first_group(make_trainer: Make) -> None:
    module, strategy, projector = lit(TwoGroups), onpro(), Projector()
    classifier = module.net.fc.weight.clone()
    make_trainer(strategy=strategy, callbacks=[projector]).fit(module, datamodule=stream())
    weight = projector.start["layers.0.weight"]
    for gradient in projector.gradients:
        weight = weight - 0.25 * gradient
    assert strategy.projector is not None
    assert torch.equal(values(strategy.projector)["layers.0.weight"], weight)
    assert torch.equal(module.net.fc.weight, classifier)


@pytest.mark.filterwarnings("ignore:.*this fit will run with no optimizer")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (NoOptimizer, r"Strategy.*configure_optimizers\(\) of NoOptimizer gives no"),
        (TwoOptimizers, r"one optimizer, configure_optimizers\(\) of TwoOptimizers gives 2"),
    ],
)
def test_what_is_not_one_optimizer_is_named(make_trainer: Make, kind: Any, said: str) -> None:
    module = lit(kind)
    keys, automatic = list(module.state_dict()), module.automatic_optimization
    for make in (onpro, er):
        with pytest.raises(ConfigurationError, match=said):
            make_trainer(strategy=make()).fit(module, datamodule=stream())
    assert list(module.state_dict()) == keys
    assert module.automatic_optimization is automatic


def test_a_name_that_is_taken_is_named(make_trainer: Make) -> None:
    class Taken(Lit):
        replay_projector = None

    with pytest.raises(ConfigurationError, match=r"Taken has an attribute 'replay_projector'.*rename"):
        make_trainer(strategy=onpro()).fit(lit(Taken), datamodule=stream())


def test_a_network_whose_width_nobody_knows_is_named(make_trainer: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot tell the width of the features.*layer="):
        make_trainer(strategy=onpro(layer="output")).fit(lit(), datamodule=stream())


class StoppedError(RuntimeError):
    pass


class Failing(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 6:
            raise StoppedError


def test_a_failed_run_gives_the_module_back(make_trainer: Make) -> None:
    module = lit(Manual)
    keys = list(module.state_dict())
    strategy = onpro()
    with pytest.raises(StoppedError):
        make_trainer(strategy=strategy, callbacks=[Failing()]).fit(module, datamodule=stream())
    assert list(module.state_dict()) == keys
    assert module.automatic_optimization is False
    assert type(module.net.norm) is nn.BatchNorm2d
    assert not module.net.fc._forward_hooks
    # and what was learned is still there
    assert strategy.memory is not None
    assert strategy.memory.n_seen == 27
    make_trainer(strategy=onpro()).fit(module, datamodule=stream())


# ---- several fits and evaluations


def tasks() -> list[Any]:
    images, labels = dataset().tensors
    loaders = []
    for low, high in ((0, 2), (2, 5), (5, 6)):
        rows = (labels >= low) & (labels < high)
        loaders.append(DataLoader(TensorDataset(images[rows], labels[rows]), 5))
    return loaders


def test_plain_loaders_one_fit_a_task(make_trainer: Make) -> None:
    module, strategy, projectors = lit(), onpro(capacity=100, replay_batch=64), []
    offers = Offers(strategy)
    trainer = make_trainer(strategy=strategy, max_epochs=0)
    for number, task in enumerate(tasks()):
        trainer.fit_loop.max_epochs = number + 1
        trainer.fit(module, task)
        trainer.validate(module, task, verbose=False)
        projectors.append((strategy.projector, values(strategy.projector)))
    assert offers.experiences == [0] * 4 + [1] * 6 + [2] * 2
    assert strategy.memory is not None
    assert torch.bincount(strategy.memory.sample(100).label).tolist() == list(SAMPLES)
    assert len({id(part) for part, _ in projectors}) == 1
    assert not equal(projectors[0][1], projectors[1][1])
    assert strategy.prototypes.ids.tolist() == list(range(6))


# ---- batches at the edge


def fitted(make_trainer: Make, *batches: tuple[Tensor, Tensor], module: Any = None, **options: Any) -> OnProStrategy:
    """A run over these batches, each a fit of its own where it is a list."""
    strategy = onpro(**options)
    trainer = make_trainer(strategy=strategy, max_epochs=1)
    trainer.fit(lit() if module is None else module, loader(*batches))
    return strategy


class Mixed:
    """The replay batches that were mixed."""

    def __init__(self, strategy: OnProStrategy) -> None:
        self.mix = strategy.prototypes.mix
        self.batches: list[Any] = []
        prototypes: Any = strategy.prototypes
        prototypes.mix = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.batches.append(self.mix(*args, **options))
        return self.batches[-1]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 1, 2)], ids=str)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.warns("the memory counts its images again")
def test_batches_of_one_class_and_of_one_image(make_trainer: Make, sizes: tuple[int, ...], norm: bool) -> None:
    module, watch = lit(norm=norm), Watch()
    start = values(module)
    trainer = make_trainer(strategy=onpro(rotation="rot4"), callbacks=[watch], max_epochs=2)
    trainer.fit(module, loader(*(batch(*[2] * size, seed=i) for i, size in enumerate(sizes))))
    assert [logged["onpro/ope_new"] for logged in watch.logged] == [0.0] * 6
    assert all(np.isfinite(value) for logged in watch.logged for value in logged.values())
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    assert all(not torch.equal(value, start[name]) for name, value in module.state_dict().items() if "weight" in name)


def test_while_the_memory_has_one_class_the_replay_batch_is_mixed_among_itself(make_trainer: Make) -> None:
    strategy = onpro(first_experience="replay", replay_batch=6, probability=1.0)
    mixed, module = Mixed(strategy), lit()
    make_trainer(strategy=strategy, max_epochs=1).fit(module, loader(*(batch(3, 3, 3, seed=i) for i in range(5))))
    assert [len(each.images) for each in mixed.batches] == [3, 6, 6, 6]  # what there is, at most six
    assert all(set(each.first.tolist() + each.second.tolist()) == {3} for each in mixed.batches)
    assert strategy.prototypes.ids.tolist() == [3]


def test_a_small_memory_is_filled_up_by_pairs(make_trainer: Make) -> None:
    """Fewer rows than the base part asks for; with two classes all others are of their one pair."""
    strategy = onpro(first_experience="replay", capacity=4, replay_batch=12, replay_per_class=None)
    mixed = Mixed(strategy)
    batches = [batch(0, 5, seed=i) for i in range(8)]
    make_trainer(strategy=strategy, max_epochs=1).fit(lit(), loader(*batches))
    # 1st: nothing to replay; 2nd: one sample, no prototypes yet, all two rows; then up to twelve
    assert [len(each.images) for each in mixed.batches] == [2] + [12] * 6
    for each in mixed.batches[1:]:
        pairs = {tuple(pair) for pair in torch.stack([each.first, each.second], 1)[4:].tolist()}
        assert pairs <= {(0, 5), (5, 5), (0, 0)}
        assert bool(((each.share >= 0) & (each.share <= 1)).all())


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (batch(0, 1, 6), r"label 6, and the classifier 6 outputs \(0 to 5\); build it"),
        (batch(0, -2, 1), r"label -2, and the classifier 6 outputs"),
        ((batch(0, 1)[0], torch.tensor([0.0, 1.0])), "onpro: targets of type float32 are no class ids"),
        ((batch(0, 1)[0], torch.tensor([True, False])), "onpro: targets of type bool are no class ids"),
        ((batch(0, 1, 1)[0], torch.tensor([0, 1])), r"targets must have shape \(3,\), got \(2,\)"),
        ((batch(0, 1)[0].to(torch.uint8), torch.tensor([0, 1])), r"floating-point tensor \(B, …\), got torch.uint8"),
        ((torch.full((2, 3, 4, 4), torch.nan), torch.tensor([0, 1])), r"images of the batch are not finite"),
    ],
)
def test_a_bad_batch_changes_nothing(make_trainer: Make, bad: tuple[Tensor, Tensor], match: str) -> None:
    def end(last: tuple[Tensor, Tensor], error: type[Exception], words: str) -> tuple[Any, Any]:
        module, strategy = lit(), onpro(first_experience="replay")
        trainer = make_trainer(strategy=strategy, callbacks=[Stop()] if error is StoppedError else [], max_epochs=1)
        with pytest.raises(error, match=words):
            trainer.fit(module, loader(batch(0, 1, 2), batch(3, 1, 2), last))
        assert strategy.projector is not None
        return values(module), {**strategy.stream_state(), "projector": values(strategy.projector)}

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise StoppedError

    (module, state), (other, other_state) = end(batch(0, 1), StoppedError, "^$"), end(bad, BatchError, match)
    assert equal(module, other)
    assert changed(state, other_state) == []


def test_images_that_cannot_be_turned_are_named_at_the_first_batch(make_trainer: Make) -> None:
    module, calls = lit(), []
    module.net.register_forward_hook(lambda *args: calls.append(1))
    with pytest.raises(BatchError, match=r"rotation='rot16'.*even side, got 5 x 5; use rotation='rot4'"):
        fitted(make_trainer, (torch.rand(4, 3, 5, 5), torch.arange(4)), module=module, rotation="rot16")
    assert not calls


@pytest.mark.parametrize(("shape", "rotation"), [((1, 5, 5), "rot4"), ((1, 4, 6), "none"), ((1, 6, 6), "rot16")])
def test_one_channel_and_any_size_that_the_rotation_allows(
    make_trainer: Make, shape: tuple[int, ...], rotation: Any
) -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, *shape, generator=draw), torch.arange(4)) for _ in range(4)]
    module = lit(channels=1)
    strategy = fitted(make_trainer, *batches, module=module, rotation=rotation, first_experience="replay")
    assert strategy.projector is not None
    # a network of eight features: as wide an embedding, of which no slice is drawn
    assert values(strategy.projector)["layers.0.weight"].shape == (8, 8)
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())


def test_an_embedding_wider_than_the_features_is_named(make_trainer: Make) -> None:
    with pytest.raises(ArgumentError, match=r"projection.dim=9 .*8 features"):
        fitted(make_trainer, batch(0, 1), dim=9)


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [
        (ERStrategy, "memory", {"storage": "uint8"}, "MemorySettings(…)"),
        (OnProStrategy, "losses", "rot4", "OnProLosses(…)"),
        (OnProStrategy, "mixing", False, "Mixing(…) or None"),
        (OnProStrategy, "projection", 32, "Projection(…)"),
        (SCRStrategy, "projection", "mlp", "Projection(…)"),
    ],
)
def test_settings_of_another_type_are_named(kind: Any, name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        kind(**{name: value})
    assert str(caught.value) == f"{name} must be {wanted}, got {value!r}"


def test_gaps_any_order_and_classes_that_come_back(make_trainer: Make) -> None:
    """Nothing depends on how many classes an experience has or in which order they come."""
    module, strategy = lit(), onpro(capacity=60)
    trainer = make_trainer(strategy=strategy, max_epochs=0)
    for number, labels in enumerate([(5, 2, 5), (0, 4, 0), (5, 0, 1)]):
        trainer.fit_loop.max_epochs = number + 1
        trainer.fit(module, loader(*(batch(*labels, seed=10 * number + i) for i in range(4))))
    assert strategy.memory is not None
    rows = strategy.memory.sample(60)
    assert torch.bincount(rows.label).tolist() == [12, 4, 4, 0, 4, 12]
    assert sorted(set(zip(rows.label.tolist(), rows.experience.tolist(), strict=True))) == [
        (0, 1), (0, 2), (1, 2), (2, 0), (4, 1), (5, 0), (5, 2),
    ]  # fmt: skip


def test_rows_without_a_label_are_not_learned(make_trainer: Make) -> None:
    """They may as well not be there: the views, the memory and the weights are those of the others."""
    ends = []
    for hidden in (False, True):
        batches = [batch(0, 1, 2, 3, seed=i) for i in range(5)]
        if hidden:
            batches = [
                (torch.cat([x[:1], torch.rand(2, 3, 4, 4), x[1:]]), torch.cat([y[:1], torch.tensor([-1, -1]), y[1:]]))
                for x, y in batches
            ]
        module = lit()
        strategy = fitted(make_trainer, *batches, module=module, first_experience="replay")
        ends.append((values(module), strategy.stream_state()))
    assert equal(ends[0][0], ends[1][0])
    assert changed(ends[0][1], ends[1][1]) == []


def test_a_head_beside_reads_the_labelled_rows(make_trainer: Make) -> None:
    """Also where it would read them from the step, which runs without the others."""
    ends = []
    for hidden in (False, True):
        x, y = batch(0, 1, 2, 3)
        if hidden:
            x, y = torch.cat([x[:1], torch.rand(2, 3, 4, 4), x[1:]]), torch.cat([y[:1], torch.tensor([-1, -1]), y[1:]])
        head = NMC()
        trainer = make_trainer(strategy=onpro(), callbacks=[head], max_epochs=1)
        trainer.fit(lit(norm=False), loader(*([(x[:0], y[:0])] if hidden else []), (x, y)))
        ends.append(dict(head.head.state_dict()))
    assert changed(*ends) == []


def test_a_head_that_must_read_the_step_says_why_it_cannot(make_trainer: Make) -> None:
    trainer = make_trainer(strategy=onpro(), callbacks=[NMC(forward="shared")], max_epochs=1)
    with pytest.raises(BatchError, match=r'rows without a label.*forward="auto"'):
        trainer.fit(lit(norm=False), loader((batch(0, 1, 2)[0], torch.tensor([0, -1, -1]))))


@pytest.mark.parametrize("labels", [(), (-1, -1)], ids=["no rows", "no labels"])
def test_a_batch_of_nothing_is_no_step(make_trainer: Make, labels: tuple[int, ...]) -> None:
    """Before there is a memory and after; with plain gradient descent the weights are those of a run without it."""

    ends = []
    nothing = (torch.rand(len(labels), 3, 4, 4), torch.tensor(labels, dtype=torch.int64))
    good = [batch(0, 1, 2, seed=i) for i in range(3)]
    for batches in (good, [nothing, good[0], nothing, *good[1:], nothing]):
        module = lit(Descent)
        module.formats = []
        strategy = fitted(make_trainer, *batches, module=module, first_experience="replay")
        assert strategy.projector is not None
        ends.append((values(module), {**strategy.stream_state(), "projector": values(strategy.projector)}))
    assert equal(ends[0][0], ends[1][0])
    assert changed(ends[0][1], ends[1][1]) == []


def test_a_term_that_is_not_finite_is_named_and_the_memory_gets_the_batch(make_trainer: Make) -> None:
    module, strategy = lit(), onpro(first_experience="replay")
    offers = Offers(strategy)

    class Break(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                with torch.no_grad():
                    pl_module.net.fc.weight.fill_(torch.inf)

    trainer = make_trainer(strategy=strategy, callbacks=[Break()], max_epochs=1)
    with (
        pytest.warns(UserWarning, match=r"batch 3: the loss terms .* of OnProStrategy are not finite"),
        pytest.warns(UserWarning, match=r"batch 2: the loss term ce_mem of OnProStrategy is not finite") as said,
    ):
        trainer.fit(module, loader(*(batch(0, 1, 2, seed=i) for i in range(5))))
    assert sum(" ce_mem " in str(warning.message) for warning in said) == 1
    assert len(offers.labels) == 15
    assert bool(strategy.prototypes.means.isfinite().all())


def test_images_of_another_size_than_the_memorys_are_named(make_trainer: Make) -> None:
    with pytest.raises(BatchError, match=r"fixed the rows to data \(3, 4, 4\) torch.float32, got data \(3, 6, 6\)"):
        fitted(make_trainer, batch(0, 1), batch(0, 1), batch(0, 1, size=6))


def test_a_label_beyond_a_classifier_that_nobody_found_is_named_before_the_weights_change(make_trainer: Make) -> None:
    module = lit(norm=False)
    with pytest.raises(BatchError, match="label 6, and the classifier 6 outputs"):
        fitted(make_trainer, batch(0, 6), module=module, kind=ERStrategy, layer="net")
    assert equal(values(module), values(lit(norm=False)))


# ---- what a run says and logs


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        yield caplog


def test_terms_are_logged_by_name(make_trainer: Make) -> None:
    watch = Watch()
    strategy = onpro(probability=1.0)
    mixed = Mixed(strategy)
    make_trainer(strategy=strategy, callbacks=[watch], limit_val_batches=0).fit(lit(), datamodule=stream())
    first, second, later = watch.logged[0], watch.logged[1], watch.logged[6]
    start = {"loss", "ce_new", "instance_new", "ope_new", "memory", "mixed_share"}
    assert set(first) == {f"onpro/{name}" for name in start}
    assert set(second) == {f"onpro/{name}" for name in start | {"ope_seen"}}
    now = start - {"ce_new"} | {"ope_seen", "ce_mem", "instance_mem", "pair_entropy"}
    assert {f"onpro/{name}" for name in now} <= set(later)
    terms = ("ce_mem", "instance_new", "instance_mem", "ope_new", "ope_seen")
    assert later["onpro/loss"] == pytest.approx(sum(later[f"onpro/{name}"] for name in terms), rel=1e-6)
    assert [logged["onpro/memory"] for logged in watch.logged] == [5, 9, 13, 17, *[20] * 8]
    pairs = mixed.batches[-1]
    share = float(((pairs.first != pairs.second) & (pairs.share > 0)).float().mean())
    assert 0 < watch.logged[-1]["onpro/mixed_share"] == pytest.approx(share)


class Written(Logger):
    """What a logger is given, by step."""

    name, version = "written", "0"

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.values.setdefault(step, {}).update({k: v for k, v in metrics.items() if "class" not in k})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_values_of_a_step_are_computed_where_lightning_logs_or_somebody_asks(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve batches, six an experience: what is written is the same values that a log of each step has."""
    calls, log = [], Lit.log_dict
    monkeypatch.setattr(Lit, "log_dict", lambda self, *args, **options: (calls.append(1), log(self, *args, **options)))
    written, counts = [], []
    asks = ModelCheckpoint(tmp_path, monitor="onpro/loss", every_n_train_steps=1, save_top_k=1)
    for every, callbacks in ((1, []), (5, []), (5, [asks])):
        calls.clear()
        logger = Written()
        trainer = make_trainer(
            strategy=onpro(), callbacks=callbacks, logger=logger, log_every_n_steps=every, limit_val_batches=0
        )
        trainer.fit(lit(), datamodule=stream())
        written.append(logger.values)
        counts.append(len(calls))
        assert "onpro/loss" in trainer.callback_metrics
    own = [{step for step, values in each.items() if "onpro/loss" in values} for each in written]
    assert own == [set(range(12)), {4, 9}, {4, 9}]
    assert written[1][4] == written[0][4]
    assert written[1][9]["onpro/loss"] == written[0][9]["onpro/loss"]
    assert counts == [12, 4, 12]  # 4 and 9, and 5 and 11, the last of their epochs
    lowest = min(written[0][step]["onpro/loss"] for step in range(12))
    assert float(asks.best_model_score) == pytest.approx(lowest)


def test_the_entropy_is_that_of_the_distribution_over_pairs(make_trainer: Make) -> None:
    """Recomputed in NumPy from the means that the step before kept."""
    strategy, kept, logged = onpro(), [], []

    class Keep(pl.Callback):
        def on_train_batch_start(self, *args: Any) -> None:
            kept.append(strategy.prototypes.means.double().numpy().copy())

        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            logged.append(float(trainer.callback_metrics.get("onpro/pair_entropy", -1.0)))

    make_trainer(strategy=strategy, callbacks=[Keep()], limit_val_batches=0).fit(lit(), datamodule=stream())
    for step in (5, 6, 7, 8, 9, 11):  # not the first batch of an experience
        means = kept[step]
        inverse = np.array(
            [1 / np.linalg.norm(means[i] - means[k]) for i in range(len(means)) for k in range(i + 1, len(means))]
        )
        q = np.exp(inverse - inverse.max())
        q /= q.sum()
        assert logged[step] == pytest.approx(-(q * np.log(q, where=q > 0, out=np.zeros_like(q))).sum(), abs=1e-5)


def test_another_name_is_another_prefix(make_trainer: Make) -> None:
    watch = Watch()
    make_trainer(strategy=er(name="mine"), callbacks=[watch], limit_val_batches=0).fit(lit(), datamodule=stream())
    assert all(set(logged) == {"mine/loss", "mine/ce", "mine/memory"} for logged in watch.logged)


def test_the_first_step_says_what_it_costs_and_what_less_would(
    make_trainer: Make, said: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(strategy=OnProStrategy(), max_epochs=1)
    data = images_of(torch.arange(20) % 6, 0)
    trainer.fit(lit(), loader((data[:10], torch.arange(10) % 6), (data[10:], torch.arange(10) % 6)))
    (line,) = [message for message in said.messages if "images through the network" in message]
    assert "2560 images" in line
    assert "for 10 new ones (rotation='rot16')" in line
    assert "rotation='rot4' would run 784 (30 %)" in line


def test_the_run_says_once_that_training_step_is_not_called(make_trainer: Make, said: pytest.LogCaptureFixture) -> None:
    trainer = make_trainer(strategy=onpro(), max_epochs=1)
    trainer.fit(lit(), loader(batch(0, 1)))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(lit(), loader(batch(0, 1)))
    assert sum("training_step() of Lit is not called" in message for message in said.messages) == 1


def test_a_second_epoch_over_an_experience_is_a_warning(make_trainer: Make, recwarn: pytest.WarningsRecorder) -> None:
    make_trainer(strategy=onpro()).fit(lit(), datamodule=stream(epochs_per_experience=2))
    messages = [str(warning.message) for warning in recwarn]
    assert sum("the memory counts its images again" in message for message in messages) == 1
    recwarn.clear()
    make_trainer(strategy=onpro()).fit(lit(), datamodule=stream())
    make_trainer(strategy=er(capacity=0)).fit(lit(), datamodule=stream(epochs_per_experience=2))
    assert not any("again" in str(warning.message) for warning in recwarn)


@pytest.mark.parametrize(
    ("options", "data", "expected"),
    [({}, {"stop_after": 1}, 1), ({"first_experience": "replay"}, {"stop_after": 1}, 0), ({}, {}, 0)],
)
def test_a_single_experience_is_a_warning_where_it_would_replay_nothing(
    make_trainer: Make,
    options: dict[str, Any],
    data: dict[str, Any],
    expected: int,
    recwarn: pytest.WarningsRecorder,
) -> None:
    make_trainer(strategy=onpro(**options)).fit(lit(), datamodule=stream(**data))
    found = [str(w.message) for w in recwarn if "first_experience='replay'" in str(w.message)]
    assert len(found) == expected
    assert all("single experience" in message for message in found)


def test_plain_loaders_are_told_what_an_experience_is(make_trainer: Make, said: pytest.LogCaptureFixture) -> None:
    fitted(make_trainer, batch(0, 1))
    assert sum("each fit is one experience" in message for message in said.messages) == 1
    said.clear()
    fitted(make_trainer, batch(0, 1), first_experience="replay")
    assert not any("each fit is one experience" in message for message in said.messages)


# ---- precision, compiled networks, memory formats


@pytest.mark.parametrize(
    ("precision", "weights"),
    [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("64-true", torch.float64)],
)
def test_other_precisions(make_trainer: Make, precision: Any, weights: torch.dtype) -> None:
    module, strategy, watch = lit(), onpro(rotation="rot4"), Watch()
    trainer = make_trainer(strategy=strategy, callbacks=[watch], precision=precision)
    trainer.fit(module, datamodule=stream())
    assert {parameter.dtype for parameter in module.parameters()} == {weights}
    assert all(bool(value.isfinite().all()) for value in module.state_dict().values())
    assert strategy.prototypes.means.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert len(strategy.prototypes) > 1
    # the losses themselves are not rounded to eight bits
    fine = [logged["onpro/loss"] for logged in watch.logged]
    assert any(float(torch.tensor(loss).bfloat16()) != loss for loss in fine)
    full = Watch()
    make_trainer(strategy=onpro(rotation="rot4"), callbacks=[full], limit_train_batches=1).fit(
        lit(), datamodule=stream()
    )
    assert fine[0] == pytest.approx(full.logged[0]["onpro/loss"], rel=0.02)


class Descent(Lit):
    """Plain gradient descent, of which a gradient of rounding errors stays small."""

    memory_format = torch.contiguous_format
    formats: list[bool]

    def forward(self, images: Tensor) -> Tensor:
        given = images.contiguous(memory_format=self.memory_format)
        self.formats.append(given.is_contiguous(memory_format=torch.channels_last))
        return super().forward(given)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_channels_last_learns_the_same_within_rounding(make_trainer: Make) -> None:
    ends, memories = [], []
    for format in (torch.contiguous_format, torch.channels_last):
        module = lit(Descent).to(memory_format=format)
        module.memory_format, module.formats = format, []
        batches = [(x.contiguous(memory_format=format), y) for x, y in (batch(0, 1, 2, seed=i) for i in range(4))]
        strategy = fitted(make_trainer, *batches, module=module, first_experience="replay")
        assert set(module.formats) == {format is torch.channels_last}
        assert strategy.memory is not None
        memories.append(strategy.memory.state_dict())
        ends.append(values(module))
    assert changed(*memories) == []
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=1e-3, atol=1e-5), name


# ---- beside others


@pytest.mark.parametrize(
    "norm", [pytest.param(True, id="an extra pass", marks=pytest.mark.slow), pytest.param(False, id="one pass")]
)
@pytest.mark.warns("the backbone still trains")
def test_heads_and_evaluation_in_any_order_of_the_list(make_trainer: Make, norm: bool) -> None:
    """What each has learned depends neither on the order nor on the others, and the network is that of a run alone."""
    alone, strategy = lit(norm=norm), onpro()
    make_trainer(strategy=strategy).fit(alone, datamodule=stream())
    ends: list[Any] = []
    for order in list(itertools.permutations(range(4)))[::11]:  # each before and after each
        module, own = lit(norm=norm), onpro()
        parts: list[Any] = [
            NMC(),
            AEFOCL(balance="none"),
            NMC(memory="replay", name="read"),
            StreamEvaluation(table=False, files=False, figures=False),
        ]
        make_trainer(strategy=own, callbacks=[parts[i] for i in order]).fit(module, datamodule=stream())
        assert equal(values(module), values(alone))
        assert changed(own.stream_state(), strategy.stream_state()) == []
        matrices = {name: result["accuracy_matrix"] for name, result in parts[3].results.items()}
        ends.append({"rows": matrices, "heads": [dict(part.head.state_dict()) for part in parts[:3]]})
    assert set(ends[0]["rows"]) == {"module", "nmc", "aef_ocl", "read"}
    assert all(changed(end, ends[0]) == [] for end in ends[1:])
