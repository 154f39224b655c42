"""A folder of embeddings that is filled batch by batch, and goes on where a kill has left it.

    embeddings.npy   n rows; those of pictures that cannot be read are NaN
    embeddings.txt   the names, one a line
    done.npy         of each batch 0, or 1 and the number of its damaged pictures
    options.json     what the embeddings were made with; it is written last, when all else is there

A batch is marked as done only after its rows are on the disk. Several processes fill one folder,
each its own batches; they must see the same files.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import whole_file
from jaxtyping import Float, Int
from machine import write_json
from stored import Stored

_HASHED = {  # options whose values say nothing to people
    "names_sha256": "other pictures, by their names",
    "network_sha256": "another network",
    "points_sha256": "other points of the faces",
}
_PATIENCE = 600.0  # seconds that others wait until the first process has laid the folder out


class FeatureFolder:
    """Rows that are written in batches, and which of them are there.

    Args:
        path: of the folder.
        options: that the embeddings are made with; those of a folder that is gone on with must be
            the same. `pictures`, `width`, `batch_size` and `dtype` say how it is laid out.
        names: of the pictures; read by the first process alone, in a new folder.
        rank: of this process.

    Raises:
        FileExistsError: there is something else.
        ValueError: the folder was begun with other options, or is damaged.
        OSError: the disk has no room for it.
    """

    def __init__(
        self, path: Path, options: dict[str, Any], names: Iterable[str], rank: int = 0
    ) -> None:
        self.path, self.options = path, options
        self.count, self.batch = options["pictures"], options["batch_size"]
        if rank == 0 and not (path / "options.json").exists():
            _lay_out(path, options, names)
        _wait_for(path / "options.json")
        begun = read_options(path)
        for key in sorted({*options, *begun}):
            if begun.get(key) != options.get(key):
                what = f"{key} {begun.get(key)}, and this is {options.get(key)}"
                raise ValueError(
                    f"{path} was begun with {_HASHED.get(key, what)}: name another folder, or go "
                    "on with what it was begun with"
                )
        self._rows = _Writable(path / "embeddings.npy")
        self._done = _Writable(path / "done.npy")
        self._waiting: dict[int, int] = {}

    def todo(self, rank: int = 0, world: int = 1) -> Int[np.ndarray, " b"]:
        """Return the numbers of the batches that are not done, this process's share of them.

        Those with damaged pictures are among them, for these may have been replaced. Shares do not
        depend on what is done: another process may be at work already.
        """
        todo = np.flatnonzero(self._done.stored[:][:, 0] != 1)
        return todo[todo % world == rank]

    def share(self, rank: int = 0, world: int = 1) -> range:
        """Return the numbers of all batches that are this process's, done or not."""
        return range(rank, len(self._done.stored), world)

    def undone(self) -> int:
        """Return how many batches of all processes have not been written yet."""
        return np.count_nonzero(self._done.stored[:][:, 0] == 0)

    def rows(self, batch: int) -> range:
        """Return which pictures a batch holds."""
        return range(batch * self.batch, min((batch + 1) * self.batch, self.count))

    def pictures(self, batches: Iterable[int]) -> int:
        """Return how many pictures some batches hold."""
        return sum(len(self.rows(batch)) for batch in batches)

    def write(
        self, batch: int, vectors: Float[np.ndarray, "b d"], damaged: Iterable[int] = ()
    ) -> None:
        """Write the rows of a batch; they count once `flush` is called.

        Args:
            batch: its number.
            vectors: a row a picture.
            damaged: places in the batch of pictures that could not be read.

        Raises:
            ValueError: a vector is not finite, or becomes so in the folder's precision.
        """
        with np.errstate(over="ignore"):  # which is refused below
            rows = vectors.astype(self._rows.stored.dtype)
        if not np.isfinite(rows).all():
            bad = self.rows(batch)[int(np.argmin(np.isfinite(rows).all(1)))]
            raise ValueError(
                f"the embedding of picture {bad} is not finite in {rows.dtype}: use --dtype fp32, "
                "or look at the network"
            )
        damaged = list(damaged)
        rows[damaged] = np.nan
        self._rows.write(self.rows(batch).start, rows)
        self._waiting[batch] = 1 + len(damaged)

    def flush(self) -> None:
        """Bring to the disk what was written, then mark it as done."""
        if self._waiting:
            self._rows.flush()
            for batch, mark in self._waiting.items():
                self._done.write(batch, np.array([[mark]], np.uint32))
            self._done.flush()
            self._waiting.clear()

    def damaged(self) -> int:
        """Return how many pictures of all processes could not be read so far."""
        marks = self._done.stored[:][:, 0].astype(np.int64)
        return int(marks[marks > 0].sum() - np.count_nonzero(marks))


