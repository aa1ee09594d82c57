"""DDB's first step: its flags, what its samples draw, what its teacher labels, and what it keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet

import train_uda
from data_handlers.classes import IGNORE
from methods import CASES, DDB, SOURCE_NET, steps_of, write_world
from models.resnet import RESNETS, BasicBlock
from nets import save_net
from refusals import check_refusal, check_refused, tree
from training.distributed import Rank
from training.flags import section_from
from uda.ddb import IMAGENET, NET, TEACHER
from uda.ddb_config import DDBConfig, ScheduleConfig
from uda.ddb_losses import weight_map, weighted_cross_entropy
from uda.mixing import AREA, cut_box
from uda.strong_augmentation import SIGMAS, STRENGTH, TAPS, blurred, draw_strong, strongly_augmented
from uda.teacher import Teacher
from utils.errors import UserError
from worlds import write_own_description


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("methods"))


# --- flags -----------------------------------------------------------------------------------------------------------


def words_of(world, out, **changes):
    flags = {
        **DDB, "method": "ddb-cut", "init": world / SOURCE_NET, "trg_data_dir": world / "cityscapes", "gpus": "cpu",
        "src_data_dir": world / "gta", "src_resize": (40, 32), "crop_size": (24, 20), "num_workers": 0,
        "run_dir": out / "run", "tb_logs_dir": out / "tb", **changes,
    }  # fmt: skip
    for name, value in flags.items():
        if value is True:
            yield f"--{name}"
        elif value is not None:
            yield from (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))


def test_what_is_refused(small_world, tmp_path, run_script):
    before = tree(tmp_path)
    cases = (
        ({"feature_classes": (1, 2)}, "--feature_classes acts only with --lambda_features"),
        ({"feature_min_ratio": 0.5}, "--feature_min_ratio acts only with --lambda_features"),
        ({"feature_classes": 256, "lambda_features": 0.1}, "--feature_classes: trainIds are 0 to 255"),
        ({"lambda_features": 0.1, "init": None, "no_pretrained_backbone": True}, "--lambda_features needs --model"),
        ({"lambda_features": 0.1}, "--lambda_features needs --model DeepLabV2 or DeepLab"),
        ({"mode": "reference", "resample": "fast"}, "--resample: --mode reference resizes as published"),
        ({"teacher_alpha": 1.1}, "--teacher_alpha is 1.1; it must be in [0, 1]"),
        ({"warmup_steps": 7}, "--warmup_steps 7 is above --num_steps 6"),
        ({"model": "VGG"}, "--model VGG: the net of --init"),
        ({"backbone_weights": "imagenet"}, "--init and --backbone_weights contradict each other"),
        ({"init": tmp_path / "missing.pth"}, "--init", "missing.pth: no such file"),
        ({"batch_size": 6}, "--batch_size 6: there are 5 target images"),
        ({"crop_size": (64, 20)}, "--crop_size 64 20 does not fit into --src_resize 40 32"),
        ({"trg_resize": (20, 32)}, "--crop_size 24 20 does not fit into --trg_resize 20 32"),
    )
    for changes, *parts in cases:
        check_refusal(run_script(train_uda, *words_of(small_world, tmp_path, **changes)), *parts)
    assert tree(tmp_path) == before


def test_a_run(small_world, tmp_path, run_script):
    """Its folder is continued by the same command, and TensorBoard has its pictures."""
    words = list(words_of(small_world, tmp_path, method="ddb-class", model=None, num_steps=2, mode="reference"))
    result = run_script(train_uda, *words)
    assert result.code == 0, result.err
    assert "UNet with 19 classes, trained by ddb-class" in result.out
    assert "it starts from" in result.out
    assert run_script(train_uda, *words).code == 0  # it is finished
    check_refusal(run_script(train_uda, *words, "--teacher_alpha", 0.9), "--teacher_alpha", "was started with 0.99")


def test_labels_of_other_classes_than_the_sources_score_nothing(small_world, tmp_path):
    own, net = write_own_description(tmp_path / "own.toml"), save_net(tmp_path / "net.pth", num_classes=4)
    changes = {"source": str(own), "init": str(net), "num_classes": 4}
    method = CASES["ddb-cut"].prepared(small_world, **{**changes, "select_by": "none"})
    assert method.validator is not None
    assert not method.validator.with_labels
    check_refused(lambda: CASES["ddb-cut"].prepared(small_world, **changes), "--select_by miou needs a labelled val")


def test_what_follows_from_the_data_sets_and_the_number_of_steps():
    def config(**flags):
        return DDBConfig.from_flags({"method": "ddb-cut", **flags})

    published = config()
    sizes = published.samples
    assert (sizes.src_resize, sizes.trg_resize, sizes.crop_size) == ((1280, 704), (1024, 512), (512, 512))
    assert (published.schedule.warmup_steps, published.schedule.validation_rate) == (1500, 4000)
    assert config(src_resize=(300, 200)).samples.crop_size == (300, 200)
    short = config(num_steps=80).schedule
    assert (short.warmup_steps, short.validation_rate) == (3, 8)
    check_refused(lambda: config(method="cbst"), "--method cbst has another configuration")
    with pytest.raises(UserError, match="--validation_rate is 0"):
        section_from(ScheduleConfig, {"warmup_steps": 0, "validation_rate": 0})


# --- losses ----------------------------------------------------------------------------------------------------------


def test_the_example_of_four_pixels():
    """Ignored pixels count in the mean, and the weight of a pseudo-label is the share of confident pixels."""
    mask = torch.tensor([[[True, False], [False, True]]])
    source = torch.tensor([[[0, IGNORE], [1, IGNORE]]])
    pseudo, confidence = torch.tensor([[[1, 1], [0, 0]]]), torch.tensor([[[0.99, 0.97], [0.60, 0.95]]])
    weight = weight_map((confidence >= 0.968).double().mean(), confidence, 0, 0)
    label, weight = torch.where(mask, source, pseudo), torch.where(mask, 1.0, weight)
    assert label.tolist() == [[[0, 1], [0, IGNORE]]]
    assert weight.tolist() == [[[1.0, 0.5], [0.5, 1.0]]]
    loss = weighted_cross_entropy(torch.zeros(1, 2, 2, 2), label, weight)
    assert float(loss) == pytest.approx(0.346574, abs=1e-6)


def test_rows_without_weight():
    weight = weight_map(torch.tensor(0.3, dtype=torch.float64), torch.ones(1, 5, 2), 2, 1)
    assert weight[0, :, 0].tolist() == pytest.approx([0.0, 0.0, 0.3, 0.3, 0.0])


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_the_boxes_have_their_area_and_lie_in_the_image():
    rng = np.random.default_rng(0)
    for _ in range(200):
        y0, x0, y1, x1 = cut_box(rng.random(3), 320, 512)
        assert 0 <= y0 < y1 <= 320
        assert 0 <= x0 < x1 <= 512
        assert (y1 - y0) * (x1 - x0) / (320 * 512) == pytest.approx(AREA, abs=0.003)


def test_how_often_and_how_strongly_is_augmented():
    rng = np.random.default_rng(0)
    draws = [draw_strong(rng, 0.8, 0.5) for _ in range(2000)]
    assert np.mean([bool(draw.order) for draw in draws]) == pytest.approx(0.8, abs=0.03)
    assert np.mean([bool(draw.sigma) for draw in draws]) == pytest.approx(0.5, abs=0.04)
    assert {len(set(draw.order)) for draw in draws} == {0, 4}
    assert {draw.order[0] for draw in draws if draw.order} == {0, 1, 2, 3}
    for values, centre in zip(zip(*(draw.factors for draw in draws), strict=True), (1, 1, 1, 0), strict=True):
        assert np.mean(values) == pytest.approx(centre, abs=0.01)
        assert np.abs(np.array(values) - centre).max() == pytest.approx(STRENGTH, rel=0.01)
    sigmas = [draw.sigma for draw in draws if draw.sigma]
    assert (min(sigmas), max(sigmas)) == pytest.approx(SIGMAS, abs=0.01)
    assert not draw_strong(rng, 0.0, 0.0).order


def test_the_clean_blur_is_the_same_in_both_directions_and_each_sample_has_its_own():
    image = torch.rand(3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = blurred(image, 1.15, (TAPS, TAPS))
    torch.testing.assert_close(blurred(image.mT, 1.15, (TAPS, TAPS)), found.mT)
    torch.testing.assert_close(blurred(found * 0 + 0.5, 1.15, (TAPS, TAPS)), found * 0 + 0.5)
    impulse = torch.zeros(3, 24, 24, dtype=torch.float64)
    impulse[:, 12, 12] = 1.0
    wide, narrow = (blurred(impulse, 1.15, (taps, taps))[0, 12, 12] for taps in (TAPS, 23))
    assert float(wide) == pytest.approx(float(narrow), rel=1e-4)  # nothing is cut off
    rng = np.random.default_rng(3)
    draws = [draw_strong(rng, 1.0, 1.0), draw_strong(rng, 0.0, 0.0), draw_strong(rng, 1.0, 0.0)]
    together = strongly_augmented(image.expand(3, -1, -1, -1), draws, reference=False)
    for one, draw in zip(together, draws, strict=True):
        assert torch.equal(one, strongly_augmented(image[None], [draw], reference=False)[0])
    assert torch.equal(together[1], image)
    assert not torch.equal(together[0], together[2])


class Part(Rank):
    """A process of several without the others."""

    def all_reduce(self, tensors):
        """Nothing is added."""


@pytest.mark.parametrize("case", ["ddb-cut", "ddb-class"])
def test_a_sample_draws_the_same_in_any_process(small_world, tmp_path, case):
    def mixed(rank):
        method = CASES[case].prepared(small_world, rank, jitter_p=1.0)
        for step, batch in steps_of(method, 0, 2, tmp_path):
            method.step(batch, 0, step)
        return method.shown["mixed"]

    alone = mixed(Rank())
    assert alone.shape == (3, 20, 24, 3)
    assert torch.equal(torch.cat([mixed(Part(k, 2)) for k in range(2)]), alone)


# --- teacher ---------------------------------------------------------------------------------------------------------


def test_the_labels_of_the_clean_teacher_do_not_depend_on_the_batch():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    images = torch.rand(2, 3, 8, 8)
    student(images)
    for batch_statistics in (False, True):
        teacher = Teacher(student, batch_statistics)
        teacher.follow(student, 0.0)
        assert not any(parameter.requires_grad for parameter in teacher.net.parameters())
        same = torch.allclose(teacher.net(images)[:1], teacher.net(images[:1]), atol=1e-6)
        assert same is not batch_statistics


def test_the_teacher_follows_and_the_student_is_used(small_world, tmp_path):
    method = CASES["ddb-cut-batchnorm"].prepared(small_world)
    for step, batch in steps_of(method, 0, 3, tmp_path):
        assert method.state_dict() == {"teacher_updates": step}
        before = [parameter.clone() for parameter in method.teacher.net.parameters()]
        student = [parameter.detach().clone() for parameter in method.net.parameters()]
        method.step(batch, 0, step)
        stays = step / (step + 1)
        for own, was, followed in zip(method.teacher.net.parameters(), before, student, strict=True):
            torch.testing.assert_close(own, stays * was + (1 - stays) * followed)
    assert method.eval_net() is method.modules[NET]
    assert method.modules[TEACHER] is method.teacher.net
    shown = method.images()
    assert list(shown) == ["source", "target", "pseudo_labels", "mixed", "mixed_labels"]
    for image in shown.values():
        assert image.shape == (3, 3, 20, 24)
        assert -1.01 <= float(image.min()) <= float(image.max()) <= 1.01


# --- the distance of features ----------------------------------------------------------------------------------------


class Features(nn.Module):
    """A net of which the features are known."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 4, 3, 4, padding=1), nn.Conv2d(4, 19, 1)

    def with_features(self, image):
        features = self.backbone(image)
        return nn.functional.interpolate(self.head(features), size=image.shape[2:]), features

    def forward(self, image):
        return self.with_features(image)[0]


