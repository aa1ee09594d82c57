"""Files of segmentation nets: the authors' and our own, and what is nearly one."""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch

from conftest import GOLDEN_DIR
from core.trained_generators import load_legacy_generators
from hostile_files import BAIT, Command, write_pickle
from models.segmentation import SegmentationShape, build_segmentation_net, load_backbone
from nets import checkpoint_of, randomise, save_net
from refusals import check_refused
from training.checkpoint import load_checkpoint
from training.segmentation_files import load_segmentation_net

RESNET = b"csemseg_models.deeplabv2\nResNet101\n)\x81"
PARALLEL = b"ctorch.nn.parallel.data_parallel\nDataParallel\n)\x81"


# --- the authors' ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def legacy_files(tmp_path_factory):
    """The authors' net as they save it, and wrapped in DataParallel."""
    plain, wrapped = (tmp_path_factory.mktemp("legacy") / name for name in ("plain.pth", "wrapped.pth"))
    with gzip.open(GOLDEN_DIR / "legacy_semseg.pth.gz") as packed, plain.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    modules, module = b"X\x08\0\0\0_modules", b"X\x06\0\0\0module"
    wrapper = b"\x80\x02" + PARALLEL + b"}" + modules + b"}" + module
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(wrapped, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, wrapper + data[2:-1] + b"ssb." if name.endswith("data.pkl") else data)
    yield {"plain": plain, "wrapped": wrapped}
    for path in (plain, wrapped):
        path.unlink()  # 0.26 GB each, and pytest keeps its folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "wrapped"])
def test_logits_of_the_authors_net(golden_dir, legacy_files, kind):
    reference = np.load(golden_dir / "legacy_semseg.npz")
    shape, net = load_segmentation_net(legacy_files[kind], "--weights")
    assert shape == SegmentationShape("DeepLabV2", "resnet101", reference["logits"].shape[1])
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    with torch.no_grad():
        logits = net(torch.from_numpy(reference["image"])).numpy()
    assert np.linalg.norm(logits - reference["logits"]) / np.linalg.norm(reference["logits"]) < 1e-4
    assert not any(name.startswith("semseg_models") for name in sys.modules)


def test_hostile_files_are_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, modules = b"\x80\x02" + RESNET + b"q\x01", b"}X\x08\0\0\0_modules}X\x06\0\0\0layer5%bssb."
    call = f"touch {BAIT}".encode()
    touch = b"cposix\nsystem\nX%c\0\0\0%b\x85R" % (len(call), call)
    payloads = {
        "posix.system": pickle.dumps([Command()], protocol=2),
        "posix.system, which": net + modules % touch,
        "is malformed": net + modules % b"h\x01",
        "semseg_models.deeplabv2.os": b"\x80\x02csemseg_models.deeplabv2\nos\n.",
        "no segmentation net": b"\x80\x02csemseg_models.deeplabv2\nResNet101\n.",
        "no classifier": net + b".",
    }
    for part, payload in payloads.items():
        write_pickle(tmp_path / "semseg.pth", payload)
        check_refused(lambda: load_segmentation_net(tmp_path / "semseg.pth", "--weights"), "semseg.pth", part)
    assert not (tmp_path / BAIT).exists()
    pickle.loads(payloads["posix.system"])  # the bait is real
    assert (tmp_path / BAIT).exists()


@pytest.mark.parametrize(
    "payload",
    [
        RESNET + b"}X\x0b\0\0\0_parameters]sb",
        RESNET + b"}X\x08\0\0\0_modulesK\x05sb",
        RESNET + b"}X\x08\0\0\0_modules}K\x01K\x02ssb",
        PARALLEL + b"}X\x08\0\0\0_modules]sb",
        RESNET + b"}b",
    ],
)
def test_records_without_the_tables_of_a_module(tmp_path, payload):
    write_pickle(tmp_path / "semseg.pth", b"\x80\x02" + payload + b".")
    write_pickle(tmp_path / "Gst.pth", b"\x80\x02](" + payload + b"e.")
    check_refused(lambda: load_segmentation_net(tmp_path / "semseg.pth", "--weights"), "semseg.pth")
    check_refused(lambda: load_legacy_generators(tmp_path / "Gst.pth"), "Gst.pth")


