"""
Nearest class mean: four metrics, two accuracies
================================================

Four variants of a classifier that has nothing to train and nothing to tune, on handwritten digits that arrive two
classes at a time:

.. image:: /tutorials/images/sphx_glr_plot_nmc_001.png
   :alt: Left, accuracy on all classes seen so far, four curves that fall slowly; right, the accuracy matrix.

On the left the accuracy on all classes seen so far, on the right that on each pair of classes after each stage. This
tutorial makes the figure, shows why the order of the classes matters for one accuracy of a stream and not for the
other, and that class ids may have gaps.
"""

# %%
# The stream
# ----------
#
# scikit-learn's digits as vectors of 64 pixels, in five experiences of two classes. The pixels
# themselves are the features (``backbone="identity"``), so that no network stands between the data
# and the classifier.

import lightning.pytorch as pl

from clkit.callbacks import NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule
from clkit.models import TimmClassifier

METRICS = ("janson", "euclidean", "icarl", "cosine")


def run(class_order=None):
    """All four variants on one stream; returns what was evaluated."""
    evaluation = StreamEvaluation(table=False, files=False)
    trainer = pl.Trainer(
        max_epochs=-1,
        strategy="gradient_free",
        callbacks=[
            *[NMC(metric=metric, name=metric) for metric in METRICS],
            evaluation,
        ],
    )
    stream = StreamDataModule(
        "digits:flat", ClassIncremental(experiences=5, class_order=class_order)
    )
    trainer.fit(TimmClassifier("identity"), datamodule=stream)
    return trainer, evaluation


trainer, evaluation = run()

# %%
# Four callbacks of one class run side by side; ``name`` tells them apart in logs, results and
# checkpoints. They cost one forward pass between them.
#
# Two accuracies
# --------------
#
# ``accuracy_seen`` is the accuracy on all classes seen so far, after each stage. Its mean over the
# stages is the *average incremental accuracy*, its last value the *final accuracy*.


def show(results):
    print(
        f"{'':10} {'after each stage':34} {'average':>8} {'final':>8} {'forgetting':>11}"
    )
    for name, row in results.items():
        stages = " ".join(f"{100 * value:6.2f}" for value in row["accuracy_seen"])
        print(
            f"{name:10} {stages} {100 * row['average_incremental_accuracy']:8.2f} {100 * row['final_accuracy']:8.2f} "
            f"{100 * row['forgetting']:11.2f}"
        )


show(evaluation.results)

# %%
# The same classes in another order. A mean does not depend on when its class came, so what is known
# after the last stage is the same, and so is the final accuracy. The average is another one: it
# depends on which classes had to be told apart early.

_, reversed_order = run(class_order=[9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
show(reversed_order.results)

# %%
# So a table that compares average accuracies must say which order it used;
# :data:`clkit.data.PUBLISHED_ORDERS` has the common ones by name.
#
# Accuracies over time and the accuracy matrix
# --------------------------------------------

import matplotlib.pyplot as plt

from clkit.metrics.figures import plot_accuracy_matrix, plot_accuracy_over_time

names = ["0-1", "2-3", "4-5", "6-7", "8-9"]
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
curves = {name: row["accuracy_seen"] for name, row in evaluation.results.items()}
plot_accuracy_over_time(curves, ax=left, names=names, full_scale=False)
plot_accuracy_matrix(
    evaluation.results["janson"]["accuracy_matrix"],
    ax=right,
    names=names,
    title="janson",
)
plt.show()

# %%
# Row *i* of the matrix is the state after experience *i*, column *j* the test samples of experience
# *j*. Nothing of what was learned is lost: a mean never changes after its class is over. Accuracies
# fall all the same, because more classes compete for each sample.
#
# Ids with gaps
# -------------
#
# The head keeps one row for each class *seen*. Scores have a column for each id up to the largest,
# and those that were never seen are minus infinity, so they cannot win:

import torch

from clkit.methods import NearestMeanHead

head = NearestMeanHead(in_features=2, metric="euclidean")
head.update(torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.tensor([2, 6]))
print(head.classes)
print(head(torch.tensor([[1.0, 0.0]])))
print(head.predict(torch.tensor([[1.0, 0.0], [3.0, 3.0]])))

# %%
# The heads of the run above predict without the trainer too, and give back what they were taught
# when asked:

janson = trainer.callbacks[0].head
print(janson)
print("samples of each class:", janson.counts.tolist())
