"""Whole-image and tiled translation, completeness checks and sizes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from core.cascade import to_pixels
from core.config import NetworkShape
from core.networks import Generator, freeze, init_weights
from core.translate import SUMMED_PIXELS, Translator, forward_tiled, forward_whole, tiles
from data_handlers.images import PROCST_INPUT
from utils.errors import UserError
from utils.png import is_complete_rgb8
from worlds import noise_image


def make_generators(norm, channels=8, scales=3):
    generators = []
    for scale in range(scales):
        generator = Generator(NetworkShape(scale, channels, 5 if scale == 0 else 7, norm))
        init_weights(generator, torch.Generator().manual_seed(scale))
        with torch.no_grad():
            for name, parameter in generator.named_parameters():
                if name.endswith("conv.weight"):
                    parameter.mul_(8)  # away from the tiny initial weights, so that an error would show
            for module in generator.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.3, 0.3)
                    module.running_var.uniform_(0.5, 2.0)
        generators.append(freeze(generator))
    return generators


def test_tiles_cover_every_pixel_once():
    for height, width, halo in ((250, 331, 7), (96, 400, 5), (10, 10, 7)):
        count = np.zeros((height, width), dtype=int)
        for read, core, target in tiles(height, width, halo, max_pixels=1):
            count[target] += 1
            assert read[1].start == max(0, target[1].start - halo)
            assert read[2].stop == min(width, target[2].stop + halo)
            assert read[1].start + core[1].start == target[1].start
        assert (count == 1).all()


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("size", [(333, 211), (97, 300)])
def test_tiled_equals_whole_image(norm, size):
    finest = make_generators(norm)[-1]
    image = PROCST_INPUT(torch.from_numpy(np.array(noise_image(size, 1))))[None]
    coarser = PROCST_INPUT(torch.from_numpy(np.array(noise_image(size, 2))))[None]
    with torch.no_grad():
        whole = finest(image, coarser)
    tiled = forward_tiled(finest, image, coarser, max_pixels=1)
    assert len(list(tiles(size[1], size[0], 7, 1))) > 2
    assert float(whole.std()) > 0.05
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-5)


def in_float64(generator, image, coarser):
    exact = copy.deepcopy(generator).double()
    x = exact.join_inputs(image.double(), None if coarser is None else coarser.double())
    for block in exact.blocks():
        x = block(x)
    return torch.tanh(x)


@pytest.mark.parametrize("groups", [8, 3])  # with 3 even the image itself has a norm
@pytest.mark.parametrize("size", [(211, 173), (1, 9), (9, 1), (2, SUMMED_PIXELS["cpu"] + 5)])
def test_whole_images_on_a_cpu_against_float64(groups, size):
    for scale in (0, 1):
        generator = freeze(Generator(NetworkShape(scale, 24, 5, "group", groups=groups)))
        init_weights(generator, torch.Generator().manual_seed(scale))
        draw = torch.Generator().manual_seed(7)
        # Dark and bright images of little contrast, where sums of squares would cancel out.
        pair = torch.tensor([-0.9, 0.8])[:, None, None, None] + 0.01 * torch.randn(2, 3, *size, generator=draw)
        image = pair.contiguous(memory_format=torch.channels_last)
        coarser = image.flip(-1).contiguous(memory_format=torch.channels_last) if scale else None
        before = image.clone()
        found = forward_whole(generator, image, coarser)
        with torch.no_grad():
            wanted = in_float64(generator, image, coarser)
        assert torch.equal(image, before)
        assert float(wanted.std()) > 1e-3
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=5e-6)


def test_exported_pixels_are_those_of_float64():
    """PyTorch's norm of this image channels last is off by more than a level."""
    generator = freeze(Generator(NetworkShape(0, 24, 5, "group", groups=3)))
    init_weights(generator, torch.Generator().manual_seed(0))
    level = torch.randint(11, 14, (1, 173, 211, 3), generator=torch.Generator().manual_seed(7), dtype=torch.uint8)
    found = Translator([generator], 0.5, torch.device("cpu"))([level])
    with torch.no_grad():
        wanted = to_pixels(in_float64(generator, PROCST_INPUT(level), None)).permute(0, 2, 3, 1)
    assert float(wanted.float().std()) > 5
    assert float((torch.from_numpy(found) != wanted).float().mean()) < 1e-3


def test_batch_norm_on_a_cpu_is_that_of_the_network():
    finest = make_generators("batch")[-1]
    image, coarser = torch.rand(2, 1, 3, 40, 50).unbind(0)
    with torch.no_grad():
        torch.testing.assert_close(forward_whole(finest, image, coarser), finest(image, coarser), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_translator_gives_the_same_pixels_on_tiles(norm):
    generators = make_generators(norm)
    sizes = [(64, 48), (128, 96), (256, 192)]
    levels = [torch.from_numpy(np.stack([np.array(noise_image(s, k)) for k in (3, 4)])) for s in sizes]
    whole = Translator(generators, 0.5, torch.device("cpu"), max_pixels=10**9)(levels)
    tiled = Translator(generators, 0.5, torch.device("cpu"), max_pixels=1)(levels)
    assert whole.shape == (2, 192, 256, 3)
    assert whole.dtype == np.uint8
    difference = np.abs(whole.astype(int) - tiled.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_one_image_does_not_change_another_in_its_batch():
    generators = make_generators("group")
    sizes = [(16, 12), (32, 24), (64, 48)]
    pair = [torch.from_numpy(np.stack([np.array(noise_image(s, k)) for k in (5, 6)])) for s in sizes]
    translator = Translator(generators, 0.5, torch.device("cpu"))
    together = translator(pair)
    alone = translator([level[:1] for level in pair])
    assert np.abs(together[:1].astype(int) - alone.astype(int)).max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_single_pixels_in_a_batch_are_refused(precision):
    levels = [torch.zeros(2, *size, 3, dtype=torch.uint8) for size in ((1, 1), (2, 2), (4, 3))]
    translator = Translator(make_generators("group"), 0.5, torch.device("cpu"), precision=precision)
    with pytest.raises(UserError, match="3x4 pixels is a single pixel"):
        translator(levels)
    assert Translator(make_generators("group", channels=16), 0.5, torch.device("cpu"))(levels).shape == (2, 4, 3, 3)


def test_completeness_of_a_png(tmp_path):
    path = tmp_path / "a.png"
    image = noise_image((40, 30), 0)
    image.save(path)
    data = path.read_bytes()
    assert is_complete_rgb8(path, (40, 30))
    assert not is_complete_rgb8(path, (30, 40))
    assert not is_complete_rgb8(tmp_path / "none.png", (40, 30))
    for cut in (0, 7, 40, len(data) // 2, len(data) - 12, len(data) - 1):
        path.write_bytes(data[:cut])
        assert not is_complete_rgb8(path, (40, 30)), cut
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    path.write_bytes(flipped)
    assert not is_complete_rgb8(path, (40, 30))
    image.convert("L").save(path)
    assert not is_complete_rgb8(path, (40, 30))
