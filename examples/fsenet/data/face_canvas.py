"""A picture under way and the masks that paint it: regions between curves, with soft edges.

A part is the region between two curves over the columns (eyes, brows, lips) or rows (outline,
nose, neck), so its mask is one clipped distance on its bounding box, a pixel belongs to the part
where the coverage passes one half, and soft edges never disagree with labels by more than a
pixel.
"""

from __future__ import annotations

import numpy as np


class Canvas:
    """The picture under way: linear colours, labels, and the pixel grid."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = np.empty((3, size, size), np.float32)
        self.labels = np.zeros((size, size), np.uint8)
        self.glasses = np.zeros((size, size), bool)
        self.axis = np.arange(size, dtype=np.float32)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        """Rows and columns of the box, cut to the picture (perhaps empty)."""
        s = self.size
        ys = slice(int(min(max(y0, 0), s)), int(min(max(y1 + 1, 0), s)))
        xs = slice(int(min(max(x0, 0), s)), int(min(max(x1 + 1, 0), s)))
        return ys, xs

    def paint(
        self, box: tuple[slice, slice], cover: np.ndarray, colour: np.ndarray, label: int | None
    ) -> None:
        """Lay `colour` ([3] or [3, h, w]) over the box where `cover` says, and set the label."""
        if cover.size == 0:
            return
        area = self.colour[:, box[0], box[1]]
        if colour.ndim == 1:
            colour = colour[:, None, None]
        area += cover * (colour - area)
        if label is not None:
            self.labels[box][cover > 0.5] = label


def between_columns(
    curves: tuple[np.ndarray, np.ndarray], canvas: Canvas, margin: float
) -> tuple[tuple[slice, slice], np.ndarray, np.ndarray, np.ndarray]:
    """Window of the region under `curves[0]` and over `curves[1]`, and both as rows per column.

    Returns the window, the two rows [w] and the signed distance [h, w], positive inside.
    """
    top, low = curves
    box = canvas.window(
        min(top[0, 0], low[0, 0]) - margin,
        min(top[:, 1].min(), low[:, 1].min()) - margin,
        max(top[-1, 0], low[-1, 0]) + margin,
        max(top[:, 1].max(), low[:, 1].max()) + margin,
    )
    x, y = canvas.axis[box[1]], canvas.axis[box[0], None]
    up = over(x, top)
    down = np.maximum(over(x, low), up)
    inside = np.minimum((y - up) * slope(up), (down - y) * slope(down))
    ends = np.minimum(x - min(top[0, 0], low[0, 0]), max(top[-1, 0], low[-1, 0]) - x)
    return box, up, down, np.minimum(inside, ends + 0.5)


def over(x: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Height of a left-to-right curve at columns `x`; folds are ironed out."""
    return np.interp(x, np.maximum.accumulate(curve[:, 0]), curve[:, 1]).astype(np.float32)


def slope(values: np.ndarray) -> np.ndarray:
    """Cosine of a curve's slope: turns vertical into true distances."""
    steep = np.zeros_like(values)
    steep[1:-1] = 0.5 * (values[2:] - values[:-2])
    if values.size > 2:
        steep[0], steep[-1] = steep[1], steep[-2]
    return 1 / np.sqrt(1 + steep * steep)


def clip(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """`np.clip` on a fresh array, without its overhead: it is called a hundred times a face."""
    values = np.maximum(values, low)
    return np.minimum(values, high, out=values)


def coverage(distance: np.ndarray) -> np.ndarray:
    """Part of a pixel inside, from the signed distance of its centre."""
    return clip(distance + 0.5, 0.0, 1.0)
