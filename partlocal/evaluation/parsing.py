"""Parsing: how well do predicted label maps agree with the true ones?

All measures come from one confusion matrix over the whole data set, as benchmarks define them:
means over pictures would let a part that is absent count as perfect.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped


class ParsingScore:
    """Gather label maps into one confusion matrix, and read F1 and IoU from it.

    >>> score = ParsingScore(["background", "nose", "hair"])
    >>> target = np.array([[0, 1, 0], [2, 2, 2]])
    >>> score.update(predicted=np.array([[0, 1, 1], [2, 2, 0]]), target=target)
    >>> score.f1
    {'background': 0.5, 'nose': 0.6666666666666666, 'hair': 0.8}
    >>> round(score.mean_f1, 3), round(score.mean_iou, 3)  # without background, and with it
    (0.733, 0.5)

    Args:
        labels: names in index order, or anything with such `labels` (and `groups`), as a
            `LabelSet`.
        groups: names for several labels at once, for `merged_f1` and `overall_f1`; those of
            `labels` when None.
        background: the label that `mean_f1` leaves out, if it is there.

    Raises:
        ValueError: names repeat, or there are none, or a group names an unknown label.
    """

    def __init__(
        self,
        labels: Any,
        groups: Mapping[str, Sequence[str]] | None = None,
        background: str = "background",
    ) -> None:
        if groups is None:
            groups = getattr(labels, "groups", {})
        names = getattr(labels, "labels", labels)
        self.labels = (names,) if isinstance(names, str) else tuple(names)
        self.groups = {name: tuple(members) for name, members in groups.items()}
        self.background = background
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels must be different names; got {list(self.labels)}")
        for members in self.groups.values():
            self._indices(members)
        self.confusion: Int[np.ndarray, "n n"]  # true label by predicted label, in pixels
        self.confusion = np.zeros((len(self.labels), len(self.labels)), dtype=np.int64)

    def update(
        self,
        predicted: Shaped[np.ndarray, "*pixels"],
        target: Shaped[np.ndarray, "*pixels"],
        ignore_index: int = 255,
        merge: Any = None,
    ) -> None:
        """Add pictures.

        Args:
            predicted: label indices.
            target: the true label indices, of the same shape.
            ignore_index: pixels with this target are skipped.
            merge: where the prediction has m labels of its own, the matrix `n m` (array or tensor
                on the CPU) that takes them to these n, one 1 a column: `HELEN.remap(coarse)`
                scores a Helen parser on maps of a coarser set.

        Raises:
            ValueError: shapes differ, values are no indices of labels, or `merge` is no such
                matrix.
        """
        predicted, target = np.asarray(predicted), np.asarray(target)
        if predicted.shape != target.shape:
            raise ValueError(
                f"predicted must be {list(target.shape)} (as target); got {list(predicted.shape)}"
            )
        known = target != ignore_index
        predicted, target = predicted[known], target[known]
        count = len(self.labels)
        if merge is not None:
            merge = self._check_merge(merge, rows=count)
            _check_indices(predicted, "predicted", merge.shape[1])
            predicted = merge.argmax(0)[predicted]
        _check_indices(predicted, "predicted", count)
        _check_indices(target, "target", count)
        cells = target.astype(np.int64) * count + predicted.astype(np.int64)
        self.confusion += np.bincount(cells, minlength=count**2).reshape(count, count)

    def merge(self, matrix: Any, labels: Any, background: str = "background") -> "ParsingScore":
        """Return the score over coarser labels: what was confused within a group is now right.

        >>> score = ParsingScore(["background", "left_eye", "right_eye"])
        >>> score.update(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]))
        >>> score.merge(np.array([[1, 0, 0], [0, 1, 1]]), ["background", "eyes"]).f1
        {'background': 1.0, 'eyes': 1.0}

        Args:
            matrix: `m n`, takes the n labels to m groups, one 1 a column, as `LabelSet.remap`
                returns it.
            labels: the m groups, as for the constructor.
            background: the group that `mean_f1` leaves out.

        Raises:
            ValueError: `matrix` is no such matrix.
        """
        merged = ParsingScore(labels, background=background)
        matrix = self._check_merge(matrix, rows=len(merged.labels), columns=len(self.labels))
        matrix = matrix.astype(np.int64)
        merged.confusion = matrix @ self.confusion @ matrix.T
        return merged

    @property
    def f1(self) -> dict[str, float]:
        """F1 of each label, 2 hits / (true + predicted pixels); NaN if it never occurs."""
        return dict(zip(self.labels, self._ratios(iou=False).tolist(), strict=True))

    @property
    def iou(self) -> dict[str, float]:
        """Intersection over union of each label; NaN if it never occurs."""
        return dict(zip(self.labels, self._ratios(iou=True).tolist(), strict=True))

    @property
    def mean_f1(self) -> float:
        """Mean F1 of the labels that occur, background left out: LaPa's and CelebAMask-HQ's."""
        counted = [name != self.background for name in self.labels]
        ratios = self._ratios(iou=False)[counted]
        return float(np.nanmean(ratios)) if not np.isnan(ratios).all() else float("nan")

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the labels that occur, background included."""
        return float(np.nanmean(self._ratios(iou=True)))

    @property
    def overall_f1(self) -> float:
        """Helen's overall F1: the group "inner" (brows, eyes, nose, mouth) as one class."""
        return self.merged_f1("inner")

    def merged_f1(self, *names: str) -> float:
        """F1 of several labels or groups taken as one class: an eye called nose is right.

        Raises:
            ValueError: a name is neither a label nor a group.
        """
        members = [member for name in names for member in self.groups.get(name, (name,))]
        chosen = sorted(set(self._indices(members)))
        both = self.confusion[np.ix_(chosen, chosen)].sum()
        either = self.confusion[chosen].sum() + self.confusion[:, chosen].sum()
        return float(2 * both / either) if either else float("nan")

    def _ratios(self, iou: bool) -> np.ndarray:
        if not self.confusion.any():
            raise ValueError("nothing was scored yet: call update(predicted, target) first")
        both = self.confusion.diagonal()
        total = self.confusion.sum(0) + self.confusion.sum(1)
        top, bottom = (both, total - both) if iou else (2 * both, total)
        return np.divide(top, bottom, out=np.full(len(both), np.nan), where=bottom > 0)

    def _indices(self, names: Sequence[str]) -> list[int]:
        if unknown := [name for name in names if name not in self.labels]:
            raise ValueError(
                f"no label or group is called {', '.join(unknown)}; there are "
                f"{', '.join((*self.labels, *self.groups))}"
            )
        return [self.labels.index(name) for name in names]

    @staticmethod
    def _check_merge(matrix: Any, rows: int, columns: int | None = None) -> np.ndarray:
        matrix = np.asarray(matrix)
        if matrix.ndim != 2 or len(matrix) != rows or columns not in (None, matrix.shape[1]):
            expected = f"[{rows}, {'m' if columns is None else columns}]"
            raise ValueError(f"the merge matrix must be {expected}; got {list(matrix.shape)}")
        if not (np.isin(matrix, (0, 1)).all() and (matrix.sum(0) == 1).all()):
            raise ValueError(
                "each column of the merge matrix must hold one 1 and zeros: every label goes to "
                "one group"
            )
        return matrix


def _check_indices(values: np.ndarray, name: str, count: int) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must hold integer labels; got {values.dtype}: take the argmax")
    if values.size and (values.min() < 0 or values.max() >= count):
        bad = values.min() if values.min() < 0 else values.max()
        raise ValueError(f"{name} must hold labels from 0 to {count - 1}; got {bad}")
