"""One predictor under watch: the errors that were recorded of it, what predicts them, and what is decided by that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from clkit.callbacks._deup_choices import OF_LOGITS, OF_SCORES, choices, no_sets, nothing_refused
from clkit.callbacks._deup_parts import Arrived, Judgement, Rows, Settings, as_endless, as_finite, checked_noise
from clkit.callbacks._known_rows import KnownRows
from clkit.callbacks.base import MODULE, Predictor
from clkit.errors import ConfigurationError, NotFittedError, first_line
from clkit.methods.decisions import abstention_threshold, risk_threshold
from clkit.methods.deup import ErrorPredictor, Uncertainty
from clkit.methods.heads.base import Head
from clkit.methods.heads.frozen import FrozenHead
from clkit.methods.prediction_sets import PredictionSets
from clkit.methods.records import ErrorRecords
from clkit.methods.sample_loss import neighbour_noise, sample_loss
from clkit.methods.stationarising import (
    FEATURE_SIGNS,
    Snapshot,
    left_out_features,
    novel_features,
    stationarising_features,
)
from clkit.schema import Instance, Many, Named, Nested, OneOf, Real, Table, read_own

__all__ = ["Watched"]

_SOURCES = ("prequential", "loo", "gaussian", "novel", "calibration")


class Watched:
    """The error predictor of one predictor. It knows no trainer.

    Args:
        name: Of the predictor.
        predictor: Whose errors are predicted; ``None`` for the module's own classifier.
        settings: What is common to all.
        say: How to tell the user something, once.
    """

    def __init__(self, name: str, predictor: Predictor | None, settings: Settings, say: Callable[[str], None]) -> None:
        self.name, self.predictor, self.settings, self.say = name, predictor, settings, say
        self.names: tuple[str, ...] = ()
        self.sources: tuple[str, ...] = ()
        self.errors = ErrorPredictor()
        self.records = ErrorRecords(settings.records.capacity, seed=settings.records.seed)
        self.sets = self._new_sets()
        self.abstain_above = math.inf
        self.accept_to = math.inf if settings.risk is None else -math.inf  # before it is known nothing is accepted
        self.arrived = Arrived()
        self.stale = False  # whether what was learned at its layer is of networks that were trained further
        self.again = False  # whether it learns samples several times, which leaves no exact left-out scores
        self.fell_back = False  # from left-out rows to arriving batches
        self.frozen: FrozenHead | None = None
        self._frozen_state: dict[str, Any] | None = None  # of a loaded state, before the head is there
        self.classifier: nn.Linear | None = None  # of the module, from features to logits

    # ---- what there is to work with

    @property
    def head(self) -> Head | None:
        """What has learned, where the predictor shows it and it has seen a class."""
        try:
            head = getattr(self.predictor, "head", None)
        except NotFittedError:
            return None
        return head if isinstance(head, Head) and bool(head.classes.numel()) else None

    @property
    def probabilities(self) -> bool:
        """Whether the softmax of the scores are probabilities."""
        return self.name == MODULE

    @property
    def needs_rows(self) -> bool:
        """Whether what was learned has to be kept: sums, and a sample of rows."""
        asked = self.settings.aleatoric == "neighbours" or self.settings.false_alarm_rate is not None
        of_rows = bool(set(self.names) - {*OF_SCORES, *OF_LOGITS})
        return asked or of_rows or bool({"loo", "gaussian", "novel"} & set(self.sources))

    @property
    def looks_ahead(self) -> bool:
        """Whether arriving batches are judged before they are learned, which takes what was known then."""
        return "prequential" in self.sources or self.settings.held_out > 0

    def choose(self, *, trains: bool, calibrates: bool) -> None:
        """Settle features and sources, where ``"auto"`` leaves them open; see :func:`choices`."""
        self.stale = trains and not calibrates
        names, self.sources = choices(self, trains, calibrates)
        if names != self.names:
            self.names = names
            self.errors = self._new_errors()
            self.records = ErrorRecords(self.settings.records.capacity, seed=self.settings.records.seed)

    def _new_errors(self) -> ErrorPredictor:
        signs = [FEATURE_SIGNS[name] for name in self.names] if self.settings.model in ("forest", "gbt") else None
        return ErrorPredictor(self.settings.model, signs, seed=self.settings.records.seed)

    def _new_sets(self) -> PredictionSets | None:
        asked = self.settings
        how: dict[str, Any] = {"class_conditional": asked.class_conditional, "adaptive": asked.adaptive}
        return None if asked.coverage is None else PredictionSets(asked.coverage, **how)

    def phi(self, view: Snapshot | None, rows: Rows) -> Tensor:
        """Return the features (n, K) of samples that were not learned."""
        return stationarising_features(self.names, view, rows.features, rows.scores, probabilities=self.probabilities)

    # ---- records

    def see(
        self, rows: Rows, view: Snapshot | None, experience: int, step: int, came: Callable[[], set[int]] = set
    ) -> None:
        """Take note of the errors on an arriving batch, of which the scores know nothing yet.

        ``view`` is what was known when the scores were given, as far as features need it; ``came`` tells the classes
        that had come before, of which sets follow the drift.
        """
        rows = rows.where((rows.targets >= 0) & rows.features.isfinite().all(dim=1) & ~rows.scores.isnan().any(dim=1))
        if not len(rows.ids):
            return
        wrong = sample_loss("error", rows.scores, rows.targets)
        self.arrived.samples += len(wrong)
        self.arrived.wrong += float(wrong.sum())
        self.arrived.loss += float(sample_loss(self.settings.loss, rows.scores, rows.targets).sum())
        knows = view is not None or not set(self.names) - {*OF_SCORES, *OF_LOGITS}
        if "prequential" in self.sources and knows:
            self._record("prequential", rows, view, experience, step)
        if self.settings.held_out and self.errors.is_fitted and knows:
            abstain = self.judge(rows.features, rows.scores, view).abstain
            assert abstain is not None
            self.arrived.judged += len(wrong)
            self.arrived.abstained += float(abstain.sum())
            self.arrived.accepted_wrong += float(wrong.cpu()[~abstain].sum())
        if self.sets is not None and self.sets.samples and self.sets.adaptive:
            self.sets.observe(rows.scores, rows.of_classes(came()))

    def _record(self, source: Any, rows: Rows, view: Snapshot | None, experience: int, step: int) -> None:
        admitted = self.records.admits(source, rows.ids)  # features are needed of those only
        if bool(admitted.any()):
            some = rows.where(admitted)
            error = sample_loss(self.settings.loss, some.scores, some.targets)
            self.records.add(source, self.phi(view, some), error, some.ids, some.targets, experience, step)

    def refit(self, known: KnownRows | None, calibration: Rows | None, experience: int, stale: str) -> None:
        """Make the records that follow from what is known, fit the error predictor, and set the thresholds.

        Args:
            known: Sums and rows of what was learned, or of the calibration samples if they were read again.
            calibration: Samples that were kept out of training.
            experience: The last that was learned.
            stale: Why the rows known are not in the sums of the head, each exactly once; empty if they are.
        """
        view = None if known is None or not known.statistics.samples else known.snapshot(self.leverage)
        again = known is not None and known.reread
        rows = calibration if again else None if known is None else self._said(known, view)
        fresh: Rows | None = None  # with scores as if the samples had not been learned
        if view is not None and rows is not None:
            if "loo" in self.sources:
                fresh = self._leave_out(rows, view, experience, stale)
            if "gaussian" in self.sources:
                self._replace("gaussian", self.phi(view, rows), rows, experience)
            if "novel" in self.sources and len(view.classes) > 1:
                learned = again or (known is not None and known.memory is not None)
                self._imagine(rows, view, experience, learned=learned)
        if "calibration" in self.sources and calibration is not None:
            fresh = calibration
            phi = self._phi_left_out(view, calibration) if again and view is not None else self.phi(view, calibration)
            self._replace("calibration", phi, calibration, experience)
        self._fit(known)
        if self.sets is not None and fresh is None:
            self.sets = self._new_sets()  # thresholds of another head, or of fewer classes, hold for nothing
            self.say(no_sets(self.name))
        elif self.sets is not None and fresh is not None:
            self.sets.calibrate(fresh.scores, fresh.targets)

    @property
    def leverage(self) -> Callable[[Tensor], Tensor] | None:
        """That of the head, where it has one and its errors are those of left-out rows."""
        return getattr(self.head, "leverage", None) if "loo" in self.sources else None

    def _said(self, known: KnownRows, view: Snapshot | None) -> Rows | None:
        """Return the rows that are kept, with what the predictor says of them now."""
        kept = None if view is None else known.rows(view)
        if kept is None or not len(kept[0]):
            return None
        ids, features, targets = kept
        scores = self.logits(features) if self.head is None else self.head(features)
        if scores is None:
            return None
        # a head that started anew has no column yet for classes that came before it
        return Rows(ids, features, targets, scores).padded(max(scores.shape[1], int(targets.max()) + 1))

    def logits(self, features: Tensor) -> Tensor | None:
        """Return what the module's classifier gives for features, where it is one linear layer; a tap hears nothing."""
        if self.classifier is None:
            return None
        weight, bias = self.classifier.weight.detach(), self.classifier.bias
        return linear(features.to(weight), weight, None if bias is None else bias.detach()).to(features)

    def _phi_left_out(self, view: Snapshot, rows: Rows) -> Tensor:
        how: dict[str, Any] = {"probabilities": self.probabilities}
        return left_out_features(self.names, view, rows.features, rows.targets, rows.scores, **how)

    def _leave_out(self, rows: Rows, view: Snapshot, experience: int, stale: str) -> Rows | None:
        """Record the errors of the head on its own rows, each as if that had not been learned."""
        head = self.head
        try:
            if stale or head is None:
                raise ConfigurationError(stale or "it shows no head")
            scores = head.leave_one_out(rows.features, rows.targets)
        except ConfigurationError as error:
            self.say(
                f"{self.name} has no exact scores of its rows as if they had not been learned ({first_line(error)}): "
                "its errors are recorded as batches arrive, which shows no forgetting"
            )
            self.sources = tuple("prequential" if each == "loo" else each for each in self.sources)
            self.fell_back = True
            return None
        fresh = rows._replace(scores=scores)
        self._replace("loo", self._phi_left_out(view, fresh), fresh, experience)
        return fresh

    def _imagine(self, rows: Rows, view: Snapshot, experience: int, *, learned: bool) -> None:
        """Record what would be said of rows if their classes had never come."""
        scores = rows.scores.clone()
        scores[torch.arange(len(scores)), rows.targets.to(scores.device)] = -torch.inf
        how: dict[str, Any] = {"probabilities": self.probabilities, "learned": learned}
        phi = novel_features(self.names, view, rows.features, rows.targets, rows.scores, **how)
        error = sample_loss(self.settings.loss, scores, rows.targets)
        self.records.replace("novel", phi, error, rows.ids, rows.targets, experience)

    def _replace(self, source: Any, phi: Tensor, rows: Rows, experience: int) -> None:
        error = sample_loss(self.settings.loss, rows.scores, rows.targets)
        self.records.replace(source, phi, error, rows.ids, rows.targets, experience)

    def _fit(self, known: KnownRows | None) -> None:
        asked = self.settings
        counts = None
        if known is not None:
            seen = known.statistics
            counts = dict(zip(seen.classes.tolist(), seen.counts.tolist(), strict=True))
        novelty = asked.records.novelty if "novel" in self.sources else 0.0
        phi, error, weight = self.records.training_set(counts, novelty=novelty, holdout=asked.held_out)
        if not len(phi):  # nothing was recorded: the total stays 1
            return
        self.errors.fit(phi, error, weight)
        if asked.held_out:
            held = self.records.held_out(counts, holdout=asked.held_out)
            total = self.errors.predict(held.phi) if len(held.phi) else held.error
            if asked.abstain_rate is not None:
                self.abstain_above = abstention_threshold(total, asked.abstain_rate)
            if asked.risk is not None:
                self.accept_to = risk_threshold(total, held.error, asked.risk, asked.delta)
            if asked.abstain_rate is not None and not (self.errors.is_fitted and self.abstain_above < math.inf):
                self.say(nothing_refused(self.name, asked.abstain_rate))

    # ---- what is said of new samples

    def judge(self, features: Tensor, scores: Tensor, view: Snapshot | None, noise: Any = None) -> Judgement:
        """Return the uncertainty of samples and what is decided by it; NaN where features or scores are not finite.

        Args:
            features: (B, D).
            scores: (B, C) of the predictor.
            view: What is known.
            noise: (B,) aleatoric part, where it is a function of the batch.
        """
        total = torch.full((len(features),), torch.nan, dtype=torch.float64)
        if not self.errors.is_fitted or (view is None and self.needs_rows):
            whole = torch.ones(len(features), dtype=torch.bool)
            total[:] = self.errors.mean_error  # there is too little to tell samples apart
        else:
            phi = self.phi(view, Rows(features, features, features, scores)).cpu()
            whole = phi.isfinite().all(dim=1)
            total[whole] = self.errors.predict(phi[whole])
        aleatoric = self._noise(features, view) if noise is None else checked_noise(noise, len(features))
        abstain = None
        if (most := self.abstains_above) is not None:
            abstain = ~whole | (total > most)
        sets = None
        if self.sets is not None and self.sets.samples:
            sets = self.sets.predict(scores.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf))
        return Judgement(Uncertainty(total, aleatoric, (total - aleatoric).clamp(min=0)), abstain, sets)

    @property
    def abstains_above(self) -> float | None:
        """The total above which nothing is accepted; ``None`` where no threshold was asked for."""
        return min(self.abstain_above, self.accept_to) if self.settings.held_out else None

    def _noise(self, features: Tensor, view: Snapshot | None) -> Tensor:
        found = torch.zeros(len(features), dtype=torch.float64)
        if self.settings.aleatoric == "neighbours":
            if view is not None and view.memory is not None and len(features):
                near = neighbour_noise(self.settings.loss, view.relative(features), *view.memory)
                found = near.nan_to_num(nan=0.0).cpu()
        elif isinstance(self.settings.aleatoric, int | float):
            found += float(self.settings.aleatoric)
        return found

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return what is the same in all processes: tensors and plain types. A call on all of them."""
        self.records.synchronize()
        return {
            "features": list(self.names),
            "sources": list(self.sources),
            "errors": self.errors.state_dict(),
            "records": self.records.state_dict(),
            "abstain_above": as_finite(self.abstain_above),
            "accept_to": as_finite(self.accept_to),
            "fell_back": self.fell_back,
            "stale": self.stale,
        }

    def own_state(self) -> dict[str, Any]:
        """Return what each process has of its own, on the host."""
        frozen = self._frozen_state if self.frozen is None else self.frozen.state_dict()
        return {
            "sets": None if self.sets is None else self.sets.state_dict(),
            "arrived": asdict(self.arrived),
            "frozen": None if frozen is None else {name: each.cpu() for name, each in frozen.items()},
        }

    def load_state_dict(self, state: Any, own: Any, owner: str) -> None:
        """Take both up.

        Raises:
            StateError: If they are damaged or of other settings; nothing is changed then.
        """
        saved = read_own(state, _TABLE, f"{owner}: {self.name}")
        saved |= read_own(own, _OWN_TABLE, f"{owner}: {self.name}")
        other = Watched(self.name, self.predictor, self.settings, self.say)
        other.names = tuple(saved["features"])
        other.errors = other._new_errors()
        other.errors.load_state_dict(saved["errors"])
        other.records.load_state_dict(saved["records"])
        if other.sets is not None:
            other.sets.load_state_dict(saved["sets"])
        self.names, self.sources = other.names, tuple(saved["sources"])
        self.errors, self.records, self.sets = other.errors, other.records, other.sets
        self.abstain_above, self.accept_to = as_endless(saved["abstain_above"]), as_endless(saved["accept_to"])
        self.arrived, self.fell_back, self.stale = Arrived(**saved["arrived"]), saved["fell_back"], saved["stale"]
        self.frozen, self._frozen_state = None, saved["frozen"]

    def fit_state(self) -> dict[str, Any]:
        """Return what a fit has made, for other processes."""
        made = {"errors": self.errors.state_dict(), "sets": None if self.sets is None else self.sets.state_dict()}
        return {**made, "thresholds": (self.abstain_above, self.accept_to)}

    def take_fit(self, state: dict[str, Any]) -> None:
        """Take up what another process has made."""
        self.errors.load_state_dict(state["errors"])
        if self.sets is not None:
            self.sets.load_state_dict(state["sets"])
        self.abstain_above, self.accept_to = state["thresholds"]

    def thaw(self, owner: str) -> None:
        """Take up the frozen head of a loaded state, once the predictor has taken up its own.

        Raises:
            StateError: If it does not fit the head.
        """
        if self._frozen_state is not None and self.head is not None:
            self.frozen = FrozenHead.load(self.head, self._frozen_state, f"{owner}: {self.name}")
        self._frozen_state = None


_TABLE: Table = {
    "features": Many(OneOf(tuple(FEATURE_SIGNS))),
    "sources": Many(OneOf(_SOURCES)),
    "errors": Instance(dict),
    "records": Instance(dict),
    "abstain_above": Real(),
    "accept_to": Real(),
    "fell_back": OneOf((False, True)),
    "stale": OneOf((False, True)),
}
_OWN_TABLE: Table = {
    "sets": Instance(dict | None),
    "arrived": Nested({field.name: Real(least=0) for field in fields(Arrived)}),
    "frozen": Named(Instance(Tensor), optional=True),
}
