"""The box of each class in feature space; the class of the nearest box is predicted."""

import torch
from torch import Tensor

from clkit.callbacks import FeatureCallback


class ClassBoxes(FeatureCallback):
    name = "boxes"  # prefix of its logs; having `scores`, it is a predictor

    def __init__(self, max_classes: int = 100) -> None:
        super().__init__()
        self.max_classes = max_classes
        self.high: Tensor | None = None  # (2, classes, D): highest x, highest -x

    def learn(self, features: Tensor, targets: Tensor) -> None:
        both = torch.stack([features, -features])
        if self.high is None:
            self.high = both.new_full((2, self.max_classes, both.shape[2]), -torch.inf)
        rows = targets[None, :, None].expand_as(both)
        self.high = self.high.to(both).scatter_reduce(1, rows, both, "amax")

    def scores(self, features: Tensor) -> Tensor:
        if self.high is None:
            return features.new_empty((len(features), 0))
        both = torch.stack([features, -features])[:, :, None]
        outside = both - self.high.to(both)[:, None]
        return -outside.clamp(min=0).sum((0, 3))  # -inf: class never seen

    def on_experience_end(self, trainer, pl_module, experience) -> None:
        if self.high is not None:  # the highest of all processes
            self.high = trainer.strategy.reduce(self.high, reduce_op="max")

    def stream_state(self) -> dict[str, Tensor | None]:
        return {"high": self.high}

    def load_stream_state(self, state: dict[str, Tensor | None]) -> None:
        self.high = state["high"]
