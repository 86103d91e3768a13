"""The contract that every head, callback and strategy must pass: clkit's own by its tests, yours by yours.

>>> from pathlib import Path
>>> import tempfile
>>> from clkit.callbacks import NMC
>>> checks = contract(Entry("nmc", "callback", NMC))  # @pytest.mark.parametrize("check", checks)
>>> with tempfile.TemporaryDirectory() as folder:     # def test_contract(check, tmp_path):
...     checks[0](Path(folder))                       #     check(tmp_path)

Nothing here needs pytest: a check that cannot apply raises :class:`unittest.SkipTest`, which pytest honours.
"""

from clkit.errors import ContractError
from clkit.testing.contract import Check, check_contract, contract, contract_together
from clkit.testing.entries import Entry, clkit_entries

__all__ = [
    "Check",
    "ContractError",
    "Entry",
    "check_contract",
    "clkit_entries",
    "contract",
    "contract_together",
]
