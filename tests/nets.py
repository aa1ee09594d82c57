"""Nets in files, for the tests: segmentation nets of this toolkit, and a perceptual net."""

from __future__ import annotations

import torch

from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from training.checkpoint import Checkpoint
from training.segmentation_files import load_segmentation_net
from uda.prototypes import Prototypes
from utils.tensor_files import weights_fingerprint


def save_net(path, model="UNet", backbone="none", num_classes=19, **weights):
    """Write an untrained net, some of its weights replaced, as a training of it would; returns the path."""
    shape = SegmentationShape(model, backbone, num_classes)
    torch.manual_seed(0)
    state = {**build_segmentation_net(shape).state_dict(), **weights}
    checkpoint_of(shape, state).save(path)
    return path


def checkpoint_of(shape, state, **changes):
    """A checkpoint for use that holds a segmentation net."""
    fields = {
        "method": "source", "config": {}, "stage": 0, "step": 1, "stage_finished": True, "modules": {"net": state},
        "segmentation": {"module": "net", "shape": vars(shape)},
    }  # fmt: skip
    return Checkpoint(**{**fields, **changes})


def save_prototypes(path, net_path, seed=0, **changes):
    """Write random prototypes of the net in a file, none of class 2, as calculate_prototypes.py would; its path."""
    shape, net = load_segmentation_net(net_path, "it")
    channels = net.head.classify.in_channels
    generator = torch.Generator().manual_seed(seed)
    vectors, counts = torch.rand(shape.num_classes, channels, generator=generator), torch.ones(shape.num_classes)
    vectors[2], counts[2] = 0, 0
    made_from = {"weights": weights_fingerprint(net), "number_of_images": 1}
    Prototypes(vectors=vectors, counts=counts.long(), images=1, made_from={**made_from, **changes}).save(path)
    return path


def randomise(net, seed=0):
    """Give every tensor random values, norms and their statistics too, so that none of them is neutral."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.ndim == 1:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return net.eval()


def write_vgg(path, last_conv):
    """Write a narrow state dict of VGG16's first convolutions, up to position `last_conv` of its features."""
    shapes = {0: (4, 3), 2: (4, 4), 5: (4, 4), 7: (4, 4), 10: (4, 4), 12: (4, 4)}
    kept = {index: shape for index, shape in shapes.items() if index <= last_conv}
    state = {f"features.{i}.weight": torch.randn(*shape, 3, 3) for i, shape in kept.items()}
    torch.save(state | {f"features.{i}.bias": torch.zeros(shape[0]) for i, shape in kept.items()}, path)
