"""One edit from beginning to end: how far to go, whether bounds hold, and what to tell of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from clkit.arguments import in_short
from clkit.errors import BatchError
from clkit.methods._checks import generator
from clkit.methods._decomposition import Rows
from clkit.methods._edit_guard import EditReference, Guard, LocalityReport
from clkit.methods._edit_log import EditLog, EditRecord, Factors, stored_factors
from clkit.methods._edit_objective import Objective
from clkit.methods._edited_network import EditedNetwork

__all__ = ["Attempt", "EditResult", "Equivalence", "Images", "Rule", "equivalents_of", "retained"]

Equivalence: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""``(images (B, …), generator) -> images``: another view of each, which shall get the same label."""

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # among which the smallest that does is looked for
_SHRINKING = (1.0, 0.7, 0.5, 0.35, 0.25)  # of a given scale, until bounds hold
_VIEWS = 8  # of a function of equivalents
_REALISED = 0.9  # below it, weights are too coarse for the edit


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
        before = self.network.logits(self.images.x)
        share = rule.flip_share
        if rule.skip_satisfied and self._is_done(share):
            return self._result("satisfied", before, reason="the images have these answers already")
        found, reason = self._search(rule)
        if found is None:
            return self._result("refused", before, reason=reason)
        original = logits = None
        if self.reference is not None:
            logits = self.reference.logits(self.network.logits)
            with self._shown([], alone=True):
                original = self.reference.logits(self.network.logits)
        factors, scale, repeats = found
        trial = _multiplied_out(factors)
        status: Literal["applied", "scaled"] = "applied"
        report, reason = None, ""
        shrinks = rule.scale != "smallest" and rule.guard is not None and rule.guard.policy == "scale"
        bounded = self.reference is not None or rule.accept is not None
        for part in _SHRINKING if shrinks and bounded else (1.0,):
            with self._shown([self._record(trial, scale * part)]):
                after = self.network.logits(self.images.x)
                if self.reference is not None and logits is not None and original is not None:
                    their = self.reference.logits(self.network.logits)
                    report = self.reference.report(self.objective, original, logits, their)
                against = "" if rule.accept is None else rule.accept()
            if not bool(torch.isfinite(after).all()):
                return self._result("refused", before, reason="the edited network gives answers that are not finite")
            broken = rule.guard.broken_by(report) if rule.guard is not None and report is not None else ""
            broken = broken or against
            reason = reason or broken
            if not broken:
                scale, status = scale * part, "applied" if part == 1.0 else "scaled"
                break
        if broken and not against and rule.guard is not None and rule.guard.policy == "warn":
            warnings.warn(f"{broken}; the edit is applied all the same (policy='warn')", stacklevel=4)
        elif broken:
            return self._result("refused", before, reason=broken, report=report)
        elif status == "scaled" and not bool(self.objective.hits(after, self.images.y).all()):
            reason = f"{reason}; at a scale of {scale:.3g} it does not, but the answer is not the wanted one"
            return self._result("refused", before, reason=reason, report=report)
        return self.apply(factors, scale, before, status=status, reason=reason, report=report, repeats=repeats)

    def apply(
        self,
        factors: Mapping[str, Factors],
        scale: float,
        before: Tensor,
        *,
        status: Literal["applied", "scaled"] = "applied",
        reason: str = "",
        report: LocalityReport | None = None,
        repeats: int = 1,
    ) -> EditResult:
        """Write an edit into the weights and the log."""
        weights = self.network.weights()
        old = {name: weight.detach().cpu().double() for name, weight in weights.items()}
        earlier = list(self.log.records)
        record = self.log.append(weights, factors, scale, x=self.images.x.cpu(), y=self.images.y.cpu())
        deltas = self.log.deltas(record)
        wanted = sum(float(delta.square().sum()) for delta in deltas.values())
        moved = {name: (weights[name].detach().cpu().double() - old[name]).view_as(deltas[name]) for name in deltas}
        realised = (
            sum(float((moved[name] * delta).sum()) for name, delta in deltas.items()) / wanted if wanted else None
        )
        if realised is not None and realised < _REALISED:
            warnings.warn(
                f"weights of {next(iter(weights.values())).dtype} are too coarse for edit {record.id}: {realised:.0%} "
                "of it is there; edit the network in float32",
                stacklevel=5,
            )
        return self._result(
            status,
            before,
            id=record.id,
            reason=reason,
            scale=scale,
            repeats=repeats,
            sizes={name: float(delta.norm() / old[name].norm()) for name, delta in deltas.items()},
            realised=realised,
            report=report,
            retention=retained(self.network, self.objective, earlier),
        )

    def _search(self, rule: Rule) -> tuple[tuple[dict[str, Factors], float, int] | None, str]:
        """Return factors, their scale and the number of proposals; or why there are none."""
        scales = SCALES if rule.scale == "smallest" else (1.0 if rule.scale == "unit" else float(rule.scale),)
        parts: list[tuple[dict[str, Factors], float]] = []
        for repeat in range(1, rule.max_repeats + 1):
            so_far = [self._record(*part) for part in parts]
            with self._shown(so_far):
                factors = self.propose(self.images.x, self.images.y)
            if factors is None:
                return (
                    None,
                    "no gradient reaches the edited layers: the answer is too certain, or a branch is switched off",
                )
            trial = _multiplied_out(factors)
            for scale in scales:
                with self._shown([*so_far, self._record(trial, scale)]):
                    done = self._is_done(rule.flip_share)
                if done or (rule.scale != "smallest" and repeat == rule.max_repeats):
                    return (*joined([*parts, (factors, scale)]), repeat), ""
            parts.append((factors, scales[-1] if rule.scale != "smallest" else 1.0))
        return None, f"no scale up to {scales[-1]} gives the wanted answers"

    def _is_done(self, share: float) -> bool:
        """Whether all edited images and a share of their equivalents have the wanted answers now."""
        logits = self.network.logits(torch.cat([self.images.x, self.images.others]))
        hits = self.objective.hits(logits, torch.cat([self.images.y, self.images.their_y]))
        own, others = hits[: len(self.images.x)], hits[len(self.images.x) :]
        return bool(own.all()) and (not len(others) or float(others.double().mean()) >= share)

    def _shown(self, records: list[EditRecord], *, alone: bool = False) -> Any:
        return self.log.shown(self.network.weights(), records, alone=alone)

    def _record(self, factors: dict[str, Factors], scale: float) -> EditRecord:
        return EditRecord(-1, self.images.x, self.images.y, scale, factors=factors)

    def _result(self, status: Any, before: Tensor, report: LocalityReport | None = None, **known: Any) -> EditResult:
        images, objective = self.images, self.objective
        after = self.network.logits(images.x)
        generality = None
        if len(images.others):
            hits = objective.hits(self.network.logits(images.others), images.their_y)
            generality = float(hits.double().mean())
        entries: dict[str, Any] = {
            "id": None,
            "reason": "",
            "scale": 0.0,
            "repeats": 0,
            "sizes": {},
            "realised": None,
            "retention": None,
            "label": images.y.tolist(),
            "prediction_before": objective.answers(before).tolist(),
            "prediction_after": objective.answers(after).tolist(),
            "probability_before": objective.probabilities(before, images.y).tolist(),
            "probability_after": objective.probabilities(after, images.y).tolist(),
            "reliability": float(objective.hits(after, images.y).double().mean()),
            "generality": generality,
            "locality": report,
        }
        return EditResult(status=status, seconds=time.perf_counter() - self.started, **{**entries, **known})


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


