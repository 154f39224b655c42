"""`part_maps` in one read of the logits, and its gradient in one read and one write of them.

For the activations a of one pixel (over its n labels) and r = 1 / |a|:

    maps[k,q] = max, or area-weighted mean, of r a[k] over the pixels that cell q covers
    da[k] = r g[k] - (sum_j g[j] a[j]) r^3 a[k] (l2), or r g[k] - (sum_j g[j] a[j]) r^2 sign a[k]
    g[k]  = the gradients of the cells that cover the pixel: of those that found their maximum in
            it, or weighted by area

A program of the forward fills some cells of a row. It walks through the rows of their pixels, a
block of columns at a time, and keeps for each part and column the maximum (or the sum by area) and
the peak; at the end each cell gathers its columns. One of the backward walks through rows of pixels
that begin in the same row of cells: of these two cover a pixel, held for all rows, and the row
below covers the last one alone. Both hold two tiles, of the parts and of all other labels, so that
every logit is read and activated once, and what only parts need is done for them alone; what labels
share is a number for each pixel. Nothing is summed across programs but the peaks, which a second
kernel combines. First of equals: maxima and peaks are found where PyTorch finds them. Activations
are float32; no atomics: same input, same bits.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from partlocal.kernels import MAX_LABELS
from partlocal.kernels.registration import LAUNCH, derive, device_of, power_of_two
from partlocal.numerics import EPS
from partlocal.resize import area_weights

SMALL, SMALL_SQUARE = tl.constexpr(EPS), tl.constexpr(EPS**2)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _labels(labels, ks, ns, k, n):
    """Return the parts and the other labels [n, 1], and for each 0, or -inf beyond their number."""
    # What is beyond repeats a label: masks would take a quarter of all instructions.
    label, other = tl.minimum(ks, k - 1), tl.minimum(k + ns, n - 1)
    label, other = tl.load(labels + label).to(tl.int64), tl.load(labels + other).to(tl.int64)
    no_part = tl.where(ks < k, 0.0, float("-inf"))
    no_other = tl.where(k + ns < n, 0.0, float("-inf"))
    return label[:, None], other[:, None], no_part[:, None], no_other[:, None]


@triton.jit
def _activate(
    x, others, no_x, no_others,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, OVER_PARTS: tl.constexpr,
):  # fmt: skip
    """Return the activations of parts and of other labels [n, pixels], and the size of each pixel.

    The last two arguments are minus infinity where there is no label, which has no activation.
    """
    if ACTIVATION == "softmax":
        top = tl.maximum(tl.max(x, 0), tl.max(others, 0))[None, :]
        x = tl.exp2((x - top) * LOG2_E + no_x)
        others = tl.exp2((others - top) * LOG2_E + no_others)
    elif ACTIVATION == "sigmoid":
        x = tl.where(no_x == 0, 1 / (1 + tl.exp(-x)), 0.0)
        others = tl.where(no_others == 0, 1 / (1 + tl.exp(-others)), 0.0)
    else:
        x, others = tl.where(no_x == 0, x, 0.0), tl.where(no_others == 0, others, 0.0)
    if ACTIVATION == "softmax":
        share = (1 / (tl.sum(x, 0) + tl.sum(others, 0)))[None, :]
        x, others = x * share, others * share
    size = _size(x, NORM)
    if not OVER_PARTS:
        size += _size(others, NORM)
    return x, others, size


@triton.jit
def _size(a, NORM: tl.constexpr):
    """Return the norm of each pixel; its square if it is l2."""
    return tl.sum(a * a, 0) if NORM == "l2" else tl.sum(tl.abs(a), 0)


@triton.jit
def _inverse(size, NORM: tl.constexpr):
    """Return 1 / norm of each pixel, and whether the norm is less than its least value."""
    least = SMALL_SQUARE if NORM == "l2" else SMALL
    small = size < least  # not >=, which is False for NaN: it must show up
    size = tl.where(small, least, size)
    return tl.rsqrt(size) if NORM == "l2" else 1 / size, small


@triton.jit
def _toward(a, NORM: tl.constexpr):
    """Return the direction in which activations change the norm, but for its length."""
    return a if NORM == "l2" else tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, 0.0))


@triton.jit
def _chain(a, grad, inner, ACTIVATION: tl.constexpr):
    """Return the gradients of logits from those of activations and their sum_j grad[j] a[j]."""
    if ACTIVATION == "softmax":
        grad = a * (grad - inner[None, :])
    elif ACTIVATION == "sigmoid":
        grad = a * (1 - a) * grad
    return grad


@triton.jit
def _higher(value, at, best, best_at):
    """Return the greater of values and where it is; NaN is greatest, the first of equals stays."""
    best_at = tl.where(value > best, at, best_at)
    return tl.maximum(value, best, propagate_nan=tl.PropagateNan.ALL), best_at


@triton.jit
def _nan_as_infinity(best):
    """Return what compares as the maximum that it is."""
    return tl.where(best != best, float("inf"), best)


@triton.jit
def _overlap(cell, pixels, pixel, cells):
    """Return how much of `pixel` a cell covers along an axis, in parts of 1 / `cells`."""
    end = tl.minimum((cell + 1) * pixels, (pixel + 1) * cells)
    return end - tl.maximum(cell * pixels, pixel * cells)


@triton.jit
def maps_kernel(  # noqa: PLR0915
    logits, labels, maps, cell_out, peak_out, peak_at_out,
    n, k, height, width, h, w, blocks, each, bin_width, l_b, l_n, l_h, l_w,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, OVER_PARTS: tl.constexpr, MAX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Fill `each` cells of a row; the grid is (b * h * blocks of cells,)."""
    program = tl.program_id(0).to(tl.int64)
    image, of_image = program // (h * blocks), (program % (h * blocks)).to(tl.int32)
    i, begin = of_image // blocks, (of_image % blocks) * each
    ns, ks, columns = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_X)
    js, end = begin + tl.arange(0, CELLS), tl.minimum(begin + each, w)
    label, other, no_part, no_other = _labels(labels, ks, ns, k, n)
    top, bottom = i * height // h, ((i + 1) * height + h - 1) // h
    start, stop = begin * width // w, (end * width + w - 1) // w
    wide = stop - start > BLOCK_X  # one cell, whose pixels a block walks through
    logits += image * l_b
    best = tl.full([BLOCK_K, BLOCK_X], float("-inf") if MAX else 0.0, tl.float32)
    best_at = tl.zeros([BLOCK_K, BLOCK_X], tl.int32)
    peak = tl.full([BLOCK_K, BLOCK_X], float("-inf"), tl.float32)
    peak_at = tl.zeros([BLOCK_K, BLOCK_X], tl.int32)
    for down in range(bottom - top):
        y = top + down
        for x0 in range(start, stop, BLOCK_X):
            xs = tl.minimum(x0 + columns, stop - 1)
            place = logits + (y.to(tl.int64) * l_h + xs.to(tl.int64) * l_w)[None, :]
            x = tl.load(place + label * l_n).to(tl.float32)
            others = tl.load(place + other * l_n).to(tl.float32)
            a, _, size = _activate(x, others, no_part, no_other, ACTIVATION, NORM, OVER_PARTS)
            pixel = (y * width + xs)[None, :]
            peak, peak_at = _higher(a, pixel, peak, peak_at)
            if NORM != "none":
                inverse, _ = _inverse(size, NORM)
                a *= inverse[None, :]
            if MAX:
                best, best_at = _higher(a, pixel, best, best_at)
            else:
                share = _overlap(i, height, y, h).to(tl.float32) / height
                beside = _overlap(begin, width, xs, w).to(tl.float32) / width
                beside = tl.where(x0 + columns < stop, beside, 0.0)
                best += a * tl.where(wide, share * beside, share)[None, :]

    total = tl.full([BLOCK_K, CELLS], float("-inf") if MAX else 0.0, tl.float32)
    cell = tl.zeros([BLOCK_K, CELLS], tl.int32)
    if MAX:
        best = _nan_as_infinity(best)
    first, last = js * width // w - start, ((js + 1) * width + w - 1) // w - start
    last = tl.minimum(last, BLOCK_X) - 1
    for right_of in range(tl.minimum(bin_width, BLOCK_X)):
        column = tl.minimum(first + right_of, last)
        index = tl.broadcast_to(column[None, :], [BLOCK_K, CELLS])
        value = tl.gather(best, index, 1)
        if MAX:
            pixel = tl.gather(best_at, index, 1)
            better = (value > total) | ((value == total) & (pixel < cell))
            total = tl.where(better, value, total)
            cell = tl.where(better, pixel, cell)
        else:
            beside = _overlap(js, width, start + column, w).to(tl.float32) / width
            value *= tl.where(wide, 1.0, beside)[None, :]
            total += tl.where((first + right_of <= last)[None, :], value, 0.0)
    write = (ks < k)[:, None] & (js < end)[None, :]
    at = ((image * k + ks)[:, None] * h + i) * w + js[None, :]
    if MAX:
        tl.store(cell_out + at, cell, mask=write)
        total = tl.where(total == float("inf"), float("nan"), total)
    tl.store(maps + at, total, mask=write)
    # Integers in the order of the numbers, for which a warp has an instruction; + 0 as -0 is 0.
    peak = (_nan_as_infinity(peak) + 0.0).to(tl.int32, bitcast=True)
    peak ^= (peak >> 31) & 0x7FFFFFFF
    highest = tl.max(peak, 1)
    first_at = tl.min(tl.where(peak == highest[:, None], peak_at, height * width), 1)
    tl.store(peak_out + program * k + ks, highest, mask=ks < k)
    tl.store(peak_at_out + program * k + ks, first_at, mask=ks < k)


