"""Prototypes, rectification and the losses of DDB's distillation against the published code's numbers.

Every `uda/ddb_{prototypes,rectify,ckd}*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it).
"""

import pytest
import torch

from uda import prototypes
from uda.prototypes import Prototypes, class_means, distances, rectification, upsampled
from uda_golden import load, over


def tensor(data, name):
    return torch.from_numpy(data[name])


def assert_near(found, expected, tolerance=1e-5, name=""):
    """Differences are relative to the largest magnitude of the tensor."""
    assert found.shape == expected.shape, name
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


def empty(classes, channels, **made_from):
    return Prototypes(
        vectors=torch.zeros(classes, channels), counts=torch.zeros(classes, dtype=torch.int64), images=0,
        made_from=made_from,
    )  # fmt: skip


@over("ddb_prototypes")
def test_prototypes_of_a_stream(path, monkeypatch):
    data, meta = load(path)
    monkeypatch.setattr(prototypes, "LEAST_PIXELS", meta["min_pixels"])
    monkeypatch.setattr(prototypes, "MOST_IMAGES", meta["cap"])
    found = empty(meta["num_classes"], meta["channels"])
    for number, batch in enumerate(meta["batches"]):
        size, prefix = (batch["H"], batch["W"]), f"batch{number}"
        vectors, classes = tensor(data, f"{prefix}/vector"), data[f"{prefix}/vector_class"].tolist()
        listed = []
        for features, logits in zip(
            tensor(data, f"{prefix}/feature_low"), tensor(data, f"{prefix}/logits_low"), strict=True
        ):
            label = upsampled(logits[None], size).argmax(1)[0]
            listed.append(label)
            means, pixels = class_means(features, label, meta["num_classes"])
            for k in range(meta["num_classes"]):
                if pixels[k] >= meta["min_pixels"]:
                    assert classes.pop(0) == k
                    assert_near(means[k], vectors[0])
                    vectors = vectors[1:]
            found.add(features, label)
        assert not classes
        assert torch.equal(torch.stack(listed).byte(), tensor(data, f"{prefix}/argmax"))
        assert_near(found.vectors, tensor(data, f"{prefix}/prototypes_after"))
        assert torch.equal(found.counts.float(), tensor(data, f"{prefix}/counts_after"))
    assert found.images == sum(batch["n"] for batch in meta["batches"])


@over("ddb_prototypes")
def test_classes_of_few_pixels_and_of_many_images(path, monkeypatch):
    data, meta = load(path)
    monkeypatch.setattr(prototypes, "LEAST_PIXELS", meta["min_pixels"])
    monkeypatch.setattr(prototypes, "MOST_IMAGES", meta["cap"])
    found = empty(meta["num_classes"], meta["channels"])
    found.add(tensor(data, "minpix/feature")[0], tensor(data, "minpix/label")[0])
    assert_near(found.vectors, tensor(data, "minpix/prototypes"))
    assert torch.equal(found.counts.float(), tensor(data, "minpix/counts"))
    found = empty(*data["cap/P0"].shape)
    found.vectors, found.counts = tensor(data, "cap/P0").clone(), tensor(data, "cap/counts0").long()
    for vectors, expected, counts in zip(*(tensor(data, f"cap/{n}") for n in ("vectors", "P", "counts")), strict=True):
        # An image in which each class has a row, whose features are its vector.
        found.add(vectors.T[..., None].expand(-1, -1, 16), torch.arange(len(vectors))[:, None].expand(-1, 16))
        assert_near(found.vectors, expected)
        assert torch.equal(found.counts.float(), counts)


@over("ddb_rectify", lambda data, meta: [case["key"] for case in meta["cases"]])
def test_rectification(path, item):
    data, _ = load(path)
    features, vectors = (tensor(data, f"{item}/{name}") for name in ("feature", "prototypes"))
    assert_near(distances(features, vectors), tensor(data, f"{item}/distance"))
    weight = rectification(features, vectors, None, features.shape[2:])
    assert_near(weight, tensor(data, f"{item}/weight"))
    probability = tensor(data, f"{item}/logits").softmax(1)
    assert_near(probability, tensor(data, f"{item}/prob"))
    assert_near(weight * probability, tensor(data, f"{item}/prob_rectified"))


def test_a_class_without_prototype_attracts_nothing():
    features = torch.tensor([3.0, 4.0])[None, :, None, None]
    vectors, known = torch.tensor([[9.0, 12.0], [0.0, 0.0]]), torch.tensor([True, False])
    published = rectification(features, vectors, None, (1, 1)).flatten()
    torch.testing.assert_close(published, torch.tensor([0.0067, 0.9933]), atol=1e-4, rtol=0)
    assert rectification(features, vectors, known, (2, 2)).movedim(1, -1).reshape(-1, 2).tolist() == 4 * [[1.0, 0.0]]


def test_half_precision_features_are_read_in_float32():
    features = torch.rand(1, 8, 3, 4).bfloat16()
    assert upsampled(features, (6, 8)).dtype == torch.float32
    assert distances(upsampled(features, (3, 4)), torch.rand(5, 8)).dtype == torch.float32


@pytest.mark.parametrize("size", [(7, 9), (14, 18)])
def test_means_are_those_of_the_pixels(size):
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(5, 7, 9, generator=generator)
    label = torch.randint(0, 3, size, generator=generator)
    means, pixels = class_means(features, label, 4)
    up = upsampled(features[None], size)[0]
    for k in range(3):
        torch.testing.assert_close(means[k], up[:, label == k].mean(dim=1))
        assert pixels[k] == (label == k).sum()
    assert not means[3].any()
