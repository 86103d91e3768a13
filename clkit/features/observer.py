"""What a batch shows: features and logits read once for all callbacks of a trainer.

Seven callbacks cost one pass through the backbone: the first one that hears of a batch opens the observation, the tap
fills it during the forward that happens anyway, and all of them read it. Within a batch the tap only reads and
``on_train_batch_end`` only writes, so a reader never meets a head that has already learned the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import ExitStack
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from clkit.distributed import share_buffers
from clkit.errors import BatchError, TapError
from clkit.features.batch import BatchReader, read_batch, read_inputs
from clkit.features.tap import FeatureTap, Tapped

__all__ = ["BatchObserver", "FeaturesFrom"]

FeaturesFrom = Literal["auto", "shared", "eval"]


class BatchObserver:
    """Reads features, logits and targets of the batch in work; one per trainer and tapped layer.

    Attributes:
        tap: The feature tap on the user's module.
        inputs: The batch's inputs as its reader found them.
        targets: The batch's targets (B,), or ``None`` where a batch to predict has none.
    """

    _of_trainer: ClassVar[WeakKeyDictionary[pl.Trainer, dict[str, BatchObserver]]] = WeakKeyDictionary()

    def __init__(self, module: nn.Module, layer: str) -> None:
        self.tap = FeatureTap(module, layer)
        self._handle = self.tap.listen(self._hear)
        self._sensitive: list[nn.Module] = self.tap.mode_sensitive()
        self._users = 0
        self._refreshed: Hashable = None
        self._batch: Hashable = None
        self._armed = False  # a plain flag: compiled code would be compiled anew for each key it reads
        self._shared: Tapped | None = None
        self._live: Tensor | None = None  # features with their graph, until the batch is done
        self._wants_graph = False
        self._evaluated: Tapped | None = None
        self._memo: dict[Hashable, Any] = {}
        self._strategy: Any = None
        self._told = False
        self._left_out = False  # whether the step runs without some rows of the batch
        self.inputs: Any = None
        self.targets: Tensor | None = None

    # ---- one per trainer

    @classmethod
    def attach(cls, trainer: pl.Trainer, module: pl.LightningModule, layer: str = "auto") -> BatchObserver:
        """Return the observer of a trainer and layer, made by the first callback that asks (in ``setup``)."""
        observers = cls._of_trainer.setdefault(trainer, {})
        if layer not in observers:
            observers[layer] = cls(module, layer)
        observers[layer]._users += 1
        return observers[layer]

    def detach(self, trainer: pl.Trainer) -> None:
        """Give the observer back; the last one removes every hook from the user's module."""
        self._users -= 1
        if self._users > 0:
            return
        self._handle.remove()
        self.tap.close()
        self.forget()
        observers = self._of_trainer.get(trainer, {})
        for layer in [name for name, observer in observers.items() if observer is self]:
            del observers[layer]

    def refresh(self, moment: Hashable = None) -> None:
        """Look for the classifier again, at each start of fitting or evaluating and after it was replaced.

        Args:
            moment: What tells this moment from others; of several calls with the same one the first looks.
        """
        if moment is not None and moment == self._refreshed:
            return
        self._refreshed = moment
        self.tap.resolve()
        self._sensitive = self.tap.mode_sensitive()
        self.forget()

    # ---- one batch

    def open(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batch: Any,
        key: Hashable,
        *,
        source: FeaturesFrom = "shared",
        reader: BatchReader | None = None,
        needs_targets: bool = True,
        graph: bool = False,
    ) -> None:
        """Begin a batch; every callback calls it with the same ``key`` before the step.

        Args:
            trainer: The trainer.
            module: The user's module.
            batch: The batch, on the module's device.
            key: What tells this batch from the last one.
            source: Where features should come from. ``"auto"`` takes the pass that happens anyway when it gives
                eval-mode features and pays one extra pass before the step otherwise; ``"shared"`` never pays;
                ``"eval"`` always does.
            reader: The user's batch reader, if any.
            needs_targets: Whether a batch without targets is an error; prediction needs none.
            graph: Whether features will be asked for with their graph.
        """
        if key != self._batch:
            self._batch = key
            self._armed = True
            self._shared = self._evaluated = self._live = None
            self._wants_graph = False
            self._memo.clear()
            self.inputs, self.targets = read_batch(batch, reader) if needs_targets else read_inputs(batch, reader)
            self._strategy = trainer.strategy
            skips = trainer.training and getattr(self._strategy, "skips_unlabelled", False)
            self._left_out = skips and self.targets is not None and self._leaves_out(self.targets)
        self._wants_graph |= graph
        if self._evaluated is None and (source == "eval" or (source == "auto" and (self._left_out or self._differs()))):
            if source == "auto" and not self._told and not self._left_out:
                self._told = True
                rank_zero_info(
                    "clkit: the network trains with batch statistics, dropout or augmented images, so heads pay one "
                    'extra eval-mode forward a batch; pass forward="shared" to learn from the training features instead'
                )
            self._evaluated = self._extra_pass(trainer, module)

    def source(self, wanted: FeaturesFrom) -> Literal["shared", "eval"]:
        """Which pass answers: the extra one, where there was one and it is wanted, or that which happens anyway."""
        return "eval" if wanted != "shared" and self._evaluated is not None else "shared"

    @property
    def known_targets(self) -> Tensor:
        """The targets (B,) of a batch that has some."""
        assert self.targets is not None
        return self.targets

    def features(self, source: FeaturesFrom = "shared", *, graph: bool = False) -> Tensor:
        """Return the features (B, D) of the open batch, in the dtype of the forward pass.

        Args:
            source: Which pass they come from, as it was said to :meth:`open`.
            graph: Whether they carry their graph, for a loss that is added before the backward pass; they are those of
                the pass that happens anyway. Detached otherwise.

        Raises:
            TapError: If nothing passed the tap, or another number of rows than the batch has; or for ``graph=True``
                where the batch was opened without, or is done.
        """
        if graph:
            if self._live is None:
                raise TapError(
                    f"features at {self.tap.point!r} have no graph: the batch was not opened with graph=True, its "
                    "forward has not run, or it is done"
                )
            return self._rows(self._live)
        evaluated = source != "shared" and self._evaluated is not None
        if self._left_out and not evaluated:
            raise BatchError(
                "the batch has rows without a label, which the step of this strategy leaves out of its forward; "
                'pass forward="auto", which runs such a batch once more'
            )
        tapped = self._evaluated if evaluated else self._shared
        if tapped is None:
            raise TapError(
                f"no features passed the tap at {self.tap.point!r} in this batch: the step did not run the tapped "
                "network; pass `layer=`, the dotted path of a layer that it does run"
            )
        rows = tapped.features
        return rows if self.targets is None or len(rows) == len(self.targets) else self._rows(rows)

    @property
    def logits(self) -> Tensor | None:
        """The module's own classifier output (B, C), or ``None`` where it has no classifier or none was run."""
        if self._shared is None or self._shared.logits is None:
            return None
        return self._rows(self._shared.logits)

    def extract(self, trainer: pl.Trainer, module: pl.LightningModule, inputs: Any) -> Tensor:
        """Features (B, D) of inputs of one's own, in eval mode and without gradients; the open batch stays as it is.

        Call :func:`~clkit.distributed.share_buffers` before the first, with several processes.
        """
        with evaluating(module), trainer.precision_plugin.forward_context():
            return self.tap.extract(inputs, lambda given: forward(module, self.tap.network, given))

    def release_graph(self) -> None:
        """Let go of the graph of the open batch: its step is done."""
        self._live = None

    def remember(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return a value computed once for the open batch, whoever asks first."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def forget(self) -> None:
        """Lets go of the batch, so that nothing outlives a run."""
        self._batch, self._armed = None, False
        self._shared = self._evaluated = self._live = None
        self._memo.clear()
        self.inputs = self.targets = self._strategy = None

    # ----

    def _hear(self, tapped: Tapped) -> None:
        if self._armed:  # of several forwards in a batch the first counts
            self._armed = False
            self._shared = _detached(tapped)
            self._live = tapped.features if self._wants_graph else None

    @staticmethod
    def _leaves_out(targets: Tensor) -> bool:
        return not len(targets) or bool((targets == -1).any())

    def _differs(self) -> bool:
        augments = getattr(self._strategy, "augments_stream", False)
        return augments or any(module.training for module in self._sensitive)

    def _rows(self, tensor: Tensor) -> Tensor:
        if self.targets is None or tensor.shape[0] == self.targets.shape[0]:
            return tensor
        rows = getattr(self._strategy, "stream_rows", None)  # asked now: a step may be of another size than the last
        if rows is not None:
            return tensor[rows]
        raise BatchError(
            f"the tapped forward had {len(tensor)} rows and the batch has {len(self.targets)} targets; a strategy that "
            "runs more rows must say which are the stream's by `stream_rows`"
        )

    def _extra_pass(self, trainer: pl.Trainer, module: pl.LightningModule) -> Tapped:
        share_buffers(trainer.strategy.model)
        heard: list[Tapped] = []
        listener = self.tap.listen(lambda tapped: heard.append(_detached(tapped)))
        armed, self._armed = self._armed, False  # this pass is not the one that happens anyway
        try:
            with evaluating(module), torch.no_grad(), trainer.precision_plugin.forward_context():
                forward(module, self.tap.network, self.inputs)
        finally:
            listener.remove()
            self._armed = armed
        if not heard:
            raise TapError(
                f"no features passed the tap at {self.tap.point!r} in an evaluation forward; pass `layer=`, the dotted "
                "path of a layer that the module's forward runs"
            )
        return heard[0]


def forward(module: pl.LightningModule, network: nn.Module, inputs: Any) -> Any:
    """Return the user's own ``forward``, or the tapped network where the module defines none."""
    own = type(module).forward is not pl.LightningModule.forward
    return module(inputs) if own else network(inputs)


class evaluating(ExitStack):  # noqa: N801  a context manager, named as torch.no_grad is
    """Puts a module into eval mode and gives every submodule its own mode back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._training = [part for part in module.modules() if part.training]
        self.callback(self._restore)
        module.eval()

    def _restore(self) -> None:
        for part in self._training:
            part.training = True


def _detached(tapped: Tapped) -> Tapped:
    logits = None if tapped.logits is None else tapped.logits.detach()
    return Tapped(tapped.features.detach(), logits)
