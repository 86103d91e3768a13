"""Evaluation features kept while the network stays as it is.

Evaluating after each of T experiences runs the network on T(T+1)/2 shares of the test data. With a frozen network the
features of a share never change, so they are kept, and in later evaluations the network's ``forward`` answers with
``classifier(kept features)`` for the length of one step. The user's own ``validation_step`` and metrics see the same
bits. This is one of two places where clkit overrides something of the user's, for a stated moment and undone.

A changed weight or buffer is noticed by its version, and whoever changes the network otherwise announces it
(:func:`clkit.stream.boundaries.backbone_changed`). For what nobody announces, such as a plain attribute that switches
an adapter, a few rows of each experience are computed afresh in each evaluation and compared.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from clkit.features.tap import FeatureTap, Handle, Tapped

__all__ = ["KeptFeatures"]

_COMPARED = 4  # rows of a batch


class KeptFeatures:
    """Keeps the features of evaluation batches and lets the network answer with them.

    Args:
        limit: Most bytes that are kept; batches beyond are computed each time.

    Attributes:
        served: Batches that were answered from what was kept.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.served = 0
        self._features: dict[Hashable, Tensor] = {}
        self._bytes = 0
        self._made_by: tuple[tuple[int, int], ...] = ()
        self._usable = True  # until the network is seen to do more with its features than its classifier says
        self._told = False
        self._warned = False
        self._compared: set[Hashable] = set()  # experiences of which rows were compared in this evaluation
        self._tap: FeatureTap | None = None
        self._handle: Handle | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._heard: Tapped | None = None
        self._overridden: nn.Module | None = None
        self._key: Hashable = None

    # ---- one evaluation

    def begin(self, module: pl.LightningModule, tap: FeatureTap) -> None:
        """Before the first batch: forgets everything if the network is not the one that made it."""
        self._tap = tap if self.limit and _can_answer(module, tap) else None
        if self._tap is None:
            return
        made_by = _fingerprint(self._tap)
        if made_by != self._made_by:
            self.clear()
            self._made_by = made_by
        self._handle = tap.listen(self._hear)
        self._hook = tap.network.register_forward_hook(self._see)
        self._compared.clear()

    def end(self) -> None:
        """After the last batch, or where something went wrong: the network is the user's own again."""
        self.after_batch()
        if self._handle is not None:
            self._handle.remove()
        if self._hook is not None:
            self._hook.remove()
        self._tap = self._handle = self._hook = None

    # ---- one batch

    def before_batch(self, key: tuple[int, ...] | None) -> None:
        """Have the network answer with what was kept for this batch, if anything was.

        Args:
            key: What tells the batch by its samples, the index of its experience first.
        """
        self._key, self._heard = key, None
        if self._tap is None or key is None or key not in self._features:
            return
        self._overridden = self._tap.network
        self._override(key, self._features[key])

    def _override(self, key: tuple[int, ...], kept: Tensor) -> None:
        assert self._tap is not None
        tap, network = self._tap, self._tap.network

        def answer(*args: Any, **kwargs: Any) -> Any:
            if key[0] not in self._compared:
                self._compared.add(key[0])
                if not self._is_fresh(kept, args, kwargs):
                    self._drop()
                    return type(network).forward(network, *args, **kwargs)
                network.forward = answer
            return _classified(tap.classifier, kept)

        network.forward = answer

    def _is_fresh(self, kept: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the network as it is gives what was kept, within rounding; its own forward shows through then."""
        assert self._tap is not None
        network = self._tap.network
        del network.forward
        few = _COMPARED if len(args) == 1 and isinstance(args[0], Tensor) and not kwargs else len(kept)
        inputs = (args[0][:few],) if few < len(kept) else args
        fresh = self._tap.extract(inputs, lambda given: network(*given, **kwargs))
        tolerance = torch.finfo(kept.dtype).eps ** 0.5
        return torch.allclose(fresh, kept[:few], rtol=tolerance, atol=tolerance * float(kept.abs().max()))

    def _drop(self) -> None:
        """Let go of everything: the network changed in a way that nobody announced."""
        self._features.clear()
        self._bytes = 0
        if not self._warned:
            self._warned = True
            rank_zero_warn(
                "clkit: evaluation features that were kept differ from fresh ones, so all are computed again. The "
                "network changed without a change of its weights (an attribute, a mode, a hook); announce such changes "
                "by clkit.stream.boundaries.backbone_changed, or set StreamEvaluation(keep_features=0)"
            )

    def after_batch(self) -> None:
        """Give the network its own forward back, and keeps what a real one gave."""
        if self._overridden is not None:
            served = "forward" in vars(self._overridden)
            if served:
                del self._overridden.forward  # the class's own shows through again
            self._overridden = None
            self.served += served
        elif self._usable and self._heard is not None and self._key is not None and self._key not in self._features:
            self._keep(self._heard.features)
        self._key = self._heard = None

    def clear(self) -> None:
        """Lets go of everything."""
        self._features.clear()
        self._bytes, self._usable, self._made_by = 0, True, ()

    # ----

    def _hear(self, tapped: Tapped) -> None:
        if self._heard is None:
            self._heard = tapped

    def _see(self, network: nn.Module, args: Any, output: Any) -> None:
        # in the forward itself, where autocast is as it will be when the kept features answer
        if self._usable and not self._features and self._overridden is None and self._heard is not None:
            assert self._tap is not None
            self._usable = _answers(self._tap.classifier, self._heard.features, output)

    def _keep(self, features: Tensor) -> None:
        features = features.detach().clone()
        size = features.numel() * features.element_size()
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


def _can_answer(module: pl.LightningModule, tap: FeatureTap) -> bool:
    """Only a network inside the user's module, with weights, called as it is."""
    network = tap.network
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
    own = set()
    if tap.classifier is not None:
        own = {id(tensor) for tensor in [*tap.classifier.parameters(), *tap.classifier.buffers()]}
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


def _answers(classifier: nn.Module | None, features: Tensor, output: Any) -> bool:
    """Whether classifier(features) is the network's output, bit for bit."""
    if not isinstance(output, Tensor):
        return False
    answer = _classified(classifier, features)
    return answer.shape == output.shape and answer.dtype == output.dtype and bool(torch.equal(answer, output))
