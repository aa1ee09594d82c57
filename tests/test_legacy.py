"""Files of the authors' code: read right through the real command line, and never executed."""

from __future__ import annotations

import copy
import os
import pickle
import sys
import zipfile
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import DataParallel

import create_sit_dataset
from core.cascade import translate_pyramid
from core.networks import ConvBlock, Generator, NetworkShape, freeze
from core.trained_generators import load_legacy_generators
from data_handlers.images import PROCST_INPUT, image_pyramid
from hostile_files import write_pickle
from utils.errors import UserError


@pytest.fixture
def reference(golden_dir):
    return np.load(golden_dir / "legacy_generators.npz")


def test_network_output(golden_dir, reference):
    generators = load_legacy_generators(golden_dir / "legacy_generators.pth")
    pyramid = image_pyramid(reference["source_rgb"], len(generators) - 1, 0.5, len(generators) - 1)
    levels = [PROCST_INPUT(torch.from_numpy(level)[None]) for level in pyramid]
    with torch.no_grad():
        sit = translate_pyramid(generators, levels, 0.5).numpy()
    expected = reference["sit"]
    assert np.linalg.norm(sit - expected) / np.linalg.norm(expected) < 1e-4


def test_saved_picture_through_the_command_line(golden_dir, reference, tmp_path, run_script):
    (tmp_path / "gta" / "images").mkdir(parents=True)
    Image.fromarray(reference["source_rgb"]).save(tmp_path / "gta" / "images" / "00001.png")
    result = run_script(
        create_sit_dataset,
        "--gpus", "cpu", "--num_workers", 0, "--trained_procst_path", golden_dir / "legacy_generators.pth",
        "--src_data_dir", tmp_path / "gta", "--sit_output_path", tmp_path / "sit",
    )  # fmt: skip
    assert result.code == 0, result.err
    with Image.open(tmp_path / "sit" / "images" / "00001.png") as saved:
        assert saved.mode == "RGB"
        pixels = np.asarray(saved).astype(int)
    assert pixels.shape == reference["sit_png"].shape
    assert np.abs(pixels - reference["sit_png"]).max() <= 1


class Touch:
    """Unpickling this runs a command that creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_hostile_pickle_creates_no_file(tmp_path, run_script):
    bait, model = tmp_path / "bait", tmp_path / "Gst.pth"
    payload = pickle.dumps([Touch(bait)], protocol=2)
    write_pickle(model, payload)
    with pytest.raises(UserError, match="system"):
        load_legacy_generators(model)
    result = run_script(
        create_sit_dataset,
        "--gpus", "cpu", "--trained_procst_path", model, "--sit_output_path", tmp_path / "sit",
    )  # fmt: skip
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert not bait.exists()
    assert not (tmp_path / "sit").exists()
    # The bait is real: the ordinary unpickler takes it.
    pickle.loads(payload)
    assert bait.exists()


def save_legacy(path, modules, monkeypatch):
    """Save modules as the authors' code would: pickled whole, under the class names of their package."""
    package, models = ModuleType("core"), ModuleType("core.models")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "core", package)
        patch.setitem(sys.modules, "core.models", models)
        ours = {"ProCSTGenerator": Generator, "ConvBlockProCST": ConvBlock}
        kept = {kind: (kind.__module__, kind.__qualname__) for kind in ours.values()}
        for name, kind in ours.items():
            kind.__module__, kind.__qualname__ = "core.models", name
            setattr(models, name, kind)
        try:
            torch.save(modules, path)
        finally:
            for kind, (module, qualname) in kept.items():
                kind.__module__, kind.__qualname__ = module, qualname


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        {"channels": 8, "norm": "group"},
        {"channels": 8, "norm": "batch"},
        {"channels": 5, "norm": "group"},
        {"channels": 8, "norm": "group", "groups": 3},
        {"channels": 8, "norm": "group", "layers": 2},
        {"channels": 8, "norm": "batch", "kernel_size": 5},
    ],
    ids=str,
)
def test_every_shape_we_can_train_is_read_back(tmp_path, monkeypatch, shape, wrapped):
    shapes = [NetworkShape(**{"scale": scale, "layers": 5, **shape}) for scale in range(2)]
    generators = [freeze(Generator(s)) for s in shapes]
    saved = copy.deepcopy(generators)
    for generator in saved:
        del generator.shape  # the authors' classes have no such attribute
    if wrapped:
        saved = [DataParallel(generator) for generator in saved]
        for wrapper in saved:
            wrapper.src_device_obj = torch.device("cuda", 0)  # set where a GPU is present
    save_legacy(tmp_path / "Gst.pth", saved, monkeypatch)
    image, coarser = torch.rand(2, 1, 3, 20, 24)
    for scale, (ours, theirs) in enumerate(
        zip(load_legacy_generators(tmp_path / "Gst.pth"), generators, strict=True)
    ):
        second = coarser if scale else None
        torch.testing.assert_close(ours(image, second), theirs(image, second), rtol=0, atol=0)


MODULE = b"ccore.models\nProCSTGenerator\n)\x81q\x01"
CONV = b"ctorch.nn.modules.conv\nConv2d\n"
PARAMETERS = b"}X\x0b\0\0\0_parameters"


@pytest.mark.parametrize(
    ("payload", "part"),
    [
        (MODULE + b"}X\x08\0\0\0_modules}X\x04\0\0\0headh\x01ssb", "is malformed"),
        (MODULE + b"]b", "state of type list"),
        (MODULE + PARAMETERS + b"]sb", "malformed"),
        (MODULE + PARAMETERS + b"}K\x01K\x02ssb", "malformed"),
        (MODULE + b"}b", "not complete"),
        (CONV + b"X\x01\0\0\0x\x85R", ""),  # called with an argument
        (b"cbuiltins\neval\nX\x01\0\0\x001\x85R", "eval"),
        (b"ctorch\nload\nX\x01\0\0\0x\x85R", "torch.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93", ""),
        (b"garbage", ""),
        (b"", ""),
    ],
)
def test_malformed_pickles_are_refused(tmp_path, recwarn, payload, part):
    write_pickle(tmp_path / "Gst.pth", b"\x80\x02]" + payload + b"a.")
    with pytest.raises(UserError) as refusal:
        load_legacy_generators(tmp_path / "Gst.pth")
    assert "Gst.pth" in str(refusal.value)
    assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not recwarn.list


def test_files_saved_on_a_gpu_are_read(golden_dir, tmp_path):
    path, plain = tmp_path / "Gst.pth", golden_dir / "legacy_generators.pth"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            data = source.read(name)
            on_gpu = data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:1")
            assert (on_gpu != data) == name.endswith("data.pkl")
            archive.writestr(name, on_gpu)
    assert load_legacy_generators(path)[0].state_dict().keys() == load_legacy_generators(plain)[0].state_dict().keys()


def test_other_models_are_refused_by_name(tmp_path):
    torch.save([nn.Conv2d(3, 3, 3)], tmp_path / "Gst.pth")
    with pytest.raises(UserError, match="not a ProCST generator"):
        load_legacy_generators(tmp_path / "Gst.pth")
