"""
DEUP: what is flagged before a class arrives, and what is said after
====================================================================

A nearest-mean classifier learns ten digits, two at a time, and is asked about all of them at each stage. Its answers
for digits that have not come yet are all wrong. Does it know?

.. image:: /tutorials/images/sphx_glr_plot_deup_001.png
   :alt: The mean uncertainty of each class is high until the class is learned, and low from then on.

It does: what is expected of a digit falls when that digit is learned. The same number, a probability to be wrong, says
when to leave an answer to a person.
"""

# %%
# One line in the list of callbacks
# ---------------------------------
#
# ``evaluate="all"`` asks about digits of the future as well.

import lightning.pytorch as pl
from torch import nn

from clkit.callbacks import DEUP, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Identity(), nn.Linear(64, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return self(batch[0])

    def configure_optimizers(self):
        return None


class Stages(pl.Callback):
    """Keeps what is reported after each stage."""

    def __init__(self):
        self.reports = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.reports.append(dict(deup.reports["nmc"]))


deup, stages = DEUP(abstain_rate=0.1, coverage=0.98), Stages()
stream = StreamDataModule(
    "digits:flat", ClassIncremental(experiences=5), batch_size=10, evaluate="all"
)
trainer = pl.Trainer(
    strategy="gradient_free",
    callbacks=[
        NMC("cosine"),
        deup,
        StreamEvaluation(table=False, files=False, figures=False),
        stages,
    ],
    max_epochs=-1,
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Digits(), datamodule=stream)

# %%
# Before and after
# ----------------
#
# A thin line is a digit, the thick one their mean.

import matplotlib.pyplot as plt

from clkit.metrics.uncertainty_figures import plot_around_learning

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
plot_around_learning(*deup.course("nmc"), ax=axes, ylabel="expected share of errors")
plt.show()

# %%
# How good is it? ``mean_total`` should be ``mean_loss``, the share of wrong answers on digits that were learned;
# ``auroc_future`` says how well digits that have not come stand out, ``auroc_error`` the same of mistakes.

columns = ["mean_total", "mean_loss", "auroc_error", "auroc_future"]
print("stage", *(f"{name:>13}" for name in columns))
for stage, report in enumerate(stages.reports, start=1):
    print(
        f"{stage:5}", *(f"{report.get(name, float('nan')):13.3f}" for name in columns)
    )

# %%
# To abstain
# ----------
#
# ``abstain_rate=0.1`` asks to refuse a tenth of what is known; the digits of the future are refused far more often, and
# what is accepted is wrong less often.

columns = ["abstention_rate", "abstention_rate_future", "mean_loss", "selective_risk"]
print("stage", *(f"{name:>22}" for name in columns))
for stage, report in enumerate(stages.reports, start=1):
    print(
        f"{stage:5}", *(f"{report.get(name, float('nan')):22.3f}" for name in columns)
    )

# %%
# Sets instead of one answer
# --------------------------
#
# ``coverage=0.98`` asks for sets of digits that hold the true one 98 times in a hundred, at every stage. Single answers
# are right less often, so the sets grow with what there is to confuse.

columns = ["coverage", "set_size", "singletons"]
print("stage", *(f"{name:>10}" for name in columns))
for stage, report in enumerate(stages.reports, start=1):
    print(f"{stage:5}", *(f"{report[name]:10.3f}" for name in columns))

# %%
# What to ask labels for
# ----------------------
#
# Of any samples, labelled or not, ``query`` names those of which a label would teach most.

import torch

from clkit.methods import query

trainer.predict(trainer.lightning_module, datamodule=stream)
unsure = torch.cat([batch["nmc"]["epistemic"] for batch in deup.predictions])
asked = query(10, unsure)
print(asked.tolist())
print(f"{unsure.mean():.2f} on average, {unsure[asked].mean():.2f} of those")

# %%
# When a simpler score is better
# ------------------------------
#
# The margin between the two best scores ranks mistakes as well, and distances alone find what is new: see the table on
# :doc:`the page of the method </methods/deup>`. What neither has is a scale on which 0.1 means one mistake in ten.
