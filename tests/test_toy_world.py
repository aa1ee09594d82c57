"""The toy world: its scenes, its looks, and the files that make_toy_data.py writes."""

import contextlib
import dataclasses
import io
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

import make_toy_data
from data_handlers.classes import CITYSCAPES_IDS, SYNTHIA_IDS
from data_handlers.datasets import DATA_SETS
from data_handlers.images import read_image, read_label
from data_handlers.lists import list_images
from data_handlers.toy import TOY_DOMAINS as DOMAINS
from data_handlers.toy.files import draw_frame, encode_label, encode_png16
from data_handlers.toy.looks import LOOKS, Id, Material
from data_handlers.toy.world import draw_scene
from utils.errors import run_cli

REPOSITORY = Path(__file__).resolve().parent.parent
SIZE = (128, 64)


Done = namedtuple("Done", ["returncode", "stderr"])


def toy_data(*arguments):
    """Run make_toy_data.py's command line in this process, which saves the start of a new one."""
    error = io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["make_toy_data.py", *map(str, arguments)]),
        contextlib.redirect_stderr(error),
        pytest.raises(SystemExit) as stopped,
    ):
        run_cli(make_toy_data.main)
    return Done(stopped.value.code, error.getvalue())


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def frames():
    """Forty frames of each domain."""
    return {domain: [draw_frame(domain, 0, "train", k, SIZE) for k in range(40)] for domain in DOMAINS}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A set of two frames per domain, written by the command line."""
    roots = {}
    for domain in DOMAINS:
        roots[domain] = tmp_path_factory.mktemp(domain)
        done = toy_data("--out", roots[domain], "--domain", domain, "--count", 2, "--size", *SIZE, "--seed", 3)
        assert done.returncode == 0, done.stderr
    return roots


@pytest.mark.slow
def test_frames_have_matching_pictures_and_labels(frames):
    for pairs in frames.values():
        for picture, label in pairs:
            assert picture.shape == (SIZE[1], SIZE[0], 3)
            assert label.shape == (SIZE[1], SIZE[0])
            assert picture.dtype == label.dtype == np.uint8
            assert set(np.unique(label)) <= {*range(19), 255}


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_every_class_occurs_and_the_common_ones_dominate(frames, domain):
    counts = np.bincount(np.concatenate([label.ravel() for _, label in frames[domain]]), minlength=256)
    assert np.all(counts[:19] > 0)
    dominant = counts[[Id.ROAD, Id.WALK, Id.BUILDING, Id.PLANT, Id.SKY, Id.CAR]].sum()
    assert dominant > 0.75 * counts.sum()
    assert counts[Id.ROAD] == counts.max()


def test_label_follows_the_picture():
    """The same scene with one material recoloured changes only where the label says so."""
    look = LOOKS["synthia"]  # no blur, no noise; sharpening reaches one pixel further
    plain = draw_scene(np.random.default_rng(5), SIZE, look)
    dark = {**look.materials, "asphalt": Material(((0, 0, 0),))}
    changed = draw_scene(np.random.default_rng(5), SIZE, dataclasses.replace(look, materials=dark))
    assert np.array_equal(plain[1], changed[1])
    moved = np.abs(plain[0].astype(int) - changed[0]).max(axis=2) > 25
    assert moved[plain[1] == Id.ROAD].mean() > 0.6
    assert moved[plain[1] != Id.ROAD].mean() < 0.03


@pytest.mark.parametrize("size", [(32, 16), (33, 17), (64, 200)])
def test_unusual_sizes(size):
    picture, label = draw_frame("cityscapes", 0, "val", 0, size)
    assert picture.shape[:2] == label.shape == size[::-1]


def test_frames_are_deterministic_and_depend_on_every_part_of_their_name():
    first = draw_frame("gta5", 4, "train", 7, SIZE)
    again = draw_frame("gta5", 4, "train", 7, SIZE)
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    others = [("gta5", 5, "train", 7), ("gta5", 4, "val", 7), ("gta5", 4, "train", 8)]
    for other in others:
        assert not np.array_equal(first[1], draw_frame(*other, SIZE)[1])


def test_domains_show_different_scenes(frames):
    """Unpaired: no scene of one domain is a scene of another."""
    for a, b in (("gta5", "cityscapes"), ("synthia", "cityscapes"), ("gta5", "synthia")):
        for _, one in frames[a]:
            assert all(np.mean(one != other) > 0.05 for _, other in frames[b])


def test_domains_look_different(frames):
    def tone(domain, train_id):
        return np.concatenate([picture[label == train_id] for picture, label in frames[domain]]).mean(axis=0)

    means = {name: np.mean([picture.mean(axis=(0, 1)) for picture, _ in frames[name]], axis=0) for name in DOMAINS}
    for a, b in (("gta5", "cityscapes"), ("synthia", "cityscapes"), ("gta5", "synthia")):
        assert np.abs(means[a] - means[b]).max() > 10
    # The trap for a net trained on the game: dark road beside light sidewalk there, the reverse in the camera's look.
    assert tone("gta5", Id.ROAD).mean() + 40 < tone("gta5", Id.WALK).mean()
    assert tone("cityscapes", Id.ROAD).mean() > tone("cityscapes", Id.WALK).mean() + 15


def test_scene_of_the_same_seed_is_shared_by_all_looks():
    labels = [draw_scene(np.random.default_rng(2), SIZE, look)[1] for look in LOOKS.values()]
    assert np.mean(labels[0] == labels[1]) > 0.9


def test_gta5_files(sets):
    expected = {f"{d}/0000{k}.png" for d in ("images", "labels") for k in (1, 2)}
    assert {*contents(sets["gta5"])} == {"toy_world.json", *expected}
    with Image.open(sets["gta5"] / "labels" / "00001.png") as label:
        assert (label.mode, label.size) == ("P", SIZE)
        assert label.getpalette()[3 * 7:3 * 7 + 3] == [128, 64, 128]
        assert label.getpalette()[3 * 33:3 * 33 + 3] == [119, 11, 32]
        ids = set(np.unique(np.asarray(label)).tolist())
    assert ids <= {0, *CITYSCAPES_IDS}
    assert 7 in ids


def test_synthia_files(sets):
    expected = {f"{d}/000000{k}.png" for d in ("RGB", "GT/LABELS") for k in (0, 1)}
    assert {*contents(sets["synthia"])} == {"toy_world.json", *expected}
    data = (sets["synthia"] / "GT" / "LABELS" / "0000000.png").read_bytes()
    label = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
    assert (label.dtype, tuple(label.shape)) == (torch.uint16, (3, SIZE[1], SIZE[0]))
    assert {*np.unique(label[0].numpy()).tolist()} <= {0, *SYNTHIA_IDS}
    assert not label[2].numpy().any()


def test_cityscapes_files(sets):
    stems = [f"train/toytown/toytown_00000{k}_000019" for k in (0, 1)]
    expected = {f"leftImg8bit/{s}_leftImg8bit.png" for s in stems} | {f"gtFine/{s}_gtFine_labelIds.png" for s in stems}
    assert {*contents(sets["cityscapes"])} == {"toy_world.json", *expected}
    with Image.open(sets["cityscapes"] / "gtFine" / f"{stems[0]}_gtFine_labelIds.png") as label:
        assert (label.mode, label.size) == ("L", SIZE)


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_toolkit_reads_back_what_was_drawn(sets, domain):
    data_set = DATA_SETS[domain]
    files = list_images(data_set, sets[domain], "--src_data_dir")
    assert len(files) == 2
    for k, name in enumerate(files.images):
        picture, label = draw_frame(domain, 3, "train", k, SIZE)
        image = read_image(sets[domain] / name)
        assert np.array_equal(np.asarray(image), picture)
        assert np.array_equal(read_label(files.label_file(name), data_set, SIZE), label)


@pytest.mark.parametrize("domain", DOMAINS)
def test_label_encodings_keep_every_class(domain):
    label = np.resize(np.array([*range(19), 255], np.uint8), (8, 20))
    ids = {train_id: i for i, train_id in (SYNTHIA_IDS if domain == "synthia" else CITYSCAPES_IDS).items()} | {255: 0}
    expected = np.vectorize(ids.get)(label)
    data = encode_label(domain, label)
    if domain == "synthia":
        assert data[24:26] == bytes([16, 2])  # bit depth and colour type
        buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        found = decode_image(buffer, mode=ImageReadMode.UNCHANGED)[0].numpy()
    else:
        with Image.open(io.BytesIO(data)) as image:
            found = np.asarray(image)
    assert np.array_equal(found, expected)


def test_png16_keeps_16_bits():
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    data = torch.frombuffer(bytearray(encode_png16(pixels)), dtype=torch.uint8)
    found = decode_image(data, mode=ImageReadMode.UNCHANGED)
    assert found.dtype == torch.uint16
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)


def test_the_same_command_writes_the_same_files_and_more_frames_extend_a_set(sets, tmp_path):
    again = ("--out", tmp_path / "s", "--domain", "gta5", "--size", *SIZE, "--seed", 3, "--count")
    assert toy_data(*again, 2).returncode == 0
    before = contents(tmp_path / "s")
    assert before == contents(sets["gta5"])
    assert toy_data(*again, 3).returncode == 0
    after = contents(tmp_path / "s")
    assert len(after) == len(before) + 2
    assert all(after[name] == before[name] for name in before if name.endswith(".png"))


def test_cityscapes_splits_share_a_folder(tmp_path):
    common = ("--out", tmp_path, "--domain", "cityscapes", "--size", *SIZE, "--count", 1, "--split")
    for split in ("train", "val"):
        assert toy_data(*common, split).returncode == 0
    one, other = (list_images(DATA_SETS["cityscapes"], tmp_path, "--trg_data_dir", split) for split in ("train", "val"))
    assert (tmp_path / one.images[0]).read_bytes() != (tmp_path / other.images[0]).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--domain", "gta5", "--count", 0), "--count"),
        (("--domain", "gta5", "--count", "many"), "--count"),
        (("--domain", "gta5", "--size", 31, 16), "--size"),
        (("--domain", "gta5", "--size", 256), "--size"),
        (("--domain", "gta5", "--size", 90000, 16), "--size"),
        (("--domain", "gta5", "--seed", -1), "--seed"),
        (("--domain", "kitti"), "--domain"),
        (("--domain", "gta5", "--split", "val"), "--split"),
        (("--domain", "cityscapes", "--split", "test"), "--split"),
        ((), "--domain"),
    ],
)
def test_bad_flags_are_refused_in_one_line(tmp_path, arguments, named):
    done = toy_data("--out", tmp_path / "new", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert named in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change",
    [("--domain", "synthia"), ("--size", 64, 32), ("--seed", 4), ("--count", 1)],
)
def test_another_set_in_the_folder_is_refused_and_kept(sets, change):
    before = contents(sets["gta5"])
    same = ("--out", sets["gta5"], "--domain", "gta5", "--count", 2, "--size", *SIZE, "--seed", 3)
    done = toy_data(*same, *change)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "already holds" in done.stderr
    assert contents(sets["gta5"]) == before


def test_a_real_data_set_in_the_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "00001.png").write_bytes(b"a real frame")
    done = toy_data("--out", tmp_path, "--domain", "gta5", "--count", 1)
    assert done.returncode == 2
    assert "images/" in done.stderr
    assert {*contents(tmp_path)} == {"images/00001.png"}


def test_out_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("here")
    done = toy_data("--out", tmp_path / "file", "--domain", "gta5", "--count", 1)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--out" in done.stderr


def test_the_script_runs_on_its_own(sets, tmp_path):
    """A new process draws the same bytes: nothing depends on the process, such as hash seeds."""
    command = [sys.executable, "make_toy_data.py", "--out", tmp_path, "--domain", "gta5", "--count", "2", "--seed", "3"]
    done = subprocess.run([*command, "--size", *map(str, SIZE)], cwd=REPOSITORY, capture_output=True, check=False)
    assert done.returncode == 0
    assert contents(tmp_path) == contents(sets["gta5"])
