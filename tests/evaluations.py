"""What the tests of evaluate.py share: small data sets with labels, random nets, command lines and true labels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from commands import command
from models.segmentation import build_segmentation_net
from models.shapes import SegmentationShape
from nets import checkpoint_of
from scoring import LABEL_IDS
from worlds import index_label, noise_image, write_cityscapes, write_gta5, write_synthia

CITY = "leftImg8bit/val/town/town_{:06d}_000019_leftImg8bit.png"
CITY_ALL = tuple(CITY.format(k) for k in range(3))


def save_unet(path, num_classes=19):
    """A random UNet that uses many classes: its logits have the mean 0 on a picture."""
    torch.manual_seed(5)
    shape = SegmentationShape("UNet", "none", num_classes)
    net = build_segmentation_net(shape).eval()
    with torch.no_grad():
        net.head.classify.weight *= 4
        picture = (torch.from_numpy(np.array(noise_image((48, 32), 0))).permute(2, 0, 1)[None] - 128.0) / 128.0
        net.head.classify.bias -= net(picture).mean(dim=(0, 2, 3))
    checkpoint_of(shape, net.state_dict()).save(path)


def write_world(tmp_path):
    """Three data sets, lists of some of their images, and nets of 19 and 16 classes; returns the folder."""
    write_cityscapes(tmp_path / "cityscapes", count=3, split="val")
    for k, path in enumerate(sorted((tmp_path / "cityscapes").rglob("*_labelIds.png"))):
        Image.fromarray(index_label((48, 32), k, (0, 7, 8, 11, 12, 17, 22, 26, 31, 33))).save(path)
    write_gta5(tmp_path / "gta5", count=6)
    write_synthia(tmp_path / "synthia", count=4)
    (tmp_path / "cityscapes.txt").write_text("town/town_000002_000019_leftImg8bit.png\n" + CITY.format(0))
    (tmp_path / "gta5.txt").write_text("00004.png\n")
    save_unet(tmp_path / "net.pth")
    save_unet(tmp_path / "net16.pth", 16)
    return tmp_path


def write_train_ids(root):
    """Labels that hold trainIds."""
    write_cityscapes(root, count=2, split="val")
    for k, path in enumerate(sorted(root.rglob("*_labelIds.png"))):
        Image.fromarray(index_label((48, 32), k, (0, 2, 8, 10, 13, 255))).save(path)


def evaluation_flags(world, **changes):
    flags = {
        "gpus": "cpu", "num_workers": 0, "weights": world / "net.pth", "data_dir": world / "cityscapes",
        "json": world / "scores.json", **changes,
    }  # fmt: skip
    return [str(word).replace("WORLD", str(world)) for word in command(flags)]


def truth(world, image):
    """TrainIds of an image's label, by our own tables."""
    if image.startswith("RGB"):
        ids = index_label((48, 32), int(image[4:-4]), (1, 2, 3, 8, 22, 0))
        return np.select([ids == 1, ids == 2, ids == 3, ids == 8], [10, 2, 0, 13], 255)
    data_set = "gta5" if image.startswith("images") else "cityscapes"
    label = (
        image.replace("images", "labels").replace("leftImg8bit/", "gtFine/").replace("leftImg8bit.", "gtFine_labelIds.")
    )
    ids = np.asarray(Image.open(world / data_set / label))
    return np.select([ids == label_id for label_id in LABEL_IDS], range(19), 255)
