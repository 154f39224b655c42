"""How a script ends when something is wrong that its user can mend: with one line."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from torch import distributed


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line for what the user can mend.

    Until the processes of `torchrun` have joined, those of one machine all find the same wrong, and
    the first of them says it.
    """
    try:
        yield
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError) as error:
        if int(os.environ.get("LOCAL_RANK", "0")) and not distributed.is_initialized():
            time.sleep(1)  # torchrun ends all processes when the first has ended
            sys.exit(1)
        sys.exit(f"error: {_said(error)}")
    except RuntimeError as error:
        if not _another_is_gone(error):
            raise
        sys.exit(
            "error: another process of this run has ended, see what it said: start all of them "
            "again with --resume"
        )


def _said(error: Exception) -> str:
    """Return the error's text; the system's own have a number, and name the file last.

    >>> _said(FileNotFoundError(2, "No such file or directory", "faces.zip"))
    'faces.zip: No such file or directory'
    """
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _another_is_gone(error: RuntimeError) -> bool:
    # gloo has no class of error of its own, and no one wording
    words = ("got no answer from another", "closed by peer", "reset by peer", "/gloo/")
    return isinstance(error, distributed.DistError) or any(word in str(error) for word in words)
