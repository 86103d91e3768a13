"""What is said of the samples of an evaluation, and how good it was."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from clkit.callbacks._deup_parts import Judgement, Rows
from clkit.callbacks._watching import Watching
from clkit.callbacks.base import Stage
from clkit.distributed import gather_objects
from clkit.methods._state import exact
from clkit.methods.sample_loss import sample_loss
from clkit.metrics import calibration, ranking
from clkit.schema import Named, Numbers, Table, read_own

__all__ = ["Judging"]


class _Said(NamedTuple):
    """What is said of the samples of one batch by one predictor, on the host."""

    judgement: Judgement
    predicted: Tensor
    novelty: Tensor | None
    is_new: Tensor | None


class _Samples(NamedTuple):
    """Labelled samples of an evaluation, each (n,) and what does not apply NaN."""

    epistemic: Tensor
    total: Tensor
    loss: Tensor
    wrong: Tensor
    future: Tensor
    target: Tensor
    abstain: Tensor
    set_size: Tensor
    covered: Tensor
    is_new: Tensor


class Judging:
    """Judges the samples of an evaluation, and concludes how good that was.

    Args:
        watching: The predictors and what is known.
        prefix: What comes before the names of columns and figures.
    """

    def __init__(self, watching: Watching, prefix: str) -> None:
        self._watching, self.prefix = watching, prefix
        self._measures = True  # whether the samples of this evaluation are kept, to be compared with their labels
        self._samples: dict[str, list[_Samples]] = {}
        self._last: dict[str, _Samples] = {}
        self._history: dict[str, dict[tuple[int, int], float]] = {}  # mean total by stage and class
        self._came: dict[int, int] = {}  # the stage in which each class was learned
        self.reports: dict[str, dict[str, float]] = {}

    def begin(self, stage: Stage) -> None:
        """Begin an evaluation."""
        self._samples, self._measures = {}, stage != "predict"

    def end(self) -> None:
        """Let go of what is not shown any more."""
        self._samples = {}

    # ---- a batch

    def scores(self, name: str) -> Tensor | None:
        """Return what a predictor says of the batch in work, (B, C) float64; ``None`` where that is nothing."""
        observer, watched = self._watching.observer_of[name], self._watching.watched[name]
        scores = observer.logits if watched.predictor is None else observer.scores(watched.predictor)
        return None if scores is None or not scores.shape[1] else scores.detach().double()

    def rows(self, ids: Tensor, *, arriving: bool = False) -> dict[str, Rows]:
        """Return the samples of the batch in work with what each predictor says of them, as far as it says something.

        Of an ``arriving`` batch it is what a head said when that was last brought up to date, before it learns it.
        """
        watching, found = self._watching, {}
        for name, watched in watching.watched.items():
            observer, wanted = watching.observer_of[name], watching.source(name)
            if arriving and not observer.has_rows(wanted):
                watching.say(
                    f"the training step shows {name} views of the arriving samples and not those themselves, so its "
                    "errors on them are not recorded; DEUP(forward='eval') pays one more pass of a batch to have them"
                )
                continue
            features = observer.features(wanted).detach().double()
            if arriving and watched.predictor is None and observer.source(watching.forward) == "eval":
                scores = watched.logits(features)  # those of the step are of the network in training mode
                if scores is None:
                    watching.say("forward='eval' needs a classifier of one linear layer; its errors are not recorded")
            elif not arriving or watched.predictor is None:
                scores = self.scores(name)
            else:
                scores = None if watched.frozen is None else watched.frozen(features)
            if scores is not None:
                found[name] = Rows(ids, features, observer.known_targets, scores)
        return found

    def _said(self) -> dict[str, _Said]:
        """Return what is said of the batch in work, by predictor; worked out once."""
        observer = next(iter(self._watching.observers))
        return observer.remember(("deup", id(self)), lambda: self._keep(self._judge()))  # type: ignore[no-any-return]  # a memo holds anything

    def _judge(self) -> dict[str, _Said]:
        watching, said = self._watching, {}
        layers, asked = watching.layers, watching.settings.aleatoric
        for name, watched in watching.watched.items():
            scores = self.scores(name)
            if scores is None:
                continue
            observer = watching.observer_of[name]
            features = observer.features(getattr(watched.predictor, "forward", "auto")).detach().double()
            view = layers.view(name, observer.point, watched.leverage) if watched.needs_rows else None
            noise = asked(observer.inputs) if callable(asked) else None
            known = layers.known_of(name, observer.point)
            novelty = is_new = None
            if known is not None and known.novelty is not None and known.statistics.samples and not watched.stale:
                novelty = known.novelty.distance(features).cpu()
                is_new = novelty > known.alarm
            judgement = watched.judge(features, scores, view, noise)
            said[name] = _Said(judgement, scores.argmax(dim=1).cpu(), novelty, is_new)
        return said

    def on_batch(self) -> None:
        """Judge the batch in work, whoever asks first, and keep what is said of its labelled samples."""
        self._said()

    def _keep(self, everything: dict[str, _Said]) -> dict[str, _Said]:
        watching = self._watching
        for name, said in everything.items():
            observer = watching.observer_of[name]
            if observer.targets is None or not self._measures:
                continue
            targets = observer.targets
            labelled = (targets >= 0).cpu()
            scores = self.scores(name)
            assert scores is not None
            loss = sample_loss(watching.settings.loss, scores, targets).cpu()
            wrong = sample_loss("error", scores, targets).cpu()
            target = targets.long().cpu()
            nothing = torch.full_like(loss, torch.nan)
            sets = said.judgement.sets
            size, covered = nothing, nothing
            if sets is not None:
                size = sets.sum(dim=1).double().cpu()
                inside = (target >= 0) & (target < sets.shape[1])
                at = torch.where(inside, target, 0)
                covered = (sets.cpu().gather(1, at[:, None])[:, 0] & inside).double()
            abstain = said.judgement.abstain
            future = ~torch.isin(target, torch.tensor(sorted(watching.layers.classes), dtype=torch.int64))
            kept = _Samples(
                epistemic=said.judgement.uncertainty.epistemic,
                total=said.judgement.uncertainty.total,
                loss=loss,
                wrong=wrong,
                future=future.double(),
                target=target.double(),
                abstain=nothing if abstain is None else abstain.double().cpu(),
                set_size=size,
                covered=covered,
                is_new=nothing if said.is_new is None else said.is_new.double(),
            )
            whole = labelled & kept.total.isfinite() & kept.loss.isfinite()
            self._samples.setdefault(name, []).append(_Samples(*(each[whole] for each in kept)))
        return everything

    def columns(self) -> dict[str, Tensor]:
        """Return the columns of the batch in work."""
        columns: dict[str, Tensor] = {}
        for name, said in self._said().items():
            of = {**said.judgement.uncertainty._asdict(), "abstain": said.judgement.abstain}
            of["set_size"] = None if said.judgement.sets is None else said.judgement.sets.sum(dim=1)
            of |= {"novelty": said.novelty, "is_new": said.is_new}
            columns |= {f"{self.prefix}{name}_{key}": value for key, value in of.items() if value is not None}
        return columns

    def predictions(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that is said of the batch in work, by predictor: plain tensors on the host."""
        found = {}
        for name, said in self._said().items():
            of = {"prediction": said.predicted, **said.judgement.uncertainty._asdict()}
            of |= {"abstain": said.judgement.abstain, "set": said.judgement.sets}
            of |= {"novelty": said.novelty, "is_new": said.is_new}
            with exact():  # what is made in a prediction could be kept in no state
                found[name] = {key: value.cpu().clone() for key, value in of.items() if value is not None}
        return found

    # ---- the whole evaluation

    def conclude(self, after: int | None) -> dict[str, dict[str, float]]:
        """Return the metrics of each predictor; a call on all processes.

        The course of the stream gets a row where this is the evaluation ``after`` an experience, by its index.
        """
        own = {name: _joined(parts) for name, parts in self._samples.items()}
        parts = gather_objects(own, "what they said of their samples")
        names = list(dict.fromkeys(name for part in parts for name in part))
        if not names:  # it was concluded before
            return self.reports
        self._last = {name: _joined([part[name] for part in parts if name in part]) for name in names}
        self._samples = {}
        self.reports = {name: report(samples) for name, samples in self._last.items() if len(samples.total)}
        if after is None:
            return self.reports
        for label in sorted(self._watching.layers.classes):
            self._came.setdefault(label, after)
        for name, samples in self._last.items():
            of = self._history.setdefault(name, {})
            for label in torch.unique(samples.target).tolist():
                of[after, int(label)] = float(samples.total[samples.target == label].mean())
        return self.reports

    def figures(self) -> dict[str, Any]:
        """Return figures of the last evaluation, by name of their file."""
        from clkit.metrics import uncertainty_figures as drawn

        figures: dict[str, Any] = {}
        for name, samples in self._last.items():
            known = samples.future == 0
            if not bool(known.any()):
                continue
            file = f"deup_{self.prefix}{name}"
            threshold = self._watching.watched[name].abstains_above
            total, loss = samples.total[known], samples.loss[known]
            figures[f"{file}_risk_coverage"] = drawn.plot_risk_coverage(total, loss, threshold=threshold, title=name)[0]
            figures[f"{file}_error"] = drawn.plot_loss_by_uncertainty(total, loss, title=name)[0]
            groups = {"classes learned": total}
            if not bool(known.all()):
                groups["classes not learned"] = samples.total[~known]
            how: dict[str, Any] = {"threshold": threshold, "xlabel": "total uncertainty", "title": name}
            figures[f"{file}_spread"] = drawn.plot_histograms(groups, **how)[0]
            table, learned = self.course(name)
            if len(table):
                ylabel = "mean total uncertainty"
                figures[f"{file}_learning"] = drawn.plot_around_learning(table, learned, ylabel=ylabel, title=name)[0]
        return figures

    def course(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the mean total (T, K) by stage and class, and when each class was learned; nothing if always after."""
        of = {at: mean for at, mean in self._history.get(name, {}).items() if at[1] in self._came}
        classes = sorted({label for _, label in of})
        if not any(stage < self._came[label] for stage, label in of):
            return torch.empty(0, 0), torch.empty(0)
        table = torch.full((max(self._came.values()) + 1, len(classes)), torch.nan, dtype=torch.float64)
        for (stage, label), mean in of.items():
            table[stage, classes.index(label)] = mean
        return table, torch.tensor([self._came[label] for label in classes])

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return what the course of the stream showed."""
        rows = {name: [[*at, mean] for at, mean in of.items()] for name, of in self._history.items()}
        return {
            "history": {name: torch.tensor(each, dtype=torch.float64).reshape(-1, 3) for name, each in rows.items()},
            "came": torch.tensor(list(self._came.items()), dtype=torch.int64).reshape(-1, 2),
        }

    def load_state_dict(self, state: Any, owner: str) -> None:
        """Take it up.

        Raises:
            StateError: If it is damaged; nothing is changed then.
        """
        saved = read_own(state, _TABLE, owner)
        self._history = {
            name: {(int(stage), int(label)): mean for stage, label, mean in rows.tolist()}
            for name, rows in saved["history"].items()
        }
        self._came = dict(saved["came"].tolist())


_TABLE: Table = {
    "history": Named(Numbers(("N", 3), torch.float64, least=0, most=2**53)),
    "came": Numbers(("C", 2), least=0, most=2**31),
}


def _joined(parts: list[_Samples]) -> _Samples:
    return _Samples(*(torch.cat(column) for column in zip(*parts, strict=True)))


def report(samples: _Samples) -> dict[str, float]:
    """Return the metrics of an evaluation; those that do not apply, or are not defined, are left out.

    Errors are those on classes that were learned; ``_future`` compares them with samples of classes that were not.
    """
    known = samples.future == 0
    u, total, loss, wrong = (each[known] for each in (samples.epistemic, samples.total, samples.loss, samples.wrong))
    found: dict[str, float] = {}
    if len(u):
        found |= {
            "mean_total": float(total.mean()),
            "mean_loss": float(loss.mean()),
            "spearman": ranking.spearman(u, loss),
            "auroc_error": ranking.auroc(u, wrong),
            "aurc": ranking.aurc(u, loss),
            "eaurc": ranking.excess_aurc(u, loss),
            "set_size": float(samples.set_size[known].mean()),
            "coverage": float(samples.covered[known].mean()),
            "singletons": _share(samples.set_size[known] == 1, samples.set_size[known]),
            "empty_sets": _share(samples.set_size[known] == 0, samples.set_size[known]),
            "abstention_rate": float(samples.abstain[known].mean()),
            "selective_risk": float(wrong[samples.abstain[known] == 0].mean()),
            "false_alarms": float(samples.is_new[known].mean()),
        }
        if bool(((total >= 0) & (total <= 1) & (loss <= 1)).all()):
            found["ece_error"] = calibration.calibration_error(calibration.adaptive_bins(total, loss))
    if bool(known.any()) and not bool(known.all()):
        found |= {
            "auroc_future": ranking.auroc(samples.epistemic, samples.future),
            "fpr95_future": ranking.fpr_at_tpr(samples.epistemic, samples.future, 0.95),
            "abstention_rate_future": float(samples.abstain[~known].mean()),
            "new_found": float(samples.is_new[~known].mean()),
        }
    return {name: value for name, value in found.items() if value == value}  # NaN is not itself


def _share(which: Tensor, of: Tensor) -> float:
    return float("nan") if bool(of.isnan().any()) else float(which.double().mean())
