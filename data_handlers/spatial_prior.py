"""The spatial prior: how often each class lies at each pixel of the source's labels (docs/uda.md, section CBST).

It is kept in a MATLAB file, `prior_array.mat`, as the published one is.
"""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from scipy.io import loadmat, savemat, whosmat
from scipy.io.matlab import MatReadError
from scipy.ndimage import gaussian_filter

from data_handlers.classes import IGNORE
from data_handlers.resampling import Size
from utils.errors import UserError
from utils.files import atomic_write

VARIABLE = "prior_array"
# What scipy raises for files that are damaged or no MATLAB files.
_UNREADABLE = (
    MatReadError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, OSError, struct.error,
    zlib.error,
)  # fmt: skip


def read_spatial_prior(path: Path, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """The prior of a MATLAB file, float32 (C,H,W); trainId first.

    Compressed files, as `write_spatial_prior` makes them, hold checksums. Others do not, and scipy does not survive all
    damage to them.

    Args:
        shape: what it must be; None takes any.

    Raises:
        UserError: missing, no MATLAB file, one of version 7.3, without the variable `prior_array`, of another shape, or
            with values that are no finite numbers of 0 and more.
    """
    values = _read_variable(path)
    if values.dtype.kind not in "fiub":
        raise UserError(f"{path}: {VARIABLE} does not hold real numbers but {values.dtype}; write it as an array")
    if values.ndim != 3 or (shape is not None and values.shape != shape):
        wanted = "(classes, height, width)" if shape is None else str(tuple(shape))
        raise UserError(f"{path}: {VARIABLE} is {values.shape}, but {wanted} is needed; class first, then row, column")
    prior = values.astype(np.float32)
    if not np.isfinite(prior).all() or prior.min(initial=0.0) < 0:
        raise UserError(f"{path}: {VARIABLE} holds negative, infinite or undefined values; make the prior anew")
    return prior


def _read_variable(path: Path) -> np.ndarray:
    """The variable of the file as it is stored."""
    try:
        with open(path, "rb") as file:
            return _variable_of(file, path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except NotImplementedError:
        raise UserError(
            f"{path} is a MATLAB file of version 7.3, which cannot be read; save it with -v7 or with scipy.io.savemat"
        ) from None
    except _UNREADABLE as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{path} is damaged or no MATLAB file ({reason}); replace it") from None


def _variable_of(file: BinaryIO, path: Path) -> np.ndarray:
    content = loadmat(file, variable_names=[VARIABLE])
    if VARIABLE not in content:
        file.seek(0)
        names = ", ".join(name for name, _, _ in whosmat(file)) or "none"
        raise UserError(f"{path} holds no variable {VARIABLE}; its variables: {names}")
    return content[VARIABLE]


def write_spatial_prior(path: Path, prior: np.ndarray) -> None:
    """Write a prior (C,H,W) as float32 to a file that `read_spatial_prior` reads.

    Raises:
        UserError: the folder cannot be written to.
    """
    content = {VARIABLE: prior.astype(np.float32)}
    atomic_write(path, lambda file: savemat(file, content, do_compression=True))


class SpatialPriorBuilder:
    """Counts the classes at each pixel of label maps.

    Args:
        classes: C.
        size: (H,W) of the prior; label maps are resized to it by taking the nearest pixel.

    Attributes:
        counts: int32 (C,H,W).
    """

    def __init__(self, classes: int, size: Size) -> None:
        self.counts = np.zeros((classes, *size), dtype=np.int32)

    def add(self, label: np.ndarray) -> None:
        """Count a label map, trainIds uint8 (h,w), 255 = ignore.

        Raises:
            ValueError: a trainId is none of the classes.
        """
        height, width = self.counts.shape[1:]
        resized = np.array(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
        labelled = resized != IGNORE
        if resized.max(where=labelled, initial=0) >= len(self.counts):
            raise ValueError(f"trainId {resized[labelled].max()} is none of {len(self.counts)} classes")
        rows, columns = np.nonzero(labelled)
        self.counts[resized[labelled], rows, columns] += 1

    def prior(self, sigma: float) -> np.ndarray:
        """Frequency of each class at each pixel, smoothed: float32 (C,H,W), at least 0, with a sum of 1 at each pixel.

        A pixel that is labelled in no map gets the frequencies of the classes over all pixels before the smoothing. At
        the border the nearest pixels are repeated.

        Args:
            sigma: standard deviation of the Gaussian, in pixels of the prior; 0 does not smooth.

        Raises:
            ValueError: no pixel of any map is labelled.
        """
        total = self.counts.sum(axis=0)
        labelled = total > 0
        if not labelled.any():
            raise ValueError("no pixel of the label maps is labelled")
        overall = self.counts.sum(axis=(1, 2)) / total.sum()
        prior = np.empty(self.counts.shape, dtype=np.float32)
        for smoothed, counts, frequency in zip(prior, self.counts, overall, strict=True):
            share = np.where(labelled, counts / np.maximum(total, 1), frequency)
            smoothed[:] = gaussian_filter(share, sigma, mode="nearest") if sigma else share
        return prior / prior.sum(axis=0)
