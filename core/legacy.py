"""Reading files that the authors' code wrote: pickled whole modules, without executing what the pickle names.

The unpickler resolves a fixed list of names that rebuild tensors, to stand-ins of ours, turns the known module classes
into inert records and refuses everything else. No class or function of the file is imported or called.
"""

from __future__ import annotations

import collections
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.networks import Generator, NetworkShape, freeze
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from utils.errors import UserError
from utils.tensor_files import check_archive, load_network

_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}

# Module classes that may stand in a file; their instances become records, the classes are never imported.
RECORD_CLASSES = frozenset(
    {
        ("core.models", "ProCSTGenerator"),
        ("core.models", "ConvBlockProCST"),
        ("torch.nn.modules.container", "Sequential"),
        ("torch.nn.modules.container", "ModuleList"),
        ("torch.nn.modules.conv", "Conv2d"),
        ("torch.nn.modules.batchnorm", "BatchNorm2d"),
        ("torch.nn.modules.normalization", "GroupNorm"),
        ("torch.nn.modules.activation", "LeakyReLU"),
        ("torch.nn.modules.activation", "Tanh"),
        ("torch.nn.parallel.data_parallel", "DataParallel"),
        ("semseg_models.deeplabv2", "ResNet101"),
        ("semseg_models.deeplabv2", "Bottleneck"),
        ("semseg_models.deeplabv2", "Classifier_Module2"),
        ("semseg_models.deeplabv2", "SEBlock"),
        ("torch.nn.modules.activation", "ReLU"),
        ("torch.nn.modules.activation", "Sigmoid"),
        ("torch.nn.modules.dropout", "Dropout2d"),
        ("torch.nn.modules.linear", "Linear"),
        ("torch.nn.modules.loss", "CrossEntropyLoss"),
        ("torch.nn.modules.pooling", "AdaptiveAvgPool2d"),
        ("torch.nn.modules.pooling", "MaxPool2d"),
    }
)


class Held:
    """A tensor or storage while unpickling: nothing the pickle does can reach the tensor's own methods."""

    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of a tensor")


