"""The kernels of `part_mask_pool` against its definition in PyTorch."""

import re
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, KINDS, LAYOUTS, PHASES, check, covering, lay_out, name
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.kernels import part_mask_pool as kernels
from partlocal.pooling import PartMaskPool, part_mask_pool
from partlocal.resize import resize_maps

MODES = ["sum", "mean", "max"]
GRIDS = {1: (1, 1), 16: (2, 8), 49: (7, 7), 196: (14, 14), 784: (28, 28)}
CASES = covering(
    {
        "hw": list(GRIDS),
        "c": [1, 3, 64, 128, 130],
        "k": [1, 2, 6, 11, 19, 20],
        "b": [1, 3],
        "layout": LAYOUTS,
        "maps_layout": LAYOUTS,
        "dtype": DTYPES,
        "mode": MODES,
        "normalize": [True, False],
    },
    # The interpreter takes milliseconds for what a GPU does in less than one microsecond.
    lambda case: case["hw"] < 784 or (case["b"] == 1 and case["c"] <= 64 and case["k"] <= 6),
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(grid, c, k, b, dtype, device, layout="contiguous", maps_layout="contiguous"):
    """Features, maps of which two are absent, and visibilities of which some are low."""
    maps = draw(b, k, *grid, seed=1).sigmoid()
    if k > 2:
        maps[0, 1] = 0
        maps[-1, 2] *= 0.4  # an empty area, though not an empty part
    features = lay_out(draw(b, c, *grid).to(device, dtype), layout)
    maps = lay_out(maps.to(device, dtype), maps_layout)
    seen = draw(b, k, seed=2).sigmoid().to(device)
    return features.requires_grad_(), maps.requires_grad_(), seen


def derivatives(features, maps, seen, mode, normalize=True, second=True, implementation="triton"):
    """Parts and mass, the gradients of both inputs, and the gradients of those."""
    pooled = part_mask_pool(
        features, maps, mode, normalize, seen, 0.3, implementation=implementation
    )
    grads = [draw(*x.shape, seed=3).to(x).requires_grad_() for x in pooled[:2]]
    first = torch.autograd.grad(pooled[:2], (features, maps), grads, create_graph=second)
    if not second:
        return *pooled[:2], *first
    toward = [draw(*x.shape, seed=4).to(x) for x in first]
    sources = (features, maps, *grads)
    more = torch.autograd.grad(first, sources, toward, allow_unused=True, materialize_grads=True)
    return *pooled[:2], *first, *more


def check_all(features, maps, seen, mode, normalize=True, second=True):
    wide = (x.detach().double().requires_grad_() for x in (features, maps))
    found = derivatives(features, maps, seen, mode, normalize, second)
    plain = derivatives(features, maps, seen, mode, normalize, second, "torch")
    oracle = derivatives(*wide, seen, mode, normalize, second, "torch")
    # In one cell the normalised sum is the feature: derivatives toward the map are sums of
    # 1 / mass^2 that cancel.
    mass = oracle[1].detach()
    least = mass[mass > 1e-6].min().item() ** -2 if maps.shape[2:].numel() == 1 else 0.0
    for one, other, truth in zip(found, plain, oracle, strict=True):
        check(one, other, truth, features.dtype, least)
    return found


def test_number_of_cases():
    assert 35 <= len(CASES) <= 60, len(CASES)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_definition(case, device):
    case = dict(case)
    hw, mode, normalize = (case.pop(key) for key in ("hw", "mode", "normalize"))
    tensors = inputs(GRIDS[hw], device=device, **case)
    check_all(*tensors, mode, normalize, second=hw <= 49)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("grid", "c", "k", "b"),
    [
        ((1, 784), 3, 2, 1),
        ((784, 1), 3, 2, 1),
        ((3, 5), 65, 17, 2),
        ((5, 13), 64, 16, 1),
        ((8, 8), 17, 65, 1),  # parts in two tiles of the sum
        ((4, 4), 3, 100, 1),
        ((2, 2), 600, 1, 1),
        ((56, 56), 3, 2, 1),
        ((7, 7), 8, 3, 257),  # no share of cells: the batch fills the GPU
    ],
)
def test_boundaries(mode, grid, c, k, b, device):
    check_all(*inputs(grid, c, k, b, torch.float32, device), mode, second=False)


