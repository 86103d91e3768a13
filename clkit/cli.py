"""The ``clkit`` command.

This file imports nothing heavy: help and the recipes answer at once, and whatever trains is imported when it is asked
for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from clkit import __version__
from clkit.recipes import read_recipe, recipe_lines

__all__ = ["main"]

TRAINER_COMMANDS = {
    "fit": "learn from a stream",
    "validate": "evaluate a checkpoint on the validation samples",
    "test": "evaluate a checkpoint on the test samples",
    "predict": "write predictions.csv for the test samples",
}

FILE_COMMANDS = {
    "merge": "add up what the heads of several checkpoints have learned",
    "forget": "take samples out of what the heads of a checkpoint have learned",
    "export": "write a network with a learned head as its classifier, for use without clkit",
}

FILE_NOTES = {
    "merge": "The result is for evaluation and export; no fit can go on from it.",
    "forget": "The result equals a run without them, and can be resumed.",
    "export": "A .pt file is a dictionary that torch and timm read; a .pt2 file is a program of torch.export.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status.

    Args:
        arguments: What follows ``clkit`` on the command line; that of the process by default.

    Example:
        >>> main(["recipes"]) == 0  # doctest: +ELLIPSIS
        aef_ocl ...
        True
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in TRAINER_COMMANDS:
        from clkit.trainer_cli import run

        return run(None if arguments is None else given)
    parser = _parser()
    options = parser.parse_args(given)
    if options.command == "recipes":
        return _recipes(options.name)
    if options.command == "demo":
        from clkit.demo import run_demo

        return run_demo(options.folder)
    if options.command in FILE_COMMANDS:
        from clkit.file_commands import run_file_command

        return run_file_command(options)
    parser.print_help()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clkit",
        description="Continual learning and uncertainty as plug-ins for PyTorch Lightning.",
        epilog="Settings of a run: clkit fit --help. Start from a recipe: clkit recipes nmc > mine.yaml, "
        "then clkit fit --config mine.yaml.",
    )
    parser.add_argument("--version", action="version", version=f"clkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for name, description in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    recipes = commands.add_parser("recipes", help="list the recipes, or print one")
    recipes.add_argument("name", nargs="?", help="the recipe to print")
    demo = commands.add_parser("demo", help="see what this is good for: three small runs on handwritten digits")
    demo.add_argument("--folder", default="runs/demo", help="where the results go (default: %(default)s)")
    _add_file_commands(commands)
    return parser


def _add_file_commands(commands: Any) -> None:
    merge, forget, export = (
        commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}. {FILE_NOTES[name]}")
        for name, text in FILE_COMMANDS.items()
    )
    merge.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="two or more checkpoint files")
    for command in (forget, export):
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint file")
    forget.add_argument(
        "--samples", required=True, metavar="FILE.npz", help="features (N, D) and targets (N,), or ids (N,)"
    )
    forget.add_argument("--heads", metavar="A,B", help="names of the heads that shall forget (default: all)")
    export.add_argument("--head", metavar="NAME", help="which head, where there are several")
    for command in (forget, export):
        command.add_argument(
            "--config", metavar="FILE", help="the run's settings (default: config.yaml in the folder of the run)"
        )
    for command, name in ((merge, "MERGED.ckpt"), (forget, "LESS.ckpt"), (export, "MODEL.pt|MODEL.pt2")):
        command.add_argument("-o", "--output", required=True, metavar=name, help="the file to write")
        command.add_argument("--force", action="store_true", help="replace an existing file")


def _recipes(name: str | None) -> int:
    if name is None:
        sys.stdout.write("\n".join(recipe_lines()) + "\n")
        return 0
    try:
        sys.stdout.write(read_recipe(name))
    except KeyError as error:
        sys.stderr.write(f"clkit: {error.args[0]}\n")
        return 2
    return 0
