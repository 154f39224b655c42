"""`part_maps` in one read of the logits, and its gradient in one read and one write of them.

For the activations a of one pixel (over its n labels) and r = 1 / |a|:

    maps[k,q] = max, or area-weighted mean, of r a[k] over the pixels that cell q covers
    da[k] = r g[k] - (sum_j g[j] a[j]) r^3 a[k] (l2), or r g[k] - (sum_j g[j] a[j]) r^2 sign a[k]
    g[k]  = the gradients of the cells that cover the pixel: of those that found their maximum in
            it, or weighted by area

A program of the forward holds a row of cells and walks through their pixels; those that two bins
share are read from the caches and activated twice. One of the backward holds a row of pixels and
walks through the cells that cover each, two along an axis at most where maps are coarser than
logits. So nothing is summed across programs but the peaks, which a second kernel combines. First
of equals: maxima and peaks are found where PyTorch finds them. Activations are float32; no
atomics: same input, same bits. Not measured on a GPU.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from partlocal.kernels.registration import LAUNCH, derive, device_of, power_of_two
from partlocal.numerics import EPS
from partlocal.resize import area_weights

MAX_LABELS = 1024
SMALL, SMALL_SQUARE = tl.constexpr(EPS), tl.constexpr(EPS**2)


@triton.jit
def _activations(place, inside, ACTIVATION: tl.constexpr):
    """Return the activations [n, pixels]; 0 for labels that there are not."""
    if ACTIVATION == "softmax":
        x = tl.load(place, mask=inside, other=float("-inf")).to(tl.float32)
        x = tl.exp(x - tl.max(x, 0)[None, :])
        x = x / tl.sum(x, 0)[None, :]
    else:
        x = tl.load(place, mask=inside, other=0).to(tl.float32)
        if ACTIVATION == "sigmoid":
            x = 1 / (1 + tl.exp(-x))
    return tl.where(inside, x, 0.0)


@triton.jit
def _inverse_norm(a, counted, NORM: tl.constexpr):
    """Return 1 / norm of each pixel, and whether the norm is more than its least value."""
    a = tl.where(counted, a, 0.0)
    if NORM == "l2":
        size = tl.sum(a * a, 0)
        least = SMALL_SQUARE
    else:
        size = tl.sum(tl.abs(a), 0)
        least = SMALL
    small = size < least  # not >=, which is False for NaN: it must show up
    size = tl.where(small, least, size)
    if NORM == "l2":
        size = tl.sqrt_rn(size)
    return 1 / size, ~small


@triton.jit
def maps_kernel(
    logits, slots, maps, cell_out, peak_out, peak_at_out,
    n, k, height, width, h, w, blocks, bin_width, l_b, l_n, l_h, l_w,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, OVER_PARTS: tl.constexpr, MAX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Fill a row of cells; the grid is (b * h * blocks of cells,)."""
    row = tl.program_id(0).to(tl.int64)
    image, of_image = row // (h * blocks), (row % (h * blocks)).to(tl.int32)
    i, js = of_image // blocks, (of_image % blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    ns = tl.arange(0, BLOCK_N)
    slot = tl.load(slots + ns, mask=ns < n, other=-1)
    logits += image * l_b + ns.to(tl.int64)[:, None] * l_n
    top, bottom = i * height // h, ((i + 1) * height + h - 1) // h
    left, right = js * width // w, ((js + 1) * width + w - 1) // w
    total = tl.full([BLOCK_N, BLOCK_W], float("-inf") if MAX else 0.0, tl.float32)
    cell = tl.zeros([BLOCK_N, BLOCK_W], tl.int32)
    peak = tl.full([BLOCK_N, BLOCK_W], float("-inf"), tl.float32)
    peak_at = tl.zeros([BLOCK_N, BLOCK_W], tl.int32)
    for down in range(bottom - top):
        y = top + down
        for right_of in range(bin_width):
            x = left + right_of
            there = (js < w) & (x < right)
            inside = (ns < n)[:, None] & there[None, :]
            place = logits + (y.to(tl.int64) * l_h + x.to(tl.int64) * l_w)[None, :]
            a = _activations(place, inside, ACTIVATION)
            value = a
            if NORM != "none":
                counted = inside & (slot >= 0)[:, None] if OVER_PARTS else inside
                inverse, _ = _inverse_norm(a, counted, NORM)
                value = a * inverse[None, :]
            pixel = (y * width + x)[None, :]
            # A maximum passes NaN over; infinity, which it does not, stands for it.
            a = tl.where(inside, tl.where(a != a, float("inf"), a), float("-inf"))
            peak_at = tl.where(a > peak, pixel, peak_at)
            peak = tl.maximum(a, peak)
            if MAX:
                value = tl.where(value != value, float("inf"), value)
                better = inside & (value > total)  # not >=: the first of equals
                total = tl.where(better, value, total)
                cell = tl.where(better, pixel, cell)
            else:
                above = tl.minimum((i + 1) * height, (y + 1) * h) - tl.maximum(i * height, y * h)
                beside = tl.minimum((js + 1) * width, (x + 1) * w) - tl.maximum(js * width, x * w)
                share = above.to(tl.float32) / height * (beside.to(tl.float32) / width)
                total += tl.where(inside, value * share[None, :], 0.0)
    write = (slot >= 0)[:, None] & (js < w)[None, :]
    at = ((image * k + slot)[:, None] * h + i) * w + js[None, :]
    if MAX:
        tl.store(cell_out + at, cell, mask=write)
        total = tl.where(total == float("inf"), float("nan"), total)
    tl.store(maps + at, total, mask=write)
    highest = tl.max(peak, 1)
    first = tl.min(tl.where(peak == highest[:, None], peak_at, height * width), 1)
    tl.store(peak_out + row * k + slot, highest, mask=slot >= 0)
    tl.store(peak_at_out + row * k + slot, first, mask=slot >= 0)


