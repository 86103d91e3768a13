"""What was measured in a run, and its files: ``results.json`` and tables as CSV."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clkit._version import __version__
from clkit.errors import ArgumentError, StateError
from clkit.files import atomic_write
from clkit.metrics.counts import MOST_CELLS, MOST_SAMPLES, StreamCounts
from clkit.metrics.functional import plain, summarize
from clkit.report.notes import notes_on
from clkit.schema import Many, Numbers, Whole, read_entries, read_state, saved_entry
from clkit.stream.experience import Experience

__all__ = ["ClassTable", "Recorded", "Results", "RunResults", "results_document", "write_predictions", "write_results"]

ClassTable = tuple[list[list[int]], list[list[int]]]  # [class, correct, samples] and [class, predicted, samples]
Results = dict[str, dict[str, Any]]


@dataclass
class Recorded:
    """One evaluation of n samples on the CPU; by predictor what it said, by name further numbers."""

    experiences: Tensor  # (n,) int64, index of the experience that each belongs to, below 0 for none: not counted
    targets: Tensor  # (n,) int64 class ids, -1 where unlabelled
    rows: Tensor  # (n,) int64, which row of the data set each is
    predicted: dict[str, Tensor] = field(default_factory=dict)  # (n,) int64 class ids, -1 for none
    own_targets: dict[str, Tensor] = field(default_factory=dict)  # (n,) of a predictor that reads others than `targets`
    scores: dict[str, Tensor] = field(default_factory=dict)  # (n,) float64 of what was predicted, NaN for none
    columns: dict[str, Tensor] = field(default_factory=dict)  # (n,) bool, int64 or float64
    places: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # (n,), number of its loader

    @classmethod
    def join(cls, parts: Sequence[Recorded]) -> Recorded:
        """Return the samples of all parts in their order; what a part lacks is -1 or ``NaN`` there."""
        parts = [part for part in parts if len(part.rows)] or parts[:1]
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {
            name: torch.cat([getattr(part, name) for part in parts])
            for name in ("experiences", "targets", "rows", "places")
        }
        for kind, lacking in (("predicted", -1), ("own_targets", -1), ("scores", torch.nan), ("columns", torch.nan)):
            names = dict.fromkeys(name for part in parts for name in getattr(part, kind))
            fill = torch.tensor(lacking)
            joined[kind] = {
                name: torch.cat([getattr(part, kind).get(name, fill.expand(len(part.rows))) for part in parts])
                for name in names
            }
        return cls(**joined)


class RunResults:
    """Counts of each predictor and means of further columns, stage by stage: all that ``results.json`` says of them."""

    def __init__(self) -> None:
        self.counts: dict[str, StreamCounts] = {}
        self.columns: dict[str, Tensor] = {}  # (n, 4) float64: stage, experience, mean, and the samples it is of
        self.layers: dict[str, Any] = {}  # where each predictor is read: {"layer": …, "features": …}
        self.brought: list[list[int]] = []  # classes that each experience trained, where no stream says so
        self.cut: set[int] = set()  # stages that were measured before their experience was over
        self.without: set[int] = set()  # experiences that have no test samples with a label
        self.one_test_set = False  # whether the test samples of a stream's first experience are those of all
        self._said: dict[str, str] = {}  # by kind, what whoever evaluated has to say of it
        self._noted: set[str] = set()  # kinds of notes that were handed out
        self._summaries: Results | None = None
        self._notes: dict[str, str] = {}

    def forget(self, predictor: str) -> None:
        """Let go of what was measured of a predictor."""
        self.counts.pop(predictor, None)
        self._summaries = None

    def measure(
        self,
        stage: int,
        recorded: Recorded,
        *,
        cut: bool = False,
        experiences: Sequence[Experience] = (),
        said: Mapping[str, str] | None = None,
    ) -> None:
        """Take one evaluation up; it takes the place of an earlier one of the same stage and experiences.

        ``cut`` says that the fit had ended before the stage's experience was over, ``experiences`` are those of the
        stream where they are known, and ``said`` are notes on this evaluation by kind.
        """
        self._summaries, self._said = None, dict(said or {})
        self.cut = self.cut | {stage} if cut else self.cut - {stage}
        some = recorded.experiences >= 0
        of = recorded.experiences[some]
        labelled = set(torch.unique(recorded.experiences[some & (recorded.targets >= 0)]).tolist())
        self.one_test_set = len(experiences) > 1 and all(
            each.eval_samples == 0 and set(each.classes) <= set(experiences[0].classes) for each in experiences[1:]
        )
        self.without |= {each.index for each in experiences if each.eval_samples == 0} | set(torch.unique(of).tolist())
        self.without -= labelled
        for name, predicted in recorded.predicted.items():
            counts = self.counts.setdefault(name, StreamCounts())
            targets = recorded.own_targets.get(name, recorded.targets)
            counts.measure(stage, of, targets[some], predicted[some])
        for name, values in recorded.columns.items():
            means = _means(stage, of, values[some])
            table = self.columns.get(name, means[:0])
            again = (table[:, 0] == stage) & torch.isin(table[:, 1], means[:, 1])
            self.columns[name] = torch.cat([table[~again], means])

    def summaries(self) -> Results:
        """Return the metrics of every predictor as they stand in ``results.json``."""
        if self._summaries is None:
            # each stage is of one experience, also where only the first one was evaluated
            tables = {name: counts.tables(by_experience=not self.one_test_set) for name, counts in self.counts.items()}
            without = () if self.one_test_set else self.without
            self._summaries = {name: summarize(*each[:5], without=without) for name, each in tables.items()}
            totals = {name: each.total for name, each in tables.items()}
            self._notes = {**self._said, **notes_on(self._summaries, totals, without)}
        return self._summaries

    def notes(self) -> list[str]:
        """Return in sentences why a metric is null, and of what samples others are."""
        if self._summaries is None:
            self.summaries()
        return list(self._notes.values())

    def new_notes(self) -> list[str]:
        """Return the notes of kinds that this method has not returned before, once there is a stage with metrics."""
        if not any(summary["accuracy_seen"] for summary in self.summaries().values()):
            return []
        new = {kind: note for kind, note in self._notes.items() if kind not in self._noted}
        self._noted |= new.keys()
        return list(new.values())

    def unmeasured(self, stage: int, recorded: Recorded) -> Recorded:
        """Return an evaluation whose rows belong to no experience where the stage has been measured on it before."""
        tables = [counts.rows[counts.rows[:, 0] == stage, 1] for counts in self.counts.values()]
        known = torch.cat([recorded.experiences[:0], *tables])
        experiences = recorded.experiences
        return replace(recorded, experiences=torch.where(torch.isin(experiences, known), -1, experiences))

    def class_counts(self, predictor: str) -> dict[int, tuple[int, int]]:
        """Return correct and evaluated samples of each class after the last stage.

        Raises:
            ArgumentError: If the predictor was not evaluated; the message lists those that were.
        """
        if predictor not in self.counts:
            raise ArgumentError(f"predictor={predictor!r} was not evaluated; there are {sorted(self.counts)}")
        classes, _ = self.counts[predictor].class_tables()
        return {label: (correct, total) for label, correct, total in classes.tolist()}

    def class_tables(self) -> dict[str, ClassTable]:
        """Return counts by class and confusions after the last stage of each predictor."""
        tables = {name: counts.class_tables() for name, counts in self.counts.items()}
        return {name: (classes.tolist(), confusions.tolist()) for name, (classes, confusions) in tables.items()}

    def column_means(self) -> dict[str, dict[str, list[list[Any]]]]:
        """Return for each column ``mean`` and ``count``, stage by experience; ``None`` and 0 where not evaluated."""
        return {name: _stage_tables(table) for name, table in self.columns.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was measured: tensors and plain types."""
        return {
            "rows": {name: counts.state_dict() for name, counts in self.counts.items()},
            "columns": dict(self.columns),
            "cut": sorted(self.cut),
            "without": sorted(self.without),
            "one_test_set": self.one_test_set,
        }

    def load_state_dict(self, state: Any, owner: str) -> None:
        """Take up what :meth:`state_dict` returned; it may have further entries, and ``owner`` is for the message.

        Raises:
            StateError: If it is damaged; nothing is changed then.
        """
        counts = {name: StreamCounts() for name in saved_entry(state, "rows", dict, owner)}
        for name, each in counts.items():
            each.load_state_dict(state["rows"][name], f"{owner}, rows of {name!r}")
        saved = saved_entry(state, "columns", dict, owner)
        table = {name: Numbers((f"rows of {name}", 4), torch.float64) for name in read_entries(saved, owner)}
        columns: dict[str, Tensor] = {}
        for name, values in read_state(saved, table, f"{owner}, columns").items():
            columns[name] = values.cpu()
            places = columns[name][:, [0, 1, 3]]
            cells = (places[:, :2].amax(dim=0) + 1).prod() if len(places) else 0  # of its table by stage and experience
            whole = bool((places == places.round()).all() & (places >= 0).all() & (places <= MOST_SAMPLES).all())
            if not whole or cells > MOST_CELLS:
                raise StateError(f"{owner}: the means of column {name!r} cannot be right; the file is damaged")
        one_test_set = saved_entry(state, "one_test_set", bool, owner)
        lists = {name: saved_entry(state, name, list, owner) for name in ("cut", "without")}
        lists = read_state(lists, dict.fromkeys(lists, Many(Whole())), owner)
        self.counts, self.columns, self._summaries = counts, columns, None
        self.cut, self.without, self.one_test_set = set(lists["cut"]), set(lists["without"]), one_test_set


