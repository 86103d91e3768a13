"""One edit from beginning to end: how far to go, whether bounds hold, and what to tell of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clkit.errors import ArgumentError, BatchError
from clkit.methods._decomposition import Rows
from clkit.methods._edit_arguments import level_outside
from clkit.methods._edit_guard import EditReference, Guard, LocalityReport
from clkit.methods._edit_log import EditLog, EditRecord, Factors, stored_factors
from clkit.methods._edit_objective import Objective
from clkit.methods._edited_network import EditedNetwork

__all__ = ["NOTHING", "Attempt", "EditResult", "Images", "Proposal", "Rule", "retained"]

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # among which the smallest that does is looked for
_SHRINKING = (1.0, 0.7, 0.5, 0.35, 0.25)  # of a given scale, until bounds hold
_REALISED = 0.9  # below it, weights are too coarse for the edit
NOTHING = (
    "no gradient reaches the edited layers: the answer is too certain, a branch is switched off, or nothing is left "
    "beside what shall not change"
)


class Images(NamedTuple):
    """Images with the labels that they shall get.

    Attributes:
        x: (B, …) edited.
        y: (B,), or (B, C).
        others: (M, …) equivalents, M = 0 where there are none.
        their_y: Their labels.
    """

    x: Tensor
    y: Tensor
    others: Tensor
    their_y: Tensor


class Rule(NamedTuple):
    """How an edit is carried out; see :meth:`GradientEditor.edit`."""

    scale: float | Literal["smallest", "unit"]
    flip_share: float
    max_repeats: int
    skip_satisfied: bool
    guard: Guard | None
    accept: Callable[[], str] | None = None


@dataclass(frozen=True)
class Proposal:
    """An edit that was not applied: what it would add to each weight.

    Attributes:
        x: (B, …) the edited images, on the CPU.
        y: (B,) int64, or (B, C), their labels.
        factors: By layer.
    """

    x: Tensor = field(repr=False)
    y: Tensor
    factors: Mapping[str, Factors] = field(repr=False)


@dataclass(frozen=True)
class EditResult:
    """What became of an edit.

    Attributes:
        id: Its number in the log; ``None`` if it was not applied.
        status: ``"applied"``; ``"scaled"``, applied at a smaller scale because of the guard; ``"satisfied"``, nothing
            to do; ``"refused"``, nothing was changed.
        reason: Why it was refused or scaled.
        scale: What the proposal was multiplied by; 0 if nothing was applied.
        repeats: Proposals that were added up.
        label: The wanted labels.
        prediction_before: Answers to the edited images before it.
        prediction_after: Likewise after it.
        probability_before: Probability of the wanted label before it, of each edited image.
        probability_after: Likewise after it.
        reliability: Share of the edited images that have the wanted answer after it.
        generality: Share of the equivalents that have it; ``None`` without equivalents.
        sizes: Norm of what is added to each layer, as a share of the norm of its weight.
        realised: Share of the edit that is there, the projection of what changed onto what was to be added: below 1
            where weights of half precision are too coarse.
        locality: What happened to the reference; ``None`` without one.
        retention: Share of the earlier edits in the log whose images all still have their labels; ``None`` without
            earlier ones.
        seconds: What it took.
    """

    id: int | None
    status: Literal["applied", "scaled", "satisfied", "refused"]
    reason: str
    scale: float
    repeats: int
    label: list[Any]
    prediction_before: list[Any]
    prediction_after: list[Any]
    probability_before: list[float]
    probability_after: list[float]
    reliability: float
    generality: float | None
    sizes: dict[str, float]
    realised: float | None
    locality: LocalityReport | None
    retention: float | None
    seconds: float


@dataclass
class Attempt:
    """An edit on its way; nothing is changed before :meth:`carry_out` has decided.

    Attributes:
        network: The network.
        objective: What is wanted of answers.
        log: The edits so far.
        propose: Images and labels to the factors of each layer, ``None`` where no gradient reaches any.
        images: What is edited.
        reference: What shall not move.
    """

    network: EditedNetwork
    objective: Objective
    log: EditLog
    propose: Callable[[Tensor, Tensor], dict[str, Factors] | None]
    images: Images
    reference: EditReference | None
    started: float = field(default_factory=time.perf_counter)

    def carry_out(self, rule: Rule) -> EditResult:
        """Edit by a rule."""
        before = self._seen()
        if rule.skip_satisfied and self._is_done(before, rule.flip_share):
            return self._result("satisfied", before, before, reason="the images have these answers already")
        found, reason = self._search(rule)
        if found is None:
            return self._result("refused", before, before, reason=reason)
        trial, status, against = found.multiplied_out(), "applied", ""
        report, reason, logits, original = None, "", None, None
        run = partial(self.network.logits_of, "reference")
        if self.reference is not None:
            original = logits = self.reference.logits(run)
            if self.log.is_open:
                with self._shown([], alone=True):
                    original = self.reference.logits(run)
        bounded = self.reference is not None or rule.accept is not None
        shrinks = bounded and rule.scale != "smallest" and rule.guard is not None and rule.guard.policy == "scale"
        for part in _SHRINKING if shrinks else (1.0,):
            scale = found.scale * part
            after = found.seen if part == 1.0 else None
            if after is None or bounded:
                with self._shown([self._record(trial, scale)]):
                    after = after or self._seen()
                    if self.reference is not None and logits is not None and original is not None:
                        their = self.reference.logits(run)
                        report = self.reference.report(self.objective, original, logits, their)
                    against = "" if rule.accept is None else rule.accept()
                if not isinstance(against, str):
                    raise ArgumentError(f"accept must return what speaks against the edit, a string, got {against!r}")
            if not bool(torch.isfinite(after.own).all()):
                reason = "the edited network gives answers that are not finite"
                return self._result("refused", before, before, reason=reason)
            broken = rule.guard.broken_by(report) if rule.guard is not None and report is not None else ""
            broken = broken or against
            reason = reason or broken
            if not broken:
                status = "applied" if part == 1.0 else "scaled"
                break
        assert after is not None  # there is at least one part
        if broken and not against and rule.guard is not None and rule.guard.policy == "warn":
            warnings.warn(f"{broken}; the edit is applied all the same (policy='warn')", stacklevel=level_outside())
        elif broken:
            return self._result("refused", before, before, reason=broken, report=report)
        elif status == "scaled" and not bool(self.objective.hits(after.own, self.images.y).all()):
            reason = f"{reason}; at a scale of {scale:.3g} it does not, but the answer is not the wanted one"
            return self._result("refused", before, before, reason=reason, report=report)
        deltas = self.log.deltas(self._record(trial, scale))
        if too_large := self._too_large(deltas):
            return self._result("refused", before, before, reason=too_large, report=report)
        known: dict[str, Any] = {"status": status, "reason": reason, "report": report, "repeats": found.repeats}
        return self.apply(found.factors, scale, before, after, deltas, **known)

    def apply(
        self,
        factors: Mapping[str, Factors],
        scale: float,
        before: Seen | None = None,
        after: Seen | None = None,
        deltas: Mapping[str, Tensor] | None = None,
        *,
        status: Literal["applied", "scaled"] = "applied",
        **known: Any,
    ) -> EditResult:
        """Write an edit into the weights and the log.

        Args:
            factors: What is added.
            scale: What that is multiplied by.
            before: What was seen before it, where that is known.
            after: What is seen with it.
            deltas: The factors and the scale multiplied out.
            status: Of the result.
            known: What else the result has.
        """
        before = before or self._seen()
        weights = self.network.weights()
        earlier, entry = list(self.log.records), {"x": self.images.x.cpu(), "y": self.images.y.cpu()}
        if deltas is None:
            deltas = self.log.deltas(self._record(dict(factors), scale))
            if too_large := self._too_large(deltas):
                raise BatchError(f"{too_large}; nothing was changed")
        old = {name: weights[name].detach().cpu().clone() for name in deltas}
        record = self.log.append(weights, factors, scale, deltas, **entry)
        wanted = moved = 0.0
        sizes: dict[str, float] = {}
        for name, delta in deltas.items():
            added = (weights[name].detach().cpu().double() - old[name].double()).reshape(delta.shape)
            moved += float((added * delta).sum())
            wanted += float(delta.square().sum())
            sizes[name] = float(delta.norm() / old[name].double().norm())
        realised = moved / wanted if wanted else None
        if realised is not None and realised < _REALISED:
            warnings.warn(
                f"weights of {next(iter(weights.values())).dtype} are too coarse for edit {record.id}: {realised:.0%} "
                "of it is there; edit the network in float32",
                stacklevel=level_outside(),
            )
        known |= {"id": record.id, "scale": scale, "sizes": sizes, "realised": realised}
        held = retained(self.network, self.objective, earlier)
        return self._result(status, before, after or self._seen(), **{"repeats": 1, **known}, retention=held)

    def _too_large(self, deltas: Mapping[str, Tensor]) -> str:
        """Return which weights an edit would make too large for their dtype, in words."""
        for name, delta in deltas.items():
            weight = self.network.weights()[name].detach()
            if not float(weight.abs().max()) + float(delta.abs().max()) <= torch.finfo(weight.dtype).max:
                return f"the weight of {name!r} would leave what {weight.dtype} holds"
        return ""

    def _search(self, rule: Rule) -> tuple[_Found | None, str]:
        """Return factors, their scale and the number of proposals; or why there are none."""
        scales = SCALES if rule.scale == "smallest" else (1.0 if rule.scale == "unit" else float(rule.scale),)
        parts: list[tuple[dict[str, Factors], float]] = []
        for repeat in range(1, rule.max_repeats + 1):
            so_far = [self._record(*part) for part in parts]
            with self._shown(so_far):
                factors = self.propose(self.images.x, self.images.y)
            if factors is None:
                return None, NOTHING
            trial = _multiplied_out(factors)
            last = rule.scale != "smallest" and repeat == rule.max_repeats
            for scale in scales:
                if last:
                    return _Found(*joined([*parts, (factors, scale)]), repeat, None if parts else trial, None), ""
                with self._shown([*so_far, self._record(trial, scale)]):
                    seen = self._seen(rule.flip_share)
                if self._is_done(seen, rule.flip_share):
                    whole = None if parts else trial
                    return _Found(*joined([*parts, (factors, scale)]), repeat, whole, None if parts else seen), ""
            parts.append((factors, scales[-1] if rule.scale != "smallest" else 1.0))
        return None, (
            f"no scale up to {scales[-1]} gives the wanted answers; train the editor, ask for less of the equivalents "
            "(flip_share), or edit other layers"
        )

    def _seen(self, share: float | None = None) -> Seen:
        """Return what the network answers now; with a share, of equivalents only where the images have their labels."""
        own, others = self.network.logits(self.images.x), None
        if not len(self.images.others):
            others = own[:0]
        elif share is None or bool(self.objective.hits(own, self.images.y).all()):
            others = self.network.logits(self.images.others)
        return Seen(own, others)

    def _is_done(self, seen: Seen, share: float) -> bool:
        """Whether all edited images and a share of their equivalents have the wanted answers."""
        if seen.others is None or not bool(self.objective.hits(seen.own, self.images.y).all()):
            return False
        hits = self.objective.hits(seen.others, self.images.their_y)
        return not len(hits) or float(hits.double().mean()) >= share

    def _shown(self, records: list[EditRecord], *, alone: bool = False) -> Any:
        return self.log.shown(self.network.weights(), records, alone=alone)

    def _record(self, factors: dict[str, Factors], scale: float) -> EditRecord:
        return EditRecord(-1, self.images.x, self.images.y, scale, factors=factors)

    def _result(
        self, status: Any, before: Seen, after: Seen, report: LocalityReport | None = None, **known: Any
    ) -> EditResult:
        images, objective = self.images, self.objective
        generality = None
        if len(images.others):
            assert after.others is not None
            generality = float(objective.hits(after.others, images.their_y).double().mean())
        entries: dict[str, Any] = {
            "id": None,
            "reason": "",
            "scale": 0.0,
            "repeats": 0,
            "sizes": {},
            "realised": None,
            "retention": None,
            "label": images.y.tolist(),
            "prediction_before": objective.answers(before.own).tolist(),
            "prediction_after": objective.answers(after.own).tolist(),
            "probability_before": objective.probabilities(before.own, images.y).tolist(),
            "probability_after": objective.probabilities(after.own, images.y).tolist(),
            "reliability": float(objective.hits(after.own, images.y).double().mean()),
            "generality": generality,
            "locality": report,
        }
        return EditResult(status=status, seconds=time.perf_counter() - self.started, **{**entries, **known})


class Seen(NamedTuple):
    """What the network answers.

    Attributes:
        own: (B, C) logits of the edited images.
        others: (M, C) of their equivalents; ``None`` where they do not matter, since an image is answered wrongly.
    """

    own: Tensor
    others: Tensor | None


class _Found(NamedTuple):
    """An edit that was found, and what is known of it already."""

    factors: dict[str, Factors]
    scale: float
    repeats: int
    trial: dict[str, Factors] | None
    seen: Seen | None

    def multiplied_out(self) -> dict[str, Factors]:
        return _multiplied_out(self.factors) if self.trial is None else self.trial


def retained(network: EditedNetwork, objective: Objective, records: list[EditRecord]) -> float | None:
    """Return the share of some edits whose images all have their labels now."""
    if not records:
        return None
    kept = 0
    for record in records:
        logits = network.logits(network.images("x", record.x))
        kept += bool(objective.hits(logits, record.y.to(logits.device)).all())
    return kept / len(records)


def _multiplied_out(factors: Mapping[str, Factors]) -> dict[str, Factors]:
    """Return the same with the products taken, once for all scales that are tried."""
    return {name: Factors(None, None, each.delta()) for name, each in factors.items()}


def joined(parts: list[tuple[dict[str, Factors], float]]) -> tuple[dict[str, Factors], float]:
    """Return the factors of a sum of scaled proposals, and what is still to be multiplied."""
    if len(parts) == 1:
        return parts[0]
    total: dict[str, Factors] = {}
    for name in parts[0][0]:
        own = [(factors[name], scale) for factors, scale in parts]
        pairs = [
            (factors.P * scale, factors.Q) for factors, scale in own if factors.P is not None and factors.Q is not None
        ]
        if len(pairs) == len(own):
            total[name] = stored_factors(Rows(torch.cat([Q for _, Q in pairs]), torch.cat([P for P, _ in pairs])))
        else:
            dense = torch.stack([scale * factors.delta() for factors, scale in own]).sum(dim=0)
            total[name] = replace(own[0][0], P=None, Q=None, dense=dense.float())
    return total, 1.0
