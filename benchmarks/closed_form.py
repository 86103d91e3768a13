"""Closed-form heads against each other, stage by stage, on real features; and against their formulas on all rows.

    CLKIT_DATA=FOLDER python benchmarks/closed_form.py --json closed_form.json

For each set, ten stages of classes: accuracy on all classes seen so far (its average and at the end), CPU seconds of
learning and of ten solves with their predictions, and bytes of the state. ``LDAHead(unit=True)``, ``KLDA`` and
``AnaCP`` must end where the same formula ends that NumPy computes in float64 from all rows at once. Logistic regression
of all rows stands beside. ``--scan`` goes through their settings, and shows the error that the sums foresee for each:
bandwidths and widths, both kinds of targets, fixed and chosen strengths, numbers of draws, and a lift against none.
``--ranpac`` sets the ridge strength that RanPAC's code chooses, on a fifth of the last task by what the rest of that
task teaches, against generalised cross-validation of everything learned.

Exit status 0 if each of the three is within 0.1 points of its formula, 1 if one is not, 2 if the data is not there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from circumstances import data_folder
from scipy.special import ndtr
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize
from threadpoolctl import threadpool_limits
from torch import Tensor

from clkit.data import published_order
from clkit.methods import KLDA, AnaCP, AnalyticHead, LDAHead, NearestMeanHead
from clkit.methods.heads.pseudo_features import correlated_rows

SETS = {
    "CIFAR-100": "features_cifar100_tf_efficientnet_lite0.npz",
    "Caltech-101": "features_caltech101_tf_efficientnet_lite0.npz",
    "traffic signs": "features_gtsrb_tf_efficientnet_lite0.npz",
}
STAGES = 10
BATCH = 256
TOLERANCE = 0.1  # points

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


class Samples(NamedTuple):
    """Features and class ids of both parts, and the classes of each stage."""

    train: Tensor
    train_ids: Tensor
    test: Tensor
    test_ids: Tensor
    stages: list[Ids]


class Course(NamedTuple):
    """What a head reached: per cent after each stage, seconds, bytes, and what its sums chose and foresee."""

    accuracies: list[float]
    learning: float
    solving: float
    state: int
    chosen: dict[str, float]
    head: Any

    @property
    def average(self) -> float:
        """Average incremental accuracy in per cent."""
        return float(np.mean(self.accuracies))


def samples(name: str, folder: Path) -> Samples:
    """One set in float64, its classes in ten stages: CIFAR-100 in iCaRL's order, the others by their ids."""
    with np.load(folder / SETS[name], allow_pickle=False) as data:
        arrays = [data["f_train"].astype(float), data["y_train"].astype(np.int64)]
        arrays += [data["f_test"].astype(float), data["y_test"].astype(np.int64)]
    order = published_order("cifar100_icarl") if name == "CIFAR-100" else np.unique(arrays[1])
    stages = [np.asarray(part) for part in np.array_split(np.asarray(order), STAGES)]
    return Samples(*map(torch.from_numpy, arrays), stages)


def learners(lift: int, width: int | None) -> dict[str, Callable[[int], Any]]:
    """The heads by what the table calls them, each made for a width of features."""
    return {
        "nearest mean": NearestMeanHead,
        "ridge": partial(AnalyticHead, gamma="auto"),
        f"ridge, ReLU lift {lift}": partial(
            AnalyticHead, gamma="auto", expansion_dim=lift, projection_init="normal", activation="relu"
        ),
        "LDA": LDAHead,
        "LDA, unit": partial(LDAHead, unit=True),
        "KLDA": partial(KLDA, expansion_dim=width),
        "AnaCP": partial(AnaCP, expansion_dim=width),
        "AnaCP, nearest": partial(AnaCP, expansion_dim=width, readout="nearest"),
    }


