"""Time the export of SiT images beside the literal one, and count the pixels that reduced precision moves.

    python benchmarks/export.py --gpus 0
    python benchmarks/export.py --gpus cpu --size 480 264 --count 8

Literal: one process, one image after the other, read with Pillow, translated in float32, written with Pillow's default
compression. Generators of the published shape with seeded random weights; generated pictures.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# The scripts of this folder are run by path, and then their own folder is where Python looks.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pictures import picture, write_gta5
from core.cascade import to_pixels, translate_pyramid
from core.command_flags import ExportFlags
from core.config import NetworkShape, layers_at_scale
from core.export import translate_images, translated_set
from core.networks import Generator, freeze, init_weights
from core.trained_generators import load_trained_generators
from data_handlers.datasets import DATA_SETS
from data_handlers.images import PROCST_INPUT, image_pyramid
from data_handlers.lists import FileList, list_images
from training.flags import Parser
from training.precision import computes_in_bf16, set_convolution_precision
from utils.devices import cpus_per_device, resolve_device, workers_for
from utils.errors import run_cli


def generators_of(channels: int) -> list[Generator]:
    """A cascade of three scales of the published shape."""
    cascade = []
    for scale in range(3):
        generator = Generator(NetworkShape(scale, channels, layers_at_scale(scale, 2, 5), "group"))
        init_weights(generator, torch.Generator().manual_seed(scale))
        cascade.append(freeze(generator))
    return cascade


@torch.no_grad()
def literal_export(
    generators: list[Generator], device: torch.device, files: FileList, names: Iterable[str], out: Path
) -> None:
    """One image after the other."""
    set_convolution_precision("fp32")  # PyTorch's default on a GPU is TF32
    for generator in generators:
        generator.to(device)
    for name in names:
        levels = image_pyramid(np.asarray(Image.open(files.root / name).convert("RGB")), 2, 0.5, 2)
        inputs = [PROCST_INPUT(torch.tensor(level)[None].to(device)) for level in levels]
        pixels = to_pixels(translate_pyramid(generators, inputs, 0.5))[0].permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(out / name)


def codec_rates(size: tuple[int, int]) -> tuple[float, float]:
    """Decodes plus encodes a second on one core: Pillow's default, and ours."""
    image = Image.fromarray(picture(size, 0))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")

    def seconds(level: int) -> float:
        started = time.perf_counter()
        Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")
        image.save(io.BytesIO(), format="PNG", compress_level=level)
        return time.perf_counter() - started

    default, ours = (min(seconds(level) for _ in range(3)) for level in (6, 1))
    return 1.0 / default, 1.0 / ours


def main() -> None:
    """Command line entry."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--gpus", nargs=1, default=(), metavar="GPU", help="index of the CUDA device, or cpu")
    add("--size", type=int, nargs=2, default=(1914, 1052), metavar=("W", "H"), help="of the images (default: GTA5's)")
    add("--count", type=int, default=64, help="images (default: %(default)s)")
    add("--channels", type=int, default=64, help="width of the generators (default: %(default)s)")
    add("--trained_procst_path", default="", metavar="PATH",
        help="a run folder: differences between precisions mean something only with trained generators")  # fmt: skip
    add("--batch_size", type=int, default=4, help="images translated at once (default: %(default)s)")
    flags = parser.parse_args()
    device = resolve_device(flags.gpus)
    generators = generators_of(flags.channels)
    if flags.trained_procst_path:
        generators = load_trained_generators(Path(flags.trained_procst_path)).generators
    default, ours = codec_rates(tuple(flags.size))
    print(f"decode + encode on one core: default {default:.2f}/s, ours {ours:.2f}/s, {ours / default:.1f} times\n")
    with tempfile.TemporaryDirectory() as folder:
        root = write_gta5(Path(folder) / "gta", flags.count, tuple(flags.size))
        files = list_images(DATA_SETS["gta5"], root, "--gpus")
        rates = {}
        for way in ("literal", "fp32", *(["bf16"] if computes_in_bf16(device) else [])):
            out = Path(folder) / way
            (out / "images").mkdir(parents=True)
            # The first time starts the device and chooses algorithms.
            for some in (files.images[: flags.batch_size], files.images):
                started = time.perf_counter()
                if way == "literal":
                    literal_export(generators, device, files, some, out)
                else:
                    settings = ExportFlags(
                        trained_procst_path="-", sit_output_path=str(out), scale_factor=0.5,
                        batch_size=flags.batch_size, precision=way, num_workers=workers_for(None, device),
                        encoders=min(16, cpus_per_device([device])),
                    )  # fmt: skip
                    sit_set = translated_set(settings, generators, files, device)
                    translate_images(sit_set, some, settings, title="")
                rates[way] = len(some) / (time.perf_counter() - started)
        print("| export | images/s | speed-up | values that differ | by more than 1 | largest |")
        print("| --- | --- | --- | --- | --- | --- |")
        for way, rate in rates.items():
            shares = _differences(Path(folder), way, files.images)
            print(f"| {way} | {rate:.2f} | {rate / rates['literal']:.2f} | {shares} |")


def _differences(folder: Path, way: str, names: tuple[str, ...]) -> str:
    """Share of the values that are not those of the literal export, share that is more than a level off, largest."""
    apart = [
        np.abs(np.asarray(Image.open(folder / way / n), int) - np.asarray(Image.open(folder / "literal" / n), int))
        for n in names[:8]
    ]
    moved = np.concatenate([difference.ravel() for difference in apart])
    return f"{(moved > 0).mean():.4%} | {(moved > 1).mean():.4%} | {moved.max()}"


if __name__ == "__main__":
    run_cli(main)
