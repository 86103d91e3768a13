"""What the site sets for each trainer that it runs, so that pages show none of it.

On the CPU, without bar, summary, logger and checkpoints, in a folder that is thrown away, and without the advice that
Lightning gives on all this. Nothing else differs from a run of one's own.
"""

from __future__ import annotations

import functools
import logging
import runpy
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

_FOLDER = tempfile.TemporaryDirectory()
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "default_root_dir": _FOLDER.name,
    "devices": 1,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}

_original = pl.Trainer.__init__


@functools.wraps(_original)
def _quiet(self: pl.Trainer, **options: Any) -> None:
    _original(self, **{**QUIET, **options})


def before_example(gallery_conf: dict[str, Any], name: str) -> None:
    """Called by sphinx-gallery before each tutorial."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    pl.Trainer.__init__ = _quiet


if __name__ == "__main__":  # python quiet.py SCRIPT
    QUIET["default_root_dir"] = "your_run"  # what a page shows of it
    before_example({}, sys.argv[1])
    sys.path.insert(0, str(Path(sys.argv[1]).parent))
    runpy.run_path(sys.argv[1], run_name="__main__")
