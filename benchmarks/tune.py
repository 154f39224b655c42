"""Time each kernel under other blocks than its configuration chooses, on the GPU at hand.

    python benchmarks/tune.py                  # every kernel: a table, and the best over all shapes
    python benchmarks/tune.py --only spread    # kernels whose name holds this text

What is found is written by hand into the functions `configuration` of partlocal/kernels: nothing is
tried while a program runs. A choice must also hold what tests/kernels/test_compilation.py asks.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from common import copies_beyond_cache, interleave
from rows import POOLED, draw, part_like
from torch import Tensor

from partlocal.kernels import negative_logsumexp as head
from partlocal.kernels import part_maps as mapping
from partlocal.kernels import part_mask_pool as pooling

SHAPES = [
    "face 28x28 (FSENet)", "face 28x28, large batch", "face 56x56", "face 14x14", "re-ID 16x8",
    "ViT 7x7, large batch", "ViT 16x16, 768 channels",
]  # fmt: skip
Run = Callable[..., Any]


class Kernel(NamedTuple):
    """A kernel, its configuration's module and key, and what may replace which blocks."""

    name: str
    module: ModuleType
    key: str
    axes: dict[str, list[int]]


KERNELS = [
    Kernel("sum", pooling, "sum", {
        "BLOCK_C": [64, 128], "BLOCK_P": [32, 64], "num_stages": [3, 4],
    }),
    Kernel("max", pooling, "max", {
        "BLOCK_K": [2, 4], "BLOCK_C": [16, 32, 64], "BLOCK_P": [8, 32], "num_warps": [2, 4],
    }),
    Kernel("spread", pooling, "spread", {
        "BLOCK_C": [16, 32, 64], "BLOCK_P": [32, 64, 128], "num_warps": [4],
    }),
    Kernel("product", pooling, "product", {
        "BLOCK_C": [16, 32], "BLOCK_P": [64, 128], "num_stages": [3, 4],
    }),
    Kernel("maps", mapping, "forward", {"BLOCK_X": [16, 32, 64], "num_warps": [1, 2]}),
    Kernel("maps backward", mapping, "backward", {"BLOCK_X": [16, 32, 64], "num_warps": [1, 2]}),
    Kernel("head sums", head, "tile", {"BLOCK_V": [64, 128, 256], "num_warps": [4, 8]}),
    Kernel("head gradients", head, "tile", {"BLOCK_V": [64, 128, 256], "num_warps": [4, 8]}),
]  # fmt: skip


def main() -> None:
    """Print the milliseconds of each candidate, and its mean time beside the configuration's."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="kernels whose name holds this text")
    options = parser.parse_args()
    device = torch.device("cuda")
    print("kernel", "shape", "dtype", "blocks", "ms", "ratio", sep="\t")
    best = []
    for kernel in KERNELS:
        if options.only not in kernel.name:
            continue
        ratios: dict[str, list[float]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            for shape, run, inputs in cases(kernel.name, dtype, device):
                for blocks, ms, ratio in candidates(kernel, run, inputs):
                    print(kernel.name, shape, str(dtype)[6:], blocks, f"{ms:.4f}", f"{ratio:.2f}",
                          sep="\t", flush=True)  # fmt: skip
                    ratios.setdefault(blocks, []).append(ratio)
        # Of what ran everywhere, by geometric mean.
        most = max(map(len, ratios.values()))
        means = {b: math.exp(statistics.fmean(map(math.log, x)))
                 for b, x in ratios.items() if len(x) == most}  # fmt: skip
        best += [(kernel.name, b, f"{m:.3f}") for b, m in sorted(means.items(), key=_second)[:4]]
    for line in best:
        print(*line, sep="\t")


def _second(pair: tuple[str, float]) -> float:
    return pair[1]


def candidates(
    kernel: Kernel, run: Run, inputs: list[tuple[Tensor, ...]]
) -> Iterator[tuple[str, float, float]]:
    """Yield blocks, milliseconds and the share of the configuration's; what fails is left out."""
    own, expected = _time(run, inputs), run(*inputs[0])
    yield "own", own, 1.0
    configure = kernel.module.configuration
    for values in product(*kernel.axes.values()):
        blocks = dict(zip(kernel.axes, values, strict=True))

        def choose(key: str, *args: Any, blocks: dict = blocks, **kwargs: Any) -> dict[str, int]:
            chosen = configure(key, *args, **kwargs)
            return chosen | blocks if key == kernel.key else chosen

        with patch.object(kernel.module, "configuration", choose):
            try:
                found, ms = run(*inputs[0]), _time(run, inputs)
            except Exception as error:  # such as more shared memory than there is
                print(f"# {kernel.name} {blocks}: {str(error).splitlines()[0][:80]}")
                continue
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=2e-2, atol=2e-2)
        yield " ".join(f"{k}={v}" for k, v in blocks.items()), ms, ms / own


