"""A LightningModule around any timm backbone, for users who have none of their own."""

from clkit.models.classifier import TimmClassifier
from clkit.models.identity import IdentityBackbone
from clkit.registry import register_strategies

__all__ = ["IdentityBackbone", "TimmClassifier"]

register_strategies()  # whoever has this package may write Trainer(strategy="gradient_free")
