"""The kernels of `structure_correlation` against its definition in PyTorch."""

import re
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, LAYOUTS, PHASES, check, covering, lay_out, name
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.correlation import StructureCorrelation, structure_correlation
from partlocal.kernels import structure_correlation as kernels

CASES = covering(
    {
        "k": [1, 2, 6, 11, 20],
        "c": [1, 3, 64, 128, 130],
        "b": [1, 3],
        "layout": LAYOUTS,
        "dtype": DTYPES,
        "visibility": [None, "float", "bool"],
    }
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(k, c, b, layout, dtype, visibility, device):
    parts = draw(b, k, c)
    if k > 2:
        parts[0, 1] = 0
        parts[-1, 2] = parts[-1, 0]
    seen = draw(b, k, seed=1) > -0.5
    seen = {None: None, "float": seen.float(), "bool": seen}[visibility]
    # A transposed layout is to parts what channels last is to features.
    parts = lay_out(parts.to(device, dtype), layout)
    return parts.requires_grad_(), None if seen is None else seen.to(device)


def derivatives(parts, visibility, implementation):
    """The descriptor, its gradient, and the gradients of that."""
    out = structure_correlation(parts, visibility, implementation=implementation)
    grad = draw(*out.shape, seed=2).to(out).requires_grad_()
    (first,) = torch.autograd.grad(out, parts, grad, create_graph=True)
    toward = draw(*parts.shape, seed=3).to(first)
    second = torch.autograd.grad(first, (parts, grad), toward)
    return out, first, *second


def test_number_of_cases():
    assert 25 <= len(CASES) <= 45, len(CASES)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_definition(case, device):
    parts, visibility = inputs(**case, device=device)
    found = derivatives(parts, visibility, "triton")
    same = derivatives(parts, visibility, "torch")
    wide = parts.detach().double().requires_grad_()
    oracle = derivatives(wide, visibility, "torch")
    # Of one number a part, the cosine is constant: its derivatives are sums of 1 / x^2 that cancel.
    shortest = wide.detach()[wide != 0].abs().min().item()
    least = shortest**-2 if case["c"] == 1 else 0.0
    for one, other, truth in zip(found, same, oracle, strict=True):
        check(one, other, truth, case["dtype"], least)


KINDS = {
    "ordinary": lambda parts, i: parts[i],
    "zero": lambda parts, i: parts[i] * 0,
    "twin of the first": lambda parts, i: parts[0],
    "too short": lambda parts, i: parts[i] / parts[i].norm() * 0.95e-12,
    "long enough": lambda parts, i: parts[i] / parts[i].norm() * 1.05e-12,
}


@settings(max_examples=25, deadline=None, phases=PHASES)
@given(data=st.data())
def test_properties(data, device):
    """Any shape, layout and dtype, parts that are nothing or nearly so."""
    b, k, c = (data.draw(st.integers(1, most)) for most in (2, 7, 20))
    dtype, layout = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(LAYOUTS))
    magnitude = data.draw(st.sampled_from([1.0, 5e4 if dtype == torch.float16 else 1e15]))
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=k, max_size=k))
    parts = draw(b, k, c, seed=data.draw(st.integers(0, 99))).clamp(-1, 1) * magnitude
    chosen = [[KINDS[kind](image, i) for i, kind in enumerate(kinds)] for image in parts]
    parts = torch.stack([torch.stack(image) for image in chosen])
    parts = lay_out(parts.to(device, dtype), layout).requires_grad_()
    seen = (draw(b, k, seed=1) > -0.5).to(device)
    seen = data.draw(st.sampled_from([None, seen, seen.float()]))
    wide = parts.detach().double().requires_grad_()
    results = []
    for x, implementation in ((parts, "triton"), (parts, "torch"), (wide, "torch")):
        out = structure_correlation(x, seen, implementation)
        # An infinite distance has no gradient.
        grad = draw(*out.shape, seed=2).to(out).masked_fill(~out.isfinite(), 0)
        results.append((out, *torch.autograd.grad(out, x, grad)))
    for numbers in (slice(0, c), slice(c, None, 2), slice(c + 1, None, 2)):
        check(*(result[0][..., numbers] for result in results), dtype)
    length = wide.detach().norm(dim=2)
    steepest = (
        1 / length[length > kernels.NULL].min().item() if (length > kernels.NULL).any() else 1
    )
    if dtype != torch.float16 or magnitude == 1:  # where no distance was infinite
        check(*(result[1] for result in results), dtype, steepest)


