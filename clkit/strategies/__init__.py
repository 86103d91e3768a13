"""Strategies: how a batch changes the network. A run has exactly one.

Importing this package registers the names ``"gradient_free"`` … with Lightning, so that
``Trainer(strategy="gradient_free")`` and YAML files find them.
"""

from clkit.strategies.base import LearningStrategy
from clkit.strategies.gradient_free import GradientFreeStrategy
from clkit.strategies.registry import register_strategies

__all__ = ["GradientFreeStrategy", "LearningStrategy"]

register_strategies()
