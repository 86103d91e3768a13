r"""One step of learning with replay: which views of which images go through the network, and the losses on them.

OnPro, experience replay, ER-ACE, DER++, SCR and plain fine-tuning are settings of one :class:`ReplayRule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from clkit.errors import ArgumentError
from clkit.methods._checks import check_choice, check_number
from clkit.methods.onpro import (
    MixedBatch,
    PrototypeContrast,
    draw_offset,
    instance_contrast,
    mixed_cross_entropy,
    prototype_contrast,
    variant_labels,
)
from clkit.methods.replay.supervised import supervised_contrast
from clkit.methods.replay.views import VARIANTS, Rotation, rotate_views

__all__ = ["Part", "ReplayRule", "StepBatch", "StepLosses", "StepOutputs", "StepViews", "Transform"]

Transform = Callable[[Tensor, Tensor, int], Tensor]
"""``(images, positions, total) -> views``: ``positions`` of the images among all ``total`` that a step augments."""

_WEIGHTS = (
    "ce_new_weight",
    "ce_mem_weight",
    "instance_new",
    "instance_mem",
    "ope_new",
    "ope_seen",
    "contrast",
    "logit_weight",
    "logit_ce_weight",
)
_WEIGHTS_OF_NEW = ("ce_new_weight", "ce_mem_weight", "instance_new", "ope_new", "contrast")  # also on the first batch


class Part(NamedTuple):
    """Images of a step that come from one place.

    Attributes:
        images: (n, …), not augmented.
        labels: (n,) int64 on the host.
        at: (n,) int64 on the host: the position of each among those of all processes.
        total: How many there are in all processes.
    """

    images: Tensor
    labels: Tensor
    at: Tensor
    total: int

    @classmethod
    def whole(cls, images: Tensor, labels: Tensor) -> Part:
        """The rows of a run of one process."""
        return cls(images, labels, torch.arange(len(images)), len(images))


@dataclass(frozen=True)
class StepBatch:
    """What a step learns from.

    Attributes:
        new: The incoming batch.
        first: Whether the rule of the first experience holds: no replay in cross-entropy and instance contrast.
        seen: A sample of the memory as it is stored, if any.
        replayed: The replay batch, of which images may be mixed from two; labels on the host.
        replayed_at: The position of each of its images among those of all processes (n,), and how many these are.
        second: Another sample of the memory, for rules that need one.
        stored_logits: (n, C) logits kept with each row of ``seen``.
    """

    new: Part
    first: bool
    seen: Part | None = None
    replayed: MixedBatch | None = None
    replayed_at: tuple[Tensor, int] | None = None
    second: Part | None = None
    stored_logits: Tensor | None = None


@dataclass
class StepViews:
    """All images of a step, in the order in which they go through the network.

    Attributes:
        images: (N, …).
        segments: Numbers of rows that belong together for batch normalisation, in order; they add up to N.
        rows: Where each named block lies, as an index of the rows.
        labels: Labels, shares and whatever else the losses compare with, one row for each of a block, on the host.
        first: As in :class:`StepBatch`.
    """

    images: Tensor
    segments: list[int]
    rows: dict[str, slice | Tensor]
    labels: dict[str, Tensor]
    first: bool


class StepOutputs(NamedTuple):
    """What the network gave for the rows of :class:`StepViews`.

    Attributes:
        logits: (N, C).
        features: (N, D).
        embeddings: (N, p) unit rows; ``None`` where the rule needs none.
    """

    logits: Tensor
    features: Tensor
    embeddings: Tensor | None


class StepLosses(NamedTuple):
    """The losses of a step.

    Attributes:
        total: Scalar with a graph.
        terms: Each loss by name, without its weight, detached.
        prototypes: Class means of the memory's sample, where there was one and the rule needs them.
    """

    total: Tensor
    terms: dict[str, Tensor]
    prototypes: PrototypeContrast | None


@dataclass(frozen=True)
class ReplayRule:
    r"""Which losses a step of replay learning has, and on which views.

    The defaults are OnPro. Other published methods are other settings; see
    :class:`~clkit.strategies.OnProStrategy`, which runs any of them in a trainer.

    Args:
        rotation: ``"rot16"``, ``"rot4"`` or ``"none"``: the variants of the instance contrast.
        ce_new_weight: Of the cross-entropy on the incoming batch, augmented. With 0 it is taken in the first
            experience only, with the weight of the replay batch.
        ce_mem_weight: Of the cross-entropy on the replay batch, augmented.
        ce_new_mask: ``"batch"``: the loss of the incoming batch sees the classes of that batch only.
        ce_mean: ``"separate"``: a mean over each batch; ``"joint"``: one mean over the rows of both.
        instance_new: Weight of the instance contrast of the incoming batch.
        instance_mem: Weight of the instance contrast of the replay batch.
        ope_new: Weight of the prototype contrast of the incoming batch.
        ope_seen: Weight of the prototype contrast of the memory's sample.
        contrast: Weight of a supervised contrast of incoming and replayed images with one augmented view of each.
        logit_weight: Weight of the squared distance to the logits that were stored with each row.
        logit_ce_weight: Weight of a cross-entropy on a second sample of the memory.
        prototype_temperature: Of the prototype contrast.
        instance_temperature: Of the instance contrast and of ``contrast``.
        similarity_scale: s of the instance contrast, after the first experience.

    Raises:
        ArgumentError: If an argument is out of range, or two exclude each other.

    Example:
        >>> ReplayRule(rotation="rot4").images(new=10, replayed=64)
        784
        >>> er = ReplayRule(ce_new_weight=1, ce_mean="joint", instance_new=0, instance_mem=0, ope_new=0, ope_seen=0)
        >>> er.images(new=10, replayed=64)
        74

    Source: Y. Wei et al., arXiv 2308.00301 (OnPro); A. Chaudhry et al., arXiv 1902.10486 (ER); L. Caccia et al., ICLR
    2022 (ER-ACE); P. Buzzega et al., NeurIPS 2020 (DER++); Z. Mai et al., CVPR Workshops 2021 (SCR).
    """

    rotation: Rotation = "rot16"
    ce_new_weight: float = 0.0
    ce_mem_weight: float = 1.0
    ce_new_mask: Literal["none", "batch"] = "none"
    ce_mean: Literal["separate", "joint"] = "separate"
    instance_new: float = 1.0
    instance_mem: float = 1.0
    ope_new: float = 1.0
    ope_seen: float = 1.0
    contrast: float = 0.0
    logit_weight: float = 0.0
    logit_ce_weight: float = 0.0
    prototype_temperature: float = 0.5
    instance_temperature: float = 0.07
    similarity_scale: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rotation", self.rotation, tuple(VARIANTS))
        check_choice("ce_new_mask", self.ce_new_mask, ("none", "batch"))
        check_choice("ce_mean", self.ce_mean, ("separate", "joint"))
        for name in _WEIGHTS:
            if check_number(name, getattr(self, name)) < 0:
                raise ArgumentError(f"{name} must be at least 0, got {getattr(self, name)!r}")
        for name in ("prototype_temperature", "instance_temperature", "similarity_scale"):
            check_number(name, getattr(self, name), above=0)
        if not any(getattr(self, name) for name in _WEIGHTS_OF_NEW):
            raise ArgumentError(
                f"nothing would be learned from an incoming image: one of {', '.join(_WEIGHTS_OF_NEW)} must be above 0"
            )
        if self.logit_weight and not self.ce_new_weight:
            raise ArgumentError(
                f"logit_weight={self.logit_weight!r} needs ce_new_weight above 0, got {self.ce_new_weight!r}: the "
                "logits that are stored with a row are those of its cross-entropy as an incoming image"
            )
        if self.ce_mean == "joint" and (
            self.ce_new_weight != self.ce_mem_weight or not self.ce_new_weight or self.ce_new_mask != "none"
        ):
            raise ArgumentError(
                "ce_mean='joint' is one mean over incoming and replayed rows: it needs equal ce_new_weight and "
                f"ce_mem_weight above 0 and no ce_new_mask, got {self.ce_new_weight!r}, {self.ce_mem_weight!r} and "
                f"{self.ce_new_mask!r}"
            )

    # What the rule needs ----------------------------------------------------------------------------------------

    @property
    def variants(self) -> int:
        """V, rotated variants of each image in the contrast of incoming and replayed images."""
        return VARIANTS[self.rotation] if self.instance_new or self.instance_mem else 1

    @property
    def embeds(self) -> bool:
        """Whether an embedding is needed beside the classifier."""
        return bool(self.instance_new or self.instance_mem or self.ope_new or self.ope_seen or self.contrast)

    @property
    def replays(self) -> bool:
        """Whether a replay batch is needed, of which images may be mixed."""
        return bool(self.ce_mem_weight or self.instance_mem)

    @property
    def segmented(self) -> bool:
        """Whether a step can have more than one segment for batch normalisation."""
        kinds = [
            self.instance_new or self.instance_mem or self.ope_new,
            self.ce_new_weight or self.ce_mem_weight,
            self.ope_seen,
            self.contrast,
            self.contrast,
            self.logit_weight,
            self.logit_ce_weight,
        ]
        return sum(map(bool, kinds)) > 1

    def images(self, new: int, replayed: int) -> int:
        """Images that one later step runs through the network, for so many incoming and replayed ones."""
        count = 2 * self.variants * new * bool(self.instance_new or self.ope_new)
        count += 2 * self.variants * replayed * bool(self.instance_mem)
        count += new * bool(self.ce_new_weight) + replayed * bool(self.ce_mem_weight)
        count += 2 * replayed * bool(self.ope_seen) + 2 * (new + replayed) * bool(self.contrast)
        return count + replayed * (bool(self.logit_weight) + bool(self.logit_ce_weight))

    def settings(self) -> dict[str, Any]:
        """All options, as plain types."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    # Views ------------------------------------------------------------------------------------------------------

    def views(self, batch: StepBatch, transform: Transform, num_classes: int) -> StepViews:
        """All images of a step, with one call of ``transform``.

        Args:
            batch: What the step learns from.
            transform: Augments images, each on its own.
            num_classes: C, the width of the classifier.
        """
        step = _Builder()
        new, seen, replayed = batch.new, batch.seen, batch.replayed
        instance = self.instance_new or self.ope_new
        with step.segment():
            if instance:
                self._pair(step, "new", new.images, new.at, new.total)
                step.labels["new_ids"] = variant_labels(new.labels, self.variants, num_classes)
            if replayed is not None and self.instance_mem:
                assert batch.replayed_at is not None
                self._pair(step, "mem", replayed.images, *batch.replayed_at)
                step.labels["mem_ids"] = self._mixed_ids(replayed, *batch.replayed_at, num_classes)
        if batch.first:
            self._seen(step, seen)
        with step.segment():
            if self.ce_new_weight or (batch.first and self.ce_mem_weight):
                step.augmented("ce_new", new.images, new.at, new.total)
            if replayed is not None and self.ce_mem_weight:
                assert batch.replayed_at is not None
                step.augmented("ce_mem", replayed.images, *batch.replayed_at)
                step.labels.update(first=replayed.first, second=replayed.second, share=replayed.share.cpu())
        if not batch.first:
            self._seen(step, seen)
        if self.contrast:
            self._contrast(step, new, seen)
        if seen is not None and self.logit_weight and batch.stored_logits is not None:
            with step.segment():
                step.augmented("logits", seen.images, seen.at, seen.total)
            step.labels["logits"] = batch.stored_logits.cpu()
        if batch.second is not None and self.logit_ce_weight:
            with step.segment():
                step.augmented("logit_ce", batch.second.images, batch.second.at, batch.second.total)
            step.labels["logit_ce"] = batch.second.labels
        step.labels["new"] = new.labels
        if seen is not None:
            step.labels["seen"] = seen.labels
        return step.built(transform, batch)

    def _pair(self, step: _Builder, name: str, images: Tensor, at: Tensor, total: int) -> None:
        """A block of rotated images and one of their augmented views."""
        variants = rotate_views(images, self.rotation) if self.variants > 1 else images
        positions = (total * torch.arange(self.variants)[:, None] + at).flatten()
        step.plain(f"{name}1", variants)
        step.augmented(f"{name}2", variants, positions, total * self.variants)

    def _seen(self, step: _Builder, seen: Part | None) -> None:
        if seen is None or not self.ope_seen:
            return
        with step.segment():
            step.plain("seen1", seen.images)
            step.augmented("seen2", seen.images, seen.at, seen.total)

    def _contrast(self, step: _Builder, new: Part, seen: Part | None) -> None:
        images, labels, at, total = new
        if seen is not None:
            images, labels = torch.cat([images, seen.images]), torch.cat([labels, seen.labels])
            at, total = torch.cat([at, total + seen.at]), total + seen.total
        with step.segment():
            step.plain("contrast1", images)
        with step.segment():
            step.augmented("contrast2", images, at, total)
        step.labels["contrast"] = labels

    def _mixed_ids(self, replayed: MixedBatch, at: Tensor, total: int, num_classes: int) -> Tensor:
        """An id for each variant: that of its class, or one of its own for an image of two classes."""
        ids = variant_labels(replayed.first, self.variants, num_classes)
        own = total * torch.arange(self.variants)[:, None] + at + num_classes * self.variants
        return torch.where(replayed.mixed.cpu(), own, ids.view_as(own)).flatten()

    # Losses -----------------------------------------------------------------------------------------------------

    def losses(self, views: StepViews, outputs: StepOutputs, generator: torch.Generator) -> StepLosses:
        """The losses of what the network gave, computed in float32 (float64 for float64 outputs).

        Args:
            views: What :meth:`views` gave.
            outputs: For its rows.
            generator: Draws the slice of features of each instance contrast.
        """
        with torch.autocast(outputs.logits.device.type, enabled=False):
            terms = dict(self._classification(views, outputs.logits))
            prototypes = None
            if outputs.embeddings is not None:
                contrasts, prototypes = self._contrasts(views, outputs.features, outputs.embeddings, generator)
                terms.update(contrasts)
            if "logits" in views.rows:
                now = _wide(outputs.logits[views.rows["logits"]])
                stored = views.labels["logits"].to(now)
                terms["logit"] = (now - stored).square().mean() if len(now) else now.sum(), self.logit_weight
            # no rows, but a graph: every weight takes part in every step, so that DDP waits for none in vain
            start = _wide(outputs.logits[:0]).sum()
            if outputs.embeddings is not None:
                start = start + outputs.embeddings[:0].sum()
            total = sum((weight * term for term, weight in terms.values()), start)
        assert isinstance(total, Tensor)
        return StepLosses(total, {name: term.detach() for name, (term, _) in terms.items()}, prototypes)

    def _classification(self, views: StepViews, logits: Tensor) -> Mapping[str, tuple[Tensor, float]]:
        terms = {}
        labels, rows = views.labels, views.rows
        if self.ce_mean == "joint" and "ce_mem" in rows:
            y = labels["new"]
            both = torch.cat([logits[rows["ce_new"]], logits[rows["ce_mem"]]])
            first, second = torch.cat([y, labels["first"]]), torch.cat([y, labels["second"]])
            share = torch.cat([torch.zeros(len(y), dtype=labels["share"].dtype), labels["share"]])
            return {"ce": (mixed_cross_entropy(both, first, second, share), self.ce_new_weight)}
        if "ce_new" in rows:
            weight = self.ce_new_weight or self.ce_mem_weight
            terms["ce_new"] = self._new_cross_entropy(logits[rows["ce_new"]], labels["new"]), weight
        if "ce_mem" in rows:
            loss = mixed_cross_entropy(logits[rows["ce_mem"]], labels["first"], labels["second"], labels["share"])
            terms["ce_mem"] = loss, self.ce_mem_weight
        if "logit_ce" in rows:
            terms["logit_ce"] = (
                _cross_entropy(logits[rows["logit_ce"]], labels["logit_ce"]),
                self.logit_ce_weight,
            )
        return terms

    def _new_cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.ce_new_mask == "batch" and len(labels):
            present, targets = torch.unique(labels, return_inverse=True)
            return _cross_entropy(logits[:, present.to(logits.device)], targets)
        return _cross_entropy(logits, labels)

    def _contrasts(
        self, views: StepViews, features: Tensor, embeddings: Tensor, generator: torch.Generator
    ) -> tuple[dict[str, tuple[Tensor, float]], PrototypeContrast | None]:
        terms: dict[str, tuple[Tensor, float]] = {}
        rows, labels = views.rows, views.labels
        scale = 1.0 if views.first else self.similarity_scale
        for name, weight in (("new", self.instance_new), ("mem", self.instance_mem)):
            if f"{name}1" in rows and weight:
                pair = rows[f"{name}1"], rows[f"{name}2"]
                loss = instance_contrast(
                    _both(embeddings, *pair),
                    _both(features, *pair),
                    labels[f"{name}_ids"],
                    form="new" if name == "new" else "memory",
                    offset=draw_offset(features.shape[1], embeddings.shape[1], generator),
                    temperature=self.instance_temperature,
                    scale=scale,
                )
                terms[f"instance_{name}"] = loss, weight
        tau = self.prototype_temperature
        if "new1" in rows and self.ope_new:
            first, second = (embeddings[rows[name]] for name in ("upright1", "upright2"))
            terms["ope_new"] = prototype_contrast(first, second, labels["new"], tau).loss, self.ope_new
        prototypes = None
        if "seen1" in rows:
            first, second = (embeddings[rows[name]] for name in ("seen1", "seen2"))
            prototypes = prototype_contrast(first, second, labels["seen"], tau)
            terms["ope_seen"] = prototypes.loss, self.ope_seen
        if "contrast1" in rows:
            first, second = (embeddings[rows[name]] for name in ("contrast1", "contrast2"))
            loss = supervised_contrast(first, second, labels["contrast"], self.instance_temperature)
            terms["contrast"] = loss, self.contrast
        return terms, prototypes


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = _wide(logits)
    return F.cross_entropy(wide, labels.to(wide.device)) if len(labels) else wide.sum()


