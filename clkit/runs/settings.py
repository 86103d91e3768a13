"""``clkit fit | validate | test | predict``: a LightningCLI that knows clkit's classes by their short names."""

from __future__ import annotations

import errno
import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

from clkit._registry import STRATEGIES
from clkit.callbacks import StreamEvaluation
from clkit.errors import ArgumentError, ClkitError, ConfigurationError
from clkit.stream._lightning import callbacks_of
from clkit.stream.checkpoint_io import read_run

__all__ = ["StreamCLI", "refusal", "run", "summary"]

# Short names in YAML are looked up among the classes that are imported; these are offered where a name is misspelt.
_NAMESPACES = [
    import_module(name)
    for name in (
        "clkit.callbacks",
        "clkit.data",
        "clkit.models",
        "clkit.strategies",
        "lightning.pytorch.callbacks",
        "lightning.pytorch.loggers",
        "lightning.pytorch.strategies",
    )
]


class _Parser(LightningArgumentParser):
    """Says in one line what is wrong before jsonargparse says it in forty."""

    def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> Any:
        """Reads a file of settings; one that cannot be read is named."""
        try:
            settings = yaml.safe_load(Path(str(cfg_path)).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{cfg_path} is no file of settings: {error}")
        if not isinstance(settings, dict):
            self.error(
                f"{cfg_path} is no file of settings: it holds a {type(settings).__name__}, not names with values"
            )
        return super().parse_path(cfg_path, *arguments, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside another: the outer one speaks
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        known = [action.dest for action in parser._actions]
        sys.stderr.write(f"clkit: {summary(message, known)}\n\n{message}\n\nall settings: {command} --help\n")
        raise SystemExit(2)


class _SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration with the results, and hands it to ``results.json``."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.loggers and Path(trainer.default_root_dir) == Path.cwd():
            raise ConfigurationError(
                "trainer.logger is false and trainer.default_root_dir is not set, so results would land in the current "
                "folder; set trainer.default_root_dir to the folder of this run"
            )
        config = yaml.safe_load(self.parser.dump(self.config, skip_unset=False))
        for callback in callbacks_of(trainer):
            if isinstance(callback, StreamEvaluation):
                callback.config = config
        saved = Path(trainer.log_dir or trainer.default_root_dir) / self.config_filename
        if stage == "fit" or not saved.exists():  # an evaluation in the folder of a fit leaves the fit's settings alone
            super().setup(trainer, pl_module, stage)


class StreamCLI(LightningCLI):
    """LightningCLI with clkit's model, data and strategies as defaults; any other of the user's can be named.

    Args:
        arguments: The command and its options; those of the process by default.
        run: Whether to run the command, or only to build what it needs (``arguments`` then has no command).

    Raises:
        ClkitError: If clkit refuses a setting.
    """

    def __init__(self, arguments: Sequence[str] | None = None, run: bool = True) -> None:
        super().__init__(
            model_class=pl.LightningModule,
            datamodule_class=pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            args=list(arguments) if arguments is not None else None,
            run=run,
        )

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        """A parser that says first what is wrong."""
        parser = _Parser(**{"prog": "clkit", **options})
        parser.add_argument("-c", "--config", action="config", help="path of a YAML file with settings")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults: a timm classifier on a stream of handwritten digits."""
        parser.set_defaults(
            {
                "model": {"class_path": "clkit.models.TimmClassifier"},
                "data": {"class_path": "clkit.data.StreamDataModule"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """A checkpoint that cannot be used is refused before anything is made for it."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path and path not in ("best", "last", "hpc") and ":" not in str(path):  # those Lightning looks up
            if not Path(path).is_file():
                what = "a folder" if Path(path).is_dir() else "not a file"
                raise ArgumentError(f"ckpt_path={str(path)!r} is {what}; give the path of a checkpoint")
            read_run(path)

    def before_instantiate_classes(self) -> None:
        """What Lightning would refuse with a traceback is refused here in one line, or, if it is plain, done."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        ours = f"clkit's own are {', '.join(STRATEGIES)}"
        _check_name(
            "trainer.strategy", config.trainer.strategy, ["auto", *StrategyRegistry.available_strategies()], ours
        )
        accelerators = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
        _check_name(
            "trainer.accelerator", config.trainer.accelerator, accelerators, f"there are {', '.join(accelerators)}"
        )
        if config.trainer.enable_progress_bar is False:  # a recipe may name a bar in its list of callbacks
            callbacks = config.trainer.callbacks
            listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
            config.trainer.callbacks = [each for each in listed if not each.class_path.endswith("ProgressBar")]


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one of Lightning's commands.

    Args:
        arguments: The command and its options; those of the process by default.

    Returns:
        0, or 2 where clkit refused a setting or a file (the message is on standard error).
    """
    sys.path.insert(0, str(Path.cwd()))  # classes of the user's own, as with `python script.py`
    try:
        StreamCLI(arguments)
    except (ValueError, KeyError, RuntimeError, OSError, ClkitError) as error:
        said = _said_of(error)
        if said is None:
            raise
        sys.stderr.write(f"clkit: {said}\n")
        return 2
    return 0


def _said_of(error: Exception) -> str | None:
    """One line for an error that a setting or a file can cause, ``None`` for one that is the code's own."""
    cause = refusal(error) if isinstance(error, ClkitError | ValueError) else None  # jsonargparse wraps in ValueError
    if cause is not None:
        return str(cause)
    text = str(error.args[0]) if error.args else ""
    if isinstance(error, RuntimeError) and text.startswith("Error(s) in loading state_dict for"):
        return _weights_mismatch(text)
    if isinstance(error, KeyError) and text.startswith("Trying to restore optimizer state"):
        return (
            "the checkpoint holds weights only (ModelCheckpoint with save_weights_only=true): no fit can go on from "
            "it; take one that was saved whole"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.filename or 'a file'} could not be written: {error.strerror}; make room and resume"
    return None


def _weights_mismatch(message: str) -> str:
    """What torch says over many lines of weights that do not fit, in one: the first difference and what to do."""
    problems = [line.strip().rstrip(".") for line in message.splitlines()[1:] if line.strip()]
    first = re.sub(r"torch\.Size\((\[[^\]]*\])\)", r"\1", problems[0])
    first = first.replace("copying a param with shape", "shape").replace("the shape in current model is", "and here")
    names, more = first.partition(": ")[2].split(", "), len(problems) - 1
    if "key(s)" in first:  # a list of names
        first, more = f"{first.partition(': ')[0]}: {names[0]}", more + len(names) - 1
    others = f" (and {more} more)" if more else ""
    return (
        f"the checkpoint has the weights of another network: {first}{others}; give the model it was trained with, "
        "for instance by the config.yaml in the folder of its run"
    )


def refusal(error: BaseException | None) -> ClkitError | None:
    """The error of clkit that caused another, if there is one: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, ClkitError):
        error = error.__cause__ or error.__context__
    return error


def _check_name(key: str, value: Any, known: Sequence[str], otherwise: str) -> None:
    if isinstance(value, str) and value not in known:
        raise ConfigurationError(f"{key}: there is no {value!r}{_near(value, known) or f'; {otherwise}'}")


# What jsonargparse reports for one wrong setting is a tree of all the types that it tried. In it, "Parser key" lines
# lead to the place and one leaf says what is wrong there.
_PLACE = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_NO_OPTION = re.compile(r"does not accept option '([^']+)'|[Uu]nrecognized arguments: (?:--)?([^\s=]+)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_IMPORT = re.compile(r"(No module named '[^']+'|module '[^']+' has no attribute '[^']+')")
_VALUE = re.compile(r"Given value: (.*)")
_TYPES = re.compile(r"Expected an? (?!dot import)(.+?)(?:\. Got value: (.*))?$")


def summary(message: str, known: Iterable[str] = ()) -> str:
    """One line for a person out of jsonargparse's message: the setting or value that is wrong, and what is near it.

    Args:
        message: What jsonargparse reports.
        known: The parser's settings, dotted.

    Example:
        >>> summary("Subcommand 'fit' does not accept option 'trainer.max_epoch'", ["trainer.max_epochs"])
        "there is no setting 'trainer.max_epoch', did you mean 'trainer.max_epochs'?"
    """
    if "is no file of settings" in message:
        return " ".join(message.split())
    if found := _NO_OPTION.search(message):
        name = found.group(1) or found.group(2)
        known = list(known)
        top = ", ".join(key for key in known if "." not in key and key not in ("help", "print_config"))
        return f"there is no setting {name!r}{_near(name, known) or f'; at the top there are {top}'}"
    lines = message.splitlines()
    for pattern, tell in ((_OPTION, _tell_option), (_NO_IMPORT, _tell_import), (_NO_CLASS, _tell_class)):
        for number, line in enumerate(lines):
            if found := pattern.search(line):
                return f"{_place(lines[:number])}{tell(found.group(1), lines[:number])}"
    for number, line in enumerate(lines):
        if _TYPES.search(line):
            return f"{_place(lines[:number])}{_tell_type(lines[number:])}"
    return " ".join(_PLACE.sub(r"\1:", message).split())


def _place(lines: Sequence[str]) -> str:
    keys = [found.group(1) for line in lines if (found := _PLACE.search(line))]
    return f"{'.'.join(keys)}: " if keys else ""


def _tell_option(name: str, lines: Sequence[str]) -> str:
    path = next(found.group(1) for line in reversed(lines) if (found := _CLASS.search(line)))
    module, _, attribute = path.rpartition(".")
    accepted = inspect.signature(getattr(import_module(module), attribute)).parameters
    return f"{attribute} has no setting {name!r}{_near(name, accepted) or '; it has ' + ', '.join(accepted)}"


def _tell_import(problem: str, lines: Sequence[str]) -> str:
    return problem


def _tell_class(name: str, lines: Sequence[str]) -> str:
    classes = [exported for namespace in _NAMESPACES for exported in namespace.__all__]
    return f"there is no class {name!r}{_near(name, classes) or '; give its dotted path, package.module.Class'}"


def _tell_type(lines: Sequence[str]) -> str:
    value, types = None, []
    for line in lines:
        if found := _TYPES.search(line):
            types.append(re.sub(r"<class '([^']+)'>|typing\.", r"\1", found.group(1)).replace("NoneType", "None"))
            value = found.group(2)
        elif value is None and (found := _VALUE.search(line)):
            value = found.group(1)
        if value is not None:
            break
    return f"{value!r} does not fit, expected {' or '.join(types)}"


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f", did you mean {near[0]!r}?" if near else ""
