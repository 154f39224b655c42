"""What is timed: operations, shapes and inputs, and the least that each must read and compute."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peers import pooling, structure
from peers.provider import Provider
from torch import Tensor

# name: b, c, h, w, k
POOLED = {
    "face 56x56": (64, 64, 56, 56, 6),
    "face 28x28 (FSENet)": (64, 128, 28, 28, 6),
    "face 28x28, large batch": (256, 128, 28, 28, 6),
    "face 14x14": (64, 256, 14, 14, 11),
    "face 28x28, 256 channels": (64, 256, 28, 28, 11),
    "face 28x28, 512 channels": (64, 512, 28, 28, 11),
    "re-ID 16x8": (64, 2048, 16, 8, 8),
    "ViT 7x7": (64, 384, 7, 7, 6),
    "ViT 16x16": (64, 768, 16, 16, 6),
    "open vocabulary 64x64": (4, 256, 64, 64, 100),
}
DIRECTIONS = {
    (): "forward",
    (True,): "forward and backward",
    (True, False): "forward and backward",
    (True, True): "forward and backward to maps too",
}
QUICK = ("face 28x28 (FSENet)", "re-ID 16x8", "ViT 7x7", "open vocabulary 64x64")


@dataclass(frozen=True)
class Row:
    """One operation on one shape, in one direction.

    Args:
        operation: its name.
        shape: what kind of inputs, and their sizes.
        inputs: as they are timed.
        providers: who does it; the first is what the others are compared with.
        differentiable: which inputs get a gradient, when the backward is timed too.
        values: numbers that must at least be read or written; 0 where nobody counted.
        flops: that must at least be computed.
        largest: numbers of every part x channel x cell.
    """

    operation: str
    shape: str
    inputs: tuple[Tensor, ...]
    providers: list[Provider]
    differentiable: tuple[bool, ...] = ()
    values: int = 0
    flops: int = 0
    largest: int = 0


def all_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield the rows of the operations; their inputs live as long as they are looked at."""
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    for dtype in dtypes:
        for name in QUICK if quick else POOLED:
            yield from pool_rows(name, dtype, device)
        for b in [64] if quick else [64, 256]:
            yield from structure_rows(b, dtype, device)


def pool_rows(name: str, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Yield pooling by sum and by maximum; a quarter of a picture is a part's area."""
    b, c, h, w, k = POOLED[name]
    features, maps = draw(dtype, device, b, c, h, w), part_like(b, k, h, w, device)
    shape = f"{name}: b={b} c={c} k={k} {str(dtype)[6:]}"
    for mode in ("sum", "max"):
        for wanted in ((), (True, False), (True, True)):
            yield Row(
                f"part_mask_pool {mode}, {DIRECTIONS[wanted]}", shape, (features, maps),
                pooling.providers(mode, maps_too=wanted == (True, True)), wanted,
                values=features.numel() * (1 + sum(wanted)) + maps.numel() + b * k * c,
                flops=2 * b * k * c * h * w * (1 + sum(wanted) * (mode == "sum")),
                largest=b * k * c * h * w,
            )  # fmt: skip


def structure_rows(b: int, dtype: torch.dtype, device: torch.device) -> Iterator[Row]:
    """Yield maps, correlation and the chain of all layers at FSENet's sizes."""
    n, k, c, side = 11, len(structure.PARTS), 128, 28
    logits = 3 * draw(dtype, device, b, n, 128, 128)
    features, parts = draw(dtype, device, b, c, side, side), draw(dtype, device, b, k, c)
    maps, described = b * k * side**2, b * k * (c + 2 * (k - 1))
    kind = str(dtype)[6:]
    for wanted in (False, True):
        times, direction = 1 + wanted, DIRECTIONS[(True,) if wanted else ()]
        yield Row(
            f"part_maps, {direction}", f"b={b} n={n} 128x128 to 28x28 k={k} {kind}", (logits,),
            structure.MAPS, (True,) * wanted, logits.numel() * times + maps,
        )  # fmt: skip
        yield Row(
            f"structure_correlation, {direction}", f"b={b} k={k} c={c} {kind}", (parts,),
            structure.STRUCTURE, (True,) * wanted, times * (parts.numel() + described),
        )  # fmt: skip
        yield Row(
            f"logits to descriptor, {direction}", f"b={b} c={c} 28x28 k={k} {kind}",
            (features, logits), structure.CHAIN, (True, False) if wanted else (),
            features.numel() * times + logits.numel() + described,
            2 * b * k * c * side**2 * times, largest=b * k * c * side**2,
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
