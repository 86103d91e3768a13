"""MEND: small trained networks that turn the gradient of one wrong answer into a local edit of a classifier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clkit.arguments import in_short
from clkit.errors import ArgumentError, BatchError, StateError
from clkit.methods._checks import check_count, check_number, check_probability
from clkit.methods._edit_arguments import check_scale
from clkit.methods._edit_guard import EditReference, Guard, LocalityReport
from clkit.methods._edit_log import EditLog, EditRecord
from clkit.methods._editing import NOTHING, Attempt, EditResult, Images, Proposal, Rule, retained
from clkit.methods._editor_network import EditorNetworks
from clkit.methods._editor_saved import editor_settings, editor_state, read_editor, saved_editor
from clkit.methods._equivalents import FLIP_SHARE, Equivalence, equivalents_of
from clkit.methods._trained_editor import TrainedEditor

__all__ = [
    "EditRecord",
    "EditReference",
    "EditResult",
    "EditorNetworks",
    "GradientEditor",
    "Guard",
    "LocalityReport",
    "Proposal",
]


class GradientEditor(TrainedEditor):
    r"""Edits a classifier's weights so that chosen images get chosen labels, and little else changes (MEND).

    The gradient of a weight is a sum of outer products :math:`\sum \delta u^\top` over positions. Networks that are
    trained once, for this classifier, map the normalised pairs :math:`[u; \delta]` to
    :math:`[\tilde u; \tilde\delta]`, and the edit is

    .. math::
        \tilde W_l = W_l - \alpha_l \sum \tilde\delta \, \tilde u^\top

    Steps: :meth:`fit_statistics` on a few hundred edits; train :attr:`networks` by :meth:`meta_loss`, with an optimizer
    of :meth:`parameter_groups`; then :meth:`edit`. Applied edits stand in a log and are taken back in any order, to the
    bit (:meth:`revert`). The network is used in evaluation mode, and gets no gradients; its weights are written in
    place. The editor is no part of it.

    It is made for corrections. Several edits in a row, and arbitrary new labels, cost accuracy elsewhere: give
    :meth:`edit` a reference, whose answers it guards.

    Args:
        model: The classifier; its forward takes images (B, …) and returns logits (B, C), or (B,) of one output.
        layers: What is edited: ``"auto"``, the MLPs of the last three transformer blocks, else the last three
            convolutions or linear layers that see more than one position of the example; ``"mlp"`` these MLPs alone;
            ``"attention"`` the output projections of the last three; ``"head"`` the classifier; dotted paths; or
            several of these.
        example: Images (B, …) for one forward, which shows the order of the layers; by default of the size that the
            module (``example_input_array``) or timm names.
        classifier: Dotted path of the classifier, or ``"auto"``.
        rank: Of the networks' blocks, at least 1.
        n_hidden: Blocks after the first, at least 0.
        norm_scope: Statistics that normalise rows: of all layers of a ``"shape"``, of each ``"layer"``, or ``"none"``.
        share: Whether layers of a ``"shape"`` share a network, or ``"none"`` do.
        transforms: What goes through networks: inputs and gradients in one (``"joint"``) or in two (``"separate"``),
            ``"inputs"`` or ``"gradients"`` alone, or the ``"smaller"`` of them.
        alpha: First step size of each layer, above 0; with ``"auto"`` the one with which the median first update has
            5 % of the norm of the weight.
        c_edit: Weight of the edit in the meta-loss, above 0.
        c_loc: Weight of locality, at least 0.
        loss: ``(logits (B, C), labels (B, C)) -> (B,)``, for networks of several labels an image; ``None`` for one
            label an image.
        store_rank: Of the edits, which are cut to it before they are applied; ``None`` leaves them whole.
        seed: Of the networks' first values, at least 0; the global random state is not used.

    Attributes:
        networks: What is learned, an ``nn.Module``.

    Raises:
        ArgumentError: If an argument is not allowed, a layer cannot be edited, or the network cannot run the example.
        ConfigurationError: If the network has no classifier, or returns something else than logits.

    Example:
        >>> import warnings
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> editor = GradientEditor(net, "0", example=torch.zeros(1, 4), norm_scope="none", alpha=0.5)
        >>> x, before = torch.ones(1, 4), net[0].weight.detach().clone()
        >>> wrong = net(x).argmin(dim=1)
        >>> with warnings.catch_warnings():  # the editor is not trained
        ...     warnings.simplefilter("ignore")
        ...     result = editor.edit(x, wrong, guard=None)
        >>> result.status, bool(net(x).argmax() == wrong)
        ('applied', True)
        >>> editor.revert(result.id)
        >>> torch.equal(net[0].weight, before)
        True

    Source: E. Mitchell, C. Lin, A. Bosselut, C. Finn, C. D. Manning, ICLR 2022, arXiv 2110.11309. The minus sign is
    that of the paper; the loss is a sum over edits, so that edits of a batch add up; statistics do not change later.
    """

    @property
    def log(self) -> list[EditRecord]:
        """The edits that were applied and not taken back, oldest first."""
        return list(self._log.records)

    @property
    def edit_log(self) -> EditLog:
        """The log itself, which knows the original weights: for whoever marks or saves the changed layers.

        Another one may be set where the weights are others for a while.
        """
        return self._log

    @edit_log.setter
    def edit_log(self, log: EditLog) -> None:
        self._log = log

    @property
    def retention(self) -> float | None:
        """Share of the edits in the log whose images all have their labels now; ``None`` without edits."""
        return retained(self._network, self._objective, self._log.records)

    # ---- edits

    def span(self, reference: Any, energy: float = 0.999) -> dict[str, Tensor]:
        """Return the directions in which inputs of the edited layers lie, for edits that leave them alone.

        Args:
            reference: Images whose answers shall not move, see :class:`EditReference`.
            energy: Share of the sum of squares that the directions hold, from 0 to 1.

        Returns:
            By layer (d_in, k) orthonormal columns, float64, k the fewest that hold it. An edit orthogonal to them moves
            what the layer computes for the reference by the rest of it alone.
        """
        check_probability("energy", energy)
        images = reference if isinstance(reference, EditReference) else EditReference(reference)
        spans = {}
        for name, gram in self._network.input_grams(images.parts()).items():
            values, directions = torch.linalg.eigh(gram)
            shares = values.flip(0).clamp(min=0).cumsum(0)
            count = int((shares < energy * shares[-1]).sum()) + 1
            spans[name] = directions.flip(1)[:, :count]
        return spans

    def propose(
        self,
        x: Tensor,
        y: Tensor,
        protect: Mapping[str, Tensor] | None = None,
        within: Mapping[str, Tensor] | None = None,
    ) -> Proposal:
        """Return the edit of images (B, …) to labels (B,) without applying it; several are edited together.

        Args:
            x: The images.
            y: The labels.
            protect: What :meth:`span` gave, to which the edit shall be orthogonal.
            within: By layer a bool mask of its weight; nothing is added elsewhere.

        Raises:
            BatchError: If a batch is not as above, or no gradient reaches any edited layer.
            NotFittedError: If statistics are missing.
        """
        x, y = self._pair((x, y))
        factors = self._factors(x, y, protect, within)
        if factors is None:
            raise BatchError(NOTHING)
        return Proposal(x.cpu(), y.cpu(), factors)

    def apply(self, proposal: Proposal, scale: float = 1.0) -> EditResult:
        """Apply a proposal, multiplied by a scale, whatever it does.

        Raises:
            ArgumentError: If it is no proposal, or the scale is not above 0.
            BatchError: If weights would leave the range of their dtype.
            EditConflictError: If weights are not what the log says; nothing is changed in either case.
        """
        check_number("scale", scale, above=0)
        if not isinstance(proposal, Proposal):
            raise ArgumentError(f"apply() takes what propose() gave, got {in_short(proposal)}")
        attempt = self._attempt(*self._pair((proposal.x, proposal.y)), None, None)
        return attempt.apply(proposal.factors, scale)

    def edit(
        self,
        x: Tensor,
        y: Tensor,
        equivalents: Tensor | Equivalence | None = None,
        *,
        scale: float | Literal["smallest", "unit"] = "smallest",
        flip_share: float = FLIP_SHARE,
        max_repeats: int = 1,
        skip_satisfied: bool = True,
        guard: Guard | None = Guard(),
        reference: Any = None,
        protect: Mapping[str, Tensor] | None = None,
        within: Mapping[str, Tensor] | None = None,
        accept: Callable[[], str] | None = None,
    ) -> EditResult:
        """Edit the network so that images get labels; or say why not, and leave every bit as it was.

        Args:
            x: (B, …) images; several are one edit, taken back together.
            y: (B,) integer labels.
            equivalents: Other views that shall get the same label: (B, k, …), or (k, …) of a single image; or a
                function ``(images, generator) -> images``, called eight times.
            scale: What the proposal is multiplied by: ``"smallest"``, the least of 0.25, 0.5, 0.75, 1, 1.5, 2, 3 that
                gives all images and ``flip_share`` of the equivalents their label, and if none does the edit is
                refused; ``"unit"``, 1; or a number above 0. These two apply it whether or not the answer is then right.
            flip_share: See ``scale``; from 0 to 1.
            max_repeats: Proposals at most, each for the network as the ones before it have left it; more than one adds
                up quickly, and does damage.
            skip_satisfied: Whether nothing is done where all images and ``flip_share`` of the equivalents have their
                label already.
            guard: Bounds on what the edit may do to the reference; ``None`` for none.
            reference: Images whose answers shall not move, see :class:`EditReference`; those of ``x`` are left out.
            protect: What :meth:`span` gave, to which the edit shall be orthogonal; it costs reliability.
            within: By layer a bool mask of its weight; nothing is added elsewhere.
            accept: A bound of your own beside the guard's: called with the edit in the weights, it returns what speaks
                against it, and nothing (``""``) where all is well.

        Raises:
            BatchError: If a batch is not as above.
            ArgumentError: If another argument is not allowed.
            NotFittedError: If statistics are missing.
            EditConflictError: If weights are not what the log says. In each case nothing is changed.
        """
        check_scale(scale)
        check_probability("flip_share", flip_share)
        check_count("max_repeats", max_repeats)
        if guard is not None and not isinstance(guard, Guard):
            raise ArgumentError(f"guard must be a Guard or None, got {in_short(guard)}")
        if accept is not None and not callable(accept):
            raise ArgumentError(f"accept must be a function, or None, got {in_short(accept)}")
        self._check_fitted()
        x, y = self._pair((x, y))
        attempt = self._attempt(x, y, equivalents, reference, protect, within)
        if guard is not None and (unseen := guard.unseen(attempt.reference)):
            self._warn(unseen)
        self._log.check(self._network.weights())
        return attempt.carry_out(Rule(scale, flip_share, max_repeats, skip_satisfied, guard, accept))

    def revert(self, *ids: int, inexact: bool = False) -> None:
        """Take edits back: the weights become, to the bit, those that the other edits give.

        Args:
            ids: Of edits in the log. Edits that came after keep what they add.
            inexact: Whether to go on where something else changed the weights since: these less the edits.

        Raises:
            ArgumentError: If there is no such edit in the log, or it was committed.
            EditConflictError: If weights are not what the log says; nothing is changed in either case.
        """
        weights = self._network.weights()
        self._log.find(ids)
        if inexact:
            self._warn("edits are taken back from weights that may have changed since: not to the bit")
            self._log.rebase(weights)
        self._log.revert(weights, ids)

    def revert_all(self) -> None:
        """Take all edits back that were not committed; raises as :meth:`revert`."""
        self.revert(*self._uncommitted())

    def commit(self, ids: int | Iterable[int] | None = None) -> None:
        """Make edits, by default all, part of the original weights, for good; raises as :meth:`revert`."""
        self._log.commit(self._network.weights(), self._uncommitted() if ids is None else ids)

    def rebase(self) -> None:
        """Take the weights, which something else changed, for the edited ones, so that edits can go on."""
        self._log.rebase(self._network.weights())

    def check(self) -> None:
        """Raise an EditConflictError if weights are not what the log of edits says."""
        self._log.check(self._network.weights())

    def replay(self, ids: int | Iterable[int]) -> list[EditResult]:
        """Make edits anew, each for the network that the other edits and the replayed ones before it give.

        They leave the log and enter it at its end, with new numbers and the same scales.

        Raises:
            ArgumentError: If there is no such edit in the log, or it was committed.
            EditConflictError: If weights are not what the log says.
            BatchError: If no gradient reaches any layer for one of them. In each case nothing is changed.
        """
        weights, own = self._network.weights(), self._log.find(ids)
        others = [record for record in self._log.find(self._uncommitted()) if record not in own]
        made: list[EditRecord] = []
        for record in own:
            with self._log.shown(weights, [*others, *made], alone=True):
                factors = dict(self.propose(record.x, record.y).factors)
            made.append(EditRecord(-1, record.x, record.y, record.scale, factors=factors))
        with self._log.kept(weights):
            self._log.revert(weights, [record.id for record in own])
            return [self.apply(Proposal(each.x, each.y, each.factors), each.scale) for each in made]

    @contextmanager
    def edited(self, edits: Proposal | int | Sequence[Proposal | int]) -> Iterator[None]:
        """Have edits in the weights inside the block, and bitwise what was there afterwards, whatever happens.

        Proposals are added to the weights as they are; numbers of edits in the log show these alone, on the original
        weights, and none of them the original weights. Blocks may be nested; the log does not change inside one.

        Raises:
            ArgumentError: If there is no such edit in the log, or proposals and numbers are mixed.
        """
        several = list(edits) if isinstance(edits, Sequence) else [edits]
        proposals = [each for each in several if isinstance(each, Proposal)]
        numbers = [each for each in several if not isinstance(each, Proposal)]
        if numbers and proposals:
            raise ArgumentError("edited() takes proposals, or numbers of edits in the log, not both; nest two blocks")
        records = self._log.find(numbers)
        records += [EditRecord(-1, each.x, each.y, factors=dict(each.factors)) for each in proposals]
        with self._log.shown(self._network.weights(), records, alone=len(numbers) == len(several)):
            yield

    def export_state_dict(self) -> dict[str, Tensor]:
        """Return a copy of the network's state dict on the CPU, the edits inside.

        Names are the network's own, without what ``torch.compile`` puts before those of a part that it has compiled.
        """
        return self._network.exported()

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the editor and its log as tensors and plain values; the network is saved by itself, edits inside."""
        return editor_state(self.networks, self._settings, self._fitted, self._made_for, self._log)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` gave, for the network that was saved with it.

        Raises:
            StateError: If it is of other layers or settings, or damaged; nothing is changed then.
        """
        read = read_editor(state, self.networks, self._settings, self._log, self._network.weights())
        self._fitted, self._made_for = read

    @classmethod
    def from_saved(cls, model: nn.Module, saved: Any, **options: Any) -> GradientEditor:
        """Return a saved editor, of the layers and settings that it was trained with, for its network.

        Args:
            model: The network that it was trained for.
            saved: What :meth:`state_dict` gave, a whole checkpoint of a run with ``strategy="editor_training"`` or with
                the callback ``MEND``, or the path of a file with either.
            options: Arguments of the constructor that no state holds: ``example``, ``classifier``, ``loss``,
                ``store_rank``, ``seed``; ``c_edit`` and ``c_loc`` for further training; ``alpha`` where statistics are
                still to be taken.

        Raises:
            ArgumentError: If there is no such file.
            StateError: If there is no editor in it, or it does not fit the network, or is damaged.
        """
        state = saved_editor(saved)
        layers, settings = editor_settings(state)
        try:
            editor = cls(model, layers, **{**settings, **options})
        except ArgumentError as error:
            raise StateError(f"no editor can be made of the saved layers and settings: {error}") from error
        editor.load_state_dict(state)
        return editor

    # ---- how it is done

    def _attempt(
        self, x: Tensor, y: Tensor, equivalents: Any, reference: Any, protect: Any = None, within: Any = None
    ) -> Attempt:
        views = equivalents_of(x, equivalents, (self.seed, len(self._log)))
        others = self._network.images("equivalents", views.flatten(0, 1)) if views.shape[1] else x[:0]
        images = Images(x, y, others, y.repeat_interleave(views.shape[1], dim=0))
        if reference is not None:
            reference = reference if isinstance(reference, EditReference) else EditReference(reference)
            reference = reference.without(x)
        propose = partial(self._factors, protect=protect, within=within)
        return Attempt(self._network, self._objective, self._log, propose, images, reference)

    def _uncommitted(self) -> list[int]:
        return [record.id for record in self._log.records if not record.committed]
