"""What an editor is trained on: edits out of a batch, each with its equivalents and with images to leave alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from clkit.arguments import check_arguments
from clkit.errors import ArgumentError, BatchError
from clkit.methods._checks import check_count, check_probability, generator
from clkit.methods._trained_editor import TrainedEditor
from clkit.methods.replay.views import RandomViews

__all__ = ["Edits", "MetaExample", "MetaExamples"]

# so that no two purposes of an edit share their draws
_LABEL, _VIEWS, _LOCALITY = range(3)

_STRONG, _TRIES = 3, 4  # an odd copy of an image is an equivalent of an equivalent of one; so many are looked at
_LIKELY = 5  # answers among which a plausible other one is drawn


class Edits(NamedTuple):
    """Images and what they shall become.

    Attributes:
        x: (E, …) images.
        y: (E,) int64, their new labels.
        old: (E,) int64, the answers to them now.
    """

    x: Tensor
    y: Tensor
    old: Tensor


class MetaExample(NamedTuple):
    """The arguments of :meth:`GradientEditor.meta_loss <clkit.methods.GradientEditor.meta_loss>`, by their names."""

    x_e: Tensor
    y_e: Tensor
    x_eq: Tensor
    y_eq: Tensor
    x_loc: Tensor


@dataclass(frozen=True)
class MetaExamples:
    """How batches of labelled images become edits on which an editor is trained.

    The first rows of a batch are edited, each on its own and from the network as it is; the others are there for
    locality. Nothing is drawn from the global random state: each draw is a function of numbers that are passed on.

    Args:
        n_edits: Rows edited of a batch, at least 1; of several processes together. A batch of few rows has fewer, since
            one is left for locality.
        together: Rows that are one edit, at least 1: more than one trains for batches of edits. It divides ``n_edits``.
        n_loc: Images for locality of each edit, at least 1.
        hard_locality: Share of them of the old or the new class of the edit, as far as the batch has any.
        labels: What an edit wants: ``"random"``, any class but the network's answer; ``"likely"``, one of its five most
            probable classes; ``"truth"``, the label, for a copy of the image so odd that the network is wrong about it;
            ``"mixed"``, ``"truth"`` for one half and ``"random"`` for the other. Where no copy is answered wrongly the
            label is random, too.
        equivalents: Other views of each edited image that shall get its label, at least 0.
        equivalence: ``(images (B, …), generator) -> images`` makes such views; ``None`` for
            :class:`~clkit.methods.RandomViews`. An odd copy is one of a view of a view.

    Raises:
        ArgumentError: If a value is not allowed.

    Example:
        >>> from torch import nn
        >>> from clkit.methods import GradientEditor
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> editor = GradientEditor(net, "1", example=torch.zeros(1, 1, 4, 4))
        >>> x, y = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
        >>> drawn = MetaExamples(n_edits=2, n_loc=6, labels="random").draw(editor, x, y, seed=0, batch=7)
        >>> [tuple(part.shape) for part in next(drawn)]
        [(1, 1, 4, 4), (1,), (2, 1, 4, 4), (2,), (6, 1, 4, 4)]

    Source: the coin between two kinds of labels follows E. Mitchell et al., arXiv 2110.11309, section 5; images,
    their views and hard locality are not in the paper.
    """

    n_edits: int = 8
    together: int = 1
    n_loc: int = 32
    hard_locality: float = 0.25
    labels: Literal["mixed", "random", "likely", "truth"] = "mixed"
    equivalents: int = 2
    equivalence: Callable[[Tensor, Any], Any] | None = None  # Any: the command line takes types for classes to build

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        for name in ("n_edits", "together", "n_loc"):
            check_count(name, getattr(self, name))
        check_count("equivalents", self.equivalents, at_least=0)
        check_probability("hard_locality", self.hard_locality)
        if self.n_edits % self.together:
            raise ArgumentError(f"together must divide n_edits={self.n_edits}, got {self.together}")

    def draw(
        self, editor: TrainedEditor, x: Tensor, y: Tensor, *, seed: int, epoch: int = 0, batch: int = 0
    ) -> Iterator[MetaExample]:
        """Yield the meta-examples of a batch; there are none where it has less than ``together + 1`` rows.

        Args:
            editor: Whose network answers.
            x: (B, …) images.
            y: (B,) int64, their true labels.
            seed: At least 0; with the next two a draw is a function of it.
            epoch: Number of the epoch.
            batch: Number of the batch in it.

        Raises:
            BatchError: If a batch is not as above.
        """
        x, y = editor.checked(x, y)
        if y.ndim > 1:
            raise BatchError(f"edits are drawn for one label an image, and y has the shape {tuple(y.shape)}")
        count = self.edited(len(x))
        edits = self.edits(editor, x[:count], y[:count], (seed, epoch, batch))
        return self.completed(edits, x[count:], y[count:], (seed, epoch, batch))

    def edited(self, rows: int, process: int = 0, processes: int = 1) -> int:
        """Return how many of a batch of so many rows are edited, of the batch that one of several processes has."""
        groups = self.n_edits // self.together
        share = groups * (process + 1) // processes - groups * process // processes
        return self.together * max(0, min(share, (rows - 1) // self.together))

    def edits(self, editor: TrainedEditor, x: Tensor, y: Tensor, numbers: Sequence[int], first: int = 0) -> Edits:
        """Return what images shall become, each a function of ``numbers`` and of its own number, from ``first`` on."""
        old = editor.answers(x) if len(x) else y
        images, wanted = x.clone(), torch.empty_like(old)
        classes = editor.classes
        for row in range(len(x)):
            draws = generator(*numbers, _LABEL, first + row)
            coin, other = float(torch.rand((), generator=draws)), int(torch.randint(1, classes, (), generator=draws))
            wanted[row] = (old[row] + other) % classes
            if self.labels == "likely" and classes > 2:
                ranked = editor.ranked(x[row : row + 1])[0, 1:_LIKELY]
                wanted[row] = ranked[other % len(ranked)]
            elif self.labels == "truth" or (self.labels == "mixed" and coin < 0.5):
                odd = self._odd_copy(editor, x[row : row + 1], y[row : row + 1], draws)
                if odd is not None:
                    images[row], old[row], wanted[row] = odd[0][0], odd[1][0], y[row]
        return Edits(images, wanted, old)

    def completed(
        self, edits: Edits, others: Tensor, labels: Tensor, numbers: Sequence[int], first: int = 0
    ) -> Iterator[MetaExample]:
        """Yield edits with views of them and with some of the other images, whose labels are (N,)."""
        for start in range(0, len(edits.x), self.together):
            x, y, old = (each[start : start + self.together] for each in edits)
            number = first + start
            views = self._views(x.repeat_interleave(self.equivalents, dim=0), generator(*numbers, _VIEWS, number))
            hard = torch.isin(labels, torch.cat([y, old])).cpu()
            chosen = self._chosen(hard, generator(*numbers, _LOCALITY, number)).to(others.device)
            yield MetaExample(x, y, views, y.repeat_interleave(self.equivalents), others[chosen])

    def _chosen(self, hard: Tensor, draws: torch.Generator) -> Tensor:
        """Return rows in a drawn order, hard ones first as far as they are asked for, the rest of any kind."""
        order = torch.randperm(len(hard), generator=draws)
        first = order[hard[order]][: round(self.hard_locality * min(self.n_loc, len(hard)))]
        rest = order[~torch.isin(order, first)]
        return torch.cat([first, rest])[: self.n_loc]

    def _odd_copy(
        self, editor: TrainedEditor, x: Tensor, y: Tensor, draws: torch.Generator
    ) -> tuple[Tensor, Tensor] | None:
        """Return the first of some odd copies that is answered wrongly, with the answer."""
        copies = x.repeat_interleave(_TRIES, dim=0)
        for _ in range(_STRONG):
            copies = self._views(copies, draws)
        answers = editor.answers(copies)
        wrong = (answers != y).nonzero()[:1, 0]
        return (copies[wrong], answers[wrong]) if len(wrong) else None

    def _views(self, x: Tensor, draws: torch.Generator) -> Tensor:
        if not len(x):
            return x
        views = (self.equivalence or RandomViews())(x, draws)
        if not isinstance(views, Tensor) or views.shape != x.shape:
            seen = f"shape {tuple(views.shape)}" if isinstance(views, Tensor) else f"a {type(views).__name__}"
            raise BatchError(f"equivalence must return a view of each image, of shape {tuple(x.shape)}, got {seen}")
        return views.detach()
