"""Files that survive SIGKILL: written beside, flushed, then renamed over the old one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` when the block ends, and never when it fails.

    `path` therefore always holds a whole file: the old one or the new. One process writes to a
    run; what a killed writer leaves beside `path`, the next overwrites.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that a kill at any moment leaves the old checkpoint or the new."""
    with whole_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain containers only, so that no file can run code.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: the file is damaged, or is no checkpoint.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged bytes fail in as many ways as the format has parts
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{path} is damaged or no checkpoint ({reason}); delete it") from None
    if not isinstance(state, dict):
        raise ValueError(
            f"{path} is damaged or no checkpoint (it holds a {type(state).__name__}); delete it"
        )
    return state
