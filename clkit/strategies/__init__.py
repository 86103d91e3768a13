"""Strategies: how a batch changes the network. A run has exactly one.

Importing this package registers the names ``"gradient_free"``, ``"er"`` … with Lightning, so that
``Trainer(strategy="er")`` and YAML files find them.
"""

from clkit._registry import register_strategies
from clkit.strategies._editor_parts import EditorSettings
from clkit.strategies._forward import Projection
from clkit.strategies._memory import MemorySettings
from clkit.strategies.base import LearningStrategy
from clkit.strategies.der_pp import DERPPStrategy
from clkit.strategies.editor_training import EditorTrainingStrategy
from clkit.strategies.er import ERStrategy
from clkit.strategies.er_ace import ERACEStrategy
from clkit.strategies.gradient_free import GradientFreeStrategy
from clkit.strategies.onpro import OnProStrategy
from clkit.strategies.ray_train import ray_strategy
from clkit.strategies.replay import ReplayStrategy
from clkit.strategies.scr import SCRStrategy

__all__ = [
    "DERPPStrategy",
    "ERACEStrategy",
    "ERStrategy",
    "EditorSettings",
    "EditorTrainingStrategy",
    "GradientFreeStrategy",
    "LearningStrategy",
    "MemorySettings",
    "OnProStrategy",
    "Projection",
    "ReplayStrategy",
    "SCRStrategy",
    "ray_strategy",
]

register_strategies()
