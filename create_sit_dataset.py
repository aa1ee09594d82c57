"""Translate a source data set into the target's look: write its "Source in Target" (SiT) images.

    python create_sit_dataset.py --trained_procst_path TrainedModels/RUN --sit_output_path data/sit

Every source image becomes an 8-bit RGB PNG of its native size, under its own name and folder below the output path
(GTA5: OUT/images/00001.png).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from tqdm import tqdm

from core.export import ExportConfig, translate_images, translate_on_devices
from core.trained_generators import TrainedGenerators, load_trained_generators
from core.translate import MIN_TILE_PIXELS
from data_handlers.cache import OR_SKIP
from data_handlers.choices import ON_BAD_IMAGE
from data_handlers.datasets import DATA_SETS
from data_handlers.images import image_size
from data_handlers.labelled import check_samples
from data_handlers.lists import FileList, Listing, list_images, replace_suffix
from training.choices import PRECISIONS
from training.precision import resolve_precision
from utils.devices import cpus_per_device, default_workers, resolve_devices
from utils.errors import UserError, run_cli
from utils.files import atomic_write_json, check_folder, make_folder, read_json, remove_leftovers
from utils.flags import OneLineParser, parse_flags
from utils.png import RGB, SIGNATURE, PngHeader, is_complete_rgb8, read_png_header

MANIFEST = "sit_manifest.json"


def build_parser() -> argparse.ArgumentParser:
    """All flags; names and defaults are the published ones."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trained_procst_path", default="", metavar="PATH",
        help="run folder, checkpoint, or the authors' Gst.pth (required)")  # fmt: skip
    add("--sit_output_path", default="", metavar="DIR", help="root of the SiT data set, created if missing (required)")
    add("--gpus", nargs="+", metavar="GPU", default=[],
        help="index of the CUDA device, or cpu (required); several devices share the images")  # fmt: skip
    add("--source", choices=sorted(DATA_SETS), default="gta5",
        help="data set to translate (default: the run's source, else gta5)")  # fmt: skip
    add("--src_data_dir", default="data/gta", help="its root folder (default: the run's, else data/gta)")
    add("--src_list", default="", metavar="FILE", help="text file with one image a line, instead of all")
    add("--batch_size", type=int, default=1, help="images of equal size translated at once (default: %(default)s)")
    add("--num_workers", type=int, default=None,
        help="loader processes for each device, 0 loads in the one that translates (default: 6, or the CPUs there are "
        "for it, half of them where the CPU translates)")  # fmt: skip
    add("--encoders", type=int, default=None,
        help="threads that write PNGs, for each device (default: 16, or the CPUs there are for it)")  # fmt: skip
    add("--png_compression", type=int, default=1, metavar="0-9",
        help="zlib's level; 6 takes five times as long for files a few percent smaller "
        "(default: %(default)s)")  # fmt: skip
    add("--precision", choices=PRECISIONS, default="fp32",
        help="arithmetic of the generators; bf16 is faster and moves pixels by a level or so "
        "(default: %(default)s)")  # fmt: skip
    add("--skip_created_files", action="store_true", help="keep complete images that are already there")
    add("--scale_factor", type=float, default=0.5,
        help="size ratio of the scales, for a Gst.pth, which does not say (default: %(default)s)")  # fmt: skip
    add("--on_bad_image", choices=ON_BAD_IMAGE, default="stop",
        help="an image that cannot be read ends the export, or is left out and listed at the end "
        "(default: %(default)s)")  # fmt: skip
    add("--max_pixels", type=int, default=None,
        help="most pixels a generator sees at once; larger images are translated on tiles, with the same result "
        "(default: what free memory allows)")  # fmt: skip
    return parser


def output_names(files: FileList) -> dict[str, str]:
    """Output path of every image, relative to the output folder: its own, with the suffix `.png`.

    Raises:
        UserError: two images differ in their suffix alone.
    """
    outputs: dict[str, str] = {}
    taken: dict[str, str] = {}
    for image in files.images:
        output = replace_suffix(image, ".png")
        if output in taken:
            raise UserError(f"{files.root}: {taken[output]} and {image} would both become {output}; rename one")
        taken[output] = image
        outputs[image] = output
    return outputs


def folders_of(outputs: dict[str, str]) -> set[str]:
    """Folders of the output paths, relative to the output folder; '' is that one."""
    return {name.rpartition("/")[0] for name in outputs.values()}