def _time(run: Run, inputs: list[tuple[Tensor, ...]]) -> float:
    calls = [lambda x=x: run(*x) for x in inputs]
    times, _ = interleave({"": calls}, inputs[0][0].device, 7, 0.05)
    return statistics.median(times[""])


def cases(
    name: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Run, list[tuple[Tensor, ...]]]]:
    """Yield shapes, what runs the kernel, and rotated inputs; it returns a tuple of tensors."""
    if name.startswith("head"):
        yield from head_cases(name, dtype, device)
        return
    if name.startswith("maps"):
        labels, how = list(range(6)), ("softmax", "l2", False)
        for b, use_max in product((64, 256), (True, False)):
            logits = draw(dtype, device, b, 11, 128, 128)
            maps, cell, peak, at = mapping.maps_and_peaks(
                logits, labels, [28, 28], *how, use_max, dtype
            )

            def forward(x: Tensor, use_max: bool = use_max) -> tuple[Tensor, ...]:
                return mapping.maps_and_peaks(x, labels, [28, 28], *how, use_max, dtype)[:1]

            def backward(x: Tensor, *saved: Tensor) -> tuple[Tensor, ...]:
                return (mapping.maps_backward(*saved[:2], x, *saved[2:], labels, *how),)

            run = forward if name == "maps" else backward
            saved = () if name == "maps" else (maps, peak, cell, at)
            kind = "max" if use_max else "area"
            yield f"b={b} {kind}", run, [(x, *saved) for x in rotated(logits)]
        return
    for title in SHAPES:
        shape = POOLED[title]
        last = shape.layout == "NHWC"
        features = draw(dtype, device, shape.b, shape.c, shape.h, shape.w)
        if last:
            features = features.contiguous(memory_format=torch.channels_last)
        maps = part_like(shape.b, shape.k, shape.h, shape.w, device)
        seen = torch.ones(shape.b, shape.k, device=device)
        sums = draw(torch.float32, device, shape.b, shape.k, shape.c)
        if name == "spread":
            run = partial(_spread, sums, maps)
        elif name == "product":
            run = partial(_product, sums)
        else:
            run = partial(_pool, maps, seen, name)
        yield title, run, [(x,) for x in rotated(features)]


def _pool(maps: Tensor, seen: Tensor, mode: str, x: Tensor) -> tuple[Tensor, ...]:
    return pooling.pool(x, maps, seen, mode, True, 0.0, 0.5)[:1]


def _spread(sums: Tensor, maps: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return (pooling.spread_parts(sums, maps, x.dtype, pooling.is_channels_last(x)),)


def _product(sums: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return (pooling.part_products(sums, x),)


def head_cases(
    name: str, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Run, list[tuple[Tensor, ...]]]]:
    """Yield 100,000 classes, and 1,024 samples or few."""
    v, d = 100_000, 512
    weight = draw(dtype, device, v, d)
    for b in (1024, 128):
        x, targets = draw(dtype, device, b, d), torch.arange(b, device=device)
        lse, _ = head.sums(x, weight, targets, 64.0)

        def gradients(x: Tensor, targets: Tensor = targets, lse: Tensor = lse) -> tuple:
            return head.gradients(lse, lse, lse, x, weight, targets, 64.0, 2**28)

        run = gradients
        if name == "head sums":
            run = lambda x, targets=targets: head.sums(x, weight, targets, 64.0)  # noqa: E731
        yield f"v={v} b={b}", run, [(x,)]


def rotated(x: Tensor) -> list[Tensor]:
    """Return `x` and copies of it, so many that the cache holds none of the next one's."""
    return [x, *(x.clone() for _ in range(copies_beyond_cache(x.nbytes) - 1))]


if __name__ == "__main__":
    main()
