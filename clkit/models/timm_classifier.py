"""An image classifier around any timm backbone, or around none for streams of cached embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError, ConfigurationError, StateError, did_you_mean, first_line
from clkit.features.batch import BatchReader, Readings, read_batch, read_inputs
from clkit.methods._checks import check_count
from clkit.models.memory_layout import to_channels_last
from clkit.stream._lightning import callbacks_of, datamodule_of

__all__ = ["IdentityBackbone", "TimmClassifier", "timm_code", "weights_of_a_run"]


class IdentityBackbone(nn.Module):
    """Hands its input (B, …) on as (B, D); with ``in_features`` and ``num_classes`` it ends in a linear classifier.

    It has the surface of a timm network that callers use: ``get_classifier``, ``reset_classifier``, ``num_classes``
    and ``num_features``.

    Args:
        num_classes: Outputs of the classifier; 0 for none.
        in_features: Width D of the features; needed for a classifier only.

    Raises:
        ArgumentError: If a classifier is asked for without ``in_features``.

    Example:
        >>> IdentityBackbone()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 64])
    """

    def __init__(self, num_classes: int = 0, in_features: int | None = None) -> None:
        check_arguments(IdentityBackbone, locals())
        super().__init__()
        self.num_features = in_features
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier, or an identity."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Make a new classifier."""
        check_count("num_classes", num_classes, at_least=0)
        if num_classes and self.num_features is None:
            raise ArgumentError(
                f"an identity backbone with num_classes={num_classes} needs the width of the features: "
                "model_kwargs={'in_features': D}"
            )
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features or 0, num_classes) if num_classes else nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features, or logits."""
        logits: Tensor = self.fc(inputs.flatten(1))
        return logits


class TimmClassifier(pl.LightningModule):
    """Trains any timm network by cross-entropy: a plain LightningModule that knows nothing of streams.

    Args:
        backbone: Name of a timm model, or ``"identity"`` for inputs that are features already.
        pretrained: Whether timm fetches its published weights.
        checkpoint_path: A file of weights to start from, as timm reads it, or a checkpoint of a run of this module.
        model_kwargs: Further arguments of ``timm.create_model``.
        small_images: For images up to about 64 px and training from scratch: the stem of a ResNet becomes one 3 x 3
            convolution of stride 1, without pooling.
        channels_last: Keeps the weights of convolutions in torch's ``channels_last`` layout, in which convolutions and
            batch norms are often faster, by the more the smaller the images. Results differ by rounding.
        num_classes: Outputs of the classifier; ``None`` takes the number from the data module, or leaves the classifier
            out where there is none; 0 leaves it out. Without data a checkpoint that is loaded says it.
        optimizer: Makes the optimizer from the parameters; AdamW at 1e-3 by default.
        lr_scheduler: Makes a learning-rate schedule from the optimizer, stepped each epoch.
        label_smoothing: Of the cross-entropy, [0, 1).
        task_heads: Whether only outputs for the classes of the present task are trained, and others are very low. A
            callback that keeps a network for each task (:class:`~clkit.callbacks.DST`) says which these are, and gives
            the classifier back as each task had it.
        batch_reader: A function ``batch -> (inputs, targets)`` for batches of an unusual form.

    Raises:
        ArgumentError: If timm has no such model or weights of that tag, it refuses ``model_kwargs``, the file of
            weights is not there, or ``small_images`` does not go with the network or the weights.
        ConfigurationError: If published weights cannot be fetched; if ``channels_last`` is not safe for a layer of the
            network; or ``num_classes`` contradicts the data module (in ``setup``).
        StateError: If the file of weights does not fit the model.

    Example:
        >>> model = TimmClassifier("resnet10t", num_classes=4, model_kwargs={"in_chans": 1})
        >>> model(torch.zeros(2, 1, 32, 32)).shape
        torch.Size([2, 4])
    """

    task_classes: Tensor

    def __init__(
        self,
        backbone: str = "resnet18",
        *,
        pretrained: bool = False,
        checkpoint_path: str | Path | None = None,
        model_kwargs: dict[str, Any] | None = None,
        small_images: bool = False,
        channels_last: bool = False,
        num_classes: int | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_scheduler: LRSchedulerCallable | None = None,
        label_smoothing: float = 0.0,
        task_heads: bool = False,
        batch_reader: BatchReader | None = None,
    ) -> None:
        check_arguments(TimmClassifier, locals())
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ArgumentError(f"label_smoothing must lie in [0, 1), got {label_smoothing}")
        self.backbone = backbone
        self.num_classes = None if num_classes is None else check_count("num_classes", num_classes, at_least=0)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.label_smoothing = label_smoothing
        self.task_heads = task_heads
        self.batch_reader = batch_reader
        self.model_kwargs = dict(model_kwargs or {})
        self.small_images = small_images
        if small_images and (pretrained or checkpoint_path is not None):
            raise ArgumentError(
                f"small_images=True replaces the first layer of {backbone!r}, for which no weights can be loaded; "
                "leave pretrained and checkpoint_path out, or small_images"
            )
        options = self.model_kwargs if num_classes is None else {**self.model_kwargs, "num_classes": num_classes}
        self.network = _build(backbone, pretrained, checkpoint_path, options)
        if small_images:
            _replace_stem(self.network, backbone)
        if channels_last:
            to_channels_last(self.network)
        self._make_task_classes()

    @property
    def data_config(self) -> dict[str, Any] | None:
        """The backbone's own preprocessing, as timm resolves it; ``None`` for the identity backbone.

        Number of channels and size follow ``model_kwargs``; other than three channels get the average mean and std.
        """
        if isinstance(self.network, IdentityBackbone):
            return None
        from timm.data.config import resolve_model_data_config

        config = dict(resolve_model_data_config(self.network))  # type: ignore[no-untyped-call]  # timm has no types
        channels, height, width = config["input_size"]
        size = self.model_kwargs.get("img_size", (height, width))
        height, width = (size, size) if isinstance(size, int) else size
        wanted = self.model_kwargs.get("in_chans", channels)
        if wanted != channels:  # timm's values are those of the published three-channel weights
            for name in ("mean", "std"):
                config[name] = (sum(config[name]) / len(config[name]),) * wanted
        return {**config, "input_size": (wanted, height, width)}

    @property
    def timm_arguments(self) -> dict[str, Any] | None:
        """What makes the network anew: ``model_name``, ``kwargs``, ``num_classes``, and whether for ``small_images``.

        ``None`` for the identity backbone.
        """
        if isinstance(self.network, IdentityBackbone):
            return None
        kwargs = {name: value for name, value in self.model_kwargs.items() if name != "num_classes"}
        outputs = {"num_classes": self.network.num_classes, "small_images": self.small_images}
        return {"model_name": self.backbone, "kwargs": kwargs, **outputs}

    def setup(self, stage: str) -> None:
        """Give the network as many outputs as the stream has classes, where no number was given."""
        if self.task_heads and not any(hasattr(each, "activated") for each in callbacks_of(self.trainer)):
            raise ConfigurationError(
                "task_heads=True needs a callback that keeps a network for each task, such as DST; add it, or leave "
                "task_heads out"
            )
        wanted = getattr(datamodule_of(self.trainer), "num_classes", None)
        if wanted is None:
            return
        if self.num_classes is None:
            if self.network.num_classes != wanted:
                self._make_classifier(wanted)
        elif 0 < self.num_classes < wanted:
            raise ConfigurationError(
                f"num_classes={self.num_classes} of the model is too small for the data, whose class ids need "
                f"{wanted} outputs; leave num_classes out, or set relabel=true in the data"
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the number of outputs from the file, where neither an argument nor the data say it."""
        said = self._trainer is not None and getattr(datamodule_of(self.trainer), "num_classes", None) is not None
        if self.num_classes is not None or said:
            return
        classifier = self.network.get_classifier()
        name = next((name for name, layer in self.named_modules() if layer is classifier), None)  # None for a pair
        weight = checkpoint["state_dict"].get(f"{name}.weight")
        if isinstance(weight, Tensor) and weight.ndim and len(weight) != self.network.num_classes:
            self._make_classifier(len(weight))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, num_classes) of inputs (B, C, H, W); features (B, D) where there is no classifier."""
        output: Tensor = self.network(inputs)
        if self.task_heads and output.shape[1] == len(self.task_classes):
            return output.masked_fill(~self.task_classes, torch.finfo(output.dtype).min)
        return output

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the cross-entropy of a batch; rows without a label (-1) do not count."""
        inputs, targets = self._read(batch)
        if not self.network.num_classes:
            raise self._nothing_to_train()
        logits, targets = (self._of_task if self.task_heads else self._of_all)(inputs, targets.long())
        loss = cross_entropy(logits, targets, ignore_index=-1, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(targets))
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Run the forward; accuracies are the callbacks' business."""
        self(self._read(batch, needs_targets=False)[0])

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return logits (B, num_classes)."""
        output: Tensor = self(self._read(batch, needs_targets=False)[0])
        return output

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and a schedule where one was given."""
        if next(self.parameters(), None) is None:
            raise self._nothing_to_train()
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": self.lr_scheduler(optimizer)}

    def _read(self, batch: Any, needs_targets: bool = True) -> tuple[Any, Any]:
        """Return inputs and targets as the module's reader finds them, or else the run's where there is a trainer."""
        if self._trainer is None:  # a step that is called by hand
            return (read_batch if needs_targets else read_inputs)(batch, self.batch_reader)
        return Readings.of(self.trainer).read(self, batch, needs_targets=needs_targets)

    def _of_all(self, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        return self(inputs), targets

    def _of_task(self, inputs: Any, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of the present task's classes alone, and targets counted among them."""
        place = self.task_classes.cumsum(0) - 1
        known = targets.clamp(min=0)
        if not bool(self.task_classes[known].all()):
            classes = self.task_classes.nonzero().squeeze(1).tolist()
            raise BatchError(f"the targets {sorted(set(targets.tolist()))} are not all of the present task, {classes}")
        return self.network(inputs)[:, self.task_classes], torch.where(targets < 0, targets, place[known])

    def _make_classifier(self, outputs: int) -> None:
        # an identity backbone of unknown width cannot get a classifier
        headless = isinstance(self.network, IdentityBackbone) and self.network.num_features is None
        fixed = hasattr(self.network.get_classifier(), "vertex_of")  # a simplex head has room for all classes
        if not headless and not fixed:
            self.network.reset_classifier(outputs)
            self._make_task_classes()

    def _make_task_classes(self) -> None:
        if self.task_heads:
            # true for the classes of the present task
            self.register_buffer("task_classes", torch.ones(self.network.num_classes, dtype=torch.bool))

    def _nothing_to_train(self) -> ConfigurationError:
        return ConfigurationError(
            f"the network {self.backbone!r} has no classifier to train; give num_classes, or use "
            'strategy="gradient_free", which trains nothing'
        )


def _replace_stem(network: Any, backbone: str) -> None:
    """Build the stem that is usual for CIFAR: nothing is lost before the first block."""
    if not all(hasattr(network, name) for name in ("conv1", "bn1", "maxpool", "layer1")):
        raise ArgumentError(
            f"small_images=True needs one of timm's ResNets, whose stem is conv1, bn1 and maxpool; {backbone!r} has "
            "another"
        )
    first = next(layer for layer in network.conv1.modules() if isinstance(layer, nn.Conv2d))
    network.conv1 = nn.Conv2d(first.in_channels, network.bn1.num_features, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")  # as timm does for all others
    network.maxpool = nn.Identity()


def timm_code(arguments: Mapping[str, Any], first: Tensor | None) -> list[str]:
    """Return the lines of Python by which plain timm makes a network, as ``network``.

    Args:
        arguments: What ``timm_arguments`` of the module gave.
        first: The weight of the layer ``conv1``, where there is one.

    Example:
        >>> model = TimmClassifier("resnet18", num_classes=4, small_images=True)
        >>> timm_code(model.timm_arguments, model.network.conv1.weight)[1:]
        ['network.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)', 'network.maxpool = torch.nn.Identity()']
    """
    kwargs = "".join(f", {name}={value!r}" for name, value in arguments["kwargs"].items())
    lines = [
        f"network = timm.create_model({arguments['model_name']!r}, num_classes={arguments['num_classes']}{kwargs})"
    ]
    if arguments["small_images"] and first is not None:
        sizes = f"{first.shape[1]}, {first.shape[0]}, {first.shape[2]}"
        lines.append(f"network.conv1 = torch.nn.Conv2d({sizes}, padding={first.shape[2] // 2}, bias=False)")
        lines.append("network.maxpool = torch.nn.Identity()")
    return lines


def _build(backbone: str, pretrained: bool, checkpoint_path: str | Path | None, options: dict[str, Any]) -> Any:
    if backbone == "identity":
        if unknown := options.keys() - {"in_features", "num_classes"}:
            names = sorted(map(str, unknown))
            raise ArgumentError(f"model_kwargs of the identity backbone can only be in_features, got {names}")
        return IdentityBackbone(**options)
    import timm

    architecture, _, tag = backbone.partition(".")
    if not timm.is_model(architecture) and not backbone.startswith(("hf-hub:", "local-dir:")):
        hint = did_you_mean(backbone, timm.list_models())
        raise ArgumentError(f"backbone={backbone!r} is neither 'identity' nor a model of timm {timm.__version__}{hint}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and timm.is_model(architecture) and tag not in tags:
        raise ArgumentError(f"backbone={backbone!r}: timm has no weights {tag!r} of {architecture}, but {tags}")
    if checkpoint_path is not None and not Path(checkpoint_path).is_file():
        raise ArgumentError(f"checkpoint_path={checkpoint_path!r} is not a file; give the path of the weights")
    try:
        if checkpoint_path is not None and (weights := weights_of_a_run(checkpoint_path)):
            network = timm.create_model(backbone, **options)
            network.load_state_dict(weights)
            return network
        return timm.create_model(backbone, pretrained=pretrained, checkpoint_path=str(checkpoint_path or ""), **options)
    except OSError as error:  # first, since older hubs say that nothing is cached by what is a ValueError, too
        if not pretrained:
            raise
        raise ConfigurationError(
            f"the pretrained weights of {backbone!r} could not be fetched ({first_line(error)}); connect once so that "
            "they are cached, or give a local file of weights as checkpoint_path with pretrained=false"
        ) from error
    except (TypeError, ValueError, AssertionError) as error:
        raise ArgumentError(f"timm refuses the model_kwargs {options} for {backbone!r}: {error}") from error
    except RuntimeError as error:
        if checkpoint_path is None:
            refused = f"timm refuses the model_kwargs {options} for {backbone!r}: {first_line(error)}"
            raise ArgumentError(refused) from error
        raise StateError(
            f"checkpoint_path={checkpoint_path!r} does not fit {backbone!r} with {options}: {first_line(error)}; set "
            "num_classes and model_kwargs to those the file was saved with"
        ) from error


def weights_of_a_run(path: str | Path) -> dict[str, Tensor]:
    """Return the network's weights in a checkpoint that Lightning wrote, nothing for other files."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever torch raises for files of other kinds, which timm reads
        return {}
    weights = saved["state_dict"] if "pytorch-lightning_version" in saved else {}
    return {name.removeprefix("network."): value for name, value in weights.items() if name.startswith("network.")}
