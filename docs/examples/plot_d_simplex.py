"""
d-Simplex: a gallery that survives three model replacements
===========================================================

A search service keeps features of its images, the gallery, and its model is replaced three times, each time by a better
one that was trained apart. How well do queries of each model search the gallery of each earlier one?

.. image:: /tutorials/images/sphx_glr_plot_d_simplex_001.png
   :alt: Two matrices of scores; behind a learnable classifier only the diagonal is high, behind the simplex all is.

Behind a learnable classifier the old gallery is lost with every replacement. Behind the simplex it is not, and the
last model searches each old gallery better than the model that wrote it. No feature was written anew, and nothing was
learned to translate.
"""

# %%
# Four models, trained apart
# --------------------------
#
# Each has seen more handwritten digits than the one before, 50, 150, 400 and 900 of them, starts from weights of its
# own, and the last is another architecture. ``DSimplex`` makes the classifier of each of them the same fixed simplex.

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from clkit.callbacks import DSimplex

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images).float() / 16, torch.tensor(labels)
gallery, queries = slice(900, 1350), slice(1350, None)


class Digits(pl.LightningModule):
    def __init__(self, *widths):
        super().__init__()
        layers = [
            layer
            for one, two in zip((64, *widths), widths, strict=False)
            for layer in (nn.Linear(one, two), nn.ReLU())
        ]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        # weight decay keeps what the junction has for vertices without a class small
        return torch.optim.SGD(
            self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-3
        )


def trained(seed, number, widths, callbacks):
    pl.seed_everything(seed, verbose=False)
    rows = TensorDataset(images[:number], labels[:number])
    model = Digits(*widths)
    trainer = pl.Trainer(max_steps=600, callbacks=callbacks)
    trainer.fit(model, DataLoader(rows, batch_size=25, shuffle=True))
    return model.eval()


SIZES = [(50, (64, 64)), (150, (64, 64)), (400, (64, 64)), (900, (96, 64, 48))]
simplex = [DSimplex(num_vertices=32) for _ in SIZES]
fixed = [
    trained(seed, number, widths, [simplex[seed]])
    for seed, (number, widths) in enumerate(SIZES)
]
learned = [
    trained(seed, number, widths, []) for seed, (number, widths) in enumerate(SIZES)
]

# %%
# Every model searches the galleries of all before it
# ---------------------------------------------------
#
# No image that is searched was trained on. A query gets the class whose mean in the gallery is nearest by angle.

from clkit.metrics import CompatibilityMatrix


def matrix_of(embeddings):
    metric = CompatibilityMatrix(models=4)
    for newer, own in enumerate(embeddings):
        for older in range(newer + 1):
            metric.update(
                own[queries],
                labels[queries],
                embeddings[older][gallery],
                labels[gallery],
                query_model=newer,
                gallery_model=older,
            )
    return metric


def hidden(model):
    """The input of a learnable classifier, of length 1, filled up to one width."""
    with torch.no_grad():
        features = F.normalize(model.net[:-1](images), dim=1)
    return F.pad(features, (0, 64 - features.shape[1]))


matrices = {
    "learnable classifier": matrix_of([hidden(model) for model in learned]),
    "simplex": matrix_of(
        [each.embed(model, images) for each, model in zip(simplex, fixed, strict=True)]
    ),
}
for name, metric in matrices.items():
    print(name)
    for row in metric.compute().tolist():
        print("  " + " ".join(f"{100 * value:5.1f}" for value in row if value == value))

# %%
# How compatible are they?
# ------------------------
#
# AC is the share of pairs in which the new model finds more in the old gallery than the old one did, AM the mean of all
# scores.

from clkit.metrics.compatibility import (
    average_compatibility,
    average_multi_model_accuracy,
)

for name, metric in matrices.items():
    scores = metric.compute()
    print(
        f"{name}: AC {average_compatibility(scores):.2f}, AM {100 * average_multi_model_accuracy(scores):.1f} %"
    )

# %%
# The figure
# ----------

import matplotlib.pyplot as plt

figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
for ax, (name, metric) in zip(axes, matrices.items(), strict=True):
    metric.plot(ax)
    ax.set_title(name)
plt.show()
