"""The export through the command line: what is written, completed, kept, and never overwritten."""

from __future__ import annotations

import json
import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

import create_sit_dataset
import train_procst
from commands import export_flags, only_run, procst_flags
from core.trained_generators import load_trained_generators
from processes import in_use
from refusals import check_refusal, tree
from utils.tensor_files import weights_fingerprint
from worlds import is_whole, noise_image, write_gta5, write_png16


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """The folder of a run of two scales, whose configuration names the source."""
    out = tmp_path_factory.mktemp("trained")
    return train(out, procst_flags(world, out, num_scales=1, batch_size_list=(2, 2), steps_per_scale=1))


def train(out, flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_procst.py", *map(str, flags)])
        train_procst.main()
    return only_run(out)


@pytest.fixture
def source(world, tmp_path):
    """A copy of the source, to be changed."""
    return shutil.copytree(world / "gta", tmp_path / "gta")


@pytest.fixture
def export(run_script, trained, source, tmp_path):
    """Run the export of the copied source: export(*flags, **changes); `sit` is where it goes."""

    def run(*words, **changes):
        flags = export_flags(trained, tmp_path / "sit", **{"src_data_dir": source, **changes})
        return run_script(create_sit_dataset, *flags, *words)

    return run


def pixels_of(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_native_sizes_at_any_batch_size(export, source, tmp_path):
    noise_image((70, 52), 9).save(source / "images" / "00007.png")
    noise_image((60, 44), 8).convert("P").save(source / "images" / "00008.png")
    noise_image((60, 44), 8).convert("RGBA").save(source / "images" / "15188.png")
    results = {}
    for batch_size in (1, 3):
        out = tmp_path / f"sit{batch_size}"
        result = export(sit_output_path=out, batch_size=batch_size)
        assert result.code == 0, result.err
        assert "9 SiT images" in result.out
        assert "images/s" in result.out
        assert sorted(path.name for path in out.iterdir()) == [".lock", "images", "sit_manifest.json"]
        results[batch_size] = pixels_of(out / "images")
        assert set(results[batch_size]) == {path.name for path in (source / "images").iterdir()}
        assert is_whole(out / "images" / "00007.png", (70, 52))
    for name, one in results[1].items():
        assert np.abs(one.astype(int) - results[3][name]).max() <= 1, name
    assert results[1]["00001.png"].std() > 0


@pytest.mark.processes
def test_two_exports_never_write_to_one_folder(export, tmp_path):
    """The second one would remove the temporary files of the first."""
    temporary = tmp_path / "sit/images/.00001.png.abc.procst-tmp"
    temporary.parent.mkdir(parents=True)
    temporary.write_bytes(b"of the first one")
    with in_use(tmp_path / "sit"):
        check_refusal(export("--skip_created_files"), "--sit_output_path", "another process")
    assert [path.name for path in temporary.parent.iterdir()] == [temporary.name]


def test_what_is_there_is_kept(export, tmp_path):
    out = tmp_path / "sit"
    assert export().code == 0
    whole = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    (out / "images/00003.png").unlink()
    stamp = (out / "images/00001.png").stat().st_mtime_ns
    result = export("--skip_created_files")
    assert result.code == 0, result.err
    assert "1 translated" in result.out
    assert "5 were already there" in result.out
    assert {path.name: path.read_bytes() for path in (out / "images").iterdir()} == whole
    assert (out / "images/00001.png").stat().st_mtime_ns == stamp
    assert json.loads((out / "sit_manifest.json").read_text())["complete"] is True


def test_a_plain_folder_of_pictures(export, tmp_path):
    (tmp_path / "pictures").mkdir()
    noise_image((50, 40), 1).save(tmp_path / "pictures" / "one.jpg")
    noise_image((50, 40), 2).save(tmp_path / "pictures" / "two.png")
    result = export(source="folder", src_data_dir=tmp_path / "pictures")
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "sit").glob("*.png")) == ["one.png", "two.png"]


