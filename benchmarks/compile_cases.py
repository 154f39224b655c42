"""What is compiled: every set of blocks that a kernel's configuration can choose, with its flags.

For each operation a pairwise cover: every set of blocks meets every flag, dtype and layout, and so
do any two of these. An operation that is run launches its kernels; `compile_kernels` takes note.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/kernels"))
from cases import covering, lay_out

from partlocal.kernels import DTYPES
from partlocal.kernels import negative_logsumexp as head
from partlocal.kernels import part_maps as mapping
from partlocal.kernels import part_mask_pool as pooling
from partlocal.kernels import structure_correlation as structure

Case = tuple[str, Callable[[], object]]
REGULAR, IRREGULAR = ["contiguous", "channels last"], ["sliced", "offset"]
LAYOUTS = [*REGULAR, "sliced"]  # sliced: no address is aligned, and no size even


def all_cases() -> Iterator[Case]:
    """Yield the names of all cases, and what runs them."""
    yield from maps_cases()
    yield from structure_cases()
    yield from pool_cases()
    yield from gradient_cases()
    yield from head_cases()


def sizes_of(configure: Callable[[int], dict], most: int) -> list[int]:
    """Return powers of two that lead to each set of blocks: the largest, as 1 is a special case.

    >>> sizes_of(lambda k: {"BLOCK_K": max(k, 4)}, most=8)
    [4, 8]
    """
    powers = [2**i for i in range(most.bit_length())]
    return list({tuple(configure(size).items()): size for size in powers}.values())


def odd(configure: Callable[[int], dict], size: int) -> int:
    """Return an odd size, one smaller, if it leads to the same blocks."""
    return size - 1 if size > 1 and configure(size - 1) == configure(size) else size


def _cases(operation: str, run: Callable[..., object], **axes: Any) -> Iterator[Case]:
    allowed = axes.pop("allowed", lambda case: True)
    for case in covering(axes, allowed):
        axis = (f"{key}={str(value).removeprefix('torch.')}" for key, value in case.items())
        yield " ".join([operation, *axis]), partial(run, **case)


def maps_cases() -> Iterator[Case]:
    """Yield what runs `part_maps`: forward with the combination of peaks, and backward."""

    def run(kernel, labels, layout, dtype, activation, norm, over_parts, use_max):
        (n, k), cells, times = labels, 32, 2
        if layout == "sliced":
            n, cells, times = odd(partial(mapping.configuration, kernel, k=k), n), 31, 3
        logits = lay_out(torch.ones(2, n, 2 * times, cells * times, dtype=dtype), layout)
        parts, how = list(range(min(k, n))), (activation, norm, over_parts)
        if kernel == "forward":
            mapping.maps_and_peaks(logits, parts, [2, cells], *how, use_max, dtype)
            return
        maps = logits.new_empty(2, len(parts), 2, cells)
        cell, peak = torch.empty(2, len(parts), 2, cells * use_max), torch.empty(2, len(parts))
        mapping.maps_backward(maps, peak, logits, cell.int(), peak.int(), parts, *how)

    powers = [2**i for i in range(11)]
    for kernel in "forward", "backward":
        sets = {
            tuple(mapping.configuration(kernel, n, k).items()): (n, k)
            for n, k in product(powers, powers)
            if k <= n
        }
        yield from _cases(
            f"maps {kernel}",
            partial(run, kernel),
            labels=list(sets.values()),
            layout=LAYOUTS,
            dtype=DTYPES,
            activation=["softmax", "sigmoid", "none"],
            norm=["l2", "sum", "none"],
            over_parts=[False, True],
            use_max=[False, True],
        )


def structure_cases() -> Iterator[Case]:
    """Yield what runs `structure_correlation` and its gradient."""

    def run(k, layout, dtype, seen):
        c = 128
        if layout == "sliced":
            k, c = odd(structure.configuration, k), 131
        parts = lay_out(torch.ones(2, k, c, dtype=dtype), layout)
        given = None if seen is None else torch.ones(2, k, dtype=seen)
        out = structure.structure_correlation(parts, given, dtype)
        structure.structure_correlation_backward(lay_out(out, layout), parts, given)

    yield from _cases(
        "structure",
        run,
        k=sizes_of(structure.configuration, 256),
        layout=LAYOUTS,
        dtype=DTYPES,
        seen=[None, torch.bool, torch.float32],
    )


def _features(
    kernel: str, k: int, layout: str, maps_layout: str, dtype: torch.dtype, b: int = 2
) -> list[torch.Tensor]:
    """Return features of FSENet's grid, or of an odd one, and maps."""
    c, side = 128, 28
    if layout not in REGULAR:
        k, c, side = odd(partial(pooling.configuration, kernel), k), 131, 7
    features = lay_out(torch.ones(1, c, side, side, dtype=dtype), layout)
    maps = lay_out(torch.ones(1, k, side, side), maps_layout)
    return [x.expand(b, -1, -1, -1) for x in (features, maps)]


