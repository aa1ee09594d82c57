"""Images and labels of a list at their training size, from their files or from a cache on the disk.

A cache holds a memory-mapped array for each image and each label, made when it is first wanted. Its name is a
fingerprint of what it follows from: path, size and time of the file, the size, and how it is resized or read. Where one
of these changes, another array is made beside the first; arrays never change.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from data_handlers.choices import Resample
from data_handlers.images import image_size, read_label, read_resized
from data_handlers.lists import FileList
from utils.files import atomic_write, make_folder

FORMAT = 3  # to be raised when the code that reads or resizes images and labels changes its results


@dataclass(frozen=True)
class ResizedFiles:
    """The images and labels of a list at a size (W,H).

    Both methods take a position of the list and raise a `UserError` for a file that cannot be used. What they return is
    read-only where it comes from the cache.

    Attributes:
        cache_dir: folder of the cache, or '' for none.
    """

    files: FileList
    size: tuple[int, int]
    resample: Resample
    cache_dir: str = ""

    def image(self, index: int) -> np.ndarray:
        """The resized image, uint8 (H,W,3)."""
        path = self.files.image_file(self.files.images[index])
        return self._cached(lambda: read_resized(path, self.size, self.resample), [self.resample], path)

    def label(self, index: int) -> np.ndarray:
        """The label resized by taking the nearest pixel, trainIds uint8 (H,W)."""
        data_set, name = self.files.data_set, self.files.images[index]
        path, image = self.files.label_file(name), self.files.image_file(name)

        def read() -> np.ndarray:
            return read_label(path, data_set, image_size(image), self.size)

        ignored = None if data_set.ignored_values is None else sorted(data_set.ignored_values)
        return self._cached(read, [sorted(data_set.value_map.items()), ignored, data_set.storage], path, image)

    def _cached(self, read: Callable[[], np.ndarray], reading: list[object], *paths: Path) -> np.ndarray:
        """What `read` returns, kept in the cache under a fingerprint of how it reads and of the files it reads."""
        if not self.cache_dir or not all(path.exists() for path in paths):  # `read` says what is wrong
            return read()
        states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        name = hashlib.sha256(json.dumps([FORMAT, self.size, reading, states]).encode()).hexdigest()
        kept = Path(self.cache_dir) / name[:2] / f"{name[2:]}.npy"
        try:
            return np.load(kept, mmap_mode="r")
        except Exception:  # not there, or damaged: the parsers raise errors of many kinds
            array = read()
            make_folder(kept.parent, "--cache_dir")
            atomic_write(kept, partial(np.save, arr=array))
            return array
