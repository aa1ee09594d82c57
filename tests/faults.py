"""What the tests of faults share: a run that the same command continues, and its last line."""

from __future__ import annotations

from commands import procst_flags

LAST = 1  # scale


def run_flags(world, out, **changes):
    """A ProCST run of two scales in the folder `run`."""
    flags = {"num_scales": LAST, "batch_size_list": (2, 1), "crop_size": (24, 20)}
    return procst_flags(world, out, checkpoints_dir=None, run_dir=out / "run", **{**flags, **changes})


def one_line(result, code=2):
    """The message: the last line, as bars are drawn above it."""
    assert result.code == code
    assert "Traceback" not in result.err
    return result.err.strip().replace("\r", "\n").splitlines()[-1]
