"""What all methods of train_uda.py share: the net they start from, passes of a step, presets, --print_config."""

from __future__ import annotations

import json
import os

import pytest
import torch

import train_procst
import train_semseg_on_source
import train_uda
from commands import source_flags
from methods import CASES, steps_of, write_world
from nets import save_net
from refusals import check_refusal, tree
from training.checkpoint import load_checkpoint
from training.distributed import Rank
from training.flags import build_parser, parse
from uda.cbst_config import SelfTrainingConfig
from uda.maxsquare_config import MaxSquareConfig
from uda.presets import NAMES, listing


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("methods"))


# --- the net to start from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [train_semseg_on_source, train_uda])
def test_a_training_on_source_starts_from_a_net(world, tmp_path, run_script, script):
    """Its shape need not be given, and is what the run records; a continued run does not need the file."""
    start = save_net(tmp_path / "start.pth", num_classes=20)
    words = ("--method", "source") if script is train_uda else ()
    flags = (*words, *source_flags(world, tmp_path, model=None, init=start, num_steps=1, lr_semseg=1e-30))
    result = run_script(script, *flags)
    assert result.code == 0, result.err
    assert "UNet with 20 classes" in result.out
    assert f"it starts from {start}" in result.out
    (run,) = (tmp_path / "models").iterdir()
    trained = load_checkpoint(run / "latest.pth")
    assert (trained.config["net"]["model"], trained.config["net"]["num_classes"]) == ("UNet", 20)
    assert_same_weights(trained, start)
    start.unlink()
    assert run_script(script, *words, "--continue_train_from_path", run).code == 0


def assert_same_weights(checkpoint, path):
    for name, value in load_checkpoint(path).modules["net"].items():
        torch.testing.assert_close(checkpoint.modules["net"][name], value, rtol=0, atol=1e-12)


def test_what_contradicts_the_net_to_start_from_is_refused(world, tmp_path, run_script):
    start = save_net(tmp_path / "start.pth")
    for changes, *parts in (
        ({"model": "VGG"}, "--model VGG: the net of --init", "start.pth is UNet with 19 classes"),
        ({"num_classes": 20}, "--num_classes 20: the net of --init"),
        ({"backbone_weights": "random"}, "--init and --backbone_weights contradict each other"),
        ({"init": tmp_path / "missing.pth"}, "--init", "missing.pth: no such file"),
    ):
        flags = source_flags(world, tmp_path, **{"init": start, **changes})
        check_refusal(run_script(train_semseg_on_source, *flags), *parts)


