"""clkit's strategies as Ray Train takes them."""

from __future__ import annotations

from functools import cache
from pkgutil import resolve_name
from typing import Any

from clkit._registry import STRATEGIES
from clkit.arguments import in_short
from clkit.errors import ArgumentError, ConfigurationError, did_you_mean
from clkit.strategies.base import LearningStrategy

__all__ = ["ray_strategy"]

_OF_RAY = {"process_group_backend": "backend=…", "timeout": "timeout_s=…"}  # what says them there


def ray_strategy(strategy: str | type[LearningStrategy], **options: Any) -> LearningStrategy:
    """Return a strategy of clkit that Ray Train accepts; to be called in the function that its workers run.

    Ray starts the processes and says who is who, so it refuses every strategy but heirs of its own
    (``ray.train.lightning.prepare_trainer``: "Invalid strategy class"). This is such an heir: the strategy of that
    name with the devices and ranks of Ray. A checkpoint goes on with or without Ray.

    Args:
        strategy: A name, ``"gradient_free"``, ``"er"`` …, or a class that derives from :class:`LearningStrategy`.
        options: Arguments of that strategy. What the processes speak by is Ray's own: set it in ``TorchConfig``.

    Raises:
        ArgumentError: If there is no such strategy, or it does not have such an argument.
        ConfigurationError: If Ray is not installed or this is not a worker of Ray Train; and when a Trainer is made
            with it without ``plugins=[RayLightningEnvironment()]``.

    Example:
        In the function that a ``ray.train.torch.TorchTrainer`` is given:

        >>> def learn(config):  # doctest: +SKIP
        ...     trainer = Trainer(strategy=ray_strategy("er", capacity=500), plugins=[RayLightningEnvironment()])

        >>> ray_strategy("gradient_fre")
        Traceback (most recent call last):
        clkit.errors.ArgumentError: no strategy of clkit is called 'gradient_fre', did you mean 'gradient_free'?
    """
    kind = _kind_of(strategy)
    if "start_method" in options:
        raise ArgumentError("start_method says how processes are started, and Ray starts the processes; leave it out")
    if given := [name for name in _OF_RAY if name in options]:
        raise ArgumentError(
            f"{given[0]} is a setting of Ray, which starts the processes: "
            f"TorchTrainer(torch_config=TorchConfig({_OF_RAY[given[0]]})); leave it out here"
        )
    try:
        from ray.train import get_context
    except ImportError as error:
        raise ConfigurationError(
            'ray_strategy needs Ray Train, which is not installed: pip install "ray[train]"'
        ) from error
    try:
        get_context()
    except RuntimeError as error:
        raise ConfigurationError(
            "ray_strategy was called outside of Ray Train's workers; call it in the function that TorchTrainer is "
            f"given, or use strategy={strategy!r} without Ray"
        ) from error
    return _in_ray(kind)(**options)


def _kind_of(strategy: Any) -> type[LearningStrategy]:
    if isinstance(strategy, type) and issubclass(strategy, LearningStrategy):
        return strategy
    if not isinstance(strategy, str):
        raise ArgumentError(
            "strategy must be the name of a strategy of clkit, or a class that derives from LearningStrategy, got "
            f"{in_short(strategy)}"
        )
    if strategy not in STRATEGIES:
        hint = did_you_mean(strategy, STRATEGIES) or f", but {', '.join(map(repr, STRATEGIES))}"
        raise ArgumentError(f"no strategy of clkit is called {strategy!r}{hint}")
    kind: type[LearningStrategy] = resolve_name(STRATEGIES[strategy])
    return kind


class _InRay(LearningStrategy):
    """Asks Ray how many processes there are: each of its workers has devices of its own, and knows of no others."""

    @property
    def single_device(self) -> bool:
        return self.world_size <= 1

    def _configure_launcher(self) -> None:
        from ray.train.lightning import RayLightningEnvironment

        if not isinstance(self.cluster_environment, RayLightningEnvironment):
            raise ConfigurationError(
                f"under Ray the Trainer needs plugins=[RayLightningEnvironment()] of ray.train.lightning; it has "
                f"{type(self.cluster_environment).__name__}, which does not know the other workers"
            )
        super()._configure_launcher()


@cache
def _in_ray(kind: type[LearningStrategy]) -> type[LearningStrategy]:
    from ray.train.lightning import RayDDPStrategy  # whose heirs Ray accepts

    made: type[LearningStrategy] = type(f"Ray{kind.__name__}", (_InRay, kind, RayDDPStrategy), {})
    made.__module__, made.__qualname__ = kind.__module__, kind.__qualname__  # the key of its state in a checkpoint
    return made
