"""How the methods that learn from predictions are trained: passes of a step, optimisers, norms, the restitution."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import uda.maxsquare
from data_handlers.classes import IGNORE
from methods import (
    CASES,
    LEARNABLE,
    TWO_HEADED_NET,
    run_quietly,
    steps_of,
    train_short_source_net,
    write_learnable_world,
    write_world,
)
from models.restitution import Restituted
from refusals import check_refused
from training.distributed import ALONE
from training.loop import Loop
from uda.maxsquare import HEADS, NET
from uda.restitution import RestitutionHeads, dual_loss, entropies, restitution_loss

TWO_HEADED = {"init": f"{{world}}/{TWO_HEADED_NET}", "multi": True, "lambda_restitution": 0.0, "threshold": 0.06}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("methods"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- passes of a step ------------------------------------------------------------------------------------------------

PASSES = {
    "maxsquare": ("maxsquare", {}), "iw_maxsquare": ("maxsquare", {"method": "iw_maxsquare", "IW_ratio": 0.7}),
    "iw_entropy": ("maxsquare", {"method": "iw_entropy"}), "hard": ("hard-adam", {}),
    "hard-multi": ("hard-multi", {**TWO_HEADED, "freeze_bn": True}),
    "iw_entropy-multi": ("hard-multi", {**TWO_HEADED, "freeze_bn": True, "method": "iw_entropy"}),
}  # fmt: skip


@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("name", PASSES)
def test_passes_add_up_to_the_step_of_the_whole_batch(world, tmp_path, monkeypatch, name, micro_batch):
    """In float64, with unevenly labelled source images, one without labels, and pseudo-labels on some of the pixels."""
    case, changes = PASSES[name]
    found, labels = {}, []
    for kind in ("ensemble_label", "confident_label"):
        function = getattr(uda.maxsquare, kind)
        monkeypatch.setattr(uda.maxsquare, kind, lambda *a, f=function: labels.append(f(*a)) or labels[-1])
    for size in (0, micro_batch):
        method = CASES[case].prepared(world, **{**changes, "batch_size": 4, "micro_batch": size})
        method.dtype = torch.float64
        seen, losses = [], []
        method.net.backbone.register_forward_pre_hook(lambda net, inputs, seen=seen: seen.append(len(inputs[0])))
        for step, batch in steps_of(method, 0, 1, tmp_path / f"{size}"):
            label = batch.source.label
            label[0], label[1, :7], label[2, 2:] = IGNORE, IGNORE, IGNORE
            losses += method.step(batch, 0, step).values()
        assert max(seen) <= (size or 4)
        grads = [p.grad for p in method.net.parameters() if p.grad is not None]
        found[size] = [torch.stack(losses), *grads, *method.net.state_dict().values()]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    kept = sum(int((label != IGNORE).sum()) for label in labels)
    assert not labels or 0 < kept < sum(label.numel() for label in labels)


def test_labels_that_are_made_ahead_leave_the_statistics(world, tmp_path):
    """Each of the two passes of each domain counts once."""
    method = CASES["hard-multi"].prepared(world, **TWO_HEADED, batch_size=2, micro_batch=1)
    norms = [module for module in method.net.modules() if isinstance(module, nn.BatchNorm2d)]
    for step, batch in steps_of(method, 0, 1, tmp_path):
        method.step(batch, 0, step)
    assert {int(norm.num_batches_tracked) for norm in norms} == {4}


def test_frozen_statistics_stay_in_all_steps(world, tmp_path):
    method = CASES["iw_entropy-reference"].prepared(world, freeze_bn=True)
    before = {name: value.clone() for name, value in method.net.state_dict().items()}
    for step, batch in steps_of(method, 0, 2, tmp_path):
        method.step(batch, 0, step)
        method.validator(method.eval_net())
    after = method.net.state_dict()
    running = [name for name in before if "running" in name]
    assert running
    assert all(torch.equal(before[name], after[name]) for name in running)
    assert not torch.equal(before["head.classify.bias"], after["head.classify.bias"])


# --- optimisers and the restitution ----------------------------------------------------------------------------------


def test_adam_has_the_published_settings(world):
    method = CASES["hard-adam"].prepared(world)
    method.begin_stage(0, resumed=False)
    optimizer = method.optimizers[NET]
    assert isinstance(optimizer, torch.optim.Adam)
    for group, rate in zip(optimizer.param_groups, (1e-3, 1e-2), strict=True):
        assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.9, 0.99), 5e-4, rate)


@pytest.mark.parametrize("mode", ["clean", "reference"])
def test_a_step_trains_norms_and_gates(world, tmp_path, mode):
    """The published optimiser forgets them; reference, too, lists them once."""
    method = CASES["hard-multi"].prepared(world, mode=mode)
    for step, batch in steps_of(method, 0, 1, tmp_path):
        names = [name for name, _ in method.net.named_parameters() if ".snr." in name]
        before = {name: method.net.get_parameter(name).detach().clone() for name in names}
        method.step(batch, 0, step)
    assert len(names) == 18
    moved = {name for name in names if not torch.equal(before[name], method.net.get_parameter(name))}
    assert moved == set(names)


def test_the_restitution_loss_of_both_domains(world, tmp_path):
    kinds = {}
    for domains in ("source", "both"):
        method = CASES["hard-multi"].prepared(world, restitution_domains=domains)
        for step, batch in steps_of(method, 0, 1, tmp_path):
            kinds[domains] = method.step(batch, 0, step)
            assert all(p.grad is not None for p in method.modules[HEADS].parameters())
    assert kinds["both"].keys() - kinds["source"].keys() == {"Target/Restitution"}
    assert "Target/RestitutionHeads" not in kinds["both"]
    torch.testing.assert_close(kinds["both"]["Source/Restitution"], kinds["source"]["Source/Restitution"])


@pytest.mark.parametrize("per_pixel", [False, True])
def test_the_share_of_the_restitution_loss(per_pixel):
    """Without labels there is the dual loss alone; its value is the local samples' share."""
    heads = RestitutionHeads((4, 8), 3)
    parts = [Restituted(*torch.rand(3, 2, channels, 4, 5)) for channels in (4, 8)]
    mean = None if per_pixel else torch.Tensor.mean
    expected = 0.0
    for head, features in zip(heads, parts, strict=True):
        expected = expected + sum(dual_loss(Restituted(*map(head, features)), mean))
    (whole,) = restitution_loss(heads, parts, None, rank=ALONE, fraction=1.0, per_pixel=per_pixel)
    torch.testing.assert_close(whole, expected)
    assert entropies(torch.zeros(2, 3, 4, 5)).shape == (2, 4, 5)


