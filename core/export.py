"""The export of SiT images: translates a list of images and writes PNGs; decoding, translating and encoding overlap."""

from __future__ import annotations

import io
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from core.command_flags import ExportFlags
from core.networks import Generator
from core.sit_folder import SitFolder, output_names
from core.trained_generators import TrainedGenerators, load_trained_generators
from core.translate import Translator
from data_handlers.cache import OR_SKIP
from data_handlers.datasets import DATA_SETS
from data_handlers.images import read_image
from data_handlers.labelled import check_samples
from data_handlers.lists import FileList, list_images
from data_handlers.pyramid import image_pyramid
from training.distributed import Rank
from training.launching import in_processes, is_launched, launch
from training.precision import resolve_precision, set_convolution_precision
from utils.devices import cpus_per_device, default_gpus, default_workers, keep_freed_memory, resolve_devices
from utils.errors import UserError, out_of_memory_means
from utils.files import atomic_write_bytes
from utils.loaders import load_in_order
from utils.locks import say
from utils.stopping import STOPPED, LoaderDied, Stopped, StopRequests, is_loader_death

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


def translate_images(
    *,
    generators: Sequence[Generator],
    device: torch.device,
    files: FileList,
    outputs: Mapping[str, str],
    root: Path,
    flags: ExportFlags,
    title: str = "translating",
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Translate the images named in `outputs` and write them below `root`: decoding, translating and encoding overlap.

    Args:
        generators: coarse to fine.
        outputs: path below `root` of every image wanted.
        flags: with the precision, scale factor and numbers of workers and encoders resolved.
        title: of the progress bar; '' draws none.
        stop: asked after every batch; the rest is left out where it returns True.

    Raises:
        UserError: an image cannot be read or written; whatever was translated before is on disk and whole.
        LoaderDied: a loader process died; likewise.
    """
    set_convolution_precision(flags.precision)
    if device.type == "cpu":
        keep_freed_memory()
    generators = [generator.to(device) for generator in generators]
    translator = Translator(generators, flags.scale_factor, device, flags.max_pixels, flags.precision)
    images = SourceImages(files, list(outputs), len(generators) - 1, flags.scale_factor)
    writer = PngWriter(root, flags.png_compression, flags.encoders)
    try:
        with tqdm(total=len(images), unit="img", desc=title, dynamic_ncols=True, disable=not title) as bar:
            samples = _samples(images, flags.num_workers, flags.on_bad_image == "skip")
            for batch, levels in equal_size_batches(samples, flags.batch_size):
                try:
                    translated = translator(levels)
                except UserError as error:
                    raise UserError(f"{files.root / batch[0]}: {error}") from None
                for name, pixels in zip(batch, translated, strict=True):
                    writer.put(outputs[name], pixels)
                bar.update(len(batch))
                if stop():
                    break
    except (LoaderDied, RuntimeError) as error:
        if not is_loader_death(error):
            raise
        raise LoaderDied(f"{LoaderDied.because(error)}; {GO_ON}") from None
    finally:
        writer.finish()


# --- the command -----------------------------------------------------------------------------------------------------


def export(flags: ExportFlags, script: str) -> None:
    """Export a SiT data set, in this process or in one for each device.

    Args:
        script: file of the command.

    Raises:
        UserError: bad input; images translated before stay.
        Stopped: the export was asked to stop.
        SystemExit: with the code of a stop, when a loader process died.
    """
    in_processes(lambda rank: _start(flags, Path(script), rank), GO_ON)


def _start(flags: ExportFlags, script: Path, rank: Rank) -> None:
    devices = resolve_devices(flags.gpus or default_gpus())
    if rank.count == 1 and len(devices) > 1:
        # Nothing is restarted: the images that are there are found again by --skip_created_files alone.
        launch(script, devices, restarts=0, if_killed=GO_ON)
        return
    rank = rank.at(devices)
    if not flags.gpus and rank.is_main:
        print(f"computing on {rank.device} (choose with --gpus)")
    stop = StopRequests(quiet=is_launched() or not rank.is_main)
    stop.at_once = rank.count == 1  # until images are translated
    with stop:
        trained = load_trained_generators(Path(flags.trained_procst_path))
        flags = _resolved(flags, trained, devices, rank)
        files = list_images(
            DATA_SETS[flags.source], flags.src_data_dir, "--src_data_dir", list_file=flags.src_list, training=False
        )
        _export(flags, trained, files, rank, stop)


def _resolved(
    flags: ExportFlags, trained: TrainedGenerators, devices: Sequence[torch.device], rank: Rank
) -> ExportFlags:
    """The flags with every value decided: as given, else the run's, else the published or the machine's defaults.

    Raises:
        UserError: a flag contradicts the run.
    """
    factor, source, folder = flags.scale_factor, flags.source, flags.src_data_dir
    if trained.config is not None:
        network, data = trained.config.network, trained.config.source
        if factor not in (None, network.scale_factor):
            raise UserError(f"--scale_factor {factor}: the run was trained with {network.scale_factor}")
        if not folder and source not in ("", data.source):
            raise UserError(f"--source {source} is not the run's ({data.source}): give its folder, --src_data_dir")
        factor, source, folder = network.scale_factor, source or data.source, folder or data.src_data_dir
    # One data set has one arithmetic, so unlike devices use the one that all of them have.
    precisions = set(rank.gather(resolve_precision(flags.precision, rank.device)))
    return replace(
        flags,
        scale_factor=0.5 if factor is None else factor,
        source=source or "gta5",
        src_data_dir=folder or "data/gta",
        precision=precisions.pop() if len(precisions) == 1 else "fp32",
        num_workers=default_workers(devices) if flags.num_workers is None else flags.num_workers,
        encoders=min(16, cpus_per_device(devices)) if flags.encoders is None else flags.encoders,
    )


def _export(flags: ExportFlags, trained: TrainedGenerators, files: FileList, rank: Rank, stop: StopRequests) -> None:
    outputs = output_names(files)
    manifest = {
        "format": "procst-sit",
        "generators": trained.fingerprint(),
        "data_set": flags.source,
        "source_folder": str(files.root.resolve()),
        "scale_factor": flags.scale_factor,
        "precision": flags.precision,
        "images": len(outputs),
    }
    rank.require_equal(manifest)
    folder = SitFolder(root=Path(flags.sit_output_path), files=files, outputs=outputs, manifest=manifest)
    names, ids_before = [], {}
    if rank.is_main:
        names = _prepare(folder, flags, trained.note)
        ids_before = folder.file_ids(names)
    names = rank.broadcast(names)
    own = names[rank.index :: rank.count]
    stop.at_once = False
    started = time.perf_counter()
    try:
        with out_of_memory_means(lambda: f" on {rank.device}; lower --batch_size or --num_workers"):
            translate_images(
                generators=trained.generators,
                device=rank.device,
                files=files,
                outputs={name: outputs[name] for name in own},
                root=folder.root,
                flags=flags,
                title="" if not rank.is_main else "translating" if rank.count == 1 else f"translating 1/{rank.count}",
                stop=stop,
            )
    except LoaderDied as error:
        if rank.count == 1:
            raise Stopped(str(error)) from None
        print(error, file=sys.stderr)  # the other processes do not wait for this one
        raise SystemExit(STOPPED) from None
    if rank.all_reduce_max(int(stop())):
        raise Stopped(f"stopped; {GO_ON}")
    if rank.is_main:
        missing = folder.missing(ids_before)
        _finish(folder, missing, skip=flags.on_bad_image == "skip")
        translated, seconds = len(names) - len(missing), time.perf_counter() - started
        print(
            f"{len(outputs) - len(missing)} SiT images in {folder.root}: {translated} translated in {seconds:.1f} s "
            f"({translated / max(seconds, 1e-9):.1f} images/s), {len(outputs) - len(names)} were already there"
        )
        if missing:
            print(f"skipped, as they cannot be read: {len(missing)} images; the data set is not complete:")
            print("\n".join(f"  {files.root / image}" for image in missing))


def _prepare(folder: SitFolder, flags: ExportFlags, note: str) -> list[str]:
    """Check the output folder and a few images, make the folder, and return the images to translate."""
    folder.check(keep_complete=flags.skip_created_files)
    if flags.on_bad_image == "stop":
        check_samples(folder.files, labels="none", or_else=OR_SKIP)
    print(folder.files.describe())
    if note:
        print(f"note: {note}")
    folder.make()
    return folder.incomplete() if flags.skip_created_files else list(folder.outputs)


def _finish(folder: SitFolder, missing: Sequence[str], skip: bool) -> None:
    if missing and not skip:
        first = folder.outputs[missing[0]]
        raise UserError(f"{len(missing)} images are missing in {folder.root}, first {first}: run the command again")
    folder.write_manifest(complete=not missing)
