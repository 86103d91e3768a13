"""The predictors that a DEUP callback watches in a run, the reader of each, and what was learned at their layers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import lightning.pytorch as pl
from torch import nn

from clkit.callbacks._deup_choices import check
from clkit.callbacks._deup_parts import Settings
from clkit.callbacks._last_epoch import backbone_trains
from clkit.callbacks._learned_layers import LearnedLayers
from clkit.callbacks._recording import module_predicts
from clkit.callbacks._watched import Watched
from clkit.callbacks.base import MODULE, FeatureCallback, Predictor
from clkit.distributed import gather_objects, rank
from clkit.errors import ConfigurationError, StateError, TapError
from clkit.features.observer import BatchObserver, FeaturesFrom
from clkit.schema import Instance, Many, Named, Nested, Table, Whole, read_own
from clkit.stream._lightning import callbacks_of, datamodule_of

__all__ = ["Watching"]


class Watching:
    """The predictors under watch, of one run after the other.

    Args:
        wanted: Names of predictors, ``"auto"`` for all.
        settings: What is common to all.
        forward: Which pass the module's errors come from.
        say: How to tell the user something, once.

    Attributes:
        watched: The predictors by name.
        observer_of: What reads the features of each.
        observers: The same readers with the part that each reads for, as a :class:`FeatureCallback` has them.
        layers: What was learned.
    """

    def __init__(
        self,
        wanted: Literal["auto"] | str | Sequence[str],
        settings: Settings,
        forward: FeaturesFrom,
        say: Callable[[str], None],
    ) -> None:
        self.wanted, self.settings, self.forward, self.say = wanted, settings, forward, say
        self.watched: dict[str, Watched] = {}
        self.observer_of: dict[str, BatchObserver] = {}
        self.observers: dict[BatchObserver, Any] = {}
        self.layers = self._new_layers()

    def _new_layers(self) -> LearnedLayers:
        return LearnedLayers(self.settings.records, novelty=self.settings.false_alarm_rate is not None)

    # ---- one run

    def join(self, trainer: pl.Trainer, module: pl.LightningModule, owner: FeatureCallback) -> None:
        """Find the predictors of a run, and join the readers of each; the callback itself reads for the module.

        Raises:
            ConfigurationError: For a predictor that there is not, or none at all.
        """
        found: dict[str, Predictor | None] = {
            each.name: each for each in callbacks_of(trainer) if isinstance(each, Predictor)
        }
        if self.wanted == "auto":
            wanted = [*([MODULE] if module_predicts("auto", trainer, (), grafted=False) else []), *found]
        else:
            wanted = [self.wanted] if isinstance(self.wanted, str) else list(self.wanted)
        if odd := [name for name in wanted if name not in found and name != MODULE]:
            raise ConfigurationError(
                f"{owner.state_key}: there is no predictor {odd[0]!r}; this run has {', '.join([MODULE, *found])}"
            )
        if not wanted:
            raise ConfigurationError(
                f"{owner.state_key} watches predictors, and {type(trainer.strategy).__name__} trains no classifier: "
                "add one to the callbacks, AEFOCL() or NMC() say"
            )
        for name in wanted:
            if name not in self.watched:
                self.watched[name] = Watched(name, found.get(name), self.settings, self.say)
            self.watched[name].predictor = found.get(name)
        self.watched = {name: self.watched[name] for name in wanted}
        self.observer_of = {name: BatchObserver.attach(trainer, module, found.get(name) or owner) for name in wanted}
        self.observers = {observer: found.get(name) or owner for name, observer in self.observer_of.items()}
        if MODULE in wanted and self.forward == "eval":
            self.observers[self.observer_of[MODULE]] = owner

    def leave(self, trainer: pl.Trainer) -> None:
        """Give the readers back."""
        for name, observer in self.observer_of.items():
            observer.detach(trainer)
            self.watched[name].predictor = self.watched[name].classifier = None
        self.observer_of, self.observers = {}, {}

    def refresh(self, trainer: pl.Trainer, moment: Hashable) -> None:
        """Look for the tapped layers again; a module without a classifier is not watched."""
        for name, observer in tuple(self.observer_of.items()):
            try:
                observer.refresh(moment)
            except TapError as error:
                if name != MODULE or self.wanted != "auto" or len(self.watched) == 1:
                    raise
                self.say(f"the module is not watched: it has no classifier ({error})")
                del self.watched[name], self.observer_of[name]
                if observer not in self.observer_of.values():
                    del self.observers[observer]
                observer.detach(trainer)
        self.settle(trainer)

    def settle(self, trainer: pl.Trainer) -> None:
        """Settle what is to be recorded of each predictor, now that the network is there.

        Raises:
            ConfigurationError: For what was asked for and cannot be had.
        """
        calibrates = getattr(datamodule_of(trainer), "evaluated_on", "") == "validation"
        for name, watched in self.watched.items():
            observer = self.observer_of[name]
            if trainer.state.fn == "fit" or not watched.names:  # an evaluation judges by what was learned
                watched.again = not _rows_come_once(trainer)
                watched.choose(trains=network_trains(trainer, observer), calibrates=calibrates)
                if trainer.state.fn == "fit":
                    check(watched, calibrates=calibrates)
            classifier = observer.tap.classifier
            watched.classifier = classifier if isinstance(classifier, nn.Linear) else None

    def source(self, name: str) -> FeaturesFrom:
        """Return which pass a predictor's features come from."""
        return getattr(self.watched[name].predictor, "forward", self.forward)

    # ---- state

    def state_dict(self, place: dict[str, Any]) -> dict[str, Any]:
        """Return everything that was learned, put together over processes, and the ``place`` of each.

        A call on all of them.
        """
        self.layers.synchronize()
        own = {name: watched.own_state() for name, watched in self.watched.items()}
        place = {**place, "numbered": self.layers.numbered, "watched": own}
        return {
            "watched": {name: watched.state_dict() for name, watched in self.watched.items()},
            "layers": self.layers.state_dict(),
            "processes": gather_objects(place, "where they are"),
        }

    def load_state_dict(self, state: dict[str, Any], owner: str) -> dict[str, Any]:
        """Take it up, and return the place of this process.

        Raises:
            StateError: If it is damaged, or of other settings; nothing is changed then.
        """
        saved = read_own(state, _TABLE, owner)
        places = saved["processes"]
        if not places:
            raise StateError(f"{owner}: 'processes' is empty; the file is damaged")
        place: dict[str, Any] = places[rank() if rank() < len(places) else 0]  # of another number of processes
        layers = self._new_layers()
        layers.load_state_dict(saved["layers"], owner)
        watched = {}
        for name, shared in saved["watched"].items():
            if self.observer_of and name not in self.observer_of:  # this run has no such predictor
                continue
            present = self.watched[name].predictor if name in self.watched else None
            watched[name] = Watched(name, present, self.settings, self.say)
            watched[name].load_state_dict(shared, place["watched"].get(name), owner)
        layers.numbered = place["numbered"]
        self.layers, self.watched = layers, {**self.watched, **watched}
        return place


_TABLE: Table = {
    "watched": Named(Instance(dict)),
    "layers": Instance(dict),
    "processes": Many(Nested({"at": Whole(), "numbered": Whole(), "watched": Named(Instance(dict))})),
}


def network_trains(trainer: pl.Trainer, observer: BatchObserver) -> bool:
    """Whether the network that gives features changes from one experience to the next."""
    strategy = trainer.strategy
    trained = getattr(strategy, "trains_module", True) and not getattr(strategy, "warmup_epochs", 0)
    return bool(trained and backbone_trains(observer.tap))


def _rows_come_once(trainer: pl.Trainer) -> bool:
    """Whether each sample is trained on in one epoch of its experience alone; a plain fit tells how many it has."""
    data = datamodule_of(trainer)
    if hasattr(data, "epochs_per_experience"):
        return bool(data.epochs_per_experience == 1)
    return trainer.max_epochs in (None, -1, trainer.current_epoch + 1)
