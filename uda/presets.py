"""The published settings of train_uda.py by name, from presets.toml. No PyTorch here."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.flags import as_given, flag_of, option
from utils.errors import UserError

_TABLES: dict[str, dict[str, Any]] = {}
for _name, _own in tomllib.loads(Path(__file__).with_name("presets.toml").read_text(encoding="utf-8")).items():
    _TABLES[_name] = {**(_TABLES[_own.pop("like")] if "like" in _own else {}), **_own}
NAMES = tuple(_TABLES)


def preset(name: str) -> Mapping[str, Any]:
    """The values of a preset by the names of their flags. Raises `UserError`, which names those there are."""
    if name not in NAMES:
        raise UserError(f"--preset {name}: no such preset; there are {', '.join(NAMES)}")
    return {key: tuple(v) if isinstance(v, list) else v for key, v in _TABLES[name].items() if key != "about"}


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
        flags = (flag_of(key) + f" {as_given(value)}" * (value is not True) for key, value in preset(name).items())
        lines += [f"{name}: {_TABLES[name]['about']}", f"    python train_uda.py {' '.join(flags)}"]
    return "\n".join(lines)
