"""A simplex head in the place of the user's classifier, to stay there: what is learned is learned for it."""

from __future__ import annotations

from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from clkit.errors import ConfigurationError, SignatureError
from clkit.features.tap import FeatureTap, path_of, put_at, width_of
from clkit.methods.simplex import ClassAllocator, SimplexHead
from clkit.surgery.change import Change, changes_of

__all__ = [
    "SimplexClassifierHead",
    "SimplexPlace",
    "attach_simplex_head",
    "detach_simplex_head",
    "simplex_classifier_of",
]


class SimplexClassifierHead(nn.Module):
    """The classifier of a network: a :class:`~clkit.methods.SimplexHead` whose logits stand at the ids of the classes.

    Args:
        head: The head.

    Attributes:
        head: The head; of its own, ``head.junction`` alone is trained.
        vertex_of: (K,) int64, the vertex whose logit stands in each column; saved with the network.

    Example:
        >>> classifier = SimplexClassifierHead(SimplexHead(num_vertices=16, in_features=8))
        >>> classifier(torch.zeros(2, 8)).shape, classifier.embed(torch.ones(2, 8)).norm(dim=1).round().tolist()
        (torch.Size([2, 16]), [1.0, 1.0])
    """

    vertex_of: Tensor

    def __init__(self, head: SimplexHead) -> None:
        super().__init__()
        self.head = head
        self.in_features, self.out_features = head.in_features, head.num_vertices
        self.register_buffer("vertex_of", torch.arange(head.num_vertices))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits (B, K), float32, of inputs (B, D) or (B, D, 1, 1): column c is that of the class with id c."""
        logits: Tensor = self.head(inputs.flatten(1))[1]
        return logits[:, self.vertex_of]

    def embed(self, inputs: Tensor) -> Tensor:
        """Return features (B, d) of length 1, as they are searched, of inputs (B, D) or (B, D, 1, 1)."""
        return self.head.embed(inputs.flatten(1))

    def follow(self, allocator: ClassAllocator, side: Literal["low", "high"]) -> None:
        """Give each class the column of its id; others get what is left, from the side on, reserved vertices last.

        So an id has its vertex already when it is allocated.
        """
        count = self.head.num_vertices
        ids = torch.tensor(allocator.classes, dtype=torch.int64)
        columns = dict(zip(ids.tolist(), allocator.rows(ids).tolist(), strict=True))
        taken, last = set(columns.values()), set(allocator.reserved)
        every = range(count) if side == "low" else range(count - 1, -1, -1)
        others = iter(sorted((row for row in every if row not in taken), key=last.__contains__))  # a stable sort
        self.vertex_of.copy_(torch.tensor([columns[c] if c in columns else next(others) for c in range(count)]))

    @property
    def feature_layer(self) -> str:
        """Where features (B, d) are read inside this module, as :class:`~clkit.FeatureTap` takes it."""
        return "head:in" if self.head.junction is None else "head.junction:out"


class SimplexPlace(Change):
    """A simplex head in the place of the user's classifier."""

    noun = "simplex head"
    remedy = "it is the classifier now, which no other can replace"

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self._original: nn.Module | None = None
        self._path = ""

    def apply(self, module: nn.Module, **settings: Any) -> None:
        """Put a head with these settings, but ``in_features``, in the place of the classifier."""
        with FeatureTap(module) as tap:
            classifier, network = tap.classifier, getattr(tap.network, "_orig_mod", tap.network)
        reset = getattr(network, "reset_classifier", None)
        if classifier is None and callable(reset) and getattr(network, "num_features", None):
            reset(settings["num_vertices"])  # it has left its classifier out
            with FeatureTap(module) as tap:
                classifier = tap.classifier
        if classifier is None:
            self._refuse("the network has no single classifier; give it one (num_classes=…)")
        if not isinstance(classifier, nn.Linear | nn.Conv2d):
            self._refuse(
                f"the classifier is a {type(classifier).__name__}, and only a linear layer or a 1x1 convolution can be "
                "replaced; build the network with a SimplexClassifierHead in its place"
            )
        self._path = path_of(module, classifier)
        self.claim(module, self._path)
        weight = classifier.weight
        place = SimplexClassifierHead(SimplexHead(in_features=width_of(classifier), **settings))
        place.to(weight.device).train(classifier.training)
        if place.head.junction is not None:
            place.head.junction.to(weight.dtype)
        self._original = classifier
        put_at(module, self._path, place)
        self.mark(place)

    def restore(self, module: nn.Module, **settings: Any) -> None:
        """Put a head there for the weights that are loaded next."""
        self.apply(module, **settings)

    def undo(self, module: nn.Module) -> None:
        """Put the classifier back that stood there."""
        if not self.applied or self._original is None:
            return
        place = module.get_submodule(self._path)
        self._original.train(place.training)
        put_at(module, self._path, self._original)
        self.unmark(place)
        self._original = None

    def state(self) -> dict[str, Any]:
        """Return nothing: all that it learns is in the weights of the network."""
        return {}

    def _refuse(self, reason: str) -> NoReturn:
        raise ConfigurationError(f"{self.owner} cannot put a simplex head into the network: {reason}")


