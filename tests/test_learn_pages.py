"""The pages on adding a class and on many machines: their commands run, and print what stands below them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from string import Template

import pytest
import torch
from small_runs import quiet_trainer
from test_docs import FENCE, ROOT, read_blocks

from clkit import load_head
from clkit.callbacks import LDA, NMC
from clkit.cli.main import main
from clkit.data import ClassIncremental, StreamDataModule
from clkit.models import TimmClassifier

PAGES = ROOT / "docs" / "guide"
NUMBER = re.compile(r"-?\d+\.\d+")


def commands(text: str) -> list[tuple[list[str], list[str]]]:
    """The words of each command of a page, and the lines that stand below it."""
    found: list[tuple[list[str], list[str]]] = []
    for match in FENCE.finditer(text):
        if match["info"].strip() != "text" or not match["body"].startswith("$ clkit"):
            continue
        for line in match["body"].replace("\\\n", " ").splitlines():
            if line.startswith("$ clkit "):
                found.append((shlex.split(line.removeprefix("$ clkit ")), []))
            else:
                found[-1][1].append(line)
    return found


def assert_prints(printed: list[str], wanted: list[str]) -> None:
    """Equal but for rounding of scores and of what random weights give, and for the digits of the settings."""
    assert len(printed) == len(wanted)
    for line, other in zip(printed, wanted, strict=True):
        texts = [re.sub(r"settings \w{10}", "settings", NUMBER.sub("#", each)).split() for each in (line, other)]
        assert texts[0] == texts[1]
        for number, expected in zip(NUMBER.findall(line), NUMBER.findall(other), strict=True):
            assert float(number) == pytest.approx(float(expected), abs=2.5)


def test_the_page_on_adding_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (PAGES / "add_a_class.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    exec(read_blocks(text)[0].code, {})  # the images
    run = commands(text)
    assert len(run) >= 5
    for words, wanted in run:
        capsys.readouterr()
        status = main(words)
        printed = capsys.readouterr()
        assert_prints((printed.out if status == 0 else printed.err).splitlines(), wanted)


def test_the_array_of_jobs_makes_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script's one command, as each job of an array of two would run it, in this process."""
    text = (PAGES / "many_machines.md").read_text(encoding="utf-8")
    script = next(match["body"] for match in FENCE.finditer(text) if match["info"].strip() == "bash")
    line = next(each for each in script.replace("\\\n", " ").splitlines() if each.startswith("clkit "))
    monkeypatch.chdir(tmp_path)
    exec(read_blocks((PAGES / "add_a_class.md").read_text(encoding="utf-8"))[0].code, {})
    (tmp_path / "parts").mkdir()
    given = {
        "BACKBONE": "test_resnet",
        "WEIGHTS": "weights.pth",
        "IMAGES": "./new/train",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }
    line = line.replace("${SLURM_CPUS_PER_TASK:-1}", "1")
    for index in range(2):
        values = {**given, "SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": "2"}
        assert main([Template(word).substitute(values) for word in shlex.split(line)[1:]]) == 0
    ((merge, _),) = commands(text)
    files = sorted(str(file) for file in Path("parts").glob("*.ckpt"))
    assert main([word for each in merge for word in (files if each == "parts/*.ckpt" else [each])]) == 0
    assert int(load_head("birds.ckpt", "lda").counts.sum()) == len(list(Path("new/train").rglob("*.png")))


@pytest.mark.slow
def test_torchrun_learns_what_one_process_learns(tmp_path: Path) -> None:
    text = (PAGES / "many_machines.md").read_text(encoding="utf-8")
    script = next(match["body"] for match in FENCE.finditer(text) if match["info"].split() == ["python", "no-run"])
    (tmp_path / "learn.py").write_text(script.replace('accelerator="auto"', 'accelerator="cpu"'), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "learn.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    callbacks = [LDA(), NMC()]
    trainer = quiet_trainer(tmp_path, strategy="gradient_free", callbacks=callbacks)
    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=5))
    trainer.fit(TimmClassifier("identity"), datamodule=stream)
    for callback in callbacks:
        head = load_head(tmp_path / "learned.ckpt", callback.name)
        assert torch.equal(head.counts, callback.head.counts)
        assert torch.allclose(head.statistics.means, callback.head.statistics.means, rtol=1e-12, atol=1e-12)
