"""Losses of MaxSquare and of the dual restitution against the published code's numbers.

Every `uda/{maxsquare,snr}_*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it), here, in
`test_maxsquare_golden_training.py` or in `test_two_headed.py`; all sizes and settings come from the file's `meta`.
"""

import pytest
import torch

from data_handlers.classes import IGNORE
from models.losses import cross_entropy
from models.restitution import Restituted
from steps import relative_l2
from training.distributed import ALONE
from uda.restitution import RestitutionHeads, dual_loss, entropies, restitution_loss
from uda.target_losses import (
    confident_label,
    ensemble_label,
    entropy,
    image_wise_entropy,
    image_wise_maxsquare,
    maxsquare,
)
from uda_golden import load, over


def tensor(data, name):
    return torch.from_numpy(data[name])


def with_ignored(label):
    """A published label, in which -1 is ignored."""
    return torch.where(label < 0, IGNORE, label)


def losses_of(meta):
    """The losses of a file by the names of its keys."""
    found = {"maxsquare": lambda x, label: maxsquare(x), "entropy": lambda x, label: entropy(x)}
    for ratio in meta["ratios"]:
        found |= {
            f"IW_maxsquare_{ratio}": lambda x, label, ratio=ratio: image_wise_maxsquare(x, ratio),
            f"IW_maxsquare_label_{ratio}": lambda x, label, ratio=ratio: image_wise_maxsquare(x, ratio, label),
            f"IW_entropy_{ratio}": lambda x, label, ratio=ratio: image_wise_entropy(x, ratio),
        }
    return found


@over("maxsquare_losses", lambda data, meta: sorted(meta["cases"]))
def test_losses(path, item):
    data, meta = load(path)
    losses = losses_of(meta)
    expected = {name.split("/")[1] for name in data if name.startswith(f"{item}/") and name.endswith("/value")}
    assert expected == losses.keys()
    assert torch.equal(tensor(data, f"{item}/logits").argmax(1), tensor(data, f"{item}/argmax"))
    for name, loss in losses.items():
        logits = tensor(data, f"{item}/logits").requires_grad_(True)
        for label in (tensor(data, f"{item}/label"), with_ignored(tensor(data, f"{item}/label"))):
            value = loss(logits, label)
            assert float(value.detach()) == pytest.approx(float(data[f"{item}/{name}/value"]), abs=1e-5, rel=1e-5), name
        value.backward()
        assert relative_l2(logits.grad, tensor(data, f"{item}/{name}/grad")) <= 1e-4, name


@over("maxsquare_guidance", lambda data, meta: sorted(meta["cases"]))
def test_guidance(path, item):
    data, meta = load(path)
    threshold = meta["cases"][item]["threshold"]
    main, aux = (tensor(data, f"{item}/logits_{head}").requires_grad_(True) for head in ("main", "aux"))
    for kind, logits, gradient, label in (
        ("hard", main, "grad_main", confident_label(main, threshold)),
        ("guidance", aux, "grad_aux", ensemble_label(main, aux, threshold)),
    ):
        assert torch.equal(label, with_ignored(tensor(data, f"{item}/{kind}/label")).long()), kind
        loss = cross_entropy(logits, label)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(data[f"{item}/{kind}/value"]), abs=1e-6, rel=1e-4), kind
        assert relative_l2(logits.grad, tensor(data, f"{item}/{kind}/{gradient}")) <= 1e-4, kind
    assert torch.equal(label != IGNORE, tensor(data, f"{item}/guidance/keep").bool())


@over("snr_dual_loss", lambda data, meta: sorted(meta["cases"]))
def test_dual_restitution_loss(path, item):
    data, _ = load(path)
    names = Restituted._fields
    logits = Restituted(*(tensor(data, f"{item}/logits_{name}").requires_grad_(True) for name in names))
    for name, part in logits._asdict().items():
        assert float(entropies(part).mean().detach()) == pytest.approx(float(data[f"{item}/entropy_{name}"]), abs=1e-5)
    plus, minus = dual_loss(logits)
    (plus + minus).backward()
    for value, name in ((plus, "loss_plus"), (minus, "loss_minus"), (plus + minus, "loss")):
        assert float(value.detach()) == pytest.approx(float(data[f"{item}/{name}"]), abs=1e-5), name
    for name, part in logits._asdict().items():
        assert relative_l2(part.grad, tensor(data, f"{item}/grad_{name}")) <= 1e-4, name
    for value, name in zip(dual_loss(logits, mean=None), ("plus", "minus"), strict=True):
        assert float(value.detach()) == pytest.approx(float(data[f"{item}/per_pixel_{name}"]), abs=1e-5), name


def test_the_heads_of_the_restitution_learn_the_labels():
    heads = RestitutionHeads((4, 8), 3)
    parts = [Restituted(*torch.rand(3, 2, channels, 4, 5)) for channels in (4, 8)]
    label = torch.full((2, 8, 10), IGNORE, dtype=torch.uint8)
    label[:, ::2, ::2] = 1  # what nearest-neighbour sampling keeps
    dual, supervised = restitution_loss(heads, parts, label, rank=ALONE, fraction=1.0)
    assert float(dual.detach()) == pytest.approx(4 * 0.693, abs=0.2)
    small = torch.ones(2, 4, 5)
    expected = [cross_entropy(head(part.restored), small) for head, part in zip(heads, parts, strict=True)]
    torch.testing.assert_close(supervised, sum(expected))


def test_logits_of_half_precision():
    logits = 8 * torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    half = logits.bfloat16()
    for loss in (maxsquare, entropy, lambda x: image_wise_maxsquare(x, 0.2)):
        assert loss(half).dtype == torch.float32
        torch.testing.assert_close(loss(half), loss(half.float()))
