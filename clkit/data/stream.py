"""The data module: a stream of experiences as one ``fit``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.data._fit import LightningData, prepare_fit
from clkit.data.batch_form import BatchForm, batch_former
from clkit.data.cutting import CutStream, PartName, cut_stream
from clkit.data.loader import (
    BatchLoader,
    EvaluationLoader,
    Fetcher,
    Rows,
    TrainLoader,
    Workers,
    cut_batches,
    epoch_order,
)
from clkit.data.position import StreamPosition
from clkit.data.preprocessing import Preprocessing, settled_preprocessing
from clkit.data.scenarios import ClassIncremental, Scenario
from clkit.data.sources import resolve_source
from clkit.data.sources.base import Source, data_root, first_image
from clkit.errors import ArgumentError, ConfigurationError, DataError
from clkit.methods._checks import check_count, check_probability
from clkit.stream import resume
from clkit.stream._lightning import loaded_checkpoint, started_epochs, stream_position
from clkit.stream.experience import Experience

__all__ = ["StreamDataModule"]


class StreamDataModule(LightningData):
    """A stream of experiences cut from a data set: one ``fit``, one checkpoint, one logger.

    The experience is a function of the trainer's epoch. Validation gives one loader over all experiences seen so far,
    whose batches never straddle two. A run resumed in the middle of an experience goes on with the next sample.

    Args:
        source: A :class:`~clkit.data.Source`, or a short form: ``"digits"``, ``"digits:flat"``,
            ``"torchvision:CIFAR100"``, ``"folder:PATH"``, ``"npz:NAME"``, ``"features:NAME"``.
        scenario: How the stream is cut; five experiences of classes by default.
        batch_size: Training samples a batch and process, at most; batches of an epoch are as even as possible.
        eval_batch_size: The same for evaluation.
        epochs_per_experience: Epochs over each experience, after a strategy's warm-up if it has one.
        preprocessing: A :class:`~clkit.data.Preprocessing`; or ``"auto"``: the module's own ``data_config`` where the
            source holds images and the module has one (a timm backbone), the stored size and [0, 1] otherwise; or
            ``"unit"``: always the latter; or any function from a stack of stored images to inputs.
        train_transform: Random augmentation of one stored training image (a uint8 or float tensor (C, H, W)). What it
            draws from torch's or Python's generator is a function of (seed, epoch, sample), and leaves both as they
            were; NumPy's global generator is not covered. Leave it out for gradient-free heads.
        evaluate: ``"seen"`` evaluates the experiences seen so far, ``"all"`` also the future ones, which forward
            transfer needs.
        val_fraction: Share of the training part, [0, 1), cut off for validation by a seeded draw stratified by class.
            With 0 validation and test are both the source's test part, as the papers' protocols have it.
        relabel: Whether batches number the classes 0, 1, … in the stream's order. Ids that a person reads are always
            the source's.
        stop_after: Only the first so many experiences, at most as many as there are; ``num_classes`` stays that of the
            whole stream, so a checkpoint may go on without it.
        shuffle: Whether the samples of an experience are shuffled (by seed and epoch); not with the trainer's
            ``overfit_batches``, which wants the same batches in every epoch.
        seed: Seed of order, augmentation and validation draw.
        num_workers: Loader processes; they live as long as the stream. 0 loads in the process itself.
        root: The data folder in which names are looked up; the environment variable ``CLKIT_DATA`` by default.
        batch_form: ``"tuple"``: ``(inputs, targets)``; ``"dict"``: a dictionary with the keys ``image`` and ``label``;
            its keys, such as ``["pixel_values", "labels"]``; ``"named"``: a named tuple of ``image`` and ``label``; or
            any function of the tuple. Where the task is given it is third, called ``task``.

    Raises:
        ArgumentError: An argument is out of its range.
        DataError: The data is not there, or cannot be cut as asked (in ``setup``); there is nothing to evaluate on.
        ConfigurationError: In ``setup``, for a trainer that would end the stream early (``max_epochs``,
            ``EarlyStopping``) or whose integer ``val_check_interval`` is longer than an experience.
        StateError: A fit is to go on from a checkpoint of another stream, or inside an experience with settings that
            change the order of its samples.

    Example:
        >>> stream = StreamDataModule("digits:flat", ClassIncremental(experiences=5), batch_size=32)
        >>> stream.setup("fit")
        >>> [experience.classes for experience in stream.experiences]
        [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
        >>> stream.num_classes, stream.experiences[0].train_samples
        (10, 183)
    """

    def __init__(
        self,
        source: str | Source = "digits",
        scenario: Scenario | None = None,
        *,
        batch_size: int = 32,
        eval_batch_size: int = 256,
        epochs_per_experience: int = 1,
        preprocessing: Literal["auto", "unit"] | Preprocessing | Callable[[Any], Tensor] = "auto",
        train_transform: Callable[[Tensor], Any] | None = None,  # Any: a command line would build a Tensor
        evaluate: Literal["seen", "all"] = "seen",
        val_fraction: float = 0.0,
        relabel: bool = False,
        stop_after: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_workers: int = 0,
        root: str | Path | None = None,
        batch_form: BatchForm = "tuple",
    ) -> None:
        check_arguments(StreamDataModule, locals())
        super().__init__()
        self.seed = check_count("seed", seed, at_least=0)
        self.num_workers = check_count("num_workers", num_workers, at_least=0)
        self.batch_size = check_count("batch_size", batch_size)
        self.eval_batch_size = check_count("eval_batch_size", eval_batch_size)
        self.epochs_per_experience = check_count("epochs_per_experience", epochs_per_experience)
        self.stop_after = None if stop_after is None else check_count("stop_after", stop_after)
        self.evaluate = evaluate
        if scenario is not None and not isinstance(scenario, Scenario):
            raise ArgumentError(
                f"scenario must be a Scenario such as ClassIncremental(experiences=5), got {scenario!r}"
            )
        if check_probability("val_fraction", val_fraction) == 1.0:
            raise ArgumentError(f"val_fraction must lie in [0, 1), got {val_fraction}")
        if preprocessing not in ("auto", "unit") and not callable(preprocessing):
            raise ArgumentError(
                f"preprocessing must be 'auto', 'unit', a Preprocessing or a function, got {preprocessing!r}"
            )
        self.batch_form, self._former = batch_form, batch_former(batch_form)
        self.source = resolve_source(source)
        self.scenario = ClassIncremental(experiences=5) if scenario is None else scenario
        self.preprocessing, self.train_transform, self.root = preprocessing, train_transform, root
        self.val_fraction, self.relabel, self.shuffle = val_fraction, relabel, shuffle

        self.experiences: list[Experience] = []
        self._loaded: CutStream | None = None  # after `setup`
        self._workers: dict[str, Workers] = {}
        self._warmup_epochs = 0
        self._position: StreamPosition | None = None  # of a loaded checkpoint, for the fit that resumes from it
        self._reached: int | None = None  # how far learning came: index of an experience

    # ---- the stream

    def setup(self, stage: str) -> None:
        """Load the source, cut the stream and, for a fit, set how the trainer walks through it."""
        if self._loaded is None:
            parts = self.source.load(data_root(self.root))
            self._loaded = cut_stream(self.source, parts, self.scenario, self.stop_after, self.val_fraction, self.seed)
            self.experiences = self._loaded.experiences
        if self.trainer is not None:
            self._warmup_epochs = getattr(self.trainer.strategy, "warmup_epochs", 0)
        self._close_workers()  # the preprocessing may be another module's
        if stage == "fit" and self.trainer is not None:
            self._reached = None
            prepare_fit(self.trainer, self.experiences, self.epochs, lambda each: len(self._batches_of(each, 0)))

    def teardown(self, stage: str) -> None:
        """Note how far a fit came and end the worker processes."""
        if stage == "fit" and self.trainer is not None:
            self._reached = self._reached_by(self.trainer)
            self._position = None
        self._close_workers()

    @property
    def _cut(self) -> CutStream:
        if self._loaded is None:
            raise ConfigurationError("the stream is not set up yet; call setup('fit') before asking for its loaders")
        return self._loaded

    @property
    def epochs(self) -> int:
        """Epochs of the whole stream, warm-up included."""
        return self._warmup_epochs + len(self.experiences) * self.epochs_per_experience

    @property
    def gives_task_id(self) -> bool:
        """Whether batches have the experience of each sample as a third entry (task-incremental scenarios)."""
        return bool(getattr(self.scenario, "gives_task_id", False))

    def experience_at(self, epoch: int) -> Experience | None:
        """Return the experience of an epoch, with its phase; ``None`` beyond the stream."""
        if epoch < self._warmup_epochs:
            return replace(self.experiences[0], phase="warmup")
        index = (epoch - self._warmup_epochs) // self.epochs_per_experience
        return self.experiences[index] if index < len(self.experiences) else None

    def is_last_epoch(self, epoch: int) -> bool:
        """Return whether an epoch is the last of its experience."""
        learned = epoch - self._warmup_epochs + 1
        return learned > 0 and learned % self.epochs_per_experience == 0

    # ---- classes, as the user numbers them

    @property
    def classes(self) -> list[int]:
        """Ids of all classes of the whole stream, in the order in which they arrive; the user's ids."""
        return [] if self._loaded is None else list(self._loaded.classes)

    @property
    def num_classes(self) -> int:
        """Columns that a classifier of this stream needs: largest id + 1, or the number of classes when relabelled."""
        return len(self.classes) if self.relabel else max(self.classes) + 1

    @property
    def original_ids(self) -> list[int] | None:
        """The user's id of each batch label when relabelled, ``None`` when batches have the user's ids."""
        return self.classes if self.relabel else None

    @property
    def class_names(self) -> dict[int, str]:
        """Names by the user's class id; may be empty."""
        return self.source.class_names

    # ---- loaders

    def train_dataloader(self) -> TrainLoader:
        """Return the batches of the current epoch, without side effects: a resume asks for a stale epoch first."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        batches = self._batches_of(self.experience_at(epoch) or self.experiences[-1], epoch)
        return TrainLoader(self._workers_of("train"), batches, epoch, self._start_of)

    def _batches_of(self, experience: Experience, epoch: int) -> list[Rows]:
        return self._shared(self._order(experience.index, epoch), self.batch_size, f"experience {experience.name!r}")

    def _order(self, index: int, epoch: int) -> Rows:
        """Return the rows of an experience as they arrive in an epoch."""
        split = self._cut.splits[index]
        return epoch_order(split.train, seed=self.seed, epoch=epoch, shuffle=self._shuffles and not split.ordered)

    @property
    def _shuffles(self) -> bool:
        # overfitting means the same few batches in every epoch, for which Lightning turns shuffling off as well
        return self.shuffle and not getattr(self.trainer, "overfit_batches", 0)

    def val_dataloader(self) -> EvaluationLoader:
        """Return one loader over the experiences that are to be evaluated now."""
        return self.evaluation_loader(self._upto())

    def test_dataloader(self) -> EvaluationLoader:
        """Return the source's test samples of the experiences that were reached."""
        return self.evaluation_loader(self._upto(), part="test")

    predict_dataloader = test_dataloader

    def evaluation_loader(self, upto: int, part: Literal["validate", "test"] = "validate") -> EvaluationLoader:
        """Return a loader over experiences 0 … ``upto`` (all of the stream with ``evaluate="all"``).

        ``part`` is ``"validate"`` for what validation uses, or ``"test"`` for the source's test part.

        Raises:
            DataError: If the source has no test samples for any experience, and none were cut off for validation.
        """
        last = len(self.experiences) - 1 if self.evaluate == "all" else min(upto, len(self.experiences) - 1)
        name: PartName = "test" if part == "test" else self.evaluated_on
        rows = self._cut.rows(name)
        if not any(map(len, rows)):
            raise DataError(
                f"the source {self.source.name!r} has no test samples to evaluate on; give it a test part, or set "
                "val_fraction above 0 to validate on a share of the training part"
            )
        batches = {
            index: self._shared(rows[index], self.eval_batch_size, f"the evaluation of experience {index}")
            for index in range(last + 1)
            if len(rows[index])
        }
        return EvaluationLoader(self._workers_of(name), batches)

    @property
    def evaluated_on(self) -> Literal["test", "validation"]:
        """``"test"`` or ``"validation"``: which samples a validation uses."""
        return "validation" if self.val_fraction else "test"

    def _upto(self) -> int:
        if self.trainer is not None and self.trainer.state.fn == "fit":
            return self._index_at(self.trainer.current_epoch)
        return len(self.experiences) - 1 if self._reached is None else self._reached

    def _reached_by(self, trainer: pl.Trainer) -> int:
        return self._index_at(max(started_epochs(trainer) - 1, 0))

    def _index_at(self, epoch: int) -> int:
        experience = self.experience_at(epoch)
        return len(self.experiences) - 1 if experience is None else experience.index

    def _shared(self, rows: Rows, batch_size: int, what: str) -> list[Rows]:
        rank, world_size = (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
        try:
            return cut_batches(rows, batch_size, rank=rank, world_size=world_size)
        except DataError as error:
            raise DataError(f"{what}: {error}") from error

    def _workers_of(self, name: PartName) -> Workers:
        if name not in self._workers:
            fetcher = Fetcher(
                self._cut.part(name),
                self._cut.targets(name, self.relabel),
                self.input_preprocessing(),
                self.train_transform if name == "train" else None,
                self._cut.tasks(name) if self.gives_task_id else None,
                self.seed,
            )
            self._workers[name] = Workers(fetcher, self.num_workers, self._former)
        return self._workers[name]

    def _close_workers(self) -> None:
        for workers in self._workers.values():
            workers.close()
        self._workers = {}

    def training_rows(self, index: int) -> Rows:
        """Return the row numbers (n,) of an experience's training samples in the source's training part, sorted."""
        return np.sort(self._cut.splits[index].train)

    def learned_batches(
        self, position: dict[str, Any], rows: Rows, *, last_experience: bool = False, last_epochs: bool = False
    ) -> list[tuple[int, Rows]]:
        """Return the batches with some training rows that a run had learned when its position was saved.

        They come as epoch and rows, whole, in the order in which they were learned; with ``last_experience`` only those
        of the experience in which learning was last, with ``last_epochs`` only those of the last epoch of each.

        Raises:
            DataError: If the training part has no such row.
            StateError: If the position is one of another stream.
        """
        saved = StreamPosition.saved(position)
        saved.check_replay(self._position_at(saved.epoch), rows, len(self._cut.train))
        return [
            (epoch, batch)
            for epoch, index in saved.learned_epochs(last_experience=last_experience, last_epochs=last_epochs)
            for batch in saved.learned_rows(epoch, self._order(index, epoch), rows)
        ]

    def replayed(self, batches: list[tuple[int, Rows]]) -> BatchLoader:
        """Return a loader of training batches given by epoch and rows, augmented as they were."""
        return BatchLoader(self._workers_of("train"), batches)

    def training_inputs(self, rows: Rows) -> Tensor:
        """Return the inputs (n, …) of some training rows as the first epoch gives them."""
        inputs: Tensor = self._workers_of("train").fetcher[0, rows][0]
        return inputs

    def first_image(self) -> Tensor | None:
        """Return the first training image (C, H, W) as it is stored, ``None`` for vectors; after ``setup``."""
        return first_image(self._cut.train)

    def input_preprocessing(self) -> Callable[[Any], Tensor]:
        """Return the function from stored inputs to those of the network, with ``"auto"`` settled; after ``setup``."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return settled_preprocessing(self.preprocessing, self._cut.train, module)

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and learned batches, with what they depend on."""
        assert self.trainer is not None  # Lightning asks while it saves a checkpoint
        return self._position_at(*stream_position(self.trainer), self._reached_by(self.trainer)).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take a position up; an evaluation only learns from it how far learning came.

        Raises:
            StateError: For another format; and, for a fit, if the stream was cut otherwise.
        """
        saved, trainer = StreamPosition.saved(state_dict), self.trainer
        now = self._position_at(0)
        if trainer is None or trainer.state.fn != "fit":
            self._reached = min(max(saved.reached, 0), len(now.experiences) - 1) if saved.is_of(now) else None
            return
        saved.check_fit(now)
        self._position = saved
        checkpoint = loaded_checkpoint(trainer)
        if checkpoint is not None:  # a run without callbacks of clkit resumes exactly, too
            resume.load(trainer, checkpoint)

    def _position_at(self, epoch: int, batches: int = 0, reached: int = 0) -> StreamPosition:
        return StreamPosition(
            epoch=epoch,
            batches=batches,
            reached=reached,
            experiences=[[experience.name, list(experience.classes)] for experience in self.experiences],
            schedule={"epochs_per_experience": self.epochs_per_experience, "warmup_epochs": self._warmup_epochs},
            order={  # what the batches of the experience depend on
                "batch_size": self.batch_size,
                "world_size": 1 if self.trainer is None else self.trainer.world_size,
                "seed": self.seed,
                "shuffle": self._shuffles,
                "train_samples": self.experiences[self._index_at(epoch)].train_samples,
            },
        )

    def _start_of(self, epoch: int) -> int:
        return 0 if self._position is None else self._position.learned_of(epoch, self._position_at(epoch).order)
