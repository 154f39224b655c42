"""The maximum of each channel under each mask, without a tensor of masks x channels x cells."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from partlocal.numerics import accumulation_dtype, eager_on_cpu

CACHE_BYTES = 2**22  # that a CPU works on at a time


def masked_max(
    features: Float[Tensor, "b c h w"], area: Bool[Tensor, "b k h w"]
) -> Float[Tensor, "b k c"]:
    """Return the maximum of each channel over each area; an empty one has no meaning.

    >>> features = torch.tensor([[[[3.0, 1.0, 2.0]]]])
    >>> masked_max(features, torch.tensor([[[[False, True, True]]]]))
    tensor([[[2.]]])

    Where a gradient is wanted, what is found is picked by index, which autograd can differentiate
    twice; the first of equal cells gets the gradient.
    """
    on_cpu = eager_on_cpu(features)
    if not (features.requires_grad and torch.is_grad_enabled()):
        if on_cpu:
            return _over_cells(features, _cells(area), lambda under: under.amax(1))
        return _over_masks(features, area, lambda under: under.amax((2, 3)))
    if on_cpu:
        cells = _cells(area)
        cell = cells.gather(2, _over_cells(features.detach(), cells, _first_largest))
    else:
        cell = _over_masks(features.detach(), area, lambda under: under.flatten(2).max(2).indices)
    return _pick(features, cell)


def _pick(features: Float[Tensor, "b c h w"], cell: Int[Tensor, "b k c"]) -> Float[Tensor, "b k c"]:
    """Return each channel's value in its cell, wide; autograd keeps the index, not the features."""
    b, c, h, w = features.shape
    image = torch.arange(b, device=features.device)[:, None, None]
    channel = torch.arange(c, device=features.device)
    # Wide, so that a cell's gradients from several parts are not added in half precision.
    features = features.to(accumulation_dtype(features.dtype))
    if features.stride(1) == 1:
        features = features.permute(0, 2, 3, 1)
        index = (image * (h * w) + cell) * c + channel
    else:
        index = (image * c + channel) * (h * w) + cell
    return features.flatten().index_select(0, index.flatten()).view(cell.shape)


def _over_masks(features: Tensor, area: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Return `reduce` of the features under each mask, one after another; compilers fuse it."""
    hidden = (torch.where(part[:, None], features, -torch.inf) for part in area.unbind(1))
    return torch.stack([reduce(under) for under in hidden], 1)


def _over_cells(
    features: Float[Tensor, "b c h w"],
    cells: Int[Tensor, "b k n"],
    reduce: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return `reduce` of the features of each mask's cells, given as `masks cells channels`.

    The channels of a cell lie side by side there, so that a cell is copied as a whole, and cells
    outside are not looked at: several times as fast as hiding them.
    """
    (b, c, h, w), (_, k, n) = features.shape, cells.shape
    dtype = accumulation_dtype(features.dtype)
    images = max(1, CACHE_BYTES // (dtype.itemsize * c * h * w))
    masks = max(1, CACHE_BYTES // (dtype.itemsize * c * n))
    # Kept from turn to turn: pages that are new each time would take as long as the work.
    rows = torch.empty(min(b, images), h, w, c, dtype=dtype)
    under = torch.empty(min(b * k, masks), n, c, dtype=dtype)
    found = []
    for some, where in zip(features.split(images), cells.split(images), strict=True):
        pixels = some.permute(0, 2, 3, 1)
        if not pixels.is_contiguous() or pixels.dtype != dtype:
            pixels = rows[: len(some)].copy_(pixels)
        first = torch.arange(len(some))[:, None, None] * (h * w)
        for index in (where + first).flatten(0, 1).split(masks):
            picked = under[: len(index)]
            table, flat = pixels.view(-1, c), picked.flatten(0, 1)
            torch.index_select(table, 0, index.flatten(), out=flat)
            found.append(reduce(picked))
    return torch.cat(found).unflatten(0, (b, k))


def _cells(area: Bool[Tensor, "b k h w"]) -> Int[Tensor, "b k n"]:
    """Return the cells of each mask, as many as the largest has: others repeat their first one."""
    flat = area.flatten(0, 1).flatten(1)
    count = flat.sum(1)
    mask, cell = flat.nonzero(as_tuple=True)
    start = count.cumsum(0) - count
    first = torch.zeros_like(count)
    first[count > 0] = cell[start[count > 0]]
    cells = first[:, None].repeat(1, max(1, int(count.max())))
    cells[mask, torch.arange(len(mask)) - start[mask]] = cell
    return cells.unflatten(0, area.shape[:2])


def _first_largest(under: Float[Tensor, "m n c"]) -> Int[Tensor, "m c"]:
    """Return what `under.max(1).indices` does, in a fraction of the time; n is below 2^24."""
    most, n = under.amax(1, keepdim=True), under.shape[1]
    if most.isnan().any():  # which equals nothing
        return under.max(1).indices
    before_end = torch.arange(n, 0, -1, dtype=under.dtype)[:, None]
    return (n - torch.eq(under, most, out=torch.empty_like(under)).mul_(before_end).amax(1)).long()
