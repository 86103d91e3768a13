"""A network with a learned head as its classifier, in a file that needs no clkit."""

from __future__ import annotations

import copy
import functools
import io
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from clkit._version import __version__
from clkit.callbacks import HeadCallback, ungraft
from clkit.data import StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError
from clkit.features.observer import forward
from clkit.features.tap import FeatureTap, Tapped
from clkit.files import atomic_write, check_output, read_checkpoint
from clkit.methods.heads.base import Head
from clkit.methods.heads.readout import NEVER, readout_module
from clkit.methods.nearest_mean import NearestMeanHead
from clkit.models import IdentityBackbone
from clkit.runs.heads import build_head, head_entries, name_of
from clkit.schema import EXPORTED
from clkit.stream._lightning import datamodule_of

__all__ = ["Exported", "export", "export_checkpoint"]

FORMAT = 1


class Exported(NamedTuple):
    """What an exported file holds.

    Attributes:
        network: timm's name of the network, or its class.
        head: Name of the head.
        classes: Number of classes that the head has learned.
        columns: Number of outputs.
        reading: How the file is read.
    """

    network: str
    head: str
    classes: int
    columns: int
    reading: str


def export(
    module: pl.LightningModule,
    head: HeadCallback | Head,
    path: str | Path,
    *,
    layer: str = "auto",
    example: Tensor | None = None,
    model_kwargs: dict[str, Any] | None = None,
    class_names: dict[int, str] | None = None,
    preprocessing: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Writes a module's network with a learned head as its classifier. The module itself is not changed.

    ``path`` says which of two forms:

    * ``.pt``: a dictionary of tensors and plain values, for :func:`torch.load` with ``weights_only=True``.
      ``state_dict`` has the network's own keys, with the head in the place of the classifier, and ``timm`` says how
      :func:`timm.create_model` makes the network (``None`` for a network of your own, which takes the weights itself).
      Only a head that is one linear layer of the features fits in there.
    * ``.pt2``: a program of :mod:`torch.export` for any batch size, with any head, for :func:`torch.export.load`.

    Before anything is written the exported network is run on ``example`` and compared with the head, so what cannot be
    exported is refused. Outputs are logits: they rank classes as the head does, and may differ from its scores by a
    number a row, or by the length of the features for unit-length means (``"icarl"``, ``"cosine"``) in a ``.pt`` file.
    Classes never learned get weight 0 and a very low finite bias.

    Args:
        module: The module that holds the network.
        head: A head callback, or a head of :mod:`clkit.methods` that learned from the module's features.
        path: The file to write, ``*.pt`` or ``*.pt2``; its folder must exist.
        layer: Where the features were read, as for :class:`~clkit.FeatureTap`; a callback knows it.
        example: Inputs (B, …) as the network takes them, which also fix their size in a ``.pt2``; by default from the
            stream of the module's trainer, the module's ``example_input_array``, or its ``data_config``.
        model_kwargs: Arguments with which ``timm.create_model`` made the network, if not those of the module's
            ``model_kwargs`` attribute.
        class_names: Names by column; by default from the stream of the module's trainer.
        preprocessing: How inputs are prepared, as plain values, written down in the file; by default from there, too.
        overwrite: Whether an existing file may be replaced.

    Returns:
        What the file holds.

    Raises:
        ArgumentError: If ``path`` has another ending or exists, or there is no ``example``.
        ConfigurationError: If the head or the network does not fit in such a file; the message gives the reason.
        NotFittedError: If nothing was learned.
        WriteError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> from clkit.methods import NearestMeanHead
        >>> from clkit.models import TimmClassifier
        >>> module = TimmClassifier("test_resnet", num_classes=2)
        >>> features = FeatureTap(module).extract(images := torch.rand(8, 3, 32, 32))
        >>> head = NearestMeanHead(features.shape[1], metric="euclidean")
        >>> head.update(features, torch.arange(8) % 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = export(module, head, f"{folder}/model.pt", example=images)
        ...     file = torch.load(f"{folder}/model.pt", weights_only=True)
        >>> file["timm"], exported.classes
        ({'model_name': 'test_resnet.r160_in1k', 'kwargs': {}, 'num_classes': 2}, 2)
    """
    if isinstance(head, HeadCallback):
        name, layer, learned = head.name, head.layer, head.head
    else:
        name, learned = "head", head
    return _export(
        module,
        learned,
        name,
        Path(path),
        layer=layer,
        example=example,
        model_kwargs=model_kwargs,
        class_names=class_names,
        preprocessing=preprocessing,
        overwrite=overwrite,
    )


def export_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    head: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Exports the network and a head of a run of ``clkit fit``; see :func:`export`.

    Args:
        path: The checkpoint file.
        output: The file to write, ``*.pt`` or ``*.pt2``.
        head: Name of the head; may be left out where there is one.
        config: The run's ``config.yaml``; looked for beside the checkpoint by default.
        overwrite: Whether an existing file may be replaced.

    Raises:
        ArgumentError: If there is no such head, or the settings of the run are not there; and as :func:`export`.
        StateError: If the checkpoint is damaged.
    """
    _check_path(Path(output), [Path(path)], overwrite)
    checkpoint = read_checkpoint(path)
    named = {name_of(key): key for key in head_entries(checkpoint)}
    if head is None and len(named) == 1:
        (head,) = named
    if head not in named:
        asked = "one must be named (--head)" if head is None else f"there is none named {head!r}"
        raise ArgumentError(f"{path} has the heads {sorted(named) or 'none'}; {asked}")
    key = named[head]
    from clkit.runs.saved_run import SavedRun  # builds a whole run

    run = SavedRun.of(path, config)
    if key not in run.callbacks:
        raise ConfigurationError(f"{run.config} has no callback {key}, but {sorted(run.callbacks)}")
    inputs = run.prepare(key)
    learned = build_head(checkpoint["callbacks"][key]["head"], f"{path}: {key}")
    return _export(
        run.module, learned, head, Path(output), layer=run.callbacks[key].layer, example=inputs, overwrite=overwrite
    )


def _export(
    module: pl.LightningModule,
    head: Head,
    name: str,
    path: Path,
    *,
    layer: str,
    example: Any,
    overwrite: bool,
    model_kwargs: dict[str, Any] | None = None,
    class_names: dict[int, str] | None = None,
    preprocessing: Any = None,
) -> Exported:
    _check_path(path, [], overwrite)
    if not head.classes.numel():
        head.predict(torch.zeros(1, head.in_features))  # raises NotFittedError
    known = _known(module)
    work = _Work(module, head, layer, _checked_example(module, known.example() if example is None else example))
    columns: list[int] = head.classes.tolist()
    names = known.names if class_names is None else class_names
    about = {
        EXPORTED: FORMAT,
        "clkit": __version__,
        "classes": columns,
        "class_ids": columns if known.ids is None else [known.ids[column] for column in columns],
        "class_names": {column: str(names[column]) for column in columns if column in names},
        "preprocessing": _plain(known.preprocessing if preprocessing is None else preprocessing),
    }
    if path.suffix == ".pt":
        made = model_kwargs or getattr(module, "model_kwargs", None) or {}
        state_dict, timm_arguments = work.weights(dict(made))
        weight, bias = _linear_form(head)
        parts = {"name": name, "classes": head.classes.cpu(), "weight": weight.cpu(), "bias": bias.cpu()}
        content = _saved({**about, "state_dict": state_dict, "timm": timm_arguments, "head": parts})
    else:
        buffer = io.BytesIO()
        torch.export.save(work.program(), buffer, extra_files={"clkit.json": json.dumps(about)})
        content = buffer.getvalue()
    with atomic_write(path) as draft:
        draft.write_bytes(content)
    return Exported(work.title, name, len(columns), work.columns, _reading(path))


def _check_path(path: Path, inputs: list[Path], overwrite: bool) -> None:
    if path.suffix not in (".pt", ".pt2"):
        raise ArgumentError(
            f"path={str(path)!r} must end in .pt (weights for torch and timm) or .pt2 (a program of torch.export)"
        )
    check_output(path, inputs, overwrite)


def _saved(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            "the file would hold more than tensors and plain values, so torch would not read it with "
            f"weights_only=True: look at model_kwargs, class_names and preprocessing ({str(error).splitlines()[0]})"
        ) from error
    return buffer.getvalue()


def _reading(path: Path) -> str:
    if path.suffix == ".pt2":
        return f'torch.export.load("{path.name}").module()'
    return f'torch.load("{path.name}", weights_only=True)["state_dict"]'


# ---- what is known without being told


class _Known(NamedTuple):
    """What the stream of a module's trainer says, or the module itself."""

    example: Callable[[], Any]
    ids: list[int] | None
    names: dict[int, str]
    preprocessing: Any


def _known(module: pl.LightningModule) -> _Known:
    trainer = _trainer_of(module)
    stream = None if trainer is None else datamodule_of(trainer)
    if isinstance(stream, StreamDataModule) and stream.experiences:
        ids = stream.original_ids
        by_id = stream.class_names
        names = by_id if ids is None else {column: by_id[id_] for column, id_ in enumerate(ids) if id_ in by_id}
        return _Known(functools.partial(_first_inputs, stream), ids, names, stream.input_preprocessing())
    return _Known(functools.partial(_own_example, module), None, {}, getattr(module, "data_config", None))


def _first_inputs(stream: StreamDataModule) -> Any:
    return next(iter(stream.replayed([(0, stream.training_rows(0)[:4])])))[0]


def _own_example(module: pl.LightningModule) -> Any:
    config = getattr(module, "data_config", None)
    if module.example_input_array is not None or not config:
        return module.example_input_array
    return torch.randn(2, *config["input_size"], generator=torch.Generator().manual_seed(0))


def _checked_example(module: pl.LightningModule, example: Any) -> Tensor:
    if example is None:
        raise ArgumentError(
            f"example is needed: nothing says what inputs a {type(module).__name__} takes; pass a batch (B, …) of them"
        )
    if not isinstance(example, Tensor) or example.ndim < 2 or not len(example):
        seen = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise ArgumentError(f"example must be one tensor (B, …), got {seen}; a network of other inputs is not exported")
    example = example.detach().cpu()
    return torch.cat([example, example]) if len(example) == 1 else example


def _plain(value: Any) -> Any:
    """Preprocessing as plain values; of a function there are none."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value if isinstance(value, (str, int, float, bool)) else None


# ---- the head in the place of the classifier


class _Work:
    """A copy of the network on the CPU, to be changed and compared with the head.

    Args:
        module: The user's module.
        head: The head.
        layer: Where its features are read.
        example: Inputs (B, …).
    """

    def __init__(self, module: pl.LightningModule, head: Head, layer: str, example: Tensor) -> None:
        self.head = head
        self.example = example
        whole = _bare_copy(module)
        tap = FeatureTap(whole, layer)
        self.network: nn.Module = getattr(tap.network, "_orig_mod", tap.network)
        self.point = tap.point
        self.branches = tap.branches
        self.path = None if tap.classifier is None else _path(self.network, tap.classifier)
        self._reads_output = tap.point == "output"
        self.features = _features(whole, tap, example)
        tap.close()
        if self.features.shape[1] != head.in_features:
            raise ConfigurationError(
                f"the network gives features of width {self.features.shape[1]} at {self.point!r}, and the head has "
                f"learned from width {head.in_features}; it belongs to another network or layer"
            )
        self.columns = max(self._outputs(), int(head.classes[-1]) + 1)

    @property
    def title(self) -> str:
        """The network's name in timm, or its class."""
        return _timm_name(self.network) or type(self.network).__name__

    def weights(self, model_kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """State dict of the network, with the head in the classifier's own tensors, and timm's arguments."""
        weight, bias = _linear_form(self.head)
        if not self.branches or self._outputs() < self.columns:
            self._make_room()
        rows = torch.zeros(self.columns, weight.shape[1], dtype=torch.float64)
        rows[self.head.classes.cpu()] = weight.cpu()
        shift = _full_bias(self.head, bias, self.columns, self._dtype)
        for branch in self.branches:
            widths = [_width(leaf) for leaf in branch]
            if None in widths or sum(filter(None, widths)) != rows.shape[1]:
                self._refuse(f"its classifier at {self.point!r} is a {type(branch[0]).__name__}, not one linear layer")
            parts = torch.split(len(branch) * rows, [width or 0 for width in widths], dim=1)
            for leaf, part in zip(branch, parts, strict=True):
                self._fill(leaf, part, shift)
        logits = self._compared(self.network, _Wanted.of(self.features.double(), weight.cpu(), bias.cpu()))
        return dict(self.network.state_dict()), self._timm_arguments(model_kwargs, logits)

    def program(self) -> torch.export.ExportedProgram:
        """The network with the head as one traced program."""
        readout = readout_module(self.head, self.columns, self._dtype).requires_grad_(False).eval()
        exact = readout_module(self.head, self.columns, torch.float64).eval()
        leaves = [leaf for branch in self.branches for leaf in branch]
        if self.path is not None and len(leaves) == 1:
            model = self._replaced(self.path, readout)
        elif leaves:  # several classifiers: each hands its features on, so that the network's mean is the features
            for branch in self.branches:
                widths = [_width(leaf) or self.head.in_features for leaf in branch]
                for index, leaf in enumerate(branch):
                    place = _HandOn(sum(widths[:index]), sum(widths[index + 1 :]), len(branch))
                    _put(self.network, _path(self.network, leaf), place)
            model = nn.Sequential(self.network, readout)
        elif self._reads_output:
            model = nn.Sequential(self.network, readout)
        else:
            self._refuse_place()
        model.eval()
        seen, last = self.head.classes.cpu(), exact[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            features, lift = self.features.double(), self.head.feature_map.projection
            design = exact[:-1](features)
            # a lift adds up products of its own, whose rounding comes before that of the layer
            reach = design.abs() if lift is None else features.abs() @ lift.cpu().abs().T
            wanted = _Wanted.of(design, last.weight[seen], last.bias[seen], reach)
        self._compared(model, wanted)
        program = _traced(model, self.example)
        self._compared(program.module(), wanted)
        self._compared(program.module(), wanted, rows=1)
        return program

    # ----

    @property
    def _dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)

    def _outputs(self) -> int:
        leaf = self.branches[0][0] if self.branches else None
        found = getattr(leaf, "out_features", getattr(leaf, "out_channels", None))
        if found is None and self.branches:
            found = getattr(self.network, "num_classes", None)
        return found if isinstance(found, int) else 0

    def _refuse(self, reason: str, remedy: str = "export to a .pt2 file, which can hold any head") -> NoReturn:
        raise ConfigurationError(f"this {self.title} with this head does not fit in such a file: {reason}; {remedy}")

    def _refuse_place(self) -> NoReturn:
        remedy = "let the head read what the network's classifier reads"
        if self.point == "output":
            remedy = "give the network a classifier, or export to a .pt2 file"
        self._refuse(f"its features are read at {self.point!r}, which is no classifier's input", remedy)

    def _replaced(self, path: str, layers: nn.Module) -> nn.Module:
        if not path:
            return layers
        _put(self.network, path, layers)
        return self.network

    def _make_room(self) -> None:
        """A classifier of as many outputs as the head needs, where the network can make one itself."""
        reset = getattr(self.network, "reset_classifier", None)
        if isinstance(self.network, IdentityBackbone):
            self.network.num_features = self.head.in_features
        elif reset is None or _timm_name(self.network) is None:
            if not self.branches:
                self._refuse_place()
            self._refuse(f"its classifier has {self._outputs()} outputs, and the head needs {self.columns}")
        assert callable(reset)
        reset(self.columns)
        self.network.eval().requires_grad_(False).to(self._dtype)
        with FeatureTap(self.network) as tap:
            self.branches, self.point = tap.branches, tap.point

    def _fill(self, leaf: nn.Module, weight: Tensor, bias: Tensor) -> None:
        norm, layer = getattr(leaf, "bn", None), getattr(leaf, "linear", None)
        if isinstance(norm, nn.BatchNorm1d) and isinstance(layer, nn.Linear):  # LeViT's: the norm must do nothing
            _neutralise(norm)
            leaf = layer
        if not isinstance(leaf, nn.Linear | nn.Conv2d):
            self._refuse(f"its classifier at {self.point!r} is a {type(leaf).__name__}, not one linear layer")
        if leaf.bias is None:
            self._refuse(f"its classifier at {self.point!r} has no bias, which the head needs")
        leaf.weight.data.copy_(weight.reshape(leaf.weight.shape))
        leaf.bias.data.copy_(bias)

    def _compared(self, model: nn.Module, goal: _Wanted, rows: int | None = None) -> Tensor:
        """The model's logits, which must be those wanted on the head's classes, and rank as the head does."""
        inputs, features, wanted = self.example[:rows], self.features[:rows], goal.scores[:rows]
        seen = self.head.classes.cpu()
        with torch.no_grad():
            logits: Tensor = model(inputs)
        if tuple(logits.shape) != (len(inputs), self.columns):
            self._refuse(f"it gives {tuple(logits.shape)} where ({len(inputs)}, {self.columns}) is wanted")
        scores = logits.double()[:, seen]
        tolerance = 100 * torch.finfo(self._dtype).eps * goal.size
        predicted = torch.searchsorted(seen, self.head.predict(features.double()).cpu())
        behind = wanted.max(dim=1).values - wanted.gather(1, predicted[:, None])[:, 0]
        if float((scores - wanted).abs().max()) > tolerance or float(behind.max()) > tolerance:
            apart = float((scores - wanted).abs().max())
            self._refuse(
                f"its outputs differ from the head's scores by {apart:.3g} (the module's own forward may do more than "
                "its network, or the network more with its classifiers than is known)",
                "export a module whose forward calls the network alone",
            )
        return logits

    def _timm_arguments(self, model_kwargs: dict[str, Any], logits: Tensor) -> dict[str, Any] | None:
        """What makes the network again, tried; ``None`` for one that timm did not make."""
        name = _timm_name(self.network)
        if name is None:
            return None
        import timm

        remedy = "pass the arguments that it was made with as model_kwargs, or export to .pt2"
        kwargs = {key: value for key, value in model_kwargs.items() if key != "num_classes"}
        channels = self.example.shape[1]
        if channels != 3 and not model_kwargs:
            kwargs["in_chans"] = channels
        try:
            again = timm.create_model(name, num_classes=self.columns, **kwargs).to(self._dtype).eval()
            again.load_state_dict(self.network.state_dict())
            with torch.no_grad():
                same = torch.allclose(again(self.example), logits, rtol=1e-3, atol=1e-5)
        except (RuntimeError, TypeError) as error:
            self._refuse(f"timm.create_model({name!r}, **{kwargs}) makes another network ({_first(error)})", remedy)
        if not same:
            self._refuse(f"timm.create_model({name!r}, **{kwargs}) with its weights gives other outputs", remedy)
        return {"model_name": name, "kwargs": kwargs, "num_classes": self.columns}


class _Wanted(NamedTuple):
    """Scores (B, k) of a linear layer, and the size of the terms that it adds up, which says how exact it can be."""

    scores: Tensor
    size: float

    @classmethod
    def of(cls, design: Tensor, weight: Tensor, bias: Tensor, reach: Tensor | None = None) -> _Wanted:
        terms = (design.abs() if reach is None else reach) @ weight.abs().T + bias.abs()
        return cls(design @ weight.T + bias, float(terms.max()))


class _HandOn(nn.Module):
    """In the place of one of several classifiers: its input at its place among all features, times their number."""

    def __init__(self, before: int, after: int, times: int) -> None:
        super().__init__()
        self.before, self.after, self.times = before, after, times

    def forward(self, features: Tensor) -> Tensor:
        return pad(features, (self.before, self.after)) * self.times


def _linear_form(head: Head) -> tuple[Tensor, Tensor]:
    """Weight (k, D) and bias (k,), float64, of one linear layer of the raw features that ranks as the head does."""
    if not head.feature_map.is_identity:
        raise ConfigurationError(
            f"a {type(head).__name__} with expansion_dim={head.feature_map.expansion_dim} lifts the features, and a "
            ".pt file holds one linear layer in the place of the classifier; export to a .pt2 file, which can hold it"
        )
    if not head.normalizes:
        return head.linear_readout()
    if isinstance(head, NearestMeanHead) and head.metric in ("icarl", "cosine"):
        # all means have length 1, so the nearest to f/|f| is that of the largest product with f
        return head.means, head.means.new_zeros(len(head.means))
    raise ConfigurationError(
        f"a {type(head).__name__} with metric={head.options.get('metric')!r} divides the features by their length, and "
        "a .pt file holds one linear layer in the place of the classifier; export to a .pt2 file, which can hold it"
    )


def _full_bias(head: Head, bias: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """The bias of all columns: very low, but finite, for classes never learned."""
    everything = torch.full((columns,), max(NEVER, torch.finfo(dtype).min / 4), dtype=torch.float64)
    everything[head.classes.cpu()] = bias.cpu()
    return everything


def _neutralise(norm: nn.BatchNorm1d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1.0)
    norm.weight.data.fill_((1.0 + norm.eps) ** 0.5)
    norm.bias.data.zero_()


def _bare_copy(module: pl.LightningModule) -> pl.LightningModule:
    """A copy on the CPU with its own classifier, in evaluation mode, that drags no trainer along."""
    parts = [part for part in module.modules() if isinstance(part, pl.LightningModule)]
    trainers = [_trainer_of(part) for part in parts]
    for part in parts:
        part.trainer = None
    try:
        copied = copy.deepcopy(module)
    finally:
        for part, trainer in zip(parts, trainers, strict=True):
            part.trainer = trainer
    ungraft(copied)
    copied.cpu().eval().requires_grad_(False)
    return copied


def _trainer_of(module: pl.LightningModule) -> pl.Trainer | None:
    try:
        return module.trainer
    except RuntimeError:  # it has none
        return None


def _features(module: pl.LightningModule, tap: FeatureTap, example: Tensor) -> Tensor:
    """Features (B, D) as the head's callback would read them: by the module's own forward."""
    heard: list[Tapped] = []
    handle = tap.listen(heard.append)
    with torch.no_grad():
        forward(module, tap.network, example)
    handle.remove()
    if not heard:
        raise ConfigurationError(f"the module's forward never reached {tap.point!r}, where the head reads features")
    return heard[0].features.detach()


def _traced(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own tracing
            return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # whatever tracing meets in the user's code
        raise ConfigurationError(f"torch.export cannot trace this network: {_first(error)}; export to .pt") from error


def _timm_name(network: nn.Module) -> str | None:
    config = getattr(network, "pretrained_cfg", None)
    if not isinstance(config, dict) or not config.get("architecture"):
        return None
    tag = config.get("tag")
    return f"{config['architecture']}.{tag}" if tag else str(config["architecture"])


def _width(leaf: nn.Module) -> int | None:
    for part in (leaf, getattr(leaf, "linear", None)):
        width = getattr(part, "in_features", getattr(part, "in_channels", None))
        if isinstance(width, int):
            return width
    return None


def _path(module: nn.Module, inner: nn.Module) -> str:
    path: str = next(name for name, part in module.named_modules() if part is inner)
    return path


def _put(module: nn.Module, path: str, value: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:;")
