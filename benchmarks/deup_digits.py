"""What DEUP's numbers are worth on handwritten digits, beside the signals that they are made of.

    python benchmarks/deup_digits.py [--seeds 5] [--only stream abstention fixed] [--threads 1]

* stream: five stages of two digits in random order, batches of ten, one pass through a real ``Trainer``; a ridge head
  on a lift of 512 and cosine means, with memories of 900 and 100 rows. By stage: the area under the ROC curve for
  samples of classes that are still to come, and for mistakes on classes that were learned; Spearman's rank correlation
  of the total and the error over all test samples, and the mean total beside the error after the last stage. Beside
  them margin, Mahalanobis distance, leverage and the fifth neighbour among all rows, from a bare loop over the rows.
* before / after: mean total on the classes of a stage before and after it. Goal: at least 2 times in every order and
  at every stage, with a memory of 900.
* abstention, of the same runs: share of samples refused, of classes learned and of classes to come, and the error of
  all and of what is accepted, for nominal rates of 5, 10 and 20 %. Then how often the error of what is accepted is
  above the risk that was asked for, in 200 draws that are exchangeable. Goal: at most a share δ.
* fixed: half of the training rows of six digits with noise, a small network, five folds, without a trainer; beside
  softmax, dropout, an ensemble of five, distances. The other four digits, turned digits and noise are to be found.

Some minutes on one core, no data needed. Exit status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from bare_trainer import quiet_trainer
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

from clkit.callbacks import AEFOCL, DEUP, NMC, Lift, Records
from clkit.data import ClassIncremental, StreamDataModule
from clkit.methods import (
    FEATURE_SIGNS,
    ErrorPredictor,
    ErrorRecords,
    FeatureStatistics,
    Snapshot,
    cross_fit,
    risk_threshold,
    sample_loss,
    stationarising_features,
)
from clkit.metrics.ranking import aurc, auroc, spearman

STAGES, HEADS, MEMORIES = 5, {"aef_ocl": "ridge", "nmc": "means"}, (900, 100)
RATES = (0.05, 0.1, 0.2)
DISTANCES = {"log_maha": "Mahalanobis", "log_leverage": "leverage", "log_knn": "5th neighbour, all rows"}
RISK, DELTA, DRAWS = 0.05, 0.1, 200
OLD, NOISE, FOLDS, MEMBERS, PASSES = 6, 0.3, 5, 5, 20


class Digits(pl.LightningModule):
    """A network without weights of its own before the classifier: features are the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Identity(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return a loss, which this strategy does not ask for."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Run the network."""
        self(batch[0])

    def configure_optimizers(self) -> None:
        """Nothing is trained."""
        return


class Scores(pl.Callback):
    """Notes what is said of each test sample after each stage, and what plain signals of all rows learned would say."""

    def __init__(self, heads: dict[str, Any], watching: list[DEUP]) -> None:
        self.heads, self.watching = heads, watching
        self.statistics = FeatureStatistics(64, gram=True, scatter=True)
        self.learned: list[tuple[Tensor, Tensor]] = []
        self.batches: list[dict[str, Tensor]] = []
        self.stages: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep all rows, for the plain signals."""
        x, y = (each.clone() for each in batch[:2])
        self.statistics.update(x.double(), y)
        self.learned.append((x, y))

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Begin a stage."""
        self.batches = []

    def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, *place: Any) -> None:
        """Note what is said of a batch."""
        if trainer.sanity_checking:
            return
        x, y = batch[0].double(), batch[1]
        said = {name: each for deup in self.watching for name, each in deup.sample_columns(batch).items()}
        for name, head in self.heads.items():
            scores = head.head(x)
            best = scores.topk(2).values
            said |= {f"{name}/error": sample_loss("error", scores, y), f"{name}/margin": best[:, 1] - best[:, 0]}
        self.batches.append({"x": x, "y": y, **said})

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        """Put the stage together."""
        if trainer.sanity_checking:
            return
        stage = {name: torch.cat([batch[name] for batch in self.batches]) for name in self.batches[0]}
        rows, labels = (torch.cat(column) for column in zip(*self.learned, strict=True))
        view = Snapshot.of(self.statistics, memory=(rows, labels))
        x = stage.pop("x")
        phi = stationarising_features(list(DISTANCES), view, x, x, probabilities=False)
        self.stages.append(stage | dict(zip(DISTANCES, phi.T, strict=True)))


