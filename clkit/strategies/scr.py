"""Supervised contrastive replay (SCR)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clkit.arguments import check_arguments
from clkit.methods._checks import check_number
from clkit.methods.replay.contrast import supervised_contrast
from clkit.methods.replay.step import Block, StepBatch, StepOutputs
from clkit.strategies._forward import Projection
from clkit.strategies.replay import ReplayStrategy

__all__ = ["SCRStrategy"]


class SCRStrategy(ReplayStrategy):
    r"""Contrasts incoming and replayed images, and one augmented view of each, by their classes (SCR).

    The loss is :func:`~clkit.methods.supervised_contrast` of what the projector gives for all views. The classifier is
    not trained: predict by ``NMC(memory="replay")``.

    Args:
        capacity: M, images kept.
        temperature: :math:`\tau`.
        projection: The embedding beside the classifier, two layers by default.
        options: Further arguments of :class:`ReplayStrategy`.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> SCRStrategy(capacity=500, projection=Projection("linear", dim=64)).projection.dim
        64

    Source: Z. Mai et al., "Supervised Contrastive Replay", CVPR Workshops 2021.
    """

    state_key = "scr"

    def __init__(
        self,
        capacity: int = 200,
        *,
        temperature: float = 0.07,
        projection: Projection = Projection("mlp"),
        **options: Any,
    ) -> None:
        check_arguments(SCRStrategy, locals())
        super().__init__(capacity, **options)
        self.temperature = check_number("temperature", temperature, above=0)
        self.projection = projection
        self.settings = {"temperature": self.temperature}
        self.augments_stream = False  # the incoming images also go through the network as they are

    def views(self, batch: StepBatch) -> list[dict[str, Block]]:
        """Return two groups: all images as they came, and augmented."""
        plain = {"new1": batch.new.plain, "memory1": batch.replay.plain}
        return [plain, {"new2": batch.new, "memory2": batch.replay}]

    def terms(self, outputs: StepOutputs) -> dict[str, tuple[float, Tensor]]:
        """Return the contrast."""
        first, second = outputs.embeddings("new1", "memory1"), outputs.embeddings("new2", "memory2")
        loss = supervised_contrast(first, second, outputs.labels("new1", "memory1"), self.temperature)
        return {"contrast": (1.0, loss)}
