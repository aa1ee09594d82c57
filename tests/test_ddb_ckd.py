"""Cross-path distillation: steps against the published code's numbers, its input, and the chain of its scripts.

Every `uda/ddb_step_ckd*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it).
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import calculate_prototypes
import train_uda
import uda.ddb_ckd
from commands import command
from data_handlers.domain import DomainBatch, PairBatch
from methods import CASES, steps_of, write_world
from models.segmentation import HEAD_RATE
from nets import save_net, save_prototypes
from refusals import check_refusal, check_refused, tree
from training.checkpoint import load_checkpoint
from training.distributed import ALONE
from uda.ddb import NET
from uda.ddb_ckd import Distillation, FrozenTeacher
from uda.ddb_ckd_config import DistillationTrainingConfig
from uda_golden import load, over


def tensor(data, name):
    return torch.from_numpy(np.asarray(data[name]))


def assert_near(found, expected, tolerance, name=""):
    """Differences are relative to the largest magnitude of the tensor."""
    assert found.shape == expected.shape, name
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


# --- golden steps ----------------------------------------------------------------------------------------------------


class StandIn(nn.Module):
    """The files' small net."""

    def __init__(self, meta):
        super().__init__()
        conv = nn.Conv2d(3, meta["mid"], 3, meta["stride"], padding=1, bias=False)
        self.backbone = nn.Sequential(conv, nn.BatchNorm2d(meta["mid"]), nn.ReLU())
        self.head = nn.Conv2d(meta["mid"], meta["num_classes"], 1)
        self.start = ""

    def network_input(self, pixels, dtype):
        return pixels.movedim(-1, 1).contiguous()

    def forward(self, image):
        return self.features_and_logits(image)[1]

    def features_and_logits(self, image):
        features = self.backbone(image)
        size = image.shape[2:]
        return features, F.interpolate(self.head(features), size=size, mode="bilinear", align_corners=False)


def tensors(data, prefix):
    """Arrays of a file below a prefix, by our names."""
    ours, found = {"conv1": "backbone.0", "bn1": "backbone.1", "conv2": "head"}, {}
    for name in data:
        if name.startswith(f"{prefix}/"):
            layer, _, kind = name.removeprefix(f"{prefix}/").partition(".")
            found[f"{ours[layer]}.{kind}"] = tensor(data, name)
    return found


def net_of(data, meta, prefix):
    net = StandIn(meta)
    net.load_state_dict(tensors(data, prefix))
    return net


class GoldenTeacher(nn.Module):
    """A teacher of a file."""

    def __init__(self, data, meta, name):
        super().__init__()
        self.net, self.inputs, self.line = net_of(data, meta, name).eval().requires_grad_(False), {}, ""
        self.register_buffer("vectors", tensor(data, f"{name}_prototypes") if meta["proto_rectify"] else None)
        self.register_buffer("known", None)


def golden_method(data, meta):
    optimizer = meta["optimizer"]
    assert (optimizer["type"], optimizer["head_mult"], meta["min_lr"]) == ("AdamW", HEAD_RATE, 0.0)
    soft = meta["soft_distill"]
    on = "logits" if soft or not meta["rectify_on_prob"] else "probabilities"
    config = DistillationTrainingConfig.from_flags({
        "method": "ddb-ckd", "model": "UNet", "num_classes": meta["num_classes"], "mode": "reference",
        "precision": "fp32", "batch_size": meta["n"], "num_steps": meta["max_iters"], "lr_semseg": optimizer["lr"],
        "weight_decay": optimizer["weight_decay"], "power": meta["power"], "warmup_steps": meta["warmup_iters"],
        "warmup_ratio": meta["warmup_ratio"], "rectify": on if meta["proto_rectify"] else "none", "soft_distill": soft,
        "soft_distill_w": meta["soft_distill_w"], "temp": float(meta["temp"]), "use_pl_weight": meta["use_pl_weight"],
        "pseudo_threshold": meta.get("pseudo_threshold", 0.968),
    })  # fmt: skip
    method = Distillation(
        config=config, rank=ALONE, source=range(9), target=range(9), net=net_of(data, meta, "student_init"),
        teachers=[GoldenTeacher(data, meta, name) for name in ("cu", "ca")],
    )  # fmt: skip
    method.begin_stage(0, resumed=False)
    settings = method.optimizers[NET].defaults
    assert (list(settings["betas"]), settings["eps"]) == (optimizer["betas"], optimizer["eps"])
    return method


LOGGED = {
    "Source/Loss": "stu_src.decode.loss_ce", "Source/Accuracy": "stu_src.decode.acc_seg",
    "Target/Loss": "stu_tgt.decode.loss_ce", "Target/Accuracy": "stu_tgt.decode.acc_seg",
    "Target/Distillation": "stu_tgt.loss_distill",
}  # fmt: skip


