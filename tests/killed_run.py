"""A server of runs that die: imports once, then forks one process (or two ranks) for each run that is asked for.

``test_kill.py`` starts it as a program of its own and speaks to it in lines of JSON. Each run is a real process; it
dies by a real SIGKILL, at the given occurrence of a named place. Nothing here is known to clkit.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import clkit.stream.resume
from clkit.callbacks import (
    AEFOCL,
    DEUP,
    DST,
    LDA,
    MEND,
    NMC,
    DSimplex,
    Lift,
    Records,
    StreamCallback,
    StreamEvaluation,
)
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.methods import MetaExamples, OnProLosses, PruneSchedule
from clkit.strategies import (
    EditorSettings,
    EditorTrainingStrategy,
    ERStrategy,
    GradientFreeStrategy,
    LearningStrategy,
    OnProStrategy,
)
from clkit.surgery.classifier import Graft

# experiences of 25, 11 and 21 samples: 7, 3 and 6 batches of 4, the next one being once shorter and once longer
TRAINED = (13, 12, 6, 5, 11, 10)
EVALUATED = (6, 5, 4, 6, 5, 7)
FIRST_EVALUATED = 100  # ids of evaluation samples begin here
HANG_S = 90.0

CONFIGS: dict[str, dict[str, Any]] = {
    "one_epoch": {},
    "two_epochs": {"epochs": 2},
    "max_steps": {"epochs": 2, "trainer": {"max_steps": 17}},
    "half_validation": {"trainer": {"val_check_interval": 0.5}},
    "everything": {
        "epochs": 2,
        "every": 3,
        "trainer": {"val_check_interval": 0.5, "max_steps": 25},
        "heads": "other",
    },
    "limited": {"trainer": {"limit_train_batches": 4}},
    "rare_validation": {"trainer": {"check_val_every_n_epoch": 2}, "stream": {"evaluate": "all"}},
    "no_validation": {"epochs": 2, "trainer": {"limit_val_batches": 0}},
    "accumulation": {"trainer": {"accumulate_grad_batches": 3}},
    "gradient_free": {"strategy": "gradient_free"},
    "warm_up": {"strategy": "warm_up", "epochs": 2},
    "base_strategy": {"strategy": "base", "epochs": 2, "stream": {"relabel": True, "val_fraction": 0.3}},
    "workers": {"stream": {"train_transform": "noise", "num_workers": 2}},
    "transform": {"epochs": 2, "stream": {"train_transform": "noise"}},
    "graft": {"heads": "graft"},
    "graft_replaced": {"heads": "graft_replaced", "trainer": {"val_check_interval": 0.5}},
    "graft_frozen": {"heads": "graft_replaced", "strategy": "gradient_free"},
    "graft_at_end": {"heads": "graft_at_end", "epochs": 2},
    "graft_at_end_replaced": {"heads": "graft_at_end_replaced"},
    "reset": {"heads": "reset", "epochs": 2},
    "reset_without_validation": {"heads": "reset", "trainer": {"val_check_interval": 0.5}},
    "max_steps_at_end": {"epochs": 2, "trainer": {"max_steps": 20}},
    "accumulation_inside": {"trainer": {"accumulate_grad_batches": 3, "val_check_interval": 0.5}, "saves": None},
    "epoch_files_unmeasured": {
        "epochs": 2,
        "saves": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        "trainer": {"check_val_every_n_epoch": 4},
    },
    "epoch_files": {"epochs": 2, "saves": {}},
    "validation_files": {
        "saves": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
        "trainer": {"val_check_interval": 0.5},
    },
    "files_inside_validation": {"saves": None},
    "last_file": {"every": 2, "saves": {"save_last": True}, "last": True},
    "manual": {"module": "manual"},
    "onpro": {"strategy": "onpro"},
    "onpro_inside": {
        "strategy": "onpro",
        "heads": "none",
        "trainer": {"accumulate_grad_batches": 3, "val_check_interval": 0.5},
        "saves": None,
    },
    "dst": {"heads": "dst", "epochs": 2},
    "d_simplex": {"heads": "d_simplex", "epochs": 2},
    "mend": {"heads": "mend", "trainer": {"val_check_interval": 0.5}},
    "editor_training": {"strategy": "editor_training", "epochs": 2, "trainer": {"accumulate_grad_batches": 2}},
    "d_simplex_replay": {"heads": "d_simplex", "strategy": "er", "trainer": {"val_check_interval": 0.5}},
    "deup": {"heads": "deup", "strategy": "gradient_free", "trainer": {"val_check_interval": 0.5}},
    "deup_kept_out": {"heads": "deup_kept_out", "strategy": "er", "epochs": 2, "stream": {"val_fraction": 0.4}},
    "warm_up_lora": {"strategy": "lora", "epochs": 2, "trainer": {"accumulate_grad_batches": 3}},
    "warm_up_norms": {"strategy": "norms"},
    "warm_up_last_block": {"strategy": "last_block", "module": "blocks", "trainer": {"val_check_interval": 0.5}},
}


class Places:
    """Counts how often each place is passed, and dies at the chosen one."""

    def __init__(self, kill: tuple[str, int] | None) -> None:
        self.kill = kill
        self.counts: Counter[str] = Counter()

    def passed(self, *places: str) -> None:
        for place in places:
            self.counts[place] += 1
            if self.kill == (place, self.counts[place]):
                os.kill(os.getpid(), signal.SIGKILL)


def ids_of(inputs: Tensor) -> list[int]:
    """Each sample carries its number in its first pixel."""
    return [round(float(value) * 255) for value in inputs[:, 0, 0, 0]]


class Module(pl.LightningModule):
    """The user's module: batch statistics, dropout, an optimizer with moments and a schedule."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 6)
        )
        self.places = places

    def forward(self, inputs: Tensor) -> Tensor:
        if self._trainer is not None and self.trainer.state.stage == "train":
            if ids_of(inputs)[0] >= FIRST_EVALUATED:
                self.places.passed("own_evaluation")
            else:
                last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
                self.places.passed("step", *(["last_step"] if last else []))
        logits: Tensor = self.net(inputs)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # what a user draws from Python and NumPy matters as much as dropout
        weight = 1 + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002  as users write it
        return weight * nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if not self.trainer.sanity_checking:
            self.places.passed("validation")
        self(batch[0])

    def on_train_batch_end(self, *args: Any) -> None:
        last = self.trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.places.passed("after_save", *(["last_after_save"] if last else []))

    def on_validation_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.places.passed("validation_end")

    def on_train_epoch_end(self) -> None:
        self.places.passed("epoch_end")

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        by_epoch = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        schedules = [{"scheduler": by_step, "interval": "step"}, {"scheduler": by_epoch, "interval": "epoch"}]
        return [optimizer], schedules


