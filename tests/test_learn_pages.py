"""The pages on adding a class and on many machines: their commands run, and print what stands below them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from string import Template
from typing import Any

import pytest
import torch
from small_runs import quiet_trainer
from test_docs import FENCE, ROOT, read_blocks

from clkit import load_head, merge_checkpoints
from clkit.callbacks import LDA, NMC
from clkit.cli.main import main
from clkit.data import ClassIncremental, StreamDataModule
from clkit.errors import ArgumentError
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


def fence(name: str) -> str:
    """The first block of the page on many machines with such a heading."""
    text = (PAGES / "many_machines.md").read_text(encoding="utf-8")
    return next(match["body"] for match in FENCE.finditer(text) if match["info"].split() == name.split())


@pytest.mark.slow
def test_jobs_of_an_array_are_killed_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script as bash runs it in each job, without SLURM."""
    monkeypatch.chdir(tmp_path)
    exec(read_blocks((PAGES / "add_a_class.md").read_text(encoding="utf-8"))[0].code, {})
    Path("job.sh").write_text(fence("bash"), encoding="utf-8")
    given = {
        "BACKBONE": "test_resnet",
        "WEIGHTS": "weights.pth",
        "IMAGES": "./new/train",
        "SLURM_ARRAY_TASK_COUNT": "3",
    }
    paths = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def job(index: int) -> subprocess.Popen[bytes]:
        task = {"SLURM_ARRAY_TASK_ID": str(index), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            ["bash", "job.sh"], env={**os.environ, **given, **paths, **task}, start_new_session=True
        )

    for done in map(job, (0, 2)):
        assert done.wait(300) == 0
    killed = job(1)
    time.sleep(2)  # it loads torch and the network
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(60) != 0
    with pytest.raises(ArgumentError, match=r"shard 1/3 of 'folder:.*' is missing"):
        merge_checkpoints(sorted(Path("parts").glob("*.ckpt")), "birds.ckpt")
    assert job(1).wait(300) == 0
    merge_checkpoints(sorted(Path("parts").glob("*.ckpt")), "birds.ckpt")
    images = len(list(Path("new/train").rglob("*.png")))
    assert int(load_head("birds.ckpt", "lda").counts.sum()) == images


DIES = """
import os
from pathlib import Path
from lightning.pytorch import Callback

class Dies(Callback):  # the second node, in the middle of the third experience, once
    def on_train_batch_start(self, trainer, module, batch, index):
        mark = Path(sys.argv[1], "died")
        if trainer.current_epoch == 2 and index == 1 and trainer.node_rank == 1 and not mark.exists():
            mark.touch()
            os._exit(1)
"""


@pytest.mark.slow
def test_two_nodes_of_which_one_dies_learn_what_one_process_learns(tmp_path: Path) -> None:
    script = fence("python no-run").replace('accelerator="auto"', 'accelerator="cpu"')
    script = script.replace("import sys\n", f"import sys\n{DIES}\n", 1).replace("callbacks=[", "callbacks=[Dies(), ")
    (tmp_path / "learn.py").write_text(script, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-id", "birds", "--rdzv-endpoint", endpoint),
        *("--local-addr", "127.0.0.1", str(tmp_path / "learn.py"), str(tmp_path)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    logs = [tmp_path / f"{node}.log" for node in range(2)]
    nodes = []
    for log in logs:
        with log.open("w") as output:
            options: Any = {"stdout": output, "stderr": output, "start_new_session": True}
            nodes.append(subprocess.Popen(command, env=environment, **options))
    try:
        codes = [node.wait(600) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:  # with the process that it started
                os.killpg(node.pid, signal.SIGKILL)
    assert codes == [0, 0], [log.read_text()[-2000:] for log in logs]
    assert (tmp_path / "died").exists()
    callbacks = [LDA(), NMC()]
    trainer = quiet_trainer(tmp_path, strategy="gradient_free", callbacks=callbacks)
    stream = StreamDataModule("digits:flat", ClassIncremental(experiences=5))
    trainer.fit(TimmClassifier("identity"), datamodule=stream)
    for callback in callbacks:
        head = load_head(tmp_path / "learned.ckpt", callback.name)
        assert torch.equal(head.counts, callback.head.counts)
        assert torch.allclose(head.statistics.means, callback.head.statistics.means, rtol=1e-12, atol=1e-12)