def course(make: Callable[[int], Any], data: Samples, stages: Sequence[Ids] | None = None) -> Course:
    """Stream a set through a head."""
    head, accuracies, learning, solving = make(data.train.shape[1]), [], 0.0, 0.0
    seen: list[int] = []
    for classes in data.stages if stages is None else stages:
        rows = torch.from_numpy(np.flatnonzero(np.isin(data.train_ids.numpy(), classes)))
        start = time.process_time()
        for chunk in rows.split(BATCH):
            head.update(data.train[chunk], data.train_ids[chunk])
        learned = time.process_time()
        seen += classes.tolist()
        tested = torch.from_numpy(np.isin(data.test_ids.numpy(), seen))
        hits = head.predict(data.test[tested]) == data.test_ids[tested]
        solving += time.process_time() - learned
        learning += learned - start
        accuracies.append(100 * float(hits.double().mean()))
    tensors = [value for value in head.state_dict().values() if isinstance(value, Tensor)]
    names = ("chosen_gamma", "chosen_bandwidth", "gcv_error")
    chosen = {name: float(getattr(head, name)) for name in names if hasattr(head, name)}
    return Course(
        accuracies, learning, solving, sum(each.numel() * each.element_size() for each in tensors), chosen, head
    )


# ---- the formulas on all rows: NumPy and what the maps draw


def lifted(rows: Floats, directions: Floats) -> Floats:
    """Rows along directions, through a GELU."""
    along = rows @ directions.T
    result: Floats = along * ndtr(along)
    return result


def strength(values: Floats, moments: Floats, rows: int, square: float, spent: float) -> float:
    """The strength of least generalised cross-validation on the grid that the methods' pages state."""
    gammas = values.mean() * 10.0 ** np.arange(-8, 2.01, 0.05)
    shrunk = 1 / (values[:, None] + gammas)
    energy = np.square(moments).sum(axis=1)
    residual = square - 2 * energy @ shrunk + (values * energy) @ np.square(shrunk)
    return float(gammas[int(np.argmin(residual / np.square(rows - spent - values @ shrunk)))])


def ridge(design: Floats, y: Floats) -> Floats:
    """Ridge weights with the strength of generalised cross-validation."""
    values, vectors = np.linalg.eigh(design.T @ design)
    values = np.maximum(values, 0)
    moments = vectors.T @ (design.T @ y)
    gamma = strength(values, moments, len(design), float(np.square(y).sum()), 0.0)
    weights: Floats = vectors @ (moments / (values + gamma)[:, None])
    return weights


def joint_lda(train: Floats, ids: Ids, test: Floats) -> Ids:
    """Nearest mean in the metric of the scatter of all rows."""
    classes, at = np.unique(ids, return_inverse=True)
    one_hot = np.eye(len(classes))[at]
    means = (one_hot / one_hot.sum(axis=0)).T @ train
    around, targets = train - train.mean(axis=0), one_hot - one_hot.mean(axis=0)
    values, vectors = np.linalg.eigh(around.T @ around)
    moments = vectors.T @ (around.T @ targets)
    gamma = strength(np.maximum(values, 0), moments, len(train), float(np.square(targets).sum()), 1.0)
    centred = train - means[at]
    scatter = centred.T @ centred + gamma * np.eye(train.shape[1])
    weight = np.linalg.solve(scatter, means.T)
    predicted: Ids = classes[(test @ weight - (means.T * weight).sum(axis=0) / 2).argmax(axis=1)]
    return predicted


def joint_klda(head: KLDA, train: Floats, ids: Ids, test: Floats) -> Ids:
    """The same of the cosines of unit rows; directions and phases as drawn."""
    directions, phases = head.feature_map.projection.numpy(), head.feature_map.phase.numpy()
    height = np.sqrt(2 / len(phases))
    train, test = (height * np.cos(normalize(rows) @ directions.T + phases) for rows in (train, test))
    return joint_lda(train, ids, test)


