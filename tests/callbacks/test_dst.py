"""DST in real runs: every earlier task gives the same bits, whatever comes after, however the run is cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_runs import hooks_of, quiet_trainer
from sparse_runs import DIGITS, Net, outputs, quick, run, stream
from torch import Tensor, nn

from clkit.callbacks import DST, StreamEvaluation
from clkit.callbacks._sparse_tasks import about_task
from clkit.cli.main import main
from clkit.data import Preprocessing, StreamDataModule, TaskIncremental
from clkit.errors import BatchError, ConfigurationError
from clkit.methods import Growth, PruneSchedule
from clkit.models import TimmClassifier
from clkit.stream.experience import Experience
from clkit.surgery.change import changes_of
from clkit.surgery.mask_forms import in_form


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3},
        {"num_sanity_val_steps": -1, "val_check_interval": 0.5},
    ],
    ids=["plain", "clipped, 3 batches a step with a remainder", "validated on the way"],
)
def test_no_output_of_an_earlier_task_changes(tmp_path: Path, options: dict[str, Any]) -> None:
    dst, evaluation = quick(), StreamEvaluation(table=False, files=False, figures=False)
    module, seen, _ = run(tmp_path, dst, evaluation, **options)
    assert dst.tasks == 5
    for later in range(5):
        for task in range(later + 1):
            assert torch.equal(seen.rows[later][task], seen.rows[task][task])
    # they are five networks, and each has learned its task
    assert not any(torch.equal(seen.rows[4][task], seen.rows[4][task + 1]) for task in range(4))
    results = evaluation.results["module"]
    assert results["forgetting"] == 0
    assert min(results["accuracy_matrix"][-1]) > 0.9
    assert changes_of(module) == []
    assert hooks_of(module) == 0


# ---- heads

SMALL = {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16], "in_chans": 1, "zero_init_last": False}


def timm_run(folder: Path, **model: Any) -> tuple[DST, TimmClassifier, StreamEvaluation]:
    dst, evaluation = quick(reuse="prefer_free"), StreamEvaluation(table=False, files=False, figures=False)
    torch.manual_seed(0)
    adam = partial(torch.optim.Adam, lr=3e-3)
    module = TimmClassifier("resnet18", model_kwargs=SMALL, task_heads=True, optimizer=adam, **model)
    trainer = quiet_trainer(folder, callbacks=[evaluation, dst, ModelCheckpoint(str(folder), save_last=True)])
    scenario = TaskIncremental(experiences=5, class_order=[4, 9, 2, 7, 0, 5, 1, 3, 8, 6])
    options = {"batch_size": 20, "epochs_per_experience": 3, "relabel": True, "train_transform": flipped_or_not}
    data = StreamDataModule("digits", scenario, preprocessing=Preprocessing(size=16), **options)
    trainer.fit(module, datamodule=data)
    return dst, module, evaluation


def flipped_or_not(image: Tensor) -> Tensor:
    """Half of the images of training are upside down, none of those that are scored."""
    return image.flip(-2) if torch.rand(()) < 0.5 else image


@pytest.mark.parametrize("small_images", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_each_task_has_a_head_of_its_own_and_its_network_goes_into_plain_timm(
    small_images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """R of the run equals, entry by entry, what plain timm gives with the exported weights, made as the file says.

    The published code scored randomly flipped images, and by an argmax over the classes of all tasks.
    """
    dst, module, evaluation = timm_run(tmp_path, small_images=small_images)
    monkeypatch.chdir(tmp_path)
    data = module.trainer.datamodule
    matrix = evaluation.results["module"]["accuracy_matrix"]
    assert sum(matrix[-1]) > 5 * 0.7
    assert evaluation._kept.served > 0  # kept features are among what R was measured with
    correct_among_all = 0
    for task in range(5):
        assert main(["export", "last.ckpt", "--task", str(task), "-o", f"{task}.pt"]) == 0
        said = capsys.readouterr().out
        assert f"the network of task {task} (experience {task + 1}), dense, with 20.0 % of the connections" in said
        file = torch.load(f"{task}.pt", weights_only=True)
        assert all(f"  {line}\n" in said for line in file["code"])
        assert not any("clkit" in line for line in file["code"])
        made: dict[str, Any] = {}
        exec("\n".join(file["code"]), made)
        plain = made["network"]
        assert ("maxpool" in str(file["code"])) == small_images
        with dst.activate(task):
            classes = module.task_classes.nonzero().squeeze(1)
        assert classes.tolist() == file["classes"] == [2 * task, 2 * task + 1]
        assert file["class_ids"] == sorted([4, 9, 2, 7, 0, 5, 1, 3, 8, 6][2 * task : 2 * task + 2])
        assert f"the only outputs that mean anything: {file['classes']}" in said
        assert file["timm"]["model_name"] == "resnet18"
        assert file["preprocessing"]["size"] == 16
        correct = total = 0
        with torch.no_grad():
            for (experience, _), batch in zip(data.val_dataloader().batches, data.val_dataloader(), strict=True):
                if experience == task:
                    correct_among_all += int((plain(batch[0]).argmax(1) == batch[1]).sum())
                    logits = plain(batch[0])[:, classes]
                    correct += int((classes[logits.argmax(1)] == batch[1]).sum())
                    total += len(batch[1])
                    with dst.activate(task):
                        module.eval()
                        assert torch.equal(module(batch[0])[:, classes], logits)
        for row in matrix[task:]:
            assert row[task] == correct / total
    assert correct_among_all < 0.9 * sum(matrix[-1]) * total  # tasks are about equally large
    with pytest.raises(BatchError, match=r"the targets \[0, 3\] are not all of the present task, \[8, 9\]"):
        module.train()._of_task(torch.zeros(2, 1, 32, 32), torch.tensor([0, 3]))


def test_task_heads_need_somebody_who_gives_them_back(tmp_path: Path) -> None:
    module = TimmClassifier("identity", model_kwargs={"in_features": 64}, num_classes=10, task_heads=True)
    with pytest.raises(ConfigurationError, match="task_heads=True needs a callback that keeps a network for each task"):
        quiet_trainer(tmp_path).fit(module, datamodule=StreamDataModule("digits:flat"))


def test_what_is_exported_says_why_it_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst, module = quick(), Net()
    run(tmp_path, dst, ModelCheckpoint(str(tmp_path), save_last=True), module=module, data=stream(stop_after=1))
    end, out = str(tmp_path / "last.ckpt"), str(tmp_path / "task.pt")
    assert main(["export", end, "--task", "4", "-o", out]) == 2
    assert "task 4 was not trained to its end; 1 tasks were, counted from 0" in capsys.readouterr().err
    assert main(["export", end, "--task", "0", "-o", out + "2"]) == 2
    assert "must end in .pt" in capsys.readouterr().err
    assert main(["export", end, "-o", out]) == 2
    assert "is of a run with DST and has no heads, but the networks of 1 tasks; say which" in capsys.readouterr().err
    checkpoint = torch.load(end, weights_only=True)
    checkpoint["callbacks"].pop("DST")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    assert main(["export", str(tmp_path / "other.ckpt"), "--task", "0", "-o", out]) == 2
    assert "is of no run with DST" in capsys.readouterr().err
    # a module of one's own has no common part, and its own class loads the file
    assert main(["export", end, "--task", "0", "-o", out]) == 0
    again, file = Net(), torch.load(out, weights_only=True)
    again.load_state_dict(file["state_dict"])
    assert torch.equal(again.eval()(DIGITS[:64]), outputs(dst, module, 0)[:64])
    assert (file["network"], file["timm"], file["part"]) == ("sparse_runs.Net", None, "")
    assert file["code"][1] == "network = ...  # a sparse_runs.Net, made as for the run"
    assert (file["classes"], file["class_ids"]) == ([0, 1], [0, 1])


def test_what_no_file_can_hold_of_a_networks_arguments_is_named(tmp_path: Path) -> None:
    class Layer(nn.BatchNorm2d):
        """An argument that is no plain value."""

    module = TimmClassifier("resnet18", model_kwargs={**SMALL, "norm_layer": Layer}, num_classes=2)
    stream, known = StreamDataModule("digits"), {"preprocessing": None}

    class Trainer:
        datamodule = stream

    about = about_task(Trainer(), module, Experience(0, "fit 1"), [[1, 0]], known)  # type: ignore[arg-type]  # what of a trainer is looked at
    assert about["timm"]["objects"] == ["norm_layer"]
    assert about["timm"]["kwargs"] == SMALL
    assert about["classes"] == about["class_ids"] == [1, 0]


def test_the_figure_shows_what_each_task_was_the_first_to_take(tmp_path: Path) -> None:
    """Bars of all tasks stand on each other, and reach what the masks have together."""
    dst = quick(density=0.3)
    run(tmp_path, dst, data=stream(stop_after=3, epochs_per_experience=1))
    axes = dst.run_figures()["layer_use"].axes[0]
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    masks = [dst.topology.mask(task) for task in range(3)]
    for place, name in enumerate(dst.topology.names):
        union, reached = torch.zeros_like(masks[0][name]), 0.0
        for task in range(3):
            union |= masks[task][name]
            reached += heights[task][place]
            assert reached == pytest.approx(100 * float(union.double().mean()))
            bar = axes.containers[task][place]
            assert bar.get_y() + bar.get_height() == pytest.approx(reached)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "whole mask of exp 3",
        "new in exp 3",
        "new in exp 2",
        "new in exp 1",
    ]


@pytest.mark.parametrize("form", ["dense", "prune", "fake_sparsity"])
def test_a_task_takes_the_forms_that_torch_has(tmp_path: Path, form: Any) -> None:
    dst, module = quick(), Net()
    run(tmp_path, dst, module=module, data=stream(stop_after=2))
    expected, other = outputs(dst, module, 0), Net()
    assert dst.load_into(other, 0, form) == {}
    other.eval()
    assert torch.equal(torch.cat([other(part) for part in DIGITS[:256].split(64)]), expected)
    mask = dst.topology.mask(0)["body.4.weight"]
    if form == "prune":
        assert torch.equal(other.body[4].weight_mask.bool(), mask)
        torch.nn.utils.prune.remove(other.body[4], "weight")
    if form == "fake_sparsity":
        assert torch.equal(other.body[4].parametrizations.weight[0].mask, mask)
    assert not (other.body[4].weight.detach()[~mask] != 0).any()
    with pytest.raises(ConfigurationError, match=r"load_into\(\) needs another module of the same class"):
        dst.load_into(module, 0)
    smaller = Net()
    smaller.body[4], smaller.head = nn.Linear(288, 20), nn.Linear(20, 10)
    before = {name: tensor.clone() for name, tensor in smaller.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"a Net is to take.*differs in 3 tensors: 'body.4.weight': \(20, 2"):
        dst.load_into(smaller, 0, form)
    assert all(torch.equal(tensor, before[name]) for name, tensor in smaller.state_dict().items())


def test_two_of_four_is_kept_and_checked(tmp_path: Path) -> None:
    def made(**options: Any) -> tuple[dict[str, str], Tensor]:
        dst, other = quick(**options), Net()
        run(tmp_path, dst, data=stream(stop_after=2, epochs_per_experience=2))
        return dst.load_into(other, 1, "semi_structured"), other.body[4].weight.detach()

    told, weight = made(density=0.4, pattern="2:4", grow_from="any")
    assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2
    assert told["body.0"] == "it is a Conv2d, and linear layers alone can be"
    assert told["body.4"] == "its shape (24, 288) is no multiple of (32, 32)"
    layer = nn.Linear(64, 32)
    layer.weight.data[:, ::2] = 0
    assert in_form(layer, {"weight": layer.weight != 0}, "semi_structured") == {
        "": "cpu is no GPU of compute capability 8.0 or newer"
    }
    layer.weight.data[0, 0] = 1.0
    told = in_form(layer, {"weight": layer.weight != 0}, "semi_structured")
    advice = r"of torch.float32; train with pattern='2:4', and load it into module.half()"
    assert told == {"": f"1 groups of 2 neighbours have more than 1 weights {advice}"}
    half = layer.half()
    half.weight.data[:, ::4] = 1.0
    half.weight.data[:, 1::4] = 1.0
    told = in_form(half, {"weight": half.weight != 0}, "semi_structured")
    assert told[""].endswith("have more than 2 weights of torch.float16; train with pattern='2:4'")


RULES = ["momentum", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("gradient", "random", "unfired"))]


@pytest.mark.parametrize("growth", RULES)
def test_a_run_killed_in_the_middle_of_a_task_ends_with_the_same_bits(tmp_path: Path, growth: Any) -> None:
    """Gradient growth averages over two steps, and 3 batches make one, so that something is on its way at any time."""
    options: dict[str, Any] = {"data": None, "accumulate_grad_batches": 3}
    make = {"growth": Growth(growth, accumulate=2), "schedule": PruneSchedule(update_every=3), "grow_from": "any"}

    def finished(*beside: Any, **more: Any) -> tuple[Any, list[Tensor], Any]:
        dst = quick(**make)
        data = stream(stop_after=3)
        module, _, _ = run(tmp_path, dst, *beside, **{**options, "data": data}, **more)
        return dict(module.state_dict()), [outputs(dst, module, task) for task in range(3)], dst.reports

    saver = ModelCheckpoint(str(tmp_path), filename="{step}", every_n_train_steps=1, save_top_k=-1)
    weights, given, reports = finished(saver)
    steps = sorted(int(path.stem.split("=")[1]) for path in tmp_path.glob("step=*.ckpt"))
    assert len(steps) == 45
    for step in (16, 20, 22, 30):  # at an update, before one, after one, and at the last step of the task
        again, same, told = finished(ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert told == reports
        assert all(torch.equal(again[name], value) for name, value in weights.items())
        assert all(torch.equal(one, other) for one, other in zip(given, same, strict=True))
