"""The feature tap: what goes into a network's classifier, read from the forward pass that happens anyway.

One file, though a long one: every rule of where a network's features are stands beside the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from clkit.arguments import check_arguments
from clkit.errors import TapError, did_you_mean, first_line

__all__ = ["FeatureTap", "Handle", "Tapped"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_DROPS = ("drop", "stochasticdepth")  # in the name of a class, or of one it derives from, lower case
_DROP_RATES = ("p", "prob", "drop", "drop_prob", "dropout", "drop_rate")
_TIMM_RATES = ("drop_rate", "drop_prob", "attn_drop_p", "patch_drop_rate")  # read by functional dropout


class Tapped(NamedTuple):
    """What one forward gave.

    Attributes:
        features: (B, D), the tensor that the classifier read, neither copied nor detached: detach before keeping it, or
            the step's graph stays alive.
        logits: (B, C), what the classifier gave; ``None`` where there is none, or where it gave something else.
    """

    features: Tensor
    logits: Tensor | None


Listener = Callable[[Tapped], None]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode for a block, and give every submodule its own mode back."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


class Handle:
    """Ends one listening; see :meth:`FeatureTap.listen`."""

    def __init__(self, listeners: list[Listener], listener: Listener) -> None:
        self._listeners = listeners
        self._listener = listener

    def remove(self) -> None:
        """Stop listening. A second call does nothing."""
        self._listeners[:] = [other for other in self._listeners if other is not self._listener]


class FeatureTap:
    r"""Reads the features of a network at its classifier's input, by forward hooks, for whoever listens.

    With the classifier :math:`c` and the network :math:`c(g(x))` the features are :math:`f = g(x)`, shape (B, D), and
    the logits :math:`c(f)`, shape (B, C). For one-off extraction there is :meth:`extract`.

    Where ``layer="auto"`` reads:

    * The module holds a timm network (anything with ``get_classifier()``, at any depth, compiled or not): the input of
      that classifier. Of one of timm's classifier heads that pool or have hidden layers it is the input of the last
      layer (``fc2`` or ``fc``); any other head, also one of the user's own, is taken whole. The input of a
      convolutional classifier is flattened. Several classifiers that read different features (CrossViT) give these
      side by side; a pair of distilled classifiers gives their common input, or the mean where each reads its own.
    * That network has no classifier (``num_classes=0``): its output, and no logits. If a classifier of your own
      follows it, name that by its path.
    * Otherwise: the input of the last ``nn.Linear`` in order of definition.

    Each forward delivers, also ``forward_features`` with ``forward_head`` where there is a single classifier.

    Under ``torch.compile`` make the tap before the first call: hooks added later are not seen by compiled code. A
    listener is compiled with the network: let it do no more than detach and store, and read nothing that takes a new
    value at each step (a counter), for which the network would be compiled anew.

    Args:
        module: The network, or a module that holds it (a ``LightningModule``, a wrapper).
        layer: ``"auto"``; ``"output"`` for the output of the network; or the dotted path from ``module`` to a layer.
            A path names the *input* of a linear or convolutional layer or of a timm classifier, the classifier's input
            of a timm network, and the *output* of any other layer. ``"path:in"`` and ``"path:out"`` say so themselves.

    Attributes:
        layer: As given.
        network: What an extra forward calls: the timm network (its compiled form if there is one), else the user's
            module.
        point: Where features are read, as a name inside the network: ``"fc:in"``, ``"head.0+head.1:in"``, ``"output"``;
            ``+`` joins inputs that are put side by side, ``|`` classifiers of which the common or mean input is taken.
            Save it beside what was learned: the same network read at another point gives other features.
        classifier: What maps features to logits: one layer or head, or a ``ModuleList`` of several side by side;
            ``None`` where there is none, or where logits are the mean of a distilled pair.
        branches: The layers whose input is read: in each branch side by side, and several branches for a distilled
            pair; none where an output is read.
        layers: All layers that are read, at their input or, the only one, at its output; a new list when others are.

    Raises:
        TapError: If no such place is found, or more than one. While listening: if what is read there has not the
            shape (B, D).

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with FeatureTap(net) as tap:
        ...     heard: list[Tapped] = []
        ...     handle = tap.listen(heard.append)
        ...     logits = net(torch.ones(5, 2, 2))
        >>> tap.point, tuple(heard[0].features.shape), heard[0].logits is logits
        ('3:in', (5, 3), True)
    """

    extracting: ClassVar[bool] = False
    """Whether a forward is on its way that was run for its features alone, whichever tap asked for it."""

    def __init__(self, module: nn.Module, layer: str = "auto") -> None:
        check_arguments(FeatureTap, locals())
        self.layer = layer
        self._module = module
        self._relay = _Relay()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._fallback: str | None = None
        self._place = self._locate()
        self._register()

    @property
    def classifier_path(self) -> str | None:
        """The dotted path from the user's module to ``classifier``, as ``get_submodule`` takes it."""
        return None if self.classifier is None else path_of(self._module, self.classifier)

    @property
    def width(self) -> int | None:
        """D, from the classifier or the last delivered forward; ``None`` before that where the classifier tells not."""
        return self._place.width if self._relay.width is None else self._relay.width

    def listen(self, listener: Callable[[Tapped], None]) -> Handle:
        """Call ``listener`` with what each forward from now on gives, until the handle's ``remove()``.

        Raises:
            TapError: If the tap was closed.
        """
        if not self._hooks:
            raise TapError(f"this tap at {self.point!r} was closed; make a new FeatureTap or call resolve() first")
        self._relay.listeners.append(listener)
        return Handle(self._relay.listeners, listener)

    def deliver(self, features: Tensor) -> None:
        """Let listeners hear of features (B, D) that a forward gave earlier, of which no logits are known."""
        for listener in tuple(self._relay.listeners):
            listener(Tapped(features, None))

    def resolve(self) -> None:
        """Look again: after a classifier was replaced, with which its hooks are gone, or on a tap that was closed.

        Listeners stay, and nothing is touched if nothing changed.

        Raises:
            TapError: If there is no place to read any more; the tap then stays as it was.
        """
        place = self._locate()
        if place == self._place and self._hooks:
            return
        self._unregister()
        self._place = place
        self._register()

    def extract(self, inputs: Any, run: Callable[[Any], Any] | None = None) -> Tensor:
        """Features (B, D) of one batch, in evaluation mode and without gradients; other listeners do not hear of it.

        Args:
            inputs: What the network's ``forward`` takes.
            run: What to call with them instead of the network.

        Raises:
            TapError: If the tap was closed, or nothing passed it.

        Example:
            >>> net = nn.Sequential(nn.Identity(), nn.Dropout(0.5), nn.Linear(2, 3))
            >>> FeatureTap(net).extract(torch.tensor([[1.0, 2.0]]))
            tensor([[1., 2.]])
            >>> net.training
            True
        """
        heard: list[Tapped] = []
        listeners = self._relay.listeners
        others, listeners[:] = listeners[:], []
        try:
            self.listen(lambda tapped: heard.append(tapped))  # torch 2.7 compiles no builtin
            with FeatureTap.aside(), evaluating(self.network), torch.no_grad():
                (run or self.network)(inputs)
        finally:
            listeners[:] = others
        if not heard:
            raise TapError(
                f"layer={self.layer!r}: the forward never reached {self.point!r}; name a layer that it runs through, "
                "or layer='output'"
            )
        return heard[0].features.detach()

    @classmethod
    @contextmanager
    def aside(cls) -> Iterator[None]:
        """Have no forward of a block count as that of a batch."""
        outer, FeatureTap.extracting = FeatureTap.extracting, True
        try:
            yield
        finally:
            FeatureTap.extracting = outer

    def mode_sensitive(self) -> list[nn.Module]:
        """Return the layers whose forward differs between training and evaluation mode, in order of definition.

        They are layers with running statistics, dropout of any kind with a rate above 0 (also functional, in attention,
        in recurrent layers and in timm's networks; also classes of your own whose name has "drop" in it), and the
        random layers of PyTorch.

        Example:
            >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.0), nn.Dropout(0.1), nn.ReLU())
            >>> [type(layer).__name__ for layer in FeatureTap(net).mode_sensitive()]
            ['BatchNorm1d', 'Dropout']
        """
        return [module for module in self.network.modules() if _is_mode_sensitive(module)]

    def close(self) -> None:
        """Remove every hook and every listener. A second call does nothing."""
        self._unregister()
        self._relay.listeners.clear()

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ---- where to read

    def _locate(self) -> _Place:
        if self.layer not in ("auto", "output"):
            path, _, side = self.layer.partition(":")
            if side not in ("", "in", "out"):
                raise TapError(f"layer={self.layer!r}: after the colon stands 'in' or 'out', not {side!r}")
            return self._explicit(path, side)
        found = self._one_network()
        if self.layer == "output":
            return _output_of(self._module if found is None else found, "output")
        if found is not None:
            return _classifier_place(found)
        if self._fallback is None or not _has_submodule(self._module, self._fallback):
            self._fallback = self._last_linear()
        # Kept once found: a learned head that takes the classifier's place need not be an nn.Linear.
        return self._explicit(self._fallback, "in")

    def _one_network(self) -> nn.Module | None:
        found = _networks(self._module)
        if len(found) > 1:
            paths = [path_of(self._module, network) for network in found]
            raise TapError(
                f"layer={self.layer!r}: the module holds {len(found)} networks with a classifier, {', '.join(paths)}; "
                f"name the one to read, for example layer={paths[0]!r}"
            )
        return found[0] if found else None

    def _explicit(self, path: str, side: str) -> _Place:
        if not _has_submodule(self._module, path):
            names = [name for name, _ in self._module.named_modules() if name]
            hint = did_you_mean(path, names) or f"; its last ones are {', '.join(names[-3:])}"
            raise TapError(f"layer={self.layer!r}: the module has no layer {path!r}{hint}")
        target = self._module.get_submodule(path)
        networks = _networks(self._module)
        around = [network for network in networks if any(inner is target for inner in network.modules())]
        network = around[0] if around else _runnable(self._module, path)
        if not side and around and _unwrapped(network) is _unwrapped(target):
            return _classifier_place(network)
        if not side:
            side = "in" if _reads_input(target, network) else "out"
            branches = _branches(target)
        else:
            branches = [list(target)] if isinstance(target, nn.ModuleList) else [[target]]
        if side == "out":
            return _output_of(network, f"{_name(network, target)}:out", target)
        return _input_of(network, target, branches)

    def _last_linear(self) -> str:
        encoders = [
            name or type(module).__name__
            for name, module in self._module.named_modules()
            if _is_of(module, "timm") and hasattr(module, "feature_info")
        ]
        if encoders:
            raise TapError(
                f"layer={self.layer!r}: {encoders[0]} is a timm encoder without get_classifier(), so nothing says "
                "where its features are; pass layer='output' if it returns (B, D), else the dotted path of a layer"
            )
        heads = list(_linear_heads(self._module, ""))
        if not heads:
            raise TapError(
                f"layer={self.layer!r}: {type(self._module).__name__} holds no network with get_classifier() and no "
                "nn.Linear; pass layer='output' for what its forward returns, or the dotted path of a layer"
            )
        return heads[-1]

    # ---- hooks

    def _register(self) -> None:
        place, relay = self._place, self._relay
        self.network, self.point, self.classifier, self.branches = place[:4]
        self.layers = [leaf for branch in place.branches for leaf in branch] or [place.output_of or place.network]
        relay.start(place, self.layer)
        if place.output_of is not None:
            self._hooks.append(place.output_of.register_forward_hook(relay.hear_output))
            return
        leaves = self.layers
        if len(leaves) == 1:
            self._hooks.append(leaves[0].register_forward_hook(relay.hear_classifier, with_kwargs=True))
            return
        network = _unwrapped(place.network)
        self._hooks.append(network.register_forward_pre_hook(relay.open))
        for index, leaf in enumerate(leaves):
            self._hooks.append(leaf.register_forward_hook(partial(relay.collect, index), with_kwargs=True))
        self._hooks.append(network.register_forward_hook(relay.finish, always_call=True))

    def _unregister(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Place(NamedTuple):
    """Where features are read; two are equal if they name the same modules."""

    network: nn.Module
    point: str
    classifier: nn.Module | None = None
    branches: tuple[tuple[nn.Module, ...], ...] = ()  # inputs side by side, in each of the branches to average
    output_of: nn.Module | None = None
    width: int | None = None


class _Relay:
    """The hooks' side of a tap: knows no module, and is silent in a copy of a network, which gets the hooks too."""

    def __init__(self) -> None:
        self.listeners: list[Listener] = []
        self.width: int | None = None
        self._inputs: list[Any] | None = None
        self._sizes: tuple[int, ...] = ()
        self._point = ""
        self._layer = ""

    def __reduce__(self) -> tuple[type[_Relay], tuple[()]]:
        return (_Relay, ())

    def start(self, place: _Place, layer: str) -> None:
        self.width = None
        self._inputs = None
        self._sizes = tuple(len(branch) for branch in place.branches)
        self._point = place.point
        self._layer = layer

    def hear_classifier(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.listeners:
            self._deliver(_first(args, kwargs), output)

    def hear_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.listeners:
            self._deliver(output, None)

    def open(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs = [None] * sum(self._sizes) if self.listeners else None

    def collect(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        # Outside of the network's own forward nothing would take the inputs away again, so they are not kept.
        if self._inputs is not None and self._inputs[index] is None:
            self._inputs[index] = _first(args, kwargs)

    def finish(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Also called when the forward raised, then without output: what was collected must go.
        inputs, self._inputs = self._inputs, None
        if inputs is None or output is None or not self.listeners:
            return
        rows = [_rows(value) for value in inputs]
        tensors = [row for row in rows if row is not None]
        if len(tensors) < len(rows):
            self._refuse(inputs[rows.index(None)])
        branches = []
        for size in self._sizes:
            branches.append(tensors[:size])
            tensors = tensors[size:]
        self._deliver(_joined(branches), output)

    def _deliver(self, features: Any, logits: Any) -> None:
        rows = _rows(features)
        if rows is None:
            self._refuse(features)
        self.width = rows.shape[1]
        tapped = Tapped(rows, None if logits is None else _rows(logits))
        for listener in tuple(self.listeners):
            listener(tapped)

    def _refuse(self, value: Any) -> NoReturn:
        seen = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        if value is None:
            seen = "nothing: the forward did not run through all of it"
        raise TapError(
            f"layer={self._layer!r}: read at {self._point!r} was {seen}, but features are one tensor of shape (B, D); "
            "pass layer='output' if the network returns that, or the dotted path of a layer that has it"
        )


# ---- values


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _rows(value: Any) -> Tensor | None:
    """(B, D) as it is, (B, D, 1, 1) flattened, ``None`` for anything else."""
    if not isinstance(value, Tensor) or value.dim() < 2:
        return None
    if value.dim() == 2:
        return value
    return value.flatten(1) if all(size == 1 for size in value.shape[2:]) else None


def _joined(branches: list[list[Tensor]]) -> Tensor:
    """Side by side within a branch; over branches their common input, or the mean of different ones."""
    first, *others = branches
    if all(a is b for other in others for a, b in zip(first, other, strict=True)):
        others = []
    joined = [torch.cat(branch, dim=1) if len(branch) > 1 else branch[0] for branch in (first, *others)]
    return torch.stack(joined).mean(dim=0) if len(joined) > 1 else joined[0]


# ---- modules


def _is_of(module: nn.Module, package: str) -> bool:
    return type(module).__module__.partition(".")[0] == package


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return what ``torch.compile`` wrapped, or the module itself."""
    inner = dict(module.named_children()).get("_orig_mod")
    return module if inner is None else _unwrapped(inner)


def _networks(module: nn.Module) -> list[nn.Module]:
    """Return the outermost modules with ``get_classifier`` (in their compiled form), each once, in order."""
    seen: set[int] = set()
    found, waiting = [], [module]
    while waiting:
        outer = waiting.pop()
        core = _unwrapped(outer)
        if id(core) in seen:
            continue
        seen.add(id(core))
        if callable(getattr(core, "get_classifier", None)):
            found.append(outer)
        else:
            waiting.extend(reversed(list(core.children())))
    return found


def _linear_heads(module: nn.Module, path: str) -> Iterator[str]:
    """Paths of the layers that may be a classifier, in order of definition: no part that a strategy attached is one."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # of nn.MultiheadAttention, which never calls it
        return
    if isinstance(module, nn.Linear) or _is_head(module):
        yield path
        return
    if _is_of(module, "clkit") and path:
        return
    for name, child in module.named_children():
        yield from _linear_heads(child, f"{path}.{name}" if path else name)


def _is_head(module: nn.Module) -> bool:
    """Whether this is a head of clkit, or layers that stand for one: the mark is of clkit.surgery, which is above."""
    grafted = getattr(getattr(module, "clkit_change", None), "noun", None) == "graft"
    return grafted or (_is_of(module, "clkit") and type(module).__name__.endswith("Head"))


def _runnable(module: nn.Module, path: str) -> nn.Module:
    """Return the outermost module on the way to ``path`` that has a ``forward``: a module may have none."""
    for name in path.split("."):
        owner: str = type(module).forward.__module__
        has_none = owner == nn.Module.__module__ or owner.partition(".")[0] in ("lightning", "pytorch_lightning")
        if "forward" in vars(module) or not has_none:  # set on the object, as torch.compile does, or by its class
            return module
        module = module.get_submodule(name)
    return module


def _has_submodule(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


def path_of(module: nn.Module, inner: nn.Module) -> str:
    """Return the dotted path from ``module`` to ``inner``, the first one if it is used twice."""
    path: str = next(name for name, other in module.named_modules() if other is inner)
    return path


def put_at(module: nn.Module, path: str, inner: nn.Module) -> None:
    """Put ``inner`` where ``path`` leads to from ``module``, in the place of what stands there."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, inner)


def width_of(layer: nn.Module) -> int | None:
    """Return the number of features that a layer reads, or that the linear layer inside it reads, if it says so."""
    for part in (layer, getattr(layer, "linear", None)):
        width = getattr(part, "in_features", getattr(part, "in_channels", None))
        if isinstance(width, int):
            return width
    return None


def _name(network: nn.Module, layer: nn.Module) -> str:
    """Return the layer's path inside the network, the same whether parts are compiled or not."""
    steps = path_of(_unwrapped(network), _unwrapped(layer)).split(".")
    return ".".join(step for step in steps if step != "_orig_mod") or "module"


# ---- classifiers


def _classifier_place(network: nn.Module) -> _Place:
    """Return the input of the network's classifier, or the network's output if it has none."""
    classifier = _classifier_of(network)
    branches = _branches(classifier)
    if not branches:
        return _output_of(network, "output")
    return _input_of(network, classifier, branches)


def _classifier_of(network: nn.Module) -> Any:
    core = _unwrapped(network)
    get_classifier: Callable[[], Any] = core.get_classifier  # type: ignore[assignment]  # modules are duck-typed
    try:
        return get_classifier()
    except Exception as error:  # a network of the user's own may fail with any
        # Some of timm's networks look inside a head that num_classes=0 has replaced by an identity.
        if isinstance(error, AttributeError) and getattr(core, "num_classes", None) == 0:
            return None
        raise TapError(
            f"{type(core).__name__}.get_classifier() failed ({first_line(error)}); pass layer='output' or a path"
        ) from error


def _branches(classifier: Any) -> list[list[nn.Module]]:
    """Return the layers that read features: a list for each classifier of a distilled pair, usually one of one."""
    parts: Sequence[Any] = classifier if isinstance(classifier, (tuple, list)) else (classifier,)
    branches = [
        [_last_layer(module) for module in (part if isinstance(part, nn.ModuleList) else (part,)) if module is not None]
        for part in parts
    ]
    kept = [[module for module in branch if not _is_empty(module)] for branch in branches]
    return [branch for branch in kept if branch]


def _last_layer(module: nn.Module) -> nn.Module:
    """Inside timm's heads that pool or have hidden layers, the layer that gives the logits: ``fc2`` or ``fc``."""
    while _is_of(module, "timm"):
        children = dict(module.named_children())
        inner = children.get("fc2", children.get("fc"))
        if inner is None:
            break
        module = inner
    return module


def _is_empty(module: nn.Module) -> bool:
    """Where timm has put no classifier: an identity, or a head with nothing in it."""
    return isinstance(module, nn.Identity) or (_is_of(module, "timm") and not list(module.parameters()))


def _reads_input(module: nn.Module, network: nn.Module) -> bool:
    """Whether a path to this layer means its input: linear, convolutional, or what timm calls the classifier."""
    if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or _is_head(module):
        return True
    core = _unwrapped(network)
    if not callable(getattr(core, "get_classifier", None)):
        return False
    classifiers = _classifier_of(network)
    parts = classifiers if isinstance(classifiers, tuple) else (classifiers,)
    last = _last_layer(module)
    return any(part is not None and (part is module or _last_layer(part) is last) for part in parts)


def _input_of(network: nn.Module, classifier: Any, branches: list[list[nn.Module]]) -> _Place:
    names = "|".join("+".join(_name(network, leaf) for leaf in branch) for branch in branches)
    leaves = branches[0]
    if len(branches) > 1:
        classifier = None
    elif len(leaves) == 1:
        classifier = leaves[0]
    known = [width for leaf in leaves if (width := width_of(leaf)) is not None]
    return _Place(
        network=network,
        point=f"{names}:in",
        branches=tuple(tuple(branch) for branch in branches),
        classifier=classifier,
        width=sum(known) if len(known) == len(leaves) else None,
    )


def _output_of(network: nn.Module, point: str, layer: nn.Module | None = None) -> _Place:
    return _Place(network=network, point=point, output_of=_unwrapped(network if layer is None else layer))


# ---- training and evaluation mode


def _is_mode_sensitive(module: nn.Module) -> bool:
    if isinstance(module, (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)):
        return True
    if "frozen" not in type(module).__name__.lower():
        for name in ("running_mean", "running_var"):
            if isinstance(getattr(module, name, None), Tensor):
                return True
    if isinstance(module, nn.RNNBase):
        return module.num_layers > 1 and _any_rate(module, ("dropout",))  # applied between layers
    if isinstance(module, nn.MultiheadAttention):
        return _any_rate(module, ("dropout",))
    ancestry = [kind.__name__.lower() for kind in type(module).__mro__]
    if any(part in name for part in _DROPS for name in ancestry) and _any_rate(module, _DROP_RATES):
        return True
    return _is_of(module, "timm") and (
        _any_rate(module, _TIMM_RATES)
        or _any_rate(getattr(module, "attn_drop", None), ("p",))  # handed to the fused attention
        or getattr(module, "aug_active", False) is True  # rotary embeddings that shift and scale positions
    )


def _any_rate(owner: object, names: Iterable[str]) -> bool:
    values = (getattr(owner, name, 0) for name in names)
    return any(isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0 for value in values)
