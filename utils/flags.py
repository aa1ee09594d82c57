"""Argparse helpers: one-line errors, and telling flags a user gave from defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from utils.errors import UserError


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad command line in one line with exit code 2, like every other bad input."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def flag_of(name: str) -> str:
    """The flag behind a destination, as a person types it."""
    return "--weight-decay" if name == "weight_decay" else f"--{name}"


def _require_utf8(arguments: Sequence[str]) -> None:
    """Paths go into checkpoints, manifests and messages, all of them UTF-8."""
    flag = ""
    for argument in arguments:
        flag = argument.partition("=")[0] if argument.startswith("--") else flag
        # Python passes the bytes that are not UTF-8 on as lone surrogates.
        if argument.encode("utf-8", "replace").decode() != argument:
            shown = argument.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"{flag} {shown}: not UTF-8; rename the file or folder")


class _NotGiven:
    """Stands for the value of a flag that is not on the command line."""


def parse_flags(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None
) -> tuple[argparse.Namespace, frozenset[str]]:
    """Parse the command line.

    Returns:
        The values, and the destinations of the flags that were given explicitly.

    Raises:
        UserError: an unknown flag, a value of the wrong kind, or one that is not UTF-8.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _require_utf8(arguments)
    # argparse fills in a default only where the namespace has no value yet.
    actions = [a for a in parser._actions if a.dest not in (argparse.SUPPRESS, "help")]
    values = parser.parse_args(arguments, argparse.Namespace(**{a.dest: _NotGiven for a in actions}))
    given = frozenset(name for name, value in vars(values).items() if value is not _NotGiven)
    defaults: dict[str, Any] = {a.dest: a.default for a in actions}
    return argparse.Namespace(**{n: v if n in given else defaults[n] for n, v in vars(values).items()}), given
