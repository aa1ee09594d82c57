"""Translate a source data set into the target's look: write its "Source in Target" (SiT) images.

    python create_sit_dataset.py --trained_procst_path TrainedModels/RUN --sit_output_path data/sit

Every source image becomes an 8-bit RGB PNG of its native size, under its own name and folder below the output path
(GTA5: OUT/images/00001.png).
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from core.pyramid import image_pyramid
from core.trained_generators import TrainedGenerators, load_trained_generators
from core.translate import MIN_TILE_PIXELS, Translator
from data_handlers.datasets import DATA_SETS
from data_handlers.images import image_size, read_image
from data_handlers.lists import FileList, list_images
from utils.devices import default_workers, resolve_device
from utils.errors import UserError, run_cli
from utils.files import atomic_write_bytes, atomic_write_json, make_folder, read_json, remove_leftovers
from utils.flags import OneLineParser, parse_flags
from utils.png import RGB, SIGNATURE, PngHeader, is_complete_rgb8, read_png_header

MANIFEST = "sit_manifest.json"
# Level 6, zlib's default, takes about five times as long for files a few percent smaller.
PNG_COMPRESSION = 1
PENDING_WRITES = 8


def build_parser() -> argparse.ArgumentParser:
    """All flags; names and defaults are the published ones."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trained_procst_path", default="", metavar="PATH",
        help="run folder, checkpoint, or the authors' Gst.pth (required)")  # fmt: skip
    add("--sit_output_path", default="", metavar="DIR", help="root of the SiT data set, created if missing (required)")
    add("--gpus", nargs="+", metavar="GPU", default=[], help="index of the CUDA device, or cpu (required)")
    add("--source", choices=sorted(DATA_SETS), default="gta5",
        help="data set to translate (default: the run's source, else gta5)")  # fmt: skip
    add("--src_data_dir", default="data/gta", help="its root folder (default: the run's, else data/gta)")
    add("--src_list", default="", metavar="FILE", help="text file with one image a line, instead of all")
    add("--batch_size", type=int, default=1, help="images of equal size translated at once (default: %(default)s)")
    add("--num_workers", type=int, default=default_workers(),
        help="loader processes, 0 loads in this one (default: 6, or the number of CPUs)")  # fmt: skip
    add("--skip_created_files", action="store_true", help="keep complete images that are already there")
    add("--scale_factor", type=float, default=0.5,
        help="size ratio of the scales, for a Gst.pth, which does not say (default: %(default)s)")  # fmt: skip
    add("--max_pixels", type=int, default=None,
        help="most pixels a generator sees at once; larger images are translated on tiles, with the same result "
        "(default: what free memory allows)")  # fmt: skip
    return parser


class SourceImages(Dataset):
    """Pyramids of native-size images, or the error that reading one gave."""

    def __init__(self, files: FileList, names: Sequence[str], num_scales: int, scale_factor: float) -> None:
        self.files, self.names = files, names
        self.num_scales, self.scale_factor = num_scales, scale_factor

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, list[np.ndarray]] | UserError:
        name = self.names[index]
        try:
            image = read_image(self.files.root / name)
        except UserError as error:
            return error
        levels = image_pyramid(image, self.num_scales, self.scale_factor, self.num_scales)
        # Arrays, not tensors: a tensor from a worker process holds a file open until it is used.
        return name, [np.array(level) for level in levels]


def equal_size_batches(
    samples: Iterator[tuple[str, list[Tensor]]], batch_size: int
) -> Iterator[tuple[list[str], list[Tensor]]]:
    """Batch pyramids of equal size; at most four batches wait for partners of their size."""
    waiting: dict[tuple[int, ...], list[tuple[str, list[Tensor]]]] = {}

    def batch(size: tuple[int, ...]) -> tuple[list[str], list[Tensor]]:
        names, pyramids = zip(*waiting.pop(size), strict=True)
        return list(names), [torch.stack(level) for level in zip(*pyramids, strict=True)]

    for name, levels in samples:
        size = tuple(levels[-1].shape)
        waiting.setdefault(size, []).append((name, levels))
        if len(waiting[size]) == batch_size:
            yield batch(size)
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            yield batch(next(iter(waiting)))
    while waiting:
        yield batch(next(iter(waiting)))


