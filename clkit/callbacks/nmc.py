"""NMC: the nearest-class-mean baseline on the features of any network."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl

from clkit.arguments import check_arguments
from clkit.callbacks.base import Stage
from clkit.callbacks.head import HeadCallback
from clkit.distributed import gather_objects, share_buffers
from clkit.errors import ArgumentError, ConfigurationError
from clkit.methods import NearestMeanHead
from clkit.stream._lightning import trained_batches
from clkit.stream.experience import Experience

__all__ = ["NMC"]

_ROWS = 256  # of the memory in one pass


class NMC(HeadCallback):
    r"""Keeps one mean feature a class and predicts the class of the nearest mean: the floor to beat.

    Choose it as the baseline of every continual run on a pretrained backbone: it needs no setting and is not disturbed
    by class imbalance or extra epochs. Not where features of a class are far from round; see
    :class:`~clkit.callbacks.LDA` and :class:`~clkit.callbacks.AEFOCL`.

    .. math:: \hat y(x) = \arg\min_c \lVert g(x) - M_c \rVert_2, \qquad M_c = \frac{1}{n_c} \sum_{y_i = c} g(x_i)

    with :math:`g` the L2-normalised feature and means that are not normalised again (``metric="janson"``).

    Means of a network that still trains grow old. Where the strategy replays a memory of the stream, choose
    ``memory="replay"``: no batch is learned, the means are those of the memory's rows, read anew with the network as it
    is at the end of each experience, and for an evaluation in between. This is the read-out of SCR and of other
    contrastive learners, whose classifier is not trained.

    Args:
        metric: ``"janson"``; ``"euclidean"``: nothing is normalised; ``"icarl"``: the means are normalised too;
            ``"cosine"``: cosine to the mean of raw features (SimpleCIL).
        memory: ``None``: the means of all batches of the stream; ``"replay"``: of the rows in the strategy's replay
            memory, ``strategy.memory``.
        max_classes: Ids at or above are refused before anything is allocated.
        name: Prefix of what is logged, and part of the key in checkpoints.
        options: Further arguments of :class:`HeadCallback`: ``layer``, ``forward``, ``batch_reader``, ``graft``,
            ``reset_each_task`` and ``epochs``.

    Raises:
        ArgumentError: If an argument is out of its range, or says how to learn batches beside ``memory="replay"``.
        ConfigurationError: When a fit begins, if ``memory="replay"`` and the strategy has no memory.

    Example:
        >>> from clkit.callbacks import NMC
        >>> NMC(metric="cosine", name="simple_cil").state_key
        'NMC(simple_cil)'

    Reference:
        P. Janson et al., "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning",
        NeurIPS 2022 Workshop on Distribution Shifts, arXiv 2210.04428. Means of a replay memory: Z. Mai et al.,
        "Supervised Contrastive Replay", CVPR Workshops 2021, arXiv 2103.13885.
    """

    def __init__(
        self,
        metric: Literal["janson", "euclidean", "icarl", "cosine"] = "janson",
        *,
        memory: Literal["replay"] | None = None,
        max_classes: int = 65_536,
        name: str = "nmc",
        **options: Any,
    ) -> None:
        check_arguments(NMC, locals())
        super().__init__(name=name, **options)
        if memory and (self.forward != "auto" or self.reset_each_task or self.epochs != "all"):
            raise ArgumentError(
                f"memory='replay' learns no batches, so forward={self.forward!r}, epochs={self.epochs!r} and "
                f"reset_each_task={self.reset_each_task!r} would say nothing; leave them out"
            )
        self.metric = metric
        self.memory = memory
        self.max_classes = max_classes
        self._read_at: int | None = None  # training batches done when the memory was read for `head`
        self.make_head(1)  # a wrong argument is an error now, not after the first batch

    def make_head(self, in_features: int) -> NearestMeanHead:
        """Return a nearest-mean head of these settings."""
        return NearestMeanHead(in_features, metric=self.metric, max_classes=self.max_classes)

    # ---- means of a replay memory

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Look for the strategy's memory, where the means shall be those of its rows."""
        super().setup(trainer, pl_module, stage)
        self._read_at = None
        memory = getattr(trainer.strategy, "memory", None)
        if self.memory and stage == "fit" and not all(hasattr(memory, name) for name in ("sample", "class_counts")):
            raise ConfigurationError(
                f"{self.state_key} with memory='replay' reads the replay memory of the strategy, and "
                f"{type(trainer.strategy).__name__} has none; use a strategy that replays with a capacity of at least "
                "1, or leave memory out to learn the means of the stream"
            )

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Forget the last experience where the user asked for that; means of a memory are made anew anyway."""
        if not self.memory:
            super().on_experience_start(trainer, pl_module, experience)

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Sum over processes or read the memory, and graft where the user asked for that."""
        self._learn_memory(trainer, pl_module)
        super().on_experience_end(trainer, pl_module, experience)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sum over processes or read the memory, and graft where the user asked for that."""
        self._boundaries.on_train_end(trainer, pl_module)  # an end that nothing noticed comes first
        if self._read_at != trained_batches(trainer):
            self._learn_memory(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def learns(self, trainer: pl.Trainer) -> bool:
        """Whether the batch in work is learned; none is where the means are those of a memory."""
        return not self.memory and super().learns(trainer)

    def on_evaluation_start(self, trainer: pl.Trainer, module: pl.LightningModule, stage: Stage) -> None:
        """Begin the running accuracy; where a memory has changed since it was read, read it anew."""
        super().on_evaluation_start(trainer, module, stage)
        if self.memory and trainer.state.fn == "fit" and self._read_at != trained_batches(trainer):
            # for this evaluation alone: what is learned does not depend on how often somebody looks
            self._evaluated_head = self._head_of_memory(trainer, module)

    def _learn_memory(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if not self.memory:
            return
        self._head = self._head_of_memory(trainer, module)
        self._read_at = trained_batches(trainer)
        self._learned_in_fit = self._learned_in_fit or self._head is not None

    def _head_of_memory(self, trainer: pl.Trainer, module: pl.LightningModule) -> NearestMeanHead | None:
        """Return a new head that has learned the memory's rows in stored order; none where it is empty."""
        strategy: Any = trainer.strategy
        memory = strategy.memory  # looked for in `setup`
        size = sum(memory.class_counts().values())
        parts = getattr(strategy, "memory_scope", "replicated") == "sharded"
        if not (sum(gather_objects(size, "how much they remember")) if parts else size):
            return None
        share_buffers(strategy.model)
        head: NearestMeanHead | None = None
        rows = memory.sample(size) if size else None  # all of them, so that nothing is drawn
        for data, label in () if rows is None else zip(rows.data.split(_ROWS), rows.label.split(_ROWS), strict=True):
            inputs = trainer.precision_plugin.convert_input(data).to(module.device)
            features = self.observer.extract(trainer, module, inputs)
            if head is None:
                head = self.make_head(features.shape[1]).to(features.device)
            head.update(features, label)
        self._tap_point = self.observer.point
        if parts:  # each process adds the rows of its own part
            width = max(gather_objects(0 if head is None else head.in_features, "the width of their features"))
            head = self.make_head(width).to(module.device) if head is None else head
            head.synchronize()
            return head
        assert head is not None
        # each process has the whole memory: loaded sums are those of all of them, to which none adds its own
        whole = self.make_head(head.in_features).to(features.device)
        whole.load_state_dict(head.state_dict())
        return whole
