"""Measure how far source and SiT images are from the target: Frechet distance of VGG16 features.

    python measure_domain_distance.py --gpus 0 --sit_data_dir data/sit
"""

from __future__ import annotations

import argparse
from pathlib import Path

from core.domain_distance import feature_gaussian
from data_handlers.datasets import DATA_SETS
from data_handlers.lists import FileList, list_images
from models.vgg import build_vgg
from training.precision import set_convolution_precision
from utils.devices import resolve_device
from utils.errors import UserError, run_cli
from utils.files import atomic_write_json, check_output_file, make_folder
from utils.flags import OneLineParser, parse_flags
from utils.frechet import GaussianFit, frechet_distance
from utils.sizes import evenly_spaced


def build_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--gpus", nargs="+", metavar="GPU", default=[], help="index of the CUDA device, or cpu (required)")
    add("--source", choices=sorted(DATA_SETS), default="gta5", help="source data set (default: %(default)s)")
    add("--target", choices=sorted(DATA_SETS), default="cityscapes", help="target data set (default: %(default)s)")
    add("--src_data_dir", default="data/gta", help="root folder of the source (default: %(default)s)")
    add("--trg_data_dir", default="data/cityscapes", help="root folder of the target (default: %(default)s)")
    add("--sit_data_dir", default="", metavar="DIR", help="root of a SiT set of the source; measured too if given")
    add("--size", type=int, nargs=2, metavar=("W", "H"), default=None,
        help="size all images are resized to (default: the target's training size)")  # fmt: skip
    add("--layer", type=int, default=8, help="layer of VGG16's features (default: %(default)s, relu2_2)")
    add("--vgg_weights", default="imagenet", metavar="imagenet|random|PATH", help="as in train_procst.py")
    add("--max_images", type=int, default=2000, help="images of each set, evenly spaced (default: %(default)s)")
    add("--json", default="", metavar="FILE", help="also write the distances to this file")
    return parser


def main() -> None:
    """Command line entry."""
    flags, _ = parse_flags(build_parser())
    if not flags.gpus:
        raise UserError("--gpus is required: the index of a CUDA device, or cpu")
    size = tuple(flags.size or DATA_SETS[flags.target].resize)
    if min(size) < 16 or flags.max_images < 1:
        raise UserError("--size needs at least 16 pixels a side, and --max_images at least 1")
    if flags.json:
        check_output_file(Path(flags.json), "--json")
    device = resolve_device(flags.gpus)
    set_convolution_precision("fp32")
    sets = {
        "target": list_images(DATA_SETS[flags.target], flags.trg_data_dir, "--trg_data_dir"),
        "source": list_images(DATA_SETS[flags.source], flags.src_data_dir, "--src_data_dir"),
    }
    if flags.sit_data_dir:
        sets["SiT"] = list_images(DATA_SETS[flags.source], flags.sit_data_dir, "--sit_data_dir")
    vgg = build_vgg(flags.vgg_weights, [flags.layer]).to(device)

    def gaussian(files: FileList) -> GaussianFit:
        paths = [files.root / name for name in evenly_spaced(files.images, flags.max_images)]
        fit = feature_gaussian(paths, size, vgg, flags.layer, device)
        if fit.count < 2:
            raise UserError(f"--size {size[0]} {size[1]}, --layer {flags.layer}: one vector is too few; raise the size")
        return fit

    fits = {name: gaussian(files) for name, files in sets.items()}
    distances = {name: frechet_distance(fits[name], fits["target"]) for name in sets if name != "target"}
    print(f"Frechet distance of VGG16 layer {flags.layer} ({flags.vgg_weights} weights) at {size[0]}x{size[1]}")
    for name, distance in distances.items():
        share = f"{distance / distances['source']:6.1%} of source-target" if distances["source"] else ""
        print(f"{name + '-target':>15}  {distance:10.4f}  {share}")
    if flags.json:
        make_folder(Path(flags.json).parent, "--json")
        atomic_write_json(Path(flags.json), {f"{name}-target": distance for name, distance in distances.items()})


if __name__ == "__main__":
    run_cli(main)
