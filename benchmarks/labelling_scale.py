"""Memory, time and disk of the two-pass thresholds and the pseudo-labels of self-training, by the number of images.

    OMP_NUM_THREADS=1 python benchmarks/labelling_scale.py --images 10 100 1000

The confidence maps are generated, 19 classes at 2048x1024, the same in each pass; their making is in no time. Each row
is measured in a process of its own: memory is its peak during the passes above what it held with a map in memory. The
thresholds of `--sort` images are compared with those of a sort of all values.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# The scripts of this folder are run by path, and then their own folder is where Python looks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.flags import Parser
from uda.pseudo_labels import select
from uda.thresholds import STRIDE, LowerCounts, UpperCounts
from utils.errors import run_cli

PORTION = 0.2
COARSE = 32  # pixels of a picture to one of its regions


class Maps:
    """Generated confidence maps, float32 (C,H,W), with a sum of 1 at each pixel; all are made in one place."""

    def __init__(self, count: int, classes: int, size: tuple[int, int]) -> None:
        width, height = size
        self.count, self.classes = count, classes
        generator = torch.Generator().manual_seed(0)
        regions = torch.randn(1, classes, height // COARSE, width // COARSE, generator=generator)
        logits = F.interpolate(4 * regions, (height, width), mode="bilinear")[0]
        self.common = logits.add_(torch.randn(logits.shape, generator=generator), alpha=0.3).softmax(0)
        self.map = torch.empty_like(self.common)

    def __iter__(self) -> Iterator[Tensor]:
        """Each is the common one, shifted and mixed with a uniform one by its own share."""
        for number in range(self.count):
            shift, share = 37 * number % self.map.shape[1], (number + 1) / (self.count + 1)
            self.map[:, shift:] = self.common[:, : self.map.shape[1] - shift]
            self.map[:, :shift] = self.common[:, self.map.shape[1] - shift :]
            yield self.map.mul_(share).add_((1 - share) / self.classes)


class Memory:
    """The process's resident memory, in bytes, as Linux reports it."""

    def __init__(self) -> None:
        self.start = self._read("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew

    @staticmethod
    def _read(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))

    def peak(self) -> int:
        """Most held so far above the start."""
        return self._read("VmHWM") - self.start


def seconds_of(maps: Maps, use: Callable[[Tensor], object]) -> float:
    """CPU seconds per map that `use` takes; what else the machine does is not in them."""
    total = 0.0
    for confidences in maps:
        started = time.process_time()
        use(confidences)
        total += time.process_time() - started
    return total / maps.count


def two_passes(*kind: Any) -> dict[str, Any]:
    """Thresholds, seconds per image of each pass, peak memory and bytes of a label, of the `Maps` of a kind."""
    maps = Maps(*kind)
    memory = Memory()
    upper = UpperCounts(maps.classes)
    seconds = [seconds_of(maps, upper.add)]
    lower = LowerCounts(upper.plan(portion=PORTION, policy="cb"))
    seconds.append(seconds_of(maps, lower.add))
    thresholds, sizes = lower.thresholds(), []

    def write(confidences: Tensor) -> None:
        label = Image.fromarray(select(confidences, thresholds).labels.numpy())
        label.save(file.name, format="PNG", compress_level=1)
        sizes.append(Path(file.name).stat().st_size)

    with tempfile.NamedTemporaryFile() as file:
        seconds.append(seconds_of(maps, write))
    return {"thresholds": thresholds, "seconds": seconds, "peak": memory.peak(), "disk": sum(sizes)}


def sort_of_all(*kind: Any) -> dict[str, Any]:
    """Thresholds and peak memory where all values of each class are kept and sorted."""
    maps = Maps(*kind)
    memory = Memory()
    values: list[list[np.ndarray]] = [[] for _ in range(maps.classes)]
    for confidences in maps:
        largest, predicted = (part.numpy().ravel() for part in confidences.max(0))
        for c, kept in enumerate(values):
            kept.append(largest[predicted == c][::STRIDE].copy())
    thresholds = []
    for kept in values:
        descending = np.sort(np.concatenate(kept))[::-1]
        rank = int(len(descending) * PORTION)
        thresholds.append(float(descending[rank - 1]) if rank else float("inf"))
    return {"thresholds": torch.tensor(thresholds), "peak": memory.peak()}


def in_own_process(measure: Callable[..., dict[str, Any]], *kind: Any) -> dict[str, Any]:
    """What `measure` returns, from a process that did nothing before."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, kind)


def main() -> None:
    """Command line entry."""
    parser = Parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[10, 100, 1000], help="rows (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=2, default=(2048, 1024), help="of the maps (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=19, help="(default: %(default)s)")
    parser.add_argument("--sort", type=int, default=10, help="maps whose values are sorted (default: %(default)s)")
    flags = parser.parse_args()
    print("| images | first pass, CPU s/image | second | labels | peak MB | labels MB |\n" + "| --- " * 6 + "|")
    for count in flags.images:
        found = in_own_process(two_passes, count, flags.classes, tuple(flags.size))
        seconds = " | ".join(f"{value:.2f}" for value in found["seconds"])
        print(f"| {count} | {seconds} | {found['peak'] / 1e6:.0f} | {found['disk'] / 1e6:.1f} |", flush=True)
    kind = (flags.sort, flags.classes, tuple(flags.size))
    ours, theirs = (in_own_process(measure, *kind) for measure in (two_passes, sort_of_all))
    same = torch.equal(ours["thresholds"], theirs["thresholds"])
    print(f"sorted, {flags.sort} images: {theirs['peak'] / 1e6:.0f} MB, the same thresholds: {same}")


if __name__ == "__main__":
    run_cli(main)
