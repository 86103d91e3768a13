"""
DST: five tasks in one network, nothing forgotten
=================================================

One small ResNet learns five pairs of handwritten digits, one pair after the other, and keeps no image:

.. image:: /tutorials/images/sphx_glr_plot_dst_001.png
   :alt: Left, an accuracy matrix whose columns do not change; right, what each task took of the layers.

On the left no column changes from one row to the next: that is measured, after each task, not assumed. On the right
which connections of each layer a task was the first to take; those left white are free. This tutorial makes the figure,
looks at the bits, and takes the network of one task out into plain timm.
"""

# %%
# The run
# -------
#
# Each task trains a fifth of the connections, chosen anew. ``task_heads=True`` trains and answers with the outputs of
# the present task's two classes only, and ``TaskIncremental`` says that the task of a sample is known.

import lightning.pytorch as pl
import torch

from clkit.callbacks import DST, StreamEvaluation
from clkit.data import Preprocessing, StreamDataModule, TaskIncremental
from clkit.methods import PruneSchedule
from clkit.models import TimmClassifier

NETWORK = {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 32], "in_chans": 1}

pl.seed_everything(0, verbose=False)
dst = DST(density=0.2, schedule=PruneSchedule(update_every=3), table=False)
evaluation = StreamEvaluation(table=False, files=False)
trainer = pl.Trainer(max_epochs=-1, callbacks=[dst, evaluation])
model = TimmClassifier(
    "resnet18",
    model_kwargs=NETWORK,
    task_heads=True,
    optimizer=lambda parameters: torch.optim.Adam(parameters, lr=3e-3),
)
stream = StreamDataModule(
    "digits",
    TaskIncremental(experiences=5),
    batch_size=16,
    epochs_per_experience=4,
    preprocessing=Preprocessing(size=16),
)
trainer.fit(model, datamodule=stream)

# %%
# Nothing is forgotten
# --------------------
#
# Row *i* of the matrix is the state after task *i*, column *j* the test samples of task *j*.

results = evaluation.results["module"]
for row in results["accuracy_matrix"]:
    print(" ".join(f"{100 * value:6.2f}" for value in row if value is not None))
print(f"forgetting: {results['forgetting']}")

# %%
# What each task took of the network: later ones read more and more of what earlier ones learned.

for report in dst.reports:
    print(
        f"task {report.task}: {report.active} connections, {report.reused} of them of earlier tasks; "
        f"{report.free} of {report.total} are free"
    )

# %%
# One task in plain timm
# ----------------------
#
# ``export`` gives the network of a task as a dense state dict with zeros. Plain timm loads it, and gives the same bits.

import timm

images = next(iter(stream.val_dataloader()))[0]
plain = timm.create_model("resnet18", num_classes=10, **NETWORK).eval()
plain.load_state_dict(
    {
        name.removeprefix("network."): value
        for name, value in dst.export(0).items()
        if name.startswith("network.")
    }
)
with dst.activate(0), torch.no_grad():
    model.eval()
    print(torch.equal(plain(images)[:, :2], model(images)[:, :2]))
zeros = sum(int((value == 0).sum()) for value in plain.state_dict().values())
print(f"{zeros} zeros")

# %%
# The figure
# ----------

import matplotlib.pyplot as plt

from clkit.metrics.figures import plot_accuracy_matrix
from clkit.report.run_figures import plot_layer_use

figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
plot_accuracy_matrix(
    results["accuracy_matrix"],
    ax=left,
    names=["0-1", "2-3", "4-5", "6-7", "8-9"],
)
plot_layer_use(*dst.topology.layer_use(), ax=right)
plt.show()