def _both(values: Tensor, first: slice | Tensor, second: slice | Tensor) -> Tensor:
    """The rows of two blocks, without a copy where one follows the other."""
    if isinstance(first, slice) and isinstance(second, slice) and first.stop == second.start:
        return values[first.start : second.stop]
    return torch.cat([values[first], values[second]])


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


@dataclass
class _Builder:
    """Collects the blocks of a step; what is augmented is augmented at the end, in one call."""

    blocks: list[tuple[str, Tensor | None]] = field(default_factory=list)
    wanted: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    total: int = 0
    sizes: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    labels: dict[str, Tensor] = field(default_factory=dict)

    def segment(self) -> _Segment:
        return _Segment(self)

    def plain(self, name: str, images: Tensor) -> None:
        self.blocks.append((name, images))
        self.sizes.append(len(images))

    def augmented(self, name: str, images: Tensor, at: Tensor, total: int) -> None:
        self.blocks.append((name, None))
        self.sizes.append(len(images))
        self.wanted.append(images)
        self.positions.append(self.total + at)
        self.total += total

    def built(self, transform: Transform, batch: StepBatch) -> StepViews:
        augmented: Iterator[Tensor] = iter(())
        if self.wanted:
            views = transform(torch.cat(self.wanted), torch.cat(self.positions), self.total)
            augmented = iter(torch.split(views, [len(images) for images in self.wanted]))
        images = [next(augmented) if block is None else block for _, block in self.blocks]
        rows: dict[str, slice] = {}
        start = 0
        for (name, _), size in zip(self.blocks, self.sizes, strict=True):
            rows[name] = slice(start, start + size)
            start += size
        if "new1" in rows:
            new = len(batch.new.images)
            for name in ("1", "2"):
                first = rows[f"new{name}"].start
                rows[f"upright{name}"] = slice(first, first + new)
        return StepViews(torch.cat(images), self.segments, dict(rows), self.labels, batch.first)


class _Segment:
    """Rows added while it is open are normalised together."""

    def __init__(self, builder: _Builder) -> None:
        self._builder = builder
        self._before = 0

    def __enter__(self) -> None:
        self._before = sum(self._builder.sizes)

    def __exit__(self, *error: object) -> None:
        size = sum(self._builder.sizes) - self._before
        if size:
            self._builder.segments.append(size)
