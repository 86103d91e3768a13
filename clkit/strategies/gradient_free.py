"""Learning without gradients: forward passes only, on a frozen network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clkit.arguments import check_arguments
from clkit.features.calling import call
from clkit.methods._checks import check_count
from clkit.strategies._company import FROZEN, UNTRAINED, Misfits
from clkit.strategies._frozen import Frozen, runnable
from clkit.strategies.base import LearningStrategy
from clkit.stream.boundaries import Boundaries, backbone_changed
from clkit.stream.experience import Experience

__all__ = ["GradientFreeStrategy"]


class GradientFreeStrategy(LearningStrategy):
    r"""Runs the stream through a frozen network: no backward pass, no optimizer step, one forward a batch.

    Choose it when heads learn from features (:class:`~clkit.callbacks.AEFOCL`, :class:`~clkit.callbacks.NMC`,
    :class:`~clkit.callbacks.LDA`) and the backbone is pretrained, or can be trained on the first experience: with
    ``warmup_epochs`` the user's own ``training_step`` and optimizer train the network for that many epochs of the
    first experience; then everything freezes and one gradient-free pass over the same data starts the statistics, as
    ACIL does. From then until the end of the fit the network is in eval mode and without gradients, and the user's
    ``training_step`` is not called; the run logs ``gradient_free/loss``, the cross-entropy of the module's own output,
    and nothing that the ``training_step`` logs.

    Args:
        warmup_epochs: Epochs (≥ 0) of the first experience trained by gradient; 0 for a pretrained backbone.
        options: Further arguments of :class:`LearningStrategy`.

    Raises:
        ArgumentError: If ``warmup_epochs`` is negative or not an integer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> import clkit.strategies
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="gradient_free", logger=False,
        ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> type(trainer.strategy).__name__, trainer.strategy.warmup_epochs
        ('GradientFreeStrategy', 0)

    Source: H. Zhuang et al., "ACIL: Analytic Class-Incremental Learning with Absolute Memorization and Privacy
    Protection", NeurIPS 2022 (the freeze after a first phase).
    """

    def __init__(self, warmup_epochs: int = 0, **options: Any) -> None:
        check_arguments(GradientFreeStrategy, locals())
        super().__init__(**options)
        self.warmup_epochs = check_count("warmup_epochs", warmup_epochs, at_least=0)
        self.trains_module = warmup_epochs > 0
        self._learning = False  # past the warm-up
        self._frozen: Frozen | None = None
        self._network: nn.Module | None = None
        self._loss: tuple[Tensor, Tensor] | None = None  # of the running epoch: sum and number of labels

    # ---- before the loops run

    @property
    def misfits(self) -> Misfits:
        """Callbacks of Lightning that are refused beside the strategy, each with the reason."""
        return {**super().misfits, **FROZEN, **({} if self.warmup_epochs else UNTRAINED)}

    def _setup_model(self, model: nn.Module) -> Any:
        # the DDP wrapper refuses a module without trainable parameters, and without gradients it has nothing to do
        return super()._setup_model(model) if self.warmup_epochs else model

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the user's optimizers for the warm-up, and none without one."""
        if self.warmup_epochs:
            super().setup_optimizers(trainer)
        else:
            self.optimizers, self.lr_scheduler_configs = [_NoUpdate()], []

    def _register_ddp_hooks(self) -> None:
        if self.warmup_epochs:
            super()._register_ddp_hooks()

    def on_train_start(self) -> None:
        """Freeze where the epoch says so: the phase is not in a checkpoint."""
        super().on_train_start()
        if Boundaries.of(self._module.trainer).upcoming(self._module.trainer).phase == "learn":
            self._freeze()

    # ---- boundaries

    def on_experience_start(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """Freeze the network before the first gradient-free batch."""
        if experience.phase == "learn":
            self._freeze()

    def on_experience_phase(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """Freeze the network when the warm-up is over."""
        if experience.phase == "learn":
            self._freeze()
            backbone_changed(trainer, "its warm-up is over and it is frozen")

    def _freeze(self) -> None:
        if self._learning:
            return
        module = self._module
        self._learning = True
        if isinstance(self.model, DistributedDataParallel):
            self.model = module
        self._frozen = Frozen(module, shared=not self.single_device)  # batch statistics differ when a warm-up ends
        self.lr_scheduler_configs.clear()
        self._network = runnable(module)

    def teardown(self) -> None:
        """Give the module its gradients, modes and way of optimising back."""
        if self._frozen is not None:
            self._frozen.thaw()
        self._frozen = None
        self._learning, self._network, self._loss = False, None, None
        super().teardown()

    # ---- one batch

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step during a warm-up, one forward without gradients afterwards."""
        if not self._learning:
            return super().training_step(*args, **kwargs)
        assert self._network is not None
        inputs, targets = self.read_batch(args[0] if args else kwargs["batch"])
        with torch.no_grad(), self.precision_plugin.train_step_context():
            output = call(self._network, inputs)
        self._log_loss(output, targets)
        # with several processes Lightning refuses a step that returns nothing
        return targets.new_zeros((), dtype=torch.float32)

    def _log_loss(self, output: Any, targets: Tensor) -> None:
        """Log the mean over the epoch's labels with its last batch: a log a batch costs more than the batch."""
        loss = _module_loss(output, targets)
        if loss is not None:
            summed, known = self._loss or (0, 0)
            self._loss = summed + loss[0], known + loss[1]
        module = self._module
        trainer = module.trainer
        last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps
        if last and self._loss is not None:
            summed, known = self._loss
            module.log("gradient_free/loss", summed / known.clamp(min=1), on_step=False, on_epoch=True, batch_size=1)
            self._loss = None

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Nothing to do once the network is frozen."""
        if self._learning:
            return closure_loss
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run the step; no parameter moves once the network is frozen."""
        if self._learning:
            return closure()
        return super().optimizer_step(optimizer, closure, *args, **kwargs)


class _NoUpdate(Optimizer):
    """An optimizer of nothing: Lightning counts batches by the steps of an optimizer."""

    def __init__(self) -> None:
        super().__init__([torch.zeros(1)], {"lr": 0.0})  # monitors of the learning rate look for one

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()


def _module_loss(output: Any, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the summed cross-entropy of the module's own output over labels with a column, and their number."""
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(targets) or output.shape[1] < 2:
        return None
    if targets.ndim != 1 or targets.is_floating_point():  # the heads say what is wrong with these
        return None
    known = (targets >= 0) & (targets < output.shape[1])
    labels = torch.where(known, targets, -100).long()
    return cross_entropy(output.float(), labels, ignore_index=-100, reduction="sum"), known.sum()
