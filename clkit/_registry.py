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
    "er": (
        "clkit.strategies.er",
        "ERStrategy",
        "experience replay: one cross-entropy over incoming and replayed images",
    ),
    "er_ace": (
        "clkit.strategies.er_ace",
        "ERACEStrategy",
        "replay in which incoming images compete only with the classes of their batch",
    ),
    "der_pp": (
        "clkit.strategies.der_pp",
        "DERPPStrategy",
        "replay of images with the logits that the network once gave for them",
    ),
    "scr": (
        "clkit.strategies.scr",
        "SCRStrategy",
        "supervised contrast of incoming and replayed images, in a single pass",
    ),
    "onpro": (
        "clkit.strategies.onpro",
        "OnProStrategy",
        "replay with contrast of class means and of turned images, in a single pass",
    ),
}


def register_strategies() -> None:
    """Make every clkit strategy known to ``Trainer(strategy="name")``; safe to call again."""
    for name, (module, attribute, description) in STRATEGIES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, _factory(module, attribute), description=description)


def _factory(module: str, attribute: str) -> Callable[..., Any]:
    def make(**kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), attribute)(**kwargs)

    return make
