"""Callbacks: what is learned and watched beside the training. Any number run together, in any order."""

# whoever has a callback may also write Trainer(strategy="gradient_free")
from clkit._registry import register_strategies
from clkit.callbacks._run_edits import FeatureShift, LoggedEdit, RunEdit
from clkit.callbacks.aef_ocl import AEFOCL, Lift, PseudoFeatures
from clkit.callbacks.anacp import AnaCP
from clkit.callbacks.base import FeatureCallback, Predictor, StreamCallback
from clkit.callbacks.d_simplex import DSimplex
from clkit.callbacks.deup import DEUP, Records
from clkit.callbacks.dst import DST
from clkit.callbacks.evaluation import StreamEvaluation
from clkit.callbacks.head import HeadCallback
from clkit.callbacks.klda import KLDA
from clkit.callbacks.lda import LDA
from clkit.callbacks.mend import MEND
from clkit.callbacks.nmc import NMC
from clkit.callbacks.progress import StreamProgressBar
from clkit.surgery.classifier import ungraft
from clkit.surgery.fixed_classifier import attach_simplex_head, detach_simplex_head

__all__ = [
    "AEFOCL",
    "DEUP",
    "DST",
    "KLDA",
    "LDA",
    "MEND",
    "NMC",
    "AnaCP",
    "DSimplex",
    "FeatureCallback",
    "FeatureShift",
    "HeadCallback",
    "Lift",
    "LoggedEdit",
    "Predictor",
    "PseudoFeatures",
    "Records",
    "RunEdit",
    "StreamCallback",
    "StreamEvaluation",
    "StreamProgressBar",
    "attach_simplex_head",
    "detach_simplex_head",
    "ungraft",
]

register_strategies()
