"""d-Simplex as a callback: a fixed classifier, and features that stay comparable with those of earlier models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.arguments import check_arguments
from clkit.callbacks._previous_model import PreviousModel
from clkit.callbacks._replacing import Replacing
from clkit.callbacks._searching import Searching
from clkit.callbacks._simplex_rules import check_strategy
from clkit.callbacks._vertices import Vertices
from clkit.callbacks.base import FeatureCallback
from clkit.errors import ConfigurationError
from clkit.features.batch import BatchReader
from clkit.features.observer import BatchObserver, forward
from clkit.features.tap import FeatureTap, path_of
from clkit.methods._checks import check_number, check_probability
from clkit.methods.alignment import HOCLoss, distillation_weight, feature_distillation, hoc_total
from clkit.methods.simplex import ClassAllocator, SimplexHead
from clkit.schema import Instance, OneOf, Table, Whole, read_own
from clkit.stream._lightning import is_logged
from clkit.stream.experience import Experience
from clkit.surgery.fixed_classifier import SimplexClassifierHead, attach_simplex_head, simplex_classifier_of

__all__ = ["DSimplex"]

_FOLDER = "models"
_OTHERS = "features of other vertices cannot be compared, so use the settings of the saved run"
_TABLE: Table = {
    "allocation": Instance(dict),
    "replaced": Whole(optional=True),
    "previous": Instance(str | None),
    "previous_file": Instance(str | None),
    "started": Whole(optional=True),
    "searched": Instance(dict),
}


class DSimplex(FeatureCallback):
    r"""Trains the network behind a classifier that never changes: the vertices of a regular simplex.

    Features of all models that were ever trained so gather round the same vertices, class by class, hence a gallery
    that an old model wrote can be searched with queries of a new one: no re-indexing. The classifier of the module is
    replaced by a :class:`~clkit.methods.SimplexHead` with room for ``num_vertices`` classes behind a trainable linear
    junction, and stays so when the run is over; the module's own cross-entropy, optimizer and strategy train it. Choose
    ``num_vertices`` for all classes that will ever come.

    From the second experience on, ``alignment="hoc"`` adds the higher-order contrastive term to the loss,
    :math:`\lambda L + (1 - \lambda) L_{NCE}` (:class:`~clkit.methods.HOCLoss`), between features of the model that
    trains and of a frozen copy of the model from which the experience started. That costs one more forward a batch and
    a copy of the weights, which is in no checkpoint: it lies in ``folder``, so that a run can be resumed inside an
    experience. ``"fd"`` adds the older distillation of features on the replayed rows. Replay is the business of a
    strategy, :class:`~clkit.strategies.ERStrategy` for instance, whose replayed rows are aligned too.

    Args:
        num_vertices: K, at least 2 and at least as many as there will be classes; features are K - 1 wide.
        alignment: ``None`` for the cross-entropy alone, ``"hoc"`` or ``"fd"``.
        lam: :math:`\lambda`, the share of the cross-entropy beside the higher-order term, [0, 1].
        mu: :math:`\mu`, the scale of the cosines in it, above 0.
        same_class: What pairs of one class count there: ``"unit"`` or ``"exclude"``.
        distillation: :math:`w_0`, the weight of ``"fd"`` where old and new classes are equally many.
        side: The class with id c has vertex c (``"low"``) or K - 1 - c (``"high"``). Two parties with classes of their
            own take a side each.
        reserved: Vertices that classes of another party have.
        junction: Whether a linear layer stands before the vertices; ``"auto"``: where widths differ.
        polytope: ``"simplex"``, or vertices of fewer dimensions without its theory; see ``SimplexHead``.
        replacements: By the index of an experience, the better model with which it starts: a path of a checkpoint of
            the same module, a network with a simplex head of the same vertices, or a function that returns one; it may
            be of another architecture.
        folder: Where the models before each experience are kept; by default ``models`` in the run's log folder.
        queries: What is searched for after each experience, in the galleries of that model and of all before it:
            ``"npz:cifar10/train"``, a source and its part, prepared as the stream's own, or a loader.
        gallery: What is searched, likewise. :attr:`compatibility` has the scores (``identification``); AC, AM, BC and
            FC are logged. Checkpoints hold each model's gallery in half precision.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.

    Raises:
        ArgumentError: If a value is not allowed.
        ConfigurationError: At the start: if the network has no single classifier, another callback has taken its place,
            nothing trains it, or ``"fd"`` has no replay.
        CapacityError: If a class has no vertex; before the experience that brings it.
        SignatureError: If a network has a simplex head of other vertices.

    Example:
        >>> from clkit.callbacks import DSimplex
        >>> DSimplex(num_vertices=1024, alignment="hoc").head.dim
        1023

    Reference:
        N. Biondi, F. Pernici, S. Ricci, A. Del Bimbo, "Stationary Representations: Optimally Approximating
        Compatibility and Implications for Improved Model Replacements", CVPR 2024, arXiv 2405.02581; "A Stationary (and
        Therefore Compatible) Representation is All You Need", TPAMI 2026, arXiv 2606.12488. ``"fd"``: CL2R, arXiv
        2211.09032.
    """

    needs_graph = True

    def __init__(
        self,
        num_vertices: int = 1024,
        *,
        alignment: Literal["hoc", "fd"] | None = None,
        lam: float = 0.1,
        mu: float = 10.0,
        same_class: Literal["unit", "exclude"] = "unit",
        distillation: float = 5.0,
        side: Literal["low", "high"] = "low",
        reserved: Sequence[int] = (),
        junction: bool | Literal["auto"] = "auto",
        polytope: Literal["simplex", "orthoplex", "cube"] = "simplex",
        replacements: dict[int, nn.Module | Callable[[], nn.Module] | str | Path] | None = None,
        folder: str | Path | None = None,
        queries: str | Iterable[Any] | None = None,
        gallery: str | Iterable[Any] | None = None,
        batch_reader: BatchReader | None = None,
    ) -> None:
        check_arguments(DSimplex, locals())
        super().__init__(forward="shared", batch_reader=batch_reader)
        # of no width yet; a wrong number of vertices is known now
        self.head = SimplexHead(num_vertices, junction=False, polytope=polytope)
        self.junction = junction
        self.alignment = alignment
        self.lam = check_probability("lam", lam)
        self.distillation = check_number("distillation", distillation, at_least=0)
        self.side = side
        self.folder = None if folder is None else Path(folder)
        self.allocator = ClassAllocator(num_vertices)
        self.allocator.reserve(reserved)
        self._vertices = Vertices(self.allocator, side, self.state_key)
        self._contrast = HOCLoss(mu, same_class)
        self._replacing = Replacing(self.state_key, replacements or {})
        self._searching = Searching(self.state_key, queries, gallery)
        self._previous: PreviousModel | None = None
        self._digest: str | None = None  # of the file that holds it
        self._kept: str | None = None  # that file
        self._started: int | None = None  # the experience that it belongs to
        self._weight = 0.0  # of the distillation in this experience
        self._added = -1  # the batch whose loss has the term
        self._said: set[str] = set()

    # ---- what the user asks for

    @property
    def compatibility(self) -> Tensor:
        """How queries of the model after experience i fare in the gallery of that after j: (T, T) float64 in [0, 1]."""
        return self._searching.matrix

    def place(self, module: nn.Module) -> SimplexClassifierHead:
        """Return the simplex classifier in a module, put there if there is none.

        Raises:
            ConfigurationError: If its network has no single classifier that can be replaced.
            SignatureError: If it has a simplex head of other vertices.
        """
        found = attach_simplex_head(
            module,
            self.head.num_vertices,
            junction=self.junction,
            polytope=self.head.polytope,
            owner=self.state_key,
        )
        self.layer = ".".join(filter(None, (path_of(module, found), found.feature_layer)))
        return found

    def embed(self, module: pl.LightningModule, inputs: Any) -> Tensor:
        """Return features (B, d) of length 1, as they are searched, in evaluation mode and without gradients.

        Args:
            module: The user's module, also of a run that is over.
            inputs: What its ``forward`` takes.
        """
        self.place(module)
        with FeatureTap(module, self.layer) as tap:
            return F.normalize(tap.extract(inputs, partial(forward, module, tap.network)).float(), dim=1)

    def replace(self, trainer: pl.Trainer, network: Any) -> None:
        """Go on with another model, from which the next experience starts; its architecture may be another.

        Call it between two fits with the trainer of the last, or at the start of an experience; ``replacements`` does.

        Raises:
            ConfigurationError: If it has no simplex head, several processes train, or the trainer has no module yet.
            SignatureError: If it has one of other vertices.
            ArgumentError: If it is none, or classes of its own have vertices that are taken here.
        """
        module = trainer.lightning_module
        self._replacing.put(trainer, network, self.allocator, self.side)
        self._look_again(trainer, module)
        self.place(module).follow(self.allocator, self.side)
        self._replacing.tell(trainer)

    # ---- one run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the head into the network before optimizers are made and weights are loaded."""
        if stage == "fit":
            check_strategy(trainer, self.state_key, self.alignment)
            self._searching.check(trainer)
        pl_module.configure_model()  # a network may be built there; Lightning calls it again, and it must stand that
        fresh = simplex_classifier_of(pl_module) is None
        place = self.place(pl_module)
        if fresh:
            place.follow(self.allocator, self.side)
        self._replacing.listen(trainer, pl_module, lambda: self._look_again(trainer, pl_module))
        super().setup(trainer, pl_module, stage)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Let go of the previous model; the head stays."""
        self._previous = None
        self._replacing.close()
        super().teardown(trainer, pl_module, stage)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take up the previous model of an experience that a resumed run goes on with."""
        super().on_train_start(trainer, pl_module)
        current = self._boundaries.current
        self._replacing.look(0 if current is None else current.index)
        if self._digest is not None and current is not None and current.index == self._started:
            self._previous = PreviousModel(pl_module, self.layer)
            self._kept = str(self._previous.load(self._files(trainer, current.index), self._digest))
            self._weigh(current)

    def on_experience_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Replace the model where that is wanted, give new classes their vertices, and freeze a copy of the model."""
        if self._started == experience.index and self._previous is not None:
            return
        if experience.index in self._replacing.models:
            self._replacing.last = experience.index
            self.replace(trainer, self._replacing.models[experience.index])
        known = len(self.allocator.classes)
        self._allocate(trainer, pl_module, experience)
        begins = experience.index > 0 or self._replacing.last is not None
        self._previous, self._digest, self._kept, self._started = None, None, None, experience.index
        if self.alignment is not None and begins:
            self._previous = PreviousModel(pl_module, self.layer)
            path = self._files(trainer, experience.index)[0]
            self._digest, self._kept = self._previous.save(path, trainer), str(path.absolute())
            self._weigh(experience, known)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Open the batch; plain loaders tell by it which classes they bring."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._vertices.seen(trainer, self, batch, self._boundaries.current)

    def learns(self, trainer: pl.Trainer) -> bool:
        """Whether the batch in work is aligned with a previous model."""
        return self._previous is not None and super().learns(trainer)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Add the term to the loss, in place."""
        super().on_before_backward(trainer, pl_module, loss)
        batch = trainer.fit_loop.total_batch_idx
        if not self._reads or self._previous is None:
            return
        if self._added == batch:
            raise ConfigurationError(
                f"{self.state_key} with alignment={self.alignment!r} saw a second backward pass for one batch (of an "
                "optimizer that runs the step again, as LBFGS does), and adds its term to one only; leave alignment out"
            )
        self._added = batch
        term = self._term(trainer, self._previous)
        if term is None:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = (1.0 if scaler is None else scaler.get_scale()) / trainer.accumulate_grad_batches
        if self.alignment == "hoc":
            loss.copy_(hoc_total(loss, scale * term, self.lam))
        else:
            loss.add_(term, alpha=self._weight * scale)
        if is_logged(trainer):
            pl_module.log(f"d_simplex/{self.alignment}", term.detach(), on_step=True, on_epoch=False)

    def on_batch(self, *_: Any) -> None:
        """Nothing is learned beside the network."""

    def on_experience_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, experience: Experience) -> None:
        """Let go of the previous model, and search where that is wanted."""
        self._searching.measure(trainer, pl_module, self, experience.index)
        self._vertices.settle(experience)
        self._previous, self._digest, self._kept = None, None, None

    # ---- how it is done

    def _look_again(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read features where they are in the network that is there now."""
        before = self.layer
        self.place(module)
        if self.layer != before and hasattr(self, "observer"):
            self.observer.detach(trainer)
            self.observer = BatchObserver.attach(trainer, module, self)
            self.observers = {self.observer: self}

    def _term(self, trainer: pl.Trainer, previous: PreviousModel) -> Tensor | None:
        """Return the term of the batch in work; ``None`` where the network ran something else than its images."""
        forwarded = getattr(trainer.strategy, "forwarded", None)  # of a strategy that runs rows of its own
        if forwarded is None and not self.observer.is_own:
            self._say_once(
                "the step gives the network something else than the inputs of the batch (a mix, a view, another "
                "scale), whose features belong to no label: such batches are not aligned with the previous model. "
                "Transform the inputs in the data module or in forward()",
                rank_zero_warn,
            )
            return None
        inputs, labels = forwarded or (self.observer.inputs, self.observer.known_targets)
        features = self.observer.features(graph=True, whole=forwarded is not None)
        rows = labels >= 0
        if self.alignment == "fd":
            stream = trainer.strategy.stream_rows  # type: ignore[attr-defined]  # checked in setup
            rows = rows.clone()
            rows[slice(0, 0) if stream is None else stream] = False
        old = previous.features(trainer, inputs)
        if not bool(rows.all()):
            at = rows.to(features.device)
            features, old, labels = features[at], old[at], labels[rows]
        if self.alignment == "fd":
            return feature_distillation(features, old)
        contrast: Tensor = self._contrast(features, old, labels)
        return contrast

    def _allocate(self, trainer: pl.Trainer, module: pl.LightningModule, experience: Experience) -> None:
        """Give the ids up to the highest one of an experience their vertices."""
        if not experience.classes and self.alignment == "fd":
            raise ConfigurationError(
                f"{self.state_key} with alignment='fd' weighs by the numbers of old and new classes, and these data do "
                "not say which classes they bring; use a StreamDataModule, or alignment='hoc'"
            )
        self._vertices.announced(trainer, experience)
        place = self.place(module)
        place.follow(self.allocator, self.side)
        if place.in_features < len(self.allocator.classes):
            self._say_once(
                f"{self.state_key}: the network gives {place.in_features} features, fewer than there are classes, so "
                "that features lie in a subspace and reach the vertices only nearly",
                rank_zero_warn,
            )

    def _weigh(self, experience: Experience, known: int | None = None) -> None:
        if self.alignment == "fd":
            new = max(1, len(experience.classes))
            old = len(self.allocator.classes) - new if known is None else known
            self._weight = distillation_weight(new, max(1, old), self.distillation)

    def _files(self, trainer: pl.Trainer, experience: int) -> list[Path]:
        """Return where the model before an experience is kept, then where a run that is resumed may have had it.

        Lightning gives a resumed run a log folder of its own.
        """
        name = f"before_experience_{experience}.pt"
        files = [(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / _FOLDER) / name]
        if trainer.ckpt_path is not None:  # a run may have been moved as a whole
            files += [folder / _FOLDER / name for folder in list(Path(trainer.ckpt_path).absolute().parents)[:2]]
        return files if self._kept is None else [*files, Path(self._kept)]

    def _say_once(self, message: str, say: Callable[[str], None] = rank_zero_info) -> None:
        if message not in self._said:
            self._said.add(message)
            say(f"clkit: {message}")

    # ---- state

    def stream_state(self) -> dict[str, Any]:
        """Return the allocation and where the previous model is to be found, but no weights."""
        self._vertices.settle(self._boundaries.current)
        return {
            "signature": self.head.signature(),
            "side": self.side,
            "allocation": self.allocator.state_dict(),
            "replaced": self._replacing.last,
            "previous": self._digest,
            "previous_file": self._kept,
            "started": self._started,
            "searched": self._searching.state(),
        }

    def load_stream_state(self, state: dict[str, Any]) -> None:
        """Take it back.

        Raises:
            StateError: If it is damaged, or of other vertices or the other side.
        """
        own = {"signature": self.head.signature(), "side": self.side}
        same = {name: OneOf((value,), _OTHERS) for name, value in own.items()}
        saved = read_own(state, {**same, **_TABLE}, self.state_key)
        self.allocator.load_state_dict(saved["allocation"])
        self._searching.load(saved["searched"])
        self._replacing.last, self._started = saved["replaced"], saved["started"]
        self._digest, self._kept = saved["previous"], saved["previous_file"]
