"""Values that a flag or a field of the configuration may take, importable without PyTorch."""

from __future__ import annotations

PRECISIONS = ("auto", "fp32", "tf32", "bf16")
SELECT_BY = ("auto", "miou", "label_free", "none")
