"""The spatial prior of a source, from all of its labels: the command `make_spatial_prior.py`."""

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_handlers.datasets import find_data_set, for_net_of, with_labels, with_split
from data_handlers.images import image_size, read_label
from data_handlers.lists import list_images, require_labels
from data_handlers.spatial_prior import SpatialPriorBuilder, write_spatial_prior
from models.segmentation import require_classes
from uda.cbst_config import PriorFlags
from utils.errors import UserError
from utils.files import atomic_write, check_output_file, make_folder
from utils.loaders import load_in_order

PUBLISHED_SIGMA, PUBLISHED_WIDTH = 35.0, 2048


def make_prior(flags: PriorFlags) -> None:
    """Write the prior and a picture for each class. Raises `UserError`: bad input, or a file that is there already."""
    output, (width, height) = Path(flags.output), flags.prior_size
    data_set = with_split(find_data_set(flags.source, "--source"), flags.src_split)
    data_set = with_labels(data_set, flags.src_labels, "--src_labels")
    if not data_set.has_labels:
        raise UserError(f"--source {flags.source} has no labels; choose a labelled data set")
    num_classes = flags.num_classes or len(data_set.class_names)
    data_set = for_net_of(data_set, num_classes)
    require_classes(num_classes, data_set.name, data_set.value_map)
    root = flags.src_data_dir or data_set.default_root
    files = list_images(data_set, root, "--src_data_dir", list_file=flags.src_list)
    require_labels(files, "--src_data_dir")
    check_output_file(output, "--output")
    if output.exists():
        raise UserError(f"--output {output} exists; move it away, or name another file")
    sigma = PUBLISHED_SIGMA * width / PUBLISHED_WIDTH if flags.sigma is None else flags.sigma
    builder = SpatialPriorBuilder(num_classes, (height, width))

    def load(name: str) -> np.ndarray:
        path = files.label_file(name)
        return read_label(path, data_set, image_size(path))

    labels = load_in_order(load, files.images, num_workers=flags.num_workers)
    for label in tqdm(labels, total=len(files), unit="label", dynamic_ncols=True):
        builder.add(label)
    if not builder.counts.any():
        raise UserError(f"--src_data_dir {files.root}: no pixel of the labels is of a class")
    prior = builder.prior(sigma)
    make_folder(output.parent, "--output")
    for number, (name, share) in enumerate(zip(data_set.class_names, prior, strict=False)):
        picture = Image.fromarray((255 * share / max(float(share.max()), 1e-9)).astype(np.uint8))
        path = output.with_name(f"{output.stem}_{number:02d}_{name.replace(' ', '_')}.png")
        atomic_write(path, partial(picture.save, format="PNG"))
    write_spatial_prior(output, prior)
    print(f"{output}: {len(prior)} classes at {width}x{height} from {len(files)} labels, sigma {sigma:.3g} pixels")
