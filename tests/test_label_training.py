"""ProCST with the label losses of the last scale on a tiny world."""

from __future__ import annotations

import copy
import json
import signal

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import create_sit_dataset
import train_procst
import train_semseg_on_source
from core import preparation
from core.checkpoint import load_checkpoint
from core.label_networks import restore_momentum
from core.segmentation_files import SegmentationFile, load_segmentation_net
from core.trainer import Trainer
from training.validation import BEST_PATTERN, Validator, best_name
from models.segmentation import SegmentationShape, build_segmentation_net
from test_train_cli import all_tensors, only_run, training_flags
from training.distributed import Rank
from worlds import write_cityscapes, write_gta5

STEPS = 3
GIVEN = ("fp32", "cpu")  # of label_flags


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    write_gta5(root / "gta", count=6, size=(60, 44))
    write_cityscapes(root / "cityscapes", count=4, size=(64, 40), labels=False)
    write_cityscapes(root / "cityscapes", count=2, size=(64, 40), seed=300, split="val")
    write_cityscapes(root / "unlabelled", count=4, size=(64, 40), labels=False)
    return root


def source_flags(world, out, **changes):
    flags = {
        "gpus": "cpu", "src_data_dir": world / "gta", "src_resize": (52, 40), "crop_size": (48, 36), "val_count": 2,
        "model": "UNet", "no_pretrained_backbone": (), "num_steps": 8, "batch_size": 2, "lr_semseg": 1e-2,
        "num_workers": 0, "print_rate": 2, "output": out / "source.pth", "checkpoints_dir": out / "models",
        "tb_logs_dir": out / "runs", **changes,
    }  # fmt: skip
    line = []
    for name, value in flags.items():
        if value is not None:
            line += [f"--{name}", *(value if isinstance(value, tuple) else (value,))]
    return line


@pytest.fixture(scope="module")
def source_net(world, tmp_path_factory):
    """The file of a UNet trained on the source for a few steps."""
    out = tmp_path_factory.mktemp("source")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_semseg_on_source.py", *map(str, source_flags(world, out))])
        train_semseg_on_source.main()
    return out / "source.pth"


def label_flags(world, out, source_net, **changes):
    labels = {
        "no_semseg": None, "model": "UNet", "semseg_weights": source_net, "lr_semseg": 1e-2, "steps_per_scale": STEPS,
        "validation_rate": 2,
    }  # fmt: skip
    return training_flags(world, out, **{**labels, **changes})


def test_the_net_trained_on_sit_saves_memory_where_it_should(world, tmp_path, run_script, source_net, monkeypatch):
    asked, build = [], preparation.build_label_networks
    monkeypatch.setattr(preparation, "recomputes_blocks", lambda precision, device: (precision, device.type) == GIVEN)
    monkeypatch.setattr(
        preparation, "build_label_networks", lambda *a, **k: asked.append(k["save_memory"]) or build(*a, **k)
    )
    result = run_script(train_procst, *label_flags(world, tmp_path, source_net), "--dry_run")
    assert result.code == 0, result.err
    assert asked == [True]


def test_run_with_label_losses(world, tmp_path, run_script, source_net):
    result = run_script(train_procst, *label_flags(world, tmp_path, source_net))
    assert result.code == 0, result.err
    run = only_run(tmp_path)
    found = json.loads((run / "validations.json").read_text())
    assert [validation["step"] for validation in found] == [2, 3]
    assert "validating the last scale on cityscapes: 2 images" in result.out
    best = max(found, key=lambda validation: validation["miou"])
    (kept,) = run.glob("best_*.pth")
    assert kept.name.startswith(f"best_step_{best['step']}_mIoU_{best['miou']:.4f}")
    _, source = load_segmentation_net(source_net, "--weights")
    _, target = load_segmentation_net(run, "--weights")
    assert not torch.equal(source.head.classify.weight, target.head.classify.weight)
    (log,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(log))
    events.Reload()
    tags = events.Tags()
    assert {"Scale2/Cyclic/SourceLabelLoss", "Semseg/SemsegLoss", "Validation/mIoU"} <= set(tags["scalars"])
    assert "Validation/Confidence" in tags["histograms"]
    assert any(tag.startswith("Validation/Image-Label-Prediction") for tag in tags["images"])
    values = [event.value for event in events.Scalars("Validation/mIoU")]
    assert values == pytest.approx([validation["miou"] for validation in found])
    # The best checkpoint can be exported.
    flags = ("--gpus", "cpu", "--trained_procst_path", kept, "--sit_output_path", tmp_path / "sit", "--num_workers", 0)
    result = run_script(create_sit_dataset, *flags)
    assert result.code == 0, result.err
    assert len(list((tmp_path / "sit/images").iterdir())) == 6


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    """A net with batch norm and dropout, whose running statistics and random draws could go wrong."""
    path = tmp_path_factory.mktemp("resnet") / "resnet18.pth"
    shape = SegmentationShape("DeepLabV2", "resnet18", 19)
    torch.manual_seed(0)
    SegmentationFile(shape, build_segmentation_net(shape).state_dict()).save(path)
    return path