@settings(max_examples=15, deadline=None, phases=PHASES)
@given(data=st.data())
def test_properties(data, device):
    """Any shape, layout and dtype."""
    shape = [data.draw(st.integers(1, most)) for most in (9, 9, 20, 9, 3)]
    layout, maps_layout = (data.draw(st.sampled_from(LAYOUTS)) for _ in range(2))
    dtype = data.draw(st.sampled_from(DTYPES))
    tensors = inputs(tuple(shape[:2]), *shape[2:], dtype, device, layout, maps_layout)
    check_all(*tensors, data.draw(st.sampled_from(MODES)), data.draw(st.booleans()), second=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_least_mass(mode, dtype, device):
    """A part is there from a mass of more than 1e-6 on."""
    maps = torch.zeros(1, 2, 3, 3)
    maps[0, :, 1, 1] = torch.tensor([0.95e-6, 1.06e-6])
    features, maps = draw(1, 4, 3, 3).to(device, dtype), maps.to(device, dtype)
    how = {"mode": mode, "area_threshold": 1e-9}
    parts = part_mask_pool(features, maps, implementation="triton", **how).parts[0]
    assert parts[0].eq(0).all()
    expected = features[0, :, 1, 1].float() / (1 if mode == "sum" else maps[0, 1, 1, 1].float())
    torch.testing.assert_close(parts[1], expected.to(dtype))


# A number near the least, one near 1, and one that is large but whose sums are finite.
MAGNITUDES = {
    torch.float16: [1e-6, 1.0, 6e4],
    torch.bfloat16: [1e-28, 1.0, 1e28],
    torch.float32: [1e-28, 1.0, 1e28],
}


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(data=st.data())
def test_extremes(data, device):
    """Faint and tiny parts, features near the limits of their dtype."""
    b, c, k, h, w = (data.draw(st.integers(1, most)) for most in (2, 5, 4, 5, 5))
    mode, normalize = data.draw(st.sampled_from(MODES)), data.draw(st.booleans())
    dtype = data.draw(st.sampled_from(DTYPES))
    magnitude = data.draw(st.sampled_from(MAGNITUDES[dtype]))
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=k, max_size=k))
    soft = draw(b, k, h, w, seed=data.draw(st.integers(0, 99))).sigmoid()
    maps = [[KINDS[kind](one) for kind, one in zip(kinds, of, strict=True)] for of in soft]
    features = (draw(b, c, h, w).clamp(-1, 1) * magnitude).to(device, dtype)
    maps = torch.stack([torch.stack(of) for of in maps]).to(device, dtype)
    features, maps = (lay_out(x, data.draw(st.sampled_from(LAYOUTS))) for x in (features, maps))
    wide = features.double(), maps.double()
    how = ((features, maps, "triton"), (features, maps, "torch"), (*wide, "torch"))
    results = []
    for one, other, implementation in how:
        sources = one.detach().requires_grad_(), other.detach().requires_grad_()
        pooled = part_mask_pool(*sources, mode, normalize, implementation=implementation)
        grad = draw(*pooled.parts.shape, seed=1).to(pooled.parts)
        more = {"allow_unused": True, "materialize_grads": True}
        slopes = torch.autograd.grad(pooled.parts, sources, grad, **more)
        results.append((pooled.parts, pooled.mass, *slopes))
    # The gradient of a map is a sum of terms as large as features over the least mass.
    present = results[2][1][results[2][1] > 1e-6]
    largest = present.reciprocal().max().item() if len(present) and normalize else 1.0
    largest *= wide[0].abs().max().item() * (1 if mode == "sum" else largest)
    for number, (one, other, truth) in enumerate(zip(*results, strict=True)):
        check(one, other, truth, dtype, 0.0 if number < 2 else (1.0, largest)[number - 2])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("splits", [1, 2, 3, 4])
