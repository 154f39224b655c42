"""The folder that a run leaves, and the processes that fill it."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fit import Workplace
from machine import computes_in_bf16, write_json
from options import Options
from torch import distributed

RUNS = Path("runs")
CONFIG = "options.json"


def open_folder(options: Options) -> Path:
    """Make the run's folder, or find the one to resume.

    Raises:
        FileExistsError: the folder holds a run and `--resume` was not given.
        FileNotFoundError: there is nothing to resume.
        OSError: the folder cannot be written.
        ValueError: the run to resume was started with other options.
    """
    folder = options.output or _default_folder(options)
    written = folder / CONFIG
    if options.resume:
        if not written.exists():
            raise FileNotFoundError(f"{folder} holds no run to resume: leave --resume out")
        try:
            started_with = dict(json.loads(written.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{written} is damaged ({error}): pass another --output") from None
        _check_same(started_with, plain(options), folder)
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
    write_json(plain(options), written)
    return folder


def open_workplace(options: Options) -> Workplace:
    """Join the other processes of `torchrun`, choose the device, open the folder."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    folder: list[Path | None] = [open_folder(options) if rank == 0 else None]
    if world > 1:
        distributed.broadcast_object_list(folder)
    precision = options.precision
    if precision == "auto":
        precision = "bf16" if computes_in_bf16(device) else "fp32"
    assert folder[0] is not None
    return Workplace(folder[0], device, precision, rank, world)


def discard_unused(place: Workplace) -> None:
    """Remove the folder of a run that failed before it left anything to resume."""
    if place.rank == 0 and [path.name for path in place.folder.iterdir()] == [CONFIG]:
        (place.folder / CONFIG).unlink()
        place.folder.rmdir()


def plain(options: Options) -> dict[str, Any]:
    """Return what decides the result, as JSON holds it."""
    values = asdict(options)
    for where in ("output", "resume"):
        del values[where]
    return json.loads(json.dumps(values, default=str))


def _default_folder(options: Options) -> Path:
    number, taken = 0, None
    while (folder := RUNS / f"{options.profile}-{number}").exists():
        number, taken = number + 1, folder
    if options.resume:
        if taken is None:
            raise FileNotFoundError(f"{folder} does not exist: leave --resume out to begin a run")
        return taken
    return folder


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    different = [name for name in new if old.get(name) != new[name]]
    if different:
        said = ", ".join(f"{n} {old.get(n)} (now {new[n]})" for n in different)
        raise ValueError(f"{folder} was started with {said}: resume it with the same options")
