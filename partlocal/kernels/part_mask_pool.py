"""`part_mask_pool` in one read of the features, and its gradients in one read or write of them.

For features F [c, p], maps M [k, p] and weights W (M itself for the sum, M >= threshold for the
mean) over the cells p of one image:

    parts[k,c] = scale[k] sum_p W[k,p] F[c,p]      scale[k] = 1 / (mass[k], number of cells, both)
    dF[c,p]    = sum_k W[k,p] gs[k,c]              gs = scale g, 0 where a part is absent
    dM[k,p]    = sum_c gs[k,c] F[c,p] + dmass[k]

`part_sums`, `spread_parts` and `part_products` are the sums over p, k and c of one product
W F S: the gradient of each is the other two, so that every order of derivative is a kernel. The
maximum keeps the cell it was found in, the first of equals, and hands its gradient there.

Features are read where they lie, whatever their strides. A program holds a block of channels and
of parts and runs over the cells, or over a share of them where a small batch would leave the GPU
idle; shares are combined in order by a second kernel. Sums are float32; no atomics: same input,
same bits.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from partlocal.kernels.registration import LARGE, LAUNCH, device_of, power_of_two

# Below so many programs the cells are shared out: about one for each multiprocessor of an H200.
# A constant, because the number of shares decides the order of the sum.
PROGRAMS = 128
SPREAD_PROGRAMS = 1024  # that keep it busy with writing


@triton.jit
def _cells(p, width, stride_h, stride_w, FLAT: tl.constexpr):
    """Return the offsets of cells; rows that follow each other evenly need no division."""
    if FLAT:
        return p.to(tl.int64) * stride_w
    return (p // width).to(tl.int64) * stride_h + (p % width).to(tl.int64) * stride_w


@triton.jit
def _scale_of(mass, count, seen, min_visibility, MODE: tl.constexpr, NORMALIZE: tl.constexpr):
    """Return what the total of each part is multiplied with; 0 where the part is absent."""
    # Not `>`, which is False for NaN: it must show up and not be an absence.
    present = ~((mass <= 1e-6) | (seen < min_visibility))
    divisor = tl.full(mass.shape, 1.0, tl.float32)
    if NORMALIZE:
        divisor = tl.where(present, mass, 1.0)
    if MODE != "sum":
        present = present & (count > 0)
    if MODE == "mean":
        divisor *= tl.where(present, count, 1.0)
    return tl.where(present, 1 / divisor, 0.0)


@triton.jit
def _add_product(left, right, total, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add left @ right to `total`.

    TF32 holds half precision; the other factor, SPLIT, comes as two numbers that it holds: 22 bits
    of 24.
    """
    if PRECISION == "tf32" and SPLIT == "left":
        high = (left.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(left - high, right, total, input_precision="tf32")
        left = high
    if PRECISION == "tf32" and SPLIT == "right":
        high = (right.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = tl.dot(left, right - high, total, input_precision="tf32")
        right = high
    return tl.dot(left, right, total, input_precision=PRECISION)


@triton.jit
def _better_of(tile, area, ps, total, cell):
    """Return the maximum under each part so far, and its cell, of each lane."""
    tile = tl.minimum(tile, float("inf"))[None, :, :]  # which passes NaN over, in one instruction
    better = area[:, None, :] & (tile > total)  # not >=: the first of equals
    return tl.where(better, tile, total), tl.where(better, ps[None, None, :], cell)


@triton.jit
def _best_of_lanes(total, cell, cells):
    """Return maxima and their cells as [channels, parts], the first of equals."""
    best = tl.max(total, 2)
    first = tl.min(tl.where(total == best[:, :, None], cell, cells), 2)
    return tl.trans(best), tl.trans(first)


@triton.jit
def pool_kernel(
    features, maps, seen, total_out, cell_out, mass_out, count_out,
    k, c, cells, width, splits, span, f_b, f_c, f_h, f_w, m_b, m_k, m_h, m_w,
    min_visibility, threshold, MODE: tl.constexpr, NORMALIZE: tl.constexpr, FINISH: tl.constexpr,
    FLAT_F: tl.constexpr, FLAT_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Pool a share of the cells; the grid is (b * splits * blocks of parts, blocks of channels).

    Programs of one share follow each other: what the first has read, the caches hold for the rest.

    With FINISH there is one share, and `count_out` takes the scale.
    """
    tiles = tl.cdiv(k, BLOCK_K)
    row = tl.program_id(0).to(tl.int64) // tiles
    image, split = row // splits, (row % splits).to(tl.int32)
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ks = tl.program_id(0) % tiles * BLOCK_K + tl.arange(0, BLOCK_K)
    features += image * f_b + cs.to(tl.int64)[:, None] * f_c
    maps += image * m_b + ks.to(tl.int64)[:, None] * m_k
    if FINISH:
        visible = tl.load(seen + image * k + ks, mask=ks < k, other=0)
    masses = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    counts = masses
    if MODE == "max":  # of each lane; the lanes are compared after the loop
        total = tl.full([BLOCK_K, BLOCK_C, BLOCK_P], float("-inf"), tl.float32)
        cell = tl.zeros([BLOCK_K, BLOCK_C, BLOCK_P], tl.int32)
    else:
        total = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
    for start in range(split * span, tl.minimum(split * span + span, cells), BLOCK_P):
        ps = start + tl.arange(0, BLOCK_P)
        inside = ps < cells
        place = features + _cells(ps, width, f_h, f_w, FLAT_F)[None, :]
        tile = tl.load(place, mask=(cs < c)[:, None] & inside[None, :], other=0).to(tl.float32)
        place = maps + _cells(ps, width, m_h, m_w, FLAT_M)[None, :]
        weight = tl.load(place, mask=(ks < k)[:, None] & inside[None, :], other=0).to(tl.float32)
        masses += weight
        if MODE != "sum":
            area = (weight >= threshold) & inside[None, :]
            weight = area.to(tl.float32)
            counts += weight
        if MODE == "max":
            total, cell = _better_of(tile, area, ps, total, cell)
        else:
            total = _add_product(tile, tl.trans(weight), total, "right", PRECISION)
    # Once, after the loop: Triton 3.8 fails on a sum of loaded values in it that is used twice.
    mass, count = tl.sum(masses, 1), tl.sum(counts, 1)
    write = (cs < c)[:, None] & (ks < k)[None, :]
    if MODE == "max":
        total, cell = _best_of_lanes(total, cell, cells)
        endless = (total == float("inf")) & write
        place = features + _cells(cell, width, f_h, f_w, FLAT_F)
        total = tl.where(endless, tl.load(place, mask=endless, other=0).to(tl.float32), total)
    if FINISH:
        count = _scale_of(mass, count, visible, min_visibility, MODE, NORMALIZE)
        total = tl.where(count[None, :] != 0, total, 0.0) * count[None, :]
    at = (row * k + ks)[None, :] * c + cs[:, None]
    tl.store(total_out + at, total, mask=write)
    if MODE == "max":
        tl.store(cell_out + at, cell, mask=write)
    if tl.program_id(1) == 0:
        tl.store(mass_out + row * k + ks, mass, mask=ks < k)
        tl.store(count_out + row * k + ks, count, mask=ks < k)


@triton.jit
def finish_kernel(
    totals, cells, masses, counts, seen, parts, cell_out, mass_out, scale_out,
    k, c, splits, min_visibility,
    MODE: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Combine the shares of one part in their order; the grid is (b * k, blocks of channels)."""
    row = tl.program_id(0).to(tl.int64)
    image, part = row // k, row % k
    cs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.full([BLOCK_C], float("-inf") if MODE == "max" else 0.0, tl.float32)
    cell = tl.zeros([BLOCK_C], tl.int32)
    mass = tl.zeros([1], tl.float32)
    count = tl.zeros([1], tl.float32)
    one = tl.arange(0, 1)
    for split in range(splits):
        share = (image * splits + split) * k + part
        mass += tl.load(masses + share + one)
        count += tl.load(counts + share + one)
        value = tl.load(totals + share * c + cs, mask=cs < c, other=0)
        if MODE == "max":
            better = (value > total) | ((value != value) & (total == total))
            total = tl.where(better, value, total)
            cell = tl.where(better, tl.load(cells + share * c + cs, mask=cs < c, other=0), cell)
        else:
            total += value
    visible = tl.load(seen + row + one)
    scale = _scale_of(mass, count, visible, min_visibility, MODE, NORMALIZE)
    tl.store(parts + row * c + cs, tl.where(scale != 0, total, 0.0) * scale, mask=cs < c)
    if MODE == "max":
        tl.store(cell_out + row * c + cs, cell, mask=cs < c)
    if tl.program_id(1) == 0:
        tl.store(mass_out + row + one, mass)
        tl.store(scale_out + row + one, scale)


@triton.jit
def _rows_of(place, ks, k, stride, inside):
    """Return rows ks in float32 of a matrix of which `place` is the first; 0 beyond the last."""
    mask = (ks < k)[:, None] & inside
    return tl.load(place + ks.to(tl.int64)[:, None] * stride, mask=mask, other=0).to(tl.float32)


@triton.jit
def spread_kernel(
    sums, maps, cells_of, out, k, c, cells, width, blocks, share, o_b, o_c, o_p,
    m_b, m_k, m_h, m_w,
    FROM_CELLS: tl.constexpr, WHOLE: tl.constexpr, FLAT_M: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write sum_k W[k,p] S[k,c] for some cells; the grid is (b * blocks of cells, shares of c).

    FROM_CELLS: W[k,p] is 1 where `cells_of[k,c]` is p, as the maximum needs it. WHOLE: a block
    holds all parts, whose weights are then read once.
    """
    row = tl.program_id(0).to(tl.int64)
    image, ps = row // blocks, (row % blocks).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    sums += image * k * c
    cells_of += image * k * c
    maps += image * m_b + _cells(ps, width, m_h, m_w, FLAT_M)[None, :]
    out += image * o_b + ps.to(tl.int64)[None, :] * o_p
    ks, inside = tl.arange(0, BLOCK_K), (ps < cells)[None, :]
    if WHOLE:
        weight = _rows_of(maps, ks, k, m_k, inside)
    first = tl.program_id(1) * share
    for channel in range(first, tl.minimum(first + share, c), BLOCK_C):
        cs = channel + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        if FROM_CELLS:
            for part in range(k):
                value = tl.load(sums + part * c + cs, mask=cs < c, other=0)
                cell = tl.load(cells_of + part * c + cs, mask=cs < c, other=0)
                total += tl.where(cell[:, None] == ps[None, :], value[:, None], 0.0)
        elif WHOLE:
            value = tl.trans(_rows_of(sums + cs[None, :], ks, k, c, (cs < c)[None, :]))
            total = tl.dot(value, weight, total, input_precision=PRECISION)
        else:
            for start in range(0, k, BLOCK_K):
                value = _rows_of(sums + cs[None, :], start + ks, k, c, (cs < c)[None, :])
                weight = _rows_of(maps, start + ks, k, m_k, inside)
                total = tl.dot(tl.trans(value), weight, total, input_precision=PRECISION)
        at = cs.to(tl.int64)[:, None] * o_c
        tl.store(out + at, total, mask=(cs < c)[:, None] & (ps < cells)[None, :])


@triton.jit
def product_kernel(
    sums, features, out, k, c, cells, width, blocks, f_b, f_c, f_h, f_w,
    FLAT_F: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write sum_c S[k,c] F[c,p] for a block; the grid is (b * blocks of cells, of parts)."""
    row = tl.program_id(0).to(tl.int64)
    image, ps = row // blocks, (row % blocks).to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = features + image * f_b + _cells(ps, width, f_h, f_w, FLAT_F)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    for start in range(0, c, BLOCK_C):
        cs = start + tl.arange(0, BLOCK_C)
        at = (image * k + ks)[:, None] * c + cs[None, :]
        value = tl.load(sums + at, mask=(ks < k)[:, None] & (cs < c)[None, :], other=0)
        mask = (cs < c)[:, None] & (ps < cells)[None, :]
        tile = tl.load(place + cs.to(tl.int64)[:, None] * f_c, mask=mask, other=0).to(tl.float32)
        total = _add_product(value, tile, total, "left", PRECISION)
    at = (image * k + ks)[:, None] * cells + ps[None, :]
    tl.store(out + at, total, mask=(ks < k)[:, None] & (ps < cells)[None, :])


def configuration(
    kernel: str, k: int = 1, regular: bool = True, last: bool = False
) -> dict[str, int]:
    """Return the blocks and warps of a kernel for k parts.

    Args:
        kernel: `"sum"` (the mean too), `"max"`, `"finish"`, `"spread"` or `"product"`.
        regular: whether what is read lies so that a thread may load 16 bytes at once.
        last: whether the channels of a cell lie side by side, for sum and maximum.
    """
    # The fastest for FSENet on an H200 that spill no register: benchmarks/tune.py. Channels and
    # cells do not choose, as each set of blocks is compiled for every GPU.
    if kernel == "finish":
        return {"BLOCK_C": 128, "num_warps": 4, **LAUNCH}
    least, most, block_c, block_p, warps = {
        "sum": (8, 32, 64, 64, 4),
        "max": (1, 2, 32, 32, 2),  # a tile of parts x channels x cells
        "spread": (16, 32, 32, 64, 4),
        "product": (16, 32, 32, 64, 4),
    }[kernel]
    if last and regular and kernel in ("sum", "max"):
        block_c, block_p = (128, 32) if kernel == "sum" else (64, 8)
    blocks = {"BLOCK_K": power_of_two(k, least, most), "BLOCK_C": block_c, "BLOCK_P": block_p}
    stages = {"num_stages": 4} if kernel == "product" else {}
    if not regular and kernel != "max":
        # To load ahead number by number takes more registers than there are.
        blocks["BLOCK_P"], stages = 32, {"num_stages": 1}
    return {**blocks, "num_warps": warps, **stages, **LARGE}


def _precision(dtype: torch.dtype) -> str:
    """Return how products with features in `dtype` keep the accuracy of float32."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


class _Grid(NamedTuple):
    """How a tensor lies in memory: strides of b, c, h and w, and what follows from them."""

    strides: tuple[int, ...]
    flat: bool  # the rows of cells follow each other evenly
    regular: bool  # flat, and aligned to 16 wherever it is not contiguous


def _grid_of(tensor: Tensor) -> _Grid:
    strides, (height, width) = tensor.stride(), tensor.shape[2:]
    flat = min(height, width) == 1 or strides[2] == width * strides[3]
    if width == 1:  # a column is a row
        strides = (*strides[:2], 0, strides[2])
    steps = (tensor.data_ptr(), strides[0], strides[1], strides[3])
    return _Grid(strides, flat, flat and all(step == 1 or step % 16 == 0 for step in steps))


def _pool(
    features: Tensor, maps: Tensor, seen: Tensor | None, mode: str, normalize: bool,
    min_visibility: float, threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launch the pooling; without `seen` return plain totals and a scale that means nothing."""
    b, c, h, w = features.shape
    k = maps.shape[1]
    feature_grid, map_grid = _grid_of(features), _grid_of(maps)
    last = is_channels_last(features)
    blocks = configuration("max" if mode == "max" else "sum", k, feature_grid.regular, last)
    tiles = triton.cdiv(c, blocks["BLOCK_C"]), triton.cdiv(k, blocks["BLOCK_K"])
    steps = triton.cdiv(h * w, blocks["BLOCK_P"])
    span = triton.cdiv(steps, min(steps, triton.cdiv(PROGRAMS, b * tiles[0] * tiles[1])))
    splits = triton.cdiv(steps, span)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return features.new_empty(shape, dtype=dtype)

    parts, mass, scale = new(b, k, c), new(b, k), new(b, k)
    cell = new(b, k, c if mode == "max" else 0, dtype=torch.int32)
    given = maps if seen is None else seen
    outputs = (parts, cell, mass, scale)
    finish = splits == 1 and seen is not None
    if splits > 1:
        shares = new(b, splits, k, c), new(b, splits, *cell.shape[1:], dtype=torch.int32)
        outputs = (*shares, new(b, splits, k), new(b, splits, k))
    grid = (b * splits * tiles[1], tiles[0])
    with device_of(features):
        pool_kernel[grid](
            features, maps, given, *outputs, k, c, h * w, w, splits, span * blocks["BLOCK_P"],
            *feature_grid.strides, *map_grid.strides, min_visibility, threshold,
            MODE=mode, NORMALIZE=normalize, FINISH=finish,
            FLAT_F=feature_grid.flat, FLAT_M=map_grid.flat, PRECISION=_precision(features.dtype),
            **blocks,
        )  # fmt: skip
        if splits > 1 and seen is not None:
            blocks = configuration("finish")
            finish_kernel[(b * k, triton.cdiv(c, blocks["BLOCK_C"]))](
                *outputs, seen, parts, cell, mass, scale, k, c, splits, min_visibility,
                MODE=mode, NORMALIZE=normalize, **blocks,
            )  # fmt: skip
    if seen is None and splits > 1:
        parts = outputs[0].sum(1)
    return parts, mass, scale, cell


@torch.library.custom_op("partlocal::part_mask_pool", mutates_args=())
def pool(
    features: Tensor, maps: Tensor, seen: Tensor, mode: str, normalize: bool,
    min_visibility: float, threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return parts [b, k, c] and mass [b, k] in float32, and what the gradient needs.

    Args:
        features: [b, c, h, w] in float32, float16 or bfloat16, with any strides.
        maps: float32 on the grid of the features, with any strides.
        seen: the visibility [b, k] in float32.
        mode, normalize, min_visibility, threshold: as in `partlocal.part_mask_pool`.

    Returns:
        parts, mass, the scale of each part, and the cell of each maximum (else nothing).
    """
    return _pool(features, maps, seen.contiguous(), mode, normalize, min_visibility, threshold)


@pool.register_fake
def _(
    features: Tensor, maps: Tensor, seen: Tensor, mode: str, normalize: bool,
    min_visibility: float, threshold: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (b, k), c = maps.shape[:2], features.shape[1]
    mass = maps.new_empty((b, k), dtype=torch.float32)
    parts = maps.new_empty((b, k, c), dtype=torch.float32)
    cell = maps.new_empty((b, k, c if mode == "max" else 0), dtype=torch.int32)
    return parts, mass, torch.empty_like(mass), cell


@torch.library.custom_op("partlocal::part_sums", mutates_args=())
def part_sums(features: Tensor, weights: Tensor) -> Tensor:
    """Return sum_p W[k,p] F[c,p] as [b, k, c] in float32."""
    return _pool(features, weights, None, "sum", False, 0.0, 0.0)[0]


@part_sums.register_fake
def _(features: Tensor, weights: Tensor) -> Tensor:
    shape = (*weights.shape[:2], features.shape[1])
    return features.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("partlocal::part_products", mutates_args=())
def part_products(sums: Tensor, features: Tensor) -> Tensor:
    """Return sum_c S[k,c] F[c,p] as [b, k, h, w] in float32."""
    (b, c, h, w), k = features.shape, sums.shape[1]
    out = features.new_empty((b, k, h, w), dtype=torch.float32)
    grid = _grid_of(features)
    blocks = configuration("product", k, grid.regular)
    steps = triton.cdiv(h * w, blocks["BLOCK_P"])
    with device_of(features):
        product_kernel[(b * steps, triton.cdiv(k, blocks["BLOCK_K"]))](
            sums.contiguous(), features, out, k, c, h * w, w, steps, *grid.strides,
            FLAT_F=grid.flat, PRECISION=_precision(features.dtype), **blocks,
        )  # fmt: skip
    return out


@part_products.register_fake
def _(sums: Tensor, features: Tensor) -> Tensor:
    b, _, h, w = features.shape
    return features.new_empty((b, sums.shape[1], h, w), dtype=torch.float32)


@torch.library.custom_op("partlocal::spread_parts", mutates_args=())
def spread_parts(sums: Tensor, weights: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Return sum_k W[k,p] S[k,c] as [b, c, h, w] in `dtype`."""
    out = _like_features(sums, weights.shape[2:], dtype, channels_last)
    grid = _grid_of(weights)
    _spread(sums, weights, sums, out, grid)
    return out


@spread_parts.register_fake
def _(sums: Tensor, weights: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    return _like_features(sums, weights.shape[2:], dtype, channels_last)


@torch.library.custom_op("partlocal::spread_maxima", mutates_args=())
def spread_maxima(
    sums: Tensor, cell: Tensor, size: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    """Return S[k,c] added to the cell of each maximum as [b, c, h, w] in `dtype`."""
    out = _like_features(sums, size, dtype, channels_last)
    _spread(sums, sums, cell, out, None)
    return out


@spread_maxima.register_fake
def _(
    sums: Tensor, cell: Tensor, size: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    return _like_features(sums, size, dtype, channels_last)


def _like_features(
    sums: Tensor, size: Sequence[int], dtype: torch.dtype, channels_last: bool
) -> Tensor:
    b, _, c = sums.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (b, c, *size)
    return torch.empty(shape, dtype=dtype, device=sums.device, memory_format=layout)


def _spread(sums: Tensor, weights: Tensor, cell: Tensor, out: Tensor, grid: _Grid | None) -> None:
    (b, c, h, w), k = out.shape, sums.shape[1]
    blocks = configuration("spread", k, grid is None or grid.regular)
    steps, tiles = triton.cdiv(h * w, blocks["BLOCK_P"]), triton.cdiv(c, blocks["BLOCK_C"])
    # As many channels a program as keep the GPU busy: what a cell has under maps is read once.
    each = max(1, tiles * b * steps // SPREAD_PROGRAMS)
    strides = (0, 0, 0, 0) if grid is None else grid.strides
    precision = _precision(torch.float32 if out.dtype == torch.float16 else out.dtype)
    with device_of(sums):
        spread_kernel[(b * steps, triton.cdiv(tiles, each))](
            sums.contiguous(), weights, cell.contiguous(), out, k, c, h * w, w, steps,
            each * blocks["BLOCK_C"], out.stride(0), out.stride(1),
            1 if out.stride(1) != 1 else c, *strides, FROM_CELLS=grid is None,
            WHOLE=grid is not None and k <= blocks["BLOCK_K"],
            FLAT_M=grid is None or grid.flat, PRECISION=precision, **blocks,
        )  # fmt: skip


def is_channels_last(features: Tensor) -> bool:
    """Whether the channels of a cell lie side by side; the gradient is laid out alike."""
    return features.stride(1) == 1 and features.shape[1] > 1


def _save_pool(ctx: Any, inputs: tuple, output: tuple) -> None:
    features, maps, _, ctx.mode, ctx.normalize, _, ctx.threshold = inputs
    parts, mass, scale, cell = output
    ctx.size, ctx.dtype = features.shape[2:], features.dtype
    ctx.channels_last = is_channels_last(features)
    # Frozen maps keep no features.
    read = features if ctx.mode == "sum" and ctx.needs_input_grad[1] else None
    ctx.save_for_backward(read, maps, parts, mass, scale, cell)


def _pool_backward(
    ctx: Any, grad: Tensor, grad_mass: Tensor, grad_scale: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    features, maps, parts, mass, scale, cell = ctx.saved_tensors
    scaled = grad * scale[..., None]
    weights = maps if ctx.mode == "sum" else (maps >= ctx.threshold).to(maps.dtype)
    to_features = to_maps = None
    if ctx.needs_input_grad[0] and ctx.mode == "max":
        to_features = spread_maxima(scaled, cell, ctx.size, ctx.dtype, ctx.channels_last)
    elif ctx.needs_input_grad[0]:
        to_features = spread_parts(scaled, weights, ctx.dtype, ctx.channels_last)
    if ctx.needs_input_grad[1]:
        of_mass = grad_mass
        if ctx.normalize:  # parts and scale both go as 1 / mass
            present = scale != 0
            through = (grad * parts).sum(2) + grad_scale * scale
            of_mass = of_mass - torch.where(present, through / torch.where(present, mass, 1), 0)
        to_maps = of_mass[..., None, None].expand(maps.shape)
        if ctx.mode == "sum":
            to_maps = to_maps + part_products(scaled, features)
    return to_features, to_maps, None, None, None, None, None


def _save_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    features, weights = ctx.saved_tensors
    to_features = spread_parts(grad, weights, features.dtype, is_channels_last(features))
    return to_features, part_products(grad, features)


def _products_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sums, features = ctx.saved_tensors
    to_features = spread_parts(sums, grad, features.dtype, is_channels_last(features))
    return part_sums(features, grad), to_features


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sums, weights = ctx.saved_tensors
    return part_sums(grad, weights), part_products(sums, grad), None, None


def _maxima_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    sums, cell = ctx.saved_tensors
    picked = grad.flatten(2).gather(2, cell.mT.long()).mT
    return picked.to(sums.dtype), None, None, None, None


pool.register_autograd(_pool_backward, setup_context=_save_pool)
part_sums.register_autograd(_sums_backward, setup_context=_save_inputs)
part_products.register_autograd(_products_backward, setup_context=_save_inputs)
spread_parts.register_autograd(_spread_backward, setup_context=_save_inputs)
spread_maxima.register_autograd(_maxima_backward, setup_context=_save_inputs)
