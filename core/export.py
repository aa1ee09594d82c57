"""Export: translating a list of images and writing PNGs, with decoding, translating and encoding overlapped."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from core.execution import Precision, set_convolution_precision
from core.networks import Generator
from core.translate import Translator
from data_handlers.images import read_image
from data_handlers.lists import FileList
from data_handlers.pyramid import image_pyramid
from utils.devices import cpus_per_device
from utils.errors import UserError, out_of_memory_means
from utils.files import atomic_write_bytes
from utils.loaders import load_in_order
from utils.locks import say
from utils.memory import keep_freed_memory
from utils.processes import Job, run_jobs
from utils.stopping import LoaderDied, is_loader_death

GO_ON = "the images translated so far stay, go on with --skip_created_files"


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
    """Encodes and writes images in threads (zlib runs without the interpreter lock), a bounded number at a time.

    Args:
        root: folder that the names are relative to.
        compression: of zlib, 0 to 9.
        threads: encoders.
    """

    def __init__(self, root: Path, compression: int, threads: int) -> None:
        self.root = root
        self.compression = compression
        self.limit = 2 * threads
        self.pool = ThreadPoolExecutor(max_workers=threads)
        self.pending: deque[Future[None]] = deque()

    def put(self, name: str, pixels: np.ndarray) -> None:
        """Queue uint8 (H,W,3) for `name`, waiting while too many are queued; errors of earlier ones surface here."""
        while len(self.pending) >= self.limit:
            self.pending.popleft().result()
        self.pending.append(self.pool.submit(self._write, name, pixels))

    def _write(self, name: str, pixels: np.ndarray) -> None:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG", compress_level=self.compression)
        atomic_write_bytes(self.root / name, buffer.getvalue())

    def finish(self) -> None:
        """Wait for everything queued; raises the first error."""
        self.pool.shutdown(wait=True)
        while self.pending:
            self.pending.popleft().result()


def _samples(images: SourceImages, num_workers: int, skip_unusable: bool) -> Iterator[tuple[str, list[Tensor]]]:
    samples = load_in_order(
        images,
        range(len(images)),
        num_workers=num_workers,
        skip_unusable=skip_unusable,
        or_else=f"; {GO_ON}, or leave such images out with --on_bad_image skip",
    )
    for sample in samples:
        if isinstance(sample, UserError):
            say(f"skipped: {sample}")
            continue
        name, levels = sample
        yield name, [torch.from_numpy(level) for level in levels]


@dataclass(frozen=True)
class ExportConfig:
    """How images are translated and written.

    Attributes:
        scale_factor: of the pyramid the generators were trained with.
        batch_size: images of equal size translated at once.
        num_workers: loader processes, for each device.
        encoders: threads that write PNGs, for each device.
        png_compression: of zlib, 0 to 9.
        precision: arithmetic of the generators; images that need tiles are computed in float32.
        max_pixels: most pixels a generator sees at once; None measures free memory.
        skip_unusable: leave images out that cannot be read.
    """

    scale_factor: float
    batch_size: int
    num_workers: int
    encoders: int
    png_compression: int
    precision: Precision = "fp32"
    max_pixels: int | None = None
    skip_unusable: bool = False


def translate_images(
    generators: Sequence[Generator],
    device: torch.device,
    files: FileList,
    outputs: Mapping[str, str],
    root: Path,
    config: ExportConfig,
    quiet: bool = False,
    go_on: Callable[[int], bool] = lambda count: True,
) -> None:
    """Translate the images named in `outputs` and write them below `root`: decoding, translating and encoding overlap.

    Args:
        generators: coarse to fine.
        outputs: path below `root` of every image wanted.
        quiet: draw no progress bar.
        go_on: told after every batch how many images it had; the rest is left out where it returns False.

    Raises:
        UserError: an image cannot be read or written; whatever was translated before is on disk and whole.
        LoaderDied: a loader process died; likewise.
    """
    set_convolution_precision(config.precision)
    if device.type == "cpu":
        keep_freed_memory()
    generators = [generator.to(device) for generator in generators]
    translator = Translator(generators, config.scale_factor, device, config.max_pixels, config.precision)
    images = SourceImages(files, list(outputs), len(generators) - 1, config.scale_factor)
    writer = PngWriter(root, config.png_compression, config.encoders)
    try:
        with _progress_bar(len(images), quiet) as bar:
            samples = _samples(images, config.num_workers, config.skip_unusable)
            for batch, levels in equal_size_batches(samples, config.batch_size):
                try:
                    translated = translator(levels)
                except UserError as error:
                    raise UserError(f"{files.root / batch[0]}: {error}") from None
                for name, pixels in zip(batch, translated, strict=True):
                    writer.put(outputs[name], pixels)
                bar.update(len(batch))
                if not go_on(len(batch)):
                    break
    except (LoaderDied, RuntimeError) as error:
        if not is_loader_death(error):
            raise
        raise LoaderDied(f"{LoaderDied.because(error)}; {GO_ON}") from None
    finally:
        writer.finish()


def _progress_bar(images: int, quiet: bool = False) -> tqdm:
    return tqdm(total=images, unit="img", desc="translating", dynamic_ncols=True, disable=quiet)


def translate_on_devices(
    generators: Sequence[Generator],
    devices: Sequence[torch.device],
    files: FileList,
    outputs: Mapping[str, str],
    root: Path,
    config: ExportConfig,
) -> None:
    """`translate_images` with one process for each device, every n-th image going to the n-th.

    Raises:
        UserError: the first error of any process, or a process was killed; the others finish the images they are on.
        RuntimeError: another failure of a process.
    """
    names = list(outputs)
    shares = [{name: outputs[name] for name in names[k :: len(devices)]} for k in range(len(devices))]
    threads = cpus_per_device(devices)
    jobs = [
        Job(f"device {device}", _translate_share, (threads, generators, device, files, share, root, config))
        for device, share in zip(devices, shares, strict=True)
    ]
    with _progress_bar(len(names)) as bar:
        run_jobs(jobs, bar.update, if_killed=GO_ON)


def _translate_share(
    threads: int,
    generators: Sequence[Generator],
    device: torch.device,
    files: FileList,
    outputs: Mapping[str, str],
    root: Path,
    config: ExportConfig,
    go_on: Callable[[int], bool],
) -> None:
    """`translate_images` in a process that shares the CPUs: `threads` of them compute where the device is the CPU."""
    if device.type == "cpu":
        torch.set_num_threads(min(threads, torch.get_num_threads()))
    try:
        with out_of_memory_means(lambda: f" on {device}; lower --batch_size or --num_workers, or name fewer devices"):
            translate_images(generators, device, files, outputs, root, config, quiet=True, go_on=go_on)
    except LoaderDied as error:
        raise UserError(str(error)) from None
