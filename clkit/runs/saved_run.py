"""A run as its checkpoint and its ``config.yaml`` describe it, to pass some batches through its network again."""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from clkit.callbacks import DEUP, DST, MEND, DSimplex, HeadCallback
from clkit.callbacks.base import FeatureCallback, Stage
from clkit.data import StreamDataModule
from clkit.data.loader import Rows
from clkit.errors import ArgumentError, ClkitError, ConfigurationError, DataError, StateError
from clkit.features.batch import BatchReader, Readings
from clkit.runs.settings import StreamCLI, read_settings, refusal, weights_line
from clkit.strategies import GradientFreeStrategy
from clkit.stream._lightning import callbacks_of

__all__ = ["SavedRun"]

Plan = list[tuple[int, Rows]]  # epoch and rows of each batch

# of the run's trainer, what says where and how numbers are computed, and with what the parts are built
_ELSEWHERE = {"accelerator": "cpu", "precision": None, "devices": 1, "num_nodes": 1, "plugins": None}

# of a trainer that only runs a network
_BARE: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "inference_mode": False,
}


class SavedRun:
    """The module, the data and the head callbacks of a checkpoint's run, built from a file of its settings.

    The settings lie beside the checkpoint or in the folder above, if not said otherwise.
    """

    def __init__(self, path: str | Path, config: str | Path | None = None) -> None:
        self.path = Path(path)
        folder = self.path.resolve().parent
        places = [folder / "config.yaml", folder.parent / "config.yaml"] if config is None else [Path(config)]
        found = [place for place in places if place.is_file()]
        if not found:
            raise ArgumentError(
                f"the settings of the run are not there: {' and '.join(map(str, places))}; give the config.yaml of the "
                "run (--config), which clkit fit writes into its folder"
            )
        self.config = found[0]
        settings = read_settings(self.config)
        cli = _built(self.config, settings)
        self.module: pl.LightningModule = cli.model
        self.data: pl.LightningDataModule = cli.datamodule
        self.strategy = cli.trainer.strategy
        self.callbacks = {
            callback.state_key: callback for callback in callbacks_of(cli.trainer) if isinstance(callback, HeadCallback)
        }
        kinds = (HeadCallback, DSimplex, DST, DEUP, MEND)
        self.learning: list[Any] = [callback for callback in callbacks_of(cli.trainer) if isinstance(callback, kinds)]
        self._placed = [callback for callback in callbacks_of(cli.trainer) if isinstance(callback, DSimplex)]
        self._readings = Readings(lambda: ((self.strategy, self.module), callbacks_of(cli.trainer)))
        trainer = settings.get("trainer") or {}
        limit = trainer.get("limit_train_batches")  # an integer 1 is one batch, 1.0 is all of them
        self.batches_are_limited = (limit is not None and repr(limit) != "1.0") or bool(trainer.get("overfit_batches"))
        self._computing = {"accelerator": trainer.get("accelerator", "auto"), "precision": trainer.get("precision")}

    def learned(self, checkpoint: dict[str, Any], keys: list[str], rows: Rows) -> dict[str, tuple[Tensor, Tensor]]:
        """Return features (N, D) and targets (N,) of some training rows, as the heads of some keys have learned them.

        A row stands there once for each time that it was learned.
        """
        instead = "give features and targets instead of ids"
        if not isinstance(self.strategy, GradientFreeStrategy):
            raise ConfigurationError(
                f"{self.config} trains the network (its strategy is no gradient_free), so the features that were "
                f"learned cannot be computed again; {instead}"
            )
        if self.batches_are_limited:
            raise ConfigurationError(
                f"{self.config} limits the training batches, so which samples were learned is not known; {instead}"
            )
        missing = [key for key in keys if key not in self.callbacks]
        if missing:
            raise ConfigurationError(
                f"{self.config} has no callback {', '.join(missing)}, but {sorted(self.callbacks)}"
            )
        stream = self.data
        if not isinstance(stream, StreamDataModule):
            raise ConfigurationError(
                f"the data of {self.config} are a {type(stream).__name__}, whose samples have no numbers; {instead}"
            )
        position = checkpoint.get(type(stream).__qualname__)
        if position is None:
            raise StateError(f"{self.path} does not say how far its stream had come; {instead}")
        stream.setup("validate")  # learning ends with what a trainer says; this only cuts the stream
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for resets, epochs in itertools.product((False, True), ("all", "last")):
            group = [
                key
                for key in keys
                if self.callbacks[key].reset_each_task is resets and self.callbacks[key].epochs == epochs
            ]
            if group:
                plan = stream.learned_batches(position, rows, last_experience=resets, last_epochs=epochs == "last")
                unlearned = np.setdiff1d(rows, np.concatenate([rows[:0], *(batch for _, batch in plan)]))
                if unlearned.size:
                    shown, more = ", ".join(map(str, unlearned[:10])), len(unlearned) - 10
                    raise DataError(
                        f"the samples {shown}{f' and {more} more' if more > 0 else ''} were not learned by "
                        f"{' and '.join(group)} before this checkpoint was saved; nothing was written"
                    )
                collectors = {
                    key: _Collector(
                        self.callbacks[key], self._reader(key), str(checkpoint["callbacks"][key]["tap"]), plan, rows
                    )
                    for key in group
                }
                self._pass(plan, list(collectors.values()), **self._computing)
                found |= {key: (torch.cat(one.features), torch.cat(one.targets)) for key, one in collectors.items()}
        return found

    def restored(self) -> tuple[pl.LightningModule, torch.device]:
        """Return the module with the network and the weights of the checkpoint, and the best place to run it.

        No data are looked at: a model may be wanted where its training data are not.
        """
        with _quiet(), _loading():
            options: dict[str, Any] = {**_BARE, "callbacks": list(self._placed), "limit_predict_batches": 0}
            trainer = pl.Trainer(accelerator="auto", devices=1, **options)
            try:
                trainer.predict(self.module, [], return_predictions=False, ckpt_path=self.path, weights_only=True)
            except MisconfigurationException as error:
                raise ConfigurationError(f"Lightning cannot run {type(self.module).__name__}: {error}") from error
        return self.module, trainer.strategy.root_device

    def opened(self) -> tuple[pl.LightningModule, pl.Trainer]:
        """Return the module and a trainer, with whose callbacks in ``learning`` the checkpoint was taken up.

        One validation batch is run: the callbacks find their layers, and the data their place in the stream.
        """
        if not is_overridden("validation_step", self.module):
            raise ConfigurationError(f"{type(self.module).__name__} has no validation_step, by which it is run here")
        with _quiet(), _loading():
            options: dict[str, Any] = {**_BARE, "callbacks": list(self.learning), "limit_val_batches": 1}
            warnings.filterwarnings("ignore", message="the checkpoint has no state for MEND")  # before its first edit
            trainer = pl.Trainer(accelerator="cpu", devices=1, strategy=self._frozen_or_not(), **options)
            trainer.validate(self.module, datamodule=self.data, ckpt_path=self.path, verbose=False, weights_only=True)
        return self.module, trainer

    def answered(self, inputs: Tensor) -> tuple[pl.LightningModule, list[dict[str, dict[str, Tensor]]]]:
        """Return the module, with its callbacks in ``learning`` taken up, and what each DEUP says of some inputs."""
        batches: DataLoader[Any] = DataLoader([(inputs, torch.full((len(inputs),), -1))], batch_size=None)  # type: ignore[arg-type]  # any list
        with _quiet(), _loading():
            options: dict[str, Any] = {**_BARE, "callbacks": list(self.learning), "strategy": self._frozen_or_not()}
            trainer = pl.Trainer(accelerator="cpu", devices=1, **options)
            trainer.predict(self.module, batches, return_predictions=False, ckpt_path=self.path, weights_only=True)
        said = [each.predictions[0] for each in self.learning if isinstance(each, DEUP) and each.predictions]
        return self.module, said

    def _frozen_or_not(self) -> Any:
        """Return a strategy that says, as that of the run did, whether the network trains."""
        return GradientFreeStrategy() if isinstance(self.strategy, GradientFreeStrategy) else "auto"

    def prepare(self, key: str, samples: int = 4) -> Any:
        """Load the checkpoint's weights into the module; return some inputs of the kind that a callback reads."""
        plan = None
        if isinstance(self.data, StreamDataModule):
            self.data.setup("validate")
            plan = [(0, self.data.training_rows(0)[:samples])]
        collector = _Collector(self.callbacks[key], self._reader(key), None, plan or [], np.empty(0, dtype=np.int64))
        self._pass(plan, [collector], accelerator="cpu", precision="32-true")
        return collector.inputs

    def _reader(self, key: str) -> BatchReader:
        """Return what reads a batch as a callback did in the run, where others may have had a reader that served it."""
        return functools.partial(self._readings.read, self.callbacks[key])  # type: ignore[return-value]  # has targets

    def _pass(self, plan: Plan | None, collectors: list[_Collector], **computing: Any) -> None:
        """Let the network see the batches of a plan, or the first one that the data have for a validation."""
        if not is_overridden("validation_step", self.module):
            raise ConfigurationError(
                f"{type(self.module).__name__} has no validation_step, by which its network is run here; give it one "
                "that takes a batch"
            )
        data = self.data
        if plan is not None:
            assert isinstance(data, StreamDataModule)
            replayed = functools.partial(data.replayed, plan)
            setattr(data, "val_dataloader", replayed)  # noqa: B010  on this object alone, which nobody else has
        with _quiet():
            try:
                trainer = pl.Trainer(
                    **computing,
                    devices=1,
                    callbacks=list(collectors),
                    **_BARE,
                    limit_val_batches=1 if plan is None else 1.0,
                )
            except MisconfigurationException as error:
                raise ConfigurationError(
                    f"the run was computed with {computing}, which is not here ({error}): other numbers would come out"
                ) from error
            with _loading():
                trainer.validate(self.module, datamodule=data, ckpt_path=self.path, verbose=False, weights_only=True)


