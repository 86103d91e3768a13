r"""The mathematics of OnPro: contrast of online class means, contrast of rotated views, and replay of mixed pairs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn import functional as F

from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_choice, check_number, check_probability
from clkit.methods._state import exact
from clkit.schema import FLOATS, Numbers, read_state

__all__ = [
    "ClassMemory",
    "MixedBatch",
    "OnlinePrototypes",
    "PrototypeContrast",
    "draw_offset",
    "instance_contrast",
    "mixed_cross_entropy",
    "pair_counts",
    "pair_probabilities",
    "prototype_contrast",
    "variant_labels",
]

PairRule = Literal["round", "multinomial"]
PureClass = Literal["first", "either"]
MixRule = Literal["squared", "once"]
Form = Literal["new", "memory"]

_EPSILON = 1e-8  # keeps the logarithm of the instance contrast finite
_SHORTEST = 1e-12  # vectors up to this length have no direction
_NEAREST = 1e-6  # smallest distance of two means that is told from none


class PrototypeContrast(NamedTuple):
    """What :func:`prototype_contrast` gives.

    Attributes:
        loss: Scalar, float32 (float64 for float64 rows).
        ids: (K,) int64, the classes of the batch, ascending, where the labels are.
        means: (K, p) detached means of both views, not normalised.
    """

    loss: Tensor
    ids: Tensor
    means: Tensor


def prototype_contrast(first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.5) -> PrototypeContrast:
    r"""Online prototype equilibrium: class means attract their other view and repel all other classes.

    With :math:`P, P'` the class means of the two views and :math:`r` their 2K rows scaled to length 1, it is the mean
    over i of :math:`-\log \mathrm{softmax}_{j \neq i}(r_i \cdot r_j / \tau)` at the row of the same class in the other
    view. One class gives exactly 0 without a gradient, no rows give 0. Gradients flow through both views. A mean of
    length zero keeps its class and counts as a vector of zeros. Computed in float32 with autocast off, or in float64.

    Args:
        first: (n, p) unit rows, the embeddings of n images.
        second: (n, p) unit rows, another view of the same images.
        labels: (n,) integer class ids, any values. Labels on the host spare a GPU the wait for the number of classes.
        temperature: :math:`\tau`.

    Raises:
        ArgumentError: If the temperature is not positive.
        BatchError: If shapes or dtypes do not fit.

    Example:
        >>> views = torch.eye(4)
        >>> loss, ids, means = prototype_contrast(views, views, torch.tensor([7, 7, 2, 2]))
        >>> ids.tolist(), means[0].tolist()
        ([2, 7], [0.0, 0.0, 0.5, 0.5])
        >>> round(float(loss), 4)  # -log(e^2 / (e^2 + 2))
        0.2395

    Source: Y. Wei, J. Ye, Z. Huang, J. Zhang, H. Shan, arXiv 2308.00301.
    """
    check_number("temperature", temperature, above=0)
    _check_rows("first", first, None)
    _check_rows("second", second, tuple(first.shape))
    _check_labels("labels", labels, len(first))
    with torch.autocast(first.device.type, enabled=False):
        rows = torch.cat([_wide(first), _wide(second)], dim=1)
        ids, inverse, counts = torch.unique(labels, sorted=True, return_inverse=True, return_counts=True)
        sums = rows.new_zeros(len(ids), rows.shape[1])
        sums = sums.index_add_(0, inverse.to(rows.device), rows)
        means = sums / counts.to(rows)[:, None]
        own, other = means.chunk(2, dim=1)
        kept = ((own + other) / 2).detach()
        if not len(ids):
            return PrototypeContrast(rows.sum(), ids, kept)
        units = _unit_rows(torch.cat([own, other]))
        itself = torch.eye(len(units), dtype=torch.bool, device=units.device)
        scores = (units @ units.T / temperature).masked_fill(itself, -torch.inf)
        partners = torch.arange(len(units), device=units.device).roll(-len(ids))
        return PrototypeContrast(F.cross_entropy(scores, partners), ids, kept)


def variant_labels(labels: Tensor, variants: int, num_classes: int, mixed: Tensor | None = None) -> Tensor:
    r"""A class id for each row of :func:`rotate_views`: :math:`y_j + C \cdot k` for variant k of image j.

    Args:
        labels: (n,) integer class ids below ``num_classes``.
        variants: V, rotated variants per image.
        num_classes: C.
        mixed: (n,) bool, images that are mixed from two classes: each of their variants becomes a class of its own,
            with the ids :math:`C V + k n + j` that no image has.

    Returns:
        (V·n,) int64.

    Example:
        >>> variant_labels(torch.tensor([0, 2]), 2, 10, torch.tensor([False, True])).tolist()
        [0, 21, 10, 23]
    """
    blocks = torch.arange(variants, device=labels.device)[:, None]
    ids = labels.long() + num_classes * blocks
    if mixed is not None:
        fresh = torch.arange(ids.numel(), device=labels.device).view_as(ids) + num_classes * variants
        ids = torch.where(mixed, fresh, ids)
    return ids.flatten()


def draw_offset(in_features: int, projection_dim: int, generator: torch.Generator) -> int:
    """First column of the slice of the features that :func:`instance_contrast` compares with: uniform in [0, D - p).

    Nothing is drawn and it is 0 where the embedding is as wide as the features.

    Example:
        >>> draw_offset(128, 128, torch.Generator())
        0
    """
    if in_features <= projection_dim:
        return 0
    return int(torch.randint(in_features - projection_dim, (), generator=generator, device=generator.device))


def instance_contrast(
    embeddings: Tensor,
    features: Tensor,
    labels: Tensor,
    *,
    form: Form,
    offset: int = 0,
    temperature: float = 0.07,
    scale: float = 1.0,
) -> Tensor:
    r"""Supervised contrast of 2n rows, two views of n images, with an embedding and a slice of the features.

    With unit embeddings z, :math:`h = f / \lVert f \rVert` and o the offset:

    .. math::
        A = s (z\, h_{:, o:o+p}^\top + z z^\top), \quad
        E = \exp\bigl((A - \operatorname{rowmax} A) / \tau\bigr), \quad
        \ell = -\log\Bigl(\frac{E}{\sum_j E_{ij} + \epsilon} + \epsilon\Bigr), \quad \epsilon = 10^{-8}

    ``sup`` is the mean over rows of the mean :math:`\ell_{ij}` over all rows j of the same label, i itself included.
    ``form="memory"`` is ``sup``. ``form="new"`` sets :math:`E_{ii} = 0` and is the mean of :math:`\ell` at the other
    view of the same image, plus twice ``sup``; its diagonal adds a constant (18.42 / positives, twice) that has no
    gradient. The row maximum is not differentiated. Computed in float32 with autocast off, or in float64.

    Args:
        embeddings: (2n, p) unit rows; row i + n is the other view of row i.
        features: (2n, D), D at least p, as they are: they are scaled to length 1 here.
        labels: (n,) integer ids of the first n rows, see :func:`variant_labels`; the other view has the same.
            Labels on the host spare a GPU the wait for how many pairs there are.
        form: See above.
        offset: First column of the slice, see :func:`draw_offset`.
        temperature: :math:`\tau`.
        scale: s.

    Returns:
        Scalar; 0 with a graph for no rows.

    Raises:
        ArgumentError: If an option is not allowed.
        BatchError: If shapes or dtypes do not fit, or the slice ends beyond the features.

    Example:
        >>> rows = torch.nn.functional.normalize(torch.randn(8, 3), dim=1)
        >>> loss = instance_contrast(rows, torch.randn(8, 5), torch.tensor([0, 1, 0, 2]), form="memory", offset=1)

    Source: Y. Wei et al., arXiv 2308.00301; Y. Guo, B. Liu, D. Zhao, ICML 2022.
    """
    check_choice("form", form, ("new", "memory"))
    check_number("temperature", temperature, above=0)
    check_number("scale", scale, above=0)
    _check_rows("embeddings", embeddings, None)
    _check_rows("features", features, (len(embeddings), None))
    _check_labels("labels", labels, len(embeddings) // 2)
    width = embeddings.shape[1]
    if len(embeddings) % 2 or not 0 <= offset <= features.shape[1] - width:
        raise BatchError(
            f"embeddings must have two views of each row and features at least offset + p columns, got embeddings of "
            f"shape {tuple(embeddings.shape)}, features of shape {tuple(features.shape)} and offset={offset}; "
            f"project to at most as many dimensions as the features have"
        )
    with torch.autocast(embeddings.device.type, enabled=False):
        z, f = _wide(embeddings), _wide(features)
        if not len(z):
            return z.sum() + f.sum()
        h = _unit_rows(f)[:, offset : offset + width]
        row, column, positives = (part.to(z.device) for part in _same_label(torch.cat([labels, labels])))
        share = (1 / len(z)) / (positives.to(z)[row] + _EPSILON)
        if form == "new":
            rows = torch.arange(len(z), device=z.device)
            row, column = torch.cat([row, rows]), torch.cat([column, rows.roll(len(labels))])
            share = torch.cat([2 * share, share.new_full((len(z),), 1 / len(z))])
        # the small factor is scaled, not the product, which is (2n, 2n)
        loss: Tensor = _PairCosts.apply(scale / temperature * z, h + z, row, column, share, form == "memory")
        return loss


def _same_label(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of each pair with one label, row after row, and in how many pairs a row is."""
    ordered, order = labels.sort(stable=True)
    begin = torch.searchsorted(ordered, labels)
    positives = torch.searchsorted(ordered, labels, right=True) - begin
    row = torch.arange(len(labels), device=labels.device).repeat_interleave(positives)
    number = torch.arange(len(row), device=labels.device)  # of the pair; those of the rows before are taken off
    return row, order[number + (begin - positives.cumsum(0) + positives)[row]], positives