def equivalents_of(network: EditedNetwork, x: Tensor, given: Any, seed: tuple[int, ...]) -> Tensor:
    """Return equivalents (B, k, …) of images, or raise a BatchError.

    Args:
        network: Which takes them.
        x: (B, …).
        given: ``None``; images (B, k, …), or (k, …) of a single one; or an :data:`Equivalence`.
        seed: Of the generator.
    """
    if given is None:
        return x[:, None][:, :0]
    if not isinstance(given, Tensor):
        draws = generator(*seed)
        views = [given(x.clone(), draws) for _ in range(_VIEWS)]
        if not all(isinstance(view, Tensor) and view.shape == x.shape for view in views):
            raise BatchError(f"equivalents must return images of shape {tuple(x.shape)}, got {in_short(views[0])}")
        given = torch.stack([view.to(x.device) for view in views], dim=1)
    if given.ndim == x.ndim and len(x) == 1:
        given = given[None]
    if given.shape[:1] + given.shape[2:] != x.shape:
        raise BatchError(f"equivalents must be of shape (B, k, …) to images {tuple(x.shape)}, got {tuple(given.shape)}")
    if not given.shape[1]:
        return x[:, None][:, :0]
    return network.images("equivalents", given.flatten(0, 1)).view(len(x), -1, *x.shape[1:])
