"""The authors' `pretrained_semseg_on_*.pth`: their pickled DeepLabV2, read without executing what it names."""

from pathlib import Path

from torch import nn

from models.segmentation import SegmentationShape, build_segmentation_net
from utils.errors import UserError
from utils.pickled_modules import Record, read_pickled_modules
from utils.tensor_files import load_network

_CLASSES = [f"semseg_models.deeplabv2.{name}" for name in ("ResNet101", "Bottleneck", "Classifier_Module2", "SEBlock")]

# The authors' names of the parts of DeepLabV2 -> ours; the stages of the backbone keep their names.
_NAMES = (
    ("layer5.conv2d_list.", "head.branches."),
    ("layer5.bottleneck.0.se.0.", "head.squeeze.reduce."),
    ("layer5.bottleneck.0.se.2.", "head.squeeze.expand."),
    ("layer5.bottleneck.1.", "head.fuse."),
    ("layer5.bottleneck.2.", "head.fuse_norm."),
    ("layer5.head.1.", "head.classify."),
)

def load_legacy_segmentation(path: Path) -> tuple[SegmentationShape, nn.Module]:
    """The authors' `pretrained_semseg_on_*.pth` (docs/method.md, section 5): its shape and the net, frozen, on the CPU.

    Raises `UserError`: the file is not a pickled DeepLabV2 on ResNet-101.
    """
    record = read_pickled_modules(path, _CLASSES)
    if not isinstance(record, Record) or record.class_name != "ResNet101":
        raise UserError(f"{path}: holds no segmentation net of the authors")
    state = {_our_name(name): tensor for name, tensor in record.state_dict().items()}
    classifier = state.get("head.classify.weight")
    if classifier is None or classifier.ndim != 4:
        raise UserError(f"{path}: the segmentation net has no classifier where DeepLabV2 has it")
    if not 2 <= classifier.shape[0] <= 255:
        raise UserError(f"{path}: the segmentation net has {classifier.shape[0]} classes; it must have 2 to 255")
    shape = SegmentationShape("DeepLabV2", "resnet101", num_classes=classifier.shape[0])
    net = build_segmentation_net(shape)
    load_network(net, state, str(path))
    return shape, net.eval().requires_grad_(False)


def _our_name(name: str) -> str:
    for theirs, ours in _NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"backbone.{name}"
