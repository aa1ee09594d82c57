"""Draw docs/maxsquare_gradient.png: how strongly entropy and MaxSquare pull at a pixel of two classes.

    python benchmarks/maxsquare_gradient.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from uda.target_losses import entropy, maxsquare

SIZE, PANEL, TOP, SCALE = (1000, 400), (360, 270), 60, 2
LEFTS = (85, 590)
BLUE, RED, BLACK, GREY = "#1f5fa8", "#c0392b", "#222222", "#dddddd"


def gradient(loss: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    """|dL/dz| of the logit z = ln(p / (1 - p)) of a pixel with probabilities p and 1 - p."""
    z = torch.logit(p).requires_grad_(True)
    logits = torch.stack([z, torch.zeros_like(z)])[None, :, None]
    (loss(logits) * len(p)).backward()  # the loss is a mean over pixels
    return z.grad.abs()


class Panel:
    """Axes with curves over p in [0.5, 1]."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: int, title: str, ticks: Sequence[float], form: str) -> None:
        self.draw, self.left, self.highest = draw, left, ticks[-1]
        self.text((left + PANEL[0] / 2, TOP - 24), title, "mm", 17)
        for value in ticks:
            (x, y), text = self.at(0.5, value), format(value, form)
            self.line([(x, y), (x + PANEL[0], y)], GREY, 1)
            self.text((x - 8, y), text, "rm", 14)
        for p in (0.5, 0.6, 0.7, 0.8, 0.9, 1.0):
            x, y = self.at(p, 0)
            self.line([(x, y), (x, y + 5)], BLACK, 1)
            self.text((x, y + 16), f"{p:g}", "mm", 14)
        self.line([self.at(0.5, self.highest), self.at(0.5, 0), self.at(1, 0)], BLACK, 1)
        self.text((left + PANEL[0] / 2, TOP + PANEL[1] + 42), "probability p of the predicted class", "mm", 15)

    def at(self, p: float, value: float) -> tuple[float, float]:
        """Where a point lies in the picture."""
        return self.left + PANEL[0] * (p - 0.5) / 0.5, TOP + PANEL[1] * (1 - value / self.highest)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
        self.draw.line([(SCALE * x, SCALE * y) for x, y in points], colour, SCALE * width, joint="curve")

    def text(self, at: tuple[float, float], words: str, anchor: str, size: int, colour: str = BLACK) -> None:
        font = ImageFont.load_default(SCALE * size)
        self.draw.text((SCALE * at[0], SCALE * at[1]), words, colour, font, anchor)

    def curve(self, p: Tensor, values: Tensor, colour: str) -> None:
        points = zip(p.tolist(), values.tolist(), strict=True)
        self.line([self.at(x, y) for x, y in points if y <= self.highest], colour, 3)


def main() -> None:
    """Draw the picture and print what it shows."""
    p = torch.cat([torch.linspace(0.5, 0.999, 2000), 1 - torch.logspace(-3, -5, 200)]).double()
    found: Mapping[str, tuple[Tensor, str]] = {
        "entropy": (gradient(entropy, p), RED), "MaxSquare": (gradient(maxsquare, p), BLUE)
    }  # fmt: skip
    image = Image.new("RGB", (SCALE * SIZE[0], SCALE * SIZE[1]), "white")
    draw = ImageDraw.Draw(image)
    panel = Panel(draw, LEFTS[0], "|dL/dz|, z the logit of two classes", (0, 0.03, 0.06, 0.09, 0.12, 0.15), ".2f")
    for number, (name, (values, colour)) in enumerate(found.items()):
        panel.curve(p, values, colour)
        top = int(values.argmax())
        x, y = panel.at(0.53, 0.142 - 0.014 * number)
        panel.line([(x, y), (x + 30, y)], colour, 3)
        panel.text((x + 38, y), f"{name}, largest at p = {p[top]:.2f}", "lm", 15)
        panel.line([panel.at(float(p[top]), 0), panel.at(float(p[top]), float(values[top]))], colour, 1)
    ratio = found["entropy"][0] / found["MaxSquare"][0]
    panel = Panel(draw, LEFTS[1], "entropy over MaxSquare", (0, 2, 4, 6, 8, 10, 12), "g")
    panel.curve(p[1:], ratio[1:], BLACK)  # both are 0 at 1/2
    for at in (0.9, 0.99, 0.999):
        value = float(ratio[(p - at).abs().argmin()])
        x, y = panel.at(at, value)
        draw.ellipse([SCALE * (x - 4), SCALE * (y - 4), SCALE * (x + 4), SCALE * (y + 4)], fill=BLACK)
        panel.text((x - 10, y - 8), f"{value:.1f} at p = {at}", "rm", 15)
        print(f"p = {at}: entropy pulls {value:.2f} times as strongly")
    image.resize(SIZE, Image.Resampling.LANCZOS).save(ROOT / "docs" / "maxsquare_gradient.png", optimize=True)


if __name__ == "__main__":
    main()
