"""The distance between domains: against scipy's matrix root, and through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy import linalg

import measure_domain_distance
from core.domain_distance import frechet_distance, gaussian_of
from worlds import write_gta5


def fit_of(vectors, batches=3):
    return gaussian_of(np.array_split(vectors, batches))


def test_mean_and_covariance_in_batches():
    vectors = np.random.default_rng(0).normal(3.0, 2.0, (50, 4))
    mean, covariance = fit_of(vectors)
    np.testing.assert_allclose(mean, vectors.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(vectors.T), rtol=1e-10)


def test_frechet_distance_against_the_matrix_root():
    rng = np.random.default_rng(1)
    a = rng.normal(size=(200, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(1.0, 1.0, size=(150, 6)) @ rng.normal(size=(6, 6))
    mean, covariance = a.mean(axis=0) - b.mean(axis=0), (np.cov(a.T), np.cov(b.T))
    root = linalg.sqrtm(covariance[0] @ covariance[1]).real
    expected = mean @ mean + np.trace(covariance[0] + covariance[1] - 2 * root)
    assert frechet_distance(fit_of(a), fit_of(b)) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(fit_of(a), fit_of(a)) == pytest.approx(0, abs=1e-8)


def test_one_dimension_by_hand_and_singular_covariances():
    a, b = np.array([[1.0], [3.0]]), np.array([[10.0], [18.0]])
    # Means 2 and 14, standard deviations sqrt(2) and sqrt(32).
    assert frechet_distance(fit_of(a, 1), fit_of(b, 1)) == pytest.approx(12**2 + (np.sqrt(32) - np.sqrt(2)) ** 2)
    flat = np.zeros((5, 3))
    assert frechet_distance(fit_of(flat), fit_of(flat + 2)) == pytest.approx(12)


def test_command_line_ranks_sets_by_their_look(tmp_path, run_script):
    roots = {name: tmp_path / name for name in ("source", "near", "target")}
    for k, (name, brightness) in enumerate((("source", 0.3), ("near", 0.9), ("target", 1.0))):
        write_gta5(roots[name], count=6, seed=10 * k)
        for path in sorted((roots[name] / "images").iterdir()):
            with Image.open(path) as image:
                changed = ImageEnhance.Brightness(image).enhance(brightness)
            changed.save(path)
    flags = (
        "--gpus", "cpu", "--target", "gta5", "--src_data_dir", roots["source"], "--trg_data_dir", roots["target"],
        "--sit_data_dir", roots["near"], "--size", 48, 32, "--vgg_weights", "random", "--layer", 3,
    )  # fmt: skip
    result = run_script(measure_domain_distance, *flags, "--json", tmp_path / "out" / "distances.json")
    assert result.code == 0, result.err
    distances = json.loads((tmp_path / "out" / "distances.json").read_text())
    assert 0 < distances["SiT-target"] < 0.7 * distances["source-target"]
    assert f"{distances['SiT-target']:.4f}" in result.out
    for bad, part in ((("--layer", 2), "layer"), (("--size", 8, 8), "--size"), (("--max_images", 0), "--max_images")):
        result = run_script(measure_domain_distance, *flags, *bad)
        assert result.code == 2
        assert part in result.err
        assert len(result.err.strip().splitlines()) == 1