@over("ddb_step_ckd")
def test_steps(path, monkeypatch):
    data, meta = load(path)
    method, teachers = golden_method(data, meta), [tensors(data, name) for name in ("cu", "ca")]
    for t in range(meta["iters"]):
        given = {name: tensor(data, f"it{t}/{name}") for name in ("src", "tgt", "label", "tgt_aug")}
        augmented = given["tgt_aug"].movedim(1, -1)

        def of_file(pixels, draws, given=given, augmented=augmented):
            assert torch.equal(pixels.movedim(-1, 1), given["tgt"])
            return augmented

        monkeypatch.setattr(method, "augmented", of_file)
        source = DomainBatch([given["src"].movedim(1, -1)], given["label"][:, 0])
        losses = method.step(PairBatch(source, DomainBatch([given["tgt"].movedim(1, -1)], None)), 0, t)
        rates = [group["lr"] for group in method.optimizers[NET].param_groups]
        np.testing.assert_allclose(rates, data[f"it{t}/lr"], rtol=1e-10)
        expected = {name.rpartition("/")[2] for name in data if name.startswith(f"it{t}/log/")}
        assert {LOGGED[name] for name in losses if name != "Target/Confident"} == expected
        for ours, value in ((name, value) for name, value in losses.items() if name in LOGGED):
            factor, tolerance = (100.0, 1e-5) if ours.endswith("Accuracy") else (1.0, 1e-6)
            expected = float(data[f"it{t}/log/{LOGGED[ours]}"])
            assert factor * float(value) == pytest.approx(expected, rel=tolerance), ours
        if f"it{t}/pseudo_label" in data:
            assert torch.equal(method.shown["pseudo_labels"].byte(), tensor(data, f"it{t}/pseudo_label"))
        gradients = {name: parameter.grad for name, parameter in method.net.named_parameters()}
        expected = tensors(data, f"it{t}/grad")
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(gradients[name], value, 1e-5, name)
        expected, state = tensors(data, f"it{t}/student_after"), method.net.state_dict()
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert_near(state[name], value, 2e-6, name)
        for teacher, before in zip(method.teachers, teachers, strict=True):
            assert all(torch.equal(value, before[name]) for name, value in teacher.net.state_dict().items())


# --- the clean mode --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("ddb"))


@pytest.mark.parametrize("case", ["ddb-ckd", "ddb-ckd-soft-reference", "ddb-ckd-unrectified"])
def test_the_teachers_see_clean_images_and_the_net_augmented_ones(small_world, tmp_path, monkeypatch, case):
    method = CASES[case].prepared(small_world)
    step, batch = next(steps_of(method, 0, 1, tmp_path))
    clean = method.net.network_input(batch.target.levels[0], torch.float32)
    seen, trained = [], []
    for teacher in method.teachers:
        teacher.net.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        assert not teacher.net.training
    method.net.backbone.register_forward_pre_hook(lambda module, inputs: trained.append(inputs[0]))
    losses = method.step(batch, 0, step)
    assert len(seen) == len(trained) == 2
    assert all(torch.equal(image, clean) for image in seen)
    assert not torch.equal(trained[1], clean)
    assert ("Target/Distillation" in losses) == ("soft" in case)
    assert ("Target/Confident" in losses) == (case == "ddb-ckd")
    assert method.images().keys() == {"source", "target", "augmented", "pseudo_labels"}


def test_a_class_without_prototype_is_no_label(small_world, tmp_path):
    """Class 2 has none; as published, its zero vector attracts."""
    for mode in ("clean", "reference"):
        method = CASES["ddb-ckd"].prepared(small_world, mode=mode, cut_prototypes="{world}/cut_prototypes.pth")
        _, batch = next(steps_of(method, 0, 1, tmp_path))
        near = [near for _, near in method.predictions(batch.target.levels[0])]
        assert all(bool((one[:, 2] > 0).any()) == (mode == "reference") for one in near)
        for one in near:
            torch.testing.assert_close(one.sum(1), torch.ones_like(one[:, 0]))


# --- input -----------------------------------------------------------------------------------------------------------


def test_teachers_and_prototypes_that_do_not_fit(tmp_path):
    net, other = save_net(tmp_path / "net.pth"), save_net(tmp_path / "other.pth", num_classes=5)
    fitting = save_prototypes(tmp_path / "fitting.pth", net)
    teacher = FrozenTeacher("cut", str(net), str(fitting), 19)
    assert teacher.line.endswith("prototypes of 18 classes")
    assert teacher.inputs.keys() == {"cut teacher", "cut prototypes"}
    of_other = save_prototypes(tmp_path / "of_other.pth", other)
    unfinished = save_prototypes(tmp_path / "unfinished.pth", net, number_of_images=2)
    two_headed = save_net(tmp_path / "two_headed.pth", "UNetMulti")
    for file, prototypes, *parts in (
        (other, fitting, "--cut_teacher", "UNet with 5 classes", "has 19"),
        (net, of_other, "--cut_prototypes", "another net than --cut_teacher"),
        (net, unfinished, "--cut_prototypes", "is not finished"),
        (net, net, "--cut_prototypes", "no file of calculate_prototypes.py"),
        (net, tmp_path / "missing.pth", "--cut_prototypes", "missing.pth: no such file"),
        (two_headed, fitting, "--cut_teacher", "a net without features for prototypes"),
    ):
        check_refused(lambda f=file, p=prototypes: FrozenTeacher("cut", str(f), str(p), 19), *parts)


