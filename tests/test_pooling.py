import re
import subprocess
import sys
from pathlib import Path

import jaxtyping
import pytest
import torch
from cases import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal import masked_max
from partlocal.pooling import PartFeatures, PartMaskPool, part_mask_pool
from partlocal.resize import resize_maps

MODES = ["sum", "mean", "max"]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def draw_maps(*shape, dtype=torch.float64, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("images_at_once", [1, 2, 5])
def test_max_with_and_without_gradient(channels_last, images_at_once, monkeypatch):
    """Where no gradient is wanted the maximum is found otherwise; in pieces of any size alike."""
    features, maps = draw(5, 3, 6, 7), draw_maps(5, 2, 6, 7)
    if channels_last:
        features = features.contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(masked_max, "CACHE_BYTES", images_at_once * features[0].nbytes)
    found = part_mask_pool(features, maps, mode="max")
    same = part_mask_pool(features.clone().requires_grad_(), maps, mode="max")
    under = torch.where(maps[:, :, None] >= 0.5, features[:, None], -torch.inf).amax((3, 4))
    expected = under / maps.sum((2, 3))[..., None]
    assert torch.equal(found.parts, same.parts.detach())
    assert torch.equal(found.parts, torch.where(under.isfinite(), expected, 0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("wanted", [False, True])
def test_max_sees_its_area_alone(value, wanted):
    """What lies under no part may be anything."""
    features, maps = draw(1, 2, 3, 3), torch.ones(1, 1, 3, 3)
    maps[..., 2, 2] = 0
    features[0, 0, 2, 2] = value
    found = part_mask_pool(features.requires_grad_(wanted), maps, mode="max").parts
    kept = features.detach().clone()
    kept[..., 2, 2] = -torch.inf
    torch.testing.assert_close(found.detach(), kept.amax((2, 3))[:, None] / 8)


def test_example():
    features = torch.tensor([[[[1.0, 3.0], [5.0, -7.0]]]])
    maps = torch.tensor([[[[1.0, 0.5], [0.25, 0.0]]]])  # mass 1.75; area: the upper row
    expected = {"sum": 1.0 + 1.5 + 1.25, "mean": 2.0, "max": 3.0}
    for mode, value in expected.items():
        parts, mass, visibility = part_mask_pool(features, maps, mode, normalize=False)
        assert parts.item() == value
        assert mass.item() == 1.75
        assert visibility.item() == 1.0
        normed = part_mask_pool(features, maps, mode).parts.item()
        assert normed == pytest.approx(value / 1.75)
    assert part_mask_pool(features, maps, "mean", False, area_threshold=0.2).parts.item() == 3.0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_many_parts_are_added_wide(mode, dtype):
    """One after another in bfloat16, ones would stop adding up at 256; in float16, at 2048."""
    features = torch.ones(1, 1, 2, 2, dtype=dtype, requires_grad=True)
    maps = torch.tensor([[1.0, 0.0], [0.0, 0.0]]).expand(1, 3000, 2, 2)
    part_mask_pool(features, maps, mode).parts.sum().backward()
    expected = torch.tensor([3000.0, 0.0, 0.0, 0.0]).to(dtype)
    assert torch.equal(features.grad.flatten(), expected)


def slow_pool(features, maps, mode, normalize, seen, threshold):
    """Pool one image in plain loops over lists: features [c][p], maps [k][p], seen [k]."""
    result = []
    for weights, visible in zip(maps, seen, strict=True):
        mass = sum(weights)
        area = [p for p, weight in enumerate(weights) if weight >= threshold]
        if mass <= 1e-6 or not visible or (mode != "sum" and not area):
            result.append([0.0] * len(features))
            continue
        row = []
        for channel in features:
            if mode == "sum":
                value = sum(weight * x for weight, x in zip(weights, channel, strict=True))
            elif mode == "mean":
                value = sum(channel[p] for p in area) / len(area)
            else:
                value = max(channel[p] for p in area)
            row.append(value / mass if normalize else value)
        result.append(row)
    return result


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("hw", [(1, 1), (7, 7), (3, 5)])
def test_reference(mode, normalize, hw):
    features, maps = draw(3, 4, *hw), draw_maps(3, 6, *hw)
    maps[0, 1] = 0
    maps[1, 2] *= 0.4  # an empty area, though not an empty part
    visibility = draw_maps(3, 6, seed=2)
    found = part_mask_pool(features, maps, mode, normalize, visibility, min_visibility=0.3)
    assert torch.equal(found.visibility, visibility)
    torch.testing.assert_close(found.mass, maps.sum((2, 3)))
    for image in range(3):
        arrays = (t[image].flatten(1).tolist() for t in (features, maps))
        seen = (visibility[image] >= 0.3).tolist()
        slow = slow_pool(*arrays, mode, normalize, seen, 0.5)
        torch.testing.assert_close(found.parts[image], torch.tensor(slow).double())


def test_sum_and_mean_are_not_proportional():
    features, maps = draw(1, 16, 7, 7), draw_maps(1, 1, 7, 7)
    by_sum, by_mean = (part_mask_pool(features, maps, m).parts.flatten() for m in ("sum", "mean"))
    assert torch.cosine_similarity(by_sum, by_mean, dim=0) < 0.999


def test_max_of_negative_features_is_negative():
    features, maps = -1 - draw(2, 8, 7, 7).abs(), draw_maps(2, 3, 7, 7)
    assert part_mask_pool(features, maps, "max").parts.max() < 0


def test_max_gradient_goes_to_the_first_of_equals():
    features = torch.ones(1, 2, 3, 3, requires_grad=True)
    maps = torch.zeros(1, 1, 3, 3)
    maps[..., 1:, 1:] = 1
    part_mask_pool(features, maps, "max", normalize=False).parts.sum().backward()
    assert features.grad.nonzero().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1]]


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_does_not_overflow(mode):
    features = torch.full((1, 4, 112, 112), 10.0, dtype=torch.float16, requires_grad=True)
    maps = torch.ones(1, 2, 112, 112, dtype=torch.float16)
    parts, mass, _ = part_mask_pool(features, maps, mode)
    assert parts.dtype == torch.float16
    assert mass.dtype == torch.float32
    assert mass.eq(112 * 112).all()
    expected = 10.0 if mode == "sum" else 10.0 / (112 * 112)
    torch.testing.assert_close(parts, torch.full_like(parts, expected))
    parts.sum().backward()
    assert features.grad.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(mode, dtype):
    features, maps = draw(2, 8, 9, 9).to(dtype), draw_maps(2, 3, 9, 9).to(dtype)
    found = part_mask_pool(features, maps, mode)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert [tensor.dtype for tensor in found] == [dtype, wide, wide]
    expected = part_mask_pool(features.double(), maps.double(), mode)
    rounding = torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(found.parts.double(), expected.parts, rtol=rounding, atol=rounding)
    torch.testing.assert_close(found.mass.double(), expected.mass, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("active", [torch.float16, torch.bfloat16])
def test_autocast(mode, active):
    features, maps = draw(2, 8, 9, 9).float(), draw_maps(2, 3, 12, 12).float()
    plain = part_mask_pool(features, maps, mode)
    with torch.autocast("cpu", dtype=active):
        found = part_mask_pool(features, maps, mode)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(part_mask_pool(features, maps, mode).parts, plain.parts)
    assert torch.equal(found.parts, plain.parts.to(active))  # rounded once, at the end
    assert torch.equal(found.mass, plain.mass)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reason", ["mass", "area", "visibility"])
def test_absent_parts(mode, dtype, reason):
    features, maps = draw(1, 4, 5, 5).to(dtype), draw_maps(1, 2, 5, 5).to(dtype)
    visibility = torch.ones(1, 2, dtype=dtype)
    if reason == "mass":
        maps[:, 0] = 0
    elif reason == "area":
        maps[:, 0] *= 0.4
    else:
        visibility[:, 0] = 0.1
    features.requires_grad_()
    maps.requires_grad_()
    pooled = part_mask_pool(features, maps, mode, True, visibility, min_visibility=0.2)
    absent = not (mode == "sum" and reason == "area")  # the sum knows no area
    gradients = torch.autograd.grad(
        pooled.parts[:, 0].sum(), (features, maps), create_graph=True, retain_graph=True
    )
    assert pooled.parts[:, 0].eq(0).all() == absent
    assert pooled.parts[:, 1].ne(0).any()
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient.eq(0).all() == absent
    both = torch.autograd.grad(pooled.parts.square().sum(), (features, maps), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in both), (features, maps))
    assert all(tensor.isfinite().all() for tensor in (*both, *second))


def test_visibility_is_the_peak_of_a_map_when_none_is_given():
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, 1, 1], maps[0, 1] = 0.75, 0.125
    pooled = part_mask_pool(torch.ones(1, 1, 2, 2), maps, min_visibility=0.5)
    assert pooled.visibility.tolist() == [[0.75, 0.125]]  # before the resize to 2 x 2
    assert pooled.parts.flatten().tolist() == [1.0, 0.0]


