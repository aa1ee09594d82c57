"""Labels are what they say: ids or trainIds, as declared or as a flag says, and never one taken for the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import evaluate as evaluate_script
import train_procst
from commands import label_flags
from data_handlers.classes import CITYSCAPES_IDS
from data_handlers.datasets import DATA_SETS, DataSet, with_labels
from data_handlers.images import read_label
from data_handlers.labelled import CHECKED_LABELS, check_samples
from data_handlers.lists import list_images
from nets import save_net
from refusals import check_refusal, tree
from utils.errors import UserError
from worlds import index_label, write_cityscapes, write_gta5, write_png16, write_synthia

SIZE = (48, 32)
TRAIN_IDS = (*range(19), 255)
OWN = DataSet(
    name="own", images={"train": ("images/*.png",)}, label_path=(("images/", "labels/"),), id_map={}, resize=SIZE,
    crop=SIZE, labels="trainids", classes=(0, 1, 2), class_names=("a", "b", "c"),
)  # fmt: skip


def write_labels(root, data_set, values, count=4):
    """A data set whose labels hold the given values, each of them in every file."""
    if data_set == "cityscapes":
        write_cityscapes(root, count=count, size=SIZE)
    else:
        write_gta5(root, count=count, size=SIZE)
    for k, path in enumerate(sorted(root.rglob("labels/*.png")) + sorted(root.rglob("*_labelIds.png"))):
        label = index_label(SIZE, k, ids=values)
        label[0, : len(values)] = values
        Image.fromarray(label).save(path)
    return list_images(DATA_SETS[data_set], root, "--src_data_dir")


def label_file(files, k=0):
    return files.label_file(files.images[k])


# --- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data_set", ["gta5", "cityscapes"])
def test_trainids_are_read_as_they_are(tmp_path, data_set):
    files = write_labels(tmp_path, data_set, TRAIN_IDS)
    told = with_labels(files.data_set, "trainids", "--src_labels")
    np.testing.assert_array_equal(read_label(label_file(files), told, SIZE), np.asarray(Image.open(label_file(files))))
    check_samples(replace(files, data_set=told))


def test_a_palette_of_trainids_is_read_by_index(tmp_path):
    files = write_labels(tmp_path, "gta5", TRAIN_IDS)
    label = np.asarray(Image.open(label_file(files)))
    palette = Image.fromarray(label, mode="P")
    palette.putpalette([255 - value // 3 for value in range(768)])
    palette.save(label_file(files))
    told = with_labels(files.data_set, "trainids", "--src_labels")
    np.testing.assert_array_equal(read_label(label_file(files), told, SIZE), label)


def test_trainids_of_synthia_are_8_bit_files(tmp_path):
    write_synthia(tmp_path, count=2, size=SIZE)
    files = list_images(DATA_SETS["synthia"], tmp_path, "--src_data_dir")
    told = with_labels(files.data_set, "trainids", "--src_labels")
    with pytest.raises(UserError, match=r"0000000\.png.*16-bit RGB PNG.*--src_labels trainids.*hold trainIds"):
        read_label(label_file(files), told, SIZE)
    label = index_label(SIZE, 0, ids=TRAIN_IDS)
    Image.fromarray(label).save(label_file(files))
    np.testing.assert_array_equal(read_label(label_file(files), told, SIZE), label)
    with pytest.raises(UserError, match=r"0000000\.png.*16-bit.*--src_labels trainids"):
        read_label(label_file(files), files.data_set, SIZE)


def test_a_declaration_may_say_that_labels_hold_trainids(tmp_path):
    label = index_label(SIZE, 0, ids=(0, 1, 2, 255))
    Image.fromarray(label).save(tmp_path / "label.png")
    np.testing.assert_array_equal(read_label(tmp_path / "label.png", OWN, SIZE), label)
    Image.fromarray(np.full_like(label, 3)).save(tmp_path / "label.png")
    with pytest.raises(UserError, match=r"label\.png holds the value 3, .*0 to 2.*own's declaration"):
        read_label(tmp_path / "label.png", OWN, SIZE)


@pytest.mark.parametrize("value", [19, 33, 254])
def test_values_that_are_no_trainids(tmp_path, value):
    files = write_labels(tmp_path, "gta5", (0, 18, 255, value))
    told = with_labels(files.data_set, "trainids", "--labels")
    with pytest.raises(UserError, match=rf"0000\d\.png holds the value {value},.*--labels trainids"):
        check_samples(replace(files, data_set=told), flag="--labels")


def test_a_flag_that_does_not_fit():
    with pytest.raises(UserError, match="--src_labels trainids: folder has no labels"):
        with_labels(DATA_SETS["folder"], "trainids", "--src_labels")
    with pytest.raises(UserError, match="--src_labels ids: own declares no label ids"):
        with_labels(OWN, "ids", "--src_labels")
    assert with_labels(DATA_SETS["folder"], "", "--src_labels") is DATA_SETS["folder"]


# --- what was not said ----------------------------------------------------------------------------------


@pytest.mark.parametrize("data_set", ["gta5", "cityscapes"])
@pytest.mark.parametrize("values", [TRAIN_IDS, (0, 1, 2, 255), (8, 255)], ids=["all", "few", "no 1 to 6"])
def test_labels_that_look_like_trainids_are_refused(tmp_path, capsys, data_set, values):
    files = write_labels(tmp_path, data_set, values)
    for flag in ("--src_labels", "--trg_labels", "--labels"):
        with pytest.raises(UserError, match=f"look like trainIds.* {flag} trainids, or {flag} ids"):
            check_samples(files, flag=flag, skip=flag == "--labels")
    check_samples(files, labels=False)
    for labels in ("ids", "trainids"):
        check_samples(replace(files, data_set=with_labels(files.data_set, labels, "--src_labels")))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("values", [(0, 1, 2, 10), (7, 8, 11, 6), (1,)], ids=str)
def test_labels_that_may_be_trainids_get_a_warning(tmp_path, capsys, values):
    files = write_labels(tmp_path, "gta5", values)
    check_samples(files, flag="--trg_labels")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: labels in {tmp_path} hold only the values {', '.join(map(str, sorted(values)))},")
    assert line.endswith("say --trg_labels trainids, otherwise --trg_labels ids")
    for labels in ("ids", "trainids"):
        check_samples(replace(files, data_set=with_labels(files.data_set, labels, "--src_labels")))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [(0, 7, 8, 11), (7,), (0,), (255,), (7, 8, 11, 21, 23, 26), (1, 2, 6, 19), (7, 26, 255), tuple(range(34)), (0, 7)],
    ids=str,
)
def test_labels_that_are_ids_get_no_warning(tmp_path, capsys, values):
    """The first are CARLA's and CamVid's, rewritten as Cityscapes' ids of road, sidewalk and building."""
    check_samples(write_labels(tmp_path, "gta5", values))
    assert not capsys.readouterr().err


