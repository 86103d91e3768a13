"""Running the checks: one callable a rule, for pytest, unittest or by hand."""

from __future__ import annotations

import unittest
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from clkit.errors import ContractError
from clkit.testing import checks_head
from clkit.testing._runs import isolated, settings
from clkit.testing.checks_own import CHECKS, all_callbacks_in_one_run_learn_what_they_learn_alone
from clkit.testing.entries import Entry, clkit_entries

__all__ = ["Check", "check_contract", "contract", "contract_together"]


class Check:
    """One rule of the contract for one method; call it with a folder for the files of its runs.

    Attributes:
        rule: Name of the rule, the same for every method.
        __name__: Method and rule, which pytest shows.
    """

    def __init__(self, name: str, rule: Callable[..., None], run: Callable[[Path], None]) -> None:
        self.name = name
        self.rule = rule.__name__
        self.promise = (rule.__doc__ or "").splitlines()[0].rstrip(".")
        self.__name__ = f"{name}-{self.rule}"
        self.__doc__ = self.promise
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
            # whatever else a method raises in an ordinary run breaks the rule, too; its traceback is kept
            except Exception as error:
                seen = str(error) if isinstance(error, ContractError) else f"it raised {type(error).__name__}: {error}"
                raise ContractError(f"{self.name} breaks the rule {self.rule!r} ({self.promise}): {seen}") from error


def contract(entry: Entry) -> list[Check]:
    """Return the checks that a method must pass, each to be called with a folder; their names serve as test ids.

    Example:
        >>> from clkit.callbacks import NMC
        >>> checks = contract(Entry("nmc", "callback", NMC))
        >>> checks[0].__name__
        'nmc-state_is_in_the_checkpoint'
    """
    rules: Sequence[Callable[..., None]] = checks_head.CHECKS if entry.kind == "head" else CHECKS[entry.kind]
    return [Check(entry.name, rule, partial(_run, rule, entry)) for rule in rules]


def _run(rule: Callable[..., None], entry: Entry, folder: Path) -> None:
    """Check a rule, of a callback or strategy in each of its settings."""
    if entry.kind == "head":
        rule(entry)
        return
    for setting in settings(entry, folder):
        try:
            rule(setting)
        except ContractError as error:
            under = "" if setting.strategy is None else f"under {setting.strategy!r}, "
            raise ContractError(f"{under}{error}") from error


def contract_together(entries: Sequence[Entry] | None = None) -> list[Check]:
    """Return the checks that methods must pass beside each other: callbacks in one run, under every strategy.

    Args:
        entries: The methods; clkit's own by default. Add yours to clkit's to see whether they get along.
    """
    table = clkit_entries() if entries is None else list(entries)
    callbacks = [entry for entry in table if entry.kind == "callback"]
    rule = all_callbacks_in_one_run_learn_what_they_learn_alone
    return [
        Check(f"together-{'auto' if strategy is None else strategy.name}", rule, partial(rule, callbacks, strategy))
        for strategy in [None, *(entry for entry in table if entry.kind == "strategy")]
    ]


def check_contract(entry: Entry, folder: str | Path) -> dict[str, str]:
    """Run all checks of a method, with their files in a folder.

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
