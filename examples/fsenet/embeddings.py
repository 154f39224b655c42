"""Embeddings of named pictures: in an `.npz`, or in an `.npy` of any size that stays on disk.

An `.npz` holds `embeddings` and `names`. Beside an `.npy` lies a `.txt` of the same name, a picture
a line; the folder that `extract.py` leaves is one, and is taken wherever an `.npy` is.
"""

import lzma
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
import torch
from data.images import without_suffix
from feature_folder import lost_rows
from jaxtyping import Int
from protocols.directions import check_directions
from protocols.lfw_lists import stem_of
from protocols.lists import listing
from stored import Names, Rows, Stored
from torch import Tensor

ABSENT, LOST = -2, -1

_DAMAGED = (  # what zipfile and NumPy raise, where bytes are not what they should be
    KeyError, TypeError, ValueError, EOFError, OSError, RuntimeError, MemoryError, SyntaxError,
    TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


class Embeddings(NamedTuple):
    """Names of n pictures and a row for each.

    Args:
        path: where they lie.
        names: of the pictures, all different.
        vectors: n rows.
        lost: rows of pictures that could not be read, and therefore have no embedding.
    """

    path: Path
    names: Sequence[str]
    vectors: np.ndarray | Stored
    lost: frozenset[int] = frozenset()

    def find(self, wanted: Iterable[str]) -> Int[np.ndarray, " w"]:
        """Return the row of each name, by itself or by a name with another suffix.

        Where there is none it is `ABSENT`, or `LOST` if the picture could not be read.

        Raises:
            ValueError: two rows have a name that is looked for.
        """
        wanted = list(wanted)
        rows: dict[str, list[int]] = {name: [] for name in wanted}
        rows |= {without_suffix(name): [] for name in wanted}
        for row, name in enumerate(self.names):
            for key in {name, without_suffix(name)}:
                if key in rows:
                    rows[key].append(row)
        return np.array([self._one(name, rows) for name in wanted], dtype=np.int64)

    def _one(self, name: str, rows: dict[str, list[int]]) -> int:
        fit = rows[name] or rows[without_suffix(name)]
        there = [row for row in fit if row not in self.lost]
        if len(there) > 1:
            raise ValueError(f"{self.path} holds {len(there)} embeddings of {name}")
        return there[0] if there else LOST if fit else ABSENT

    def refuse(self, sign: int, names: Sequence[str], index: Int[np.ndarray, " w"]) -> None:
        """Raise, with all their names, if some were found `ABSENT` or `LOST`."""
        if missing := [name for name, row in zip(names, index, strict=True) if row == sign]:
            what = "could not be read when described"
            if sign == ABSENT:
                what = f"have no embedding ({self.example(missing[0])})"
            raise ValueError(
                f"{self.path}: {len(missing)} pictures of the protocol {what}: {listing(missing)}"
            )

    def example(self, wanted: str) -> str:
        """Say how names look here: of a picture called alike in another folder, or of the first."""
        stem = stem_of(wanted)
        names = iter(self.names)
        first = next(names, None)
        if first is None:
            return "there are no names"
        alike = (name for name in chain([first], names) if stem_of(name) == stem)
        return f"names there are such as {next(alike, first)!r}"

    def rows(self, index: Int[np.ndarray, " r"]) -> "NamedRows":
        """Return some rows, which are checked when they are read."""
        return NamedRows(self, index)


class NamedRows:
    """Some embeddings, read when they are asked for.

    Args:
        embeddings: all.
        index: of some, in an order of their own.
    """

    def __init__(self, embeddings: Embeddings, index: Int[np.ndarray, " r"]) -> None:
        self._all, self._rows = embeddings, Rows(embeddings.vectors, index)
        self.shape = self._rows.shape

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | Int[np.ndarray, " r"]) -> np.ndarray:
        """Return some of them.

        Raises:
            ValueError: one is not finite, or has no direction; their pictures are named.
        """
        block = self._rows[rows]
        largest = np.abs(block).max(1, initial=0)  # NaN if one number is
        check_directions(largest, lambda bad: self._named(rows, bad), self._all.path, least=1e-12)
        return block

    def _named(self, rows: slice | Int[np.ndarray, " r"], bad: Int[np.ndarray, " b"]) -> list[str]:
        names = list(self._all.names)
        return [names[row] for row in self._rows.index[rows][bad]]


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
        lost = lost_rows(path)
        return _from_npy(path / "embeddings.npy")._replace(lost=lost)
    return _from_npy(path) if path.suffix == ".npy" else _from_npz(path)


def embedding_rows(path: Path, names: Sequence[str]) -> NamedRows:
    """Return the embeddings of the named pictures, in their order and of their length.

    Those of an `.npy` are read from it when they are asked for.

    Raises:
        FileNotFoundError, ValueError: see `load_embeddings`; or pictures have none.
    """
    found = load_embeddings(path)
    index = found.find(names)
    for sign in (ABSENT, LOST):
        found.refuse(sign, names, index)
    return found.rows(index)


def read_embeddings(path: Path, names: tuple[str, ...]) -> Tensor:
    """Return the embeddings of the named pictures in memory, in their order and of their length.

    Raises:
        FileNotFoundError, ValueError: see `embedding_rows`; or one has no direction.
    """
    return torch.from_numpy(embedding_rows(path, names)[:]).float()


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
    _check_different(beside, names)
    return Embeddings(path, names, vectors)


def _from_npz(path: Path) -> Embeddings:
    with path.open("rb") as file:  # whose own errors say what is wrong
        try:
            with np.load(file, allow_pickle=False) as arrays:
                found, embeddings = arrays["names"], arrays["embeddings"]
        except _DAMAGED as error:
            raise ValueError(f"{path} holds no arrays 'embeddings' and 'names' ({error})") from None
    if found.ndim != 1:
        raise ValueError(f"{path}: names must be a list of strings; got {list(found.shape)}")
    if embeddings.dtype.kind not in "fiu":
        raise ValueError(f"{path}: embeddings must be real numbers; got dtype {embeddings.dtype}")
    names = list(map(str, found))
    _check_different(path, names)
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise ValueError(
            f"{path} must hold one embedding a picture, [n, d] with n = {len(names)} names; got "
            f"{list(embeddings.shape)}"
        )
    return Embeddings(path, names, embeddings)


def _check_different(path: Path, names: Sequence[str]) -> None:
    """Refuse names that stand there again; of millions only a hash each is held."""
    hashes = np.sort(np.fromiter(map(hash, names), np.int64, len(names)))
    again = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    counts = Counter(name for name in names if hash(name) in again) if again else {}
    if repeated := sorted(name for name, count in counts.items() if count > 1):
        raise ValueError(
            f"{path} must name every picture once; {len(repeated)} are there more often, keep one "
            f"embedding of each: {listing(repeated)}"
        )
