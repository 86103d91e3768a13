"""What an edit costs beside one forward and backward pass, in time and memory.

    python benchmarks/mend_cost.py [--network resnet50 vit_base_patch16_224] [--rounds 5] [--threads 1] [--json FILE]

Random weights, one image of 224 px, the layers that an editor takes by itself. Beside the gradients of all parameters
of one image: an edit at unit scale (goal: at most twice as long) and at the smallest that does, which is one forward
more for each scale that is tried; taking it back; and their parts. Seconds of the processor, the best of rounds in
turns.

Memory: parameters of the editor beside the formula of its networks (they must be equal), what an edit leaves (original
weights, their sums in double precision, factors) beside the sizes of these, and the most that is added meanwhile.
A minute on one core, no data needed. Exit status 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from circumstances import circumstances
from onpro import best_of, resident
from torch import Tensor, nn
from torch.nn import functional as F

from clkit.methods import GradientEditor

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet50": {"zero_init_last": False},  # no gradient would reach a branch whose last norm is 0
    "vit_base_patch16_224": {},
}
RANKS = (16, 64, 128, 1920)
GOAL = 2.0
MIB = 2**20


def editor_of(model: nn.Module, x: Tensor, rank: int = 64) -> GradientEditor:
    """Return an editor with statistics of a few edits."""
    editor = GradientEditor(model, rank=rank)
    editor.fit_statistics([(x, torch.arange(len(x)))])
    return editor


def by_formula(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Return the parameters of an editor: of each shape U, V and b of two blocks, s and o of its layers; and steps."""
    total = len(shapes)
    for shape in set(shapes.values()):
        width, layers = sum(shape), sum(each == shape for each in shapes.values())
        total += 2 * (2 * min(rank, width) * width + width + 2 * layers * width)
    return total


def time_of(model: nn.Module, editor: GradientEditor, x: Tensor, rounds: int) -> dict[str, float]:
    """Return seconds of an edit and of what it stands beside."""
    with torch.no_grad():
        label = model(x).topk(2).indices[0, 1:]

    def gradients() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), label).backward()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    tried: list[float] = []

    def edit(scale: Any) -> None:
        result = editor.edit(x, label, scale=scale, guard=None)
        assert result.status == "applied", result
        tried.append(result.scale)

    def unit() -> None:
        edit("unit")

    def smallest() -> None:
        edit("smallest")

    found = {}
    for name, run in (("edit, unit scale", unit), ("edit, smallest scale", smallest)):
        best = [float("inf")] * 4
        for _ in range(rounds):
            taken = best_of(1, gradients, forward, run, editor.revert_all)
            best = [min(*pair) for pair in zip(best, taken, strict=True)]
        found |= {"forward and backward": best[0], "forward": best[1], name: best[2], "taking it back": best[3]}
    found["proposal"] = best_of(rounds, lambda: editor.propose(x, label))[0]
    found["scale"] = tried[-1]
    return found


def give_back_freed() -> None:
    """Give the system the memory that is free in this process, so that what is resident is what is held."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # of glibc; where memory is measured there is a /proc


def memory_of(model: nn.Module, editor: GradientEditor, x: Tensor) -> dict[str, float]:
    """Return MiB of the editor, and what an edit leaves and needs, measured and by its sizes."""
    label = (model(x).argmax(1) + 1) % 1000
    weights = [model.get_parameter(f"{name}.weight") for name in editor.layers]
    proposal = editor.propose(x, label)
    factors = sum(
        sum(part.numel() * part.element_size() for part in (each.P, each.Q, each.dense) if part is not None)
        for each in proposal.factors.values()
    )
    size = sum(weight.numel() for weight in weights)
    del proposal
    for _ in range(2):  # the first finds what torch allocates once
        editor.edit(x, label, scale="unit", guard=None)
        editor.revert_all()
    give_back_freed()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the highest so far is forgotten
    before = resident("VmRSS")
    editor.edit(x, label, scale="unit", guard=None)
    peak = resident("VmHWM") - before
    give_back_freed()
    after = resident("VmRSS") - before
    editor.revert_all()
    return {
        "edited weights": 4 * size / MIB,
        "left by sizes": (4 * size + 8 * size + factors) / MIB,
        "left": after,
        "factors": factors / MIB,
        "most": peak,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and say by the exit status whether the goals were met."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", "the editor is not trained")  # it costs as much
    for line in circumstances("mend_cost.py", arguments, f"{options.threads} thread(s) used"):
        print(line)
    found: dict[str, Any] = {}
    met = True
    for name in options.network:
        torch.manual_seed(0)
        model, x = timm.create_model(name, **NETWORKS[name]).eval(), torch.randn(2, 3, 224, 224)
        editor = editor_of(model, x)
        memory = memory_of(model, editor, x[:1]) if Path("/proc/self/clear_refs").exists() else {}
        seconds = time_of(model, editor, x[:1], options.rounds)
        shapes = editor.networks.shapes
        parameters = {}
        for rank in RANKS:
            networks = type(editor.networks)(shapes, rank=rank)
            parameters[rank] = sum(parameter.numel() for parameter in networks.parameters())
            met &= parameters[rank] == by_formula(shapes, rank)
        base = seconds["forward and backward"]
        ratio = seconds["edit, unit scale"] / base
        met &= ratio <= GOAL
        found[name] = {"seconds": seconds, "memory": memory, "parameters": parameters}
        print(f"\n{name}: {', '.join(editor.layers)}")
        for what, value in seconds.items():
            print(f"  {what:<22} {value:8.3f}" + (f" s, {value / base:.2f} times" if what != "scale" else ""))
        verdict = "met" if ratio <= GOAL else "MISSED"
        print(f"  {verdict}: at unit scale at most {GOAL:g} times a forward and backward")
        counts = ", ".join(f"{rank}: {count / 1e6:.2f}" for rank, count in parameters.items())
        print(f"  million parameters of the editor by rank, as by the formula: {counts}")
        for what, value in memory.items():
            print(f"  {what:<22} {value:8.1f} MiB")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
