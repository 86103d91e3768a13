"""Speed and memory of a replay step, as ratios measured side by side in one run.

    python benchmarks/onpro.py [--only step er memory peak] [--rounds 5] [--threads 1] [--json FILE]

``step``: a whole step of OnPro (memory sample, mixing, views, forward, losses, backward) beside a plain transcription
of its equations: three forward calls, a loop over classes for the means, full matrices of costs, gradients also with
respect to the images. Both are checked to give the same loss and gradients first. ``er``: OnPro at each rotation
beside experience replay with the same batch, and the ratio that the numbers of images predict. ``memory``: what a
ReservoirBuffer costs a step beside the forward of a resnet18. ``peak``: the most resident memory (VmHWM) of a step,
each in a process of its own. Needs no data. Where there is a GPU, ``gpu`` measures steps of a ResNet-18 and a ViT-S
under bfloat16 there. Seconds are those of the processor, on a GPU those of the clock. Exit status 1 if a goal is
missed.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clkit import FeatureTap
from clkit.methods import (
    BatchNormSegments,
    MixedBatch,
    OnlinePrototypes,
    OnProLosses,
    RandomViews,
    ReservoirBuffer,
    rotate_views,
)
from clkit.methods.replay.contrast import Projector, draw_offset
from clkit.methods.replay.step import Block, StepBatch, StepOutputs, arrange, total_loss
from clkit.methods.replay.views import VARIANTS
from clkit.models import TimmClassifier
from clkit.strategies import ERStrategy

CLASSES, NEW, REPLAYED = 10, 10, 64
ROTATIONS = ("rot16", "rot4", "none")
STEP_GOAL, MEMORY_GOAL = 0.8, 0.01
SMALL_NET = {"layers": [1, 1, 1, 1], "channels": [8, 16, 32, 64], "stem_type": "deep", "stem_width": 4}


@dataclass
class Line:
    """One comparison: seconds (or MiB) of both sides and the first over the second."""

    what: str
    ours: float
    theirs: float
    goal: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """Ours over theirs."""
        return self.ours / self.theirs

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, where there is one."""
        return None if self.goal is None else self.ratio <= self.goal


def best_of(rounds: int, *runs: Callable[[], Any], on_gpu: bool = False) -> list[float]:
    """Seconds of one call of each function: the best round, the functions taking turns.

    On a CPU the seconds of the processor: what other processes take of a shared machine is not in them.
    """

    def now() -> float:
        if not on_gpu:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    best = [math.inf] * len(runs)
    for _ in range(rounds):
        for position, run in enumerate(runs):
            start = now()
            run()
            best[position] = min(best[position], now() - start)
    return best


# ---- what a step works on


