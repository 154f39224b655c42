"""The folder that a run leaves, and the processes that fill it."""

import errno
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from machine import (
    keep_freed_memory,
    plain_command,
    to_json,
    versions,
    write_json,
)
from telemetry import EVENTS, HISTORY
from torch import distributed
from workplace import Workplace, this_process

try:
    import fcntl
except ModuleNotFoundError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
CONFIG = "options.json"
STARTS = "starts.jsonl"
LOCK = ".lock"
PICTURES = "pictures.json"
LEFT = (STARTS, PICTURES, HISTORY, EVENTS, "maps-*.npz")  # by a run without a checkpoint
WHERE = ("output", "resume")  # options that say where a run is, and nothing about its result
# on resuming: no weight depends on these, but by rounding and through BatchNorm's statistics
MAY_CHANGE = (
    *("processes", "accumulate", "compile", "workers", "tensorboard"),
    *("parsing", "score", "export", "test_time", "damaged"),
)


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

    @property
    def tensorboard(self) -> bool:
        """Return whether TensorBoard's events are written."""


@contextmanager
def workplace(options: RunOptions, name: str) -> Iterator[Workplace]:
    """Open the workplace of a run, and leave nothing behind if the run fails at once."""
    place = None
    with ExitStack() as stack:
        try:
            keep_freed_memory()
            place = open_workplace(options, name, stack)
            yield place
        except BaseException:
            if place is not None:
                discard_unused(place)
            raise
        finally:
            if distributed.is_initialized():
                distributed.destroy_process_group()


def open_workplace(options: RunOptions, name: str, stack: ExitStack) -> Workplace:
    """Join the other processes of `torchrun`, choose the device, open the folder.

    Args:
        options: a dataclass, written to the folder, to which a later `--resume` is held.
        name: of the runs of this kind: `runs/<name>-<number>`.
        stack: which the folder is given back by.
    """
    place = this_process(options.precision)
    on_gpu = place.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(place.device)
    if place.world > 1:
        # what processes tell each other apart from gradients goes from CPU to CPU
        distributed.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    config = {**plain(options), "precision": place.precision, "processes": place.world}
    folder: list[Path | None] = [None]
    if place.rank == 0:
        folder = [open_folder(options.output, name, config, options.resume)]
        stack.enter_context(hold(folder[0]))
        note_start(folder[0] / STARTS, config, place.device, options.resume)
    if place.world > 1:
        distributed.broadcast_object_list(folder)
    assert folder[0] is not None
    return replace(place, folder=folder[0], tensorboard=options.tensorboard)


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
    if found := sorted(path for name in ("*.pt", *LEFT) for path in folder.glob(name)):
        raise FileExistsError(
            f"{found[0]} was left by a run whose {CONFIG} is gone: delete it, or pass another "
            "--output"
        )
    write_json(config, written)
    return folder


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder until this process ends, however it does.

    Processes of a run whose `torchrun` was killed may go on for a while: a resumed run must not
    write beside them.

    Raises:
        BlockingIOError: another process holds the folder.
    """
    with (folder / LOCK).open("a") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked processes do not get it
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else a file system without locks
                raise BlockingIOError(
                    f"{folder} is written by another process: end it, or wait until it has ended"
                ) from None
        yield


def note_start(path: Path, config: Mapping[str, Any], device: torch.device, resumed: bool) -> None:
    """Add a line that says what began a run, or went on with it, and names nobody's folders."""
    gpu = device.type == "cuda"
    start = {
        "command": plain_command(sys.argv),
        "resumed": resumed,
        "seed": config.get("seed"),
        "processes": config["processes"],
        "precision": config["precision"],
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    with path.open("a") as file:
        file.write(to_json(start, indent=None) + "\n")


def bind(place: Workplace, pictures: Mapping[str, str]) -> None:
    """Hold all processes of a run, and those that go on with it, to the same training pictures.

    Args:
        place: whose folder remembers them.
        pictures: what identifies them; the first value says it to people.

    Raises:
        ValueError: a process has others, or the run began with others; on all processes.
    """
    found: list[Any] = [dict(pictures)]
    if place.world > 1:
        found = [None] * place.world
        distributed.all_gather_object(found, dict(pictures))
    for rank, others in enumerate(found):
        if others != found[0]:
            raise ValueError(
                f"--faces: process {rank} has {others['pictures']}, which are not the "
                f"{found[0]['pictures']} of process 0: give all machines the same files"
            )
    began: list[Any] = [None]
    written = place.folder / PICTURES
    if place.rank == 0:
        if not written.exists():
            write_json(found[0], written)
        with suppress(ValueError):  # a damaged one is no match
            began = [json.loads(written.read_text())]
    if place.world > 1:
        distributed.broadcast_object_list(began)
    if began[0] != found[0]:
        raise ValueError(
            f"{written} names other pictures than the {found[0]['pictures']} that --faces holds "
            "now: resume with the files that the run was started with"
        )


def discard_unused(place: Workplace) -> None:
    """Forget a run that failed before it left a checkpoint to resume from."""
    if place.rank > 0 or any(place.folder.glob("*.pt")):
        return
    for name in (CONFIG, LOCK, *LEFT):
        for path in place.folder.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not any(place.folder.iterdir()):
        place.folder.rmdir()


def plain(options: RunOptions) -> dict[str, Any]:
    """Return all options but where the run is, as JSON holds them.

    Of paths the last name is kept, also of those that `PATH:KIND:SPLITS` begins with: another
    machine may hold the files elsewhere.
    """
    values = {name: value for name, value in asdict(options).items() if name not in WHERE}
    return json.loads(json.dumps(_without_folders(values)))


def _without_folders(value: Any) -> Any:
    """Return options with the last names of paths alone; a text with colons names a set."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_without_folders(inner) for inner in value]
    if isinstance(value, Path):
        return value.resolve().name
    if isinstance(value, str) and ":" in value:
        return ":".join(Path(part).name for part in value.split(":"))
    return value


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
