"""Files of segmentation nets: the authors' and our own."""

from __future__ import annotations

import gzip
import pickle
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch
from core.segmentation_files import SegmentationFile, load_segmentation_net, read_segmentation_file

from conftest import GOLDEN_DIR
from models import legacy
from models.legacy import load_legacy_segmentation
from models.segmentation import SegmentationShape, build_segmentation_net
from test_legacy import Touch, write_archive
from test_segmentation_nets import check_refused, randomise


@pytest.fixture(scope="module")
def legacy_files(tmp_path_factory):
    """The authors' net as they save it, and wrapped in DataParallel."""
    plain, wrapped = (tmp_path_factory.mktemp("legacy") / name for name in ("plain.pth", "wrapped.pth"))
    with gzip.open(GOLDEN_DIR / "legacy_semseg.pth.gz") as packed, plain.open("wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    modules, module = b"X\x08\0\0\0_modules", b"X\x06\0\0\0module"
    wrapper = b"\x80\x02ctorch.nn.parallel.data_parallel\nDataParallel\n)\x81}" + modules + b"}" + module
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(wrapped, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            archive.writestr(name, wrapper + data[2:-1] + b"ssb." if name.endswith("data.pkl") else data)
    yield {"plain": plain, "wrapped": wrapped}
    for path in (plain, wrapped):
        path.unlink()  # 0.26 GB each, and pytest keeps its folders


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
    direct = load_legacy_segmentation(legacy_files[kind])[1].state_dict()
    assert all(torch.equal(value, direct[name]) for name, value in net.state_dict().items())
    assert not any(name.startswith("semseg_models") for name in sys.modules)


def test_nets_of_the_authors_that_are_no_deeplab_v2(legacy_files, monkeypatch):
    record = legacy.read_pickled_modules(legacy_files["plain"], legacy._CLASSES)
    monkeypatch.setattr(legacy, "read_pickled_modules", lambda *_: record)
    for module, attribute, value in (
        ("layer2.0.conv1", "stride", (1, 1)),
        ("layer4.2.conv2", "padding", (2, 2)),
        ("layer5.conv2d_list.4.0", "dilation", (12, 12)),
        ("layer3.22.bn2", "_buffers", {}),
        ("layer5.conv2d_list.0.1", "num_groups", 8),
        ("maxpool", "ceil_mode", False),
        ("bn1", "eps", 1.0),
    ):
        attributes = dict(record.named_records())[module].attributes
        assert attributes[attribute] != value
        expected = f"{module} has {attribute} {value}" if value != {} else f"{module}.running_mean is missing"
        with monkeypatch.context() as patch:
            patch.setitem(attributes, attribute, value)
            check_refused(lambda: load_legacy_segmentation("semseg.pth"), "semseg.pth", expected)


def test_hostile_files_are_not_executed(tmp_path):
    bait, path = tmp_path / "bait", tmp_path / "semseg.pth"
    net = b"\x80\x02csemseg_models.deeplabv2\nResNet101\n)\x81q\x01"
    modules = b"}X\x08\0\0\0_modules}X\x06\0\0\0layer5%bssb."
    command = f"touch {bait}".encode()
    touch = b"cposix\nsystem\nX%c\0\0\0%b\x85R" % (len(command), command)
    payloads = {
        "posix.system": pickle.dumps([Touch(bait)], protocol=2),
        "posix.system, which": net + modules % touch,
        "contains itself": net + modules % b"h\x01",
        "semseg_models.deeplabv2.os": b"\x80\x02csemseg_models.deeplabv2\nos\n.",
        "no segmentation net": b"\x80\x02csemseg_models.deeplabv2\nResNet101\n.",
        "no classifier": net + b".",
    }
    for part, payload in payloads.items():
        write_archive(path, payload)
        check_refused(lambda: load_segmentation_net(path, "--weights"), "semseg.pth", part)
    assert not bait.exists()
    pickle.loads(payloads["posix.system"])  # the bait is real
    assert bait.exists()


@pytest.fixture
def saved(tmp_path):
    shape = SegmentationShape("DeepLab", "resnet18", 5)
    net = randomise(build_segmentation_net(shape))
    SegmentationFile(shape, net.state_dict(), {"step": 7, "miou": 0.25}, {"rate": 1e-3}).save(tmp_path / "net.pth")
    return tmp_path / "net.pth", net.state_dict()


def test_our_files(saved):
    path, weights = saved
    content = torch.load(path, weights_only=True)
    assert (content["format"], content["version"]) == ("procst-segmentation", 1)
    file = read_segmentation_file(path)
    assert (dict(file.info), dict(file.training)) == ({"step": 7, "miou": 0.25}, {"rate": 1e-3})
    shape, net = load_segmentation_net(path, "--weights")
    assert shape == file.shape == SegmentationShape("DeepLab", "resnet18", 5)
    assert not net.training
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_a_run_folder_stands_for_its_best_net(saved):
    path, _ = saved
    check_refused(lambda: load_segmentation_net(path.parent, "--weights"), "--weights", "best.pth nor latest.pth")
    path.rename(path.with_name("latest.pth"))
    assert load_segmentation_net(path.parent, "--weights")[0].num_classes == 5
    shape = SegmentationShape("UNet", "none", 3)
    SegmentationFile(shape, build_segmentation_net(shape).state_dict()).save(path.with_name("best.pth"))
    assert load_segmentation_net(path.parent, "--weights")[0] == shape


def test_files_that_are_refused(saved):
    path, weights = saved
    content, name = torch.load(path, weights_only=True), "head.branches.2.bias"
    for changes, part in (
        ({"version": 2}, "version 2; this program reads 1"),
        ({"version": torch.ones(2)}, "this program reads 1"),
        ({"weights": {name: 5}}, "names and tensors alone"),
        ({"shape": {**content["shape"], "num_classes": 5.0}}, "num_classes is 5.0"),
        ({"format": "other"}, "holds no segmentation net"),
        ({"shape": {**content["shape"], "num_classes": 6}}, "head.branches.0.weight is (5, 512, 3, 3) there"),
        ({"shape": {**content["shape"], "num_classes": 1}}, "num_classes is 1"),
        ({"shape": {"depth": 3}}, "incomplete"),
        ({"info": None}, "incomplete: 'info'"),
        ({"weights": {**weights, name: torch.full((5,), float("nan"))}}, "not finite"),
        ({"weights": {**weights, name: torch.full((5,), float("inf"))}}, "not finite"),
        ({"weights": {n: v for n, v in weights.items() if n != name}}, f"{name} is missing"),
        ({"weights": {**weights, "extra": torch.zeros(1)}}, "extra is unknown"),
    ):
        torch.save({key: value for key, value in {**content, **changes}.items() if value is not None}, path)
        check_refused(lambda: load_segmentation_net(path, "--weights"), part)
