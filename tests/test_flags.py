"""The command lines of the trainings: what is answered at once, what is the default, stored, or may change."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_procst
import train_semseg_on_source
import train_uda
from commands import only_run, procst_flags, source_flags
from core.config import ProCSTConfig
from refusals import check_refusal, tree
from training.config import StartFlags
from training.flags import build_parser, flag_of, options_of, parse
from uda.cbst_config import SelfTrainingConfig
from uda.config import SourceTrainingConfig
from uda.ddb_ckd_config import DistillationTrainingConfig
from uda.ddb_config import DDBConfig
from uda.maxsquare_config import MaxSquareConfig
from uda.presets import PresetFlags
from utils.errors import UserError

REPOSITORY = Path(__file__).parent.parent
STARTING = (StartFlags, PresetFlags)  # no part of a configuration
CONFIGS = (
    ProCSTConfig, SourceTrainingConfig, SelfTrainingConfig, MaxSquareConfig, DDBConfig, DistillationTrainingConfig,
)  # fmt: skip
SCRIPTS = (train_procst, train_semseg_on_source, train_uda)
# Flags of all trainings that cannot act, or have one value, in one.
REFUSED = {SelfTrainingConfig: ("cache_dir", "resample"), DistillationTrainingConfig: ("method",)}


ALWAYS = {  # of their command lines
    MaxSquareConfig: ("--method", "iw_entropy", "--lambda_restitution", "0.3"), DDBConfig: ("--method", "ddb-cut"),
    DistillationTrainingConfig: ("--method", "ddb-ckd"),
}  # fmt: skip


def sections(config):
    return [section for group in config.groups.values() for section in group]


def config_of(config, *arguments):
    """What a command line comes to."""
    words = [*ALWAYS.get(config, ()), *map(str, arguments)]
    given = parse(build_parser("", config.groups, config.first), words)
    config.check_given(given)
    return config.from_flags(given)


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_typo_is_answered_before_pytorch_is_imported(script):
    code = (
        "import sys\n"
        "sys.argv = ['train.py', '--typo', '1']\n"
        f"import {script.__name__}\n"
        "from utils.errors import run_cli\n"
        "try:\n"
        f"    run_cli({script.__name__}.main)\n"
        "finally:\n"
        "    print('torch' in sys.modules or 'numpy' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "False\n")
    assert result.stderr == "error: unrecognized arguments: --typo 1 (see --help)\n"


@pytest.mark.parametrize(
    ("script", "config"), [*zip(SCRIPTS, CONFIGS, strict=False), *((train_uda, config) for config in CONFIGS[3:])]
)
def test_help_begins_with_the_flags_that_matter_most(run_script, script, config):
    result = run_script(script, *ALWAYS.get(config, ()), "--help")
    assert result.code == 0
    assert result.out.startswith("usage: python ")
    lines = [line.split()[0].rstrip(",") for line in result.out.splitlines() if line.startswith("  --")]
    assert lines[: len(config.first)] == [flag_of(name) for name in config.first]
    options = options_of(*sections(config))
    shown = {name for name, field in options.items() if not field.metadata["hidden"]}
    assert set(lines) == {"--print_data"} | {flag_of(name) for name in shown}
    assert len(lines) == len(set(lines))
    text = " ".join(result.out.split())
    assert all(options[name].metadata["help"] in text for name in shown)


def test_the_defaults_are_the_published_setting():
    config = config_of(ProCSTConfig)
    assert config.schedule.batch_size_list == (32, 16, 3)
    assert config.network.base_channels_list == (64, 64, 64)
    assert config.network.norm == ("batch", "batch", "group")
    assert (config.source.crop_size, config.source.src_resize) == ((1024, 512), (1126, 619))
    assert config.schedule.epochs_per_scale == 40
    assert str(config.net.shape()) == "DeepLabV2 on resnet101 with 19 classes"


def test_one_value_stands_for_every_scale():
    config = config_of(ProCSTConfig, "--batch_size", 4, "--steps_per_scale", 7, "--base_channels_list", 16)
    assert config.schedule.batch_size_list == (4, 4, 4)
    assert config.schedule.steps_per_scale == (7, 7, 7)
    assert config.network.base_channels_list == (16, 16, 16)


@pytest.mark.parametrize(("gpus", "norm"), [(1, "batch"), (2, "batch"), (3, "group")])
def test_the_norm_follows_the_images_of_a_gpu(gpus, norm):
    assert config_of(ProCSTConfig, "--gpus", *range(gpus)).network.norm[0] == norm


def test_paths_become_absolute_and_keywords_stay(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = ("--src_data_dir", "gta", "--vgg_weights", "random", "--semseg_weights", "~/net.pth")
    config = config_of(ProCSTConfig, *words)
    assert config.source.src_data_dir == str(tmp_path / "gta")
    assert config.run.checkpoints_dir == str(tmp_path / "TrainedModels")
    assert config.loss.vgg_weights == "random"
    assert config.labels.semseg_weights == str(Path.home() / "net.pth")
    assert config.loader.cache_dir == ""


@pytest.mark.parametrize("config", CONFIGS)
def test_a_stored_configuration_is_read_back(config):
    stored = json.loads(json.dumps(config_of(config).to_json()))
    assert config.from_json(stored, "latest.pth") == config_of(config)
    for section in stored:
        for broken in ({**stored, section: {**stored[section], "unknown": 1}}, {**stored, section: 3}):
            with pytest.raises(UserError, match=r"latest\.pth: written by another version of this toolkit"):
                config.from_json(broken, "latest.pth")


OTHER_VALUES = {
    "gpus": "cpu", "num_scales": "1 --batch_size 2", "base_channels_list": "16", "norm": "batch",
    "batch_size_list": "2 2 2", "crop_size": "512 256", "src_resize": "1200 700", "trg_resize": "1200 700",
    "content_layers": "8", "style_layers": "3", "steps_per_scale": "5", "model": "VGG", "backbone": "resnet50",
    "beta1": "0.5", "momentum": "0.5", "scale_factor": "0.75", "ker_size": "5", "num_workers": "3",
    "debug_stop_iteration": "3 --debug_run", "output": "other",
    "debug_stop_epoch": "2 --debug_run", "backbone_weights": "random", "source": "synthia", "target": "gta5",
    "aspp_branches": "4 --model DeepLabV2Multi", "random_crop": "--crop_size 512 256", "multi": "--model UNetMulti",
    "lambda_seg": "0.2 --multi --model UNetMulti", "trg_labels": "trainids --target gta5",
    "trg_data_dir": "other --target gta5",
    "spatial_prior": "other --method cbst-sp", "method": "st", "mine_port": "0.5", "scale_rate_range": "0.5 2",
    "mode": "reference",
    "teacher_alpha": "0.5", "pseudo_threshold": "0.5", "cat_max_ratio": "0.5", "jitter_p": "0.5",
    "feature_classes": "1 2 --lambda_features 0.1", "feature_min_ratio": "0.5 --lambda_features 0.1",
    "rectify": "logits", "soft_distill_w": "0.5 --soft_distill", "temp": "2 --soft_distill",
}  # fmt: skip


OTHER_VALUES_IN = {
    MaxSquareConfig: {
        "method": "hard", "model": "UNet", "aspp_branches": "4", "multi": "", "lambda_seg": "0.2 --multi",
        "trg_data_dir": "other", "trg_labels": "trainids", "threshold": "0.5 --multi", "backbone_weights": "",
        "micro_batch": "2 --lambda_restitution 0", "lambda_restitution": "0.5", "IW_ratio": "0.5",
    },
    DDBConfig: {"method": "ddb-class"},
    DistillationTrainingConfig: {"pseudo_threshold": "0.5 --use_pl_weight"},
}  # fmt: skip


def other_value(field, config):
    """A legal value of a flag that is not its default, as words of a command line."""
    kind, choices = field.metadata["type"], field.metadata["choices"]
    if field.name in (own := OTHER_VALUES_IN.get(config, {})):
        return own[field.name].split()
    if field.name in OTHER_VALUES and (field.name != "crop_size" or field.metadata["nargs"]):
        return OTHER_VALUES[field.name].split()
    if choices:
        return [next(choice for choice in choices if choice != field.default)]
    return [] if kind is bool else ["other"] if kind is str else [str((field.default or 1) * 2)]


def flags_of(config):
    options = options_of(*(section for section in sections(config) if section not in STARTING))
    refused = REFUSED.get(config, ())
    shown = (name for name, field in options.items() if not field.metadata["hidden"] and name not in refused)
    return [pytest.param(config, name, id=f"{config.__name__}-{name}") for name in shown]


@pytest.mark.parametrize(("config", "name"), [flag for config in CONFIGS for flag in flags_of(config)])
def test_every_flag_is_stored_and_kept_by_a_continued_run_unless_it_may_change(config, name):
    field = options_of(*sections(config))[name]
    words, flag = other_value(field, config), f"--no-{name}" if field.default is True else flag_of(name)
    started, changed = config_of(config), config_of(config, flag, *words)
    # Two flags stand for another one, and leave no value of their own.
    stored = {"no_pretrained_backbone": "backbone_weights"}.get(name, name)
    if config is ProCSTConfig and name == "batch_size":
        stored = "batch_size_list"
    assert changed.flags()[stored] != started.flags()[stored]
    assert config.from_json(json.loads(json.dumps(changed.to_json())), "latest.pth") == changed
    given = parse(build_parser("", config.groups), [*ALWAYS.get(config, ()), flag, *words])
    if started.may_change(stored):
        assert started.continued({name: given[name]}).flags()[stored] == changed.flags()[stored]
    else:
        with pytest.raises(UserError, match=r"the run was started with|changes the run's config") as refusal:
            started.continued({name: given[name]})
        assert flag_of(name) in str(refusal.value)
    assert changed.continued(given) == changed  # the same command starts a run and continues it


@pytest.mark.parametrize("config", CONFIGS)
def test_what_may_change(config):
    """Where things are, how they are reported, and how they are computed; never what is computed."""
    options = options_of(*(section for section in sections(config) if section not in STARTING))
    shared = {
        "gpus", "tb_logs_dir", "print_rate", "save_checkpoint_rate", "save_checkpoint_minutes", "pics_per_epoch",
        "precision", "deterministic", "num_workers", "cache_dir", "on_bad_image", "src_data_dir", "backbone_weights",
    }  # fmt: skip
    own = {
        ProCSTConfig: {"trg_data_dir", "vgg_weights", "semseg_weights"},
        SourceTrainingConfig: {"trg_data_dir", "src_label_dir", "source_images", "output"},
        SelfTrainingConfig: {"trg_data_dir", "src_label_dir", "source_images"},
        MaxSquareConfig: {"trg_data_dir", "src_label_dir", "source_images"},
        DDBConfig: {"trg_data_dir", "src_label_dir", "source_images"},
        DistillationTrainingConfig: {
            "trg_data_dir", "src_label_dir", "source_images", "cut_teacher", "class_teacher", "cut_prototypes",
            "class_prototypes",
        },
    }
    expected = (shared | own[config]) & options.keys()
    assert {name for name, field in options.items() if field.metadata["may_change"]} == expected


def test_a_flag_is_the_same_with_dashes_and_underscores():
    one = config_of(SelfTrainingConfig, "--init-tgt-port", 0.3, "--base_lr=1e-3", "--no-deterministic")
    assert one == config_of(SelfTrainingConfig, "--init_tgt_port=0.3", "--base-lr", 1e-3, "--no_deterministic")
    assert one.rounds.init_tgt_port == 0.3
    with pytest.raises(UserError, match="unrecognized arguments: --init-tgt_ports=1"):
        config_of(SelfTrainingConfig, "--init-tgt_ports=1")


def test_a_refusal_names_the_flag_that_changes_the_run():
    started = config_of(ProCSTConfig, "--batch_size_list", 2, 2, 2)
    with pytest.raises(UserError, match=r"^--batch_size: the run was started with 2 2 2"):
        started.continued({"batch_size": 3, "backbone_weights": "random", "print_rate": 3})


# --- continuing a run ------------------------------------------------------------------------------------------------


@pytest.fixture
def run(finished_run, tmp_path):
    return shutil.copytree(finished_run, tmp_path / "run")


def test_a_continued_run_takes_what_may_change(world, run, tmp_path, run_script, monkeypatch):
    shutil.copytree(world, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    result = run_script(
        train_procst, "--continue_train_from_path", "run", "--src_data_dir", "moved/gta", "--print_rate", 7,
        "--num_workers", 1, "--gpus", "cpu", "--tb_logs_dir", "logs", "--cache_dir", "cache",
    )  # fmt: skip
    assert result.code == 0, result.err
    config = json.loads((run / "config.json").read_text())["config"]
    assert config["run"]["print_rate"] == 7
    assert config["run"]["tb_logs_dir"] == str(tmp_path / "logs")
    assert config["loader"] == {**config["loader"], "num_workers": 1, "cache_dir": str(tmp_path / "cache")}
    assert config["source"]["src_data_dir"] == str(tmp_path / "moved/gta")


def test_a_continued_run_keeps_the_rest(run, run_script):
    before = tree(run)
    for words, parts in (
        (("--lr_g", 1e-5), ("--lr_g", "0.001", "1e-05")),
        (("--base_channels_list", 16), ("--base_channels_list", "8 8 8", "16 16 16")),
        (("--batch_size", 2), ("--batch_size:", "2 2 1", "2 2 2")),
        (("--num_scales", 1), ("--num_scales 1",)),
        (("--padd_size", 2), ("--padd_size 2",)),
        (("--source", "synthia"), ("--source", "gta5")),
        (("--warmup_epochs", 2), ("--warmup_epochs", "--no_semseg")),
        (("--semseg_weights", "net.pth"), ("--semseg_weights", "--no_semseg")),
        (("--run_dir", run), ("--run_dir", "--continue_train_from_path")),
    ):
        check_refusal(run_script(train_procst, "--continue_train_from_path", run, *words), *parts)
    assert tree(run) == before


@pytest.mark.parametrize(("script", "flags"), [(train_procst, procst_flags), (train_semseg_on_source, source_flags)])
def test_without_gpus_a_line_says_where_is_computed(world, tmp_path, run_script, script, flags):
    result = run_script(script, *flags(world, tmp_path, gpus=None), "--dry_run")
    assert result.code == 0, result.err
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert result.out.splitlines()[0] == f"computing on {device} (choose with --gpus)"


def test_the_gpus_of_a_run_are_not_the_next_ones(world, tmp_path, run_script):
    """A run that was started without `--gpus` takes what the machine has that continues it."""
    short = {"num_scales": 0, "batch_size_list": 2, "steps_per_scale": 1}
    assert run_script(train_procst, *procst_flags(world, tmp_path, gpus=None, **short)).code == 0
    config = json.loads((only_run(tmp_path) / "config.json").read_text())["config"]
    assert config["run"]["gpus"] == []