class ManualModule(Module):
    """Optimises by hand."""

    def __init__(self, places: Places) -> None:
        super().__init__(places)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class BlockModule(Module):
    """Its network has two equal blocks."""

    def __init__(self, places: Places) -> None:
        super().__init__(places)
        blocks = [nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.ReLU()) for _ in range(2)]
        first, last = nn.Linear(16, 12), nn.Linear(12, 6)
        self.net = nn.Sequential(nn.Flatten(), first, nn.Sequential(*blocks), nn.Dropout(0.3), last)


MODULES: dict[str, type[Module]] = {"manual": ManualModule, "blocks": BlockModule}


class Diary(pl.Callback):
    """Writes down every trained batch and every boundary; after a resume only what the checkpoint knows of stays."""

    boundary_phase = 5  # before all others

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines = 0
        self.path = folder

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.path = self.folder / f"diary.{trainer.global_rank}"
        known = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        assert len(known) >= self.lines
        self.path.write_text("".join(known[: self.lines]))

    def _note(self, *what: Any) -> None:
        with self.path.open("a") as file:
            file.write(" ".join(map(str, what)) + "\n")
        self.lines += 1

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        content = zlib.crc32(batch[0].numpy().tobytes())
        self._note("batch", trainer.current_epoch, batch_idx, *ids_of(batch[0]), "content", content)

    def on_experience_start(self, trainer: pl.Trainer, module: Any, experience: Any) -> None:
        self._note("start", experience.index, experience.phase)

    def on_experience_phase(self, trainer: pl.Trainer, module: Any, experience: Any) -> None:
        self._note("phase", experience.index, experience.phase)

    def on_experience_end(self, trainer: pl.Trainer, module: Any, experience: Any) -> None:
        self._note("end", experience.index)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": self.lines}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lines = state_dict["lines"]


class AtHooks(pl.Callback):
    """Dies in hooks: behind all other callbacks, but before the one that saves."""

    boundary_phase = 45  # heads have solved and grafted, the evaluation has not heard of the end

    def __init__(self, places: Places) -> None:
        self.places = places

    def on_train_batch_start(self, *args: Any) -> None:
        self.places.passed("batch_start")

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self.places.passed("before_save", *(["last_before_save"] if last else []))

    def on_experience_start(self, *args: Any) -> None:
        self.places.passed("experience_start")

    def on_experience_end(self, *args: Any) -> None:
        self.places.passed("experience_end")

    def on_train_epoch_end(self, *args: Any) -> None:
        self.places.passed("epoch_end_before_save")

    def on_save_checkpoint(self, *args: Any) -> None:
        self.places.passed("save_collects")
        self.places.counts["save_writes"] += 1
        if self.places.kill == ("save_writes", self.places.counts["save_writes"]):
            die_half_written()

    def on_train_end(self, *args: Any) -> None:
        self.places.passed("train_end")


