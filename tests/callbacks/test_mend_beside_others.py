"""MEND beside what else learns of a network: heads, masks of tasks, simplex heads, predictors of errors, grafts."""

from __future__ import annotations

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from small_runs import LitSmall, quiet_trainer
from test_mend_runs import LAYER, bits, digits, loader, made, mistakes, same
from torch import Tensor

from clkit.callbacks import AEFOCL, DEUP, DST, LDA, MEND, NMC, DSimplex, FeatureCallback
from clkit.callbacks._run_edits import feature_shift
from clkit.data import ClassIncremental, StreamDataModule, TaskIncremental
from clkit.errors import ArgumentError, BatchError, ConfigurationError
from clkit.methods import GradientEditor, Guard, OnProLosses, PruneSchedule
from clkit.strategies import GradientFreeStrategy, OnProStrategy
from clkit.surgery.fixed_classifier import simplex_classifier_of

pytestmark = pytest.mark.filterwarnings("ignore:the editor is not trained", "ignore:the guard has no reference")


def frozen(folder: Path, *callbacks: Any, module: Any = None) -> Any:
    """A run that learns heads on a network that does not train; gives trainer and module.

    Whoever edits keeps the trainer, as ``_trainer``: a callback has a weak reference to it.
    """
    module = module or made()
    trainer = quiet_trainer(folder, callbacks=[*callbacks], max_epochs=1, strategy=GradientFreeStrategy())
    trainer.fit(module, loader(0, 400), loader())
    return trainer, module