# --- passes of a step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
@pytest.mark.parametrize("name", ["source-unet", "cbst"])
def test_passes_add_up_to_the_step_of_the_whole_batch(small_world, tmp_path, name, micro_batch):
    """In float64, without batch norm, with labels that are spread unevenly over the images, one without any."""
    batch_size = 4
    found = {}
    for size in (0, micro_batch):
        method = CASES[name].prepared(small_world, batch_size=batch_size, micro_batch=size)
        method.dtype = torch.float64
        seen = []
        method.net.register_forward_pre_hook(lambda net, inputs, seen=seen: seen.append(len(inputs[0])))
        losses = []
        for step, batch in steps_of(method, 0, 2, tmp_path / f"{size}"):
            batch.label[0], batch.label[1, : 7 + step], batch.label[2, 2:] = 255, 255, 255
            del seen[:]
            losses += [float(value) for value in method.step(batch, 0, step).values()]
            passes = -(-batch_size // size) if size else 1
            assert (len(seen), sum(seen)) == (passes, batch_size)
            assert max(seen) <= (size or batch_size)
        found[size] = losses, [p.grad.clone() for p in method.net.parameters()], method.net.state_dict()
    (losses, grads, state), (ours, our_grads, our_state) = found.values()
    assert ours == pytest.approx(losses, rel=0, abs=1e-12)
    for one, other in zip(grads, our_grads, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    for key, value in state.items():
        torch.testing.assert_close(our_state[key], value, rtol=0, atol=1e-12)


def test_all_processes_take_as_many_passes_and_none_is_empty():
    for count in (1, 2, 3):
        for batch in range(count, 9):
            for micro_batch in range(5):
                ranks = [Rank(index=k, count=count) for k in range(count)]
                (passes,) = {rank.passes(batch, micro_batch) for rank in ranks}
                sizes = [len(p) for r in ranks for p in torch.empty(len(r.part(batch))).tensor_split(passes)]
                assert min(sizes) >= 1
                assert not micro_batch or max(sizes) <= micro_batch + (micro_batch == 1 and batch % count > 0)
                assert micro_batch or passes == 1


# --- presets ---------------------------------------------------------------------------------------------------------

# The published command lines by the names of the authors' flags; what theirs leave out is their default.
PUBLISHED = {
    "num_round": 6, "epoch_per_round": 2, "test_scales": 1850, "batch_size": 2, "crop_size": 500, "base_lr": 1e-4,
    "weight_decay": 5e-4, "momentum": 0.9, "scale_rate_range": (0.7, 1.3), "max_tgt_port": 0.5, "step_tgt_port": 0.05,
    "max_src_port": 0.06, "step_src_port": 0.0025, "mine_port": 0.8, "mine_id_number": 3, "mine_thresh": 0.001,
    "seed_int": 0, "source_sample_policy": "cumulative", "split_tgt": "train", "target": "cityscapes",
}  # fmt: skip
GTA5 = {**PUBLISHED, "source": "gta5", "init_tgt_port": 0.15, "init_src_port": 0.03}
SYNTHIA = {**PUBLISHED, "source": "synthia", "init_tgt_port": 0.2, "init_src_port": 0.02}
PRIOR = os.path.abspath("pretrained/prior_gta5.mat")
MAXSQUARE = {
    "method": "maxsquare", "source": "gta5", "target": "cityscapes", "src_split": "", "src_resize": (1280, 720),
    "trg_resize": (1024, 512), "crop_size": None, "random_crop": False, "no_gaussian_blur": False, "batch_size": 1,
    "round_num": 5, "epoch_each_round": 2, "lr_semseg": 2.5e-4, "weight_decay": 5e-4, "momentum": 0.9, "power": 0.9,
    "lambda_target": 0.1, "IW_ratio": 0.2, "multi": False, "lambda_seg": 0.1, "threshold": 0.95, "model": "",
    "aspp_branches": None, "freeze_bn": False, "mode": "clean", "select_by": "none", "lambda_restitution": 0,
}  # fmt: skip
EXPECTED = {
    "gta5-cityscapes-cbst": {**GTA5, "method": "cbst", "spatial_prior": ""},
    "gta5-cityscapes-cbst-sp": {**GTA5, "method": "cbst-sp", "spatial_prior": PRIOR},
    "gta5-cityscapes-st": {**GTA5, "method": "st", "spatial_prior": ""},
    "synthia-cityscapes-cbst": {**SYNTHIA, "method": "cbst", "spatial_prior": ""},
    "synthia-cityscapes-st": {**SYNTHIA, "method": "st", "spatial_prior": ""},
    "gta5-cityscapes-maxsquare": MAXSQUARE,
    "gta5-cityscapes-iw-maxsquare": {**MAXSQUARE, "method": "iw_maxsquare"},
    "gta5-cityscapes-iw-maxsquare-multi": {
        **MAXSQUARE, "method": "iw_maxsquare", "multi": True, "lambda_target": 0.09, "trg_resize": (1280, 640),
    },
    "gta5-cityscapes-entropy": {**MAXSQUARE, "method": "entropy"},
    "gta5-cityscapes-snr-maxsquare": {**MAXSQUARE, "model": "DeepLabV2MultiSNR"},
    "synthia-cityscapes-maxsquare": {**MAXSQUARE, "source": "synthia", "src_resize": (1280, 760)},
    "cityscapes-crosscity-maxsquare": {
        **MAXSQUARE, "source": "cityscapes", "src_split": "fine", "src_resize": (1024, 512), "target": "crosscity",
        "round_num": 1, "epoch_each_round": 10,
    },
}  # fmt: skip
# Longer sides at the factor 1: None is that of each data set's images, which is the published one.
EVERYWHERE = {"origin_size": None, "origin_size_tgt": None, "mode": "clean", "micro_batch": 0, "select_by": "none"}


def parsed(*words):
    """The configuration of a command line, and the flags that count as given."""
    words = [str(word) for word in words]
    config, groups = train_uda.flags_of(words)
    given = parse(build_parser("", groups), words)
    config.check_given(given)
    return config, given


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_the_published_command_line(name):
    config, given = parsed("--preset", name)
    expected = EXPECTED[name] if config is MaxSquareConfig else {**EXPECTED[name], **EVERYWHERE}
    flags = config.from_flags(given).flags()
    assert {key: flags[key] for key in expected} == expected
    assert given.keys() <= flags.keys()
    lines = listing().splitlines()
    (command,) = (lines[k + 1] for k, line in enumerate(lines) if line.startswith(f"{name}: "))
    assert parsed(*command.split()[2:]) == (config, given)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("gta5-cityscapes-cbst", "--method", "hard"), ("--method hard does not have --init_tgt_port",)),
        (("gta5-cityscapes-maxsquare", "--method=cbst"), ("--method cbst does not have --src_resize",)),
        (("gta5-cityscapes-entropy", "--method", "source"), ("--preset: --method source does not have --trg_resize",)),
        (("gta5-cityscapes-iw-maxsquare", "--method", "hard"), ("--IW_ratio acts only with iw_maxsquare",)),
        (("gta5-cityscapes-cbst-sp", "--method", "cbst"), ("--spatial_prior (or a preset's) acts only with cbst-sp",)),
    ],
)  # fmt: skip
def test_a_method_that_a_preset_does_not_fit(tmp_path, run_script, monkeypatch, words, parts):
    monkeypatch.chdir(tmp_path)
    check_refusal(run_script(train_uda, "--preset", *words, "--print_config"), *parts)
    assert not list(tmp_path.iterdir())


