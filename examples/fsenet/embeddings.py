"""Embeddings of named pictures: in an `.npz`, or in an `.npy` of any size that stays on disk.

An `.npz` holds `embeddings` and `names`. Beside an `.npy` lies a `.txt` of the same name, a picture
a line; the folder that `extract.py` leaves is one, and is taken wherever an `.npy` is.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from partlocal.evaluation.search import Vectors


class Stored:
    """The rows of an `.npy`, each read from the file when it is asked for.

    The file is mapped for every read anew: what was read does not stay in this process's memory.

    Raises:
        ValueError: it holds no rows of real numbers, or is cut short.
    """

    def __init__(self, path: Path) -> None:
        try:
            mapped = np.lib.format.open_memmap(path, mode="r")
        except (ValueError, EOFError, TypeError, SyntaxError) as error:
            raise ValueError(f"{path} is no .npy of numbers, or a damaged one ({error})") from None
        if mapped.ndim != 2 or mapped.dtype.kind not in "fiu" or not mapped.flags.c_contiguous:
            raise ValueError(
                f"{path} must hold one embedding a picture, [n, d] of real numbers in rows; got "
                f"{list(mapped.shape)} of {mapped.dtype}"
            )
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self.offset = mapped.offset  # of the first row, in bytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Int[np.ndarray, " r"]) -> np.ndarray:
        mapped = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        return np.array(mapped[rows])


class Rows:
    """Some rows of vectors, in an order of their own, read when they are asked for.

    >>> Rows(np.eye(3), np.array([2, 0]))[0:1]
    array([[0., 0., 1.]])

    Args:
        vectors: an array, or anything that gives rows for a slice and for an array of numbers.
        index: of the rows.
    """

    def __init__(self, vectors: Vectors, index: Int[np.ndarray, " r"]) -> None:
        self.vectors, self.index = vectors, index
        self.shape = (len(index), vectors.shape[1])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: slice | Int[np.ndarray, " r"]) -> np.ndarray:
        return self.vectors[self.index[rows]]  # type: ignore[index]


class Names(Sequence[str]):
    """The lines of a text file, of which a large one is never held as a list."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._count = sum(1 for _ in file)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            for line in file:
                yield line.rstrip(b"\n").decode("utf-8", errors="surrogateescape")

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return list(self)[index]


class Embeddings(NamedTuple):
    """Names of n pictures and a row for each.

    Args:
        names: of the pictures, all different.
        vectors: n rows.
        lost: rows of pictures that could not be read, and therefore have no embedding.
    """

    names: Sequence[str]
    vectors: np.ndarray | Stored
    lost: frozenset[int] = frozenset()

    def find(self, wanted: Iterable[str]) -> Int[np.ndarray, " w"]:
        """Return the row of each name, and -1 where there is none.

        Raises:
            ValueError: two rows have a name that is looked for.
        """
        wanted = list(wanted)
        rows = dict.fromkeys(wanted, -1)
        for row, name in enumerate(self.names):
            if name in rows and row not in self.lost:
                if rows[name] >= 0:
                    raise ValueError(f"there are two embeddings of {name}")
                rows[name] = row
        return np.array([rows[name] for name in wanted], dtype=np.int64)


def load_embeddings(path: Path) -> Embeddings:
    """Return names and embeddings as they are stored.

    Args:
        path: an `.npz`, an `.npy` with its `.txt`, or the folder that `extract.py` left.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it does not hold as many different names as embeddings, or an extraction has
            not come to its end.
    """
    if path.is_dir():
        from feature_folder import lost_rows  # noqa: PLC0415  (which reads and writes with Stored)

        lost = lost_rows(path)
        return _from_npy(path / "embeddings.npy")._replace(lost=lost)
    return _from_npy(path) if path.suffix == ".npy" else _from_npz(path)


def embedding_rows(path: Path, names: Sequence[str]) -> Rows:
    """Return the embeddings of the named pictures, in their order and of their length.

    Those of an `.npy` are read from it when they are asked for.

    Raises:
        FileNotFoundError, ValueError: see `load_embeddings`; or a picture has none.
    """
    found = load_embeddings(path)
    index = found.find(names)
    if missing := [name for name, row in zip(names, index, strict=True) if row < 0]:
        raise ValueError(
            f"{path}: {len(missing)} pictures of the protocol have no embedding, first "
            f"{', '.join(missing[:5])}"
        )
    return Rows(found.vectors, index)


def read_embeddings(path: Path, names: tuple[str, ...]) -> Tensor:
    """Return the embeddings of the named pictures in memory, in their order and of their length.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `load_embeddings`, or a picture has none.
    """
    vectors = torch.from_numpy(embedding_rows(path, names)[:]).float()
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{path} holds embeddings that are not finite")
    return vectors


def _from_npy(path: Path) -> Embeddings:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    vectors, beside = Stored(path), path.with_suffix(".txt")
    if not beside.is_file():
        raise FileNotFoundError(f"{beside} does not exist: it must name a picture a line")
    names = Names(beside)
    if len(names) != len(vectors):
        raise ValueError(
            f"{path} must hold one embedding a picture, [n, d] with n = {len(names)} names in "
            f"{beside.name}; got {list(vectors.shape)}"
        )
    return Embeddings(names, vectors)


def _from_npz(path: Path) -> Embeddings:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found, embeddings = arrays["names"], arrays["embeddings"]
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no arrays 'embeddings' and 'names' ({error})") from None
    if found.ndim != 1:
        raise ValueError(f"{path}: names must be a list of strings; got {list(found.shape)}")
    if embeddings.dtype.kind not in "fiu":
        raise ValueError(f"{path}: embeddings must be real numbers; got dtype {embeddings.dtype}")
    names = list(map(str, found))
    if len(set(names)) < len(names):
        row = {name: number for number, name in enumerate(names)}
        twice = next(name for number, name in enumerate(names) if row[name] != number)
        raise ValueError(f"{path} holds two embeddings of {twice}")
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise ValueError(
            f"{path} must hold one embedding a picture, [n, d] with n = {len(names)} names; got "
            f"{list(embeddings.shape)}"
        )
    return Embeddings(names, embeddings)
