"""Schedule, teacher and steps of DDB against the published code's numbers. See `test_ddb_golden.py`."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import uda.ddb
from data_handlers.domain import DomainBatch, PairBatch
from models.segmentation import HEAD_RATE
from training.distributed import ALONE
from uda.ddb import NET, TEACHER, DDBTraining, warmed_up_rate
from uda.ddb_config import DDBConfig, ScheduleConfig
from uda.teacher import Teacher, ramped
from uda_golden import check_close, load, over


def tensor(data, name):
    return torch.from_numpy(np.asarray(data[name]))


class StandIn(nn.Module):
    """The files' small net."""

    def __init__(self, width, classes, stride):
        super().__init__()
        conv = nn.Conv2d(3, width, 3, stride, padding=1, bias=False)
        self.backbone = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Conv2d(width, classes, 1)
        self.start = ""

    def network_input(self, pixels, dtype):
        return pixels.movedim(-1, 1).contiguous()

    def forward(self, image):
        logits = self.head(self.backbone(image))
        return F.interpolate(logits, size=image.shape[2:], mode="bilinear", align_corners=False)


def tensors(data, prefix):
    """Arrays of a file below a prefix, by our names."""
    ours = {"conv1": "backbone.0", "bn1": "backbone.1", "conv2": "head"}
    found = {}
    for name in data:
        if name.startswith(f"{prefix}/"):
            layer, _, kind = name.removeprefix(f"{prefix}/").partition(".")
            found[f"{ours[layer]}.{kind}"] = tensor(data, name)
    return found


def check_state(net, expected):
    state = net.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        check_close(state[name], value, 2e-6, name)


# --- schedule and teacher --------------------------------------------------------------------------------------------


@over("ddb_lr")
def test_rates(path):
    data, meta = load(path)
    policy = {name: meta["lr_policy"][name] for name in ("power", "warmup_iters", "warmup_ratio", "min_lr")}
    published = {"max_iters": meta["max_iters"], **policy}
    runs = {name: ({**published, "lr": rate}, "iters") for name, rate in meta["base_lr"].items()}
    for name, (run, iters) in {**runs, "alt": (meta["alt"], "alt_iters")}.items():
        config = ScheduleConfig(
            num_steps=run["max_iters"], lr_semseg=run["lr"], power=run["power"], warmup_steps=run["warmup_iters"],
            warmup_ratio=run["warmup_ratio"], validation_rate=1,
        )  # fmt: skip
        assert run["min_lr"] == 0
        rates = np.array([warmed_up_rate(config, step) for step in data[iters].tolist()])
        assert np.abs(rates[:, None] * (1.0, meta["head_mult"]) - data[name]).max() <= 1e-10 * data[name].max(), name


@over("ddb_lr")
def test_the_default_schedule_and_optimiser_are_the_published_ones(path):
    meta = load(path)[1]
    method = method_of(StandIn(2, 3, 1), {})
    config = DDBConfig.from_flags({"method": "ddb-cut"}).schedule
    assert (config.lr_semseg, config.num_steps, config.power) == (meta["base_lr"]["st_r1"], meta["max_iters"], 1.0)
    assert (config.warmup_steps, config.warmup_ratio) == (meta["warmup_iters"], meta["warmup_ratio"])
    optimizer = method.optimizers[NET]
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == len(meta["param_groups"])
    for group in meta["param_groups"]:
        ours = optimizer.param_groups["decode_head" in group["name"]]
        assert ours["lr"] == pytest.approx(group["lr"])
        for name in ("weight_decay", "eps"):
            assert ours[name] == group[name]
        assert list(ours["betas"]) == group["betas"]


@over("ddb_ema")
def test_teacher(path):
    data, meta = load(path)
    alphas = [ramped(int(t), meta["alpha_max"]) for t in data["alpha_t"]]
    np.testing.assert_allclose(alphas, data["alpha"], rtol=1e-6)
    student = StandIn(meta["mid"], meta["num_classes"], 1)
    for batch_statistics in (True, False):
        teacher = Teacher(student, batch_statistics)
        teacher.net.load_state_dict(tensors(data, "teacher_before"))
        for t, alpha in zip(meta["steps"], meta["alpha_at_steps"], strict=True):
            state = tensors(data, f"student_at{t}" if t else "student0")
            student.load_state_dict(state)
            assert ramped(t, meta["alpha_max"]) == pytest.approx(alpha)
            teacher.follow(student, ramped(t, meta["alpha_max"]))
            expected = tensors(data, f"teacher_after{t}")
            buffers = dict(student.named_buffers())
            for name, value in teacher.net.state_dict().items():
                copied = name in buffers and not batch_statistics
                check_close(value, state[name] if copied else expected[name], 1e-6, name)
        assert teacher.updates == len(meta["steps"])
        norm = teacher.net.backbone[1]
        assert (norm.training, teacher.net.training) == (batch_statistics, False)


