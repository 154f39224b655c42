import re

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from partlocal.resize import _window_max, area_weights, resize_maps

# 32 to 7 is the paper's 128 to 28.
SIZES = [((32, 32), (7, 7)), ((7, 5), (3, 4)), ((4, 6), (9, 6)), ((1, 3), (2, 2))]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_example():
    # Each of the two new cells covers one and a half old ones.
    maps = torch.tensor([[[[3.0, 6.0, 9.0], [3.0, 6.0, 9.0], [3.0, 6.0, 9.0]]]])
    by_area, by_max = resize_maps(maps, (1, 2)), resize_maps(maps, (1, 2), mode="max")
    assert by_area.flatten().tolist() == pytest.approx([4.0, 8.0])
    assert by_max.flatten().tolist() == [6.0, 9.0]


def mean_error(resized, maps):
    """Largest error of a map's mean, relative to that mean."""
    mean = maps.mean((2, 3))
    return ((resized.double().mean((2, 3)) - mean).abs() / mean).max().item()


def test_impulses_keep_their_mass():
    pixels = torch.randint(128 * 128, (300,), generator=torch.Generator().manual_seed(0))
    impulses = F.one_hot(pixels, 128 * 128).float().view(1, 300, 128, 128)
    assert mean_error(resize_maps(impulses, (28, 28)), impulses) < 1e-6
    assert mean_error(F.interpolate(impulses, (28, 28), mode="area"), impulses) > 0.3


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_area_reference(old, new):
    maps = draw(2, 3, *old)
    fine = maps.repeat_interleave(new[0], 2).repeat_interleave(new[1], 3)
    expected = F.avg_pool2d(fine, old)  # on this fine grid every border is a whole number
    torch.testing.assert_close(resize_maps(maps, new), expected)


@pytest.mark.parametrize(("old", "new"), SIZES)
def test_max_reference(old, new):
    maps = draw(2, 3, *old).sub(0.5)
    expected = torch.zeros(2, 3, *new, dtype=maps.dtype)
    for i in range(new[0]):
        for j in range(new[1]):
            top, left = i * old[0] // new[0], j * old[1] // new[1]
            bottom, right = -(-(i + 1) * old[0] // new[0]), -(-(j + 1) * old[1] // new[1])
            expected[:, :, i, j] = maps[:, :, top:bottom, left:right].amax((2, 3))
    assert torch.equal(resize_maps(maps, new, mode="max"), expected)
    assert torch.equal(_window_max(_window_max(maps, 2, new[0]), 3, new[1]), expected)


def test_max_gradient_goes_to_the_first_of_equals():
    maps = torch.ones(1, 1, 4, 4, requires_grad=True)
    resize_maps(maps, (2, 2), mode="max").sum().backward()
    assert maps.grad.nonzero()[:, 2:].tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


@settings(max_examples=25, deadline=None)
@given(
    old=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    new=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 999),
)
def test_properties(old, new, seed):
    maps = draw(1, 2, *old, dtype=torch.float32, seed=seed) + 0.1
    by_area, by_max = resize_maps(maps, new), resize_maps(maps, new, mode="max")
    assert by_area.shape == by_max.shape == (1, 2, *new)
    assert mean_error(by_area, maps.double()) < 1e-6
    # A cell's average cannot exceed the largest pixel that it touches.
    assert (by_area <= by_max + 1e-6).all()
    torch.testing.assert_close(resize_maps(torch.ones(1, 1, *old), new), torch.ones(1, 1, *new))


def test_weights_sum_up():
    weights = area_weights(128, 28, torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(weights.sum(1), torch.ones(28, dtype=torch.float64))
    torch.testing.assert_close(weights.sum(0), torch.full((128,), 28 / 128, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["area", "max"])
def test_dtypes_and_autocast(mode):
    maps = draw(1, 2, 9, 9)
    exact = resize_maps(maps, (4, 4), mode)
    assert exact.dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16):
        narrow = resize_maps(maps.to(dtype), (4, 4), mode)
        assert narrow.dtype == torch.float32
        expected = resize_maps(maps.to(dtype).double(), (4, 4), mode)
        torch.testing.assert_close(narrow.double(), expected, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = resize_maps(maps.float(), (4, 4), mode)
    torch.testing.assert_close(wide.double(), exact, rtol=1e-6, atol=1e-6)


def test_same_grid_is_no_copy():
    maps = draw(1, 2, 5, 5)
    assert resize_maps(maps, (5, 5)).data_ptr() == maps.data_ptr()


@pytest.mark.parametrize("mode", ["area", "max"])
@pytest.mark.parametrize("new", [(3, 2), (6, 6)])
def test_gradcheck(mode, new):
    maps = draw(1, 2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: resize_maps(m, new, mode), maps)
    assert torch.autograd.gradgradcheck(lambda m: resize_maps(m, new, mode).square(), maps)


@pytest.mark.parametrize(
    ("size", "mode", "message"),
    [
        ((2, 2), "mean", "downsample must be 'area' or 'max'; got 'mean'"),
        ((0, 2), "area", "size must be two positive whole numbers (height, width); got (0, 2)"),
        ((2,), "max", "size must be two positive whole numbers (height, width); got (2,)"),
        ((2, 2.5), "max", "size must be two positive whole numbers (height, width); got (2, 2.5)"),
        (3, "area", "size must be two positive whole numbers (height, width); got 3"),
    ],
)
def test_errors(monkeypatch, size, mode, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resize_maps(torch.ones(1, 1, 4, 4), size, mode)
