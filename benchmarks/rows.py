"""What is timed: operations, shapes and inputs, and the least that each must read and compute."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import torch
from peers import head, pooling, structure
from peers.provider import Provider
from torch import Tensor

from partlocal.resize import Downsample


@dataclass(frozen=True)
class Shape:
    """Features `b c h w`, k parts, the layout in memory, and whether CPUs compile for it too."""

    b: int
    c: int
    h: int
    w: int
    k: int
    layout: str = "NCHW"
    compiled: bool = False


POOLED = {
    "face 56x56": Shape(64, 64, 56, 56, 6),
    "face 28x28 (FSENet)": Shape(64, 128, 28, 28, 6, compiled=True),
    "face 28x28 (FSENet), NHWC": Shape(64, 128, 28, 28, 6, "NHWC"),
    "face 28x28, large batch": Shape(256, 128, 28, 28, 6),
    "face 14x14": Shape(256, 256, 14, 14, 11),
    "face 28x28, 256 channels": Shape(64, 256, 28, 28, 11),
    "face 28x28, 512 channels": Shape(64, 512, 28, 28, 11),
    "re-ID 16x8": Shape(64, 2048, 16, 8, 8, compiled=True),
    "ViT 7x7": Shape(64, 384, 7, 7, 6, "NHWC", compiled=True),
    "ViT 7x7, large batch": Shape(256, 384, 7, 7, 6, "NHWC"),
    "ViT 7x7, 768 channels": Shape(64, 768, 7, 7, 6, "NHWC"),
    "ViT 16x16": Shape(64, 384, 16, 16, 6, "NHWC"),
    "ViT 16x16, 768 channels": Shape(64, 768, 16, 16, 6, "NHWC"),
    "open vocabulary 64x64": Shape(4, 256, 64, 64, 100, compiled=True),
}
# Mean and maximum give the maps no gradient but through their mass.
DIRECTIONS_OF = {
    "sum": ((), (True, False), (True, True)),
    "mean": ((), (True, False)),
    "max": ((), (True, False)),
}
QUICK = {
    "face 28x28 (FSENet)": Shape(16, 128, 28, 28, 6),
    "re-ID 16x8": Shape(8, 2048, 16, 8, 8),
    "ViT 7x7": Shape(64, 384, 7, 7, 6, "NHWC"),
    "open vocabulary 64x64": Shape(1, 256, 64, 64, 100),
}
CORRELATED = {"face": (6, 128), "all labels": (11, 256), "re-ID": (8, 2048), "many": (100, 256)}
DIRECTIONS = {
    (): "forward",
    (True,): "and backward",
    (True, False): "and backward",
    (True, True): "and backward, maps too",
    (True, True, False): "and backward",
}


@dataclass(frozen=True)
class Row:
    """One operation on one shape, in one direction.

    Args:
        operation: its name.
        shape: what kind of inputs, and their sizes.
        inputs: as they are timed.
        providers: who does it; the first is what the others are compared with.
        differentiable: which inputs get a gradient, when the backward is timed too.
        layout: of the features in memory.
        compiled: whether CPUs run the compiled ways too, which takes minutes; GPUs always do.
        values: numbers that must at least be read or written; 0 where nobody counted.
        flops: that must at least be computed.
        largest: numbers of every part x channel x cell, or sample x class.
        classes: of a head; its inputs are held against the oracle as a whole, or a million classes.
    """

    operation: str
    shape: str
    inputs: tuple[Tensor, ...]
    providers: list[Provider]
    differentiable: tuple[bool, ...] = ()
    layout: str = "NCHW"
    compiled: bool = False
    values: int = 0
    flops: int = 0
    largest: int = 0
    classes: int = 0

    @property
    def direction(self) -> str:
        """Forward alone, or with which gradients."""
        return DIRECTIONS[self.differentiable]


def all_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the rows of the operations; their inputs live as long as they are looked at."""
    for dtype in [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]:
        for name, shape in (QUICK if quick else POOLED).items():
            yield from pool_rows(name, shape, dtype, device, quick)
        batches = [16] if quick else [64, 256]
        for b in batches:
            yield from maps_rows(b, dtype, device)
        for name in ["face"] if quick else CORRELATED:
            for b in batches:
                yield from correlation_rows(name, b, dtype, device)
        for v, b in head_sizes(device, quick):
            yield from head_rows(v, b, dtype, device)


def head_sizes(device: torch.device, quick: bool) -> list[tuple[int, int]]:
    """Return numbers of classes and samples that the memory holds."""
    if quick:
        return [(10_000, 64)]
    if device.type == "cuda":
        return [(10_000, 1024), (100_000, 1024), (1_000_000, 1024), (10_000_000, 1024)]
    return [(10_000, 256), (100_000, 256), (1_000_000, 64)]


