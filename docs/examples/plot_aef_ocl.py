"""
AEF-OCL: a stream without gradients, and rare classes
=====================================================

A small network is trained on the first classes only, then it freezes, and a ridge classifier learns all further classes
in one pass. Where later classes are rarer and rarer, AEF-OCL keeps them up with pseudo-features:

.. image:: /tutorials/images/sphx_glr_plot_aef_ocl_002.png
   :alt: Accuracy of each class, with fewer and fewer training samples, of ridge and of AEF-OCL.

This tutorial gets there in two runs: one on a stream of equal classes, one on the long-tailed stream of the figure.
"""

# sphinx_gallery_thumbnail_number = 2

# %%
# Your module
# -----------
#
# An ordinary ``LightningModule`` around a network of timm. Nothing in it is about streams.

import lightning.pytorch as pl
import timm
import torch
from torch.nn.functional import cross_entropy


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = timm.create_model("resnet10t", in_chans=1, num_classes=10)

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("val_loss", cross_entropy(self(images), labels))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


# %%
# The run
# -------
#
# Digits 0 to 3 come first and train the network for eight epochs, the *warm-up*. Then
# ``GradientFreeStrategy`` freezes it. From there on every batch is one forward pass, and the heads
# read what goes into the network's own classifier.

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, LongTailed, Preprocessing, StreamDataModule
from clkit.strategies import GradientFreeStrategy

SCENARIO = ClassIncremental(first_experience_classes=4, classes_per_experience=2)
NAMES = ["0-3", "4-5", "6-7", "8-9"]


def run(scenario):
    pl.seed_everything(0, verbose=False)
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = pl.Trainer(
        max_epochs=-1,
        strategy=GradientFreeStrategy(warmup_epochs=8),
        callbacks=[AEFOCL(), AEFOCL(balance="none", name="ridge"), NMC(), evaluation],
    )
    stream = StreamDataModule(
        "digits", scenario, batch_size=32, preprocessing=Preprocessing(size=32)
    )
    trainer.fit(Classifier(), datamodule=stream)
    return trainer, evaluation


def show(results):
    print(f"{'':8} {'after each stage':28} {'average':>8} {'AMCA':>7}")
    for name, row in results.items():
        stages = " ".join(f"{100 * value:6.1f}" for value in row["accuracy_seen"])
        print(
            f"{name:8} {stages} {100 * row['average_incremental_accuracy']:8.1f} {100 * row['amca']:7.1f}"
        )


trainer, evaluation = run(SCENARIO)
show(evaluation.results)

# %%
# ``aef_ocl`` and ``ridge`` learn the same sums from the same pass; they differ in how these are
# solved. Where all classes are about equally frequent there is little to balance, and the two agree
# closely. ``module`` is the network's own classifier: it was trained on the digits 0 to 3 and then
# froze, so it can answer nothing else. The heads know the digits 4 to 9 by features that were never
# trained on them.

import matplotlib.pyplot as plt

from clkit.metrics.figures import plot_accuracy_matrix

figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.4), layout="constrained")
for ax, name in zip(axes, ("aef_ocl", "nmc"), strict=True):
    plot_accuracy_matrix(
        evaluation.results[name]["accuracy_matrix"], ax=ax, names=NAMES, title=name
    )
plt.show()

# %%
# Rare classes
# ------------
#
# ``LongTailed`` wraps any scenario and keeps fewer training samples of each class than of the one
# before. The test samples stay as they are.

trainer, evaluation = run(LongTailed(SCENARIO, factor=0.6))
show(evaluation.results)

# %%
# A plain ridge classifier minimises the squared error over the samples it was given, so it neglects
# classes with few of them. AEF-OCL adds Gaussian pseudo-features of each rare class, drawn from its
# running mean and variance, until all classes weigh the same. They enter when the classifier is
# solved and never what is stored.

heads = {"ridge": trainer.callbacks[1].head, "aef_ocl": trainer.callbacks[0].head}
learned = heads["aef_ocl"].counts.tolist()

figure, ax = plt.subplots(figsize=(8.5, 3.8), layout="constrained")
for shift, (name, colour, hatch) in zip(
    (-0.2, 0.2), (("ridge", "#b8b8b8", ""), ("aef_ocl", "#1f5f8b", "//")), strict=True
):
    counts = evaluation.class_counts(name)
    accuracy = [100 * correct / total for correct, total in counts.values()]
    ax.bar(
        [label + shift for label in counts],
        accuracy,
        width=0.4,
        color=colour,
        hatch=hatch,
        label=name,
    )
ax.set_xticks(range(10), [f"{label}\nn={n}" for label, n in enumerate(learned)])
ax.set(
    xlabel="class and its number of training samples",
    ylabel="test accuracy (%)",
    ylim=(0, 100),
)
ax.legend(loc="lower left")
plt.show()

# %%
# The balance moves accuracy from frequent classes to rare ones. Which of the two is better depends
# on what counts: overall accuracy weighs test samples, *AMCA* weighs classes (and counts those not
# yet learned as wrong, so it starts low on any stream of classes).
#
# Nothing but sums
# ----------------
#
# What the head keeps does not grow with the number of samples, and it does not depend on their
# order: learned in one batch, or split over two machines and merged, it is the same classifier up
# to rounding. So are samples unlearned.

head = heads["ridge"]
print(
    f"{head.counts.sum()} samples, {len(head.classes)} classes, {head.in_features} features"
)

from clkit.methods import AnalyticHead

generator = torch.Generator().manual_seed(0)
features = torch.randn(60, 8, generator=generator, dtype=torch.float64)
labels = torch.arange(60) % 3
everything, first, second = (AnalyticHead(8) for _ in range(3))
everything.update(features, labels)
first.update(features[:25], labels[:25])
second.update(features[25:], labels[25:])
first.merge(second)
print("merged:   ", float((everything.weight - first.weight).abs().max()))
first.subtract(features[50:], labels[50:])
fresh = AnalyticHead(8)
fresh.update(features[:50], labels[:50])
print("unlearned:", float((fresh.weight - first.weight).abs().max()))