def flags_for(world, out, **changes):
    flags = {
        "method": "ddb-ckd", "gpus": "cpu", "src_data_dir": world / "gta", "trg_data_dir": world / "cityscapes",
        "src_resize": (52, 40), "trg_resize": (48, 36), "crop_size": (32, 24), "cut_teacher": out / "cut.pth",
        "class_teacher": out / "class.pth", "cut_prototypes": out / "cut_prototypes.pth",
        "class_prototypes": out / "class_prototypes.pth", "num_steps": 2, "batch_size": 2, "num_workers": 0,
        "precision": "fp32", "run_dir": out / "run", "tb_logs_dir": out / "runs",
    }  # fmt: skip
    return command(flags, changes)


@pytest.fixture
def teachers(tmp_path):
    for name in ("cut", "class"):
        net = save_net(tmp_path / f"{name}.pth", **{"head.classify.bias": torch.full((19,), float(len(name)))})
        save_prototypes(tmp_path / f"{name}_prototypes.pth", net)
    return tmp_path


def test_what_does_not_act_is_refused(world, teachers, run_script):
    before = tree(teachers)
    for changes, *parts in (
        ({"cut_teacher": None}, "--cut_teacher is required, a net of --method ddb-cut"),
        ({"class_prototypes": None}, "--class_prototypes is required", "--rectify none"),
        ({"rectify": "none"}, "--cut_prototypes does not act with --rectify none"),
        ({"rectify": "probabilities", "soft_distill": ()}, "--rectify probabilities", "--soft_distill"),
        ({"use_pl_weight": (), "soft_distill": ()}, "--use_pl_weight", "--soft_distill"),
        ({"temp": 2}, "--temp acts only with --soft_distill"),
        ({"pseudo_threshold": 0.5}, "--pseudo_threshold acts only with --use_pl_weight"),
        ({"soft_distill": (), "temp": 0}, "--temp is 0"),
        ({"teacher_alpha": 0.5}, "--teacher_alpha"),
        ({"num_classes": 21}, "--cut_teacher", "UNet with 19 classes", "has 21 (--num_classes)"),
    ):
        check_refusal(run_script(train_uda, *flags_for(world, teachers, **changes)), *parts)
    assert tree(teachers) == before


def test_a_changed_teacher_is_noticed_and_a_moved_one_is_found(world, teachers, run_script):
    result = run_script(train_uda, *flags_for(world, teachers))
    assert result.code == 0, result.err
    assert "cut teacher: UNet with 19 classes of " in result.out
    trained = load_checkpoint(teachers / "run/latest.pth")
    assert trained.modules.keys() == {"net"}
    assert trained.config["net"]["model"] == "UNet"  # as the teacher
    (teachers / "cut.pth").rename(teachers / "moved.pth")
    again = flags_for(world, teachers, cut_teacher=teachers / "moved.pth")
    assert run_script(train_uda, *again).code == 0
    check_refusal(run_script(train_uda, *flags_for(world, teachers)), "--cut_teacher", "cut.pth: no such file")
    save_net(teachers / "class.pth")
    check_refusal(run_script(train_uda, *again), "--class_prototypes", "another net than --class_teacher")
    save_prototypes(teachers / "class_prototypes.pth", teachers / "class.pth")
    check_refusal(run_script(train_uda, *again), "the class teacher is not the one the run was started with")


@pytest.mark.slow
def test_prototypes_of_the_script_are_taken(world, teachers, run_script, monkeypatch):
    for name in ("cut", "class"):
        flags = {
            "weights": teachers / f"{name}.pth", "trg_data_dir": world / "cityscapes", "trg_resize": (48, 36),
            "output": teachers / f"made/{name}.pth", "gpus": "cpu", "num_workers": 0,
        }  # fmt: skip
        assert run_script(calculate_prototypes, *command(flags)).code == 0
    flags = flags_for(
        world, teachers, cut_prototypes=teachers / "made/cut.pth", class_prototypes=teachers / "made/class.pth"
    )
    seen, real = [], uda.ddb_ckd.rectification
    monkeypatch.setattr(uda.ddb_ckd, "rectification", lambda *given: seen.append(given[1]) or real(*given))
    result = run_script(train_uda, *flags)
    assert result.code == 0, result.err
    assert len(seen) == 4
    assert all(vectors.shape == (19, 16) for vectors in seen)
