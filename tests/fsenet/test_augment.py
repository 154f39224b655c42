"""Augmentation: pictures, part maps, label maps and points move alike, as a slow oracle says."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.augment import NUMBERS, Augmentation, _similarities, augment, move_points
from data.batches import generator
from data.procedural import FLIP68
from kornia.geometry.linalg import transform_points
from kornia.geometry.transform import get_affine_matrix2d, warp_affine

from partlocal import HELEN
from partlocal.labels import FSENET_PARTS

PARTS = HELEN.select(*FSENET_PARTS)
STILL = Augmentation(flip=0)
FLIP = Augmentation(flip=1)
WILD = Augmentation(0.5, 0.1, 0.2, 20, 0.3, 0.3, 0.5)


def batch(b=4, size=32, seed=0):
    rng = generator(seed)
    images = torch.randint(0, 256, (b, 3, size, size), dtype=torch.uint8, generator=rng)
    maps = torch.rand(b, len(PARTS), size // 4, size // 4, generator=rng)
    labels = torch.randint(0, len(HELEN), (b, size, size), dtype=torch.uint8, generator=rng)
    return images, maps, labels


def numbers(seed, b=4):
    return torch.rand(NUMBERS, b, generator=generator(seed))


def test_example():
    """Mirrored: the left eye's map is where the right eye's was, mirrored; the nose keeps its."""
    images, maps, labels = batch()
    pixels, moved, _ = augment(images, maps, PARTS, FLIP, numbers(0))
    assert torch.equal(pixels, images.flip(-1).float() / 255)
    left, right, nose = (PARTS.names.index(n) for n in ("left_eye", "right_eye", "nose"))
    assert torch.equal(moved[:, left], maps[:, right].flip(-1))
    assert torch.equal(moved[:, right], maps[:, left].flip(-1))
    assert torch.equal(moved[:, nose], maps[:, nose].flip(-1))

    _, named, _ = augment(images, labels, HELEN, FLIP, numbers(0))
    assert named.dtype == torch.uint8
    for label, other in (("left_eye", "right_eye"), ("right_brow", "left_brow"), ("hair",) * 2):
        here, there = named == HELEN.index(label), labels.flip(-1) == HELEN.index(other)
        assert here.any()
        assert torch.equal(here, there)


def test_twice_mirrored_is_not_mirrored():
    images, maps, labels = batch()
    for what, names in ((maps, PARTS), (labels, HELEN)):
        pixels, once, _ = augment(images, what, names, FLIP, numbers(0))
        bytes_ = (pixels * 255).round().to(torch.uint8)
        again, twice, _ = augment(bytes_, once, names, FLIP, numbers(0))
        assert torch.equal(again, images.float() / 255)
        assert torch.equal(twice, what)


def test_zeros_change_nothing():
    images, maps, labels = batch()
    for what, names in ((maps, PARTS), (labels, HELEN), (None, PARTS)):
        pixels, same, _ = augment(images, what, names, STILL, numbers(0))
        assert torch.equal(pixels, images.float() / 255)
        assert same is None if what is None else torch.equal(same, what)


def test_the_share_of_mirrored_pictures():
    images = batch(400, 4)[0]
    pixels, _, told = augment(images, None, PARTS, Augmentation(flip=0.25), numbers(0, 400))
    mirrored = (pixels == images.flip(-1).float() / 255).flatten(1).all(1)
    unmoved = (pixels == images.float() / 255).flatten(1).all(1)
    assert (mirrored ^ unmoved).all()
    assert torch.equal(told, mirrored)
    assert 70 < mirrored.sum() < 130  # 100, four standard deviations


def test_swap():
    """One number a part is swapped as maps are whose every cell is that number."""
    how = Augmentation(flip=0.5, brightness=0.3, grey=0.5)
    visibility = torch.rand(40, len(PARTS), generator=generator(0))
    maps = visibility[:, :, None, None].expand(-1, -1, 4, 4)
    moved = augment(batch(40, 8)[0], maps, PARTS, how, numbers(7, 40))
    found = moved.swap(visibility, PARTS)
    assert torch.equal(found, moved.maps[..., 0, 0])
    assert 5 < (found != visibility).any(1).sum() < 35


def centroid(weights):
    """Rows and columns weighted, as shares of the side."""
    n = weights.shape[-1]
    at = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    total = weights.double().sum((-2, -1))
    return torch.stack(
        [(weights.double().sum(-2) * at).sum(-1), (weights.double().sum(-1) * at).sum(-1)], -1
    ) / total.unsqueeze(-1)


@pytest.mark.parametrize(
    "how",
    [
        replace(STILL, shift=0.1),
        replace(STILL, scale=0.2),
        replace(STILL, rotation=30),
        Augmentation(flip=0.5, shift=0.08, scale=0.15, rotation=20),
    ],
    ids=["shift", "scale", "rotation", "all"],
)
def test_pictures_maps_and_labels_move_alike(how):
    """A red blob, its map and its label are found in one place, which is another than before."""
    b, size = 16, 96
    at = torch.arange(size)
    blob = ((at[:, None] - 36) ** 2 + (at[None] - 58) ** 2 < 100).expand(b, size, size)
    images = torch.zeros(b, 3, size, size, dtype=torch.uint8)
    images[:, 0] = 255 * blob
    label, part = HELEN.index("nose"), PARTS.names.index("nose")  # no partner to trade places with
    labels = (label * blob).to(torch.uint8)
    maps = torch.zeros(b, len(PARTS), size // 4, size // 4)
    maps[:, part] = blob.float().view(b, size // 4, 4, size // 4, 4).mean((2, 4))

    pixels, moved, _ = augment(images, maps, PARTS, how, numbers(1, b))
    again, named, _ = augment(images, labels, HELEN, how, numbers(1, b))
    assert torch.equal(pixels, again)
    red = centroid(pixels[:, 0])
    assert (red - centroid(blob)).norm(dim=1).mean() > 0.01, "nothing moved"
    torch.testing.assert_close(centroid(moved[:, part]), red, atol=0.01, rtol=0)
    torch.testing.assert_close(centroid(named == label), red, atol=0.01, rtol=0)
    assert set(named.unique().tolist()) == {0, label}  # no label is blended out of two


def kornia_matrices(how, numbers, side):
    """For each pixel of a moved picture, where it comes from, in pixels."""
    dx, dy, size, turn = 2 * numbers[1:5] - 1
    return get_affine_matrix2d(
        how.shift * side * torch.stack([dx, dy], 1),
        torch.full((len(dx), 2), (side - 1) / 2),
        (1 + how.scale * size)[:, None].expand(-1, 2),
        how.rotation * turn,
    )


@pytest.mark.parametrize("flip", [0, 1])
def test_kornia_moves_them_alike(flip):
    """The same turn, size and shift in pixels, by kornia: pictures, part maps and label maps."""
    how = Augmentation(flip=flip, shift=0.1, scale=0.2, rotation=25)
    images, maps, labels = batch(6, 48)
    pixels, moved, _ = augment(images, maps, PARTS, how, numbers(7, 6))
    _, named, _ = augment(images, labels, HELEN, how, numbers(7, 6))

    def warp(x, mode, padding):
        side = x.shape[-1]
        back = kornia_matrices(how, numbers(7, 6), side)
        return warp_affine(x, back.inverse()[:, :2], (side, side), mode, padding, True)

    flipped = images.float() / 255, maps, labels
    if flip:
        flipped = flipped[0].flip(-1), PARTS.flip(maps), HELEN.flip(labels)
    expected = warp(flipped[0], "bilinear", "border")
    torch.testing.assert_close(pixels, expected, atol=2e-4, rtol=0)
    torch.testing.assert_close(moved, warp(flipped[1], "bilinear", "zeros"), atol=2e-4, rtol=0)
    nearest = warp(flipped[2][:, None].float(), "nearest", "border")[:, 0]
    assert (named == nearest).float().mean() > 0.999  # a sample may lie between two pixels
    assert (pixels - flipped[0]).abs().mean() > 0.1


@pytest.mark.parametrize("flip", [0, 1])
def test_kornia_moves_points_alike(flip):
    how = Augmentation(flip=flip, shift=0.1, scale=0.2, rotation=25)
    points = 48 * torch.rand(6, 5, 2, generator=generator(0))
    partners = [1, 0, 2, 4, 3]
    moved = move_points(points, partners, 48, how, numbers(7, 6))
    expected = points
    if flip:
        expected = torch.stack([47 - points[:, partners, 0], points[:, partners, 1]], 2)
    expected = transform_points(kornia_matrices(how, numbers(7, 6), 48).inverse(), expected)
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=0)
    assert (moved - points).norm(dim=2).mean() > 2


def test_points_are_found_again():
    """A dot is drawn at each point of a picture of its own, moved, and looked for."""
    how, size, b = Augmentation(flip=0.5, shift=0.08, scale=0.15, rotation=20), 64, 12
    points = 20 + 24 * torch.rand(b, 68, 2, generator=generator(0))
    moved = move_points(points, FLIP68.tolist(), size, how, numbers(3, b))
    seen = torch.empty(b, 68, 2)
    at = torch.arange(size)
    for n in range(68):
        x, y = points[:, n, 0, None, None], points[:, n, 1, None, None]
        dots = (-((at - x) ** 2 + (at[:, None] - y) ** 2) / 8).exp()
        images = (255 * dots).round().to(torch.uint8)[:, None].expand(-1, 3, -1, -1)
        pixels, _, mirrored = augment(images, None, HELEN, how, numbers(3, b))
        seen[:, n] = size * centroid(pixels[:, 0]) - 0.5
    assert 0 < mirrored.sum() < b
    seen[mirrored] = seen[mirrored][:, FLIP68]  # a dot does not know that it is on the right now
    torch.testing.assert_close(moved, seen, atol=0.1, rtol=0)
    assert (moved - points).norm(dim=2).mean() > 2


def test_points_mirrored_twice_are_where_they_were():
    points = 112 * torch.rand(4, 68, 2, generator=generator(0))
    once = move_points(points, FLIP68.tolist(), 112, FLIP, numbers(0))
    assert (once - points).norm(dim=2).mean() > 2
    again = move_points(once, FLIP68.tolist(), 112, FLIP, numbers(0))
    torch.testing.assert_close(again, points, atol=1e-4, rtol=0)
    assert torch.equal(move_points(points, FLIP68.tolist(), 112, STILL, numbers(0)), points)


def test_moves_stay_within_their_ranges():
    """Forty corners each, by hand: the matrix turns, scales and shifts by no more than asked."""
    how = Augmentation(shift=0.1, scale=0.2, rotation=15)
    draw = torch.rand(4, 2000, generator=generator(0))
    matrix = _similarities(draw, how).double()
    size = matrix[:, :, 0].norm(dim=1)
    angle = torch.atan2(matrix[:, 1, 0], matrix[:, 0, 0]) * 180 / math.pi
    for values, low, high in (
        (matrix[:, 0, 2] / 2, -0.1, 0.1),
        (matrix[:, 1, 2] / 2, -0.1, 0.1),
        (size, 0.8, 1.2),
        (angle, -15, 15),
    ):
        assert low - 1e-6 <= values.min() < low + (high - low) / 100
        assert high - (high - low) / 100 < values.max() <= high + 1e-6
    corner = np.array([[math.cos(0.1), -math.sin(0.1), 0.2], [math.sin(0.1), math.cos(0.1), -0.2]])
    how = Augmentation(shift=0.1, rotation=math.degrees(0.1))
    found = _similarities(torch.tensor([[1.0], [0.0], [0.3], [1.0]]), how)[0]
    np.testing.assert_allclose(found.numpy(), corner, atol=1e-6)


def test_light():
    """Gain and contrast keep the order of pixels and the mean's share; grey has no colour."""
    images = batch(64)[0] // 2 + 64  # nothing saturates
    before = images.float() / 255
    pixels, _, _ = augment(images, None, PARTS, replace(STILL, brightness=0.1), numbers(0, 64))
    gain = pixels.mean((1, 2, 3)) / before.mean((1, 2, 3))
    torch.testing.assert_close(pixels, before * gain.view(-1, 1, 1, 1))
    assert gain.min() >= 0.9 - 1e-4
    assert gain.max() <= 1.1 + 1e-4
    assert gain.max() - gain.min() > 0.15

    pixels, _, _ = augment(images, None, PARTS, replace(STILL, contrast=0.2), numbers(0, 64))
    torch.testing.assert_close(pixels.mean((1, 2, 3)), before.mean((1, 2, 3)))
    spread = pixels.std((1, 2, 3)) / before.std((1, 2, 3))
    assert 0.8 - 1e-4 <= spread.min() < 0.85 < 1.15 < spread.max() <= 1.2 + 1e-4

    pixels, _, _ = augment(images, None, PARTS, replace(STILL, grey=0.5), numbers(0, 64))
    grey = (pixels == pixels[:, :1]).flatten(1).all(1)
    assert 16 <= grey.sum() <= 48
    torch.testing.assert_close(pixels.mean(1), before.mean(1))
    assert torch.equal(pixels[~grey], before[~grey])

    images[:] = 250
    pixels, _, _ = augment(images, None, PARTS, replace(STILL, brightness=0.3), numbers(0, 64))
    assert pixels.max() == 1


def test_the_same_numbers_give_the_same_bits():
    images, maps, labels = batch()
    for what, names in ((maps, PARTS), (labels, HELEN)):
        runs = [augment(images, what, names, WILD, numbers(7)) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        other = augment(images, what, names, WILD, numbers(8))
        assert not torch.equal(other[0], runs[0][0])
        assert not torch.equal(other[1], runs[0][1])
    state = torch.get_rng_state()
    augment(images, maps, PARTS, WILD, numbers(7))
    assert torch.equal(torch.get_rng_state(), state), "the main generator was drawn from"


def test_a_share_of_a_batch():
    """A picture is changed in the same way whichever others are there."""
    images, maps, _ = batch(9)
    whole = augment(images, maps, PARTS, WILD, numbers(3, 9))
    part = augment(images[1::3], maps[1::3], PARTS, WILD, numbers(3, 9)[:, 1::3])
    for a, b in zip(part, whole, strict=True):
        torch.testing.assert_close(a, b[1::3], atol=1e-6, rtol=1e-5)
