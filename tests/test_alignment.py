import inspect
import io
import math
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from partlocal.alignment import ARCFACE_TEMPLATE, align_faces, similarity_from_points

TEMPLATE = torch.tensor(ARCFACE_TEMPLATE, dtype=torch.float64)
needs_kornia = pytest.mark.skipif(find_spec("kornia") is None, reason="kornia is not there")
DATA = Path(__file__).parents[1] / "../shared/data"


def matrix(scale, angle, x, y):
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[cosine, -sine, x], [sine, cosine, y]], dtype=torch.float64)


def apply(matrices, points):
    return points @ matrices[..., :2].mT + matrices[..., None, :, 2]


def random_points(seed, batch=3, count=5):
    generator = torch.Generator().manual_seed(seed)
    return 100 * torch.rand(batch, count, 2, generator=generator, dtype=torch.float64)


def umeyama(source, target):
    """The general solution, through a singular value decomposition that forbids reflections."""
    source, target = source.numpy(), target.numpy()
    from_centre, to_centre = source.mean(0), target.mean(0)
    a, b = source - from_centre, target - to_centre
    u, d, v = np.linalg.svd(b.T @ a / len(a))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(v))])
    rotation = u @ np.diag(sign) @ v
    scale = (d * sign).sum() / a.var(0).sum()
    shift = to_centre - scale * rotation @ from_centre
    return np.concatenate([scale * rotation, shift[:, None]], 1)


def test_example():
    source = torch.tensor([[[1.0, 1.0], [3.0, 1.0]]])
    target = torch.tensor([[10.0, 10.0], [10.0, 14.0]])  # turned by 90 degrees, twice as big
    expected = torch.tensor([[[0.0, -2.0, 12.0], [2.0, 0.0, 8.0]]])
    torch.testing.assert_close(similarity_from_points(source, target), expected)


