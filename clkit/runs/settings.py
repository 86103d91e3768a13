"""``clkit fit | validate | test | predict``: a LightningCLI that knows clkit's classes by their short names."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.strategies import StrategyRegistry

from clkit._registry import STRATEGIES
from clkit.callbacks import StreamEvaluation
from clkit.errors import ArgumentError, ClkitError, ConfigurationError, did_you_mean
from clkit.runs._messages import line_for_error, line_for_settings
from clkit.stream._lightning import callbacks_of
from clkit.stream.checkpoint_io import read_run

__all__ = ["StreamCLI", "read_settings", "run"]


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return a file of settings as a tree; one that is no such file is a ConfigurationError."""
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is no file of settings: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigurationError(
            f"{path} is no file of settings: it holds a {type(settings).__name__}, not names with values"
        )
    return settings


class _Parser(LightningArgumentParser):
    """A parser that says in one line what is wrong before jsonargparse says it in forty."""

    def parse_path(self, cfg_path: Any, *arguments: Any, **options: Any) -> Any:
        """Read a file of settings; name one that cannot be read."""
        try:
            read_settings(str(cfg_path))
        except ConfigurationError as error:
            self.error(str(error))
        return super().parse_path(cfg_path, *arguments, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a parser inside another: the outer one speaks
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        command = parser.prog.replace(" [options]", "")
        known = [action.dest for action in parser._actions]
        sys.stderr.write(f"clkit: {line_for_settings(message, known)}\n\n{message}\n\nall settings: {command} --help\n")
        raise SystemExit(2)


class _SaveConfig(SaveConfigCallback):
    """The callback that saves the resolved configuration with the results and hands it to ``results.json``."""

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
        """Return a parser that says first what is wrong."""
        parser = _Parser(**{"prog": "clkit", **options})
        parser.add_argument("-c", "--config", action="config", help="path of a YAML file with settings")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Set the defaults: a timm classifier on a stream of handwritten digits."""
        parser.set_defaults(
            {
                "model": {"class_path": "clkit.models.TimmClassifier"},
                "data": {"class_path": "clkit.data.StreamDataModule"},
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse a checkpoint that cannot be used before anything is made for it."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        path = self.config[command].get("ckpt_path") if command else None
        if path and path not in ("best", "last", "hpc") and ":" not in str(path):  # those Lightning looks up
            if not Path(path).is_file():
                what = "a folder" if Path(path).is_dir() else "not a file"
                raise ArgumentError(f"ckpt_path={str(path)!r} is {what}; give the path of a checkpoint")
            read_run(path)

    def before_instantiate_classes(self) -> None:
        """Refuse in one line what Lightning would refuse with a traceback, and do what is plainly meant."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        strategies = ["auto", *StrategyRegistry.available_strategies()]
        accelerators = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
        for name, known, others in (
            ("strategy", strategies, f"clkit's own are {', '.join(STRATEGIES)}"),
            ("accelerator", accelerators, f"there are {', '.join(accelerators)}"),
        ):
            value = config.trainer[name]
            if isinstance(value, str) and value not in known:
                hint = did_you_mean(value, known) or f"; {others}"
                raise ConfigurationError(f"trainer.{name}: there is no {value!r}{hint}")
        if config.trainer.enable_progress_bar is False:  # a recipe may name a bar in its list of callbacks
            callbacks = config.trainer.callbacks
            listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
            config.trainer.callbacks = [each for each in listed if not each.class_path.endswith("ProgressBar")]


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one of Lightning's commands: ``arguments``, or those of the process.

    Returns:
        0, or 2 where clkit refused a setting or a file (the message is on standard error).
    """
    sys.path.insert(0, str(Path.cwd()))  # classes of the user's own, as with `python script.py`
    try:
        StreamCLI(arguments)
    except (ValueError, KeyError, RuntimeError, OSError, ClkitError) as error:
        said = line_for_error(error)
        if said is None:
            raise
        sys.stderr.write(f"clkit: {said}\n")
        return 2
    return 0
