"""The contract of ``class_boxes.py``: run it with pytest."""

import pytest
from class_boxes import ClassBoxes

from clkit.testing import Entry, contract

ENTRY = Entry("boxes", kind="callback", make=ClassBoxes)


@pytest.mark.parametrize("check", contract(ENTRY))
def test_contract(check, tmp_path):
    check(tmp_path)
