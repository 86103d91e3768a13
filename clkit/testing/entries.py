"""What the contract must know of a method, and the table of clkit's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from clkit.arguments import check_arguments
from clkit.callbacks import (
    AEFOCL,
    DEUP,
    DST,
    KLDA,
    LDA,
    MEND,
    NMC,
    AnaCP,
    DSimplex,
    Lift,
    StreamEvaluation,
    StreamProgressBar,
)
from clkit.errors import ArgumentError
from clkit.methods import KLDA as KLDAHead  # noqa: N811  a callback and its head share the method's name
from clkit.methods import AnaCP as AnaCPHead
from clkit.methods import AnalyticHead, LDAHead, MetaExamples, NearestMeanHead, Novelty, PruneSchedule
from clkit.strategies import (
    DERPPStrategy,
    EditorSettings,
    EditorTrainingStrategy,
    ERACEStrategy,
    ERStrategy,
    GradientFreeStrategy,
    LearningStrategy,
    MemorySettings,
    OnProStrategy,
    SCRStrategy,
)

__all__ = ["Entry", "clkit_entries"]

Kind = Literal["head", "callback", "strategy"]
Processes = Literal["exact", "agree", "refused"]


@dataclass(frozen=True, eq=False)
class Entry:
    """A method under the contract: how to make it, and the facts about it that no check can find out.

    What is declared absent is checked to be refused by name.

    Args:
        name: What the checks call it; letters, digits and ``_ . -``.
        kind: ``"head"``, ``"callback"`` or ``"strategy"``.
        make: Makes a new one. A head is made by ``make(in_features)``, the others by ``make()``. Checks in several
            processes need one that can be pickled: a class, or :func:`functools.partial` of one, that can be imported.
        yaml: How it is written in a YAML file, ``{"class_path": …, "init_args": …}``; read from ``make`` by default.
        registered: Of a strategy: its name for ``Trainer(strategy="…")``, if it has one.
        learns: Whether it learns from training batches. One that only watches may keep what it sees of others, and
            need not refuse a bad batch.
        reads_batches: Of a callback that learns: whether it learns from batches itself. One that follows the optimizer
            learns what the module's own step makes of them, bad ones included, in the dtype of the weights.
        needs_gradients: Of a callback: whether it cannot run where the network is not trained.
        changes_training: Of a callback: whether it means to change how the network is trained.
        replaces_classifier: Of a callback: whether it puts a part of its own in the place of the classifier, to
            stay there.
        processes: What several processes give: ``"exact"``: what one process gives, within ``tolerance``; ``"agree"``:
            the same on every process; ``"refused"``: an error by name.
        merges: Of a head: whether it offers ``merge``.
        subtracts: Of a head: whether it offers ``subtract``.
        tolerance: Largest relative difference where numbers are added in another order.
        volatile: Entries of the saved state that no two runs share, such as clock times.

    Raises:
        ArgumentError: If a value is not allowed.

    Example:
        >>> from clkit.callbacks import NMC
        >>> Entry("nmc", "callback", NMC).configuration
        {'class_path': 'clkit.callbacks.nmc.NMC'}
    """

    name: str
    kind: Kind
    make: Callable[..., Any]
    yaml: Mapping[str, Any] | None = None
    registered: str | None = None
    learns: bool = True
    reads_batches: bool = True
    needs_gradients: bool = False
    changes_training: bool = False
    replaces_classifier: bool = False
    processes: Processes = "exact"
    merges: bool = True
    subtracts: bool = True
    tolerance: float = 1e-12
    volatile: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        for argument, allowed in (("kind", get_args(Kind)), ("processes", get_args(Processes))):
            value = getattr(self, argument)
            if value not in allowed:
                raise ArgumentError(f"{argument} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if not callable(self.make):
            raise ArgumentError(
                f"make must be a class or a function that makes the {self.kind}, got {self.make!r}; "
                "pass the class itself, not an object of it"
            )

    @property
    def configuration(self) -> dict[str, Any] | None:
        """What stands in a YAML file, or ``None`` where ``make`` is no class that could be imported."""
        if self.yaml is not None:
            return dict(self.yaml)
        maker, options = (self.make.func, self.make.keywords) if isinstance(self.make, partial) else (self.make, {})
        if not isinstance(maker, type) or "<locals>" in maker.__qualname__:
            return None
        path = {"class_path": f"{maker.__module__}.{maker.__qualname__}"}
        return {**path, "init_args": dict(options)} if options else path


def clkit_entries() -> list[Entry]:
    """Return the table of clkit's own heads, callbacks and strategies; a new method joins by adding its line.

    Example:
        >>> [entry.registered for entry in clkit_entries() if entry.registered]
        ['gradient_free', 'er', 'er_ace', 'der_pp', 'scr', 'onpro', 'editor_training']
    """
    head = partial(Entry, kind="head")
    callback = partial(Entry, kind="callback")
    strategy = partial(Entry, kind="strategy", processes="agree")
    return [
        head("AnalyticHead", make=AnalyticHead),
        head("AnalyticHead-lift-bias", make=partial(AnalyticHead, expansion_dim=11, bias=True)),
        head("AnalyticHead-pfg", make=partial(AnalyticHead, balance="pfg"), tolerance=1e-9),
        head("AnalyticHead-expected", make=partial(AnalyticHead, balance="expected"), tolerance=1e-11),
        head("AnalyticHead-reweight", make=partial(AnalyticHead, balance="reweight"), tolerance=1e-11),
        head(
            "AnalyticHead-recursive",
            make=partial(AnalyticHead, solver="recursive"),
            merges=False,
            subtracts=False,
            processes="refused",
            tolerance=1e-9,
        ),
        head("NearestMeanHead", make=NearestMeanHead),
        head("NearestMeanHead-cosine", make=partial(NearestMeanHead, metric="cosine")),
        head("LDAHead", make=LDAHead, tolerance=1e-11),
        head("LDAHead-unit", make=partial(LDAHead, unit=True), tolerance=1e-11),
        head("KLDAHead", make=partial(KLDAHead, expansion_dim=24, bandwidth=[0.1, 0.5]), tolerance=1e-9),
        head("AnaCPHead", make=partial(AnaCPHead, expansion_dim=20, maps=2, draws=5), tolerance=1e-8),
        head(
            "AnaCPHead-nearest",
            make=partial(AnaCPHead, expansion_dim=20, maps=1, readout="nearest", targets="unwhitened", gamma=1.0),
            tolerance=1e-9,
        ),
        head("Novelty", make=Novelty, tolerance=1e-9),
        callback("AEFOCL", make=AEFOCL),
        callback(
            "AEFOCL-lift",
            make=partial(AEFOCL, lift=Lift(20), balance="none", name="lift"),
            yaml={
                "class_path": "clkit.callbacks.AEFOCL",
                "init_args": {"lift": {"expansion_dim": 20}, "balance": "none", "name": "lift"},
            },
        ),
        callback("AEFOCL-reweight", make=partial(AEFOCL, balance="reweight", name="reweight")),
        callback(
            "AEFOCL-recursive",
            make=partial(AEFOCL, solver="recursive", balance="none", name="recursive"),
            processes="refused",
        ),
        callback("NMC", make=NMC),
        callback(
            "DST",
            make=partial(DST, density=0.2, schedule=PruneSchedule(update_every=1), table=False),
            yaml={
                "class_path": "clkit.callbacks.DST",
                "init_args": {"density": 0.2, "schedule": {"update_every": 1}, "table": False},
            },
            reads_batches=False,
            needs_gradients=True,
            changes_training=True,
            processes="agree",
        ),
        callback(
            "DSimplex",
            make=partial(DSimplex, num_vertices=16, alignment="hoc"),
            yaml={"class_path": "clkit.callbacks.DSimplex", "init_args": {"num_vertices": 16, "alignment": "hoc"}},
            reads_batches=False,
            needs_gradients=True,
            changes_training=True,
            replaces_classifier=True,
            processes="agree",
        ),
        callback("LDA", make=LDA),
        callback("LDA-unit", make=partial(LDA, unit=True, name="unit")),
        callback("KLDA", make=partial(KLDA, bandwidth=[0.1, 0.5], expansion_dim=24)),
        callback("AnaCP", make=partial(AnaCP, expansion_dim=20, maps=2, draws=5)),
        callback("MEND", make=MEND, learns=False),
        callback(
            "DEUP",
            make=partial(DEUP, "module", abstain_rate=0.2),
            yaml={"class_path": "clkit.callbacks.DEUP", "init_args": {"predictor": "module", "abstain_rate": 0.2}},
            reads_batches=False,  # what the module's own step makes of them is what it judges
            needs_gradients=True,  # alone, for want of another predictor
            processes="agree",
            # what each process has of its own; and the course of an earlier run's evaluations, of which a kill may
            # lose the last
            volatile=("processes", "report"),
        ),
        callback(
            "StreamEvaluation",
            make=partial(StreamEvaluation, table=False, figures=False),
            learns=False,
            volatile=("seconds",),
        ),
        callback("StreamProgressBar", make=StreamProgressBar, learns=False),
        strategy("LearningStrategy", make=LearningStrategy, learns=False),
        strategy(
            "GradientFreeStrategy",
            make=GradientFreeStrategy,
            learns=False,
            registered="gradient_free",
            processes="exact",
        ),
        strategy("GradientFreeStrategy-warmup", make=partial(GradientFreeStrategy, warmup_epochs=1), learns=False),
        strategy(
            "GradientFreeStrategy-lora",
            make=partial(GradientFreeStrategy, warmup_epochs=1, warmup="lora", lora_rank=2),
            learns=False,
        ),
        strategy("ERStrategy", make=ERStrategy, registered="er"),
        strategy("ERACEStrategy", make=ERACEStrategy, registered="er_ace"),
        strategy("DERPPStrategy", make=DERPPStrategy, registered="der_pp"),
        strategy("SCRStrategy", make=SCRStrategy, registered="scr"),
        strategy("OnProStrategy", make=OnProStrategy, registered="onpro"),
        strategy("EditorTrainingStrategy", make=EditorTrainingStrategy, registered="editor_training"),
        strategy(
            "EditorTrainingStrategy-soon",
            make=partial(
                EditorTrainingStrategy,
                editor=EditorSettings(rank=4),
                examples=MetaExamples(n_edits=2, n_loc=3),
                stat_edits=4,
            ),
            yaml={
                "class_path": "clkit.strategies.EditorTrainingStrategy",
                "init_args": {
                    "editor": {"rank": 4},
                    "examples": {"n_edits": 2, "n_loc": 3},
                    "stat_edits": 4,
                },
            },
        ),
        strategy(
            "OnProStrategy-sharded",
            make=partial(OnProStrategy, memory=MemorySettings(scope="sharded")),
            yaml={"class_path": "clkit.strategies.OnProStrategy", "init_args": {"memory": {"scope": "sharded"}}},
        ),
    ]
