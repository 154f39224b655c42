"""Files that survive SIGKILL: written beside, flushed, then renamed over the old one."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch


@contextmanager
def whole_file(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that appears at `path` when the block ends, and never when it fails.

    `path` therefore always holds a whole file: the old one or the new. One process writes to a
    run; what a killed writer leaves beside `path`, the next overwrites.

    Args:
        path: of the file.
        keep: where the old one stays.
    """
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            _keep(path, keep)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write `state` so that a kill at any moment leaves the old checkpoint or the new.

    The last but one is kept too, for the case that the disk damages the last.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    try:
        with whole_file(path, keep=last_but_one(path)) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"{path} cannot be written ({_reason(error)}): the last checkpoint is whole; make "
            "room, and pass --resume"
        ) from None


def newest_checkpoint(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """Return the newest checkpoint that is whole, and where it lies; None where there is none.

    Raises:
        OSError: a file cannot be read.
        ValueError: the last one is damaged and the one before it damaged too, or gone.
    """
    found = [candidate for candidate in (path, last_but_one(path)) if candidate.exists()]
    for candidate in found:
        try:
            return candidate, load_checkpoint(candidate)
        except ValueError as error:
            if candidate == found[-1]:
                raise
            what = str(error).removesuffix("; delete it")
            print(f"warning: {what}; going on from the one before", file=sys.stderr)
    return None


def last_but_one(path: Path) -> Path:
    """Return where the checkpoint before the last is kept."""
    return path.with_name(f"{path.stem}-before{path.suffix}")


def load_checkpoint(path: Path | BinaryIO) -> dict[str, Any]:
    """Read a checkpoint: tensors and plain containers only, so that no file can run code.

    Raises:
        OSError: the file is not there or cannot be read.
        ValueError: the file is damaged, or is no checkpoint.
    """
    with open(path, "rb") if isinstance(path, Path) else nullcontext(path) as file:
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


def _keep(path: Path, keep: Path) -> None:
    """Give a file that is about to be replaced another name."""
    keep.unlink(missing_ok=True)
    try:
        os.link(path, keep)
    except OSError:  # a file system without links: for a moment there is none at `path`
        os.replace(path, keep)


def _reason(error: BaseException) -> str:
    """Return what the system said, behind which torch's writer fails in its own words."""
    within: BaseException | None = error
    while within is not None:
        if isinstance(within, OSError) and within.strerror:
            return within.strerror
        within = within.__cause__ or within.__context__
    return str(error).splitlines()[0]
