"""Evaluation features kept while the network stays as it is.

In later evaluations the network's ``forward`` answers with ``classifier(kept features)`` for the length of one step, so
the user's own ``validation_step`` and metrics see the same bits. A changed weight or buffer is noticed by its version,
and whoever changes the network otherwise announces it (:func:`clkit.stream.boundaries.backbone_changed`). For what
nobody announces, some rows of each experience's first batch are run alone when it is kept and again in each evaluation,
and compared bit for bit: the loader of a stream gives these batches before all others.

Where a callback shows each experience a network of its own, that callback says which networks are still the same.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from clkit.features.tap import FeatureTap, Tapped

__all__ = ["KeptFeatures"]

_SOME = 8  # rows of a batch that are run again
_APART = 16  # at most, in a large batch, of which more rows are run


class KeptFeatures:
    """Keeps at most ``limit`` bytes of features of evaluation batches and lets the network answer with them.

    Attributes:
        active: Whether features are kept in the evaluation in work.
        served: Batches that were answered from what was kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.active = False
        self.served = 0
        self._features: dict[Hashable, list[Tensor]] = {}  # at the classifier, then at each of the others
        self._bytes = 0
        self._made_by: tuple[tuple[int, int], ...] = ()
        self._usable = True  # until the network is seen to do more with its features than its classifier says
        self._told = False
        self._warned = False
        self._samples: dict[int, tuple[Hashable, list[Tensor]]] = {}  # by experience: of which batch, and what it gave
        self._networks: dict[int, tuple[Hashable, ...]] = {}  # by experience: what was said of its network
        self._tap: FeatureTap | None = None
        self._others: list[FeatureTap] = []
        self._points: list[str] = []  # of the others
        self._heard_others: dict[int, Tensor] = {}
        self._calls = 0  # of the network in the batch in work
        self._hooks: list[Any] = []
        self._heard: Tapped | None = None
        self._overridden: nn.Module | None = None
        self._experience = 0  # of the batch in work
        self._key: Hashable = None
        self._sample: list[Tensor] | None = None

    # ---- one evaluation

    def begin(
        self, module: pl.LightningModule, tap: FeatureTap, *others: FeatureTap, by_experience: bool = False
    ) -> None:
        """Begin an evaluation, with nothing kept if the network is not the one that made it.

        Args:
            module: The user's module.
            tap: That of the network's classifier, which answers for the network.
            others: Further ones, to which what passed them is given again; those that read what it reads do anyway.
            by_experience: Whether each experience has a network of its own, of which each batch says if it is the same.
        """
        others = tuple(each for each in others if each.point != tap.point)
        self._tap = tap if self.limit and _can_answer(module, tap, others) else None
        if self._tap is None:
            return
        points = [each.point for each in others]
        if points != self._points:
            self.clear()
            self._points = points
        before, now = self._made_by, () if by_experience else _fingerprint(self._tap)
        if now != before:
            self.clear()
            self._made_by = now
            if before:  # a network that trains will have changed by the next evaluation, too
                self._tap = None
                return
        self.active = True
        self._others = list(others)
        self._hooks = [
            tap.listen(self._hear),
            *(other.listen(partial(self._hear_other, index)) for index, other in enumerate(others)),
            tap.network.register_forward_hook(self._see, with_kwargs=True),
        ]

    def end(self) -> None:
        """Give the network back: after the last batch, or where something went wrong."""
        if not self.active:
            return
        self.active = False
        if self._overridden is not None:  # something went wrong in the middle of a batch
            self._give_back()
        self._key = self._heard = self._sample = None
        for hook in self._hooks:
            hook.remove()
        self._tap, self._others, self._hooks = None, [], []

    # ---- one batch

    def before_batch(self, experience: int, rows: Any, networks: tuple[Hashable, ...] = ()) -> None:
        """Have the network answer with what was kept of these rows of an experience, if known and if anything was.

        Args:
            experience: Index of the experience.
            rows: Numbers of the rows in the data set, or ``None``.
            networks: What each part that shows the experience a network of its own says of that: the same value as long
                as it is the same to the bit, and ``None`` where nothing of it may be kept.
        """
        self._experience = experience
        unknown = rows is None or None in networks
        self._key = None if unknown else (experience, len(rows), int(rows[0]), int(rows[-1]))
        if not unknown and self._networks.setdefault(experience, networks) != networks:
            self.clear()
            self._networks[experience] = networks
        self._heard, self._heard_others, self._calls, self._sample = None, {}, 0, None
        if self._key not in self._features:
            return
        assert self._tap is not None
        classifier, network = self._tap.classifier, self._tap.network
        kept, *kept_of_others = self._features[self._key]
        sampled, sample = self._samples[experience]

        def answer(*args: Any, **kwargs: Any) -> Any:
            if self._calls:  # another forward in the same step, which the step that was kept did not have
                return type(network).forward(network, *args, **kwargs)
            if sampled == self._key and not _same(self._sampled(len(kept), args, kwargs), sample):
                self._drop()
                self._give_back()
                return type(network).forward(network, *args, **kwargs)
            for other, features in zip(self._others, kept_of_others, strict=True):
                other.deliver(features)
            return _classified(classifier, kept)

        self._overridden = network
        network.forward = answer

    def _sampled(self, count: int, args: Any, kwargs: Any) -> list[Tensor]:
        """Run some rows of a batch of ``count`` alone; without a result if the classifier does not give the output."""
        assert self._tap is not None
        apart = min(-(-count // _SOME), _APART)
        some_args, some_kwargs = apply_to_collection(
            (args, kwargs), Tensor, lambda each: each[::apart] if each.dim() and len(each) == count else each
        )
        heard, self._heard = self._heard, None
        others, self._heard_others = self._heard_others, {}
        network = self._tap.network
        with FeatureTap.aside():
            output = type(network).forward(network, *some_args, **some_kwargs)
            features = output if self._heard is None else self._heard.features
            given = [features, *self._heard_others.values()] if _answers(self._tap.classifier, features, output) else []
        self._heard, self._heard_others = heard, others
        return [each.detach().clone() for each in given]

    def _drop(self) -> None:
        self._features.clear()
        self._samples.clear()
        self._bytes = 0
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                "clkit: evaluation features that were kept differ from fresh ones, so all are computed again. The "
                "network changed in a way that its weights do not tell (an attribute, a mode, a hook, a write to "
                ".data); announce such changes by clkit.stream.boundaries.backbone_changed, or set "
                "StreamEvaluation(keep_features=0)"
            )

    def after_batch(self, own: bool = True) -> None:
        """Give the network its own forward back, and keep what a real one gave.

        Args:
            own: Whether the network was given the batch's own inputs, of which alone anything is kept.
        """
        if self._overridden is not None:
            self._give_back()
            self.served += 1
        elif self._key is not None and own and self._usable:
            fresh = self._fresh()
            if fresh and self._keep(fresh) and self._sample is not None:
                self._samples[self._experience] = self._key, self._sample
        self._key = self._heard = self._sample = None

    def _give_back(self) -> None:
        assert self._overridden is not None
        del self._overridden.forward  # the class's own shows through again
        self._overridden = None

    def _fresh(self) -> list[Tensor] | None:
        """Return what a forward showed at the classifier and at the others; ``None`` where that is not all."""
        parts = [self._heard and self._heard.features, *map(self._heard_others.get, range(len(self._others)))]
        known = [part for part in parts if part is not None]
        # of several forwards with inputs of their own, one answer cannot serve all
        return known if self._calls == 1 and len(known) == len(parts) else None

    def clear(self) -> None:
        """Let go of everything."""
        self._features.clear()
        self._samples.clear()
        self._networks.clear()
        self._bytes, self._usable, self._made_by = 0, True, ()

    # ----

    def _hear(self, tapped: Tapped) -> None:
        if self._heard is None:
            self._heard = tapped

    def _hear_other(self, index: int, tapped: Tapped) -> None:
        self._heard_others.setdefault(index, tapped.features)

    def _see(self, network: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._calls += 1
        waits = self._usable and self._overridden is None and self._heard is not None and self._key is not None
        # in the forward itself, where autocast is as it will be when the kept features answer
        if waits and self._calls == 1 and self._experience not in self._samples:
            assert self._tap is not None
            assert self._heard is not None
            if _answers(self._tap.classifier, self._heard.features, output):
                self._sample = self._sampled(len(self._heard.features), args, kwargs)
            self._usable = bool(self._sample)

    def _keep(self, features: list[Tensor]) -> bool:
        features = [each.detach().clone() for each in features]
        size = sum(each.numel() * each.element_size() for each in features)
        if self._bytes + size > self.limit:
            if not self._told:
                self._told = True
                rank_zero_info(
                    f"clkit: {self._bytes / 2**20:.0f} MiB of evaluation features are kept, which is the limit; the "
                    "rest is computed at each evaluation (StreamEvaluation(keep_features=MiB) sets it)"
                )
            return False
        self._features[self._key] = features
        self._bytes += size
        return True


def _can_answer(module: pl.LightningModule, tap: FeatureTap, others: Sequence[FeatureTap]) -> bool:
    """Only a network inside the user's module, with weights, called as it is, of which others read what is kept too."""
    network = tap.network
    own = [] if tap.classifier is None else list(tap.classifier.modules())
    for other in others:  # what is inside the classifier, or around it, changes with it
        if (
            other.network is not network or len(other.layers) > 1
        ):  # what is put together ends with the network's forward
            return False
        if any(part in own or any(inner is tap.classifier for inner in part.modules()) for part in other.layers):
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


def _same(fresh: list[Tensor], sample: list[Tensor]) -> bool:
    return len(fresh) == len(sample) and all(
        now.dtype == then.dtype and torch.equal(now.nan_to_num(), then.nan_to_num())
        for now, then in zip(fresh, sample, strict=True)
    )


def _answers(classifier: nn.Module | None, features: Any, output: Any) -> bool:
    """Whether classifier(features) is the network's output, bit for bit."""
    if not isinstance(features, Tensor):
        return False
    answer = _classified(classifier, features)
    return isinstance(output, Tensor) and answer.dtype == output.dtype and torch.equal(answer, output)
