"""Training-free translators: against independent computations, as SiT sets, and as images to train on."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import create_sit_dataset
import train_semseg_on_source
from commands import command, source_flags, tensors_of
from core.colour_transfer import histogram_matched, low_frequencies_swapped
from data_handlers.datasets import DATA_SETS
from data_handlers.domain import Domain, Samples
from data_handlers.lists import list_images
from refusals import check_refusal
from worlds import noise_image, write_gta5


def picture(width, height, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def matched_by_sorting(source, target):
    """Each channel's levels by their rank: the least level that as large a part of the target does not exceed."""
    out = np.empty(source.shape)
    for c in range(3):
        ours, theirs = source[..., c].ravel(), np.sort(target[..., c].ravel())
        levels = np.unique(theirs)
        reached = np.searchsorted(theirs, levels, side="right") / len(theirs)
        share = np.searchsorted(np.sort(ours), ours, side="right") / len(ours)
        out[..., c] = np.interp(share, reached, levels).reshape(source.shape[:2])
    return out


def swapped_in_the_middle(source, target, beta):
    """FDA as published: a square window in the middle of the shifted spectrum of all frequencies."""
    height, width = source.shape[:2]
    n = int(np.floor(min(height, width) * beta))
    out = np.empty(source.shape)
    for c in range(3):
        ours, theirs = (np.fft.fftshift(np.fft.fft2(p[..., c].astype(float))) for p in (source, target))
        amplitude, (y, x) = np.abs(ours), (height // 2, width // 2)
        window = np.s_[y - n : y + n + 1, x - n : x + n + 1]
        amplitude[window] = np.abs(theirs)[window]
        out[..., c] = np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * np.angle(ours)))).real
    return np.clip(np.rint(out), 0, 255)


@pytest.mark.parametrize("sizes", [((40, 24), (40, 24)), ((37, 23), (64, 16)), ((1, 1), (5, 3))])
def test_histogram_matching_against_sorting(sizes):
    source, target = picture(*sizes[0], 1), picture(*sizes[1], 2) // 2 + 60
    found = histogram_matched(source, target)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.floor(matched_by_sorting(source, target) + 1e-9))


@pytest.mark.parametrize("beta", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("size", [(40, 24), (37, 23)])
def test_low_frequencies_against_the_published_way(size, beta):
    source, target = picture(*size, 1) // 2 + 20, np.asarray(noise_image(size, 2))
    found = low_frequencies_swapped(source, target, beta)
    assert found.dtype == np.uint8
    # A value halfway between two levels may be rounded to either.
    assert np.abs(found - swapped_in_the_middle(source, target, beta)).max() <= 1
    assert (found == swapped_in_the_middle(source, target, beta)).mean() > 0.999
    if int(beta * min(size)) == 0:
        np.testing.assert_allclose(found.mean((0, 1)), target.mean((0, 1)), atol=0.6)  # the mean colour alone


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (16, 9), (33, 20)])
def test_a_picture_equal_to_its_target_stays(size):
    pixels = picture(*size, 3)
    np.testing.assert_array_equal(histogram_matched(pixels, pixels), pixels)
    for beta in (0.0, 0.1, 0.5):
        np.testing.assert_array_equal(low_frequencies_swapped(pixels, pixels, beta), pixels)


def test_a_target_of_another_size_is_resized():
    source, target = picture(20, 12, 1), picture(31, 9, 2)
    resized = np.asarray(Image.fromarray(target).resize((20, 12), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(
        low_frequencies_swapped(source, target, 0.1), low_frequencies_swapped(source, resized, 0.1)
    )


def transfer_flags(world, out, translator="histogram", **changes):
    flags = {
        "gpus": "cpu", "translator": translator, "sit_output_path": out, "src_data_dir": world / "gta",
        "trg_data_dir": world / "cityscapes", "num_workers": 0,
    }  # fmt: skip
    return command(flags, changes)


def pixels_of(folder):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / "images").glob("*.png"))}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