def results_document(
    results: RunResults, datamodule: Any, config: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Return what ``results.json`` holds; of a data module that is no stream less is known."""
    document: dict[str, Any] = {
        "format": 1,
        "clkit": __version__,
        "seed": getattr(datamodule, "seed", None),
        "config": config,
        "evaluated_on": getattr(datamodule, "evaluated_on", None),
        "stream": {
            "scenario": getattr(getattr(datamodule, "scenario", None), "name", None),
            "experiences": [
                {name: getattr(each, name) for name in ("name", "classes", "train_samples", "eval_samples")}
                for each in getattr(datamodule, "experiences", None) or []
            ]
            or [{"name": f"experience {index}", "classes": ids} for index, ids in enumerate(results.brought, start=1)],
        },
        "layers": {name: layer for name, layer in results.layers.items() if name in results.counts},
        "predictors": results.summaries(),
        "notes": results.notes(),
        "cut_short": sorted(results.cut),
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": _peak_memory(),
    }
    if results.columns:
        document["columns"] = results.column_means()
    return document


def write_results(
    folder: Path, document: Mapping[str, Any], classes: Mapping[str, ClassTable], names: Mapping[int, str]
) -> None:
    """Write ``results.json``, ``accuracy.csv``, ``per_class.csv`` and ``confusion_<predictor>.csv``.

    ``classes`` are counts by class and confusions of each predictor after its last stage, ``names`` class names by id.
    """
    write_json(folder / "results.json", document)
    predictors: Mapping[str, Mapping[str, Any]] = document["predictors"]
    width = max((len(row) for summary in predictors.values() for row in summary["accuracy_matrix"][:1]), default=0)
    stages = [
        [predictor, stage, *("" if value is None else f"{value:.6f}" for value in (seen, *row))]
        for predictor, summary in predictors.items()
        for stage, (seen, row) in enumerate(
            zip(summary["accuracy_seen"], summary["accuracy_matrix"], strict=True), start=1
        )
    ]
    experiences = [f"experience_{j + 1}" for j in range(width)]
    counted = [
        [predictor, label, names.get(label, ""), n, hits, f"{hits / n:.6f}"]
        for predictor, (counts, _) in classes.items()
        for label, hits, n in counts
    ]
    tables: dict[str, list[Sequence[Any]]] = {
        "accuracy.csv": [["predictor", "stage", "accuracy_seen", *experiences], *stages],
        "per_class.csv": [["predictor", "class", "name", "samples", "correct", "accuracy"], *counted],
    }
    for predictor, (_, pairs) in classes.items():
        tables[f"confusion_{predictor}.csv"] = [["true", "predicted", "count"], *pairs]
    write_tables(folder, tables)


def write_predictions(path: Path, recorded: Recorded, names: Mapping[int, str]) -> None:
    """Write a line for each sample, in the data set's order: target, predictions with their scores, further columns."""
    order = torch.argsort(recorded.rows, stable=True)

    def ids(header: str, labels: Tensor) -> list[tuple[str, list[Any]]]:
        listed = labels[order].tolist()
        shown = [label if label >= 0 else "" for label in listed]
        return [(header, shown), (f"{header}_name", [names.get(label, "") for label in listed])]

    columns: list[tuple[str, list[Any]]] = [("row", recorded.rows[order].tolist()), *ids("target", recorded.targets)]
    for name, predicted in recorded.predicted.items():
        if not torch.equal(recorded.own_targets.get(name, recorded.targets), recorded.targets):
            columns += ids(f"{name}_target", recorded.own_targets[name])
        columns += [*ids(name, predicted), (f"{name}_score", _cells(recorded.scores[name][order]))]
    columns += [(name, _cells(values[order])) for name, values in recorded.columns.items()]
    rows = [[header for header, _ in columns], *zip(*(cells for _, cells in columns), strict=True)]
    write_tables(path.parent, {path.name: rows})


def _means(stage: int, experiences: Tensor, values: Tensor) -> Tensor:
    """Return (m, 4): stage, experience, mean and number of the finite values of each experience that has some."""
    values = values.double()
    known = values.isfinite()
    number = torch.bincount(experiences[known])
    sums = torch.bincount(experiences[known], weights=values[known])
    measured = number.nonzero().squeeze(1)
    sums, number = sums[measured], number[measured]
    return torch.stack([torch.full_like(sums, stage), measured.double(), sums / number, number.double()], dim=1)


def _stage_tables(table: Tensor) -> dict[str, list[list[Any]]]:
    table = table[table[:, 0] > 0]
    stage, experience = table[:, :2].long().unbind(1)
    size = (int(stage.max()), int(experience.max()) + 1) if len(table) else (0, 0)
    mean, count = torch.full(size, torch.nan, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
    mean[stage - 1, experience], count[stage - 1, experience] = table[:, 2], table[:, 3].long()
    return {"mean": plain(mean), "count": count.tolist()}


def _cells(values: Tensor) -> list[Any]:
    """Return values as they stand in a table: six digits, nothing for ``NaN``."""
    listed: list[Any] = values.tolist()
    return ["" if value != value else f"{value:.6g}" for value in listed] if values.is_floating_point() else listed


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_tables(folder: Path, tables: Mapping[str, Sequence[Sequence[Any]]]) -> None:
    """Write tables as CSV by the names of their files, the header first; each whole or not at all."""
    for name, rows in tables.items():
        with atomic_write(folder / name) as draft, draft.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)


def _peak_memory() -> int | None:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if os.name != "posix":
        return None  # the standard library tells it on POSIX systems only
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
