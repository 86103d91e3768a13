"""What of a module a run may leave behind: its structure, hooks and modes, to be compared before and after."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["surface"]


def surface(module: nn.Module) -> dict[str, Any]:
    """Everything of a module but its values: keys, parts, hooks, attributes, modes, who needs gradients."""
    seen: dict[str, Any] = {
        f"global {name}": len(hooks)
        for name, hooks in vars(torch_module).items()
        if name.startswith("_global_") and isinstance(hooks, dict)
    }
    seen["keys of state_dict()"] = repr(list(module.state_dict()))
    for name, part in module.named_modules():
        place = name or type(part).__name__
        seen[f"{place} (the object)"] = id(part)
        seen[f"{place}.training"] = part.training
        seen[f"{place} (its attributes)"] = repr(sorted(vars(part)))
        for key, value in vars(part).items():
            if "_hooks" in key and isinstance(value, dict):
                seen[f"{place}.{key}"] = len(value)
    for name, parameter in module.named_parameters():
        seen[f"{name} (the object)"] = id(parameter)
        seen[f"{name}.requires_grad"] = parameter.requires_grad
    return seen
