"""A masked network in the forms that torch itself has for zeros among weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from clkit.errors import ConfigurationError
from clkit.methods._checks import check_choice

__all__ = ["MaskForm", "crowded_groups", "in_form", "refuse_other_tensors"]

MaskForm = Literal["dense", "prune", "fake_sparsity", "semi_structured"]

# rows and columns of a weight must be multiples of these (CUTLASS, the stricter of torch's two libraries)
_MULTIPLES = {torch.float16: (32, 64), torch.bfloat16: (32, 64), torch.float32: (32, 32)}
_GROUP = {torch.float32: (2, 1)}  # at most one of each two; of other dtypes two of each four


def in_form(module: nn.Module, masks: Mapping[str, Tensor], form: MaskForm) -> dict[str, str]:
    """Give the masked layers of a module, which holds the weights with their zeros, another form.

    Args:
        module: The module; its layers are changed.
        masks: Bool masks by the name of a weight.
        form: See :meth:`clkit.callbacks.DST.load_into`.

    Returns:
        Why, by the name of a layer that could not take it and stays dense, it could not.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> in_form(layer, {"weight": torch.tensor([[True, False]])}, "prune")
        {}
        >>> sorted(name for name, _ in layer.named_parameters())
        ['bias', 'weight_orig']
    """
    check_choice("form", form, get_args(MaskForm))
    refused: dict[str, str] = {}
    for name, mask in masks.items():
        path = name.removesuffix("weight").removesuffix(".")
        layer: Any = module.get_submodule(path)
        own = mask.to(layer.weight.device)
        if form == "prune":
            prune.custom_from_mask(layer, "weight", own)  # type: ignore[no-untyped-call]  # torch: no types
        elif form == "fake_sparsity":
            from torch.ao import pruning  # takes a second to import

            fake: Any = pruning
            parametrize.register_parametrization(layer, "weight", fake.FakeSparsity(own))
        elif form == "semi_structured":
            why = _why_not(layer)
            if why:
                refused[path] = why
            else:
                layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    return refused


def crowded_groups(weight: Tensor, size: int = 4, most: int = 2) -> int:
    """Return how many groups of ``size`` neighbours along the last dimension have more than ``most`` nonzeros.

    Example:
        >>> crowded_groups(torch.tensor([[1.0, 2.0, 0.0, 0.0, 3.0, 4.0, 5.0, 0.0]]))
        1
    """
    return int((weight.reshape(-1, size).count_nonzero(dim=1) > most).sum())


def refuse_other_tensors(module: nn.Module, weights: Mapping[str, Tensor], owner: str) -> None:
    """Refuse a module that is to be given weights and has others: torch would write those that fit, and then raise.

    Raises:
        ConfigurationError: Naming the first that differ.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items() if isinstance(tensor, Tensor)}
    new = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    odd = [name for name in {**new, **own} if own.get(name) != new.get(name)]
    if odd:
        raise ConfigurationError(
            f"{owner}: a {type(module).__name__} is to take the weights of a task, and differs in {len(odd)} tensors: "
            f"{odd[0]!r}: {own.get(odd[0], 'none')} there, {new.get(odd[0], 'none')} in the task; give a new "
            "module of the class that was trained, made with the same arguments"
        )


def _why_not(layer: nn.Module) -> str:
    """Return why a layer cannot be converted to torch's semi-structured form, if it cannot."""
    weight = getattr(layer, "weight", None)
    if type(layer) is not nn.Linear or weight is None:
        return f"it is a {type(layer).__name__}, and linear layers alone can be"
    if weight.dtype not in _MULTIPLES:
        return f"its weights are {weight.dtype}"
    multiples = _MULTIPLES[weight.dtype]
    if any(size % of for size, of in zip(weight.shape, multiples, strict=True)):
        return f"its shape {tuple(weight.shape)} is no multiple of {multiples}"
    size, most = _GROUP.get(weight.dtype, (4, 2))
    if crowded := crowded_groups(weight.detach(), size, most):
        advice = "train with pattern='2:4'" + ", and load it into module.half()" * (size == 2)
        return f"{crowded} groups of {size} neighbours have more than {most} weights of {weight.dtype}; {advice}"
    if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < (8, 0):
        return f"{weight.device} is no GPU of compute capability 8.0 or newer"
    return ""
