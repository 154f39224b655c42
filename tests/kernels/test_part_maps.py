"""The kernels of `part_maps` against its definition in PyTorch."""

import re
import subprocess
import sys

import pytest
import torch
from cases import DTYPES, LAYOUTS, PHASES, check, covering, lay_out, name
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.kernels import part_maps as kernels
from partlocal.part_maps import PartMaps, part_maps

PARTS = {1: (0,), 4: (3, 1), 11: (10, 0, 4, 5, 6, 2), 19: (0, 18, 7)}
SIZES = {
    "same": ((6, 5), (6, 5)),
    "bins": ((8, 12), (4, 3)),
    "overlap": ((9, 13), (4, 5)),
    "finer": ((3, 4), (5, 9)),
    "one": ((7, 5), (1, 1)),
}
CASES = covering(
    {
        "n": list(PARTS),
        "sizes": list(SIZES),
        "b": [1, 3],
        "activation": ["softmax", "sigmoid", None],
        "norm": ["l2", "sum", None],
        "downsample": ["max", "area"],
        "norm_over": ["labels", "parts"],
        "layout": LAYOUTS,
        "dtype": DTYPES,
    }
)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def derivatives(logits, second=True, **how):
    """Maps and visibility, the gradient of the logits, and the gradients of that."""
    results = part_maps(logits, **how)
    grads = [draw(*x.shape, seed=3).to(x).requires_grad_() for x in results]
    (first,) = torch.autograd.grad(results, logits, grads, create_graph=second)
    if not second:
        return *results, first
    toward = draw(*first.shape, seed=4).to(first)
    return (
        *results,
        first,
        *torch.autograd.grad(
            first, (logits, *grads), toward, allow_unused=True, materialize_grads=True
        ),
    )


def check_all(logits, second=True, least=0.0, **how):
    found = derivatives(logits, second, implementation="triton", **how)
    plain = derivatives(logits, second, implementation="torch", **how)
    wide = logits.detach().double().requires_grad_()
    oracle = derivatives(wide, second, implementation="torch", **how)
    for one, other, truth in zip(found, plain, oracle, strict=True):
        check(one, other, truth, logits.dtype, least)
    return found


def test_number_of_cases():
    assert 25 <= len(CASES) <= 45, len(CASES)


@pytest.mark.parametrize("case", CASES, ids=name)
def test_definition(case, device):
    old, new = SIZES[case["sizes"]]
    # Positive where there is no activation: a norm of numbers near zero has steep derivatives.
    logits = draw(case["b"], case["n"], *old)
    logits = logits if case["activation"] else logits.abs() + 0.5
    logits = lay_out(logits.to(device, case["dtype"]), case["layout"]).requires_grad_()
    how = {key: case[key] for key in ("activation", "norm", "downsample", "norm_over")}
    # One label alone is 1 after its norm: its derivatives are sums of 1 / a^2 that cancel.
    least = 0.5**-2 if case["n"] == 1 and case["norm"] else 0.0
    check_all(logits, least=least, parts=PARTS[case["n"]], size=new, **how)


@settings(max_examples=15, deadline=None, phases=PHASES)
@given(data=st.data())
def test_properties(data, device):
    b, n = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 6))
    old = data.draw(st.tuples(*[st.integers(1, 9)] * 2))
    new = data.draw(st.tuples(*[st.integers(1, 9)] * 2))
    parts = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=5))  # twice, too
    logits = draw(b, n, *old, seed=data.draw(st.integers(0, 99)))
    dtype = data.draw(st.sampled_from(DTYPES))
    layout = data.draw(st.sampled_from(LAYOUTS))
    logits = lay_out(logits.to(device, dtype), layout).requires_grad_()
    downsample = data.draw(st.sampled_from(["max", "area"]))
    check_all(logits, False, parts=parts, size=new, downsample=downsample)


@pytest.mark.parametrize("norm", ["l2", "sum"])
def test_least_norm(norm, device):
    """Scores are divided by their norm, but by no less than 1e-6."""
    scores = torch.tensor([3.0, 4.0], device=device).view(1, 2, 1, 1)
    how = {"parts": (0, 1), "size": 1, "activation": None, "norm": norm}
    for unit in (1e-30, 1e-7, 1.4e-7, 2.1e-7, 1.0):
        found = part_maps(scores * unit, implementation="triton", **how)
        torch.testing.assert_close(found, part_maps(scores * unit, **how), rtol=1e-6, atol=0)


