"""calculate_prototypes.py: what it writes, what is continued, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import calculate_prototypes
from commands import command, failing_at
from data_handlers.images import read_image
from nets import save_net
from refusals import check_refusal, tree
from training.segmentation_files import load_segmentation_net
from uda import make_prototypes
from uda.prototypes import class_means, load_prototypes

SIZE = (48, 32)


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    return save_net(tmp_path_factory.mktemp("net") / "net.pth", num_classes=5)


def flags_for(world, net, output, **changes):
    flags = {
        "weights": net, "target": world / "cityscapes/leftImg8bit/train/town", "output": output, "trg_resize": SIZE,
        "gpus": "cpu", "num_workers": 0,
    }  # fmt: skip
    return command(flags, changes)


@pytest.fixture
def whole(world, net, tmp_path, run_script):
    """The file of an undisturbed calculation."""
    result = run_script(calculate_prototypes, *flags_for(world, net, tmp_path / "folder/whole.pth"))
    assert result.code == 0, result.err
    assert "of 5 classes from 4 images" in result.out.splitlines()[-1]
    return tmp_path / "folder/whole.pth"


def content_of(path):
    return torch.load(path, weights_only=True)


def assert_same(one, other):
    one, other = content_of(one), content_of(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def test_they_are_the_mean_features_of_the_predictions(world, net, whole):
    found, (_, trained) = load_prototypes(whole, "it"), load_segmentation_net(net, "it")
    folder, sums, counts = world / "cityscapes/leftImg8bit/train/town", torch.zeros(5, 16), torch.zeros(5)
    for path in sorted(folder.iterdir()):
        pixels = torch.from_numpy(np.array(read_image(path).resize(SIZE, Image.Resampling.BICUBIC)))
        with torch.no_grad():
            features, logits = trained.features_and_logits(trained.network_input(pixels)[None])
        means, pixels = class_means(features[0], logits[0].argmax(0), 5)
        sums[pixels >= 10] += means[pixels >= 10]
        counts += pixels >= 10
    assert counts.max() > 1
    assert torch.equal(found.counts, counts.long())
    torch.testing.assert_close(found.vectors, sums / counts.clamp(min=1)[:, None])
    assert found.finished
    assert found.made_from["trg_resize"] == list(SIZE)


@pytest.mark.parametrize("calls", [1, 2, 4])
@pytest.mark.parametrize("save_every", [1, 3])
def test_a_killed_calculation_continues(world, net, whole, tmp_path, run_script, monkeypatch, calls, save_every):
    flags, reads = flags_for(world, net, tmp_path / "again.pth"), []
    monkeypatch.setattr(make_prototypes, "SAVE_EVERY", save_every)
    with monkeypatch.context() as patch:
        patch.setattr(make_prototypes, "read_resized", failing_at(calls, make_prototypes.read_resized))
        assert run_script(calculate_prototypes, *flags).code == 2
    saved = (calls - 1) // save_every * save_every
    assert (tmp_path / "again.pth").exists() == (saved > 0)
    assert not saved or not load_prototypes(tmp_path / "again.pth", "it").finished
    real = make_prototypes.read_resized
    monkeypatch.setattr(make_prototypes, "read_resized", lambda *given: reads.append(given[0]) or real(*given))
    assert run_script(calculate_prototypes, *flags).code == 0
    assert len(reads) == 4 - saved
    assert_same(tmp_path / "again.pth", whole)
    before = tree(tmp_path)
    assert run_script(calculate_prototypes, *flags).code == 0
    assert tree(tmp_path) == before
    assert len(reads) == 4 - saved


def test_files_of_something_else_are_not_replaced(world, net, whole, tmp_path, run_script):
    (tmp_path / "note").write_text("precious")
    other = save_net(tmp_path / "other.pth")
    before = tree(tmp_path)
    for changes, *parts in (
        ({"weights": other}, "is of another net or of other images"),
        ({"trg_resize": (32, 32)}, "is of another net or of other images"),
        ({"output": tmp_path / "note"}, "--output", "note"),
        ({"output": other}, "no file of calculate_prototypes.py"),
        ({"output": tmp_path}, "is a folder"),
    ):
        flags = flags_for(world, net, **{"output": whole, **changes})
        check_refusal(run_script(calculate_prototypes, *flags), "--output", *parts)
    assert tree(tmp_path) == before


def test_a_net_without_features_is_refused(world, tmp_path, run_script):
    other = save_net(tmp_path / "net.pth", "UNetMulti", num_classes=5)
    flags = flags_for(world, other, tmp_path / "out.pth")
    check_refusal(run_script(calculate_prototypes, *flags), "--weights", "a net without features for prototypes")
    assert not (tmp_path / "out.pth").exists()


def test_features_that_are_not_finite_are_refused(world, tmp_path, run_script):
    huge = {"head.stages.2.4.weight": torch.full((16,), 3e38), "head.stages.2.4.bias": torch.full((16,), 3e38)}
    other = save_net(tmp_path / "net.pth", num_classes=5, **huge)
    flags = flags_for(world, other, tmp_path / "out.pth")
    check_refusal(run_script(calculate_prototypes, *flags), "features are not finite")
    assert not (tmp_path / "out.pth").exists()


def test_an_image_that_cannot_be_used_is_refused_or_skipped(net, tmp_path, run_script):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (40, 32), "red").save(tmp_path / "images" / name)
    (tmp_path / "images/c.png").write_bytes((tmp_path / "images/c.png").read_bytes()[:60])
    flags = flags_for(tmp_path, net, tmp_path / "out.pth", target=tmp_path / "images")
    check_refusal(run_script(calculate_prototypes, *flags), "c.png")
    result = run_script(calculate_prototypes, *flags, "--on_bad_image", "skip")
    assert result.code == 0, result.err
    assert load_prototypes(tmp_path / "out.pth", "it").finished
    assert int(load_prototypes(tmp_path / "out.pth", "it").counts.max()) == 2
    (tmp_path / "images/a.png").write_bytes(b"")
    (tmp_path / "images/b.png").write_bytes(b"")
    flags = flags_for(tmp_path, net, tmp_path / "none.pth", target=tmp_path / "images", on_bad_image="skip")
    check_refusal(run_script(calculate_prototypes, *flags), "no class has 10 predicted pixels")
