"""Running the checks: one callable a rule, for pytest, unittest or by hand."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from clkit.errors import ContractError
from clkit.testing import checks_callback, checks_head, checks_strategy
from clkit.testing._runs import isolated
from clkit.testing.entries import Entry, clkit_entries
from clkit.testing.together import CHECKS_TOGETHER

__all__ = ["Check", "check_contract", "contract", "contract_together"]

CHECKS: dict[str, list[Callable[[Entry, Path], None]]] = {
    "head": checks_head.CHECKS,
    "callback": checks_callback.CHECKS,
    "strategy": checks_strategy.CHECKS,
}


class Check:
    """One rule of the contract for one method; call it with a folder for the files of its runs.

    Attributes:
        rule: Name of the rule, the same for every method.
        __name__: Method and rule, which pytest shows.
    """

    def __init__(self, name: str, rule: str, promise: str, run: Callable[[Path], None]) -> None:
        self.name = name
        self.rule = rule
        self.promise = promise
        self.__name__ = f"{name}-{rule}"
        self.__doc__ = promise
        self._run = run

    def __repr__(self) -> str:
        return f"<check {self.__name__}>"

    def __call__(self, folder: str | Path) -> None:
        """Run the check.

        Args:
            folder: For the files of its runs, which land in a folder of its own there; pytest's ``tmp_path``, say.

        Raises:
            ContractError: If the rule is broken: which one, what was seen and what to do.
            unittest.SkipTest: If it cannot apply here, with the reason (no GPU, say).
        """
        place = Path(folder) / self.__name__
        place.mkdir(parents=True)
        with isolated():
            try:
                self._run(place)
            except unittest.SkipTest as reason:
                raise unittest.SkipTest(f"{self.__name__} is not applicable: {reason}") from reason
            except ContractError as error:
                raise ContractError(self._broken(str(error))) from error
            # whatever else a method raises in an ordinary run breaks the rule, too; its traceback is kept
            except Exception as error:
                raise ContractError(self._broken(f"it raised {type(error).__name__}: {error}")) from error

    def _broken(self, seen: str) -> str:
        return f"{self.name} breaks the rule {self.rule!r} ({self.promise}): {seen}"


def contract(entry: Entry) -> list[Check]:
    """Return the checks that a method must pass, one callable each.

    Args:
        entry: The method.

    Returns:
        Checks to be called with a folder; their names serve as test ids.

    Example:
        >>> from clkit.callbacks import NMC
        >>> checks = contract(Entry("nmc", "callback", NMC))
        >>> checks[0].__name__
        'nmc-state_is_in_the_checkpoint'
    """
    return [_check(entry.name, function, entry) for function in CHECKS[entry.kind]]


def contract_together(entries: Sequence[Entry] | None = None) -> list[Check]:
    """Return the checks that methods must pass beside each other: callbacks in one run, under every strategy.

    Args:
        entries: The methods; clkit's own by default. Add yours to clkit's to see whether they get along.

    Returns:
        Checks to be called with a folder.
    """
    table = clkit_entries() if entries is None else list(entries)
    strategies = [None, *(entry for entry in table if entry.kind == "strategy")]
    callbacks = [entry for entry in table if entry.kind == "callback"]
    return [
        _check(f"together-{'auto' if strategy is None else strategy.name}", function, callbacks, strategy)
        for function in CHECKS_TOGETHER
        for strategy in strategies
    ]


def check_contract(entry: Entry, folder: str | Path) -> dict[str, str]:
    """Run all checks of a method.

    Args:
        entry: The method.
        folder: For the files of the runs.

    Returns:
        By rule ``"holds"``, or ``"not applicable: …"`` with the reason.

    Raises:
        ContractError: At the first rule that is broken.
    """
    report = {}
    for check in contract(entry):
        try:
            check(folder)
            report[check.rule] = "holds"
        except unittest.SkipTest as reason:
            report[check.rule] = str(reason).partition("is ")[2]
    return report


def _check(name: str, function: Callable[..., None], *subject: Any) -> Check:
    promise = (function.__doc__ or "").splitlines()[0].rstrip(".")
    return Check(name, function.__name__, promise, lambda folder: function(*subject, folder))
