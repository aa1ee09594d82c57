"""Crops for self-training: mining small classes, and training samples from explicit draws (docs/uda.md, section CBST).

A crop is taken at a random scale, at a random place or around a pixel of a class that is rare in the predictions, and
resized to the network's input; its label is sampled once for each cell of the network's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data_handlers.classes import IGNORE
from data_handlers.resampling import Size, resize_by_rule
from training.confidence_maps import padded_size

# (height, width) that the scale of a crop refers to, whatever the size of the image. GTA5's frames are about 1052x1914.
NOMINAL_SIZE = {"gta5": (1024, 2048), "synthia": (760, 1280), "cityscapes": (1024, 2048)}
# Levels of red, green and blue of ImageNet's mean, rounded down.
IMAGENET_FILL = (123, 116, 103)


@dataclass(frozen=True)
class MinedClasses:
    """TrainIds that crops are centred on.

    Attributes:
        rarest: the classes of the smallest sizes, ascending by size, equal ones by trainId.
        priority: ascending trainIds of all classes with less than a given share; they go before `rarest`.
    """

    rarest: tuple[int, ...]
    priority: tuple[int, ...]


def mined_classes(sizes: np.ndarray, *, number: int, share: float) -> MinedClasses:
    """The rare classes among the predictions.

    Args:
        sizes: (C,), as `uda.thresholds.Plan.sizes`; a class that was never predicted counts as the rarest.
        number: of the rarest classes.
        share: of all sizes, in [0,1]; classes below it have priority.
    """
    shares = sizes / max(sizes.sum(), 1)
    rarest = np.argsort(shares, kind="stable")[:number]
    return MinedClasses(tuple(rarest.tolist()), tuple(np.flatnonzero(shares < share).tolist()))


@dataclass(frozen=True, kw_only=True)
class Cropping:
    """How samples are made of the images of a domain.

    Attributes:
        nominal: (height, width) of an image; the longer side is what a scale refers to.
        origin_size: longer side to which an image is scaled at rate 1.
        scale_range: smallest and largest factor on `origin_size`.
        crop_size: side of the network input, which is rounded up to a multiple of `stride`.
        stride: output stride of the network.
        mine_port: probability that a crop is mined, in [0,1].
        mined: the classes that are mined.
        fill: levels of red, green and blue outside of the image.
        reference: mirror labels as the published code does, off by one pixel where `stride` is even.
    """

    nominal: Size
    origin_size: int
    scale_range: tuple[float, float]
    crop_size: int
    stride: int
    mine_port: float
    mined: MinedClasses
    fill: tuple[int, int, int] = IMAGENET_FILL
    reference: bool = False

    @property
    def side(self) -> int:
        """Side of the network input, K."""
        return padded_size((self.crop_size, self.crop_size), self.stride)[0]

    def target_sizes(self) -> range:
        """The longer sides that an image may be scaled to."""
        smallest, largest = (int(factor * self.origin_size) for factor in self.scale_range)
        return range(smallest, largest + 1)


@dataclass(frozen=True, kw_only=True)
class Draws:
    """The random numbers of a sample. Units lie in [0,1): the item floor(unit * n) of n is taken.

    Attributes:
        target_size: longer side that the image is scaled to.
        mine: unit, below `mine_port` a crop is mined.
        class_unit, pixel_unit: choose a class and one of its pixels, for a mined crop.
        row_unit, column_unit: choose the place of any other crop.
        mirror: left and right are exchanged.
    """

    target_size: int
    mine: float
    class_unit: float
    pixel_unit: float
    row_unit: float
    column_unit: float
    mirror: bool


def draw(rng: np.random.Generator, cropping: Cropping) -> Draws:
    """The random numbers of one sample; as many are taken from `rng` for every image."""
    sizes = cropping.target_sizes()
    target_size = int(rng.integers(sizes.start, sizes.stop))
    mine, class_unit, pixel_unit, row_unit, column_unit, mirror = rng.random(6).tolist()
    return Draws(
        target_size=target_size,
        mine=mine,
        class_unit=class_unit,
        pixel_unit=pixel_unit,
        row_unit=row_unit,
        column_unit=column_unit,
        mirror=mirror < 0.5,
    )


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Sizes of a crop, in pixels of the image.

    Attributes:
        side: of the crop.
        cell: side of a cell of the network's output.
        border: a crop may begin so far outside of the image, at its upper and left side.
    """

    side: int
    cell: float
    border: int

    @staticmethod
    def of(cropping: Cropping, target_size: int) -> "Geometry":
        """The sizes for an image scaled to `target_size`."""
        rate = target_size / max(cropping.nominal)
        cell = cropping.stride / rate
        return Geometry(side=int(cropping.side / rate), cell=cell, border=max(1, int(cell / 2)))

    def starts(self, length: int) -> int:
        """Number of places along a side of the image of `length` pixels; the first lies at `-border`."""
        return int(max(1, self.cell, self.border + length - self.side + 1))

    def centres(self, length: int) -> range:
        """Pixels along a side that may be the centre of a mined crop; the crop then lies inside of the image."""
        half = self.side // 2
        return range(half, length - half - 1)


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A square window of an image; it may reach beyond the image.

    Attributes:
        top, left, side: in pixels of the image.
        centre: (row, column) of the pixel that the crop was mined around; None for a random crop.
        candidates: the classes among which that of the pixel was drawn; empty for a random crop.
    """

    top: int
    left: int
    side: int
    centre: tuple[int, int] | None = None
    candidates: tuple[int, ...] = ()


def random_crop(size: Size, geometry: Geometry, draws: Draws) -> Crop:
    """A crop at a random place of an image of `size` (h,w)."""
    units = (draws.row_unit, draws.column_unit)
    top, left = (_pick(u, geometry.starts(n)) - geometry.border for u, n in zip(units, size, strict=True))
    return Crop(top=top, left=left, side=geometry.side)


def mined_crop(label: np.ndarray, mined: MinedClasses, geometry: Geometry, draws: Draws) -> Crop | None:
    """A crop around a pixel of a rare class, inside of the image.

    Args:
        label: trainIds uint8 (h,w): of the source its labels, of the target its pseudo-labels.

    Returns:
        None where no class that is mined has a pixel at which a crop fits.
    """
    rows, columns = (geometry.centres(length) for length in label.shape)
    region = label[rows.start : max(rows.stop, 0), columns.start : max(columns.stop, 0)]
    pixels = np.bincount(region.ravel(), minlength=IGNORE + 1)
    candidates = _present(mined.priority, pixels) or _present(mined.rarest, pixels)
    if not candidates:
        return None
    chosen = candidates[_pick(draws.class_unit, len(candidates))]
    place = np.flatnonzero(region == chosen)[_pick(draws.pixel_unit, int(pixels[chosen]))]
    row, column = (int(n) for n in np.unravel_index(place, region.shape))
    half = geometry.side // 2
    return Crop(
        top=row + rows.start - half,
        left=column + columns.start - half,
        side=geometry.side,
        centre=(row + rows.start, column + columns.start),
        candidates=candidates,
    )


def _pick(unit: float, count: int) -> int:
    return int(unit * count)


def _present(classes: Sequence[int], pixels: np.ndarray) -> tuple[int, ...]:
    return tuple(c for c in classes if pixels[c])


def window(values: np.ndarray, crop: Crop, fill: int | tuple[int, ...]) -> np.ndarray:
    """The pixels (side,side,...) of a crop of (h,w,...); those outside of the image are `fill`."""
    result = np.empty((crop.side, crop.side, *values.shape[2:]), values.dtype)
    result[:] = fill
    places = []
    for start, length in zip((crop.top, crop.left), values.shape[:2], strict=True):
        first = min(max(start, 0), length)
        end = max(min(start + crop.side, length), first)
        places.append((slice(first, end), slice(first - start, end - start)))
    (rows, to_rows), (columns, to_columns) = places
    result[to_rows, to_columns] = values[rows, columns]
    return result


@dataclass(frozen=True)
class Sample:
    """A training sample.

    Attributes:
        pixels: RGB uint8 (K,K,3).
        label: trainIds uint8 (K/stride,K/stride), 255 = ignore; cell i is that of pixel stride * i + stride // 2.
        crop: where it was cut out of the image.
    """

    pixels: np.ndarray
    label: np.ndarray
    crop: Crop


def make_sample(pixels: np.ndarray, label: np.ndarray, draws: Draws, cropping: Cropping) -> Sample:
    """Cut a sample out of an image.

    Args:
        pixels: RGB uint8 (h,w,3).
        label: trainIds uint8 (h,w), 255 = ignore.
    """
    geometry = Geometry.of(cropping, draws.target_size)
    crop = None
    if draws.mine < cropping.mine_port:
        crop = mined_crop(label, cropping.mined, geometry, draws)
    if crop is None:
        crop = random_crop(label.shape, geometry, draws)
    side = (cropping.side, cropping.side)
    image = resize_by_rule(window(pixels, crop, cropping.fill), side)
    grid = label_grid(
        np.array(Image.fromarray(window(label, crop, IGNORE)).resize(side, Image.Resampling.NEAREST)),
        stride=cropping.stride,
        mirror=draws.mirror,
        reference=cropping.reference,
    )
    return Sample(pixels=np.ascontiguousarray(image[:, ::-1]) if draws.mirror else image, label=grid, crop=crop)


def label_grid(label: np.ndarray, *, stride: int, mirror: bool, reference: bool) -> np.ndarray:
    """The label at the middle of each cell of the network's output.

    Args:
        label: (K,K), not yet mirrored.
        mirror: of the mirrored label.
        reference: sample first and mirror the grid. With an even stride this takes the pixel beside the right one.

    Returns:
        (K/stride,K/stride).
    """
    middle = stride // 2
    if reference or not mirror:
        grid = label[middle::stride, middle::stride]
        return np.ascontiguousarray(grid[:, ::-1] if mirror else grid)
    return np.ascontiguousarray(label[middle::stride, ::-1][:, middle::stride])