def pool_cases() -> Iterator[Case]:
    """Yield what runs `part_mask_pool`: in one share of the cells, in shares, and plain sums."""

    def run(mode, of, maps_layout, dtype, normalize, programs):
        k, layout = of  # which choose the blocks together
        b = 1 if programs == "shares" else 256
        kernel = "max" if mode == "max" else "sum"
        features, maps = _features(kernel, k, layout, maps_layout, dtype, b)
        if programs == "plain":
            pooling.part_sums(features, maps)
        else:
            seen = torch.ones(maps.shape[:2])
            pooling.pool(features, maps, seen, mode, normalize, 0.0, 0.5)

    shares = {"of": (6, "contiguous"), "maps_layout": "contiguous", "programs": "shares"}
    yield from _cases(
        "shares",
        partial(run, dtype=torch.float32, **shares),
        mode=["sum", "mean", "max"],
        normalize=[False, True],
    )
    sums = ["sum", "mean"]
    for modes, layouts in (
        (sums, REGULAR),
        (sums, IRREGULAR),
        (["max"], [*REGULAR, *IRREGULAR]),
    ):
        yield from _cases(
            "pool",
            run,
            mode=modes,
            of=list(product(sizes_of(partial(pooling.configuration, modes[0]), 32), layouts)),
            maps_layout=["contiguous", "sliced"],
            dtype=DTYPES,
            normalize=[False, True],
            programs=["one share", "shares", "plain"],
            allowed=lambda case: (
                case["programs"] != "plain" or (case["mode"] == "sum" and not case["normalize"])
            ),
        )


def gradient_cases() -> Iterator[Case]:
    """Yield what runs the two products that are the gradients of `part_mask_pool`."""

    def spread(k, layout, dtype, last):
        _, maps = _features("spread", k, layout, layout, dtype)
        pooling.spread_parts(torch.ones(2, maps.shape[1], channels(layout)), maps, dtype, last)

    def spread_cells(k, layout, dtype, last):
        _, maps = _features("spread", k, layout, layout, dtype)
        sums = torch.ones(2, maps.shape[1], channels(layout))
        pooling.spread_maxima(sums, sums.int(), maps.shape[2:], dtype, last)

    def multiply(k, layout, dtype):
        features, maps = _features("product", k, layout, "contiguous", dtype)
        pooling.part_products(torch.ones(2, maps.shape[1], features.shape[1]), features)

    def channels(layout):
        return 128 if layout in REGULAR else 131

    for run, layouts in product((spread, spread_cells), (REGULAR, IRREGULAR)):
        yield from _cases(
            run.__name__.replace("_", " "),
            run,
            k=[*sizes_of(partial(pooling.configuration, "spread"), 32), 64],
            layout=layouts,
            dtype=DTYPES,
            last=[False, True],
        )
    for layouts in REGULAR, IRREGULAR:
        yield from _cases(
            "product",
            multiply,
            k=sizes_of(partial(pooling.configuration, "product"), 32),
            layout=layouts,
            dtype=DTYPES,
        )


def head_cases() -> Iterator[Case]:
    """Yield what runs `negative_logsumexp`: the sums, and all that its gradients take."""

    def run(b, layout, dtypes, precision):
        d, v = 512, 256
        if layout == "sliced":
            d, v = 131, 255
        x, weight = (
            lay_out(torch.ones(n, d, dtype=dtype), layout)
            for n, dtype in zip((b, v), dtypes, strict=True)
        )
        targets, number = torch.zeros(b, dtype=torch.long), torch.ones(b)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            head.sums(x, weight, targets, 64.0)
            head.gradients(number, number, number, x, weight, targets, 64.0, 2**20)
        finally:
            torch.set_float32_matmul_precision(before)

    halves = [(dtype, dtype) for dtype in DTYPES if dtype != torch.float32]
    mixed = [pair for pair in product(DTYPES, DTYPES) if pair not in halves]
    for dtypes, layouts in product((halves, mixed), (["contiguous"], IRREGULAR)):
        half, ahead = dtypes is halves, layouts == ["contiguous"]
        configure = partial(head.configuration, "tile", half=half, ahead=ahead)
        yield from _cases(
            "head",
            run,
            b=sizes_of(configure, 128),
            layout=layouts,
            dtypes=dtypes,
            precision=["highest"] if half else ["highest", "high"],
        )