def test_shares_of_the_cells(mode, splits, device, monkeypatch):
    """However many programs share the cells, and whichever finds the maximum."""
    features, maps, seen = inputs((14, 14), 5, 3, 1, torch.float32, device)
    blocks = kernels.configuration("max" if mode == "max" else "sum", 3)
    assert -(-196 // blocks["BLOCK_P"]) >= 4
    monkeypatch.setattr(kernels, "PROGRAMS", splits)
    check_all(features, maps, seen, mode, second=False)
    features = torch.ones(1, 5, 14, 14, device=device, requires_grad=True)
    pooled = part_mask_pool(features, torch.ones_like(maps), "max", implementation="triton")
    (gradient,) = torch.autograd.grad(pooled.parts.sum(), features)
    assert gradient.flatten(2).nonzero()[:, 2].eq(0).all()  # the first of equals


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_area_of_all_cells(mode, device):
    """A border of 0 takes every cell, and none of those a block holds beyond the last."""
    features, maps, _ = inputs((7, 7), 5, 3, 2, torch.float32, device)
    features = features.detach() - 9  # beyond the last cell lie zeros
    found = part_mask_pool(features, maps, mode, False, area_threshold=0, implementation="triton")
    plain = features.mean((2, 3)) if mode == "mean" else features.amax((2, 3))
    torch.testing.assert_close(found.parts[:, 0], plain)


def test_hand_worked(device):
    features = torch.tensor([[[[1.0, 3.0], [5.0, -7.0]]]], device=device)
    maps = torch.tensor([[[[1.0, 0.5], [0.25, 0.0]]]], device=device)
    for mode, value in {"sum": 1.0 + 1.5 + 1.25, "mean": 2.0, "max": 3.0}.items():
        parts, mass, visibility = part_mask_pool(
            features, maps, mode, normalize=False, implementation="triton"
        )
        assert (parts.item(), mass.item(), visibility.item()) == (value, 1.75, 1.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reason", ["mass", "area", "visibility"])
def test_absent_parts(mode, dtype, reason, device):
    features, maps = draw(1, 4, 5, 5).to(device, dtype), draw(1, 2, 5, 5).abs().to(device, dtype)
    seen = torch.ones(1, 2, device=device)
    if reason == "visibility":
        seen[:, 0] = 0.1
    else:
        maps[:, 0] *= 0 if reason == "mass" else 0.01
    features.requires_grad_()
    maps.requires_grad_()
    pooled = part_mask_pool(features, maps, mode, True, seen, 0.2, implementation="triton")
    gradients = torch.autograd.grad(pooled.parts[:, 0].sum(), (features, maps))
    absent = not (mode == "sum" and reason == "area")  # the sum knows no area
    for tensor in (pooled.parts[:, 0], *gradients):
        assert tensor.isfinite().all()
        assert tensor.eq(0).all() == absent
    assert pooled.parts[:, 1].ne(0).any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["features", "maps", "visibility"])
def test_nan_shows(mode, name, device):
    """What is NaN is not taken for absent."""
    given = {"features": draw(1, 3, 4, 4), "maps": draw(1, 2, 4, 4).sigmoid() + 0.5}
    given = {key: tensor.to(device) for key, tensor in given.items()}
    given["visibility"] = torch.ones(1, 2, device=device)
    given[name].view(-1)[0] = torch.nan
    pooled = part_mask_pool(**given, mode=mode, implementation="triton")
    plain = pooled.parts.isnan()
    assert plain[0, 0, 0] if name == "features" else plain[0, 0].all() or name == "visibility"
    assert not plain[0, 1, 1:].any()


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_does_not_overflow(mode, device):
    features = torch.full((1, 2, 112, 112), 10.0, dtype=torch.float16, device=device)
    features.requires_grad_()
    maps = torch.ones(1, 1, 112, 112, dtype=torch.float16, device=device)
    parts, mass, _ = part_mask_pool(features, maps, mode, implementation="triton")
    assert mass.eq(112 * 112).all()
    expected = 10.0 if mode == "sum" else 10.0 / (112 * 112)
    torch.testing.assert_close(parts, torch.full_like(parts, expected))
    parts.sum().backward()
    assert features.grad.isfinite().all()


def test_max_of_negative_features(device):
    features, maps, _ = inputs((7, 7), 8, 3, 2, torch.float32, device)
    maps = maps.detach().clamp(min=0.5)
    parts = part_mask_pool(-1 - features.abs(), maps, "max", implementation="triton").parts
    assert parts.max() < 0


@pytest.mark.parametrize("mode", MODES)
def test_tokens_and_other_grids(mode, device):
    features, _, _ = inputs((3, 5), 8, 4, 2, torch.float32, device)
    tokens = torch.cat([draw(2, 1, 8).to(device), features.detach().flatten(2).mT], 1)
    tokens.requires_grad_()
    maps = draw(2, 4, 12, 10).sigmoid().to(device)
    both = [
        part_mask_pool(tokens[:, 1:], maps, mode, grid=(3, 5), implementation=i)
        for i in ("triton", "torch")
    ]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(x.parts.sin().sum(), tokens) for x in both))
    same = part_mask_pool(features, resize_maps(maps, (3, 5)), mode, implementation="triton")
    torch.testing.assert_close(both[0].parts, same.parts)


