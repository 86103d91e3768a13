"""From which errors, and by which features, the errors of a predictor are learned, where the user leaves that open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clkit.errors import ConfigurationError

if TYPE_CHECKING:
    from clkit.callbacks._watched import Watched

__all__ = ["OF_LOGITS", "OF_SCORES", "check", "choices"]

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
    if not watched.probabilities and (odd := set(watched.names) & set(OF_LOGITS)):
        raise ConfigurationError(f"features: {sorted(odd)} are of logits, and {watched.name} gives none")
