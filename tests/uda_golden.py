"""Reference numbers of the second-stage methods: files of `uda/` below the golden folder, and their `meta`."""

import json
from functools import cache

import numpy as np
import pytest
import torch

from conftest import GOLDEN_DIR
from data_handlers.images import NetworkInput
from uda.thresholds import LowerCounts, UpperCounts

UDA_DIR = GOLDEN_DIR / "uda"


@cache
def load(path):
    """All arrays of a file, by name, and its `meta` as a dictionary."""
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    return data, json.loads(str(data.pop("meta")))


def files_of(kind, but=None):
    """The files of a kind, such as `cbst_step`: `cbst_step.npz` and every `cbst_step_*.npz`; without those of `but`."""
    found = {*UDA_DIR.glob(f"{kind}.npz"), *UDA_DIR.glob(f"{kind}_*.npz")}
    return sorted(found.difference(files_of(but) if but else ()))


def indices(name):
    """Items for `over`: the numbers of the entries of `meta[name]`."""
    return lambda data, meta: list(range(len(meta[name])))


def over(kind, items=None, but=None):
    """Parametrise a test by (path, item) for each file of a kind.

    Args:
        but: see `files_of`.
        items: arrays and meta of a file -> items to be tested; None tests the file as one, with `path` alone.
    """
    files = files_of(kind, but)
    if items is None:
        return pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in files])
    cases = [pytest.param(path, item, id=f"{path.stem}-{item}") for path in files for item in items(*load(path))]
    return pytest.mark.parametrize(("path", "item"), cases)


def imagenet_input(meta):
    """The normalisation that a file's numbers were made with: ImageNet's, unless `meta` says otherwise."""
    mean, std = meta.get("mean", (0.485, 0.456, 0.406)), meta.get("std", (0.229, 0.224, 0.225))
    return NetworkInput(mean=tuple(255 * x for x in mean), std=tuple(255 * x for x in std))


def search(maps, run, reference=True):
    """Plan and thresholds of confidence maps (N,C,H,W), for `portion`, `policy` and `stride` of a run."""
    upper = UpperCounts(maps.shape[1], run["stride"])
    for confidences in maps:
        upper.add(confidences)
    plan = upper.plan(portion=run["portion"], policy=run["policy"], reference=reference)
    lower = LowerCounts(plan)
    for confidences in maps:
        lower.add(confidences)
    return plan, lower.thresholds()


def check_close(found, expected, tolerance, name=""):
    """Values differ by at most the tolerance, relative to the largest magnitude that is expected."""
    found, expected = (torch.as_tensor(value).detach().double() for value in (found, expected))
    assert found.shape == expected.shape, name
    difference = float((found - expected).abs().max())
    assert difference <= tolerance * float(expected.abs().max()), f"{name}: {difference}"
