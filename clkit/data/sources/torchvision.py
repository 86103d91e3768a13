"""Data sets of torchvision, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clkit.data.sources.base import DATA_VARIABLE, RowRange, SlicedSource, SourcePart, no_root
from clkit.data.sources.custom import DatasetPart, class_names_of
from clkit.errors import ArgumentError, DataError, did_you_mean

__all__ = ["Torchvision"]


@dataclass
class Torchvision(SlicedSource):
    """A labelled image set of ``torchvision.datasets``, by the name of its class, from the data folder.

    Args:
        name: The class's name, e.g. ``"CIFAR10"``.
        download: Let torchvision fetch what is not there.
        options: More keyword arguments of the class, e.g. ``{"split": "balanced"}`` for EMNIST.
        train_split: ``split=`` of the training part, for classes with such an argument.
        test_split: ``split=`` of the test part, for classes with such an argument; e.g. ``"val"`` for ImageNet.
        train_rows: Take only the training rows ``[start, stop, step]``, as a slice.
        test_rows: The same for the test part.

    Raises:
        ArgumentError: No class has this name, it takes neither ``train`` nor ``split``, or it refuses an option.
        DataError: The files are not in the data folder, or there is no data folder.

    Example:
        >>> source = Torchvision("CIFAR10", train_rows=[None, None, 10])  # every tenth training image
        >>> source.name
        'CIFAR10'
    """

    name: str
    download: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    train_split: str = "train"
    test_split: str = "test"
    train_rows: RowRange | None = None
    test_rows: RowRange | None = None

    def load(self, root: Path | None) -> tuple[SourcePart, SourcePart]:
        """Open both parts, each image decoded when it is asked for."""
        kind = _torchvision_class(self.name)
        if root is None:
            raise DataError(no_root(f"torchvision:{self.name}"))
        datasets = [self._open(kind, root, training) for training in (True, False)]
        self.class_names = class_names_of(datasets[0])
        train, test = (DatasetPart(dataset, ("targets", "labels", "_labels")) for dataset in datasets)
        return self._sliced(train, test)

    def _open(self, kind: Any, root: Path, training: bool) -> Any:
        arguments = dict(self.options)
        accepted = _accepted_arguments(kind)
        if "train" in accepted:
            arguments["train"] = training
        elif "split" in accepted:
            arguments["split"] = self.train_split if training else self.test_split
        else:
            raise ArgumentError(
                f"torchvision.datasets.{self.name} takes neither train= nor split=, so it has no test part; split it "
                "yourself and pass the two data sets to Custom(train, test)"
            )
        if self.download:
            arguments["download"] = True
        try:
            return kind(root=str(root), **arguments)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"torchvision.datasets.{self.name} refuses {arguments}: {error}. See options, train_split, test_split "
                "and download"
            ) from error
        except (RuntimeError, OSError, ImportError) as error:
            remedy = (
                "the download failed; check the network, or copy the files there by hand"
                if self.download
                else "pass download=True, copy the files there by hand, or point the data folder elsewhere "
                f"(data.root or the environment variable {DATA_VARIABLE})"
            )
            raise DataError(f"torchvision.datasets.{self.name} found no data in {root}: {error}. {remedy}") from error


def _torchvision_class(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"torchvision:{name} needs the package torchvision, which is not installed") from error
    if name not in datasets.__all__:
        hint = did_you_mean(name, datasets.__all__) or "; its documentation lists the names"
        raise ArgumentError(f"torchvision.datasets has no {name!r}{hint}")
    return getattr(datasets, name)


def _accepted_arguments(kind: Any) -> set[str]:
    """Return the argument names of a class's constructor and of those that it may hand keywords on to."""
    import inspect

    return {
        argument
        for base in kind.__mro__
        if "__init__" in vars(base) and base is not object
        for argument in inspect.signature(base.__init__).parameters
    }
