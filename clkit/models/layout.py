"""The memory layout ``channels_last``, and the networks for which it is not safe."""

from __future__ import annotations

import torch
from torch import nn

from clkit.errors import ConfigurationError

__all__ = ["refuse_unsafe_layout", "to_channels_last"]

# Backward of such a layer on the CPU writes past its workspace (oneDNN issue 6035) with fewer channels than a vector of
# the processor holds, 8 with AVX2 and 16 with AVX-512.
_VECTOR = 16


def to_channels_last(network: nn.Module) -> None:
    """Put the weights of all 2-d convolutions into the layout ``channels_last``.

    Args:
        network: Any network; layers that have no such layout stay as they are.

    Raises:
        ConfigurationError: If a layer is not safe in that layout, see :func:`refuse_unsafe_layout`.
    """
    _refuse(network)
    for layer in _convolutions(network):
        layer.to(memory_format=torch.channels_last)


def refuse_unsafe_layout(network: nn.Module) -> None:
    """Refuses a network in ``channels_last`` that would overwrite memory when it trains on a CPU.

    Args:
        network: Any network.

    Raises:
        ConfigurationError: Naming the first strided 1 x 1 convolution with fewer than 16 input channels, if any
            convolution of the network has its weights in ``channels_last``.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 1, stride=2))
        >>> refuse_unsafe_layout(network)
        >>> refuse_unsafe_layout(network.to(memory_format=torch.channels_last))
        Traceback (most recent call last):
        clkit.errors.ConfigurationError: channels_last is not safe on a CPU for the layer '1', a 1 x 1 convolution ...
    """
    if any(_is_channels_last(layer.weight) for layer in _convolutions(network)):
        _refuse(network)


def _refuse(network: nn.Module) -> None:
    for name, layer in network.named_modules():
        if (
            isinstance(layer, nn.Conv2d)
            and set(layer.kernel_size) == {1}
            and max(layer.stride) > 1
            and layer.in_channels // layer.groups < _VECTOR
        ):
            raise ConfigurationError(
                f"channels_last is not safe on a CPU for the layer {name!r}, a 1 x 1 convolution of stride "
                f"{layer.stride} with {layer.in_channels} input channels: its backward pass overwrites memory (oneDNN "
                f"issue 6035). Use {_VECTOR} channels or more there, or leave channels_last out"
            )


def _convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]


def _is_channels_last(weight: torch.Tensor) -> bool:
    """Whether the layout is that one and no other; a 1 x 1 kernel is in both."""
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
