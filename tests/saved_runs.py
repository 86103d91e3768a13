"""Short runs whose files are kept in ``tests/saved/VERSION``, since files of each release load for ever.

``python tests/saved_runs.py`` writes those of this version, before it is released; afterwards they never change.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from clkit import export, load_head, merge_checkpoints
from clkit.callbacks import AEFOCL, DST, LDA, NMC, StreamEvaluation
from clkit.data import ClassIncremental, Custom, StreamDataModule
from clkit.methods import Growth, OnProLosses, PruneSchedule
from clkit.runs.learned import NewModel
from clkit.runs.learning import learn_images
from clkit.strategies import (
    DERPPStrategy,
    ERACEStrategy,
    ERStrategy,
    GradientFreeStrategy,
    MemorySettings,
    OnProStrategy,
    Projection,
    ReplayStrategy,
    SCRStrategy,
)

FOLDER = Path(__file__).parent / "saved"
VERSION = "0.1"
CLASSES, TRAINED, MEASURED = 5, 12, 8  # rows of a class
SAVED_AT = 6  # of ten steps: in the middle of the second of three experiences
NAMES = ("aef_ocl", "nmc", "lda")

small = {"capacity": 10, "replay_batch": 4, "transform": None}
STRATEGIES: dict[str, Callable[[], Any]] = {
    "gradient_free": GradientFreeStrategy,
    "er": lambda: ERStrategy(**small),
    "er_ace": lambda: ERACEStrategy(**small, memory=MemorySettings(policy="class_balanced")),
    "der_pp": lambda: DERPPStrategy(**small),
    "scr": lambda: SCRStrategy(**small, projection=Projection(dim=4)),
    "onpro": lambda: OnProStrategy(**small, losses=OnProLosses(rotation="none"), projection=Projection(dim=4)),
    "sharded": lambda: ERStrategy(**small, memory=MemorySettings(scope="sharded")),
    "dst": lambda: "auto",
}
CALLBACKS: dict[str, Callable[[], list[Any]]] = {  # of the others a head that reads the memory
    "gradient_free": lambda: [AEFOCL(), NMC(), LDA()],
    "dst": lambda: [
        DST(
            0.3,
            growth=Growth("momentum"),
            schedule=PruneSchedule(update_every=1),
            reuse="prefer_free",
            grow_from="any",
            steps_per_task=5,
            table=False,
        )
    ],
}


def rows(first: int, number: int) -> TensorDataset:
    """Return as many images of each of the classes, from the first one on."""
    digits = load_digits()
    labels = torch.as_tensor(digits.target)
    chosen = torch.cat([(labels == label).nonzero()[first : first + number, 0] for label in range(CLASSES)])
    return TensorDataset(torch.as_tensor(digits.images, dtype=torch.float32)[chosen, None] / 16, labels[chosen])


class Module(pl.LightningModule):
    """A small network with batch statistics, trained by Adam.

    No bias stands before the batch norm: its gradient would be rounding alone, which Adam makes as large as any other,
    so that versions of PyTorch would differ by it.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        first = nn.Conv2d(1, 4, 3, stride=2, bias=False)
        self.net = nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Save(pl.Callback):
    """Saves in the middle of the stream; unlike ``ModelCheckpoint`` it leaves no path of this machine in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == SAVED_AT:
            trainer.save_checkpoint(self.path)


class Run:
    """One of the runs, from its start or from a saved file."""

    def __init__(self, name: str, folder: Path, first: int = 0) -> None:
        self.strategy = STRATEGIES[name]()
        self.evaluation = StreamEvaluation(table=False, files=False)
        self.heads = CALLBACKS.get(name, lambda: [NMC(memory="replay")])()
        self.module = Module()
        self.stream = StreamDataModule(
            Custom(rows(first, TRAINED), rows(40, MEASURED)),
            ClassIncremental(first_experience_classes=2, classes_per_experience=2),
            batch_size=6,
        )
        self.trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            strategy=self.strategy,
            logger=False,
            enable_checkpointing=False,
            callbacks=[*self.heads, self.evaluation, Save(folder / f"{name}.ckpt")],
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    def fit(self, ckpt_path: Path | None = None) -> dict[str, Any]:
        """Learn the stream to its end; return what was reached."""
        self.trainer.fit(self.module, datamodule=self.stream, ckpt_path=ckpt_path)
        images = rows(40, 1).tensors[0]
        with torch.no_grad():
            reached: dict[str, Any] = {"logits": self.module.eval()(images).tolist()}
        if isinstance(self.strategy, ReplayStrategy):
            memory = self.strategy.memory
            reached["memory"] = {str(label): count for label, count in memory.class_counts().items()}
        for dst in self.heads:
            if isinstance(dst, DST):
                reached["tasks"] = []
                for task in range(dst.tasks):
                    with dst.activate(task), torch.no_grad():
                        reached["tasks"].append(self.module.eval()(images).tolist())
        reached["accuracy"] = {name: each["accuracy_matrix"] for name, each in self.evaluation.results.items()}
        return reached


def scores(path: Path, name: str) -> list[list[float]]:
    """Return the scores that a head of a file gives the measured images, read as the network reads them."""
    saved: dict[str, Any] = torch.load(path, weights_only=True)["state_dict"]
    module = Module().eval()
    own = {key: saved.get(key, saved.get(key.removeprefix("net."))) for key in module.state_dict()}
    module.load_state_dict({key: value for key, value in own.items() if value is not None}, strict=False)
    with torch.no_grad():
        values: Tensor = load_head(path, name)(module.net[:-1](rows(40, 1).tensors[0]))
    return values.tolist()


def write_learned(path: Path) -> None:
    """Write a file of ``clkit learn``: half of some features of the network, as the first of two shards."""
    parts = {}
    for part, first, number in (("train", 0, TRAINED), ("test", 40, MEASURED)):
        images, labels = rows(first, number).tensors
        with torch.no_grad():
            parts |= {f"f_{part}": Module().eval().net[:-1](images).numpy(), f"y_{part}": labels.numpy()}
    with tempfile.TemporaryDirectory() as other, contextlib.chdir(other):  # the file names its data
        np.savez("features.npz", **parts)
        learn_images(NewModel("identity"), "features:./features.npz", path, shard=(0, 2))


def main() -> None:
    """Write the files of this version and what they must give."""
    folder = FOLDER / VERSION
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    expected: dict[str, Any] = {}
    for name in STRATEGIES:
        expected[name] = {"fit": Run(name, folder).fit()}
    with tempfile.TemporaryDirectory() as other:
        run = Run("gradient_free", Path(other), first=TRAINED)
        run.fit()
        shutil.copy(folder / "gradient_free.ckpt", Path(other) / "first.ckpt")
        with contextlib.chdir(other):  # the file names those that it is made of
            merge_checkpoints(["first.ckpt", "gradient_free.ckpt"], folder / "merged.ckpt")
        export(run.module, run.heads[0], folder / "exported.pt", example=rows(40, 1).tensors[0])
    write_learned(folder / "learned.ckpt")
    heads_of = {"gradient_free": NAMES, "merged": NAMES, "exported": NAMES[:1], "learned": NAMES[2:]}
    for name, heads in heads_of.items():
        suffix = "pt" if name == "exported" else "ckpt"
        expected.setdefault(name, {})["scores"] = {head: scores(folder / f"{name}.{suffix}", head) for head in heads}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
