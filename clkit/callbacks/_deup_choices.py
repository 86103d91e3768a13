"""From which errors, and by which features, the errors of a predictor are learned, where the user leaves that open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clkit.errors import ConfigurationError

if TYPE_CHECKING:
    from clkit.callbacks._watched import Watched

__all__ = ["OF_LOGITS", "OF_SCORES", "check", "choices", "no_sets", "nothing_refused"]

OF_SCORES = ("confidence", "margin")
OF_LOGITS = ("entropy", "energy")
_OF_ROWS = ("log_maha", "gap", "log_leverage", "log_knn")


def choices(watched: Watched, trains: bool, calibrates: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the features and the sources for a predictor.

    ``trains`` says whether the network that gives its features still trains, ``calibrates`` whether there are samples
    kept out of training, to be read again.
    """
    rows, stale = watched.settings.records.memory, trains and not calibrates
    sources: Sequence[str] = watched.settings.sources
    names: Sequence[str] = watched.settings.features
    if sources == "auto":
        left_out = callable(getattr(watched.predictor, "make_head", None)) and rows == "features"
        first = "calibration" if calibrates else "prequential"
        if not trains:
            first = "gaussian" if rows == "gaussian" else "loo" if left_out and not watched.again else first
        sources = (first,) if stale or rows == "none" else (first, "novel")
    if sources[0] == "prequential" and watched.predictor is not None and not hasattr(type(watched.predictor), "head"):
        watched.say(
            f"{watched.name} shows no `head` of clkit.methods, so that it is not known what it said before it learned "
            "a batch: no error of it is recorded, and its total is 1. Keep samples out of training (val_fraction)"
        )
    if watched.fell_back:
        sources = tuple("prequential" if each == "loo" else each for each in sources)
    if stale and watched.settings.false_alarm_rate is not None:
        watched.say(
            f"the network trains, so that distances from what {watched.name} has learned would compare features of "
            "different networks: it gets no novelty. Keep samples out of training (val_fraction of the data module)"
        )
    if names == "auto":
        if stale:
            watched.say(
                f"the network trains, so that distances from what {watched.name} has learned would compare features "
                "of different networks: its errors are predicted from its scores alone. Keep samples out of "
                "training (val_fraction of the data module), which are read again, to have them"
            )
        of_rows = () if stale else _OF_ROWS if rows == "features" or trains else _OF_ROWS[:-1]
        names = (*of_rows, *OF_SCORES, *(OF_LOGITS if watched.probabilities and stale else ()))
    return tuple(names), tuple(each for each in sources if each != "novel" or watched.settings.records.novelty > 0)


def check(watched: Watched, *, calibrates: bool) -> None:
    """Refuse what is asked for and cannot be had of this predictor.

    Raises:
        ConfigurationError: Naming the argument.
    """
    if "calibration" in watched.sources and not calibrates:
        raise ConfigurationError(
            "sources: 'calibration' needs samples kept out of training: StreamDataModule(val_fraction=0.1), say"
        )
    if "gmm" in watched.names and {"loo", "calibration"} & set(watched.sources):
        raise ConfigurationError(
            f"features: 'gmm' has no left-out form, which errors of {watched.name} from {list(watched.sources)} need, "
            "since a mixture is fitted anew and not updated; use 'kde' or sources=['prequential']"
        )
    if not watched.probabilities and (odd := set(watched.names) & set(OF_LOGITS)):
        raise ConfigurationError(f"features: {sorted(odd)} are of logits, and {watched.name} gives none")


def no_sets(name: str) -> str:
    """Return why a predictor gets no prediction sets, and what would give it some."""
    return (
        f"no prediction sets for {name}: they need scores of samples that were not learned, of a head with an exact "
        "leave-one-out form on a frozen network, or of samples kept out of training (val_fraction of the data module)"
    )


def nothing_refused(name: str, rate: float) -> str:
    """Return why nothing is refused yet of what a predictor says."""
    return (
        f"too few errors of {name} are recorded yet for abstain_rate={rate}, so nothing is refused: a rate r takes "
        "1/r - 1 records of those that nothing is fitted to, the share `holdout` of Records"
    )
