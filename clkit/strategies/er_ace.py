"""ER with asymmetric cross-entropy (ER-ACE)."""

from __future__ import annotations

import torch
from torch import Tensor

from clkit.methods.replay.step import StepOutputs, cross_entropy
from clkit.strategies.er import ERStrategy

__all__ = ["ERACEStrategy"]


class ERACEStrategy(ERStrategy):
    r"""Experience replay in which incoming images compete only with the classes of their own batch (ER-ACE).

    So a new class does not push away the features of old ones. With :math:`z` the logits, :math:`C_B` the classes of
    the incoming batch :math:`B` and :math:`C` all of them:

    .. math::
        L = -\frac{1}{|B|} \sum_{(x, y) \in B} \log \frac{\exp z_y(x)}{\sum_{c \in C_B} \exp z_c(x)}
            -\frac{1}{|M|} \sum_{(x, y) \in M} \log \frac{\exp z_y(x)}{\sum_{c \in C} \exp z_c(x)}

    Its arguments are those of :class:`ReplayStrategy`.

    Example:
        >>> ERACEStrategy(capacity=500, replay_batch=10).memory.capacity
        500

    Source: L. Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR
    2022.
    """

    state_key = "er_ace"

    def terms(self, outputs: StepOutputs) -> dict[str, tuple[float, Tensor]]:
        """Return a mean over the incoming images, among their classes, and one over the replayed ones."""
        logits = outputs.logits("new")
        present, targets = torch.unique(outputs.labels("new"), return_inverse=True)
        return {
            "ce_new": (1.0, cross_entropy(logits[:, present.to(logits.device)], targets)),
            "ce_mem": (1.0, cross_entropy(outputs.logits("memory"), outputs.labels("memory"))),
        }
