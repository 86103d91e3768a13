"""A network with a learned head as its classifier, in a file that needs no clkit."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from clkit._version import __version__
from clkit.callbacks import HeadCallback
from clkit.data import StreamDataModule
from clkit.errors import ArgumentError, ConfigurationError, first_line
from clkit.files import atomic_write, check_output, plain_values, read_checkpoint
from clkit.methods.heads.base import Head
from clkit.methods.heads.readout import LinearReadout, linear_of, readout_module, readout_tensors
from clkit.methods.nearest_mean import NearestMeanHead
from clkit.runs.heads import head_entries, name_of
from clkit.runs.task_export import saved_tasks
from clkit.schema import EXPORTED, LEARNED
from clkit.stream._lightning import datamodule_of
from clkit.surgery.copies import trainer_of
from clkit.surgery.splice import SplicedCopy

__all__ = ["Exported", "export", "export_checkpoint"]

FORMAT = 1


class Exported(NamedTuple):
    """What an exported file holds: timm's name of the network or its class, the name of the head, and how it is read.

    ``classes`` is the number of classes that the head has learned, ``columns`` that of the outputs.
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
    name: str = "head",
    overwrite: bool = False,
) -> Exported:
    """Write a module's network with a learned head as its classifier. The module itself is not changed.

    ``path`` says which of two forms:

    * ``.pt``: a dictionary of tensors and plain values, for :func:`torch.load` with ``weights_only=True``.
      ``state_dict`` has the network's own keys, with the head in the place of the classifier, and ``timm`` says how
      :func:`timm.create_model` makes the network (``None`` for a network of your own). Only a head that is one linear
      layer of the features fits in there.
    * ``.pt2``: a program of :mod:`torch.export` for any batch size, with any head, for :func:`torch.export.load`.

    Before anything is written the exported network is run on ``example`` and compared with the head. Outputs are
    logits: they rank classes as the head does, and may differ from its scores by a number a row, or by the length of
    the features for unit-length means (``"icarl"``, ``"cosine"``) in a ``.pt`` file. Classes never learned get weight 0
    and a very low finite bias.

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
        name: What the file calls a head; a callback knows its own.
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
        >>> from clkit import FeatureTap
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
    path = Path(path)
    if isinstance(head, HeadCallback):
        name, layer, learned = head.name, head.layer, head.head
    else:
        learned = head
    _check_path(path, [], overwrite)
    if not learned.classes.numel():
        learned.predict(torch.zeros(1, learned.in_features))  # raises NotFittedError
    trainer = trainer_of(module)
    data = None if trainer is None else datamodule_of(trainer)
    stream = data if isinstance(data, StreamDataModule) and data.experiences else None
    spliced = SplicedCopy(module, learned, layer, _example(module, stream, example))
    columns: list[int] = learned.classes.tolist()
    ids, names = (None, {}) if stream is None else (stream.original_ids, stream.class_names)
    class_ids = columns if ids is None else [ids[column] for column in columns]
    if class_names is None:
        class_names = {column: names[id_] for column, id_ in zip(columns, class_ids, strict=True) if id_ in names}
    if preprocessing is None:
        preprocessing = getattr(module, "data_config", None) if stream is None else stream.input_preprocessing()
    about = {
        EXPORTED: FORMAT,
        "clkit": __version__,
        "classes": columns,
        "class_ids": class_ids,
        "class_names": {column: str(class_names[column]) for column in columns if column in class_names},
        "preprocessing": plain_values(preprocessing),
    }
    if path.suffix == ".pt":
        content = _weights(spliced, learned, name, about, model_kwargs or getattr(module, "model_kwargs", None) or {})
        reading = f'torch.load("{path.name}", weights_only=True)["state_dict"]'
    else:
        buffer = io.BytesIO()
        torch.export.save(_program(spliced, learned), buffer, extra_files={"clkit.json": json.dumps(about)})
        content = buffer.getvalue()
        reading = f'torch.export.load("{path.name}").module()'
    with atomic_write(path) as draft:
        draft.write_bytes(content)
    return Exported(spliced.title, name, len(columns), spliced.columns, reading)


def export_checkpoint(
    path: str | Path,
    output: str | Path,
    *,
    head: str | None = None,
    config: str | Path | None = None,
    overwrite: bool = False,
) -> Exported:
    """Export the network and a head of a run of ``clkit fit``; see :func:`export`.

    Args:
        path: The checkpoint file.
        output: The file to write, ``*.pt`` or ``*.pt2``.
        head: The name of the head; may be left out where there is one.
        config: The run's ``config.yaml``; looked for beside the checkpoint by default.
        overwrite: Whether an existing file may be replaced.
    """
    _check_path(Path(output), [Path(path)], overwrite)
    checkpoint = read_checkpoint(path)
    named = {name_of(key): key for key in head_entries(checkpoint)}
    if head is None and len(named) == 1:
        (head,) = named
    if not named and (tasks := saved_tasks(checkpoint)):
        raise ArgumentError(
            f"{path} is of a run with DST and has no heads, but the networks of {tasks} tasks; say which one is "
            f"wanted: --task K, from 0 to {tasks - 1}"
        )
    if head not in named:
        asked = "one must be named (--head)" if head is None else f"there is none named {head!r}"
        raise ArgumentError(f"{path} has the heads {sorted(named) or 'none'}; {asked}")
    key = named[head]
    if LEARNED in checkpoint:
        from clkit.runs.learned import LearnedModel

        learned = LearnedModel.of_checkpoint(checkpoint, path, "cpu")
        about: dict[str, Any] = {"class_names": learned.names, "preprocessing": learned.preprocessing}
        about |= {"layer": learned.layer, "name": name_of(learned.key)}
        return export(learned.module, learned.head, output, overwrite=overwrite, **about)
    from clkit.runs.saved_run import SavedRun  # builds a whole run

    run = SavedRun(path, config)
    if key not in run.callbacks:
        raise ConfigurationError(f"{run.config} has no callback {key}, but {sorted(run.callbacks)}")
    inputs = run.prepare(key)
    run.callbacks[key].load_stream_state(checkpoint["callbacks"][key])
    return export(run.module, run.callbacks[key], output, example=inputs, overwrite=overwrite)


def _check_path(path: Path, inputs: list[Path], overwrite: bool) -> None:
    if path.suffix not in (".pt", ".pt2"):
        raise ArgumentError(
            f"path={str(path)!r} must end in .pt (weights for torch and timm) or .pt2 (a program of torch.export)"
        )
    check_output(path, inputs, overwrite)


def _example(module: pl.LightningModule, stream: StreamDataModule | None, example: Any) -> Tensor:
    """Return the inputs that are given, or else known, as a batch of at least two on the CPU."""
    if example is None and stream is not None:
        example = stream.training_inputs(stream.training_rows(0)[:4])
    elif example is None and module.example_input_array is not None:
        example = module.example_input_array
    elif example is None and (config := getattr(module, "data_config", None)):
        example = torch.randn(2, *config["input_size"], generator=torch.Generator().manual_seed(0))
    elif example is None:
        raise ArgumentError(
            f"example is needed: nothing says what inputs a {type(module).__name__} takes; pass a batch (B, …) of them"
        )
    if not isinstance(example, Tensor) or example.ndim < 2 or not len(example):
        seen = f"shape {tuple(example.shape)}" if isinstance(example, Tensor) else type(example).__name__
        raise ArgumentError(f"example must be one tensor (B, …), got {seen}; a network of other inputs is not exported")
    example = example.detach().cpu()
    return torch.cat([example, example]) if len(example) == 1 else example


def _weights(spliced: SplicedCopy, head: Head, name: str, about: dict[str, Any], model_kwargs: dict[str, Any]) -> bytes:
    """Return the file of the network's state dict, with the head in the classifier's own tensors."""
    linear = _linear_form(head)
    network = spliced.fill(linear)
    exact = nn.Sequential(linear_of(*readout_tensors(linear, spliced.columns, torch.float64)))
    logits = spliced.compare(network, exact)
    content = {
        **about,
        "state_dict": dict(network.state_dict()),
        "timm": _timm_arguments(spliced, model_kwargs, logits),
        "head": {"name": name, **linear.state_dict()},
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConfigurationError(
            "the file would hold more than tensors and plain values, so torch would not read it with "
            f"weights_only=True: look at model_kwargs, class_names and preprocessing ({first_line(error)})"
        ) from error
    return buffer.getvalue()


def _linear_form(head: Head) -> LinearReadout:
    """Return one linear layer of the features themselves that ranks as the head does."""
    does, weight, bias = "", *head.linear_readout()
    if head.options.get("expansion_dim"):
        does = f"expansion_dim={head.options['expansion_dim']} lifts the features"
    elif isinstance(head, NearestMeanHead) and head.metric in ("icarl", "cosine"):
        # all means have length 1, so the nearest to f/|f| is that of the largest product with f
        weight, bias = head.means, torch.zeros_like(bias)
    elif head.normalizes:
        option = "metric" if "metric" in head.options else "unit"
        does = f"{option}={head.options.get(option)!r} divides the features by their length"
    if does:
        raise ConfigurationError(
            f"this {type(head).__name__} with {does}, and a .pt file holds one linear layer in the place of the "
            "classifier; export to a .pt2 file, which can hold it"
        )
    return LinearReadout(head.classes.cpu(), weight.cpu(), bias.cpu())


def _timm_arguments(spliced: SplicedCopy, model_kwargs: dict[str, Any], logits: Tensor) -> dict[str, Any] | None:
    """Return what makes the network again, tried; ``None`` for one that timm did not make."""
    name = spliced.timm_name
    if name is None:
        return None
    import timm

    remedy = "pass the arguments that it was made with as model_kwargs, or export to .pt2"
    kwargs = {key: value for key, value in model_kwargs.items() if key != "num_classes"}
    channels = spliced.example.shape[1]
    if channels != 3 and not model_kwargs:
        kwargs["in_chans"] = channels
    try:
        again = timm.create_model(name, num_classes=spliced.columns, **kwargs).to(spliced.dtype).eval()
        again.load_state_dict(spliced.network.state_dict())
        with torch.no_grad():
            same = torch.allclose(again(spliced.example), logits, rtol=1e-3, atol=1e-5)
    except (RuntimeError, TypeError) as error:
        spliced.refuse(f"timm.create_model({name!r}, **{kwargs}) makes another network ({first_line(error)})", remedy)
    if not same:
        spliced.refuse(f"timm.create_model({name!r}, **{kwargs}) with its weights gives other outputs", remedy)
    return {"model_name": name, "kwargs": kwargs, "num_classes": spliced.columns}


def _program(spliced: SplicedCopy, head: Head) -> torch.export.ExportedProgram:
    """Return the network with the head as one traced program."""
    readout = readout_module(head, spliced.columns, spliced.dtype).requires_grad_(False)
    exact = readout_module(head, spliced.columns, torch.float64)
    model = spliced.put(readout).eval()
    spliced.compare(model, exact)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about its own tracing
            batch = torch.export.Dim("batch", min=1, max=2**40)  # unbounded, torch 2.7 finds one value too many
            program = torch.export.export(model, (spliced.example,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:  # whatever tracing meets in the user's code
        reason = first_line(error)
        raise ConfigurationError(f"torch.export cannot trace this network: {reason}; export to .pt") from error
    for rows in (None, 1):
        spliced.compare(program.module(), exact, rows)
    return program
