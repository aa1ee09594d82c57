"""What the tests of faults share: a run's command line, what happens in it, and whether its end is as it should be."""

from __future__ import annotations

import pytest
import torch
from core.checkpoint import load_checkpoint

import train_procst
from test_train_cli import all_tensors, training_flags, world  # noqa: F401

LAST = 2  # scale
STEPS = 3  # of every scale


def run_flags(world, out, **changes):  # noqa: F811
    return training_flags(world, out, checkpoints_dir=None, run_dir=out / "run", **changes)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):  # noqa: F811
    """The tensors of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train_procst.py", *map(str, run_flags(world, out))])
        train_procst.main()
    return dict(all_tensors(load_checkpoint(out / "run" / "latest.pth")))


def same_as(undisturbed, folder):
    ours = dict(all_tensors(load_checkpoint(folder / "latest.pth")))
    return ours.keys() == undisturbed.keys() and all(torch.equal(ours[k], v) for k, v in undisturbed.items())


def at_step(monkeypatch, scale, step, happens):
    """Let something happen before a step is taken."""
    real = train_procst.Trainer.one_step

    def one_step(self, *arguments):
        if (self.scale, self.step) == (scale, step):
            happens(self)
        return real(self, *arguments)

    monkeypatch.setattr(train_procst.Trainer, "one_step", one_step)


def one_line(result, code=2):
    """The message: the last line, as bars are drawn above it."""
    assert result.code == code
    assert "Traceback" not in result.err
    return result.err.strip().replace("\r", "\n").splitlines()[-1]
