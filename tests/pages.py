"""The pages of the documentation: the commands in them, and the description in docs/own-data.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OWN_DATA = (ROOT / "docs/own-data.md").read_text()
(OWN_DESCRIPTION,) = re.findall(r"^```toml\n(.*?)^```", OWN_DATA, re.DOTALL | re.MULTILINE)


def commands_of(text):
    """Commands in the fenced blocks and in backticks of a text, without comments, continued lines joined."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|make|torchrun) [^`\n]+)`", text)
    return [line.strip() for line in lines if re.match(r"\s*(python|make|torchrun|srun) ", line)]
