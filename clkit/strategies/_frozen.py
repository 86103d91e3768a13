"""The user's module as a strategy that does not train it leaves it: without gradients, in evaluation mode."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from clkit.distributed import broadcast
from clkit.features.tap import FeatureTap

__all__ = ["Frozen", "runnable"]


class Frozen:
    """Freezes a module until :meth:`thaw`, and has Lightning run the steps of its fit.

    Args:
        module: The module.
        shared: Whether several processes have it: all get the weights and buffers of the first, for no wrapper sees to
            that any more.
    """

    def __init__(self, module: pl.LightningModule, *, shared: bool) -> None:
        self._module, self._automatic = module, module.automatic_optimization
        if shared:
            broadcast([*module.parameters(), *module.buffers()], "the network's weights")
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._modes = [(part, part.training) for part in module.modules()]
        for parameter in module.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        module.eval()
        module.automatic_optimization = True

    def hold_still(self) -> None:
        """Keep evaluation mode, whatever the user's hooks have put into training mode; call it before a step."""
        for part, _ in self._modes:
            if part.training:
                part.training = False

    def thaw(self) -> None:
        """Give the module its gradients, modes and way of optimising back."""
        for parameter in self._parameters:
            parameter.requires_grad_(True)
        for part, training in self._modes:
            part.training = training
        self._module.automatic_optimization = self._automatic


def runnable(module: pl.LightningModule) -> nn.Module:
    """Return what runs a batch: the module, or the network inside one that has no forward of its own."""
    if type(module).forward is not pl.LightningModule.forward:
        return module
    with FeatureTap(module) as tap:
        return tap.network