@pytest.mark.parametrize(("translator", "more"), [("histogram", {}), ("fda", {"beta": 0.05})])
def test_a_set_and_its_variants(world, tmp_path, run_script, translator, more):
    """Each image is matched to a target image by seed, variant and name, whatever else is translated with it."""
    flags = {"translator": translator, "seed": 3, **more}
    result = run_script(create_sit_dataset, *transfer_flags(world, tmp_path / "whole", **flags))
    assert result.code == 0, result.err
    whole = pixels_of(tmp_path / "whole")
    assert list(whole) == [path.name for path in sorted((world / "gta/images").glob("*.png"))]
    targets = [np.asarray(Image.open(p)) for p in sorted((world / "cityscapes/leftImg8bit/train").rglob("*.png"))]
    change = (lambda s, t: low_frequencies_swapped(s, t, 0.05)) if translator == "fda" else histogram_matched
    for name, pixels in whole.items():
        source = np.asarray(Image.open(world / "gta/images" / name))
        assert any(np.array_equal(pixels, change(source, target)) for target in targets)
    manifest = json.loads((tmp_path / "whole/sit_manifest.json").read_text())
    assert (manifest["translator"], manifest["seed"], manifest["complete"]) == (translator, 3, True)

    (tmp_path / "one.txt").write_text("00003.png\n")
    one = transfer_flags(world, tmp_path / "one", src_list=tmp_path / "one.txt", **flags)
    assert run_script(create_sit_dataset, *one).code == 0
    assert_same(pixels_of(tmp_path / "one"), {"00003.png": whole["00003.png"]})

    variants = transfer_flags(world, tmp_path / "many", variants=3, num_workers=1, **flags)
    assert run_script(create_sit_dataset, *variants).code == 0
    sets = [pixels_of(tmp_path / "many" / f"v{k}") for k in (1, 2, 3)]
    assert_same(sets[0], whole)
    assert any(not np.array_equal(sets[0][name], sets[1][name]) for name in whole)
    assert all(found.keys() == whole.keys() for found in sets)


def test_an_interrupted_set_is_continued(world, tmp_path, run_script):
    flags = transfer_flags(world, tmp_path / "sit", variants=2)
    assert run_script(create_sit_dataset, *flags).code == 0
    whole = [pixels_of(tmp_path / "sit" / name) for name in ("v1", "v2")]
    (tmp_path / "sit/v2/images/00002.png").unlink()
    result = run_script(create_sit_dataset, *flags, "--skip_created_files")
    assert result.code == 0, result.err
    assert "1 translated" in result.out
    assert_same(pixels_of(tmp_path / "sit/v1"), whole[0])
    assert_same(pixels_of(tmp_path / "sit/v2"), whole[1])
    other = transfer_flags(world, tmp_path / "sit", variants=2, seed=1, skip_created_files=())
    check_refusal(run_script(create_sit_dataset, *other), "another seed")


def test_no_variant_is_written_before_all_can_be(world, tmp_path, run_script):
    shutil.copytree(world / "gta/images", tmp_path / "sit/v2/images")
    flags = transfer_flags(world, tmp_path / "sit", variants=2)
    check_refusal(run_script(create_sit_dataset, *flags), tmp_path / "sit/v2", "did not write")
    assert not (tmp_path / "sit/v1").exists()