class _PairCosts(torch.autograd.Function):
    r"""The sum of :math:`\ell` of some pairs of rows, each with its share; see :func:`instance_contrast`.

    Nearly all entries of the matrix of weights are needed for the row sums only, and so for the gradient, which is
    found together with the loss: no matrix is kept for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, row: Tensor, column: Tensor, share: Tensor, diagonal: bool
    ) -> Tensor:
        ctx.diagonal = diagonal
        loss, *slopes = _cost_and_slopes(left, right, row, column, share, diagonal)
        ctx.save_for_backward(left, right, row, column, share, *slopes)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        left, right, row, column, share, of_left, of_right = ctx.saved_tensors
        if torch.is_grad_enabled():  # the slopes will be differentiated themselves
            _, of_left, of_right = _cost_and_slopes(left, right, row, column, share, ctx.diagonal)
        return slope * of_left, slope * of_right, None, None, None, None


def _cost_and_slopes(
    left: Tensor, right: Tensor, row: Tensor, column: Tensor, share: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, and its slopes by ``left`` and ``right``; works in place, for the matrix has a row for each view."""
    scores = left @ right.T
    scores = scores.sub_(scores.detach().amax(dim=1, keepdim=True))
    if not diagonal:
        with torch.no_grad():
            scores.fill_diagonal_(-torch.inf)
    weights = scores.exp_()
    totals = weights.sum(dim=1) + _EPSILON
    parts = weights[row, column] / totals[row]
    kept = parts + _EPSILON
    of_pairs = -share * parts / kept  # the slopes by the scores of the pairs, the totals held
    of_rows = torch.zeros_like(totals).index_put_((row,), of_pairs, accumulate=True)
    by_row = (-of_rows / totals)[:, None]
    slopes = weights * by_row if torch.is_grad_enabled() else weights.mul_(by_row)  # autograd still needs the weights
    slopes = slopes.index_put_((row, column), of_pairs, accumulate=True)
    return -(share * kept.log()).sum(), slopes @ right, (left.T @ slopes).T