@given(
    st.floats(0.05, 20),
    st.floats(-math.pi, math.pi),
    st.floats(-500, 500),
    st.floats(-500, 500),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_properties(scale, angle, x, y, seed):
    """A known similarity is recovered, and undone by the opposite fit."""
    points = random_points(seed, count=2 + seed % 5)
    expected = matrix(scale, angle, x, y)
    moved = apply(expected, points)
    found = similarity_from_points(points, moved)
    torch.testing.assert_close(found, expected.expand(3, 2, 3), rtol=1e-9, atol=1e-7)
    back = similarity_from_points(moved, points)
    torch.testing.assert_close(apply(back, moved), points, rtol=1e-9, atol=1e-7)
    order = torch.randperm(points.shape[1])
    again = similarity_from_points(points[:, order], moved[:, order])
    torch.testing.assert_close(again, found, rtol=1e-9, atol=1e-7)


@given(st.integers(0, 10_000), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_reference(seed, count):
    """Points that no similarity fits, reflected ones among them."""
    source, target = random_points(seed, 4, count), random_points(seed + 1, 4, count)
    target[0] = source[0] * torch.tensor([-1.0, 1.0]) + 0.1 * target[0]
    # With a nearly singular covariance the two algorithms round differently.
    found = similarity_from_points(source, target)
    assume((found[:, :, :2].abs().amax((1, 2)) > 1e-3).all())
    for i in range(4):
        np.testing.assert_allclose(found[i], umeyama(source[i], target[i]), rtol=1e-6, atol=1e-6)
        columns = [[[x, -y, 1, 0], [y, x, 0, 1]] for x, y in source[i].tolist()]
        system = np.array(columns).reshape(-1, 4)
        solution = np.linalg.lstsq(system, target[i].numpy().reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(found[i, 0, 0], solution[0], atol=1e-8)
        np.testing.assert_allclose(found[i, 1, 0], solution[1], atol=1e-8)
        np.testing.assert_allclose(found[i, :, 2], solution[2:], rtol=1e-8, atol=1e-6)


def test_gradcheck():
    source, target = random_points(0).requires_grad_(), random_points(1).requires_grad_()
    assert torch.autograd.gradcheck(similarity_from_points, (source, target))


@needs_kornia
def test_gradient_through_the_warp():
    ramp = torch.arange(20, dtype=torch.float64)
    images = (ramp[:, None] + 2 * ramp)[None, None] / 60
    points = (TEMPLATE[None] / 112 * 18 + 1).requires_grad_()
    align_faces(images, points, size=8).sum().backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()
    # Points further right show what is further right, which is brighter.
    assert points.grad[..., 0].sum() > 0


@needs_kornia
@pytest.mark.parametrize("pixel_centers", ["half", "integer"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_known_warp(interpolation, pixel_centers):
    """On a linear ramp each pixel tells where it came from (torch's cubic is off by 0.05)."""
    offset = 0.5 if pixel_centers == "half" else 0.0
    forward = matrix(1.6, 0.3, -70.0, -120.0)
    points = apply(similarity_from_points(TEMPLATE[None], apply(forward, TEMPLATE)), TEMPLATE)
    grid = torch.arange(200, dtype=torch.float64)
    images = torch.stack([grid.expand(200, 200), grid[:, None].expand(200, 200)])[None] + offset
    shift = torch.tensor([90.0, 150.0])
    aligned = align_faces(
        images, points + shift, interpolation=interpolation, pixel_centers=pixel_centers
    )
    pixels = torch.arange(112, dtype=torch.float64) + offset
    y, x = torch.meshgrid(pixels, pixels, indexing="ij")
    expected = (apply(forward, torch.stack([x, y], -1).reshape(-1, 2)) + shift).T
    expected = expected.reshape(2, 112, 112)
    inside = ((expected > 3) & (expected < 197)).all(0)
    assert inside.float().mean() > 0.5
    tolerance = 1e-6 if interpolation == "bilinear" else 0.05
    torch.testing.assert_close(aligned[0][:, inside], expected[:, inside], rtol=0, atol=tolerance)


@needs_kornia
def test_identity_and_size():
    images = torch.rand(2, 3, 112, 112)
    points = TEMPLATE.float().expand(2, 5, 2)
    torch.testing.assert_close(align_faces(images, points), images, rtol=0, atol=2e-4)
    # Half as big is the mean of four pixels, exactly, where half pixels are counted rightly.
    half = align_faces(images, points, size=56)
    assert half.shape == (2, 3, 56, 56)
    means = torch.nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(half, means, rtol=0, atol=2e-4)


@needs_kornia
def test_batch_and_dtypes():
    images = torch.rand(3, 3, 90, 120, generator=torch.Generator().manual_seed(0))
    points = TEMPLATE.float() * 0.8 + torch.tensor([[[0.0, 0.0]], [[5.0, -3.0]], [[-9.0, 2.0]]])
    aligned = align_faces(images, points)
    for i in range(3):
        alone = align_faces(images[i : i + 1], points[i : i + 1])
        torch.testing.assert_close(aligned[i : i + 1], alone)
    assert not torch.equal(aligned[0], aligned[1])
    for interpolation in ("bilinear", "bicubic"):
        as_float = align_faces(images, points, interpolation=interpolation)
        assert as_float.min() >= 0
        assert as_float.max() <= 1
        as_bytes = (images * 255).round().byte()
        as_uint8 = align_faces(as_bytes, points, interpolation=interpolation)
        assert as_uint8.dtype == torch.uint8
        torch.testing.assert_close(as_uint8 / 255.0, as_float, rtol=0, atol=1.5 / 255)
    as_half = align_faces(images.half(), points)
    assert as_half.dtype == torch.float16
    torch.testing.assert_close(as_half.float(), aligned, rtol=0, atol=2e-3)


@needs_kornia
@pytest.mark.parametrize("value", [0.7, -0.7])
def test_outside_is_black(value):
    """Also where black is no colour of the picture, and bicubic is cut to its range."""
    images = torch.full((1, 1, 112, 112), value)
    points = TEMPLATE.float()[None] - torch.tensor([50.0, 0.0])  # the left half lies outside
    for interpolation in ("bilinear", "bicubic"):
        aligned = align_faces(images, points, interpolation=interpolation)[0, 0]
        torch.testing.assert_close(aligned[:, :48], torch.zeros(112, 48))
        torch.testing.assert_close(aligned[:, 53:], torch.full((112, 59), value))


@needs_kornia
def test_lfw():
    """The aligned faces come from their originals, up to resampling and JPEG noise.

    Measured over the 100 pictures, in grey levels of 255: bicubic 2.05 (the worst picture 2.78),
    bilinear 2.26; with integer pixel centres 2.25 and 2.41. Saving a face as JPEG of the same
    quality (88) alone moves it by 1.8, and fitting every matrix anew by gradient gains less than
    0.01: the geometry is that of the files, which were drawn with a sharper cubic.
    """
    image = pytest.importorskip("PIL.Image")
    originals, faces = DATA / "lfw250_sample.zip", DATA / "lfw112.zip"
    if not (originals.exists() and faces.exists()):
        pytest.skip("needs ../shared/data/lfw112.zip and lfw250_sample.zip")

    def read(archive, name):
        with image.open(io.BytesIO(archive.read(f"images/{name}"))) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)

    with zipfile.ZipFile(originals) as unaligned, zipfile.ZipFile(faces) as aligned:
        rows = [row.split() for row in unaligned.read("landmarks5.txt").decode().splitlines()]
        images = torch.stack([read(unaligned, row[0]) for row in rows])
        expected = torch.stack([read(aligned, row[0]) for row in rows]).float()
    points = torch.tensor([[float(value) for value in row[1:11]] for row in rows])
    points = points.unflatten(1, (5, 2))
    assert len(images) == 100

    def distances(**options):
        difference = align_faces(images, points, **options).float() - expected
        return difference.abs().mean((1, 2, 3))

    bicubic, bilinear = distances(interpolation="bicubic"), distances()
    integer = distances(interpolation="bicubic", pixel_centers="integer")
    assert bicubic.mean() < 2.1
    assert bicubic.max() < 3.0
    assert bilinear.mean() < 2.3
    assert integer.mean() > bicubic.mean() + 0.1  # the bound above tells the conventions apart


def test_errors():
    fit, align = inspect.unwrap(similarity_from_points), inspect.unwrap(align_faces)
    points, images = random_points(0).float(), torch.rand(3, 3, 20, 20)
    with pytest.raises(ValueError, match=r"source must be \[b, p, 2\] with .* got \[5, 2\]"):
        fit(points[0], points[0])
    with pytest.raises(ValueError, match=r"at least 2 points; got \[3, 1, 2\]"):
        fit(points[:, :1], points[:, :1])
    with pytest.raises(
        ValueError, match=r"target must be \[5, 2\] or \[3, 5, 2\] .* got \[2, 5, 2"
    ):
        fit(points, points[:2])
    for value in (float("nan"), float("inf")):
        broken = points.clone()
        broken[1, 3, 0] = value
        with pytest.raises(ValueError, match="source points must be finite; those of picture 1"):
            fit(broken, points)
        with pytest.raises(ValueError, match="target points must be finite; those of picture 1"):
            fit(points, broken)
    same = points.clone()
    same[2] = torch.tensor([33.3, 71.7])
    with pytest.raises(ValueError, match="source points of picture 2 are all one point, which"):
        fit(same, points)
    with pytest.raises(ValueError, match="target points of picture 2 are all one point"):
        fit(points, same)
    with pytest.raises(ValueError, match=r"images must be \[b, c, h, w\]; got \[3, 20, 20\]"):
        align(images[0], points)
    with pytest.raises(ValueError, match="images must hold at least one picture; got an empty ba"):
        align(images[:0], points[:0])
    with pytest.raises(TypeError, match=r"source must be floating point; got torch.int64: pass so"):
        fit(points.long(), points[0])
    torch.testing.assert_close(fit(points, points[0].long()), fit(points, points[0].trunc()))
    with pytest.raises(ValueError, match=r"points must be \[b, 5, 2\] with b = 3 .*got \[2, 5, 2"):
        align(images, points[:2])
    with pytest.raises(TypeError, match=r"images must be floats or uint8; got torch\.int64"):
        align(images.long(), points)
    with pytest.raises(ValueError, match="interpolation must be 'bilinear' or 'bicubic'; got 'x'"):
        align(images, points, interpolation="x")
    with pytest.raises(ValueError, match="pixel_centers must be 'half' or 'integer'; got 'x'"):
        align(images, points, pixel_centers="x")
    with pytest.raises(ValueError, match="size must be at least 1; got 0"):
        align(images, points, size=0)


def test_without_kornia(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.geometry.transform", None)
    with pytest.raises(ImportError, match="align_faces needs kornia: pip install kornia, or warp"):
        align_faces(torch.rand(1, 3, 20, 20), random_points(0, 1).float())
