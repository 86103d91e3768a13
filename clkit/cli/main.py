"""The ``clkit`` command. It imports nothing heavy before that is asked for, so help and recipes answer at once."""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from clkit._version import __version__
from clkit.cli.command_parts import add_command, add_config
from clkit.cli.completion import SHELLS, completion_script
from clkit.cli.edit_commands import add_edit_commands, edit, edits, revert
from clkit.cli.learn_commands import (
    add_forgetting,
    add_learn_command,
    answer,
    answers_images,
    forgot,
    image_parser,
    learn,
)
from clkit.cli.search_commands import add_search_commands, embed, search
from clkit.cli.settings_help import COMMANDS, OPTIONS, settings_help
from clkit.runs.recipes import read_recipe, recipe_lines, recipe_names

if TYPE_CHECKING:
    from clkit.runs.merging import HeadSummary

__all__ = ["main"]

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
    "merge": "The result is for evaluation and export; clkit learn can go on from its own files, and no fit.",
    "forget": "The result equals a run without them, and can be resumed.",
    "export": "A .pt file is a dictionary that torch and timm read; a .pt2 file is a program of torch.export.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what follows ``clkit`` on a command line, by default that of the process; return the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] in COMMANDS and not answers_images(given):
        return _trainer_command(given, of_process=arguments is None)
    parser, commands = _parser()
    given, overrides = _split_overrides(given) if given[:1] == ["compare"] else (given, [])
    if answers_images(given):
        options = argparse.Namespace(command="predict")
        image_parser(_OneLine, _positive).parse_args(given[1:], options)
    else:
        options = parser.parse_args(given)
    if options.command == "recipes":
        try:
            sys.stdout.write("\n".join([*recipe_lines(), ""]) if options.name is None else read_recipe(options.name))
        except KeyError as error:
            return _refuse(error.args[0])
        return 0
    if options.command == "complete":
        sys.stdout.write(completion_script(options.shell, _words(commands)))
        return 0
    if options.command == "demo":
        from clkit.cli.demo import run_demo

        return run_demo(options.folder)
    if options.command == "compare":
        for override in overrides:
            if override.partition("=")[0].startswith(OWN_SETTINGS):
                return _refuse(f"{override} is what clkit compare sets for each of its runs; leave it out")
        options.overrides = overrides
    if options.command is None:
        parser.print_help()
        return 0
    from clkit.errors import ClkitError  # imports scikit-learn

    try:
        lines = _LINES_OF[options.command](options)
    except ClkitError as error:
        return _refuse(error)
    except KeyboardInterrupt:
        sys.stderr.write("clkit: interrupted; give the same command again\n")
        return 130
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return int(getattr(options, "status", 0))


def _trainer_command(given: list[str], *, of_process: bool) -> int:
    """Show the help of a command that runs a trainer, or run it."""
    if "-h" in given or "--help" in given:
        sys.stdout.write(settings_help(given[0], shutil.get_terminal_size().columns))
        return 0
    verbose = "--verbose" in given
    given = ["--help" if word == "--help.all" else word for word in given if word != "--verbose"]
    if of_process:  # Lightning reads the line of the process, and warns of another beside it
        sys.argv[1:] = given
    from clkit.runs.settings import run

    return run(None if of_process else given, verbose=verbose)


def _words(commands: Mapping[str, argparse.ArgumentParser]) -> dict[str, list[str]]:
    """Return what may follow each command, for the completion of a shell."""
    words = {
        name: [option for option in parser._option_string_actions if len(option) > 2]
        for name, parser in commands.items()
    }
    words |= {name: list(OPTIONS) for name in COMMANDS}
    words["recipes"] += recipe_names()
    words["compare"] += [*recipe_names(), *OPTIONS]
    words["complete"] += SHELLS
    return words


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """Return the parser, and those of its commands by name."""
    parser = _OneLine(
        prog="clkit",
        description="Continual learning and uncertainty as plug-ins for PyTorch Lightning.",
        epilog="Settings of a run: clkit fit --help. Start from a recipe: clkit recipes nmc > mine.yaml, "
        "then clkit fit --config mine.yaml.",
    )
    parser.add_argument("--version", action="version", version=f"clkit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands", parser_class=_OneLine)
    for name, description in COMMANDS.items():
        commands.add_parser(name, help=description, add_help=False)
    recipes = commands.add_parser("recipes", help="list the recipes, or print one")
    recipes.add_argument("name", nargs="?", help="the recipe to print")
    demo = commands.add_parser("demo", help="see what this is good for: three small runs on handwritten digits")
    demo.add_argument("--folder", default="runs/demo", help="where the results go (default: %(default)s)")
    _add_compare(commands)
    add_learn_command(commands, _positive)
    _add_file_commands(commands)
    add_search_commands(commands, _positive)
    add_edit_commands(commands, _index)
    complete = commands.add_parser(
        "complete",
        help="print what a shell needs to complete commands, recipes and settings",
        epilog='For instance, in ~/.bashrc: eval "$(clkit complete bash)"',
    )
    complete.add_argument("shell", choices=SHELLS, help="which shell")
    return parser, commands.choices


