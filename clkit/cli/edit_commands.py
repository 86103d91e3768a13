"""``clkit edit``, ``clkit edits`` and ``clkit revert``: single answers of a saved run corrected, listed, taken back."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from clkit.cli.command_parts import add_command, add_config, add_picture, check_picture, write_picture

__all__ = ["ROUTES", "add_edit_commands", "edit", "edits", "revert"]

ROUTES = ("auto", "exact", "editor")

EDIT = "correct an answer of a checkpoint's network, or of its head, by an edit that can be taken back"
EDITS = "list the edits of a checkpoint"
REVERT = "take edits of a checkpoint back"


def add_edit_commands(commands: Any, number: Callable[[str], int]) -> None:
    """Add the parsers of the three commands; ``number`` reads one of at least 0."""
    edit = add_command(
        commands,
        "edit",
        EDIT,
        ". The run's validation samples bound what it may do elsewhere; the exit status is 1 where an edit is refused.",
        usage="clkit edit CHECKPOINT --image FILE [FILE ...] --label LABEL [LABEL ...] [options]",
    )
    edits = add_command(commands, "edits", EDITS)
    revert = add_command(commands, "revert", REVERT, ": the weights become, to the bit, what the other edits give.")
    for command in (edit, edits, revert):
        command.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint file")
    edit.add_argument(
        "--image", required=True, nargs="+", metavar="FILE", help="image files, or rows of a source: digits/test/17"
    )
    edit.add_argument(
        "--label", required=True, nargs="+", metavar="LABEL", help="one for each: the id of a class, or its name"
    )
    edit.add_argument("--editor", metavar="FILE", help="a trained editor (default: that of the run, or a new one)")
    edit.add_argument("--layers", nargs="+", metavar="NAME", help="what a new editor edits (default: auto)")
    edit.add_argument("--route", choices=ROUTES, help="correct a head exactly, or the network (default: what decides)")
    edit.add_argument("--head", metavar="NAME", help="which head, where there are several")
    edit.add_argument("--task", type=number, metavar="K", help="whose network, of a run with DST, from 0")
    edit.add_argument("--no-guard", dest="guard", action="store_false", help="whatever it does elsewhere")
    edit.add_argument("--allow-stale", action="store_true", help="also where heads have learned what will move")
    add_picture(edit, "draw the image and its answers before and after", "replace existing files: --output, --picture")
    revert.add_argument("--force", action="store_true", help="replace an existing --output")
    revert.add_argument("ids", nargs="+", type=number, metavar="ID", help="numbers of edits, as clkit edits lists them")
    revert.add_argument(
        "--inexact", action="store_true", help="also where something else has changed the weights since"
    )
    add_config(edit, revert)
    for command in (edit, revert):
        command.add_argument(
            "-o", "--output", metavar="FILE", help="the file to write (default: the checkpoint itself)"
        )


def edit(options: argparse.Namespace) -> list[str]:
    """Edit a checkpoint; return what to say of it."""
    from clkit.errors import ConfigurationError
    from clkit.runs.correcting import edit_checkpoint

    check_picture(options, [options.checkpoint])
    if options.editor is not None and options.layers is not None:
        raise ConfigurationError("--layers is for a new editor, and --editor names a trained one; leave one out")
    done = edit_checkpoint(
        options.checkpoint,
        options.image,
        options.label,
        editor=options.editor,
        layers=options.layers,
        route=options.route,
        head=options.head,
        task=options.task,
        guard=options.guard,
        allow_stale=options.allow_stale,
        drawn=options.picture is not None,
        output=options.output,
        config=options.config,
        overwrite=options.force,
    )
    result, names = done.result, done.names
    if options.picture is not None:
        from clkit.report.corrections import plot_edit

        figure = plot_edit(
            done.image,
            done.before,
            done.after,
            int(result.label[0]),
            locality=result.locality,
            names=names,
            bars="probability" if result.route == "editor" else "softmax of the head's scores",
        )
        if result.id is None:
            figure.suptitle(f"{result.status}, nothing was written")
        write_picture(options, figure)
    where = f"the head {result.head!r}" if result.route == "exact" else "the network"
    if result.task is not None:
        where += f" of task {result.task}"
    shares = "p" if result.route == "editor" else "softmax of scores"  # which are no probabilities
    lines = [
        f"  {image}: {_name(before, names)} -> {_name(after, names)}, "
        f"{shares} of {_name(label, names)} {p:.3f} -> {q:.3f}"
        for image, label, before, after, p, q in zip(
            options.image,
            result.label,
            result.prediction_before,
            result.prediction_after,
            result.probability_before,
            result.probability_after,
            strict=True,
        )
    ]
    if result.locality is not None:
        seen = result.locality
        line = f"  elsewhere: {100 * seen.agreement:.1f} % of {seen.images} validation samples keep their answer"
        if seen.accuracy_before is not None and seen.accuracy_after is not None:
            line += f", accuracy {100 * seen.accuracy_before:.1f} -> {100 * seen.accuracy_after:.1f} %"
        lines.append(line)
    if result.stale:
        lines.append(f"  now of a network from before: {', '.join(result.stale)}")
    options.status = int(result.status == "refused")
    if result.id is None:
        return [f"{result.status}: {result.reason}; nothing was written", *lines]
    target = options.output or options.checkpoint
    return [f"wrote {target}: edit {result.id} of {where}, {result.status} at scale {result.scale:g}", *lines]


def edits(options: argparse.Namespace) -> list[str]:
    """Print the log of edits."""
    from rich.console import Console

    from clkit.report.corrections import edits_table
    from clkit.runs.correcting import logged_edits

    found = logged_edits(options.checkpoint)
    if not found:
        return [f"{options.checkpoint} has no edits"]
    Console().print(edits_table(found, {}, f"edits of {options.checkpoint}"))
    return []


def revert(options: argparse.Namespace) -> list[str]:
    """Take edits back; return what to say of it."""
    from clkit.runs.correcting import revert_in_checkpoint

    left = revert_in_checkpoint(
        options.checkpoint,
        options.ids,
        inexact=options.inexact,
        output=options.output,
        config=options.config,
        overwrite=options.force,
    )
    gone = " and ".join(map(str, dict.fromkeys(options.ids)))
    numbers = ", ".join(str(entry.id) for entry in left) or "none"
    return [f"wrote {options.output or options.checkpoint} without edit {gone}; left: {numbers}"]


def _name(label: Any, names: dict[int, str]) -> str:
    return names.get(label, str(label))
