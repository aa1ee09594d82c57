"""What every method of training has to hold: see `training.method.Method`, and `methods.py` for how one joins."""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter
from fnmatch import fnmatchcase

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core.domain_distance import frechet_distance, gaussian_of
from methods import (
    CASES,
    run_quietly,
    steps_of,
    train_short_source_net,
    write_learnable_world,
    write_world,
)
from processes import in_processes
from training.checkpoint import LATEST, load_checkpoint, read_newest
from training.loop import Loop
from utils.stopping import Stopped

every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("methods"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def leaves(value, name=""):
    """Every tensor and plain value in nested dicts and lists, by its path."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, f"{name}/{key}")
    else:
        yield name, value


def differences(one, other):
    """Paths at which two nested values are not the same bits."""
    one, other = dict(leaves(one)), dict(leaves(other))
    assert one.keys() == other.keys()
    return [
        name for name, value in one.items()
        if not (torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name])
    ]  # fmt: skip


# --- resume ----------------------------------------------------------------------------------------------------------


@every_case
def test_a_run_that_is_stopped_ends_with_the_same_bits(world, tmp_path, case):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    run_quietly(Loop(method=CASES[case].prepared(world), folder=whole))
    for at in CASES[case].stops:
        loop = continued(world, parts, case)
        loop.stop = lambda loop=loop, at=at: (loop.stage, loop.step) == at
        with pytest.raises(Stopped):
            run_quietly(loop)
        assert (loop.stage, loop.step) == at
    run_quietly(continued(world, parts, case))
    names = {path.name for path in whole.glob("*.pth")}
    assert {path.name for path in parts.glob("*.pth")} == names
    for name in names - {"previous.pth"}:
        one, other = (vars(load_checkpoint(folder / name)) for folder in (whole, parts))
        assert one["modules"]
        assert differences(one, other) == [], name
    assert load_checkpoint(whole / LATEST).stage_finished


def continued(world, folder, case):
    """A loop as a new process would make it: from the newest checkpoint, if there is one."""
    loop = Loop(method=CASES[case].prepared(world), folder=folder)
    if (folder / LATEST).exists():
        loop.restore(*read_newest(folder))
    return loop


# --- several processes -----------------------------------------------------------------------------------------------


def trained_in_float64(rank, world, folder, case):
    """The checkpoint after a whole run without validation, which is made in float32."""
    method = CASES[case].prepared(world, rank)
    method.dtype, method.validator = torch.float64, None
    loop = Loop(method=method, folder=folder)
    run_quietly(loop)
    return vars(loop.checkpoint())


@pytest.mark.processes
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if not case.has_dropout])
def test_two_processes_are_one_in_float64(world, tmp_path, case):
    names = ("one", "two")
    for name in names:
        (tmp_path / name).mkdir()
    first, second = in_processes(trained_in_float64, world, tmp_path / "two", case)
    alone = trained_in_float64(None, world, tmp_path / "one", case)
    assert differences(first["modules"], second["modules"]) == []
    for part in ("modules", "method_state"):
        expected, found = dict(leaves(alone[part])), dict(leaves(first[part]))
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                assert value.dtype == torch.float64, name
            if not isinstance(value, str):  # a fingerprint of weights tells roundings apart
                torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)


# --- what is trained -------------------------------------------------------------------------------------------------


@every_case
def test_every_trainable_tensor_is_in_one_group_and_moves(world, tmp_path, case):
    method = CASES[case].prepared(world)
    for stage in range(len(method.stages())):
        batches = steps_of(method, stage, 4, tmp_path)
        step, batch = next(batches)
        trainable = {
            f"{name}.{key}": parameter for name, module in method.modules.items()
            for key, parameter in module.named_parameters() if parameter.requires_grad
        }  # fmt: skip
        groups = [group for optimizer in method.optimizers.values() for group in optimizer.param_groups]
        held = Counter(id(parameter) for group in groups for parameter in group["params"])
        assert held == Counter(id(parameter) for parameter in trainable.values())
        before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
        method.step(batch, stage, step)
        for step, batch in batches:
            method.step(batch, stage, step)
        still = {name for name, parameter in trainable.items() if torch.equal(parameter, before[name])}
        listed = {name for name in trainable if any(fnmatchcase(name, pattern) for pattern in method.unused)}
        assert still == listed
        assert all(method.unused.values())
        method.end_stage(stage)


# --- learning --------------------------------------------------------------------------------------------------------

@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.learning])
def test_learning(tmp_path, case, seed):
    """A segmentation net comes to predict held-out labels, and a translator comes closer to the target."""
    world = write_learnable_world(tmp_path, seed)
    if CASES[case].adapts:
        train_short_source_net(world, seed)
    method = CASES[case].prepared(world, manual_seed=seed, **CASES[case].learning)
    validator = method.validator
    loop = Loop(method=method, folder=tmp_path)
    loop.begin_stage(0, resumed=False)
    before = validator(method.eval_net()).mean_iou if validator else None
    run_quietly(loop)
    if validator:
        assert validator(method.eval_net()).mean_iou > before + 0.1
    else:
        images = {name: colours(image) for name, image in method.images().items()}
        untranslated, translated = (frechet_distance(images[name], images["target"]) for name in ("source", "SiT"))
        assert translated < 0.5 * untranslated


def colours(images):
    """Gaussian of the colours of images (B,3,h,w)."""
    return gaussian_of([images.permute(0, 2, 3, 1).flatten(0, 2).numpy()])


# --- what a step does not do -----------------------------------------------------------------------------------------


class NoHostReads(TorchDispatchMode):
    """Refuses operations whose result or whose shape depends on values, for which a GPU would be waited for."""

    REFUSED = (
        "aten._local_scalar_dense", "aten.item", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select",
        "aten.unique", "aten._unique2", "aten.index.Tensor_bool", "aten.bincount",
    )  # fmt: skip

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = str(function)
        assert not name.startswith(tuple(f"{refused}." for refused in self.REFUSED)), f"{name} waits for the device"
        return function(*arguments, **(keywords or {}))


@every_case
def test_a_step_reads_nothing_back_and_does_no_io(world, tmp_path, monkeypatch, case):
    method = CASES[case].prepared(world)

    def refuse(*arguments, **keywords):
        raise AssertionError("a step does I/O, or reads a value back")

    for stage in range(len(method.stages())):
        for step, batch in steps_of(method, stage, 2, tmp_path):
            with monkeypatch.context() as patch, NoHostReads():
                for where, names in (
                    (builtins, ("open", "print")), (io, ("open",)), (os, ("open", "write")),
                    (torch.Tensor, ("cpu", "item", "numpy", "tolist", "__bool__", "__float__", "__int__")),
                ):  # fmt: skip
                    for name in names:
                        patch.setattr(where, name, refuse)
                losses = method.step(batch, stage, step)
            assert losses
            for value in losses.values():
                assert value.shape == ()
                assert not value.requires_grad
        method.end_stage(stage)
