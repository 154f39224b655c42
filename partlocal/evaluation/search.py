"""Exact search: all probes against all of a gallery, block by block, in bounded memory.

A gallery may be longer than memory: it is read a few thousand rows at a time, from a memory-mapped
file or anything else that has a shape and gives rows for a slice.
"""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int

ROWS = COLUMNS = 4096  # probes and gallery entries of a block; its scores have 64 MB
_WAITING = 1024  # candidates of a probe that are sorted at once, or k, if that is more


@runtime_checkable
class Vectors(Protocol):
    """What holds n vectors of d numbers: an array, a memory map, a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return n, d."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Return some of them, as an array."""


def score_blocks(
    probes: Vectors, gallery: Vectors
) -> Iterator[tuple[slice, slice, Float[np.ndarray, "r c"]]]:
    """Yield the products of all probes with all of a gallery, a block at a time.

    >>> blocks = list(score_blocks(np.eye(3), 2 * np.eye(3)))
    >>> blocks[0][:2], blocks[0][2].tolist()[0]
    ((slice(0, 3, None), slice(0, 3, None)), [2.0, 0.0, 0.0])

    Each row of the gallery is read once, each of the probes once a block of the gallery.

    Args:
        probes: q vectors, of any real kind; half precision becomes single.
        gallery: g vectors of the same length.

    Returns:
        which probes, which entries of the gallery, and the scores of each with each. The scores
        are overwritten by those of the next block.

    Raises:
        ValueError: shapes disagree, or a vector is not finite.
    """
    if len(probes.shape) != 2 or len(gallery.shape) != 2 or probes.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"probes and gallery must be [q, d] and [g, d]; got {list(probes.shape)} and "
            f"{list(gallery.shape)}"
        )
    room = np.empty((min(ROWS, probes.shape[0]), min(COLUMNS, gallery.shape[0])), np.float32)
    for begin in range(0, gallery.shape[0], COLUMNS):
        columns = slice(begin, min(begin + COLUMNS, gallery.shape[0]))
        entries = _finite(gallery, columns, "gallery")
        for first in range(0, probes.shape[0], ROWS):
            rows = slice(first, min(first + ROWS, probes.shape[0]))
            scores = room[: rows.stop - rows.start, : len(entries)]
            np.matmul(_finite(probes, rows, "probes"), entries.T, out=scores)
            yield rows, columns, scores


class Nearest:
    """The k best entries of a gallery for each probe; of equal ones those that come first.

    >>> best = Nearest(probes=2, k=2)
    >>> for block in score_blocks(np.eye(2), np.array([[1, 5], [2, 4], [3, 5]])):
    ...     best.add(*block)
    >>> best.scores.tolist(), best.entries.tolist()
    ([[3.0, 2.0], [5.0, 5.0]], [[2, 1], [0, 2]])

    Args:
        probes: their number, q.
        k: how many are kept of each; what a gallery of fewer lacks scores `-inf`, at entry -1.
    """

    def __init__(self, probes: int, k: int) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1; got {k}")
        self._scores = np.full((probes, k), -np.inf, np.float32)
        self._entries = np.full((probes, k), -1, np.int64)
        self._counts = np.zeros(probes, np.int64)  # of the candidates that wait, by probe
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def scores(self) -> Float[np.ndarray, "q k"]:
        """The scores of the best, highest first."""
        self._merge()
        return self._scores

    @property
    def entries(self) -> Int[np.ndarray, "q k"]:
        """Which entries of the gallery they are."""
        self._merge()
        return self._entries

    def add(self, rows: slice, columns: slice, scores: Float[np.ndarray, "r c"]) -> None:
        """Take in a block; those of one probe must come in the gallery's order."""
        k = self._scores.shape[1]
        floor = self._scores[rows, -1:]
        if scores.shape[1] > 4 * k and np.isneginf(floor).any():  # or all of it would be sorted
            floor = np.nextafter(np.partition(scores, -k, axis=1)[:, -k, None], -np.inf)
        row, column = np.divmod(np.flatnonzero(scores > floor), scores.shape[1])
        if len(row):
            self._waiting.append((
                (rows.start + row).astype(np.int32), columns.start + column, scores[row, column]
            ))  # fmt: skip
            self._counts[rows] += np.bincount(row, minlength=len(scores))
            # Sorting takes long, and is put off; what waits is bounded, whatever the order.
            if self._counts.max() > max(k, _WAITING):
                self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        k, counts = self._scores.shape[1], self._counts
        row, column, scores = map(np.concatenate, zip(*self._waiting, strict=True))
        self._waiting = []
        order = np.argsort(row, kind="stable")
        row, column, scores = row[order], column[order], scores[order]
        place = np.arange(k, k + len(row)) - (np.cumsum(counts) - counts)[row]
        found = np.full((len(counts), k + counts.max()), np.inf, np.float32)  # of what is negated
        found[:, :k], found[row, place] = -self._scores, -scores
        best = np.argsort(found, axis=1, kind="stable")[:, :k]
        self._scores = -np.take_along_axis(found, best, 1)
        who = np.full(found.shape, -1, np.int64)
        who[:, :k], who[row, place] = self._entries, column
        self._entries = np.take_along_axis(who, best, 1)
        self._counts[:] = 0


class Highest:
    """The highest of all scores, whichever probe and entry they belong to.

    >>> top = Highest(3)
    >>> top.add(np.array([[0.1, 0.9], [0.5, 0.7]]))
    >>> top.scores().tolist()
    [0.9, 0.7, 0.5]

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self.size, self._floor, self._waiting = size, -np.inf, 0
        self._kept: list[np.ndarray] = []

    def add(self, scores: Float[np.ndarray, "..."]) -> None:
        """Take in some, in an array of any shape."""
        above = scores[scores > self._floor]
        self._kept.append(above)
        self._waiting += len(above)
        if self._waiting > 2 * self.size:
            self._merge()

    def scores(self) -> Float[np.ndarray, " size"]:
        """Return those kept, highest first; fewer where there were not as many."""
        self._merge()
        return np.sort(self._kept[0])[::-1]

    def _merge(self) -> None:
        kept = np.concatenate([np.empty(0, np.float32), *self._kept])
        if len(kept) > self.size:
            kept = np.partition(kept, len(kept) - self.size)[len(kept) - self.size :]
            self._floor = kept.min(initial=np.inf)
        self._kept, self._waiting = [kept], 0


def _finite(vectors: Vectors, rows: slice, name: str) -> np.ndarray:
    block = np.asarray(vectors[rows], dtype=np.float32)
    # One pass without a copy: a sum is finite only if all are, but for sums that overflow.
    if not np.isfinite(block.sum(dtype=np.float64)) and not np.isfinite(block).all():
        bad = rows.start + int(np.argmin(np.isfinite(block).all(1)))
        raise ValueError(f"{name} must be finite; row {bad} is not")
    return block
