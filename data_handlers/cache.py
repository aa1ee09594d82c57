"""Reading a cache of decoded, resized images (and labels) through the page cache of the operating system.

Decoding a PNG and resizing it takes far longer than anything else the loader does. With a cache a sample is a crop cut
out of a memory-mapped array. `data_handlers.cache_building` makes them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.files import read_json

UNUSABLE = "unusable.json"
OR_SKIP = "; or leave such images out with --on_bad_image skip"


class ImageCache:
    """A finished cache.

    Args:
        images: .npy file, uint8 (N,H,W,3).
        labels: .npy file, trainIds uint8 (N,H,W); None for a cache without labels.
    """

    def __init__(self, images: Path, labels: Path | None = None) -> None:
        self._files = {"images": images, "labels": labels}
        # Opened where it is read: every worker process maps the files itself.
        self._arrays: dict[str, np.ndarray] = {}
        self._unusable = {kind: unusable_files(path.parent) for kind, path in self._files.items() if path}

    def require_all_usable(self) -> None:
        """Check that the cache holds every image and label of its list.

        Raises:
            UserError: it was built with `--on_bad_image skip`, and names what that left out.
        """
        for reasons in self._unusable.values():
            for reason in reasons.values():
                raise UserError(f"{reason}{OR_SKIP}")

    def image(self, index: int) -> np.ndarray:
        """The resized image at a position of the list, uint8 (H,W,3), read-only.

        Raises:
            UserError: the file could not be used when the cache was built.
        """
        return self._at("images", index)

    def label(self, index: int) -> np.ndarray:
        """Its resized label, trainIds uint8 (H,W), read-only.

        Raises:
            UserError: the file could not be used when the cache was built.
            ValueError: the cache was opened without labels.
        """
        return self._at("labels", index)

    def _at(self, kind: str, index: int) -> np.ndarray:
        if reason := self._unusable.get(kind, {}).get(index):
            raise UserError(reason)
        return self._array(kind)[index]

    def _array(self, kind: str) -> np.ndarray:
        if kind not in self._arrays:
            path = self._files[kind]
            if path is None:
                raise ValueError("this cache was opened without labels")
            try:
                self._arrays[kind] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise UserError(f"cannot read the cache {path} any more ({error}); start again") from None
        return self._arrays[kind]

    def __getstate__(self) -> dict[str, object]:
        return {"_files": self._files, "_arrays": {}, "_unusable": self._unusable}


def unusable_files(folder: Path) -> dict[int, str]:
    """What is wrong with the files that a cache was built without, by position in the list."""
    path = folder / UNUSABLE
    return {int(index): reason for index, reason in read_json(path).items()} if path.exists() else {}
