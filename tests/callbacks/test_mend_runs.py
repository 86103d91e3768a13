"""MEND in real runs: what an edit changes, what takes it back, what goes into a checkpoint, and what is refused."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from sklearn.datasets import load_digits
from small_runs import LitSmall, quiet_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import MEND
from clkit.errors import ArgumentError, BatchError, ConfigurationError, EditConflictError, NotFittedError, StateError
from clkit.methods import GradientEditor, Guard

pytestmark = pytest.mark.filterwarnings("ignore:the editor is not trained", "ignore:the guard has no reference")

LAYER = {"layers": "net.hidden"}


@cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels)[order]


@cache
def trained() -> dict[str, Tensor]:
    """Weights that answer most digits rightly."""
    torch.manual_seed(0)
    module, (x, y) = LitSmall(), digits()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x[:600]), y[:600]).backward()
        optimizer.step()
    return copy.deepcopy(module.state_dict())


def made(kind: type[LitSmall] = LitSmall) -> LitSmall:
    module = kind()
    module.load_state_dict(trained())
    return module


def loader(start: int = 600, stop: int = 800, size: int = 50) -> DataLoader[Any]:
    x, y = digits()
    return DataLoader(TensorDataset(x[start:stop], y[start:stop]), batch_size=size)


def mistakes(module: nn.Module, count: int = 3) -> list[tuple[Tensor, Tensor]]:
    """Images that the network answers wrongly, with their true labels."""
    x, y = digits()
    with torch.no_grad():
        wrong = (module(x[800:]).argmax(1) != y[800:]).nonzero()[:count, 0] + 800
    return [(x[row : row + 1], y[row : row + 1]) for row in wrong.tolist()]


def validated(folder: Path, mend: MEND, module: pl.LightningModule, *others: pl.Callback, **options: Any) -> pl.Trainer:
    """A run that has only looked at its validation samples."""
    trainer = quiet_trainer(folder, callbacks=[mend, *others])
    trainer.validate(module, loader(), verbose=False, **options)
    return trainer


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def test_an_edit_corrects_and_is_taken_back_to_the_bit(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, guard=None)
    before = bits(module)
    trainer = validated(tmp_path, mend, module)
    results = [mend.edit(*pair) for pair in mistakes(module)]
    assert [result.status for result in results] == ["applied"] * 3
    assert [result.route for result in results] == ["editor"] * 3
    x, y = mistakes(made())[2]
    assert bool(module(x).argmax(1) == y)
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"net.hidden.weight"}
    assert not any(name.startswith("editor") for name in module.state_dict())
    alone = made()  # what the network is without the second edit, by an editor of its own
    assert mend.editor is not None
    other = GradientEditor(alone, "net.hidden", example=x)
    records = mend.editor.log
    for record in (records[0], records[2]):
        proposal = type(mend.editor.propose(x, y))(record.x, record.y, record.factors)
        other.apply(proposal, record.scale)
    mend.revert(1)
    assert same(bits(module), bits(alone))
    assert [entry.id for entry in mend.records] == [0, 2]
    mend.revert_all()
    assert same(bits(module), before)
    assert trainer.callback_metrics["val_acc"] > 0.8


def test_the_editor_is_saved_with_its_edits_and_found_again(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, guard=None)
    trainer = validated(tmp_path, mend, module)
    pairs = mistakes(module)
    for pair in pairs[:2]:
        mend.edit(*pair)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert sorted(saved["state_dict"]) == sorted(trained())
    fresh, again = LitSmall(), MEND()
    validated(tmp_path, again, fresh, ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True)
    assert same(bits(fresh), bits(module))
    assert [entry.label for entry in again.records] == [pair[1].tolist() for pair in pairs[:2]]
    again.revert(0)
    mend.revert(0)
    assert same(bits(fresh), bits(module))
    again.revert(1)
    assert same(bits(fresh), trained())
    assert again.edit(*pairs[2]).id == 2


def test_what_is_committed_is_part_of_the_network_for_good(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, guard=None)
    trainer = validated(tmp_path, mend, module)
    pairs = mistakes(module)
    for pair in pairs:
        mend.edit(*pair)
    edited = bits(module)
    with torch.inference_mode():  # as in a hook of an evaluation
        mend.commit(1)
    assert same(bits(module), edited)
    with pytest.raises(ArgumentError, match="edit 1 was committed"):
        mend.revert(1)
    mend.revert(0)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    fresh, again = LitSmall(), MEND()
    later = validated(tmp_path, again, fresh, ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True)
    for callback in (mend, again):
        callback.revert_all()
        assert [(entry.id, entry.committed) for entry in callback.records] == [(1, True)]
    assert same(bits(fresh), bits(module))
    assert bool(module(pairs[1][0]).argmax(1) == pairs[1][1])
    assert not same(bits(module), trained())
    again.edit(*pairs[0])
    again.commit()
    assert [(entry.id, entry.committed) for entry in again.records] == [(1, True), (3, True)]
    assert later


def edited_run(folder: Path) -> LitSmall:
    """A module with one edit, and its run in ``run.ckpt``."""
    module, mend = made(), MEND(LAYER, guard=None)
    trainer = validated(folder, mend, module)
    mend.edit(*mistakes(module)[0])
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "run.ckpt")
    return module


def test_weights_that_something_else_changed_are_a_conflict_at_the_start(tmp_path: Path) -> None:
    edited_run(tmp_path)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    saved["state_dict"]["net.hidden.weight"][0, 0] += 1
    torch.save(saved, tmp_path / "other.ckpt")
    for start in ("validate", "test", "predict", "fit"):
        run = getattr(quiet_trainer(tmp_path, callbacks=[MEND()], max_epochs=1), start)
        with pytest.raises(EditConflictError, match=r"MEND\(mend\).*net.hidden"):
            run(LitSmall(), loader(), ckpt_path=str(tmp_path / "other.ckpt"), weights_only=True)


class EditsInHooks(pl.Callback):
    """Edits the first mistake of a batch in the hook of an evaluation, with the batch as it is there."""

    def __init__(self, mend: MEND) -> None:
        self.mend, self.results = mend, []  # type: ignore[var-annotated]  # of any kind

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, *args: Any) -> None:
        x, y = batch
        wrong = (module(x).argmax(1) != y).nonzero()
        if len(wrong) and not self.results:
            assert x.is_inference() or torch.is_inference_mode_enabled()
            at = int(wrong[0, 0])
            self.results.append(self.mend.edit(x[at : at + 1].clone(), y[at : at + 1].clone()))

    on_predict_batch_end = on_test_batch_end = on_validation_batch_end


@pytest.mark.parametrize("what", ["validate", "test", "predict"])
def test_edits_inside_of_hooks_that_run_in_inference_mode(tmp_path: Path, what: str) -> None:
    x, y = digits()
    module, mend = made(), MEND(LAYER, guard=None, reference=(x[:50], y[:50]))
    hooks = EditsInHooks(mend)
    trainer = quiet_trainer(tmp_path, callbacks=[hooks, mend], precision="bf16-mixed")
    options = {} if what == "predict" else {"verbose": False}
    getattr(trainer, what)(module, loader(800, 1200, 400), **options)
    assert [result.status for result in hooks.results] == ["applied"]
    mend.revert_all()
    assert same(bits(module), trained())


@pytest.mark.slow
def test_a_compiled_network_is_edited_as_the_eager_one(tmp_path: Path) -> None:
    plain, compiled = made(), made()
    compiled.net = torch.compile(compiled.net, backend="eager")
    pair = mistakes(plain)[0]
    weights = []
    for module, layers in ((plain, "net.hidden"), (compiled, "net._orig_mod.hidden")):
        mend = MEND({"layers": layers}, guard=None)
        trainer = validated(tmp_path, mend, module)
        result = mend.edit(*pair)
        assert result.status == "applied", trainer
        assert bool(module(pair[0]).argmax(1) == pair[1])
        weights.append(next(value for name, value in module.state_dict().items() if name.endswith("hidden.weight")))
        assert mend.editor is not None
        LitSmall().net.load_state_dict({k.removeprefix("net."): v for k, v in mend.editor.export_state_dict().items()})
    assert torch.equal(*weights)


def test_edits_at_the_end_of_a_fit_are_in_its_last_evaluation_and_checkpoint(tmp_path: Path) -> None:
    seen: list[float] = []

    class Looks(pl.Callback):
        def on_validation_end(self, trainer: Any, module: Any) -> None:
            with torch.no_grad():
                seen.append(float((module(x).argmax(1) == y).float().mean()))

    module = made()
    pairs = mistakes(module, 2)
    x, y = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1] for pair in pairs])
    mend = MEND(LAYER, edits=pairs, guard=None)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]  # a lambda is enough
    trainer = quiet_trainer(tmp_path, callbacks=[Looks(), mend], max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(module, loader(0, 100), loader())
    assert seen == [0.0, 1.0]
    assert [result.status for result in mend.results] == ["applied"] * 2
    assert [(entry.epoch, entry.step) for entry in mend.records] == [(1, 4)] * 2
    mend.revert_all()
    assert same(bits(module), trained())


def test_training_goes_on_from_edits_and_says_which_share_holds(tmp_path: Path) -> None:
    module = made()
    mend = MEND(LAYER, edits=mistakes(module, 2), when="train_epoch_end", guard=None)
    trainer = quiet_trainer(tmp_path, callbacks=[mend], max_epochs=3)
    with pytest.warns(UserWarning, match="training goes on from an edited network"):
        trainer.fit(module, loader(0, 600), loader())
    assert 0 <= float(trainer.callback_metrics["mend/retention"]) <= 1
    assert mend.editor is not None
    pairs = [(each.x, each.y) for each in mend.editor.log]
    with torch.no_grad():
        held = [bool(module(x).argmax(1) == y) for x, y in pairs]
    assert sum(held) / len(held) == float(trainer.callback_metrics["mend/retention"])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = MEND()
    validated(tmp_path, again, LitSmall(), ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True)
    assert [entry.id for entry in again.records] == [entry.id for entry in mend.records]


def test_after_further_training_edits_are_taken_back_inexactly_alone(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, guard=None)
    trainer = quiet_trainer(tmp_path, callbacks=[mend], max_epochs=1)
    trainer.validate(module, loader(), verbose=False)
    mend.edit(*mistakes(module)[0])
    assert mend.editor is not None
    added = mend.editor.edit_log.deltas(mend.editor.log[0])["net.hidden"]
    with pytest.warns(UserWarning, match="training goes on"):
        trainer.fit(module, loader(0, 100), loader())
    before = module.net.hidden.weight.detach().double()
    with pytest.raises(EditConflictError, match=r"net\.hidden"):
        mend.revert(0)
    with pytest.warns(UserWarning, match="not to the bit"):
        mend.revert(0, inexact=True)
    assert torch.allclose(module.net.hidden.weight.double(), before - added, atol=1e-7)
    assert not mend.records


def test_an_edit_that_is_not_made_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, guard=Guard(0.0, 0.0), scale=3.0)
    trainer = quiet_trainer(tmp_path, callbacks=[mend], max_epochs=1)
    trainer.validate(module, loader(), verbose=False)
    mend.guard = None
    mend.edit(*mistakes(module)[0])
    with pytest.warns(UserWarning, match="training goes on"):
        trainer.fit(module, loader(0, 100), loader())
    mend.guard, before, (x, _) = Guard(0.0, 0.0), bits(module), digits()
    assert mend.edit(x[800:801], torch.tensor([int(module(x[800:801]).argmin())])).status == "refused"
    with pytest.raises(BatchError):
        mend.edit(x[800:801], torch.tensor([77]))
    assert same(bits(module), before)
    with pytest.raises(EditConflictError, match=r"net\.hidden.*rebase"):
        mend.revert(0)
    mend.rebase()
    assert same(bits(module), before)
    mend.revert(0)
    assert not mend.records


def test_a_checkpoint_from_before_the_first_edit_has_none(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, guard=None)
    trainer = validated(tmp_path, mend, module)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    pair = mistakes(module)[0]
    first = mend.edit(*pair)
    edited = bits(module)
    trainer.validate(module, loader(), verbose=False, ckpt_path=str(tmp_path / "before.ckpt"), weights_only=True)
    assert same(bits(module), trained())
    assert not mend.records
    again = mend.edit(*pair)
    assert (first.status, again.status, again.scale) == ("applied", "applied", first.scale)
    assert same(bits(module), edited)


def test_the_editor_that_is_asked_for_edits_or_is_refused(tmp_path: Path) -> None:
    module, mend, pairs = made(), MEND(LAYER, guard=None), mistakes(made())
    trainer = validated(tmp_path, mend, module)
    mend.edit(*pairs[0])
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "edited.ckpt")
    mend.commit()
    trainer.save_checkpoint(tmp_path / "committed.ckpt")
    own, x = made(), digits()[0]
    head = GradientEditor(own, "net.head", example=x[:2], norm_scope="none", alpha=0.1)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    hidden = GradientEditor(own, "net.hidden", example=x[:2], norm_scope="none", alpha=0.1)

    def edits_by(editor: Any, checkpoint: str) -> Any:
        other, fresh = MEND(editor, scale="unit", guard=None), LitSmall()
        trainer = validated(tmp_path, other, fresh, ckpt_path=str(tmp_path / checkpoint), weights_only=True)
        assert other.edit(*pairs[1]).status == "applied", trainer
        assert other.editor is not None
        return [name for name, each in fresh.state_dict().items() if not torch.equal(each, module.state_dict()[name])]

    for editor in ({"layers": "head"}, {**LAYER, "rank": 3}, tmp_path / "head.pt", head, hidden):
        with pytest.raises(ConfigurationError, match=r"edits \[0\] were made by an editor of 'net\.hidden'"):
            edits_by(editor, "edited.ckpt")
    for editor in (None, LAYER, {"seed": 1}, {"alpha": 0.1}):
        assert edits_by(editor, "edited.ckpt") == ["net.hidden.weight"]
    for editor in ({"layers": "head"}, tmp_path / "head.pt"):
        assert edits_by(editor, "committed.ckpt") == ["net.head.weight"]


def test_the_guard_speaks_of_the_validation_samples(tmp_path: Path) -> None:
    module = made()
    mend = MEND(LAYER, guard=Guard(max_drop=0.0, max_total_drop=0.0), scale=3.0)
    validated(tmp_path, mend, module)
    x, _ = digits()
    state = torch.random.get_rng_state()
    result = mend.edit(x[800:801], torch.tensor([int(module(x[800:801]).argmin())]))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert result.status == "refused"
    assert result.locality is not None
    assert result.locality.images == 200
    assert result.locality.accuracy_before == pytest.approx(
        float((made()(x[600:800]).argmax(1) == digits()[1][600:800]).double().mean())
    )
    assert same(bits(module), trained())
    assert not mend.records


def test_an_editor_of_a_file_and_one_of_its_own_edit_alike(tmp_path: Path) -> None:
    module, x = made(), digits()[0]
    editor = GradientEditor(module, "net.hidden", example=x[:2], rank=4)
    editor.fit_statistics([(x[:100], torch.randint(10, (100,), generator=torch.Generator().manual_seed(0)))])
    torch.save({"epoch": 1, "strategy": {"editor": editor.state_dict()}}, tmp_path / "trained.ckpt")
    pair, weights = mistakes(module)[0], []
    for given, own in ((editor, module), (tmp_path / "trained.ckpt", made())):
        mend = MEND(given, guard=None, reference=None)  # type: ignore[arg-type]  # mypy takes the tuple for objects
        trainer = validated(tmp_path, mend, own)
        assert mend.edit(*pair).status == "applied", trainer
        weights.append(own.net.hidden.weight)
    assert torch.equal(*weights)
    torch.save({"epoch": 1}, tmp_path / "none.ckpt")
    with pytest.raises(StateError, match=r"none\.ckpt holds no editor"):
        MEND(tmp_path / "none.ckpt")


def test_what_cannot_be_edited_is_refused_by_name(tmp_path: Path) -> None:
    module, mend, (x, y) = made(), MEND(LAYER, reference=None), digits()
    with pytest.raises(ConfigurationError, match="belongs to no run yet"):
        mend.edit(x[:1], y[:1])
    trainer = validated(tmp_path, mend, module)
    with pytest.raises(NotFittedError, match="reference"):
        mend.edit(x[:1], y[:1])
    fitted = MEND({**LAYER, "alpha": 0.1, "norm_scope": "none"}, guard=None)
    trainer = validated(tmp_path, fitted, module)
    for odd in ((x[:1], y[:1] + 10), (x[:1], y[:1].float()), (x[:1] / 0, y[:1]), (x[:2], y[:1])):
        with pytest.raises(BatchError):
            fitted.edit(*odd)
    with pytest.raises(ArgumentError, match="no edit 3"):
        fitted.revert(3)
    with pytest.raises(ConfigurationError, match="route='exact' counts"):
        fitted.edit(x[:1], y[:1], route="exact")
    with pytest.raises(ArgumentError, match="one network for all"):
        fitted.edit(x[:1], y[:1], task=0)
    assert trainer
    assert same(bits(module), trained())
    for wrong in ({"layer": "x"}, {"editor": {"layer": "x"}}, {"weight": 0}, {"scale": "large"}, {"reference": "test"}):
        with pytest.raises(ArgumentError):
            MEND(**wrong)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ArgumentError, match="an edit must be"):
        MEND(edits=[(x[:1],)])


def test_weights_of_which_an_average_is_kept_are_edited_on_request_alone(tmp_path: Path) -> None:
    pairs = mistakes(made(), 1)
    average = StochasticWeightAveraging(swa_lrs=0.01)
    trainer = quiet_trainer(tmp_path, callbacks=[MEND(LAYER, edits=pairs), average], max_epochs=2)
    with pytest.raises(ConfigurationError, match="StochasticWeightAveraging averages the weights"):
        trainer.fit(made(), loader(0, 100))

    class Edits(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            mend.edit(*pairs[0])

    targets: tuple[Literal["live"] | None, ...] = (None, "live")
    for target in targets:
        mend = MEND(LAYER, target=target, guard=None, reference=digits()[0][600:800])
        trainer = quiet_trainer(
            tmp_path, callbacks=[mend, Edits(), WeightAveraging()], max_epochs=1, num_sanity_val_steps=0
        )
        if target is None:
            with pytest.raises(ConfigurationError, match="WeightAveraging averages the weights"):
                trainer.fit(made(), loader(0, 100))
            with pytest.raises(ConfigurationError, match="in a trainer without WeightAveraging"):  # its average stays
                mend.edit(*pairs[0])
            assert not mend.records
        else:
            trainer.fit(made(), loader(0, 100))
            assert len(mend.records) == 1


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_strategies_that_split_the_network_are_refused(kind: type[Any]) -> None:
    class Trainer:
        strategy = kind.__new__(kind)  # not all can be made without what they need

    with pytest.raises(
        ConfigurationError, match=rf"MEND\(mend\) cannot edit weights under {kind.__name__}.*strategy=\"ddp\""
    ):
        MEND().setup(Trainer(), made(), "fit")  # type: ignore[arg-type]  # what of a trainer is looked at


def test_two_callbacks_do_not_edit_one_layer(tmp_path: Path) -> None:
    """Each would take the other's edits for weights that something else changed."""
    module, pairs = made(), mistakes(made())
    two = [MEND(LAYER, edits=pairs[at : at + 1], guard=None, name=name) for at, name in enumerate(("first", "second"))]
    trainer = quiet_trainer(tmp_path, callbacks=two, max_epochs=1)
    with pytest.raises(ConfigurationError, match=r"MEND\(second\) would change 'net\.hidden', .*edit of MEND\(first\)"):
        trainer.fit(module, loader(0, 100), loader())
    module, two = made(), [MEND(LAYER, guard=None, name=name) for name in ("first", "second")]
    trainer = validated(tmp_path, two[0], module, two[1])
    for mend, pair in zip(two, pairs[:2], strict=True):  # when the run is over
        assert mend.edit(*pair).status == "applied"
    with pytest.raises(EditConflictError, match=r"net\.hidden"):
        two[0].revert(0)
    for mend in reversed(two):
        mend.revert(0)
    assert same(bits(module), trained())
    assert trainer


