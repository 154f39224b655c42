"""`structure_correlation` in one launch forward and one backward.

For the parts L of an image, with n = |L_i| |L_j|:

    D[i,j] = |L_i - L_j|      A[i,j] = L_i . L_j / n      out[i] = [L_i, D_i1, A_i1, D_i2, ...]
    dL_i   = g_i + sum_j (gD_ij + gD_ji) (L_i - L_j) / D_ij
                 + sum_j (gA_ij + gA_ji) (L_j / n - A_ij L_i / |L_i|^2)

One program a part: it sees all parts of its image, which the caches hold, and writes its own row,
so that nothing is summed across programs. Sums are float32. Where D is 0 its gradient is 0; where
a part is not visible, or no longer than 1e-12, its cosines (or both numbers of a pair) and their
gradients are 0. Not timed on a GPU.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from partlocal.kernels.registration import LAUNCH, derive, device_of, power_of_two
from partlocal.numerics import NULL

MAX_PARTS = 256
LEAST = tl.constexpr(NULL**2)  # squared length of a part that has a direction


@triton.jit
def _pairs_of(
    parts, seen, i, k, c, stride_k, stride_c, SEEN: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return what part i has with all: squared distances, products, lengths, what is a pair."""
    js = tl.arange(0, BLOCK_K)
    squared = tl.zeros([BLOCK_K], tl.float32)
    product = tl.zeros([BLOCK_K], tl.float32)
    energy = tl.zeros([BLOCK_K], tl.float32)
    for start in range(0, c, BLOCK_C):
        cs = start + tl.arange(0, BLOCK_C)
        columns = cs.to(tl.int64)[None, :] * stride_c
        rows = js.to(tl.int64)[:, None] * stride_k
        inside = cs[None, :] < c
        own = tl.load(parts + i.to(tl.int64) * stride_k + columns, mask=inside, other=0)
        own = own.to(tl.float32)
        other = tl.load(parts + rows + columns, mask=(js[:, None] < k) & inside, other=0)
        other = other.to(tl.float32)
        apart = own - other  # not |a|^2 + |b|^2 - 2ab, which cancels
        squared += tl.sum(apart * apart, 1)
        product += tl.sum(own * other, 1)
        energy += tl.sum(other * other, 1)
    # Taken from all, not summed alone: a pair has the same bits in both rows.
    own_energy = tl.sum(tl.where(js == i, energy, 0.0)[None, :], 1)
    pair = (js < k) & (js != i)
    if SEEN:
        # Not `>`, which is False for NaN: it must show up and not be an absence.
        pair = pair & (tl.load(seen + js, mask=js < k, other=0) > 0) & ~(energy <= LEAST)
        pair = pair & (tl.load(seen + i + tl.arange(0, 1)) > 0) & ~(own_energy <= LEAST)
    return squared, product, energy, own_energy, pair