class PngWriter:
    """Encodes and writes images in threads (zlib runs without the interpreter lock), a bounded number at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pool = ThreadPoolExecutor(max_workers=max(1, min(4, os.cpu_count() or 1)))
        self.pending: deque[Future[None]] = deque()

    def put(self, name: str, pixels: np.ndarray) -> None:
        """Queue uint8 (H,W,3) for `name`, waiting while too many are queued; errors of earlier ones surface here."""
        while len(self.pending) >= PENDING_WRITES:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._write, name, pixels))

    def _write(self, name: str, pixels: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=PNG_COMPRESSION)
        atomic_write_bytes(self.root / name, buffer.getvalue())

    def finish(self) -> None:
        """Wait for everything queued; raises the first error."""
        self.pool.shutdown(wait=True)
        while self.pending:
            self.pending.popleft().result()


def output_names(files: FileList) -> dict[str, str]:
    """Output path of every image, relative to the output folder: its own, with the suffix `.png`.

    Raises:
        UserError: two images differ in their suffix alone.
    """
    outputs: dict[str, str] = {}
    taken: dict[str, str] = {}
    for image in files.images:
        output = str(PurePosixPath(image).with_suffix(".png"))
        if output in taken:
            raise UserError(f"{files.root}: {taken[output]} and {image} would both become {output}; rename one")
        taken[output] = image
        outputs[image] = output
    return outputs


def _check_output(
    root: Path, outputs: dict[str, str], files: FileList, manifest: dict[str, object], skip: bool
) -> None:
    """Refuse to overwrite the source or foreign files, and to mix two models or sources in one data set."""
    for folder in {str(PurePosixPath(name).parent) for name in outputs.values()}:
        if (root / folder).resolve() == (files.root / folder).resolve():
            raise UserError(f"--sit_output_path {root} would overwrite the source images; choose another folder")
    if (root / MANIFEST).exists():
        held = read_json(root / MANIFEST)
        for name in ("generators", "data_set", "source_folder", "scale_factor"):
            if not isinstance(held, dict) or held.get(name) != manifest[name]:
                raise UserError(
                    f"--sit_output_path {root} holds images of another {name.replace('_', ' ')} (see its {MANIFEST}); "
                    "choose another folder, or delete that one"
                )
        return
    present = [(image, root / output) for image, output in outputs.items() if (root / output).exists()]
    if present and not skip:
        raise UserError(
            f"--sit_output_path {root} already holds images that this program did not write; choose another folder, "
            "or keep the complete ones with --skip_created_files"
        )
    for image, path in present:
        if not _may_be_translated(files.root / image, path):
            raise UserError(
                f"{path} is no translation of {image} but another file; choose another --sit_output_path than {root}"
            )


def _may_be_translated(image: Path, path: Path) -> bool:
    """Whether a file of unknown origin can be a translation, whole or cut short: not the source, not a label."""
    data = path.read_bytes()
    if len(data) < 33:
        return data == b"" or data.startswith(SIGNATURE[: len(data)])
    header = read_png_header(path)
    fits = header == PngHeader(*image_size(image), 8, RGB)
    return fits and data != image.read_bytes()


def _to_translate(files: FileList, outputs: dict[str, str], root: Path, skip: bool) -> list[str]:
    """The images to translate: all, or those whose output is not there or not complete."""
    if not skip:
        return list(outputs)

    def done(image: str) -> bool:
        path, source = root / outputs[image], files.root / image
        # An image that was replaced after its translation is translated again.
        newer = path.exists() and path.stat().st_mtime >= source.stat().st_mtime
        return newer and is_complete_rgb8(path, image_size(source))

    return [i for i in tqdm(outputs, desc="checking created files", unit="img", dynamic_ncols=True) if not done(i)]


def _choose(flags: argparse.Namespace, given: frozenset[str], trained: TrainedGenerators) -> tuple[str, str, float]:
    """Source name, its folder and the scale factor: as given, else the run's, else the published defaults."""
    config = trained.config
    if config is None:
        if not 0.0 < flags.scale_factor < 1.0:
            raise UserError(f"--scale_factor is {flags.scale_factor}; it must be between 0 and 1")
        return flags.source, flags.src_data_dir, flags.scale_factor
    if "scale_factor" in given and flags.scale_factor != config.network.scale_factor:
        raise UserError(f"--scale_factor {flags.scale_factor}: the run was trained with {config.network.scale_factor}")
    source = flags.source if "source" in given else config.data.source
    if "src_data_dir" in given:
        return source, flags.src_data_dir, config.network.scale_factor
    if source != config.data.source:
        raise UserError(f"--source {source} is not the run's ({config.data.source}): give its folder, --src_data_dir")
    return source, config.data.src_data_dir, config.network.scale_factor


