"""Edits from beginning to end: how far they go, what they leave alone, what is refused, and that all is taken back."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any, Literal

import pytest
import timm
import torch
from torch import Tensor, nn

from clkit.errors import ArgumentError, BatchError, EditConflictError
from clkit.methods import EditReference, GradientEditor, Guard, LocalityReport
from clkit.methods._edit_objective import objective_for
from clkit.metrics.editing import drawdown, locality, locality_kl

pytestmark = pytest.mark.filterwarnings("ignore:the editor is not trained", "ignore:the guard has no reference")


class Net(nn.Module):
    """Two hidden layers, one of them edited, and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.second, self.fc = nn.Linear(12, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))))


def rows(n: int, seed: int = 0) -> Tensor:
    """Points of five clusters that overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(99))
    return centres[torch.randint(5, (n,), generator=generator)] + torch.randn(n, 6, generator=generator)


@cache
def trained() -> dict[str, Tensor]:
    """Weights that tell the clusters apart."""
    torch.manual_seed(0)
    model, centres = Net(), 2 * torch.randn(5, 6, generator=torch.Generator().manual_seed(99))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for seed in range(150):
        x = rows(100, 1000 + seed)
        loss = nn.functional.cross_entropy(model(x), torch.cdist(x, centres).argmin(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def make(layers: Any = ("first", "second"), dtype: torch.dtype = torch.float32, **options: Any) -> GradientEditor:
    """An untrained editor of a trained network: it makes gradient steps."""
    model = Net().eval()
    model.load_state_dict(trained())
    model.to(dtype)
    editor = GradientEditor(model, layers, example=torch.zeros(2, 6), **{"norm_scope": "none", **options})
    if options.get("alpha", "auto") == "auto":
        x = rows(60, 8)
        editor.fit_statistics([(x, model(x.to(dtype)).topk(2).indices[:, 1])])
    return editor


def answers(editor: GradientEditor, x: Tensor) -> Tensor:
    model = editor._network.model
    with torch.no_grad():
        return model(x.to(next(model.parameters()).dtype)).float()


def second_best(editor: GradientEditor, x: Tensor) -> Tensor:
    return answers(editor, x).topk(2).indices[:, 1]


def unsure(editor: GradientEditor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The points of which the network is least sure, and the second best answers."""
    x = rows(300, seed)
    best = answers(editor, x).topk(2, dim=1)
    kept = (best.values[:, 0] - best.values[:, 1]).argsort()[:n]
    return x[kept], best.indices[kept, 1]


def bits(editor: GradientEditor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in editor._network.model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def near(x: Tensor, k: int = 6) -> Tensor:
    return x[:, None] + 0.02 * torch.randn(len(x), k, 6, generator=torch.Generator().manual_seed(3))


# ---- how far


def test_the_smallest_scale_that_does_is_taken() -> None:
    editor = make()
    for seed in range(6):
        x = rows(1, seed)
        y, views = second_best(editor, x), near(x)
        proposal, before = editor.propose(x, y), bits(editor)
        done = []
        for scale in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0):
            editor.apply(proposal, scale)
            hits = answers(editor, torch.cat([x, views[0]])).argmax(1) == y
            done.append(bool(hits[0]) and float(hits[1:].double().mean()) >= 0.75)
            editor.revert_all()
        result = editor.edit(x, y, views, guard=None)
        if any(done):
            assert result.status == "applied"
            assert result.scale == (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)[done.index(True)]
            assert result.prediction_after == y.tolist() == result.label
            assert result.generality == pytest.approx(float((answers(editor, views[0]).argmax(1) == y).double().mean()))
            assert result.probability_after[0] == pytest.approx(float(answers(editor, x).softmax(1)[0, y]), rel=1e-5)
            editor.revert(result.id)
        else:
            assert (result.status, result.id) == ("refused", None)
            assert result.reason.startswith("no scale up to 3.0 gives the wanted answers; ")
        assert same(bits(editor), before)


def test_of_images_that_are_edited_together_all_get_their_label() -> None:
    editor = make()
    one, label = unsure(editor, 1, 4)
    x, y = near(one, 3)[0], label.repeat(3)
    result = editor.edit(x, y, guard=None)
    assert result.reliability == float((answers(editor, x).argmax(1) == y).double().mean()) == 1.0
    assert len(editor.log) == 1
    assert torch.equal(editor.log[0].x, x)