class AfterBoundary(pl.Callback):
    """Dies where all parts have heard of an experience's end and the row is pending."""

    boundary_phase = 60

    def __init__(self, places: Places) -> None:
        self.places = places

    def on_experience_end(self, *args: Any) -> None:
        self.places.passed("row_pending")


class SavesInsideValidation(pl.Callback):
    """A user's callback that saves after every validation batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self.count += 1
            trainer.save_checkpoint(self.folder / f"{time.time_ns()}.ckpt")


def watch_files(places: Places) -> None:
    """Dies as files are moved into place or removed, whoever does it; notices a checkpoint written in its own place."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":
            target = str(arguments[1])
            if target.endswith(".ckpt"):
                places.passed("save_moves")
            elif target.endswith((".json", ".csv")):
                places.passed("results_move")
        elif event == "os.remove" and str(arguments[0]).endswith(".ckpt"):
            places.passed("save_removes_old")
        elif event == "open" and str(arguments[0]).endswith(".ckpt") and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            places.passed("save_in_place")

    sys.addaudithook(hear)


def die_half_written() -> None:
    """From now on the kernel ends this process in the middle of any file of more than a few kilobytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def break_clkit(part: str) -> None:
    """Takes one thing away that makes a resume exact, to show that the comparison notices."""

    def nothing(*_: Any) -> None:
        return None

    def none_done(*_: Any) -> int:
        return 0

    broken: dict[str, list[tuple[Any, str, Any]]] = {
        "loops": [(clkit.stream.resume, "_make_loops_whole", nothing)],
        "random": [(clkit.stream.resume, "restore_random_state", nothing)],
        "position": [(StreamDataModule, "_start_of", none_done)],
        "row": [(StreamEvaluation, "_flush", nothing)],
        "gradients": [(clkit.stream.resume, "_restore_gradients", nothing)],
        "graft": [(Graft, "restore", Graft.apply)],
        "end": [(StreamCallback, "on_fit_end", nothing)],
        "memory": [(OnProStrategy, "load_stream_state", nothing)],
    }
    for owner, name, replacement in broken[part]:
        assert hasattr(owner, name)
        setattr(owner, name, replacement)


def noise(image: Tensor) -> Tensor:
    """A random transform that leaves the sample's number alone."""
    noisy = (image + torch.randint(0, 60, image.shape, dtype=torch.uint8)).clamp(max=254)
    noisy[0, 0, 0] = image[0, 0, 0]
    return noisy


def dataset(counts: tuple[int, ...], first: int, seed: int) -> TensorDataset:
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (len(targets), 1, 4, 4), generator=draw, dtype=torch.uint8)
    images[torch.arange(len(targets)), 0, 2, targets % 4] += 60  # something to learn
    images[torch.arange(len(targets)), 0, 3, targets // 2] += 60
    images[:, 0, 0, 0] = torch.arange(first, first + len(targets))
    return TensorDataset(images, targets)


def make_heads(kind: str) -> list[Any]:
    if kind == "none":
        return []
    if kind == "dst":
        return [DST(0.3, schedule=PruneSchedule(update_every=2)), NMC()]
    if kind == "mend":
        image = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(5))
        image[0, 0, 0, 0] = 1.0  # of the evaluation samples, for who counts steps
        settings = {"layers": "net.1", "alpha": 0.5, "norm_scope": "none"}
        return [MEND(settings, edits=[(image, torch.tensor([2]))], guard=None, allow_stale=True), NMC()]
    if kind == "d_simplex":
        return [DSimplex(8, alignment="hoc"), NMC()]
    if kind == "deup":
        decides: dict[str, Any] = {"abstain_rate": 0.2, "coverage": 0.8, "false_alarm_rate": 0.2, "adaptive": 0.05}
        arriving = DEUP(sources=["prequential", "novel"], records=Records(capacity=40, refit=2), name="arriving")
        return [arriving, AEFOCL(balance="none"), NMC(), DEUP(records=Records(memory_size=30), **decides)]
    if kind == "deup_kept_out":
        return [NMC(), DEUP(loss="brier", coverage=0.8, abstain_rate=0.2)]
    if kind == "graft":
        return [AEFOCL(graft="experience_end"), NMC(), LDA()]
    if kind == "graft_replaced":
        return [NMC(graft="experience_end"), LDA()]
    if kind == "graft_at_end":
        return [AEFOCL(graft="fit_end"), NMC(), LDA()]
    if kind == "graft_at_end_replaced":
        return [NMC(graft="fit_end"), LDA()]
    if kind == "reset":
        return [AEFOCL(reset_each_task=True), NMC(reset_each_task=True), LDA(reset_each_task=True)]
    if kind == "other":
        return [
            AEFOCL(0.1, Lift(20), balance="none", name="lift"),
            AEFOCL(balance="reweight", name="reweight", forward="shared"),
            NMC("icarl"),
            LDA(),
        ]
    return [AEFOCL(), NMC(), LDA()]