@triton.jit
def peaks_kernel(peaks, ats, peak_out, at_out, k, shares, BLOCK_K: tl.constexpr):
    """Combine the peaks that the programs of one image found; the grid is (b,)."""
    image = tl.program_id(0).to(tl.int64)
    ks = tl.arange(0, BLOCK_K)
    peak = tl.full([BLOCK_K], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK_K], tl.int32)
    for share in range(shares):
        place = (image * shares + share) * k + ks
        value = tl.load(peaks + place, mask=ks < k, other=0)
        where = tl.load(ats + place, mask=ks < k, other=0)
        better = (value > peak) | ((value == peak) & (where < at))
        peak, at = tl.where(better, value, peak), tl.where(better, where, at)
    peak = tl.where(peak == float("inf"), float("nan"), peak)
    tl.store(peak_out + image * k + ks, peak, mask=ks < k)
    tl.store(at_out + image * k + ks, at, mask=ks < k)


@triton.jit
def maps_backward_kernel(
    grad_maps, grad_peak, logits, slots, cells, peak_at, out,
    n, k, height, width, h, w, blocks, rows, columns, l_b, l_n, l_h, l_w, o_b, o_n, o_p,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, OVER_PARTS: tl.constexpr, MAX: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some pixels' logits; the grid is (b * blocks of pixels,)."""
    row = tl.program_id(0).to(tl.int64)
    image, ps = row // blocks, (row % blocks).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    ns = tl.arange(0, BLOCK_N)
    slot = tl.load(slots + ns, mask=ns < n, other=-1)
    part, plane = slot >= 0, (image * k + slot)[:, None] * (h * w)
    y, x = ps // width, ps % width
    inside = (ns < n)[:, None] & (ps < height * width)[None, :]
    place = image * l_b + ns.to(tl.int64)[:, None] * l_n
    place += (y.to(tl.int64) * l_h + x.to(tl.int64) * l_w)[None, :]
    a = _activations(logits + place, inside, ACTIVATION)

    grad = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for row_of in range(rows):
        i = y * h // height + row_of
        above = tl.minimum((i + 1) * height, (y + 1) * h) - tl.maximum(i * height, y * h)
        for column_of in range(columns):
            j = x * w // width + column_of
            beside = tl.minimum((j + 1) * width, (x + 1) * w) - tl.maximum(j * width, x * w)
            covers = (ps < height * width) & (i < h) & (j < w) & (above > 0) & (beside > 0)
            mask = part[:, None] & covers[None, :]
            at = plane + (i * w + j)[None, :]
            given = tl.load(grad_maps + at, mask=mask, other=0).to(tl.float32)
            if MAX:
                found = tl.load(cells + at, mask=mask, other=-1)
                grad += tl.where(found == ps[None, :], given, 0.0)
            else:
                share = above.to(tl.float32) / height * (beside.to(tl.float32) / width)
                grad += tl.where(mask, given * share[None, :], 0.0)
    if NORM != "none":
        counted = inside & part[:, None] if OVER_PARTS else inside
        inverse, free = _inverse_norm(a, counted, NORM)
        along = tl.where(free, tl.sum(grad * a, 0), 0.0) * inverse * inverse
        grad = grad * inverse[None, :]
        if NORM == "l2":
            grad -= tl.where(counted, a * (along * inverse)[None, :], 0.0)
        else:
            sign = tl.where(a > 0, 1.0, tl.where(a < 0, -1.0, 0.0))
            grad -= tl.where(counted, sign * along[None, :], 0.0)
    given = tl.load(grad_peak + image * k + slot, mask=part, other=0).to(tl.float32)
    found = tl.load(peak_at + image * k + slot, mask=part, other=-1)
    grad += tl.where(found[:, None] == ps[None, :], given[:, None], 0.0)
    if ACTIVATION == "softmax":
        grad = a * (grad - tl.sum(grad * a, 0)[None, :])
    elif ACTIVATION == "sigmoid":
        grad = a * (1 - a) * grad
    at = image * o_b + ns.to(tl.int64)[:, None] * o_n + ps.to(tl.int64)[None, :] * o_p
    tl.store(out + at, grad, mask=inside)


def configuration(kernel: str, n: int) -> dict[str, int]:
    """Return the blocks and warps for n labels.

    Args:
        kernel: `"forward"`, `"backward"`, or `"peaks"`, whose labels are the selected ones.
    """
    if kernel == "peaks":
        block_k = power_of_two(n, 32, MAX_LABELS)
        return {"BLOCK_K": block_k, "num_warps": max(block_k // 128, 1), **LAUNCH}
    # The size of maps does not choose, as each set of blocks is compiled for every GPU: 16 cells
    # waste no more of rows of 7, 14, 28 and 56 than 32 do.
    name, tile, most = {"forward": ("BLOCK_W", 512, 16), "backward": ("BLOCK_P", 1024, 128)}[kernel]
    block_n = power_of_two(n, 2, MAX_LABELS)
    block = max(1, min(tile // block_n, most))
    warps = min(max(block_n * block // 128, 1), 8)
    return {"BLOCK_N": block_n, name: block, "num_warps": warps, **LAUNCH}


@lru_cache(maxsize=64)
def slots_of(labels: tuple[int, ...], n: int, device: torch.device) -> Tensor:
    """Return for each of n labels its place among the selected ones, -1 for the others."""
    places = {label: place for place, label in enumerate(labels)}
    return torch.tensor([places.get(i, -1) for i in range(n)], dtype=torch.int32, device=device)


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
    blocks = configuration("forward", n)
    steps = triton.cdiv(w, blocks["BLOCK_W"])
    maps, cell, peak, peak_at = _outputs(logits, k, size, use_max, dtype)
    shares, ats = peak.new_empty((b, h * steps, k)), peak_at.new_empty((b, h * steps, k))
    bin_width = max(-(-(j + 1) * width // w) - j * width // w for j in range(w))
    slots = slots_of(tuple(labels), n, logits.device)
    with device_of(logits):
        maps_kernel[(b * h * steps,)](
            logits, slots, maps, cell, shares, ats,
            n, k, height, width, h, w, steps, bin_width, *logits.stride(),
            ACTIVATION=activation, NORM=norm, OVER_PARTS=over_parts, MAX=use_max, **blocks,
        )  # fmt: skip
        peaks_kernel[(b,)](shares, ats, peak, peak_at, k, h * steps, **configuration("peaks", k))
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
    blocks = configuration("backward", n)
    steps = triton.cdiv(height * width, blocks["BLOCK_P"])
    out = _like_logits(logits)
    # How many cells cover a pixel along an axis, at most.
    rows, columns = _covering(height, h), _covering(width, w)
    with device_of(logits):
        maps_backward_kernel[(b * steps,)](
            grad_maps.contiguous(), grad_peak.contiguous(), logits,
            slots_of(tuple(labels), n, logits.device), cell, peak_at, out,
            n, k, height, width, h, w, steps, rows, columns,
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
    return max(-(-(p + 1) * cells // pixels) - p * cells // pixels for p in range(pixels))


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