def test_layout_of_the_gradient(device):
    maps = torch.rand(2, 3, 4, 5, device=device)
    for mode in MODES:
        for layout in (torch.contiguous_format, torch.channels_last):
            features = torch.rand(2, 6, 4, 5, device=device).contiguous(memory_format=layout)
            features.requires_grad_()
            parts = part_mask_pool(features, maps, mode, implementation="triton").parts
            (gradient,) = torch.autograd.grad(parts.sum(), features)
            assert gradient.is_contiguous(memory_format=layout)


def test_frozen_maps_keep_no_features(device):
    features, maps = torch.rand(1, 3, 4, 4, device=device), torch.rand(1, 2, 4, 4, device=device)
    for mode in MODES:
        for frozen in (True, False):
            saved = []
            pack = torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.append(t.untyped_storage().data_ptr()) or t,  # noqa: B023
                lambda t: t,
            )
            with pack:
                one, other = features.clone().requires_grad_(), maps.clone()
                other.requires_grad_(not frozen)
                part_mask_pool(one, other, mode, implementation="triton")
            kept = one.untyped_storage().data_ptr() in saved
            assert saved
            assert kept == (mode == "sum" and not frozen)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_far_strides(mode, axis, device, far_apart):
    """The third image, channel or row begins 2^31 numbers after the first, by a 32-bit stride."""
    strides = [36, 12, 4, 1]
    strides[axis] = 2**30
    far = far_apart(2**31 + 128).as_strided((3, 3, 3, 4), strides)
    features, maps, seen = inputs((3, 4), 3, 3, 3, torch.float32, device)
    far = far.copy_(features.detach()).requires_grad_()
    found, expected = (derivatives(x, maps, seen, mode, second=False) for x in (far, features))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_and_inputs_as_they_were(mode, device):
    tensors = inputs((7, 7), 20, 6, 2, torch.float32, device, "sliced")
    before = [tensor.detach().clone() for tensor in tensors]
    first, second = (derivatives(*tensors, mode) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


@pytest.mark.parametrize("active", [torch.float16, torch.bfloat16])
def test_autocast(active, device):
    features, maps, _ = inputs((7, 7), 8, 3, 2, torch.float32, device)
    with torch.autocast(device.type, dtype=active):
        found = part_mask_pool(features, maps, implementation="triton")
        expected = part_mask_pool(features, maps, implementation="torch")
        with torch.autocast(device.type, enabled=False):
            off = part_mask_pool(features, maps, implementation="triton")
    plain = part_mask_pool(features, maps, implementation="triton")
    assert all(torch.equal(*pair) for pair in zip(off, plain, strict=True))
    assert found.parts.dtype == active
    assert found.mass.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=torch.finfo(active).eps, atol=1e-5)


def test_opcheck(device):
    features, maps, seen = inputs((2, 3), 4, 3, 2, torch.float32, device, "channels last")
    sums = draw(2, 3, 4).to(device).requires_grad_()
    cell = torch.zeros(2, 3, 4, dtype=torch.int32, device=device)
    for mode in MODES:
        torch.library.opcheck(kernels.pool, (features, maps, seen, mode, True, 0.3, 0.5))
    torch.library.opcheck(kernels.part_sums, (features, maps))
    torch.library.opcheck(kernels.part_products, (sums, features))
    for channels_last in (False, True):
        torch.library.opcheck(kernels.spread_parts, (sums, maps, torch.float16, channels_last))
    torch.library.opcheck(kernels.spread_maxima, (sums, cell, [2, 3], torch.float32, False))


