"""Methods as plain PyTorch: modules and functions on tensors, no trainer needed."""

from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.lda import LDAHead
from clkit.methods.nearest_mean import NearestMeanHead
from clkit.methods.onpro import (
    MixedBatch,
    OnlinePrototypes,
    instance_contrast,
    mixed_cross_entropy,
    prototype_contrast,
    variant_labels,
)
from clkit.methods.replay.buffer import MemoryRows, ReservoirBuffer
from clkit.methods.replay.projector import Projector
from clkit.methods.replay.rule import ReplayRule
from clkit.methods.replay.segments import BatchNormSegments
from clkit.methods.replay.supervised import supervised_contrast
from clkit.methods.replay.views import RandomViews, rotate_views
from clkit.methods.ridge import AnalyticHead
from clkit.methods.statistics import FeatureStatistics

__all__ = [
    "AnalyticHead",
    "BatchNormSegments",
    "FeatureMap",
    "FeatureStatistics",
    "LDAHead",
    "MemoryRows",
    "MixedBatch",
    "NearestMeanHead",
    "OnlinePrototypes",
    "Projector",
    "RandomViews",
    "ReplayRule",
    "ReservoirBuffer",
    "instance_contrast",
    "mixed_cross_entropy",
    "prototype_contrast",
    "rotate_views",
    "supervised_contrast",
    "variant_labels",
]
