"""What the tests of faults share: a run that the same command continues, and its last line."""

from __future__ import annotations

from commands import procst_flags

LAST = 2  # scale of a run of `procst_flags`


def run_flags(world, out, **changes):
    return procst_flags(world, out, checkpoints_dir=None, run_dir=out / "run", **changes)


def one_line(result, code=2):
    """The message: the last line, as bars are drawn above it."""
    assert result.code == code
    assert "Traceback" not in result.err
    return result.err.strip().replace("\r", "\n").splitlines()[-1]
