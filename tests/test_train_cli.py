"""Training and export through the command line, on a tiny world: run folder, resume, SiT set."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import create_sit_dataset
import train_procst
from core.checkpoint import load_checkpoint
from training.precision import computes_in_bf16
from core.trained_generators import load_trained_generators
from utils.png import is_complete_rgb8
from worlds import noise_image, write_cityscapes, write_gta5

STEPS = 3


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world with spaces é")
    write_gta5(root / "gta", count=5, size=(60, 44))
    write_cityscapes(root / "cityscapes", count=4, size=(64, 40), labels=False)
    return root


def training_flags(world, out, **changes):
    flags = {
        "gpus": "cpu", "src_data_dir": world / "gta", "trg_data_dir": world / "cityscapes", "no_semseg": (),
        "src_resize": (52, 40), "trg_resize": (48, 36), "crop_size": (48, 36), "base_channels_list": 8,
        "batch_size_list": (2, 2, 1), "steps_per_scale": STEPS, "vgg_weights": "random", "content_layers": 6,
        "style_layers": (3, 6), "num_workers": 0, "precision": "fp32", "print_rate": 2, "lr_g": 1e-3, "lr_d": 1e-3,
        "checkpoints_dir": out / "models", "tb_logs_dir": out / "runs", **changes,
    }  # fmt: skip
    line = []
    for name, value in flags.items():
        if value is not None:
            line += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return line


def only_run(out):
    (run,) = (out / "models").iterdir()
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What was trained so far, by flags: folder and result."""
    return {}


@pytest.fixture
def finished(world, trained, tmp_path_factory, tmp_path, run_script, request):
    """A copy of a finished run, and what was printed."""
    changes = getattr(request, "param", {})
    if str(changes) not in trained:
        out = tmp_path_factory.mktemp("trained")
        trained[str(changes)] = out, run_script(train_procst, *training_flags(world, out, **changes))
    out, result = trained[str(changes)]
    assert result.code == 0, result.err
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    return only_run(tmp_path), result


def all_tensors(checkpoint):
    for name, states in sorted(checkpoint.networks.items()):
        for scale, state in enumerate(states):
            for key, value in state.items():
                yield f"{name} {scale} {key}", value
    for name, state in sorted(checkpoint.optimizers.items()):
        for index, values in state["state"].items():
            for key, value in values.items():
                yield f"optimiser {name} {index} {key}", value


def test_run_folder(finished, tmp_path):
    run, result = finished
    assert "random" in result.out
    assert ":" not in run.name
    assert {path.name for path in run.iterdir()} == {
        ".lock", "config.json", "latest.pth", "previous.pth", "scale_0.pth", "scale_1.pth", "scale_2.pth",
        "contact_sheet_scale_0.png", "contact_sheet_scale_1.png", "contact_sheet_scale_2.png",
    }  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["network"]["base_channels_list"] == [8, 8, 8]
    assert config["network"]["norms"] == ["group", "group", "group"]
    state = torch.load(run / "latest.pth", weights_only=True)
    assert (state["scale"], state["step"], state["scale_finished"]) == (2, STEPS, True)
    for scale in range(3):
        with Image.open(run / f"contact_sheet_scale_{scale}.png") as sheet:
            assert sheet.width > sheet.height > 3 * 36
    (log,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(log))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for scale in range(3):
        for name in ("ST/Generator/StyleLoss", "TS/Discriminator/LossGP", "Cyclic/LossTST"):
            assert f"Scale{scale}/{name}" in scalars
    assert [tag for tag in events.Tags()["images"] if tag.startswith("Scale1/source-SiT-SiTiS-target-TiS-TiSiT")]
    assert np.isfinite([event.value for event in events.Scalars("Scale2/ST/Generator/StyleLoss")]).all()


def test_lower_scales_stay_as_they_were_frozen(finished):
    run, _ = finished
    early, late = load_checkpoint(run / "scale_0.pth"), load_checkpoint(run / "latest.pth")
    for name in ("Gst", "Gts", "Dst", "Dts"):
        for key, value in early.networks[name][0].items():
            assert torch.equal(value, late.networks[name][0][key])
    first = load_checkpoint(run / "scale_1.pth").networks["Gst"][1]["head.conv.weight"]
    assert not torch.equal(first, late.networks["Gst"][2]["head.conv.weight"])


