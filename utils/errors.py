"""Errors a person can act on, and how a command line reports them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """Bad input from outside: the message is one line that says what, which file or flag, and what to do."""


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`; a `UserError` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("error: out of memory; lower the sizes or the batch size", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
