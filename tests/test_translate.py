"""Whole-image and tiled translation, completeness checks and sizes."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from core.cascade import to_pixels
from core.config import NetworkShape
from core.networks import Generator, freeze, init_weights
from core.translate import Translator, forward_tiled, tiles
from data_handlers.images import PROCST_INPUT
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
