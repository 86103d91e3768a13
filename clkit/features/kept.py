"""Evaluation features kept while the network stays as it is.

In later evaluations the network's ``forward`` answers with ``classifier(kept features)`` for the length of one step, so
the user's own ``validation_step`` and metrics see the same bits. A changed weight or buffer is noticed by its version,
and whoever changes the network otherwise announces it (:func:`clkit.stream.boundaries.backbone_changed`). For what
nobody announces, the first batch of each experience is computed afresh in each evaluation and compared, bit for bit:
the loader of a stream gives these batches before all others.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from clkit.features.tap import FeatureTap, Tapped

__all__ = ["KeptFeatures"]


class KeptFeatures:
    """Keeps at most ``limit`` bytes of features of evaluation batches and lets the network answer with them.

    Attributes:
        served: Batches that were answered from what was kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.served = 0
        self._features: dict[Hashable, list[Tensor]] = {}  # at the classifier, then at each of the others
        self._bytes = 0
        self._made_by: tuple[tuple[int, int], ...] = ()
        self._usable = True  # until the network is seen to do more with its features than its classifier says
        self._told = False
        self._warned = False
        self._compared: set[int] = set()  # experiences of which a batch was compared in this evaluation
        self._tap: FeatureTap | None = None
        self._others: list[FeatureTap] = []
        self._points: list[str] = []  # of the others
        self._heard_others: dict[int, Tensor] = {}
        self._calls = 0  # of the network in the batch in work
        self._hooks: list[Any] = []
        self._heard: Tapped | None = None
        self._overridden: nn.Module | None = None
        self._key: Hashable = None

    # ---- one evaluation

    def begin(self, module: pl.LightningModule, tap: FeatureTap, *others: FeatureTap) -> None:
        """Begin an evaluation, with nothing kept if the network is not the one that made it.

        Args:
            module: The user's module.
            tap: That of the network's classifier, which answers for the network.
            others: Further ones, to which what passed them is given again.
        """
        self._tap = tap if self.limit and _can_answer(module, tap, others) else None
        if self._tap is None:
            return
        points = [each.point for each in others]
        if points != self._points:
            self.clear()
            self._points = points
        made_by = _fingerprint(self._tap)
        if made_by != self._made_by:
            self.clear()
            self._made_by = made_by
        self._others = list(others)
        self._hooks = [
            tap.listen(self._hear),
            *(other.listen(partial(self._hear_other, index)) for index, other in enumerate(others)),
            tap.network.register_forward_hook(self._see),
        ]
        self._compared.clear()

    def end(self) -> None:
        """Give the network back: after the last batch, or where something went wrong."""
        self.after_batch()
        for hook in self._hooks:
            hook.remove()
        self._tap, self._others, self._hooks = None, [], []

    # ---- one batch

    def before_batch(self, experience: int, rows: Any) -> None:
        """Have the network answer with what was kept of these rows of an experience, if known and if anything was."""
        self._key = None if rows is None else (experience, len(rows), int(rows[0]), int(rows[-1]))
        self._heard, self._heard_others, self._calls = None, {}, 0
        if self._tap is None or self._key is None or self._key not in self._features:
            return
        if experience not in self._compared:
            self._compared.add(experience)
            return  # the network runs, and `after_batch` compares
        classifier, network = self._tap.classifier, self._tap.network
        kept, *kept_of_others = self._features[self._key]

        def answer(*args: Any, **kwargs: Any) -> Any:
            for other, features in zip(self._others, kept_of_others, strict=True):
                other.deliver(features)
            return _classified(classifier, kept)

        self._overridden = network
        network.forward = answer

    def _drop(self) -> None:
        self._features.clear()
        self._bytes = 0
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                "clkit: evaluation features that were kept differ from fresh ones, so all are computed again. The "
                "network changed without a change of its weights (an attribute, a mode, a hook); announce such changes "
                "by clkit.stream.boundaries.backbone_changed, or set StreamEvaluation(keep_features=0)"
            )

    def after_batch(self, own: bool = True) -> None:
        """Give the network its own forward back, and keep what a real one gave.

        Args:
            own: Whether the network was given the batch's own inputs, of which alone anything is kept.
        """
        if self._overridden is not None:
            del self._overridden.forward  # the class's own shows through again
            self._overridden = None
            self.served += 1
        elif self._key is not None and self._calls:
            fresh, kept = self._fresh() if own and self._usable else None, self._features.get(self._key)
            if kept is not None and not (fresh and all(map(_same, kept, fresh))):
                self._drop()
                kept = None
            if kept is None and fresh:
                self._keep(fresh)
        self._key = self._heard = None

    def _fresh(self) -> list[Tensor] | None:
        """Return what a forward showed at the classifier and at the others; ``None`` where that is not all."""
        parts = [self._heard and self._heard.features, *map(self._heard_others.get, range(len(self._others)))]
        known = [part for part in parts if part is not None]
        # of several forwards with inputs of their own, one answer cannot serve all
        return known if self._calls == 1 and len(known) == len(parts) else None

    def clear(self) -> None:
        """Let go of everything."""
        self._features.clear()
        self._bytes, self._usable, self._made_by = 0, True, ()

    # ----

    def _hear(self, tapped: Tapped) -> None:
        if self._heard is None:
            self._heard = tapped

    def _hear_other(self, index: int, tapped: Tapped) -> None:
        self._heard_others.setdefault(index, tapped.features)

    def _see(self, network: nn.Module, args: Any, output: Any) -> None:
        self._calls += 1  # of several one answer cannot be that of all
        # in the forward itself, where autocast is as it will be when the kept features answer
        first = not self._features or self._key in self._features  # of an evaluation, or of one of its experiences
        if self._usable and first and self._overridden is None and self._heard is not None:
            assert self._tap is not None
            self._usable = _answers(self._tap.classifier, self._heard.features, output)

    def _keep(self, features: list[Tensor]) -> None:
        features = [each.detach().clone() for each in features]
        size = sum(each.numel() * each.element_size() for each in features)
        if self._bytes + size > self.limit:
            if not self._told:
                self._told = True
                rank_zero_info(
                    f"clkit: {self._bytes / 2**20:.0f} MiB of evaluation features are kept, which is the limit; the "
                    "rest is computed at each evaluation (StreamEvaluation(keep_features=MiB) sets it)"
                )
            return
        self._features[self._key] = features
        self._bytes += size