def test_a_given_scale_is_taken_whether_or_not_it_does() -> None:
    editor = make()
    x = rows(1, 2)
    result = editor.edit(x, second_best(editor, x), scale=1e-4, guard=None)
    assert (result.status, result.scale, result.reliability) == ("applied", 1e-4, 0.0)
    before = bits(editor)
    other = editor.edit(x, second_best(editor, x), scale="unit", guard=None)
    assert other.scale == 1.0
    weights = {name: before[f"{name}.weight"].double() for name in editor.layers}
    for name, size in other.sizes.items():
        moved = bits(editor)[f"{name}.weight"].double() - weights[name]
        assert size == pytest.approx(float(moved.norm() / weights[name].norm()), rel=1e-3)


def test_what_is_satisfied_needs_nothing_unless_asked() -> None:
    editor = make()
    x = rows(1)
    y, before = answers(editor, x).argmax(1), bits(editor)
    result = editor.edit(x, y, guard=None)
    assert (result.status, result.id, result.scale, result.sizes) == ("satisfied", None, 0.0, {})
    assert same(bits(editor), before)
    assert editor.edit(x, y, guard=None, skip_satisfied=False, scale="unit").status == "applied"


def test_a_second_proposal_is_for_the_network_that_the_first_has_left() -> None:
    editor = make(alpha=0.002)
    x = rows(1, 1)
    y = second_best(editor, x)
    one = editor.propose(x, y)
    with editor.edited(one):
        two = editor.propose(x, y)
        with editor.edited(two):
            wanted = answers(editor, x)
    result = editor.edit(x, y, scale="unit", max_repeats=2, guard=None)
    assert (result.repeats, len(editor.log)) == (2, 1)
    torch.testing.assert_close(answers(editor, x), wanted, rtol=1e-6, atol=1e-6)


def test_equivalents_may_be_drawn_by_a_function() -> None:
    editor, seen = make(), []

    def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
        seen.append(x + 0.02 * torch.randn(x.shape, generator=generator))
        return seen[-1]

    x = rows(2, 3)
    random = torch.get_rng_state()
    result = editor.edit(x, second_best(editor, x), shifted, guard=None)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(seen) == 8
    views, y = torch.stack(seen, dim=1).flatten(0, 1), torch.tensor(result.label).repeat_interleave(8)
    assert result.generality == pytest.approx(float((answers(editor, views).argmax(1) == y).double().mean()))
    with pytest.raises(BatchError, match=r"equivalents must return images of shape \(2, 6\), got"):
        editor.edit(x, torch.tensor([0, 1]), lambda images, generator: images[:1], guard=None)
    with pytest.raises(BatchError, match=r"equivalents must be of shape \(B, k, …\) to images \(2, 6\), got \(3, 6\)"):
        editor.edit(x, torch.tensor([0, 1]), rows(3), guard=None)


# ---- what it leaves alone


def report_by_hand(before: Tensor, after: Tensor, y: Tensor | None) -> dict[str, Any]:
    p = before.softmax(1).sort(descending=True).values
    ties = p[:, 0] - p[:, 1] < 0.05
    kept = before.argmax(1) == after.argmax(1)
    found = {
        "images": len(before),
        "agreement": locality(before.argmax(1), after.argmax(1)),
        "near_ties": int(ties.sum()),
        "near_tie_agreement": float(kept[ties].double().mean()) if ties.any() else None,
        "kl": locality_kl(before, after),
    }
    if y is not None:
        right = [each.argmax(1) == y for each in (before, after)]
        found |= {
            f"accuracy_{when}": float(each.double().mean())
            for when, each in zip(("before", "after"), right, strict=True)
        }
        found["drop"] = drawdown(before.argmax(1), after.argmax(1), y) / 100
    return found


