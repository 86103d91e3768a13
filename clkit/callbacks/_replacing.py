"""Another model in the place of the one that was trained so far, also of another architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn

from clkit.arguments import in_short
from clkit.errors import ArgumentError, ConfigurationError, SignatureError
from clkit.features.tap import FeatureTap, path_of, put_at
from clkit.files import read_checkpoint
from clkit.methods.simplex import ClassAllocator
from clkit.schema import saved_entry
from clkit.stream._lightning import callbacks_of, loaded_checkpoint
from clkit.stream.boundaries import backbone_changed
from clkit.surgery.change import changes_of
from clkit.surgery.fixed_classifier import SimplexPlace, simplex_classifier_of

__all__ = ["Replacing"]


class Replacing:
    """The models that take the place of the one before, by the experience that starts with them.

    Args:
        owner: Whose they are, for messages and in checkpoints.
        models: Paths, networks, or functions that return one.

    Attributes:
        last: The experience whose model was put in last.

    Raises:
        ArgumentError: If one is neither of these, or for no experience.
    """

    def __init__(self, owner: str, models: Mapping[int, Any]) -> None:
        for index, model in models.items():
            if not isinstance(index, int) or isinstance(index, bool) or index < 0 or not _is_model(model):
                raise ArgumentError(
                    f"replacements must give a path, a network or a function that returns one for the index of an "
                    f"experience (from 0), got {type(model).__name__} for {index!r}"
                )
        self.owner = owner
        self.models = dict(models)
        self.last: int | None = None
        self._hook: Any = None

    def listen(self, trainer: pl.Trainer, module: pl.LightningModule, placed: Callable[[], Any]) -> None:
        """Have the module the architecture of a checkpoint before its weights are loaded."""

        def before_load(*_: Any) -> None:
            state = (loaded_checkpoint(trainer) or {}).get("callbacks", {}).get(self.owner)
            saved = None if state is None else saved_entry(state, "replaced", object, self.owner)
            if saved is not None and saved != self.last and not isinstance(self.models.get(saved), str | Path):
                if saved not in self.models:
                    raise ConfigurationError(
                        f"the model of the checkpoint took the place of another at experience {saved}; give "
                        f"{self.owner} the same replacements as the saved run"
                    )
                self.last = saved
                self._put_network(module, self.models[saved])
                placed()

        self._hook = module.register_load_state_dict_pre_hook(before_load)  # type: ignore[no-untyped-call]  # torch: no types

    def close(self) -> None:
        """Take the hook off."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def look(self, first: int) -> None:
        """Refuse files that are not there, of this experience and those after it."""
        for index, model in sorted(self.models.items()):
            if index >= first and index != self.last and isinstance(model, str | Path) and not Path(model).is_file():
                raise ArgumentError(
                    f"replacements[{index}]={str(model)!r} is not a file; give the path of a checkpoint, which must be "
                    "there when the run begins"
                )

    def put(self, trainer: pl.Trainer, model: Any, allocator: ClassAllocator, side: Literal["low", "high"]) -> None:
        """Put a model in the place of the network; :meth:`tell` must follow."""
        module: pl.LightningModule | None = trainer.lightning_module
        if not _is_model(model):
            raise ArgumentError(
                f"network must be a path, a network or a function that returns one, got {in_short(model)}"
            )
        if module is None:
            raise ConfigurationError(
                f"{self.owner}: the trainer has no module yet whose network could be replaced; give the trainer of the "
                "last fit, or the model that comes first as replacements={0: ...}"
            )
        if isinstance(model, str | Path):
            checkpoint = read_checkpoint(model)
            self._check_weights(module, checkpoint, model)
            self._take_allocation(checkpoint, allocator, side)
            module.load_state_dict(checkpoint["state_dict"])
        else:
            if trainer.world_size > 1:
                raise ConfigurationError(
                    f"{self.owner}: another network cannot take the place of this one while several processes train "
                    "it; replace it between two fits, or give the path of a checkpoint of the same architecture"
                )
            self._put_network(module, model)

    def tell(self, trainer: pl.Trainer) -> None:
        """Have all parts of a run go on with the network that is there now."""
        for callback in callbacks_of(trainer):
            if hasattr(callback, "refresh"):
                callback.refresh(trainer)
        if trainer.training:
            trainer.strategy.setup_optimizers(trainer)  # what they remember is of other weights
        backbone_changed(trainer, "another model takes its place")

    def _check_weights(self, module: pl.LightningModule, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Refuse the weights of another module before anything is changed."""
        state, own = checkpoint.get("callbacks", {}).get(self.owner), simplex_classifier_of(module)
        assert own is not None
        if state is not None and (theirs := saved_entry(state, "signature", str, self.owner)) != own.head.signature():
            raise SignatureError(
                f"{self.owner}: the model in {path} has the vertices {theirs!r}, and the network that it shall replace "
                f"{own.head.signature()!r}: features of one mean nothing to the other"
            )
        weights = checkpoint.get("state_dict")
        given = weights if isinstance(weights, dict) else {}
        found, wanted = ({name: tuple(w.shape) for name, w in each.items()} for each in (given, module.state_dict()))
        if found != wanted:
            wrong = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
            raise ConfigurationError(
                f"{self.owner}: {path} does not hold the weights of the {type(module).__name__} as it is now: "
                f"{wrong[0]!r} is {found.get(wrong[0], 'missing')} there and {wanted.get(wrong[0], 'unknown')} here "
                f"({len(wrong)} differ); for another architecture give a function that builds its network and loads it"
            )

    def _take_allocation(self, checkpoint: dict[str, Any], allocator: ClassAllocator, side: str) -> None:
        """Keep vertices free that the other model's classes have, or refuse it where both use the same."""
        state = checkpoint.get("callbacks", {}).get(self.owner)
        if state is None:
            return
        other = ClassAllocator(allocator.num_vertices)
        other.load_state_dict(saved_entry(state, "allocation", dict, self.owner))
        if saved_entry(state, "side", str, self.owner) == side:
            allocator.join(other)
        else:
            allocator.reserve(other.rows(torch.tensor(other.classes, dtype=torch.int64)))

    def _put_network(self, module: pl.LightningModule, model: Any) -> None:
        network = model if isinstance(model, nn.Module) else model()
        if not isinstance(network, nn.Module):
            raise ConfigurationError(
                f"{self.owner}: the function that shall give the network of a replacement returned "
                f"{in_short(network)}; return the network, a torch.nn.Module"
            )
        new, old = simplex_classifier_of(network), simplex_classifier_of(module)
        assert old is not None
        if new is None:
            raise ConfigurationError(
                f"{self.owner}: the {type(network).__name__} that shall take the network's place has no simplex head; "
                "it must be trained with one: clkit.callbacks.attach_simplex_head(network, num_vertices)"
            )
        old.head.check_compatible(new.head)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ConfigurationError(
                f"{self.owner}: no parameter of the {type(network).__name__} that shall take the network's place "
                "requires a gradient, so nothing could be trained; call requires_grad_(True) on what shall train"
            )
        others = [change for change in changes_of(module) if not isinstance(change, SimplexPlace)]
        if others:
            raise ConfigurationError(
                f"{self.owner}: the network holds the {others[0].noun} of {others[0].owner}, which would be lost with "
                "it; no other architecture can take its place"
            )
        with FeatureTap(module) as tap:
            path = path_of(module, tap.network)
        if not path:
            raise ConfigurationError(
                f"{self.owner}: {type(module).__name__} is itself the network, so that nothing of it can be replaced "
                "by another architecture; hold the network in an attribute of the module"
            )
        some = next(module.parameters())
        network.to(some.device, some.dtype).train(module.get_submodule(path).training)
        put_at(module, path, network)


def _is_model(model: Any) -> bool:
    return isinstance(model, str | Path | nn.Module) or callable(model)
