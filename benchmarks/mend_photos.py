"""Photos for studies of edits: an ImageNet network cut in a stem, which stays, and a tail, and what the stem gives."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from editing import answers
from PIL import Image
from torch import Tensor, nn

from clkit.methods import RandomViews

PHOTOS, WEIGHTS = "imagenet1k_sample.npz", "weights/tf_efficientnet_lite0_in1k.safetensors"
NETWORK, SIZE, STEM = "tf_efficientnet_lite0", 224, 6  # blocks before what is edited
STEM_SHAPE = (192, 7, 7)  # of what they give
CORRECTED, VIEWS = 30, 16
crops = RandomViews(grey=0.0, area=(0.5, 1.0))


class Tail(nn.Module):
    """The last block of the network and what follows it, under the same names, for what the stem gives."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({str(STEM): model.blocks[STEM]})
        self.conv_head, self.bn2 = model.conv_head, model.bn2
        self.global_pool, self.classifier = model.global_pool, model.classifier

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.classifier(self.global_pool(self.bn2(self.conv_head(self.blocks[str(STEM)](x)))))
        return logits


class Photos(NamedTuple):
    """Photos (N, 3, 224, 224) with labels (N,), what the stem gives for them, and for views (N, V, …) of them."""

    x: Tensor
    y: Tensor
    stem: Tensor
    views: Tensor


class Halves(NamedTuple):
    """The photos of the editor, those to correct, and those to leave alone."""

    editor: Photos
    wrong: Photos
    rest: Photos


def network(root: Path) -> nn.Module:
    """Return the network that is edited."""
    model: nn.Module = timm.create_model(NETWORK, pretrained=False, checkpoint_path=str(root / WEIGHTS))
    return model.eval().to(memory_format=torch.channels_last)


def photos(root: Path) -> tuple[Tensor, Tensor]:
    """Return all photos, cut to a square, as bytes (N, 3, 224, 224), and their labels."""
    with np.load(root / PHOTOS, allow_pickle=False) as file:
        data, offsets, y = file["jpeg"], file["offsets"], torch.from_numpy(file["y"].astype(np.int64))
    x = np.empty((len(y), SIZE, SIZE, 3), dtype=np.uint8)
    for row in range(len(y)):
        photo = Image.open(io.BytesIO(data[offsets[row] : offsets[row + 1]].tobytes()))
        left, top = (photo.width - SIZE) // 2, (photo.height - SIZE) // 2
        x[row] = np.asarray(photo.crop((left, top, left + SIZE, top + SIZE)))
    return torch.from_numpy(x).permute(0, 3, 1, 2), y


def scaled(x: Tensor) -> Tensor:
    """Return pixels as the network takes them."""
    return (x.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def stem_of(model: Any, x: Tensor) -> Tensor:
    """Return what the blocks before the edited ones give."""
    parts = []
    for part in x.split(32):
        z = model.bn1(model.conv_stem(part))
        for block in model.blocks[:STEM]:
            z = block(z)
        parts.append(z)
    return torch.cat(parts)


def viewed(model: nn.Module, x: Tensor, y: Tensor, count: int, seed: int) -> Photos:
    """Return photos with what the stem gives for them and for views of them."""
    generator = torch.Generator().manual_seed(seed)
    stem = stem_of(model, scaled(x))
    views = [stem_of(model, crops(scaled(x), generator)) for _ in range(count)]
    return Photos(x, y, stem, torch.stack(views, dim=1) if views else stem[:, None][:, :0])


def halves(root: Path, model: nn.Module) -> Halves:
    """Cut the photos in two halves, and the second in those to correct and those to leave alone."""
    (x, y), tail = photos(root), Tail(model)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    own, other = order.chunk(2)
    wrong = other[answers(tail, stem_of(model, scaled(x[other]))) != y[other]][:CORRECTED]
    rest = other[~torch.isin(other, wrong)]
    return Halves(
        viewed(model, x[own], y[own], 0, 1),
        viewed(model, x[wrong], y[wrong], VIEWS + 8, 3),  # those to judge by, and those of the edits
        viewed(model, x[rest], y[rest], 0, 4),
    )
