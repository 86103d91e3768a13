"""Maximally interfered retrieval: replay the images whose loss the coming step would raise most."""

import torch
from torch.nn.functional import cross_entropy

from clkit.methods import MemoryRows
from clkit.strategies import ERStrategy


class MIRStrategy(ERStrategy):
    state_key = "mir"  # its name in checkpoints and logs

    def __init__(self, capacity: int = 200, *, candidates: int = 50, **options) -> None:
        super().__init__(capacity, **options)
        self.candidates = candidates

    def retrieve(self, new, count: int, generator: torch.Generator) -> MemoryRows:
        rows = self.memory.sample(self.candidates, generator)
        images, labels = (
            each.to(new.images.device) for each in (rows.data, rows.label)
        )
        if not len(new.images):  # this process has no batch
            return rows.take(torch.arange(len(images))[:count])
        weights = {
            k: w for k, w in self.lightning_module.named_parameters() if w.requires_grad
        }
        loss = cross_entropy(self.look(new.images), new.labels.to(images.device))
        slopes = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        rate = self.optimizers[0].param_groups[0]["lr"]
        stepped = {
            key: weight.detach() if slope is None else weight.detach() - rate * slope
            for (key, weight), slope in zip(weights.items(), slopes, strict=True)
        }
        with torch.no_grad():
            before = cross_entropy(self.look(images), labels, reduction="none")
            after = cross_entropy(self.look(images, stepped), labels, reduction="none")
        return rows.take((after - before).argsort(descending=True)[:count].cpu())
