"""Strategy names for Lightning's registry; a lazy entry, so that registering imports no strategy."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

__all__ = ["STRATEGIES", "register_strategies"]

# name -> (module, class, what a person reads)
STRATEGIES = {
    "gradient_free": (
        "clkit.strategies.gradient_free",
        "GradientFreeStrategy",
        "forward passes only: the backbone stays frozen and heads learn from its features",
    ),
    "onpro": (
        "clkit.strategies.onpro",
        "OnProStrategy",
        "replay from a small memory of images, in a single pass over the stream",
    ),
}


def register_strategies() -> None:
    """Makes every clkit strategy known to ``Trainer(strategy="name")``; safe to call again."""
    for name, (module, attribute, description) in STRATEGIES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, _factory(module, attribute), description=description)


def _factory(module: str, attribute: str) -> Callable[..., Any]:
    def make(**kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), attribute)(**kwargs)

    return make
