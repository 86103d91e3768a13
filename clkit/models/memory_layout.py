"""How the weights of convolutions lie in memory, and which layers may not have them in ``channels_last``."""

from __future__ import annotations

import torch
from torch import nn

from clkit.errors import ConfigurationError

__all__ = ["refuse_unsafe_layout", "to_channels_last"]

# Backward of a strided 1 x 1 convolution on the CPU writes past its workspace (oneDNN issue 6035) with fewer channels
# than a vector of the processor holds, 8 with AVX2 and 16 with AVX-512.
_NARROWEST = 16


def to_channels_last(network: nn.Module) -> None:
    """Keep the weights of convolutions in ``channels_last``.

    Raises:
        ConfigurationError: As :func:`refuse_unsafe_layout`.
    """
    _refuse_narrow(network)
    for layer in _convolutions(network).values():
        layer.to(memory_format=torch.channels_last)


def refuse_unsafe_layout(network: nn.Module) -> None:
    """Refuse a network in ``channels_last`` that would overwrite memory when it trains on a CPU.

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
    weights = [layer.weight for layer in _convolutions(network).values()]  # a 1 x 1 kernel is in both layouts
    if any(w.is_contiguous(memory_format=torch.channels_last) and not w.is_contiguous() for w in weights):
        _refuse_narrow(network)


def _refuse_narrow(network: nn.Module) -> None:
    for name, layer in _convolutions(network).items():
        narrow = layer.in_channels // layer.groups < _NARROWEST
        if narrow and set(layer.kernel_size) == {1} and max(layer.stride) > 1:
            raise ConfigurationError(
                f"channels_last is not safe on a CPU for the layer {name!r}, a 1 x 1 convolution of stride "
                f"{layer.stride} with {layer.in_channels} input channels: its backward pass overwrites memory (oneDNN "
                f"issue 6035). Use {_NARROWEST} channels or more there, or leave channels_last out"
            )


def _convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)}