def attach_simplex_head(
    module: nn.Module,
    num_vertices: int = 1024,
    *,
    junction: bool | Literal["auto"] = "auto",
    polytope: Literal["simplex", "orthoplex", "cube"] = "simplex",
    owner: str = "attach_simplex_head",
) -> SimplexClassifierHead:
    """Put a simplex head in the place of a network's classifier, and return it; one that is there already stays.

    Call it in ``configure_model`` or ``setup`` where a module builds its network there; elsewhere
    :class:`~clkit.callbacks.DSimplex` does it.

    Args:
        module: A timm network, or any module with one classifier.
        num_vertices: K; see :class:`~clkit.methods.SimplexHead`, as for the further ones.
        junction: See there.
        polytope: See there.
        owner: Who asks, for messages.

    Raises:
        ConfigurationError: If there is no such classifier, or another change of the network holds it.
        SignatureError: If a simplex head of other vertices is there.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 10))
        >>> attach_simplex_head(network, 16).head
        SimplexHead(
          num_vertices=16, dim=15, polytope='simplex'
          (junction): Linear(in_features=8, out_features=15, bias=False)
        )
        >>> network(torch.zeros(2, 4)).shape
        torch.Size([2, 16])
    """
    place = simplex_classifier_of(module)
    if place is None:
        SimplexPlace(owner).apply(module, num_vertices=num_vertices, junction=junction, polytope=polytope)
        place = simplex_classifier_of(module)
        assert place is not None
        return place
    if place.head.signature() != (wanted := SimplexHead(num_vertices, polytope=polytope).signature()):
        raise SignatureError(
            f"{owner} was asked for the vertices {wanted!r}, and the network has a simplex head of "
            f"{place.head.signature()!r}; a network keeps its vertices for ever, so ask for these"
        )
    return place


def detach_simplex_head(module: nn.Module) -> None:
    """Give a network the classifier back that stood there before a simplex head, as it was then.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 10))
        >>> _ = attach_simplex_head(network, 16)
        >>> detach_simplex_head(network)
        >>> network[0].out_features
        10
    """
    for change in changes_of(module):
        if isinstance(change, SimplexPlace):
            change.undo(module)


def simplex_classifier_of(module: nn.Module) -> SimplexClassifierHead | None:
    """Return the simplex classifier inside a module, if there is one.

    Raises:
        ConfigurationError: If there are several.
    """
    found = [part for part in module.modules() if isinstance(part, SimplexClassifierHead)]
    if len(found) > 1:
        raise ConfigurationError(f"the module holds {len(found)} simplex heads, and a network has one classifier")
    return found[0] if found else None
