"""Checkpoints that survive SIGKILL: written beside, flushed, then renamed over the old one."""

import os
from pathlib import Path
from typing import Any

import torch


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that `path` always holds a whole checkpoint: the old one or the new.

    One process writes to a run. What a killed writer leaves beside `path`, the next overwrites.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with open(scratch, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


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
