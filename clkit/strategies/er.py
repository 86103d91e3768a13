"""Experience replay (ER)."""

from __future__ import annotations

from torch import Tensor

from clkit.methods.replay.step import Block, StepBatch, StepOutputs, cross_entropy
from clkit.strategies.replay import ReplayStrategy

__all__ = ["ERStrategy"]


class ERStrategy(ReplayStrategy):
    r"""Trains on the incoming batch and a random sample of the memory, by one cross-entropy over both (ER).

    With :math:`B` the incoming images, :math:`M` the replayed ones, all augmented, and :math:`p` the softmax of the
    logits:

    .. math:: L = -\frac{1}{|B| + |M|} \sum_{(x, y) \in B \cup M} \log p_y(x)

    With ``capacity=0`` it is plain fine-tuning. Its arguments are those of :class:`ReplayStrategy`.

    Example:
        >>> import lightning.pytorch as pl
        >>> trainer = pl.Trainer(accelerator="cpu", strategy=ERStrategy(capacity=500), logger=False)
        >>> trainer.strategy.memory.capacity
        500

    Source: A. Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", arXiv 1902.10486.
    """

    state_key = "er"
    segmented = False

    def views(self, batch: StepBatch) -> list[dict[str, Block]]:
        """Return one group: both parts, augmented."""
        return [{"new": batch.new, "memory": batch.replay}]

    def terms(self, outputs: StepOutputs) -> dict[str, tuple[float, Tensor]]:
        """Return one mean over the rows of both."""
        return {"ce": (1.0, cross_entropy(outputs.logits("new", "memory"), outputs.labels("new", "memory")))}