def test_three_derivatives_of_one_product(device):
    """Sums over cells, parts and channels of W F S: each the gradient of the others."""
    features, weights, _ = inputs((2, 3), 4, 3, 2, torch.float32, device)
    sums = draw(2, 3, 4).to(device).requires_grad_()
    one = (kernels.part_sums(features, weights) * sums).sum()
    other = (kernels.part_products(sums, features) * weights).sum()
    third = (kernels.spread_parts(sums, weights, torch.float32, False) * features).sum()
    expected = torch.einsum("bchw,bkhw,bkc->", features, weights, sums)
    gradients = torch.autograd.grad(expected, (features, weights, sums))
    for value in (one, other, third):
        torch.testing.assert_close(value, expected)
        found = torch.autograd.grad(value, (features, weights, sums))
        torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"features": torch.ones(2, 4, 3, 3, dtype=torch.float64)},
            NotImplementedError,
            "implementation='triton': part_mask_pool needs features in float32, float16 or "
            "bfloat16; got torch.float64: use implementation='auto' or 'torch'",
        ),
        (
            {
                "features": torch.ones(2, 4, 3, 3, device="meta"),
                "maps": torch.ones(2, 3, 3, 3, device="meta"),
            },
            NotImplementedError,
            "implementation='triton': part_mask_pool needs features on a CUDA or ROCm device; got "
            "meta: move it there, or use implementation='auto' or 'torch'",
        ),
        (
            {"features": torch.ones(2, 4, 3, 3, dtype=torch.int64)},
            TypeError,
            "features must be floating point; got torch.int64: pass features.float()",
        ),
        (
            {"maps": torch.ones(2, 3, 3, 3, dtype=torch.int64)},
            TypeError,
            "maps must be floating point; got torch.int64: pass maps.float()",
        ),
        *(
            (
                {name: torch.ones(shape, device="meta")},
                ValueError,
                f"{name} must be on DEVICE (as features); got meta: pass {name}.to('DEVICE')",
            )
            for name, shape in (("maps", (2, 3, 3, 3)), ("visibility", (2, 3)))
        ),
        (
            {"maps": torch.ones(1, 3, 3, 3)},
            ValueError,
            "maps must be [b, k, h, w] with b = 2 (as features); got [1, 3, 3, 3]",
        ),
        (
            {"features": torch.ones(2, 9, 4), "grid": (3, 4)},
            ValueError,
            "grid must have h * w = 9 cells (as the tokens); got (3, 4): drop prefix tokens first",
        ),
    ],
)
def test_errors(change, error, message, device, launches):
    """Each before anything is launched."""
    good = {
        "features": torch.ones(2, 4, 3, 3, device=device),
        "maps": torch.ones(2, 3, 3, 3, device=device),
    }
    moved = {
        name: value.to(device) if torch.is_tensor(value) and not value.is_meta else value
        for name, value in (good | change).items()
    }
    message = message.replace("DEVICE", str(good["maps"].device))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        part_mask_pool(**moved, implementation="triton")
    assert not launches
    # Maps of any precision beside any features: they are taken in float32.
    good["maps"] = good["maps"].double()
    found = part_mask_pool(**good, implementation="triton")
    assert launches
    torch.testing.assert_close(found, part_mask_pool(**good))


COMPILE = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from partlocal.pooling import PartMaskPool

def draw(b):
    features = torch.randn(b, 4, 5, 5, device=DEVICE, requires_grad=True)
    maps = torch.rand(b, 3, 8, 8, device=DEVICE, requires_grad=True)
    return features, maps, torch.rand(b, 3, device=DEVICE)

inputs = [draw(b) for b in (2, 5, 3, 8)]
layer = PartMaskPool(MODE, min_visibility=0.1, implementation="triton")
counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(layer, fullgraph=True, backend=counter)
for arguments in inputs:
    both = [f(*arguments) for f in (compiled, layer)]
    torch.testing.assert_close(*both)
    gradients = [torch.autograd.grad(y.parts.sin().sum(), arguments[:2]) for y in both]
    torch.testing.assert_close(*gradients)
assert counter.frame_count <= 2, counter.frame_count

batch = {0: torch.export.Dim("b")}
example = tuple(x.detach() for x in inputs[0])
program = torch.export.export(layer, example, dynamic_shapes=(batch, batch, batch))
assert "partlocal" not in str(program.graph), program.graph  # runs where we are not installed
torch.testing.assert_close(program.module()(*inputs[1]), layer(*inputs[1]))
"""


@pytest.mark.parametrize("mode", MODES)
def test_compile(mode, device):
    script = COMPILE.replace("DEVICE", repr(device.type)).replace("MODE", repr(mode))
    subprocess.run([sys.executable, "-c", script], check=True)


def test_module(device):
    layer = PartMaskPool("mean", implementation="triton")
    features, maps, _ = inputs((3, 3), 4, 2, 1, torch.float32, device)
    expected = part_mask_pool(features, maps, "mean", implementation="triton")
    assert torch.equal(layer(features, maps).parts, expected.parts)
