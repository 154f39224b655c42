import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from partlocal.masked_norm import MaskedBatchNorm


def test_example():
    """By hand: 1 and 3 have mean 2 and variance 1 (unbiased 2); what is absent does not count."""
    norm = MaskedBatchNorm(1, eps=0.0)
    x = torch.tensor([[1.0], [3.0], [50.0]])
    there = torch.tensor([[True], [True], [False]])
    assert norm(x, there).flatten().tolist() == [-1, 1, 0]
    torch.testing.assert_close(norm.running_mean, torch.tensor([0.1 * 2]))
    torch.testing.assert_close(norm.running_var, torch.tensor([0.9 + 0.1 * 2]))
    norm.eval()
    expected = [(v - 0.2) / 1.1**0.5 for v in (1, 3)]
    torch.testing.assert_close(norm(x, there).flatten(), torch.tensor([*expected, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference(dtype):
    """Where everything is there: torch's BatchNorm, its gradients and its running statistics."""
    torch.manual_seed(0)
    mine = MaskedBatchNorm(7, dtype=dtype)
    theirs = nn.BatchNorm1d(7, affine=False, dtype=dtype)
    for _ in range(3):
        x = (3 * torch.randn(9, 7, dtype=dtype) + 1).requires_grad_()
        y, expected = mine(x, torch.ones(9, 7, dtype=torch.bool)), theirs(x)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        found = torch.autograd.grad((y * weights).sum(), x)[0]
        torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), x)[0])
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(mine.state_dict()[name], value)
    x = torch.randn(1, 7, dtype=dtype)
    there = torch.ones(1, 7, dtype=torch.bool)
    torch.testing.assert_close(mine.eval()(x, there), theirs.eval()(x))


@given(st.integers(0, 2**16), st.integers(2, 12), st.floats(0, 1))
@settings(max_examples=40)
def test_properties(seed, b, share):
    """Columns are torch's BatchNorm of what is there; values that are absent do not matter."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(b, 5, generator=rng, dtype=torch.float64)
    there = torch.rand(b, 5, generator=rng) >= share
    norm = MaskedBatchNorm(5, dtype=torch.float64)
    y = norm(x, there)
    assert torch.equal(y, MaskedBatchNorm(5, dtype=torch.float64)(x.where(there, x + 9), there))
    assert not y[~there].any()
    for column in range(5):
        rows = there[:, column]
        if rows.sum() > 1:
            single = nn.BatchNorm1d(1, affine=False, dtype=torch.float64)
            expected = single(x[rows, column].unsqueeze(1)).flatten()
            torch.testing.assert_close(y[rows, column], expected)
            torch.testing.assert_close(norm.running_var[column], single.running_var[0])
        else:
            assert not y[:, column].any()
            assert norm.running_mean[column] == 0
            assert norm.running_var[column] == 1


def test_gradcheck():
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    there = torch.rand(6, 4) > 0.3

    def call(x):
        return MaskedBatchNorm(4, dtype=torch.float64)(x, there)

    assert torch.autograd.gradcheck(call, (x,))
    assert torch.autograd.gradgradcheck(call, (x,))


def test_half():
    x = 100 + torch.randn(32, 3)
    there = torch.ones(32, 3, dtype=torch.bool)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        found = MaskedBatchNorm(3)(half, there)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, MaskedBatchNorm(3)(half.float(), there))
