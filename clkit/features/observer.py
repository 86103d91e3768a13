"""What a batch shows: features and logits read once for all callbacks of a trainer.

The first callback that hears of a batch opens the observation, the tap fills it during the forward that happens anyway,
and all of them read it. Within a batch the tap only reads and ``on_train_batch_end`` only writes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from clkit.distributed import share_buffers
from clkit.errors import BatchError, TapError
from clkit.features.batch import BatchReader, Readings
from clkit.features.calling import call
from clkit.features.origin import InputWatch
from clkit.features.repeats import mark_repeats
from clkit.features.tap import FeatureTap, Tapped, evaluating

__all__ = ["BatchObserver", "FeaturesFrom", "forward"]

FeaturesFrom = Literal["auto", "shared", "eval"]

_NOT_OWN = (
    "no forward of the step is given the batch's own inputs, so the first one, which may be of noise, of a mix or of a "
    "view, stands for the batch"
)


class BatchObserver:
    """Reads features, logits and targets of the batch in work; one per trainer, tapped layer and batch reader.

    Of several forwards in a step the first counts that is given the batch's own inputs, or a view of them: the features
    of noise, of a mix of samples or of an augmented view do not belong to the targets of the batch. What a strategy
    runs that says by ``stream_rows`` which rows are the stream's counts too.

    The tap is made by the first :meth:`refresh`, when ``setup`` and ``configure_model`` have built the network.

    Attributes:
        reader: The batch reader that was given for what it shows, if any.
        point: Where features are read, as :class:`~clkit.FeatureTap` names it; empty before the run begins.
        inputs: The batch's inputs as its reader found them.
        targets: The batch's targets (B,), or ``None`` where a batch to predict has none.
    """

    _of_trainer: ClassVar[WeakKeyDictionary[pl.Trainer, dict[Hashable, BatchObserver]]] = WeakKeyDictionary()

    def __init__(self, module: nn.Module, layer: str, readings: Readings, reader: BatchReader | None) -> None:
        self._module, self._layer, self._readings, self.reader = module, layer, readings, reader
        self.point = ""
        self._tap: FeatureTap | None = None
        self._watch = InputWatch()
        self._sensitive: list[nn.Module] = []
        self._users = 0
        self._refreshed: Hashable = None
        self._batch: Hashable = None
        self._armed = False  # a plain flag: compiled code would be compiled anew for each key it reads
        self._shared: Tapped | None = None  # of the batch's own forward, or of another one until that comes
        self._is_own = False
        self._live: Tensor | None = None  # features with their graph, until the batch is done
        self._wants_graph = False
        self._evaluated: Tensor | None = None  # features of the extra pass
        self._memo: dict[Hashable, Any] = {}
        self._trainer: pl.Trainer | None = None
        self._strategy: Any = None
        self._said: set[str] = set()
        self._left_out = False  # whether the step runs without some rows of the batch
        self.inputs: Any = None
        self.targets: Tensor | None = None

    @property
    def tap(self) -> FeatureTap:
        """The feature tap on the user's module.

        Raises:
            TapError: Before the run begins, when the module may not have built its network.
        """
        if self._tap is None:
            raise TapError(
                "the network is read from `on_fit_start` and from the start of an evaluation on: in `setup` the module "
                "may not have built it yet"
            )
        return self._tap

    # ---- one per trainer

    @classmethod
    def attach(cls, trainer: pl.Trainer, module: pl.LightningModule, part: Any) -> BatchObserver:
        """Return the observer of what a part reads, made by the first that asks (in ``setup``).

        Its ``layer`` says where features are read, ``"auto"`` for a part that does not say; its ``batch_reader`` how.
        """
        layer = getattr(part, "layer", "auto")
        readings = Readings.of(trainer)
        reader = readings.given(part)
        key = layer, id(reader)
        observers = cls._of_trainer.setdefault(trainer, {})
        if key not in observers:
            observers[key] = cls(module, layer, readings, reader)
        observers[key]._users += 1
        return observers[key]

    def detach(self, trainer: pl.Trainer) -> None:
        """Give the observer back; the last one removes every hook from the user's module."""
        self._users -= 1
        if self._users > 0:
            return
        if self._tap is not None:
            self._watch.close()
            self._tap.close()
        self.forget()
        observers = self._of_trainer.get(trainer, {})
        for key in [key for key, observer in observers.items() if observer is self]:
            del observers[key]

    def refresh(self, moment: Hashable = None) -> None:
        """Look for the classifier again; of several calls with the same ``moment`` the first looks."""
        if moment is not None and moment == self._refreshed:
            return
        if self._tap is None:
            self._tap = FeatureTap(self._module, self._layer)
            self._tap.listen(self._hear)
        self._tap.resolve()
        self.point = self._tap.point
        self._watch.follow(self._module, self._tap)
        self._refreshed = moment  # once it has looked: the next part is told what the first was
        self._sensitive = self._tap.mode_sensitive()
        if self._batch is not None:
            self.forget()

    # ---- one batch

    def open(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        batch: Any,
        key: Hashable,
        *,
        part: Any = None,
        source: FeaturesFrom = "shared",
        needs_targets: bool = True,
        graph: bool = False,
        loader: Any = None,
    ) -> None:
        """Begin a batch; every callback calls it with the same ``key`` before the step.

        Args:
            trainer: The trainer.
            module: The user's module.
            batch: The batch, on the module's device.
            key: What tells this batch from the last one; its own number is last.
            part: Whose reader reads the batch; see :class:`~clkit.features.batch.Readings`.
            source: ``"auto"`` reads the pass that happens anyway where it gives eval-mode features and pays one extra
                pass before the step otherwise; ``"shared"`` never pays; ``"eval"`` always does.
            needs_targets: Whether a batch without targets is an error.
            graph: Whether features will be asked for with their graph.
            loader: The plain loader that it comes from, which may give rows of it to another process, too.
        """
        if key != self._batch:
            self.inputs, targets = self._readings.read(part, batch, needs_targets=needs_targets, moment=key)
            if trainer.world_size > 1 and targets is not None:
                targets = mark_repeats(trainer, loader, key[-1] if isinstance(key, tuple) else 0, targets)
            self.targets = targets
            self._watch.begin(self.inputs, self.targets)
            self._batch = key
            self._armed = True
            self._shared = self._evaluated = self._live = None
            self._is_own = self._wants_graph = False
            self._memo.clear()
            self._trainer, self._strategy = trainer, trainer.strategy
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
            self.say_once(
                "the network trains with batch statistics, dropout or augmented images, so heads pay one "
                'extra eval-mode forward a batch; pass forward="shared" to learn from the training features instead'
            )
        if trainer.world_size > 1:
            share_buffers(trainer.strategy.model)
        self._evaluate(trainer, module)

    def settle(self, wanted: FeaturesFrom) -> None:
        """Pay the extra pass where no forward of the step was the batch's own; before the network moves, if possible.

        Processes need not agree: where features depend on buffers that move, all of them have paid before the step.
        """
        if wanted == "shared" or self._evaluated is not None or self._shared is None or self._counts():
            return
        self.say_once(
            "no forward of the step is given the batch's own inputs (it may be noise, a mix, a view, or a "
            "preprocessing), so heads pay one extra eval-mode forward of the inputs a batch. If what the step gives "
            'the network is the same for a sample each time, pass forward="shared"'
        )
        assert self._trainer is not None
        self._evaluate(self._trainer, self._trainer.lightning_module)

    def source(self, wanted: FeaturesFrom) -> Literal["shared", "eval"]:
        """Which pass answers: the extra one where there was one and it is wanted, else that which happens anyway."""
        return "eval" if wanted != "shared" and self._evaluated is not None else "shared"

    def has_rows(self, wanted: FeaturesFrom) -> bool:
        """Whether the pass that answers ran the batch's own rows; a step that runs views of them alone did not."""
        if self.source(wanted) == "eval" or self._shared is None or self._counts():
            return True
        changed = getattr(self._strategy, "augments_stream", False)
        return not changed and (self.targets is None or len(self._shared.features) == len(self.targets))

    @property
    def known_targets(self) -> Tensor:
        """The targets (B,) of a batch that has some."""
        assert self.targets is not None
        return self.targets

    def features(self, source: FeaturesFrom = "shared", *, graph: bool = False, whole: bool = False) -> Tensor:
        """Return the features (B, D) of the open batch, in the dtype of the forward pass.

        Args:
            source: Which pass they come from, as it was said to :meth:`open`.
            graph: Whether they carry their graph, for a loss that is added before the backward pass; they are those of
                the pass that happens anyway. Detached otherwise.
            whole: With ``graph``, whether rows that a strategy runs beside the batch are among them.

        Raises:
            BatchError: If another number of rows passed the tap than the batch has, or some were left out.
            TapError: If nothing passed it; or for ``graph=True`` where the batch was opened without, or is done.
        """
        if graph:
            if self._live is None:
                raise TapError(
                    f"features at {self.point!r} have no graph: the batch was not opened with graph=True, its "
                    "forward has not run, or it is done"
                )
            return self._live if whole else self._rows(self._live)
        if not self._is_own:
            self.settle(source)
        evaluated = source != "shared" and self._evaluated is not None
        if not evaluated and self._shared is not None and not (self._is_own or self._counts()):
            self.say_once(_NOT_OWN, rank_zero_warn)
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
                f"no features passed the tap at {self.point!r} in this batch: the step did not run the tapped "
                "network; pass `layer=`, the dotted path of a layer that it does run"
            )
        return rows if self.targets is None or len(rows) == len(self.targets) else self._rows(rows)

    @property
    def is_own(self) -> bool:
        """Whether a forward was heard that was given the batch's own inputs, or that the strategy vouches for."""
        return self._shared is not None and self._counts()

    @property
    def output_shape(self) -> tuple[int, ...] | None:
        """Shape of what the outermost call of that forward returned; ``None`` where that was no tensor."""
        return self._watch.shape

    @property
    def logits(self) -> Tensor | None:
        """The module's own classifier output (B, C), or ``None`` where it has no classifier or none was run."""
        if self._shared is None or self._shared.logits is None:
            return None
        if not self._counts():
            self.say_once(_NOT_OWN, rank_zero_warn)
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
            features = self.features(getattr(predictor, "forward", "auto"))
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
        self._watch.end()
        self._readings.end()
        self.inputs = self.targets = self._strategy = self._trainer = None

    # ----

    def _hear(self, tapped: Tapped) -> None:
        if not self._armed or FeatureTap.extracting:
            return
        own, self._watch.own = self._watch.own, False
        if own or self._shared is None:
            self._armed, self._is_own = not own, own
            logits = None if tapped.logits is None else tapped.logits.detach()
            self._shared = Tapped(tapped.features.detach(), logits)
            self._live = tapped.features if self._wants_graph else None

    def _counts(self) -> bool:
        """Whether the forward that was heard is the batch's own."""
        return self._is_own or self._stream_rows() is not None

    def _stream_rows(self) -> slice | None:
        """Return which rows of a training step's forward are the stream's, where the strategy says so.

        Asked when it is needed: a step may be of another size than the last.
        """
        training = self._trainer is not None and self._trainer.training
        return getattr(self._strategy, "stream_rows", None) if training else None

    def _evaluate(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Pay the extra pass, unless another observer of the layer has done so for these inputs."""
        for other in self._of_trainer.get(trainer, {}).values():
            same = other._batch == self._batch and other.inputs is self.inputs and other.tap.layer == self.tap.layer
            if same and other._evaluated is not None:
                self._evaluated = other._evaluated
                return
        self._evaluated = self.extract(trainer, module, self.inputs)

    def say_once(self, message: str, say: Callable[[str], None] = rank_zero_info) -> None:
        """Say something that concerns what is read, once in the life of the observer."""
        if message not in self._said:
            self._said.add(message)
            say(f"clkit: {message}")

    def _rows(self, tensor: Tensor) -> Tensor:
        if self.targets is None or tensor.shape[0] == self.targets.shape[0]:
            return tensor
        rows = self._stream_rows()
        if rows is not None:
            return tensor[rows]
        raise BatchError(
            f"the forward that was read at {self.point!r} had {len(tensor)} rows and the batch has "
            f"{len(self.targets)} targets; a strategy that runs more rows must say which are the stream's by "
            "`stream_rows`"
        )


def forward(module: pl.LightningModule, network: nn.Module, inputs: Any) -> Any:
    """Return the user's own ``forward``, or the tapped network where the module defines none."""
    if type(module).forward is not pl.LightningModule.forward:
        return call(module, inputs, ', or to a head forward="shared", which learns from what the training step runs')
    return call(network, inputs, ", or layer=, the dotted path of a layer of the part that takes them")
