"""Dark experience replay (DER++)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clkit.arguments import check_arguments
from clkit.methods._checks import check_number
from clkit.methods.replay.step import Block, StepBatch, StepOutputs, cross_entropy
from clkit.strategies.replay import SECOND, ReplayStrategy

__all__ = ["DERPPStrategy"]


class DERPPStrategy(ReplayStrategy):
    r"""Replays images with the logits that the network once gave for them (DER++).

    With :math:`h(x)` the logits, :math:`z` those that were stored with a replayed image when it came, :math:`C` the
    number of classes, and :math:`M, M'` two samples of the memory:

    .. math::
        L = -\frac{1}{|B|} \sum_{(x, y) \in B} \log p_y(x)
            + \frac{\alpha}{C |M|} \sum_{(x, z) \in M} \lVert z - h(x) \rVert^2
            - \frac{\beta}{|M'|} \sum_{(x, y) \in M'} \log p_y(x)

    Args:
        capacity: M, images kept with their logits.
        alpha: Weight of the distance to the stored logits; the default is that of the authors for CIFAR-10 with 200
            images, as that of ``beta``.
        beta: Weight of the cross-entropy on a second sample of the memory.
        options: Further arguments of :class:`ReplayStrategy`.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> DERPPStrategy(capacity=500, alpha=0.3).settings
        {'alpha': 0.3, 'beta': 0.5}

    Source: P. Buzzega et al., "Dark Experience for General Continual Learning", NeurIPS 2020.
    """

    state_key = "der_pp"
    extra_names = ("logits",)

    def __init__(self, capacity: int = 200, *, alpha: float = 0.1, beta: float = 0.5, **options: Any) -> None:
        check_arguments(DERPPStrategy, locals())
        super().__init__(capacity, **options)
        self.alpha = check_number("alpha", alpha, at_least=0)
        self.beta = check_number("beta", beta, at_least=0)
        self.settings = {"alpha": self.alpha, "beta": self.beta}

    def views(self, batch: StepBatch) -> list[dict[str, Block]]:
        """Return three groups: the incoming images, a sample with its stored logits, another with its classes."""
        stored = batch.replay._replace(labels=batch.extras["logits"])
        _, again = self.drawn(batch.new, batch.wanted, SECOND)
        return [{"new": batch.new}, {"logit": stored}, {"logit_ce": again}]

    def terms(self, outputs: StepOutputs) -> dict[str, tuple[float, Tensor]]:
        """Return the cross-entropy, the squared distance to the stored logits, and the second cross-entropy."""
        now = outputs.logits("logit")
        stored = outputs.labels("logit").to(now)
        return {
            "ce_new": (1.0, cross_entropy(outputs.logits("new"), outputs.labels("new"))),
            "logit": (self.alpha, (now - stored).square().mean() if len(now) else now.sum()),
            "logit_ce": (self.beta, cross_entropy(outputs.logits("logit_ce"), outputs.labels("logit_ce"))),
        }

    def remember(self, outputs: StepOutputs) -> dict[str, Tensor]:
        """Return the logits of the incoming images."""
        return {"logits": outputs.logits("new").detach().float()}
