"""Descriptions of data sets: what each key does, what is refused, and the commands of docs/own-data.md as written."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import create_sit_dataset
import evaluate
import measure_domain_distance
import train_procst
import train_semseg_on_source
import train_uda
from commands import command, only_run, procst_flags, source_flags, stop_at
from core.procst import ProCST
from data_handlers.classes import ALL_19, CITYSCAPES_IDS, CLASS_NAMES
from data_handlers.datasets import DATA_SETS, DESCRIPTIONS, find_data_set, with_split
from data_handlers.images import read_label
from data_handlers.label_maps import colourise
from data_handlers.labelled import check_samples
from data_handlers.lists import list_images, require_labels
from data_handlers.splits import train_and_validation
from pages import OWN_DATA, OWN_DESCRIPTION, commands_of
from refusals import check_refusal
from utils.errors import UserError
from worlds import index_label, noise_image, write_gta5, write_synthia

SIZE = (48, 48)
COLOURS = ((0, 0, 255), (0, 160, 0), (128, 64, 128), (70, 70, 70))
BASE = """
classes = ["a", "b", "c"]
resize = [64, 32]
[images]
train = ["img/*.jpg"]
[labels]
replace = [["img/", "lbl/"]]
suffix = ".png"
"""


def described(folder, text, name="own.toml"):
    path = folder / name
    path.write_text(text)
    return str(path)


def write_frames(root, count=10, places=("a", "b/c")):
    """JPEG frames of four classes with labels of RGB colours, as `frames.toml` of the page describes them."""
    for k in range(count):
        place = root / places[k % len(places)]
        for folder in ("rgb", "mask"):
            (place / folder).mkdir(parents=True, exist_ok=True)
        noise_image(SIZE, k).save(place / f"rgb/{k:04d}.jpg")
        train_ids = index_label(SIZE, k, ids=(0, 1, 2, 3, 255))
        Image.fromarray(colourise(train_ids, COLOURS)).save(place / f"mask/{k:04d}.png")
    return root


def write_photos(root, count=4):
    (root / "inner").mkdir(parents=True)
    for k, name in zip(range(count), ("a.png", "inner/b.JPG", "inner/c.jpeg", "d.jpg"), strict=True):
        with open(root / name, "wb") as file:
            noise_image(SIZE, 50 + k).save(file, "PNG" if name == "a.png" else "JPEG")
    return root


@pytest.fixture
def frames(tmp_path, monkeypatch):
    """The working directory holds `frames`, `photos`, `renders` and `frames.toml`."""
    monkeypatch.chdir(tmp_path)
    write_frames(tmp_path / "frames")
    write_photos(tmp_path / "photos")
    write_photos(tmp_path / "renders")
    described(tmp_path, OWN_DESCRIPTION, "frames.toml")
    return tmp_path


# --- the page ------------------------------------------------------------------------------------------------------

TINY = {
    "train_procst": {
        "src_resize": (52, 48), "trg_resize": (48, 48), "crop_size": (48, 36), "base_channels_list": 8,
        "batch_size_list": (2, 2, 1), "steps_per_scale": 2, "vgg_weights": "random", "content_layers": 6,
        "style_layers": (3, 6), "tb_logs_dir": "logs",
    },
    "train_semseg_on_source": {
        "src_resize": SIZE, "crop_size": (32, 32), "num_steps": 4, "batch_size": 2, "model": "UNet",
        "lr_semseg": 1e-2, "tb_logs_dir": "logs",
    },
    "train_uda": {"crop_size": 32, "num_round": 1, "epoch_per_round": 1, "init_src_port": 0.5,
                  "max_src_port": 0.5, "tb_logs_dir": "logs"},
    "evaluate": {}, "create_sit_dataset": {},
}  # fmt: skip


def run_page(run_script, section):
    """Run the commands of a section of the page, with flags that make them small."""
    results = []
    for line in commands_of(section):
        words = shlex.split(line)
        script = words[1].removesuffix(".py")
        small = {"gpus": "cpu", "num_workers": 0, **TINY[script]}
        if script == "train_procst" and "--semseg_weights" in words:
            small["model"] = "UNet"
        result = run_script(importlib.import_module(script), *words[2:], *command(small))
        assert result.code == 0, f"{line}: {result.err}"
        results.append(result)
    return results


def section_of(title):
    (text,) = re.findall(rf"^## {title}\n(.*?)^## ", OWN_DATA, re.DOTALL | re.MULTILINE)
    return text


@pytest.mark.slow
def test_two_folders_of_pictures(frames, run_script):
    assert len(run_page(run_script, section_of("From two folders of pictures to SiT in five minutes"))) == 3
    for folder in ("look", "other"):
        root = frames / "data" / folder
        written = {str(path.relative_to(root)) for path in root.rglob("*.png")}
        assert written == {"a.png", "d.png", "inner/b.png", "inner/c.png"}


@pytest.mark.slow
def test_a_set_of_four_classes(frames, run_script):
    section = section_of("A labelled set: four classes, frames of 512x512")
    trained, scored, translated, *_ = run_page(run_script, section)
    assert "UNet with 4 classes" in trained.out
    assert re.findall(r"^(\w+)  +(?:\d|absent)", scored.out, re.MULTILINE)[:4] == ["water", "land", "road", "building"]
    assert "2 images in" in scored.out  # the last fifth of 10
    assert "semseg" in translated.out.lower() or "label" in translated.out.lower()
    assert len(list((frames / "data/frames_sit").rglob("*.png"))) == 10
    saved = frames / "saved"
    flags = {"gpus": "cpu", "num_workers": 0, "weights": "frames.pth", "data_set": "frames.toml"}
    flags["save_predictions"] = saved
    assert run_script(evaluate, *command({**flags, "prediction_format": "colour"})).code == 0
    pixels = {tuple(p) for path in saved.rglob("*.png") for p in np.asarray(Image.open(path)).reshape(-1, 3).tolist()}
    assert pixels <= set(COLOURS)
    check_refusal(run_script(evaluate, *command({**flags, "save_predictions": "x", "prediction_format": "labelids"})),
                  "--prediction_format labelids", "frames")  # fmt: skip


# --- encodings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "values", "train_ids"),
    [
        ('encoding = "ids"\nmap = { 7 = 0, 9 = 2 }\nvoid = [1]', (7, 9, 1), (0, 2, 255)),
        ('encoding = "ids"\nmap = { 7 = 0, 9 = 2 }', (7, 9, 77), (0, 2, 255)),
        ('encoding = "trainids"', (0, 2, 255), (0, 2, 255)),
        ('encoding = "colours"\nmap = { "1 2 3" = 1, "4 5 6" = 0 }\nvoid = [[7, 8, 9]]',
         ((1, 2, 3), (4, 5, 6), (7, 8, 9)), (1, 0, 255)),
    ],
)  # fmt: skip
def test_an_encoding(tmp_path, labels, values, train_ids):
    data_set = find_data_set(described(tmp_path, BASE + labels), "--source")
    pixels = np.array(values, np.uint8)[None].repeat(2, axis=0)
    Image.fromarray(pixels).save(tmp_path / "label.png")
    found = read_label(tmp_path / "label.png", data_set, (3, 2))
    np.testing.assert_array_equal(found, np.array(train_ids, np.uint8)[None].repeat(2, axis=0))


def test_an_unknown_colour_and_a_label_without_colours(tmp_path):
    colours = 'encoding = "colours"\nmap = { "1 2 3" = 1 }\nvoid = [[0, 0, 0]]'
    data_set = find_data_set(described(tmp_path, BASE + colours), "--source")
    Image.fromarray(np.array([[(1, 2, 3), (1, 2, 4)]], np.uint8)).save(tmp_path / "label.png")
    with pytest.raises(UserError, match=r"label\.png holds the colour \(1, 2, 4\), which own does not know; is this"):
        read_label(tmp_path / "label.png", data_set, (2, 1))
    Image.fromarray(np.zeros((1, 2), np.uint8)).save(tmp_path / "label.png")
    with pytest.raises(UserError, match=r"8-bit grey PNG, but own labels are 8-bit RGB PNGs of class colours"):
        read_label(tmp_path / "label.png", data_set, (2, 1))


def test_defaults_and_class_sets(tmp_path):
    bare = find_data_set(described(tmp_path, '[images]\ntrain = ["*.png"]'), "--source")
    assert (bare.name, bare.class_names, bare.classes, bare.resize, bare.crop) == (
        "own", CLASS_NAMES, ALL_19, (1024, 512), (1024, 512))  # fmt: skip
    assert not bare.has_labels
    assert bare.default_root == "data/own"
    text = "categories = { x = [0, 2] }\nscored = [0, 1]" + BASE + "map = { 1 = 0 }"
    own = find_data_set(described(tmp_path, text), "--source")
    assert (own.categories, own.classes, own.crop) == ({"x": (0, 2)}, (0, 1), (64, 32))
    assert len(set(own.colours)) == 3


def test_synthia_with_labels_of_8_bits(tmp_path):
    root = write_synthia(tmp_path, count=3, size=SIZE)
    sixteen = list_images(DATA_SETS["synthia"], root, "--src_data_dir")
    expected = [read_label(sixteen.label_file(name), sixteen.data_set, SIZE) for name in sixteen.images]
    assert "GT/LABELS, 16-bit" in sixteen.describe()
    for folder in ("GT/labels", "labels"):
        (root / folder).mkdir(parents=True)
        for k, name in enumerate(sixteen.images):
            label = Image.fromarray(index_label(SIZE, k, ids=(1, 2, 3, 8, 22, 0)))
            label.save(root / folder / name.removeprefix("RGB/"))
        if folder == "GT/labels":
            shutil.rmtree(root / "GT/LABELS")
        files = list_images(DATA_SETS["synthia"], root, "--src_data_dir")
        assert f"labels in {root / folder}, 8-bit index" in files.describe()
        require_labels(files, "--src_data_dir")
        check_samples(files)
        for name, label in zip(files.images, expected, strict=True):
            np.testing.assert_array_equal(read_label(files.label_file(name), files.data_set, SIZE), label)
        shutil.rmtree(root / folder)
    other = tmp_path / "other"  # the labels of a SiT set are in another root
    (other / "labels").mkdir(parents=True)
    for k in range(3):
        Image.fromarray(index_label(SIZE, k, ids=(1, 2, 3))).save(other / f"labels/{k:07d}.png")
    for files in train_and_validation(DATA_SETS["synthia"], root, "--src_data_dir", val_count=1, label_root=other):
        assert files.data_set.storage == "8-bit index"


# --- mistakes ------------------------------------------------------------------------------------------------------

MISTAKES = {
    "colour = 1": r"own\.toml: colour: no such key; a description takes root, classes, .*split_file",
    "resize = [0, 3]": r"own\.toml: resize: .*\[width, height\] in pixels",
    "crop = [99999, 9]": r"crop: \[99999, 9\] does not fit into resize",
    "held_out = 1.5": r"held_out: '1\.5' must be a number of images, or a fraction",
    "held_out = true": r"held_out: ",
    'damaged = "x"': r"damaged: .*list of texts",
    "root = 3": r"root: '3' must be a folder",
    "scored = [3]": r"scored: .*trainIds 0 to 2",
    'scored = "synthia16"': r"scored: ",
    "colours = [[0, 0, 0]]": r"colours: .*3 colours",
    "categories = { x = [7] }": r"categories\.x: .*trainIds 0 to 2",
    "split_file = { train = 'x' }": r"split_file: must hold file =",
    "x = [": r"own\.toml is no TOML: .*line",
}  # fmt: skip
OTHER_MISTAKES = {
    "": r"own\.toml: images\.train: missing",
    'classes = "streets"': r'classes: .*"cityscapes" or a list',
    "images = 3": r"images: '3' must be a table",
    "[images]\ntrain = 'x'": r"images\.train: 'x' must be a list of globs or \{ list",
    "[images]\ntrain = ['../x']": r"images\.train: ",
    BASE + "suffixes = 1": r"labels\.suffixes: no such key; labels takes replace, suffix, encoding, map, void",
    BASE + "encoding = 'rgb'": r"labels\.encoding: 'rgb' must be one of ids, ids16, trainids, colours",
    BASE: r"labels\.map: must say the trainId",
    BASE + "map = 'streets'": r"labels\.map: must say .*cityscapes, synthia",
    BASE + "map = { 7 = 3 }": r"labels\.map: 3 is no trainId; they are 0 to 2",
    BASE + "map = { 300 = 1 }": r"labels\.map: '300' is no id",
    BASE + "map = { x = 1 }": r"labels\.map: 'x' is no id",
    BASE + 'encoding = "colours"\nmap = { "1 2" = 1 }': r"labels\.map: '1 2' is no colour",
    BASE + "map = { 1 = 1 }\nvoid = [[1, 2, 3]]": r"labels\.void: .*list of ids",
    BASE.replace('suffix = ".png"', "suffix = 3"): r"labels\.suffix: ",
    BASE.replace('[["img/", "lbl/"]]', '["img/", "lbl/"]'): r"labels\.replace: .*pairs",
    '[images]\ntrain = ["*.png"]\n[labels]\nmap = { 7 = 0 }': r"labels\.replace: missing",
}  # fmt: skip


def without(line):
    """The base with a wrong line, in the place of the right one where it has the key."""
    return line + "\n" + re.sub(rf"^{line.split()[0]} = .*\n", "", BASE, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("text", "line"), [*((without(key) + "map = { 1 = 0 }", line) for key, line in MISTAKES.items()),
                       *OTHER_MISTAKES.items()],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_file_and_key(tmp_path, text, line):
    with pytest.raises(UserError, match=line) as refusal:
        find_data_set(described(tmp_path, text), "--source")
    assert str(tmp_path / "own.toml") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_what_names_no_data_set(tmp_path, run_script, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for script, flag in ((train_procst, "source"), (train_procst, "target"), (train_semseg_on_source, "source"),
                         (create_sit_dataset, "source"), (measure_domain_distance, "target"), (evaluate, "data_set")):
        needed = {create_sit_dataset: ("--sit_output_path", "x", "--translator", "fda"), evaluate: ("--weights", "x")}
        for value in ("gta55", "none.toml"):
            result = run_script(script, f"--{flag}", value, *needed.get(script, ()))
            check_refusal(result, value, "known data set" if value == "gta55" else "cannot read the description")
    described(tmp_path, "x = 1")
    check_refusal(run_script(train_procst, "--source", "own.toml"), "own.toml: x: no such key")


# --- printed, copied and edited ------------------------------------------------------------------------------------


def test_a_printed_description_is_the_data_set(tmp_path, run_script):
    for name, data_set in DATA_SETS.items():
        for script in (train_procst, train_semseg_on_source, create_sit_dataset, evaluate, measure_domain_distance):
            result = run_script(script, "--print_data", name)
            assert (result.code, result.out) == (0, (DESCRIPTIONS / f"{name}.toml").read_text())
        copy = find_data_set(described(tmp_path, result.out, f"{name}.toml"), "--source")
        assert replace(copy, fingerprint="") == data_set
    check_refusal(run_script(train_procst, "--print_data", "gta"), "--print_data gta", "gta5")


@pytest.mark.slow
def test_a_continued_run_refuses_an_edited_description(world, tmp_path, run_script, monkeypatch):
    text = (DESCRIPTIONS / "gta5.toml").read_text()
    monkeypatch.chdir(tmp_path)
    path = described(tmp_path, text)
    flags = procst_flags(world, tmp_path, source="own.toml")
    with monkeypatch.context() as patch:
        stop_at(patch, ProCST, 0, 1)
        assert run_script(train_procst, *flags).code == 75
    run = only_run(tmp_path)
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["source"]["source"] == path
    again = ("--continue_train_from_path", run)
    described(tmp_path, text.replace("held_out = 500", "held_out = 400"))
    check_refusal(run_script(train_procst, *again), "the description of the source data set is not the one")
    described(tmp_path, "# a comment changes nothing\n" + text)
    assert run_script(train_procst, *again).code == 0


# --- splits --------------------------------------------------------------------------------------------------------


def test_the_splits_of_gta5(tmp_path, run_script):
    root = write_gta5(tmp_path / "gta", count=8, size=(60, 44))
    savemat(root / "split.mat", {"trainIds": [[5], [1], [8], [2]], "valIds": [[3], [7]], "testIds": [[4], [6]]})
    names = {split: tuple(f"images/{k:05d}.png" for k in numbers)
             for split, numbers in {"train": (1, 2, 5, 8), "val": (3, 7), "test": (4, 6)}.items()}  # fmt: skip
    for split, images in names.items():
        assert list_images(with_split(DATA_SETS["gta5"], split), root, "--src_data_dir").images == images
    train, val = train_and_validation(with_split(DATA_SETS["gta5"], "train"), root, "--src_data_dir")
    assert (train.images, val.images) == (names["train"], names["val"])
    result = run_script(
        train_semseg_on_source,
        *source_flags(tmp_path, tmp_path / "out", src_split="train", val_count=None, num_steps=1), "--dry_run",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "gta5: 4 images" in result.out
    assert "validating on gta5: 2 images" in result.out
    savemat(root / "split.mat", {"trainIds": [[9], [1]]})
    with pytest.raises(UserError, match=r"split\.mat: 1 of the 2 images of trainIds are not in .* number 9"):
        list_images(with_split(DATA_SETS["gta5"], "train"), root, "--src_data_dir")
    with pytest.raises(UserError, match=r"split\.mat holds no variable valIds; its variables: trainIds"):
        list_images(with_split(DATA_SETS["gta5"], "val"), root, "--src_data_dir")
    (root / "split.mat").unlink()
    check_refusal(run_script(train_semseg_on_source, *source_flags(tmp_path, tmp_path, src_split="test")), "split.mat")
    with pytest.raises(UserError, match="--src_split dev: gta5 has no such split; it has train, val, test"):
        with_split(DATA_SETS["gta5"], "dev")


def test_splits_by_glob_list_and_fraction(tmp_path):
    for k in range(10):
        path = tmp_path / f"world/{'ab'[k % 2]}/deep/{k}.{('png', 'JPG', 'jpeg')[k % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "world/val.txt").write_text("b/deep/1.JPG\n# a comment\n3.png\nb/deep/3.png\n".replace("3.png\nb", "b"))
    text = '[images]\ntrain = ["a/**/*.*", "**/*.png"]\nval = { list = "val.txt" }\n'
    own = find_data_set(described(tmp_path, text), "--source")
    train = list_images(own, tmp_path / "world", "--source").images
    assert train == ("a/deep/0.png", "a/deep/2.jpeg", "a/deep/4.JPG", "a/deep/6.png", "a/deep/8.jpeg",
                     "b/deep/3.png", "b/deep/9.png")  # fmt: skip
    assert list_images(own, tmp_path / "world", "--source", split="val").images == ("b/deep/1.JPG", "b/deep/3.png")
    first, _ = train_and_validation(own, tmp_path / "world", "--source")
    assert first.images == tuple(name for name in train if "/3" not in name)
    fraction = find_data_set(described(tmp_path, "held_out = 0.3\n" + text.partition("val")[0]), "--source")
    first, last = train_and_validation(fraction, tmp_path / "world", "--source")
    assert (first.images, last.images) == (train[:5], train[5:])


# --- pictures without labels, and SiT sets of JPEG images ----------------------------------------------------------


@pytest.mark.slow
def test_nothing_asks_for_labels_without_label_losses(world, tmp_path, run_script):
    shutil.copytree(world / "gta/images", tmp_path / "bare/images")
    flags = procst_flags(world, tmp_path, src_data_dir=tmp_path / "bare")
    assert run_script(train_procst, *flags, "--dry_run").code == 0
    check_refusal(run_script(train_semseg_on_source, *source_flags(world, tmp_path, src_data_dir=tmp_path / "bare")),
                  "have no label")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["**/rgb/*.jpg", "**/rgb/*.{jpg,jpeg}", "**/rgb/*.[jJ][pP]*[gG]"])
def test_a_sit_set_of_jpeg_images_is_read_by_the_same_description(frames, run_script, tmp_path, pattern):
    described(tmp_path, OWN_DESCRIPTION.replace("**/rgb/*.jpg", pattern), "frames.toml")
    if "{" in pattern:
        (frames / "frames/b/c/rgb/0003.jpg").rename(frames / "frames/b/c/rgb/0003.jpeg")
    own = find_data_set("frames.toml", "--source")
    source = list_images(own, "frames", "--src_data_dir")
    translators = {"gpus": "cpu", "translator": "histogram", "source": "frames.toml", "target": "photos",
                   "num_workers": 0, "sit_output_path": "sit"}  # fmt: skip
    result = run_script(create_sit_dataset, *command(translators))
    assert result.code == 0, result.err
    files = list_images(own, "sit", "--src_data_dir")
    assert [name.rpartition(".")[0] for name in files.images] == [name.rpartition(".")[0] for name in source.images]
    assert files.image_file(files.images[0]).suffix == ".png"
    for changes in ({"source_images": "sit", "cache_dir": "cache"}, {"src_data_dir": "sit", "src_label_dir": "frames"}):
        flags = {"source": "frames.toml", "src_data_dir": None, "val_count": None, "src_resize": SIZE,
                 "crop_size": (32, 32), "num_steps": 2, "run_dir": "net", "checkpoints_dir": None}  # fmt: skip
        flags = {**flags, **changes, "num_classes": 6, "output": ""}
        shutil.rmtree("net", ignore_errors=True)
        result = run_script(train_semseg_on_source, *source_flags(frames, frames / "out", **flags))
        assert result.code == 0, result.err
        assert f"8 images in {frames / 'sit'}" in result.out
        adapted = {"gpus": "cpu", "init": "net", "source": "frames.toml", "target": "photos", "crop_size": 32,
                   "batch_size": 2, "num_round": 1, "init_src_port": 1, "max_src_port": 1, "num_workers": 0,
                   "run_dir": f"uda_{'src_label_dir' in changes}"}  # fmt: skip
        changes.pop("cache_dir", None)
        result = run_script(train_uda, *command(adapted, changes))
        assert result.code == 0, result.err
        assert re.search(r"round 0: .*(water|land|road|building|class 4|class 5) 0\.", result.out)
    distances = {"gpus": "cpu", "source": "frames.toml", "target": "photos", "sit_data_dir": "sit", "size": (32, 32),
                 "vgg_weights": "random"}  # fmt: skip
    result = run_script(measure_domain_distance, *command(distances))
    assert result.code == 0, result.err
    assert "SiT-target" in result.out
    listed = frames / "list.txt"
    listed.write_text(source.images[3])
    assert list_images(own, "sit", "--src_data_dir", list_file=str(listed)).images == source.images[3:4]
    listed.write_text("\n".join(source.images[-2:]))
    split = train_and_validation(own, "sit", "--src_data_dir", val_list=str(listed), label_root="frames")
    assert list(map(len, split)) == [8, 2]


def test_ids_of_the_toolkit_are_known_by_name(tmp_path):
    own = find_data_set(described(tmp_path, BASE.replace('classes = ["a", "b", "c"]', "") + 'map = "cityscapes"'), "")
    assert own.id_map == CITYSCAPES_IDS