def test_gradient_of_maps():
    # dM = (g / mass) (F - out) for the sum; for the maximum, through the mass alone.
    features, maps = draw(1, 3, 4, 4), draw_maps(1, 1, 4, 4).requires_grad_()
    for mode in ("sum", "max"):
        parts, mass, _ = part_mask_pool(features, maps, mode)
        (found,) = torch.autograd.grad(parts.sum(), maps)
        own = features.sum(1) if mode == "sum" else torch.zeros(())
        expected = ((own - parts.sum()) / mass).expand(1, 1, 4, 4)
        torch.testing.assert_close(found, expected)


def test_frozen_maps_keep_no_features():
    features, maps = draw(1, 3, 4, 4).requires_grad_(), draw_maps(1, 2, 4, 4)
    for mode in MODES:
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            part_mask_pool(features, maps, mode)
        storages = {tensor.untyped_storage().data_ptr() for tensor in saved}
        assert saved
        assert features.untyped_storage().data_ptr() not in storages


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 999),
    mode=st.sampled_from(MODES),
    normalize=st.booleans(),
    hw=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    order=st.permutations(range(4)),
)
def test_properties(seed, mode, normalize, hw, order):
    features, maps = draw(2, 3, *hw, seed=seed), draw_maps(2, 4, *hw, seed=seed)

    def pool(f, m):
        return part_mask_pool(f, m, mode, normalize).parts

    parts = pool(features, maps)
    torch.testing.assert_close(pool(features, maps[:, order]), parts[:, order])
    # A constant map gives the mean (or maximum), and a constant feature comes back as it is.
    one = torch.ones_like(maps)
    whole = pool(features, one)[:, 0] * (hw[0] * hw[1] if normalize else 1)
    plain = {
        "sum": features.sum((2, 3)),
        "mean": features.mean((2, 3)),
        "max": features.amax((2, 3)),
    }
    torch.testing.assert_close(whole, plain[mode])
    torch.testing.assert_close(pool(features * 3, maps), parts * 3)
    if mode != "max":
        other = draw(2, 3, *hw, seed=seed + 1)
        torch.testing.assert_close(pool(features + other, maps), parts + pool(other, maps))
    # The order of the cells does not matter.
    torch.testing.assert_close(pool(features.flip(2, 3), maps.flip(2, 3)), parts)