@pytest.mark.parametrize("labelled", [True, False])
def test_the_report_is_that_of_logits_before_and_after(labelled: bool) -> None:
    editor = make()
    reference = rows(300, 20)
    y = answers(editor, reference).argmax(1)
    y[::7] = (y[::7] + 1) % 5
    x = rows(2, 2)
    pristine = answers(editor, reference)
    data = (reference, y) if labelled else reference
    editor.edit(x[:1], second_best(editor, x[:1]), scale="unit", guard=None)
    before = answers(editor, reference)
    result = editor.edit(x[1:], second_best(editor, x[1:]), scale="unit", guard=None, reference=data)
    after, report = answers(editor, reference), result.locality
    assert isinstance(report, LocalityReport)
    for name, value in report_by_hand(before, after, y if labelled else None).items():
        assert getattr(report, name) == pytest.approx(value, rel=1e-4, abs=1e-9), name
    kept = float((pristine.argmax(1) == after.argmax(1)).double().mean())
    accuracy = [float((each.argmax(1) == y).double().mean()) for each in (pristine, after)]
    assert report.total_drop == pytest.approx(accuracy[0] - accuracy[1] if labelled else 1 - kept)
    assert report.near_ties > 0
    lost = dict.fromkeys(range(5), 0)
    for was, now, true in zip(before.argmax(1).tolist(), after.argmax(1).tolist(), y.tolist(), strict=True):
        own, gone = (true, was == true and now != true) if labelled else (was, was != now)
        lost[own] += gone
    assert all(lost[c] == n for c, n in report.lost.items())
    assert sorted(report.lost.values(), reverse=True) == [n for n in sorted(lost.values(), reverse=True)[:3] if n]


@pytest.mark.parametrize("scale", ["smallest", "unit", 2.0])
@pytest.mark.parametrize("policy", ["scale", "refuse"])
def test_no_edit_breaks_the_bounds_of_its_guard(scale: Any, policy: Any) -> None:
    editor = make()
    reference, statuses = rows(400, 30), []
    pristine = answers(editor, reference).argmax(1)
    guard = Guard(max_drop=0.03, max_total_drop=0.05, policy=policy)
    for seed in range(10):
        x, before = rows(1, 100 + seed), bits(editor)
        answered = answers(editor, reference).argmax(1)
        result = editor.edit(x, second_best(editor, x), scale=scale, guard=guard, reference=reference)
        statuses.append(result.status)
        now = answers(editor, reference).argmax(1)
        assert float((now != answered).double().mean()) <= 0.03
        assert float((now != pristine).double().mean()) <= 0.05
        if result.status == "refused":
            assert same(bits(editor), before)
            assert "drops by" in result.reason or "no scale" in result.reason
        else:
            assert result.locality is not None
            assert result.locality.drop == pytest.approx(float((now != answered).double().mean()))
        if result.status == "scaled":
            assert (policy, result.reliability) == ("scale", 1.0)
            assert "above max" in result.reason
    assert "refused" in statuses
    assert {"applied", "scaled"} & set(statuses)


def test_the_smallest_scale_is_not_made_smaller_and_few_images_are_said() -> None:
    editor, x, reference = make(), rows(1, 101), rows(200, 30)
    wanted, before = second_best(editor, x), bits(editor)
    seen: list[Tensor] = []

    def looks() -> str:
        seen.append(answers(editor, x))
        return "not this one"

    scales: dict[Literal["smallest", "unit"], bool] = {"smallest": False, "unit": True}
    for scale, several in scales.items():
        seen.clear()
        assert editor.edit(x, wanted, scale=scale, reference=reference, accept=looks).status == "refused"
        assert (len(seen) > 1) == several
        assert seen
    assert same(bits(editor), before)
    with pytest.warns(UserWarning, match=r"the reference has 20 images, too few to see a drop of max_drop=0\.02"):
        editor.edit(x, wanted, reference=reference[:20])


def test_near_ties_are_less_than_a_twentieth_apart() -> None:
    p = torch.tensor([[0.524, 0.476], [0.526, 0.474], [0.5, 0.5]])
    assert objective_for(2, None).near_ties(p.log()).tolist() == [True, False, True]


def test_a_guard_that_warns_edits_all_the_same() -> None:
    editor = make()
    x, reference = rows(1, 101), rows(200, 30)
    guard = Guard(max_drop=0.0, max_total_drop=0.0, policy="warn")
    with pytest.warns(
        UserWarning, match=r"share of unchanged answers on 200 reference images drops by .* \(policy='warn'\)"
    ):
        result = editor.edit(x, second_best(editor, x), scale=2.0, guard=guard, reference=reference)
    assert result.status == "applied"


