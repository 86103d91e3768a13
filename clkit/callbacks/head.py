"""Learning a head beside the user's training: what AEF-OCL, NMC, LDA and any other head callback share."""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.callbacks._last_epoch import check_last_epoch_is_known, is_last_epoch, leaves_behind, on_second_epoch
from clkit.callbacks._reading_rules import check_reading
from clkit.callbacks.base import MODULE, FeatureCallback, Predictor, Stage
from clkit.distributed import report_lost_process
from clkit.errors import ArgumentError, ConfigurationError, NotFittedError, StateError, first_line
from clkit.features.batch import BatchReader
from clkit.features.observer import FeaturesFrom
from clkit.methods.heads.base import Head
from clkit.schema import Whole, saved_entry
from clkit.stream._lightning import callbacks_of, datamodule_of, is_fast_dev_run
from clkit.stream.experience import Experience
from clkit.surgery.classifier import Graft

__all__ = ["GraftWhen", "HeadCallback"]

_WIDEST = 2**31  # features that nobody has, where a damaged file names more than a number of torch can hold

GraftWhen = Literal["never", "experience_end", "fit_end"]


class HeadCallback(FeatureCallback):
    """A callback that learns a head, made by a subclass, from the features of the user's network.

    Args:
        name: Prefix of everything that is logged, and part of the key in checkpoints.
        layer: Where features are read; see :class:`~clkit.FeatureTap`.
        forward: ``"auto"`` learns from the pass that happens anyway when its features are eval-mode features, and pays
            one extra pass a batch otherwise; ``"shared"`` never pays; ``"eval"`` always does. A pass of other inputs
            than the batch's own (noise, a mix, another view) is not one that happens anyway.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form; one that is given to the
            strategy, to the module or to another callback serves here too.
        graft: When the head replaces the user's own classifier: ``"never"``, at each ``"experience_end"``, or at
            ``"fit_end"``.
        reset_each_task: Whether to start anew with each experience, for a backbone that still trains.
        epochs: Which epochs of an experience are learned: ``"all"``, or the ``"last"`` one alone, for a backbone that
            trains for several, whose earlier features are stale by then. With plain loaders, where one fit is one
            experience, the last epoch is that of ``max_epochs``, and nothing may end the fit before it.
    """

    stages = frozenset({"train", "validate", "test"})

    counts_epochs: bool = False
    """Whether a second epoch over the same samples changes the head."""

    def __init__(
        self,
        *,
        name: str,
        layer: str = "auto",
        forward: FeaturesFrom = "auto",
        batch_reader: BatchReader | None = None,
        graft: GraftWhen = "never",
        reset_each_task: bool = False,
        epochs: Literal["all", "last"] = "all",
    ) -> None:
        check_arguments(HeadCallback, locals())
        super().__init__(layer=layer, forward=forward, batch_reader=batch_reader)
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == MODULE:
            raise ArgumentError(
                f"name must be letters, digits, '_', '-' and '.', since it names logs and files, and not {MODULE!r}, "
                f"which is the module's own classifier; got {name!r}"
            )
        if not isinstance(layer, str):
            raise ArgumentError(f"layer must be 'auto', 'output' or the dotted path of a layer, got {layer!r}")
        self.name = name
        self.graft_when = graft
        self.reset_each_task = reset_each_task
        self.epochs = epochs
        self._head: Head | None = None
        self._evaluated_head: Head | None = None  # a copy summed over ranks, while an evaluation runs
        self._tap_point: str | None = None
        self._graft: Graft | None = None
        self._checks_classes: Callable[[int], None] | None = None  # of a graft that not every class has a place in
        self._correct = 0
        self._counted = 0
        self._device: torch.device | None = None
        self._processes = 1
        self._first_epoch: int | None = None  # in which the running experience was first learned
        self._again = False  # whether it was learned in a second one
        self._waits = False  # whether it is not learned yet because its last epoch is still to come
        self._learned_in_fit = False
        self._said: set[str] = set()

    @abstractmethod
    def make_head(self, in_features: int) -> Head:
        """Return a head, with nothing learned, for features of width ``in_features``."""

    # ---- the head

    @property
    def head(self) -> Any:
        """The head, a module of :mod:`clkit.methods`.

        Raises:
            NotFittedError: Before the first batch showed the width of the features.
        """
        if self._head is None:
            raise NotFittedError(f"{self.state_key} has seen no features yet; fit first, or load a checkpoint")
        return self._head

    @property
    def grafted(self) -> bool:
        """Whether the head stands in the place of the user's classifier now."""
        return self._graft is not None and self._graft.applied

    def scores(self, features: Tensor) -> Tensor:
        """Scores (B, C), column = class id, for features (B, D); (B, 0) before anything is learned."""
        head = self._evaluated_head or self._head
        return features.new_empty((len(features), 0)) if head is None else head(features)

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the readers of the batch, and refuse what cannot be read or told apart."""
        check_reading(self.state_key, trainer, pl_module)
        names = [callback.name for callback in callbacks_of(trainer) if isinstance(callback, Predictor)]
        if names.count(self.name) > 1:
            raise ConfigurationError(f"two callbacks have the name {self.name!r}; give one another: name='…'")
        if stage == "fit" and self.graft_when == "fit_end":  # before the optimizer collects parameters
            self.ungraft(pl_module)
        super().setup(trainer, pl_module, stage)
        self._processes = trainer.world_size

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take every hook off the user's network."""
        super().teardown(trainer, pl_module, stage)
        self._evaluated_head = None

    def learns(self, trainer: pl.Trainer) -> bool:
        """Whether the training batch in work is learned: none of a warm-up, and of some epochs as ``epochs`` says."""
        if not super().learns(trainer):
            return False
        self._waits = self.epochs == "last" and not is_last_epoch(trainer)
        return not self._waits

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look for the classifier again, put a restored graft back, and check what could fail at the end."""
        super().on_fit_start(trainer, pl_module)
        self._checks_classes = None
        if self.epochs == "last":
            check_last_epoch_is_known(trainer, self.state_key)
        self._restore_graft(pl_module)
        self._learned_in_fit = False
        if self.graft_when != "never":
            for other in callbacks_of(trainer):
                if isinstance(other, HeadCallback) and other is not self and other.graft_when != "never":
                    raise ConfigurationError(
                        f"{self.state_key} and {other.state_key} would both replace the module's classifier; set "
                        'graft="never" for one of them'
                    )
            graft = self._graft or Graft(self.state_key)
            graft.check(pl_module, self.layer, self.make_head)
            graft.check_classes((getattr(datamodule_of(trainer), "num_classes", None) or 1) - 1)
            self._checks_classes = graft.check_classes if graft.one_output else None
            strategy = trainer.strategy
            trains = getattr(strategy, "trains_module", True) and not getattr(strategy, "warmup_epochs", 0)
            several = len(getattr(datamodule_of(trainer), "experiences", ())) > 1
            if self.graft_when == "experience_end" and trains and several:  # gradients go on after a boundary
                graft.check_training(pl_module, trainer.strategy.model, self.make_head(1))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the user's own classifier, where the head shall take over only at the end."""
        super().on_train_start(trainer, pl_module)
        if self.graft_when == "fit_end":
            self.ungraft(pl_module)

    def on_batch(
        self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Learn a training batch; count the hits in one of an evaluation."""
        observer = self.observer
        targets = observer.targets
        assert targets is not None
        if stage == "train":
            if self._first_epoch is None:
                self._first_epoch = trainer.current_epoch
            elif trainer.current_epoch > self._first_epoch and not self._again:
                self._again = True
                if message := on_second_epoch(observer.tap, self.counts_epochs):
                    self._say(message)
            features = observer.features(self.forward)
            source = observer.source(self.forward)
            head = self._ensure_head(features, observer.point)
            key = ("checked", source, self._device)  # what is wrong with a batch is asked once for all heads
            checked = observer.remember(key, lambda: head.checked(features, targets))
            if self._checks_classes is not None and checked.ids.size:
                self._checks_classes(int(checked.ids[-1]))
            head.learn(checked)
            self._learned_in_fit = True
            return
        scores = observer.scores(self)
        labelled = targets >= 0
        self._counted += int(labelled.sum())
        if scores.shape[1]:
            self._correct += int(((scores.argmax(dim=1).to(targets.device) == targets) & labelled).sum())

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Forget the last experience where the user asked for that."""
        self._first_epoch, self._waits, self._again = None, False, False
        if experience.index == 0 and self._head is not None and self._head.classes.numel():
            self._say(
                "it has learned before and adds this stream to that; use a new callback, or head.reset(), to start anew"
            )
        if self.reset_each_task and self._head is not None and experience.index > 0:
            self._head.reset()
        elif experience.index > 0 and leaves_behind(trainer, self.observer.tap):
            self._say(
                "the backbone still trains, so what was learned of earlier experiences no longer fits its "
                "features; freeze it, use strategy='gradient_free', or pass reset_each_task=True"
            )

    def on_backbone_changed(self, trainer: pl.Trainer, pl_module: pl.LightningModule, reason: str) -> None:
        """Say that what was learned of the features from before may no longer fit."""
        if self._head is not None and self._head.classes.numel():
            self._say(f"the backbone changed: {reason}; what was learned before may no longer fit its features")

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Sum over processes, and graft where the user asked for that."""
        # before the last evaluation and checkpoint
        last = self._boundaries.ending or trainer.max_epochs == trainer.current_epoch + 1
        self._conclude(pl_module, self.graft_when == "experience_end" or (self.graft_when == "fit_end" and last))

    def on_experience_cut(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Sum over processes, so that all evaluate the same head, where a fit ends within an experience."""
        self._conclude(pl_module, self.graft_when == "fit_end")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum over processes, and graft where the user asked for that."""
        super().on_train_end(trainer, pl_module)
        again = self.graft_when == "experience_end" and self._graft is not None
        self._conclude(pl_module, again or self.graft_when == "fit_end")

    def _conclude(self, module: pl.LightningModule, graft: bool) -> None:
        if self._waits:
            self._waits = False
            self._say("the fit ended before the last epoch of its experience, of which epochs='last' learned nothing")
        if self._head is not None:
            self._head.synchronize()
            if graft:
                self.graft(module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Warn of a fit that taught nothing, most often a mistake in its settings."""
        super().on_fit_end(trainer, pl_module)
        if not self._learned_in_fit and not is_fast_dev_run(trainer):
            self._say(
                "this fit learned no batch; max_epochs may be reached already (a second fit of one trainer needs "
                "more), or hold the warm-up alone"
            )

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"{self.state_key}: {message}")

    def _ensure_head(self, features: Tensor, point: str) -> Head:
        """Return the head, made for the first features, and checked to be one for features like these."""
        here = features.shape[1], point
        fits = self._head is not None and (self._head.in_features, self._tap_point) == here
        if self._head is None or not (fits or self._head.classes.numel()):
            self._head, self._tap_point, self._device = self.make_head(here[0]), point, None
        elif not fits:
            raise StateError(
                f"{self.state_key} has learned features of width {self._head.in_features} read at {self._tap_point!r}; "
                f"this network gives width {here[0]} at {point!r}. Use the network it was trained with, or a new name"
            )
        if features.device != self._device:
            self._head.to(features.device)
            self._device = features.device
        return self._head

    def _restore_graft(self, module: pl.LightningModule) -> None:
        if self._graft is not None and not self._graft.applied and self._head is not None:
            self._graft.restore(module, self.layer, self._head)
            self.observer.refresh()

    # ---- evaluation: the head's own running accuracy

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Put a loaded graft back, and begin the running accuracy."""
        self._restore_graft(module)
        if trainer.state.fn != "fit" and (self._head is None or not self._head.classes.numel()):
            self._say("it has learned nothing, so it is left out; pass ckpt_path, the checkpoint of a fit")
        if stage == "predict":
            return
        self._correct = self._counted = 0
        self._evaluated_head = self._head
        if trainer.world_size > 1 and self._head is not None:
            # each process has its own share; the sum is taken on a copy, so that evaluating changes nothing learned
            self._evaluated_head = copy.deepcopy(self._head)
            self._evaluated_head.synchronize()

    def on_evaluation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Log ``<name>/accuracy``."""
        if stage == "predict":
            return
        correct, counted = float(self._correct), float(self._counted)
        if trainer.world_size > 1:
            counts = torch.tensor([correct, counted], dtype=torch.float64, device=trainer.strategy.root_device)
            with report_lost_process("their accuracies"):
                correct, counted = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        if counted and self._evaluated_head is not None:
            module.log(f"{self.name}/accuracy", correct / counted, rank_zero_only=False)
        self._evaluated_head = None

    # ---- graft

    def graft(self, pl_module: pl.LightningModule) -> None:
        """Replace the user's own classifier by the head, until :meth:`ungraft`.

        Raises:
            NotFittedError: Before anything is learned.
            ConfigurationError: If the classifier cannot take the head over; the message names the reason.
        """
        if self._graft is None:
            self._graft = Graft(self.state_key)
        self._graft.apply(pl_module, self.layer, self.head)
        if hasattr(self, "observer"):
            self.observer.refresh()

    def ungraft(self, pl_module: pl.LightningModule) -> None:
        """Give the user's classifier back as it was."""
        if self._graft is not None:
            self._graft.undo(pl_module)
            self._graft = None
        if hasattr(self, "observer"):
            self.observer.refresh()

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return head, width and tap point, summed over processes so that the file is the same for any number."""
        graft = None if self._graft is None else self._graft.state()
        if self._head is None:
            return {"head": None, "in_features": None, "tap": None, "graft": graft}
        if self._processes > 1:
            self._head.synchronize()
        saved = dict(self._head.state_dict())
        return {"head": saved, "in_features": self._head.in_features, "tap": self._tap_point, "graft": graft}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Build a head of the saved width and fill it."""
        kinds: dict[str, Any] = {
            "graft": dict | None,
            "tap": str | None,
            "head": dict | None,
            "in_features": Whole(optional=True),
        }
        saved = {name: saved_entry(state, name, kind, self.state_key) for name, kind in kinds.items()}
        graft = None if saved["graft"] is None else Graft(self.state_key, saved["graft"])
        head = None
        if saved["head"] is not None:
            try:
                head = self.make_head(min(saved["in_features"] or 0, _WIDEST))
                head.load_state_dict(saved["head"])
            except StateError as error:
                raise StateError(f"{self.state_key}: {error}") from error
            except (ArgumentError, RuntimeError, MemoryError) as error:  # torch says by RuntimeError: memory is short
                reason = f"no head can be made for the saved in_features={saved['in_features']}: {first_line(error)}"
                raise StateError(f"{self.state_key}: {reason}") from error
        self._graft = graft
        self._tap_point, self._head, self._device = saved["tap"], head, None

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let go of a graft from before: the module has the checkpoint's weights by now."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        if self._graft is not None:
            self._graft.release(pl_module)
            self._graft = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save a grafted module under the user's own keys."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._graft is not None:
            self._graft.restore_keys(checkpoint["state_dict"])
