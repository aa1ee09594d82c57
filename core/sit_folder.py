"""The folder of an exported SiT data set: which files it holds, and checks that no other files are overwritten."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_handlers.lists import FileList, Listing
from utils.errors import UserError
from utils.files import atomic_write_json, check_folder, make_folder, read_json, remove_leftovers

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

    def check(self) -> None:
        """Check that an export overwrites neither the source nor other files, and does not mix two exports.

        Raises:
            UserError: it would.
        """
        root, source = self.root, self.files.root
        check_folder(root, FLAG)
        if any(os.path.realpath(root / folder) == os.path.realpath(source / folder) for folder in self.folders()):
            raise UserError(f"{FLAG} {root} would overwrite the source images; choose another folder")
        if (root / MANIFEST).exists():
            held = dict(read_json(root / MANIFEST))
            for name in {**self.manifest, **held}:
                if name not in VARYING and held.get(name) != self.manifest.get(name):
                    raise UserError(
                        f"{FLAG} {root} holds images of another {name.replace('_', ' ')} (see its {MANIFEST}); choose "
                        "another folder, or delete that one"
                    )
            return
        listing = Listing(root)
        if any(output in listing for output in self.outputs.values()):
            raise UserError(f"{FLAG} {root} holds images that this program did not write; choose another folder")

    def make(self) -> None:
        """Make the folders, remove what an interrupted export left, write the manifest. The caller holds the lock."""
        for folder in {"", *self.folders()}:
            remove_leftovers(make_folder(self.root / folder, FLAG))
        self.write_manifest(complete=False)

    def write_manifest(self, complete: bool) -> None:
        """Write the manifest; `complete` says whether every image is there."""
        atomic_write_json(self.root / MANIFEST, {**self.manifest, "complete": complete})

    def incomplete(self) -> list[str]:
        """The images without an output that is newer than the image; what is there is complete."""
        paths = {image: (self.root / output, self.files.image_file(image)) for image, output in self.outputs.items()}
        return [
            image
            for image, (path, source) in paths.items()
            if not path.exists() or path.stat().st_mtime < source.stat().st_mtime
        ]
