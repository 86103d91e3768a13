"""Methods as plain PyTorch: modules and functions on tensors, no trainer needed."""

from clkit.methods.alignment import HOCLoss, align, distillation_weight, feature_distillation, hoc_total
from clkit.methods.anacp import AnaCP
from clkit.methods.cross_fitting import OutOfSample, cross_fit
from clkit.methods.decisions import abstention_threshold, query, risk_threshold
from clkit.methods.deup import ErrorPredictor, Uncertainty
from clkit.methods.feature_bank import FeatureBank, Neighbours
from clkit.methods.feature_memory import FeatureMemory
from clkit.methods.heads.feature_map import FeatureMap
from clkit.methods.heads.head_part import HeadPart
from clkit.methods.heads.holdings import Holdings, shard_bounds
from clkit.methods.klda import KLDA
from clkit.methods.lda import LDAHead
from clkit.methods.mend import (
    EditorNetworks,
    EditRecord,
    EditReference,
    EditResult,
    GradientEditor,
    Guard,
    LocalityReport,
    Proposal,
)
from clkit.methods.meta_examples import MetaExample, MetaExamples
from clkit.methods.nearest_mean import NearestMeanHead
from clkit.methods.novelty import Novelty
from clkit.methods.onpro import OnlinePrototypes, OnProLosses
from clkit.methods.prediction_sets import PredictionSets, nonconformity
from clkit.methods.records import ErrorRecords, WeightedRecords, sample_keys
from clkit.methods.replay.buffer import MemoryRows, ReservoirBuffer
from clkit.methods.replay.contrast import Projector, instance_contrast, prototype_contrast, supervised_contrast
from clkit.methods.replay.mixing import MixedBatch, Mixing, mixed_cross_entropy
from clkit.methods.replay.segments import BatchNormSegments
from clkit.methods.replay.views import RandomViews, rotate_views, variant_labels
from clkit.methods.ridge import AnalyticHead
from clkit.methods.sample_loss import neighbour_noise, replicate_noise, sample_loss
from clkit.methods.simplex import ClassAllocator, SimplexHead
from clkit.methods.sparse import Growth, Initial, Prune, PruneSchedule, SparseTopology, TaskReport
from clkit.methods.stationarising import (
    FEATURE_SIGNS,
    Snapshot,
    gaussian_rows,
    left_out_features,
    novel_features,
    stationarising_features,
)
from clkit.methods.statistics import FeatureStatistics

__all__ = [
    "FEATURE_SIGNS",
    "KLDA",
    "AnaCP",
    "AnalyticHead",
    "BatchNormSegments",
    "ClassAllocator",
    "EditRecord",
    "EditReference",
    "EditResult",
    "EditorNetworks",
    "ErrorPredictor",
    "ErrorRecords",
    "FeatureBank",
    "FeatureMap",
    "FeatureMemory",
    "FeatureStatistics",
    "GradientEditor",
    "Growth",
    "Guard",
    "HOCLoss",
    "HeadPart",
    "Holdings",
    "Initial",
    "LDAHead",
    "LocalityReport",
    "MemoryRows",
    "MetaExample",
    "MetaExamples",
    "MixedBatch",
    "Mixing",
    "NearestMeanHead",
    "Neighbours",
    "Novelty",
    "OnProLosses",
    "OnlinePrototypes",
    "OutOfSample",
    "PredictionSets",
    "Projector",
    "Proposal",
    "Prune",
    "PruneSchedule",
    "RandomViews",
    "ReservoirBuffer",
    "SimplexHead",
    "Snapshot",
    "SparseTopology",
    "TaskReport",
    "Uncertainty",
    "WeightedRecords",
    "abstention_threshold",
    "align",
    "cross_fit",
    "distillation_weight",
    "feature_distillation",
    "gaussian_rows",
    "hoc_total",
    "instance_contrast",
    "left_out_features",
    "mixed_cross_entropy",
    "neighbour_noise",
    "nonconformity",
    "novel_features",
    "prototype_contrast",
    "query",
    "replicate_noise",
    "risk_threshold",
    "rotate_views",
    "sample_keys",
    "sample_loss",
    "shard_bounds",
    "stationarising_features",
    "supervised_contrast",
    "variant_labels",
]
