"""Embeddings of named pictures: in an `.npz`, or in an `.npy` of any size that stays on disk.

An `.npz` holds `embeddings` and `names`. Beside an `.npy` lies a `.txt` of the same name, a picture
a line; the folder that `extract.py` leaves is one, and is taken wherever an `.npy` is.
"""

import lzma
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

import numpy as np
import torch
from feature_folder import lost_rows
from jaxtyping import Int
from stored import Names, Rows, Stored
from torch import Tensor

_DAMAGED = (  # what zipfile and NumPy raise, where bytes are not what they should be
    KeyError, TypeError, ValueError, EOFError, OSError, RuntimeError, MemoryError, SyntaxError,
    TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


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
        ValueError: see `load_embeddings`; or a picture has none, or one without a direction.
    """
    vectors = torch.from_numpy(embedding_rows(path, names)[:]).float()
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{path} holds embeddings that are not finite")
    short = vectors.norm(dim=1) < 1e-12  # which `normalize` leaves shorter than 1
    if short.any():
        raise ValueError(
            f"{path} holds {int(short.sum())} embeddings of zero, first that of "
            f"{names[int(short.int().argmax())]}: they have no cosine"
        )
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
