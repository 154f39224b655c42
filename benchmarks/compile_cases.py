"""What is compiled: every set of blocks that a kernel's configuration can choose, with its flags.

For each operation a pairwise cover: every set of blocks meets every flag, dtype and layout, and so
do any two of these. An operation that is run launches its kernels; `compile_kernels` takes note.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/kernels"))
from cases import covering, lay_out

from partlocal.kernels import DTYPES
from partlocal.kernels import part_maps as mapping
from partlocal.kernels import part_mask_pool as pooling
from partlocal.kernels import structure_correlation as structure

Case = tuple[str, Callable[[], object]]
REGULAR, IRREGULAR = ["contiguous", "channels last"], ["sliced", "offset"]
LAYOUTS = [*REGULAR, "sliced"]  # sliced: nothing is aligned, and no size
POWERS = [2**i for i in range(11)]


def all_cases() -> Iterator[Case]:
    """Yield the names of all cases, and what runs them."""
    yield from maps_cases()
    yield from structure_cases()
    yield from pool_cases()
    yield from gradient_cases()


def shapes_of(configure: Callable[..., dict], *sizes: Iterable[int]) -> list[tuple[int, ...]]:
    """Return sizes that lead to each set of blocks: the largest, as a size of 1 is a special one.

    >>> shapes_of(lambda k: {"BLOCK_K": max(k, 4)}, [1, 2, 4, 8])
    [(8,), (4,)]
    """
    found: dict[tuple, tuple[int, ...]] = {}
    for shape in sorted(product(*sizes), key=prod, reverse=True):
        found.setdefault(tuple(configure(*shape).items()), shape)
    return list(found.values())


def odd(configure: Callable[..., dict], *sizes: int) -> tuple[int, ...]:
    """Return sizes that are multiples of nothing, with the blocks of the given powers of two."""
    larger = (*(max(size - 1, 1) for size in sizes[:-1]), 3 * sizes[-1] - 1)
    smaller = tuple(max(size - 1, 1) for size in sizes)
    same = (shape for shape in (larger, smaller) if configure(*shape) == configure(*sizes))
    return next(same, sizes)


def _cases(operation: str, run: Callable[..., object], **axes: Any) -> Iterator[Case]:
    allowed = axes.pop("allowed", lambda case: True)
    for case in covering(axes, allowed):
        axis = (f"{key}={str(value).removeprefix('torch.')}" for key, value in case.items())
        yield " ".join([operation, *axis]), partial(run, **case)


def maps_cases() -> Iterator[Case]:
    """Yield what runs `part_maps`: forward with the combination of peaks, and backward."""

    def run(kernel, shape, layout, dtype, activation, norm, over_parts, use_max):
        (n, cells), times = shape, 2
        if layout == "sliced":
            (n, cells), times = odd(partial(mapping.configuration, kernel), n, cells), 3
        logits = lay_out(torch.ones(2, n, 2 * times, cells * times, dtype=dtype), layout)
        labels, how = list(range(n)), (activation, norm, over_parts)
        if kernel == "forward":
            mapping.maps_and_peaks(logits, labels, [2, cells], *how, use_max, dtype)
            return
        maps, cell = logits.new_empty(2, n, 2, cells), torch.empty(2, n, 2, cells * use_max)
        peak = torch.empty(2, n)
        mapping.maps_backward(maps, peak, logits, cell.int(), peak.int(), labels, *how)

    for kernel, cells in ("forward", POWERS[4:6]), ("backward", [64]):
        yield from _cases(
            f"maps {kernel}",
            partial(run, kernel),
            shape=shapes_of(partial(mapping.configuration, kernel), POWERS[1:], cells),
            layout=LAYOUTS,
            dtype=DTYPES,
            activation=["softmax", "sigmoid", "none"],
            norm=["l2", "sum", "none"],
            over_parts=[False, True],
            use_max=[False, True],
        )


def structure_cases() -> Iterator[Case]:
    """Yield what runs `structure_correlation` and its gradient."""

    def run(shape, layout, dtype, seen):
        k, c = odd(structure.configuration, *shape) if layout == "sliced" else shape
        parts = lay_out(torch.ones(2, k, c, dtype=dtype), layout)
        given = None if seen is None else torch.ones(2, k, dtype=seen)
        out = structure.structure_correlation(parts, given, dtype)
        structure.structure_correlation_backward(lay_out(out, layout), parts, given)

    yield from _cases(
        "structure",
        run,
        shape=shapes_of(structure.configuration, POWERS[1:9], POWERS[4:]),
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
        (k,), c, side = odd(partial(pooling.configuration, kernel), k), 131, 7
    features = lay_out(torch.ones(1, c, side, side, dtype=dtype), layout)
    maps = lay_out(torch.ones(1, k, side, side), maps_layout)
    return [x.expand(b, -1, -1, -1) for x in (features, maps)]


def pool_cases() -> Iterator[Case]:
    """Yield what runs `part_mask_pool`: in one share of the cells, in shares, and plain sums."""

    def run(mode, shape, layout, maps_layout, dtype, normalize, programs):
        b = 1 if programs == "shares" else 256
        kernel = "max" if mode == "max" else "sum"
        features, maps = _features(kernel, *shape, layout, maps_layout, dtype, b)
        if programs == "plain":
            pooling.part_sums(features, maps)
        else:
            seen = torch.ones(maps.shape[:2])
            pooling.pool(features, maps, seen, mode, normalize, 0.0, 0.5)

    shares = {"layout": "contiguous", "maps_layout": "contiguous", "programs": "shares"}
    yield from _cases(
        "shares",
        partial(run, shape=(6,), dtype=torch.float32, **shares),
        mode=["sum", "mean", "max"],
        normalize=[False, True],
    )
    for modes, layouts in product((["sum", "mean"], ["max"]), (REGULAR, IRREGULAR)):
        yield from _cases(
            "pool",
            run,
            mode=modes,
            shape=shapes_of(partial(pooling.configuration, modes[0]), POWERS[:6]),
            layout=layouts,
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

    def spread(shape, layout, dtype, last):
        _, maps = _features("spread", *shape, layout, layout, dtype)
        pooling.spread_parts(torch.ones(2, maps.shape[1], channels(layout)), maps, dtype, last)

    def spread_cells(shape, layout, dtype, last):
        _, maps = _features("spread", *shape, layout, layout, dtype)
        sums = torch.ones(2, maps.shape[1], channels(layout))
        pooling.spread_maxima(sums, sums.int(), maps.shape[2:], dtype, last)

    def multiply(shape, layout, dtype):
        features, maps = _features("product", *shape, layout, "contiguous", dtype)
        pooling.part_products(torch.ones(2, maps.shape[1], features.shape[1]), features)

    def channels(layout):
        return 128 if layout in REGULAR else 131

    for run, layouts in product((spread, spread_cells), (REGULAR, IRREGULAR)):
        yield from _cases(
            run.__name__.replace("_", " "),
            run,
            shape=shapes_of(partial(pooling.configuration, "spread"), POWERS[:6]),
            layout=layouts,
            dtype=DTYPES,
            last=[False, True],
        )
    for layouts in REGULAR, IRREGULAR:
        yield from _cases(
            "product",
            multiply,
            shape=shapes_of(partial(pooling.configuration, "product"), POWERS[:6]),
            layout=layouts,
            dtype=DTYPES,
        )
