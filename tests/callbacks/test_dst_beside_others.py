"""DST beside heads, evaluations and other processes; side state that is frozen; what a person sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from small_runs import quiet_trainer
from sparse_runs import DIGITS, OFTEN, Net, outputs, quick, run, stream
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import AEFOCL, DST, NMC, StreamEvaluation


def test_heads_and_the_module_are_evaluated_under_the_network_of_each_task(tmp_path: Path) -> None:
    """In any order of the list, with and without kept features, the same results; those of the module stay.

    No head says that what it learned of an earlier task no longer fits: its network is kept, and shown.
    """
    found = []
    for number, order in enumerate(([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2])):
        dst, nmc, ridge = quick(), NMC(), AEFOCL()
        evaluation = StreamEvaluation(table=False, files=False, figures=False, keep_features=1024 if number else 0)
        parts = [dst, nmc, ridge, evaluation]
        trainer = quiet_trainer(tmp_path, callbacks=[parts[place] for place in order])
        torch.manual_seed(1)
        trainer.fit(Net(), datamodule=stream(epochs_per_experience=1))
        found.append({name: each["accuracy_matrix"] for name, each in evaluation.results.items()})
    assert found[0] == found[1] == found[2]
    assert found[0].keys() == {"module", "nmc", "aef_ocl"}
    for row in range(5):
        assert found[0]["module"][row][: row + 1] == [found[0]["module"][j][j] for j in range(row + 1)]


def test_future_tasks_are_evaluated_with_the_network_of_the_present(tmp_path: Path) -> None:
    dst, evaluation = quick(), StreamEvaluation(table=False, files=False, figures=False)
    run(tmp_path, dst, evaluation, data=stream(evaluate="all", epochs_per_experience=2))
    results = evaluation.results["module"]
    assert results["forward_transfer"] is not None
    assert results["forgetting"] == 0


def test_batches_of_a_stream_have_their_own_network_without_an_evaluation_too(tmp_path: Path) -> None:
    """What the user's own steps see, in validation, test and prediction; the task that a block names comes first."""

    class Watching(Net):
        seen: list[Any]

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.seen.append((int(batch[1][0]) // 2, self(batch[0])))

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            self.validation_step(batch, batch_idx)
            return self.seen[-1][1]

    dst, module = quick(), Watching()
    module.seen = []
    _, _, trainer = run(tmp_path, dst, module=module, data=stream(stop_after=3, epochs_per_experience=2))
    live = {name: value.clone() for name, value in module.state_dict().items()}
    data = stream(stop_after=3)
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        module.seen = []
        evaluate(module, datamodule=data)
        assert {task for task, _ in module.seen} == {0, 1, 2}
        with torch.inference_mode():
            for task, logits in module.seen:
                rows = [batch[0] for batch in data.val_dataloader() if int(batch[1][0]) // 2 == task]
                with dst.activate(task):
                    assert torch.equal(module.eval()(rows[0]), logits)
    module.seen = []
    with dst.activate(0):
        trainer.validate(module, DataLoader(TensorDataset(DIGITS[:64], torch.zeros(64).long()), 64), verbose=False)
    assert torch.equal(module.seen[0][1], outputs(dst, module, 0)[:64])
    assert all(torch.equal(value, live[name]) for name, value in module.state_dict().items())


def test_a_checkpoint_is_enough_to_evaluate_all_tasks(tmp_path: Path) -> None:
    dst, evaluation = quick(), StreamEvaluation(table=False, files=False, figures=False)
    module, _, trainer = run(tmp_path, dst, evaluation, data=stream(stop_after=3, epochs_per_experience=2))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    again, fresh = StreamEvaluation(table=False, files=False, figures=False), quick()
    other = Net()
    quiet_trainer(tmp_path, callbacks=[again, fresh]).validate(
        other, datamodule=stream(stop_after=3), ckpt_path=str(tmp_path / "end.ckpt"), weights_only=True, verbose=False
    )
    for task in range(3):
        assert torch.equal(outputs(fresh, other, task), outputs(dst, module, task))


def test_side_state_that_is_frozen_after_the_first_task_stays(tmp_path: Path) -> None:
    """Norms, their statistics and biases; heads and connections go on, and modes are given back."""
    dst, module = quick(side_state="freeze_after_first"), Net()
    run(tmp_path, dst, module=module, data=stream(epochs_per_experience=2))
    tasks = dst.stream_state()["side"]["tasks"]
    for task in range(1, 5):
        for name, value in tasks[0].items():
            assert torch.equal(value, tasks[task][name]) != name.startswith("head.")
    assert not torch.equal(dst.topology.export(0)["body.0.weight"], dst.topology.export(4)["body.0.weight"])
    assert all(part.training for part in module.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_plain_rigl_of_one_task_is_an_ordinary_fit(tmp_path: Path) -> None:
    loader = DataLoader(TensorDataset(DIGITS[:256], torch.arange(256) % 10), batch_size=32)
    dst, module = quick(schedule="rigl", initial="erk", head=[], exclude=["head"], steps_per_task=500), Net()
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[dst]).fit(module, loader)
    assert dst.tasks == 1
    report = dst.reports[0]
    assert report.reused == 0
    assert report.active == sum(int(p.count_nonzero()) for n, p in module.named_parameters() if n in dst.topology.names)


def test_a_person_sees_a_line_and_a_figure_of_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst, evaluation = quick(table=True), StreamEvaluation(table=False)
    logger = CSVLogger(tmp_path)
    run(tmp_path, dst, evaluation, data=stream(stop_after=2, epochs_per_experience=2), logger=logger)
    shown = capsys.readouterr().out
    report = dst.reports[1]
    assert shown.count("sparse sub-networks (% of 6,984 connections)") == 2
    (line,) = [line for line in shown.splitlines() if "exp 2" in line]
    shares = [report.density, *(each / report.total for each in (report.active, report.nonzero, report.reused))]
    expected = [*shares, report.free / report.total, report.explored]
    assert [float(cell) for cell in line.split("│")[2:-1]] == pytest.approx([100 * each for each in expected], abs=0.05)
    heads = next(line for line in shown.splitlines() if "asked" in line).split("┃")[1:-1]
    assert len(set(heads)) == len(heads) == len(line.split("│")[1:-1])
    assert (Path(logger.log_dir) / "layer_use.png").stat().st_size > 5000
    logger.finalize("success")
    logged = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "dst/free" in logged
    assert str(report.free / report.total) in logged
    assert json.loads((Path(logger.log_dir) / "results.json").read_text())


def test_a_learned_stream_goes_on_with_its_checkpoint(tmp_path: Path) -> None:
    """Three tasks, then two more in another trainer, equal five in one."""
    whole, module = quick(), Net()
    run(tmp_path, whole, module=module, data=stream(epochs_per_experience=2))
    first, early = quick(), Net()
    _, _, trainer = run(tmp_path, first, module=early, data=stream(stop_after=3, epochs_per_experience=2))
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    last, late = quick(), Net()
    data = stream(epochs_per_experience=2)
    run(tmp_path, last, module=late, data=data, ckpt_path=str(tmp_path / "three.ckpt"))
    assert last.tasks == 5
    for task in range(5):
        assert torch.equal(outputs(last, late, task), outputs(whole, module, task))


def test_every_component_may_be_a_function_of_the_task(tmp_path: Path) -> None:
    dst = DST(
        lambda task: 0.3 - 0.05 * task,
        initial=lambda task: ("erk", "uniform")[task % 2],
        growth=lambda task: ("gradient", "random", "momentum", "unfired")[task % 4],
        prune=lambda task: ("magnitude", "set", "taylor", "mest")[task % 4],
        schedule=lambda task: OFTEN,
        reuse=lambda task: ("random", "prefer_free")[task % 2],
        grow_from=lambda task: ("free", "any")[task % 2],
        table=False,
    )
    run(tmp_path, dst, data=stream(stop_after=4, epochs_per_experience=2))
    assert [round(report.active / report.total, 3) for report in dst.reports] == [0.3, 0.25, 0.2, 0.15]
    assert list(dst.topology.densities(1).values()) == [pytest.approx(0.25, abs=0.01)] * 2
