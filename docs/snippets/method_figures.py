"""Draws what each head does, on points in the plane. Every curve is computed by the head itself."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from clkit.methods import AnalyticHead, LDAHead, NearestMeanHead

COLOURS = ("#1f5f8b", "#e08214", "#5aae61", "#7b3294")
MARKERS = ("o", "^", "s", "D")


def cloud(generator, count, centre, spread):
    """Points of a Gaussian with the covariance spread @ spread.T."""
    return generator.normal(size=(count, 2)) @ np.asarray(spread).T + np.asarray(centre)


def draw(ax, head, points, labels, title):
    low, high = points.min(0) - 1.0, points.max(0) + 1.0
    x, y = np.meshgrid(
        np.linspace(low[0], high[0], 300), np.linspace(low[1], high[1], 300)
    )
    grid = torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1))
    regions = head.predict(grid).reshape(x.shape).numpy()
    classes = np.unique(labels)
    ax.contourf(
        x,
        y,
        regions,
        levels=np.arange(len(classes) + 1) - 0.5,
        colors=COLOURS[: len(classes)],
        alpha=0.18,
    )
    ax.contour(
        x,
        y,
        regions,
        levels=np.arange(len(classes)) + 0.5,
        colors="#333333",
        linewidths=0.8,
    )
    for label in classes:
        own = points[labels == label]
        ax.scatter(
            *own.T,
            s=14,
            color=COLOURS[label],
            marker=MARKERS[label],
            linewidths=0,
            label=f"class {label}",
        )
    ax.set(title=title, xlabel="feature 1", ylabel="feature 2")


def learned(head, points, labels):
    head.update(torch.from_numpy(points), torch.from_numpy(labels))
    return head


def figure(name, heads, points, labels, means=False):
    shown, axes = plt.subplots(
        1,
        len(heads),
        figsize=(5.2 * len(heads), 4.3),
        layout="constrained",
        squeeze=False,
    )
    for ax, (title, head) in zip(axes[0], heads.items(), strict=True):
        draw(ax, learned(head, points, labels), points, labels, title)
        if means:
            ax.scatter(
                *head.statistics.means.numpy().T,
                s=90,
                color="black",
                marker="x",
                label="mean",
            )
    axes[0][0].legend(loc="best", fontsize=8)
    shown.savefig(f"{name}.png", dpi=150)


generator = np.random.default_rng(0)

# nearest mean
parts = [
    cloud(generator, 60, centre, np.eye(2) * 0.7)
    for centre in ((2, 0), (4, 4), (0.3, 3))
]
points, labels = np.concatenate(parts), np.repeat(np.arange(3), 60)
figure(
    "idea_nmc",
    {
        'metric="euclidean": distances to the means': NearestMeanHead(
            2, metric="euclidean"
        ),
        'metric="janson": directions only': NearestMeanHead(2, metric="janson"),
    },
    points,
    labels,
)

# linear discriminant analysis: the same tilted shape for every class
tilted = [[1.5, 0.0], [1.35, 0.45]]
parts = [
    cloud(generator, 80, centre, tilted)
    for centre in ((0, 0), (1.6, -0.6), (3.2, -1.2))
]
points, labels = np.concatenate(parts), np.repeat(np.arange(3), 80)
correct = {}
heads = {"nearest mean": NearestMeanHead(2, metric="euclidean"), "LDA": LDAHead(2)}
figure("idea_lda", heads, points, labels, means=True)
for name, head in heads.items():
    correct[name] = float(
        (head.predict(torch.from_numpy(points)).numpy() == labels).mean()
    )

# ridge with a rare class
parts = [
    cloud(generator, 300, (1.0, 0.5), np.eye(2) * 0.55),
    cloud(generator, 300, (-0.6, 0.9), np.eye(2) * 0.55),
    cloud(generator, 8, (0.4, -1.2), np.eye(2) * 0.5),
]
points, labels = np.concatenate(parts), np.repeat(np.arange(3), [300, 300, 8])
figure(
    "idea_aef_ocl",
    {
        'balance="none": 8 samples against 300': AnalyticHead(2, gamma=1.0, bias=True),
        'balance="pfg": pseudo-features added': AnalyticHead(
            2, gamma=1.0, bias=True, balance="pfg"
        ),
    },
    points,
    labels,
)
print(
    f"nearest mean {100 * correct['nearest mean']:.0f} %, LDA {100 * correct['LDA']:.0f} %"
)