def _check_output(
    root: Path, outputs: dict[str, str], files: FileList, manifest: dict[str, object], skip: bool
) -> None:
    """Refuse to overwrite the source or foreign files, and to mix two models or sources in one data set."""
    check_folder(root, "--sit_output_path")
    for folder in folders_of(outputs):
        if os.path.realpath(root / folder) == os.path.realpath(files.root / folder):
            raise UserError(f"--sit_output_path {root} would overwrite the source images; choose another folder")
    if (root / MANIFEST).exists():
        held = read_json(root / MANIFEST)
        if isinstance(held, dict):
            held.setdefault("precision", "fp32")  # of the time before it was written down
        for name in ("generators", "data_set", "source_folder", "scale_factor", "precision"):
            if not isinstance(held, dict) or held.get(name) != manifest[name]:
                raise UserError(
                    f"--sit_output_path {root} holds images of another {name.replace('_', ' ')} (see its {MANIFEST}); "
                    "choose another folder, or delete that one"
                )
        return
    listing = Listing(root)
    present = [(image, root / output) for image, output in outputs.items() if output in listing]
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
        if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
            return False
        try:
            return is_complete_rgb8(path, image_size(source))
        except UserError:
            return False  # the source cannot be read; what comes of that is decided where it is translated

    return [i for i in tqdm(outputs, desc="checking created files", unit="img", dynamic_ncols=True) if not done(i)]


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


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


def _check_flags(flags: argparse.Namespace) -> None:
    for name in ("trained_procst_path", "sit_output_path", "gpus"):
        if not getattr(flags, name):
            raise UserError(f"--{name} is required (see --help)")
    if flags.batch_size < 1:
        raise UserError(f"--batch_size is {flags.batch_size}; it must be greater than 0")
    if flags.max_pixels is not None and flags.max_pixels < MIN_TILE_PIXELS:
        raise UserError(f"--max_pixels is {flags.max_pixels}; the smallest tile has {MIN_TILE_PIXELS} pixels")
    if flags.encoders is not None and flags.encoders < 1:
        raise UserError(f"--encoders is {flags.encoders}; it must be greater than 0")
    if not 0 <= flags.png_compression <= 9:
        raise UserError(f"--png_compression is {flags.png_compression}; it must be 0 to 9")
    if flags.num_workers is not None and flags.num_workers < 0:
        raise UserError(f"--num_workers is {flags.num_workers}; it must be 0 or greater")


def main() -> None:
    """Command line entry."""
    flags, given = parse_flags(build_parser())
    _check_flags(flags)
    devices = resolve_devices(flags.gpus)
    precisions = {resolve_precision(flags.precision, device) for device in devices}
    precision = precisions.pop() if len(precisions) == 1 else "fp32"  # auto on unlike devices: one set, one arithmetic
    trained = load_trained_generators(Path(flags.trained_procst_path))
    source, folder, scale_factor = _choose(flags, given, trained)
    files = list_images(DATA_SETS[source], folder, "--src_data_dir", list_file=flags.src_list, training=False)
    outputs = output_names(files)
    root = Path(flags.sit_output_path)
    config = ExportConfig(
        scale_factor=scale_factor,
        batch_size=flags.batch_size,
        num_workers=default_workers(devices) if flags.num_workers is None else flags.num_workers,
        encoders=min(16, cpus_per_device(devices)) if flags.encoders is None else flags.encoders,
        png_compression=flags.png_compression,
        precision=precision,
        max_pixels=flags.max_pixels,
        skip_unusable=flags.on_bad_image == "skip",
    )
    manifest = {
        "format": "procst-sit",
        "generators": trained.fingerprint(),
        "data_set": source,
        "source_folder": str(files.root.resolve()),
        "scale_factor": scale_factor,
        "precision": precision,
        "images": len(outputs),
    }
    _check_output(root, outputs, files, manifest, flags.skip_created_files)
    if flags.on_bad_image == "stop":
        check_samples(files, labels="none", or_else=OR_SKIP)
    for path in (root / folder for folder in {"", *folders_of(outputs)}):
        remove_leftovers(make_folder(path, "--sit_output_path"))

    print(files.describe())
    if trained.note:
        print(f"note: {trained.note}")
    names = _to_translate(files, outputs, root, flags.skip_created_files)
    atomic_write_json(root / MANIFEST, {**manifest, "complete": False})
    wanted = {name: outputs[name] for name in names}
    there = Listing(root)
    before = {image: _identity(root / output) for image, output in wanted.items() if output in there}
    started = time.perf_counter()
    if len(devices) == 1:
        translate_images(trained.generators, devices[0], files, wanted, root, config)
    else:
        translate_on_devices(trained.generators, devices, files, wanted, root, config)
    seconds = time.perf_counter() - started
    listing = Listing(root)
    # An older file that was to be replaced, and was not, is no translation either.
    stale = {image for image, identity in before.items() if _identity(root / outputs[image]) == identity}
    missing = [image for image, output in outputs.items() if output not in listing or image in stale]
    if missing and not config.skip_unusable:
        first = outputs[missing[0]]
        raise UserError(f"{len(missing)} images are missing in {root}, first {first}: run the command again")
    atomic_write_json(root / MANIFEST, {**manifest, "complete": not missing})
    kept = len(outputs) - len(names)
    translated = len(names) - len(missing)
    print(
        f"{len(outputs) - len(missing)} SiT images in {root}: {translated} translated in {seconds:.1f} s "
        f"({translated / max(seconds, 1e-9):.1f} images/s), {kept} were already there"
    )
    if missing:
        print(f"skipped, as they cannot be read: {len(missing)} images; the data set is not complete:")
        print("\n".join(f"  {files.root / image}" for image in missing))


if __name__ == "__main__":
    run_cli(main)