def _can_answer(module: pl.LightningModule, tap: FeatureTap, others: Sequence[FeatureTap]) -> bool:
    """Only a network inside the user's module, with weights, called as it is, of which others read what is kept too."""
    network = tap.network
    own = [] if tap.classifier is None else list(tap.classifier.modules())
    for other in others:  # what is inside the classifier, or around it, changes with it
        if other.network is not network or any(
            part in own or any(inner is tap.classifier for inner in part.modules()) for part in other.layers
        ):
            return False
    return (
        network is not module
        and not isinstance(tap.classifier, nn.ModuleList)  # several classifiers side by side
        and not hasattr(network, "_orig_mod")  # compiled: its graph would be compiled anew
        and "forward" not in vars(network)
        and any(True for _ in network.parameters())
        and not any(tensor.is_inference() for tensor in _tensors(network))  # these do not tell when they are written to
    )


def _fingerprint(tap: FeatureTap) -> tuple[tuple[int, int], ...]:
    """Change when a parameter or buffer outside the classifier is replaced or written to."""
    own = set() if tap.classifier is None else {id(tensor) for tensor in _tensors(tap.classifier)}
    return tuple((id(tensor), tensor._version) for tensor in _tensors(tap.network) if id(tensor) not in own)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _classified(classifier: nn.Module | None, features: Tensor) -> Tensor:
    """Return the network's answer to features (B, D), which the tap flattens before a convolutional classifier."""
    if classifier is None:
        return features
    if isinstance(classifier, nn.Conv2d):
        return torch.flatten(classifier(features[:, :, None, None]), 1)
    logits: Tensor = classifier(features)
    return logits


def _same(kept: Tensor, fresh: Tensor) -> bool:
    return kept.dtype == fresh.dtype and torch.equal(kept.nan_to_num(), fresh.nan_to_num())


def _answers(classifier: nn.Module | None, features: Tensor, output: Any) -> bool:
    """Whether classifier(features) is the network's output, bit for bit."""
    answer = _classified(classifier, features)
    return isinstance(output, Tensor) and answer.dtype == output.dtype and torch.equal(answer, output)