class Rebuilder:
    """A callable the pickle may use and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of a function")


class Record:
    """What is left of a pickled object: the name of its class and its attributes."""

    def __init__(self, class_name: str) -> None:
        self.class_name = class_name
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise pickle.UnpicklingError(f"{self.class_name} has a state of type {type(state).__name__}")
        self.attributes = state

    def _table(self, name: str) -> dict[str, Any]:
        table = self.attributes.get(name, {})
        if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
            raise TypeError(f"a {self.class_name} of it is malformed")
        return table

    def child(self, name: str) -> Any:
        """Submodule of that name, or None."""
        return self._table("_modules").get(name)

    def named_records(self, prefix: str = "") -> Iterator[tuple[str, Record]]:
        """All submodules under the names `nn.Module.named_modules` would give them."""
        for name, child in self._table("_modules").items():
            if isinstance(child, Record):
                yield prefix + name, child
                yield from child.named_records(f"{prefix}{name}.")

    def state_dict(self, prefix: str = "") -> dict[str, Tensor]:
        """All parameters and buffers under the names `nn.Module.state_dict` would give them."""
        tensors = {}
        for kind in ("_parameters", "_buffers"):
            for name, value in self._table(kind).items():
                if isinstance(value, Held):
                    tensors[prefix + name] = value.tensor
        for name, child in self._table("_modules").items():
            if isinstance(child, Record):
                tensors.update(child.state_dict(f"{prefix}{name}."))
        return tensors


def _record_class(name: str) -> type[Record]:
    """A fresh class whose instances are records; `pickle` creates them by `cls.__new__(cls)`, without arguments."""

    class NamedRecord(Record):
        def __new__(cls) -> NamedRecord:
            record = super().__new__(cls)
            Record.__init__(record, name)
            return record

        def __init__(self) -> None:
            """Everything is set in `__new__`, the only thing unpickling calls."""

    return NamedRecord


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_rest: Any) -> Held:
    """Stands in for `torch._utils._rebuild_tensor_v2`; the tensor must lie inside its storage and not repeat it."""
    if not isinstance(storage, Held) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor without a storage")
    flat = storage.tensor
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *size, *stride)):
        raise pickle.UnpicklingError(f"a tensor of size {size}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= flat.numel() or math.prod(size) > flat.numel()):
        raise pickle.UnpicklingError(f"a tensor of size {size} that reaches past its storage")
    return Held(flat.as_strided(tuple(size), tuple(stride), offset).clone())


def _rebuild_parameter(data: Any, *_rest: Any) -> Held:
    """Stands in for `torch._utils._rebuild_parameter`: a parameter is read as the plain tensor it holds."""
    if not isinstance(data, Held):
        raise pickle.UnpicklingError("a parameter without a tensor")
    return data


def _forget_device(*_arguments: Any) -> None:
    """Stands in for `torch.device`, which a DataParallel wrapper made on a GPU names; everything is read on the CPU."""


_REBUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"): Rebuilder(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Rebuilder(_rebuild_parameter),
    ("torch", "device"): Rebuilder(_forget_device),
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    **{("torch", name): dtype for name, dtype in _STORAGE_DTYPES.items()},
}


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, root: str, pickle_name: str) -> None:
        super().__init__(archive.open(pickle_name))
        self._archive = archive
        self._root = root
        self._storages: dict[str, Held] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _REBUILDERS:
            return _REBUILDERS[module, name]
        if (module, name) in RECORD_CLASSES:
            return _record_class(name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs; nothing was executed")

    def persistent_load(self, identifier: Any) -> Held:
        """A storage, as a flat tensor on the CPU whatever device it was saved from."""
        if not (isinstance(identifier, tuple) and len(identifier) == 5 and identifier[0] == "storage"):
            raise pickle.UnpicklingError("an unknown kind of storage")
        _, dtype, key, _device, numel = identifier
        if not isinstance(dtype, torch.dtype) or not isinstance(numel, int) or not str(key).isdigit():
            raise pickle.UnpicklingError("an unknown kind of storage")
        if key not in self._storages:
            name = f"{self._root}/data/{key}"
            # Before reading: an archive can claim to unpack to far more than it should hold.
            if self._archive.getinfo(name).file_size != numel * dtype.itemsize:
                raise pickle.UnpicklingError(f"storage {key} has the wrong size")
            data = bytearray(self._archive.read(name))
            self._storages[key] = Held(torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype))
        return self._storages[key]


def read_inert(path: Path) -> Any:
    """Unpickle a file that `torch.save` wrote, with module instances as `Record`s and tensors on the CPU.

    Raises:
        UserError: not such a file, damaged, or naming anything outside the fixed lists.
    """
    check_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise pickle.UnpicklingError("it holds no data.pkl")
            return _InertUnpickler(archive, pickles[0].split("/")[0], pickles[0]).load()
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    # A pickle is a program: a damaged or hostile one can make the unpickler fail in any way, and each means the same.
    except Exception as error:
        raise UserError(f"{path}: cannot be read as a trained model: {error}") from None


def load_legacy_generators(path: Path) -> list[Generator]:
    """The frozen generators, coarse to fine, of the authors' `Gst.pth` (specification section 5).

    Raises:
        UserError: the file is not a pickled list of ProCST generators.
    """
    try:
        return _generators_of(read_inert(path), path)
    except RecursionError:
        raise UserError(f"{path}: a module of it contains itself") from None
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None


def _generators_of(records: Any, path: Path) -> list[Generator]:
    if not isinstance(records, Sequence) or not records:
        raise UserError(f"{path}: holds a {type(records).__name__}, not the list of generators of a Gst.pth")
    generators = []
    for scale, record in enumerate(records):
        if isinstance(record, Record) and record.class_name == "DataParallel":
            record = record.child("module")
        if not isinstance(record, Record) or record.class_name != "ProCSTGenerator":
            raise UserError(f"{path}: entry {scale} is not a ProCST generator")
        generator = Generator(_shape_of(record, scale, path))
        load_network(generator, record.state_dict(), f"{path}, scale {scale},")
        generators.append(freeze(generator))
    return generators


def _shape_of(record: Record, scale: int, path: Path) -> NetworkShape:
    """Read a generator's shape off its weights and norms."""
    try:
        head_weight = record.state_dict()["head.conv.weight"]
        blocks = [
            record.child("head"),
            *record.child("body").attributes["_modules"].values(),
            next(iter(record.child("tail").attributes["_modules"].values())),
        ]
        norms = [norm for norm in (block.child("norm") for block in blocks) if norm is not None]
        channels, inputs, kernel = head_weight.shape[0], head_weight.shape[1], head_weight.shape[2]
        kinds = {norm.class_name for norm in norms}
        # Where no block has a norm, `groups` is a number that divides no width, so the group rule gives none either.
        groups = next((n.attributes["num_groups"] for n in norms if n.class_name == "GroupNorm"), channels + inputs)
    except (KeyError, AttributeError, IndexError, TypeError, StopIteration) as error:
        raise UserError(f"{path}: the generator of scale {scale} is not complete ({error})") from None
    if not (kinds <= {"BatchNorm2d"} or kinds <= {"GroupNorm"}):
        raise UserError(f"{path}: the generator of scale {scale} mixes norms: {', '.join(sorted(kinds))}")
    return NetworkShape(
        scale=scale,
        channels=channels,
        layers=len(blocks),
        norm="batch" if "BatchNorm2d" in kinds else "group",
        groups=groups,
        image_channels=inputs if scale == 0 else inputs // 2,
        kernel_size=kernel,
    )


