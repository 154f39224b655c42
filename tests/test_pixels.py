"""Every network's own normalisation, against torchvision bit for bit."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from partlocal.pixels import Pixels

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(b=2, h=5, w=7, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (b, 3, h, w), dtype=torch.uint8, generator=rng)


def test_example():
    pixels = Pixels((0.5, 0.0, 0.25), (0.5, 1.0, 0.25))
    x = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).repeat(1, 3, 1, 1)
    expected = torch.tensor([[-1.0, 0.0, 1.0], [0.0, 0.5, 1.0], [-1.0, 1.0, 3.0]])
    assert torch.equal(pixels(x)[0, :, 0], expected)
    black = pixels(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    assert black.flatten().tolist() == [-1, 0, -1]


@pytest.mark.parametrize("constants", [IMAGENET, ((0.5,) * 3, (0.5,) * 3)])
def test_reference(constants):
    """uint8 as torchvision's ToTensor and Normalize; a float of the same picture likewise."""
    transforms = pytest.importorskip("torchvision.transforms")
    every = np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3) % 256  # all bytes, each channel
    every = every.astype(np.uint8)
    to_tensor = transforms.ToTensor()
    expected = transforms.Normalize(*constants)(to_tensor(every))
    pixels = Pixels(*constants)
    assert torch.equal(pixels(torch.from_numpy(every).permute(2, 0, 1)[None])[0], expected)
    assert torch.equal(pixels(to_tensor(every)[None])[0], expected)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    st.lists(st.floats(0.0625, 2, width=32), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_properties(mean, std, seed):
    pixels, x = Pixels(mean, std), picture(seed=seed)
    standardised = pixels(x)
    assert standardised.dtype == torch.float32
    back = standardised * pixels.std + pixels.mean
    torch.testing.assert_close(back, x.float() / 255, atol=1e-5, rtol=1e-4)
    assert torch.equal(pixels(x.flip(-1)), standardised.flip(-1))
    assert torch.equal(pixels(x[1:]), standardised[1:])


def test_integer_constants_are_numbers():
    """mean=(0, 0, 0) must not turn the pictures into integers."""
    x = picture()
    pixels = Pixels((0, 0, 0), (1, 1, 1))
    assert torch.equal(pixels(x), x.float() / 255)
    assert torch.equal(pixels(x.float() / 255), x.float() / 255)


def test_normalized_passes():
    x = torch.randn(2, 3, 4, 4) * 9
    assert Pixels(*IMAGENET, input="normalized")(x) is x


def test_module():
    pixels = Pixels(*IMAGENET)
    assert list(pixels.state_dict()) == ["mean", "std"]  # saved with the weights
    other = Pixels((0.1,) * 3, (0.2,) * 3)
    other.load_state_dict(pixels.state_dict())
    assert torch.equal(other(picture()), pixels(picture()))
    assert list(pixels.parameters()) == []
    rebuilt = eval(repr(pixels), {"Pixels": Pixels})
    torch.testing.assert_close(rebuilt(picture()), pixels(picture()))
    for dtype in (torch.float64, torch.bfloat16):
        assert copy.deepcopy(pixels).to(dtype)(picture()).dtype == dtype
    x = picture().contiguous(memory_format=torch.channels_last)
    assert pixels(x).is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 2, 2, requires_grad=True)
    pixels(x).sum().backward()
    torch.testing.assert_close(x.grad, (1 / pixels.std).expand(1, 3, 2, 2))


def test_errors():
    with pytest.raises(ValueError, match="input must be 'pixels' or 'normalized'; got 'rgb'"):
        Pixels(*IMAGENET, input="rgb")
    for mean, std in ((IMAGENET[0][:2], IMAGENET[1]), (IMAGENET[0], (1.0, 0.0, 1.0))):
        message = r"mean and std must be three numbers each, std above 0; got \("
        with pytest.raises(ValueError, match=message):
            Pixels(mean, std)
    pixels = Pixels(*IMAGENET)
    for shape in ((1, 1, 4, 4), (3, 4, 4), (1, 4, 4, 3)):
        x = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"images must be \[b, 3, h, w\]; got \["):
            pixels._check(x)
        with pytest.raises((TypeCheckError, ValueError)):
            pixels(x)
    with pytest.raises(ValueError, match="images must hold at least one picture; got an empty"):
        pixels(picture()[:0])
    for network in (pixels, Pixels(*IMAGENET, input="normalized")):
        with pytest.raises(ValueError, match=r"hold at least one pixel; got \[1, 3, 0, 0\]"):
            network(torch.zeros(1, 3, 0, 0))
    message = (
        r"images must be on cpu \(as the network\); got meta: pass images.to\('cpu'\), or move"
    )
    for x in (picture(), picture().float()):
        with pytest.raises(ValueError, match=message):
            pixels(x.to("meta"))
        assert copy.deepcopy(pixels).to("meta")(x.to("meta")).shape == x.shape
    with pytest.raises(TypeError, match=r"must be uint8 or floating point; got torch.int64: pass"):
        pixels(picture().long())
    message = "must be floats in .0, 1.; got values from 0 to 255: divide by 255, or pass input="
    x = picture().float()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = 0, 255
    for _ in range(2):  # on a CPU at every call
        with pytest.raises(ValueError, match=message):
            pixels(x)
    pixels(x / 255)
    with pytest.raises(ValueError, match="got values from -2"):
        pixels(torch.full((1, 3, 2, 2), -2.0))
    x = x / 255
    x[1, 2, 3, 4] = torch.nan
    message = r"must be finite; got values from nan to nan: find the pictures with images\.isfinite"
    with pytest.raises(ValueError, match=message):
        pixels(x)
    x[1, 2, 3, 4] = torch.inf
    with pytest.raises(ValueError, match=r"images must be finite; got values from 0 to inf: find"):
        pixels(x)
    x[1, 2, 3, 4] = 1.0005  # resampling overshoots
    pixels(x)
