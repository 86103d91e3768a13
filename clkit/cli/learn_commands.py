"""``clkit learn`` and ``clkit predict FILE IMAGE ...``: a folder of images becomes a head, and the head answers."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clkit.runs.learning import Learned, Loading

__all__ = ["add_forgetting", "add_learn_command", "answer", "answers_images", "forgot", "image_parser", "learn"]

LEARN = "learn a folder of images into a head on a frozen network, or more classes into a saved one"
UNREADABLE = ("stop", "skip")


def add_learn_command(commands: Any, positive: Callable[[str], int]) -> None:
    """Add the parser of the command; ``positive`` reads a number of at least 1."""
    learn = commands.add_parser(
        "learn",
        help=LEARN,
        usage="clkit learn --backbone NAME --data SOURCE -o FILE [options]\n"
        "       clkit learn CHECKPOINT --data SOURCE -o FILE [options]",
        description=f"{LEARN[0].upper()}{LEARN[1:]}. One pass, exact in any order; no old image is needed.",
        epilog="Shards of one list are added up by clkit merge; images are taken out again by clkit forget --data.",
    )
    learn.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT", help="a file of clkit learn to go on from")
    learn.add_argument(
        "--data", required=True, metavar="SOURCE", help="folder:PATH with a folder of images a class, or another source"
    )
    learn.add_argument("--backbone", metavar="NAME", help="a timm model, or identity for features as they are")
    learn.add_argument("--weights", metavar="FILE", help="its weights (default: those that timm publishes)")
    learn.add_argument("--model", action="append", metavar="NAME=VALUE", help="an argument of timm.create_model")
    learn.add_argument("--head", metavar="NAME", help="lda, klda, anacp, aef_ocl or nmc (default: lda)")
    learn.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="a setting of the head: gamma=10, lift=2000"
    )
    learn.add_argument(
        "--like", metavar="FILE", help="network, settings and ids of classes of this file, no more of it"
    )
    learn.add_argument("--shard", metavar="I/N", help="only part I of N, from 0; clkit merge adds the parts up")
    learn.add_argument("--test", metavar="SOURCE", help="test images (default, but for shards: test/ of a folder)")
    learn.add_argument("--batch-size", type=positive, default=64, metavar="N", help="(default: %(default)s)")
    _add_reading(learn, positive)
    learn.add_argument(
        "--unreadable", choices=UNREADABLE, default="stop", help="what to do with such an image (default: %(default)s)"
    )
    learn.add_argument("-o", "--output", required=True, metavar="FILE", help="the file to write")
    learn.add_argument("--force", action="store_true", help="replace an existing file")


def add_forgetting(forget: Any, positive: Callable[[str], int]) -> None:
    """Add to the parser of ``clkit forget`` what it takes for a file of ``clkit learn``."""
    what = forget.add_mutually_exclusive_group(required=True)
    what.add_argument("--samples", metavar="FILE.npz", help="features (N, D) and targets (N,), or ids (N,)")
    what.add_argument("--data", metavar="folder:PATH", help="the images themselves, of a file of clkit learn")
    forget.add_argument(
        "--classes", action="append", metavar="A,B", help="of --data only these classes; may stand several times"
    )
    _add_reading(forget, positive)


def _add_reading(command: Any, positive: Callable[[str], int]) -> None:
    command.add_argument("--workers", type=positive, metavar="N", help="processes that read images (default: none)")
    command.add_argument("--root", metavar="DIR", help="where data lie (default: the folder that CLKIT_DATA names)")
    command.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: %(default)s)")


def answers_images(given: list[str]) -> bool:
    """Return whether a line is ``clkit predict FILE IMAGE ...`` rather than the prediction of a run's test samples."""
    return len(given) > 1 and given[0] == "predict" and not given[1].startswith("-")


def image_parser(kind: type[argparse.ArgumentParser], positive: Callable[[str], int]) -> argparse.ArgumentParser:
    """Return the parser of what follows ``clkit predict`` there."""
    parser = kind(prog="clkit predict", description="Names of classes and scores for image files.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file of clkit learn, or of a run with heads")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--head", metavar="NAME", help="which head (default: each)")
    parser.add_argument("--top", type=positive, default=3, metavar="N", help="how many classes (default: %(default)s)")
    parser.add_argument("--config", metavar="FILE", help="a run's settings (default: config.yaml in its folder)")
    parser.add_argument("--device", default="auto", metavar="NAME", help="cpu, cuda, ... (default: %(default)s)")
    return parser


