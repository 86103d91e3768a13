"""Comparing states: every leaf, bit by bit or within a tolerance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from clkit.errors import ContractError

__all__ = ["bits", "changed", "far", "leaves", "plain", "require", "same", "surface"]

PLAIN = (Tensor, int, float, str, bool, type(None))


def require(holds: bool, seen: str, advice: str) -> None:
    """Require what a check is about, or raise a ContractError that says what was seen and what to do."""
    if not holds:
        raise ContractError(f"{seen}; {advice}")


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return every leaf of a nested state under its path."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {key: leaf for name, part in value.items() for key, leaf in leaves(part, f"{path}/{name}").items()}
    return {path or "/": value}


def bits(value: Any) -> Any:
    """Return what is equal for two leaves exactly if they are the same to the last bit (NaN included)."""
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        return str(value.dtype), tuple(value.shape), raw
    return type(value).__name__, repr(value)


def changed(before: Any, after: Any) -> list[str]:
    """Return the paths of leaves that are not the same bits in both."""
    one, two = leaves(before), leaves(after)
    paths = [*one, *(path for path in two if path not in one)]
    return [path for path in paths if path not in one or path not in two or bits(one[path]) != bits(two[path])]


def same(before: Any, after: Any, seen: str, advice: str) -> None:
    """Require the same bits; the error names the first paths that differ."""
    paths = changed(before, after)
    more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
    require(not paths, f"{seen} ({', '.join(paths[:4])}{more})", advice)


def plain(state: Any, of: str) -> None:
    """Require tensors and plain values in a state that a message calls ``of``."""
    for path, leaf in leaves(state).items():
        require(
            isinstance(leaf, PLAIN),
            f"{of} holds a {type(leaf).__module__}.{type(leaf).__qualname__} at {path}",
            "keep tensors and plain values only: files are loaded with weights_only=True",
        )


def far(expected: Any, found: Any, tolerance: float) -> list[str]:
    """Return the paths of leaves that differ by more than ``tolerance``, relative to the largest value of the leaf."""
    one, two = leaves(expected), leaves(found)
    paths = sorted(one.keys() ^ two.keys())
    for path in one.keys() & two.keys():
        a, b = one[path], two[path]
        if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.is_floating_point():
            a, b = a.cpu().double(), b.cpu().double()
            known = a.isfinite() & b.isfinite()
            scale = max(float(a[known].abs().max()), 1.0) if known.any() else 1.0
            close = bool((a[known] - b[known]).abs().le(tolerance * scale).all())
            if not close or not torch.equal(a[~known], b[~known]):
                paths.append(path)
        elif bits(a) != bits(b):
            paths.append(path)
    return paths


def surface(module: nn.Module) -> dict[str, Any]:
    """Return everything of a module but its values: keys, parts, hooks, attributes, modes, who needs gradients."""
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
