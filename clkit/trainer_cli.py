"""``clkit fit | validate | test | predict``: a LightningCLI that knows clkit's classes by their short names."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

import clkit.data
import clkit.models  # noqa: F401

# short names in YAML are looked up among the classes that are imported
from clkit._lightning import callbacks_of
from clkit.callbacks import StreamEvaluation
from clkit.errors import ClkitError, ConfigurationError
from clkit.strategies.registry import STRATEGIES

__all__ = ["StreamCLI", "run"]


class _Parser(LightningArgumentParser):
    """Says in one line what is wrong before jsonargparse says it in forty."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.stderr.write(f"clkit: {summary(message, self)}\n\n")
        super().error(message, ex)
        raise SystemExit(2)


class _SaveConfig(SaveConfigCallback):
    """Saves the resolved configuration with the results, and hands it to ``results.json``."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.loggers and trainer.default_root_dir == _here():
            raise ConfigurationError(
                "trainer.logger is false and trainer.default_root_dir is not set, so results would land in the current "
                "folder; set trainer.default_root_dir to the folder of this run"
            )
        config = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        for callback in callbacks_of(trainer):
            if isinstance(callback, StreamEvaluation):
                callback.config = config
        super().setup(trainer, pl_module, stage)


class StreamCLI(LightningCLI):
    """LightningCLI with clkit's model, data and strategies as defaults; any other of the user's can be named."""

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
        parser = _Parser(**options)
        parser.add_argument("--config", action="config", help="path of a YAML file with settings")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Defaults: a timm classifier on a stream of handwritten digits."""
        parser.set_defaults(
            {
                "model": {"class_path": "clkit.models.TimmClassifier"},
                "data": {"class_path": "clkit.data.StreamDataModule"},
            }
        )


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one of Lightning's commands.

    Args:
        arguments: The command and its options; those of the process by default.

    Returns:
        0, or 1 where clkit refused a setting (the message is on standard error).
    """
    try:
        StreamCLI(arguments)
    except ClkitError as error:
        sys.stderr.write(f"clkit: {error}\n")
        return 1
    return 0


def summary(message: str, parser: LightningArgumentParser | None = None) -> str:
    """One line for a person out of jsonargparse's message: the key or value that is wrong, and what is near it."""
    strategy = re.search(r"strategy[^\n]*?'([\w-]+)'", message)
    unknown = re.search(r"(?:Key|Option|key|Unrecognized arguments:) ['\"]?(--)?([\w.\[\]-]+)['\"]?", message)
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    text = lines[-1] if len(lines) > 1 else message
    if unknown is not None and ("not expected" in message or "not accept" in message or "Unrecognized" in message):
        key = unknown.group(2)
        near = get_close_matches(key.rsplit(".", 1)[-1], _known_keys(parser, message), n=1)
        text = f"unknown setting {key!r}" + (f", did you mean {near[0]!r}?" if near else "")
    elif strategy is not None:
        near = get_close_matches(strategy.group(1), STRATEGIES, n=1)
        text = f"strategy {strategy.group(1)!r}: clkit has {', '.join(STRATEGIES)}" + (
            f"; did you mean {near[0]!r}?" if near else ""
        )
    return text


def _known_keys(parser: LightningArgumentParser | None, message: str) -> list[str]:
    listed = re.findall(r"[a-z_][a-z0-9_]+", message)
    actions = [] if parser is None else [action.dest.rsplit(".", 1)[-1] for action in parser._actions]
    return [*actions, *listed]


def _here() -> str:
    from pathlib import Path

    return str(Path.cwd())