def head_rows(v: int, b: int, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Yield ArcFace's loss over v classes, forward and backward to embeddings and rows."""
    d = 512
    rng = torch.Generator(device).manual_seed(v)
    weight = torch.randn(v, d, generator=rng, device=device, dtype=dtype)
    labels = torch.randint(v, (b,), generator=rng, device=device)
    for wanted in ((), (True, True, False)):
        yield Row(
            "margin_softmax", f"v={v} b={b} d={d}", (draw(dtype, device, b, d), weight, labels),
            head.providers(device), wanted, compiled=v <= 100_000,
            values=v * d * (1 + bool(wanted)), flops=2 * b * v * d * (3 if wanted else 1),
            largest=b * v, classes=v,
        )  # fmt: skip


def pool_rows(
    name: str, shape: Shape, dtype: torch.dtype, device: torch.device, quick: bool = False
) -> Iterator[Row]:
    """Yield pooling by sum and by maximum; a quarter of a picture is a part's area."""
    b, c, h, w, k = shape.b, shape.c, shape.h, shape.w, shape.k
    features, maps = draw(dtype, device, b, c, h, w), part_like(b, k, h, w, device).to(dtype)
    if shape.layout == "NHWC":
        features = features.contiguous(memory_format=torch.channels_last)
    for mode, directions in DIRECTIONS_OF.items():
        if mode == "mean" and not shape.compiled:  # a sum but for its weights: not everywhere
            continue
        for wanted in directions[:2] if quick else directions:
            yield Row(
                f"part_mask_pool {mode}", f"{name}: b={b} c={c} k={k}", (features, maps),
                pooling.providers(mode, device, maps_too=wanted == (True, True)), wanted,
                shape.layout, shape.compiled,
                values=features.numel() * (1 + sum(wanted)) + maps.numel() + b * k * c,
                flops=2 * b * k * c * h * w * (1 + sum(wanted) * (mode != "max")),
                largest=b * k * c * h * w,
            )  # fmt: skip


def maps_rows(b: int, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Yield maps, and the chain of all layers, at FSENet's sizes."""
    n, k, c, side = 11, len(structure.PARTS), 128, 28
    logits, features = (
        3 * draw(dtype, device, b, n, 128, 128),
        draw(dtype, device, b, c, side, side),
    )
    maps, described = b * k * side**2, b * k * (c + 2 * (k - 1))
    for wanted in (False, True):
        times = 1 + wanted
        for downsample in get_args(Downsample):
            yield Row(
                f"part_maps {downsample}", f"b={b} n={n} 128x128 to 28x28 k={k}", (logits,),
                structure.maps_providers(device, downsample), (True,) * wanted, compiled=b == 64,
                values=logits.numel() * times + maps,
            )  # fmt: skip
        yield Row(
            "logits to descriptor", f"b={b} c={c} 28x28 k={k}", (features, logits),
            structure.chain_providers(device), (True, False) if wanted else (), compiled=b == 64,
            values=features.numel() * times + logits.numel() + described,
            flops=2 * b * k * c * side**2 * times, largest=b * k * c * side**2,
        )  # fmt: skip


def correlation_rows(name: str, b: int, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Yield the correlation of k parts of c numbers."""
    k, c = CORRELATED[name]
    b = b // 8 if k > 50 else b
    parts = draw(dtype, device, b, k, c)
    for wanted in ((), (True,)):
        yield Row(
            "structure_correlation", f"{name}: b={b} k={k} c={c}", (parts,),
            structure.correlation_providers(device), wanted, compiled=name == "face" and b == 64,
            values=(1 + len(wanted)) * b * k * (2 * c + 2 * (k - 1)),
            flops=5 * b * k * k * c // 2 * (1 + 2 * len(wanted)), largest=b * k * k * c,
        )  # fmt: skip


def draw(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    """Draw normal numbers, the same for the same shape."""
    rng = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=rng).to(device, dtype)


def part_like(b: int, k: int, h: int, w: int, device: torch.device) -> Tensor:
    """Return soft maps `b k h w`: a box of about a quarter of the picture at 0.9, the rest 0."""
    rng = torch.Generator().manual_seed(k)
    height, width = max(1, h // 2), max(1, w // 2)
    top = torch.randint(0, h - height + 1, (b, k, 1, 1), generator=rng)
    left = torch.randint(0, w - width + 1, (b, k, 1, 1), generator=rng)
    rows, columns = torch.arange(h)[:, None], torch.arange(w)
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    return (0.9 * inside).to(device)