# --- our own ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A file for use, and the weights in it."""
    shape = SegmentationShape("DeepLab", "resnet18", 5)
    state = randomise(build_segmentation_net(shape)).state_dict()
    checkpoint_of(shape, state, info={"miou": 0.25}).save(tmp_path / "net.pth")
    return tmp_path / "net.pth", state


def test_our_files(saved):
    path, weights = saved
    shape, net = load_segmentation_net(path, "--weights")
    assert shape == SegmentationShape("DeepLab", "resnet18", 5)
    assert load_checkpoint(path).info == {"miou": 0.25}
    assert not net.training
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_a_run_folder_stands_for_its_best_net(saved):
    path, _ = saved
    check_refused(lambda: load_segmentation_net(path.parent, "--weights"), "--weights", "best.pth nor latest.pth")
    path.rename(path.with_name("latest.pth"))
    assert load_segmentation_net(path.parent, "--weights")[0].num_classes == 5
    save_net(path.with_name("best.pth"), num_classes=3)
    assert load_segmentation_net(path.parent, "--weights")[0] == SegmentationShape("UNet", "none", 3)


@pytest.mark.slow
def test_files_that_are_refused(saved):
    path, weights = saved
    content, name = torch.load(path, weights_only=True), "head.branches.2.bias"
    shape = content["segmentation"]["shape"]

    def with_shape(**changes):
        return {"segmentation": {"module": "net", "shape": {**shape, **changes}}}

    def with_weights(**changes):
        return {"modules": {"net": {n: v for n, v in {**weights, **changes}.items() if v is not None}}}

    for changes, part in (
        ({"version": 1}, "checkpoint version 1; this program reads"),
        ({"format": "other"}, "holds no segmentation net"),
        ({"segmentation": {}}, "holds no segmentation net: the run trains without label losses"),
        ({"segmentation": {"module": "net"}}, "incomplete: 'shape'"),
        ({"segmentation": {"module": "other", "shape": shape}}, "incomplete: 'other'"),
        ({"segmentation": {"module": "net", "shape": {"depth": 3}}}, "incomplete"),
        ({"info": None}, "incomplete: 'info'"),
        (with_shape(num_classes=5.0), "num_classes is 5.0"),
        (with_shape(num_classes=1), "num_classes is 1"),
        (with_shape(num_classes=6), "head.branches.0.weight is (5, 512, 3, 3) there"),
        ({"modules": {"net": {name: 5}}}, "names and tensors alone"),
        (with_weights(**{name: torch.full((5,), float("nan"))}), "not finite"),
        (with_weights(**{name: torch.full((5,), float("inf"))}), "not finite"),
        (with_weights(**{name: None}), f"{name} is missing"),
        (with_weights(extra=torch.zeros(1)), "extra is unknown"),
    ):
        torch.save({key: value for key, value in {**content, **changes}.items() if value is not None}, path)
        check_refused(lambda: load_segmentation_net(path, "--weights"), "net.pth", part)


@pytest.mark.parametrize("content", [{1: torch.zeros(1)}, {"conv1.weight": 5}, {"classifier.0.weight": "x"}, [1], 3])
@pytest.mark.parametrize(("model", "backbone"), [("DeepLabV2", "resnet18"), ("VGG", "vgg16")])
def test_backbone_weights_that_are_no_state_dict(tmp_path, content, model, backbone):
    torch.save(content, tmp_path / "backbone.pth")
    with torch.device("meta"):
        net = build_segmentation_net(SegmentationShape(model, backbone, 19))
    weights = str(tmp_path / "backbone.pth")
    check_refused(lambda: load_backbone(net, backbone, weights), "--backbone_weights", "backbone.pth")