def mixed_cross_entropy(logits: Tensor, first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    r"""Cross-entropy of images mixed from two classes: mean of :math:`(1-\lambda)\,CE(a) + \lambda\,CE(b)`.

    Computed in float32, or in float64 for float64 logits, also under autocast.

    Args:
        logits: (m, C), over all classes.
        first: (m,) integer class ids a.
        second: (m,) integer class ids b.
        share: (m,) share of b, in [0, 1].

    Returns:
        Scalar; 0 with a graph for no rows.

    Raises:
        BatchError: If shapes or dtypes do not fit, or (seen on a CPU only) a label is not below C.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
        >>> share = torch.tensor([0.25, 0.4], dtype=torch.float64)
        >>> round(float(mixed_cross_entropy(logits, torch.tensor([0, 1]), torch.tensor([2, 1]), share)), 10)
        0.7356453667
    """
    _check_rows("logits", logits, None)
    for name, labels in (("first", first), ("second", second)):
        _check_labels(name, labels, len(logits), below=logits.shape[1])
    if share.shape != first.shape or not share.dtype.is_floating_point:
        raise BatchError(
            f"share must be floating-point numbers of shape {tuple(first.shape)}, "
            f"got {share.dtype} of shape {tuple(share.shape)}"
        )
    if not len(logits):
        return _wide(logits).sum()
    costs = -F.log_softmax(_wide(logits), dim=1)
    both = costs.gather(1, torch.stack([first, second], dim=1).to(costs.device, torch.int64))
    of_second = share.to(both)
    return ((1 - of_second) * both[:, 0] + of_second * both[:, 1]).mean()


def pair_probabilities(means: Tensor) -> tuple[Tensor, Tensor]:
    r"""How often each pair of classes is mixed: :math:`\mathrm{softmax}(1 / \lVert \mu_i - \mu_k \rVert)`.

    Args:
        means: (K, p).

    Returns:
        ``(pairs, probabilities)``: (R, 2) int64 positions i < k in lexicographic order, R = K (K - 1) / 2, and (R,)
        float64. Distances below 1e-6 count as 1e-6, so that coincident means share everything.

    Example:
        >>> pairs, probabilities = pair_probabilities(torch.tensor([[0.0], [1.0], [3.0]]))
        >>> pairs.tolist(), [round(float(q), 3) for q in probabilities]
        ([[0, 1], [0, 2], [1, 2]], [0.472, 0.242, 0.286])
    """
    means = means.detach().double()
    pairs = torch.combinations(torch.arange(len(means), device=means.device)).reshape(-1, 2)
    distances = vector_norm(means[pairs[:, 0]] - means[pairs[:, 1]], dim=1)
    return pairs, torch.softmax(1 / distances.clamp(min=_NEAREST), dim=0)


def pair_counts(probabilities: Tensor, total: int, generator: torch.Generator, *, rule: PairRule = "round") -> Tensor:
    """How many images each pair gets; they always add up to ``total``.

    ``"round"`` rounds ``probabilities * total`` half to even, and adds or takes one at random pairs until the sum is
    right; where all round to zero, the pairs are therefore uniform whatever the probabilities. ``"multinomial"``
    draws each image's pair with the probabilities, which follows them for any number of pairs.

    Args:
        probabilities: (R,) on the generator's device, R at least 1.
        total: Images.
        generator: Where the random numbers come from.
        rule: See above.

    Returns:
        (R,) int64.

    Raises:
        ArgumentError: If the rule is none of the two, or the probabilities are none.

    Example:
        >>> pair_counts(torch.tensor([0.7, 0.2, 0.1]), 10, torch.Generator()).tolist()
        [7, 2, 1]
    """
    check_choice("pair_rule", rule, ("round", "multinomial"))
    if not len(probabilities) or not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ArgumentError(f"probabilities must be at least one number from 0 to 1, got {probabilities.tolist()}")
    if rule == "multinomial":
        if not total:
            return torch.zeros_like(probabilities, dtype=torch.int64)
        drawn = torch.multinomial(probabilities, total, replacement=True, generator=generator)
        return torch.bincount(drawn, minlength=len(probabilities))
    counts = (probabilities * total).round().long()  # half to even
    while surplus := int(counts.sum()) - total:
        eligible = torch.nonzero(counts > 0).flatten() if surplus > 0 else torch.arange(len(counts))
        order = torch.randperm(len(eligible), generator=generator)[: abs(surplus)]
        counts[eligible[order]] -= 1 if surplus > 0 else -1
    return counts


class MixedBatch(NamedTuple):
    """A replay batch some of whose images are mixed from two.

    Attributes:
        images: (m, ...), ``(1 - share) * x_first + share * x_second``.
        first: (m,) int64.
        second: (m,) int64.
        share: (m,) share of the second, in [0, 1], float32 (float64 for float64 images).
    """

    images: Tensor
    first: Tensor
    second: Tensor
    share: Tensor

    @property
    def mixed(self) -> Tensor:
        """(m,) bool, whether an image is of two classes."""
        return (self.first != self.second) & (self.share > 0)

    @classmethod
    def pure(cls, images: Tensor, labels: Tensor) -> MixedBatch:
        """Images of one class each."""
        share = torch.zeros(len(images), dtype=_share_dtype(images), device=images.device)
        return cls(images, labels, labels, share)


class ClassMemory(Protocol):
    """What :meth:`OnlinePrototypes.mix` asks of a memory; :class:`~clkit.methods.ReservoirBuffer` is one."""

    def classes(self) -> Iterable[int]:
        """The class ids that have rows stored."""

    def sample_classes(self, class_ids: Tensor, generator: torch.Generator) -> Sequence[Any]:
        """A random stored row of each class named, as something whose first entry is the images."""


class OnlinePrototypes:
    r"""The class means of the last step, and the replay batches that they ask for (adaptive prototypical feedback).

    Use it in a replay method: after each step :meth:`keep` the means that :func:`prototype_contrast` gave for the
    memory's sample; before the next one :meth:`mix` that step's sample. A share of the sample is mixed among itself,
    the rest is replaced by mixtures of pairs of classes, close pairs more often. Everything is drawn from the
    generator that is given; the global random states are not touched. Means are held on the host, without a graph.

    Args:
        base_rate: :math:`\rho`, share of a replay batch that is mixed among itself.
        mix_probability: P, how often images are mixed at all.
        mix_max: Largest share of the second image in the first part.
        mix_alpha: The share in the second part has the distribution Beta(alpha, alpha).
        pair_rule: ``"round"`` or ``"multinomial"``, see :func:`pair_counts`.
        pure_class: Which class an image of a pair has that is not mixed: always the ``"first"`` of the two, as
            published, or ``"either"``.
        mix_probability_rule: ``"squared"``: one coin for the whole first part and one for each row, so that a row is
            mixed with probability P squared, as published; ``"once"``: one for each row.

    Raises:
        ArgumentError: If an argument is not allowed.

    Example:
        >>> prototypes = OnlinePrototypes(base_rate=1.0, mix_probability=1.0)
        >>> prototypes.keep(torch.tensor([0, 3]), torch.eye(2))
        >>> prototypes.ids.tolist()
        [0, 3]

    Source: Y. Wei, J. Ye, Z. Huang, J. Zhang, H. Shan, arXiv 2308.00301.
    """

    def __init__(
        self,
        *,
        base_rate: float = 0.75,
        mix_probability: float = 0.6,
        mix_max: float = 0.6,
        mix_alpha: float = 0.4,
        pair_rule: PairRule = "round",
        pure_class: PureClass = "first",
        mix_probability_rule: MixRule = "squared",
    ) -> None:
        self.base_rate = check_probability("base_rate", base_rate)
        self.mix_probability = check_probability("mix_probability", mix_probability)
        self.mix_max = check_probability("mix_max", mix_max)
        self.mix_alpha = check_number("mix_alpha", mix_alpha, above=0)
        check_choice("pair_rule", pair_rule, ("round", "multinomial"))
        check_choice("pure_class", pure_class, ("first", "either"))
        check_choice("mix_probability_rule", mix_probability_rule, ("squared", "once"))
        self.pair_rule: PairRule = pair_rule
        self.pure_class: PureClass = pure_class
        self.mix_probability_rule: MixRule = mix_probability_rule
        self.reset()

    def reset(self) -> None:
        """Forget all means."""
        self.ids = torch.empty(0, dtype=torch.int64)
        self.means = torch.empty(0, 0)
        self._probabilities: Tensor | None = None

    def __len__(self) -> int:
        """Classes whose mean is known."""
        return len(self.ids)

    def keep(self, ids: Tensor, means: Tensor) -> None:
        """Replace what is known by the means of one step.

        Args:
            ids: (K,) int64, ascending class ids.
            means: (K, p) floating point; copied to the host without their graph.

        Raises:
            BatchError: If means are not finite; what was known is kept.
            StateError: If they are of another form; what was known is kept.
        """
        if means.shape[:1] == ids.shape and not bool(means.isfinite().all()):
            raise BatchError(
                f"the means of classes {ids.tolist()} are not all finite, as the embeddings of this step were not; "
                f"the means from before are kept; a lower learning rate may help"
            )
        self.load_state_dict({"ids": ids, "means": means})

    def mix(
        self,
        images: Tensor,
        labels: Tensor,
        memory: ClassMemory,
        generator: torch.Generator,
        *,
        size: int | None = None,
    ) -> MixedBatch:
        """A replay batch made of a sample of the memory, and of pairs of classes drawn from the whole of it.

        The first ``floor(size * base_rate)`` rows (or as many as there are) are rows of the sample mixed among
        themselves; the others are mixtures of pairs of classes. Classes that have left the memory are replaced by
        random ones that it shares with the prototypes. With fewer than two prototypes, or none that the memory has,
        there are no pairs: then all rows are of the first kind, at most as many as the sample has.

        Args:
            images: (n, ...) floating point, the sample.
            labels: (n,) int64.
            memory: Where the images of pairs come from, such as a :class:`~clkit.methods.ReservoirBuffer`.
            generator: A CPU generator.
            size: Rows wanted; ``None`` for n.

        Raises:
            BatchError: If shapes or dtypes do not fit.
        """
        if not images.dtype.is_floating_point:
            raise BatchError(f"images must be floating-point numbers to be mixed, got {images.dtype}")
        _check_labels("labels", labels, len(images))
        size = len(images) if size is None else size
        stored = set(memory.classes())
        shared = [c for c in self.ids.tolist() if c in stored]
        paired = len(self) >= 2 and bool(shared)
        base = self._mix_base(
            images, labels, min(int(size * self.base_rate) if paired else size, len(images)), generator
        )
        missing = size - len(base.images)
        if not paired or not missing:
            return base
        feedback = self._mix_pairs(images, missing, memory, shared, generator)
        return MixedBatch(*(torch.cat(parts) for parts in zip(base, feedback, strict=True)))

    def _mix_base(self, images: Tensor, labels: Tensor, count: int, generator: torch.Generator) -> MixedBatch:
        rows = torch.randperm(len(images), generator=generator)[:count]
        partners = rows[torch.randperm(count, generator=generator)]
        drawn = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        coins = drawn[:, 0] < self.mix_probability
        if self.mix_probability_rule == "squared":
            coins &= self._coin(generator)
        share = torch.where(coins, drawn[:, 1] * self.mix_max, 0.0)
        rows, partners = rows.to(images.device), partners.to(images.device)
        labels = labels.to(images.device, torch.int64)
        return _mixture(images[rows], images[partners], labels[rows], labels[partners], share)

    @property
    def pair_entropy(self) -> float | None:
        """Entropy in nats of the distribution over pairs of the last :meth:`mix`; ``None`` without pairs."""
        if self._probabilities is None:
            return None
        return float(torch.special.entr(self._probabilities).sum())

    def _mix_pairs(
        self, like: Tensor, count: int, memory: ClassMemory, shared: list[int], generator: torch.Generator
    ) -> MixedBatch:
        pairs, probabilities = pair_probabilities(self.means)
        self._probabilities = probabilities
        counts = pair_counts(probabilities, count, generator, rule=self.pair_rule)
        chosen = torch.nonzero(counts).flatten()
        counts = counts[chosen]
        ids = self._stored(self.ids[pairs[chosen]], shared, generator).repeat_interleave(counts, dim=0)
        share = self._pair_shares(counts, generator)
        first, second = ids.unbind(dim=1)
        x, y = memory.sample_classes(torch.cat([first, second]), generator)[0].to(like).chunk(2)
        first, second = first.to(like.device), second.to(like.device)
        if self.pure_class == "either":
            swapped = ((torch.rand(count, generator=generator) < 0.5) & (share == 0)).to(like.device)
            pixels = swapped.view(-1, *[1] * (like.ndim - 1))
            x, y = torch.where(pixels, y, x), torch.where(pixels, x, y)
            first, second = torch.where(swapped, second, first), torch.where(swapped, first, second)
        return _mixture(x, y, first, second, share)

    def _stored(self, ids: Tensor, shared: list[int], generator: torch.Generator) -> Tensor:
        """The classes themselves, and random shared ones for those that have left the memory."""
        stored = torch.tensor(shared)
        instead = stored[torch.randint(len(shared), ids.shape, generator=generator)]
        return torch.where(torch.isin(ids, stored), ids, instead)

    def _pair_shares(self, counts: Tensor, generator: torch.Generator) -> Tensor:
        """Beta numbers by the inverse of the distribution function, one uniform number each; one coin for a pair."""
        coins = torch.rand(len(counts), generator=generator, dtype=torch.float64) < self.mix_probability
        share = torch.rand(int(counts.sum()), generator=generator, dtype=torch.float64)
        quantiles = torch.from_numpy(betaincinv(self.mix_alpha, self.mix_alpha, share.numpy()))
        return torch.where(coins.repeat_interleave(counts), quantiles, 0.0)

    def _coin(self, generator: torch.Generator) -> bool:
        return float(torch.rand((), generator=generator, dtype=torch.float64)) < self.mix_probability

    def state_dict(self) -> dict[str, Tensor]:
        """What is known, as plain tensors: ``ids`` (K,) int64 and ``means`` (K, p)."""
        return {"ids": self.ids.clone(), "means": self.means.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave.

        Raises:
            StateError: If it is of another form; what was known before is kept.
        """
        with exact():
            table = {"ids": Numbers(("K",), least=0, ids=True), "means": Numbers(("K", "p"), FLOATS)}
            saved = read_state(state, table, "OnlinePrototypes")
            self.ids, self.means = (saved[name].to("cpu", copy=True) for name in ("ids", "means"))


def _mixture(x: Tensor, y: Tensor, first: Tensor, second: Tensor, share: Tensor) -> MixedBatch:
    share = share.to(x.device, _share_dtype(x))
    weight = share.view(-1, *[1] * (x.ndim - 1))
    return MixedBatch(((1 - weight) * x + weight * y).to(x.dtype), first, second, share)


def _share_dtype(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _unit_rows(rows: Tensor) -> Tensor:
    """Rows of length 1; a row without a direction stays as it is, with a gradient of ordinary size."""
    lengths = vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(lengths > _SHORTEST, lengths, 1.0)


def _check_rows(name: str, rows: Tensor, shape: tuple[int | None, ...] | None) -> None:
    fits = rows.ndim == 2 and (
        shape is None or all(wanted in (None, got) for wanted, got in zip(shape, rows.shape, strict=True))
    )
    if not fits or not rows.dtype.is_floating_point:
        told = "(n, p)" if shape is None else str(shape).replace("None", "D")
        raise BatchError(
            f"{name} must be floating-point numbers of shape {told}, got {rows.dtype} of shape {tuple(rows.shape)}"
        )


def _check_labels(name: str, labels: Tensor, rows: int, *, below: int | None = None) -> None:
    if labels.dtype == torch.bool or labels.dtype.is_floating_point or labels.dtype.is_complex:
        raise BatchError(
            f"{name} must be integer class ids, got {labels.dtype}; call .long() if they are whole numbers"
        )
    if labels.shape != (rows,):
        raise BatchError(f"{name} must have shape ({rows},), got {tuple(labels.shape)}")
    if below is not None and labels.device.type == "cpu" and rows:  # elsewhere the question would cost a wait
        low, high = (int(bound) for bound in labels.aminmax())
        if low < 0 or high >= below:
            raise BatchError(
                f"{name} must be class ids from 0 to {below - 1}, as the head has {below} outputs, "
                f"got {low if low < 0 else high}; make the head as wide as the number of classes"
            )
