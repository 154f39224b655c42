"""The kernels of `negative_logsumexp` against its definition in PyTorch."""

import math
import re

import pytest
import torch
from cases import DTYPES, PHASES, check, covering, lay_out, name
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.kernels import negative_logsumexp as kernels
from partlocal.logsumexp import negative_logsumexp

CASES = covering(
    {
        "b": [1, 3, 16, 70],
        "d": [1, 3, 64, 130],
        "v": [1, 2, 63, 64, 300],
        "layout": ["contiguous", "sliced", "expanded", "offset", "channels last"],
        "dtype": DTYPES,
        "weight_dtype": DTYPES,
        "labels": ["all", "some ignored", "one class"],
    }
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(b, d, v, layout, dtype, weight_dtype, labels, device):
    x, weight = 5 * draw(b, d), draw(v, d, seed=1)
    own = torch.randint(v, (b,), generator=torch.Generator().manual_seed(2))
    if labels == "some ignored":
        own[::2] = -1
    elif labels == "one class":
        own[:] = v - 1
    if v > 2 and b > 2:
        weight[1], x[1] = 0, 0
    x, weight = (
        lay_out(x.to(device, dtype), layout),
        lay_out(weight.to(device, weight_dtype), layout),
    )
    return x.requires_grad_(), weight.requires_grad_(), own.to(device)


def derivatives(x, weight, labels, implementation, workspace=None, scale=32.0):
    results = negative_logsumexp(
        x, weight, labels, scale, implementation=implementation, workspace=workspace
    )
    weights = [draw(len(x), seed=seed).to(results[0]) for seed in (3, 4)]
    total = sum(
        (w * r).masked_fill(r.isinf(), 0).sum() for w, r in zip(weights, results, strict=True)
    )
    return *results, *torch.autograd.grad(total, (x, weight))


def test_number_of_cases():
    assert 25 <= len(CASES) <= 45, len(CASES)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_definition(case, device):
    x, weight, labels = inputs(**case, device=device)
    found = derivatives(x, weight, labels, "triton")
    same = derivatives(x, weight, labels, "torch")
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    oracle = derivatives(*wide, labels, "torch")
    none = oracle[0].isinf()
    assert torch.equal(found[0].isinf(), none)
    for one, other, truth in zip(found[:2], same, oracle, strict=False):
        check(one[~none], other[~none], truth[~none], torch.float32)
    half = x.dtype == weight.dtype == torch.bfloat16
    for one, other, truth in zip(found[2:], same[2:], oracle[2:], strict=True):
        check(one, other, truth, torch.bfloat16 if half else one.dtype, least=1.0)


@pytest.mark.parametrize("workspace", [1, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_of_classes(workspace, dtype, device):
    x, weight, labels = inputs(9, 40, 700, "contiguous", dtype, dtype, "all", device)
    whole = derivatives(x, weight, labels, "triton")
    parts = derivatives(x, weight, labels, "triton", workspace)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    )
    torch.testing.assert_close(parts, whole, **tolerance)
    again = derivatives(x, weight, labels, "triton", workspace)
    assert all(map(torch.equal, parts, again))


@settings(max_examples=20, deadline=None, phases=PHASES)
@given(data=st.data())
def test_properties(data, device):
    """Any shape and scale, rows and embeddings of any length."""
    b, d, v = (data.draw(st.integers(1, most)) for most in (5, 20, 90))
    scale = data.draw(st.sampled_from([1.0, 64.0]))
    long = data.draw(st.sampled_from([1e-9, 1.0, 1e9]))
    x, weight, labels = inputs(
        b, d, v, "contiguous", torch.float32, torch.float32, "some ignored", device
    )
    x = (x.detach() * long).requires_grad_()
    found = derivatives(x, weight, labels, "triton", scale=scale)
    same = derivatives(x, weight, labels, "torch", scale=scale)
    for one, other in zip(found[:2], same[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found[2] * long, same[2] * long, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[3], same[3], rtol=1e-3, atol=1e-3)


def test_hand_worked(device):
    # cosines 0.6, 0.8, 0; the target, 0.8, is left out
    x = torch.tensor([[3.0, 4.0]], device=device)
    weight = torch.tensor([[7.0, 0.0], [0.0, 0.1], [4.0, -3.0]], device=device)
    own = torch.tensor([1], device=device)
    lse, cos = negative_logsumexp(x, weight, own, 10.0, implementation="triton")
    assert lse.item() == pytest.approx(math.log(math.exp(6) + 1), rel=1e-6)
    assert cos.item() == pytest.approx(0.8)


def test_columns_that_lie_far_apart(device, far_apart):
    """A transposed matrix of millions of classes: the last column is beyond 2^31 numbers."""
    memory = far_apart(127 * 2**25 + 64)
    weight = memory.as_strided((64, 128), (1, 2**25))
    weight.copy_(draw(64, 128))
    x, labels = draw(2, 128, seed=1).to(device), torch.tensor([3, 63], device=device)
    for kernel, plain in zip(
        derivatives(x.clone().requires_grad_(), weight.requires_grad_(), labels, "triton"),
        derivatives(x.clone().requires_grad_(), weight, labels, "torch"),
        strict=True,
    ):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


def test_what_is_not_finite_reaches_no_row(device):
    x, weight, labels = inputs(4, 8, 20, "contiguous", torch.float32, torch.float32, "all", device)
    with torch.no_grad():
        x[2, 3] = math.nan
    lse, _, grad_x, grad_weight = derivatives(x, weight, labels, "triton")
    assert lse.isnan().tolist() == [False, False, True, False]
    assert grad_weight.isfinite().all()
    assert grad_x.isnan().any(1).tolist() == [False, False, True, False]


def test_opcheck(device):
    from partlocal import logsumexp  # noqa: PLC0415

    x, weight, labels = inputs(4, 8, 20, "contiguous", torch.float32, torch.float32, "all", device)
    how = logsumexp.How(8.0, 10_000, False, True)
    torch.library.opcheck(logsumexp._operation, (x, weight, labels, -1, *how))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.float64)}, "needs embeddings in float32, float16 or"),
        ({"weight": torch.ones(4, 3, dtype=torch.float64)}, "needs weight in float32, float16 or"),
        (
            {"x": torch.ones(2, 3, device="meta")},
            "needs embeddings on a CUDA or ROCm device; got meta",
        ),
    ],
)
def test_errors(change, message, device, launches):
    good = {
        "x": torch.ones(2, 3, device=device),
        "weight": torch.ones(4, 3, device=device),
        "labels": torch.zeros(2, dtype=torch.long, device=device),
    }
    moved = {key: t if t.is_meta else t.to(device) for key, t in (good | change).items()}
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        negative_logsumexp(**moved, scale=4.0, implementation="triton")
    assert not launches
    negative_logsumexp(**good, scale=4.0, implementation="triton")
    assert launches


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9")
def test_precision_that_is_set_by_the_new_name():
    """The getter of old raises from then on."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        assert kernels._may_be_tf32()
        matmul.fp32_precision = "ieee"
        assert not kernels._may_be_tf32()
    finally:
        matmul.fp32_precision = before
