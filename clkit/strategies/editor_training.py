"""Training an editor (MEND) for a classifier that stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from clkit.arguments import check_arguments
from clkit.distributed import broadcast, exchange_device, gather_objects
from clkit.errors import ConfigurationError
from clkit.features.batch import BatchReader, Readings
from clkit.features.calling import call
from clkit.methods._checks import check_count, check_number
from clkit.methods.mend import GradientEditor
from clkit.methods.meta_examples import Edits, MetaExamples
from clkit.schema import FLOATS, Instance, Many, Numbers, Row, Table, Whole, read_own, read_state, saved_entry
from clkit.strategies._company import EDITED, Misfits
from clkit.strategies._editor_parts import ClippedAdam, EditorSettings, rows_of_all
from clkit.strategies._forward import checked_batch
from clkit.strategies._frozen import Frozen, runnable
from clkit.strategies.base import LearningStrategy

__all__ = ["EditorTrainingStrategy"]

_MOST_SKIPPED = 10  # steps in a row
_HELD_OUT = 2**31  # an epoch of draws that no training has
_TABLE: Table = {
    "size": Instance(list | None),
    "editor": Instance(dict | None),
    "first": Instance(dict | None),
    "skipped": Row({"all": Whole(), "in a row": Whole()}),
}
_FIRST: Table = {"x": Numbers(("N", ...), FLOATS), "y": Numbers(("N",)), "old": Numbers(("N",))}


class EditorTrainingStrategy(LearningStrategy):
    r"""Trains an editor (MEND) for the user's classifier, which stays as it is to the bit.

    The module is frozen and in evaluation mode while the fit runs; its ``training_step`` and ``configure_optimizers``
    are not called. Of each batch of the user's loader the first rows are edited, one by one, and the others show what
    an edit must leave alone. A step makes the mean of

    .. math:: c_e \, \mathrm{CE}(f_{\tilde W}(x_e), y_e) + c_l \, \mathrm{KL}(f_W(x_l) \,\|\, f_{\tilde W}(x_l))

    over them smaller, by Adam. The first ``stat_edits`` edits train nothing: they give the statistics and the first
    step sizes.

    Images that did not train the classifier make better edits: of those that did, gradients are tiny.

    A whole checkpoint contains the editor, and while the first edits are collected their images; a weights-only one is
    the user's own. Afterwards ``trainer.strategy.editor`` edits the module, and in another process
    ``GradientEditor.from_saved(module, "run.ckpt")``.

    Logged each step under ``name``: ``editor/loss``, ``editor/edit``, ``editor/locality``, ``editor/success`` (share of
    edits and their equivalents that hold), and by layer ``editor/size/…`` (norm of the edit as a share of the
    weight's) and ``editor/alpha/…``. Where there is validation, ``editor/val_loss`` and ``editor/val_success`` are of
    edits of its images, the same each time: ``ModelCheckpoint(monitor="editor/val_loss")`` keeps the best editor.

    With several processes a step is that of one process with the batches of all, up to rounding.

    Args:
        layers: What is edited: ``"auto"``, ``"mlp"``, ``"attention"``, ``"head"``, dotted paths, or several of these.
        editor: What kind of editor.
        examples: How batches become edits.
        stat_edits: Edits whose gradients give the statistics, at least 2.
        lr: Of the networks, above 0; by default 1e-3 for a module below a million parameters, else 1e-4.
        alpha_lr: Of the step sizes, as multiples of their start, above 0.
        clip: Largest norm of the gradient, above 0.
        val_edits: Edits of the validation images at most, of each process; at least 0.
        name: Prefix of what is logged.
        seed: Of all draws, at least 0, with the numbers of epoch and batch; the global random states are left alone.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.
        ddp_options: Keyword arguments of :class:`lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        editor: The :class:`~clkit.methods.GradientEditor`, ``None`` before the first fit.
        skipped: Steps left out because their gradient was not finite.

    Raises:
        ArgumentError: If an argument is not allowed; in the fit if the editor cannot be made of them.
        ConfigurationError: In the fit, if ten steps in a row are not finite.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> import clkit.strategies
        >>> trainer = Trainer(accelerator="cpu", devices=1, strategy="editor_training", logger=False,
        ...                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> type(trainer.strategy).__name__
        'EditorTrainingStrategy'

    Source: E. Mitchell, C. Lin, A. Bosselut, C. Finn, C. D. Manning, ICLR 2022, arXiv 2110.11309, section 3.3.
    """

    state_key = "editor_training"
    trains_module = False

    def __init__(
        self,
        layers: str | Sequence[str] = "auto",
        *,
        editor: EditorSettings = EditorSettings(),
        examples: MetaExamples = MetaExamples(),
        stat_edits: int = 200,
        lr: float | None = None,
        alpha_lr: float = 0.1,
        clip: float = 100.0,
        val_edits: int = 500,
        name: str = "editor",
        seed: int = 0,
        batch_reader: BatchReader | None = None,
        **ddp_options: Any,
    ) -> None:
        check_arguments(EditorTrainingStrategy, locals())
        super().__init__(batch_reader=batch_reader, **ddp_options)
        self.layers, self.settings, self.examples = layers, editor, examples
        self.stat_edits = check_count("stat_edits", stat_edits, at_least=2)
        self.lr = None if lr is None else check_number("lr", lr, above=0)
        self.alpha_lr = check_number("alpha_lr", alpha_lr, above=0)
        self.clip = check_number("clip", clip, above=0)
        self.val_edits = check_count("val_edits", val_edits, at_least=0)
        self.name = name
        self.seed = check_count("seed", seed, at_least=0)
        self.editor: GradientEditor | None = None
        self.skipped = self._skipped_in_a_row = 0
        self._first: list[Edits] = []  # until there are enough for the statistics
        self._new: Edits | None = None  # those of the batch in work
        self._network: nn.Module | None = None  # while a fit runs
        self._edited: nn.Module | None = None  # the network that the editor is made for
        self._size: list[int] | None = None  # of one image
        self._frozen: Frozen | None = None
        self._adam: ClippedAdam | None = None
        self._judged = 0  # edits of the validation that runs

    # ---- before and after the loops

    @property
    def misfits(self) -> Misfits:
        """Callbacks of Lightning that are refused beside the strategy, each with the reason."""
        return {**super().misfits, **EDITED}

    def _setup_model(self, model: nn.Module) -> Any:
        return model  # nothing of the module is trained, and gradients of the editor are added up by the strategy

    def _register_ddp_hooks(self) -> None:
        pass  # for the same reason

    def setup_optimizers(self, trainer: pl.Trainer) -> None:
        """Make the editor's optimizer; the module's own are not asked for."""
        self._adam = ClippedAdam(self.clip)
        self.optimizers, self.lr_scheduler_configs = [self._adam], []
        self._network = runnable(self._module)
        if self._network is self._edited:
            self._take_over()

    def _make_editor(self, network: nn.Module, size: Sequence[int], state: dict[str, Any] | None) -> None:
        """Make the editor for a network, in the state that one of its kind had."""
        example = torch.zeros(2, *size)
        made = GradientEditor(network, self.layers, example=example, seed=self.seed, **asdict(self.settings))
        if state is not None:
            made.load_state_dict(state)
        self.editor, self._edited, self._size = made, network, list(size)

    def _take_over(self) -> None:
        """Have the optimizer train the editor."""
        assert self.editor is not None
        assert self._adam is not None
        self.editor.networks.to(self.root_device)
        self._adam.take(self.editor.parameter_groups(self.lr, self.alpha_lr))
        rank_zero_info(
            f"clkit: {type(self).__name__} trains an editor for {', '.join(self.editor.layers)}; "
            f"{type(self._module).__name__} is frozen, and its training_step() is not called"
        )

    def on_train_start(self) -> None:
        """Freeze the module."""
        self._frozen = Frozen(self._module, shared=not self.single_device)
        super().on_train_start()

    def on_backbone_changed(self, trainer: pl.Trainer, module: pl.LightningModule, reason: str) -> None:
        """Say that the editor was trained for another network."""
        rank_zero_warn(f"{self.state_key}: the network was changed ({reason}) while an editor is trained for it")

    def on_train_end(self) -> None:
        """Say so where there were too few edits."""
        super().on_train_end()
        if self.editor is not None and not self.editor.is_fitted:
            seen = sum(len(each.x) for each in self._first)
            rank_zero_warn(
                f"{self.state_key}: the fit ended after {seen} edits, and the statistics need stat_edits="
                f"{self.stat_edits}: nothing was trained"
            )

    def teardown(self) -> None:
        """Give the user's module back as it was."""
        if self._frozen is not None:
            self._frozen.thaw()
        self._frozen = self._adam = self._new = self._network = None
        super().teardown()

    # ---- one batch

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the editor, by name."""
        return {} if self.editor is None else dict(self.editor.networks.named_parameters())

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss of a batch's edits; that of this process is its share of their mean."""
        assert self._network is not None
        assert self._frozen is not None
        self._frozen.hold_still()
        trainer, batch = self._module.trainer, args[0] if args else kwargs["batch"]
        inputs, targets = self.read_batch(batch)
        with torch.no_grad(), self.precision_plugin.train_step_context():
            call(self._network, inputs)  # callbacks that learn from features read them here
        x, y = checked_batch(inputs, targets, None)
        if self.editor is None or self._network is not self._edited:  # the first batch shows what images are like
            self._make_editor(self._network, x.shape[1:], None if self.editor is None else self.editor.state_dict())
            self._take_over()
        editor = self.editor
        assert editor is not None
        x, y = editor.checked(x, y) if len(x) else (x, y.to(x.device))
        numbers = (self.seed, trainer.current_epoch, trainer.fit_loop.batch_idx)
        own = self.examples.edited(len(x), trainer.global_rank, trainer.world_size)
        sizes = gather_objects((own, len(x) - own), "the sizes of their batches")
        counts = [edited for edited, _ in sizes]
        first = sum(counts[: trainer.global_rank])
        edits = self.examples.edits(editor, x[:own], y[:own], numbers, first)
        if not editor.is_fitted:
            self._new = Edits(*(rows_of_all(each, counts).cpu() for each in edits))
            return self._nothing()
        others, labels = (rows_of_all(each[own:], [kept for _, kept in sizes]) for each in (x, y))
        with self.precision_plugin.train_step_context():
            found = [
                editor.meta_loss(**each._asdict())
                for each in self.examples.completed(edits, others, labels, numbers, first)
            ]
        if not found:
            return self._nothing()
        self._report(found)
        loss: Tensor = torch.stack([each["loss"] for each in found]).sum() / (sum(counts) // self.examples.together)
        if not bool(torch.isfinite(loss.detach())):
            return torch.nan * self._nothing()  # so that no gradient is finite, in no process
        return loss

    def _nothing(self) -> Tensor:
        """Return a loss of 0 whose gradient is 0, for a batch of which nothing is learned."""
        nothing: Tensor = 0.0 * torch.stack([parameter.sum() for parameter in self.trained_parameters().values()]).sum()
        return nothing

    def _report(self, found: list[dict[str, Tensor]]) -> None:
        assert self.editor is not None
        means = {name: torch.stack([each[name].detach() for each in found]).mean(dim=0) for name in found[0]}
        sizes = means.pop("size")
        alphas = self.editor.networks.alpha.detach()
        for place, layer in enumerate(self.editor.layers):
            means |= {f"size/{layer}": sizes[place], f"alpha/{layer}": alphas[place]}
        logged = {f"{self.name}/{key}": value for key, value in means.items()}
        self._module.log_dict(logged, on_step=True, on_epoch=False, batch_size=len(found))

    def on_batch_learned(self) -> None:
        """Keep the first edits; with the last of them the editor gets its statistics."""
        new, self._new = self._new, None
        if new is None or self.editor is None:
            return
        self._first.append(new)
        if sum(len(each.x) for each in self._first) < self.stat_edits:
            return
        self.editor.fit_statistics([(each.x, each.y) for each in self._first], self.stat_edits)
        self._first = []
        for part in self.editor.networks.fixed():
            sent = part.to(exchange_device(part.device)) if self._module.trainer.world_size > 1 else part
            broadcast([sent], "the statistics of the editor")
            part.copy_(sent)

    # ---- the step

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
        """Run the step on the gradients of all processes together; of ten without a finite gradient say so.

        Raises:
            ConfigurationError: If ten steps in a row had none.
        """
        assert self._adam is not None
        self._adam.is_done = False

        def joined() -> Any:
            output = closure()
            self._add_up_gradients()
            return output

        output = super().optimizer_step(optimizer, joined, *args, **kwargs)
        if self._adam.is_done:
            self._skipped_in_a_row = 0
            return output
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row == _MOST_SKIPPED:
            raise ConfigurationError(
                f"{self.state_key}: the gradients of {_MOST_SKIPPED} steps in a row were not finite, and nothing is "
                f"learned any more; start again with a smaller lr or alpha ({self.editor and self.editor.alpha} now)"
            )
        return output

    def _add_up_gradients(self) -> None:
        if self._module.trainer.world_size == 1:
            return
        gradients = [parameter.grad for parameter in self.trained_parameters().values() if parameter.grad is not None]
        together: Any = self.reduce(torch.cat([each.flatten() for each in gradients]), reduce_op="sum")
        for each, added in zip(gradients, together.split([each.numel() for each in gradients]), strict=True):
            each.copy_(added.view_as(each))

    # ---- validation

    def on_validation_start(self) -> None:
        """Begin to count the edits of held-out images."""
        super().on_validation_start()
        self._judged = 0

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's step, then some edits of its images."""
        output = super().validation_step(*args, **kwargs)
        trainer, editor = self._module.trainer, self.editor
        if trainer.state.fn != "fit" or trainer.sanity_checking or editor is None or not editor.is_fitted:
            return output
        batch, loader = args[0] if args else kwargs["batch"], args[2] if len(args) > 2 else 0
        if self._judged < self.val_edits and not loader:
            with torch.inference_mode(False), torch.no_grad(), self.precision_plugin.val_step_context():
                inputs, targets = Readings.of(trainer).read(self, batch)
                assert targets is not None
                x, y = checked_batch(inputs, targets, editor.classes)
                if len(x):
                    self._judge(editor, x.clone(), y.clone())
        return output

    def _judge(self, editor: GradientEditor, x: Tensor, y: Tensor) -> None:
        drawn = self.examples.draw(editor, x, y, seed=self.seed, epoch=_HELD_OUT, batch=self._judged)
        found = [editor.meta_loss(**each._asdict()) for each in drawn]
        if not found:
            return
        self._judged += len(found) * self.examples.together
        means = {name: torch.stack([each[name] for each in found]).mean() for name in ("loss", "success")}
        logged = {f"{self.name}/val_{name}": value for name, value in means.items()}
        self._module.log_dict(
            logged, on_step=False, on_epoch=True, batch_size=len(found), sync_dist=True, add_dataloader_idx=False
        )

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return the editor, the first edits while they are collected, and how many steps were left out."""
        first = Edits(*map(torch.cat, zip(*self._first, strict=True))) if self._first else None
        return {
            "size": self._size,
            "editor": None if self.editor is None else self.editor.state_dict(),
            "first": None if first is None else first._asdict(),
            "skipped": [self.skipped, self._skipped_in_a_row],
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`stream_state` gave."""
        saved = read_own(state, _TABLE, self.state_key)
        first = None if saved["first"] is None else Edits(**read_state(saved["first"], _FIRST, self.state_key))
        skipped, in_a_row = saved["skipped"]
        if saved["editor"] is not None:
            size = saved_entry(saved, "size", Many(Whole(1, 2**20)), self.state_key)
            self._make_editor(runnable(self._module), size, saved["editor"])
        self._first = [] if first is None else [first]
        self.skipped, self._skipped_in_a_row = skipped, in_a_row
