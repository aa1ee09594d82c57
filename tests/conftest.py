"""Shared by all tests: where the reference numbers are, and deterministic thread use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

GOLDEN_DIR = Path(os.environ.get("PROCST_GOLDEN_DIR") or Path(__file__).parent / "golden")


@pytest.fixture
def golden_dir() -> Path:
    """Folder of the reference numbers; `PROCST_GOLDEN_DIR` overrides it."""
    return GOLDEN_DIR
