"""clkit: continual learning and uncertainty as plug-ins for PyTorch Lightning.

Names are imported when they are first used, so that ``import clkit`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from clkit._version import __version__

if TYPE_CHECKING:
    from clkit.features.tap import FeatureTap as FeatureTap
    from clkit.runs.exporting import export as export
    from clkit.runs.forgetting import forget_samples as forget_samples
    from clkit.runs.heads import load_head as load_head
    from clkit.runs.merging import merge_checkpoints as merge_checkpoints
    from clkit.stream.experience import Experience as Experience

_PLACES = {
    "Experience": "clkit.stream.experience",
    "FeatureTap": "clkit.features.tap",
    "export": "clkit.runs.exporting",
    "forget_samples": "clkit.runs.forgetting",
    "load_head": "clkit.runs.heads",
    "merge_checkpoints": "clkit.runs.merging",
}
_SUBPACKAGES = ("callbacks", "data", "errors", "methods", "metrics", "models", "strategies", "testing")

__all__ = ["Experience", "FeatureTap", "__version__", "export", "forget_samples", "load_head", "merge_checkpoints"]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"clkit.{name}")
    raise AttributeError(f"module 'clkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])


if "lightning.pytorch" in sys.modules:  # then Trainer(strategy="gradient_free") shall work after `import clkit`
    from clkit._registry import register_strategies

    register_strategies()