class Setting:
    """A network, a full memory and an incoming batch."""

    def __init__(
        self, size: int, network: nn.Module, width: int, *, device: str = "cpu", bfloat16: bool = False
    ) -> None:
        torch.manual_seed(0)
        self.device, self.bfloat16 = torch.device(device), bfloat16
        self.network = network.to(device).train()
        self.projector = Projector(width, min(128, width // 2)).to(device)
        self.memory = ReservoirBuffer(200)
        generator = torch.Generator().manual_seed(0)
        for start in range(0, 400, NEW):
            images = torch.randn(NEW, 3, size, size, generator=generator)
            self.memory.add(images, torch.arange(start, start + NEW) % CLASSES)
        self.x = torch.randn(NEW, 3, size, size, generator=generator).to(device)
        self.y = torch.arange(NEW) % 2 + CLASSES - 2
        self.prototypes = OnlinePrototypes()
        self.prototypes.keep(torch.arange(CLASSES), torch.randn(CLASSES, self.width, generator=generator))

    @property
    def width(self) -> int:
        """Of the embedding."""
        return int(self.projector.layers[-1].out_features)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Of network and projector."""
        return [*self.network.parameters(), *self.projector.parameters()]

    def draw(self, generator: torch.Generator, *, apf: bool) -> tuple[Tensor, Tensor, MixedBatch]:
        """A sample of the memory and the replay batch made of it."""
        rows = self.memory.sample(REPLAYED, generator)
        images, labels = rows.data.to(self.device), rows.label.cpu()
        if not apf:
            return images, labels, MixedBatch.pure(images, labels)
        mixed = self.prototypes.mix(rows.data, rows.label, self.memory, generator)
        return images, labels, mixed._replace(images=mixed.images.to(self.device))

    def autocast(self) -> torch.autocast:
        """Of the forward."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bfloat16)


def small_setting() -> Setting:
    """The ResNet of the digits' recipe on 8 x 8 images."""
    model = TimmClassifier("resnet18", small_images=True, num_classes=CLASSES, model_kwargs=SMALL_NET)
    return Setting(8, model, 64)


# ---- a step of the library


class LibraryStep:
    """One step as OnProStrategy makes it, or, without losses of OnPro, ERStrategy; without a trainer around."""

    def __init__(self, setting: Setting, losses: OnProLosses | None, *, transform: RandomViews | None) -> None:
        self.setting, self.losses, self.transform = setting, losses, transform
        self.tap = FeatureTap(setting.network)
        self.segments = None if losses is None else BatchNormSegments(setting.network)
        self.er = ERStrategy()

    def close(self) -> None:
        """Gives the network back as it was."""
        if self.segments is not None:
            self.segments.close()
        self.tap.close()

    def __call__(self) -> Tensor:
        """The loss of one step, after its backward."""
        setting, generator = self.setting, torch.Generator().manual_seed(1)
        images, labels, mixed = setting.draw(generator, apf=self.losses is not None)
        new, seen = Block.whole(setting.x, setting.y), Block.whole(images, labels)
        if self.losses is None:
            rows = setting.memory.sample(0)
            blocks = self.er.views(StepBatch(new, seen, REPLAYED, rows, {}))
        else:
            blocks = self.losses.views(new, seen, Block.whole(mixed.images, mixed.labels), CLASSES, first=False)

        def augmented(images: Tensor, positions: Tensor, total: int) -> Tensor:
            if self.transform is None:
                return images
            return self.transform(images, numbers=self.transform.draw(total, generator)[positions])

        views = arrange(blocks, augmented)
        heard = []
        listener = self.tap.listen(heard.append)
        with setting.autocast():
            if self.segments is None:
                logits = setting.network(views.images)
            else:
                with self.segments.step(views.segments):
                    logits = setting.network(views.images)
            features = heard[0].features
            embeddings = None if self.losses is None else setting.projector(features)
        listener.remove()
        outputs = StepOutputs(views, logits, features, embeddings)
        if self.losses is None:
            loss = total_loss(self.er.terms(outputs), outputs)
        else:
            loss = total_loss(self.losses.losses(outputs, generator, first=False)[0], outputs)
        loss.backward()
        return loss.detach()


# ---- the same, transcribed from the equations


class PlainStep:
    """One later step, line by line: a forward call for each group of views, loops, and gradients of the images."""

    def __init__(self, setting: Setting, rotation: Any, *, transform: RandomViews | None) -> None:
        self.setting, self.rotation, self.transform = setting, rotation, transform
        self.variants = VARIANTS[rotation]

    def __call__(self) -> Tensor:
        """The loss of one step, after its backward."""
        setting, generator = self.setting, torch.Generator().manual_seed(1)
        u, v, mixed = setting.draw(generator, apf=True)
        x, y = setting.x.clone().requires_grad_(), setting.y
        replay = mixed.images.clone().requires_grad_()
        first_of, second_of, share = mixed.first, mixed.second, mixed.share

        def augmented(images: Tensor) -> Tensor:
            return images if self.transform is None else self.transform(images, generator)

        # first call: rotated images and their augmented views
        new, memory = rotate_views(x, self.rotation), rotate_views(replay, self.rotation)
        f = self.features(torch.cat([new, augmented(new), memory, augmented(memory)]))
        z = self.projected(f)
        count = 2 * len(new)
        ids = torch.cat([y + CLASSES * k for k in range(self.variants)]).float()
        offsets = [draw_offset(f.shape[1], z.shape[1], generator) for _ in range(2)]
        loss = self.instance(z[:count], f[:count], ids, offsets[0], new=True)
        blend = (1 - share.cpu()) * first_of.cpu() + share.cpu() * second_of.cpu()
        blend = torch.where(first_of.cpu() == second_of.cpu(), first_of.cpu().float(), blend)  # rounding parts them
        mixed_ids = torch.cat([blend + CLASSES * k for k in range(self.variants)])
        loss = loss + self.instance(z[count:], f[count:], mixed_ids, offsets[1], new=False)
        upright = slice(0, NEW), slice(len(new), len(new) + NEW)
        loss = loss + self.prototypes(z[upright[0]], z[upright[1]], y)

        # second call: cross-entropy of the replay batch
        with setting.autocast():
            logits = setting.network(augmented(replay))
        logits = logits.float()
        both = [F.cross_entropy(logits, ids.to(logits.device), reduction="none") for ids in (first_of, second_of)]
        loss = loss + ((1 - share) * both[0] + share * both[1]).mean()

        # third call: prototypes of the memory's sample
        z = self.projected(self.features(torch.cat([u, augmented(u)])))
        loss = loss + self.prototypes(z[: len(u)], z[len(u) :], v)
        loss.backward()
        return loss.detach()

    def features(self, images: Tensor) -> Tensor:
        """What goes into the classifier."""
        network: Any = self.setting.network.network
        with self.setting.autocast():
            features: Tensor = network.forward_head(network.forward_features(images), pre_logits=True)
        return features

    def projected(self, features: Tensor) -> Tensor:
        """Unit rows."""
        with self.setting.autocast():
            embeddings: Tensor = self.setting.projector(features)
        return embeddings

    @staticmethod
    def instance(z: Tensor, f: Tensor, ids: Tensor, offset: int, *, new: bool, temperature: float = 0.07) -> Tensor:
        """The contrast of instances with all of its matrices."""
        f, n = f.float(), len(z) // 2
        h = f / f.norm(dim=1, keepdim=True)
        scores = z @ h[:, offset : offset + z.shape[1]].T + z @ z.T
        scores = scores - scores.max(dim=1, keepdim=True).values.detach()
        weights = torch.exp(scores / temperature)
        if new:
            weights = weights * (1 - torch.eye(2 * n, device=z.device))
        costs = -torch.log(weights / (weights.sum(dim=1, keepdim=True) + 1e-8) + 1e-8)
        labels = torch.cat([ids, ids]).to(z.device)
        same = (labels[:, None] == labels[None, :]).float()
        same = same / (same.sum(dim=1, keepdim=True) + 1e-8)
        total = (same * costs).sum() / (2 * n)
        if not new:
            return total
        partners = torch.arange(2 * n, device=z.device).roll(n)
        return costs[torch.arange(2 * n, device=z.device), partners].mean() + 2 * total

    @staticmethod
    def prototypes(first: Tensor, second: Tensor, labels: Tensor, temperature: float = 0.5) -> Tensor:
        """The contrast of class means, one class after the other."""
        labels = labels.to(first.device)
        classes = sorted(set(labels.tolist()))
        means = [view[labels == c].mean(dim=0) for view in (first, second) for c in classes]
        unit = torch.stack([mean / mean.norm() for mean in means])
        scores = unit @ unit.T / temperature
        scores = scores.masked_fill(torch.eye(len(unit), dtype=torch.bool, device=unit.device), -torch.inf)
        partners = torch.arange(len(unit), device=unit.device).roll(len(classes))
        return -F.log_softmax(scores, dim=1)[torch.arange(len(unit), device=unit.device), partners].mean()


def check_equal(setting: Setting, rotation: Any) -> None:
    """Both steps give the same loss and gradients where nothing is augmented.

    Raises:
        AssertionError: If they differ.
    """
    ours = LibraryStep(setting, OnProLosses(rotation=rotation), transform=None)
    try:
        losses, gradients = [], []
        for step in (ours, PlainStep(setting, rotation, transform=None)):
            setting.network.zero_grad()
            setting.projector.zero_grad()
            state = {name: value.clone() for name, value in setting.network.state_dict().items()}
            losses.append(float(step()))
            gradients.append(torch.cat([p.grad.flatten() for p in setting.parameters if p.grad is not None]))
            setting.network.load_state_dict(state)
        off = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
        assert math.isclose(*losses, rel_tol=1e-4), f"{rotation}: losses {losses}"
        assert off < 1e-3, f"{rotation}: gradients differ by {off:.1e}"
    finally:
        ours.close()


# ---- parts


def step(rounds: int) -> list[Line]:
    """A step beside its transcription, at each rotation."""
    lines = []
    setting = small_setting()
    for rotation in ROTATIONS:
        check_equal(setting, rotation)
        ours = LibraryStep(setting, OnProLosses(rotation=rotation), transform=RandomViews())
        plain = PlainStep(setting, rotation, transform=RandomViews())
        seconds = best_of(rounds, ours, plain)
        ours.close()
        lines.append(Line(f"a step, {rotation}, small ResNet at 8 px / transcription", *seconds, STEP_GOAL))
    return lines


def er(rounds: int) -> list[Line]:
    """OnPro beside ER with the same batch of 10 + 64."""
    setting = small_setting()
    lines = []
    for rotation in ROTATIONS:
        rule = OnProLosses(rotation=rotation)
        ours = LibraryStep(setting, rule, transform=RandomViews())
        theirs = LibraryStep(setting, None, transform=RandomViews())
        seconds = best_of(rounds, ours, theirs)
        theirs.close()
        ours.close()
        images = rule.images(NEW, REPLAYED), NEW + REPLAYED
        note = f"images {images[0]} / {images[1]} = {images[0] / images[1]:.1f}"
        lines.append(Line(f"OnPro, {rotation} / ER", *seconds, note=note))
    return lines


def memory(rounds: int) -> list[Line]:
    """Reading and writing the memory, beside the forward of the step's images through a resnet18 at 32 px."""
    network = TimmClassifier("resnet18", small_images=True, num_classes=CLASSES).train()
    pixels = torch.randint(0, 256, (NEW, 3, 32, 32), dtype=torch.uint8)
    images, labels = pixels.float() / 255, torch.arange(NEW)
    whole = torch.rand(NEW + REPLAYED, 3, 32, 32)

    def forward() -> None:
        with torch.no_grad():
            network(whole)

    lines = []
    for storage in ("same", "uint8", "float16"):
        buffer = ReservoirBuffer(500, storage=storage)
        for _ in range(60):
            buffer.add(images, labels)

        def both(buffer: ReservoirBuffer = buffer) -> None:
            for _ in range(20):
                buffer.add(images, labels)
                buffer.sample(REPLAYED)

        twenty, one = best_of(rounds, both, forward)
        what = f"ReservoirBuffer.add 10 + sample 64, storage {storage} / forward of 74 images, resnet18 at 32 px"
        lines.append(Line(what, twenty / 20, one, MEMORY_GOAL))
    return lines


def peak(rounds: int) -> list[Line]:
    """Most resident memory of a step above what lay there before, each in a process of its own; on Linux only."""
    del rounds
    if not Path("/proc/self/clear_refs").exists():
        print("peak: needs Linux, whose /proc can forget the highest resident memory so far")
        return []
    lines = []
    for rotation in ROTATIONS:
        added = []
        for kind in ("ours", "plain"):
            command = [sys.executable, __file__, "--peak", kind, rotation]
            added.append(float(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
        lines.append(Line(f"MiB that a step adds, {rotation}, small ResNet at 8 px / transcription", *added))
    return lines


def peak_of(kind: str, rotation: Any) -> float:
    """MiB by which a step raises the resident memory of this process at its highest."""
    setting = small_setting()
    run: Callable[[], Tensor] = PlainStep(setting, rotation, transform=RandomViews())
    if kind == "ours":
        run = LibraryStep(setting, OnProLosses(rotation=rotation), transform=RandomViews())
    setting.network(setting.x).sum().backward()  # what torch allocates once
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is forgotten
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of a field of this process, such as ``VmRSS``, what is resident now, or ``VmHWM``, the most so far."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def gpu(rounds: int) -> list[Line]:
    """Steps of a ResNet-18 at 32 px and a ViT-S at 224 px under bfloat16, and their memory."""
    lines = []
    resnet = TimmClassifier("resnet18", small_images=True, num_classes=CLASSES)
    vit = TimmClassifier("vit_small_patch16_224", num_classes=CLASSES)
    for title, size, network, width, rotations in (
        ("ResNet-18 at 32 px", 32, resnet, 512, ROTATIONS),
        ("ViT-S/16 at 224 px", 224, vit, 384, ("rot4", "none")),
    ):
        setting = Setting(size, network, width, device="cuda", bfloat16=True)
        replay = LibraryStep(setting, None, transform=RandomViews())
        for rotation in rotations:
            rule = OnProLosses(rotation=rotation)
            ours = LibraryStep(setting, rule, transform=RandomViews())
            plain = PlainStep(setting, rotation, transform=RandomViews())
            peaks = []
            for run in (ours, plain):
                run()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                run()
                torch.cuda.synchronize()
                peaks.append(torch.cuda.max_memory_allocated() / 2**20)
            seconds = best_of(rounds, ours, plain, replay, on_gpu=True)
            ours.close()
            goal = STEP_GOAL
            lines.append(Line(f"a step, {rotation}, {title}, bf16 / transcription", *seconds[:2], goal))
            predicted = rule.images(NEW, REPLAYED) / (NEW + REPLAYED)
            lines.append(
                Line(f"OnPro, {rotation}, {title} / ER", seconds[0], seconds[2], note=f"images {predicted:.1f}")
            )
            lines.append(Line(f"MiB of a step, {rotation}, {title} / transcription", *peaks))
        replay.close()
    return lines


PARTS: dict[str, Callable[[int], list[Line]]] = {"step": step, "er": er, "memory": memory, "peak": peak, "gpu": gpu}


def main() -> int:
    """Runs the parts; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="of each comparison; the best counts")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=None, help="default: all, gpu where there is one")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak is not None:
        print(peak_of(*options.peak))
        return 0
    parts = options.only or [name for name in PARTS if name != "gpu" or torch.cuda.is_available()]
    print(
        f"torch {torch.__version__}, {options.threads} threads; processor seconds of one call, "
        f"best of {options.rounds} in turns"
    )
    lines = []
    for name in parts:
        for line in PARTS[name](options.rounds):
            goal = "" if line.goal is None else f"goal <= {line.goal}: {'met' if line.met else 'MISSED'}"
            print(
                f"{line.what:<92} {line.ours:>10.5f} {line.theirs:>10.5f} {line.ratio:>9.5f}  {goal or line.note}",
                flush=True,
            )
            lines.append(line)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(line) | {"ratio": line.ratio} for line in lines], indent=1) + "\n")
    return int(any(line.met is False for line in lines))


if __name__ == "__main__":
    sys.exit(main())
