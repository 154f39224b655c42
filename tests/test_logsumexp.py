import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from partlocal import logsumexp
from partlocal.logsumexp import negative_logsumexp


def problem(b=6, d=5, v=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator)
    labels = torch.randint(v, (b,), generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def materialised(x, weight, labels, scale):
    cos = F.normalize(x) @ F.normalize(weight).T
    own = F.one_hot(labels.clamp(min=0), len(weight)).bool() & (labels >= 0)[:, None]
    negatives = (scale * cos).masked_fill(own, -math.inf).logsumexp(1)
    return negatives, cos.masked_fill(~own, 0).sum(1)


def gradients(results, inputs):
    weights = torch.linspace(-1, 2, len(results[0]), dtype=results[0].dtype)
    total = (results[0] * weights).sum() + (results[1] * weights.flip(0)).sum()
    return torch.autograd.grad(total, inputs)


def test_example():
    # cosines 0.6, 0.8, 0; the target, 0.8, is left out
    x, weight = torch.tensor([[3.0, 4.0]]), torch.tensor([[7.0, 0.0], [0.0, 0.1], [4.0, -3.0]])
    lse, cos = negative_logsumexp(x, weight, torch.tensor([1]), scale=10.0)
    assert lse.item() == pytest.approx(math.log(math.exp(6) + 1), rel=1e-6)
    assert cos.item() == pytest.approx(0.8)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    v=st.integers(2, 40),
    workspace=st.integers(1, 20_000),
    keep=st.booleans(),
)
def test_properties(seed, v, workspace, keep):
    x, weight, labels = problem(v=v, seed=seed)
    options = {"workspace": workspace, "recompute": not keep}
    lse, cos = negative_logsumexp(x, weight, labels, 16.0, **options)
    order = torch.randperm(v, generator=torch.Generator().manual_seed(seed))
    moved, same = negative_logsumexp(3 * x, weight[order] / 2, order.argsort()[labels], 16.0)
    torch.testing.assert_close(moved, lse)
    torch.testing.assert_close(same, cos)
    # A longer row is the same row: no gradient along it.
    grad_x, grad_weight = gradients((lse, cos), (x, weight))
    assert (grad_x * x).sum(1).abs().max() < 1e-12
    assert (grad_weight * weight).sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("workspace", [1, 1000, logsumexp.WORKSPACE])
def test_reference(workspace, recompute):
    x, weight, labels = problem()
    labels[2], labels[4] = -1, labels[5]
    ours = negative_logsumexp(x, weight, labels, 64.0, workspace=workspace, recompute=recompute)
    theirs = materialised(x, weight, labels, 64.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-14)
    for grad, expected in zip(
        gradients(ours, (x, weight)), gradients(theirs, (x, weight)), strict=True
    ):
        torch.testing.assert_close(grad, expected, rtol=0, atol=5e-13)


@pytest.mark.parametrize("recompute", [True, False])
def test_gradcheck(recompute):
    x, weight, labels = problem(4, 3, 5)

    def function(x, weight):
        return negative_logsumexp(x, weight, labels, 5.0, workspace=300, recompute=recompute)

    assert torch.autograd.gradcheck(function, (x, weight))


def test_opcheck():
    x, weight, labels = problem(4, 3, 5)
    for keep in (False, True):
        how = logsumexp.How(4.0, 100, keep, kernel=False)
        torch.library.opcheck(logsumexp._operation, (x, weight, labels, -1, *how))


def test_second_derivative_is_refused():
    x, weight, labels = problem()
    lse, _ = negative_logsumexp(x, weight, labels, 4.0)
    (grad,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"has no second derivative .* take logits"):
        grad.sum().backward()


def test_no_negatives():
    x, weight, labels = problem(v=1)
    results = negative_logsumexp(x, weight, labels, 64.0)
    assert (results[0] == -math.inf).all()
    grads = torch.autograd.grad(results[0].sum(), (x, weight))
    assert all((grad == 0).all() for grad in grads)