MAGNITUDES = {
    torch.float16: [1e-7, 1.0, 6e4],
    torch.bfloat16: [1e-30, 1e-6, 1.0, 1e38],
    torch.float32: [1e-30, 1e-6, 1.0, 1e38],
}


@settings(max_examples=20, deadline=None, phases=PHASES)
@given(data=st.data())
def test_extremes(data, device):
    """Logits near the limits of their dtype, labels that are masked out, in every mode."""
    b, n = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 5))
    old, new = (data.draw(st.tuples(*[st.integers(1, 6)] * 2)) for _ in range(2))
    dtype = data.draw(st.sampled_from(DTYPES))
    magnitude = data.draw(st.sampled_from(MAGNITUDES[dtype]))
    names = ("activation", "norm", "downsample", "norm_over")
    choices = (["softmax", "sigmoid", None], ["l2", "sum", None], ["max", "area"])
    drawn = [data.draw(st.sampled_from(c)) for c in (*choices, ["labels", "parts"])]
    how = dict(zip(names, drawn, strict=True)) | {"parts": (1, 0), "size": new}
    logits = draw(b, n, *old, seed=data.draw(st.integers(0, 99))).clamp(-1, 1) * magnitude
    logits = logits.to(device, dtype)
    if how["activation"] is None:  # probabilities
        logits = (logits / magnitude if magnitude > 1 else logits).abs()
    elif data.draw(st.booleans()):
        logits[:, 1] = -torch.inf
    logits = lay_out(logits, data.draw(st.sampled_from(LAYOUTS))).requires_grad_()
    found = part_maps(logits, implementation="triton", **how)
    plain = part_maps(logits, implementation="torch", **how)
    oracle = part_maps(logits.detach().double(), implementation="torch", **how)
    for one, other, truth in zip(found, plain, oracle, strict=True):
        check(one, other, truth, dtype)
    # Where scores are equal but for rounding, another pixel's may be the largest.
    grads = [draw(*x.shape, seed=1).to(x) for x in found]
    (first,) = torch.autograd.grad(found, logits, grads)
    assert first.isfinite().all() or (dtype == torch.float16 and magnitude < 1)


@pytest.mark.parametrize("downsample", ["max", "area"])
@pytest.mark.parametrize(("labels", "old"), [(40, 32), (3, 128)])
def test_a_row_of_several_blocks(downsample, labels, old, device):
    """28 cells, also of the paper's width, and a cell wider than a block of pixels."""
    logits = draw(1, labels, 9, old).to(device).requires_grad_()
    for size in ((2, 28), (2, 3), (1, 1)):
        check_all(logits, False, parts=(2, 0), size=size, downsample=downsample)


@pytest.mark.parametrize("downsample", ["max", "area"])
@pytest.mark.parametrize(("labels", "parts"), [(20, 9), (70, 2), (300, 40)])
def test_many_labels(downsample, labels, parts, device):
    """More parts than the smallest tile holds, and tiles that several warps share."""
    logits = draw(1, labels, 7, 5).to(device).requires_grad_()
    check_all(logits, False, parts=range(parts), size=(3, 2), downsample=downsample)


def test_hand_worked(device):
    logits = torch.tensor([[[[0.0, 3.0, 4.0, 1.0]], [[1.0, 4.0, 3.0, 0.0]]]], device=device)
    how = {"activation": None, "size": (1, 2), "implementation": "triton"}
    maps, visibility = part_maps(logits, (0, 1), **how)
    torch.testing.assert_close(maps[0, :, 0].cpu(), torch.tensor([[0.6, 1.0], [1.0, 0.6]]))
    assert visibility.tolist() == [[4.0, 4.0]]
    maps, _ = part_maps(logits, (0, 1), norm=None, downsample="area", **how)
    assert maps[0, :, 0].tolist() == [[1.5, 2.5], [2.5, 1.5]]


@pytest.mark.parametrize("downsample", ["max", "area"])
def test_the_first_of_equals_gets_the_gradient(downsample, device):
    """As in PyTorch, within a cell and, for the visibility, over all of them."""
    logits = torch.zeros(2, 3, 9, 9, device=device, requires_grad=True)
    found = check_all(logits, parts=(0, 2), size=4, downsample=downsample)
    assert found[2].ne(0).any()