@triton.jit
def peaks_kernel(
    peaks, ats, peak_out, at_out, k, shares, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Combine the peaks that the programs of one image found; the grid is (b, blocks of parts)."""
    image = tl.program_id(0).to(tl.int64)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    peak = tl.full([BLOCK_K], -(2**31), tl.int32)
    at = tl.full([BLOCK_K], 2**31 - 1, tl.int32)
    for start in range(0, shares, BLOCK_S):
        share = start + tl.arange(0, BLOCK_S)
        place = (image * shares + share.to(tl.int64))[:, None] * k + ks[None, :]
        mask = (share < shares)[:, None] & (ks < k)[None, :]
        values = tl.load(peaks + place, mask=mask, other=-(2**31))
        places = tl.load(ats + place, mask=mask, other=2**31 - 1)
        value = tl.max(values, 0)
        where = tl.min(tl.where(values == value[None, :], places, 2**31 - 1), 0)
        better = (value > peak) | ((value == peak) & (where < at))
        peak, at = tl.where(better, value, peak), tl.where(better, where, at)
    peak = (peak ^ ((peak >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    peak = tl.where(peak == float("inf"), float("nan"), peak)
    tl.store(peak_out + image * k + ks, peak, mask=ks < k)
    tl.store(at_out + image * k + ks, at, mask=ks < k)


@triton.jit
def _from_cell(grad_maps, cells, plane, part, i, j, xs, w, width, MAX: tl.constexpr):
    """Return the gradients of some cells, and the pixels they are for (area: their share)."""
    beside = _overlap(j, width, xs, w)
    mask, at = part & (beside > 0)[None, :], plane + (i * w + j)[None, :]
    given = tl.load(grad_maps + at, mask=mask, other=0).to(tl.float32)
    if MAX:
        found = tl.load(cells + at, mask=mask, other=-1)
    else:
        found = 0
        given *= (beside.to(tl.float32) / width)[None, :]
    return given, found


@triton.jit
def maps_backward_kernel(  # noqa: PLR0915
    grad_maps, grad_peak, logits, labels, cells, peak_at, out,
    n, k, height, width, h, w, groups, blocks, cover, l_b, l_n, l_h, l_w, o_b, o_n, o_p,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, OVER_PARTS: tl.constexpr, MAX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Write gradients of rows that begin in the same cells; the grid is (b * groups * blocks,)."""
    program = tl.program_id(0).to(tl.int64)
    image, of_image = program // (groups * blocks), (program % (groups * blocks)).to(tl.int32)
    group, x0 = of_image // blocks, (of_image % blocks) * BLOCK_X
    # What lies beyond the width does as the last pixel does.
    xs = tl.minimum(x0 + tl.arange(0, BLOCK_X), width - 1)
    ns, ks = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    part = (ks < k)[:, None]
    of_peak = image * k + tl.minimum(ks, k - 1)[:, None]
    logits += image * l_b + (xs.to(tl.int64) * l_w)[None, :]
    out += image * o_b + (xs.to(tl.int64) * o_p)[None, :]

    top = (group * height + groups - 1) // groups
    bottom = ((group + 1) * height + groups - 1) // groups
    first, end = top * h // height, (bottom * h + height - 1) // height
    j0, plane = xs * w // width, (image * k + ks)[:, None] * (h * w)
    # The two cells of a row of them that cover a pixel are those of all rows of pixels.
    one, one_at = _from_cell(grad_maps, cells, plane, part, first, j0, xs, w, width, MAX)
    two, two_at = _from_cell(grad_maps, cells, plane, part, first, j0 + 1, xs, w, width, MAX)
    # Others are of the last row of pixels, which may be the only one.
    rest = tl.zeros([BLOCK_K, BLOCK_X], tl.float32)
    for down in range(end - first):
        i = first + down
        for right_of in range(tl.where(down == 0, 2, 0), cover):
            j = j0 + right_of
            given, at = _from_cell(grad_maps, cells, plane, part, i, j, xs, w, width, MAX)
            if MAX:
                rest += tl.where(at == ((bottom - 1) * width + xs)[None, :], given, 0.0)
            else:
                rest += given * (_overlap(i, height, bottom - 1, h).to(tl.float32) / height)

    for down in range(bottom - top):
        y = top + down
        # Read for each row: what follows from them would take too many registers.
        label, other, no_part, no_other = _labels(labels, ks, ns, k, n)
        place, to = logits + y.to(tl.int64) * l_h, out + y.to(tl.int64) * width * o_p
        x = tl.load(place + label * l_n).to(tl.float32)
        others = tl.load(place + other * l_n).to(tl.float32)
        a, others, size = _activate(x, others, no_part, no_other, ACTIVATION, NORM, OVER_PARTS)
        pixel = (y * width + xs)[None, :]
        if MAX:
            grad = tl.where(one_at == pixel, one, 0.0) + tl.where(two_at == pixel, two, 0.0)
        else:
            grad = (one + two) * (_overlap(first, height, y, h).to(tl.float32) / height)
        grad += tl.where(y == bottom - 1, rest, 0.0)
        grad_others = tl.zeros([BLOCK_N, BLOCK_X], tl.float32)
        lost = tl.zeros([BLOCK_X], tl.float32)
        if NORM != "none":
            inverse, small = _inverse(size, NORM)
            along = tl.where(small, 0.0, tl.sum(grad * a, 0)) * inverse * inverse
            if NORM == "l2":
                along *= inverse
            grad *= inverse[None, :]
            lost = along * size
        given_peak = tl.load(grad_peak + of_peak).to(tl.float32)
        grad += tl.where(tl.load(peak_at + of_peak) == pixel, given_peak, 0.0)
        inner = tl.sum(grad * a, 0) - lost  # over all labels, once the norm's part is taken off
        if NORM != "none":
            grad -= _toward(a, NORM) * along[None, :]
            if not OVER_PARTS:
                grad_others -= _toward(others, NORM) * along[None, :]
        tl.store(to + label * o_n, _chain(a, grad, inner, ACTIVATION), mask=part)
        grad_others = _chain(others, grad_others, inner, ACTIVATION)
        tl.store(to + other * o_n, grad_others, mask=no_other == 0)


def configuration(kernel: str, n: int, k: int = 1) -> dict[str, int]:
    """Return the blocks and warps for n labels, of which k are selected.

    Args:
        kernel: `"forward"`, `"backward"` or `"peaks"`.
    """
    if kernel == "peaks":
        return {"BLOCK_K": 8, "BLOCK_S": 32, "num_warps": 1, **LAUNCH}
    # Few sets, as each is compiled for every GPU. A warp holds all labels of its pixels, but for
    # many; the gradient has more numbers for each part, and half the pixels.
    most = n - k if k <= 8 else max(k, n - k)
    block_n = next(size for size in (8, 16, 32, 64, 256, MAX_LABELS) if size >= most)
    block_k = 8 if k <= 8 else block_n
    warps = 1 if block_n <= 16 else min(block_n // 8, 16)
    tile = 128 * max(warps, 2) // max(block_n // 2, block_k)
    block_x = max(tile if kernel == "forward" else tile // 2, 1)
    blocks = {"BLOCK_N": block_n, "BLOCK_K": block_k, "BLOCK_X": block_x}
    return {**blocks, "num_warps": warps, **LAUNCH}


@cache  # for ever: a CUDA graph may hold one by its address
def parts_first(labels: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """Return all n labels: the selected ones, then the others."""
    others = sorted(set(range(n)) - set(labels))
    return torch.tensor([*labels, *others], dtype=torch.int32, device=device)


@torch.library.custom_op("partlocal::part_maps", mutates_args=())
def maps_and_peaks(
    logits: Tensor, labels: Sequence[int], size: Sequence[int], activation: str, norm: str,
    over_parts: bool, use_max: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return maps [b, k, h, w] and peaks [b, k], each with the pixels where they were found.

    Args:
        logits: [b, n, sh, sw] in float32, float16 or bfloat16, with any strides.
        labels: k different ones.
        size: (h, w).
        activation, norm: as in `partlocal.part_maps`, `"none"` for None.
        over_parts: whether the norm runs over the selected labels alone.
        use_max: the maximum over the pixels of a cell; else their mean by area.
        dtype: of the maps.
    """
    b, n, height, width = logits.shape
    if n > MAX_LABELS:
        raise NotImplementedError(
            f"implementation='triton': part_maps takes logits of at most {MAX_LABELS} labels; got "
            f"{n}: use implementation='auto' or 'torch'"
        )
    (h, w), k = size, len(labels)
    blocks = configuration("forward", n, k)
    each = _cells_within(blocks["BLOCK_X"], width, w)
    steps = triton.cdiv(w, each)
    maps, cell, peak, peak_at = _outputs(logits, k, size, use_max, dtype)
    shares, ats = (peak_at.new_empty((b, h * steps, k)) for _ in range(2))
    order = parts_first(tuple(labels), n, logits.device)
    with device_of(logits):
        maps_kernel[(b * h * steps,)](
            logits, order, maps, cell, shares, ats,
            n, k, height, width, h, w, steps, each, _covering(w, width), *logits.stride(),
            ACTIVATION=activation, NORM=norm, OVER_PARTS=over_parts, MAX=use_max,
            CELLS=power_of_two(each, 1, blocks["BLOCK_X"]), **blocks,
        )  # fmt: skip
        blocks = configuration("peaks", n)
        peaks_kernel[(b, triton.cdiv(k, blocks["BLOCK_K"]))](
            shares, ats, peak, peak_at, k, h * steps, **blocks
        )
    return maps, cell, peak, peak_at


@maps_and_peaks.register_fake
def _(
    logits: Tensor, labels: Sequence[int], size: Sequence[int], activation: str, norm: str,
    over_parts: bool, use_max: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(logits, len(labels), size, use_max, dtype)


def _outputs(
    logits: Tensor, k: int, size: Sequence[int], use_max: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, (h, w) = logits.shape[0], size
    return (
        logits.new_empty((b, k, h, w), dtype=dtype),
        logits.new_empty((b, k, h, w if use_max else 0), dtype=torch.int32),
        logits.new_empty((b, k), dtype=torch.float32),
        logits.new_empty((b, k), dtype=torch.int32),
    )


@torch.library.custom_op("partlocal::part_maps_backward", mutates_args=())
def maps_backward(
    grad_maps: Tensor, grad_peak: Tensor, logits: Tensor, cell: Tensor, peak_at: Tensor,
    labels: Sequence[int], activation: str, norm: str, over_parts: bool,
) -> Tensor:  # fmt: skip
    """Return the gradient of the logits, in their dtype, given those of maps and peaks."""
    (b, n, height, width), (k, h, w) = logits.shape, grad_maps.shape[1:]
    blocks = configuration("backward", n, k)
    steps, cover = triton.cdiv(width, blocks["BLOCK_X"]), _covering(width, w)
    # A group of rows of pixels begins in one row of cells, of which two cover a pixel; or is one.
    groups = h * max(height // (8 * h), 1) if h <= height and cover <= 2 else height
    out = _like_logits(logits)
    with device_of(logits):
        maps_backward_kernel[(b * groups * steps,)](
            grad_maps.contiguous(), grad_peak.contiguous(), logits,
            parts_first(tuple(labels), n, logits.device), cell, peak_at, out,
            n, k, height, width, h, w, groups, steps, cover,
            *logits.stride(), *out.stride()[:2], out.stride(3),
            ACTIVATION=activation, NORM=norm, OVER_PARTS=over_parts, MAX=cell.numel() > 0, **blocks,
        )  # fmt: skip
    return out


@maps_backward.register_fake
def _(
    grad_maps: Tensor, grad_peak: Tensor, logits: Tensor, cell: Tensor, peak_at: Tensor,
    labels: Sequence[int], activation: str, norm: str, over_parts: bool,
) -> Tensor:  # fmt: skip
    return _like_logits(logits)


def _covering(pixels: int, cells: int) -> int:
    """Return how many cells, at most, cover a pixel along an axis."""
    return max(-(-(p + 1) * cells // pixels) - p * cells // pixels for p in range(pixels))


@cache  # for ever: a CUDA graph may hold one by its address
def _cells_within(block: int, pixels: int, cells: int) -> int:
    """Return how many cells of a row a program takes: those whose pixels, and they, fit a block."""

    def fits(each: int) -> bool:
        spans = (
            -(-min(j + each, cells) * pixels // cells) - j * pixels // cells
            for j in range(0, cells, each)
        )
        return max(spans) <= block

    return next((each for each in range(min(block, cells), 1, -1) if fits(each)), 1)


def _like_logits(logits: Tensor) -> Tensor:
    last = logits.stride(1) == 1 and logits.shape[1] > 1
    layout = torch.channels_last if last else torch.contiguous_format
    shape = tuple(logits.shape)
    return torch.empty(shape, dtype=logits.dtype, device=logits.device, memory_format=layout)


def maps_and_visibility(
    logits: Tensor, labels: tuple[int, ...], size: Sequence[int], activation: str | None,
    norm: str | None, downsample: str, over_parts: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return maps and visibility of labels of which some may be named twice."""
    different = tuple(dict.fromkeys(labels))
    how = (activation or "none", norm or "none", over_parts, downsample == "max", dtype)
    maps, _, peak, _ = maps_and_peaks(logits, different, size, *how)
    if len(different) < len(labels):
        order = torch.tensor([different.index(label) for label in labels], device=logits.device)
        maps, peak = maps.index_select(1, order), peak.index_select(1, order)
    return maps, peak


def gradient(
    grad_maps: Tensor, grad_peak: Tensor, logits: Tensor, cell: Tensor, peak_at: Tensor,
    labels: Sequence[int], activation: str, norm: str, over_parts: bool,
) -> Tensor:  # fmt: skip
    """Return what the backward kernel does in plain PyTorch, for second derivatives."""
    height, width = logits.shape[2:]
    a, grad_maps = logits.float(), grad_maps.float()
    if activation == "softmax":
        a = a.softmax(1)
    elif activation == "sigmoid":
        a = a.sigmoid()
    if cell.numel():
        empty = a.new_zeros((*grad_maps.shape[:2], height * width))
        grad = empty.scatter_add(2, cell.flatten(2).long(), grad_maps.flatten(2))
        grad = grad.unflatten(2, (height, width))
    else:
        rows, columns = (
            area_weights(pixels, cells, a)
            for pixels, cells in zip((height, width), grad_maps.shape[2:], strict=True)
        )
        grad = rows.T @ grad_maps @ columns
    chosen = torch.tensor(labels, device=logits.device)
    grad = torch.zeros_like(a).index_add(1, chosen, grad)
    if norm != "none":
        counted = a
        if over_parts:
            kept = torch.zeros_like(a[0, :, :1, :1]).index_fill(0, chosen, 1)
            counted = a * kept
        size = counted.square() if norm == "l2" else counted.abs()
        size, least = size.sum(1, keepdim=True), EPS**2 if norm == "l2" else EPS
        inverse = size.clamp(min=least)
        inverse = inverse.rsqrt() if norm == "l2" else inverse.reciprocal()
        along = (grad * a).sum(1, keepdim=True) * inverse.square() * (size >= least)
        toward = counted * inverse if norm == "l2" else counted.sign()
        grad = grad * inverse - toward * along
    at_peak = torch.zeros_like(a).flatten(2).index_select(1, chosen)
    at_peak = at_peak.scatter_add(2, peak_at[..., None].long(), grad_peak.float()[..., None])
    grad = grad.flatten(2).index_add(1, chosen, at_peak).unflatten(2, (height, width))
    if activation == "softmax":
        grad = a * (grad - (grad * a).sum(1, keepdim=True))
    elif activation == "sigmoid":
        grad = a * (1 - a) * grad
    return grad.to(logits.dtype)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    logits, ctx.labels, _, ctx.activation, ctx.norm, ctx.over_parts, _, _ = inputs
    _, cell, _, peak_at = output
    ctx.save_for_backward(logits, cell, peak_at)


def _backward(
    ctx: Any, grad_maps: Tensor, _: Tensor, grad_peak: Tensor, __: Tensor
) -> tuple[Tensor | None, ...]:
    how = (ctx.labels, ctx.activation, ctx.norm, ctx.over_parts)
    return maps_backward(grad_maps, grad_peak, *ctx.saved_tensors, *how), *[None] * 7


def _save_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.how = inputs[5:]


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *inputs, cell, peak_at = ctx.saved_tensors
    first = derive(lambda m, p, x: gradient(m, p, x, cell, peak_at, *ctx.how), inputs, grad)
    return *first, *[None] * 6


maps_and_peaks.register_autograd(_backward, setup_context=_save)
maps_backward.register_autograd(_second, setup_context=_save_gradient)
