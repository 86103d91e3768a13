"""Streams of data: sources say what there is, scenarios say what arrives when."""

from __future__ import annotations

from clkit._registry import register_strategies
from clkit.data.class_orders import PUBLISHED_ORDERS, published_order
from clkit.data.preprocessing import Preprocessing
from clkit.data.scenarios import (
    Blurry,
    ClassIncremental,
    DomainIncremental,
    Joint,
    Labels,
    LongTailed,
    NaturalOrder,
    Scenario,
    Split,
    TaskIncremental,
)
from clkit.data.sources import resolve_source
from clkit.data.sources.base import Source, SourcePart, data_root
from clkit.data.sources.custom import Custom
from clkit.data.sources.digits import Digits
from clkit.data.sources.folder import ImageFolder
from clkit.data.sources.npz import NpzFeatures, NpzImages
from clkit.data.sources.torchvision import Torchvision
from clkit.data.stream import StreamDataModule

__all__ = [
    "PUBLISHED_ORDERS",
    "Blurry",
    "ClassIncremental",
    "Custom",
    "Digits",
    "DomainIncremental",
    "ImageFolder",
    "Joint",
    "Labels",
    "LongTailed",
    "NaturalOrder",
    "NpzFeatures",
    "NpzImages",
    "Preprocessing",
    "Scenario",
    "Source",
    "SourcePart",
    "Split",
    "StreamDataModule",
    "TaskIncremental",
    "Torchvision",
    "data_root",
    "published_order",
    "resolve_source",
]

register_strategies()  # whoever has this package may write Trainer(strategy="gradient_free")
