"""Strategy names for Lightning's registry; a lazy entry, so that registering imports no strategy."""

from __future__ import annotations

import sys
from functools import partial
from pkgutil import resolve_name
from typing import Any, NoReturn

from lightning.pytorch.strategies import StrategyRegistry

from clkit.errors import ConfigurationError

__all__ = ["CHANGE_IMPORT", "STRATEGIES", "register_strategies"]

CHANGE_IMPORT = (
    "which is another package to Python: write `import lightning.pytorch as pl` for `import pytorch_lightning as pl`, "
    "for the Trainer, the module and the callbacks alike"
)

# dotted path of the class by name
STRATEGIES = {
    "gradient_free": "clkit.strategies.gradient_free.GradientFreeStrategy",
    "er": "clkit.strategies.er.ERStrategy",
    "er_ace": "clkit.strategies.er_ace.ERACEStrategy",
    "der_pp": "clkit.strategies.der_pp.DERPPStrategy",
    "scr": "clkit.strategies.scr.SCRStrategy",
    "onpro": "clkit.strategies.onpro.OnProStrategy",
    "editor_training": "clkit.strategies.editor_training.EditorTrainingStrategy",
}


def register_strategies() -> None:
    """Make every clkit strategy known to ``Trainer(strategy="name")``; safe to call again."""
    for name, path in STRATEGIES.items():
        if name not in StrategyRegistry:
            StrategyRegistry.register(name, partial(_make, path))
    other: Any = sys.modules.get("pytorch_lightning.strategies")  # a copy of Lightning with a registry of its own
    for name in STRATEGIES if other is not None else ():
        if name not in other.StrategyRegistry:
            other.StrategyRegistry.register(name, partial(_refuse, name))


def _make(path: str, **options: Any) -> Any:
    return resolve_name(path)(**options)


def _refuse(name: str, **options: Any) -> NoReturn:
    raise ConfigurationError(
        f"strategy={name!r} is one for the Trainer of lightning, and this one is of pytorch_lightning, {CHANGE_IMPORT}"
    )