@pytest.mark.parametrize(
    ("finished", "stop"),
    [
        ({"norm": "batch"}, "after a step of scale 1"),
        ({"num_workers": 1}, "between scales"),
        pytest.param(
            {"precision": "bf16"}, "after a step of scale 1",
            marks=pytest.mark.skipif(not computes_in_bf16(torch.device("cpu")), reason="no bfloat16 arithmetic"),
        ),
    ],
    indirect=["finished"],
)
def test_a_continued_run_equals_an_uninterrupted_one(
    world, finished, tmp_path, run_script, monkeypatch, request, stop
):
    changes = request.node.callspec.params["finished"]
    out = tmp_path / "interrupted"
    real_step, real_start, calls = train_procst.Trainer.one_step, train_procst.Trainer.start_scale, []

    def stop_in_step(self, *arguments):
        calls.append(1)
        if len(calls) == STEPS + 3:
            raise KeyboardInterrupt
        return real_step(self, *arguments)

    def stop_before_scale(self, scale):
        if scale == 2:
            raise KeyboardInterrupt
        return real_start(self, scale)

    with monkeypatch.context() as patch:
        if stop == "between scales":
            patch.setattr(train_procst.Trainer, "start_scale", stop_before_scale)
        else:
            patch.setattr(train_procst.Trainer, "one_step", stop_in_step)
        assert run_script(train_procst, *training_flags(world, out, save_checkpoint_rate=1, **changes)).code == 130
    run = only_run(out)
    stopped_at = load_checkpoint(run / "latest.pth")
    assert (stopped_at.scale, stopped_at.step) == ((1, STEPS) if stop == "between scales" else (1, 2))
    result = run_script(train_procst, "--continue_train_from_path", run)
    assert result.code == 0, result.err
    whole = dict(all_tensors(load_checkpoint(finished[0] / "latest.pth")))
    continued = dict(all_tensors(load_checkpoint(run / "latest.pth")))
    assert whole.keys() == continued.keys()
    for key, value in whole.items():
        assert torch.equal(value, continued[key]), key


def test_a_finished_run_has_nothing_to_continue(finished, run_script):
    run, _ = finished
    before = (run / "latest.pth").read_bytes()
    result = run_script(train_procst, "--continue_train_from_path", run)
    assert result.code == 0, result.err
    assert (run / "latest.pth").read_bytes() == before


def test_resume_to_epoch_sets_the_step_counter(world, tmp_path, run_script, monkeypatch):
    flags = training_flags(world, tmp_path, steps_per_scale=None, epochs_per_scale=2)
    assert run_script(train_procst, *flags).code == 0
    run = only_run(tmp_path)
    result = run_script(train_procst, "--continue_train_from_path", run, "--resume_to_epoch", 3)
    assert result.code == 2
    assert "--resume_to_epoch 3" in result.err
    real_step, seen = train_procst.Trainer.one_step, []

    def record(self, *arguments):
        seen.append((self.scale, self.step))
        return real_step(self, *arguments)

    monkeypatch.setattr(train_procst.Trainer, "one_step", record)
    line = ("--continue_train_from_path", run, "--resume_to_epoch", 2, "--stride", 1, "--padd_size", 1)
    assert run_script(train_procst, *line).code == 0
    assert seen == [(2, step) for step in range(5, 10)]
    state = load_checkpoint(run / "latest.pth")
    counts = {int(values["step"]) for values in state.optimizers["Gst"]["state"].values()}
    assert counts == {15}


def test_debug_run_stops_early(world, tmp_path, run_script):
    flags = training_flags(
        world, tmp_path, steps_per_scale=None, debug_run=(), debug_stop_iteration=1, debug_stop_epoch=1
    )
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    assert "2, 2, 2" in result.out