def learn(options: argparse.Namespace) -> list[str]:
    """Learn images; return what to say of it."""
    from clkit.errors import ArgumentError
    from clkit.runs.learned import NewModel
    from clkit.runs.learning import learn_images
    from clkit.runs.listing import parse_shard

    places = {"CHECKPOINT": options.checkpoint, "--like": options.like, "--backbone": options.backbone}
    given = [name for name, value in places.items() if value is not None]
    if len(given) != 1:
        seen = " and ".join(given) or "none of them"
        raise ArgumentError(f"give one of {', '.join(places)}: where the network comes from; got {seen}")
    fixed = {"--weights": options.weights, "--model": options.model, "--head": options.head, "--set": options.set}
    if options.backbone is None and (odd := [name for name, value in fixed.items() if value is not None]):
        raise ArgumentError(f"{odd[0]} is for a new head; that of {options.checkpoint or options.like} stays as it is")
    start: Any = options.checkpoint or options.like
    if options.backbone is not None:
        start = NewModel(
            options.backbone,
            options.weights,
            options.head or "lda",
            _values(options.set, "--set"),
            _values(options.model, "--model"),
        )
    done = learn_images(
        start,
        options.data,
        options.output,
        empty=options.like is not None,
        shard=None if options.shard is None else parse_shard(options.shard),
        test=options.test,
        loading=_loading(options, options.batch_size, options.unreadable),
        overwrite=options.force,
    )
    model = done.model
    part = "" if options.shard is None else f", shard {options.shard}"
    lines = [
        f"wrote {options.output}: {model.key} on {model.module.backbone}{part}, settings {model.fingerprint()}",
        *_table(done),
    ]
    if done.known:
        lines.append(f"  in it already and left out: {_images(done.known)}")
    if done.ignored:
        lines.append(f"  in the folder and not read: {done.ignored}")
    left_out = {"not readable and left out": done.unreadable, "test images that do not count": done.untested}
    for what, reasons in left_out.items():
        if reasons:
            lines += [f"  {what}:", *(f"    {reason}" for reason in reasons)]
    return lines


def forgot(options: argparse.Namespace) -> list[str]:
    """Take images out; return what to say of it."""
    from clkit.errors import ArgumentError
    from clkit.runs.learning import forget_images

    if options.heads is not None or options.config is not None:
        raise ArgumentError("--heads and --config are for --samples; a file of clkit learn has one head and no run")
    done = forget_images(
        options.checkpoint,
        options.data,
        options.output,
        classes=options.classes,
        loading=_loading(options, 64, "stop"),
        overwrite=options.force,
    )
    return [f"wrote {options.output}: without {_images(done.rows)}", *_table(done)]


def answer(options: argparse.Namespace) -> list[str]:
    """Answer images; return a line for each head of each."""
    from clkit.runs.answering import answer_images

    answers = answer_images(
        options.checkpoint,
        options.images,
        head=options.head,
        top=options.top,
        config=options.config,
        device=options.device,
    )
    several = len({each.head for each in answers}) > 1
    lines = []
    for each in answers:
        says = [", ".join(f"{name} {score:.4g}" for name, score in each.best)]
        if each.classes is not None:
            says.append(f"set {{{', '.join(each.classes)}}}")
        if each.novelty is not None:
            says.append(f"novelty {each.novelty:.4g}" + (" (new)" if each.is_new else ""))
        lines.append(f"{each.image}{f' [{each.head}]' if several else ''}: {'; '.join(says)}")
    return lines


def _images(count: int) -> str:
    return f"{count} image{'s' if count != 1 else ''}"


def _table(done: Learned) -> list[str]:
    """Return lines of what there was before and is after."""
    rows: list[tuple[str, object, object]] = [
        ("classes", *done.classes),
        ("images learned", *done.samples),
    ]
    for group, (number, before, after) in done.accuracy.items():
        share = [None if right is None else f"{100 * right / number:.1f} %" for right in (before, after)]
        rows.append((f"right of {number} test images, {group}", share[0], share[1]))
    shown = [("", "before", "after"), *rows]
    texts = [[str(part) if part is not None else "-" for part in row] for row in shown]
    widths = [max(len(row[column]) for row in texts) for column in range(3)]
    return [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}" for row in texts]


def _values(given: list[str] | None, option: str) -> dict[str, Any]:
    """Return settings of the form NAME=VALUE, with numbers and the like as Python writes them."""
    from clkit.errors import ArgumentError

    found: dict[str, Any] = {}
    for each in given or []:
        name, sign, value = each.partition("=")
        if not (sign and name.isidentifier()):
            raise ArgumentError(f"{option} {each!r} must be NAME=VALUE, such as gamma=10")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            found[name] = value
    return found


def _loading(options: argparse.Namespace, batch_size: int, unreadable: Any) -> Loading:
    from clkit.runs.learning import Loading

    return Loading(batch_size, options.workers or 0, options.root, options.device, unreadable)
