"""The training of an editor: what it leaves alone, what a step is, resumes, and what is refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from small_runs import quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import NMC
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.errors import ArgumentError, BatchError, ConfigurationError, StateError
from clkit.methods import GradientEditor, MetaExamples
from clkit.strategies import EditorSettings, EditorTrainingStrategy

CLASSES = 4


def turned(images: Tensor, generator: torch.Generator) -> Tensor:
    """A view that costs next to nothing, and as an odd copy changes answers."""
    return images.flip(3) + torch.randn(images.shape, generator=generator).to(images)


EXAMPLES = MetaExamples(n_edits=2, n_loc=4, equivalents=1, equivalence=turned)


class Net(pl.LightningModule):
    """Batch statistics, dropout, and steps that nobody may call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        )
        self.head = nn.Linear(8, CLASSES)
        self.validated: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(images))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        raise AssertionError("the strategy does not call it")

    def on_train_epoch_start(self) -> None:
        self.train()  # as some do, and which would let the statistics move

    def configure_optimizers(self) -> Any:
        raise AssertionError("the strategy does not call it")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated.append(self.training)
        self(batch[0])


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return torch.randn(count, 1, 6, 6, generator=generator) + y[:, None, None, None] / 2, y


def loader(count: int = 48, seed: int = 0) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(count, seed)), batch_size=8)


def strategy(**options: Any) -> EditorTrainingStrategy:
    defaults: dict[str, Any] = {
        "editor": EditorSettings(rank=3),
        "examples": EXAMPLES,
        "stat_edits": 4,
        "val_edits": 0,
        "seed": 5,
    }
    return EditorTrainingStrategy(["body.3", "head"], **{**defaults, **options})


def trained(folder: Path, module: Net | None = None, data: Any = None, *, ckpt: Any = None, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("stat_edits", "lr", "examples", "val_edits", "clip") if name in options}
    trainer = quiet_trainer(folder, **{"max_epochs": 1, "strategy": strategy(**own), **options})
    trainer.fit(Net() if module is None else module, data or loader(), ckpt_path=ckpt)
    return trainer


def learned(trainer: pl.Trainer) -> dict[str, Tensor]:
    return dict(trainer.strategy.editor.networks.state_dict())  # type: ignore[attr-defined]  # it is an own strategy


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


class Batches:
    """A loader that draws nothing itself."""

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Any:
        return (rows(8, seed) for seed in range(6))


def test_the_network_stays_as_it_is_and_the_editor_learns(tmp_path: Path) -> None:
    module = Net()
    module.body[5].eval()  # a mode of its own
    module.body[0].requires_grad_(False)
    before, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    trainable = [parameter.requires_grad for parameter in module.parameters()]
    torch.manual_seed(1)
    random.seed(1)
    drawn = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002  users draw from it
    options: dict[str, Any] = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    trainer = quiet_trainer(tmp_path, max_epochs=2, strategy=strategy(val_edits=4), **options)
    trainer.fit(module, Batches(), Batches())
    left = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002  users draw from it
    assert drawn == left
    assert_same(before, dict(module.state_dict()))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert modes == [part.training for part in module.modules()]
    assert trainable == [parameter.requires_grad for parameter in module.parameters()]
    assert not any(module.validated)  # nor in the sanity check, where statistics of a batch norm would move
    editor = trainer.strategy.editor  # type: ignore[attr-defined]  # it is an own strategy
    assert set(editor.alpha) == {"body.3", "head"}
    for networks in editor.networks.networks:
        assert bool(networks["joint"].U.any())