def test_auto_norm_follows_the_batch_and_is_stored(world, tmp_path, run_script):
    flags = training_flags(
        world, tmp_path, batch_size_list=(16, 2, 1), src_list=tmp_path / "many.txt", steps_per_scale=1, num_scales=2
    )
    names = [f"{k:05d}" for k in range(1, 18)]
    write_gta5(tmp_path / "gta", names=names)
    (tmp_path / "many.txt").write_text("\n".join(f"{name}.png" for name in names))
    flags[flags.index("--src_data_dir") + 1] = tmp_path / "gta"
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    run = only_run(tmp_path)
    assert load_checkpoint(run / "latest.pth").config.network.norms == ("batch", "group", "group")
    result = run_script(train_procst, "--continue_train_from_path", run, "--norm", "group")
    assert result.code == 2
    assert "--norm:" in result.err


def export_flags(run, world, out, **changes):
    flags = {"gpus": "cpu", "trained_procst_path": run, "sit_output_path": out, "num_workers": 0, **changes}
    line = []
    for name, value in flags.items():
        line += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return line


def pixels_of(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def test_export_writes_native_sizes_at_any_batch_size(finished, tmp_path, run_script):
    run, _ = finished
    root = write_gta5(tmp_path / "mixed", count=4, size=(60, 44))
    noise_image((70, 52), 9).save(root / "images" / "00005.png")
    noise_image((60, 44), 8).convert("P").save(root / "images" / "00006.png")
    noise_image((60, 44), 8).convert("RGBA").save(root / "images" / "15188.png")
    results = {}
    for batch_size in (1, 3):
        out = tmp_path / f"sit{batch_size}"
        flags = export_flags(run, root, out, src_data_dir=root, batch_size=batch_size)
        result = run_script(create_sit_dataset, *flags)
        assert result.code == 0, result.err
        assert "7 SiT images" in result.out
        assert "images/s" in result.out
        assert sorted(path.name for path in out.iterdir()) == ["images", "sit_manifest.json"]
        assert {path.name for path in (out / "images").iterdir()} == {path.name for path in (root / "images").iterdir()}
        assert is_complete_rgb8(out / "images" / "00005.png", (70, 52))
        assert is_complete_rgb8(out / "images" / "00001.png", (60, 44))
        results[batch_size] = pixels_of(out / "images")
    for name, one in results[1].items():
        assert np.abs(one.astype(int) - results[3][name]).max() <= 1, name
    assert results[1]["00001.png"].std() > 0


def test_export_keeps_only_complete_files(finished, world, tmp_path, run_script):
    run, _ = finished
    out = tmp_path / "sit"
    assert run_script(create_sit_dataset, *export_flags(run, world, out)).code == 0
    whole = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    (out / "images" / "00002.png").write_bytes(whole["00002.png"][:-20])
    (out / "images" / "00003.png").unlink()
    (out / "images" / "00004.png").write_bytes(b"")
    stamp = (out / "images" / "00001.png").stat().st_mtime_ns
    result = run_script(create_sit_dataset, *export_flags(run, world, out, skip_created_files=()))
    assert result.code == 0, result.err
    assert "3 translated" in result.out
    assert "2 were already there" in result.out
    assert {path.name: path.read_bytes() for path in (out / "images").iterdir()} == whole
    assert (out / "images" / "00001.png").stat().st_mtime_ns == stamp
    assert json.loads((out / "sit_manifest.json").read_text())["complete"] is True


def test_a_plain_folder_of_pictures_is_translated(finished, tmp_path, run_script):
    run, _ = finished
    (tmp_path / "pictures").mkdir()
    noise_image((50, 40), 1).save(tmp_path / "pictures" / "one.jpg")
    noise_image((50, 40), 2).save(tmp_path / "pictures" / "two.png")
    flags = export_flags(run, None, tmp_path / "sit", source="folder", src_data_dir=tmp_path / "pictures")
    result = run_script(create_sit_dataset, *flags)
    assert result.code == 0, result.err
    assert sorted(path.name for path in (tmp_path / "sit").glob("*.png")) == ["one.png", "two.png"]


def test_generators_of_run_folder_and_checkpoint_are_the_same(finished):
    run, _ = finished
    prints = {load_trained_generators(run / name).fingerprint() for name in ("", "latest.pth", "scale_2.pth")}
    assert len(prints) == 1
