"""Bring maps to another grid: by exact area, which conserves mass, or by maximum."""

from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from partlocal.numerics import accumulation_dtype, wide_matmul

Downsample = Literal["area", "max"]


def resize_maps(
    maps: Float[Tensor, "b k h w"], size: tuple[int, int], mode: Downsample = "area"
) -> Float[Tensor, "b k th tw"]:
    """Resize maps so that small parts survive.

    >>> maps = torch.tensor([[[[0., 0., 6.]]]])
    >>> resize_maps(maps, (1, 2)), resize_maps(maps, (1, 2), mode="max")
    (tensor([[[[0., 4.]]]]), tensor([[[[0., 6.]]]]))

    `F.interpolate(mode="area")` is not exact: from 128 to 28 it weighs a pixel between 0.58 and
    2.81 of its due, because its bins overlap and are averaged each with the same weight.

    Args:
        maps: any real values.
        size: height and width of the new grid, in cells; it may be finer than the old one.
        mode: `"area"` takes each pixel by the share of the cell it covers, so that the mean of
            every map is kept; `"max"` takes the bins of `torch.nn.AdaptiveMaxPool2d`, which
            overlap where the sizes do not divide. The first of equal values gets the gradient.

    Returns:
        Maps in float32, or float64 when `maps` are. Maps that are on the grid already are not
        copied.

    Raises:
        ValueError: a size is no positive whole number, or the mode is unknown.
    """
    check_downsample(mode)
    check_size(size)
    maps = maps.to(accumulation_dtype(maps.dtype))
    if tuple(maps.shape[2:]) == tuple(size):
        return maps
    if mode == "area":
        rows = area_weights(maps.shape[2], size[0], maps)
        columns = area_weights(maps.shape[3], size[1], maps)
        return wide_matmul(wide_matmul(rows, maps), columns.T)
    if torch.compiler.is_exporting():
        # ONNX knows no adaptive maximum for sizes that do not divide. Equal values, but amax
        # shares the gradient between ties: for export alone.
        return _window_max(_window_max(maps, 2, size[0]), 3, size[1])
    return F.adaptive_max_pool2d(maps, tuple(size))


def check_downsample(mode: str) -> None:
    """Refuse an unknown way to a coarser grid.

    >>> check_downsample("area")

    Raises:
        ValueError: it is neither `"area"` nor `"max"`.
    """
    if mode not in ("area", "max"):
        raise ValueError(f"downsample must be 'area' or 'max'; got {mode!r}")


def check_size(size: Any, name: str = "size") -> tuple[int, int]:
    """Return `size` as (height, width), or refuse what is no such pair.

    >>> check_size([28, 7])
    (28, 7)

    Raises:
        ValueError: `size` is not two positive whole numbers.
    """
    numbers: tuple[Any, ...] = tuple(size) if isinstance(size, tuple | list) else ()
    whole = all(isinstance(n, Integral | torch.SymInt) for n in numbers)
    if len(numbers) != 2 or not whole or min(numbers) < 1:
        raise ValueError(f"{name} must be two positive whole numbers (height, width); got {size!r}")
    return numbers[0], numbers[1]


def side_or_size(size: Any) -> tuple[int, int]:
    """Return (height, width) where one side of a square may stand for both, or refuse as above.

    >>> side_or_size(28), side_or_size((28, 7))
    ((28, 28), (28, 7))
    """
    return check_size((size, size) if isinstance(size, int) else size)


def area_weights(old: int, new: int, like: Tensor) -> Float[Tensor, "new old"]:
    """Return how much of each new cell every old cell covers; rows sum to 1, columns to new/old.

    >>> area_weights(3, 2, torch.zeros(())).mul(3)
    tensor([[2., 1., 0.],
            [0., 1., 2.]])
    """
    # In units of 1 / (old * new) every border is a whole number: no rounding until the division.
    left = torch.arange(new, device=like.device)[:, None] * old
    start = torch.arange(old, device=like.device) * new
    overlap = torch.minimum(left + old, start + new) - torch.maximum(left, start)
    return overlap.clamp(min=0).to(like.dtype) / old


def _window_max(maps: Tensor, dim: int, new: int) -> Tensor:
    old = maps.shape[dim]
    first = [i * old // new for i in range(new)]
    last = [-(-(i + 1) * old // new) - 1 for i in range(new)]
    width = max(end - start for start, end in zip(first, last, strict=True)) + 1
    windows = [[min(f + j, end) for j in range(width)] for f, end in zip(first, last, strict=True)]
    index = torch.tensor(windows, device=maps.device)
    gathered = maps.index_select(dim, index.flatten()).unflatten(dim, (new, width))
    return gathered.amax(dim + 1)