def read_options(path: Path) -> dict[str, Any]:
    """Return what the embeddings of a folder were made with.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: it is damaged.
    """
    file = path / "options.json"
    try:
        options = json.loads(file.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is no folder of embeddings: no options.json") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): remove the folder") from None
    if not isinstance(options, dict) or not isinstance(options.get("batch_size"), int):
        raise ValueError(f"{file} is damaged: remove the folder")
    return options


def lost_rows(path: Path) -> frozenset[int]:
    """Return the rows of a whole folder whose pictures could not be read.

    Raises:
        FileNotFoundError: it is no such folder.
        ValueError: it is damaged, or not filled to the end.
    """
    options = read_options(path)
    marks, rows = Stored(path / "done.npy"), Stored(path / "embeddings.npy")
    done = marks[:][:, 0]
    if not done.all():
        raise ValueError(
            f"{path} is not filled to the end: {np.count_nonzero(done == 0)} of {len(done)} "
            "batches are missing; run extract.py again to go on"
        )
    lost, size = set[int](), options["batch_size"]
    for batch in np.flatnonzero(done > 1).tolist():
        first = rows[slice(batch * size, (batch + 1) * size)][:, 0]
        lost |= set((batch * size + np.flatnonzero(np.isnan(first))).tolist())
    return frozenset(lost)


def hash_names(names: Iterable[str]) -> str:
    """Return the hash that embeddings.txt has."""
    digest = hashlib.sha256()
    for line in _lines(names):
        digest.update(line)
    return digest.hexdigest()


class _Writable:
    """An `.npy` that is there, whose rows are written in place."""

    def __init__(self, path: Path) -> None:
        self.stored = Stored(path)
        self._file = open(path, "r+b", buffering=0)  # noqa: SIM115  (open as long as this lives)
        self._offset = self.stored.offset
        self._stride = self.stored.shape[1] * self.stored.dtype.itemsize

    def write(self, row: int, rows: np.ndarray) -> None:
        self._file.seek(self._offset + row * self._stride)
        data = memoryview(np.ascontiguousarray(rows, self.stored.dtype)).cast("B")
        while len(data):  # a full disk writes less, and the next time says so
            data = data[self._file.write(data) :]

    def flush(self) -> None:
        os.fsync(self._file.fileno())


def _lay_out(path: Path, options: dict[str, Any], names: Iterable[str]) -> None:
    """Make the files; one that a kill has left half made is made again."""
    known = {"embeddings.npy", "embeddings.txt", "done.npy", ".options.json.tmp"}
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file: name a folder")
    if path.exists() and (others := {x.name for x in path.iterdir()} - known):
        raise FileExistsError(
            f"{path} holds {min(others)} and is no folder of embeddings: name another"
        )
    path.mkdir(exist_ok=True)
    n, width = options["pictures"], options["width"]
    dtype = np.dtype({"fp16": np.float16, "fp32": np.float32}[options["dtype"]])
    if (free := shutil.disk_usage(path).free) < n * width * dtype.itemsize:
        raise OSError(
            f"{path}: {n} embeddings of {width} numbers take "
            f"{n * width * dtype.itemsize / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        )
    with (path / "embeddings.txt").open("wb") as file:
        written = sum(file.write(line) > 0 for line in _lines(names))
    if written != n:
        raise ValueError(f"there are {n} pictures and {written} names")
    _empty(path / "embeddings.npy", (n, width), dtype)
    _empty(path / "done.npy", (-(-n // options["batch_size"]), 1), np.dtype(np.uint32))
    write_json(options, path / "options.json")


def _lines(names: Iterable[str]) -> Iterator[bytes]:
    for name in names:
        if "\n" in name:
            raise ValueError(
                f"the name {name!r} has more than one line: call the picture otherwise"
            )
        yield name.encode("utf-8", errors="surrogateescape") + b"\n"


def _empty(path: Path, shape: tuple[int, int], dtype: np.dtype) -> None:
    """Make an `.npy` of zeros that takes its room on the disk as it is filled."""
    with whole_file(path) as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + shape[0] * shape[1] * dtype.itemsize)


def _wait_for(path: Path) -> None:
    until = time.monotonic() + _PATIENCE
    while not path.exists():
        if time.monotonic() > until:
            raise TimeoutError(f"{path} is not there after {_PATIENCE:.0f} s: has rank 0 failed?")
        time.sleep(0.05)
