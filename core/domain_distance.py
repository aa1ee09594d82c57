"""How far apart two sets of images look: the Frechet distance of their VGG16 features.

Every position of a feature map is one vector, so the distance compares local appearance (colour, contrast, texture),
and a few dozen images suffice. It is not the FID of the literature, which pools Inception features over the image.
Values compare only for the same layer, weights and size.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from scipy import linalg

from core.command_flags import DistanceFlags
from data_handlers.datasets import find_data_set
from data_handlers.images import PROCST_INPUT, read_resized
from data_handlers.lists import list_images
from models.vgg import VGGFeatures, build_vgg
from training.precision import set_convolution_precision
from utils.devices import resolve_device
from utils.errors import UserError
from utils.files import atomic_write_json, check_output_file, make_folder
from utils.sizes import evenly_spaced

POSITIONS_PER_IMAGE = 500


Gaussian = tuple[np.ndarray, np.ndarray]  # mean (D,) and covariance (D,D)


def gaussian_of(batches: Iterable[np.ndarray]) -> Gaussian:
    """Mean and unbiased covariance of vectors that arrive in batches (n,D), summed in float64.

    Raises `UserError`: there are fewer than two.
    """
    count, total, outer = 0, 0.0, 0.0
    for vectors in batches:
        exact = vectors.astype(np.float64)
        count, total, outer = count + len(exact), total + exact.sum(axis=0), outer + exact.T @ exact
    if count < 2:
        raise UserError("--size, --max_images: one vector of features is too few; raise the size")
    mean = total / count
    return mean, (outer - count * np.outer(mean, mean)) / (count - 1)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + trace(C_a + C_b - 2 (C_a C_b)^(1/2)), as in the Frechet Inception Distance."""
    (mean_a, covariance_a), (mean_b, covariance_b) = a, b
    # The root of the product has the same trace as that of the symmetric C_a^(1/2) C_b C_a^(1/2), whose eigenvalues
    # are real and not negative but for rounding: no complex parts to discard, no failure for singular covariances.
    values, vectors = linalg.eigh(covariance_a)
    root_a = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = linalg.eigvalsh(root_a @ covariance_b @ root_a)
    trace_of_root = np.sqrt(product.clip(min=0.0)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * trace_of_root)


@torch.no_grad()
def feature_vectors(
    paths: Iterable[Path], size: tuple[int, int], vgg: VGGFeatures, layer: int, device: torch.device
) -> Iterator[np.ndarray]:
    """The layer's feature vectors (n,D) of each image. Raises `UserError`: an image cannot be read.

    Args:
        size: (W,H) every image is resized to (bicubic).
        vgg: frozen features on `device` that return `layer`.
    """
    for path in paths:
        pixels = torch.from_numpy(read_resized(path, size, "exact")).to(device)
        features = vgg(PROCST_INPUT(pixels)[None])[layer][0].flatten(1)
        # A regular subset: neighbouring positions have similar features.
        stride = max(1, features.shape[1] // POSITIONS_PER_IMAGE)
        yield features[:, ::stride].T.cpu().numpy()


def measure_distances(flags: DistanceFlags) -> None:
    """Print the distances of source and SiT to the target; write them (`--json`). Raises `UserError`."""
    if flags.json:
        check_output_file(Path(flags.json), "--json")
    source, target = find_data_set(flags.source, "--source"), find_data_set(flags.target, "--target")
    size = flags.size or target.resize
    device = resolve_device(flags.gpus)
    set_convolution_precision("fp32")
    sets = {
        "target": list_images(target, flags.trg_data_dir or target.default_root, "--trg_data_dir"),
        "source": list_images(source, flags.src_data_dir or source.default_root, "--src_data_dir"),
    }
    if flags.sit_data_dir:
        sets["SiT"] = list_images(source, flags.sit_data_dir, "--sit_data_dir")
    vgg = build_vgg(flags.vgg_weights, [flags.layer]).to(device)
    fits = {}
    for name, files in sets.items():
        paths = [files.image_file(image) for image in evenly_spaced(files.images, flags.max_images)]
        fits[name] = gaussian_of(feature_vectors(paths, size, vgg, flags.layer, device))
    distances = {name: frechet_distance(fits[name], fits["target"]) for name in sets if name != "target"}
    print(f"Frechet distance of VGG16 layer {flags.layer} ({flags.vgg_weights} weights) at {size[0]}x{size[1]}")
    for name, distance in distances.items():
        share = f"{distance / distances['source']:6.1%} of source-target" if distances["source"] else ""
        print(f"{name + '-target':>15}  {distance:10.4f}  {share}")
    if flags.json:
        make_folder(Path(flags.json).parent, "--json")
        atomic_write_json(Path(flags.json), {f"{name}-target": distance for name, distance in distances.items()})
