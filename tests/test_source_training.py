"""Source training of a segmentation net on a tiny world: what is kept, gone on with and published."""

from __future__ import annotations

import shutil
import signal

import numpy as np
import pytest
import torch
from core.segmentation_files import read_segmentation_file
from core.source_training import SourceTrainer, poly_rate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_semseg_on_source
from data_handlers.datasets import DATA_SETS
from data_handlers.lists import list_images
from data_handlers.stream import StreamConfig, StreamSamples
from test_label_training import source_flags, world  # noqa: F401
from test_train_cli import only_run
from training.validation import Validator


def test_source_training_keeps_the_best_and_the_latest(world, tmp_path, run_script):  # noqa: F811
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path))
    assert result.code == 0, result.err
    run = only_run(tmp_path)
    assert {path.name for path in run.iterdir()} == {".lock", "config.json", "latest.pth", "previous.pth", "best.pth"}
    latest, best = read_segmentation_file(run / "latest.pth"), read_segmentation_file(run / "best.pth")
    assert latest.training["step"] == 8
    assert best.info["miou"] == latest.training["best_miou"] > 0
    assert (tmp_path / "source.pth").read_bytes() == (run / "best.pth").read_bytes()
    assert f"--semseg_weights {tmp_path / 'source.pth'}" in result.out
    (log,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(log))
    events.Reload()
    # 4 images to train on in batches of 2: an epoch is 2 steps, and each ends with a validation.
    assert [event.step for event in events.Scalars("Validation/mIoU")] == [2, 4, 6, 8]
    assert max(event.value for event in events.Scalars("Validation/mIoU")) == pytest.approx(best.info["miou"])
    assert "Validation/IoU/road" in events.Tags()["scalars"]
    rates = [event.value for event in events.Scalars("Semseg/LearningRate")]
    assert rates == pytest.approx([1e-2 * poly_rate(step, 8, 0.9) for step in (1, 3, 5, 7)])


def test_a_continued_source_training_equals_an_uninterrupted_one(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    flags = source_flags(world, tmp_path / "cut", save_checkpoint_rate=1, validation_rate=4)
    whole_flags = source_flags(world, tmp_path / "whole2", validation_rate=4)
    assert run_script(train_semseg_on_source, *whole_flags).code == 0
    real_step = SourceTrainer._one_step

    def stop(self, batch):
        if self.step == 5:
            raise KeyboardInterrupt
        return real_step(self, batch)

    monkeypatch.setattr(SourceTrainer, "_one_step", stop)
    assert run_script(train_semseg_on_source, *flags).code == 130
    monkeypatch.setattr(SourceTrainer, "_one_step", real_step)
    run = only_run(tmp_path / "cut")
    assert run_script(train_semseg_on_source, "--continue_train_from_path", run).code == 0
    ours = read_segmentation_file(run / "latest.pth")
    whole = read_segmentation_file(only_run(tmp_path / "whole2") / "latest.pth")
    assert ours.training["best_miou"] == whole.training["best_miou"]
    for name, value in whole.weights.items():
        assert torch.equal(value, ours.weights[name]), name
    refused = run_script(train_semseg_on_source, "--continue_train_from_path", run, "--lr_semseg", "0.5")
    assert refused.code == 2
    assert "--lr_semseg" in refused.err


def test_a_source_training_stopped_in_its_validation(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    """What was learnt is kept, the validation is made up for, and the curves go on where they stopped."""
    assert run_script(train_semseg_on_source, *source_flags(world, tmp_path / "whole")).code == 0
    real_call = Validator.__call__
    calls = []

    def stop(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGUSR1)
        return real_call(self, *arguments)

    monkeypatch.setattr(Validator, "__call__", stop)
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path / "cut"))
    assert result.code == 75, result.err
    assert "stopped at step 4, and saved" in result.err
    run = only_run(tmp_path / "cut")
    assert read_segmentation_file(run / "latest.pth").training["step"] == 4
    (tmp_path / "cut/source.pth").unlink()
    monkeypatch.chdir(run)
    result = run_script(train_semseg_on_source, "--continue_train_from_path", ".")
    assert result.code == 0, result.err
    ours, whole = (read_segmentation_file(path / "latest.pth") for path in (run, only_run(tmp_path / "whole")))
    assert ours.training["best_miou"] == whole.training["best_miou"]
    assert all(torch.equal(value, ours.weights[name]) for name, value in whole.weights.items())
    assert (tmp_path / "cut/source.pth").read_bytes() == (run / "best.pth").read_bytes()
    logged = []
    for out in ("whole", "cut"):
        (log,) = (tmp_path / out / "runs").iterdir()
        events = EventAccumulator(str(log))
        events.Reload()
        tags = ("Validation/mIoU", "Semseg/SemsegLoss")
        logged.append([[(event.step, event.value) for event in events.Scalars(tag)] for tag in tags])
    assert logged[0] == logged[1]


