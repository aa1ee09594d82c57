"""The flags of the methods that learn from predictions: what contradicts, what is refused, what follows."""

import shutil

import pytest

import train_uda
from methods import MAXSQUARE, write_world
from nets import save_net
from refusals import check_refusal, check_refused
from uda.maxsquare_config import MaxSquareConfig
from worlds import write_own_description


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("methods"))


def words_of(world, out, **changes):
    flags = {
        "method": "maxsquare", **MAXSQUARE, "gpus": "cpu", "src_data_dir": world / "gta", "src_resize": (40, 32),
        "num_workers": 0, "run_dir": out / "run", "tb_logs_dir": out / "tb", **changes,
    }  # fmt: skip
    for name, value in flags.items():
        if value is True:
            yield f"--{name}"
        elif value is not None:
            yield from (f"--{name}", *map(str, value if isinstance(value, tuple) else (value,)))


def test_a_missing_label_is_told(small_world, tmp_path, run_script):
    city = shutil.copytree(small_world / "cityscapes", tmp_path / "city")
    next(city.rglob("val/*/*_gtFine_labelIds.png")).unlink()
    words = words_of(small_world, tmp_path, trg_data_dir=city, init=save_net(tmp_path / "net.pth"))
    result = run_script(train_uda, *words, "--dry_run")
    assert result.code == 0, result.err
    assert "which chooses nothing, without mIoU: 1 of them have no label" in result.out


def test_a_run(small_world, tmp_path, run_script):
    flags = {
        "init": save_net(tmp_path / "net.pth", "UNetMulti"), "trg_data_dir": small_world / "cityscapes",
        "method": "hard", "multi": True, "threshold": 0.5, "round_num": 1, "epoch_each_round": 1, "freeze_bn": True,
        "no_gaussian_blur": True,
    }  # fmt: skip
    words = list(words_of(small_world, tmp_path, **flags))
    result = run_script(train_uda, *words)
    assert result.code == 0, result.err
    assert "adapted by hard with both heads" in result.out
    assert result.out.rstrip().endswith(f"evaluate.py --weights {tmp_path / 'run'}")  # its best state, if it has one
    assert run_script(train_uda, *words).code == 0  # it is finished
    check_refusal(run_script(train_uda, *words, "--threshold", 0.6), "--threshold", "was started with 0.5")
    run = ("--continue_train_from_path", tmp_path / "run")
    check_refusal(run_script(train_uda, *run), "another training (maxsquare)", "its script or --method hard")
    assert run_script(train_uda, *run, "--method", "hard").code == 0


def test_labels_of_other_classes_than_the_sources_score_nothing(small_world, tmp_path, run_script):
    own, net = write_own_description(tmp_path / "own.toml"), save_net(tmp_path / "net.pth", num_classes=4)
    flags = {"init": net, "source": own, "trg_data_dir": small_world / "cityscapes", "round_num": 1,
             "epoch_each_round": 1}  # fmt: skip
    words = list(words_of(small_world, tmp_path, **flags))
    check_refusal(run_script(train_uda, *words, "--select_by", "miou"), "--select_by miou needs a labelled val split")
    result = run_script(train_uda, *words)
    assert result.code == 0, result.err
    assert "mIoU" not in result.out
    assert "label-free score" in result.out


def test_a_net_without_restitution_is_given_one(small_world, tmp_path, run_script):
    """Its 18 new tensors are named when the run starts."""
    plain = save_net(tmp_path / "plain.pth", "UNetMulti")
    flags = {"init": plain, "model": "UNetMultiSNR", "trg_data_dir": small_world / "cityscapes"}
    result = run_script(train_uda, *words_of(small_world, tmp_path, **flags), "--dry_run")
    assert result.code == 0, result.err
    assert "UNetMultiSNR with 19 classes" in result.out
    assert "18 tensors (backbone.snr.0.norm.weight, " in result.out
    assert result.out.count("backbone.snr.") == 18


def test_sizes_that_follow_from_the_data_sets():
    published = {"gta5": (1280, 720), "synthia": (1280, 760), "cityscapes": (1024, 512)}
    for source, size in published.items():
        config = MaxSquareConfig.from_flags({"method": "maxsquare", "source": source}).target
        assert (config.src_resize, config.trg_resize, config.crop_size) == (size, (1024, 512), None)
    check_refused(lambda: MaxSquareConfig.from_flags({"method": "cbst"}), "--method cbst has another configuration")