RESNET = {
    "model": "DeepLabV2", "backbone": "resnet18", "no_pretrained_backbone": (), "lr_semseg": 1e-3,
    "steps_per_scale": (1, 1, 3),
}  # fmt: skip


@pytest.fixture(scope="module")
def whole_resnet_run(world, resnet_file, tmp_path_factory):
    """Folder and trainer of a finished run."""
    out, trainers, real_fit = tmp_path_factory.mktemp("whole"), [], Trainer.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "fit", lambda self, progress: (trainers.append(self), real_fit(self, progress)))
        patch.setattr("sys.argv", ["train_procst.py", *map(str, label_flags(world, out, resnet_file, **RESNET))])
        train_procst.main()
    return only_run(out), trainers[0]


def test_the_source_net_is_bit_identical_after_training(whole_resnet_run, resnet_file):
    _, trainer = whole_resnet_run
    _, before = load_segmentation_net(resnet_file, "--weights")
    after = trainer.labels.seg_source
    assert not after.training
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in after.parameters())
    trained = trainer.labels.seg_sit
    assert not torch.equal(trained.backbone.bn1.running_mean, torch.zeros(64))


def stop_in_step(scale, step):
    real = Trainer.one_step

    def stop(self, *arguments):
        if (self.scale, self.step) == (scale, step):
            raise KeyboardInterrupt
        return real(self, *arguments)

    return Trainer, "one_step", stop


def stop_in_validation(number):
    real, calls = Validator.__call__, []

    def stop(self, *arguments):
        calls.append(arguments)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    return Validator, "__call__", stop


@pytest.mark.parametrize(
    ("stop", "where"),
    [(stop_in_step, (2, 1)), (stop_in_validation, (2,))],
    ids=["at the last scale", "in the last validation"],
)
def test_a_continued_run_with_label_losses_equals_an_uninterrupted_one(
    world, whole_resnet_run, tmp_path, run_script, resnet_file, stop, where
):
    (whole, _), out = whole_resnet_run, tmp_path / "cut"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*stop(*where))
        rate = {"save_checkpoint_rate": 1} if stop is stop_in_step else {}  # a validation follows a checkpoint
        flags = label_flags(world, out, resnet_file, **RESNET, **rate)
        assert run_script(train_procst, *flags).code == (75 if stop is stop_in_validation else 130)
    run = only_run(out)
    assert len(load_checkpoint(run / "latest.pth").validations) == (where == (2,))  # what is broken off is made again
    result = run_script(train_procst, "--continue_train_from_path", run)
    assert result.code == 0, result.err
    ours, theirs = load_checkpoint(run / "latest.pth"), load_checkpoint(whole / "latest.pth")
    for (name, value), (_, expected) in zip(all_tensors(ours), all_tensors(theirs), strict=True):
        assert torch.equal(value, expected), name
    for name, value in theirs.segmentation["target_net"].items():
        assert torch.equal(value, ours.segmentation["target_net"][name]), name
    momenta = [
        [state["momentum_buffer"] for state in checkpoint.segmentation["optimizer"]["state"].values()]
        for checkpoint in (ours, theirs)
    ]
    assert momenta[0]
    assert all(torch.equal(value, expected) for value, expected in zip(*momenta, strict=True))
    assert ours.validations == theirs.validations
    assert [path.name for path in run.glob("best_*.pth")] == [path.name for path in whole.glob("best_*.pth")]