# The authors' names of the parts of DeepLabV2 -> ours; the stages of the backbone keep their names.
_SEGMENTATION_NAMES = (
    ("layer5.conv2d_list.", "head.branches."),
    ("layer5.bottleneck.0.se.0.", "head.squeeze.reduce."),
    ("layer5.bottleneck.0.se.2.", "head.squeeze.expand."),
    ("layer5.bottleneck.1.", "head.fuse."),
    ("layer5.bottleneck.2.", "head.fuse_norm."),
    ("layer5.head.1.", "head.classify."),
)

# What a module computes and the shapes of its weights do not show.
_SETTINGS = {
    "Conv2d": ("stride", "padding", "dilation", "groups", "padding_mode"),
    "BatchNorm2d": ("eps",),
    "GroupNorm": ("num_groups", "eps"),
    "MaxPool2d": ("kernel_size", "stride", "padding", "ceil_mode"),
}


def load_legacy_segmentation(path: Path) -> tuple[SegmentationShape, nn.Module]:
    """The authors' `pretrained_semseg_on_*.pth` (specification section 5): its shape and the net, frozen, on the CPU.

    Raises:
        UserError: the file is not a pickled DeepLabV2 on ResNet-101.
    """
    try:
        record = read_inert(path)
        if isinstance(record, Record) and record.class_name == "DataParallel":
            record = record.child("module")
        if not isinstance(record, Record) or record.class_name != "ResNet101":
            raise UserError(f"{path}: holds no segmentation net of the authors")
        return _segmentation_net_of(record, path)
    except RecursionError:
        raise UserError(f"{path}: a module of it contains itself") from None
    except TypeError as error:
        raise UserError(f"{path}: {error}") from None


def _segmentation_net_of(record: Record, path: Path) -> tuple[SegmentationShape, nn.Module]:
    state = {_own_name(name): tensor for name, tensor in record.state_dict().items()}
    classifier = state.get("head.classify.weight")
    if classifier is None or classifier.ndim != 4:
        raise UserError(f"{path}: the segmentation net has no classifier where DeepLabV2 has it")
    if not 2 <= classifier.shape[0] <= 255:
        raise UserError(f"{path}: the segmentation net has {classifier.shape[0]} classes; it must have 2 to 255")
    shape = SegmentationShape("DeepLabV2", "resnet101", num_classes=classifier.shape[0])
    net = build_segmentation_net(shape)
    load_network(net, state, str(path))
    modules = dict(net.named_modules())
    for name, part in record.named_records():
        own = modules.get(_own_name(f"{name}.").removesuffix("."))
        for attribute in _SETTINGS.get(part.class_name, ()) if type(own).__name__ == part.class_name else ():
            if part.attributes.get(attribute) != getattr(own, attribute):
                raise UserError(f"{path}: {name} has {attribute} {part.attributes.get(attribute)}, not DeepLabV2's")
    return shape, freeze(net)


def _own_name(name: str) -> str:
    for theirs, ours in _SEGMENTATION_NAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return f"backbone.{name}"
