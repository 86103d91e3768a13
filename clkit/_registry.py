"""Strategy names for Lightning's registry; a lazy entry, so that registering imports no strategy."""

from __future__ import annotations

from functools import partial
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

__all__ = ["STRATEGIES", "register_strategies"]

# dotted path of the class by name
STRATEGIES = {
    "gradient_free": "clkit.strategies.gradient_free.GradientFreeStrategy",
    "er": "clkit.strategies.er.ERStrategy",
    "er_ace": "clkit.strategies.er_ace.ERACEStrategy",
    "der_pp": "clkit.strategies.der_pp.DERPPStrategy",
    "scr": "clkit.strategies.scr.SCRStrategy",
    "onpro": "clkit.strategies.onpro.OnProStrategy",
}


def register_strategies() -> None:
    """Make every clkit strategy known to ``Trainer(strategy="name")``; safe to call again."""
    for name, path in STRATEGIES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, partial(_make, path))


def _make(path: str, **options: Any) -> Any:
    return resolve_name(path)(**options)
