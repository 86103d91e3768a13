"""Runs the README's Python examples with the installed package, outside the source tree.

Usage: python .ci/readme_examples.py README.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

page = Path(sys.argv[1]).resolve()
blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
assert blocks, f"{page} has no Python example"

with TemporaryDirectory() as folder:
    os.chdir(folder)
    import clkit

    installed = Path(clkit.__file__).resolve()
    assert page.parent not in installed.parents or "site-packages" in installed.parts, f"the source tree: {installed}"
    for number, block in enumerate(blocks, start=1):
        print(f"==> README example {number} of {len(blocks)}", flush=True)
        exec(compile(block, f"{page.name}, example {number}", "exec"), {"__name__": "__main__"})
    command = Path(sys.executable).with_name("clkit")
    for arguments in (["--version"], ["recipes"], ["recipes", "nmc"]):
        subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)
print(f"==> {len(blocks)} examples and the command ran from {installed.parent}")
