"""Train the perceptual net of `make demo`: the first layers of a narrow VGG, on labels of the toy world's source.

    python benchmarks/train_toy_features.py        (4000 steps: about 12 minutes on one CPU core)

ProCST's content term needs features that tell what a thing is and not which colour it has. ImageNet's VGG gives them
for photographs; it is no file of this project and too slow for the demo. This net learns the classes of 550 toy GTA5
frames that no demo draws, under random tone curves, exchanged colour channels, blur and noise. It sees no frame of the
target. The layers are named as torchvision's `vgg16().features`, and each ReLU's mean square over the frames is 1.
"""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data_handlers.classes import IGNORE
from data_handlers.toy.files import draw_frame
from models.vgg import outputs_at, vgg_layers
from training.flags import build_parser, option, parse, section_from
from utils.errors import run_cli
from utils.files import atomic_write

SIZE = (108, 54)
FRAMES, HELD_OUT = 600, 50
WORLD_SEED = 101
CONVS = {0: (3, 32), 2: (32, 32), 5: (32, 48), 7: (48, 48), 10: (48, 64), 12: (64, 64), 14: (64, 64)}
LAST = 15
TAPS = (3, 8, 15)
# A toy frame at the scales of ProCST's pyramid; the two finer ones are drawn twice as often.
SCALES = (1.0, 1.0, 0.5, 0.5, 0.25)
KNOTS = 4


@dataclass(frozen=True)
class FeatureFlags:
    """The flags of this script."""

    out: str = option(str(ROOT / "data_handlers" / "toy" / "features.pth"), "the file to write")
    steps: int = option(4000, "steps of 12 frames")


class FeatureNet(nn.Module):
    """The layers and a head that classifies each pixel from three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = vgg_layers(CONVS, LAST)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        channels = sum(CONVS[tap - 1][1] for tap in TAPS)
        self.head = nn.Sequential(nn.Conv2d(channels, 64, 1), nn.ReLU(), nn.Conv2d(64, 19, 1))

    def forward(self, image: Tensor) -> Tensor:
        """(B,3,h,w) in [-1,1] -> logits (B,19,h,w)."""
        found = outputs_at(self.features, image, TAPS)
        maps = [F.interpolate(found[tap], size=image.shape[-2:], mode="bilinear") for tap in TAPS]
        return self.head(torch.cat(maps, dim=1))


def draw_frames() -> tuple[Tensor, Tensor]:
    """The frames, (N,3,H,W) in [0,1], and their trainIds, (N,H,W)."""
    with ProcessPoolExecutor() as pool:
        drawn = pool.map(partial(draw_frame, "gta5", WORLD_SEED, "train", size=SIZE), range(FRAMES), chunksize=10)
        pictures, labels = zip(*drawn, strict=True)
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    return images, torch.from_numpy(np.stack(labels)).long()


def other_light(images: Tensor, random: torch.Generator) -> Tensor:
    """Images (B,3,h,w) in [0,1] under other colours: tone curves that may fall as well as rise, blur, noise."""
    count = len(images)
    uniform, normal = partial(torch.rand, generator=random), partial(torch.randn, generator=random)
    grey = uniform(count, 1, 1, 1) * (uniform(count, 1, 1, 1) < 0.5)
    images = images * (1 - grey) + images.mean(1, keepdim=True) * grey
    order = torch.stack([torch.randperm(3, generator=random) for _ in range(count)])
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    images = _tone_curves(images, uniform)
    images = images * torch.exp(0.25 * normal(count, 3, 1, 1)) + 0.1 * normal(count, 3, 1, 1)
    if (sigma := 1.2 * uniform(1).item()) > 0.3:
        line = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * sigma**2))
        line = line / line.sum()
        kernel = (line[:, None] * line).expand(3, 1, 5, 5)
        images = F.conv2d(F.pad(images, (2, 2, 2, 2), "replicate"), kernel, groups=3)
    return (images + 0.08 * uniform(1) * normal(*images.shape)).clamp(0, 1)


def _tone_curves(images: Tensor, uniform: partial[Tensor]) -> Tensor:
    """Map the values of every channel through random knots with straight lines between them."""
    count = len(images)
    knots = uniform(count, 1, KNOTS) + 0.5 * (uniform(count, 3, KNOTS) - 0.5)
    strength = uniform(count, 1, 1)
    knots = torch.linspace(0, 1, KNOTS) * (1 - strength) + knots * strength
    position = images.clamp(0, 1) * (KNOTS - 1)
    below = position.floor().clamp(max=KNOTS - 2)
    index = below.long().flatten(2)
    low, high = (knots.gather(2, index + k).view_as(images) for k in (0, 1))
    return low + (high - low) * (position - below)


def train(net: FeatureNet, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train with Adam on random frames, scales, mirrorings and colours."""
    random = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(0, FRAMES - HELD_OUT, (12,), generator=random)
        scale = SCALES[int(torch.randint(0, len(SCALES), (1,), generator=random))]
        size = [int(side * scale) for side in reversed(SIZE)]
        x = F.interpolate(images[chosen], size=size, mode="bilinear", antialias=True)
        y = F.interpolate(labels[chosen, None].float(), size=size, mode="nearest")[:, 0].long()
        if torch.rand(1, generator=random) < 0.5:
            x, y = x.flip(-1), y.flip(-1)
        loss = F.cross_entropy(net(2 * other_light(x, random) - 1), y, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"step {step}: cross entropy {loss.item():.3f}", flush=True)


@torch.no_grad()
def report(net: FeatureNet, images: Tensor, labels: Tensor) -> None:
    """Print the pixel accuracy on the frames held out, as drawn and under other light."""
    shown = {"as drawn": images, "in other light": other_light(images, torch.Generator().manual_seed(1))}
    for name, frames in shown.items():
        right = (net(2 * frames - 1).argmax(1) == labels)[labels != IGNORE]
        print(f"{len(frames)} frames held out, {name}: {100 * right.float().mean().item():.1f}% of the pixels right")


@torch.no_grad()
def normalise(features: nn.Sequential, images: Tensor) -> None:
    """Scale every convolution so that the mean square of its ReLU's output is 1; what the net tells apart stays."""
    x, before = 2 * images - 1, torch.ones(())
    for module in features:
        if isinstance(module, nn.Conv2d):
            module.bias /= before  # as the input was divided by it
            scale = F.relu(module(x)).square().mean().sqrt()
            module.weight /= scale
            module.bias /= scale
            before = before * scale
        x = module(x)


def main() -> None:
    """Command line entry."""
    flags = section_from(FeatureFlags, parse(build_parser(__doc__, {"flags": [FeatureFlags]})))
    torch.manual_seed(0)
    images, labels = draw_frames()
    net = FeatureNet()
    train(net, images, labels, flags.steps)
    report(net, images[-HELD_OUT:], labels[-HELD_OUT:])
    normalise(net.features, images[:100])
    state = {f"features.{name}": value.clone() for name, value in net.features.state_dict().items()}
    atomic_write(Path(flags.out), partial(torch.save, state))


if __name__ == "__main__":
    run_cli(main)
