"""The user's network as an editor runs it: in evaluation mode, without gradients of its own, restored afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clkit.errors import ArgumentError, BatchError, ClkitError, ConfigurationError, first_line
from clkit.features.tap import FeatureTap, evaluating
from clkit.methods._decomposition import Capture, Rows, input_rows
from clkit.methods._editable import Survey, chosen_layers

__all__ = ["EditedNetwork", "ran"]

_ROUNDED = 1e-2  # how far from 1 probabilities of half precision may add up to


class EditedNetwork:
    """A network whose weights are edited: what it answers, and what the gradients of its weights are made of.

    It is run without its compiled forms, in which hooks would not be heard; these stay valid.

    Args:
        model: The user's module; its forward takes images (B, …) and returns logits (B, C), or (B,) of one output.
        layers: As for :func:`chosen_layers`.
        example: Images (B, …) for one forward; by default those that the module or timm says it takes.
        classifier: Dotted path of the classifier, ``"auto"`` for the one that the tap finds.

    Attributes:
        model: The module, not its compiled form.
        layers: Names of the edited layers in the order of execution.
        outputs: C.
        excluded: Why other linear and convolutional layers cannot be edited, by name.
        heads: Names of the layers that are the classifier.

    Raises:
        ArgumentError: If a layer cannot be edited, or the network cannot run the example.
        ConfigurationError: If it has no classifier, or returns something else than logits.
    """

    def __init__(self, model: nn.Module, layers: Any, example: Tensor | None, classifier: str) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        inputs = _example(self.model) if example is None else example
        with self._at_rest(), torch.no_grad():
            self._dtype, self._device = self._kind()
            batch = self.images("example", inputs)
            survey = Survey(self.model, lambda: self._try(batch, given=example is not None), len(batch), classifier)
        self.layers = list(chosen_layers(survey, layers))
        self.excluded, self.heads = survey.excluded, survey.heads
        logits = self._logits(survey.output, len(batch))
        self.outputs = logits.shape[1]
        sums = logits.double().sum(dim=1)
        shares = self.outputs > 1 and bool((logits >= 0).all()) and bool(((sums - 1).abs() < _ROUNDED).all())
        if shares and not survey.ends_in_head:  # one fitted by least squares may well add up to 1
            raise ConfigurationError(
                "the network returns probabilities, of which losses and distances would be wrong; have it return "
                "logits, without its last softmax"
            )

    @property
    def device(self) -> torch.device:
        """Where the first edited weight lies now."""
        return self.weights()[self.layers[0]].device

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The (d_out, d_in) of each edited weight."""
        return {name: (len(weight), weight[0].numel()) for name, weight in self.weights().items()}

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the edited weights by the names of their layers, or raise a ConfigurationError where one is gone."""
        found: dict[str, nn.Parameter] = {}
        for name in self.layers:
            try:
                found[name] = self.model.get_parameter(f"{name}.weight")
            except AttributeError as error:
                raise ConfigurationError(
                    f"the network has no layer {name!r} any more, which the editor edits"
                ) from error
        return found

    def images(self, name: str, x: Any) -> Tensor:
        """Return images where and as the network takes them, or raise a BatchError."""
        if not isinstance(x, Tensor) or x.ndim < 2 or not len(x):
            seen = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise BatchError(f"{name} must be a tensor of images (B, …), got {seen}")
        self._dtype, self._device = self._kind()
        with torch.inference_mode(False):
            batch = x.detach().clone() if x.is_inference() else x.detach()  # which no graph could begin at
            if batch.is_floating_point():
                if not bool(torch.isfinite(batch).all()):
                    raise BatchError(f"{name} has values that are not finite; nothing was changed")
                batch = batch.to(self._dtype)
            return batch.to(self._device)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of images, (B, C), detached."""
        with self._at_rest(), torch.no_grad():
            return self._logits(ran(self.model, x), len(x))

    def exported(self) -> dict[str, Tensor]:
        """Return a copy of the state dict on the CPU, under the names that it has without ``torch.compile``."""
        state = self.model.state_dict()
        return {name.replace("_orig_mod.", ""): value.detach().cpu().clone() for name, value in state.items()}

    def logits_of(self, name: str, x: Tensor) -> Tensor:
        """Return the logits of images that need not be where and as the network takes them, (B, C), detached."""
        return self.logits(self.images(name, x))

    def rows(self, x: Tensor, loss: Callable[[Tensor], Tensor]) -> dict[str, Rows]:
        """Return what the gradient of a loss of the logits is made of, for each edited weight.

        Args:
            x: (B, …) images.
            loss: Logits (B, C) to (B,) losses, which are added up, so that rows do not depend on how many there are.

        Raises:
            BatchError: If the loss is not finite.
        """
        layers = {name: self.model.get_submodule(name) for name in self.layers}
        with self._at_rest(), torch.enable_grad(), Capture(layers) as capture:
            total = loss(self._logits(ran(self.model, x), len(x))).sum()
            if not bool(torch.isfinite(total)):
                raise BatchError(f"the loss of the edit is {float(total.detach())}; nothing was changed")
            return capture.rows(total)

    def input_grams(self, parts: Iterable[Tensor]) -> dict[str, Tensor]:
        """Return the sum of the outer products of all rows that each edited layer reads, (d_in, d_in) float64."""
        grams = {name: torch.zeros(width, width, dtype=torch.float64) for name, (_, width) in self.shapes.items()}

        def hear(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            rows = input_rows(layer, (args[0] if args else kwargs["input"]).detach()).double()
            grams[name] += (rows.T @ rows).cpu()

        with ExitStack() as hooks:
            for name in self.layers:
                layer = self.model.get_submodule(name)
                hooks.callback(layer.register_forward_hook(partial(hear, name), with_kwargs=True).remove)
            for part in parts:
                self.logits(self.images("reference", part))
        return grams

    def logits_with(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Return the logits of images with other edited weights, differentiable in these; autocast stays as it is."""
        with self._at_rest(autocast=True):
            own = {f"{name}.weight": each for name, each in weights.items()}
            return self._logits(ran(lambda batch: functional_call(self.model, own, (batch,)), x), len(x))

    @contextmanager
    def _at_rest(self, *, autocast: bool = False) -> Iterator[None]:
        """Have the network in evaluation mode and frozen inside the block, and as it was afterwards."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            stack.enter_context(FeatureTap.aside())  # listeners do not hear of it as of a batch
            stack.enter_context(torch.inference_mode(False))
            if not autocast:
                device = next((parameter.device.type for parameter in self.model.parameters()), "cpu")
                stack.enter_context(torch.autocast(device, enabled=False))
            if any(_is_compiled(part) for part in self.model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for parameter in trained:
                parameter.requires_grad_(False)
            try:
                yield
            finally:
                for parameter in trained:
                    parameter.requires_grad_(True)

    def _kind(self) -> tuple[torch.dtype, torch.device]:
        floats = (parameter for parameter in self.model.parameters() if parameter.is_floating_point())
        first = next(floats, None)
        if first is None:
            raise ConfigurationError("the network has no floating-point parameters, so there is nothing to edit")
        return first.dtype, first.device

    def _try(self, batch: Tensor, *, given: bool) -> Any:
        try:
            return ran(self.model, batch)
        except BatchError as error:
            told = "the example" if given else "images of the size that the network names"
            cause = error.__cause__ or error
            raise ArgumentError(
                f"the network cannot run {told}, of shape {tuple(batch.shape)} ({type(cause).__name__}: "
                f"{first_line(cause)}); pass example=, a batch of images as it takes them"
            ) from cause

    def _logits(self, output: Any, rows: int) -> Tensor:
        if isinstance(output, Tensor) and output.shape == (rows,):
            output = output[:, None]
        if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != rows:
            seen = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ConfigurationError(
                f"in evaluation mode the network must return logits of shape ({rows}, C), got {seen}; edit the part of "
                "it that does"
            )
        return output


def ran(run: Callable[[Tensor], Any], x: Tensor) -> Any:
    """Return what a forward gives for images, or raise a BatchError that says which it cannot run."""
    try:
        return run(x)
    except (ClkitError, torch.OutOfMemoryError):  # which say themselves what is wrong
        raise
    except Exception as error:  # whatever a forward of the user may raise
        raise BatchError(
            f"the network cannot run images of shape {tuple(x.shape)} and {x.dtype} ({type(error).__name__}: "
            f"{first_line(error)}); give batches as it takes them; nothing was changed"
        ) from error


def _example(model: nn.Module) -> Tensor:
    """Return images of the size that a module, or a network of timm inside it, says that it takes."""
    own = getattr(model, "example_input_array", None)
    if isinstance(own, Tensor):
        return own
    for part in model.modules():
        config = getattr(part, "pretrained_cfg", None)
        if isinstance(config, dict) and "input_size" in config:
            return torch.zeros(2, *config["input_size"])
    raise ArgumentError(
        "example must be a batch of images (B, …) as the network takes them: nothing in it says how large they are"
    )


def _is_compiled(module: nn.Module) -> bool:
    # Lightning takes a compiled module apart, and leaves the compiled forward in it, and "_compiler_ctx"
    marks = ("_compiled_call_impl", "_compiler_ctx")
    return "_orig_mod" in module._modules or any(getattr(module, name, None) is not None for name in marks)
