"""The ``clkit`` command.

This file imports nothing heavy: help and the recipes answer at once, and whatever trains is imported when it is asked
for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clkit import __version__
from clkit.recipes import read_recipe, recipe_lines

__all__ = ["main"]

TRAINER_COMMANDS = {
    "fit": "learn from a stream",
    "validate": "evaluate a checkpoint on the validation samples",
    "test": "evaluate a checkpoint on the test samples",
    "predict": "write predictions.csv for the test samples",
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
    return parser


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
