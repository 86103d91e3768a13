"""A file of a network, a head on its features and what the head holds: what ``clkit learn`` writes and others read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import clkit.callbacks
from clkit.callbacks import HeadCallback, Lift
from clkit.data import Preprocessing
from clkit.errors import ArgumentError, ConfigurationError, StateError, did_you_mean, first_line
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap
from clkit.files import plain_values, read_checkpoint, write_checkpoint
from clkit.methods import Holdings
from clkit.methods.heads.base import Head
from clkit.methods.heads.portable import head_of_state
from clkit.models.timm_classifier import TimmClassifier, weights_of_a_run
from clkit.runs.contents import Contents, read_contents
from clkit.runs.heads import HEADS, head_entries
from clkit.schema import LEARNED, saved_entry

__all__ = ["LearnedModel", "NewModel", "head_names"]


@dataclass(frozen=True)
class NewModel:
    """The network and the head that a first file is made of.

    Attributes:
        backbone: Name of a timm model, or ``"identity"`` for features.
        weights: A file of its weights; ``None`` takes those that timm publishes.
        head: ``"lda"``, ``"aef_ocl"``, ``"nmc"`` or the name of another head callback.
        options: Arguments of the callback; a number as ``lift`` is the width of a lift.
        model_kwargs: Further arguments of ``timm.create_model``.
    """

    backbone: str
    weights: str | Path | None = None
    head: str = "lda"
    options: Mapping[str, Any] = field(default_factory=dict)
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)


def head_names() -> dict[str, Callable[..., HeadCallback]]:
    """Return the callbacks of heads that there are, by their names."""
    kinds = [getattr(clkit.callbacks, name) for name in clkit.callbacks.__all__]
    heads: list[Any] = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, HeadCallback)]
    return {kind().name: kind for kind in heads if kind is not HeadCallback}


class LearnedModel:
    """A network, its preprocessing, and a head with the names of its classes and the rows that it holds.

    Attributes:
        module: The network, in evaluation mode.
        preprocessing: From stored images to its inputs.
        names: Of the classes, by id.
        holds: What the head has learned.
        key: Under which the head stands in the file, as that of a callback does.
        layer: Where features are read, see :class:`~clkit.FeatureTap`.
        device: Where the network runs.
    """

    def __init__(
        self, module: TimmClassifier, preprocessing: Preprocessing, key: str, layer: str, device: str = "auto"
    ) -> None:
        self.module, self.preprocessing = module.eval().requires_grad_(False), preprocessing
        self.key, self.layer = key, layer
        self.names: dict[int, str] = {}
        self.holds = Holdings()
        self._head: Head | None = None
        self._make: Callable[[int], Head] | None = None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
            self.module.to(self.device)
        except (RuntimeError, AssertionError) as error:  # torch built without CUDA says it by an assertion
            raise ArgumentError(f"device={device!r}: the network cannot be put there ({first_line(error)})") from error
        self._tap = FeatureTap(module, layer)
        self._run = partial(forward, module, self._tap.network)

    # ---- where one comes from

    @classmethod
    def new(cls, made: NewModel, device: str = "auto") -> LearnedModel:
        """Return one that has learned nothing.

        Raises:
            ArgumentError: If a name or an option is not known.
            ConfigurationError: If timm's weights cannot be fetched.
            StateError: If a file of weights does not fit.
        """
        kinds = head_names()
        if made.head not in kinds:
            hint = did_you_mean(made.head, kinds)
            raise ArgumentError(f"head={made.head!r} is not known; there are {', '.join(sorted(kinds))}{hint}")
        options = dict(made.options)
        if isinstance(options.get("lift"), int):
            options["lift"] = Lift(options["lift"])
        if made.head == "aef_ocl":
            options.setdefault("gamma", "auto")
        try:
            callback = kinds[made.head](**options)
        except TypeError as error:
            raise ArgumentError(f"the options {dict(made.options)} of the head {made.head!r}: {error}") from error
        if options.get("solver") == "recursive":
            raise ArgumentError('the option solver="recursive" keeps no sums, which are what is merged and forgotten')
        identity = made.backbone == "identity"
        weights = None if made.weights is None else Path(made.weights)
        module = TimmClassifier(
            made.backbone,
            pretrained=weights is None and not identity,
            checkpoint_path=None if weights is None else str(weights),
            model_kwargs=dict(made.model_kwargs),
            num_classes=_outputs_of(weights, made),
        )
        config = module.data_config
        preprocessing = Preprocessing() if config is None else Preprocessing.of_timm(config)
        model = cls(module, preprocessing, callback.state_key, callback.layer, device)
        model._make = callback.make_head
        return model

    @classmethod
    def read(cls, path: str | Path, device: str = "auto") -> LearnedModel:
        """Return that of a file.

        Raises:
            ArgumentError: If there is no such file, or ``clkit learn`` has not written it.
            StateError: If it is damaged.
        """
        return cls.of_checkpoint(read_checkpoint(path), path, device)

    @classmethod
    def of_checkpoint(cls, checkpoint: dict[str, Any], path: str | Path, device: str = "auto") -> LearnedModel:
        """Return that of the content of a file; otherwise as :meth:`read`."""
        if LEARNED not in checkpoint:
            raise ArgumentError(f"{path} was not written by clkit learn, so that it does not say what its head holds")
        contents = read_contents(checkpoint, path)
        settings = contents.settings
        entries = head_entries(checkpoint)
        if len(entries) != 1:
            raise StateError(f"{path} holds {len(entries)} heads, where there must be one; the file is damaged")
        ((key, entry),) = entries.items()
        head = head_of_state(entry["head"], f"{path}: {key}", HEADS)
        weights = saved_entry(checkpoint, "state_dict", dict, str(path))
        try:
            preprocessing = Preprocessing(**settings["preprocessing"])
            module = TimmClassifier(
                settings["backbone"], model_kwargs=settings["model_kwargs"], num_classes=settings["num_classes"]
            )
            module.load_state_dict(weights)
        except (TypeError, RuntimeError, ValueError) as error:  # torch and timm on what does not fit
            raise StateError(f"{path}: the network cannot be built as the file says: {first_line(error)}") from error
        model = cls(module, preprocessing, key, settings["layer"], device)
        if entry.get("tap") != model.point:
            raise StateError(f"{path}: the head reads {entry.get('tap')!r}, the network has {model.point!r}")
        model._head = head.to(model.device)
        model.names, model.holds = contents.names, contents.holds
        return model

    def emptied(self) -> LearnedModel:
        """Let go of all that was learned; network, settings and the ids of classes stay."""
        if self._head is not None:
            self._head.reset()
        self.holds = Holdings()
        return self

    # ---- what it does

    @property
    def point(self) -> str:
        """Where features are read."""
        return self._tap.point

    @property
    def head(self) -> Head:
        """The head.

        Raises:
            ConfigurationError: Before the first features of a new one.
        """
        if self._head is None:
            raise ConfigurationError("nothing was learned yet, so that there is no head")
        return self._head

    @property
    def samples(self) -> int:
        """How many samples the head has learned."""
        return 0 if self._head is None else int(self._head.counts.sum())

    @property
    def learned_classes(self) -> list[int]:
        """Ids of the classes that it has learned."""
        return [] if self._head is None else self._head.classes.tolist()

    def features(self, inputs: Tensor) -> Tensor:
        """Return features (B, D) of inputs, on the device."""
        with torch.inference_mode():
            return self._tap.extract(inputs.to(self.device, non_blocking=True), self._run)

    def learn(self, features: Tensor, targets: Tensor) -> None:
        """Learn a batch; the head is made for the first."""
        if self._head is None:
            assert self._make is not None  # one that was read has its head
            self._head = self._make(features.shape[1]).to(self.device)
        self._head.update(features, targets.to(self.device))

    # ---- the file

    @property
    def settings(self) -> dict[str, Any]:
        """What a part must have in common with others, as plain values; the head's own options are in the head."""
        return {
            "backbone": self.module.backbone,
            "model_kwargs": plain_values(self.module.model_kwargs),
            "num_classes": self.module.num_classes,
            "layer": self.layer,
            "preprocessing": plain_values(asdict(self.preprocessing)),
        }

    def fingerprint(self) -> str:
        """Return ten digits that are those of another file exactly if network, settings and options are."""
        digest = hashlib.blake2b(digest_size=5)
        options = {} if self._head is None else self._head.options
        digest.update(json.dumps([self.settings, self.key, options], sort_keys=True).encode())
        for name, value in self.module.state_dict().items():
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def checkpoint(self) -> dict[str, Any]:
        """Return the content of its file: a checkpoint of Lightning's form, with the head as its callback saves it."""
        entry = {"head": dict(self.head.state_dict()), "in_features": self.head.in_features, "tap": self.point}
        return {
            "pytorch-lightning_version": importlib.metadata.version("lightning"),
            "epoch": 0,
            "global_step": 0,
            "state_dict": {name: value.detach().cpu() for name, value in self.module.state_dict().items()},
            "callbacks": {self.key: {"format": 1, "batches": 0, **entry, "graft": None}},
            LEARNED: Contents(self.settings, self.names, self.holds).state(),
        }

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        write_checkpoint(self.checkpoint(), path)


def _outputs_of(path: Path | None, made: NewModel) -> int | None:
    """Return how many outputs the classifier in a file of weights has, ``None`` where that is as published."""
    if path is None or not path.is_file() or "num_classes" in made.model_kwargs:
        return None
    import timm

    if not timm.is_model(made.backbone.partition(".")[0]):
        return None
    config: Any = timm.get_pretrained_cfg(made.backbone)
    place = getattr(config, "classifier", None)
    name = place if isinstance(place, str) else next(iter(place or ()), None)
    if name is None:
        return None
    try:
        weights: dict[str, Any] = weights_of_a_run(path) or timm.models.load_state_dict(str(path))
    except Exception:  # whatever timm raises for files of other kinds: the network says it better
        return None
    weight = weights.get(f"{name}.weight")
    return 0 if weight is None else len(weight)
