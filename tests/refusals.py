"""What bad input must come to: exit code 2, one line that names it, and nothing written."""

from __future__ import annotations

import hashlib
import os
import stat

import pytest

from utils.errors import UserError


def tree(root):
    """Everything below a folder: kind, permissions, time of the last change, and what a file holds or a link names."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[os.path.relpath(path, root)] = (oct(status.st_mode), status.st_mtime_ns, _content(path, status))
    found["."] = os.stat(root).st_mtime_ns
    return found


def _content(path, status):
    if stat.S_ISLNK(status.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(status.st_mode) or not os.access(path, os.R_OK):
        return ""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def check_refusal(result, *parts):
    """Exit code 2 and one line on stderr, progress bars aside, that holds every part."""
    assert result.code == 2, result.out + result.err
    lines = [line for line in result.err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, result.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in result.err
    for part in parts:
        assert str(part) in lines[0], lines[0]


def check_refused(call, *parts):
    """The call must raise one line that holds all parts."""
    with pytest.raises(UserError) as refusal:
        call()
    assert "\n" not in str(refusal.value)
    assert all(str(part) in str(refusal.value) for part in parts), str(refusal.value)