def run(seed: int) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Return what is said of each test sample after each stage, and the stage at which each digit comes."""
    order = np.random.default_rng(seed).permutation(10)
    heads = {
        "aef_ocl": AEFOCL(0.1, Lift(512, projection_seed=seed), balance="none"),
        "nmc": NMC("cosine"),
    }
    watching = [DEUP(records=Records(memory_size=size, seed=seed), name=f"m{size}") for size in MEMORIES]
    for rate in RATES:
        records = Records(memory_size=MEMORIES[0], seed=seed)
        watching.append(DEUP(records=records, abstain_rate=rate, name=f"r{rate}"))
    scores = Scores(heads, watching)
    data = StreamDataModule(
        "digits:flat",
        ClassIncremental(experiences=STAGES, class_order=order.tolist()),
        batch_size=10,
        eval_batch_size=500,
        evaluate="all",
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = quiet_trainer(
            strategy="gradient_free",
            callbacks=[*heads.values(), *watching, scores],
            default_root_dir=folder,
        )
        trainer.fit(Digits(), datamodule=data)
    came = torch.empty(10, dtype=torch.int64)
    came[torch.from_numpy(order)] = torch.arange(10) // (10 // STAGES)
    return scores.stages, came


def figures(stages: list[dict[str, Tensor]], came: Tensor, head: str, score: str) -> dict[str, list[float]]:
    """Return the figures of a score by stage."""
    found: dict[str, list[float]] = {"future": [], "spearman": [], "mistakes": [], "total": [], "error": []}
    for number, stage in enumerate(stages):
        u, error = stage[score].double(), stage[f"{head}/error"]
        known = came[stage["y"]] <= number
        if number < STAGES - 1:
            found["future"].append(auroc(u, ~known))
            found["spearman"].append(spearman(u, error))
        if number:
            found["mistakes"].append(auroc(u[known], error[known]))
        found["total"].append(float(u[known].mean()))
        found["error"].append(float(error[known].mean()))
    mean = [[float(each[score][came[each["y"]] == at].mean()) for at in range(STAGES)] for each in stages]
    found["before"] = [mean[at - 1][at] for at in range(1, STAGES)]
    found["after"] = [mean[at][at] for at in range(1, STAGES)]
    return found


def measure_stream(runs: list[tuple[list[dict[str, Tensor]], Tensor]], console: Console) -> list[str]:
    """Print the table of the stream and what falls when a class is learned; return the goals missed."""
    table = Table("head", "score", "classes to come, stages 1-4", "Spearman", "mistakes, stages 2-5", "total / error")
    falls = Table("head", "memory", "before", "after", "least ratio of the means", "of one order and stage")
    missed = []
    for head, shown in HEADS.items():
        scores = {f"m{size}_{head}_total": f"DEUP, memory {size}" for size in MEMORIES}
        for score, name in {**scores, **DISTANCES, f"{head}/margin": "margin"}.items():
            each = [figures(*one, head, score) for one in runs]
            mean = {key: np.mean([one[key] for one in each], axis=0) for key in each[0]}
            columns = [" ".join(map(_shown, mean[key])) for key in ("future", "spearman", "mistakes")]
            scale = f"{mean['total'][-1]:.3f} / {mean['error'][-1]:.3f}" if score in scores else ""
            table.add_row(shown, name, *columns, scale)
            if score in scores:
                ratios = mean["before"] / mean["after"]
                one = min(np.min(np.array(each_one["before"]) / np.array(each_one["after"])) for each_one in each)
                cells = [" ".join(f"{value:.3f}" for value in mean[key]) for key in ("before", "after")]
                falls.add_row(shown, name.split()[-1], *cells, f"{ratios.min():.1f}", f"{one:.1f}")
                if name.endswith(str(MEMORIES[0])) and one < 2:
                    missed.append(f"{shown}: before / after {one:.2f}, goal 2")
    console.print(table)
    console.print(falls)
    return missed


def _shown(value: float) -> str:
    """Write a number; a dash where it is not defined in some order, which has no mistake."""
    return "-" if np.isnan(value) else f"{value:.3f}"


def measure_abstention(runs: list[tuple[list[dict[str, Tensor]], Tensor]], console: Console) -> list[str]:
    """Print what was refused and what that leaves, and how often a risk was kept; return the goals missed."""
    table = Table(
        "head",
        "nominal, %",
        "refused of classes learned, stages 1-5, %",
        "of classes to come, 1-4, %",
        "error after stage 5, %",
        "of what is accepted, %",
    )
    for head, shown in HEADS.items():
        for rate in RATES:
            refused, future, before, after = [], [], [], []
            for stages, came in runs:
                masks = [stage[f"r{rate}_{head}_abstain"].bool() for stage in stages]
                known = [came[stage["y"]] <= number for number, stage in enumerate(stages)]
                refused.append([float(m[k].double().mean()) for m, k in zip(masks, known, strict=True)])
                future.append([float(m[~k].double().mean()) for m, k in zip(masks[:-1], known[:-1], strict=True)])
                error = stages[-1][f"{head}/error"]
                before.append(float(error.mean()))
                after.append(float(error[~masks[-1]].mean()))
            cells = [" ".join(f"{100 * each:.0f}" for each in np.mean(part, axis=0)) for part in (refused, future)]
            errors = (f"{100 * np.mean(before):.1f}", f"{100 * np.mean(after):.1f}")
            table.add_row(shown, f"{100 * rate:g}", *cells, *errors)
    console.print(table)
    above = {head: _above(runs, head) for head in HEADS}
    for head, (share, used) in above.items():
        print(
            f"risk {RISK}, delta {DELTA}, {HEADS[head]}: above it in {100 * share:.1f} % of {DRAWS} exchangeable "
            f"draws; {100 * used:.0f} % of inputs accepted"
        )
    return [f"{HEADS[head]}: a risk was exceeded in {share:.3f}" for head, (share, _) in above.items() if share > DELTA]


def _above(runs: list[tuple[list[dict[str, Tensor]], Tensor]], head: str) -> tuple[float, float]:
    """Draw a threshold from a random half of the test samples and measure it on the other, again and again."""
    draws = torch.Generator().manual_seed(0)
    above, used = [], []
    for number in range(DRAWS):
        stage = runs[number % len(runs)][0][-1]
        u, wrong = stage[f"m{MEMORIES[0]}_{head}_total"], stage[f"{head}/error"]
        half, other = torch.randperm(len(u), generator=draws).tensor_split(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where no threshold holds, nothing is accepted
            threshold = risk_threshold(u[half], wrong[half], RISK, DELTA)
        accepted = u[other] <= threshold
        used.append(float(accepted.double().mean()))
        above.append(bool(accepted.any()) and float(wrong[other][accepted].mean()) > RISK)
    return float(np.mean(above)), float(np.mean(used))


# ---- fixed data


def network(x: Tensor, y: Tensor, seed: int) -> nn.Sequential:
    """Return a small network trained on rows."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, OLD)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(40):
        for batch in torch.randperm(len(x)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


NAMES = ["log_maha", "gap", "log_leverage", "log_knn", "confidence", "margin"]


def signals(net: nn.Sequential, x: Tensor, y: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Return what gives the features of DEUP and the logits of new rows, from a network and the rows it learned."""
    with torch.no_grad():
        known = net[:-1](x).double()
    statistics = FeatureStatistics(known.shape[1], gram=True, scatter=True)
    statistics.update(known, y)
    view = Snapshot.of(statistics, memory=(known, y))

    def of(rows: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            hidden = net[:-1](rows).double()
            logits = net[-1](hidden.float()).double()
        return stationarising_features(NAMES, view, hidden, logits, probabilities=True), logits

    return of


def entropy(p: Tensor) -> Tensor:
    """Entropy of each row."""
    return -(p * p.clamp(min=1e-12).log()).sum(dim=-1)


def fixed(seed: int) -> dict[str, tuple[float, ...]]:
    """Return by score the AUROC of mistakes, the AURC, and the AUROC of each kind of what is new."""
    rows, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(rows / 16, dtype=torch.float32), torch.tensor(labels)
    rng = np.random.default_rng(seed)
    old = torch.from_numpy(np.argsort(rng.permutation(10)))[y]  # ids below OLD are learned
    noisy = x + NOISE * torch.from_numpy(rng.normal(size=x.shape)).float()
    train = torch.arange(0, len(x), 2)
    train = train[old[train] < OLD]
    train = train[torch.from_numpy(rng.permutation(len(train)))[: len(train) // 2]]
    test = torch.arange(1, len(x), 2)
    new = test[old[test] >= OLD]
    test = test[old[test] < OLD]
    turned = torch.rot90(x[test].view(-1, 8, 8), 1, (1, 2)).reshape(-1, 64)
    noise = torch.from_numpy(rng.random((len(test), 64))).float()
    kinds = [noisy[test], noisy[new], turned + NOISE * torch.randn(turned.shape), noise]

    def make(of: Tensor, targets: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        given = signals(network(of, targets, seed), of, targets)

        def record(some: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
            phi, logits = given(some)
            return phi, sample_loss("error", logits, truth)

        return record

    records = cross_fit(make, noisy[train], old[train], folds=FOLDS, seed=seed)
    by_class = cross_fit(make, noisy[train], old[train], folds=OLD // 2, by="class", seed=seed)
    signs = [FEATURE_SIGNS[name] for name in NAMES]
    alone, both = ErrorPredictor(signs=signs, seed=seed), ErrorPredictor(signs=signs, seed=seed)
    alone.fit(records.phi, records.error)
    table = ErrorRecords(4096, seed)
    ids = torch.arange(len(train))
    table.add("calibration", records.phi, records.error, ids, old[train])
    table.add("novel", by_class.phi, by_class.error, ids, old[train])
    both.fit(*table.training_set(novelty=0.05))
    nets = [network(noisy[train], old[train], seed + 100 * number) for number in range(MEMBERS)]
    given = signals(nets[0], noisy[train], old[train])

    def scores(of: Tensor) -> dict[str, Tensor]:
        phi, logits = given(of)
        p = logits.softmax(dim=1)
        with torch.no_grad():
            torch.manual_seed(seed)
            dropped = nets[0].train()
            passes = torch.stack([dropped(of).double().softmax(dim=1) for _ in range(PASSES)])
            nets[0].eval()
            members = torch.stack([net(of).double().softmax(dim=1) for net in nets])
        return {
            "largest softmax": 1 - p.amax(dim=1),
            "entropy": entropy(p),
            "energy": -logits.logsumexp(dim=1),
            f"dropout ({PASSES}), entropy": entropy(passes.mean(dim=0)),
            f"dropout ({PASSES}), mutual information": entropy(passes.mean(dim=0)) - entropy(passes).mean(dim=0),
            f"ensemble ({MEMBERS}), entropy": entropy(members.mean(dim=0)),
            f"ensemble ({MEMBERS}), mutual information": entropy(members.mean(dim=0)) - entropy(members).mean(dim=0),
            "Mahalanobis": phi[:, 0],
            "5th neighbour": phi[:, 3],
            f"DEUP, {FOLDS} folds": alone.predict(phi),
            f"DEUP, {FOLDS} folds and folds of classes": both.predict(phi),
        }

    said = [scores(of) for of in kinds]
    error = sample_loss("error", given(kinds[0])[1], old[test])
    found: dict[str, tuple[float, ...]] = {}
    for name, u in said[0].items():
        flags = [torch.cat([torch.zeros(len(u)), torch.ones(len(other[name]))]) for other in said[1:]]
        new_ones = [auroc(torch.cat([u, other[name]]), flag) for other, flag in zip(said[1:], flags, strict=True)]
        scale = float(u.mean()) if name.startswith("DEUP") else float("nan")
        found[name] = (auroc(u, error), aurc(u, error), *new_ones, scale, float(error.mean()))
    return found


def measure_fixed(seeds: int, console: Console) -> None:
    """Print the table of fixed data."""
    every = [fixed(seed) for seed in range(seeds)]
    table = Table("score", "mistakes", "AURC", "other digits", "turned", "noise", "mean total / error")
    for name in every[0]:
        mean = np.mean([one[name] for one in every], axis=0)
        scale = "" if np.isnan(mean[5]) else f"{mean[5]:.3f} / {mean[6]:.3f}"
        table.add_row(name, *(f"{value:.3f}" for value in mean[:5]), scale)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure what was asked for, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=["stream", "abstention", "fixed"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, missed = Console(width=160), []
    if {"stream", "abstention"} & set(options.only):
        runs = [run(seed) for seed in range(options.seeds)]
        if "stream" in options.only:
            missed += measure_stream(runs, console)
        if "abstention" in options.only:
            missed += measure_abstention(runs, console)
    if "fixed" in options.only:
        measure_fixed(options.seeds, console)
    for what in missed:
        print(f"MISSED: {what}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
