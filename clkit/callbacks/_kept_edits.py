"""The edits that a run has: in whose weights or sums they stand, how they are taken back, and how they are saved."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from clkit.callbacks._edit_rules import edited_weights, grafted_layers, paths_in, tasks_of
from clkit.callbacks._edit_sources import chosen_editor, make_editor
from clkit.callbacks._exact_edits import Beginnings, take_out
from clkit.callbacks._run_edits import LoggedEdit, check_inner, check_log, edits_by_task, open_edits, read_logged
from clkit.callbacks.base import StreamCallback
from clkit.callbacks.head import HeadCallback
from clkit.errors import ConfigurationError, EditConflictError, StateError
from clkit.methods import GradientEditor
from clkit.methods._edit_log import EditLog
from clkit.methods._editor_saved import editor_settings, saved_editor
from clkit.schema import Instance, Many, Named, OneOf, Table, Whole, read_own
from clkit.stream._lightning import callbacks_of
from clkit.stream.boundaries import BoundaryPhase, backbone_changed
from clkit.surgery.edits import Edits
from clkit.surgery.fixed_classifier import simplex_classifier_of

__all__ = ["KeepsEdits"]

_TABLE: Table = {
    "editor": Instance(dict | None),
    "logs": Named(Instance(dict)),
    "edits": Many(Instance(dict)),
    "next_id": Whole(),
    "moved": OneOf((False, True)),
}


class KeepsEdits(StreamCallback):
    """A callback that has edits of a run in its log, and an editor that is no part of the user's module.

    Args:
        editor: A trained editor's file, the editor, or settings of a new one.
        name: Part of the key in checkpoints.

    Attributes:
        records: The edits that were made and not taken back, oldest first.
    """

    boundary_phase = BoundaryPhase.EDIT
    checks_weights: bool = True  # at the start of a run; without, edits can be taken back inexactly

    def __init__(self, editor: str | Path | Mapping[str, Any] | GradientEditor | None, name: str) -> None:
        super().__init__()
        self.name = name
        self.records: list[LoggedEdit] = []
        self._settings = dict(editor) if isinstance(editor, Mapping) else {}
        self._editor = editor if isinstance(editor, GradientEditor) else None
        self._state: dict[str, Any] | None = None  # of a trained editor, until one is made of it
        self._elsewhere = ""  # the file whose editor has made edits, which are not taken up
        if isinstance(editor, str | Path):
            saved = saved_editor(editor)
            self._elsewhere = str(editor) if check_log(saved["log"], str(editor)).is_open else ""
            self._state = {**saved, "log": EditLog().state_dict()}
        self._given: Any = self._state if self._editor is None else self._editor  # a trained one, or None
        self._heads = Beginnings()  # of the heads that hold the images of edits
        self._logs: dict[int, EditLog] = {}  # of tasks that have a network of their own
        self._saved_logs: dict[str, Any] = {}  # until they are looked at beside the weights
        self._next_id = 0
        self._moved = False  # whether training moved edited weights since
        self._marks: Edits | None = None
        self._run: tuple[Any, Any] = (None, None)  # weak references to the trainer and the module
        self._runs = False  # whether that goes on
        self._said: set[str] = set()

    @property
    def editor(self) -> GradientEditor | None:
        """The editor, once there is one: it is made with the first edit, or for those of a checkpoint."""
        return self._editor

    # ---- what the user asks for

    def revert(self, *ids: int, inexact: bool = False) -> None:
        """Take edits back: weights become, to the bit, what the other edits give; sums what they were, to rounding.

        Args:
            ids: Of edits in the log. Edits that came after keep what they add.
            inexact: Whether to go on where something else, such as further training, changed the weights since.

        Raises:
            ArgumentError: If there is no such edit in the log, or it was committed.
            EditConflictError: If weights are not what the log says; nothing is changed in any of these cases.
            ConfigurationError: If another task has connections of the edit by now, or the head is not there.
        """
        trainer, module = self._there()
        self._let_go(trainer)
        found = open_edits(self.records, ids)
        with torch.inference_mode(False):
            for task, own in edits_by_task(found).items():
                editor = self._made(module, None)
                with self._network_of(task, trainer, module, [each.inner for each in own]):
                    editor.revert(*(each.inner for each in own if each.inner is not None), inexact=inexact)
                self._moved = self._moved and not inexact
                self._drop(own)
            for each in found:
                if each.route == "exact":
                    head = self._head(trainer, each.head)
                    take_out(head, *each.rows())
                    self._drop([each])
                    if head.grafted:
                        head.graft(module)
        if any(each.route == "editor" for each in found) and self._made(module, None).edits_features:
            self._tell(trainer, f"edits {sorted(each.id for each in found)} were taken back")

    def revert_all(self) -> None:
        """Take all edits back that were not committed; raises as :meth:`revert`."""
        self._let_go(self._there()[0])
        self.revert(*(entry.id for entry in self.records if not entry.committed))

    def rebase(self) -> None:
        """Take the weights, which something else changed, for the edited ones, so that edits can go on.

        What is taken back afterwards is what an edit has added, and no more exact. Raises as :meth:`revert`.
        """
        trainer, module = self._there()
        for task in edits_by_task(self.records):
            editor = self._made(module, None)
            with torch.inference_mode(False), self._network_of(task, trainer, module, None):
                editor.rebase()
        self._moved = False

    def commit(self, *ids: int) -> None:
        """Make edits, by default all, part of the weights or sums for good; raises as :meth:`revert`."""
        trainer, module = self._there()
        self._let_go(trainer)
        found = open_edits(self.records, ids or [entry.id for entry in self.records if not entry.committed])
        for task, own in edits_by_task(found).items():
            editor = self._made(module, None)
            with self._network_of(task, trainer, module, ()):
                editor.commit(each.inner for each in own if each.inner is not None)
        done = {each.id for each in found}
        self.records = [entry.commit() if entry.id in done else entry for entry in self.records]

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take note of the run."""
        super().setup(trainer, pl_module, stage)
        self._run, self._runs = (weakref.ref(trainer), weakref.ref(pl_module)), True
        if self._editor is not None and not any(self._editor.model is part for part in pl_module.modules()):
            self._state, self._editor = self._editor.state_dict(), None  # it was of another module
            self._saved_logs, self._logs = {str(task): log.state_dict() for task, log in self._logs.items()}, {}

    def verify(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Mark the edited layers, and check that their weights are what the log says.

        Raises:
            EditConflictError: If they are not.
            StateError: If a loaded log does not fit the network.
        """
        self._let_go(trainer)
        found = [each for each in self.records if each.route == "editor" and not each.committed]
        if not found:
            return
        editor = self._made(module, None)
        if self.checks_weights and not self._moved:
            for task in edits_by_task(found):
                with self._network_of(task, trainer, module, None):
                    try:
                        editor.check()
                    except EditConflictError as error:
                        raise EditConflictError(f"{self.state_key}: {error}") from error
        self._claim(trainer, module, mark=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether training has moved edited weights."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._moved or self._editor is None or not edits_by_task(self.records):
            return
        if any(weight.requires_grad for weight in edited_weights(pl_module, self._editor).values()):
            try:
                self._editor.check()
            except EditConflictError:
                self._moved = True
                self._say(
                    "training goes on from an edited network: it may undo what edits did (mend/retention says so), and "
                    "they are taken back with inexact=True alone, as what they have added"
                )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the marks off the layers; the edits stay."""
        self._runs = False
        if self._marks is not None:
            self._marks.release(pl_module)
            self._marks = None

    # ---- how it is done

    def _there(self) -> tuple[pl.Trainer, pl.LightningModule]:
        trainer, module = (None if each is None else each() for each in self._run)
        if trainer is None or module is None:
            raise ConfigurationError(
                f"{self.state_key} belongs to no run yet, or its trainer is gone: fit, validate, or hold the trainer"
            )
        return trainer, module

    def _made(self, module: pl.LightningModule, example: Tensor | None) -> GradientEditor:
        """Return the editor, made or loaded for a module if it is not there yet."""
        if self._editor is not None and self._state is None:
            return self._editor
        if example is None and self._state is not None:
            saved = [self._state["log"], *self._saved_logs.values()]
            images = [edit["x"] for log in saved for edit in log["edits"]]
            example = images[0] if images else None
        if self._state is not None and self._settings:
            layers, known = editor_settings(self._state)
            wanted = make_editor(module, {"layers": layers, **known, **self._settings}, None, example).state_dict()
            self._state = chosen_editor(self.state_key, wanted, self._state, edits_by_task(self.records))
        if self._editor is not None and self._state is not None:
            self._editor.load_state_dict(self._state)
        else:
            self._editor = make_editor(module, self._settings, self._state, example)
        with torch.inference_mode(False):
            weights = edited_weights(module, self._editor)
            for task, state in self._saved_logs.items():
                self._logs[int(task)] = EditLog()
                self._logs[int(task)].load_state_dict(state, weights)
        self._state, self._saved_logs = None, {}
        if self._elsewhere:
            self._say(
                f"the log of {self._elsewhere} has edits, which are not taken up here: where the weights have them, "
                "they count as part of the original; to take them back begin from that file (ckpt_path=…)"
            )
        return self._editor

    @contextmanager
    def _network_of(
        self, task: int | None, trainer: pl.Trainer, module: pl.LightningModule, inner: Iterable[int | None] | None
    ) -> Iterator[dict[str, Tensor] | None]:
        """Have the network of a task and its log inside the block; what may change there, bool by layer.

        Args:
            task: The task, ``None`` where all have one network, which may change everywhere.
            trainer: Of the run.
            module: The user's module.
            inner: Numbers of edits that are about to be changed; ``None`` for no change at all.
        """
        if task is None:
            yield None
            return
        tasks, editor = tasks_of(trainer), self._made(module, None)
        if tasks is None:
            raise ConfigurationError(
                f"{self.state_key} has edits of the network of task {task}, and no such task is there"
            )
        before = editor.edit_log
        if inner is None:
            editor.edit_log = self._logs.setdefault(task, EditLog())
            try:
                with tasks.activate(task, module):
                    yield None
            finally:
                editor.edit_log = before
            return
        names = {f"{path}.weight": name for name, path in paths_in(module, editor).items()}
        free = {names[name]: mask for name, mask in tasks.editable(task).items() if name in names}
        if odd := sorted(names.values() - free.keys()):
            raise ConfigurationError(
                f"{self.state_key} edits {odd}, which {tasks.state_key} keeps apart for each task (no mask); name "
                "layers that have a mask (editor={'layers': …})"
            )
        changed, editor.edit_log = set(inner), self._logs.setdefault(task, EditLog())
        try:
            for record in editor.log:
                if record.id in changed:
                    for name, factors in record.factors.items():
                        if bool(factors.delta()[~free[name].cpu().flatten(1)].any()):
                            raise ConfigurationError(
                                f"another task reads connections of task {task} by now that the edit has changed, so "
                                f"it would change too; the edit stays, and {self.state_key} can commit it"
                            )
            with tasks.activate(task, module):
                yield free
                tasks.take(task)
        finally:
            editor.edit_log = before

    def _claim(self, trainer: pl.Trainer, module: pl.LightningModule, *, mark: bool) -> None:
        """Refuse edited layers that another change holds, and ``mark`` them for as long as the run goes on."""
        assert self._editor is not None
        paths = paths_in(module, self._editor)
        place = simplex_classifier_of(module)
        if place is not None and any(module.get_submodule(path) in set(place.modules()) for path in paths.values()):
            raise ConfigurationError(
                f"{self.state_key} would edit {list(paths.values())}, and the simplex head is the same in all models; "
                "edit layers before it (editor={'layers': …})"
            )
        if tasks_of(trainer) is not None:  # who keeps the layers, and the edits within its masks
            return
        if self._editor.edits_features or not grafted_layers(trainer):
            marks = self._marks or Edits(self.state_key, self._editor.edit_log)
            for path in paths.values():
                marks.claim(module, path)
            if mark and self._runs:
                marks.apply(module, paths)
                self._marks = marks
        else:
            self._say(
                f"the edit is of the classifier, where the head of {grafted_layers(trainer)[0]} stands: what that "
                'learns further overwrites it. route="exact" corrects the head itself'
            )

    def _rebased(self, module: pl.LightningModule, editor: GradientEditor) -> AbstractContextManager[None]:
        """Take edited weights as training has left them, for good if the block adds an edit."""
        return editor.edit_log.rebased(edited_weights(module, editor)) if self._moved else nullcontext()

    def _head(self, trainer: pl.Trainer, name: str | None) -> HeadCallback:
        for each in callbacks_of(trainer):
            if isinstance(each, HeadCallback) and each.name == name:
                return each
        raise ConfigurationError(f"{self.state_key} has edits of the head {name!r}, and this run has no such head")

    def _let_go(self, trainer: pl.Trainer) -> None:
        """Take edits out of the log whose head began anew since: its sums do not hold their images any more."""
        for callback in (each for each in callbacks_of(trainer) if isinstance(each, HeadCallback)):
            own = self._counted_in(callback)
            if own and not self._heads.holds(callback):
                self._drop(own)
                self._say(
                    f"{callback.state_key} began anew, and its sums do not hold edits {[each.id for each in own]} any "
                    "more: they are out of the log; make them again if they are still wanted"
                )

    def _counted_in(self, head: HeadCallback) -> list[LoggedEdit]:
        """Return the edits whose images a head holds, and that could be taken back."""
        return [each for each in self.records if each.head == head.name and not each.committed]

    def _drop(self, gone: list[LoggedEdit]) -> None:
        self.records = [entry for entry in self.records if entry not in gone]

    def _tell(self, trainer: pl.Trainer, reason: str) -> None:
        """Announce a change of the network."""
        backbone_changed(trainer, f"{self.state_key}: {reason}", sender=self)

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"{self.state_key}: {message}")

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return the editor and the log; the edits themselves are in the module's weights, or in a head's sums."""
        trainer = self._run[0] and self._run[0]()
        if trainer is not None:
            self._let_go(trainer)
        return {
            "editor": self._state if self._editor is None or self._state is not None else self._editor.state_dict(),
            "logs": self._saved_logs or {str(task): log.state_dict() for task, log in self._logs.items()},
            "edits": [entry.state() for entry in self.records],
            "next_id": self._next_id,
            "moved": self._moved,
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back; weights of the network come with the network's own state.

        Raises:
            StateError: If it is damaged; nothing is changed then, nor in the next case.
            ConfigurationError: If it has open edits of an editor that is unlike the one that was asked for.
        """
        saved = read_own(state, _TABLE, self.state_key)
        entries = read_logged(saved["edits"], saved["next_id"], self.state_key)
        logs = list(saved["logs"].items())
        if odd := [task for task, _ in logs if not task.isdecimal()]:
            raise StateError(f"{self.state_key}: 'logs' must be those of tasks, got {odd[0]!r}; the file is damaged")
        known: dict[int | None, EditLog] = {int(task): check_log(log, self.state_key) for task, log in logs}
        if saved["editor"] is not None:
            known[None] = check_log(saved["editor"].get("log"), self.state_key)
        check_inner(entries, known, self.state_key)
        chosen = saved["editor"]
        if chosen is not None and self._given is not None:
            given = self._given if isinstance(self._given, dict) else self._given.state_dict()
            chosen = chosen_editor(self.state_key, given, chosen, edits_by_task(entries))
        self.records, self._next_id, self._moved = entries, saved["next_id"], saved["moved"]
        self._heads, self._elsewhere = Beginnings(), ""
        if chosen is not None:
            self._state, self._saved_logs, self._logs = chosen, dict(logs), {}
            return
        self._saved_logs, self._logs = {}, {}  # it is from before the first edit
        if self._editor is not None:
            self._editor.edit_log = EditLog()
        if self._state is not None:
            self._state = {**self._state, "log": EditLog().state_dict()}
