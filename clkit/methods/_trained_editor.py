"""What an editor learns, and how: statistics of gradients, first step sizes, and the loss that trains its networks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clkit.arguments import check_arguments, in_short
from clkit.errors import BatchError, ConfigurationError, NotFittedError
from clkit.methods._checks import check_count, check_number
from clkit.methods._decomposition import Rows, computed_in
from clkit.methods._edit_arguments import check_limits, level_outside
from clkit.methods._edit_log import EditLog, Factors, stored_factors
from clkit.methods._edit_objective import SampleLoss, objective_for
from clkit.methods._edited_network import EditedNetwork
from clkit.methods._editor_network import EditorNetworks
from clkit.methods._state import exact

__all__ = ["TrainedEditor"]

_STATISTICS_EDITS, _ALPHA_EDITS = 200, 20
_FIRST_SIZE = 0.05  # of a weight's norm: the median of its first updates under alpha="auto"
_ROUNDING = 1e-6  # of a projection, below which nothing is left
_SAMPLED = 512  # numbers of a weight by which it is known again
_APART = 0.1  # of their norm: above it an editor does clearly more damage
_LARGE = 1_000_000  # parameters of a network whose editor is trained in smaller steps


class TrainedEditor:
    """The part of a :class:`GradientEditor` that is trained; arguments and errors are those."""

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] = "auto",
        *,
        example: Tensor | None = None,
        classifier: str = "auto",
        rank: int = 64,
        n_hidden: int = 1,
        norm_scope: Literal["shape", "layer", "none"] = "shape",
        share: Literal["shape", "none"] = "shape",
        transforms: Literal["joint", "separate", "inputs", "gradients", "smaller"] = "joint",
        alpha: float | Literal["auto"] = "auto",
        c_edit: float = 0.1,
        c_loc: float = 1.0,
        loss: SampleLoss | None = None,
        store_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        check_arguments(TrainedEditor, locals())
        self.c_edit, self.c_loc = check_number("c_edit", c_edit, above=0), check_number("c_loc", c_loc, at_least=0)
        self.seed = check_count("seed", seed, at_least=0)
        self.store_rank = None if store_rank is None else check_count("store_rank", store_rank)
        self._settings: dict[str, Any] = {
            "rank": rank,
            "n_hidden": n_hidden,
            "norm_scope": norm_scope,
            "share": share,
            "transforms": transforms,
        }
        self._auto = alpha == "auto"
        start = 1.0 if alpha == "auto" else check_number("alpha", alpha, above=0)
        self._network = EditedNetwork(model, layers, example, classifier)
        self._objective = objective_for(self._network.outputs, loss)
        self.networks = self._new_networks()
        self.networks.alpha_start.fill_(start)
        self._fitted = not self._auto and norm_scope == "none"
        self._log = EditLog()
        self._made_for: dict[str, Tensor] = {}  # some numbers of each weight for which it has its statistics
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        state = "trained" if not self.networks.is_identity else "not trained" if self._fitted else "without statistics"
        return f"{type(self).__name__}({type(self.model).__name__}, {self.layers}, {state}, {len(self._log)} edits)"

    @property
    def model(self) -> nn.Module:
        """The network that is edited, not its compiled form."""
        return self._network.model

    @property
    def layers(self) -> list[str]:
        """Names of the edited layers, in the order of execution."""
        return list(self._network.layers)

    @property
    def edits_features(self) -> bool:
        """Whether a layer before the classifier is edited, so that features move."""
        return not set(self._network.layers) <= set(self._network.heads)

    @property
    def is_fitted(self) -> bool:
        """Whether it has its statistics."""
        return self._fitted

    @property
    def excluded(self) -> dict[str, str]:
        """Why other linear and convolutional layers cannot be edited, by name."""
        return dict(self._network.excluded)

    @property
    def alpha(self) -> dict[str, float]:
        """The step size of each layer now; training may turn its sign."""
        return dict(zip(self.layers, self.networks.alpha.tolist(), strict=True))

    @property
    def classes(self) -> int:
        """How many answers the network has."""
        return self._objective.classes

    def checked(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, …) and labels (B,) where and as the network takes them, or raise a BatchError."""
        return self._pair((x, y))

    def answers(self, x: Tensor) -> Tensor:
        """Return the network's answers to images (B, …), (B,) int64."""
        return self._objective.answers(self._network.logits(x))

    def ranked(self, x: Tensor) -> Tensor:
        """Return the classes from the most to the least probable for images (B, …), (B, C) int64."""
        return self._network.logits(x).argsort(dim=1, descending=True)

    def fit_statistics(self, data: Iterable[tuple[Tensor, Tensor]], edits: int = _STATISTICS_EDITS) -> None:
        """Take the statistics of rows, and with ``alpha="auto"`` the first step sizes, from edits: once, and first.

        Args:
            data: Batches of images (B, …) and the labels that they would be given.
            edits: How many are used at most, at least 2.

        Raises:
            ConfigurationError: If that was done before. In each case the editor stays as it was.
            NotFittedError: If there are too few, or no gradient reaches a layer.
            BatchError: If a batch is not as above.
        """
        check_count("edits", edits, at_least=2)
        if self._fitted:
            raise ConfigurationError("the editor has its statistics already, and they do not change; make a new editor")
        fresh, singles, left = self._new_networks(), list[dict[str, Rows]](), edits
        for batch in data:
            x, y = (each[:left] for each in self._pair(batch))
            left -= len(x)
            alone = min(len(x), _ALPHA_EDITS - len(singles))  # step sizes are for single edits
            pieces = [*[1] * alone, *[len(x) - alone] * (len(x) > alone)]
            for images, labels in zip(torch.split(x, pieces), torch.split(y, pieces), strict=True):
                rows = self._rows(images, labels)
                fresh.collect(rows)
                if len(singles) < _ALPHA_EDITS:
                    singles.append(rows)
            if not left:
                break
        if not singles:
            raise NotFittedError("data has no edits; give batches of images and the labels that they would get")
        fresh.check()
        if self._auto:
            with torch.no_grad():
                first = [{name: float(_product(each).norm()) for name, each in fresh(rows).items()} for rows in singles]
                for place, (name, weight) in enumerate(self._network.weights().items()):
                    sizes = [each[name] for each in first if each[name] > 0]
                    if not sizes:
                        raise NotFittedError(
                            f"no gradient of the first edits reaches {name!r}; leave it out (layers=…)"
                        )
                    step = _FIRST_SIZE * weight.detach().norm() / torch.tensor(sizes).median()
                    self.networks.alpha_start[place] = step
        self.networks.statistics = fresh.statistics
        self._made_for = self._sampled()
        self._fitted = True

    def parameter_groups(self, lr: float | None = None, alpha_lr: float = 0.1) -> list[dict[str, Any]]:
        """Return the parameters for one Adam in two groups, networks and step sizes.

        Args:
            lr: Of the networks, by default 1e-3 for a network below a million parameters, else 1e-4.
            alpha_lr: Of the step sizes, as multiples of their start.
        """
        if lr is None:
            large = sum(parameter.numel() for parameter in self._network.model.parameters()) >= _LARGE
            lr = 1e-4 if large else 1e-3
        return [
            {"params": list(self.networks.networks.parameters()), "lr": check_number("lr", lr, above=0)},
            {"params": [self.networks.steps], "lr": check_number("alpha_lr", alpha_lr, above=0)},
        ]

    def meta_loss(
        self, x_e: Tensor, y_e: Tensor, x_eq: Tensor | None = None, y_eq: Tensor | None = None, *, x_loc: Tensor
    ) -> dict[str, Tensor]:
        r"""Return what a training step of the editor makes smaller: :math:`c_e L_{edit} + c_l L_{loc}`.

        The edit is that of the network as it is now; several images are edited together. Nothing is changed.

        Args:
            x_e: (B, …) images to edit.
            y_e: (B,) their new labels.
            x_eq: (M, …) equivalents, which shall get the same.
            y_eq: (M,) their labels.
            x_loc: (K, …) images whose answers shall not move; none of those edited.

        Returns:
            ``loss``, ``edit`` (mean over images and equivalents) and ``locality`` (mean KL divergence) with their
            graph, which ends in the editor's parameters; ``success``, the share of images and equivalents with the
            wanted answer; ``size`` (L,), of the edit of each layer as a share of the weight's.

        Raises:
            BatchError: If a batch is not as above.
            NotFittedError: If statistics are missing.
        """
        self._check_fitted()
        x, y = self._pair((x_e, y_e))
        if (x_eq is None) != (y_eq is None):
            raise BatchError("x_eq and y_eq must be given together: equivalents and their labels")
        others = x[:0], y[:0]
        if x_eq is not None and len(x_eq):
            others = self._pair((x_eq, y_eq), ("x_eq", "y_eq"))
        kept = self._network.images("x_loc", x_loc)
        for name, part in (("x_eq", others[0]), ("x_loc", kept)):
            if part.shape[1:] != x.shape[1:]:
                raise BatchError(f"{name} must have images as x_e, {tuple(x.shape[1:])}, got {tuple(part.shape[1:])}")
        labels = torch.cat([y, others[1]])
        weights = self._network.weights()
        with torch.autocast(x.device.type, enabled=False):
            deltas = {name: _product(each) for name, each in self.networks(self._rows(x, y)).items()}
            edited = {
                name: (weights[name].detach() + delta.view_as(weights[name])).to(weights[name].dtype)
                for name, delta in deltas.items()
            }
        with torch.no_grad():
            answers = self._network.logits_with({}, kept)
        logits, now = self._network.logits_with(edited, torch.cat([x, others[0], kept])).tensor_split([len(labels)])
        edit = self._objective.losses(logits, labels).mean()
        locality = self._objective.divergence(answers, now).mean()
        sizes = [delta.detach().norm() / weights[name].detach().norm() for name, delta in deltas.items()]
        return {
            "loss": self.c_edit * edit + self.c_loc * locality,
            "edit": edit,
            "locality": locality,
            "success": self._objective.hits(logits.detach(), labels).double().mean(),
            "size": torch.stack(sizes),
        }

    # ---- how it is done

    def _new_networks(self) -> EditorNetworks:
        networks = EditorNetworks(self._network.shapes, **self._settings, seed=self.seed)
        weight = self._network.weights()[self.layers[0]]
        return networks.to(weight.device, computed_in(weight))

    def _pair(self, batch: Any, names: tuple[str, str] = ("x", "y")) -> tuple[Tensor, Tensor]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise BatchError(f"a batch must be (images, labels), got {in_short(batch)}")
        x = self._network.images(names[0], batch[0])
        return x, self._objective.targets(names[1], batch[1], len(x), x.device)

    def _rows(self, x: Tensor, y: Tensor) -> dict[str, Rows]:
        self.networks.to(x.device)
        return self._network.rows(x, lambda logits: self._objective.losses(logits, y))

    def _factors(
        self,
        x: Tensor,
        y: Tensor,
        protect: Mapping[str, Tensor] | None = None,
        within: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Factors] | None:
        """Return what an edit would add, ``None`` where no gradient reaches any layer."""
        self._check_fitted()
        check_limits(protect, within, {name: tuple(each.shape) for name, each in self._network.weights().items()})
        rows = self._rows(x, y)
        if not any(len(each.inputs) for each in rows.values()):
            return None
        if self.networks.is_identity:
            self._warn(
                "the editor is not trained: its edits are plain gradient steps on normalised rows; train it "
                "for edits that stay local (meta_loss, or strategy='editor_training', clkit recipes mend_train)"
            )
        self._check_weights()
        with exact(), torch.autocast(x.device.type, enabled=False):
            factors: dict[str, Rows] = self.networks(rows)
            for name, span in (protect or {}).items():
                inputs, own = factors[name].inputs, span.to(factors[name].inputs)
                left = inputs - inputs @ own @ own.T
                keep = float(left.norm()) > _ROUNDING * float(inputs.norm())
                factors[name] = factors[name]._replace(inputs=left if keep else torch.zeros_like(left))
            stored = {name: stored_factors(each, self.store_rank) for name, each in factors.items()}
            for name, mask in (within or {}).items():
                inside = torch.where(mask.cpu().flatten(1), stored[name].delta(), 0)
                stored[name] = Factors(None, None, inside.to(factors[name].inputs.dtype))
            return None if all(each.is_nothing for each in stored.values()) else stored

    def _sampled(self) -> dict[str, Tensor]:
        """Return some numbers of each weight without the edits of the log."""
        weights = {name: self._log.original(name, each.detach()) for name, each in self._network.weights().items()}
        return {
            name: each.flatten()[:: -(-each.numel() // _SAMPLED)].float().cpu().clone()
            for name, each in weights.items()
        }

    def _check_weights(self) -> None:
        for name, own in (self._sampled() if self._made_for else {}).items():
            then = self._made_for.get(name, own[:0])
            if then.shape != own.shape or float((own - then).norm()) > _APART * float(then.norm()):
                self._warn(
                    f"the weight of {name!r} is not the one that the editor was made for, so that its edits do more "
                    "damage; load that network, or train an editor for this one"
                )
                return

    def _check_fitted(self) -> None:
        if not self._fitted:
            raise NotFittedError("the editor has no statistics of gradients yet: call fit_statistics() first")

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(f"{message} (said once)", stacklevel=level_outside())


def _product(factors: Rows) -> Tensor:
    return factors.gradients.T @ factors.inputs