@pytest.mark.parametrize("magnitude", [1e-20, 1e-4, 1e4, 1e20])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("norm", ["l2", "sum"])
def test_magnitudes(magnitude, activation, norm, device):
    if magnitude > 1e19 and activation is None:
        pytest.skip("the square of 1e20 is infinite in float32, in PyTorch too")
    logits = (draw(1, 4, 6, 6) * magnitude).to(device).requires_grad_()
    check_all(logits, False, parts=(1, 2), size=3, activation=activation, norm=norm)


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_labels(dtype, device):
    """A label at minus infinity has no probability."""
    logits = draw(1, 4, 6, 6).to(device, dtype)
    logits[:, 2] = -torch.inf
    maps, visibility = part_maps(logits, (2, 1), 3, implementation="triton")
    same = part_maps(logits, (2, 1), 3)
    assert maps[:, 0].eq(0).all()
    torch.testing.assert_close(maps, same.maps, atol=1e-2, rtol=0)
    torch.testing.assert_close(visibility, same.visibility)


@pytest.mark.parametrize("downsample", ["max", "area"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
def test_nan_shows(downsample, activation, device):
    logits = draw(1, 3, 8, 8).to(device)
    logits[0, 1, 5, 5] = torch.nan
    how = {"activation": activation, "downsample": downsample, "implementation": "triton"}
    maps, visibility = part_maps(logits, (0, 1), 4, **how)
    assert maps[0, :, 2, 2].isnan().all()
    assert maps.isnan().sum() == 2
    assert visibility[0, 1].isnan()


@pytest.mark.parametrize("axis", [0, 1])
def test_far_strides(axis, device, far_apart):
    """The third image, or label, begins 2^31 numbers after the first, by a 32-bit stride."""
    strides = (2**30, 16) if axis == 0 else (48, 2**30)
    far = far_apart(2**31 + 256).as_strided((3, 3, 4, 4), (*strides, 4, 1))
    logits = draw(3, 3, 4, 4).to(device)
    both = [far.copy_(logits).requires_grad_(), logits.requires_grad_()]
    how = {"parts": (0, 2), "size": 2, "implementation": "triton"}
    found, expected = (derivatives(x, False, **how) for x in both)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_same_bits_and_inputs_as_they_were(device):
    logits = lay_out(draw(2, 11, 12, 12).to(device), "sliced").requires_grad_()
    before = logits.detach().clone()
    how = {"parts": (1, 2, 3), "size": 5, "implementation": "triton"}
    first, second = (derivatives(logits, **how) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert torch.equal(logits, before)


def test_layout_of_the_gradient(device):
    for layout in ("contiguous", "channels last"):
        logits = lay_out(draw(2, 3, 6, 6).to(device), layout).requires_grad_()
        part_maps(logits, (1,), 3, implementation="triton").maps.sum().backward()
        assert logits.grad.stride() == logits.stride()


@pytest.mark.parametrize("active", [torch.float16, torch.bfloat16])
def test_autocast(active, device):
    logits = draw(2, 6, 8, 8).to(device)
    with torch.autocast(device.type, dtype=active):
        found, expected = (
            part_maps(logits, (1, 2), 4, implementation=i) for i in ("triton", "torch")
        )
        with torch.autocast(device.type, enabled=False):
            off = part_maps(logits, (1, 2), 4, implementation="triton")
    plain = part_maps(logits, (1, 2), 4, implementation="triton")
    assert all(torch.equal(*pair) for pair in zip(off, plain, strict=True))
    assert found.maps.dtype == active
    assert found.visibility.dtype == torch.float32
    # The interpreter cuts bfloat16 off where a GPU rounds: one unit in the last place.
    torch.testing.assert_close(found.maps, expected.maps, rtol=torch.finfo(active).eps, atol=1e-6)


@pytest.mark.parametrize("use_max", [True, False])
def test_opcheck(use_max, device):
    logits = draw(2, 4, 9, 9).to(device).requires_grad_()
    how = ([1, 3], [4, 4], "softmax", "l2", False, use_max, torch.float16)
    torch.library.opcheck(kernels.maps_and_peaks, (logits, *how))
    maps, cell, peak, at = kernels.maps_and_peaks(logits.detach(), *how)
    grads = [torch.randn_like(x, dtype=torch.float32).requires_grad_() for x in (maps, peak)]
    arguments = (*grads, logits, cell, at, [1, 3], "softmax", "l2", False)
    torch.library.opcheck(kernels.maps_backward, arguments)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid", None])
@pytest.mark.parametrize("norm", ["l2", "sum", None])
@pytest.mark.parametrize("norm_over", ["labels", "parts"])
@pytest.mark.parametrize("downsample", ["max", "area"])
def test_gradient_formula(activation, norm, norm_over, downsample, device):
    """What second derivatives differentiate is the derivative of the definition, in float64."""
    logits = draw(2, 4, 7, 6).to(device).double().requires_grad_()
    how = {"activation": activation, "norm": norm, "norm_over": norm_over, "downsample": downsample}
    results = part_maps(logits, (3, 1), (3, 4), **how)
    grads = [draw(*x.shape, seed=1).to(x) for x in results]
    (expected,) = torch.autograd.grad(results, logits, grads)
    options = (activation or "none", norm or "none", norm_over == "parts")
    given_max = downsample == "max"
    arguments = ([3, 1], (3, 4), *options, given_max, torch.float32)
    _, cell, _, at = kernels.maps_and_peaks(logits.detach().float(), *arguments)
    found = kernels.gradient(*grads, logits, cell, at, [3, 1], *options)
    torch.testing.assert_close(found, expected.to(found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": torch.ones(1, 1025, 2, 2)},
            NotImplementedError,
            "implementation='triton': part_maps takes logits of at most 1024 labels; got 1025: "
            "use implementation='auto' or 'torch'",
        ),
        (
            {"logits": torch.ones(1, 3, 2, 2, dtype=torch.float64)},
            NotImplementedError,
            "implementation='triton': part_maps needs logits in float32, float16 or bfloat16; got "
            "torch.float64: use implementation='auto' or 'torch'",
        ),
        (
            {"logits": torch.ones(1, 3, 2, 2, device="meta")},
            NotImplementedError,
            "implementation='triton': part_maps needs logits on a CUDA or ROCm device; got meta: "
            "move it there, or use implementation='auto' or 'torch'",
        ),
        (
            {"logits": torch.ones(1, 3, 2, 2, dtype=torch.int64)},
            TypeError,
            "logits must be floating point; got torch.int64: for label images pass one-hot maps "
            "as float, with activation=None",
        ),
        (
            {"parts": (3,)},
            ValueError,
            "parts must be label indices from 0 to 2 (logits hold 3 labels); got 3: select parts "
            "from the parser's own label set",
        ),
    ],
)
def test_errors(change, error, message, device, launches):
    """Each before anything is launched."""
    good = {"logits": torch.ones(1, 3, 2, 2), "parts": (0,), "size": 1}
    moved = {
        name: value.to(device) if torch.is_tensor(value) and not value.is_meta else value
        for name, value in (good | change).items()
    }
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        part_maps(**moved, implementation="triton")
    assert not launches
    part_maps(good["logits"].to(device), (0,), 1, implementation="triton")
    assert launches


COMPILE = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from partlocal.part_maps import PartMaps

layer = PartMaps((1, 2), 3, implementation="triton")
inputs = [torch.randn(b, 3, 8, 8, device=DEVICE, requires_grad=True) for b in (2, 5, 3, 8)]
counter = CompileCounterWithBackend("aot_eager")
compiled = torch.compile(layer, fullgraph=True, backend=counter)
for logits in inputs:
    both = [f(logits) for f in (compiled, layer)]
    torch.testing.assert_close(*both)
    torch.testing.assert_close(*(
        torch.autograd.grad(y.maps.sin().sum() + y.visibility.sum(), logits) for y in both
    ))
assert counter.frame_count <= 2, counter.frame_count

batch = {0: torch.export.Dim("b")}
program = torch.export.export(layer, (inputs[0].detach(),), dynamic_shapes=(batch,))
assert "partlocal" not in str(program.graph), program.graph  # runs where we are not installed
torch.testing.assert_close(program.module()(inputs[1]), layer(inputs[1]))
"""


def test_compile(device):
    script = COMPILE.replace("DEVICE", repr(device.type))
    subprocess.run([sys.executable, "-c", script], check=True)


def test_module(device):
    logits = draw(2, 5, 8, 8).to(device)
    layer = PartMaps((1, 2), 4, implementation="triton")
    found, expected = layer(logits), part_maps(logits, (1, 2), 4, implementation="triton")
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("label", [0, 2])
@pytest.mark.parametrize("norm", ["l2", "sum", None])
def test_infinite_logits_of_a_sigmoid(label, norm, device):
    """As overflow in half precision leaves them; no label that is not there spoils the norm."""
    logits = draw(1, 3, 4, 4).to(device)
    logits[0, label, 1, 2] = torch.inf
    found, expected = (
        part_maps(logits, (0,), 2, activation="sigmoid", norm=norm, implementation=implementation)
        for implementation in ("triton", "torch")
    )
    torch.testing.assert_close(found, expected)
