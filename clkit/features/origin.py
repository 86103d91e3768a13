"""Whose features a forward gives: those of the batch's own input, or of noise, a mix or another view of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clkit.features.batch import tensors_in
from clkit.features.tap import FeatureTap

__all__ = ["InputWatch"]


class InputWatch:
    """Tells whether the forward on its way was given the batch's own input, by hooks that only look.

    The outermost call counts: a network may do with its input what it likes. Own is a tensor of the batch, a view of
    all of it, and what a part beside the tapped one makes of nothing but these (an encoder before a classifier).
    Whoever hears the features of the forward reads :attr:`own` and sets it back.

    Attributes:
        own: Whether the forward on its way is the batch's own.
        shape: Shape of what the outermost call of the last such forward returned; ``None`` for no tensor.
    """

    def __init__(self) -> None:
        self.own = False
        self.shape: tuple[int, ...] | None = None
        self._followed: list[int] = []
        self._hooks: list[Any] = []
        self._inputs: list[tuple[Tensor, int]] = []  # with the version that each had when the batch began
        self._targets: Tensor | None = None
        self._depth = 0  # of the outermost call that was given an own input

    def __reduce__(self) -> tuple[type[InputWatch], tuple[()]]:
        return (InputWatch, ())  # in a copy of the network, which gets the hooks too, it sees nothing

    def follow(self, module: nn.Module, tap: FeatureTap) -> None:
        """Look at what the modules around the tapped layers are given; again after the tap has found others.

        The hooks come after those of the tap, which hears of a forward before its outermost call has ended.
        """
        path = _path(module, tap.layers)
        followed = [id(each) for each in (tap.layers, *path)]
        if followed == self._followed:
            return
        self.close()
        self._followed = followed
        for depth, part in enumerate(path):
            self._hooks.append(part.register_forward_pre_hook(partial(self._enter, depth), with_kwargs=True))
            if part not in tap.layers:
                self._hooks.append(part.register_forward_hook(partial(self._leave, depth)))
        for part in _beside(module, tap.layers):
            self._hooks.append(part.register_forward_hook(self._leave_beside, with_kwargs=True))

    def close(self) -> None:
        """Take every hook off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._followed = [], []
        self.end()

    def begin(self, inputs: Any, targets: Tensor | None) -> None:
        """Look for a batch with these inputs."""
        self._inputs, self._targets, self.own, self.shape = [], targets, False, None
        self._add(inputs)

    def end(self) -> None:
        """Let go of the batch."""
        self._inputs, self._targets, self.own = [], None, False

    def _add(self, inputs: Any) -> None:
        # how often a tensor was written to; those of an inference do not count
        self._inputs += [(each, 0 if each.is_inference() else each._version) for each in tensors_in(inputs)]

    # ---- hooks; in compiled code nothing may depend on the batch, so what is inside of it is not looked at

    def _enter(self, depth: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._inputs or FeatureTap.extracting or torch.compiler.is_compiling():
            return
        if self.own and depth > self._depth:  # what an own call does inside is its own
            return
        if depth == 0 and "forward" in vars(module) and any(leaf is self._targets for leaf in tensors_in(args)):
            return  # a step that DDP runs as the module's forward: it is given the batch, not an input
        if self._is_own((args, kwargs)):
            self.own, self._depth = True, depth
        elif depth <= self._depth:  # called anew, with something else
            self.own = False

    def _leave(self, depth: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if depth == self._depth and not FeatureTap.extracting and not torch.compiler.is_compiling():
            self.own = False  # it has been heard of by now, or gives no features
            self.shape = tuple(output.shape) if isinstance(output, Tensor) else None

    def _leave_beside(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        waits = bool(self._inputs) and not FeatureTap.extracting and not torch.compiler.is_compiling()
        if waits and self._is_own((args, kwargs)):
            self._add(output)

    def _is_own(self, given: Any) -> bool:
        """Whether a call was given something of the batch, and no floating-point tensor that is not of it."""
        found = False
        for each in tensors_in(given):
            for own, version in self._inputs:
                alike = each is own or (
                    each.numel() == own.numel() > 0
                    and (each.dtype, each.device) == (own.dtype, own.device)
                    and each.layout == own.layout == torch.strided
                    and each.data_ptr() == own.data_ptr()
                )  # views of all of one tensor are that tensor
                if alike and version == (0 if each.is_inference() else each._version):
                    found = True
                    break
            else:
                if each.is_floating_point():
                    return False
        return found


def _path(module: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the modules around some layers and the layers, outermost first; nothing inside of a compiled one."""
    path: dict[nn.Module, None] = {module: None}
    for layer in layers:
        name = next(name for name, other in module.named_modules() if other is layer)
        part = module
        for step in name.split(".") if name else ():
            if hasattr(part, "_orig_mod"):
                break
            part = part.get_submodule(step)
            path[part] = None
    return list(path)


def _beside(module: nn.Module, layers: list[nn.Module]) -> list[nn.Module]:
    """Return the children with weights that do not hold any of the layers."""
    return [
        child
        for child in module.children()
        if any(True for _ in child.parameters()) and not any(part in layers for part in child.modules())
    ]
