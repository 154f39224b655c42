import math
import re
import subprocess
import sys

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.correlation import (
    NULL,
    StructureCorrelation,
    present_numbers,
    structure_correlation,
)


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_example():
    # Three corners of a 3-4-5 triangle; the first at the origin, where the cosine is 0.
    parts = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [3.0, 4.0]]])
    expected = [
        [0.0, 0.0, 3.0, 0.0, 5.0, 0.0],
        [3.0, 0.0, 3.0, 0.0, 4.0, 0.6],
        [3.0, 4.0, 5.0, 0.0, 4.0, 0.6],
    ]
    torch.testing.assert_close(structure_correlation(parts)[0], torch.tensor(expected))
    # Given its visibility, the zero vector is an absent part, and its pairs say nothing.
    seen = structure_correlation(parts, visibility=torch.tensor([[0.1, 0.9, 0.9]]))[0]
    expected = [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [3.0, 0.0, 0.0, 0.0, 4.0, 0.6],
        [3.0, 4.0, 0.0, 0.0, 4.0, 0.6],
    ]
    torch.testing.assert_close(seen, torch.tensor(expected))


def slow_structure(parts, present):
    rows = []
    for i, own in enumerate(parts):
        row = list(own)
        for j, other in enumerate(parts):
            if i == j:
                continue
            lengths = math.hypot(*own), math.hypot(*other)
            products = (a / lengths[0] * b / lengths[1] for a, b in zip(own, other, strict=True))
            pair = [math.dist(own, other), sum(products) if min(lengths) > NULL else 0.0]
            row += pair if present[i] and present[j] else [0.0, 0.0]
        rows.append(row)
    return rows


@pytest.mark.parametrize("k", [1, 2, 6, 11])
@pytest.mark.parametrize("kind", ["none", "float", "bool"])
def test_reference(k, kind):
    parts = draw(3, k, 5)
    parts[2, 0] = 0
    seen = torch.rand(3, k, generator=torch.Generator().manual_seed(1)) > 0.3
    visibility = {"none": None, "float": seen.float(), "bool": seen}[kind]
    found = structure_correlation(parts, visibility)
    assert found.shape == (3, k, 5 + 2 * (k - 1))
    for image in range(3):
        present = seen[image] & (parts[image] != 0).any(1)
        present = [True] * k if kind == "none" else present.tolist()
        slow = slow_structure(parts[image].tolist(), present)
        torch.testing.assert_close(found[image], torch.tensor(slow).double())


def test_distance_comes_from_differences():
    # ||a||^2 + ||b||^2 - 2ab would lose all digits of this distance.
    near = torch.full((1, 2, 64), 100.0)
    near[0, 1] += 0.0009765625
    distance = structure_correlation(near)[0, 0, 64].item()
    assert distance == pytest.approx(0.0009765625 * 8, rel=1e-6)
    gram = (near.square().sum(2, keepdim=True) - near @ near.mT)[0, 0, 1].item()
    assert abs(math.sqrt(abs(2 * gram)) - distance) > 0.1 * distance


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["identical", "zero", "all zero"])
@pytest.mark.parametrize("given_visibility", [False, True])
def test_identical_and_zero_parts(dtype, case, given_visibility):
    parts = draw(2, 4, 8).to(dtype)
    if case == "identical":
        parts[:, 1] = parts[:, 2]
    elif case == "zero":
        parts[:, 1] = 0
    else:
        parts.zero_()
    parts.requires_grad_()
    visibility = torch.ones(2, 4) if given_visibility else None
    pairs = structure_correlation(parts, visibility)[..., 8:]
    (gradient,) = torch.autograd.grad(pairs.sum(), parts, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), parts)
    assert pairs.isfinite().all()
    assert gradient.isfinite().all()
    assert second.isfinite().all()
    # Order of part 1's pairs: 0, 2, 3.
    if case == "identical":
        assert pairs[:, 1, 2].eq(0).all()
        torch.testing.assert_close(pairs[:, 1, 3].float(), torch.ones(2), rtol=1e-2, atol=1e-2)
        (alone,) = torch.autograd.grad(structure_correlation(parts)[:, 1, 10].sum(), parts)
        assert alone.eq(0).all()
    else:
        assert pairs[:, 1, 1::2].eq(0).all()
        (alone,) = torch.autograd.grad(structure_correlation(parts)[:, 1, 9::2].sum(), parts)
        assert alone.eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("exponent", range(-30, -5))