def test_the_bar_tells_the_losses_of_both_domains_apart(world):
    method = CASES["maxsquare"].prepared(world)
    assert method.summary({"Source/Main": 2.0, "Target/Main": 1.0}) == "Source/Main 2.0000 Target/Main 1.0000"
    assert method.summary({"Source/Main": 2.0, "Source/Auxiliary": 1.0}) == "Main 2.0000 Auxiliary 1.0000"


# --- learning --------------------------------------------------------------------------------------------------------

SHORTLY = {
    **LEARNABLE, "trg_data_dir": "{world}/evening", "trg_resize": (48, 32), "batch_size": 4, "round_num": 1,
    "epoch_each_round": 6, "lr_semseg": 2e-2, "select_by": "none",
}  # fmt: skip
LEARNING = {
    "maxsquare": {}, "iw_maxsquare": {}, "entropy": {}, "hard": {"threshold": 0.8},
    "hard-multi": {"method": "hard", "threshold": 0.8, "multi": True},
}  # fmt: skip


def scores_after(world, seed, name, lambda_target):
    """mIoU before; mIoU and mean confidence on the target after 24 steps."""
    flags = {**SHORTLY, "method": name, **LEARNING[name], "lambda_target": lambda_target, "manual_seed": seed}
    method = CASES["maxsquare"].prepared(world, **flags)
    loop = Loop(method=method, folder=world)
    loop.begin_stage(0, resumed=False)
    before = method.validator(method.eval_net()).mean_iou
    run_quietly(loop)
    after = method.validator(method.eval_net())
    return before, after.mean_iou, after.statistics.mean_confidence()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_learning(tmp_path, seed):
    """From a short source net, mIoU on the target rises by ten points, and the target's losses add to the confidence.

    Most of the gain comes from the source's labels (docs/uda.md).
    """
    world = write_learnable_world(tmp_path, seed)
    train_short_source_net(world, seed, model="UNetMulti", multi=True)
    alone = scores_after(world, seed, "maxsquare", 0.0)[2]
    for name in LEARNING:
        before, after, confidence = scores_after(world, seed, name, 1.0)
        assert after > before + 0.1, name
        assert confidence > alone, name


# --- flags -----------------------------------------------------------------------------------------------------------


def test_what_contradicts_is_refused(world):
    for changes, *parts in (
        ({"micro_batch": 1}, "--lambda_restitution compares means over a batch; omit --micro_batch"),
        ({"mode": "reference", "optim": "Adam"}, "--mode reference", "omit --optim Adam"),
    ):
        check_refused(lambda changes=changes: CASES["hard-multi"].prepared(world, **changes), *parts)