@pytest.mark.parametrize("classes", [(), (0, 1, 2, 3, IGNORE)])
def test_the_distance_of_features_is_learned(small_world, tmp_path, classes):
    """It begins at 0, as the net starts from the frozen backbone, and holds the net back."""
    found = {}
    for weight in (1e-9, 10.0):
        torch.manual_seed(0)
        net = Features()
        method = CASES["ddb-cut"].prepared(
            small_world, feature_classes=classes, feature_min_ratio=0.2, num_steps=5, warmup_steps=0, lr_semseg=1e-2
        )
        net.network_input, net.start = method.net.network_input, ""
        teacher = replace(method.config.teacher, lambda_features=weight)
        method = type(method)(
            config=replace(method.config, teacher=teacher), rank=Rank(), net=net,
            imagenet=Features().backbone.requires_grad_(False), **method.domains,
        )  # fmt: skip
        method.imagenet.load_state_dict(net.backbone.state_dict())
        losses = [float(method.step(batch, 0, step)["Source/FeatureDistance"]) / weight
                  for step, batch in steps_of(method, 0, 5, tmp_path)]  # fmt: skip
        assert losses[0] == 0.0
        found[weight] = losses[-1]
    assert 0.0 < found[10.0] < 0.5 * found[1e-9]


def test_a_deeplab_keeps_near_its_imagenet_features(small_world, tmp_path, monkeypatch):
    """The frozen backbone has the weights of the file, also where the net starts from another one."""
    monkeypatch.setitem(RESNETS, "resnet18", (BasicBlock, (1, 1, 1, 1)))  # half of its weights
    weights = tmp_path / "resnet18.pth"
    torch.manual_seed(1)
    state = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]).state_dict()
    torch.save(state, weights)
    flags = {"model": "DeepLabV2", "backbone": "resnet18", "backbone_weights": str(weights), "lambda_features": 0.1,
             "batch_size": 1, "crop_size": (16, 16)}  # fmt: skip
    for init in ("", str(save_net(tmp_path / "net.pth", "DeepLabV2", "resnet18"))):
        method = CASES["ddb-class"].prepared(small_world, init=init, **flags)
        (step, batch), *_ = steps_of(method, 0, 1, tmp_path)
        losses = method.step(batch, 0, step)
        assert 0.0 < float(losses["Source/FeatureDistance"]) < float("inf")
        frozen = method.modules[IMAGENET]
        assert torch.equal(frozen.conv1.weight, state["conv1.weight"])
        assert torch.equal(frozen.bn1.running_mean, state["bn1.running_mean"])
        same = torch.equal(method.modules[TEACHER].backbone.conv1.weight, frozen.conv1.weight)
        assert same is not bool(init)
