"""A LightningModule around any timm backbone, for users who have none of their own."""

from clkit._registry import register_strategies
from clkit.models.timm_classifier import IdentityBackbone, TimmClassifier

__all__ = ["IdentityBackbone", "TimmClassifier"]

register_strategies()  # whoever has this package may write Trainer(strategy="gradient_free")
