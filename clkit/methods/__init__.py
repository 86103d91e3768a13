"""Methods as plain PyTorch: modules and functions on tensors, no trainer needed."""

from clkit.methods.feature_map import FeatureMap
from clkit.methods.lda import LDAHead
from clkit.methods.nearest_mean import NearestMeanHead
from clkit.methods.ridge import AnalyticHead
from clkit.methods.statistics import FeatureStatistics

__all__ = ["AnalyticHead", "FeatureMap", "FeatureStatistics", "LDAHead", "NearestMeanHead"]
