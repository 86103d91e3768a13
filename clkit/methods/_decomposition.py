"""The gradient of a weight as a sum of outer products: the rows that it is made of, read by forward hooks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.errors import ConfigurationError

__all__ = ["Capture", "Rows", "computed_in", "input_rows", "weight_rows"]


class Rows(NamedTuple):
    """What the gradient of a weight is made of: its sum of outer products is ``gradients.T @ inputs``.

    Attributes:
        inputs: u (N, d_in), inputs of the layer, one row a position; of a convolution its patches.
        gradients: delta (N, d_out), the gradient of the loss at the layer's output, at the same positions.
    """

    inputs: Tensor
    gradients: Tensor

    def informative(self) -> Rows:
        """Return the rows in which neither half is zero throughout; the others add nothing to the gradient."""
        kept = self.inputs.any(dim=1) & self.gradients.any(dim=1)
        return Rows(self.inputs[kept], self.gradients[kept])


def computed_in(weight: Tensor) -> torch.dtype:
    """Return the dtype of rows: float32, or float64 for a network in float64."""
    return torch.promote_types(weight.dtype, torch.float32)


def weight_rows(layer: nn.Module, inputs: Tensor, gradients: Tensor) -> Rows:
    """Return the rows of the gradient of a layer's weight, those that are zero left out.

    Args:
        layer: A linear layer, or a 2-D convolution with one group and zero padding.
        inputs: What went in: (…, d_in), or (B, C_in, H, W).
        gradients: Gradient of the loss at what came out.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> inputs, gradients = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [0.0]])
        >>> weight_rows(layer, inputs, gradients)
        Rows(inputs=tensor([[1., 2.]]), gradients=tensor([[1.]]))
    """
    if isinstance(layer, nn.Conv2d):
        gradients = gradients.movedim(-3, -1)
    return Rows(input_rows(layer, inputs), gradients.flatten(0, -2)).informative()


def input_rows(layer: nn.Module, inputs: Tensor) -> Tensor:
    """Return what a layer reads at each position, (N, d_in); of a convolution its patches."""
    return (_patches(layer, inputs) if isinstance(layer, nn.Conv2d) else inputs).flatten(0, -2)


class Capture:
    """Forward hooks that read what weights' gradients are made of, from one forward inside a block.

    Each layer gives its output plus a tensor of zeros, whose gradient is that of the output. So logits stay the same
    bits, no parameter needs a gradient or gets one, and operations that change the output in place do no harm.

    Args:
        layers: Layers by name.

    Example:
        >>> layer = nn.Linear(2, 1).requires_grad_(False)
        >>> with Capture({"one": layer}) as capture:
        ...     loss = layer(torch.tensor([[1.0, 2.0]])).sum()
        >>> capture.rows(loss)
        {'one': Rows(inputs=tensor([[1., 2.]]), gradients=tensor([[1.]]))}
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._layers = layers
        self._inputs: dict[str, Tensor] = {}
        self._zeros: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Capture:
        for name, layer in self._layers.items():
            self._hooks.callback(layer.register_forward_hook(partial(self._hear, name), with_kwargs=True).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def rows(self, loss: Tensor) -> dict[str, Rows]:
        """Return the rows of each layer, detached, in float32 or, of a network in float64, in that.

        Args:
            loss: A scalar that was computed inside the block.

        Raises:
            ConfigurationError: If the forward did not run through a layer, or more than once.
        """
        if missing := [name for name in self._layers if name not in self._zeros]:
            raise ConfigurationError(
                f"the forward did not run through {missing[:5]}, so that their gradients are not known; name other "
                "layers (layers=…)"
            )
        zeros = [self._zeros[name] for name in self._layers]
        found: Iterable[Tensor | None] = [None] * len(zeros)
        if loss.requires_grad:
            found = torch.autograd.grad(loss, zeros, allow_unused=True)
        rows = {}
        for (name, layer), zero, gradient in zip(self._layers.items(), zeros, found, strict=True):
            dtype = computed_in(layer.get_parameter("weight"))
            rows[name] = weight_rows(
                layer, self._inputs[name].to(dtype), (zero if gradient is None else gradient).detach().to(dtype)
            )
        return rows

    def _hear(self, name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        if name in self._zeros:
            raise ConfigurationError(
                f"the forward runs through {name!r} more than once, so that its gradient is no sum over one pass; name "
                "other layers (layers=…)"
            )
        inputs: Tensor = args[0] if args else kwargs["input"]
        zero = torch.zeros_like(output, requires_grad=True)
        # a copy: a residual branch may be added to the layer's input in place
        self._inputs[name], self._zeros[name] = inputs.detach().clone(), zero
        shifted: Tensor = output + zero
        return shifted


def _patches(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what each position of a convolution reads, (B, H_out, W_out, C_in kh kw) or one flat run of positions."""
    before_and_after = _padding(layer)
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and not any(before_and_after):
        return inputs.movedim(-3, -1)
    batch = inputs if inputs.dim() == 4 else inputs[None]
    padded = F.pad(batch, before_and_after)
    return F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride).mT


def _padding(layer: nn.Conv2d) -> list[int]:
    """Return the zeros left, right, above and below, as ``torch.nn.functional.pad`` takes them."""
    if not isinstance(layer.padding, str):
        height, width = layer.padding
        return [width, width, height, height]
    if layer.padding == "valid":
        return [0, 0, 0, 0]
    sides = []
    for kernel, dilation in zip(reversed(layer.kernel_size), reversed(layer.dilation), strict=True):
        both = dilation * (kernel - 1)
        sides += [both // 2, both - both // 2]
    return sides