def plain_loop(data: Any, epochs: int, clip: float) -> GradientEditor:
    """What the strategy does, written as one would by hand."""
    editor = GradientEditor(Net(), ["body.3", "head"], rank=3, seed=5, example=torch.zeros(2, 1, 6, 6))
    drawn = [
        [list(EXAMPLES.draw(editor, x, y, seed=5, epoch=epoch, batch=batch)) for batch, (x, y) in enumerate(data)]
        for epoch in range(epochs)
    ]
    batches = [batch for epoch in drawn for batch in epoch]
    editor.fit_statistics([(each.x_e, each.y_e) for batch in batches[:2] for each in batch], 4)
    optimizer = torch.optim.Adam(editor.parameter_groups())
    for batch in batches[2:]:
        optimizer.zero_grad()
        losses = [editor.meta_loss(**each._asdict())["loss"] for each in batch]
        torch.stack(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(editor.networks.parameters(), clip)
        optimizer.step()
    return editor


@pytest.mark.parametrize("clip", [100.0, 1e-6])  # with the smaller one, steps are below the eps of Adam
def test_a_step_is_that_of_a_plain_loop(tmp_path: Path, clip: float) -> None:
    wanted = plain_loop(loader(), 2, clip).networks.state_dict()
    own = {} if clip == 100 else {"clip": clip}
    torch.testing.assert_close(learned(trained(tmp_path, max_epochs=2, **own)), dict(wanted), rtol=1e-5, atol=1e-7)


STOPS = (1, 5, 13)  # while edits are collected, while a gradient waits, and in another epoch


class Saves(pl.Callback):
    """Saves after some batches."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if done in STOPS:
            trainer.save_checkpoint(self.folder / f"{done}.ckpt")


def test_a_resume_within_an_epoch_loses_nothing(tmp_path: Path) -> None:
    data = TensorDataset(*rows(48))

    def stream() -> StreamDataModule:
        return StreamDataModule(
            Custom(data, data), ClassIncremental(experiences=2), batch_size=6, epochs_per_experience=2
        )

    options: dict[str, Any] = {"max_epochs": -1, "accumulate_grad_batches": 3, "val_edits": 4}
    whole = trained(tmp_path, data=stream(), callbacks=[Saves(tmp_path)], **options)
    for done in STOPS:
        resumed = trained(tmp_path, data=stream(), ckpt=tmp_path / f"{done}.ckpt", **options)
        assert resumed.global_step == whole.global_step
        assert_same(learned(resumed), learned(whole))
        assert_same(resumed.optimizers[0].state_dict(), whole.optimizers[0].state_dict())
        logged = [each.callback_metrics["editor/val_loss"] for each in (whole, resumed)]
        assert logged[0] == logged[1]


def test_an_editor_is_taken_out_of_a_checkpoint(tmp_path: Path) -> None:
    module = Net()
    trainer = trained(tmp_path, module)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    Net().load_state_dict(checkpoint["state_dict"])  # the module's own keys, and no others
    x, y = rows(3)
    example = torch.zeros(2, 1, 6, 6)
    wanted = trainer.strategy.editor.propose(x, y).factors["head"]
    for saved in (tmp_path / "run.ckpt", checkpoint, trainer.strategy.editor.state_dict()):
        editor = GradientEditor.from_saved(module, saved, example=example)
        assert_same(dict(vars(editor.propose(x, y).factors["head"])), dict(vars(wanted)))
    with pytest.raises(StateError, match="holds no editor"):
        GradientEditor.from_saved(module, tmp_path / "weights.ckpt", example=example)
    (tmp_path / "bad.ckpt").write_bytes(b"no file of torch")
    with pytest.raises(StateError, match=r"bad\.ckpt"):
        GradientEditor.from_saved(module, tmp_path / "bad.ckpt", example=example)
    (other := copy.deepcopy(checkpoint))["clkit_strategy"]["editor"]["settings"]["rnk"] = 3
    with pytest.raises(StateError, match="rnk"):
        GradientEditor.from_saved(module, other, example=example)


def test_steps_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="10 steps in a row"):
        trained(tmp_path, data=loader(8 * 20), lr=1e30)
    seen: list[dict[str, Tensor]] = []

    class Watches(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            seen.append({name: value.clone() for name, value in learned(trainer).items()})

    trainer = trained(tmp_path, data=loader(8 * 8), lr=1e30, callbacks=[Watches()])
    assert trainer.strategy.skipped == 5  # two batches for the statistics, one step
    assert_same(seen[-1], seen[2])
    waits = trained(tmp_path, data=loader(8 * 8), lr=1e30, callbacks=[Watches()], accumulate_grad_batches=2)
    assert waits.strategy.skipped == 2  # a step of two batches, and two that come after it
    assert_same(seen[-1], seen[8 + 3])
    assert all(bool(value.isfinite().all()) for value in seen[-1].values())


def test_a_batch_of_which_nothing_is_learned_moves_nothing(tmp_path: Path) -> None:
    good, lone, unlabelled = rows(8), rows(1, 1), (rows(8)[0], torch.full((8,), -1))
    ends = []
    for batches in ([good] * 4, [good, good, good, lone, unlabelled, (good[0][:0], good[1][:0]), good]):
        examples = MetaExamples(n_edits=2, n_loc=4, equivalents=0, labels="random")

        class Loader:
            def __init__(self, own: Any) -> None:
                self.own = own

            def __len__(self) -> int:
                return len(self.own)

            def __iter__(self) -> Any:
                return iter(self.own)

        trainer = trained(tmp_path, data=Loader(batches), examples=examples)
        ends.append(trainer.optimizers[0].state_dict()["state"][0]["step"])
    assert ends[0] == ends[1] == 2


def test_validation_judges_the_same_edits_each_time(tmp_path: Path) -> None:
    module, held = Net(), loader(16, seed=1)
    saves = ModelCheckpoint(tmp_path, monitor="editor/val_loss", save_top_k=1)
    trainer = quiet_trainer(tmp_path, max_epochs=2, strategy=strategy(val_edits=4), callbacks=[saves])
    trainer.fit(module, loader(), held)
    editor = trainer.strategy.editor  # type: ignore[attr-defined]  # it is an own strategy
    losses = []
    for first, (x, y) in zip((0, 2), held, strict=True):
        drawn = EXAMPLES.draw(editor, x, y, seed=5, epoch=2**31, batch=first)
        losses += [float(editor.meta_loss(**each._asdict())["loss"].detach()) for each in drawn]
    assert float(trainer.callback_metrics["editor/val_loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert saves.best_model_score is not None
    assert {
        "editor/loss",
        "editor/success",
        "editor/size/head",
        "editor/alpha/body.3",
    } <= trainer.callback_metrics.keys()


def test_mixed_precision_is_for_the_second_forward_alone(tmp_path: Path) -> None:
    full = trained(tmp_path)
    mixed = trained(tmp_path, precision="bf16-mixed")
    editors = [each.strategy.editor for each in (full, mixed)]
    for one, other in zip(*(each.networks.fixed() for each in editors), strict=True):
        assert_same({"": one}, {"": other})  # statistics and first steps: captured in float32
    assert all(value.dtype != torch.bfloat16 for value in learned(mixed).values())
    assert all(bool(networks["joint"].U.any()) for networks in editors[1].networks.networks)


def test_one_strategy_goes_on_with_another_trainer_and_heads_learn_beside_it(tmp_path: Path) -> None:
    shared, head = strategy(), NMC()
    trainer = quiet_trainer(tmp_path, max_epochs=1, strategy=shared, callbacks=[head])
    trainer.fit(Net(), loader())
    assert head.head is not None
    assert int(head.head.statistics.counts.sum()) == 48
    first = {name: value.clone() for name, value in learned(trainer).items()}
    again = quiet_trainer(tmp_path, max_epochs=1, strategy=shared)
    again.fit(Net(), loader())  # another module of the same layers
    fixed = [name for name in first if "statistics" in name or name == "alpha_start"]
    assert_same({name: first[name] for name in fixed}, {name: learned(again)[name] for name in fixed})
    assert not torch.equal(first["steps"], learned(again)["steps"])


def test_what_is_refused(tmp_path: Path) -> None:
    for options, named in (
        ({"stat_edits": 1}, "stat_edits"),
        ({"lr": 0}, "lr"),
        ({"clip": -1.0}, "clip"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ArgumentError, match=named):
            strategy(**options)
    for values, named in (({"rank": 0}, "rank"), ({"n_hidden": -1}, "n_hidden"), ({"alpha": 0.0}, "alpha")):
        with pytest.raises(ArgumentError, match=f"{named} must be"):  # and not in the fit alone
            EditorSettings(**values)
    for values, named in (({"n_edits": 3, "together": 2}, "together"), ({"labels": "odd"}, "labels")):
        with pytest.raises(ArgumentError, match=named):
            MetaExamples(**values)
    trainer = quiet_trainer(tmp_path, max_epochs=1, strategy=EditorTrainingStrategy("body.1"))
    with pytest.raises(ArgumentError, match=r"body\.1"):  # a batch norm
        trainer.fit(Net(), loader())
    with pytest.raises(ConfigurationError, match="StochasticWeightAveraging"):
        trained(tmp_path, callbacks=[StochasticWeightAveraging(0.1)])
    x, y = rows(8)
    x[3, 0, 0, 0] = torch.nan
    with pytest.raises(BatchError, match="not finite"):
        trained(tmp_path, data=DataLoader(TensorDataset(x, y), batch_size=8))
    with pytest.raises(BatchError, match="class ids from 0 to 3, got 4"):
        trained(tmp_path, data=DataLoader(TensorDataset(rows(8)[0], y.clamp(min=CLASSES)), batch_size=8))
    with pytest.warns(UserWarning, match="nothing was trained"):
        trained(tmp_path, data=loader(8))


# ---- how batches become edits


@pytest.fixture(scope="module")
def editor() -> GradientEditor:
    return GradientEditor(Net(), ["head"], rank=2, example=torch.zeros(2, 1, 6, 6))


@pytest.mark.parametrize("labels", ["random", "likely", "truth", "mixed"])
def test_edits_want_what_they_shall(editor: GradientEditor, labels: Any) -> None:
    x, y = rows(120, seed=2)
    rule = MetaExamples(n_edits=60, n_loc=10, hard_locality=0.5, labels=labels, equivalence=turned)
    logits = editor._network.model.eval()(x).detach()
    truths = 0
    for row, each in enumerate(rule.draw(editor, x, y, seed=1, epoch=2, batch=3)):
        changed = not torch.equal(each.x_e[0], x[row])
        old = int(editor._network.model(each.x_e).argmax(1))
        assert int(each.y_e) != old
        assert changed or old == int(logits[row].argmax())
        truths += changed
        if changed:  # an odd copy that is answered wrongly
            assert labels in ("truth", "mixed")
            assert int(each.y_e) == int(y[row])
        elif labels == "likely":
            assert int(each.y_e) in logits[row].topk(4).indices[1:]
        places = [int((x == image).flatten(1).all(1).nonzero()) for image in each.x_loc]
        assert len(set(places)) == 10
        assert min(places) >= 60  # no edited one
        hard = [place for place in places if int(y[place]) in (old, int(each.y_e))]
        there = int(torch.isin(y[60:], torch.tensor([old, int(each.y_e)])).sum())
        assert len(hard) >= min(5, there)
        assert torch.equal(each.y_eq, each.y_e.repeat(2))
    share = {"random": 0, "likely": 0}.get(labels)
    assert truths == share if share is not None else truths > 12
    if labels == "mixed":
        assert truths < 42


def test_random_edits_reach_all_other_classes(editor: GradientEditor) -> None:
    x, y = rows(200, seed=2)
    wanted = torch.cat(
        [each.y_e for each in MetaExamples(n_edits=150, labels="random", equivalents=0).draw(editor, x, y, seed=0)]
    )
    counts = torch.bincount((wanted - editor.answers(x[:150])) % CLASSES, minlength=CLASSES)
    assert counts[0] == 0
    assert counts[1:].min() > 30  # of 50 expected


def test_a_draw_depends_on_seed_epoch_and_place_alone(editor: GradientEditor) -> None:
    x, y = rows(12)
    drawn = [next(EXAMPLES.draw(editor, x, y, seed=1, epoch=0, batch=batch)) for batch in (0, 0, 1)]
    assert_same(drawn[0]._asdict(), drawn[1]._asdict())
    assert not torch.equal(drawn[0].x_eq, drawn[2].x_eq)
    others = torch.cat([x[:2], rows(10, seed=9)[0]])
    assert torch.equal(next(EXAMPLES.draw(editor, others, y, seed=1)).x_eq, drawn[0].x_eq)
    pairs = MetaExamples(n_edits=4, together=2, n_loc=3, equivalence=turned)
    shapes = [[len(part) for part in each] for each in pairs.draw(editor, x, y, seed=1)]
    assert shapes == [[2, 2, 4, 4, 3]] * 2
    assert [pairs.edited(5, process, 3) for process in range(3)] == [0, 2, 2]
    assert [pairs.edited(count) for count in range(6)] == [0, 0, 0, 2, 2, 4]
    odd = MetaExamples(n_edits=4, labels="truth", equivalents=0, equivalence=lambda images, _: images + 1.0)
    far = [int((each.x_e - x[:4]).flatten(1).abs().amax(1).min()) for each in odd.draw(editor, x, y, seed=1)]
    assert set(far) <= {0, 3}  # as it is, or a view of a view of a view
    assert 3 in far
    with pytest.raises(BatchError, match="view of each image"):
        next(MetaExamples(equivalence=lambda images, _: images[:1]).draw(editor, x, y, seed=1))


@pytest.mark.slow  # compiles
def test_a_compiled_module_is_trained_for_as_any(tmp_path: Path) -> None:
    plain = trained(tmp_path)
    compiled: Any = torch.compile(Net())
    torch.testing.assert_close(learned(trained(tmp_path, compiled)), learned(plain), rtol=1e-4, atol=1e-6)
