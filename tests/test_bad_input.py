"""Bad input to training and export that takes more than a command line to tell; see `bad_cases` for the many others."""

from __future__ import annotations

import shutil
import zipfile

import numpy as np
import pytest
import torch

import create_sit_dataset
import train_procst
from refusals import check_refusal, tree
from test_train_cli import export_flags, only_run, training_flags
from worlds import noise_image, write_cityscapes, write_gta5, write_png16


@pytest.fixture
def world(tmp_path):
    write_gta5(tmp_path / "gta", count=4, size=(60, 44))
    write_cityscapes(tmp_path / "cityscapes", count=3, size=(64, 40), labels=False)
    return tmp_path


def check_training_refused(run_script, world, *parts, **changes):
    """Run a training that must be refused before anything is written."""
    before = tree(world)
    check_refusal(run_script(train_procst, *training_flags(world, world / "out", **changes)), *parts)
    assert tree(world) == before


def test_missing_data_folder(run_script, world):
    check_training_refused(run_script, world, "--src_data_dir", "nowhere", src_data_dir=world / "nowhere")
    check_training_refused(run_script, world, "--trg_data_dir", "nowhere", trg_data_dir=world / "nowhere")


def test_empty_folder(run_script, world):
    (world / "empty").mkdir()
    check_training_refused(run_script, world, "no images", "images/*.png", src_data_dir=world / "empty")
    check_training_refused(run_script, world, "no images", "leftImg8bit", trg_data_dir=world / "empty")


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image(run_script, world, workers):
    write_gta5(world / "more", count=8, size=(60, 44))
    path = world / "more/images/00003.png"  # not among the few that are looked at before the training
    path.write_bytes(path.read_bytes()[:900])
    changes = {"src_data_dir": world / "more", "batch_size_list": (4, 2, 1), "num_workers": workers}
    check_refusal(run_script(train_procst, *training_flags(world, world / "out", **changes)), path, "truncated")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"batch_size_list": (2, 2)}, ("--batch_size_list", "2 values", "3 scales")),
        ({"batch_size_list": (2, 0, 1)}, ("--batch_size_list",)),
        ({"batch_size_list": (9, 2, 1)}, ("--batch_size_list", "9")),
        ({"batch_size_list": (2, 2, 1), "batch_size": 2}, ("--batch_size",)),
        ({"crop_size": (53, 36)}, ("--crop_size 53 36", "--src_resize 52 40")),
        ({"crop_size": (48, 38)}, ("--crop_size 48 38", "--trg_resize 48 36")),
        ({"crop_size": (24, 16), "style_layers": (3, 22)}, ("--crop_size 24 16", "8 a side", "layer 22")),
        ({"crop_size": (12, 12)}, ("--crop_size 12 12", "4 a side")),
        ({"epochs_per_scale": 2}, ("--epochs_per_scale", "--steps_per_scale")),
        ({"debug_run": ()}, ("--debug_run", "--steps_per_scale")),
        ({"manual_seed": 10**23}, ("--manual_seed",)),
        ({"ker_size": -1}, ("--ker_size",)),
        ({"gpus": "²"}, ("--gpus",)),
        ({"crop_size": (0, 16)}, ("--crop_size",)),
        ({"base_channels_list": (8, 8)}, ("--base_channels_list", "2 values")),
        ({"steps_per_scale": (1, 2)}, ("--steps_per_scale",)),
        ({"steps_per_scale": 0}, ("--steps_per_scale",)),
        ({"lr_g": 0}, ("--lr_g",)),
        ({"lr_d": "nan"}, ("--lr_d",)),
        ({"beta1": 1}, ("--beta1",)),
        ({"lambda_style": -1}, ("--lambda_style",)),
        ({"scale_factor": 1}, ("--scale_factor",)),
        ({"num_scales": -1}, ("--num_scales",)),
        ({"body_layers": 1}, ("--body_layers",)),
        ({"ker_size": 4}, ("--ker_size",)),
        ({"stride": 2}, ("--stride",)),
        ({"padd_size": 3}, ("--padd_size",)),
        ({"nc_im": 1}, ("--nc_im",)),
        ({"print_rate": 0}, ("--print_rate",)),
        ({"manual_seed": -1}, ("--manual_seed",)),
        ({"num_workers": -1}, ("--num_workers",)),
        ({"gpus": 3}, ("--gpus 3",)),
        ({"gpus": ("0", "0")}, ("--gpus 0 0",)),
        ({"gpus": "zero"}, ("--gpus zero",)),
        ({"gpus": None}, ("--gpus is required",)),
        ({"source": "kitti"}, ("--source", "gta5")),
        ({"lr_g": "fast"}, ("--lr_g", "fast")),
        ({"no_such_flag": 1}, ("--no_such_flag",)),
        ({"resume_to_epoch": 2}, ("--resume_to_epoch", "--continue_train_from_path")),
        ({"debug_stop_epoch": 1}, ("--debug_run",)),
        ({"no_semseg": None}, ("pretrained_semseg_on_gta5.pth", "--semseg_weights", "train_semseg_on_source.py")),
        ({"lambda_labels": 2}, ("--lambda_labels", "--no_semseg")),
        ({"weight-decay": 1e-3}, ("--weight-decay", "--no_semseg")),
        ({"style_layers": (3, 7)}, ("[7]", "--style_layers")),
        ({"vgg_weights": "missing.pth"}, ("--vgg_weights missing.pth",)),
        ({"src_list": "missing.txt"}, ("missing.txt",)),
        ({"continue_train_from_path": "missing"}, ("--continue_train_from_path missing",)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_flags(run_script, world, changes, parts):
    if "gpus" in changes and changes["gpus"] == 3 and torch.cuda.device_count() > 3:
        pytest.skip("this machine has a GPU 3")
    check_training_refused(run_script, world, *parts, **changes)


def write_vgg(path, last_conv):
    shapes = {0: (4, 3), 2: (4, 4), 5: (4, 4), 7: (4, 4), 10: (4, 4), 12: (4, 4)}
    kept = {index: shape for index, shape in shapes.items() if index <= last_conv}
    state = {f"features.{i}.weight": torch.randn(*shape, 3, 3) for i, shape in kept.items()}
    torch.save(state | {f"features.{i}.bias": torch.zeros(shape[0]) for i, shape in kept.items()}, path)


def test_a_style_layer_the_weights_do_not_reach(run_script, world):
    write_vgg(world / "vgg.pth", last_conv=5)
    flags = {"vgg_weights": world / "vgg.pth", "content_layers": 6}
    parts = ("vgg.pth", "features.7", "[8, 11]", "[1, 3, 6]")
    check_training_refused(run_script, world, *parts, style_layers=(3, 8, 11), **flags)
    result = run_script(train_procst, *training_flags(world, world / "out", steps_per_scale=1, **flags))
    assert result.code == 0, result.err


def test_vgg_weights_that_are_something_else(run_script, world):
    (world / "text.pth").write_text("no weights")
    check_training_refused(run_script, world, "text.pth", vgg_weights=world / "text.pth")
    torch.save(torch.nn.Conv2d(1, 1, 1), world / "module.pth")
    check_training_refused(run_script, world, "module.pth", vgg_weights=world / "module.pth")


@pytest.fixture
def trained(run_script, world):
    result = run_script(train_procst, *training_flags(world, world / "out", steps_per_scale=1))
    assert result.code == 0, result.err
    return only_run(world / "out")


def rewrite_pickle(path, change):
    """Change the bytes of the pickle inside a file of torch.save, the archive around it staying whole."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)


def test_flipped_bytes_in_a_checkpoint_never_give_a_traceback(run_script, world, trained):
    rng = np.random.default_rng(0)
    path, good = trained / "latest.pth", (trained / "latest.pth").read_bytes()
    refused = 0
    for _ in range(6):
        path.write_bytes(good)

        def flip(data):
            changed = bytearray(data)
            # Only in the opcodes' first part: a changed storage length can ask for any amount of memory.
            changed[int(rng.integers(2, 400))] = int(rng.integers(256))
            return bytes(changed)

        rewrite_pickle(path, flip)
        result = run_script(create_sit_dataset, *export_flags(trained, world, world / "sit"))
        assert result.code in (0, 2), result.err
        refused += result.code == 2
        shutil.rmtree(world / "sit", ignore_errors=True)
    assert refused > 2


def test_going_on_from_an_older_checkpoint_would_overwrite_newer_ones(run_script, world, trained):
    before = tree(world)
    check_refusal(run_script(train_procst, "--continue_train_from_path", trained / "scale_0.pth"), "latest.pth")
    assert tree(world) == before


def test_going_on_with_other_data_or_another_perceptual_net(run_script, world, trained):
    write_vgg(world / "vgg.pth", last_conv=5)
    before = tree(world)
    line = ("--continue_train_from_path", trained)
    check_refusal(run_script(train_procst, *line, "--vgg_weights", world / "vgg.pth"), "perceptual net")
    assert tree(world) == before
    for folder in ("images", "labels"):
        (world / "gta" / folder / "00002.png").unlink()
    before = tree(world)
    check_refusal(run_script(train_procst, *line), "list of source images")
    assert tree(world) == before


def test_divergence_keeps_the_last_good_checkpoint(run_script, world):
    flags = {"steps_per_scale": 6, "save_checkpoint_rate": 1, "print_rate": 100}
    result = run_script(train_procst, *training_flags(world, world / "out", lr_g=1e14, lr_d=1e14, **flags))
    check_refusal(result, "diverged")
    state = torch.load(only_run(world / "out") / "latest.pth", weights_only=True)
    for states in state["networks"].values():
        assert all(bool(tensor.isfinite().all()) for tensor in states[-1].values())


def test_unwritable_tensorboard_folder(run_script, world):
    (world / "file").write_text("")
    check_training_refused(run_script, world, "--tb_logs_dir", tb_logs_dir=world / "file")


def test_list_files_that_leave_the_data_folder(run_script, world):
    noise_image((60, 44), 0).save(world / "outside.png")
    for line in ("../outside.png", str(world / "outside.png"), "x" * 5000):
        (world / "list.txt").write_text(line + "\n")
        check_training_refused(run_script, world, "list.txt line 1", src_list=world / "list.txt")


def test_exporting_a_run_that_has_not_reached_its_last_scale(run_script, world, trained):
    result = run_script(create_sit_dataset, *export_flags(trained / "scale_0.pth", world, world / "sit"))
    check_refusal(result, "scale 0 of 0..2")
    assert not (world / "sit").exists()


def test_export_never_overwrites_the_source_or_foreign_images(run_script, world, trained):
    before = tree(world)
    check_refusal(run_script(create_sit_dataset, *export_flags(trained, world, world / "gta")), "overwrite the source")
    (world / "alias").mkdir()
    (world / "alias/images").symlink_to(world / "gta/images")
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "alias", skip_created_files=()))
    check_refusal(result, "overwrite the source")
    write_gta5(world / "other", count=1)
    check_refusal(run_script(create_sit_dataset, *export_flags(trained, world, world / "other")), "did not write")
    after = tree(world)
    assert {path: stamp for path, stamp in after.items() if path.startswith("gta")} == {
        path: stamp for path, stamp in before.items() if path.startswith("gta")
    }


def test_skipping_never_adopts_or_overwrites_what_is_no_translation(run_script, world, trained):
    shutil.copytree(world / "gta", world / "copy")
    before = tree(world)
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "copy", skip_created_files=()))
    check_refusal(result, "no translation")
    changes = {"source": "folder", "src_data_dir": world / "gta/images", "skip_created_files": ()}
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "gta/labels", **changes))
    check_refusal(result, "no translation")
    assert tree(world) == before


def test_a_half_written_set_of_another_program_is_completed(run_script, world, trained):
    (world / "sit/images").mkdir(parents=True)
    noise_image((60, 44), 77).save(world / "sit/images/00001.png")
    noise_image((60, 44), 78).save(world / "sit/images/00002.png")
    half = (world / "sit/images/00002.png").read_bytes()
    (world / "sit/images/00002.png").write_bytes(half[: len(half) // 2])
    (world / "sit/images/.00003.png.abc.procst-tmp").write_bytes(b"left by a killed export")
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "sit", skip_created_files=()))
    assert result.code == 0, result.err
    assert "3 translated" in result.out
    assert sorted(path.name for path in (world / "sit/images").iterdir()) == [f"{k:05d}.png" for k in range(1, 5)]


def test_a_replaced_source_image_is_translated_again(run_script, world, trained):
    assert run_script(create_sit_dataset, *export_flags(trained, world, world / "sit")).code == 0
    old = (world / "sit/images/00002.png").read_bytes()
    noise_image((60, 44), 99).save(world / "gta/images/00002.png")
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "sit", skip_created_files=()))
    assert "1 translated" in result.out
    assert (world / "sit/images/00002.png").read_bytes() != old


def test_export_refuses_to_mix_two_sources(run_script, world, trained):
    assert run_script(create_sit_dataset, *export_flags(trained, world, world / "sit")).code == 0
    write_gta5(world / "gta2", count=4, size=(60, 44), seed=50)
    before = tree(world)
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "sit", src_data_dir=world / "gta2"))
    check_refusal(result, "source folder")
    (world / "sit/sit_manifest.json").write_text("[]")
    check_refusal(run_script(create_sit_dataset, *export_flags(trained, world, world / "sit")), "sit_manifest.json")
    assert {k: v for k, v in tree(world).items() if "manifest" not in k} == {
        k: v for k, v in before.items() if "manifest" not in k
    }


def test_export_of_an_image_of_a_single_pixel(run_script, world, trained):
    noise_image((1, 1), 0).save(world / "gta/images/00009.png")
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "sit"))
    check_refusal(result, "1x1")


def test_images_of_16_bits_are_not_cut_silently(run_script, world, trained):
    write_png16(world / "gta/images/00009.png", np.full((20, 30, 3), 0x1234, dtype=np.uint16))
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "sit"))
    check_refusal(result, "00009.png", "8 bits")


def test_export_refuses_to_mix_two_models(run_script, world, trained):
    assert run_script(create_sit_dataset, *export_flags(trained, world, world / "sit")).code == 0
    other = training_flags(world, world / "second", steps_per_scale=1, manual_seed=1)
    assert run_script(train_procst, *other).code == 0
    before = tree(world)
    flags = export_flags(only_run(world / "second"), world, world / "sit", skip_created_files=())
    check_refusal(run_script(create_sit_dataset, *flags), "another generators")
    assert tree(world) == before


def test_export_into_an_unwritable_folder(run_script, world, trained):
    (world / "file").write_text("")
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "file" / "sit"))
    check_refusal(result, "--sit_output_path")


def test_export_stops_at_a_truncated_image_and_goes_on_after_its_repair(run_script, world, trained):
    for k in range(5, 9):
        noise_image((60, 44), k).save(world / f"gta/images/{k:05d}.png")
    path = world / "gta/images/00003.png"  # not among the few that are looked at before the export
    good = path.read_bytes()
    path.write_bytes(good[:900])
    check_refusal(run_script(create_sit_dataset, *export_flags(trained, world, world / "sit")), path, "truncated")
    assert sorted(p.name for p in (world / "sit/images").iterdir()) == ["00001.png", "00002.png"]
    path.write_bytes(good)
    result = run_script(create_sit_dataset, *export_flags(trained, world, world / "sit", skip_created_files=()))
    assert result.code == 0, result.err
    assert "6 translated" in result.out