def test_small_parts(dtype, exponent):
    """One short part among others of length near 1, and all of them short."""
    tiny = (draw(2, 4, 8) * 10.0**exponent).to(dtype)
    mixed = draw(2, 4, 8, seed=1).to(dtype)
    mixed[:, 1] = tiny[:, 1]
    for parts in (tiny, mixed):
        parts.requires_grad_()
        found = structure_correlation(parts)
        pairs = found[..., 8:].double()
        (gradient,) = torch.autograd.grad(pairs.sum(), parts)
        assert pairs.isfinite().all()
        assert gradient.isfinite().all()
        exact = parts.detach().double()
        null = exact.norm(dim=2) <= NULL
        cosines = structure_correlation(exact)[..., 9::2]
        rounding = torch.finfo(dtype).eps + 1e-6
        torch.testing.assert_close(pairs[..., 1::2], cosines, rtol=rounding, atol=rounding)
        rows = torch.tensor([[j for j in range(4) if j != i] for i in range(4)])
        apart = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
        apart = apart[:, torch.arange(4)[:, None], rows]
        torch.testing.assert_close(pairs[..., ::2], apart, rtol=rounding, atol=1e-22)
        either = null[:, :, None] | null[:, rows]
        assert torch.equal(pairs[..., 1::2] == 0, either)


@pytest.mark.parametrize("exponent", [-30, -20, -13, -11, -6])
def test_one_rule_of_presence(exponent):
    parts = draw(1, 3, 8, dtype=torch.float32)
    parts[:, 1] *= 10.0**exponent / parts[:, 1].norm()
    visibility = torch.ones(1, 3)
    there = present_numbers(parts, visibility)
    assert there[0, 1].eq(exponent > -12).all()
    assert torch.equal(structure_correlation(parts, visibility)[..., 8:] != 0, there[..., 8:])


