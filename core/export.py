"""The export of SiT images: translates a list of images and writes PNGs; decoding, translating and encoding overlap."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from core.colour_transfer import ColourTransfer, histogram_matched, low_frequencies_swapped
from core.command_flags import ExportFlags
from core.networks import Generator
from core.sit_folder import FLAG, SitFolder, output_names
from core.trained_generators import TrainedGenerators, load_trained_generators
from core.translate import Translator
from data_handlers.datasets import find_data_set, with_split
from data_handlers.images import image_pyramid, read_pixels
from data_handlers.labelled import check_samples
from data_handlers.lists import FileList, list_images
from training.distributed import Rank
from training.launching import in_processes, is_launched, launch
from training.precision import resolve_precision, set_convolution_precision
from utils.devices import cpus_per_device, resolve_devices, workers_for
from utils.errors import UserError, out_of_memory_means
from utils.files import atomic_write, make_folder
from utils.loaders import load_in_order
from utils.locks import locked, say
from utils.stopping import STOPPED, LoaderDied, Stopped, StopRequests, is_loader_death
from utils.tensor_files import weights_fingerprint

# Decodes an image, by its name, in a loader process.
Load = Callable[[str], list[np.ndarray]]
CONTINUE = "the images translated so far stay, continue with --skip_created_files"


@dataclass(frozen=True)
class SourcePyramids:
    """Pyramids of native-size images by name; `UserError` for an image that cannot be read."""

    files: FileList
    num_scales: int
    scale_factor: float

    def __call__(self, name: str) -> list[np.ndarray]:
        # Arrays, not tensors: a tensor from a worker process holds a file open until it is used.
        pixels = read_pixels(self.files.image_file(name))
        return image_pyramid(pixels, self.num_scales, self.scale_factor, self.num_scales)


@dataclass(frozen=True)
class SitSet:
    """A SiT set to write.

    Attributes:
        folder: where it goes, and the names of its images.
        load: of an image's name, in a loader process: uint8 arrays (h_i,w_i,3), the last of the image's size.
        translator: of these for a batch of images of equal size, uint8 (B,h_i,w_i,3): uint8 (B,H,W,3).
    """

    folder: SitFolder
    load: Load
    translator: Callable[[Sequence[Tensor]], np.ndarray]

    def batches(
        self, names: Sequence[str], flags: ExportFlags, skipped: list[str]
    ) -> Iterator[tuple[Sequence[str], list[Tensor]]]:
        """Names and levels of neighbouring images of equal size; what cannot be used is named in `skipped` instead."""
        samples = load_in_order(
            self.load,
            names,
            num_workers=flags.num_workers,
            skip_unusable=flags.on_bad_image == "skip",
            or_else=f"; {CONTINUE}, or exclude such images with --on_bad_image skip",
        )

        def usable() -> Iterator[tuple[str, list[np.ndarray]]]:
            for name, sample in zip(names, samples, strict=True):
                if isinstance(sample, UserError):
                    say(f"skipped: {sample}")
                    skipped.append(name)
                else:
                    yield name, sample

        for _, equal in groupby(usable(), lambda named: named[1][-1].shape):
            while batch := list(islice(equal, flags.batch_size)):
                of_batch, pyramids = zip(*batch, strict=True)
                yield of_batch, [torch.from_numpy(np.stack(level)) for level in zip(*pyramids, strict=True)]


def translate_images(
    sit_set: SitSet, names: Sequence[str], flags: ExportFlags, *, title: str = "translating",
    stop: Callable[[], bool] = lambda: False,
) -> list[str]:  # fmt: skip
    """Translate images of a set and write them: decoding, translating and encoding overlap.

    Args:
        names: the images wanted.
        flags: with the numbers of workers and encoders resolved.
        title: of the progress bar; '' draws none.
        stop: asked after every batch; where it returns True, the translation ends early.

    Returns:
        The images that were skipped because they cannot be read, with `--on_bad_image skip`.

    Raises `UserError` where an image cannot be read or written; images translated before are on disk and complete.
    """
    folder, skipped = sit_set.folder, []
    writing: deque[Future[None]] = deque()
    with (
        ThreadPoolExecutor(flags.encoders) as pool,  # zlib runs without the interpreter lock
        tqdm(total=len(names), unit="img", desc=title, dynamic_ncols=True, disable=not title) as bar,
    ):
        for of_batch, levels in sit_set.batches(names, flags, skipped):
            try:
                translated = sit_set.translator(levels)
            except UserError as error:
                raise UserError(f"{folder.files.root / of_batch[0]}: {error}") from None
            for name, pixels in zip(of_batch, translated, strict=True):
                encode = partial(Image.fromarray(pixels).save, format="PNG", compress_level=flags.png_compression)
                writing.append(pool.submit(atomic_write, folder.root / folder.outputs[name], encode))
            while len(writing) > 2 * flags.encoders:
                writing.popleft().result()
            bar.update(len(of_batch))
            if stop():
                break
    for future in writing:
        future.result()
    return skipped


# --- the command -----------------------------------------------------------------------------------------------------


def export(flags: ExportFlags, script: str) -> None:
    """Export a SiT data set, in this process or in one for each device; `script` is the file of the command.

    Images translated before a `UserError`, a `Stopped` or the death of a loader stay.
    """
    in_processes(lambda rank: _start(flags, Path(script), rank), CONTINUE)


def _start(flags: ExportFlags, script: Path, rank: Rank) -> None:
    # Training-free translators compute in the loaders.
    devices = resolve_devices(flags.gpus or (() if flags.translator == "procst" else ("cpu",)))
    if rank.count == 1 and len(devices) > 1:
        # No restarts: only --skip_created_files finds the images that are already there.
        launch(script, devices, restarts=0, if_killed=CONTINUE)
        return
    rank = rank.at(devices)
    if not flags.gpus and rank.is_main and flags.translator == "procst":
        print(f"computing on {rank.device} (choose with --gpus)")
    stop = StopRequests(quiet=is_launched() or not rank.is_main)
    stop.at_once = rank.count == 1  # until images are translated
    with stop:
        trained = load_trained_generators(Path(flags.trained_procst_path)) if flags.translator == "procst" else None
        flags = _resolved(flags, trained, devices, rank)
        source = with_split(find_data_set(flags.source, "--source"), flags.src_split)
        files = list_images(source, flags.src_data_dir, "--src_data_dir", list_file=flags.src_list, training=False)
        if trained is None:
            sets = _transferred_sets(flags, files)
        else:
            sets = [translated_set(flags, trained.generators, files, rank.device)]
        if rank.is_main:
            if trained and trained.note:
                print(f"note: {trained.note}")
            for sit_set in sets:
                sit_set.folder.check()
            check_samples(files, labels=False, skip=flags.on_bad_image == "skip")
            print(files.describe())
        for sit_set in sets:
            rank.require_equal(sit_set.folder.manifest)
            with locked(make_folder(sit_set.folder.root, FLAG), FLAG) if rank.is_main else nullcontext():
                _export(sit_set, flags, rank, stop)


def _folder(flags: ExportFlags, files: FileList, root: Path | str, **made_with: Any) -> SitFolder:
    """The folder of a set; `made_with` is what its manifest says about the translator."""
    outputs = output_names(files)
    manifest = {
        "format": "procst-sit", "data_set": flags.source, "source_folder": str(files.root.resolve()), **made_with,
        "images": len(outputs),
    }  # fmt: skip
    return SitFolder(root=Path(root), files=files, outputs=outputs, manifest=manifest)


def translated_set(
    flags: ExportFlags, generators: Sequence[Generator], files: FileList, device: torch.device
) -> SitSet:
    """The set that trained generators, coarse to fine, make of `files` on a device."""
    folder = _folder(
        flags, files, flags.sit_output_path, generators=weights_fingerprint(*generators),
        scale_factor=flags.scale_factor, precision=flags.precision,
    )  # fmt: skip
    set_convolution_precision(flags.precision)
    on_device = [generator.to(device) for generator in generators]
    translator = Translator(on_device, flags.scale_factor, device, flags.max_pixels, flags.precision)
    return SitSet(folder, SourcePyramids(files, len(generators) - 1, flags.scale_factor), translator)


def _transferred_sets(flags: ExportFlags, files: FileList) -> list[SitSet]:
    """The sets that a training-free translator makes, one for each of `--variants`."""
    target = list_images(
        find_data_set(flags.target, "--target"), flags.trg_data_dir, "--trg_data_dir", list_file=flags.trg_list,
        training=False,
    )  # fmt: skip
    skips = flags.on_bad_image == "skip"
    check_samples(target, labels=False, skip=skips)
    sets, root = [], Path(flags.sit_output_path)
    uses_fda = flags.translator == "fda"
    transfer = partial(low_frequencies_swapped, beta=flags.beta) if uses_fda else histogram_matched
    for variant in range(1, (flags.variants or 1) + 1):
        folder = _folder(
            flags, files, root / f"v{variant}" if flags.variants else root, translator=flags.translator,
            beta=flags.beta, seed=flags.seed, target=flags.target, target_folder=str(target.root.resolve()),
            target_images=target.fingerprint(), variant=variant,
        )  # fmt: skip
        load = ColourTransfer(
            files=files, target=target, transfer=transfer, seed=flags.seed, variant=variant, skips=skips
        )
        sets.append(SitSet(folder, load, lambda levels: levels[0].numpy()))
    return sets


def _resolved(
    flags: ExportFlags, trained: TrainedGenerators | None, devices: Sequence[torch.device], rank: Rank
) -> ExportFlags:
    """The flags with every value decided: as given, else the run's, else the published or the machine's."""
    source, folder = flags.source, flags.src_data_dir
    if source and (found := find_data_set(source, "--source")).name == "folder":
        folder = folder or found.root  # '' of the known set, which is a folder that --src_data_dir names
    if trained is None:
        target = flags.target or "cityscapes"
        decided = {
            "target": target,
            "trg_data_dir": flags.trg_data_dir or find_data_set(target, "--target").default_root,
            "seed": flags.seed or 0, "beta": 0.01 if flags.translator == "fda" and flags.beta is None else flags.beta,
        }  # fmt: skip
    else:
        factor = flags.scale_factor
        if trained.config is not None:
            network, data = trained.config.network, trained.config.source
            if factor not in (None, network.scale_factor):
                raise UserError(f"--scale_factor {factor}: the run was trained with {network.scale_factor}")
            if not folder and source not in ("", data.source):
                raise UserError(f"--source {source} is not the run's ({data.source}): give its folder, --src_data_dir")
            factor, source, folder = network.scale_factor, source or data.source, folder or data.src_data_dir
        decided = {
            "scale_factor": 0.5 if factor is None else factor,
            "precision": resolve_precision(flags.precision, rank.device),
        }
    return replace(
        flags,
        **decided,
        source=source or "gta5",
        src_data_dir=folder or find_data_set(source or "gta5", "--source").default_root,
        num_workers=workers_for(flags.num_workers, rank.device, len(devices)),
        encoders=min(16, cpus_per_device(devices)) if flags.encoders is None else flags.encoders,
    )


def _export(sit_set: SitSet, flags: ExportFlags, rank: Rank, stop: StopRequests) -> None:
    folder, names = sit_set.folder, None
    if rank.is_main:
        folder.check()  # another export may have written to it meanwhile
        folder.make()
        names = folder.incomplete() if flags.skip_created_files else list(folder.outputs)
    names = rank.broadcast(names)
    stop.at_once = False
    started = time.perf_counter()
    try:
        with out_of_memory_means(lambda: f" on {rank.device}; lower --batch_size, --max_pixels or --num_workers"):
            title = "" if not rank.is_main else "translating" if rank.count == 1 else f"translating 1/{rank.count}"
            skipped = translate_images(sit_set, names[rank.index :: rank.count], flags, title=title, stop=stop)
    except (LoaderDied, RuntimeError) as error:
        if not is_loader_death(error):
            raise
        say(f"{LoaderDied.because(error)}; {CONTINUE}")
        raise SystemExit(STOPPED) from None  # other processes do not wait for this one
    if rank.all_reduce_max(int(stop())):
        raise Stopped(f"stopped; {CONTINUE}")
    skipped = sorted(name for part in rank.gather(skipped) for name in part)
    if not rank.is_main:
        return
    folder.write_manifest(complete=not skipped)
    seconds, translated = time.perf_counter() - started, len(names) - len(skipped)
    print(
        f"{len(folder.outputs) - len(skipped)} SiT images in {folder.root}: {translated} translated in {seconds:.1f} s "
        f"({translated / max(seconds, 1e-9):.1f} images/s), {len(folder.outputs) - len(names)} were already there"
    )
    if skipped:
        print(f"skipped, as they cannot be read: {len(skipped)} images; the data set is not complete:")
        print("\n".join(f"  {folder.files.image_file(image)}" for image in skipped))
