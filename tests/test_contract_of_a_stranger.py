"""Methods of a stranger pass the public contract, and broken ones are caught, each by the check of its rule."""

from __future__ import annotations

import inspect
import sys
import unittest
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clkit.callbacks import NMC, FeatureCallback
from clkit.errors import ArgumentError, BatchError, ClkitError, NotFittedError, StateError
from clkit.features.batch import read_batch
from clkit.strategies import GradientFreeStrategy, LearningStrategy
from clkit.testing import Check, ContractError, Entry, check_contract, clkit_entries, contract, contract_together

SNIPPETS = Path(__file__).parents[1] / "docs" / "snippets"
sys.path.append(str(SNIPPETS))

# the files that the guide shows
import test_class_boxes as shown  # noqa: E402
from class_boxes import ClassBoxes  # noqa: E402

# ---- methods of a stranger


class LabelCounts(pl.Callback):
    """Knows nothing of clkit's base classes."""

    def __init__(self, max_classes: int = 50) -> None:
        self.counts = torch.zeros(max_classes, dtype=torch.int64)
        self.own = torch.zeros_like(self.counts)  # of this process, since the last exchange

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        inputs, targets = read_batch(batch)
        if targets.shape != (len(inputs),) or targets.is_floating_point() or not inputs.isfinite().all():
            raise BatchError(f"inputs must be finite and targets (B,) integers, got {inputs} and {targets}")
        if len(targets) and not -1 <= int(targets.min()) <= int(targets.max()) < len(self.counts):
            raise BatchError(f"targets must lie in [-1, {len(self.counts)}), got {targets}")
        self.own += torch.bincount(targets[targets >= 0].cpu(), minlength=len(self.own))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counts += trainer.strategy.reduce(self.own.clone(), reduce_op="sum")
        self.own.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts + self.own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.counts, self.own = state_dict["counts"], torch.zeros_like(state_dict["counts"])