def features(module: LitSmall, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.relu(module.net.hidden(x)).double()


@pytest.mark.parametrize("kind", [AEFOCL, NMC, LDA])
def test_a_head_that_decides_is_corrected_by_its_sums(tmp_path: Path, kind: Any) -> None:
    head, mend = kind(), MEND(guard=None, weight=200)
    _trainer, module = frozen(tmp_path, head, mend)
    (x, y), before = digits(), bits(module)
    learned = {name: value for name, value in head.head.state_dict().items() if isinstance(value, Tensor)}
    learned = copy.deepcopy(learned)
    at = int((head.head.predict(features(module, x[800:])) != y[800:]).nonzero()[0, 0]) + 800
    result = mend.edit(x[at : at + 1], y[at : at + 1], x[at : at + 1, None] + 0.01 * torch.rand(1, 5, 64))
    assert (result.status, result.route, result.head, result.scale) == ("applied", "exact", head.name, 200.0)
    assert result.prediction_before != result.label == result.prediction_after
    assert result.generality == 1.0
    assert result.locality is not None
    assert int(head.head.predict(features(module, x[at : at + 1]))) == int(y[at])
    by_hand = copy.deepcopy(head.head)  # a head that learns the same rows as a batch of its own
    by_hand.reset()
    by_hand.update(features(module, x[:400]), y[:400])
    by_hand.update(features(module, x[at : at + 1]).repeat(200, 1), y[at : at + 1].repeat(200))
    rows = features(module, x[800:])
    assert torch.allclose(by_hand(rows), head.head(rows), rtol=1e-8, atol=1e-8)
    assert same(bits(module), before)
    mend.revert(0)
    for name, value in head.head.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.allclose(value.double(), learned[name].double(), rtol=1e-12, atol=1e-9), name
    assert not mend.records


def test_an_edit_of_a_head_survives_a_checkpoint_and_is_taken_back_there(tmp_path: Path) -> None:
    head, mend, (x, y) = NMC(), MEND(guard=None, weight=100), digits()
    trainer, module = frozen(tmp_path, head, mend)
    at = int((head.head.predict(features(module, x[800:])) != y[800:]).nonzero()[0, 0]) + 800
    unedited = head.head(features(module, x[800:900]))
    mend.edit(x[at : at + 1], y[at : at + 1])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other, again = NMC(), MEND()
    later = quiet_trainer(tmp_path, callbacks=[other, again], strategy=GradientFreeStrategy())
    later.validate(LitSmall(), loader(), verbose=False, ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True)
    assert torch.equal(other.head(features(module, x[800:900])), head.head(features(module, x[800:900])))
    again.revert(0)
    assert torch.allclose(other.head(features(module, x[800:900])), unedited, rtol=1e-10)


def test_an_edit_of_a_head_that_is_committed_stays(tmp_path: Path) -> None:
    head, mend = NMC(), MEND(guard=None, weight=200)
    _trainer, module = frozen(tmp_path, head, mend)
    x, _ = digits()
    plain = head.head.counts.clone()
    for at in (800, 801):
        wanted = (head.head.predict(features(module, x[at : at + 1])) + 1) % 10
        assert mend.edit(x[at : at + 1], wanted).route == "exact"
    mend.revert(1)
    counts = head.head.counts.clone()
    mend.commit()
    assert torch.equal(head.head.counts, counts)
    assert not torch.equal(counts, plain)
    with pytest.raises(ArgumentError, match="edit 0 was committed"):
        mend.revert(0)
    assert [(entry.committed, entry.features) for entry in mend.records] == [(True, None)]
    again = MEND()
    again.load_state_dict(mend.state_dict())
    assert [(entry.id, entry.committed) for entry in again.records] == [(0, True)]


def test_the_guard_of_a_head_refuses_and_changes_nothing(tmp_path: Path) -> None:
    head, mend, (x, y) = NMC(), MEND(guard=Guard(0.0, 0.0), weight=3000), digits()
    _, module = frozen(tmp_path, head, mend)
    before = copy.deepcopy(dict(head.head.state_dict()))
    wanted = (head.head.predict(features(module, x[800:801])) + 5) % 10
    result = mend.edit(x[800:801], wanted)
    assert (result.status, result.route) == ("refused", "exact")
    assert "max_drop" in result.reason
    answers = copy.deepcopy(head.head)  # the drop, counted by hand
    answers.update(features(module, x[800:801]).repeat(3000, 1), wanted.repeat(3000))
    reference = features(module, x[600:800])
    right = [float((each.predict(reference) == y[600:800]).double().mean()) for each in (head.head, answers)]
    assert result.locality is not None
    assert result.locality.drop == pytest.approx(right[0] - right[1])
    assert (result.locality.near_ties, result.locality.near_tie_agreement) == (0, None)  # of scores there are none
    assert all(torch.equal(value, before[name]) for name, value in head.head.state_dict().items() if value is not None
               and isinstance(value, Tensor))  # fmt: skip
    lazy = MEND(guard=None, weight=1)
    _, module = frozen(tmp_path, NMC(), lazy)
    result = lazy.edit(x[800:801], wanted)
    assert (result.status, result.scale) == ("refused", 0.0)
    assert "raise weight" in result.reason


def test_a_recursive_head_and_several_heads_are_refused_by_name(tmp_path: Path) -> None:
    x, y = digits()
    mend = MEND(guard=None)
    _trainer, _ = frozen(tmp_path, AEFOCL(solver="recursive", balance="none"), mend)
    with pytest.raises(ConfigurationError, match="recursive"):
        mend.edit(x[:1], y[:1])
    mend = MEND(guard=None)
    _trainer, _ = frozen(tmp_path, NMC(), LDA(), mend)
    with pytest.raises(ConfigurationError, match="several heads decide, nmc, lda"):
        mend.edit(x[:1], y[:1])
    named = MEND(guard=None, head="nm")
    _trainer, _ = frozen(tmp_path, NMC(), LDA(), named)
    with pytest.raises(ConfigurationError, match="no head 'nm'; this run has nmc, lda"):
        named.edit(x[:1], y[:1])


def test_a_head_beside_a_network_that_answers_itself_refuses_a_change_of_its_features(tmp_path: Path) -> None:
    module, head, mend = made(), NMC(), MEND(LAYER, guard=None)
    first = quiet_trainer(tmp_path, callbacks=[head, mend], max_epochs=1)  # which mend has a weak reference to
    first.fit(module, loader(0, 100), loader())
    before, pair = bits(module), mistakes(module)[0]
    with pytest.raises(ConfigurationError, match=r"NMC\(nmc\) learned.*allow_stale=True"):
        mend.edit(*pair)
    assert same(bits(module), before)
    classifier = MEND({"layers": "head"}, guard=None, name="classifier")
    allowed = MEND(LAYER, guard=None, allow_stale=True)
    trainer = quiet_trainer(tmp_path, callbacks=[head, allowed, classifier])
    trainer.validate(module, loader(), verbose=False)
    assert classifier.edit(*pair).stale == ()
    classifier.revert_all()
    with pytest.warns(UserWarning, match=r"NMC\(nmc\): the backbone changed: MEND\(mend\): edit 0 changed net.hidden"):
        assert allowed.edit(*pair).stale == ("NMC(nmc)",)
    gc.collect()
    assert mend.edit(*pair, route="exact").route == "exact"
    assert first


def test_a_grafted_head_decides_and_its_graft_follows(tmp_path: Path) -> None:
    head, mend, (x, y) = AEFOCL(graft="fit_end", balance="none"), MEND(guard=None, weight=100), digits()
    trainer = quiet_trainer(tmp_path, callbacks=[head, mend], max_epochs=1)
    module = made()
    module.net.requires_grad_(False)
    module.net.head.requires_grad_(True)
    trainer.fit(module, loader(0, 400), loader())
    assert head.grafted
    with torch.no_grad():
        wrong = (module(x[800:]).argmax(1) != y[800:]).nonzero()
    at = int(wrong[0, 0]) + 800
    result = mend.edit(x[at : at + 1], y[at : at + 1])
    assert (result.route, result.status) == ("exact", "applied")
    assert int(module(x[at : at + 1]).argmax(1)) == int(y[at])
    mend.revert(0)
    assert int(module(x[at : at + 1]).argmax(1)) != int(y[at])
    plain = MEND({"layers": "head"}, guard=None, route="editor", scale=20.0, name="plain")
    trainer = quiet_trainer(tmp_path, callbacks=[head, plain])
    trainer.validate(module, loader(), verbose=False)
    with pytest.warns(UserWarning, match="what that learns further overwrites it"):
        assert plain.edit(x[at : at + 1], y[at : at + 1]).status == "applied"


class Tasks(LitSmall):
    """The same network every time."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(width=32)


def sparse(folder: Path, *callbacks: Any, stop_after: int = 2) -> Any:
    """Two tasks in one network; gives trainer, module and masks."""
    module, dst = Tasks(), DST(0.4, schedule=PruneSchedule(update_every=2), table=False, initial="uniform")
    data = StreamDataModule("digits:flat", TaskIncremental(experiences=2), batch_size=60, epochs_per_experience=2)
    trainer = quiet_trainer(folder, callbacks=[*callbacks, dst])
    trainer.fit(module, datamodule=data)
    return trainer, module, dst


@pytest.mark.parametrize("task", [0, 1])
def test_an_edit_keeps_to_the_connections_of_its_task(tmp_path: Path, task: int) -> None:
    mend = MEND(LAYER, guard=None, reference=digits()[0][:50])
    trainer, module, dst = sparse(tmp_path, mend)
    exported = [{name: value.clone() for name, value in dst.export(each).items()} for each in range(2)]
    live = bits(module)
    x, _ = digits()
    with dst.activate(task), torch.no_grad():
        wanted = module(x[800:801]).topk(2).indices[0, 1:]
    result = mend.edit(x[800:801], wanted, task=task)
    assert (result.status, result.task) == ("applied", task)
    mine, others = dst.topology.mask(task)["net.hidden.weight"], dst.topology.mask(1 - task)["net.hidden.weight"]
    edited = dst.export(task)["net.hidden.weight"]
    moved = edited != exported[task]["net.hidden.weight"]
    assert bool(moved.any())
    assert not bool((moved & ~(mine & ~others)).any())
    assert torch.equal(edited[~mine], torch.zeros_like(edited[~mine]))
    assert same(dst.export(1 - task), exported[1 - task])
    for _ in range(2):  # whichever task is shown in between
        for each in (0, 1):
            with dst.activate(each), torch.no_grad():
                assert bool(module(x[800:801]).argmax(1) == wanted) or each != task
                assert torch.equal(module.net.hidden.weight == 0, dst.export(each)["net.hidden.weight"] == 0)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again, masks = MEND(), DST(0.4, schedule=PruneSchedule(update_every=2), table=False, initial="uniform")
    fresh = Tasks()
    later = quiet_trainer(tmp_path, callbacks=[again, masks])
    data = StreamDataModule("digits:flat", TaskIncremental(experiences=2), batch_size=60, epochs_per_experience=2)
    later.validate(fresh, data, verbose=False, ckpt_path=str(tmp_path / "run.ckpt"), weights_only=True)
    assert torch.equal(masks.export(task)["net.hidden.weight"], edited)
    for callback, tasks, network in ((mend, dst, module), (again, masks, fresh)):
        callback.revert(0)
        assert all(same(tasks.export(each), exported[each]) for each in range(2))
        assert same(bits(network), live)


def test_no_edit_while_a_task_trains_nor_of_what_it_keeps_apart(tmp_path: Path) -> None:
    refused: list[str] = []

    class Edits(FeatureCallback):
        def learn(self, features: Tensor, targets: Tensor) -> None:
            if not refused:
                x, y = digits()
                with pytest.raises(ConfigurationError) as error:
                    mend.edit(x[:1], y[:1])
                refused.append(str(error.value))

    mend = MEND(LAYER, guard=None, reference=digits()[0][:50])
    head = MEND({"layers": "head"}, guard=None, reference=digits()[0][:50], name="head")
    _, module, dst = sparse(tmp_path, Edits(forward="shared"), mend, head)
    assert "task 0 of DST trains" in refused[0]
    x, y = digits()
    with pytest.raises(ConfigurationError, match=r"keeps apart for each task"):
        head.edit(x[:1], y[:1])
    assert same({"w": dst.export(1)["net.hidden.weight"]}, {"w": module.net.hidden.weight.detach()})


def test_a_simplex_head_is_never_edited_and_the_shift_of_features_is_bounded(tmp_path: Path) -> None:
    module, x = Tasks(), digits()[0]
    simplex, mend = DSimplex(16), MEND(LAYER, guard=None)
    head = MEND({"layers": ["net.head.head.junction"]}, guard=None, name="head")
    tight = MEND(LAYER, guard=None, max_feature_shift=1e-6, name="tight")
    data = StreamDataModule("digits:flat", ClassIncremental(experiences=2), batch_size=60, epochs_per_experience=2)
    trainer = quiet_trainer(tmp_path, callbacks=[simplex, mend, head, tight])
    trainer.fit(module, datamodule=data)
    place = simplex_classifier_of(module)
    assert place is not None
    assert GradientEditor(module, example=x[:2]).layers == ["net.hidden"]  # by itself
    before, old = bits(module), simplex.embed(module, x[:100])
    reference = torch.cat([batch[0] for batch in data.val_dataloader()])[:512]
    with torch.no_grad():
        wanted = module(x[800:801]).topk(2).indices[0, 1:]
        base = simplex.embed(module, reference)
    refused = tight.edit(x[800:801], wanted)
    assert refused.status == "refused"
    assert "max_feature_shift=1e-06" in refused.reason
    assert same(bits(module), before)
    result = mend.edit(x[800:801], wanted)
    assert result.status == "applied"
    assert result.features is not None
    cosine = (base * simplex.embed(module, reference)).sum(1).mean()
    assert result.features.cosine == pytest.approx(float(cosine), abs=1e-5)
    assert result.features.recall_before is not None
    assert not torch.equal(simplex.embed(module, x[:100]), old)
    assert {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])} == {
        "net.hidden.weight"
    }
    with pytest.raises(ConfigurationError, match="simplex head"):
        head.edit(x[800:801], wanted)


def test_no_edit_of_weights_that_a_low_rank_change_holds(tmp_path: Path) -> None:
    said: list[str] = []

    class Edits(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            x, y = digits()
            if not said:
                for mend in mends:
                    with pytest.raises(ConfigurationError) as error:
                        mend.edit(x[:1], y[:1])
                    said.append(str(error.value))

    mends = [MEND(LAYER, guard=None), MEND(guard=None, route="editor", name="auto")]
    strategy = GradientFreeStrategy(1, "lora", lora_rank=2)
    trainer = quiet_trainer(tmp_path, callbacks=[Edits(), *mends], strategy=strategy, max_epochs=2)
    trainer.fit(made(), loader(0, 100), loader())
    held = "would change weights that hold the low-rank change of GradientFreeStrategy(warmup='lora'); it stands until"
    assert [held in each for each in said] == [True, True], said


def test_what_a_head_cannot_count_is_refused_by_name(tmp_path: Path) -> None:
    head, mend = NMC(), MEND(guard=None)
    _trainer, _ = frozen(tmp_path, head, mend)
    x, y = digits()[0][800:801], digits()[1][800:801]
    learned = head.head.counts.clone()
    for images, labels, views, says in (
        (x, y + 10**9, None, "is not below max_classes=65536"),  # before anything of that width is made
        (x, y > 3, None, r"y must be \(B,\) class ids to 1 images, got \(1,\) torch.bool"),
        (x[:, :7], y, None, r"\(1, 7\)"),
        (x, y, "crops", "equivalents must be images or a function"),
        (x, 3, None, r"images \(B, …\) and labels \(B,\), got shape \(1, 64\) and 3"),
    ):
        with pytest.raises(BatchError, match=says):
            mend.edit(images, labels, views)  # type: ignore[arg-type]  # of any kind
    for options, says in (
        ({"route": "head"}, "route must be 'auto', 'exact', 'editor' or None"),
        ({"task": "a"}, "task"),
    ):
        with pytest.raises(ArgumentError, match=says):
            mend.edit(x, y, **options)  # type: ignore[arg-type]  # likewise
    with pytest.raises(ArgumentError, match="edits are named by their numbers"):
        mend.revert([0])  # type: ignore[arg-type]  # likewise
    for edits in ([(1, 2)], [(x, 3)]):
        with pytest.raises(ArgumentError, match="an edit must be tensors"):  # and not at the end of a fit
            MEND(edits=edits)
    with pytest.raises(ArgumentError, match="scale must be 'smallest', 'unit' or a finite number above 0"):
        MEND(scale=-1.0)
    assert torch.equal(head.head.counts, learned)
    result = mend.edit(x, (y + 1) % 10, torch.zeros(0, 64))  # views of which there are none
    assert (result.status, result.generality) == ("applied", None)


@pytest.mark.parametrize("route", ["exact", "editor"])
def test_predictors_of_errors_are_named_as_stale(tmp_path: Path, route: Any) -> None:
    mend, x = MEND(LAYER, guard=None, allow_stale=True, weight=300), digits()[0]
    _, module = frozen(tmp_path, NMC(), DEUP(), mend)
    wanted = mistakes(module)[0][1] if route == "editor" else torch.tensor([3])
    image = mistakes(module)[0][0] if route == "editor" else x[800:801]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = mend.edit(image, wanted, route=route)
    told = "DEUP: the backbone changed" if route == "editor" else "MEND(mend): DEUP judges by errors of before"
    assert any(told in str(each.message) for each in said)
    assert result.status == "applied"
    assert "DEUP" in result.stale
    assert ("NMC(nmc)" in result.stale) == (route == "editor")


def counted(head: Any) -> Tensor:
    counts: Tensor = head.head.counts.clone()
    return counts


@pytest.mark.parametrize("how", ["reset", "another head"])
def test_edits_of_a_head_that_began_anew_are_not_taken_out_of_it(tmp_path: Path, how: str) -> None:
    head, mend, (x, y) = NMC(), MEND(guard=None), digits()
    trainer, module = frozen(tmp_path, head, mend)
    assert mend.edit(x[800:801], (y[800:801] + 1) % 10).route == "exact"
    if how == "reset":
        head.head.reset()
        head.head.update(features(module, x[:400]), y[:400])
    else:
        trainer, module = frozen(tmp_path, head := NMC(), mend, module=module)
    before = counted(head)
    with pytest.warns(UserWarning, match=r"began anew, and its sums do not hold edits \[0\] any more"):
        trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert not mend.records
    with pytest.raises(ArgumentError, match="no edit 0"):
        mend.revert(0)
    assert torch.equal(counted(head), before)
    assert mend.edit(x[801:802], (y[801:802] + 1) % 10).id == 1
    mend.revert_all()
    assert torch.equal(counted(head), before)


def test_the_guard_of_a_head_counts_all_edits_and_says_what_it_cannot_see(tmp_path: Path) -> None:
    head, (x, y) = NMC(), digits()
    mend = MEND(guard=Guard(0.0, 0.0, policy="warn"), weight=3000)
    _trainer, module = frozen(tmp_path, head, mend)
    reference = features(module, x[600:800])
    before = head.head.predict(reference) == y[600:800]
    for row in (800, 650):  # the second is one of the reference, and does not count there
        wanted = (head.head.predict(features(module, x[row : row + 1])) + 5) % 10
        with pytest.warns(UserWarning, match=r"above max_\w*drop=0\.0; the edit is applied all the same"):
            result = mend.edit(x[row : row + 1], wanted)
        assert result.status == "applied"
    kept = torch.arange(600, 800) != 650
    after = head.head.predict(reference) == y[600:800]
    assert result.locality is not None
    assert result.locality.images == 199
    lost = float(before[kept].double().mean() - after[kept].double().mean())
    assert result.locality.total_drop == pytest.approx(lost)
    assert result.locality.total_drop > result.locality.drop
    for data, says in ((None, "the guard has no reference"), ((x[600:610], y[600:610]), "10 images, too few to see")):
        blind = MEND(reference=data)
        _trainer, _ = frozen(tmp_path, NMC(), blind)
        with pytest.warns(UserWarning, match=says):
            blind.edit(x[800:801], (y[800:801] + 1) % 10)


def test_an_image_counts_as_often_as_its_views_need(tmp_path: Path) -> None:
    head, mend, (x, _) = NMC(), MEND(guard=None, reference=None, weight=10), digits()
    _trainer, module = frozen(tmp_path, head, mend)
    seen = set()
    for row in range(800, 830):
        own, near = x[row : row + 1], x[row] + 0.3 * torch.randn(8, 64, generator=torch.Generator().manual_seed(row))
        wanted = (head.head.predict(features(module, own)) + 1) % 10
        shares = {}
        for count in (10, 30, 100):
            by_hand = copy.deepcopy(head.head)
            by_hand.update(features(module, own).repeat(count, 1), wanted.repeat(count))
            if bool((by_hand.predict(features(module, own)) == wanted).all()):
                shares[count] = float((by_hand.predict(features(module, near)) == wanted).double().mean())
        result = mend.edit(own, wanted, near)
        if not shares:
            assert result.status == "refused"
            continue
        again = mend.edit(own, wanted, near)  # which is nothing to do only where the views are right, too
        assert (again.status == "satisfied") == (shares[result.scale] >= 0.75)
        least = next((count for count, share in shares.items() if share >= 0.75), min(shares))
        assert (result.scale, result.generality) == (least, shares[least])
        seen.add((least, shares[least] >= 0.75, least == min(shares)))
        mend.revert(*(entry.id for entry in mend.records))
    assert {(right, first) for _, right, first in seen} == {(True, True), (True, False), (False, True)}


def test_how_far_features_moved_does_not_find_an_image_by_itself() -> None:
    old = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    shift = feature_shift(old, old, torch.tensor([0, 1, 2, 2]))
    assert (shift.cosine, shift.recall_before, shift.recall_after) == (pytest.approx(1.0), 0.5, 0.5)


def test_a_network_that_learned_by_replay_is_edited_when_the_fit_is_over(tmp_path: Path) -> None:
    module, mend = made(), MEND(LAYER, edits=mistakes(made(), 2), guard=None)
    strategy = OnProStrategy(50, losses=OnProLosses(rotation="none"), transform=torch.nn.Identity(), mixing=None)
    trainer = quiet_trainer(tmp_path, callbacks=[mend], max_epochs=1, strategy=strategy)
    trainer.fit(module, loader(0, 100), loader())
    assert {result.status for result in mend.results} <= {"applied", "satisfied", "refused"}
    assert mend.records
    trainer.fit_loop.max_epochs = 2
    with pytest.warns(UserWarning, match="training goes on from an edited network"):
        trainer.fit(module, loader(0, 100), loader())