def checkpoint_saver(config: dict[str, Any], folder: Path) -> pl.Callback:
    saves = config.get("saves", {"every_n_train_steps": config.get("every", 1)})
    if saves is None:
        return SavesInsideValidation(folder)
    if "every" in config:
        saves = {"every_n_train_steps": config["every"], **saves}
    return ModelCheckpoint(str(folder), **saves)


def make_strategy(name: str, world: int) -> Any:
    if name == "warm_up":
        return GradientFreeStrategy(warmup_epochs=1)
    if name in ("lora", "norms", "last_block"):
        return GradientFreeStrategy(2, name, lora_rank=2)  # type: ignore[arg-type]  # one of the names that it takes
    if name == "gradient_free":
        return GradientFreeStrategy()
    if name == "base":
        return LearningStrategy()
    if name == "onpro":
        return OnProStrategy(capacity=12, losses=OnProLosses(rotation="rot4"), replay_batch=10)
    if name == "editor_training":
        return EditorTrainingStrategy(editor=EditorSettings(rank=3), examples=MetaExamples(n_edits=2), stat_edits=6)
    if name == "er":
        return ERStrategy(capacity=12, replay_batch=5)
    return "auto" if world == 1 else "ddp"


def seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)  # a fork seeds it anew
    np.random.seed(seed)  # noqa: NPY002  the legacy global generator is what users' code draws from


def fit(request: dict[str, Any], rank: int) -> None:
    """One run, from its checkpoint if one is given, to its end or to its death."""
    config = CONFIGS[request["config"]]
    folder, world = Path(request["folder"]), request["world"]
    kill = request["kill"] if rank in request["ranks"] else None
    places = Places(None if kill is None else (kill[0], int(kill[1])))
    if "without" in request:
        break_clkit(request["without"])
    watch_files(places)
    stream_options = dict(config.get("stream", {}))
    if "train_transform" in stream_options:
        stream_options["train_transform"] = noise
    stream = StreamDataModule(
        Custom(dataset(TRAINED, 0, 1), dataset(EVALUATED, FIRST_EVALUATED, 2)),
        ClassIncremental(classes_per_experience=2),
        batch_size=4,
        eval_batch_size=4,
        epochs_per_experience=config.get("epochs", 1),
        **stream_options,
    )
    torch.manual_seed(0)
    module = MODULES.get(config.get("module", ""), Module)(places)
    seed_all(1000 if request["checkpoint"] else 0)  # whoever resumes has drawn other numbers
    callbacks = [
        Diary(folder),
        *make_heads(config.get("heads", "")),
        StreamEvaluation(table=False, figures=False),
        AtHooks(places),
        AfterBoundary(places),
        checkpoint_saver(config, folder / "checkpoints"),
    ]
    options: dict[str, Any] = {"max_epochs": -1, "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "default_root_dir": str(folder), **config.get("trainer", {})}
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=world,
        strategy=make_strategy(config.get("strategy", ""), world),
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, datamodule=stream, ckpt_path=request["checkpoint"])
    trainer.save_checkpoint(folder / "end.pt")
    module.eval()
    probe = torch.rand(9, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.save({"answers": module.net(probe), "steps": trainer.global_step}, folder / f"answers.{rank}")
    (folder / f"places.{rank}").write_text(json.dumps(places.counts))


# ---- the server


def start(request: dict[str, Any], rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        log = os.open(Path(request["folder"]) / f"log.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if request["world"] > 1:  # Lightning then takes the processes as started by someone else
            os.environ |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(request["world"]),
                "NODE_RANK": "0",
                "LOCAL_RANK": str(rank),
            }
        fit(request, rank)
        code = 0
    except BaseException:  # whatever it is: this copy of the server must end here, and say why
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Runs the processes of a request; tells how each ended: 0, 1 (an exception) or minus the signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.monotonic()
    running = {start(request, rank, port): rank for rank in range(request["world"])}
    ended: dict[int, int] = {}
    hung = False
    while running:
        spent = time.monotonic() - began
        kill_after = request.get("kill_after")
        if spent > HANG_S or (kill_after is not None and spent > kill_after):
            hung = kill_after is None
            for child in running:
                os.kill(child, signal.SIGKILL)
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in running:
            ended[running.pop(child)] = os.waitstatus_to_exitcode(status)
        elif child == 0:
            time.sleep(0.003)
    return {
        "ended": [ended[rank] for rank in range(request["world"])],
        "hung": hung,
        "seconds": time.monotonic() - began,
    }


def main() -> None:
    """Answers one line of JSON by another until the input ends."""
    torch.set_num_threads(1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
