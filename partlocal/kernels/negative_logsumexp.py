"""The sums over classes of `negative_logsumexp`, and their gradients, a tile of classes at a time.

With c = x.w / |x||w|, g_n the gradient of sample n's log-sum-exp N_n, h_n that of its own cosine:

    G_nv  = (g_n s exp(s c_nv - N_n), or h_n at the sample's own class) / (|x_n| |w_v|)
    dx_n  = P sum_v G_nv w_v        dw_v = P sum_n G_nv x_n

where P takes out the part along x_n, or w_v. So both gradients are products of one matrix with the
inputs as they are, in their own dtype, and no unit vectors are stored.

Forward: each program keeps the running maximum and sum of some samples over one share of the
classes; the shares are combined in order. Backward: for one chunk of classes after another a
program writes a tile of G, cuBLAS multiplies it from both sides, a last launch finishes the rows.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from partlocal.kernels import INTERPRETED
from partlocal.kernels.registration import LARGE, LAUNCH, device_of, power_of_two
from partlocal.numerics import NULL

MOST_BLOCKS = 65_535  # along the second axis of a grid
PROGRAMS = 528  # four for each multiprocessor of a large GPU


@triton.jit
def _cosines(
    x, w, inverse_x, inverse_w, row, first, b, v, d, stride_xb, stride_wv, stride_wd,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return the cosines of a tile of samples and classes, from `row` and `first` on."""
    product = tl.zeros([BLOCK_B, BLOCK_V], tl.float32)
    x += row.to(tl.int64) * stride_xb
    w += first.to(tl.int64) * stride_wv
    some, which = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_V)
    far = which.to(tl.int64)[:, None] * stride_wv
    for start in range(0, d, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D)
        place = some[:, None] * stride_xb + ds[None, :]
        left = tl.load(x + place, mask=(some[:, None] < b - row) & (ds[None, :] < d), other=0)
        place = far + ds.to(tl.int64)[None, :] * stride_wd
        right = tl.load(w + place, mask=(which[:, None] < v - first) & (ds[None, :] < d), other=0)
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        product = tl.dot(left, tl.trans(right), product, input_precision=PRECISION)
    rows, classes = row + some, first + which
    inverse = tl.load(inverse_w + classes, mask=classes < v, other=0)
    product *= tl.load(inverse_x + rows, mask=rows < b, other=0)[:, None]
    return product * inverse[None, :]


