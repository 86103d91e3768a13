"""Callbacks: what is learned and watched beside the training. Any number run together, in any order."""

# whoever has a callback may also write Trainer(strategy="gradient_free")
from clkit._registry import register_strategies
from clkit.callbacks.aef_ocl import AEFOCL, Lift, PseudoFeatures
from clkit.callbacks.base import FeatureCallback, Predictor, StreamCallback
from clkit.callbacks.dst import DST
from clkit.callbacks.evaluation import StreamEvaluation
from clkit.callbacks.head import HeadCallback
from clkit.callbacks.lda import LDA
from clkit.callbacks.nmc import NMC
from clkit.callbacks.progress import StreamProgressBar
from clkit.surgery.classifier import ungraft

__all__ = [
    "AEFOCL",
    "DST",
    "LDA",
    "NMC",
    "FeatureCallback",
    "HeadCallback",
    "Lift",
    "Predictor",
    "PseudoFeatures",
    "StreamCallback",
    "StreamEvaluation",
    "StreamProgressBar",
    "ungraft",
]

register_strategies()