def joint_anacp(head: AnaCP, train: Floats, ids: Ids, test: Floats) -> Ids:
    """Targets, projection and decision of AnaCP; maps and noise as drawn."""
    train, test = normalize(train), normalize(test)
    classes, at = np.unique(ids, return_inverse=True)
    means = np.stack([train[ids == each].mean(axis=0) for each in classes])
    centred = train - means[at]
    covariance = centred.T @ centred / len(train) + 1e-4 * np.eye(train.shape[1])
    values, vectors = np.linalg.eigh(covariance)
    whitening = (vectors / np.sqrt(values + 1e-8)) @ vectors.T
    u, s, vt = np.linalg.svd((means - means.mean(axis=0)) @ whitening, full_matrices=False)
    back = whitening if head.targets == "published" else (vectors * np.sqrt(values + 1e-8)) @ vectors.T
    targets = normalize((u * np.where(s > 1e-10 * s[0], s + 1, 0)) @ vt @ back + means.mean(axis=0))
    maps = [getattr(head, f"map_{number}").projection.numpy() for number in range(1, head.maps + 1)]
    thetas = [ridge(lifted(train, each), targets[at]) for each in maps]

    def projected(rows: Floats) -> Floats:
        parts = [normalize(lifted(rows, each) @ theta) for each, theta in zip(maps, thetas, strict=True)]
        mean: Floats = np.mean(parts, axis=0)
        return mean

    if head.readout == "nearest":
        nearest: Ids = classes[(projected(test) @ targets.T).argmax(axis=1)]
        return nearest
    factor, drawn = torch.from_numpy(np.linalg.cholesky(covariance)), []
    for each, mean in zip(classes, torch.from_numpy(means), strict=True):
        drawn.append(correlated_rows(mean, factor, head.draws, class_id=int(each), seed=head.seed).numpy())
    last = head.feature_map.projection.numpy()
    labels = np.repeat(np.eye(len(classes)), head.draws, axis=0)
    weight = ridge(lifted(projected(np.concatenate(drawn)), last), labels)
    predicted: Ids = classes[(lifted(projected(test), last) @ weight).argmax(axis=1)]
    return predicted


def joint_of(name: str, head: Any, data: Samples) -> float | None:
    """Accuracy in per cent of the formula of a new read-out on all rows; ``None`` of one that has no formula here."""
    train, ids, test = data.train.numpy(), data.train_ids.numpy(), data.test.numpy()
    if isinstance(head, KLDA):
        predicted = joint_klda(head, train, ids, test)
    elif isinstance(head, AnaCP):
        predicted = joint_anacp(head, train, ids, test)
    elif name == "LDA, unit":
        predicted = joint_lda(normalize(train), ids, normalize(test))
    else:
        return None
    return 100 * float((predicted == data.test_ids.numpy()).mean())


def logistic(data: Samples) -> float:
    """Accuracy in per cent of logistic regression on all rows, standardised, C = 0.01."""
    scaler = StandardScaler().fit(data.train.numpy())
    model = LogisticRegression(C=0.01, max_iter=1000)
    model.fit(scaler.transform(data.train.numpy()), data.train_ids.numpy())
    return 100 * float(model.score(scaler.transform(data.test.numpy()), data.test_ids.numpy()))


# ---- settings


