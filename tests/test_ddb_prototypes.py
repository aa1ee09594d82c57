"""Prototypes, rectification and the losses of DDB's distillation against the published code's numbers.

Every `uda/ddb_{prototypes,rectify,ckd}*.npz` of the golden folder is tested (`PROCST_GOLDEN_DIR` overrides it).
"""

import pytest
import torch

from uda import prototypes
from uda.ddb_losses import correct, weight_map, weighted_cross_entropy
from uda.distillation import ensemble, hard_labels, soft_loss
from uda.prototypes import Prototypes, class_means, distances, rectification, upsampled
from uda_golden import load, over


def tensor(data, name):
    return torch.from_numpy(data[name])


def assert_near(found, expected, tolerance=1e-5, name=""):
    """Differences are relative to the largest magnitude of the tensor."""
    assert found.shape == expected.shape, name
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max()), name


@over("ddb_prototypes")
def test_prototypes_of_a_stream(path, monkeypatch):
    data, meta = load(path)
    monkeypatch.setattr(prototypes, "LEAST_PIXELS", meta["min_pixels"])
    monkeypatch.setattr(prototypes, "MOST_IMAGES", meta["cap"])
    found = Prototypes.empty(meta["num_classes"], meta["channels"], {})
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


@over("ddb_prototypes")
def test_classes_of_few_pixels_and_of_many_images(path, monkeypatch):
    data, meta = load(path)
    monkeypatch.setattr(prototypes, "LEAST_PIXELS", meta["min_pixels"])
    monkeypatch.setattr(prototypes, "MOST_IMAGES", meta["cap"])
    found = Prototypes.empty(meta["num_classes"], meta["channels"], {})
    found.add(tensor(data, "minpix/feature")[0], tensor(data, "minpix/label")[0])
    assert_near(found.vectors, tensor(data, "minpix/prototypes"))
    assert torch.equal(found.counts.float(), tensor(data, "minpix/counts"))
    found, width = Prototypes.empty(*data["cap/P0"].shape, {}), meta["min_pixels"]
    found.vectors, found.counts = tensor(data, "cap/P0").clone(), tensor(data, "cap/counts0").long()
    for vectors, expected, counts in zip(*(tensor(data, f"cap/{n}") for n in ("vectors", "P", "counts")), strict=True):
        # An image in which each class has a row, whose features are its vector.
        found.add(vectors.T[..., None].expand(-1, -1, width), torch.arange(len(vectors))[:, None].expand(-1, width))
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


# --- losses ----------------------------------------------------------------------------------------------------------


