"""Strategies: how a batch changes the network. A run has exactly one.

Importing this package registers the names ``"gradient_free"`` … with Lightning, so that
``Trainer(strategy="gradient_free")`` and YAML files find them.
"""

from clkit._registry import register_strategies
from clkit.strategies.base import LearningStrategy
from clkit.strategies.gradient_free import GradientFreeStrategy
from clkit.strategies.onpro import OnProStrategy
from clkit.strategies.replay_methods import REPLAY_METHODS

__all__ = ["REPLAY_METHODS", "GradientFreeStrategy", "LearningStrategy", "OnProStrategy"]

register_strategies()