def test_zero_rows_and_embeddings():
    x, weight, labels = problem()
    with torch.no_grad():
        x[0], weight[labels[1]], weight[(labels[2] + 1) % 11] = 0, 0, 0
    lse, cos = negative_logsumexp(x, weight, labels, 64.0)
    assert lse[0].item() == pytest.approx(math.log(10))  # ten negatives of cosine 0
    assert cos[0] == cos[1] == 0
    grad_x, grad_weight = gradients((lse, cos), (x, weight))
    assert (grad_x[0] == 0).all()
    assert (grad_weight[labels[1]] == 0).all()
    assert grad_x.isfinite().all()
    assert grad_weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision(dtype):
    x, weight, labels = problem(8, 64, 300, dtype)
    results = negative_logsumexp(x, weight, labels, 64.0)
    exact = negative_logsumexp(x.double(), weight.double(), labels, 64.0)
    assert results[0].dtype == results[1].dtype == torch.float32
    torch.testing.assert_close(results[0].double(), exact[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(results[1].double(), exact[1], rtol=0, atol=5e-7)
    for grad, expected in zip(
        gradients(results, (x, weight)), gradients(exact, (x, weight)), strict=True
    ):
        assert grad.dtype == dtype
        error = (grad - expected).norm() / expected.norm()
        assert error < {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]


def test_autocast_changes_nothing():
    x, weight, labels = problem(dtype=torch.float32)
    plain = negative_logsumexp(x, weight, labels, 64.0)
    expected = gradients(plain, (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = negative_logsumexp(x, weight, labels, 64.0)
        grads = gradients(results, (x, weight))
    assert all(map(torch.equal, (*results, *grads), (*plain, *expected)))


def test_inputs_of_any_layout_are_read_where_they_are():
    x, weight, labels = problem()
    wide = torch.stack([weight.detach(), weight.detach()], 2)[:, :, 1].requires_grad_()
    tall = x.detach().T.contiguous().T.requires_grad_()
    same = torch.ones(1, 5, dtype=torch.float64).expand(6, 5).requires_grad_()
    for embeddings in (tall, same):
        before = embeddings.detach().clone(), wide.detach().clone()
        results = negative_logsumexp(embeddings, wide, labels.to(torch.int32), 4.0)
        grads = gradients(results, (embeddings, wide))
        solid = [t.clone().requires_grad_() for t in before]
        expected = negative_logsumexp(*solid, labels, 4.0)
        torch.testing.assert_close(results, expected)
        torch.testing.assert_close(grads, gradients(expected, solid))
        assert torch.equal(embeddings, before[0])
        assert torch.equal(wide, before[1])


def test_same_bits_again():
    x, weight, labels = problem(16, 32, 500, torch.float32)
    runs = []
    for _ in range(3):
        results = negative_logsumexp(x, weight, labels, 64.0, workspace=30_000)
        runs.append((*results, *gradients(results, (x, weight))))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


class Watch(TorchDispatchMode):
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


def test_no_tensor_of_samples_times_classes():
    b, d, v, workspace = 64, 8, 4000, 2**16
    x, weight, labels = (t.detach() for t in problem(b, d, v, torch.float32))
    how = logsumexp.How(64.0, workspace, keep=False, kernel=False)
    with Watch() as watch:
        lse, _, _, kept = logsumexp.forward(x, weight, labels, how)
        assert watch.largest <= workspace
        ones = torch.ones_like(lse)
        logsumexp.backward(ones, ones, x, weight, labels, lse, kept, how)
    assert watch.largest <= v * d * 4 < b * v * 4 / 7  # the gradient of weight is the largest
    with Watch() as watch:  # and the watch does see such a tensor
        logsumexp.forward(x, weight, labels, how._replace(keep=True))
    assert watch.largest >= b * v * 4


PEAK = """
import torch
from partlocal import ArcFace, margin_softmax, negative_logsumexp

def peak(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
"""


def resident(script):
    """Return the numbers that a script prints, which can ask for the `peak` of its memory."""
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")
    command = [sys.executable, "-c", PEAK + script]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return [float(line) for line in run.stdout.split()]


@pytest.mark.parametrize(
    ("b", "v"), [(1024, 2**16), pytest.param(4096, 2**18, marks=pytest.mark.slow)]
)
def test_peak_memory(b, v):
    (beyond,) = resident(f"""
def run(b, v):
    x, weight = torch.randn(b, 16, requires_grad=True), torch.randn(v, 16, requires_grad=True)
    before = peak("VmRSS")
    lse, cos = negative_logsumexp(x, weight, torch.arange(b), 64.0)
    (lse - cos).sum().backward()
    return before

run(64, 64)  # loads what is loaded once
before = run({b}, {v})
print(peak("VmHWM") - before)
""")
    # The gradient of weight, a few chunks, and some megabytes for the allocator; the matrix
    # would be 256 MB, or 4 GB.
    assert beyond < v * 16 * 4 + 3 * logsumexp.WORKSPACE + 2**25 < b * v * 4 / 2


MILLIONS = """
def rows(v, d, dtype):
    weight = torch.empty(v, d, dtype=dtype)
    block = torch.randn(2**14, d, generator=torch.Generator().manual_seed(0)).to(dtype)
    for part in weight.split(2**14):
        part.copy_(block[: len(part)])
    return weight

x = torch.randn(64, 512, requires_grad=True)
small = torch.randn(70, 512, requires_grad=True)  # loads what is loaded once
margin_softmax(x, small, torch.arange(64), ArcFace(0.5), 64.0).backward()
"""


def test_a_million_classes():
    """Beyond rows and their gradient at most 512 MB; the matrix alone would be 256 MB, thrice."""
    beyond, loss = resident(f"""{MILLIONS}
weight = rows(1_000_000, 512, torch.float32).requires_grad_()
before = peak("VmRSS")
loss = margin_softmax(x, weight, torch.arange(64), ArcFace(0.5), 64.0)
loss.backward()
print(peak("VmHWM") - before - weight.grad.nbytes, loss.item())
""")
    assert beyond < 128 * 2**20
    assert 0 < loss < 100


def test_ten_million_classes_in_half_precision():
    """Forward beside 10 GB of rows."""
    beyond, loss = resident(f"""{MILLIONS}
weight = rows(10_000_000, 512, torch.bfloat16)
before = peak("VmRSS")
with torch.no_grad():
    loss = margin_softmax(x.bfloat16(), weight, torch.arange(64), ArcFace(0.5), 64.0)
print(peak("VmHWM") - before, loss.item())
""")
    assert beyond < 128 * 2**20
    assert 0 < loss < 100


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 11], r"labels must be in \[0, 11\), .* ignore_index = -1; got 11 at position 1"),
        ([-5, 0], "got -5 at position 0"),
    ],
)
def test_errors(labels, message):
    x, weight, _ = problem(b=2)
    with pytest.raises(ValueError, match=message):
        negative_logsumexp(x, weight, torch.tensor(labels), 64.0)


