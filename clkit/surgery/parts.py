"""Parts of a network that a training may be confined to: its normalisation layers, its last block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["last_block", "norm_parameters", "norms_within", "running_norms"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)
_ROWS = (nn.Sequential, nn.ModuleList)
_UNMATCHED = "\0"  # a name that no rule of timm matches, like those of classifiers


def norm_parameters(network: nn.Module) -> list[str]:
    """Return the names of what normalisation layers learn: scales and shifts.

    These are torch's layers and what derives from them, and the vectors of any other layer in whose class name stands
    "norm" (``RmsNorm`` of timm, ``LlamaRMSNorm``).

    Example:
        >>> norm_parameters(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.BatchNorm1d(3, affine=False)))
        ['1.weight', '1.bias']
    """
    return [
        f"{path}.{name}" if path else name
        for path, layer in network.named_modules()
        for name, parameter in layer.named_parameters(recurse=False)
        if isinstance(layer, _NORMS) or ("norm" in type(layer).__name__.lower() and parameter.ndim == 1)
    ]


def running_norms(network: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that keep running statistics, by path.

    Example:
        >>> list(running_norms(nn.Sequential(nn.BatchNorm1d(3), nn.InstanceNorm1d(3), nn.LayerNorm(3))))
        ['0']
    """
    norms = {path: layer for path, layer in network.named_modules() if isinstance(layer, _NormBase)}
    return {path: layer for path, layer in norms.items() if layer.track_running_stats}


def last_block(network: nn.Module) -> list[str]:
    """Return the names of the parameters of a network's last block and of all that is defined behind it.

    In a timm network the blocks are those of its ``group_matcher``, by which timm itself gives layers their own
    learning rates; they begin with their first tensor. In another network they are the elements of the last
    ``nn.Sequential`` or ``nn.ModuleList`` that has two or more of one class with layers of their own; where the last
    of them is such a row itself, the last block is inside it.

    Returns:
        The names, the classifier's among them; none where there are no blocks.

    Example:
        >>> block = lambda: nn.TransformerEncoderLayer(4, 2, 8)
        >>> network = nn.ModuleDict({"blocks": nn.Sequential(block(), block()), "head": nn.Linear(4, 2)})
        >>> names = last_block(network)
        >>> names[0], names[-1]
        ('blocks.1.self_attn.in_proj_weight', 'head.bias')
    """
    names = [name for name, _ in network.named_parameters()]
    matcher: Any = getattr(network, "group_matcher", None)
    if matcher is not None:
        inside = _last_group(names, matcher())
    else:
        path = _last_in_row(network)
        inside = [name for name in names if path and name.startswith(f"{path}.")]
    if not inside:
        return []
    return names[names.index(inside[0]) :]


def norms_within(network: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the paths of the layers that keep running statistics in the last block and behind it.

    Args:
        network: The network.
        names: What :func:`last_block` says of it, at least one name.

    Example:
        >>> block = lambda: nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 4))
        >>> network = nn.Sequential(block(), block(), nn.BatchNorm1d(4, affine=False))
        >>> norms_within(network, last_block(network))
        ['1.0', '2']
    """
    order = [path for path, _ in network.named_modules()]
    start, inside, found = order.index(names[0].rpartition(".")[0]), set(names), []
    for path in running_norms(network):
        around = path  # one that learns nothing lies where the tensors around it do
        while around and next(network.get_submodule(around).parameters(), None) is None:
            around = around.rpartition(".")[0]
        own = {f"{around}.{name}" for name, _ in network.get_submodule(around).named_parameters()}
        if order.index(path) > start or own <= inside:
            found.append(path)
    return found


def _last_group(names: list[str], matcher: Any) -> list[str]:
    """Return those names that timm puts into the last group of blocks, in order."""
    from timm.models import group_parameters  # where there is a timm network, timm is loaded

    probe: Any = SimpleNamespace(named_parameters=lambda: ((name, name) for name in (*names, _UNMATCHED)))
    groups: dict[int, list[str]] = group_parameters(probe, matcher)
    matched = [group for group in groups.values() if _UNMATCHED not in group]
    return matched[-1] if len(matched) > 1 else []


def _last_in_row(network: nn.Module) -> str | None:
    """Return the path of the last block of the last row of equal blocks."""
    rows = list(_rows(network, ""))
    if not rows:
        return None
    path = rows[-1]
    row = network.get_submodule(path)
    common = Counter(type(each) for each in row.children() if _is_block(each)).most_common(1)[0][0]
    last = [name for name, each in row.named_children() if type(each) is common][-1]
    path = f"{path}.{last}" if path else last
    block = network.get_submodule(path)
    inside = _last_in_row(block) if next(_rows(block, ""), None) == "" else None
    return path if inside is None else f"{path}.{inside}"


def _rows(network: nn.Module, path: str) -> Iterator[str]:
    """Yield the paths of the outermost rows, in order of definition."""
    if isinstance(network, _ROWS):
        kinds = Counter(type(each) for each in network.children() if _is_block(each))
        if kinds and max(kinds.values()) > 1:
            yield path
            return
    for name, child in network.named_children():
        yield from _rows(child, f"{path}.{name}" if path else name)


def _is_block(module: nn.Module) -> bool:
    return next(module.children(), None) is not None and next(module.parameters(), None) is not None