def test_a_damaged_best_net_does_not_end_the_training(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    real_step = SourceTrainer._one_step

    def stop(self, batch):
        if self.step == 5:
            signal.raise_signal(signal.SIGTERM)
        return real_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(SourceTrainer, "_one_step", stop)
        assert run_script(train_semseg_on_source, *source_flags(world, tmp_path)).code == 75
    run = only_run(tmp_path)
    (run / "best.pth").write_bytes((run / "best.pth").read_bytes()[:500])
    result = run_script(train_semseg_on_source, "--continue_train_from_path", run)
    assert result.code == 0, result.err
    assert "best.pth is damaged" in result.err


def test_output_that_another_run_takes_meanwhile(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    real_step = SourceTrainer._one_step

    def take(self, batch):
        if self.step == 2:
            (tmp_path / "source.pth").write_text("another run's net")
        return real_step(self, batch)

    monkeypatch.setattr(SourceTrainer, "_one_step", take)
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path))
    assert result.code == 0, result.err
    assert (tmp_path / "source.pth").read_text() == "another run's net"
    run = only_run(tmp_path)
    assert f"--semseg_weights {run / 'best.pth'}" in result.out
    read_segmentation_file(run / "best.pth")


def test_a_run_of_the_same_name_is_another_run(world, tmp_path, run_script, monkeypatch):  # noqa: F811
    def flags(parent, **changes):
        return source_flags(world, tmp_path, checkpoints_dir=None, run_dir=tmp_path / parent / "run", **changes)

    real_step = SourceTrainer._one_step

    def other_is_published(self, batch):
        if self.step == 2:
            (tmp_path / "other.pth").rename(tmp_path / "source.pth")
        return real_step(self, batch)

    assert run_script(train_semseg_on_source, *flags("a", output=tmp_path / "other.pth")).code == 0
    published = (tmp_path / "other.pth").read_bytes()
    monkeypatch.setattr(SourceTrainer, "_one_step", other_is_published)
    result = run_script(train_semseg_on_source, *flags("b"))
    assert result.code == 0, result.err
    assert f"--semseg_weights {tmp_path / 'b/run/best.pth'}" in result.out
    assert (tmp_path / "source.pth").read_bytes() == published
    # A continued run knows its own file, and a copy of its folder does not.
    monkeypatch.undo()
    (tmp_path / "source.pth").rename(tmp_path / "other.pth")
    again = flags("a", output=tmp_path / "other.pth")
    assert run_script(train_semseg_on_source, *again).code == 0
    shutil.copytree(tmp_path / "a/run", tmp_path / "a/copy")
    refused = run_script(train_semseg_on_source, *again, "--run_dir", tmp_path / "a/copy")
    assert refused.code == 2
    assert "is not of this run" in refused.err


def test_the_output_of_another_run_is_not_overwritten(world, tmp_path, run_script):  # noqa: F811
    (tmp_path / "source.pth").write_text("the authors' file")
    result = run_script(train_semseg_on_source, *source_flags(world, tmp_path))
    assert result.code == 2
    assert "--output" in result.err
    assert (tmp_path / "source.pth").read_text() == "the authors' file"
    assert not (tmp_path / "models").exists()


def test_labels_from_another_folder(world, tmp_path, run_script):  # noqa: F811
    """SiT images have the labels of their source."""
    shutil.copytree(world / "gta/images", tmp_path / "sit/images")
    flags = source_flags(world, tmp_path, src_data_dir=tmp_path / "sit", num_steps=4)
    refused = run_script(train_semseg_on_source, *flags)
    assert refused.code == 2
    assert "have no label" in refused.err
    assert run_script(train_semseg_on_source, *flags, "--src_label_dir", world / "gta").code == 0
    same = source_flags(world, tmp_path / "same", num_steps=4)
    assert run_script(train_semseg_on_source, *same).code == 0
    ours, theirs = (read_segmentation_file(only_run(out) / "latest.pth") for out in (tmp_path, tmp_path / "same"))
    assert all(torch.equal(value, theirs.weights[name]) for name, value in ours.weights.items())


def test_flipped_samples_mirror_image_and_label(world):  # noqa: F811
    files = list_images(DATA_SETS["gta5"], world / "gta", "--src_data_dir")
    shared = {
        "seed": 1, "domain": "source", "scale": 0, "batch_size": 1, "steps_per_epoch": 6, "epoch_length": 6,
        "resize": (52, 40), "crop": (48, 36), "labels": "read",
    }  # fmt: skip
    plain, mirrored = (
        StreamSamples(files, StreamConfig(**shared, flip=flip), lambda image: [np.array(image)])
        for flip in (False, True)
    )
    flips = [mirrored.is_flipped(position) for position in range(40)]
    assert 10 < sum(flips) < 30
    for position in range(6):
        sample, other = plain[position], mirrored[position]
        step = -1 if flips[position] else 1
        np.testing.assert_array_equal(sample.levels[0][:, ::step], other.levels[0])
        np.testing.assert_array_equal(sample.label[:, ::step], other.label)
