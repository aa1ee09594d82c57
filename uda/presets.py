"""The published settings of train_uda.py by name, from presets.toml. No PyTorch here."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.flags import as_given, flag_of, option
from utils.errors import UserError

_CONTENT = tomllib.loads(Path(__file__).with_name("presets.toml").read_text(encoding="utf-8"))
_SHARED = {name: value for name, value in _CONTENT.items() if not isinstance(value, dict)}
NAMES = tuple(name for name in _CONTENT if name not in _SHARED)


def preset(name: str) -> Mapping[str, Any]:
    """The values of a preset by the names of their flags. Raises `UserError`, which names those there are."""
    if name not in NAMES:
        raise UserError(f"--preset {name}: no such preset; there are {', '.join(NAMES)}")
    own = {key: value for key, value in _CONTENT[name].items() if key != "about"}
    values = {**own, **_SHARED, **own}  # its own come first
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


@dataclass(frozen=True)
class PresetFlags:
    """Flags that stand for others."""

    preset: str = option(
        "", "a published setting by its name (--list_presets); flags that are given override it", type=preset
    )
    list_presets: bool = option(False, "print the presets, each with the command that it stands for, and end")


def listing() -> str:
    """Each preset with a line about it and the command that it stands for."""
    lines = []
    for name in NAMES:
        flags = " ".join(f"{flag_of(key)} {as_given(value)}" for key, value in preset(name).items())
        lines += [f"{name}: {_CONTENT[name]['about']}", f"    python train_uda.py {flags}"]
    return "\n".join(lines)