@triton.jit
def sums_kernel(
    x, w, inverse_x, inverse_w, targets, tops, totals, b, v, d, tiles, scale,
    stride_xb, stride_wv, stride_wd,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write maximum and sum over some tiles of classes; the grid is (blocks of samples, shares)."""
    row, share = tl.program_id(0) * BLOCK_B, tl.program_id(1)
    rows = row + tl.arange(0, BLOCK_B)
    own = tl.load(targets + rows, mask=rows < b, other=-1)
    top = tl.full([BLOCK_B], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_B], tl.float32)
    for tile in range(tiles):
        first = (share * tiles + tile) * BLOCK_V
        cosines = _cosines(
            x, w, inverse_x, inverse_w, row, first, b, v, d, stride_xb, stride_wv, stride_wd,
            UPCAST, PRECISION, BLOCK_B, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        classes = first + tl.arange(0, BLOCK_V)
        hidden = (classes[None, :] >= v) | (classes[None, :] == own[:, None])
        logits = tl.where(hidden, float("-inf"), cosines * scale)
        largest = tl.maximum(top, tl.max(logits, 1))
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = largest
    place = share.to(tl.int64) * b + rows
    tl.store(tops + place, top, mask=rows < b)
    tl.store(totals + place, total, mask=rows < b)


@triton.jit
def shares_kernel(
    x, w, inverse_x, inverse_w, targets, grad_lse, grad_cos, lse, out, first, b, v, d, scale,
    stride_xb, stride_wv, stride_wd, stride_out,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write a tile of G of one chunk, which begins at class `first`; the grid covers it."""
    row, column = tl.program_id(0) * BLOCK_B, tl.program_id(1) * BLOCK_V
    cosines = _cosines(
        x, w, inverse_x, inverse_w, row, column, b, v, d, stride_xb, stride_wv, stride_wd,
        UPCAST, PRECISION, BLOCK_B, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    rows, classes = row + tl.arange(0, BLOCK_B), column + tl.arange(0, BLOCK_V)
    inside = rows < b
    shift = tl.load(lse + rows, mask=inside, other=0)
    shift = tl.where(shift == float("-inf"), 0.0, shift)
    pull = tl.load(grad_lse + rows, mask=inside, other=0) * scale
    grad = tl.exp(cosines * scale - shift[:, None]) * pull[:, None]
    own = tl.load(targets + rows, mask=inside, other=-1) - first
    toward = tl.load(grad_cos + rows, mask=inside, other=0)
    grad = tl.where(classes[None, :] == own[:, None], toward[:, None], grad)
    grad *= tl.load(inverse_x + rows, mask=inside, other=0)[:, None]
    grad *= tl.load(inverse_w + classes, mask=classes < v, other=0)[None, :]
    place = rows.to(tl.int64)[:, None] * stride_out + classes[None, :]
    tl.store(out + place, grad, mask=inside[:, None] & (classes[None, :] < v))


@triton.jit
def rows_kernel(
    product, w, inverse_w, out, v, d, stride_wv, stride_wd,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the gradient of some rows: their product, less its part along the row."""
    classes = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = classes.to(tl.int64)[:, None]
    along = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, d, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D)[None, :]
        inside = (classes[:, None] < v) & (ds < d)
        row = tl.load(w + rows * stride_wv + ds.to(tl.int64) * stride_wd, mask=inside, other=0)
        grad = tl.load(product + rows * d + ds, mask=inside, other=0)
        along += tl.sum(row.to(tl.float32) * grad.to(tl.float32), 1)
    inverse = tl.load(inverse_w + classes, mask=classes < v, other=0)
    along *= inverse * inverse
    for start in range(0, d, BLOCK_D):
        ds = start + tl.arange(0, BLOCK_D)[None, :]
        inside = (classes[:, None] < v) & (ds < d)
        row = tl.load(w + rows * stride_wv + ds.to(tl.int64) * stride_wd, mask=inside, other=0)
        grad = tl.load(product + rows * d + ds, mask=inside, other=0).to(tl.float32)
        tl.store(out + rows * d + ds, grad - along[:, None] * row.to(tl.float32), mask=inside)


def configuration(kernel: str, b: int, half: bool = False, ahead: bool = True) -> dict[str, int]:
    """Return the blocks, warps and stages.

    Args:
        kernel: `"tile"`, of samples and classes, or `"rows"`.
        b: samples.
        half: whether products are taken in half precision.
        ahead: whether rows lie evenly, so that they can be loaded ahead of their use.
    """
    if kernel == "rows":
        return {"BLOCK_V": 8, "BLOCK_D": 128, "num_warps": 4, **LAUNCH}
    # The fastest on an H200 at 1,024 samples of those that spill no register on any target.
    most, block_v, block_d, warps, stages = 64, 64, 16, 8, 1
    if ahead:
        most, block_v, block_d, warps, stages = (
            (128, 128, 32, 4, 4) if half else (128, 64, 32, 8, 3)
        )
    block_b = power_of_two(b, 16, most)
    blocks = {"BLOCK_B": block_b, "BLOCK_V": block_v, "BLOCK_D": block_d}
    return blocks | {"num_warps": warps if block_b > 16 else 4, "num_stages": stages, **LARGE}


def sums(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the log-sum-exp over all classes but the target's, and the largest of its logits.

    Args:
        x: [b, d] in float32, float16 or bfloat16, with any strides.
        weight: [v, d], likewise.
        targets: [b], rows of `weight`, or -1 for samples without one.
        scale: of the cosines.
    """
    x = x.contiguous()  # the samples are few; the rows are read where they are
    (b, d), v = x.shape, weight.shape[0]
    how, blocks = _tiles(x, weight)
    of_samples, tiles = triton.cdiv(b, blocks["BLOCK_B"]), triton.cdiv(v, blocks["BLOCK_V"])
    each = max(1, triton.cdiv(tiles * of_samples, PROGRAMS))
    shares = max(1, triton.cdiv(tiles, each))
    tops, totals = (x.new_empty((shares, b), dtype=torch.float32) for _ in range(2))
    with device_of(x):
        sums_kernel[(of_samples, shares)](
            x, weight, _inverse_norms(x), _inverse_norms(weight), targets, tops, totals,
            b, v, d, each, float(scale), x.stride(0), *weight.stride(), **how, **blocks,
        )  # fmt: skip
    top = tops.amax(0)
    shift = top.masked_fill(top == -math.inf, 0)
    return (totals * (tops - shift).exp()).sum(0).log() + shift, top


def gradients(
    grad_lse: Tensor, grad_cos: Tensor, lse: Tensor, x: Tensor, weight: Tensor, targets: Tensor,
    scale: float, workspace: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return that of `x`, in float32 and with its part along `x`, and that of `weight`."""
    x = x.contiguous()
    (b, d), v = x.shape, weight.shape[0]
    how, blocks = _tiles(x, weight)
    finish = configuration("rows", b)
    # bfloat16 has the range of shares, which float16 has not.
    dtype = torch.bfloat16 if x.dtype == weight.dtype == torch.bfloat16 else torch.float32
    left, inverse_x, inverse_w = x.to(dtype), _inverse_norms(x), _inverse_norms(weight)
    grad_x = x.new_zeros((b, d), dtype=torch.float32)
    grad_weight = weight.new_empty((v, d))
    size = max(1, workspace // (dtype.itemsize * (b + 2 * d)))
    size = min(triton.cdiv(size, blocks["BLOCK_V"]), MOST_BLOCKS) * blocks["BLOCK_V"]
    share = x.new_empty((b, min(size, v)), dtype=dtype)
    for first in range(0, v, size):
        rows, inverse = weight[first : first + size], inverse_w[first : first + size]
        some = share[:, : len(rows)]
        grid = (triton.cdiv(b, blocks["BLOCK_B"]), triton.cdiv(len(rows), blocks["BLOCK_V"]))
        with device_of(x):
            shares_kernel[grid](
                x, rows, inverse_x, inverse, targets, grad_lse, grad_cos, lse, some, first,
                b, len(rows), d, float(scale), x.stride(0), *rows.stride(), share.stride(0),
                **how, **blocks,
            )  # fmt: skip
        _add_product(grad_x, some, rows.to(dtype))
        product, out = some.t() @ left, grad_weight[first : first + size]
        with device_of(x):
            rows_kernel[(triton.cdiv(len(rows), finish["BLOCK_V"]),)](
                product, rows, inverse, out, len(rows), d, *rows.stride(), **finish
            )
    return grad_x, grad_weight


def _tiles(x: Tensor, weight: Tensor) -> tuple[dict[str, object], dict[str, int]]:
    """Return in which precision products are taken, and the configuration of tiles.

    Equal halves are multiplied as they are, all else in float32, or TF32 where PyTorch may.
    """
    half = x.dtype == weight.dtype != torch.float32
    ahead = weight.stride(1) == 1 and weight.stride(0) % 8 == 0 and weight.data_ptr() % 16 == 0
    fast = _may_be_tf32() and not torch.version.hip
    exact = "ieee" if half or torch.version.hip else "tf32x3"  # as good as float32, and faster
    precision = "tf32" if fast and not half else exact
    # Triton's interpreter multiplies bfloat16 wrongly.
    how = {"UPCAST": not half or INTERPRETED, "PRECISION": precision}
    return how, configuration("tile", len(x), half, ahead and weight.shape[1] % 8 == 0)


def _may_be_tf32() -> bool:
    """Tell whether PyTorch may multiply float32 in TF32, however it was told so."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # the getter of old raises once this was set
        return matmul.fp32_precision == "tf32"
    return torch.get_float32_matmul_precision() != "highest"


def _inverse_norms(rows: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    null = norm <= NULL
    return norm.masked_fill(null, 1).reciprocal().masked_fill(null, 0)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to `total` in float32, which a GPU need not round to half precision first."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        total.add_(left @ right)
