"""Rows of numbers, and lines of names, that stay in their files until they are asked for."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
from jaxtyping import Int

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
        except (ValueError, EOFError, TypeError, SyntaxError, TokenError) as error:
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
        some = self.index[rows]
        if len(some) and (np.diff(some) == 1).all():  # which a file is read faster by
            return self.vectors[slice(int(some[0]), int(some[-1]) + 1)]
        return self.vectors[some]  # type: ignore[index]


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
