"""What an editor meets seldom: other precisions and layouts, two heads, edits that are committed, another device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from test_mend_edits import answers, bits, make, rows, same, second_best, unsure
from torch import Tensor, nn
from torch.nn import functional as F

import clkit
from clkit.errors import ArgumentError, BatchError
from clkit.methods import EditReference, GradientEditor, Guard

pytestmark = pytest.mark.filterwarnings("ignore:the editor is not trained", "ignore:the guard has no reference")
# the row beside it runs everywhere, on the CPU; this one is that of a network on another device than its reference
ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def images(n: int, seed: int = 0, size: int = 32) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", ["smallest", "unit"])
def test_of_a_network_in_double_precision_all_of_an_edit_is_there(scale: Any) -> None:
    editor = make(dtype=torch.float64)
    before = bits(editor)
    x, y = unsure(editor, 1, 60)
    result = editor.edit(x, y, scale=scale, guard=None)
    for name in editor.layers:
        moved = bits(editor)[f"{name}.weight"] - before[f"{name}.weight"]
        assert result.sizes[name] == pytest.approx(float(moved.norm() / before[f"{name}.weight"].norm()), rel=1e-9)
    assert result.realised == pytest.approx(1.0, abs=1e-9)


def test_gradients_below_half_precision_are_refused_by_name() -> None:
    """Each layer behind the edited one makes a gradient smaller, until float16 has 0 for it."""
    editor = make("first", dtype=torch.float16, alpha=0.1)
    model = editor._network.model
    with torch.no_grad():
        model.fc.weight.mul_(1e-3)
        model.second.weight.mul_(1e-6)
    x, before = rows(1), bits(editor)
    with torch.no_grad():
        logits = model(x.half())
    wide = [each.detach().float() for each in (logits[0], model.fc.weight, model.second.weight)]
    gradient = (wide[0].softmax(0) - F.one_hot(torch.tensor(1), 5)) @ wide[1] @ wide[2]
    assert 0 < float(gradient.abs().max()) < 2**-25  # half of the smallest number of float16, so it is 0 there
    result = editor.edit(x, torch.tensor([1]), guard=None)
    assert result.status == "refused"
    assert "no gradient reaches the edited layers" in result.reason
    assert same(bits(editor), before)


def test_a_network_in_channels_last_is_edited_as_any_and_stays_so() -> None:
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=5, zero_init_last=False).eval().double()
        model.to(memory_format=layout)
        editor = GradientEditor(model, example=images(2))
        editor.fit_statistics([(images(20, 1), torch.arange(20) % 5)])
        x = images(1, 2).double().to(memory_format=layout)
        result = editor.edit(x, model(x).topk(2).indices[0, 1:], guard=None)
        assert result.status == "applied"
        convolutions = [model.get_submodule(name).weight for name in editor.layers]
        assert all(weight.is_contiguous(memory_format=layout) for weight in convolutions)
        found.append(editor.export_state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-9)


def test_two_heads_are_edited_by_the_loss_of_what_the_network_returns() -> None:
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 24, "num_heads": 2}
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, **size).eval().double()
    editor = GradientEditor(model, "head", example=images(2), norm_scope="none", alpha=0.5)
    assert editor.layers == ["head", "head_dist"]
    x, y = images(1, 3), torch.tensor([2])
    proposal = editor.propose(x, y)
    weights = [model.get_parameter(f"{name}.weight") for name in editor.layers]
    exact = torch.autograd.grad(F.cross_entropy(model(x.double()), y), weights)
    for name, gradient in zip(editor.layers, exact, strict=True):
        torch.testing.assert_close(proposal.factors[name].delta(), -0.5 * gradient, rtol=1e-9, atol=1e-12)


def test_committed_edits_are_part_of_the_weights(tmp_path: Any) -> None:
    editor, start = make(), bits(make())
    x, y = rows(3, 61), second_best(editor, rows(3, 61))
    for i in range(3):
        editor.edit(x[i : i + 1], y[i : i + 1], scale="unit", guard=None)
    edited, records = bits(editor), editor.log
    kept = make()  # what the network is with the second and third alone
    for i in (1, 2):
        kept.edit_log.append(kept._network.weights(), records[i].factors, 1.0, x=x[i : i + 1], y=y[i : i + 1])
    editor.commit([1])
    assert same(bits(editor), edited)
    with pytest.raises(ArgumentError, match="edit 1 was committed"):
        editor.revert(1)
    assert editor.retention == pytest.approx(float((answers(editor, x).argmax(1) == y).double().mean()))
    editor.revert(0)
    assert same(bits(editor), bits(kept))
    torch.save([editor.state_dict(), editor.model.state_dict()], tmp_path / "edits.pt")
    state, weights = torch.load(tmp_path / "edits.pt", weights_only=True)
    fresh = make()
    fresh.model.load_state_dict(weights)
    fresh.load_state_dict(state)
    for each in (editor, fresh):
        each.revert_all()
        assert [(record.id, record.committed) for record in each.log] == [(1, True)]
    kept.revert(1)
    assert same(bits(editor), bits(kept))
    assert same(bits(fresh), bits(kept))
    assert not same(bits(editor), start)
    editor.commit()  # of nothing
    assert same(bits(editor), bits(kept))


def test_step_sizes_move_by_their_own_rate() -> None:
    """As multiples of their start: gradients that something else clears before the step would leave them there."""
    editor = make(alpha=0.01)
    optimizer = torch.optim.Adam(editor.parameter_groups(alpha_lr=0.1))
    x = rows(8, 62)
    editor.meta_loss(x[:1], second_best(editor, x[:1]), x_loc=x[1:])["loss"].backward()
    optimizer.step()  # the first of Adam is as long as its rate
    moved = [value / 0.01 - 1 for value in editor.alpha.values()]
    assert [abs(each) for each in moved] == pytest.approx([0.1, 0.1], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_between_edits_a_network_may_move_to_another_device() -> None:
    editor, start = make(), bits(make())
    x, y = rows(2, 63), second_best(editor, rows(2, 63))
    editor.edit(x[:1], y[:1], guard=None)
    editor.model.cuda()
    editor.edit(x[1:], y[1:], guard=None)
    editor.revert(0)
    editor.model.cpu()
    editor.revert_all()
    assert same(bits(editor), start)


def test_a_network_that_is_one_layer_alone_is_its_head() -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    editor = GradientEditor(net, "head", example=torch.zeros(2, 4), norm_scope="none", alpha=1.0)
    x = torch.ones(1, 4)
    result = editor.edit(x, net(x).argmin(1), guard=None)
    assert (result.status, result.reliability) == ("applied", 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
def test_a_reference_need_not_be_as_the_network_takes_it(dtype: torch.dtype, device: str) -> None:
    """As the samples of a loader are: in float32, on the CPU, and as mappings."""
    editor = make(dtype=dtype)
    editor.model.to(device)
    x, y = unsure(editor, 1, 64) if device == "cpu" else (rows(1), torch.tensor([3]))
    images_, labels = rows(40, 65), torch.arange(40) % 5
    before = bits(editor)
    result = editor.edit(x, y, scale="unit", guard=None, reference=(images_, labels))
    assert result.locality is not None
    with torch.no_grad():
        after = editor.model(images_.to(device, dtype)).argmax(1).cpu()
    assert result.locality.accuracy_after == pytest.approx(float((after == labels).double().mean()))
    editor.revert_all()
    parts = [{"image": images_[:30], "label": labels[:30]}, {"image": images_[30:], "label": labels[30:]}]
    again = editor.edit(x, y, scale="unit", guard=None, reference=parts)
    assert again.locality == result.locality
    editor.revert_all()
    assert same(bits(editor), before)


def test_a_reference_of_no_numbers_says_nothing_of_answers() -> None:
    """Each of them would keep its answer, whatever an edit does."""
    with pytest.raises(ArgumentError, match="reference has images with values that are not finite"):
        EditReference(rows(5) * float("nan"))
    with pytest.raises(ArgumentError, match=r"images of one size, got \(3, 4, 4\) and \(3, 5, 5\)"):
        EditReference([images(2, size=4), images(2, size=5)])


def test_what_the_network_cannot_run_is_refused_by_its_shape() -> None:
    editor, odd, y = make(), torch.zeros(1, 7), torch.tensor([1])
    before, x = bits(editor), rows(1)
    said = r"the network cannot run images of shape \({}, 7\) and torch.float32 \(RuntimeError: mat1"
    for call in (
        lambda: editor.edit(odd, y),
        lambda: editor.propose(odd, y),
        lambda: editor.edit(x, y, reference=torch.zeros(60, 7)),
        lambda: editor.span(torch.zeros(4, 7)),
        lambda: editor.meta_loss(odd, y, x_loc=odd),
    ):
        with pytest.raises(BatchError, match=said.format("(1|4|60)")):
            call()
    for name, batch in (("x_eq", {"x_eq": odd, "y_eq": y, "x_loc": x}), ("x_loc", {"x_loc": odd})):
        with pytest.raises(BatchError, match=rf"{name} must have images as x_e, \(6,\), got \(7,\)"):
            editor.meta_loss(x, y, **batch)
    assert same(bits(editor), before)
    assert all(parameter.requires_grad for parameter in editor.model.parameters())
    assert not editor.model.training


MASK = torch.ones(12, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scale": 0}, "scale must be 'smallest', 'unit' or a finite number above 0, got 0"),
        ({"scale": -1.0}, "scale must be 'smallest', 'unit' or a finite number above 0"),
        ({"accept": 3}, "accept must be a function, or None, got 3"),
        ({"accept": lambda: None}, "accept must return what speaks against the edit, a string, got None"),
        ({"protect": 3}, "protect must be tensors by the names of layers, got 3"),
        (
            {"protect": {"frist": MASK}},
            r"protect names 'frist', and the edited layers are \['first', 'second'\], did you",
        ),
        ({"protect": {"first": torch.eye(5)}}, r"protect\['first'\] must be columns of length 1, of shape \(6, k\)"),
        ({"protect": {"first": 2 * torch.eye(6)}}, "must be columns of length 1"),
        (
            {"within": {"first": MASK.float()}},
            r"within\['first'\] must be a bool tensor of shape \(12, 6\), got torch.fl",
        ),
        ({"within": {"first": MASK[0]}}, r"got torch.bool \(6,\)"),
    ],
)
def test_what_cannot_bound_an_edit_is_refused_by_name(options: dict[str, Any], says: str) -> None:
    editor = make()
    x, y = unsure(editor, 1, 66)
    before = bits(editor)
    with pytest.raises(ArgumentError, match=says):
        editor.edit(x, y, **{"guard": None, **options})
    assert same(bits(editor), before)
    assert editor.log == []


@pytest.mark.parametrize("scale", ["unit", "smallest", 2.0])
@pytest.mark.parametrize("kind", ["within", "protect"])
def test_an_edit_of_which_nothing_is_left_is_none(kind: str, scale: Any) -> None:
    editor = make()
    x, y = unsure(editor, 1, 67)
    before = bits(editor)
    whole = {name: torch.eye(editor.model.get_submodule(name).in_features) for name in editor.layers}  # type: ignore[arg-type]  # a Module to mypy
    none = {name: torch.zeros_like(editor.model.get_parameter(f"{name}.weight"), dtype=torch.bool) for name in whole}
    rotated = {name: torch.linalg.qr(torch.randn_like(each))[0] for name, each in whole.items()}  # rounding is left
    for given in (none,) if kind == "within" else (whole, rotated):
        result = editor.edit(x, y, scale=scale, guard=None, **{kind: given})
        assert (result.status, result.id) == ("refused", None)
        assert "nothing is left beside what shall not change" in result.reason
    assert same(bits(editor), before)


def test_numbers_of_edits_are_numbers() -> None:
    editor = make()
    x, y = unsure(editor, 1, 68)
    kept = editor.edit(x, y, guard=None).id
    for call in (
        lambda: editor.revert([kept]),  # type: ignore[arg-type]  # what is refused
        lambda: editor.commit("0"),  # type: ignore[arg-type]  # likewise
        lambda: editor.replay([None]),  # type: ignore[list-item]  # that of a refused edit
        lambda: editor.edited("0").__enter__(),  # type: ignore[arg-type]  # likewise
    ):
        with pytest.raises(ArgumentError, match="edits are named by their numbers"):
            call()
    with pytest.raises(ArgumentError, match=r"apply\(\) takes what propose\(\) gave, got 3"):
        editor.apply(3)  # type: ignore[arg-type]  # likewise
    assert repr(editor) == "GradientEditor(Net, ['first', 'second'], not trained, 1 edits)"
    assert repr(editor.log) == f"[EditRecord(id=0, y=tensor([{int(y)}]), scale={editor.log[0].scale}, committed=False)]"
    assert kept is not None
    editor.commit(kept)
    assert editor.log[0].committed


def test_an_editor_of_another_precision_is_taken_up() -> None:
    single, double = make(), make(dtype=torch.float64)
    with torch.no_grad():
        for parameter in single.networks.networks.parameters():
            parameter.add_(0.01)
    double.load_state_dict(single.state_dict())
    for name, value in double.networks.state_dict().items():
        assert torch.equal(value, single.networks.state_dict()[name].double()), name
    x, y = unsure(single, 1, 69)
    factors = [each.propose(x, y).factors["first"].delta() for each in (single, double)]
    torch.testing.assert_close(*factors, rtol=1e-4, atol=1e-6)
    assert GradientEditor.from_saved(single.model, double.state_dict(), example=x).alpha == single.alpha


def test_an_edit_that_is_none_leaves_no_trace() -> None:
    """Refused by a bound, by numbers that overflow, or satisfied: no bit of anything, and no draw."""
    editor = make()
    x = rows(1, 70)
    y, reference = second_best(editor, x), rows(100, 71)
    editor.edit(*unsure(editor, 1, 72), guard=None)
    before, state, random = bits(editor), editor.state_dict(), torch.get_rng_state()
    done = answers(editor, x).argmax(1)
    nothing = Guard(max_drop=0.0, max_total_drop=0.0)
    for label, options, wanted in (
        (y, {"scale": 3.0, "guard": nothing, "reference": reference}, ("refused", "drops by")),
        (y, {"scale": 1e45, "guard": None}, ("refused", "gives answers that are not finite")),
        (y, {"accept": lambda: "not today", "guard": None, "scale": "unit"}, ("refused", "not today")),
        (done, {"guard": nothing, "reference": reference}, ("satisfied", "these answers already")),
    ):
        result = editor.edit(x, label, **options)  # type: ignore[arg-type]  # of several types
        assert (result.status, result.id, result.scale) == (wanted[0], None, 0.0)
        assert wanted[1] in result.reason
        assert same(bits(editor), before)
        assert torch.equal(torch.get_rng_state(), random)
        assert str(editor.state_dict()) == str(state)
    with pytest.raises(BatchError, match=r"the weight of 'first' would leave what torch\.float32 holds"):
        editor.apply(editor.propose(x, y), 1e45)
    linear = GradientEditor(
        nn.Sequential(nn.Linear(4, 3)), "head", example=rows(2)[:, :4], norm_scope="none", alpha=1.0
    )
    bright = 1e20 * torch.ones(1, 4)
    result = linear.edit(bright, (answers(linear, bright).argmax(1) + 1) % 3, scale=1e10, guard=None)
    assert (result.status, linear.log) == ("refused", [])
    assert "not finite" in result.reason
    assert same(bits(editor), before)
    assert [record.id for record in editor.log] == [0]


CHILD = """
import sys, torch
from test_mend_edits import bits, make
state, weights = torch.load(sys.argv[1], weights_only=True)
editor = make()
editor.model.load_state_dict(weights)
editor.load_state_dict(state)
editor.revert(2)
torch.save(bits(editor), sys.argv[2])
"""


@pytest.mark.slow
def test_saved_after_seven_edits_another_process_takes_the_third_back(tmp_path: Path) -> None:
    editor, kept = make(), make()
    x, y = rows(7, 73), second_best(editor, rows(7, 73))
    for i in range(7):
        editor.edit(x[i : i + 1], y[i : i + 1], scale="unit", guard=None)
    torch.save([editor.state_dict(), editor.model.state_dict()], tmp_path / "edits.pt")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "edits.pt"), str(tmp_path / "left.pt")]
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(clkit.__file__).parents[1])])
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path}, timeout=300)
    for record in editor.log:
        if record.id != 2:
            kept.edit_log.append(kept._network.weights(), record.factors, record.scale, x=record.x, y=record.y)
    assert same(torch.load(tmp_path / "left.pt", weights_only=True), bits(kept))
