"""What a batch shows: features and logits read once for all callbacks of a trainer.

The first callback that hears of a batch opens the observation, the tap fills it during the forward that happens anyway,
and all of them read it. Within a batch the tap only reads and ``on_train_batch_end`` only writes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from clkit.distributed import share_buffers
from clkit.errors import BatchError, TapError
from clkit.features.batch import BatchReader, read_batch, read_inputs
from clkit.features.tap import FeatureTap, Tapped, evaluating

__all__ = ["BatchObserver", "FeaturesFrom", "forward"]

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
        self._evaluated: Tensor | None = None  # features of the extra pass
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
        self._of_trainer.get(trainer, {}).pop(self.tap.layer, None)

    def refresh(self, moment: Hashable = None) -> None:
        """Look for the classifier again; of several calls with the same ``moment`` the first looks."""
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
            source: ``"auto"`` reads the pass that happens anyway where it gives eval-mode features and pays one extra
                pass before the step otherwise; ``"shared"`` never pays; ``"eval"`` always does.
            reader: The user's batch reader, if any.
            needs_targets: Whether a batch without targets is an error.
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
            self._left_out = False
            if trainer.training and getattr(self._strategy, "skips_unlabelled", False) and self.targets is not None:
                self._left_out = not len(self.targets) or bool((self.targets == -1).any())
        self._wants_graph |= graph
        if source == "shared" or self._evaluated is not None:
            return
        if source == "auto" and not self._left_out:
            augments = getattr(self._strategy, "augments_stream", False)
            if not augments and not any(module.training for module in self._sensitive):
                return  # the pass that happens anyway gives the same features
            if not self._told:
                self._told = True
                rank_zero_info(
                    "clkit: the network trains with batch statistics, dropout or augmented images, so heads pay one "
                    'extra eval-mode forward a batch; pass forward="shared" to learn from the training features instead'
                )
        if trainer.world_size > 1:
            share_buffers(trainer.strategy.model)
        self._evaluated = self.extract(trainer, module, self.inputs)

    def source(self, wanted: FeaturesFrom) -> Literal["shared", "eval"]:
        """Which pass answers: the extra one where there was one and it is wanted, else that which happens anyway."""
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
            BatchError: If another number of rows passed the tap than the batch has, or some were left out.
            TapError: If nothing passed it; or for ``graph=True`` where the batch was opened without, or is done.
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
        rows = self._evaluated
        if not evaluated:
            rows = None if self._shared is None else self._shared.features
        if rows is None:
            raise TapError(
                f"no features passed the tap at {self.tap.point!r} in this batch: the step did not run the tapped "
                "network; pass `layer=`, the dotted path of a layer that it does run"
            )
        return rows if self.targets is None or len(rows) == len(self.targets) else self._rows(rows)

    @property
    def logits(self) -> Tensor | None:
        """The module's own classifier output (B, C), or ``None`` where it has no classifier or none was run."""
        if self._shared is None or self._shared.logits is None:
            return None
        return self._rows(self._shared.logits)

    def extract(self, trainer: pl.Trainer, module: pl.LightningModule, inputs: Any) -> Tensor:
        """Features (B, D) of other inputs, in eval mode and without gradients; the open batch stays as it is.

        With several processes call :func:`~clkit.distributed.share_buffers` before the first.
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

    def scores(self, predictor: Any) -> Tensor:
        """Return the scores (B, C), float64, that a predictor gives for the open batch."""
        key = ("scores", predictor.name)
        if key not in self._memo:
            features = self.features()
            # in float64, so that two classes that differ by less than float32 can tell are still told apart
            wide = features if features.device.type == "mps" else features.double()
            self._memo[key] = predictor.scores(wide).double()
        scores: Tensor = self._memo[key]
        return scores

    def forget(self) -> None:
        """Let go of the batch, so that nothing outlives a run."""
        self._batch, self._armed = None, False
        self._shared = self._evaluated = self._live = None
        self._memo.clear()
        self.inputs = self.targets = self._strategy = None

    # ----

    def _hear(self, tapped: Tapped) -> None:
        if self._armed:  # of several forwards in a batch the first counts
            self._armed = False
            logits = None if tapped.logits is None else tapped.logits.detach()
            self._shared = Tapped(tapped.features.detach(), logits)
            self._live = tapped.features if self._wants_graph else None

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


def forward(module: pl.LightningModule, network: nn.Module, inputs: Any) -> Any:
    """Return the user's own ``forward``, or the tapped network where the module defines none."""
    own = type(module).forward is not pl.LightningModule.forward
    return module(inputs) if own else network(inputs)
