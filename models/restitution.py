"""Style normalisation and restitution of features (docs/uda.md, section SNR)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.losses import at_least_float32

REDUCTION = 16
IDLE_HEAD = "the auxiliary head is trained with --multi alone"  # why a two-headed net has tensors that do not act


class Restituted(NamedTuple):
    """What restitution makes of features (B,C,h,w): the normalised ones, these with what of the style is relevant
    for the task, which go on through the net, and with the rest of it, which only the dual loss reads."""

    normalised: Tensor
    restored: Tensor
    contaminated: Tensor


class Restitution(nn.Module):
    """Instance normalisation whose residual is restored to the share a of a channel gate, in (0,1).

    With the normalised features n = s x + t the restored ones are a x + (1-a) n, an affine map of x in each channel.
    The mean of the residual, which the gate reads, is that of x less the bias of the normalisation.
    """

    def __init__(self, channels: int, reduction: int = REDUCTION) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(channels, affine=True)
        self.reduce = nn.Conv2d(channels, channels // reduction, 1)
        self.expand = nn.Conv2d(channels // reduction, channels, 1)
        for layer in (self.reduce, self.expand):
            nn.init.normal_(layer.weight, std=0.01)

    def factors(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B,C,h,w) -> scale s and offset t of the normalisation, and the gate a, each (B,C,1,1)."""
        variance, mean = torch.var_mean(at_least_float32(x), dim=(2, 3), correction=0, keepdim=True)
        weight, bias = (p[None, :, None, None] for p in (self.norm.weight, self.norm.bias))
        scale = weight * (variance + self.norm.eps).rsqrt()
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(mean - bias))))
        return scale, bias - mean * scale, gate.to(scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(B,C,h,w) -> the restored features, of the same shape."""
        scale, offset, gate = self.factors(x)
        return x * (gate + (1 - gate) * scale).to(x.dtype) + ((1 - gate) * offset).to(x.dtype)

    def restore(self, x: Tensor, parts: list[Restituted] | None) -> Tensor:
        """(B,C,h,w) -> the restored features; all that restitution makes of them is appended to `parts`."""
        if parts is None:
            return self(x)
        parts.append(self.parts(x))
        return parts[-1].restored

    def parts(self, x: Tensor) -> Restituted:
        """(B,C,h,w) -> all that restitution makes of it."""
        scale, offset, gate = self.factors(x)
        normalised = x * scale + offset
        residual = x - normalised
        return Restituted(normalised, normalised + gate * residual, normalised + (1 - gate) * residual)
