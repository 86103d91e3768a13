"""What several commands have in common: how their parsers begin, the settings of their run, and their picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["add_command", "add_config", "add_picture", "check_picture", "write_picture"]


def add_command(commands: Any, name: str, text: str, more: str = ".", **options: Any) -> argparse.ArgumentParser:
    """Add the parser of a command, whose description is its help text as a sentence, and ``more``.

    Example:
        >>> commands = argparse.ArgumentParser().add_subparsers()
        >>> add_command(commands, "list", "show what is there", ": names alone.").description
        'Show what is there: names alone.'
    """
    description = f"{text[0].upper()}{text[1:]}{more}"
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=description, **options)
    return parser


def add_config(*commands: argparse.ArgumentParser) -> None:
    """Add ``--config``, the settings of the run that a checkpoint is of."""
    for command in commands:
        command.add_argument(
            "--config", metavar="FILE", help="the run's settings (default: config.yaml in the folder of the run)"
        )


def add_picture(command: argparse.ArgumentParser, text: str, force: str = "replace an existing picture") -> None:
    """Add ``--picture``, and ``--force`` for one that is there; what else that replaces is said in its help."""
    command.add_argument("--picture", metavar="FILE.png", help=text)
    command.add_argument("--force", action="store_true", help=force)


def check_picture(options: argparse.Namespace, inputs: Iterable[str]) -> None:
    """Refuse, before any work, a picture that could not be written beside the files that are read.

    Raises:
        ArgumentError: If its name is not allowed, or it exists.
        ConfigurationError: Without matplotlib.
    """
    from clkit.callbacks._showing import has_matplotlib
    from clkit.errors import ArgumentError, ConfigurationError
    from clkit.files import check_output

    if options.picture is None:
        return
    if Path(options.picture).suffix != ".png":
        raise ArgumentError(f"--picture {options.picture} must end in .png")
    if not has_matplotlib():
        raise ConfigurationError('--picture needs matplotlib, which is not installed: pip install "clkit[report]"')
    check_output(options.picture, map(Path, inputs), options.force)


def write_picture(options: argparse.Namespace, figure: Figure) -> None:
    """Write a figure where ``--picture`` wants it."""
    from clkit.report.run_figures import save_figure

    save_figure(figure, Path(options.picture))
