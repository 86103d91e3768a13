"""A LightningModule around any timm backbone, for users who have none of their own."""

from clkit.models.classifier import TimmClassifier
from clkit.models.identity import IdentityBackbone

__all__ = ["IdentityBackbone", "TimmClassifier"]
