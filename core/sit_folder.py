"""The folder of an exported SiT data set: which files it holds, and checks that no other files are overwritten."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_handlers.images import image_size
from data_handlers.lists import FileList, Listing
from utils.errors import UserError
from utils.files import atomic_write_json, check_folder, make_folder, read_json, remove_leftovers
from utils.png import RGB, SIGNATURE, PngHeader, is_complete_rgb8, read_png_header

FLAG = "--sit_output_path"
MANIFEST = "sit_manifest.json"
VARYING = ("images", "complete")  # all else in a manifest is equal for all images of a folder


def output_names(files: FileList) -> dict[str, str]:
    """Path below the output folder of every image: its own, with `.png`. Raises `UserError` where two are equal."""
    images: dict[str, str] = {}
    for image in files.images:
        output = os.path.splitext(image)[0] + ".png"
        if output in images:
            raise UserError(f"{files.root}: {images[output]} and {image} would both become {output}; rename one")
        images[output] = image
    return {image: output for output, image in images.items()}


@dataclass(frozen=True, kw_only=True)
class SitFolder:
    """The output folder of an export.

    Attributes:
        files: the source images.
        outputs: see `output_names`.
        manifest: describes the data set; all but the values named by `VARYING` hold for every image in the folder.
    """

    root: Path
    files: FileList
    outputs: Mapping[str, str]
    manifest: Mapping[str, Any]

    def folders(self) -> set[str]:
        """The folders of the outputs, relative to the root; '' is the root."""
        return {name.rpartition("/")[0] for name in self.outputs.values()}

    def check(self, keep_complete: bool) -> None:
        """Check that an export overwrites neither the source nor other files, and does not mix two exports.

        Args:
            keep_complete: complete images are kept, as with `--skip_created_files`.

        Raises:
            UserError: it would.
        """
        root, source = self.root, self.files.root
        check_folder(root, FLAG)
        if any(os.path.realpath(root / folder) == os.path.realpath(source / folder) for folder in self.folders()):
            raise UserError(f"{FLAG} {root} would overwrite the source images; choose another folder")
        if (root / MANIFEST).exists():
            held = read_json(root / MANIFEST)
            held = held if isinstance(held, dict) else {}
            for name in {**self.manifest, **held}:
                if name not in VARYING and held.get(name) != self.manifest.get(name):
                    raise UserError(
                        f"{FLAG} {root} holds images of another {name.replace('_', ' ')} (see its {MANIFEST}); choose "
                        "another folder, or delete that one"
                    )
            return
        listing = Listing(root)
        for image, output in self.outputs.items():
            if output not in listing:
                continue
            if not keep_complete:
                raise UserError(
                    f"{FLAG} {root} already holds images that this program did not write; choose another "
                    "folder, or keep the complete ones with --skip_created_files"
                )
            if not _may_be_translation(root / output, self.files.image_file(image)):
                raise UserError(
                    f"{root / output} is no translation of {image} but another file; choose another {FLAG}"
                )

    def make(self) -> None:
        """Make the folders, remove what an interrupted export left, write the manifest. The caller holds the lock."""
        for folder in {"", *self.folders()}:
            remove_leftovers(make_folder(self.root / folder, FLAG))
        self.write_manifest(complete=False)

    def write_manifest(self, complete: bool) -> None:
        """Write the manifest; `complete` says whether every image is there."""
        atomic_write_json(self.root / MANIFEST, {**self.manifest, "complete": complete})

    def incomplete(self) -> list[str]:
        """The images without a complete output that is newer than the image."""
        images = tqdm(self.outputs, desc="checking created files", unit="img", dynamic_ncols=True)
        return [image for image in images if not self._is_complete(image)]

    def _is_complete(self, image: str) -> bool:
        path, source = self.root / self.outputs[image], self.files.image_file(image)
        if not path.exists() or path.stat().st_mtime < source.stat().st_mtime:
            return False
        try:
            return is_complete_rgb8(path, image_size(source))
        except UserError:
            return False  # translating the image reports that it cannot be read


def _may_be_translation(path: Path, image: Path) -> bool:
    """Whether a file of unknown origin can be a translation of `image`, whole or truncated: no copy, no label."""
    data = path.read_bytes()
    if len(data) < 33:
        return SIGNATURE.startswith(data[: len(SIGNATURE)])
    return read_png_header(path) == PngHeader(*image_size(image), 8, RGB) and data != image.read_bytes()