def layouts(features):
    """Yield the same values as contiguous, channels last, crop, offset and channel slice."""
    b, c, h, w = features.shape
    yield "contiguous", features
    yield "channels_last", features.contiguous(memory_format=torch.channels_last)
    frame = torch.full((b, c + 2, h + 3, w + 4), torch.nan, dtype=features.dtype)
    frame[:, 1:-1, 1:-2, 3:-1] = features
    yield "crop", frame[:, 1:-1, 1:-2, 3:-1]
    nhwc = torch.full((b, h, w, c + 5), torch.nan, dtype=features.dtype)
    nhwc[..., 2:-3] = features.permute(0, 2, 3, 1)
    yield "nhwc", nhwc[..., 2:-3].permute(0, 3, 1, 2)
    steps = torch.full((b, 2 * c, 2 * h + 1, 3 * w), torch.nan, dtype=features.dtype)
    steps[:, 1::2, 1::2, ::3] = features
    yield "steps", steps[:, 1::2, 1::2, ::3]
    yield "expanded", features[:1].expand(b, -1, -1, -1)
    yield "one channel", features[:, :1].expand(-1, c, -1, -1)


@pytest.mark.parametrize("mode", MODES)
def test_layouts(mode, shapes_of):
    for name, features in layouts(draw(2, 32, 5, 6)):
        maps = draw_maps(2, 3, 5, 6)
        maps.requires_grad_()
        plain = features.clone(memory_format=torch.contiguous_format).requires_grad_()
        features.requires_grad_()
        expected = part_mask_pool(plain, maps, mode)
        with shapes_of([features, maps]) as shapes:
            found = part_mask_pool(features, maps, mode)
        torch.testing.assert_close(found, expected)
        if mode != "max":  # which needs the features under one part
            assert shapes.largest < features.numel(), f"{name} features were copied"
        pairs = ((found, features), (expected, plain))
        gradients = [torch.autograd.grad(r.parts.sin().sum(), (f, maps)) for r, f in pairs]
        torch.testing.assert_close(*gradients)


