"""Read the class rows that other projects saved, one file a rank or one for all.

insightface's PartialFC writes `softmax_fc_gpu_<rank>.pt`, and later `checkpoint_gpu_<rank>.pt`,
whose rows follow each other in the order of ranks. Others keep the transposed matrix, [d, v].
"""

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("weight", "weight_activated", "kernel", "W")  # in the order in which they are tried
PER_RANK = re.compile(r"(softmax_fc_gpu|checkpoint_gpu)_(\d+)\.pt")


def read_rows(
    source: str | Path | Sequence[str | Path], name: str | None = None, transposed: bool = False
) -> list[Tensor]:
    """Return the rows of all classes, one tensor a file, for `ArcFaceHead.load_rows`.

    The files are mapped into memory, so that a rank reads from them what it keeps. They are read as
    tensors alone: no code in them is run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for rank in range(2):
    ...         rows = torch.full((3, 4), float(rank))
    ...         torch.save({"weight": rows}, f"{folder}/softmax_fc_gpu_{rank}.pt")
    ...     [tuple(rows.shape) for rows in read_rows(folder)]
    [(3, 4), (3, 4)]

    Args:
        source: a folder with `softmax_fc_gpu_<rank>.pt` or `checkpoint_gpu_<rank>.pt` of all ranks
            (the latter if it holds both), or files in the order of their classes.
        name: of the matrix in a file; None takes `weight`, `weight_activated`, `kernel` or `W`,
            alone or behind a dot.
        transposed: the files hold [d, v].

    Raises:
        FileNotFoundError: no file, or that of a rank is missing.
        ValueError: a file holds more than tensors, or not one matrix of the name, or widths differ.
    """
    paths = _of_folder(Path(source)) if isinstance(source, str | Path) else list(map(Path, source))
    rows = [_matrix(path, name) for path in paths]
    rows = [matrix.T for matrix in rows] if transposed else rows
    if len({matrix.shape[1] for matrix in rows}) > 1:
        shapes = ", ".join(f"{p.name} {list(m.shape)}" for p, m in zip(paths, rows, strict=True))
        raise ValueError(
            f"the rows of all files must be of one width; got {shapes}: pass "
            f"transposed={not transposed} if they are columns, and files of one head"
        )
    return rows


def _of_folder(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found: dict[str, dict[int, Path]] = {}
    for file in path.iterdir():
        if match := PER_RANK.fullmatch(file.name):
            found.setdefault(match[1], {})[int(match[2])] = file
    if not found:
        raise FileNotFoundError(
            f"{path} holds no softmax_fc_gpu_<rank>.pt and no checkpoint_gpu_<rank>.pt: pass the "
            "files themselves, in the order of their classes"
        )
    ranks = found[min(found)]  # "checkpoint_gpu" comes first
    missing = sorted(set(range(max(ranks) + 1)) - ranks.keys())
    if missing:
        raise FileNotFoundError(
            f"{path} holds {min(found)}_{max(ranks)}.pt, but not those of the ranks {missing}: "
            "copy the files of all ranks into one folder"
        )
    return [ranks[rank] for rank in sorted(ranks)]


def _matrix(path: Path, name: str | None) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file: pass those that hold the rows")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors ({str(error).splitlines()[0]}): save "
            "its state_dict() alone, in the format of torch 1.6 or newer"
        ) from None
    if isinstance(held, Mapping) and isinstance(held.get("state_dict_softmax_fc"), Mapping):
        held = held["state_dict_softmax_fc"]
    if isinstance(held, Tensor):
        held = {"weight": held}
    entries = held.items() if isinstance(held, Mapping) else ()
    matrices = {k: t for k, t in entries if isinstance(t, Tensor) and t.ndim == 2 and t.shape[1]}
    for wanted in NAMES if name is None else (name,):
        fitting = [k for k in matrices if k == wanted or str(k).endswith(f".{wanted}")]
        if len(fitting) == 1:
            return matrices[fitting[0]]
    found = ", ".join(f"{key} {list(matrix.shape)}" for key, matrix in matrices.items())
    raise ValueError(
        f"{path} must hold one matrix called {name or ' or '.join(NAMES)}; got "
        f"{found or 'no matrix'}: pass name="
    )
