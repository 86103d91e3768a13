"""Sources: where samples come from.

A source has a training and a test part. A part knows its targets (and domains) as arrays, so a scenario can cut a
stream without reading an input, and gives inputs by row number, many at a time.

============================  =========================================================================================
spec                          source
============================  =========================================================================================
``digits``                    :class:`Digits`: 8 x 8 grey images that ship with scikit-learn; ``digits:flat``,
                              ``digits:shifts`` and ``digits:flat,shifts`` set its options
``torchvision:NAME``          :class:`Torchvision`: any labelled image set of ``torchvision.datasets``
``folder:PATH``               :class:`ImageFolder`: image files, one folder a class
``npz:NAME``                  :class:`NpzImages`: pixels or JPEG bytes in one ``.npz`` file
``features:NAME``             :class:`NpzFeatures`: vectors in one ``.npz`` file
============================  =========================================================================================

The user's own data sets come in by :class:`Custom`, which has no spec. A name without a slash is looked up in the data
folder, a path with a slash is taken as it is. See :func:`resolve_source` and :func:`data_root`.
"""

from __future__ import annotations

from collections.abc import Callable

from clkit.data.sources.base import Source
from clkit.data.sources.digits import Digits
from clkit.data.sources.folder import ImageFolder
from clkit.data.sources.npz import NpzFeatures, NpzImages
from clkit.data.sources.torchvision import Torchvision
from clkit.errors import ArgumentError, did_you_mean

__all__ = ["resolve_source"]

_NAMED_KINDS: dict[str, Callable[[str], Source]] = {
    "torchvision": Torchvision,
    "folder": ImageFolder,
    "npz": NpzImages,
    "features": NpzFeatures,
}
_DIGITS = "'digits', 'digits:flat', 'digits:shifts', 'digits:flat,shifts'"
_SPECS = f"{_DIGITS}, 'torchvision:NAME', 'folder:PATH', 'npz:NAME', 'features:NAME'"


def resolve_source(spec: str | Source) -> Source:
    """Return the source of a spec, e.g. ``"digits:flat"`` or ``"npz:cifar100_subset"``; a source is returned as it is.

    Raises:
        ArgumentError: The spec is not known; the message lists what is allowed and the nearest match.

    Example:
        >>> resolve_source("digits:flat,shifts")
        Digits(flat=True, shifts=True)
    """
    if isinstance(spec, Source):
        return spec
    if not isinstance(spec, str):
        raise ArgumentError(f"source={spec!r} must be a spec (one of {_SPECS}) or a Source")
    kind, colon, rest = spec.partition(":")
    if kind == "digits":
        options = [option.strip() for option in rest.split(",")] if colon else []
        for option in options:
            if option not in ("flat", "shifts"):
                hint = did_you_mean(option, ("flat", "shifts"))
                raise ArgumentError(f"source={spec!r} has the unknown option {option!r}; allowed: {_DIGITS}{hint}")
        return Digits(**dict.fromkeys(options, True))
    if kind == "custom":
        raise ArgumentError("source='custom' has no spec; pass Custom(train, test) with your data sets")
    if kind not in _NAMED_KINDS:
        hint = did_you_mean(kind, ["digits", *_NAMED_KINDS])
        raise ArgumentError(f"source={spec!r} is not known; allowed: {_SPECS}{hint}")
    if not rest:
        raise ArgumentError(f"source={spec!r} lacks what comes after the colon; write one of {_SPECS}")
    return _NAMED_KINDS[kind](rest)
