"""Methods as plain PyTorch: modules and functions on tensors, no trainer needed."""

from clkit.methods.alignment import HOCLoss, align, distillation_weight, feature_distillation, hoc_total
from clkit.methods.feature_bank import FeatureBank, Neighbours
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.lda import LDAHead
from clkit.methods.nearest_mean import NearestMeanHead
from clkit.methods.onpro import OnlinePrototypes, OnProLosses
from clkit.methods.replay.buffer import MemoryRows, ReservoirBuffer
from clkit.methods.replay.contrast import Projector, instance_contrast, prototype_contrast, supervised_contrast
from clkit.methods.replay.mixing import MixedBatch, Mixing, mixed_cross_entropy
from clkit.methods.replay.segments import BatchNormSegments
from clkit.methods.replay.views import RandomViews, rotate_views, variant_labels
from clkit.methods.ridge import AnalyticHead
from clkit.methods.simplex import ClassAllocator, SimplexHead
from clkit.methods.sparse import Growth, Initial, Prune, PruneSchedule, SparseTopology, TaskReport
from clkit.methods.statistics import FeatureStatistics

__all__ = [
    "AnalyticHead",
    "BatchNormSegments",
    "ClassAllocator",
    "FeatureBank",
    "FeatureMap",
    "FeatureStatistics",
    "Growth",
    "HOCLoss",
    "Initial",
    "LDAHead",
    "MemoryRows",
    "MixedBatch",
    "Mixing",
    "NearestMeanHead",
    "Neighbours",
    "OnProLosses",
    "OnlinePrototypes",
    "Projector",
    "Prune",
    "PruneSchedule",
    "RandomViews",
    "ReservoirBuffer",
    "SimplexHead",
    "SparseTopology",
    "TaskReport",
    "align",
    "distillation_weight",
    "feature_distillation",
    "hoc_total",
    "instance_contrast",
    "mixed_cross_entropy",
    "prototype_contrast",
    "rotate_views",
    "supervised_contrast",
    "variant_labels",
]
