"""How a script ends when something is wrong that its user can mend: with one line."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from checkpoint import whole_file
from torch import distributed


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line for what the user can mend.

    Under `torchrun` the line ends its report, which comes last, beside the rank of the process that
    ended with it, and of the processes of a machine the first alone prints it, too: what all of
    them find wrong is not said by each.
    """
    try:
        yield
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError) as error:
        _end(f"error: {_said(error)}")
    except RuntimeError as error:
        if not _another_is_gone(error):
            raise
        print(
            "error: another process of this run has ended, see what it said: start all of them "
            "again with --resume",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(1)  # or torchrun's report could take this for what came first
        sys.exit(1)


def _end(message: str) -> NoReturn:
    """End the process with a message, which torchrun finds in the file that it names."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not report:
        sys.exit(message)
    told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
    with suppress(OSError), whole_file(Path(report)) as file:
        file.write(json.dumps({"message": told}).encode())
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    sys.exit(message if first or not Path(report).exists() else 1)


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
