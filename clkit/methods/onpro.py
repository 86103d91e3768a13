r"""OnPro: the losses of a step, the class means of the last one, and the replay batches that they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from scipy.special import betaincinv
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_number
from clkit.methods._state import exact
from clkit.methods.replay import contrast
from clkit.methods.replay.buffer import ReservoirBuffer
from clkit.methods.replay.mixing import (
    MixedBatch,
    Mixing,
    mixed_cross_entropy,
    mixture,
    of_two_classes,
    pair_counts,
    pair_probabilities,
)
from clkit.methods.replay.rows import check_labels
from clkit.methods.replay.step import Block, StepOutputs, cross_entropy
from clkit.methods.replay.views import VARIANTS, Rotation, rotate_views, variant_labels
from clkit.schema import FLOATS, Numbers, Table, read_state

__all__ = ["OnProLosses", "OnlinePrototypes"]

_NEW = ("upright1", "turned1", "upright2", "turned2")  # blocks of the incoming images; turned: all other variants


@dataclass(frozen=True)
class OnProLosses:
    r"""The losses of OnPro, by their weights, and the views that they are taken on.

    Args:
        rotation: ``"rot16"``, ``"rot4"`` or ``"none"``: the variants of the instance contrast.
        ce_new: Of the cross-entropy on the incoming batch, augmented. With 0 it is taken in the first experience only,
            with the weight ``ce_mem``.
        ce_mem: Of the cross-entropy on the replay batch, augmented.
        instance_new: Of the instance contrast of the incoming batch.
        instance_mem: Of the instance contrast of the replay batch.
        ope_new: Of the prototype contrast of the incoming batch.
        ope_seen: Of the prototype contrast of the memory's sample.
        prototype_temperature: Of the prototype contrast.
        instance_temperature: Of the instance contrast.
        similarity_scale: s of the instance contrast, after the first experience.

    Raises:
        ArgumentError: If an argument is out of range, or nothing would be learned from an incoming image.

    Example:
        >>> OnProLosses(rotation="rot4").images(new=10, replayed=64)
        784

    Source: Y. Wei, J. Ye, Z. Huang, J. Zhang, H. Shan, arXiv 2308.00301.
    """

    rotation: Rotation = "rot16"
    ce_new: float = 0.0
    ce_mem: float = 1.0
    instance_new: float = 1.0
    instance_mem: float = 1.0
    ope_new: float = 1.0
    ope_seen: float = 1.0
    prototype_temperature: float = 0.5
    instance_temperature: float = 0.07
    similarity_scale: float = 1.0

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        for name in ("ce_new", "ce_mem", "instance_new", "instance_mem", "ope_new", "ope_seen"):
            check_number(name, getattr(self, name), at_least=0)
        for name in ("prototype_temperature", "instance_temperature", "similarity_scale"):
            check_number(name, getattr(self, name), above=0)
        if not (self.ce_new or self.ce_mem or self.instance_new or self.ope_new):
            raise ArgumentError(
                "nothing would be learned from an incoming image: raise ce_new, ce_mem, instance_new or ope_new above 0"
            )

    @property
    def variants(self) -> int:
        """V, rotated variants of each image in the contrast of incoming and replayed images."""
        return VARIANTS[self.rotation] if self.instance_new or self.instance_mem else 1

    @property
    def embeds(self) -> bool:
        """Whether an embedding is needed beside the classifier."""
        return bool(self.instance_new or self.instance_mem or self.ope_new or self.ope_seen)

    @property
    def replays(self) -> bool:
        """Whether a replay batch is needed, of which images may be mixed."""
        return bool(self.ce_mem or self.instance_mem)

    @property
    def segmented(self) -> bool:
        """Whether a step can have more than one segment for batch normalisation."""
        contrasts = self.instance_new or self.instance_mem or self.ope_new
        return sum(map(bool, (contrasts, self.ce_new or self.ce_mem, self.ope_seen))) > 1

    def settings(self) -> dict[str, Any]:
        """Return all options, as plain types."""
        return asdict(self)

    def images(self, new: int, replayed: int) -> int:
        """Return how many images a later step runs through the network, for so many incoming and replayed ones."""
        count = 2 * self.variants * (new * bool(self.instance_new or self.ope_new) + replayed * bool(self.instance_mem))
        return count + new * bool(self.ce_new) + replayed * (bool(self.ce_mem) + 2 * bool(self.ope_seen))

    def views(
        self, new: Block, seen: Block | None, mixed: Block | None, num_classes: int, *, first: bool
    ) -> list[dict[str, Block]]:
        """Return the blocks of a step, those that are normalised together in one dictionary.

        Args:
            new: The incoming batch.
            seen: A sample of the memory, if any.
            mixed: The replay batch with the labels of :attr:`MixedBatch.labels`, if any.
            num_classes: C, a number above all labels.
            first: Whether the rule of the first experience holds: no replay in cross-entropy and instance contrast.
        """
        contrasts: dict[str, Block] = {}
        if self.instance_new or self.ope_new:
            count, turned = len(new.images), self._turned(new)
            ids = variant_labels(new.labels, self.variants, num_classes)
            others = Block(turned.images[count:], ids[count:], turned.at[count:] - new.total, turned.total - new.total)
            contrasts |= dict(zip(_NEW, (new.plain, others.plain, new, others), strict=True))
        if mixed is not None and self.instance_mem:
            turned = self._turned(mixed)
            first_class, second_class, share = mixed.labels.unbind(1)
            ids = variant_labels(first_class.long(), self.variants, num_classes)
            two = of_two_classes(first_class, second_class, share).repeat(self.variants)
            # each variant of an image of two classes is a class of its own
            turned = turned._replace(labels=torch.where(two, turned.at + num_classes * self.variants, ids))
            contrasts |= {"mem1": turned.plain, "mem2": turned}
        prototypes = {"seen1": seen.plain, "seen2": seen} if seen is not None and self.ope_seen else {}
        classifier: dict[str, Block] = {}
        if self.ce_new or (first and self.ce_mem):
            classifier["ce_new"] = new
        if mixed is not None and self.ce_mem:
            classifier["ce_mem"] = mixed
        return [contrasts, prototypes, classifier] if first else [contrasts, classifier, prototypes]

    def _turned(self, block: Block) -> Block:
        """Return all variants of the images, without labels of their own."""
        images = rotate_views(block.images, self.rotation) if self.variants > 1 else block.images
        at = block.total * torch.arange(self.variants)[:, None] + block.at
        return Block(images, block.labels, at.flatten(), block.total * self.variants)

    def losses(
        self, outputs: StepOutputs, generator: torch.Generator, *, first: bool
    ) -> tuple[dict[str, tuple[float, Tensor]], contrast.PrototypeContrast | None]:
        """Return each loss by name with its weight, and the class means of the memory's sample if there was one.

        ``generator`` draws the slice of features of each instance contrast, ``first`` is that of :meth:`views`.
        """
        terms: dict[str, tuple[float, Tensor]] = {}
        blocks, logits, labels = outputs.views.rows, outputs.logits, outputs.labels
        if "ce_new" in blocks:
            terms["ce_new"] = self.ce_new or self.ce_mem, cross_entropy(logits("ce_new"), labels("ce_new"))
        if "ce_mem" in blocks:
            one, two, share = labels("ce_mem").unbind(1)
            loss = mixed_cross_entropy(logits("ce_mem"), one.long(), two.long(), share)
            terms["ce_mem"] = self.ce_mem, loss
        scale = 1.0 if first else self.similarity_scale
        for name, weight, both in (("new", self.instance_new, _NEW), ("mem", self.instance_mem, ("mem1", "mem2"))):
            if both[0] in blocks and weight:
                features, embeddings = outputs.features(*both), outputs.embeddings(*both)
                loss = contrast.instance_contrast(
                    embeddings,
                    features,
                    labels(*both[: len(both) // 2]),
                    form="new" if name == "new" else "memory",
                    offset=contrast.draw_offset(features.shape[1], embeddings.shape[1], generator),
                    temperature=self.instance_temperature,
                    scale=scale,
                )
                terms[f"instance_{name}"] = weight, loss
        if "upright1" in blocks and self.ope_new:
            terms["ope_new"] = self.ope_new, self._prototypes(outputs, "upright").loss
        if "seen1" not in blocks:
            return terms, None
        prototypes = self._prototypes(outputs, "seen")
        return {**terms, "ope_seen": (self.ope_seen, prototypes.loss)}, prototypes

    def _prototypes(self, outputs: StepOutputs, name: str) -> contrast.PrototypeContrast:
        one, two = f"{name}1", f"{name}2"
        first, second = outputs.embeddings(one), outputs.embeddings(two)
        return contrast.prototype_contrast(first, second, outputs.labels(one), self.prototype_temperature)


class OnlinePrototypes:
    r"""The class means of the last step, and the replay batches that they ask for (adaptive prototypical feedback).

    After each step :meth:`keep` the means that :func:`prototype_contrast` gave for the memory's sample; before the next
    one :meth:`mix` that step's sample. Means are held on the host, without a graph.

    Args:
        mixing: How images are mixed.

    Example:
        >>> prototypes = OnlinePrototypes(Mixing(base_rate=1.0, probability=1.0))
        >>> prototypes.keep(torch.tensor([0, 3]), torch.eye(2))
        >>> prototypes.ids.tolist()
        [0, 3]

    Source: Y. Wei, J. Ye, Z. Huang, J. Zhang, H. Shan, arXiv 2308.00301.
    """

    table: ClassVar[Table] = {"ids": Numbers(("K",), least=0, ids=True), "means": Numbers(("K", "p"), FLOATS)}
    """What a saved state must look like."""

    def __init__(self, mixing: Mixing = Mixing()) -> None:
        check_arguments(OnlinePrototypes, locals())
        self.mixing = mixing
        self.reset()

    def reset(self) -> None:
        """Forget all means."""
        self.ids = torch.empty(0, dtype=torch.int64)
        self.means = torch.empty(0, 0)
        self._probabilities: Tensor | None = None

    def __len__(self) -> int:
        """Return how many classes have a known mean."""
        return len(self.ids)

    def keep(self, ids: Tensor, means: Tensor) -> None:
        """Replace what is known by a copy of the means of one step.

        Args:
            ids: (K,) int64, ascending class ids.
            means: (K, p) floating point.

        Raises:
            BatchError: If means are not finite; what was known is kept, as for a :class:`StateError`.
        """
        if means.shape[:1] == ids.shape and not bool(means.isfinite().all()):
            raise BatchError(
                f"the means of classes {ids.tolist()} are not all finite, those from before are kept; a lower learning "
                "rate may help"
            )
        self.load_state_dict({"ids": ids, "means": means})

    def mix(
        self,
        images: Tensor,
        labels: Tensor,
        memory: ReservoirBuffer,
        generator: torch.Generator,
        *,
        size: int | None = None,
    ) -> MixedBatch:
        """Return a replay batch made of a sample of the memory, and of pairs of classes drawn from the whole of it.

        The first ``floor(size * base_rate)`` rows (or as many as there are) are rows of the sample mixed among
        themselves; the others are mixtures of pairs of classes, close pairs more often. Classes that have left the
        memory are replaced by random ones that it shares with the prototypes. With fewer than two prototypes, or none
        that the memory has, all rows are of the first kind, at most as many as the sample has.

        Args:
            images: (n, ...) floating point, the sample.
            labels: (n,) int64.
            memory: Where the images of pairs come from.
            generator: A CPU generator.
            size: Rows wanted; ``None`` for n.

        Raises:
            BatchError: If shapes or dtypes do not fit.
        """
        if not images.dtype.is_floating_point:
            raise BatchError(f"images must be floating-point numbers to be mixed, got {images.dtype}")
        check_labels("labels", labels, len(images))
        size = len(images) if size is None else size
        stored = set(memory.classes())
        shared = [c for c in self.ids.tolist() if c in stored]
        paired = len(self) >= 2 and bool(shared)
        count = int(size * self.mixing.base_rate) if paired else size
        base = self._mix_base(images, labels, min(count, len(images)), generator)
        missing = size - len(base.images)
        if not paired or not missing:
            return base
        feedback = self._mix_pairs(images, missing, memory, shared, generator)
        return MixedBatch(*(torch.cat(parts) for parts in zip(base, feedback, strict=True)))

    def _mix_base(self, images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> MixedBatch:
        rows = torch.randperm(len(images), generator=generator)[:count]
        partners = rows[torch.randperm(count, generator=generator)]
        drawn = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        coins = drawn[:, 0] < self.mixing.probability
        if self.mixing.probability_rule == "squared":
            coins &= torch.rand((), generator=generator, dtype=torch.float64) < self.mixing.probability
        share = torch.where(coins, drawn[:, 1] * self.mixing.largest, 0.0)
        rows, partners = rows.to(images.device), partners.to(images.device)
        labels = labels.to(images.device, torch.int64)
        return mixture(images[rows], images[partners], labels[rows], labels[partners], share)

    @property
    def pair_entropy(self) -> float | None:
        """Entropy in nats of the distribution over pairs of the last :meth:`mix`; ``None`` without pairs."""
        if self._probabilities is None:
            return None
        return float(torch.special.entr(self._probabilities).sum())

    def _mix_pairs(
        self, like: Tensor, count: int, memory: ReservoirBuffer, shared: list[int], generator: torch.Generator
    ) -> MixedBatch:
        pairs, self._probabilities = pair_probabilities(self.means)
        counts = pair_counts(self._probabilities, count, generator, rule=self.mixing.pair_rule)
        chosen = torch.nonzero(counts).flatten()
        counts = counts[chosen]
        ids, stored = self.ids[pairs[chosen]], torch.tensor(shared)
        instead = stored[torch.randint(len(shared), ids.shape, generator=generator)]  # of classes that were dropped
        ids = torch.where(torch.isin(ids, stored), ids, instead).repeat_interleave(counts, dim=0)
        coins = torch.rand(len(counts), generator=generator, dtype=torch.float64) < self.mixing.probability
        drawn = torch.rand(int(counts.sum()), generator=generator, dtype=torch.float64)
        beta = torch.from_numpy(betaincinv(self.mixing.alpha, self.mixing.alpha, drawn.numpy()))
        share = torch.where(coins.repeat_interleave(counts), beta, 0.0)
        first, second = ids.unbind(dim=1)
        x, y = memory.sample_classes(torch.cat([first, second]), generator)[0].to(like).chunk(2)
        first, second = first.to(like.device), second.to(like.device)
        if self.mixing.pure_class == "either":
            swapped = ((torch.rand(count, generator=generator) < 0.5) & (share == 0)).to(like.device)
            pixels = swapped.view(-1, *[1] * (like.ndim - 1))
            x, y = torch.where(pixels, y, x), torch.where(pixels, x, y)
            first, second = torch.where(swapped, second, first), torch.where(swapped, first, second)
        return mixture(x, y, first, second, share)

    def state_dict(self) -> dict[str, Tensor]:
        """Return what is known, as plain tensors: ``ids`` (K,) int64 and ``means`` (K, p)."""
        return {"ids": self.ids.clone(), "means": self.means.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state_dict` gave; a :class:`StateError` if it is of another form changes nothing."""
        with exact():
            saved = read_state(state, self.table, "OnlinePrototypes")
            self.ids, self.means = (saved[name].to("cpu", copy=True) for name in ("ids", "means"))
