"""``clkit embed`` and ``clkit search``: a gallery in a file, and what a model finds in it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from clkit.cli.command_parts import add_command, add_config, add_picture, check_picture, write_picture

if TYPE_CHECKING:
    from clkit.runs.embedding import Found

__all__ = ["PARTS", "add_search_commands", "embed", "search"]

PARTS = ("train", "test")
SHOWN = 8  # queries in table and picture
IN_TABLE, IN_PICTURE = 5, 8  # neighbours of each

EMBED = "write features of images by a model with a simplex head into a bank"
SEARCH = "find the images of a bank that are nearest to others, with the same model or a later one"


def add_search_commands(commands: Any, positive: Callable[[str], int]) -> None:
    """Add the parsers of the two commands; ``positive`` reads a number of at least 1."""
    embed = add_command(
        commands,
        "embed",
        EMBED,
        ". Models trained by DSimplex with the same vertices share banks.",
        usage="clkit embed CHECKPOINT --data SOURCE [SOURCE ...] -o BANK [options]",
    )
    search = add_command(
        commands,
        "search",
        SEARCH,
        usage="clkit search BANK --queries CHECKPOINT --data SOURCE [SOURCE ...] [options]",
    )
    embed.add_argument("checkpoint", metavar="CHECKPOINT", help="the checkpoint file of the model")
    search.add_argument("bank", metavar="BANK", help="the file that clkit embed wrote")
    search.add_argument(
        "--queries", required=True, metavar="CHECKPOINT", help="the checkpoint file of the model that sees the queries"
    )
    for command, part in ((embed, "train"), (search, "test")):
        command.add_argument(
            "--data", required=True, nargs="+", metavar="SOURCE", help="the images: digits, npz:NAME, folder:PATH, ..."
        )
        command.add_argument("--part", choices=PARTS, default=part, help="which part of them (default: %(default)s)")
        command.add_argument("--root", metavar="DIR", help="where data lie (default: where the run had them)")
        add_config(command)
    search.add_argument(
        "-k", type=positive, default=5, metavar="K", help="how many images for each query (default: %(default)s)"
    )
    add_picture(search, "draw some queries and their nearest images")
    embed.add_argument("--half", action="store_true", help="store float16, half as large")
    embed.add_argument("-o", "--output", required=True, metavar="BANK", help="the file to write")
    existing = embed.add_mutually_exclusive_group()
    existing.add_argument("--add", action="store_true", help="add to the bank that is there")
    existing.add_argument("--force", action="store_true", help="replace an existing file")


def embed(options: argparse.Namespace) -> list[str]:
    """Write or extend a bank; return what to say of it."""
    from clkit.runs.embedding import embed_images

    written = embed_images(
        options.checkpoint,
        options.output,
        options.data,
        part=options.part,
        half=options.half,
        add=options.add,
        root=options.root,
        config=options.config,
        overwrite=options.force,
    )
    bank = written.bank
    size = f"{len(bank)} x {bank.width} numbers, {bank.storage}, of {bank.signature}"
    return [
        f"wrote {options.output}: {written.rows} rows by {written.model}" + (" added" if options.add else ""),
        f"  {size}",
        *_writers(bank.models),
    ]


def search(options: argparse.Namespace) -> list[str]:
    """Print a table of some queries and how well the label is found; draw them where that is asked for."""
    from clkit.runs.embedding import search_images

    check_picture(options, [options.bank, options.queries])
    found = search_images(
        options.bank,
        options.queries,
        options.data,
        part=options.part,
        k=options.k,
        root=options.root,
        config=options.config,
    )
    _show(found, options)
    return [] if options.picture is None else [f"wrote {options.picture}"]


def _show(found: Found, options: argparse.Namespace) -> None:
    """Print and draw queries from the first to the last, evenly spaced: rows of one class often stand together."""
    import torch
    from rich.console import Console

    from clkit.methods import Neighbours
    from clkit.report.neighbours import neighbours_table, plot_neighbours
    from clkit.runs.embedding import stored_images

    rows = torch.linspace(0, len(found.names) - 1, min(SHOWN, len(found.names))).round().long()
    names, labels = [found.names[row] for row in rows.tolist()], found.labels[rows].tolist()
    nearest = Neighbours(*(column[rows, :IN_PICTURE] for column in found.neighbours))
    shown = names if len(options.data) > 1 else [name.rpartition("/")[2] for name in names]
    title = f"nearest in {options.bank}: label and cosine ({len(rows)} of {len(found.names)} queries)"
    first = Neighbours(*(column[:, :IN_TABLE] for column in nearest))
    console = Console()
    console.print(neighbours_table(shown, labels, first, found.class_names, title))
    for line in _recalls(found, options):  # before the picture, for which an image may be missing
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if options.picture is None:
        return
    images = stored_images([*names, *(found.bank.names[at] for at in nearest.rows.flatten().tolist())], found.root)
    columns = nearest.rows.shape[1]
    others = [images[start : start + columns] for start in range(len(names), len(images), columns)]
    figure = plot_neighbours(images[: len(names)], others, labels, nearest, found.class_names)
    write_picture(options, figure)


def _recalls(found: Found, options: argparse.Namespace) -> list[str]:
    """Return whose rows were searched, the recall, and what makes it another number than it seems."""
    counted = int(found.counted.sum())
    lines = [
        f"queries: {', '.join(options.data)}, {options.part} part, by {found.model}",
        f"gallery: {len(found.bank)} rows",
        *_writers(found.bank.models),
    ]
    if not counted:
        return [*lines, "recall@1: - (no query has a label that is in the gallery)"]
    recalls = ", ".join(f"recall@{each} {100 * found.recall(each):.1f} %" for each in dict.fromkeys((1, options.k)))
    lines.append(f"{recalls} of {counted} queries")
    if left_out := len(found.names) - counted:
        lines.append(f"  {left_out} left out: they have no label, or one that is not in the gallery")
    if themselves := len(set(found.names) & set(found.bank.names)):
        lines.append(f"  {themselves} of the queries are in the gallery themselves, where they may find themselves")
    if found.apart:
        label, (one, two) = next(iter(found.apart.items()))
        lines.append(
            f"  {len(found.apart)} labels have another vertex for the model of the queries than in the gallery (label "
            f"{label}: {two} and {one}), so that they cannot be found: the models gave classes different vertices"
        )
    own, theirs = (dict.fromkeys(each.rsplit("/", 2)[0] for each in names) for names in (found.bank.names, found.names))
    if others := [source for source in theirs if source not in own]:
        lines.append(
            f"  {', '.join(others)}: no source of the gallery ({', '.join(filter(None, own)) or 'unknown'}); equal ids "
            "count as the same class, whatever they are called there"
        )
    return lines


def _writers(models: Mapping[str, int]) -> list[str]:
    return [f"  {rows} by {model}" for model, rows in models.items()]