@pytest.mark.parametrize("k", [1, 3, 33, 100, 256])
def test_many_parts(k, device):
    case = {"k": k, "c": 5, "b": 1, "layout": "contiguous", "dtype": torch.float32}
    parts, _ = inputs(**case, visibility=None, device=device)
    many = [parts, parts, parts.detach().double().requires_grad_()]
    results = []
    for x, implementation in zip(many, ("triton", "torch", "torch"), strict=True):
        out = structure_correlation(x, None, implementation)
        results.append((out, torch.autograd.grad(out.sin().sum(), x)[0]))
    for one, other, truth in zip(*results, strict=True):
        check(one, other, truth, torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"parts": torch.ones(1, 257, 1)},
            NotImplementedError,
            "implementation='triton': structure_correlation takes at most 256 parts; got 257: use "
            "implementation='auto' or 'torch'",
        ),
        (
            {"parts": torch.ones(1, 3, 4, dtype=torch.float64)},
            NotImplementedError,
            "implementation='triton': structure_correlation needs parts in float32, float16 or "
            "bfloat16; got torch.float64: use implementation='auto' or 'torch'",
        ),
        (
            {"parts": torch.ones(1, 3, 4, device="meta")},
            NotImplementedError,
            "implementation='triton': structure_correlation needs parts on a CUDA or ROCm device; "
            "got meta: move it there, or use implementation='auto' or 'torch'",
        ),
        (
            {"parts": torch.ones(1, 3, 4, dtype=torch.int32)},
            TypeError,
            "parts must be floating point; got torch.int32: pass parts.float()",
        ),
        (
            {"visibility": torch.ones(1, 4)},
            ValueError,
            "visibility must be [b, k] = [1, 3] (as parts); got [1, 4]",
        ),
        (
            {"visibility": torch.ones(1, 3, device="meta")},
            ValueError,
            "visibility must be on DEVICE (as parts); got meta: pass visibility.to('DEVICE')",
        ),
    ],
)
def test_errors(change, error, message, device, launches):
    """Each before anything is launched."""
    good = {"parts": torch.ones(1, 3, 4, device=device)}
    moved = {name: x if x.is_meta else x.to(device) for name, x in (good | change).items()}
    message = message.replace("DEVICE", str(good["parts"].device))
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        structure_correlation(**moved, implementation="triton")
    assert not launches
    structure_correlation(**good, implementation="triton")
    assert launches


def test_hand_worked(device):
    parts = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]], device=device)
    expected = torch.tensor([[0, 0, 3, 0, 5, 0], [3, 0, 3, 0, 4, 0.6], [3, 4, 5, 0, 4, 0.6]])
    found = structure_correlation(parts, implementation="triton")[0]
    torch.testing.assert_close(found.cpu(), expected)
    seen = torch.tensor([[0.5, 1.0, 0.0]], device=device)
    found = structure_correlation(parts, seen, implementation="triton")[0]
    assert found[:, 2:].eq(0).all()  # one part is zero, one not seen: no pair is left


@pytest.mark.parametrize("case", ["identical", "zero", "all zero"])
@pytest.mark.parametrize("visibility", [None, 1.0])
def test_identical_and_zero_parts(case, visibility, device):
    parts = draw(2, 4, 8)
    if case == "identical":
        parts[:, 1] = parts[:, 2]
    else:
        parts[:, 1 if case == "zero" else slice(None)] = 0
    parts = parts.to(device).requires_grad_()
    seen = None if visibility is None else torch.full((2, 4), visibility, device=device)
    pairs = structure_correlation(parts, seen, "triton")[..., 8:]
    # Pairs of part 1: with 0, 2, 3. Distance to its twin, or cosine of a zero part.
    number = 2 if case == "identical" else 1
    assert pairs[:, 1, number].eq(0).all()
    (gradient,) = torch.autograd.grad(pairs[:, 1, number].sum(), parts)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("scale", [1e-15, 4e-13, 1e-4, 1e4, 1e15])
def test_magnitudes(scale, device):
    """At 4e-13 two of the parts are shorter than 1e-12 and have no direction, the others do."""
    parts = (draw(1, 5, 7) * scale).to(device).requires_grad_()
    found = derivatives(parts, None, "triton")
    oracle = derivatives(parts.detach().double().requires_grad_(), None, "torch")
    plain = derivatives(parts, None, "torch")
    # Distances grow with the scale, cosines do not: each against its own kind.
    for numbers in (slice(0, 7), slice(7, None, 2), slice(8, None, 2)):
        one, other, truth = (x[0][..., numbers] for x in (found, plain, oracle))
        check(one, other, truth, torch.float32)
    check(found[1], plain[1], oracle[1], torch.float32)


def test_distance_comes_from_differences(device):
    near = torch.full((1, 2, 64), 100.0, device=device)
    near[0, 1] += 0.0009765625
    distance = structure_correlation(near, implementation="triton")[0, 0, 64].item()
    assert distance == pytest.approx(0.0009765625 * 8, rel=1e-6)


@pytest.mark.parametrize("shortest", [0.9e-12, 1.1e-12])
def test_parts_without_length(shortest, device):
    """With a visibility, a part of length 1e-12 or less is absent, and a longer one is there."""
    parts = torch.tensor([[[shortest, 0], [0, 2], [3, 3]]], device=device)
    seen = torch.ones(1, 3, device=device)
    found = structure_correlation(parts, seen, "triton")
    torch.testing.assert_close(found, structure_correlation(parts, seen, "torch"))
    assert (found[0, 0, 2:] != 0).any() == (shortest > 1e-12)