@over("ddb_ckd", lambda data, meta: [variant["name"] for variant in meta["variants"]])
def test_distillation(path, item):
    data, meta = load(path)
    given = next(variant for variant in meta["variants"] if variant["name"] == item)
    size, teachers = (meta["H"], meta["W"]), []
    for name in ("cu", "ca"):
        features = tensor(data, f"{name}_feature_low")
        logits = upsampled(tensor(data, f"{name}_logits_low"), size)
        near = rectification(features, tensor(data, f"{name}_prototypes"), None, size)
        assert_near(near[:1], tensor(data, f"{name}_proto_weight"))
        teachers.append((logits, near if given["proto_rectify"] else None))
    assert_near(teachers[0][0][:1], tensor(data, "cu_logits_up"))
    assert_near(upsampled(tensor(data, "cu_feature_low"), size)[:1], tensor(data, "cu_feature_up"))
    student = {name: tensor(data, f"student_{name}_logits_low").requires_grad_(True) for name in ("src", "tgt")}
    source, target = (upsampled(logits, size) for logits in student.values())
    label = tensor(data, "src_label")[:, 0]
    losses = {"stu_src.decode.loss_ce": weighted_cross_entropy(source, label)}
    accuracies = {"stu_src": (source, label)}
    if given["soft_distill"]:
        losses["stu_tgt.loss_distill"] = given["soft_distill_w"] * soft_loss(target, teachers, given["temp"], True)
    else:
        probability = ensemble(teachers, not given["rectify_on_prob"], reference=True)
        pseudo, confidence = hard_labels(probability, reference=True)
        weight = torch.ones_like(confidence)
        if given["use_pl_weight"]:
            share = (confidence >= given["pseudo_threshold"]).double().mean()
            assert float(share) == pytest.approx(given["weight_value"], rel=1e-6)
            weight = weight_map(share, confidence, 0, 0)
        assert torch.equal(pseudo.byte(), tensor(data, f"{item}/pseudo_label"))
        assert_near(weight, tensor(data, f"{item}/weight").expand_as(weight))
        if f"{item}/ensemble_prob" in data:
            assert_near(probability[:1], tensor(data, f"{item}/ensemble_prob"))
        losses["stu_tgt.decode.loss_ce"] = weighted_cross_entropy(target, pseudo, weight)
        accuracies["stu_tgt"] = (target, pseudo)
    sum(losses.values()).backward()
    for name, (logits, labels) in accuracies.items():
        accuracy = 100 * float(correct(logits, labels)) / labels.numel()
        assert accuracy == pytest.approx(float(data[f"{item}/log/{name}.decode.acc_seg"]), rel=1e-5)
    for name, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(float(data[f"{item}/log/{name}"]), rel=1e-5), name
    assert {f"{item}/log/{name}" for name in losses} == {
        name for name in data if name.startswith(f"{item}/log/stu_") and not name.endswith("acc_seg")
    }
    for name, logits in student.items():
        assert_near(logits.grad, tensor(data, f"{item}/grad_{name}_low"), name=name)


def test_what_the_soft_loss_is():
    logits = [torch.tensor(values)[None, :, None, None] for values in ((2.0, 0.0), (0.0, 0.0))]
    teachers = [(one, None) for one in logits]
    for temperature, expected in ((1.0, 0.110944), (2.0, 4 * 0.0302999)):
        loss = soft_loss(torch.zeros(1, 2, 1, 1), teachers, temperature, reference=False)
        assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_the_nearer_teacher_decides():
    """Example B of the specification, from probabilities and nearnesses."""
    def prediction(probability, near):
        shaped = [torch.tensor(values)[None, :, None, None] for values in (probability, near)]
        return shaped[0].log(), shaped[1]

    teachers = [prediction((0.6, 0.4), (0.268941, 0.731059)), prediction((0.45, 0.55), (0.622459, 0.377541))]
    probability = ensemble(teachers, on_logits=False, reference=True)
    torch.testing.assert_close(probability.flatten(), torch.tensor([0.220736, 0.250035]), atol=1e-6, rtol=0)
    label, confidence = hard_labels(probability, reference=True)
    assert (int(label), float(confidence)) == (1, pytest.approx(0.250035, abs=1e-6))
    assert float(hard_labels(probability, reference=False)[1]) == pytest.approx(0.250035 / 0.470771, abs=5e-6)
    plain = ensemble([(logits, None) for logits, _ in teachers], on_logits=False, reference=False)
    torch.testing.assert_close(plain.flatten(), torch.tensor([0.525, 0.475]))


def test_rectified_logits_mean_what_rectified_probabilities_mean():
    """Also where logits are negative, which the published product would raise, and for a class that is far away."""
    logits = torch.tensor([-3.0, -1.0, -2.0])[None, :, None, None]
    near = torch.tensor([0.5, 0.5, 0.0])[None, :, None, None]
    expected = near * logits.softmax(1)
    found = ensemble([(logits, near)], on_logits=True, reference=False)
    torch.testing.assert_close(found, expected / expected.sum())
    student = torch.zeros(1, 3, 1, 1, requires_grad=True)
    loss = soft_loss(student, [(logits, near)], 2.0, reference=False)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
