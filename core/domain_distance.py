"""How far apart two sets of images look: the Frechet distance of their VGG16 features.

Every position of a feature map counts as one vector, so the distance compares local appearance (colour, contrast,
texture), which is what ProCST moves, and a few dozen images are enough for a stable covariance. It is not the FID of
the literature, which pools Inception features over the image; values compare only for the same layer, weights and size.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data_handlers.images import PROCST_INPUT, read_image
from models.vgg import VGGFeatures
from utils.frechet import GaussianFit

POSITIONS_PER_IMAGE = 500


@torch.no_grad()
def feature_gaussian(
    paths: Iterable[Path], size: tuple[int, int], vgg: VGGFeatures, layer: int, device: torch.device
) -> GaussianFit:
    """Gaussian of the layer's feature vectors over all images.

    Args:
        paths: image files.
        size: (W,H) every image is resized to (bicubic), so that both sets are seen at one scale.
        vgg: frozen features on `device` that return `layer`.

    Raises:
        UserError: an image cannot be read.
    """
    fit: GaussianFit | None = None
    for path in paths:
        image = read_image(path)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).to(device)
        features = vgg(PROCST_INPUT(pixels)[None])[layer][0].flatten(1)
        # A regular subset of positions: neighbours say nearly the same, and it needs no random numbers.
        stride = max(1, features.shape[1] // POSITIONS_PER_IMAGE)
        vectors = features[:, ::stride].T.cpu().numpy()
        fit = fit or GaussianFit(vectors.shape[1])
        fit.add(vectors)
    if fit is None:
        raise ValueError("no images")
    return fit
