"""The ``clkit`` command.

This file imports nothing heavy: help and the recipes answer at once, and whatever trains is imported when it is asked
for.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from clkit._version import __version__
from clkit.runs.recipes import read_recipe, recipe_lines

__all__ = ["main"]

TRAINER_COMMANDS = {
    "fit": "learn from a stream",
    "validate": "evaluate a checkpoint on the validation samples",
    "test": "evaluate a checkpoint on the test samples",
    "predict": "write predictions.csv for the test samples",
}

# what `clkit compare` sets for each of its runs, as it would stand on the line
OWN_SETTINGS = (
    "--seed_everything",
    "--data.seed",
    "--data.init_args.seed",
    "--ckpt_path",
    "--print_config",
    "--trainer.default_root_dir",
    "--trainer.logger",
)

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
    """Run the command and return its exit status.

    Args:
        arguments: What follows ``clkit`` on the command line; that of the process by default.

    Example:
        >>> main(["recipes"]) == 0  # doctest: +ELLIPSIS
        aef_ocl ...
        True
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in TRAINER_COMMANDS:
        from clkit.runs.settings import run

        return run(None if arguments is None else given)
    parser = _parser()
    given, overrides = _split_overrides(given) if given[:1] == ["compare"] else (given, [])
    options = parser.parse_args(given)
    if options.command == "recipes":
        return _recipes(options.name)
    if options.command == "demo":
        from clkit.cli.demo import run_demo

        return run_demo(options.folder)
    if options.command == "compare":
        for override in overrides:
            if override.partition("=")[0].startswith(OWN_SETTINGS):
                sys.stderr.write(f"clkit: {override} is what clkit compare sets for each of its runs; leave it out\n")
                return 2
        from clkit.runs.comparing import run_compare

        return run_compare(options, overrides)
    if options.command in FILE_COMMANDS:
        from clkit.cli.file_commands import run_file_command

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
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands", parser_class=_OneLine)
    for name, description in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    recipes = commands.add_parser("recipes", help="list the recipes, or print one")
    recipes.add_argument("name", nargs="?", help="the recipe to print")
    demo = commands.add_parser("demo", help="see what this is good for: three small runs on handwritten digits")
    demo.add_argument("--folder", default="runs/demo", help="where the results go (default: %(default)s)")
    _add_compare(commands)
    _add_file_commands(commands)
    return parser


class _OneLine(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"clkit: {message}; see {self.prog} --help\n")


def _add_compare(commands: Any) -> None:
    text = "run several recipes with several seeds on one stream, in one table"
    compare = commands.add_parser(
        "compare",
        help=text,
        usage="clkit compare RECIPE [RECIPE ...] [--seeds N] [--out DIR] [--no-outer] [settings of clkit fit]",
        description=f"{text[0].upper()}{text[1:]}: mean and 95 % t-interval of each metric, with fine-tuning and "
        "joint training as outer rows.",
        epilog="Any setting of clkit fit may follow and goes to all runs: --data.batch_size 10, --config mine.yaml. "
        "All recipes must then have the same data. An interrupted comparison goes on where it was: give the same "
        "command again.",
    )
    compare.add_argument("recipes", nargs="+", metavar="RECIPE", help="a name of clkit recipes, or a YAML file")
    compare.add_argument(
        "--seeds", type=_positive, default=3, metavar="N", help="how many: 0, 1, ... N-1 (default: %(default)s)"
    )
    compare.add_argument(
        "--out", default="runs/compare", metavar="DIR", help="where results and runs go (default: %(default)s)"
    )
    compare.add_argument(
        "--no-outer", dest="outer", action="store_false", help="leave fine-tuning and joint training out"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _split_overrides(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command's own words from the settings of a fit between them, ``--name value`` or ``--name=value``."""
    words: list[str] = []
    options: list[str] = []
    overrides: list[str] = []
    rest = iter(given)
    for word in rest:
        name, _, value = word.partition("=")
        if not word.startswith("-"):
            words.append(word)
        elif name in ("-h", "--help", "--no-outer"):
            options.append(word)
        else:
            part = options if name in ("--seeds", "--out") else overrides
            part += [word] if value else [word, *itertools.islice(rest, 1)]
    return [*words, *options], overrides  # argparse does not take words from between options


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
