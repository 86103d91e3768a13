"""MEND: single answers of a run's network corrected, each by an edit that can be taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor

from clkit.arguments import check_arguments, in_short
from clkit.callbacks._edit_rules import check_averaging, check_strategy, deciding_head, stale_parts, tasks_of
from clkit.callbacks._edit_sources import read_edits, take_statistics, val_reference
from clkit.callbacks._exact_edits import count_in, features_of, propose_counting
from clkit.callbacks._kept_edits import KeepsEdits
from clkit.callbacks._run_edits import FeatureShift, LoggedEdit, RunEdit, feature_shift
from clkit.callbacks.head import HeadCallback
from clkit.distributed import gather_objects
from clkit.errors import ArgumentError, BatchError, ConfigurationError, refuse_unknown_arguments
from clkit.features.batch import BatchReader
from clkit.features.tap import path_of
from clkit.methods import EditReference, GradientEditor, Proposal
from clkit.methods._checks import check_count, check_number
from clkit.methods._edit_arguments import check_scale
from clkit.methods._edit_guard import Guard
from clkit.stream.experience import Experience
from clkit.surgery.fixed_classifier import simplex_classifier_of

__all__ = ["MEND"]

_REFERENCE = 512  # images of the validation loaders


class MEND(KeepsEdits):
    r"""Corrects single answers of the network, each by an edit that stands in a log and can be taken back.

    Choose it where a trained network answers an image wrongly and nothing else shall change. :meth:`edit` may be
    called at any time, in a run and after it; with ``edits`` given, they are made when the fit ends. The network is
    edited by a trained :class:`~clkit.methods.GradientEditor`, which is no part of the module: no optimizer and no DDP
    sees it, and it is saved with the edits in this callback's state. The edits themselves are in the module's weights.

    Where a head decides (:class:`~clkit.callbacks.AEFOCL`, :class:`~clkit.callbacks.NMC`,
    :class:`~clkit.callbacks.LDA`, on a network that does not train, or grafted), no editor is needed:
    the image is counted some times in the head's sums and taken out again exactly. ``result.route`` says which
    way was gone.

    An edit is a change of the network, and others learned it as it was. Heads beside it refuse a change of their
    features (``allow_stale=True`` goes on and says so); predictors of errors are named as stale. Masks of
    :class:`~clkit.callbacks.DST` hold: an edit belongs to the task that is shown, and changes only connections that no
    other task has. A simplex head is never edited, and features of the reference are compared.

    Args:
        editor: A file with a trained editor (its ``state_dict()``, or a checkpoint of the run that trained it; edits
            in its log are not taken up), the editor itself, or settings of a new one: it makes gradient steps, with
            statistics of the reference.
        edits: What to edit, ``(images, labels)`` or ``(images, labels, equivalents)`` each; the path of a file with
            ``images`` and ``labels``; or a function ``(trainer, module)`` that returns such a list.
        when: When ``edits`` are made: at the ``"fit_end"``, before its last evaluation; at each
            ``"train_epoch_end"``, those whose answers do not hold, which later training may wash out; or not
            (``"manual"``).
        route: ``"editor"``, ``"exact"``, or ``"auto"``: exact where a head decides.
        head: The name of the head to correct, where there are several.
        weight: How often an image is counted in a head, at least 1; three or ten times as often where that is not
            enough.
        scale: See :meth:`clkit.methods.GradientEditor.edit`.
        guard: Bounds on what an edit may do to the reference; ``None`` for none.
        reference: ``"val"``, up to 512 samples of the validation loaders; or see
            :class:`~clkit.methods.EditReference`; ``None`` for none.
        equivalence: A function ``(images, generator) -> images``: another view of each, which shall get the same
            label.
        max_feature_shift: Largest 1 - cosine, in the mean over the reference, by which an edit may move features.
        allow_stale: Whether an edit may change features that heads beside it have learned.
        target: ``"live"`` allows edits of weights of which another callback keeps an average.
        name: Prefix of what is logged, and part of the key in checkpoints.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.

    Raises:
        ArgumentError: If a value is not allowed.
        ConfigurationError: At the start, for a strategy that splits the network.
        EditConflictError: At the start, if the weights are not what the log of edits says.

    Example:
        >>> from clkit.callbacks import MEND
        >>> MEND(when="manual", max_feature_shift=0.1).state_key
        'MEND(mend)'

    Reference:
        E. Mitchell, C. Lin, A. Bosselut, C. Finn, C. D. Manning, "Fast Model Editing at Scale", ICLR 2022, arXiv
        2110.11309. The exact route and everything about streams are this library's.
    """

    def __init__(
        self,
        editor: str | Path | dict[str, Any] | GradientEditor | None = None,
        *,
        edits: Any = None,
        when: Literal["fit_end", "train_epoch_end", "manual"] = "fit_end",
        route: Literal["auto", "exact", "editor"] = "auto",
        head: str | None = None,
        weight: int = 30,
        scale: float | Literal["smallest", "unit"] = "smallest",
        guard: Guard | None = Guard(),
        reference: Any = "val",
        equivalence: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        max_feature_shift: float | None = None,
        allow_stale: bool = False,
        target: Literal["live"] | None = None,
        name: str = "mend",
        batch_reader: BatchReader | None = None,
    ) -> None:
        check_arguments(MEND, locals())
        if isinstance(editor, dict):
            refuse_unknown_arguments(GradientEditor, editor)
        check_scale(scale)
        if max_feature_shift is not None:
            check_number("max_feature_shift", max_feature_shift, at_least=0)
        self.weight = check_count("weight", weight)
        super().__init__(editor, name)
        self.edits = edits if edits is None or callable(edits) else read_edits(edits)
        self.when, self.route, self.head_name = when, route, head
        self.scale, self.guard, self.equivalence = scale, guard, equivalence
        if isinstance(reference, str) and reference != "val":
            raise ArgumentError(f"reference must be 'val', images, batches of them or None, got {reference!r}")
        self.reference = reference if reference is None or isinstance(reference, str) else EditReference(reference)
        self.max_feature_shift, self.allow_stale, self.target = max_feature_shift, allow_stale, target
        self.batch_reader = batch_reader
        self.results: list[RunEdit] = []
        """What became of ``edits``, one after another."""
        self._due = False  # whether they wait for the fit's end

    # ---- what the user asks for

    def edit(
        self,
        x: Tensor,
        y: Tensor,
        equivalents: Any = None,
        *,
        route: Literal["auto", "exact", "editor"] | None = None,
        task: int | None = None,
    ) -> RunEdit:
        """Edit so that images get labels; or say why not, and leave every bit as it was.

        It may be called inside the hooks of an evaluation. In several processes all call it, and the images of the
        first count.

        Args:
            x: (B, …) images; several are one edit, taken back together.
            y: (B,) integer labels, as batches have them.
            equivalents: Other views that shall get the same label, see :meth:`clkit.methods.GradientEditor.edit`; by
                default those of ``equivalence``.
            route: Another one than that of the constructor.
            task: Whose network, in a run with a network for each task; by default the one that is shown.

        Raises:
            BatchError: If a batch is not as above.
            NotFittedError: If the editor has no statistics, and there is no reference to take them from.
            EditConflictError: If weights are not what the log of edits says.
            ConfigurationError: If nothing decides that could be edited, a layer is not to be edited, a task trains, or
                a head beside it has learned the features that would move. In each case nothing is changed.
        """
        trainer, module = self._there()
        views = self.equivalence if equivalents is None else equivalents
        fits = trainer.state.fn == "fit" and trainer.state.status == "running"
        if route not in (None, "auto", "exact", "editor"):
            raise ArgumentError(f"route must be 'auto', 'exact', 'editor' or None, got {route!r}")
        if task is not None:
            check_count("task", task, at_least=0)
        if not isinstance(x, Tensor) or not isinstance(y, Tensor) or x.ndim < 2 or not len(x):
            seen = (f"shape {tuple(each.shape)}" if isinstance(each, Tensor) else in_short(each) for each in (x, y))
            raise BatchError(f"x and y must be tensors of images (B, …) and labels (B,), got {' and '.join(seen)}")
        with torch.inference_mode(False):
            x, y = x.detach().clone(), y.detach().clone()
            head = deciding_head(self.state_key, trainer, route or self.route, self.head_name)
            if self.target is None and (head is None or head.grafted):
                check_averaging(self.state_key, trainer, fits=fits)
            reference = self._reference(trainer)
            if head is not None:
                return self._count(trainer, module, head, x, y, views, reference)
            return self._edit_network(trainer, module, x, y, views, reference, task)

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what edits cannot stand beside."""
        check_strategy(self.state_key, trainer)
        if stage == "fit" and self.edits is not None and self.when != "manual" and self.target is None:
            check_averaging(self.state_key, trainer, fits=True)
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that edits of a loaded run are there."""
        self.verify(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have the edits wait for the fit's end."""
        super().on_train_start(trainer, pl_module)
        self._due = self.when == "fit_end"

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that edits of a loaded run are there."""
        super().on_validation_start(trainer, pl_module)
        if trainer.state.fn != "fit":
            self.verify(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Edit before the last evaluation of the fit."""
        if self._boundaries.ending or trainer.max_epochs == trainer.current_epoch + 1:
            self._make_due(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit, where nothing ended before."""
        super().on_train_end(trainer, pl_module)
        self._make_due(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Edit what does not hold, and log which share of the edits holds."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.when == "train_epoch_end":
            self._make(trainer, pl_module)
        if self._editor is not None and self._state is None and self._editor.log:
            pl_module.log(f"{self.name}/retention", self._editor.retention or 0.0, rank_zero_only=True)

    # ---- how it is done

    def _make_due(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._due:
            self._due = False
            self._make(trainer, module)

    def _make(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make the edits that the constructor was given."""
        wanted = read_edits(self.edits(trainer, module)) if callable(self.edits) else self.edits or []
        results = [self.edit(*each) for each in wanted]
        refused = [result for result in results if result.status == "refused"]
        if refused:
            self._say(f"{len(refused)} of {len(results)} edits were refused, the first because: {refused[0].reason}")
        self.results += results

    def _reference(self, trainer: pl.Trainer) -> EditReference | None:
        if isinstance(self.reference, str):  # "val"
            return val_reference(trainer, self, _REFERENCE)
        return self.reference

    def _enter(self, trainer: pl.Trainer, result: RunEdit, **more: Any) -> RunEdit:
        """Give an edit that was made its number, and note it."""
        numbered = replace(result, id=self._next_id)
        at = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self.records.append(LoggedEdit.of(numbered, id=self._next_id, **at, **more))
        self._next_id += 1
        return numbered

    def _count(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        head: HeadCallback,
        x: Tensor,
        y: Tensor,
        views: Any,
        reference: EditReference | None,
    ) -> RunEdit:
        """Correct a head by counting the images in its sums."""
        if trainer.world_size > 1:
            head.head.synchronize()
        self._let_go(trainer)
        if self.guard is not None and (unseen := self.guard.unseen(reference)):
            self._say(unseen)
        earlier = self._counted_in(head)
        how: dict[str, Any] = {"weight": self.weight, "guard": self.guard, "reference": reference, "earlier": earlier}
        result: RunEdit
        result, rows = self._agreed(trainer, lambda: propose_counting(module, head, x, y, views, **how))
        if result.status != "applied":
            return result
        if result.reason:
            self._say(f"{result.reason}; the edit is applied all the same (policy='warn')")
        count = round(result.scale)
        targets = torch.tensor(result.label).repeat(count)
        count_in(head, rows.repeat(count, 1), targets, here=trainer.is_global_zero)
        self._heads.note(head)
        if head.grafted:
            head.graft(module)
        _, judges = stale_parts(trainer)
        if judges:
            self._say(f"{', '.join(judges)} judges by errors of before the edits of {head.state_key}")
        return self._enter(trainer, replace(result, stale=tuple(judges)), inner=None, features=rows)

    def _edit_network(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        x: Tensor,
        y: Tensor,
        views: Any,
        reference: EditReference | None,
        task: int | None,
    ) -> RunEdit:
        """Edit weights of the network."""
        editor = self._made(module, x if reference is None else reference.images[:2])
        heads, judges = stale_parts(trainer) if editor.edits_features else ([], [])
        if heads and not self.allow_stale:
            raise ConfigurationError(
                f"{self.state_key} would move the features that {', '.join(heads)} learned, whose sums would then be "
                'of another network; correct the head itself (route="exact"), edit the classifier (editor={"layers": '
                '"head"}), or pass allow_stale=True'
            )
        tasks = tasks_of(trainer)
        if tasks is None and task is not None:
            raise ArgumentError(f"task={task!r} is the network of a task, and this run has one network for all")
        if tasks is not None and task is None:
            task = tasks.topology.shown
        self._claim(trainer, module, mark=False)
        shifts: list[FeatureShift] = []
        with self._network_of(task, trainer, module, ()) as within, self._rebased(module, editor):
            bound = self._bound(module, reference, shifts)
            how: dict[str, Any] = {
                "scale": self.scale,
                "guard": self.guard,
                "reference": reference,
                "within": within,
                "accept": bound,
            }

            def make() -> Any:
                take_statistics(self.state_key, editor, reference)
                result = editor.edit(x, y, views, **how)
                made = None if result.id is None else editor.log[-1]
                return result, made, editor.state_dict() if trainer.world_size > 1 else None, shifts

            result, made, state, shifts = self._agreed(trainer, make)
            if not trainer.is_global_zero:
                if not editor.is_fitted:
                    editor.load_state_dict({**state, "log": editor.edit_log.state_dict()})
                if made is not None:
                    editor.apply(Proposal(made.x, made.y, made.factors), made.scale)
        shift = shifts[-1] if shifts else None
        known = RunEdit.of(result, route="editor", task=task, features=shift, stale=(*heads, *judges))
        if made is None:
            return replace(known, stale=())
        self._moved = False
        self._claim(trainer, module, mark=True)
        if editor.edits_features:
            self._tell(trainer, f"edit {self._next_id} changed {', '.join(editor.layers)}")
        return self._enter(trainer, known, inner=made.id)

    def _bound(
        self, module: pl.LightningModule, reference: EditReference | None, shifts: list[FeatureShift]
    ) -> Callable[[], str] | None:
        """Return what asks, with an edit in the weights, whether features moved too far, and notes how far."""
        if reference is None or (self.max_feature_shift is None and simplex_classifier_of(module) is None):
            return None
        place = simplex_classifier_of(module)
        layer = "auto" if place is None else ".".join(filter(None, (path_of(module, place), place.feature_layer)))

        def features() -> Tensor:
            return torch.cat([features_of(module, layer, part).cpu() for part in reference.parts()])

        before = features()

        def asked() -> str:
            shifts.append(feature_shift(before, features(), reference.labels))
            moved, most = 1 - shifts[-1].cosine, self.max_feature_shift
            far = most is not None and moved > most
            return f"features of the reference move by {moved:.4f}, above max_feature_shift={most}" if far else ""

        return asked

    def _agreed(self, trainer: pl.Trainer, make: Callable[[], Any]) -> Any:
        """Return what the first process makes, or raise its error, on all processes."""
        if trainer.world_size == 1:
            return make()
        made: Any = None
        if trainer.is_global_zero:
            try:
                made = (make(), None)
            except Exception as error:  # the others wait, so they must hear of whatever it is
                made = (None, error)
        found, failed = gather_objects(made, "an edit")[0]
        if failed is not None:
            raise failed
        return found
