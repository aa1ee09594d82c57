"""Files of mmsegmentation with DDB's net: whole checkpoints of the DDB authors and of runs like theirs."""

from collections.abc import Mapping

from torch import Tensor

from models.deeplab_multi_files import backbone_of
from models.resnet import DEEP_STEM
from models.shapes import DDB_MODEL, SegmentationShape

# Of a self-training the student comes before its teacher; the frozen teachers in a file of a distillation are not read.
_PREFIXES = ("model.", "stu_model.", "ema_model.", "")
_CLASSIFIER = "decode_head.conv_seg.weight"
_NAMES = (
    (".conv_seg.", ".classify."), (".aspp_modules.", ".branches."), (".bottleneck.", ".adapter."), (".conv.", ".0."),
    (".bn.", ".1."),
)  # fmt: skip


def our_name(name: str) -> str:
    """Our name of a tensor of mmseg's net."""
    if not name.startswith("decode_head."):
        return name
    name = name.removeprefix("decode_")
    for theirs, ours in _NAMES:
        name = name.replace(theirs, ours)
    return name


def mmseg_net(state: Mapping[str, Tensor], origin: str) -> tuple[SegmentationShape, dict[str, Tensor]] | None:
    """Shape and tensors, by our names, of the net in a state dict of mmseg; None where there is none.

    Raises `UserError`, which names `origin`, for a backbone that is not known.
    """
    prefix = next((p for p in _PREFIXES if getattr(state.get(p + _CLASSIFIER), "ndim", 0) == 4), None)
    if prefix is None:
        return None
    parts = tuple(f"{prefix}{part}." for part in ("backbone", "decode_head"))
    found = {our_name(name.removeprefix(prefix)): value for name, value in state.items() if name.startswith(parts)}
    stem = DEEP_STEM if "backbone.stem.0.weight" in found else ""
    shape = SegmentationShape(DDB_MODEL, backbone_of(found, origin) + stem, len(found["head.classify.weight"]))
    return shape, found