class _OneLine(argparse.ArgumentParser):
    """A parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"clkit: {message}; see {self.prog} --help\n")


def _add_compare(commands: Any) -> None:
    text = "run several recipes with several seeds on one stream, in one table"
    compare = add_command(
        commands,
        "compare",
        text,
        ": mean and 95 % t-interval of each metric, with fine-tuning and joint training as outer rows.",
        usage="clkit compare RECIPE [RECIPE ...] [--seeds N] [--out DIR] [--no-outer] [settings of clkit fit]",
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


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _split_overrides(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate a command's own words from the settings of a fit between them, ``--name value`` or ``--name=value``."""
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
        add_command(commands, name, text, f". {FILE_NOTES[name]}") for name, text in FILE_COMMANDS.items()
    )
    merge.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="two or more checkpoint files")
    for command in (forget, export):
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint file")
    merge.add_argument("--partial", action="store_true", help="also where shards of a list are missing")
    add_forgetting(forget, _positive)
    forget.add_argument("--heads", metavar="A,B", help="names of the heads that shall forget (default: all)")
    what = export.add_mutually_exclusive_group()
    what.add_argument("--head", metavar="NAME", help="which head, where there are several")
    what.add_argument(
        "--task", type=_index, metavar="K", help="the network of this task of a run with DST, from 0, and no head"
    )
    add_config(forget, export)
    for command, name in ((merge, "MERGED.ckpt"), (forget, "LESS.ckpt"), (export, "MODEL.pt|MODEL.pt2")):
        command.add_argument("-o", "--output", required=True, metavar=name, help="the file to write")
        command.add_argument("--force", action="store_true", help="replace an existing file")


def _refuse(reason: object) -> int:
    sys.stderr.write(f"clkit: {reason}\n")
    return 2


# ---- the commands: each returns the lines that it prints at its end


def _compare(options: argparse.Namespace) -> list[str]:
    from clkit.runs.comparing import compare

    compare(options.recipes, options.seeds, Path(options.out), options.outer, options.overrides)
    return []


def _merge(options: argparse.Namespace) -> list[str]:
    from clkit.runs.merging import merge_checkpoints

    learned = merge_checkpoints(options.checkpoints, options.output, partial=options.partial, overwrite=options.force)
    return [
        f"wrote {options.output}, merged from {len(options.checkpoints)} checkpoints, for evaluation and export (no "
        "fit can go on from it); what is learned:",
        *_lines(learned),
    ]


def _forget(options: argparse.Namespace) -> list[str]:
    if options.data is not None:
        return forgot(options)
    from clkit.errors import ArgumentError
    from clkit.runs.forgetting import forget_samples, read_samples

    if options.classes is not None:
        raise ArgumentError("--classes are those of --data; of --samples all are forgotten")
    samples = read_samples(options.samples)
    learned = forget_samples(
        options.checkpoint,
        options.output,
        **samples,
        heads=None if options.heads is None else [name.strip() for name in options.heads.split(",")],
        config=options.config,
        overwrite=options.force,
    )
    forgotten = _count(len(next(iter(samples.values()))), "sample")
    return [f"wrote {options.output}, without {forgotten}; what is left:", *_lines(learned)]


def _export(options: argparse.Namespace) -> list[str]:
    if options.task is not None:
        from clkit.runs.task_export import export_task

        task = export_task(options.checkpoint, options.output, options.task, overwrite=options.force)
        return [
            f"wrote {options.output} ({_size(options.output)}): the network of task {options.task} (experience "
            f"{options.task + 1}), dense, with {100 * task.density:.1f} % of the connections of its masked layers "
            f"({100 * task.nonzero:.1f} % are not 0) and zeros for the others",
            *([f"classes of the task, the only outputs that mean anything: {task.classes}"] if task.classes else []),
            "make the network and read the file with (these lines are its 'code'):",
            *(f"  {line}" for line in task.code),
        ]
    from clkit.runs.exporting import export_checkpoint

    exported = export_checkpoint(
        options.checkpoint, options.output, head=options.head, config=options.config, overwrite=options.force
    )
    return [
        f"wrote {options.output} ({_size(options.output)}): {exported.network} with the head {exported.head!r}, "
        f"{_count(exported.classes, 'class')} learned of {exported.columns} outputs",
        f"read it with: {exported.reading}",
    ]


def _size(path: str) -> str:
    size = Path(path).stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _lines(learned: list[HeadSummary]) -> list[str]:
    return [
        f"  {head}: {_count(samples, 'sample')} of {_count(classes, 'class')}" for head, samples, classes in learned
    ]


def _count(number: int, one: str) -> str:
    plural = "es" if one.endswith("s") else "s"
    return f"{number} {one}{plural * (number != 1)}"


_LINES_OF: Mapping[str, Callable[[argparse.Namespace], list[str]]] = {
    "compare": _compare,
    "learn": learn,
    "predict": answer,
    "merge": _merge,
    "forget": _forget,
    "export": _export,
    "embed": embed,
    "search": search,
    "edit": edit,
    "edits": edits,
    "revert": revert,
}
