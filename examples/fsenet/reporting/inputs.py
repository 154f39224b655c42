"""Read and check the files a training run leaves for its report."""

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# Which top-level entries of metrics.json must be what; only those in REQUIRED must be there.
OBJECTS = ("protocol", "config", "versions", "seconds", "parser", "training")
TABLES = ("arms", "shortcuts", "energy")
REQUIRED = ("protocol", "arms")

# A file's arrays: kind and shape, whose letters stand for sizes that must agree.
Layout = dict[str, tuple[str, tuple[int | str, ...]]]
SCORE_ARRAYS: Layout = {
    "same": ("b", ("p",)),
    "arm_names": ("U", ("a",)),
    "scores": ("f", ("a", "p")),
}
FACE_ARRAYS: Layout = {
    "images": ("u", ("m", 112, 112, 3)),
    "maps": ("f", ("m", "k", "h", "w")),
    "labels": ("u", ("m", 112, 112)),
    "identity": ("iu", ("m",)),
    "part_names": ("U", ("k",)),
    "parts": ("f", ("m", "k", "c")),
    "global": ("f", ("m", "d")),
    "local": ("f", ("m", "l")),
    "visibility": ("f", ("m", "k")),
}
KINDS = {"b": "booleans", "U": "text", "f": "floats", "u": "unsigned integers", "iu": "integers"}


@dataclass(frozen=True)
class Run:
    """What a run measured: metrics.json, history.jsonl, scores.npz and faces.npz.

    `commands` are those of starts.jsonl: what began it, and what went on with it.
    """

    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    scores: dict[str, np.ndarray]
    faces: dict[str, np.ndarray]
    commands: tuple[str, ...] = ()

    def table(self, name: str) -> dict[str, Any]:
        """Return one object of metrics.json, empty where the run did not measure it."""
        return self.metrics.get(name, {})


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged or not as the recipe writes it; the message is one line.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give the folder that train.py wrote")
    names = ("metrics.json", "history.jsonl", "scores.npz", "faces.npz")
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}: the run did not finish, or this is no run folder"
            )
    metrics, history, scores, faces = (folder / name for name in names)
    starts = folder / "starts.jsonl"
    started = _read_rows(starts) if starts.is_file() else []
    return Run(
        metrics=_read_metrics(metrics),
        history=_read_rows(history),
        scores=_read_arrays(scores, SCORE_ARRAYS),
        faces=_read_arrays(faces, FACE_ARRAYS),
        commands=tuple(str(row["command"]) for row in started if "command" in row),
    )


def number(value: object) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _read_metrics(path: Path) -> dict[str, Any]:
    metrics = _parse(path.read_bytes(), path.name)
    for name in REQUIRED:
        if name not in metrics:
            raise ValueError(f"{path.name} holds no {name!r}: it was not written by train.py")
    for name in (*OBJECTS, *TABLES):
        _must_be_object(metrics.get(name, {}), f"{path.name}: {name}")
    for name in TABLES:
        for key, row in metrics.get(name, {}).items():
            _must_be_object(row, f"{path.name}: {name}[{key!r}]")
    if "f1" in metrics.get("parser", {}):
        _must_be_object(metrics["parser"]["f1"], f"{path.name}: parser.f1")
    if not metrics["arms"]:
        raise ValueError(f"{path.name}: arms is empty: the run was not evaluated")
    tests = metrics.get("paired_tests", [])
    if not isinstance(tests, list):
        raise ValueError(f"{path.name}: paired_tests must be a list; got {type(tests).__name__}")
    for index, test in enumerate(tests):
        _must_be_object(test, f"{path.name}: paired_tests[{index}]")
    return metrics


def _read_rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_bytes().splitlines()
    return [
        _parse(line, f"{path.name} line {number}")
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]


def _parse(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is damaged: {' '.join(str(error).split())}") from None
    _must_be_object(value, what)
    return value


def _must_be_object(value: object, what: str) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be a JSON object; got {type(value).__name__}")


def _read_arrays(path: Path, expected: Layout) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            missing = [name for name in expected if name not in archive.files]
            arrays = {name: archive[name] for name in expected if name not in missing}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is damaged: {' '.join(str(error).split())}") from None
    except Exception as error:  # zlib, struct and tokenizer errors of a damaged member
        raise ValueError(f"{path.name} is damaged: {type(error).__name__}") from None
    if missing:
        raise ValueError(f"{path.name} lacks {', '.join(missing)}: it was not written by train.py")
    sizes: dict[str, int] = {}
    for name, (kind, shape) in expected.items():
        array = arrays[name]
        if array.dtype.kind not in kind:
            raise ValueError(f"{path.name}: {name} must hold {KINDS[kind]}; got {array.dtype}")
        fits = array.ndim == len(shape) and all(
            size == (wanted if isinstance(wanted, int) else sizes.setdefault(wanted, size))
            for size, wanted in zip(array.shape, shape, strict=True)
        )
        if not fits or 0 in array.shape:
            wanted = ", ".join(
                f"{size} = {sizes[size]}" if size in sizes else str(size) for size in shape
            )
            raise ValueError(f"{path.name}: {name} must be [{wanted}]; got {list(array.shape)}")
    return arrays
