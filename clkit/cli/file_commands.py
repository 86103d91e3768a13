"""``clkit merge | forget | export``: files in, a file out."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from clkit.errors import ClkitError
from clkit.runs.merging import HeadSummary

__all__ = ["run_file_command"]


def run_file_command(options: argparse.Namespace) -> int:
    """Run one of the commands.

    Args:
        options: What was parsed of the command line.

    Returns:
        0, or 2 where something was refused (the message is on standard error; nothing is written then).
    """
    try:
        lines = {"merge": _merge, "forget": _forget, "export": _export}[options.command](options)
    except ClkitError as error:
        sys.stderr.write(f"clkit: {error}\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _merge(options: argparse.Namespace) -> list[str]:
    from clkit.runs.merging import merge_checkpoints

    learned = merge_checkpoints(options.checkpoints, options.output, overwrite=options.force)
    return [
        f"wrote {options.output}, merged from {len(options.checkpoints)} checkpoints, for evaluation and export (no "
        "fit can go on from it); what is learned:",
        *_lines(learned),
    ]


def _forget(options: argparse.Namespace) -> list[str]:
    from clkit.runs.forgetting import forget_samples, read_samples

    samples = read_samples(options.samples)
    learned = forget_samples(
        options.checkpoint,
        options.output,
        features=samples.features,
        targets=samples.targets,
        ids=samples.ids,
        heads=None if options.heads is None else [name.strip() for name in options.heads.split(",")],
        config=options.config,
        overwrite=options.force,
    )
    given = samples.ids if samples.targets is None else samples.targets
    assert given is not None
    return [f"wrote {options.output}, without {_count(len(given), 'sample')}; what is left:", *_lines(learned)]


def _export(options: argparse.Namespace) -> list[str]:
    from clkit.runs.exporting import export_checkpoint

    exported = export_checkpoint(
        options.checkpoint, options.output, head=options.head, config=options.config, overwrite=options.force
    )
    return [
        f"wrote {options.output} ({_size(Path(options.output))}): {exported.network} with the head {exported.head!r}, "
        f"{_count(exported.classes, 'class', 'classes')} learned of {exported.columns} outputs",
        f"read it with: {exported.reading}",
    ]


def _lines(learned: list[HeadSummary]) -> list[str]:
    return [
        f"  {head}: {_count(samples, 'sample')} of {_count(classes, 'class', 'classes')}"
        for head, samples, classes in learned
    ]


def _size(file: Path) -> str:
    size = file.stat().st_size
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