class Centres(nn.Module):
    """A head in the fixed form of heads, written with no part of clkit but its errors."""

    def __init__(self, in_features: int, max_classes: int = 64) -> None:
        super().__init__()
        self.in_features, self.max_classes = in_features, max_classes
        self.reset()

    def reset(self) -> None:
        self.counts = torch.zeros(self.max_classes, dtype=torch.int64)
        self.sums = torch.zeros(self.max_classes, self.in_features, dtype=torch.float64)

    @property
    def classes(self) -> Tensor:
        return self.counts.nonzero().flatten()

    def update(self, features: Tensor, targets: Tensor, sign: int = 1) -> None:
        rows, ids = self.checked(features).detach(), targets
        if ids.shape != (len(rows),) or ids.is_floating_point():
            raise BatchError(f"targets must be ({len(rows)},) integers, got {ids.dtype} {tuple(ids.shape)}")
        if len(ids) and not -1 <= int(ids.min()) <= int(ids.max()) < self.max_classes:
            raise BatchError(f"targets must lie in [-1, {self.max_classes}), got {ids}")
        rows, ids = rows[ids >= 0], ids[ids >= 0]
        counts = self.counts + sign * torch.bincount(ids, minlength=self.max_classes)
        if bool((counts < 0).any()):
            raise BatchError("more samples of a class than were learned")
        sums = self.sums.index_add(0, ids, rows, alpha=sign)
        self.counts, self.sums = counts, sums * (counts > 0)[:, None]

    def subtract(self, features: Tensor, targets: Tensor) -> None:
        self.update(features, targets, sign=-1)

    def merge(self, other: Centres) -> None:
        if (other.in_features, other.max_classes) != (self.in_features, self.max_classes):
            raise ArgumentError("heads of different widths cannot be merged")
        self.counts, self.sums = self.counts + other.counts, self.sums + other.sums

    def synchronize(self) -> None:
        for value in (self.counts, self.sums):
            torch.distributed.all_reduce(value)

    def checked(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.in_features or not features.is_floating_point():
            raise BatchError(f"features must be (B, {self.in_features}) floats, got {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise BatchError("features are not finite")
        return features.double()

    def forward(self, features: Tensor) -> Tensor:
        width = int(self.classes[-1]) + 1 if len(self.classes) else 0
        rows, means = self.checked(features), self.sums[:width] / self.counts[:width, None]
        scores = -(rows[:, None] - means).square().sum(2).nan_to_num(nan=torch.inf)
        return scores if features.dtype == torch.float64 else scores.float()

    def predict(self, features: Tensor) -> Tensor:
        if not len(self.classes):
            raise NotFittedError("call update first")
        return self(features.double()).argmax(1)

    def get_extra_state(self) -> dict[str, Any]:
        return {"counts": self.counts, "sums": self.sums}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        if state["sums"].shape[1] != self.in_features:
            raise StateError(f"the state has width {state['sums'].shape[1]}, this head {self.in_features}")
        self.counts, self.sums = state["counts"].clone(), state["sums"].clone()


class Rehearsal(LearningStrategy):
    """Trains each batch together with the last rows of the one before, which are its own state."""

    def __init__(self, rows: int = 3, **options: Any) -> None:
        super().__init__(**options)
        self.rows = rows
        self.memory: dict[str, Tensor] = {}

    @property
    def stream_rows(self) -> slice | None:
        return slice(len(self.memory["targets"]), None) if self.memory else None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs, targets = read_batch(args[0], self.batch_reader)
        if targets.shape != (len(inputs),) or targets.is_floating_point() or not inputs.isfinite().all():
            raise BatchError(f"inputs must be finite and targets (B,) integers, got {inputs} and {targets}")
        parts = [self.memory] if self.memory else []
        x = torch.cat([*(part["inputs"] for part in parts), inputs])
        y = torch.cat([*(part["targets"] for part in parts), targets])
        with self.precision_plugin.train_step_context():
            assert self.model is not None
            logits = self.model(x)
            if len(y) and not -1 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
                raise BatchError(f"targets must lie in [-1, {logits.shape[1]}), got {targets}")
            loss = nn.functional.cross_entropy(logits, y, ignore_index=-1)
        self.memory = {"inputs": inputs[-self.rows :].clone(), "targets": targets[-self.rows :].clone()}
        return loss

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        super().save_checkpoint({**checkpoint, "rehearsal": self.memory}, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        self.memory = checkpoint.get("rehearsal", {})
        return checkpoint


BOXES = Entry("ClassBoxes", "callback", ClassBoxes)
STRANGERS = [
    BOXES,
    Entry("LabelCounts", "callback", LabelCounts),
    Entry("Centres", "head", Centres),
    Entry("Rehearsal", "strategy", Rehearsal, processes="agree"),
]


def marked(check: Check) -> Any:
    return pytest.param(check, marks=pytest.mark.slow if check.rule.startswith("two_processes") else [])


@pytest.mark.parametrize(
    "check",
    [marked(check) for entry in STRANGERS for check in contract(entry)],
    ids=lambda check: check.__name__,
)
def test_methods_of_a_stranger_pass(check: Check, tmp_path: Path) -> None:
    check(tmp_path)


def test_the_method_of_the_guide_has_less_than_forty_lines() -> None:
    assert len((SNIPPETS / "class_boxes.py").read_text(encoding="utf-8").splitlines()) < 40
    assert len(inspect.getsource(LabelCounts).splitlines()) < 40


def test_the_test_of_the_guide_runs(tmp_path: Path) -> None:
    (mark,) = shown.test_contract.pytestmark
    assert mark.args[0] == "check"
    assert [check.rule for check in mark.args[1]] == [check.rule for check in contract(BOXES)]
    shown.test_contract(mark.args[1][0], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "check", contract_together([*clkit_entries(), *STRANGERS])[-1:], ids=lambda check: check.__name__
)
def test_a_stranger_gets_along_with_all_of_clkits(check: Check, tmp_path: Path) -> None:
    assert "Rehearsal" in check.__name__
    check(tmp_path)


# ---- broken methods: each is caught by the check of its rule


class Sums(FeatureCallback):
    """A right one: the sum of features and their number, by class. Each broken method differs in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[int, Tensor] = {}
        self.rows = 0

    def learn(self, features: Tensor, targets: Tensor) -> None:
        for label in targets.unique().tolist():
            self.sums[label] = self.sums.get(label, 0) + features[targets == label].sum(0)
        self.rows += len(features)

    def stream_state(self) -> dict[str, Any]:
        return {"sums": {str(label): total.clone() for label, total in self.sums.items()}, "rows": self.rows}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        self.sums = {int(label): total.clone() for label, total in state["sums"].items()}
        self.rows = state["rows"]


class HidesItsState(Sums):
    def stream_state(self) -> dict[str, Any]:
        return {}

    def load_stream_state(self, state: dict[str, Any]) -> None: ...


class IgnoresGrowth(Sums):
    """Loads into what is there already."""

    def load_stream_state(self, state: dict[str, Any]) -> None:
        self.sums = {label: state["sums"][str(label)] for label in self.sums}
        self.rows = state["rows"]


class KeepsThePartOfTheModule(Sums):
    """Puts what it learns among the user's own keys."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        pl_module.register_buffer("learned_sums", torch.zeros(3))


class LosesItsPace(Sums):
    """What it weighs the next batch with is neither saved nor restored."""

    weight = 1.0

    def learn(self, features: Tensor, targets: Tensor) -> None:
        self.weight *= 0.9
        super().learn(features * self.weight, targets)


class SavingCounts(Sums):
    def stream_state(self) -> dict[str, Any]:
        self.rows += 1
        return super().stream_state()


class LooksAtItsNeighbour(Sums):
    """What it reads there depends on who came first."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        others = [callback for callback in trainer.callbacks if isinstance(callback, NMC)]
        if others and others[0]._head is not None:
            self.rows += int(others[0].head.counts.sum())
        super().on_train_batch_end(trainer, *args)


class ChangesTheBatch(Sums):
    """In place: whoever comes after it reads other labels."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        batch[1].fill_(0)


class DrawsGlobally(Sums):
    def learn(self, features: Tensor, targets: Tensor) -> None:
        super().learn(features + torch.randn(len(features), 1) * 0, targets)


class TouchesWeights(Sums):
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args)
        next(pl_module.parameters()).data.mul_(1.0001)


class LeavesItsHookWhenARunFails(Sums):
    """Nobody calls teardown then."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.handle = pl_module.register_forward_hook(lambda *args: None)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self.handle.remove()

    def on_exception(self, *args: Any) -> None: ...


class FreezesForGood(Sums):
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        pl_module.net[3].requires_grad_(False)


class LearnsFromValidation(Sums):
    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, *args: Any
    ) -> None:
        self.rows += len(batch[1])


class LearnsThePartBefore(Sums):
    """Adds up row by row and stops at the bad one."""

    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        for row, target in zip(features, targets, strict=False):
            rows, ids = super()._checked(row[None], target[None])
            self.learn(rows, ids)
        return super()._checked(features[:0], targets[:0])


class RaisesSomething(Sums):
    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        try:
            return super()._checked(features, targets)
        except ClkitError as error:
            raise KeyError("oops") from error


class LearnsTheUnlabelled(Sums):
    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return super()._checked(features, targets.clamp(min=0) if not targets.is_floating_point() else targets)


class KeepsTheDtype(Sums):
    def _checked(self, features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        rows, ids = super()._checked(features, targets)
        return rows.to(features.dtype), ids


class HooksLate(Sums):
    """A hook set between two batches: compiled code never calls it."""

    handle: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 1:
            self.handle = pl_module.net.register_forward_hook(self.hear)

    def hear(self, *args: Any) -> None:
        self.rows += 1

    def teardown(self, *args: Any) -> None:
        super().teardown(*args)
        if self.handle is not None:
            self.handle.remove()


class NeedsAnObject(Sums):
    def __init__(self, helper: Any) -> None:
        super().__init__()
        self.helper = helper


class AddsTheTotalAgain(Sums):
    """Exchanges at each boundary what was exchanged at the last one."""

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Any) -> None:
        self.rows = int(trainer.strategy.reduce(torch.tensor(self.rows), reduce_op="sum"))
        self.sums = {}


BROKEN_CALLBACKS: dict[Any, str] = {
    HidesItsState: "state_is_in_the_checkpoint",
    IgnoresGrowth: "state_is_in_the_checkpoint",
    KeepsThePartOfTheModule: "state_is_in_the_checkpoint",
    LosesItsPace: "a_resumed_run_equals_an_uninterrupted_one",
    SavingCounts: "a_resumed_run_equals_an_uninterrupted_one",
    LooksAtItsNeighbour: "order_of_callbacks_does_not_matter",
    ChangesTheBatch: "order_of_callbacks_does_not_matter",
    DrawsGlobally: "training_is_left_alone",
    TouchesWeights: "training_is_left_alone",
    LeavesItsHookWhenARunFails: "nothing_is_left_on_the_module",
    FreezesForGood: "nothing_is_left_on_the_module",
    LearnsFromValidation: "evaluating_changes_nothing",
    LearnsThePartBefore: "hostile_batches_are_refused_whole",
    RaisesSomething: "hostile_batches_are_refused_whole",
    LearnsTheUnlabelled: "empty_and_single_row_batches_are_taken",
    KeepsTheDtype: "low_precision_is_taken",
    HooksLate: "a_compiled_module_gives_the_same_bits",
    partial(NeedsAnObject, helper=object()): "yaml_builds_the_same",
}


def check_of(entry: Entry, rule: str) -> Check:
    (found,) = [check for check in contract(entry) if check.rule == rule]
    return found


def name_of(value: Any) -> str:
    return getattr(value, "__name__", None) or (value if isinstance(value, str) else type(value).__name__)


@pytest.mark.parametrize(("broken", "rule"), BROKEN_CALLBACKS.items(), ids=name_of)
def test_a_broken_callback_is_caught_by_the_check_of_its_rule(broken: Any, rule: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=f"broken breaks the rule '{rule}'"):
        check_of(Entry("broken", "callback", broken), rule)(tmp_path)


@pytest.mark.slow  # one more callback that is right
@pytest.mark.parametrize("rule", sorted(set(BROKEN_CALLBACKS.values())))
def test_the_one_that_they_were_made_of_passes(rule: str, tmp_path: Path) -> None:
    check_of(Entry("right", "callback", Sums), rule)(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [Sums, AddsTheTotalAgain])
def test_wrong_sums_over_processes_are_caught(broken: Any, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="broken breaks the rule 'two_processes_equal_one'"):
        check_of(Entry("broken", "callback", broken), "two_processes_equal_one")(tmp_path)


class CastSums(Centres):
    """Buffers, which .half() casts."""

    def reset(self) -> None:
        super().reset()
        sums = self.__dict__.pop("sums")
        self.register_buffer("sums", sums, persistent=False)


class NumpyCentres(Centres):
    def get_extra_state(self) -> dict[str, Any]:
        return {"counts": self.counts, "sums": self.sums.numpy()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state({**state, "sums": torch.as_tensor(state["sums"])})


class TakesAnyWidth(Centres):
    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.counts, self.sums = state["counts"].clone(), state["sums"].clone()


class LearnsBeforeItLooks(Centres):
    def update(self, features: Tensor, targets: Tensor, sign: int = 1) -> None:
        before = self.counts.clone()
        known = (
            targets[(targets >= 0) & (targets < self.max_classes)] if not targets.is_floating_point() else before[:0]
        )
        self.counts = before + torch.bincount(known.flatten(), minlength=self.max_classes)
        if features.shape[-1:] == (self.in_features,) and bool(features.isfinite().all()):
            self.counts = before
        super().update(features, targets, sign)


class LastBatchWins(Centres):
    """Its answer depends on how the samples were cut."""

    def update(self, features: Tensor, targets: Tensor, sign: int = 1) -> None:
        super().update(features, targets, sign)
        self.sums = self.sums * 0.99


class LearnsUnlabelled(Centres):
    def update(self, features: Tensor, targets: Tensor, sign: int = 1) -> None:
        super().update(features, targets.clamp(min=0) if bool((targets == -1).any()) else targets, sign)


class MergesMeans(Centres):
    def merge(self, other: Centres) -> None:
        if other.in_features != self.in_features:
            raise ArgumentError("heads of different widths cannot be merged")
        self.counts, self.sums = self.counts + other.counts, self.sums


class ForgetsToForget(Centres):
    def subtract(self, features: Tensor, targets: Tensor) -> None:
        rows, ids = features.clone() * 0.5, targets
        self.update(rows, ids, sign=-1)


class RemembersAfterReset(Centres):
    def reset(self) -> None:
        counts = getattr(self, "counts", None)
        super().reset()
        if counts is not None:
            self.counts = counts


class CachesForGood(Centres):
    cached: Tensor | None = None

    def forward(self, features: Tensor) -> Tensor:
        if self.cached is None or self.cached.shape[0] != len(features):
            self.cached = super().forward(features)
        return self.cached.to(features.dtype if features.dtype == torch.float64 else torch.float32)


class ScoresUnseenByZero(Centres):
    def forward(self, features: Tensor) -> Tensor:
        return super().forward(features).nan_to_num(neginf=0.0)


class AnswersUnlearned(Centres):
    def predict(self, features: Tensor) -> Tensor:
        return self(features).argmax(1) if len(self.classes) else torch.zeros(len(features), dtype=torch.int64)


class DrawsNoise(Centres):
    def update(self, features: Tensor, targets: Tensor, sign: int = 1) -> None:
        torch.rand(1)
        super().update(features, targets, sign)


BROKEN_HEADS = {
    ScoresUnseenByZero: "scores_have_a_column_for_each_class",
    CastSums: "precision_of_sums_is_kept",
    AnswersUnlearned: "an_unlearned_head_says_so",
    NumpyCentres: "state_survives_a_file",
    TakesAnyWidth: "a_state_that_does_not_fit_is_refused",
    LastBatchWins: "rows_one_by_one_equal_one_batch",
    LearnsUnlabelled: "unlabelled_rows_are_skipped",
    LearnsBeforeItLooks: "hostile_batches_are_refused_whole",
    MergesMeans: "merged_heads_equal_the_union",
    ForgetsToForget: "subtracting_equals_never_having_seen",
    RemembersAfterReset: "reset_forgets_everything",
    CachesForGood: "predicting_changes_nothing",
    DrawsNoise: "inputs_and_random_state_are_left_alone",
}


@pytest.mark.parametrize(("broken", "rule"), BROKEN_HEADS.items(), ids=name_of)
def test_a_broken_head_is_caught_by_the_check_of_its_rule(broken: Any, rule: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=f"broken breaks the rule '{rule}'"):
        check_of(Entry("broken", "head", broken), rule)(tmp_path)


class ForgetsItsMemory(Rehearsal):
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return LearningStrategy.load_checkpoint(self, checkpoint_path, *args, **kwargs)


class KeepsItsPartInTheModule(Rehearsal):
    def connect(self, model: pl.LightningModule) -> None:
        super().connect(model)
        model.projector = nn.Linear(2, 2)


class Unrepeatable(Rehearsal):
    runs = 0

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        Unrepeatable.runs += 1
        return super().training_step(*args, **kwargs) * Unrepeatable.runs


class FreezesAgain(GradientFreeStrategy):
    """Gives nothing back at the end."""

    def teardown(self) -> None:
        self._frozen = None
        super().teardown()


class TrainsInValidation(Rehearsal):
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        next(self.lightning_module.parameters()).data.mul_(1.0001)
        return super().validation_step(*args, **kwargs)


class RemembersBeforeItLooks(Rehearsal):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs, targets = args[0]
        loss = super().training_step(*args, **kwargs) if self.memory == {} else None
        self.memory = {"inputs": inputs[-3:].clone(), "targets": targets[-3:].clone()}
        return super().training_step(*args, **kwargs) if loss is None else loss


class CastsTheModule(Rehearsal):
    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.lightning_module is not None
        self.lightning_module.double()


class NeedsAnArgument(Rehearsal):
    def __init__(self, helper: Any, **options: Any) -> None:
        super().__init__(**options)


BROKEN_STRATEGIES = {
    partial(NeedsAnArgument, object()): "yaml_builds_the_same",
    Unrepeatable: "a_run_can_be_repeated",
    KeepsItsPartInTheModule: "state_is_in_the_checkpoint",
    ForgetsItsMemory: "a_resumed_run_equals_an_uninterrupted_one",
    FreezesAgain: "nothing_is_left_on_the_module",
    TrainsInValidation: "evaluating_changes_nothing",
    RemembersBeforeItLooks: "hostile_batches_are_refused_whole",
    CastsTheModule: "low_precision_is_taken",
}


@pytest.mark.parametrize(("broken", "rule"), BROKEN_STRATEGIES.items(), ids=name_of)
def test_a_broken_strategy_is_caught_by_the_check_of_its_rule(broken: Any, rule: str, tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=f"broken breaks the rule '{rule}'"):
        check_of(Entry("broken", "strategy", broken), rule)(tmp_path)


def test_one_that_disturbs_others_is_caught_beside_all(tmp_path: Path) -> None:
    table = [*clkit_entries(), Entry("broken", "callback", ChangesTheBatch)]
    with pytest.raises(ContractError, match=r"together-auto breaks the rule .*order of the callbacks"):
        contract_together(table)[0](tmp_path)


# ---- running the checks


def test_all_rules_at_once_say_what_holds(tmp_path: Path) -> None:
    report = check_contract(Entry("centres", "head", lambda width: Centres(width)), tmp_path / "first")
    assert report.pop("two_processes_equal_one").startswith("not applicable: make cannot be sent to another process")
    assert set(report.values()) == {"holds"}
    assert len(report) == 15
    with pytest.raises(ContractError, match="mine breaks the rule 'an_unlearned_head_says_so'"):
        check_contract(Entry("mine", "head", AnswersUnlearned), tmp_path / "second")
    assert issubclass(ContractError, ClkitError)
    assert issubclass(ContractError, AssertionError)


def test_what_cannot_apply_is_skipped_with_its_reason(tmp_path: Path) -> None:
    quiet = Entry("quiet", "callback", LabelCounts, changes_training=True)
    with pytest.raises(unittest.SkipTest, match=r"quiet-training_is_left_alone is not applicable: .*changes training"):
        check_of(quiet, "training_is_left_alone")(tmp_path)
    nameless = Entry("nameless", "callback", lambda: LabelCounts())
    with pytest.raises(unittest.SkipTest, match="give the entry `yaml`"):
        check_of(nameless, "yaml_builds_the_same")(tmp_path)
    with pytest.raises(unittest.SkipTest, match="cannot be sent to another process"):
        check_of(nameless, "two_processes_equal_one")(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "metric"}, r"kind must be one of 'head', 'callback', 'strategy', got 'metric'"),
        ({"processes": "maybe"}, r"processes must be one of .*got 'maybe'"),
        ({"make": LabelCounts()}, r"make must be a function, got <.*LabelCounts"),
    ],
)
def test_a_wrong_entry_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Entry(**{"name": "mine", "kind": "callback", "make": LabelCounts, **options})


def test_checks_leave_the_random_state_and_the_numbers_of_the_caller(tmp_path: Path) -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002  the global generator is what must be left alone
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002  as above
    check_of(BOXES, "state_is_in_the_checkpoint")(tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002  as above