def test_a_damaged_state_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, guard=None)
    trainer = validated(tmp_path, mend, module)
    mend.edit(*mistakes(module)[0])
    state = mend.state_dict()
    for change in (
        lambda s: s.update(next_id=0),
        lambda s: s["edits"][0].update(inner=7),
        lambda s: s["edits"][0].update(route="exact"),
        lambda s: s["editor"]["log"].update(next_id=0),
        lambda s: s["editor"].pop("log"),
        lambda s: s.update(logs={"x": s["editor"]["log"]}),
    ):
        damaged = copy.deepcopy(state)
        change(damaged)
        fresh = MEND()
        with pytest.raises(StateError):
            fresh.load_state_dict(damaged)
        assert not fresh.records
    assert trainer


def test_nothing_is_warned_of_where_nothing_is_edited(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        validated(tmp_path, MEND(), made())
    assert not [each for each in said if "MEND" in str(each.message) or "clkit" in each.filename]


def test_the_edits_of_a_file_that_gives_an_editor_are_not_taken_up_and_that_is_said(tmp_path: Path) -> None:
    module = edited_run(tmp_path)
    other = MEND(tmp_path / "run.ckpt", guard=None)
    trainer = validated(tmp_path, other, module)
    with pytest.warns(UserWarning, match=r"run\.ckpt has edits, which are not taken up here"):
        other.edit(*mistakes(module)[0])
    again = MEND(tmp_path / "run.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "The 'val_dataloader' does not have many workers")
        trainer = validated(tmp_path, again, LitSmall(), ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True)
        again.revert(0)
    assert trainer