def scanned(lift: int, width: int) -> dict[str, Callable[[int], Any]]:
    """Settings of the new read-outs by what the table calls them."""
    found: dict[str, Callable[[int], Any]] = {
        "ridge": partial(AnalyticHead, gamma="auto"),
        f"ridge, ReLU lift {lift}": partial(AnalyticHead, gamma="auto", expansion_dim=lift, projection_init="normal"),
        f"ridge, GELU lift {lift}": partial(
            AnalyticHead, gamma="auto", expansion_dim=lift, projection_init="normal", activation="gelu"
        ),
        "LDA": LDAHead,
        "LDA, unit": partial(LDAHead, unit=True),
    }
    for bandwidth in (0.005, 0.02, 0.1, 0.5, 2.0):
        found[f"KLDA {width}, g = {bandwidth}"] = partial(KLDA, expansion_dim=width, bandwidth=bandwidth)
    for narrow in (width // 2, 2 * width):
        found[f"KLDA {narrow}, g = 0.1"] = partial(KLDA, expansion_dim=narrow)
        found[f"AnaCP {narrow}, nearest"] = partial(AnaCP, expansion_dim=narrow, readout="nearest")
    anacp = partial(AnaCP, expansion_dim=width)
    for gamma in ("auto", 100.0):
        found[f"AnaCP {width}, gamma {gamma}, nearest"] = partial(anacp, gamma=gamma, readout="nearest")
        for draws in (20, 100):
            found[f"AnaCP {width}, gamma {gamma}, {draws} draws"] = partial(anacp, gamma=gamma, draws=draws)
    for readout in ("draws", "nearest"):
        found[f"AnaCP {width}, unwhitened, {readout}"] = partial(anacp, targets="unwhitened", readout=readout)
    return found


def last_task_strength(design: Floats, one_hot: Floats) -> float:
    """The strength of least squared error on the last fifth of a task's rows, learned from the others alone."""
    cut = int(0.8 * len(design))
    values, vectors = np.linalg.eigh(design[:cut].T @ design[:cut])
    moments, held_out = vectors.T @ (design[:cut].T @ one_hot[:cut]), design[cut:] @ vectors
    strengths = 10.0 ** np.arange(-8, 10)
    losses = [
        np.square(held_out @ (moments / (np.maximum(values, 0) + each)[:, None]) - one_hot[cut:]).sum()
        for each in strengths
    ]
    return float(strengths[int(np.argmin(losses))])


def _accuracy(shown: Floats, values: Floats, moments: Floats, places: Ids, gamma: float) -> float:
    """Accuracy in per cent of a ridge strength, of rows in the basis of eigenvectors."""
    scores = shown @ (moments / (values + gamma)[:, None])
    return 100 * float((scores.argmax(axis=1) == places).mean())


def ranpac(name: str, data: Samples, options: argparse.Namespace) -> dict[str, Any]:
    """Strengths behind a ReLU lift, chosen in three ways at each stage of a set."""
    settings: Any = {"gamma": "auto", "expansion_dim": options.lift, "projection_init": "normal"}
    head = AnalyticHead(data.train.shape[1], **settings)
    draws, seen = np.random.default_rng(0), []
    reached: dict[str, list[float]] = {"all rows, by GCV": [], "last task, 80/20": [], "best on the test rows": []}
    strengths: dict[str, list[float]] = {way: [] for way in reached}
    for classes in data.stages:
        rows = draws.permutation(np.flatnonzero(np.isin(data.train_ids.numpy(), classes)))
        seen += classes.tolist()
        for chunk in torch.from_numpy(rows).split(BATCH):
            head.update(data.train[chunk], data.train_ids[chunk])
        ids, known = data.train_ids.numpy()[rows], head.classes.numpy()
        design = head.feature_map(data.train[rows]).numpy()
        tested = np.isin(data.test_ids.numpy(), seen)
        values, vectors = np.linalg.eigh(head.statistics.gram.numpy())
        moments = vectors.T @ head.statistics.sums.numpy().T
        shown, labels = head.feature_map(data.test[tested]).numpy() @ vectors, data.test_ids.numpy()[tested]
        accuracy = partial(_accuracy, shown, np.maximum(values, 0), moments, np.searchsorted(known, labels))
        grid = values.mean() * 10.0 ** (np.arange(-80, 21) / 10)
        every = [accuracy(each) for each in grid]
        chosen = [head.chosen_gamma, last_task_strength(design, (ids[:, None] == known) * 1.0)]
        for way, gamma in zip(reached, [*chosen, float(grid[int(np.argmax(every))])], strict=True):
            reached[way].append(accuracy(gamma))
            strengths[way].append(gamma)
    print(f"\n{name}, ReLU lift {options.lift}, in per cent\n")
    print("| strength | average | final | smallest and largest strength |\n|---|---|---|---|")
    for way, each in reached.items():
        spread = f"{min(strengths[way]):.2g} to {max(strengths[way]):.2g}"
        print(f"| {way} | {np.mean(each):.2f} | {each[-1]:.2f} | {spread} |", flush=True)
    return {way: {"stages": each, "final": each[-1], "strengths": strengths[way]} for way, each in reached.items()}


# ---- the report


def row_of(name: str, run: Course, joint: float | None) -> str:
    """A line of the table of a set."""
    figures = [f"{run.average:.2f}", f"{run.accuracies[-1]:.2f}", "" if joint is None else f"{joint:.2f}"]
    figures += [f"{run.learning:.1f}", f"{run.solving:.1f}", f"{run.state / 1e6:.1f}"]
    return f"| {name} | {' | '.join(figures)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--sets", default=",".join(SETS), help="which sets, with commas between (default: all)")
    parser.add_argument("--lift", type=int, default=2048, help="units of the ridge's lift (default: 2048)")
    parser.add_argument("--width", type=int, help="units of the maps of KLDA and AnaCP (default: their own)")
    parser.add_argument("--heads", help="parts of names, with commas between (default: all)")
    parser.add_argument("--scan", action="store_true", help="go through settings, at the end of the stream alone")
    parser.add_argument("--ranpac", action="store_true", help="compare ways to choose the strength behind a lift")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and BLAS (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write all figures")
    options = parser.parse_args(arguments)
    names = options.sets.split(",")
    if unknown := [name for name in names if name not in SETS]:
        parser.error(f"--sets: {', '.join(map(repr, unknown))} is not one of {', '.join(SETS)}")
    if (folder := data_folder("closed_form", [SETS[name] for name in names])) is None:
        return 2
    torch.set_num_threads(options.threads)
    report: dict[str, Any] = {}
    with threadpool_limits(options.threads):
        for name in names:
            data = samples(name, folder)
            run = ranpac if options.ranpac else scan if options.scan else compare
            report[name] = run(name, data, options)
            if options.json is not None:
                options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    apart = [row["final"] - row["joint"] for rows in report.values() for row in rows.values() if row.get("joint")]
    return int(max(map(abs, apart), default=0.0) > TOLERANCE)


def wanted(heads: dict[str, Callable[[int], Any]], options: argparse.Namespace) -> dict[str, Callable[[int], Any]]:
    """Those heads that the command names."""
    asked = [""] if options.heads is None else options.heads.split(",")
    return {name: make for name, make in heads.items() if any(part in name for part in asked)}


def compare(name: str, data: Samples, options: argparse.Namespace) -> dict[str, Any]:
    """All heads on the stream of a set, and their formulas."""
    print(f"\n{name}: {len(data.train)} rows to learn, {len(data.test)} to test, in per cent\n")
    columns = ("", "average", "final", "NumPy, all rows", "learning, CPU s", "ten solves, CPU s", "state, MB")
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    found: dict[str, Any] = {}
    for title, make in wanted(learners(options.lift, options.width), options).items():
        run = course(make, data)
        joint = joint_of(title, run.head, data)
        print(row_of(title, run, joint), flush=True)
        found[title] = {
            "average": run.average,
            "final": run.accuracies[-1],
            "joint": joint,
            "stages": run.accuracies,
            "seconds_learning": run.learning,
            "seconds_solving": run.solving,
            "state_bytes": run.state,
            **run.chosen,
        }
    if options.heads is None:
        joint = logistic(data)
        print(f"| logistic regression of all rows | | {joint:.2f} | | | | |", flush=True)
        found["logistic"] = {"final": joint}
    return found


def scan(name: str, data: Samples, options: argparse.Namespace) -> dict[str, Any]:
    """Settings of the heads, at the end of the stream of a set."""
    print(f"\n{name}, final, in per cent\n\n| | final | error that the sums foresee | strength |\n|---|---|---|---|")
    found: dict[str, Any] = {}
    for title, make in wanted(scanned(options.lift, options.width or 2048), options).items():
        run = course(make, data, [np.concatenate(data.stages)])
        error, gamma = (run.chosen.get(key, np.nan) for key in ("gcv_error", "chosen_gamma"))
        print(f"| {title} | {run.accuracies[-1]:.2f} | {error:.4f} | {gamma:.3g} |".replace("nan", ""), flush=True)
        found[title] = {"final": run.accuracies[-1], **run.chosen}
    return found


if __name__ == "__main__":
    sys.exit(main())