def test_another_target_is_drawn_for_one_that_cannot_be_read(world, tmp_path, run_script):
    cityscapes = shutil.copytree(world / "cityscapes", tmp_path / "cityscapes")
    bad = min((cityscapes / "leftImg8bit/train").rglob("*.png"))
    bad.write_bytes(b"no image")
    flags = transfer_flags(world, tmp_path / "sit", trg_data_dir=cityscapes)
    check_refusal(run_script(create_sit_dataset, *flags), bad, "--on_bad_image skip")
    result = run_script(create_sit_dataset, *flags, "--on_bad_image", "skip")
    assert result.code == 0, result.err
    assert len(pixels_of(tmp_path / "sit")) == 6
    assert "cannot be read" not in result.out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ({"trained_procst_path": "x"}, ("--trained_procst_path x acts only with --translator procst",)),
        ({"scale_factor": 0.5}, ("--scale_factor", "--translator procst")),
        ({"batch_size": 2}, ("--batch_size 2", "--translator procst")),
        ({"precision": "bf16"}, ("--precision bf16", "--translator procst")),
        ({"beta": 0.1}, ("--beta 0.1 acts only with --translator fda",)),
        ({"translator": "fda", "beta": 0.6}, ("--beta is 0.6",)),
        ({"translator": "procst", "trained_procst_path": "x", "seed": 1, "trg_data_dir": None}, ("--seed 1",)),
        ({"variants": 0}, ("--variants",)),
        ({"trg_data_dir": "nowhere"}, ("--trg_data_dir nowhere",)),
        ({"target": "folder", "trg_data_dir": "WORLD/empty"}, ("no images",)),
    ],
)
def test_bad_flags(world, tmp_path, run_script, flags, parts):
    (world / "empty").mkdir(exist_ok=True)
    flags = {name: world / "empty" if value == "WORLD/empty" else value for name, value in flags.items()}
    check_refusal(run_script(create_sit_dataset, *transfer_flags(world, tmp_path / "sit", **flags)), *parts)
    assert not (tmp_path / "sit").exists()


# --- training on several folders of images ---------------------------------------------------------------------------


def test_one_folder_is_drawn_for_each_sample(tmp_path):
    roots = [write_gta5(tmp_path / name, seed=seed) for name, seed in (("own", 0), ("v1", 50), ("v2", 90))]
    files = list_images(DATA_SETS["gta5"], roots[0], "--src_data_dir")
    settings = {
        "files": files, "name": "source", "seed": 5, "resize": (48, 32), "crop": (48, 32), "labels": True,
    }  # fmt: skip

    def drawn(**more):
        domain = Domain(**settings, **more)
        samples = Samples(domain=domain, stage=0, per_epoch=6, epoch_length=6, pyramid=lambda image: [image])
        found = []
        for position in range(60):
            (image,), label, _ = samples[position]
            name = files.images[samples.image_index(position)]
            matches = [k for k, root in enumerate(roots) if np.array_equal(image, np.asarray(Image.open(root / name)))]
            own = Samples(
                domain=Domain(**settings), stage=0, per_epoch=6, epoch_length=6, pyramid=lambda image: [image]
            )
            np.testing.assert_array_equal(label, own[position][1])  # the label stays that of the list
            found += matches
        return found

    assert set(drawn()) == {0}
    both = drawn(image_roots=tuple(roots[1:]))
    assert set(both) == {1, 2}
    assert 15 < both.count(1) < 45
    assert drawn(image_roots=tuple(roots[1:]), cache_dir=str(tmp_path / "cache")) == both


def test_training_on_variants(world, tmp_path, run_script):
    variants = transfer_flags(world, tmp_path / "sit", variants=2)
    assert run_script(create_sit_dataset, *variants).code == 0
    folders = (tmp_path / "sit/v1", tmp_path / "sit/v2")

    def train(name, images, **more):
        flags = source_flags(world, tmp_path, output="", checkpoints_dir=None, run_dir=tmp_path / name, **more)
        words = ("--source_images", *map(str, images)) if images else ()
        return run_script(train_semseg_on_source, *flags, *words)

    assert train("both", folders).code == 0
    assert train("first", folders[:1]).code == 0
    assert train("as_set", (), src_data_dir=folders[0], src_label_dir=world / "gta").code == 0
    weights = {name: dict(tensors_of(tmp_path / name / "latest.pth")) for name in ("both", "first", "as_set")}
    same = {
        name: all((weights[name][key] == value).all() for key, value in weights["first"].items()) for name in weights
    }
    assert same == {"both": False, "first": True, "as_set": True}

    check_refusal(train("empty", ("",)), "--source_images names an empty path")
    (folders[1] / "images/00001.png").unlink()
    check_refusal(train("missing", folders), "--source_images", "1 of 4 images are missing", "00001.png")
    assert not (tmp_path / "missing").exists()
