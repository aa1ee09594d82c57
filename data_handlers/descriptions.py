"""Descriptions of data sets: TOML files, whose keys docs/own-data.md explains; the known sets are such files, too.

This module imports nothing heavy, as the command lines read descriptions before anything else.
"""

import colorsys
import hashlib
import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data_handlers.classes import CATEGORIES, CLASS_COLOURS, CLASS_NAMES, ID_MAPS, SUBSETS
from utils.errors import UserError

FOLDER = Path(__file__).parent / "descriptions"
KEYS = {
    "": (
        "root", "classes", "colours", "categories", "scored", "resize", "crop", "held_out", "damaged",
        "not_for_training", "images", "labels", "split_file",
    ),
    "labels": ("replace", "suffix", "encoding", "map", "void"),
}  # fmt: skip
# What the files of labels hold: how `DataSet` calls the kind of values, and how they are stored.
ENCODINGS = {
    "ids": ("ids", "8-bit index"), "ids16": ("ids", "16-bit channel 0"), "trainids": ("trainids", "8-bit index"),
    "colours": ("ids", "colours"),
}  # fmt: skip


@dataclass(frozen=True)
class ListFile:
    """The images of a split by a file.

    Attributes:
        path: below the data set's root. A text file with one image a line, or with `variable` a MATLAB file.
        variable: holds the numbers of images; the image 00001.png has the number 1.
        within: the glob patterns of the images that are chosen from.
    """

    path: str
    variable: str = ""
    within: tuple[str, ...] = ()


def packed(colour: Sequence[Any]) -> Any:
    """A colour (R,G,B), integers or arrays of them, as one number, as which label files of colours are read."""
    return colour[0] << 16 | colour[1] << 8 | colour[2]


@dataclass(frozen=True)
class _Table:
    """A table of the file at `path`; `where` is its name."""

    path: Path
    content: Mapping[str, Any]
    where: str = ""

    def check_keys(self) -> None:
        for key in self.content:
            known = KEYS[self.where]
            if key not in known:
                self.refuse(key, f"no such key; {self.where or 'a description'} takes {', '.join(known)}")

    def refuse(self, key: str, problem: str) -> NoReturn:
        raise UserError(f"{self.path}: {f'{self.where}.' * bool(self.where)}{key}: {problem}")

    def value(self, key: str, fits: Callable[[Any], bool], wanted: str, default: Any = None) -> Any:
        """The value of a key. Raises `UserError`, which says what is `wanted`, for one that does not fit."""
        value = self.content.get(key, default)
        if key in self.content and not fits(value):
            self.refuse(key, f"{str(value)[:60]!r} must be {wanted}")
        return value

    def table(self, key: str) -> "_Table":
        return _Table(self.path, self.value(key, lambda v: isinstance(v, dict), "a table", {}), key)

    def names(self, key: str) -> tuple[str, ...]:
        return tuple(self.value(key, lambda v: _are(v, _is_name), "a list of texts", []))

    def size(self, key: str, default: Any) -> tuple[int, int]:
        fits = lambda v: _are(v, lambda n: _is_int(n, 1, 10**6)) and len(v) == 2  # noqa: E731
        return tuple(self.value(key, fits, "[width, height] in pixels", default))


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(fits, value))


def _is_colour(value: Any) -> bool:
    return _are(value, lambda level: _is_int(level, 0, 255)) and len(value) == 3


