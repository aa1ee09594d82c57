"""The spatial prior: how often each class lies at each pixel of the source's labels (docs/uda.md, section CBST).

It is kept in a MATLAB file, `prior_array.mat`, as the published one is.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import distance_transform_edt, gaussian_filter

from data_handlers.classes import IGNORE
from data_handlers.resampling import Size
from utils.errors import UserError
from utils.files import atomic_write
from utils.matlab_files import read_matlab_variable

VARIABLE = "prior_array"


def read_spatial_prior(path: Path, shape: tuple[int, int, int] | None = None) -> np.ndarray:
    """The prior of a MATLAB file, float32 (C,H,W); trainId first. Raises `UserError`.

    Compressed files, as `write_spatial_prior` makes them, hold checksums. Others do not, and scipy does not survive all
    damage to them.

    Args:
        shape: what it must be; None takes any.
    """
    values = read_matlab_variable(path, VARIABLE)
    if values.dtype.kind not in "fiub":
        raise UserError(f"{path}: {VARIABLE} does not hold real numbers but {values.dtype}; write it as an array")
    if values.ndim != 3 or (shape is not None and values.shape != shape):
        wanted = "(classes, height, width)" if shape is None else str(tuple(shape))
        raise UserError(f"{path}: {VARIABLE} is {values.shape}, but {wanted} is needed; class first, then row, column")
    prior = values.astype(np.float32)
    if not np.isfinite(prior).all() or prior.min(initial=0.0) < 0:
        raise UserError(f"{path}: {VARIABLE} holds negative, infinite or undefined values; make the prior anew")
    return prior


def write_spatial_prior(path: Path, prior: np.ndarray) -> None:
    """Write a prior (C,H,W) as float32 to a file that `read_spatial_prior` reads.

    Raises `UserError`: the folder cannot be written to.
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

        A pixel that is labelled in no map gets the frequencies at the nearest one that is, before the smoothing. At the
        border the nearest pixels are repeated.

        Args:
            sigma: standard deviation of the Gaussian, in pixels of the prior; 0 does not smooth.

        Raises:
            ValueError: no pixel of any map is labelled.
        """
        total = self.counts.sum(axis=0)
        if not total.any():
            raise ValueError("no pixel of the label maps is labelled")
        nearest = tuple(distance_transform_edt(total == 0, return_distances=False, return_indices=True))
        prior = np.empty(self.counts.shape, dtype=np.float32)
        for smoothed, counts in zip(prior, self.counts, strict=True):
            share = (counts / np.maximum(total, 1))[nearest]
            smoothed[:] = gaussian_filter(share, sigma, mode="nearest") if sigma else share
        return prior / prior.sum(axis=0)