def test_absent_parts_have_no_gradient_through_their_pairs():
    parts = draw(1, 3, 4).requires_grad_()
    visibility = torch.tensor([[1.0, 0.0, 1.0]])
    structure_correlation(parts, visibility)[..., 4:].sum().backward()
    assert parts.grad[0, 1].eq(0).all()
    assert parts.grad[0, 0].ne(0).any()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    order=st.permutations(range(5)),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
)
def test_properties(seed, order, scale):
    parts = draw(2, 5, 3, dtype=torch.float32, seed=seed)

    def pair_table(vectors):
        """Distance and cosine as full matrices, so that rows can be permuted."""
        rows = structure_correlation(vectors)[..., 3:].unflatten(2, (4, 2))
        full = torch.zeros(2, 5, 5, 2)
        for i in range(5):
            full[:, i, [j for j in range(5) if j != i]] = rows[:, i]
        return full

    table = pair_table(parts)
    torch.testing.assert_close(table, table.transpose(1, 2), rtol=0, atol=0)
    permuted = pair_table(parts[:, order])
    torch.testing.assert_close(permuted, table[:, order][:, :, order], rtol=1e-5, atol=1e-6)
    assert (table[..., 0] >= 0).all()
    assert table[..., 1].abs().max() <= 1 + 1e-6
    scaled = pair_table(parts * scale)
    torch.testing.assert_close(scaled[..., 0], table[..., 0] * scale, rtol=1e-5, atol=0)
    torch.testing.assert_close(scaled[..., 1], table[..., 1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    parts = draw(2, 6, 32).to(dtype)
    found = structure_correlation(parts)
    assert found.dtype == dtype
    expected = structure_correlation(parts.double())
    rounding = torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)
    assert torch.equal(found[..., :32], parts)


KINDS = {
    "ordinary": lambda parts, i: parts[i],
    "zero": lambda parts, i: parts[i] * 0,
    "twin of the first": lambda parts, i: parts[0],
    "opposite of the first": lambda parts, i: -parts[0],
    "too short": lambda parts, i: parts[i] / parts[i].norm() * 0.95e-12,
    "long enough": lambda parts, i: parts[i] / parts[i].norm() * 1.05e-12,
    "tiny": lambda parts, i: parts[i] * 1e-30,
}


def layouts(parts):
    """Return the same values contiguous, transposed, in steps, shifted and expanded."""
    b, k, c = parts.shape
    frame = torch.full((b, 2 * k + 1, 3 * c), torch.nan, dtype=parts.dtype)
    frame[:, 1::2, ::3] = parts
    shifted = torch.full((parts.numel() + 1,), torch.nan, dtype=parts.dtype)
    shifted[1:] = parts.flatten()
    return (
        parts,
        parts.mT.contiguous().mT,
        frame[:, 1::2, ::3],
        shifted[1:].view(b, k, c),
        parts[:1].expand(b, k, c),
        parts[:, :1].expand(b, k, c),
        parts[:, :, :1].expand(b, k, c),
    )


def full_table(parts, present):
    """Return distances and cosines of all pairs, [b, k, k, 2], in float64 by broadcasting."""
    apart = (parts[:, :, None] - parts[:, None]).square().sum(3)
    distance = torch.where(apart > 0, torch.where(apart > 0, apart, 1).sqrt(), 0)
    length = parts.norm(dim=2, keepdim=True)
    unit = torch.where(length > NULL, parts / torch.where(length > NULL, length, 1), 0)
    both = present[:, :, None] & present[:, None]
    cosine = (unit[:, :, None] * unit[:, None]).sum(3)
    return torch.where(both[..., None], torch.stack([distance, cosine], 3), 0)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_input(data):
    """Any shape, layout and dtype, parts that are nothing or nearly so, and extreme lengths."""
    b, k, c = (data.draw(st.integers(1, most)) for most in (2, 5, 7))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    size = data.draw(st.sampled_from([1.0, 5e4 if dtype == torch.float16 else 1e15]))
    kinds = data.draw(st.lists(st.sampled_from(list(KINDS)), min_size=k, max_size=k))
    parts = draw(b, k, c, seed=data.draw(st.integers(0, 99))).clamp(-1, 1) * size
    chosen = [[KINDS[kind](image, i) for i, kind in enumerate(kinds)] for image in parts]
    parts = torch.stack([torch.stack(image) for image in chosen]).to(dtype)
    parts = layouts(parts)[data.draw(st.integers(0, 6))].requires_grad_()
    seen = draw(b, k, seed=1) > -0.5
    visibility = data.draw(st.sampled_from([None, seen, seen.float()]))

    found = structure_correlation(parts, visibility)
    exact = parts.detach().double().contiguous().requires_grad_()
    length = exact.detach().norm(dim=2)
    there = torch.full((b, k), True) if visibility is None else seen & (length > NULL)
    slow = [slow_structure(p, t) for p, t in zip(exact.tolist(), there.tolist(), strict=True)]
    slow = torch.tensor(slow, dtype=torch.float64).view(found.shape)
    assert found.dtype == dtype
    assert torch.equal(found[..., :c], parts.detach())
    pairs, expected = found[..., c:].detach(), slow[..., c:]
    limit = torch.finfo(dtype)
    # Of float16, a distance may be more than it can hold.
    over, under = expected > limit.max * 1.01, expected < limit.max * 0.99
    assert pairs[over].eq(torch.inf).all()
    error = (pairs.double() - expected).abs()
    least = torch.tensor([1e-21, 1e-6]).double().repeat(k - 1)  # squares below are 0 in float32
    allowed = (limit.eps + 1e-6) * expected.abs() + least + limit.smallest_normal * limit.eps
    assert (error <= allowed)[under].all()

    grad = torch.where(pairs.isfinite(), draw(b, k, 2 * (k - 1), seed=2), 0).to(dtype)
    (given,) = torch.autograd.grad(found[..., c:], parts, grad)
    # Float16 cannot hold the slope of a short vector's cosine; else all is finite.
    assert given.isfinite().all() or dtype == torch.float16
    apart = (exact[:, :, None] - exact[:, None]).detach().norm(dim=3)
    if dtype == torch.float16 or ((apart > 0) & (apart < 1e-18)).any():
        return
    others = [[j for j in range(k) if j != i] for i in range(k)]
    table = full_table(exact, there)
    rows = torch.stack([table[:, i, other].flatten(1) for i, other in enumerate(others)], 1)
    (slope,) = torch.autograd.grad(rows, exact, grad.double(), materialize_grads=True)
    steepest = 1 + torch.where(length > NULL, 1 / length.clamp(min=NULL), 0)[..., None]
    terms = grad.double().abs().sum((1, 2))[:, None, None] * steepest
    assert (given.double() - slope).abs().le(limit.eps * slope.abs() + 3e-6 * terms).all()


def test_lengths_beyond_float32():
    """Their squares are not finite, and say so."""
    with pytest.raises(ValueError, match="got NaN or infinity in their squared lengths"):
        structure_correlation(torch.full((1, 2, 3), 1e20))
    far = torch.tensor([[[6e4], [-6e4]]], dtype=torch.float16)
    assert structure_correlation(far)[0, 0].tolist() == [6e4, torch.inf, -1.0]


def test_no_tensor_of_all_pairs(shapes_of):
    """One difference for each pair of parts: half of what broadcasting takes."""
    b, k, c = 2, 9, 50
    parts = draw(b, k, c).requires_grad_()
    for visibility in (None, torch.ones(b, k)):
        with shapes_of([parts]) as shapes:
            structure_correlation(parts, visibility).sin().sum().backward()
        assert 0 < shapes.largest <= b * k * (k - 1) // 2 * c
        with shapes_of([parts]) as shapes, torch.no_grad():
            structure_correlation(parts, visibility)
        assert 0 < shapes.largest <= b * k * (k - 1) // 2 * c
    with shapes_of([parts]) as shapes:  # what it forbids
        full_table(parts, torch.full((b, k), True))
    assert shapes.largest == b * k * k * c


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_and_inputs_as_they_were(dtype):
    parts, visibility = draw(3, 6, 32).to(dtype).requires_grad_(), draw(3, 6, seed=1)
    before = parts.detach().clone(), visibility.clone()

    def derivatives():
        found = structure_correlation(parts, visibility)
        (first,) = torch.autograd.grad(found.sin().sum(), parts, create_graph=True)
        return found, first, *torch.autograd.grad(first.square().sum(), parts)

    one, other = derivatives(), derivatives()
    assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
    assert torch.equal(parts, before[0])
    assert torch.equal(visibility, before[1])


@pytest.mark.parametrize("active", [torch.float16, torch.bfloat16])
def test_autocast(active):
    parts = draw(2, 6, 32, dtype=torch.float32)
    plain = structure_correlation(parts)
    with torch.autocast("cpu", dtype=active):
        found = structure_correlation(parts)
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(structure_correlation(parts), plain)
    assert torch.equal(found, plain.to(active))  # rounded once, at the end


def test_layouts():
    parts = draw(2, 4, 6)
    padded = torch.zeros(2, 5, 9, dtype=parts.dtype)
    padded[:, 1:, 2:8] = parts
    expected = structure_correlation(parts)
    for other in (padded[:, 1:, 2:8], parts.mT.contiguous().mT):
        torch.testing.assert_close(structure_correlation(other), expected)
    shared = parts[:1].expand(2, -1, -1)
    torch.testing.assert_close(structure_correlation(shared)[1], expected[0])


@pytest.mark.parametrize("k", [1, 3])
def test_gradcheck(k):
    parts = draw(2, k, 2).requires_grad_()
    visibility = torch.tensor([[1.0] * k, [0.0] + [1.0] * (k - 1)])
    assert torch.autograd.gradcheck(structure_correlation, parts)
    assert torch.autograd.gradgradcheck(structure_correlation, parts)
    assert torch.autograd.gradcheck(lambda p: structure_correlation(p, visibility), parts)
    assert torch.autograd.gradgradcheck(lambda p: structure_correlation(p, visibility), parts)


def test_module():
    layer = StructureCorrelation(implementation="torch")
    parts, visibility = draw(2, 6, 128), torch.tensor([[1.0] * 6, [0.0] * 6])
    expected = structure_correlation(parts, visibility, implementation="torch")
    assert expected.shape == (2, 6, 138)
    for module in (layer, eval(repr(layer))):
        assert torch.equal(module(parts, visibility), expected)
    assert repr(layer) == "StructureCorrelation(implementation='torch')"


GOOD = {"parts": torch.ones(2, 3, 4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"parts": torch.ones(2, 3)},
            ValueError,
            "parts must be [b, k, c], none of them 0; got [2, 3]",
        ),
        (
            {"parts": torch.ones(2, 0, 4)},
            ValueError,
            "parts must be [b, k, c], none of them 0; got [2, 0, 4]",
        ),
        (
            {"parts": torch.ones(0, 3, 4)},
            ValueError,
            "parts must hold at least one image; got an empty batch",
        ),
        (
            {"parts": torch.ones(2, 3, 4, dtype=torch.int32)},
            TypeError,
            "parts must be floating point; got torch.int32: pass parts.float()",
        ),
        (
            {"visibility": torch.ones(2, 4)},
            ValueError,
            "visibility must be [b, k] = [2, 3] (as parts); got [2, 4]",
        ),
        (
            {"visibility": torch.ones(2, 3, device="meta")},
            ValueError,
            "visibility must be on cpu (as parts); got meta: pass visibility.to('cpu')",
        ),
        (
            {"parts": torch.full((2, 3, 4), torch.nan)},
            ValueError,
            "parts must be finite; got NaN or infinity in their squared lengths: look for a "
            "division by zero or an overflow before this layer (parts.isfinite() shows where)",
        ),
        (
            {"visibility": torch.full((2, 3), torch.nan)},
            ValueError,
            "visibility must be finite; got NaN or infinity in its values: look for a division by "
            "zero or an overflow before this layer (visibility.isfinite() shows where)",
        ),
        (
            {"implementation": "triton"},
            NotImplementedError,
            "implementation='triton': structure_correlation needs parts on a CUDA or ROCm device; "
            "got cpu: move it there, or use implementation='auto' or 'torch'",
        ),
    ],
)
def test_errors(monkeypatch, change, error, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    structure_correlation(**GOOD)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        structure_correlation(**GOOD | change)


def test_compile():
    script = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from partlocal.correlation import StructureCorrelation

layer = StructureCorrelation()
inputs = [(torch.randn(b, 6, 8, requires_grad=True), torch.rand(b, 6)) for b in (2, 5, 3, 8)]
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
torch.testing.assert_close(program.module()(*inputs[1]), layer(*inputs[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True)
