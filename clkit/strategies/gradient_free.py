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
from clkit.errors import ArgumentError
from clkit.features.calling import call
from clkit.methods._checks import check_count
from clkit.strategies._company import CONFINED, FROZEN, UNTRAINED, Misfits
from clkit.strategies._first_session import FirstSession, Trains
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

    A pretrained network is adapted to the first experience in the same way (RanPAC), and loses less of what it knows
    when ``warmup`` lets little of it move. Whatever the choice, the classifier trains too, and so does what lies in
    the module outside of a timm network; of a module without one all is its network. What you froze yourself stays
    frozen. All else has ``requires_grad=False`` when your ``configure_optimizers`` is called, and until the warm-up
    is over:

    * ``"all"``: the whole network.
    * ``"norms"``: scales and shifts of normalisation layers, and running statistics move.
    * ``"last_block"``: the last block of a timm network, or of a row of equal blocks, and all that is defined behind
      it, with its running statistics. Those of the rest stay.
    * ``"lora"``: a pair of small matrices beside the weight of each linear and convolutional layer that is larger than
      the pair. When the warm-up is over, or the fit ends before, the pairs are added to the weights and nothing of them
      is left. Running statistics stay.

    A checkpoint of the warm-up resumes to the bit. The weights in it are those that the forward sees, under the names
    that they always have.

    Args:
        warmup_epochs: Epochs (≥ 0) of the first experience trained by gradient; 0 for a pretrained backbone.
        warmup: What they train; other than ``"all"`` needs ``warmup_epochs``.
        lora_rank: Rank (≥ 1) of the pairs of ``"lora"``; nothing else reads it.
        options: Further arguments of :class:`LearningStrategy`.

    Raises:
        ArgumentError: If ``warmup_epochs`` is negative or not an integer, ``warmup`` is none of these or is given
            without epochs, or ``lora_rank`` is not an integer of at least 1.
        ConfigurationError: When a fit begins, if the network has no part of the kind that trains, or the user's
            optimizers have nothing of it.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> import clkit.strategies
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="gradient_free", logger=False,
        ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> type(trainer.strategy).__name__, trainer.strategy.warmup_epochs
        ('GradientFreeStrategy', 0)

    Source: H. Zhuang et al., "ACIL: Analytic Class-Incremental Learning with Absolute Memorization and Privacy
    Protection", NeurIPS 2022 (the freeze after a first phase); M. McDonnell et al., "RanPAC: Random Projections and
    Pre-trained Models for Continual Learning", NeurIPS 2023, section 4.3 (a small part trained on the first phase).
    """

    frozen_remedy = "let some train in the warm-up, or leave warmup_epochs out"

    def __init__(self, warmup_epochs: int = 0, warmup: Trains = "all", *, lora_rank: int = 8, **options: Any) -> None:
        check_arguments(GradientFreeStrategy, locals())
        super().__init__(**options)
        self.warmup_epochs = check_count("warmup_epochs", warmup_epochs, at_least=0)
        if warmup != "all" and not warmup_epochs:
            raise ArgumentError(
                f"warmup={warmup!r} says what warmup_epochs train, and these are 0; give warmup_epochs, or leave it out"
            )
        self._session = FirstSession(warmup, lora_rank)
        self.trains_module = warmup_epochs > 0
        self._learning = False  # past the warm-up
        self._frozen: Frozen | None = None
        self._network: nn.Module | None = None
        self._loss: tuple[Tensor, Tensor] | None = None  # of the running epoch: sum and number of labels

    # ---- before the loops run

    @property
    def misfits(self) -> Misfits:
        """Callbacks of Lightning that are refused beside the strategy, each with the reason."""
        trained = CONFINED if self._session.trains != "all" else {}
        return {**super().misfits, **FROZEN, **(trained if self.warmup_epochs else UNTRAINED)}

    def setup(self, trainer: pl.Trainer) -> None:
        """Prepare the module, with gradients for what the warm-up trains."""
        if trainer.state.fn == "fit" and self.warmup_epochs:
            self._session.begin(self._module)
        super().setup(trainer)
        self._session.settle()

    def _setup_model(self, model: nn.Module) -> Any:
        # the DDP wrapper refuses a module without trainable parameters, and without gradients it has nothing to do
        return super()._setup_model(model) if self.warmup_epochs else model

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Build the user's optimizers for the warm-up, and none without one."""
        if self.warmup_epochs:
            super().setup_optimizers(trainer)
            self._session.check_optimizers(self._module, self._check_optimizers())
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

    # ---- state

    @property
    def has_state(self) -> bool:
        """Whether a checkpoint holds what the strategy has learned: where the warm-up trains a part."""
        return self._session.trains != "all"

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the user's own state, with the weights as the forward sees them."""
        return self._session.plain_state(super().lightning_module_state_dict())

    def stream_state(self) -> dict[str, Any]:
        """Return what a warm-up of a part has learned."""
        return {"first_session": self._session.state(self._module)} if self.has_state else {}

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self._session.load(state.get("first_session"), self._module)

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
        self._session.end()
        if isinstance(self.model, DistributedDataParallel):
            self.model = module
        self._frozen = Frozen(module, shared=not self.single_device)  # batch statistics differ when a warm-up ends
        self.lr_scheduler_configs.clear()
        self._network = runnable(module)

    def teardown(self) -> None:
        """Give the module its gradients, modes and way of optimising back."""
        self._session.end(cut=True)
        if self._frozen is not None:
            self._frozen.thaw()
        self._frozen = None
        self._learning, self._network, self._loss = False, None, None
        super().teardown()

    # ---- one batch

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step during a warm-up, one forward without gradients afterwards."""
        if not self._learning:
            self._session.hold_still()
            loss = super().training_step(*args, **kwargs)
            self._session.check_still()
            return loss
        assert self._network is not None
        assert self._frozen is not None
        self._frozen.hold_still()
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
