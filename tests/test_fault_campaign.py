"""A short version of benchmarks/fault_campaign.py: real processes, really killed."""

from __future__ import annotations

import pytest

from benchmarks.fault_campaign import Campaign

pytestmark = [pytest.mark.slow, pytest.mark.processes]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Campaign(tmp_path_factory.mktemp("campaign"), kills=1, steps=5, images=12, seed=0)


@pytest.mark.parametrize("in_writes", [False, True])
def test_killed_training(campaign, in_writes):
    assert campaign.killed_training(in_writes).passed


def test_killed_export(campaign):
    assert campaign.killed_export().passed


def test_killed_loaders_of_an_export(campaign):
    assert campaign.killed_export_loader().passed


def test_a_campaign_can_fail(campaign):
    """What was made is compared: other weights, other pixels."""
    weights, campaign.weights = campaign.weights, "other"
    pixels, campaign.pixels = campaign.pixels, "other"
    try:
        for row in (campaign.killed_loader(), campaign.killed_export()):
            assert row.injected == row.survived > 0
            assert row.lost == 0
            assert not row.equal
            assert not row.passed
    finally:
        campaign.weights, campaign.pixels = weights, pixels
