"""What a warm-up may train, how the rest of the module is held still meanwhile, and what a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Literal, get_args
from zlib import crc32

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from clkit.errors import ConfigurationError, StateError, TapError
from clkit.features.tap import FeatureTap
from clkit.methods._checks import check_count
from clkit.schema import FLOATS, Instance, Numbers, OneOf, Table, Whole, read_state
from clkit.surgery.low_rank import LowRank, low_rank_layers
from clkit.surgery.parts import last_block, norm_parameters, norms_within, running_norms

__all__ = ["FirstSession", "Trains"]

Trains = Literal["all", "norms", "last_block", "lora"]

_OWNER = "GradientFreeStrategy: first_session"
_TABLE: Table = {"warmup": OneOf(get_args(Trains)), "lora_rank": Whole(1), "values": Instance(dict | None)}
_ADVICE = "choose another, or warmup='all' with requires_grad_(False) on what is to stay as it is"
_NONE = {
    "norms": "has no normalisation layer with a scale or a shift that trains",
    "last_block": "has no blocks of which one is the last and trains: timm does not name them, and no nn.Sequential or "
    "nn.ModuleList holds two or more layers of one class that are made of others",
    "lora": "has no linear or convolutional layer that trains and whose weight has more numbers than a pair of rank {}",
}


class FirstSession:
    """Confines a warm-up to a part of the network, and leaves the module as it was but for the values of that part.

    From :meth:`begin` to :meth:`end` these train, as far as the user has not frozen them: the part, the classifier, and
    what of the module lies outside of its network (a timm network; else the module itself is taken for it). All else
    has no gradients, and layers with running statistics keep these, in evaluation mode, unless they belong to the part.

    Args:
        trains: The part; with ``"all"`` nothing is changed.
        rank: Of the low-rank changes of ``"lora"``, at least 1.
    """

    def __init__(self, trains: Trains, rank: int) -> None:
        self.trains = trains
        self._rank = check_count("lora_rank", rank)
        self._change = LowRank(f"GradientFreeStrategy(warmup={trains!r})", rank)
        self._module: pl.LightningModule | None = None  # while training is confined
        self._network: nn.Module | None = None  # of it
        self._part: list[nn.Parameter] = []
        self._frozen: list[nn.Parameter] = []  # which had gradients before
        self._moving: set[str] = set()  # paths of layers whose running statistics move
        self._still: list[nn.Module] = []  # the other layers that have some
        self._training: list[nn.Module] = []  # those of them that were in training mode before
        self._loaded: dict[str, Tensor] | None = None  # what a checkpoint says of the low-rank changes
        self._merged = False  # whether it says that they are in the weights, and no step was taken since
        self._cut: dict[str, Tensor] = {}  # the values of a fit that ended in its warm-up
        self._left: dict[str, int] = {}  # checksums of the weights that it left

    # ---- the time of the warm-up

    def begin(self, module: pl.LightningModule) -> None:
        """Confine training to the part, before optimizers and wrappers look for what trains.

        Raises:
            ConfigurationError: If the network has no such part that trains, or another change holds a layer of it.
        """
        loaded, self._loaded, self._cut, self._left = self._loaded, None, {}, {}
        if self.trains == "all":
            return
        self._merged = loaded == {}
        network, heads = _network_of(module, self.trains)
        own = {id(parameter) for head in heads for parameter in head.parameters()}
        if self.trains == "lora":
            paths = self._low_rank_paths(module, network, heads)
            part, moving = set[int](), set[str]()
        else:
            names = norm_parameters(network) if self.trains == "norms" else last_block(network)
            found = [(name, network.get_parameter(name)) for name in names]
            part = {id(parameter) for _, parameter in found if parameter.requires_grad} - own
            paths = [name for name, parameter in found if id(parameter) in part]
            moving = set(running_norms(network))
            if self.trains == "last_block" and names:
                moving = {path for path in norms_within(network, names) if not _is_frozen(network.get_submodule(path))}
        if not paths:
            raise ConfigurationError(
                f"warmup={self.trains!r}: {type(network).__name__} {_NONE[self.trains].format(self._rank)}; {_ADVICE}"
            )
        if self.trains == "lora":
            if loaded:
                self._change.restore(module, loaded)
            else:
                self._change.apply(module, paths)
            part = {id(parameter) for parameter in self._change.parameters(module)}
        self._module, self._network, self._moving = module, network, moving
        inside = [p for p in network.parameters() if p.requires_grad and id(p) not in own]
        self._part = [parameter for parameter in inside if id(parameter) in part]
        self._frozen = [parameter for parameter in inside if id(parameter) not in part]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def settle(self) -> None:
        """Find what is to be held still, once wrappers have put layers into the network and optimizers are built.

        Pairs that a checkpoint says are merged go: they stood for the optimizers, which take up its states.
        """
        if self._module is None or self._network is None:
            return
        if self._merged:
            self._change.undo(self._module)
        self._still = [norm for path, norm in running_norms(self._network).items() if path not in self._moving]
        self._training = [norm for norm in self._still if norm.training]
        for norm in self._training:
            norm.training = False

    def hold_still(self) -> None:
        """Keep running statistics outside of the part, whatever was put into training mode; call it before a step."""
        self._merged = False
        for norm in self._still:
            if norm.training:
                norm.training = False

    def check_still(self) -> None:
        """Say by name that a step itself has put layers into training mode that were to keep their statistics.

        Raises:
            ConfigurationError: If it has.
        """
        if any(norm.training for norm in self._still):
            raise ConfigurationError(
                f"warmup={self.trains!r} keeps running statistics of layers that do not train, and training_step() has "
                "put them into training mode; call train() before the step (on_train_epoch_start), or use warmup='all'"
            )

    def end(self, *, cut: bool = False) -> None:
        """Give the module its gradients, modes and layers back; what was learned is in its weights.

        Args:
            cut: Whether the warm-up is not over, and may go on from a checkpoint that is yet to be written.
        """
        module, self._module = self._module, None
        self._loaded = None
        if module is None:
            return
        if cut and not self._merged:
            self._cut = {name: value.cpu() for name, value in self._change.values(module).items()}
        (self._change.undo if self._merged else self._change.merge)(module)
        self._left = _checksums(module, self._cut)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for norm in self._training:
            norm.training = True
        self._part, self._frozen, self._still, self._training, self._network = [], [], [], [], None

    def check_optimizers(self, module: pl.LightningModule, known: Collection[int]) -> None:
        """Refuse optimizers that train nothing, or nothing of the part.

        Args:
            module: The user's module.
            known: The ids of the tensors that they have.

        Raises:
            ConfigurationError: If they do.
        """
        name = type(module).__name__
        if not any(parameter.requires_grad for parameter in module.parameters() if id(parameter) in known):
            raise ConfigurationError(
                f"a warm-up trains by gradient, and every tensor of the optimizers of {name} is frozen "
                "(requires_grad=False); give configure_optimizers() some that train, or leave warmup_epochs out"
            )
        left_out = [parameter for parameter in self._part if id(parameter) not in known]
        if not left_out:
            return
        advice = "give its optimizers what self.parameters() gives when it is called"
        if len(left_out) == len(self._part):
            raise ConfigurationError(
                f"configure_optimizers() of {name} leaves out all {len(left_out)} tensors that warmup={self.trains!r} "
                f"trains beside the classifier; {advice}"
            )
        rank_zero_info(
            f"clkit: configure_optimizers() of {name} leaves out {len(left_out)} of {len(self._part)} tensors that "
            f"warmup={self.trains!r} would train; they stay as they are. To train all, {advice}"
        )

    # ---- state

    def plain_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return the module's own state: the weights as its forward sees them, by the names that they always have."""
        return state if self._module is None else self._change.plain_state(self._module, state)

    def state(self, module: pl.LightningModule) -> dict[str, Any]:
        """Return the part, and while it is not merged all of the low-rank change, as tensors and plain values.

        After a fit that ended in its warm-up the values are ``None`` where ``module`` has other weights than it left.
        """
        values: dict[str, Tensor] | None = self._cut
        if self._module is not None and not self._merged:
            values = self._change.values(self._module)
        elif self._left != _checksums(module, self._cut):
            values = None
            rank_zero_warn(
                f"warmup={self.trains!r}: weights were changed since the fit ended in its warm-up, and the low-rank "
                "changes that it trained are no part of them any more: a fit that goes on from the file begins new ones"
            )
        return {"warmup": self.trains, "lora_rank": self._rank, "values": values}

    def load(self, state: Any, module: pl.LightningModule) -> None:
        """Take up a saved state at the next :meth:`begin`; ``None`` where everything was trained.

        Raises:
            StateError: If it does not fit the module or the settings; nothing is changed then.
        """
        saved: dict[str, Any] = {"warmup": "all", "values": {}}
        if state is not None:
            saved = read_state(state, _TABLE, _OWNER)
        if saved["warmup"] != self.trains or (self.trains == "lora" and saved["lora_rank"] != self._rank):
            asked, was = (f"warmup={each!r}" for each in (self.trains, saved["warmup"]))
            if self.trains == saved["warmup"]:
                asked, was = (f"lora_rank={each}" for each in (self._rank, saved["lora_rank"]))
            raise StateError(f"the saved run has {was}, and this one {asked}; go on with the settings of the saved run")
        if saved["values"]:
            network, heads = _network_of(module, self.trains)
            table: dict[str, Numbers] = {}
            for path in self._low_rank_paths(module, network, heads) if self.trains == "lora" else ():
                weight = module.get_parameter(f"{path}.weight")
                shapes = {"weight": weight.shape, "down": (self._rank, weight[0].numel())}
                shapes["up"] = (len(weight), self._rank)
                for name, shape in shapes.items():
                    table[f"{path}.{name}"] = Numbers(tuple(shape), FLOATS, any_value=True)  # a run may diverge
            read_state(saved["values"], table, f"{_OWNER}: values")
        self._loaded = saved["values"]

    def _low_rank_paths(self, module: nn.Module, network: nn.Module, heads: Collection[nn.Module]) -> list[str]:
        inside = {id(layer) for layer in network.modules()}
        found = low_rank_layers(module, self._rank, without=heads)
        return [path for path in found if id(module.get_submodule(path)) in inside]


def _is_frozen(layer: nn.Module) -> bool:
    tensors = list(layer.parameters())
    return bool(tensors) and not any(tensor.requires_grad for tensor in tensors)


def _checksums(module: nn.Module, values: Iterable[str]) -> dict[str, int]:
    """Return checksums of the weights that a module has now and values of a low-rank change belong to."""
    own = dict(module.named_parameters())
    weights = {name: own[name].detach().cpu().contiguous() for name in values if name in own}
    return {name: crc32(weight.view(torch.uint8).numpy().tobytes()) for name, weight in weights.items()}


def _network_of(module: pl.LightningModule, trains: str) -> tuple[nn.Module, list[nn.Module]]:
    """Return the network inside a module, and the layers that classify."""
    try:
        with FeatureTap(module) as tap:
            network = getattr(tap.network, "_orig_mod", tap.network)
            return network, [layer for branch in tap.branches for layer in branch]
    except TapError as error:
        raise ConfigurationError(
            f"warmup={trains!r} trains a part of the network of {type(module).__name__}, which was not found: {error}. "
            f"Else {_ADVICE}"
        ) from error
