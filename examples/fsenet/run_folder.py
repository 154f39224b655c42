"""The folder that a run leaves, and the processes that fill it."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from fit import Workplace
from machine import choose_precision, keep_freed_memory, write_json
from torch import distributed

RUNS = Path("runs")
CONFIG = "options.json"
WHERE = ("output", "resume")  # options that say where a run is, and nothing about its result
# on resuming: no weight depends on these
MAY_CHANGE = ("workers", "parsing", "export", "test_time", "damaged")


class RunOptions(Protocol):
    """What the options of every run have."""

    @property
    def output(self) -> Path | None:
        """Return the run's folder, or None for the next free one."""

    @property
    def resume(self) -> bool:
        """Return whether to go on with a run."""

    @property
    def precision(self) -> Literal["auto", "fp32", "bf16"]:
        """Return in what networks compute."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line for what the user can mend."""
    try:
        yield
    except (OSError, ValueError, FloatingPointError, ModuleNotFoundError) as error:
        sys.exit(f"error: {error}")


@contextmanager
def workplace(options: RunOptions, name: str) -> Iterator[Workplace]:
    """Open the workplace of a run, and leave nothing behind if the run fails at once."""
    place = None
    try:
        keep_freed_memory()
        place = open_workplace(options, name)
        yield place
    except BaseException:
        if place is not None:
            discard_unused(place)
        raise
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def open_workplace(options: RunOptions, name: str) -> Workplace:
    """Join the other processes of `torchrun`, choose the device, open the folder.

    Args:
        options: a dataclass, written to the folder, to which a later `--resume` is held.
        name: of the runs of this kind: `runs/<name>-<number>`.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    precision = choose_precision(options.precision, device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    config = {**plain(options), "precision": precision, "processes": world}
    folder: list[Path | None] = [None]
    if rank == 0:
        folder = [open_folder(options.output, name, config, options.resume)]
    if world > 1:
        distributed.broadcast_object_list(folder)
    assert folder[0] is not None
    return Workplace(folder[0], device, precision, rank, world)


def open_folder(output: Path | None, name: str, config: Mapping[str, Any], resume: bool) -> Path:
    """Make the run's folder, or find the one to resume.

    Raises:
        FileExistsError: the folder holds a run, or its remains, and `resume` is not set.
        FileNotFoundError: there is nothing to resume.
        OSError: the folder cannot be written.
        ValueError: the run to resume was started with another `config`.
    """
    folder = output or _default_folder(name, resume)
    written = folder / CONFIG
    if resume:
        if not written.exists():
            raise FileNotFoundError(f"{folder} holds no run to resume: leave --resume out")
        try:
            started_with = dict(json.loads(written.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{written} is damaged ({error}): pass another --output") from None
        _check_same(started_with, config, folder)
        return folder
    if written.exists():
        raise FileExistsError(f"{folder} holds a run: pass --resume, or another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}): pass another --output"
        ) from None
    if found := sorted(folder.glob("*.pt")):
        raise FileExistsError(
            f"{found[0]} was left by a run whose {CONFIG} is gone: delete it, or pass another "
            "--output"
        )
    write_json(config, written)
    return folder


def discard_unused(place: Workplace) -> None:
    """Forget a run that failed before it left a checkpoint to resume from."""
    if place.rank > 0 or any(place.folder.glob("*.pt")):
        return
    for path in (place.folder / CONFIG, *place.folder.glob("maps-*.npz")):
        path.unlink(missing_ok=True)
    if not any(place.folder.iterdir()):
        place.folder.rmdir()


def plain(options: RunOptions) -> dict[str, Any]:
    """Return all options but where the run is, as JSON holds them."""
    values = {name: value for name, value in asdict(options).items() if name not in WHERE}
    return json.loads(json.dumps(values, default=str))


def _default_folder(name: str, resume: bool) -> Path:
    endings = [path.name.removeprefix(f"{name}-") for path in RUNS.glob(f"{name}-*")]
    newest = max([int(ending) for ending in endings if ending.isdecimal()], default=-1)
    if resume and newest < 0:
        raise FileNotFoundError(
            f"{RUNS / name}-0 does not exist: leave --resume out to begin a run"
        )
    return RUNS / f"{name}-{newest if resume else newest + 1}"


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    different = [n for n in new if n not in MAY_CHANGE and old.get(n) != new[n]]
    if different:
        said = ", ".join(f"{n} {old.get(n)} (now {new[n]})" for n in different)
        raise ValueError(f"{folder} was started with {said}: resume it with the same options")