# --- steps -----------------------------------------------------------------------------------------------------------


def method_of(net, flags):
    """The method with a small net, ready for its first step."""
    config = DDBConfig.from_flags({
        "method": "ddb-cut", "model": "UNet", "num_classes": net.head.out_channels, "mode": "reference",
        "precision": "fp32", "jitter_p": 0.0, "blur_p": 0.0, **flags,
    })  # fmt: skip
    method = DDBTraining(config=config, rank=ALONE, source=range(9), target=range(9), net=net)
    method.begin_stage(0, resumed=False)
    return method


def golden_method(data, meta):
    optimizer = meta["optimizer"]
    assert (optimizer["type"], optimizer["head_mult"], meta["min_lr"]) == ("AdamW", HEAD_RATE, 0.0)
    net = StandIn(meta["mid"], meta["num_classes"], meta["stride"])
    net.load_state_dict(tensors(data, "distilled" if meta["distilled"] else "student_init"))
    method = method_of(net, {
        "method": f"ddb-{meta['mode']}", "batch_size": meta["n"], "num_steps": meta["max_iters"],
        "lr_semseg": optimizer["lr"], "weight_decay": optimizer["weight_decay"], "power": meta["power"],
        "warmup_steps": meta["warmup_iters"], "warmup_ratio": meta["warmup_ratio"],
        "pseudo_threshold": meta["threshold"], "teacher_alpha": meta["alpha"], "ignore_top": meta["ignore_top"],
        "ignore_bottom": meta["ignore_bottom"],
    })  # fmt: skip
    settings = method.optimizers[NET].defaults
    assert (list(settings["betas"]), settings["eps"]) == (optimizer["betas"], optimizer["eps"])
    method.modules[TEACHER].load_state_dict(tensors(data, "teacher_init"))
    return method


LOGGED = {
    "Source/Loss": "decode.loss_ce", "Mixed/Loss": "mix.decode.loss_ce", "Source/Accuracy": "decode.acc_seg",
    "Mixed/Accuracy": "mix.decode.acc_seg",
}  # fmt: skip


@over("ddb_step", but="ddb_step_ckd")
def test_steps(path, monkeypatch):
    data, meta = load(path)
    method = golden_method(data, meta)
    seen = {}

    def recording(name):
        function = getattr(uda.ddb, name)

        def record(*arguments):
            seen[name] = (arguments, function(*arguments))
            return seen[name][1]

        monkeypatch.setattr(uda.ddb, name, record)

    recording("pseudo_labels")
    recording("weighted_cross_entropy")
    for t in range(meta["iters"]):
        given = {name: tensor(data, f"it{t}/{name}") for name in ("src", "tgt", "label", "mask")}
        monkeypatch.setattr(method, "_mask", lambda label, draws, given=given: given["mask"][:, 0].bool())
        source = DomainBatch([given["src"].movedim(1, -1)], given["label"][:, 0])
        losses = method.step(PairBatch(source, DomainBatch([given["tgt"].movedim(1, -1)], None)), 0, t)
        rates = [group["lr"] for group in method.optimizers[NET].param_groups]
        np.testing.assert_allclose(rates, data[f"it{t}/lr"], rtol=1e-10)
        for ours, theirs in LOGGED.items():
            factor, tolerance = (1.0, 1e-6) if ours.endswith("Loss") else (100.0, 1e-5)
            expected = float(data[f"it{t}/log/{theirs}"])
            assert factor * float(losses[ours]) == pytest.approx(expected, rel=tolerance, abs=tolerance), ours
        assert float(losses["Target/Confident"]) == pytest.approx(float(data[f"it{t}/q"]), rel=1e-6)
        (logits,), (pseudo, _) = seen["pseudo_labels"]
        expected = data[f"it{t}/teacher_logits"]
        check_close(logits[: len(expected)], expected, 1e-5)
        assert torch.equal(pseudo, tensor(data, f"it{t}/pseudo_label").long())
        (_, mixed_label, mixed_weight), _ = seen["weighted_cross_entropy"]
        assert torch.equal(mixed_label, tensor(data, f"it{t}/mixed_label")[:, 0].long())
        check_close(mixed_weight, data[f"it{t}/mixed_weight"], 1e-6)
        gradients = {name: parameter.grad for name, parameter in method.net.named_parameters()}
        expected = tensors(data, f"it{t}/grad")
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            check_close(gradients[name], value, 1e-5, name)
        check_state(method.net, tensors(data, f"it{t}/student_after"))
        check_state(method.modules[TEACHER], tensors(data, f"it{t}/teacher_after"))