def test_an_id_in_one_of_the_sampled_labels_is_enough(tmp_path, capsys):
    files = write_labels(tmp_path, "gta5", (0, 7, 11, 255), count=2 * CHECKED_LABELS)
    with pytest.raises(UserError, match="look like trainIds"):
        check_samples(files)
    Image.fromarray(np.full((SIZE[1], SIZE[0]), 26, np.uint8)).save(label_file(files, 2))
    check_samples(files)
    assert not capsys.readouterr().err


def test_data_sets_with_other_ids_are_believed(tmp_path, capsys):
    files = write_labels(tmp_path / "gta", "gta5", (0, 1, 2, 255))
    known = DATA_SETS["cityscapes"].void_ids | set(CITYSCAPES_IDS)
    own_map = replace(files.data_set, id_map={1: 0, 2: 1}, void_ids=known)
    check_samples(replace(files, data_set=own_map))
    write_synthia(tmp_path / "synthia", count=3, size=SIZE)  # holds the ids 1, 2, 3, 8, 22 and 0
    synthia = list_images(DATA_SETS["synthia"], tmp_path / "synthia", "--src_data_dir")
    check_samples(synthia)
    assert not capsys.readouterr().err
    # 255 is no id of SYNTHIA, so trainIds that were stored in 16 bits are refused.
    channels = np.zeros((SIZE[1], SIZE[0], 3), np.uint16)
    channels[0, 0, 0] = 255
    write_png16(label_file(synthia), channels)
    with pytest.raises(UserError, match=r"0000000\.png holds the id 255"):
        check_samples(synthia)


# --- scripts --------------------------------------------------------------------------------------------


def test_trainids_are_neither_scored_nor_trained_on_as_ids(tmp_path, run_script):
    net_file = save_net(tmp_path / "net.pth")
    write_gta5(tmp_path / "gta", count=4, size=(60, 44))
    write_cityscapes(tmp_path / "cityscapes", count=3, size=(64, 40), labels=False)
    write_cityscapes(tmp_path / "cityscapes", count=2, size=(64, 40), split="val")
    scored = ("--gpus", "cpu", "--weights", net_file, "--data_dir", tmp_path / "cityscapes", "--num_workers", 0)
    trained = label_flags(tmp_path, tmp_path / "out", net_file, on_bad_image="skip")
    for path in (tmp_path / "cityscapes").rglob("*_labelIds.png"):
        Image.fromarray(index_label((64, 40), 0, ids=TRAIN_IDS)).save(path)
    before = tree(tmp_path)
    check_refusal(run_script(evaluate_script, *scored), "look like trainIds", "--labels trainids")
    check_refusal(run_script(train_procst, *trained), "look like trainIds", "--trg_labels trainids")
    for path in (tmp_path / "cityscapes").rglob("*_labelIds.png"):
        Image.fromarray(index_label((64, 40), 0)).save(path)
    for path in (tmp_path / "gta/labels").iterdir():
        Image.fromarray(index_label((60, 44), 0, ids=TRAIN_IDS)).save(path)
    check_refusal(run_script(train_procst, *trained), "look like trainIds", "--src_labels trainids")
    assert tree(tmp_path).keys() == before.keys()
