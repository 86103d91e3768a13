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
trainer = pl.Trainer(
    strategy="gradient_free",  # a frozen network: forward passes only
    callbacks=[AEFOCL(), NMC(), StreamEvaluation()],  # the line you add
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
digits = StreamDataModule("digits:flat", ClassIncremental(classes_per_experience=5))
trainer.fit(YourModule(), datamodule=digits)
