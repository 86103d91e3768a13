"""How long it takes until something happens: imports and help, each in a new process, best of several.

    python benchmarks/startup.py

Goals: `import clkit` after `import torch` costs at most 0.3 s more, and `clkit --help` at most 1.5 times what
`import lightning.pytorch` costs. Exit status 1 if one of them is missed.
"""

from __future__ import annotations

import subprocess
import sys
import time

REPEATS = 5


def best(*command: str) -> float:
    """Wall-clock seconds of the fastest of several runs."""
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> int:
    """Prints the table; returns the exit status."""
    rows = {
        "python": best("-c", "pass"),
        "import torch": best("-c", "import torch"),
        "import torch, clkit": best("-c", "import torch, clkit"),
        "import lightning.pytorch": best("-c", "import lightning.pytorch"),
        "import lightning.pytorch, clkit": best("-c", "import lightning.pytorch, clkit"),
        "clkit --help": best("-m", "clkit", "--help"),
        "clkit recipes": best("-m", "clkit", "recipes"),
    }
    for name, seconds in rows.items():
        print(f"{name:<34} {seconds:6.2f} s")
    extra = rows["import torch, clkit"] - rows["import torch"]
    ratio = rows["clkit --help"] / rows["import lightning.pytorch"]
    print(f"clkit beside torch: {extra:+.2f} s (goal: at most 0.3)")
    print(f"clkit --help / import lightning.pytorch: {ratio:.2f} (goal: at most 1.5)")
    return int(extra > 0.3 or ratio > 1.5)


if __name__ == "__main__":
    sys.exit(main())