def test_edited_images_do_not_count_as_reference() -> None:
    reference = EditReference((rows(10), torch.zeros(10, dtype=torch.int64)))
    assert len(reference.without(rows(10)[3:5])) == 8
    assert len(reference.without(rows(2, 9))) == 10
    for data, says in [
        (rows(0), "reference has no images"),
        ([(rows(2), torch.zeros(2).long()), rows(3)], "a label for each image, or for none"),
        (3, "reference must be images"),
        ([("a", 1)], "a batch of reference must be images"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            EditReference(data)
    editor = make()
    with pytest.raises(ArgumentError, match="reference has no images"):
        editor.edit(rows(1), torch.tensor([2]), reference=rows(1))


def test_a_guard_without_a_reference_says_that_it_knows_nothing() -> None:
    editor = make()
    x = rows(1)
    with pytest.warns(UserWarning, match="the guard has no reference"):
        editor.edit(x, second_best(editor, x))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the guard")  # it is said once
        editor.edit(x, second_best(editor, x))


def test_what_is_no_guard_and_no_bound_is_refused() -> None:
    for options, says in [
        ({"scale": "large"}, "scale must be 'smallest', 'unit' or a finite number"),
        ({"flip_share": 2.0}, "flip_share must be a number from 0 to 1"),
        ({"max_repeats": 0}, "max_repeats must be"),
        ({"guard": 0.02}, "guard must be a Guard or None, got 0.02"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            make().edit(rows(1), torch.tensor([0]), **options)
    with pytest.raises(ArgumentError, match="max_drop must be a number from 0 to 1"):
        Guard(max_drop=-0.1)
    with pytest.raises(ArgumentError, match="policy must be one of"):
        Guard(policy="stop")  # type: ignore[arg-type]  # what is refused


def test_a_protected_edit_leaves_what_layers_compute_for_the_reference() -> None:
    editor = make(("first", "second"))
    model, reference = editor._network.model, rows(40, 60)
    flat = reference.clone()
    flat[:, 4:] = 0  # their inputs of the first layer lie in four dimensions
    x, y = unsure(editor, 1, 61)
    spans = editor.span(flat)
    assert {name: tuple(each.shape) for name, each in spans.items()}["first"] == (6, 4)
    with torch.no_grad():
        hidden = torch.tanh(model.norm(model.first(flat))).double()
    values = torch.linalg.svdvals(hidden).square()
    wanted = int((values.cumsum(0) / values.sum() < 0.999).sum()) + 1
    assert spans["second"].shape == (12, wanted)
    exact = editor.span(flat, energy=1 - 1e-9)
    plain, kept = (editor.propose(x, y, protect) for protect in (None, exact))
    for name, inputs in (("first", flat.double()), ("second", hidden)):
        moved = [float((each.factors[name].delta() @ inputs.T).norm()) for each in (plain, kept)]
        assert moved[1] < 1e-3 * moved[0], name
    assert float(kept.factors["first"].delta().norm()) > 0.01 * float(plain.factors["first"].delta().norm())
    result = editor.edit(x, y, scale="unit", guard=None, protect=exact)
    torch.testing.assert_close(editor.log[-1].factors["first"].delta(), kept.factors["first"].delta(), rtol=0, atol=0)
    assert result.status == "applied"


# ---- what is taken back, kept and shown


def test_edits_are_taken_back_in_any_order_and_held_ones_are_counted() -> None:
    editor = make()
    start = bits(editor)
    x, y = rows(4, 40), second_best(editor, rows(4, 40))
    results = [editor.edit(x[i : i + 1], y[i : i + 1], scale="unit", guard=None) for i in range(4)]
    assert [result.id for result in results] == [0, 1, 2, 3]
    assert results[0].retention is None
    held = answers(editor, x).argmax(1) == y
    assert results[3].retention == pytest.approx(float(held[:3].double().mean()))
    others = make()
    for i in (0, 2, 3):
        others.edit_log.append(others._network.weights(), editor.log[i].factors, editor.log[i].scale, x=x, y=y)
    editor.revert(1)
    assert same(bits(editor), bits(others))
    editor.revert(3, 0)
    editor.revert_all()
    assert same(bits(editor), start)
    assert editor.log == []
    with pytest.raises(ArgumentError, match="there is no edit 1 in the log"):
        editor.revert(1)


def test_replayed_edits_are_made_anew() -> None:
    editor = make()
    x = rows(2, 41)
    y = second_best(editor, x)
    for i in range(2):
        editor.edit(x[i : i + 1], y[i : i + 1], scale="unit", guard=None)
    editor.revert(0)
    kept = bits(editor)
    (result,) = editor.replay([1])
    assert result.id == 2
    assert not same(bits(editor), kept)  # the first edit is no more there
    fresh = make()
    fresh.edit(x[1:], y[1:], scale="unit", guard=None)
    assert same(bits(editor), bits(fresh))


def test_a_replay_that_fails_leaves_the_log_and_the_weights() -> None:
    """The answer of the second edit is sure by itself, so that the scale that it was made with leaves float16."""
    editor = make("second", dtype=torch.float16, alpha=0.5)
    x = rows(1, 41)
    y = second_best(editor, x)
    editor.edit(x, y, scale=8.0, guard=None)
    proposal = editor.propose(x, y)
    largest = float(proposal.factors["second"].delta().abs().max())
    editor.apply(proposal, 100 / largest)
    editor.revert(0)
    before, known = bits(editor), editor.log
    with pytest.raises(BatchError, match=r"would leave what torch\.float16 holds"):
        editor.replay([1])
    assert same(bits(editor), before)
    assert editor.log == known
    editor.revert(1)
    assert same(bits(editor), bits(make("second", dtype=torch.float16, alpha=0.5)))


def test_an_editor_beside_another_network_says_so_once_and_its_own_edits_are_none() -> None:
    editor = make()
    x = rows(4, 43)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not the one that the editor was made for")
        for i in range(3):
            editor.edit(x[i : i + 1], second_best(editor, x[i : i + 1]), scale="unit", guard=None)
    state = editor.state_dict()
    torch.manual_seed(5)
    other = GradientEditor(Net().eval(), ("first", "second"), example=torch.zeros(2, 6), norm_scope="none")
    other.load_state_dict({**state, "log": other.state_dict()["log"]})
    with pytest.warns(UserWarning, match="weight of 'first' is not the one that the editor was made for") as told:
        made = [other.edit(x[i : i + 1], second_best(other, x[i : i + 1]), guard=None) for i in range(2)]
    assert len(made) == 2
    assert len([each for each in told if "made for" in str(each.message)]) == 1


def test_blocks_show_proposals_and_numbers() -> None:
    editor = make()
    start = bits(editor)
    x = rows(3, 42)
    y = second_best(editor, x)
    proposals = [editor.propose(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    editor.apply(proposals[0])
    editor.apply(proposals[1])
    applied = bits(editor)
    with editor.edited([]):
        assert same(bits(editor), start)
        with editor.edited(proposals[1]):
            alone = bits(editor)
    with editor.edited(1):
        assert same(bits(editor), alone)
    with pytest.raises(ZeroDivisionError), editor.edited([proposals[2]]):
        raise ZeroDivisionError
    assert same(bits(editor), applied)
    with pytest.raises(ArgumentError, match="not both; nest two blocks"), editor.edited([1, proposals[0]]):
        pass


def test_what_training_changed_is_a_conflict_until_it_is_taken_as_it_is() -> None:
    editor = make()
    x = rows(1, 43)
    result = editor.edit(x, second_best(editor, x), guard=None)
    model = editor._network.model
    with torch.no_grad():
        model.first.weight.mul_(1.01)
    before = bits(editor)
    for act in (editor.check, editor.revert_all, lambda: editor.edit(x, torch.tensor([0]), guard=None)):
        with pytest.raises(EditConflictError, match="the weight of 'first'"):
            act()
    assert same(bits(editor), before)
    delta = editor.log[0].scale * editor.log[0].factors["first"].delta()
    with pytest.warns(UserWarning, match="not to the bit"):
        editor.revert(result.id, inexact=True)
    wanted = before["first.weight"].double() - delta
    torch.testing.assert_close(bits(editor)["first.weight"].double(), wanted, rtol=0, atol=1e-6)


def test_saved_between_edits_all_is_taken_back(tmp_path: Any) -> None:
    editor = make()
    start, x = bits(editor), rows(2, 44)
    y = second_best(editor, x)
    editor.edit(x[:1], y[:1], guard=None)
    torch.save([editor.state_dict(), editor._network.model.state_dict()], tmp_path / "edits.pt")
    state, weights = torch.load(tmp_path / "edits.pt", weights_only=True)
    fresh = make()
    fresh.load_state_dict(state)
    with pytest.raises(EditConflictError):
        fresh.check()  # the network itself is not there yet
    fresh._network.model.load_state_dict(weights)
    fresh.check()
    for each in (editor, fresh):
        each.edit(x[1:], y[1:], guard=None)
    assert same(bits(fresh), bits(editor))
    fresh.revert_all()
    assert same(bits(fresh), start)


def test_exported_weights_give_the_edited_logits_in_plain_timm() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32, patch_size=16)
    x = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    editor = GradientEditor(torch.compile(model, backend="eager"), example=x)
    editor.fit_statistics([(x, torch.arange(9) % 4)])
    result = editor.edit(x[:1], model.eval()(x[:1]).argmin(1), scale="unit", guard=None)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=4, depth=2, img_size=32, patch_size=16).eval()
    exported = editor.export_state_dict()
    assert exported.keys() == plain.state_dict().keys()
    plain.load_state_dict(exported)
    assert torch.equal(plain(x), model(x))
    editor.revert(result.id)
    assert not torch.equal(plain(x), model(x))


# ---- networks of other kinds


def test_weights_of_half_precision_say_how_much_of_an_edit_is_there() -> None:
    editor = make(dtype=torch.bfloat16)
    x, before = rows(1, 45), None
    y = second_best(editor, x)
    before = {name: value.double() for name, value in bits(editor).items()}
    result = editor.edit(x, y, scale="unit", guard=None)
    wanted = moved = 0.0
    for name, factors in editor.log[-1].factors.items():
        delta = result.scale * factors.delta()
        wanted += float(delta.square().sum())
        moved += float(((bits(editor)[f"{name}.weight"].double() - before[f"{name}.weight"]) * delta).sum())
    assert result.realised == pytest.approx(moved / wanted, rel=1e-9)
    assert result.realised == pytest.approx(1.0, abs=0.05)
    editor.revert_all()
    with pytest.warns(UserWarning, match="weights of torch.bfloat16 are too coarse for edit 1"):
        tiny = editor.edit(x, y, scale=1e-3, guard=None)
    assert tiny.realised is not None
    assert tiny.realised < 0.9
    editor.revert_all()
    assert same({n: v.double() for n, v in bits(editor).items()}, before)


def test_answers_that_are_too_certain_are_refused_by_name() -> None:
    editor = make()
    with torch.no_grad():
        editor._network.model.fc.weight.zero_()
    x, before = rows(1), bits(editor)
    y = (answers(editor, x).argmax(1) + 1) % 5
    result = editor.edit(x, y, guard=None)
    assert (result.status, result.id) == ("refused", None)
    assert "no gradient reaches the edited layers" in result.reason
    with pytest.raises(BatchError, match="no gradient reaches the edited layers"):
        editor.propose(x, y)
    assert same(bits(editor), before)


def test_the_head_alone_and_a_network_in_training_mode() -> None:
    editor = make("head")
    x, y = unsure(editor, 1, 47)
    model, before = editor._network.model.train(), bits(editor)
    result = editor.edit(x, y, guard=None)
    assert result.status == "applied"
    assert all(part.training for part in model.modules())
    editor.revert_all()
    assert same(bits(editor), before)  # batch norm too


def test_edits_of_a_certain_rank_are_applied_as_they_are_stored() -> None:
    editor = make(store_rank=1)
    before = bits(editor)
    x = rows(4, 48)
    editor.edit(x, second_best(editor, x), scale="unit", guard=None)
    for name in editor.layers:
        moved = bits(editor)[f"{name}.weight"].double() - before[f"{name}.weight"].double()
        values = torch.linalg.svdvals(moved)
        assert float(values[1] / values[0]) < 1e-5


def test_inference_mode_and_listeners_do_not_disturb_an_edit() -> None:
    editor, other = make(), make()
    x, y = unsure(editor, 1, 49)
    plain = other.edit(x, y, guard=None)
    with torch.inference_mode():
        result = editor.edit(x.clone(), y.clone(), guard=None)
    assert result.scale == plain.scale
    assert same(bits(editor), bits(other))
    editor.revert(0)
    loss = editor._network.model(x).sum()
    loss.backward()  # weights are still those that can be trained
    assert copy.deepcopy(editor._network.model.first.weight.grad) is not None