def test_a_kill_leaves_no_second_best(tmp_path):
    """The same step may be validated twice, with other scores, after --resume_to_epoch."""
    found = [(6, 0.2, True), (12, 0.3, True), (18, 0.1, False), (6, 0.4, True)]
    validations = [{"step": step, "miou": miou, "label_free": 0.5, "best": best} for step, miou, best in found]
    names = [best_name(validation["step"], validation) for validation in validations]
    unnoted = "best_step_7_mIoU_0.1000_label_free_0.5000.pth"  # killed before: it will be validated again
    for name in (*names, unnoted):
        (tmp_path / name).touch()
    trainer = Trainer.__new__(Trainer)
    trainer.validations, trainer.rank, trainer.run_folder = [], Rank(), tmp_path
    trainer._keep_best(trainer._bests())
    assert len(list(tmp_path.iterdir())) == 5
    trainer.validations = validations
    trainer._keep_best(trainer._bests())
    assert {path.name for path in tmp_path.iterdir()} == {names[3], names[2], unnoted}
    trainer._keep_best(tmp_path.glob(BEST_PATTERN))
    assert [path.name for path in tmp_path.iterdir()] == [names[3]]


def test_selection_without_target_labels(world, tmp_path, run_script, source_net):
    flags = label_flags(world, tmp_path, source_net, trg_data_dir=world / "unlabelled", select_by="label_free")
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    run = only_run(tmp_path)
    found = json.loads((run / "validations.json").read_text())
    assert [validation["miou"] for validation in found] == [None, None]
    best = max(found, key=lambda validation: validation["label_free"])
    assert [path.name for path in run.glob("best_*")] == [
        f"best_step_{best['step']}_label_free_{best['label_free']:.4f}.pth"
    ]


def test_target_without_labels_is_not_validated(world, tmp_path, run_script, source_net):
    flags = label_flags(world, tmp_path, source_net, trg_data_dir=world / "unlabelled", validation_rate=None)
    result = run_script(train_procst, *flags)
    assert result.code == 0, result.err
    assert "no validation of the last scale: the target has no labelled val split" in result.out
    run = only_run(tmp_path)
    assert not (run / "validations.json").exists()
    assert not list(run.glob("best_*"))


def test_warmup_epochs_hold_the_label_losses_back(world, tmp_path, run_script, source_net):
    """An epoch of the last scale is 6 steps here, so one warm-up epoch covers the whole run: Gst is what it is without
    segmentation nets, while Q learns."""
    short = {"steps_per_scale": (1, 1, STEPS)}
    assert run_script(train_procst, *training_flags(world, tmp_path / "without", **short)).code == 0
    warm = label_flags(world, tmp_path / "warm", source_net, warmup_epochs=1, **short)
    assert run_script(train_procst, *warm).code == 0
    cold = label_flags(world, tmp_path / "cold", source_net, **short)
    assert run_script(train_procst, *cold).code == 0
    without, warm, cold = (
        load_checkpoint(only_run(tmp_path / name) / "latest.pth") for name in ("without", "warm", "cold")
    )
    for name in ("Gst", "Gts", "Dst", "Dts"):
        for key, value in without.networks[name][2].items():
            assert torch.equal(value, warm.networks[name][2][key]), f"{name} {key}"
    assert not torch.equal(without.networks["Gst"][2]["head.conv.weight"], cold.networks["Gst"][2]["head.conv.weight"])
    weight = "head.classify.weight"
    assert not torch.equal(warm.segmentation["target_net"][weight], cold.segmentation["target_net"][weight])
    for scale in (0, 1):
        for key, value in without.networks["Gst"][scale].items():
            assert torch.equal(value, cold.networks["Gst"][scale][key])


def test_momentum_of_another_memory_layout_fits_its_weights():
    def net():
        torch.manual_seed(0)
        return nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)

    whole, continued = net(), net()
    image = torch.rand(2, 4, 6, 6)

    def step(net, optimizer):
        optimizer.zero_grad()
        net(image).square().sum().backward()
        optimizer.step()

    optimizers = [torch.optim.SGD(n.parameters(), lr=1e-2, momentum=0.9, fused=True) for n in (whole, continued)]
    step(whole, optimizers[0])
    state = copy.deepcopy(optimizers[0].state_dict())
    for held in state["state"].values():
        held["momentum_buffer"] = held["momentum_buffer"].clone(memory_format=torch.contiguous_format)
    continued.load_state_dict(whole.state_dict())
    restore_momentum(optimizers[1], state)
    for net, optimizer in zip((whole, continued), optimizers, strict=True):
        step(net, optimizer)
    torch.testing.assert_close(continued.weight, whole.weight)