def test_the_source_is_that_of_the_run(run_script, trained, tmp_path):
    assert run_script(create_sit_dataset, *export_flags(trained, tmp_path / "sit")).code == 0
    assert len(list((tmp_path / "sit/images").iterdir())) == 6


def test_run_folder_and_checkpoints_hold_the_same_generators(trained):
    names = ("", "latest.pth", "scale_1.pth")
    prints = {weights_fingerprint(*load_trained_generators(trained / name).generators) for name in names}
    assert len(prints) == 1


def test_a_run_that_has_not_reached_its_last_scale(export, trained, tmp_path):
    check_refusal(export(trained_procst_path=trained / "scale_0.pth"), "scale 0 of 0..1")
    assert not (tmp_path / "sit").exists()


def test_the_source_and_foreign_images_are_never_overwritten(export, source, tmp_path):
    before = tree(source)
    check_refusal(export(sit_output_path=source), "overwrite the source")
    (tmp_path / "alias").mkdir()
    (tmp_path / "alias/images").symlink_to(source / "images")
    check_refusal(export("--skip_created_files", sit_output_path=tmp_path / "alias"), "overwrite the source")
    write_gta5(tmp_path / "other", count=1)
    for words in ((), ("--skip_created_files",)):
        check_refusal(export(*words, sit_output_path=tmp_path / "other"), "did not write")
    assert tree(source) == before


def test_a_replaced_source_image_is_translated_again(export, source, tmp_path):
    assert export().code == 0
    old = (tmp_path / "sit/images/00002.png").read_bytes()
    noise_image((60, 44), 99).save(source / "images/00002.png")
    assert "1 translated" in export("--skip_created_files").out
    assert (tmp_path / "sit/images/00002.png").read_bytes() != old


def test_two_sources_or_two_models_are_not_mixed(export, world, tmp_path):
    assert export().code == 0
    write_gta5(tmp_path / "gta2", count=4, size=(60, 44), seed=50)
    out = tmp_path / "second"
    other = train(out, procst_flags(world, out, num_scales=0, batch_size_list=2, steps_per_scale=1))
    before = tree(tmp_path)
    check_refusal(export(src_data_dir=tmp_path / "gta2"), "source folder")
    check_refusal(export("--skip_created_files", trained_procst_path=other), "another generators")
    assert tree(tmp_path) == before
    (tmp_path / "sit/sit_manifest.json").write_text("[]")
    check_refusal(export(), "sit_manifest.json")


def test_images_that_cannot_be_translated(export, source):
    write_png16(source / "images/00009.png", np.full((20, 30, 3), 0x1234, dtype=np.uint16))
    check_refusal(export(), "00009.png", "8 bits")


def test_a_truncated_image_stops_the_export_until_its_repair(export, source, tmp_path):
    for k in range(7, 11):
        noise_image((60, 44), k).save(source / f"images/{k:05d}.png")
    path = source / "images/00004.png"  # not among the few that are read before the export
    good = path.read_bytes()
    path.write_bytes(good[:900])
    check_refusal(export(), path, "truncated")
    assert sorted(p.name for p in (tmp_path / "sit/images").iterdir()) == [f"{k:05d}.png" for k in range(1, 4)]
    path.write_bytes(good)
    result = export("--skip_created_files")
    assert result.code == 0, result.err
    assert "7 translated" in result.out


def test_flipped_bytes_in_a_checkpoint_never_give_a_traceback(export, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(run / "latest.pth") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    refused = 0
    for _ in range(6):
        with zipfile.ZipFile(run / "latest.pth", "w") as archive:
            for name, data in entries.items():
                if name.endswith("data.pkl"):
                    # Only in the first part: a changed storage length can ask for any amount of memory.
                    place = int(rng.integers(2, 400))
                    data = data[:place] + bytes([int(rng.integers(256))]) + data[place + 1 :]
                archive.writestr(name, data)
        result = export(trained_procst_path=run)
        assert result.code in (0, 2), result.err
        refused += result.code == 2
        shutil.rmtree(tmp_path / "sit", ignore_errors=True)
    assert refused > 2
