"""Errors for the user, and how a command line reports them."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from utils.stopping import STOPPED, LoaderDied, Stopped, is_loader_death
from utils.streams import safe_streams


class UserError(Exception):
    """Bad input: the message is one line that says what, which file or flag, and what to do."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; PyTorch raises a plain `RuntimeError` for the CPU."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in text or "out of memory" in text)
    )


@contextmanager
def out_of_memory_means(what_to_do: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory inside the block into a `UserError` that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"memory does not suffice{what_to_do()}") from None


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main` and exit.

    A `UserError`, or an `OSError` of a file, becomes one line on stderr and exit code 2; Ctrl-C exit code 130;
    `Stopped` and the death of a loader process one line and exit code 75.
    """
    with safe_streams():
        code, line = _run(main)
        if line:
            print(line, file=sys.stderr)
    sys.exit(code)


def _run(main: Callable[[], None]) -> tuple[int, str]:
    """Exit code and last line. On return the error is released, and with it the loader processes of `main`."""
    try:
        main()
    except UserError as error:
        return 2, f"error: {' '.join(str(error).split())}"
    except OSError as error:
        if error.filename is None:
            raise
        return 2, f"error: {error.filename}: {error.strerror}; check the path and its permissions"
    except (MemoryError, RuntimeError, LoaderDied) as error:
        if is_loader_death(error):
            return STOPPED, f"{LoaderDied.because(error)}; run the same command again"
        if not is_out_of_memory(error):
            raise
        return 2, "error: out of memory; lower the sizes or the batch size"
    except Stopped as stop:
        return STOPPED, str(stop)
    except KeyboardInterrupt:
        return 130, "interrupted"
    return 0, ""
