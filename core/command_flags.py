"""The flags of the commands that export SiT images and measure distances. Nothing here imports PyTorch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from data_handlers.choices import ON_BAD_IMAGE
from training.config import PRECISIONS, ROOT_HELP
from training.flags import (
    Size,
    as_given,
    check,
    check_not_negative,
    check_positive,
    data_set_option,
    option,
    size_option,
)

MIN_TILE_PIXELS = 96 * 96
TRANSLATORS = ("procst", "histogram", "fda")


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """The flags of `create_sit_dataset.py`; None and '' stand for values that the run or the machine decides."""

    translator: str = option(
        "procst", "trained generators; or what needs no training: each image takes the colour histograms of a target "
        "image, or its lowest frequencies' amplitudes (Fourier domain adaptation)", choices=TRANSLATORS,
    )  # fmt: skip
    trained_procst_path: str = option(
        "", "run folder, checkpoint, or the authors' Gst.pth (required with --translator procst)", metavar="PATH"
    )
    sit_output_path: str = option(
        "", "root of the SiT data set, made where it is missing (required)", metavar="DIR", required=True
    )
    gpus: tuple[str, ...] = option(
        (), "indices of CUDA devices, or cpu; several share the images, one process each (default: the first GPU, or "
        "the CPU where there is none)", type=str, nargs="+", metavar="GPU",
    )  # fmt: skip
    source: str = data_set_option("", "data set to translate (default: the run's source, else gta5)")
    src_data_dir: str = option("", f"{ROOT_HELP[:-1]}; first of all the run's)", metavar="DIR")
    src_split: str = option("", "a split it declares, as in train_procst.py (default: training images)")
    src_list: str = option("", "text file with one image a line, instead of all", metavar="FILE")
    target: str = data_set_option("", "histogram, fda: data set whose images are drawn (default: cityscapes)")
    trg_data_dir: str = option("", f"histogram, fda: {ROOT_HELP}", metavar="DIR")
    trg_list: str = option("", "histogram, fda: text file with one image a line, instead of all", metavar="FILE")
    seed: int | None = option(None, "histogram, fda: of the draw (default: 0)", type=int)
    variants: int | None = option(
        None, "histogram, fda: write N sets, each with its own draw, into OUT/v1 to OUT/vN; "
        "train_semseg_on_source.py --source_images takes them", type=int,
    )  # fmt: skip
    beta: float | None = option(
        None, "fda: the amplitudes of up to floor(beta * shorter side) cycles are the target's (default: 0.01)",
        type=float,
    )  # fmt: skip
    skip_created_files: bool = option(False, "keep the images that are already there and newer than their source")
    on_bad_image: str = option(
        "stop", "an image that cannot be read ends the export, or is skipped and listed at the end",
        choices=ON_BAD_IMAGE,
    )  # fmt: skip
    batch_size: int = option(1, "images of equal size translated at once")
    precision: str = option(
        "fp32", "arithmetic of the generators; bf16 is faster and moves pixels by a level or so", choices=PRECISIONS
    )
    num_workers: int | None = option(
        None, "loader processes for each device, 0 loads in the one that translates (default: 6, or the CPUs there are "
        "for it, half of them where the CPU translates)", type=int,
    )  # fmt: skip
    encoders: int | None = option(
        None, "threads that write PNGs, for each device (default: 16, or the CPUs there are for it)", type=int
    )
    png_compression: int = option(1, "zlib's level, 0 to 9; 6 takes five times as long for files a few percent smaller")
    scale_factor: float | None = option(
        None, "size ratio of the scales, for a Gst.pth, which does not say (default: 0.5)", type=float
    )
    max_pixels: int | None = option(
        None, "most pixels a generator sees at once; larger images are translated on tiles, with the same result "
        "(default: what free memory allows)", type=int,
    )  # fmt: skip

    first: ClassVar[Sequence[str]] = (
        "trained_procst_path", "sit_output_path", "translator", "gpus", "source", "src_data_dir", "trg_data_dir",
        "skip_created_files", "on_bad_image", "precision",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_positive(self, "batch_size", "encoders", "variants")
        check_not_negative(self, "num_workers", "seed")
        self._check_translator()
        check(self.beta is None or 0.0 <= self.beta <= 0.5, f"--beta is {self.beta}; it must be between 0 and 0.5")
        check(0 <= self.png_compression <= 9, f"--png_compression is {self.png_compression}; it must be 0 to 9")
        factor, pixels = self.scale_factor, self.max_pixels
        check(factor is None or 0.0 < factor < 1.0, f"--scale_factor is {factor}; it must be between 0 and 1")
        check(
            pixels is None or pixels >= MIN_TILE_PIXELS,
            f"--max_pixels is {pixels}; the smallest tile has {MIN_TILE_PIXELS} pixels",
        )

    def _check_translator(self) -> None:
        """Refuse flags that do not act with this translator."""
        if self.translator == "procst":
            check(bool(self.trained_procst_path), "--trained_procst_path is required (see --help)")
            idle, needed = ("target", "trg_data_dir", "trg_list", "seed", "variants", "beta"), "histogram or fda"
        else:
            idle, needed = ("trained_procst_path", "scale_factor", "max_pixels"), "procst"
            check(self.precision == "fp32", f"--precision {self.precision} acts only with --translator procst")
            check(self.batch_size == 1, f"--batch_size {self.batch_size} acts only with --translator procst")
        for name in idle:
            given = getattr(self, name)
            check(given in (None, ""), f"--{name} {given} acts only with --translator {needed}")
        check(self.beta is None or self.translator == "fda", f"--beta {self.beta} acts only with --translator fda")


@dataclass(frozen=True, kw_only=True)
class DistanceFlags:
    """The flags of `measure_domain_distance.py`."""

    gpus: tuple[str, ...] = option(
        (), "index of the CUDA device, or cpu (default: the first GPU, or the CPU where there is none)", type=str,
        nargs="+", metavar="GPU",
    )  # fmt: skip
    source: str = data_set_option("gta5", "source data set")
    target: str = data_set_option("cityscapes", "target data set")
    src_data_dir: str = option("", ROOT_HELP, metavar="DIR")
    trg_data_dir: str = option("", ROOT_HELP, metavar="DIR")
    sit_data_dir: str = option("", "root folder of a SiT set of the source, which is measured, too", metavar="DIR")
    size: Size | None = size_option("size all images are resized to (default: the target's training size)")
    max_images: int = option(2000, "images of each set, evenly spaced")
    layer: int = option(8, "layer of VGG16's features (default: 8, relu2_2)")
    vgg_weights: str = option("imagenet", "as in train_procst.py", metavar="imagenet|random|PATH")
    json: str = option("", "also write the distances to this file", metavar="FILE")

    def __post_init__(self) -> None:
        check_positive(self, "max_images")
        check(
            self.size is None or min(self.size) >= 16,
            f"--size {as_given(self.size)}: both sides must be at least 16",
        )