def test_a_preset_with_another_method_that_takes_its_flags(run_script):
    for words in (("--method", "hard", "--threshold", 0.9), ("--method=iw_entropy", "--IW_ratio", 0.1)):
        result = run_script(train_uda, *words, "--preset", "gta5-cityscapes-entropy", "--print_config")
        assert result.code == 0, result.err
        config = json.loads(result.out)
        assert config["method"]["method"] in str(words[:2])
        assert config["target"]["src_resize"] == [1280, 720]


def test_a_preset_is_overridden_and_recorded_as_what_it_comes_to(tmp_path, run_script, monkeypatch):
    assert tuple(EXPECTED) == NAMES
    monkeypatch.chdir(tmp_path)
    words = ("--preset", "synthia-cityscapes-cbst", "--num-round", 3)
    for order in (words, (*words[2:], *words[:2])):
        result = run_script(train_uda, *order, "--print_config")
        assert result.code == 0, result.err
        config = SelfTrainingConfig.from_json(json.loads(result.out), "printed")
        expected = SelfTrainingConfig.from_flags({**EXPECTED["synthia-cityscapes-cbst"], "num_round": 3})
        assert config == expected
    check_refusal(run_script(train_uda, "--preset", "gta-cbst"), "--preset gta-cbst: no such preset", *NAMES)
    for method in ((), ("--method", "source"), ("--method", "maxsquare"), ("--preset", "gta5-cityscapes-entropy")):
        result = run_script(train_uda, *method, "--list_presets")
        assert (result.code, result.out) == (0, listing() + "\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [train_procst, train_semseg_on_source, train_uda])
def test_the_configuration_is_printed_without_data_and_nothing_is_written(tmp_path, run_script, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    result = run_script(script, "--print_config", "--run_dir", "run", "--manual_seed", 3)
    assert result.code == 0, result.err
    assert json.loads(result.out)["run"]["manual_seed"] == 3
    assert not list(tmp_path.iterdir())
    check_refusal(run_script(script, "--print_config", "--print_rate", 0), "--print_rate is 0")


def test_the_configuration_of_a_run_is_printed(finished_run, run_script):
    before = tree(finished_run)
    result = run_script(train_procst, "--continue_train_from_path", finished_run, "--print_config")
    assert json.loads(result.out) == json.loads((finished_run / "config.json").read_text())["config"]
    assert tree(finished_run) == before