class _Collector(FeatureCallback):
    """Keep features and targets of some rows of each batch, as a head callback would read them."""

    stages = frozenset({"validate"})

    def __init__(self, callback: HeadCallback, reader: BatchReader, point: str | None, plan: Plan, rows: Rows) -> None:
        super().__init__(layer=callback.layer, batch_reader=reader)
        self.name = callback.name  # what tells two collectors of one trainer apart
        self._point = point
        self._plan = plan
        self._rows = rows
        self.features: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.inputs: Any = None

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Refuse a network that has the features elsewhere."""
        point = self.observer.point
        if self._point not in (None, point):
            raise StateError(
                f"the heads of the checkpoint read features at {self._point!r}, and the network of the settings has "
                f"them at {point!r}; give the config.yaml that belongs to the checkpoint"
            )

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take nothing: only the weights are of interest."""

    def on_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Keep the rows that are asked for."""
        self.inputs = self.observer.inputs
        if self._rows.size:
            asked = torch.from_numpy(np.isin(self._plan[batch_idx][1], self._rows))
            self.features.append(self.observer.features(self.forward).cpu()[asked])
            self.targets.append(self.observer.known_targets.cpu()[asked])


def _built(config: Path, settings: dict[str, Any]) -> StreamCLI:
    """Build everything that the settings name, on a trainer that is not used."""
    sys.path.insert(0, str(Path.cwd()))  # classes of the user's own, as `clkit fit` finds them
    wanted = {name: dict(settings.get(name) or {}) for name in ("model", "data", "trainer")}
    wanted["trainer"] |= {**_ELSEWHERE, "logger": False}
    arguments = wanted["model"].get("init_args") or {}
    if str(wanted["model"].get("class_path", "TimmClassifier")).endswith("TimmClassifier"):
        # weights come from the checkpoint: nothing is to be fetched
        wanted["model"]["init_args"] = {**arguments, "pretrained": False, "checkpoint_path": None}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump({"seed_everything": False, **wanted}), encoding="utf-8")
        try:
            return StreamCLI(["--config", str(file)], run=False)
        except ClkitError:
            raise
        except ValueError as error:
            raise refusal(error) or ConfigurationError(f"{config}: {error}") from error
        except SystemExit as error:  # the parser has said what is wrong
            raise ConfigurationError(f"the run of {config} cannot be built; what is wrong is said above") from error


@contextmanager
def _loading() -> Iterator[None]:
    """Say in one line that weights do not fit."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Error(s) in loading state_dict for"):
            raise
        raise StateError(weights_line(str(error))) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's notes, which a person does not want to read here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
