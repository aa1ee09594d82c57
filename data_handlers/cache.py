"""Reading a cache of resized images and labels; `data_handlers.cache_building` builds it.

Decoding and resizing an image takes longer than everything else that a loader does. With a cache, a sample is a crop of
a memory-mapped array. A cache is one folder for the images and one for the labels, so that runs with and without labels
share the images. Each folder holds an array and a manifest, and never changes.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from utils.errors import UserError

ARRAY = "array.npy"
MANIFEST = "cache.json"
OR_SKIP = "; or leave such images out with --on_bad_image skip"


def read_unusable(folder: Path) -> dict[int, str]:
    """What was wrong with the files that a cache was built without, by position in the list.

    Raises:
        OSError, ValueError, ...: the folder holds no manifest, or a damaged one.
    """
    manifest = json.loads((folder / MANIFEST).read_bytes())
    return {int(index): str(reason) for index, reason in manifest["unusable"].items()}


class ImageCache:
    """A finished cache.

    Args:
        images: folder with the images, uint8 (N,H,W,3).
        labels: folder with the labels, trainIds uint8 (N,H,W); None for a cache without labels.
    """

    def __init__(self, images: Path, labels: Path | None = None) -> None:
        self._folders = {"images": images} | ({"labels": labels} if labels else {})
        self._unusable = {kind: read_unusable(folder) for kind, folder in self._folders.items()}
        self._arrays: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, object]:
        # Every worker process maps the files itself; a pickled memory map would be a copy of the array.
        return self.__dict__ | {"_arrays": {}}

    def require_all_usable(self) -> None:
        """Check that the cache holds every image and label of its list.

        Raises:
            UserError: the cache was built with `--on_bad_image skip` and lacks a file; names the first one.
        """
        for kind, reasons in self._unusable.items():
            for reason in reasons.values():
                again = f"if the file is sound by now, delete {self._folders[kind]}, which was built without it"
                raise UserError(f"{reason}{OR_SKIP}; {again}")

    def image(self, index: int) -> np.ndarray:
        """The resized image at a position of the list, uint8 (H,W,3), read-only.

        Raises:
            UserError: the file could not be used when the cache was built.
        """
        return self._at("images", index)

    def label(self, index: int) -> np.ndarray:
        """The resized label at a position of the list, trainIds uint8 (H,W), read-only.

        Raises:
            UserError: the file could not be used when the cache was built.
            ValueError: the cache was opened without labels.
        """
        if "labels" not in self._folders:
            raise ValueError("this cache was opened without labels")
        return self._at("labels", index)

    def _at(self, kind: str, index: int) -> np.ndarray:
        if reason := self._unusable[kind].get(index):
            raise UserError(reason)
        if kind not in self._arrays:
            path = self._folders[kind] / ARRAY
            try:
                self._arrays[kind] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read the cache {path} any more ({error}); start again") from None
        return self._arrays[kind][index]
