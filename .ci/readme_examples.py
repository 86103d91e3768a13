"""Runs README's three ways as a newcomer would: in an empty folder, with the installed package, as they stand there.

Python examples print what the comment behind a `print` says; commands end with 0. What only a checkout has (make) is
left out, the comparison of seeds is cut to one experience, and where README learns a folder of images there are a few
of noise, and weights in a file in place of those that timm publishes.

Usage: python .ci/readme_examples.py README.md
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

page = Path(sys.argv[1]).resolve()
text = page.read_text(encoding="utf-8")
ADDED = {
    "clkit compare er onpro --seeds 3": " --data.source digits --data.stop_after 1 --no-outer --seeds 1",
    "clkit learn --backbone resnet18 --data folder:./birds -o birds.ckpt": " --weights resnet18.pth",
}


def make_images() -> None:
    """Make what README's commands find: folders of images, a class each, a photo, and weights."""
    import numpy as np
    import timm
    import torch
    from PIL import Image

    draws = np.random.default_rng(0)
    for name in (
        "birds/robin/1",
        "birds/robin/2",
        "birds/wren/1",
        "birds/wren/2",
        "new_birds/owl/1",
        "new_birds/owl/2",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(f"{name}.jpg")
    Path("photo.jpg").write_bytes(Path("birds/robin/1.jpg").read_bytes())
    torch.save(timm.create_model("resnet18").state_dict(), "resnet18.pth")


def run_python(number: int, block: str) -> None:
    """Run an example; what it prints must be what the comment behind the print begins with."""
    lines = block.splitlines()

    def said(*values: Any) -> None:
        printed = " ".join(map(str, values))
        promised = lines[sys._getframe(1).f_lineno - 1].partition("  # ")[2]
        assert promised.startswith(printed), f"example {number} prints {printed!r}, README says {promised!r}"

    exec(compile(block, f"{page.name}, example {number}", "exec"), {"__name__": "__main__", "print": said})


with TemporaryDirectory() as folder:
    os.chdir(folder)
    import clkit

    installed = Path(clkit.__file__).resolve()
    assert page.parent not in installed.parents or "site-packages" in installed.parts, f"the source tree: {installed}"
    examples = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    assert examples, f"{page} has no Python example"
    for number, block in enumerate(examples, start=1):
        print(f"==> README example {number} of {len(examples)}", flush=True)
        run_python(number, block)
    commands = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S))
    commands = re.sub(r"^make .*\n", "", commands, flags=re.M)
    for command, more in ADDED.items():
        assert command in commands, f"README has no {command!r}"
        commands = commands.replace(command, command + more)
    make_images()
    print(f"==> README commands\n{commands}", flush=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-e", "-x", "-c", commands], check=True, stdout=subprocess.DEVNULL, env=environment)
print(f"==> {len(examples)} examples and {commands.count('clkit ')} commands ran from {installed.parent}")