@triton.jit
def forward_kernel(
    parts, seen, out, k, c, stride_b, stride_k, stride_c,
    SEEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write one row of the descriptor; the grid is (b * k,)."""
    row = tl.program_id(0).to(tl.int64)
    image, i = row // k, (row % k).to(tl.int32)
    parts += image * stride_b
    seen += image * k
    out += row * (c + 2 * (k - 1))
    squared, product, energy, own_energy, pair = _pairs_of(
        parts, seen, i, k, c, stride_k, stride_c, SEEN, BLOCK_K, BLOCK_C
    )
    length = _inverse_length(own_energy, LEAST) * _inverse_length(energy, LEAST)
    js = tl.arange(0, BLOCK_K)
    place = out + c + 2 * (js - (js > i).to(tl.int32))
    written = (js < k) & (js != i)
    tl.store(place, tl.where(pair, tl.sqrt_rn(squared), 0.0), mask=written)
    tl.store(place + 1, tl.where(pair, product * length, 0.0), mask=written)
    for start in range(0, c, BLOCK_C):
        cs = start + tl.arange(0, BLOCK_C)
        columns = cs.to(tl.int64) * stride_c
        own = tl.load(parts + i.to(tl.int64) * stride_k + columns, mask=cs < c, other=0)
        tl.store(out + cs, own.to(tl.float32), mask=cs < c)


@triton.jit
def backward_kernel(
    grad, parts, seen, grad_parts, k, c, grad_b, grad_k, grad_f, stride_b, stride_k, stride_c,
    SEEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the gradient of one part; the grid is (b * k,)."""
    row = tl.program_id(0).to(tl.int64)
    image, i = row // k, (row % k).to(tl.int32)
    parts += image * stride_b
    grad += image * grad_b
    squared, product, energy, own_energy, pair = _pairs_of(
        parts, seen + image * k, i, k, c, stride_k, stride_c, SEEN, BLOCK_K, BLOCK_C
    )
    # The numbers of the pair (i, j) stand in row i, and again in row j.
    js = tl.arange(0, BLOCK_K)
    rows = js.to(tl.int64) * grad_k
    own_row = i.to(tl.int64) * grad_k
    here = own_row + (c + 2 * (js - (js > i).to(tl.int32))).to(tl.int64) * grad_f
    there = rows + (c + 2 * (i - (i > js).to(tl.int32))).to(tl.int64) * grad_f
    distance = tl.load(grad + here, mask=pair, other=0).to(tl.float32)
    distance += tl.load(grad + there, mask=pair, other=0).to(tl.float32)
    cosine = tl.load(grad + here + grad_f, mask=pair, other=0).to(tl.float32)
    cosine += tl.load(grad + there + grad_f, mask=pair, other=0).to(tl.float32)

    inverse, own_inverse = _inverse_length(energy, LEAST), _inverse_length(own_energy, LEAST)
    distance *= _inverse_length(squared, 0.0)
    cosine *= own_inverse * inverse
    turn = tl.sum(cosine * product, 0) * own_inverse * own_inverse
    for start in range(0, c, BLOCK_C):
        cs = start + tl.arange(0, BLOCK_C)
        inside = cs[None, :] < c
        columns = cs.to(tl.int64)[None, :]
        own_place = parts + i.to(tl.int64) * stride_k + columns * stride_c
        own = tl.load(own_place, mask=inside, other=0).to(tl.float32)
        place = parts + js.to(tl.int64)[:, None] * stride_k + columns * stride_c
        other = tl.load(place, mask=(js[:, None] < k) & inside, other=0).to(tl.float32)
        pulled = tl.sum(distance[:, None] * (own - other) + cosine[:, None] * other, 0)[None, :]
        total = tl.load(grad + own_row + columns * grad_f, mask=inside, other=0).to(tl.float32)
        tl.store(grad_parts + row * c + columns, total + pulled - turn * own, mask=inside)


@triton.jit
def _inverse_length(squared, least):
    longer = ~(squared <= least)
    return tl.where(longer, 1 / tl.sqrt_rn(tl.where(longer, squared, 1.0)), 0.0)


def configuration(k: int) -> dict[str, int]:
    """Return the blocks and warps for k parts, however long they are."""
    # Eight numbers of the tile a thread: with more, registers spill where nothing is aligned. The
    # length of parts does not choose, as each set of blocks is compiled for every GPU.
    block_k = power_of_two(k, 2, MAX_PARTS)
    block_c = min(max(1024 // block_k, 16), 128)
    warps = block_k * block_c // 256
    return {"BLOCK_K": block_k, "BLOCK_C": block_c, "num_warps": warps, **LAUNCH}


@torch.library.custom_op("partlocal::structure_correlation", mutates_args=())
def structure_correlation(parts: Tensor, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the descriptor [b, k, c + 2 (k - 1)] in `dtype` of `parts` [b, k, c].

    Args:
        parts: float32, float16 or bfloat16, with any strides.
        seen: [b, k], above 0 where a part is visible; None takes every part as it is.
        dtype: of the result.
    """
    b, k, c = parts.shape
    if k > MAX_PARTS:
        raise NotImplementedError(
            f"implementation='triton': structure_correlation takes at most {MAX_PARTS} parts; "
            f"got {k}: use implementation='auto' or 'torch'"
        )
    out = parts.new_empty((b, k, c + 2 * (k - 1)), dtype=dtype)
    given = parts if seen is None else seen.contiguous()
    with device_of(parts):
        forward_kernel[(b * k,)](
            parts, given, out, k, c, *parts.stride(), SEEN=seen is not None, **configuration(k)
        )
    return out


@structure_correlation.register_fake
def _(parts: Tensor, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    b, k, c = parts.shape
    return parts.new_empty((b, k, c + 2 * (k - 1)), dtype=dtype)


@torch.library.custom_op("partlocal::structure_correlation_backward", mutates_args=())
def structure_correlation_backward(grad: Tensor, parts: Tensor, seen: Tensor | None) -> Tensor:
    """Return the gradient of `parts`, in their dtype, given that of the descriptor."""
    b, k, c = parts.shape
    grad_parts = torch.empty_like(parts, memory_format=torch.contiguous_format)
    given = parts if seen is None else seen.contiguous()
    with device_of(parts):
        backward_kernel[(b * k,)](
            grad, parts, given, grad_parts, k, c, *grad.stride(), *parts.stride(),
            SEEN=seen is not None, **configuration(k),
        )  # fmt: skip
    return grad_parts


@structure_correlation_backward.register_fake
def _(grad: Tensor, parts: Tensor, seen: Tensor | None) -> Tensor:
    return torch.empty_like(parts, memory_format=torch.contiguous_format)


def gradient(grad: Tensor, parts: Tensor, seen: Tensor | None) -> Tensor:
    """Return what the backward kernel does in plain PyTorch, for second derivatives."""
    b, k, c = parts.shape
    wide, grad = parts.float(), grad.float()
    energy = wide.square().sum(2)
    nonzero = ~(energy <= NULL**2)
    inverse = torch.where(nonzero, torch.where(nonzero, energy, 1).rsqrt(), 0)
    apart = wide[:, :, None] - wide[:, None]
    squared = apart.square().sum(3)
    unequal = squared != 0
    inverse_distance = torch.where(unequal, torch.where(unequal, squared, 1).rsqrt(), 0)
    # k rows without their diagonal, read as k - 1 rows of k, lack one number at each end.
    both = grad[..., c:].reshape(b, k, k - 1, 2).permute(0, 3, 1, 2).reshape(b, 2, k - 1, k)
    both = F.pad(F.pad(both, (0, 1)).flatten(2), (1, 0)).unflatten(2, (k, k))
    distance, cosine = (both + both.mT).unbind(1)
    if seen is not None:
        present = (seen > 0) & nonzero
        pair = present[:, :, None] & present[:, None]
        distance, cosine = torch.where(pair, distance, 0), torch.where(pair, cosine, 0)
    unit = wide * inverse[..., None]
    turn = (cosine * (unit @ unit.mT)).sum(2, keepdim=True)
    pulled = ((distance * inverse_distance)[..., None] * apart).sum(2)
    turned = (cosine @ unit - turn * unit) * inverse[..., None]
    return (grad[..., :c] + pulled + turned).to(parts.dtype)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    parts, seen, _ = inputs
    ctx.save_for_backward(parts, seen)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    parts, seen = ctx.saved_tensors
    return structure_correlation_backward(grad, parts, seen), None, None


def _save_gradient(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    seen = ctx.saved_tensors[2]
    return *derive(lambda g, p: gradient(g, p, seen), ctx.saved_tensors[:2], grad), None


structure_correlation.register_autograd(_backward, setup_context=_save)
structure_correlation_backward.register_autograd(_second, setup_context=_save_gradient)