def test_nan_shows(device):
    """A part that is NaN is not taken for an absent one."""
    parts = draw(1, 3, 4).to(device)
    parts[0, 1, 2] = torch.nan
    found = structure_correlation(parts, torch.ones(1, 3, device=device), "triton")
    assert found[0, 1, 4:].isnan().all()
    assert found[0, [0, 2], 4:].isnan().sum() == 4  # each with the NaN part: distance and cosine


@pytest.mark.parametrize("axis", [0, 1])
def test_far_strides(axis, device, far_apart):
    """The third image, or part, begins 2^31 numbers after the first, by a 32-bit stride."""
    strides = (2**30, 4) if axis == 0 else (12, 2**30)
    far = far_apart(2**31 + 64).as_strided((3, 3, 4), (*strides, 1))
    parts = draw(3, 3, 4).to(device)
    both = [far.copy_(parts).requires_grad_(), parts.requires_grad_()]
    found, expected = (derivatives(x, None, "triton") for x in both)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_same_bits(device):
    parts, visibility = inputs(6, 130, 3, "sliced", torch.float32, "float", device)
    first, second = (derivatives(parts, visibility, "triton") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    pairs = first[0][..., 130:].unflatten(2, (5, 2))
    for i in range(6):
        for j in range(i):
            assert torch.equal(pairs[:, i, j], pairs[:, j, i - 1])  # the matrix is symmetric


def test_inputs_are_not_written(device):
    parts, visibility = inputs(6, 64, 3, "sliced", torch.float16, "float", device)
    before = parts.detach().clone(), visibility.clone()
    derivatives(parts, visibility, "triton")
    assert torch.equal(parts, before[0])
    assert torch.equal(visibility, before[1])


@pytest.mark.parametrize("active", [torch.float16, torch.bfloat16])
def test_autocast(active, device):
    parts = draw(2, 6, 32).to(device)
    with torch.autocast(device.type, dtype=active):
        found, expected = (structure_correlation(parts, None, i) for i in ("triton", "torch"))
        with torch.autocast(device.type, enabled=False):
            off = structure_correlation(parts, None, "triton")
    assert torch.equal(off, structure_correlation(parts, None, "triton"))
    assert found.dtype == active
    # The interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
    rounding = torch.finfo(active).eps
    torch.testing.assert_close(found, expected, rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("k", [1, 4])
def test_opcheck(k, device):
    parts, visibility = inputs(k, 8, 2, "sliced", torch.float32, "float", device)
    for seen in (None, visibility):
        torch.library.opcheck(kernels.structure_correlation, (parts, seen, torch.float16))
        grad = draw(2, k, 8 + 2 * (k - 1)).to(device).requires_grad_()
        torch.library.opcheck(kernels.structure_correlation_backward, (grad, parts, seen))


@pytest.mark.parametrize("visibility", [False, True])
def test_gradient_formula(visibility, device):
    """What second derivatives differentiate is the derivative of the definition, in float64."""
    parts = draw(2, 4, 3).to(device).double().requires_grad_()
    seen = torch.tensor([[1.0, 1, 0, 1], [1, 1, 1, 1]], device=device) if visibility else None
    out = structure_correlation(parts, seen)
    grad = draw(*out.shape, seed=1).to(out)
    (expected,) = torch.autograd.grad(out, parts, grad)
    found = kernels.gradient(grad, parts, seen)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-5, atol=1e-6)


COMPILE = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from partlocal.correlation import StructureCorrelation

layer = StructureCorrelation("triton")
inputs = [(torch.randn(b, 6, 8, device=DEVICE, requires_grad=True), torch.rand(b, 6, device=DEVICE))
          for b in (2, 5, 3, 8)]
counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(layer, fullgraph=True, backend=counter)
for parts, visibility in inputs:
    both = [f(parts, visibility) for f in (compiled, layer)]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(torch.autograd.grad(y.sin().sum(), parts) for y in both))
assert counter.frame_count <= 2, counter.frame_count

batch = {0: torch.export.Dim("b")}
example = tuple(x.detach() for x in inputs[0])
program = torch.export.export(layer, example, dynamic_shapes=(batch, batch))
assert "partlocal" not in str(program.graph), program.graph  # runs where we are not installed
torch.testing.assert_close(program.module()(*inputs[1]), layer(*inputs[1]))
"""


def test_compile(device):
    script = COMPILE.replace("DEVICE", repr(device.type))
    subprocess.run([sys.executable, "-c", script], check=True)


def test_module(device):
    layer = StructureCorrelation(implementation="triton")
    parts = draw(2, 6, 16).to(device)
    assert torch.equal(layer(parts), structure_correlation(parts, implementation="triton"))
