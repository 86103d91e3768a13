"""Numbers, terminal output and figures that are made when the site is built.

Before the pages are read, every script of ``docs/snippets`` is run, and every command of ``COMMANDS``; what they print
lies in ``docs/_build/generated/<name>.txt`` afterwards, and files that a script writes lie beside it. A script or
command that ends otherwise than expected fails the build.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sphinx.errors import SphinxError
from sphinx.util import logging

DOCS = Path(__file__).parents[1]
GENERATED = DOCS / "_build" / "generated"
CLKIT = [sys.executable, "-m", "clkit"]
SIMPLEX = ["--config", "d_simplex.yaml", "--trainer.enable_progress_bar", "false"]
OLD, NEW = (f"runs/d_simplex/version_{run}/checkpoints/last.ckpt" for run in (0, 1))

# name of the output -> command line, expected exit status, whether standard error is what is shown
COMMANDS: dict[str, tuple[list[str], int, bool]] = {
    "cli_help": ([*CLKIT, "--help"], 0, False),
    "cli_fit_help": ([*CLKIT, "fit", "--help"], 0, False),
    "cli_recipes": ([*CLKIT, "recipes"], 0, False),
    "cli_fit": (
        [
            *CLKIT,
            "fit",
            "--config",
            "nmc.yaml",
            "--data.scenario.experiences",
            "2",
            "--trainer.enable_model_summary",
            "false",
        ],
        0,
        False,
    ),
    "cli_fit_old": ([*CLKIT, "fit", *SIMPLEX, "--data.stop_after", "3"], 0, False),
    "cli_fit_new": ([*CLKIT, "fit", *SIMPLEX, "--ckpt_path", OLD], 0, False),
    "cli_embed": (
        [*CLKIT, "embed", OLD, "--data", "digits", "-o", "gallery.pt"],
        0,
        False,
    ),
    "cli_search": (
        [
            *CLKIT,
            "search",
            "gallery.pt",
            "--queries",
            NEW,
            "--data",
            "digits",
            "--picture",
            "found.png",
        ],
        0,
        False,
    ),
    "cli_no_recipe": ([*CLKIT, "recipes", "nmd"], 2, True),
    "cli_no_data": (
        [*CLKIT, "fit", "--config", "nmc.yaml", "--data.source", "npz:birds"],
        2,
        True,
    ),
}

logger = logging.getLogger(__name__)


def make_outputs(app: Any) -> None:
    """Runs all scripts and commands."""
    shutil.rmtree(GENERATED, ignore_errors=True)  # run folders are numbered
    GENERATED.mkdir(parents=True)
    for recipe in ("nmc.yaml", "d_simplex.yaml"):
        shutil.copy(DOCS.parent / "configs" / recipe, GENERATED)
    scripts = {
        script.stem: [sys.executable, str(DOCS / "_ext" / "quiet.py"), str(script)]
        for script in sorted((DOCS / "snippets").glob("*.py"))
    }
    for name, command in scripts.items():
        _run(name, command, 0, False)
    for name, (command, status, errors) in COMMANDS.items():
        _run(name, command, status, errors)


def _run(name: str, command: list[str], status: int, errors: bool) -> None:
    start = time.perf_counter()
    environment = {
        **os.environ,
        "PYTHONPATH": str(DOCS.parent),
        "COLUMNS": "84",
        "NO_COLOR": "1",
        "PYTHONWARNINGS": "ignore",
        "MPLBACKEND": "agg",
        "CLKIT_DATA": str(GENERATED),
    }
    done = subprocess.run(
        command,
        cwd=GENERATED,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != status:
        raise SphinxError(
            f"{' '.join(command)} ended with {done.returncode}, not {status}:\n{done.stderr}"
        )
    text = done.stderr if errors else done.stdout
    text = text.replace(f"{GENERATED}/", "").replace(str(GENERATED), "/your/folder")
    lines = [line.rstrip() for line in text.splitlines()]
    if errors:  # Lightning greets on standard error too
        lines = [line for line in lines if line.startswith("clkit:")]
    (GENERATED / f"{name}.txt").write_text(
        "\n".join(lines).strip("\n") + "\n", encoding="utf-8"
    )
    logger.info("output of %s: %.1f s", name, time.perf_counter() - start)


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", make_outputs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
