import lightning.pytorch as pl
import torch
from torch import nn

from clkit.callbacks import AEFOCL, NMC, StreamEvaluation
from clkit.data import ClassIncremental, StreamDataModule


class YourModule(pl.LightningModule):
    """A LightningModule as you have it: it has never heard of clkit."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self(x), y))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters())


pl.seed_everything(0)

digits = StreamDataModule("digits:flat", ClassIncremental(experiences=5))
evaluation = StreamEvaluation()
trainer = pl.Trainer(
    strategy="gradient_free",  # a frozen network: forward passes only
    callbacks=[AEFOCL(), NMC(), evaluation],  # the line you add
)
trainer.fit(YourModule(), datamodule=digits)

# ---- the figure: the same module without a method, trained on one experience after the other

from clkit.metrics.figures import plot_accuracy_over_time

trained = StreamEvaluation(table=False, files=False)
digits = StreamDataModule(
    "digits:flat", ClassIncremental(experiences=5), epochs_per_experience=4
)
pl.Trainer(callbacks=[trained]).fit(YourModule(), datamodule=digits)
curves = {"AEF-OCL": evaluation.results["aef_ocl"], "NMC": evaluation.results["nmc"]}
curves["training alone"] = trained.results["module"]
figure, axes = plot_accuracy_over_time(
    {name: result["accuracy_seen"] for name, result in curves.items()},
    names=["0-1", "2-3", "4-5", "6-7", "8-9"],
)
axes.set_xlabel("digits that have just arrived")
figure.savefig("first_result.png", dpi=150)