# A number near the least, one near 1, and one that is large but whose sums are finite.
SIZES = {
    torch.float16: [1e-6, 1.0, 6e4],
    torch.bfloat16: [1e-30, 1.0, 1e30],
    torch.float32: [1e-30, 1.0, 1e30],
    torch.float64: [1e-300, 1.0, 1e200],
}


def plain_pool(features, maps, mode, normalize):
    """Pool by the product of parts, channels and cells, in float64."""
    maps = maps.flatten(2)[:, :, None]
    values = features.flatten(2)[:, None].expand(-1, maps.shape[1], -1, -1)
    mass, area = maps.sum(3), maps >= 0.5
    if mode == "sum":
        parts = (values * maps).sum(3)
    elif mode == "mean":
        parts = (values * area).sum(3) / area.sum(3).clamp(min=1)
    else:
        parts = torch.where(area, values, -torch.inf).max(3).values
    present = mass > 1e-6
    if mode != "sum":
        present = present & area.any(3)
    parts = torch.where(present, parts, 0)
    return parts / torch.where(present, mass, 1) if normalize else parts


def assert_near(found, expected, terms, dtype):
    """Compare with the rounding of `dtype`, and that of float32 in sums of such terms."""
    limit = torch.finfo(dtype)
    # Just below the limit, rounding decides.
    over, under = expected.abs() > limit.max * 1.01, expected.abs() < limit.max * 0.99
    assert found.dtype == dtype
    assert torch.equal(found[over].double(), expected[over].sign() * torch.inf)
    error = (found.double() - expected).abs()
    # What sums lose below the least normal number, and the result below its own.
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    least = wide.smallest_normal + limit.smallest_normal * limit.eps
    allowed = limit.eps * expected.abs() + 4e-6 * terms + least
    assert (error <= allowed)[under].all()


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_input(data):
    """Parts and both gradients: any shape, layout and dtype, faint parts and extreme features."""
    b, c, k, h, w = (data.draw(st.integers(1, most)) for most in (2, 4, 4, 6, 6))
    mode, normalize = data.draw(st.sampled_from(MODES)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(list(SIZES)))
    size = data.draw(st.sampled_from(SIZES[dtype]))
    seed = data.draw(st.integers(0, 99))
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=k, max_size=k))
    soft = draw_maps(b, k, h, w, seed=seed)
    maps = [[KINDS[kind](one) for kind, one in zip(kinds, of, strict=True)] for of in soft]
    maps = torch.stack([torch.stack(of) for of in maps]).to(dtype)
    # No number but the largest may lie beyond the dtype.
    features = (draw(b, c, h, w, seed=seed + 1).clamp(-1, 1) * size).to(dtype)
    places = st.integers(0, len(list(layouts(features))) - 1)
    features, maps = (list(layouts(x))[data.draw(places)][1] for x in (features, maps))
    features.requires_grad_()
    maps.requires_grad_()

    wide = [x.detach().double().contiguous().requires_grad_() for x in (features, maps)]
    expected = plain_pool(*wide, mode, normalize)
    found = part_mask_pool(features, maps, mode, normalize)
    mass = wide[1].detach().sum((2, 3))
    torch.testing.assert_close(found.mass.double(), mass, rtol=2e-6, atol=0)
    # How large the terms of each sum are; what is absent is exactly 0.
    present = (expected != 0).any(2, keepdim=True) if size >= 1 else mass[..., None] > 1e-6
    divisor = torch.where(present & normalize, mass[..., None], 1)
    largest = wide[0].detach().abs().max()
    terms = largest * (mass[..., None].clamp(min=1) if mode == "sum" else 1) / divisor
    terms = (terms * present).expand_as(expected)
    assert_near(found.parts, expected.detach(), terms, dtype)
    grad = draw(*found.parts.shape, seed=seed + 2).to(dtype)
    # An infinite part would hand on NaN: the gradient of what is finite.
    grad = torch.where(found.parts.isfinite(), grad, 0)
    unused = {"allow_unused": True, "materialize_grads": True}
    given = torch.autograd.grad(found.parts, (features, maps), grad, **unused)
    exact = torch.autograd.grad(expected, wide, grad.double(), **unused)
    pull = grad.double().abs() * present / divisor
    to_maps = (
        2 * (pull * (largest + terms * divisor)).sum(2) / (1 if mode == "sum" else divisor[..., 0])
    )
    assert_near(given[0], exact[0], pull.sum(1)[..., None, None].expand_as(features), dtype)
    assert_near(given[1], exact[1], to_maps[..., None, None].expand_as(maps), dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_subnormal_features(mode, dtype):
    features = torch.full((1, 2, 4, 4), torch.finfo(dtype).smallest_normal / 16, dtype=dtype)
    found = part_mask_pool(features, torch.ones(1, 1, 4, 4), mode, normalize=mode == "sum").parts
    torch.testing.assert_close(found[0], features[0, :, 0, :1].T, rtol=0.01, atol=0)


def test_overflow_of_half_precision():
    """Finiteness is checked before the result is narrowed: what float16 cannot hold is infinite."""
    features = torch.full((1, 1, 20, 20), 6e4, dtype=torch.float16)
    maps = torch.ones(1, 1, 20, 20)
    for mode in MODES:
        assert part_mask_pool(features, maps, mode).parts.isfinite().all()
    assert part_mask_pool(features, maps, normalize=False).parts.item() == torch.inf
    assert part_mask_pool(-features, maps, normalize=False).parts.item() == -torch.inf
    for mode in ("mean", "max"):
        parts = part_mask_pool(features, maps, mode, normalize=False).parts
        assert parts.item() == features[0, 0, 0, 0].item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("normalize", [True, False])
def test_overflow_of_sums(dtype, normalize):
    """Sums are float32: one beyond it is refused, even where its mean would not be."""
    features = torch.full((1, 1, 4, 4), torch.finfo(dtype).max / 2, dtype=dtype)
    for mode in ("sum", "mean"):
        with pytest.raises(ValueError, match="features must be finite; got NaN or infinity in the"):
            part_mask_pool(features, torch.ones(1, 1, 4, 4), mode, normalize)
    assert part_mask_pool(features, torch.ones(1, 1, 4, 4), "max", normalize).parts.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_and_inputs_as_they_were(mode, dtype):
    features, maps = draw(5, 32, 9, 11).to(dtype), draw_maps(5, 4, 9, 11).to(dtype)
    visibility = draw_maps(5, 4, seed=2)
    inputs = [features.requires_grad_(), maps.requires_grad_(), visibility]
    before = [tensor.detach().clone() for tensor in inputs]

    def derivatives():
        pooled = part_mask_pool(features, maps, mode, True, visibility, 0.3)
        first = torch.autograd.grad(pooled.parts.sin().sum(), (features, maps), create_graph=True)
        return *pooled, *first, *torch.autograd.grad(first[1].square().sum(), (features, maps))

    one, other = derivatives(), derivatives()
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_tokens(mode):
    features, maps = draw(2, 8, 3, 5), draw_maps(2, 4, 3, 5)
    with_prefix = torch.cat([draw(2, 1, 8), features.flatten(2).mT], 1)
    found = part_mask_pool(with_prefix[:, 1:], maps, mode, grid=(3, 5))
    torch.testing.assert_close(found, part_mask_pool(features, maps, mode))


@pytest.mark.parametrize("mode", MODES)
def test_maps_on_another_grid(mode):
    features, maps = draw(2, 8, 7, 7), draw_maps(2, 4, 32, 24)
    found = part_mask_pool(features, maps, mode, area_threshold=0.45)
    resized = resize_maps(maps, (7, 7))
    expected = part_mask_pool(features, resized, mode, area_threshold=0.45)
    torch.testing.assert_close(found.parts, expected.parts)
    torch.testing.assert_close(found.mass, maps.mean((2, 3)) * 49)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("grid", [(3, 2), (4, 4)])
def test_gradcheck(mode, normalize, grid):
    features = draw(1, 2, 3, 2).requires_grad_()
    maps = draw_maps(1, 3, *grid)
    maps[:, 0] = 0
    maps.requires_grad_()

    def pool(f, m):
        pooled = part_mask_pool(f, m, mode, normalize, torch.ones(1, 3), area_threshold=0.45)
        return pooled.parts, pooled.mass

    assert torch.autograd.gradcheck(pool, (features, maps))
    assert torch.autograd.gradgradcheck(pool, (features, maps))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grid", [(6, 6), (12, 9)])
def test_no_tensor_of_parts_times_features(mode, dtype, grid, shapes_of, monkeypatch):
    monkeypatch.setattr(masked_max, "CACHE_BYTES", 1)  # small tensors would be taken all at once
    b, k, c, h, w = 2, 5, 7, 6, 6
    features = draw(b, c, h, w).to(dtype).requires_grad_()
    maps = draw_maps(b, k, *grid).to(dtype).requires_grad_()
    most = b * max(k * grid[0] * grid[1], c * h * w)
    with shapes_of([features, maps]) as shapes:
        part_mask_pool(features, maps, mode).parts.square().sum().backward()
    assert features.grad.abs().sum() > 0
    assert maps.grad.abs().sum() > 0
    assert 0 < shapes.largest <= most < b * k * c * h * w
    with shapes_of([features, maps]) as shapes, torch.no_grad():
        part_mask_pool(features, maps, mode)
    assert 0 < shapes.largest <= most
    # What it forbids.
    weights = resize_maps(maps.detach(), (h, w))
    with shapes_of([features, weights]) as shapes:
        (features[:, None] * weights[:, :, None]).sum((3, 4)).square().sum().backward()
    assert shapes.largest == b * k * c * h * w


# A tensor of parts times features would take 4 * 100 * 256 * 100 * 100 * 4 bytes = 4.1 GB.
MEMORY = """
import torch
from pathlib import Path
from partlocal.pooling import part_mask_pool

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

for mode in ("sum", "mean", "max"):
    features = torch.randn(4, 256, 100, 100, requires_grad=True)
    maps = torch.rand(4, 100, 100, 100, requires_grad=True)
    part_mask_pool(features[:1, :1], maps[:1, :1], mode).parts.sum().backward()  # load what is lazy
    features.grad = maps.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is held
    before = peak()
    part_mask_pool(features, maps, mode).parts.square().sum().backward()
    print(mode, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory():
    run = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    grown = dict(line.split() for line in run.stdout.splitlines())
    assert list(grown) == MODES
    # MiB; the gradients of features and maps take 54 of them, a copy of the features 39.
    assert all(0 < float(mebibytes) < 200 for mebibytes in grown.values()), grown


def test_module():
    layer = PartMaskPool("mean", False, 0.25, 0.75, "torch")
    features, maps = draw(2, 6, 5, 5), draw_maps(2, 3, 5, 5)
    visibility = draw_maps(2, 3)
    expected = part_mask_pool(
        features,
        maps,
        mode="mean",
        normalize=False,
        visibility=visibility,
        min_visibility=0.25,
        area_threshold=0.75,
        implementation="torch",
    )
    assert isinstance(expected, PartFeatures)
    for module in (layer, eval(repr(layer))):
        torch.testing.assert_close(module(features, maps, visibility), expected, rtol=0, atol=0)
    tokens = layer(features.flatten(2).mT, maps, visibility, grid=(5, 5))
    torch.testing.assert_close(tokens, expected)
    assert repr(layer) == (
        "PartMaskPool(mode='mean', normalize=False, min_visibility=0.25, area_threshold=0.75, "
        "implementation='torch')"
    )


GOOD = {"features": torch.ones(8, 4, 28, 28), "maps": torch.ones(8, 6, 28, 28)}
TOKENS = {"features": torch.ones(8, 49, 4), "maps": torch.ones(8, 6, 7, 7)}
NAN = torch.ones(8, 4, 28, 28)
NAN[3, 2, 5, 5] = torch.nan


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"maps": torch.ones(4, 6, 28, 28)},
            ValueError,
            "maps must be [b, k, h, w] with b = 8 (as features); got [4, 6, 28, 28]",
        ),
        (
            {"maps": torch.ones(8, 28, 28)},
            ValueError,
            "maps must be [b, k, h, w] with b = 8 (as features); got [8, 28, 28]",
        ),
        (
            {"maps": torch.ones(8, 0, 28, 28)},
            ValueError,
            "maps must hold at least one part; got [8, 0, 28, 28]",
        ),
        (
            {"maps": torch.ones(8, 6, 28, 28, dtype=torch.bool)},
            TypeError,
            "maps must be floating point; got torch.bool: pass maps.float()",
        ),
        (
            {"maps": torch.ones(8, 6, 28, 28, device="meta")},
            ValueError,
            "maps must be on cpu (as features); got meta: pass maps.to('cpu')",
        ),
        (
            {"features": torch.ones(8, 4, 28, 28, dtype=torch.int64)},
            TypeError,
            "features must be floating point; got torch.int64: pass features.float()",
        ),
        (
            {"features": torch.ones(4, 28)},
            ValueError,
            "features must be [b, c, h, w], or tokens [b, hw, c] with grid=(h, w); got [4, 28]",
        ),
        (
            {"features": torch.ones(0, 4, 28, 28)},
            ValueError,
            "features must hold at least one image; got an empty batch",
        ),
        (
            {"features": torch.ones(8, 0, 28, 28)},
            ValueError,
            "features must hold no empty axis; got [8, 0, 28, 28]",
        ),
        *(
            (
                {"features": NAN, "mode": mode},
                ValueError,
                "features must be finite; got NaN or infinity in the pooled parts: look for a "
                "division by zero or an overflow before this layer (features.isfinite() shows "
                "where)",
            )
            for mode in MODES
        ),
        (
            {"visibility": torch.ones(8, 5)},
            ValueError,
            "visibility must be [b, k] = [8, 6] (as maps); got [8, 5]",
        ),
        (
            {"visibility": torch.ones(8, 6, device="meta")},
            ValueError,
            "visibility must be on cpu (as features); got meta: pass visibility.to('cpu')",
        ),
        ({"mode": "gem"}, ValueError, "mode must be 'sum', 'mean' or 'max'; got 'gem'"),
        (
            {"grid": (28, 28)},
            ValueError,
            "grid is for tokens [b, hw, c]; got features [b, c, h, w], which have their own: "
            "leave it out",
        ),
        (
            TOKENS,
            ValueError,
            "tokens [b, hw, c] = [8, 49, 4] need grid=(h, w) with h * w = 49",
        ),
        (
            TOKENS | {"grid": (7, 8)},
            ValueError,
            "grid must have h * w = 49 cells (as the tokens); got (7, 8): drop prefix tokens first",
        ),
        *(
            (
                TOKENS | {"grid": grid},
                ValueError,
                f"grid must be two positive whole numbers (height, width); got {grid}",
            )
            for grid in (7, (49,), (-7, -7), (7.0, 7.0))
        ),
        *(
            (
                {"maps": torch.where(NAN[:, 2:3].isnan(), value, GOOD["maps"]), "mode": mode},
                ValueError,
                "maps must be finite; got NaN or infinity in their mass: look for a division by "
                "zero or an overflow before this layer (maps.isfinite() shows where)",
            )
            for value in (torch.nan, torch.inf)
            for mode in MODES
        ),
        (
            {"visibility": torch.full((8, 6), torch.nan)},
            ValueError,
            "visibility must be finite; got NaN or infinity in its values: look for a division by "
            "zero or an overflow before this layer (visibility.isfinite() shows where)",
        ),
        (
            {"implementation": "triton"},
            NotImplementedError,
            "implementation='triton': part_mask_pool needs features on a CUDA or ROCm device; got "
            "cpu: move it there, or use implementation='auto' or 'torch'",
        ),
    ],
)
def test_errors(monkeypatch, arguments, error, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    part_mask_pool(**GOOD)
    part_mask_pool(**TOKENS, grid=(7, 7))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        part_mask_pool(**GOOD | arguments)


@pytest.mark.parametrize("given", [False, True])
def test_nan_maps_show_up_where_nobody_looks(monkeypatch, given):
    """As on an accelerator: NaN is no absence, whose zeros would pass for a result."""
    monkeypatch.setattr("partlocal.pooling.refuse_non_finite", lambda *_: None)
    maps = torch.ones(2, 3, 4, 4)
    maps[1, 2, 0, 0] = torch.nan
    found = part_mask_pool(
        torch.ones(2, 5, 4, 4), maps, visibility=torch.ones(2, 3) if given else None
    )
    assert found.parts[1, 2].isnan().all()
    assert found.parts.isnan().sum() == 5


def test_compile():
    script = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from partlocal.pooling import PartMaskPool

inputs = [
    (torch.randn(b, 4, 5, 5, requires_grad=True), torch.rand(b, 3, 8, 8, requires_grad=True),
     torch.rand(b, 3)) for b in (2, 5, 3, 8)]
for mode in ("sum", "mean", "max"):
    layer = PartMaskPool(mode, min_visibility=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for arguments in inputs:
        both = [f(*arguments) for f in (compiled, layer)]
        torch.testing.assert_close(*both)
        gradients = (torch.autograd.grad(y.parts.sin().sum(), arguments[:2]) for y in both)
        torch.testing.assert_close(*gradients)
    assert counter.frame_count <= 2, counter.frame_count

batch = {0: torch.export.Dim("b")}
example = tuple(x.detach() for x in inputs[0])
program = torch.export.export(layer, example, dynamic_shapes=(batch, batch, batch))
torch.testing.assert_close(program.module()(*inputs[1]), layer(*inputs[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.slow
def test_compile_with_inductor():
    """The whole chain, as most users compile it: maps, pooling and structure, with autocast."""
    script = """
import torch
from partlocal.correlation import structure_correlation
from partlocal.part_maps import part_maps
from partlocal.pooling import part_mask_pool

def chain(logits, features):
    maps, visibility = part_maps(logits, (1, 3, 4), (7, 7))
    pooled = part_mask_pool(features, maps, "max", visibility=visibility, area_threshold=0.2)
    return structure_correlation(pooled.parts, pooled.visibility)

compiled = torch.compile(chain, fullgraph=True)
logits = torch.randn(2, 5, 16, 16, requires_grad=True)
features = torch.randn(2, 4, 7, 7, requires_grad=True)
both = [f(logits, features) for f in (compiled, chain)]
torch.testing.assert_close(*both)
torch.testing.assert_close(
    *(torch.autograd.grad(y.sin().sum(), (logits, features)) for y in both), rtol=1e-4, atol=1e-5)
with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
    both = [f(logits, features) for f in (compiled, chain)]
torch.testing.assert_close(*both, rtol=2e-2, atol=2e-2)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("side", [2, 9])  # fewer and more cells than channels
def test_features_that_reach_no_part(mode, side):
    """Such as the second image here, of which nothing is seen."""
    features = torch.ones(2, 8, side, side)
    features[1] = torch.inf
    features.requires_grad_()
    maps = torch.ones(2, 3, side, side)
    maps[1] = 0
    parts = part_mask_pool(features, maps, mode, normalize=False).parts
    assert parts[1].eq(0).all()
    assert parts[0].eq(side * side if mode == "sum" else 1).all()
    (gradient,) = torch.autograd.grad(parts.sum(), features)
    assert gradient[1].eq(0).all()
    assert gradient[0].ne(0).any()
