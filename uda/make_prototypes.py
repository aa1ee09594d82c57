"""The class prototypes of a net over target images: the command `calculate_prototypes.py`."""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_handlers.choices import OR_SKIP
from data_handlers.images import read_resized
from data_handlers.labelled import check_samples
from models.segmentation import require_features
from training.precision import channels_last, exact_convolutions
from training.preparation import target_files
from training.segmentation_files import load_segmentation_net
from uda.ddb_ckd_config import PrototypeFlags
from uda.prototypes import LEAST_PIXELS, MOST_IMAGES, Prototypes, load_prototypes
from utils.devices import resolve_device, to_device, workers_for
from utils.errors import UserError
from utils.files import check_output_file, make_folder
from utils.loaders import load_in_order
from utils.tensor_files import weights_fingerprint

SAVE_EVERY = 100  # images


@torch.no_grad()
def make_prototypes(flags: PrototypeFlags) -> None:
    """Write the prototypes, or continue a file of the same net and images. Raises `UserError`: bad input."""
    device, output, skips = resolve_device(flags.gpus), Path(flags.output), flags.on_bad_image == "skip"
    shape, net = load_segmentation_net(Path(flags.weights), "--weights")
    require_features(net, f"--weights {flags.weights}")
    files = target_files(flags, shape.num_classes)
    check_samples(files, labels=False, skip=skips)
    size = flags.trg_resize or files.data_set.resize
    made_from = {
        "weights": weights_fingerprint(net), "images": files.fingerprint(), "number_of_images": len(files),
        "trg_resize": list(size), "least_pixels": LEAST_PIXELS, "most_images": MOST_IMAGES,
    }  # fmt: skip
    check_output_file(output, "--output")
    channels_last(net.to(device))
    found = load_prototypes(output, "--output") if output.exists() else None
    if found and found.made_from != made_from:
        raise UserError(f"--output {output} is of another net or of other images; move it away, or name another file")
    print(f"{shape} sees {files.describe()} on {device}", flush=True)
    make_folder(output.parent, "--output")

    def load(name: str) -> np.ndarray:
        return read_resized(files.image_file(name), size, "exact")

    begun, workers = found.images if found else 0, workers_for(flags.num_workers, device)
    images = load_in_order(load, files.images[begun:], num_workers=workers, skip_unusable=skips, or_else=OR_SKIP)
    with tqdm(total=len(files), initial=begun, unit="img", dynamic_ncols=True) as bar, exact_convolutions():
        for pixels in images:
            if isinstance(pixels, UserError):
                bar.write(f"skipped: {pixels}")
            else:
                image = net.network_input(to_device(torch.from_numpy(pixels), device))
                features, logits = net.features_and_logits(image[None])
                found = found or Prototypes.empty(shape.num_classes, features.shape[1], made_from)
                found.add(features[0], logits[0].argmax(dim=0))
            if found:
                found.images = bar.n + 1
            bar.update()
            if found and (found.images % SAVE_EVERY == 0 or found.finished):
                found.save(output)
    known = int((found.counts > 0).sum()) if found else 0
    if not known:
        raise UserError(f"--target {flags.target}: no class has {LEAST_PIXELS} predicted pixels in any image")
    print(f"{output}: prototypes of {known} of {shape.num_classes} classes from {len(files)} images")
