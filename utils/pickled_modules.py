"""Files in which whole modules were pickled, read without importing or executing what they name.

`torch.load(weights_only=True)` reads them. Module classes allowed by name become `Record`s, which keep what the file
says; any other class or function is refused.
"""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError
from utils.tensor_files import read_tensor_file

_LAYERS = (
    "container.Sequential", "container.ModuleList", "conv.Conv2d", "linear.Linear", "batchnorm.BatchNorm2d",
    "normalization.GroupNorm", "activation.ReLU", "activation.LeakyReLU", "activation.Sigmoid", "activation.Tanh",
    "dropout.Dropout2d", "loss.CrossEntropyLoss", "pooling.AdaptiveAvgPool2d", "pooling.MaxPool2d",
)  # fmt: skip
_TORCH_CLASSES = ("torch.nn.parallel.data_parallel.DataParallel", *(f"torch.nn.modules.{name}" for name in _LAYERS))


class Record:
    """What a file holds of a pickled module: its `__dict__` as `attributes`, with records in place of submodules."""

    attributes: dict[str, Any]

    def __new__(cls) -> "Record":  # unpickling does not call `__init__`
        record = super().__new__(cls)
        record.attributes = {}
        return record

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"a {self.class_name} of it has a state of type {type(state).__name__}")
        self.attributes = dict(state)

    @property
    def class_name(self) -> str:
        """Name of the module's class, without its package."""
        return type(self).__name__

    def child(self, name: str) -> "Record | None":
        """Submodule of that name, None where there is none."""
        return dict(self.children()).get(name)

    def children(self) -> Iterator[tuple[str, "Record"]]:
        """Submodules with their names."""
        return ((k, v) for k, v in self.attributes.get("_modules", {}).items() if isinstance(v, Record))

    def state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers under the names that `nn.Module.state_dict` would give them."""
        own = {**self.attributes.get("_parameters", {}), **self.attributes.get("_buffers", {})}
        tensors = {name: value.detach() for name, value in own.items() if isinstance(value, Tensor)}
        for prefix, child in self.children():
            tensors |= {f"{prefix}.{name}": value for name, value in child.state_dict().items()}
        return tensors

def read_pickled_modules(path: Path, class_names: Collection[str]) -> Any:
    """Read a file in which `torch.save` pickled a module, or a list of modules. Raises `UserError`.

    Args:
        class_names: full names of allowed classes, besides layers of PyTorch. They need not exist.

    Returns:
        What the file holds, with `Record`s in place of modules, and of what DataParallel wraps in place of it.
    """
    stubs = [(type(name.rpartition(".")[2], (Record,), {}), name) for name in (*class_names, *_TORCH_CLASSES)]
    with torch.serialization.safe_globals(stubs):
        content = read_tensor_file(path)
        if content is None:
            raise UserError(f"{path}: cannot be read as a trained model: {_refused(path)}; nothing was executed")
    try:
        return [_unwrapped(entry) for entry in content] if isinstance(content, list) else _unwrapped(content)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as a trained model: a module of it is malformed ({error})") from None


def _unwrapped(entry: Any) -> Any:
    if not isinstance(entry, Record):
        return entry
    entry.state_dict()  # fails here where a part of it is malformed
    return entry.child("module") if entry.class_name == "DataParallel" else entry


def _refused(path: Path) -> str:
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # whatever a reader makes of arbitrary bytes
        names = []
    return f"it names {names[0]}, which no such file needs" if names else "it holds more than modules and tensors"