def read_description(path: Path) -> dict[str, Any]:
    """The fields of a `DataSet` from its description, but for its name.

    Raises `UserError`: missing, no TOML, an unknown key or a value that does not fit; names the file and the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the description ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no TOML: {error}; correct the line, --print_data gta5 shows an example") from None
    top = _Table(path, content)
    top.check_keys()
    classes = _classes(top)
    resize = top.size("resize", (1024, 512))
    fields = {
        "root": top.value("root", _is_name, "a folder", ""),
        "images": _images(top),
        "resize": resize,
        "crop": top.size("crop", resize),
        "held_out": top.value(
            "held_out", lambda v: _is_int(v, 0, 10**9) or (isinstance(v, float) and 0 < v < 1),
            "a number of images, or a fraction between 0 and 1", 0,
        ),
        "never_used": frozenset(top.names("damaged")),
        "not_for_training": frozenset(top.names("not_for_training")),
        **classes,
        **_labels(top.table("labels"), classes),
    }  # fmt: skip
    for side in range(2):
        if fields["crop"][side] > resize[side]:
            top.refuse("crop", f"{list(fields['crop'])} does not fit into resize {list(resize)}; lower it")
    fields["splits"] = _split_file(top, fields["images"]["train"])
    fields["fingerprint"] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return fields


def _classes(top: _Table) -> dict[str, Any]:
    """Names, colours, categories and scored classes."""
    given = top.value(
        "classes", lambda v: v == "cityscapes" or (_are(v, _is_name) and 2 <= len(set(v)) == len(v) <= 255),
        '"cityscapes" or a list of 2 to 255 different names', "cityscapes",
    )  # fmt: skip
    is_known = given == "cityscapes"
    names = CLASS_NAMES if is_known else tuple(given)
    every, is_class = tuple(range(len(names))), lambda value: _is_int(value, 0, len(names) - 1)
    colours = top.value(
        "colours", lambda v: _are(v, _is_colour) and len(v) == len(names),
        f"a list of {len(names)} colours [red, green, blue] of 0 to 255, one for each class",
        CLASS_COLOURS if is_known else [_distinct_colour(k) for k in every],
    )  # fmt: skip
    scored = top.value(
        "scored", lambda v: (is_known and isinstance(v, str) and v in SUBSETS) or _are(v, is_class),
        f"a list of trainIds 0 to {every[-1]}{f', or one of {list(SUBSETS)}' if is_known else ''}", list(every),
    )  # fmt: skip
    groups = top.table("categories").content
    for name, group in groups.items():
        if not _are(group, is_class):
            top.refuse(f"categories.{name}", f"must be a list of trainIds 0 to {every[-1]}")
    return {
        "class_names": names, "colours": tuple(map(tuple, colours)),
        "classes": SUBSETS[scored] if isinstance(scored, str) else tuple(scored),
        "categories": {name: tuple(group) for name, group in groups.items()} or (CATEGORIES if is_known else {}),
    }  # fmt: skip


def _distinct_colour(index: int) -> tuple[int, ...]:
    return tuple(round(255 * level) for level in colorsys.hsv_to_rgb(0.618 * index % 1.0, 0.7, 0.9))


def _images(top: _Table) -> dict[str, tuple[str, ...] | ListFile]:
    """Patterns or list file of every split."""
    found: dict[str, tuple[str, ...] | ListFile] = {}
    given = top.table("images").content
    if "train" not in given:
        top.refuse("images.train", 'missing; name the images, such as train = ["images/**/*.jpg"]')
    for split, rule in given.items():
        is_list = isinstance(rule, dict) and set(rule) == {"list"} and _is_name(rule["list"])
        if not is_list and not _are(rule, lambda pattern: _is_name(pattern) and ".." not in pattern.split("/")):
            top.refuse(f"images.{split}", f'{str(rule)[:60]!r} must be a list of globs or {{ list = "FILE" }}')
        within = tuple(given["train"]) if isinstance(given["train"], list) else ()
        found[split] = ListFile(rule["list"], within=within) if is_list else tuple(rule)
    return found


def _split_file(top: _Table, train: tuple[str, ...] | ListFile) -> dict[str, ListFile]:
    """The splits that a MATLAB file of the data set defines."""
    table = top.table("split_file")
    if table.content and not ("file" in table.content and all(map(_is_name, table.content.values()))):
        top.refuse("split_file", 'must hold file = "FILE.mat" and, for each split, the name of a variable')
    within = train if isinstance(train, tuple) else train.within
    variables = {split: name for split, name in table.content.items() if split != "file"}
    return {split: ListFile(table.content["file"], name, within) for split, name in variables.items()}


def _labels(table: _Table, classes: Mapping[str, Any]) -> dict[str, Any]:
    """How labels are found and read; no `[labels]`: there are none."""
    if not table.content:
        return {"label_path": (), "id_map": {}}
    table.check_keys()
    pairs = table.value(
        "replace",
        lambda v: _are(v, lambda p: isinstance(p, list) and len(p) == 2 and _is_name(p[0]) and (
            isinstance(p[1], str) or _are(p[1], _is_name))),
        'a list of pairs ["part of the image\'s path", "what stands there in the label\'s"]', [],
    )  # fmt: skip
    suffix = table.value("suffix", _is_name, 'the end of label files, such as ".png"', "")
    if not pairs and not suffix:
        table.refuse("replace", "missing; say how an image's path becomes its label's")
    choices = [new if isinstance(new, list) else [new] for _, new in pairs]
    paths = [
        tuple((old, new[min(k, len(new) - 1)]) for (old, _), new in zip(pairs, choices, strict=True))
        for k in range(max(map(len, choices), default=1))
    ]
    encoding = table.value(
        "encoding", lambda v: isinstance(v, str) and v in ENCODINGS, f"one of {', '.join(ENCODINGS)}", "ids"
    )
    labels, storage = ENCODINGS[encoding]
    void = table.value("void", lambda v: isinstance(v, list) and all(map(_value_of(encoding), v)),
                       "a list of ids, or with encoding = \"colours\" of colours")  # fmt: skip
    return {
        "label_path": paths[0], "other_label_paths": tuple(paths[1:]), "label_suffix": suffix, "labels": labels,
        "label_encoding": storage, "id_map": {} if labels == "trainids" else _map(table, encoding, classes),
        "void_ids": None if void is None else frozenset(packed(v) if encoding == "colours" else v for v in void),
    }  # fmt: skip


def _value_of(encoding: str) -> Callable[[Any], bool]:
    most = 65535 if encoding == "ids16" else 255
    return _is_colour if encoding == "colours" else lambda value: _is_int(value, 0, most)


def _map(table: _Table, encoding: str, classes: Mapping[str, Any]) -> dict[int, int]:
    """Id, or packed colour, -> trainId."""
    is_colours, count = encoding == "colours", len(classes["class_names"])
    given = table.content.get("map")
    if given is None and is_colours:
        return {packed(colour): train_id for train_id, colour in enumerate(classes["colours"])}
    if isinstance(given, str) and given in ID_MAPS and not is_colours:
        found = dict(ID_MAPS[given])
    else:
        example = '{ "128 64 128" = 0 }' if is_colours else f"{{ 7 = 0 }} or one of {', '.join(ID_MAPS)}"
        if not isinstance(given, dict) or not given:
            table.refuse("map", f"must say the trainId of each value in the label files, such as {example}")
        found = {}
        for key, train_id in given.items():
            words = key.split() if is_colours else [key]
            value = [int(word) for word in words if word.isdecimal() and len(word) < 6]
            if len(value) < len(words) or not _value_of(encoding)(value if is_colours else value[0]):
                table.refuse("map", f"{key[:60]!r} is no {'colour' if is_colours else 'id'}; write {example}")
            found[packed(value) if is_colours else value[0]] = train_id
    for train_id in found.values():
        if not _is_int(train_id, 0, count - 1):
            table.refuse("map", f"{str(train_id)[:60]} is no trainId; they are 0 to {count - 1}, one for each class")
    return found