def _samples(images: SourceImages, num_workers: int) -> Iterator[tuple[str, list[Tensor]]]:
    for sample in DataLoader(images, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is):
        if isinstance(sample, UserError):
            raise UserError(f"{sample}; the images translated so far stay, go on with --skip_created_files")
        name, levels = sample
        yield name, [torch.from_numpy(level) for level in levels]


def _as_it_is(sample: object) -> object:
    return sample


def translate_images(
    images: SourceImages, outputs: dict[str, str], translator: Translator, root: Path, batch_size: int, num_workers: int
) -> float:
    """Translate `images` and write them below `root`; returns the seconds it took.

    Raises:
        UserError: an image cannot be read or written; whatever was translated before is on disk and whole.
    """
    started = time.perf_counter()
    writer = PngWriter(root)
    try:
        with tqdm(total=len(images), unit="img", desc="translating", dynamic_ncols=True) as bar:
            for batch, levels in equal_size_batches(_samples(images, num_workers), batch_size):
                for name, pixels in zip(batch, translator(levels), strict=True):
                    writer.put(outputs[name], pixels)
                bar.update(len(batch))
    finally:
        writer.finish()
    return time.perf_counter() - started


def _check_flags(flags: argparse.Namespace) -> None:
    for name in ("trained_procst_path", "sit_output_path", "gpus"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is required (see --help)")
    if flags.batch_size < 1:
        raise UserError(f"--batch_size is {flags.batch_size}; it must be greater than 0")
    if flags.max_pixels is not None and flags.max_pixels < MIN_TILE_PIXELS:
        raise UserError(f"--max_pixels is {flags.max_pixels}; the smallest tile has {MIN_TILE_PIXELS} pixels")
    if flags.num_workers < 0:
        raise UserError(f"--num_workers is {flags.num_workers}; it must be 0 or greater")


def main() -> None:
    """Command line entry."""
    flags, given = parse_flags(build_parser())
    _check_flags(flags)
    device = resolve_device(flags.gpus)
    trained = load_trained_generators(Path(flags.trained_procst_path))
    source, folder, scale_factor = _choose(flags, given, trained)
    files = list_images(DATA_SETS[source], folder, "--src_data_dir", list_file=flags.src_list, training=False)
    outputs = output_names(files)
    root = Path(flags.sit_output_path)
    manifest = {
        "format": "procst-sit",
        "generators": trained.fingerprint(),
        "data_set": source,
        "source_folder": str(files.root.resolve()),
        "scale_factor": scale_factor,
        "images": len(outputs),
    }
    _check_output(root, outputs, files, manifest, flags.skip_created_files)
    for path in {root, *((root / name).parent for name in outputs.values())}:
        remove_leftovers(make_folder(path, "--sit_output_path"))

    print(files.describe())
    if trained.note:
        print(f"note: {trained.note}")
    names = _to_translate(files, outputs, root, flags.skip_created_files)
    atomic_write_json(root / MANIFEST, {**manifest, "complete": False})
    generators = [generator.to(device) for generator in trained.generators]
    translator = Translator(generators, scale_factor, device, flags.max_pixels)
    images = SourceImages(files, names, len(generators) - 1, scale_factor)
    seconds = translate_images(images, outputs, translator, root, flags.batch_size, flags.num_workers)
    if missing := [name for name in outputs.values() if not (root / name).is_file()]:
        raise UserError(f"{len(missing)} images are missing in {root}, first {missing[0]}: run the command again")
    atomic_write_json(root / MANIFEST, {**manifest, "complete": True})
    kept = len(outputs) - len(names)
    print(
        f"{len(outputs)} SiT images in {root}: {len(names)} translated in {seconds:.1f} s "
        f"({len(names) / max(seconds, 1e-9):.1f} images/s), {kept} were already there"
    )


if __name__ == "__main__":
    run_cli(main)
