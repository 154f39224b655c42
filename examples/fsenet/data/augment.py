"""Random geometry and light for a batch; part maps, labels and points move with their pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from partlocal.labels import LabelSet, Parts

NUMBERS = 8  # that are drawn for a picture


@dataclass(frozen=True)
class Augmentation:
    """How far a training picture may be moved; zeros leave it where it is.

    Args:
        flip: share of mirrored pictures (left and right parts trade places).
        shift: largest move along each axis, as a share of the side.
        scale: largest change of size, as a share.
        rotation: largest turn, degrees.
        brightness: largest change of gain, as a share.
        contrast: largest change of contrast about the mean, as a share.
        grey: share of pictures that lose their colour.
    """

    flip: float = 0.5
    shift: float = 0.0
    scale: float = 0.0
    rotation: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    grey: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether pictures are resampled at all."""
        return any((self.shift, self.scale, self.rotation))


class Augmented(NamedTuple):
    """A batch as it is trained on.

    Args:
        images: floats in [0, 1], b 3 h w.
        maps: part maps or labels, moved as their pictures were.
        mirrored: which pictures were, b.
    """

    images: Tensor
    maps: Tensor | None
    mirrored: Tensor

    def swap(self, numbers: Tensor, parts: Parts) -> Tensor:
        """Return `b k`, one number a part, with left and right swapped where it was mirrored."""
        return torch.where(self.mirrored[:, None], numbers[:, parts.mirrored], numbers)


def augment(
    images: Tensor,
    maps: Tensor | None,
    names: LabelSet | Parts,
    how: Augmentation,
    numbers: Tensor,
) -> Augmented:
    """Change `images` (uint8, b 3 h w) and move `maps` alike.

    Args:
        images: the pictures.
        maps: part maps `b k hm wm` (floats, resampled bilinearly), a label map `b h w`
            (integers, nearest), or None.
        names: of the maps' channels or the label map's values, for the swap of left and right.
        how: the ranges.
        numbers: random ones in [0, 1), `NUMBERS b`; on the device, if nothing shall wait for it.
    """
    draw = numbers.to(images.device)
    pixels = images.float() / 255

    mirrored = _mirrored(draw, how)
    pixels = torch.where(mirrored.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
    if maps is not None:
        swap = mirrored.view(-1, *[1] * (maps.ndim - 1))
        maps = torch.where(swap, names.flip(maps), maps)

    if how.moves:
        matrix = _similarities(draw[1:5], how)
        pixels = _move(pixels, matrix, "bilinear", "border")
        if maps is not None and maps.is_floating_point():
            maps = _move(maps, matrix, "bilinear", "zeros")
        elif maps is not None:
            moved = _move(maps.unsqueeze(1).float(), matrix, "nearest", "border")
            maps = moved.squeeze(1).to(maps.dtype)

    if how.brightness or how.contrast:
        gain = (1 + how.brightness * (2 * draw[5] - 1)).view(-1, 1, 1, 1)
        contrast = (1 + how.contrast * (2 * draw[6] - 1)).view(-1, 1, 1, 1)
        mean = pixels.mean((1, 2, 3), keepdim=True)
        pixels = (((pixels - mean) * contrast + mean) * gain).clamp(0, 1)
    if how.grey:
        colourless = (draw[7] < how.grey).view(-1, 1, 1, 1)
        pixels = torch.where(colourless, pixels.mean(1, keepdim=True), pixels)
    return Augmented(pixels, maps, mirrored)


def move_points(
    points: Float[Tensor, "b n 2"],
    partners: Sequence[int],
    size: int,
    how: Augmentation,
    numbers: Float[Tensor, "m b"],
) -> Float[Tensor, "b n 2"]:
    """Move points as `augment` moves the pictures that they lie in, given the same `numbers`.

    >>> eyes = torch.tensor([[[2.0, 4.0], [6.0, 5.0]]])
    >>> move_points(eyes, [1, 0], 10, Augmentation(flip=1), torch.zeros(NUMBERS, 1))
    tensor([[[3., 5.],
             [7., 4.]]])

    Args:
        points: x, y in pixels; the centre of the first is (0, 0). They may leave the picture.
        partners: for each point, the one that takes its place in a mirrored picture.
        size: pixels of the pictures' side.
        how, numbers: as `augment` gets them.
    """
    draw = numbers.to(points.device)
    mirror = points[:, partners] * points.new_tensor([-1, 1]) + points.new_tensor([size - 1, 0])
    points = torch.where(_mirrored(draw, how).view(-1, 1, 1), mirror, points)
    if not how.moves:
        return points
    # The matrices say where each pixel comes from; points go the other way.
    matrix = _similarities(draw[1:5], how).to(points.dtype)
    turn, shift = matrix[:, :, :2], matrix[:, None, :, 2]
    at = (2 * points + 1) / size - 1 - shift
    at = at @ turn / turn[:, :, :1].square().sum(1, keepdim=True)  # its inverse: orthogonal columns
    return ((at + 1) * size - 1) / 2


def _mirrored(draw: Tensor, how: Augmentation) -> Tensor:
    return draw[0] < how.flip


def _similarities(draw: Tensor, how: Augmentation) -> Tensor:
    """Turn four uniform numbers a picture into the matrices of `affine_grid`."""
    dx, dy, size, turn = 2 * draw - 1
    size = 1 + how.scale * size
    angle = math.radians(how.rotation) * turn
    cos, sin = size * angle.cos(), size * angle.sin()
    x, y = 2 * how.shift * dx, 2 * how.shift * dy  # the grid's side is 2
    return torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)


def _move(x: Tensor, matrix: Tensor, mode: str, padding: str) -> Tensor:
    grid = F.affine_grid(matrix.to(x.dtype), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=False)