def test_errors_of_minus_one_when_another_label_is_ignored():
    x, weight, _ = problem(b=2)
    negative_logsumexp(x, weight, torch.tensor([-100, 3]), 64.0, ignore_index=-100)
    with pytest.raises(ValueError, match="ignore_index = -100; got -1 at position 0"):
        negative_logsumexp(x, weight, torch.tensor([-1, 3]), 64.0, ignore_index=-100)


@pytest.mark.parametrize("labels", [torch.zeros(6), torch.zeros(6, dtype=torch.bool)])
def test_errors_of_label_types(labels):
    x, weight, _ = problem()
    with pytest.raises(TypeError, match=f"whole numbers; got {labels.dtype}: pass labels.long"):
        negative_logsumexp(x, weight, labels, 64.0)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((0, 5), (3, 5), (0,)), r"embeddings must be \[b, d\] with b at least 1; got \[0, 5\]"),
        (((2, 5), (3, 4), (2,)), r"weight must be \[v, d\] .* d = 5 .*; got \[3, 4\]"),
        (((2, 5), (0, 5), (2,)), r"weight must be \[v, d\] with v at least 1 .*; got \[0, 5\]"),
        (((2, 5), (3, 5), (3,)), r"labels must be \[b\] with b = 2 .*; got \[3\]"),
    ],
)
def test_errors_of_shapes(shapes, message):
    x, weight, labels = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        logsumexp.check_inputs(x, weight, labels.long(), 64.0)


def test_errors_of_options():
    x, weight, labels = problem()
    with pytest.raises(ValueError, match=r"scale must be positive and finite; got 0\.0"):
        negative_logsumexp(x, weight, labels, 0.0)
    with pytest.raises(NotImplementedError, match="negative_logsumexp needs embeddings on a CUDA"):
        negative_logsumexp(x, weight, labels, 64.0, implementation="triton")
