import itertools
import math
import re
import subprocess
import sys

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from partlocal.labels import HELEN
from partlocal.part_maps import MapsAndVisibility, PartMaps, part_maps

ACTIVATIONS = ["softmax", "sigmoid", None]
NORMS = ["l2", "sum", None]


def draw(*shape, dtype=torch.float64, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype) * scale


def faces(labels, confidence=8.0, n=11):
    """Logits that are sure of a label image."""
    return torch.nn.functional.one_hot(labels, n).movedim(-1, 1).float() * confidence


def test_example():
    # Probabilities 1/2, 1/4, 1/4; their L2 norm is sqrt(6)/4.
    logits = torch.tensor([2.0, 1.0, 1.0]).log().view(1, 3, 1, 1).expand(1, 3, 2, 2)
    maps, visibility = part_maps(logits, parts=(1, 0), size=1)
    assert visibility[0].tolist() == pytest.approx([0.25, 0.5])
    assert maps.flatten().tolist() == pytest.approx([1 / math.sqrt(6), 2 / math.sqrt(6)])
    maps, _ = part_maps(logits, parts=(1, 0), size=1, norm_over="parts")
    assert maps.flatten().tolist() == pytest.approx([1 / math.sqrt(5), 2 / math.sqrt(5)])
    maps, _ = part_maps(logits, parts=(1, 0), size=1, norm="sum", norm_over="parts")
    assert maps.flatten().tolist() == pytest.approx([1 / 3, 2 / 3])


def slow_part_maps(logits, parts, size, activation, norm, downsample, norm_over):
    """Compute every cell of one image from its pixels, in plain loops over lists."""
    n, height, width = len(logits), len(logits[0]), len(logits[0][0])
    activated, normed = {}, {}
    for pixel in itertools.product(range(height), range(width)):
        scores = [logits[label][pixel[0]][pixel[1]] for label in range(n)]
        if activation == "softmax":
            exponentials = [math.exp(score - max(scores)) for score in scores]
            scores = [value / sum(exponentials) for value in exponentials]
        elif activation == "sigmoid":
            scores = [math.exp(min(score, 0)) / (1 + math.exp(-abs(score))) for score in scores]
        over = scores if norm_over == "labels" else [scores[part] for part in parts]
        length = {"l2": math.hypot(*over), "sum": sum(map(abs, over)), None: 1.0}[norm]
        activated[pixel] = scores
        normed[pixel] = [value / (max(length, 1e-6) if norm else 1) for value in scores]
    visibility = [max(scores[part] for scores in activated.values()) for part in parts]
    cells = []
    for i, j in itertools.product(range(size[0]), range(size[1])):
        rows, columns = shares(i, height, size[0]), shares(j, width, size[1])
        here = [(a * b, normed[y, x]) for (y, a), (x, b) in itertools.product(rows, columns)]
        if downsample == "max":
            cells.append([max(values[part] for _, values in here) for part in parts])
        else:
            cells.append([sum(share * values[part] for share, values in here) for part in parts])
    return torch.tensor(cells).double().T.reshape(len(parts), *size), visibility


def shares(cell, pixels, cells):
    """Return each pixel that a cell covers along an axis, and its share of the cell."""
    first, last = cell * pixels / cells, (cell + 1) * pixels / cells
    inside = range(cell * pixels // cells, -(-(cell + 1) * pixels // cells))
    return [(p, (min(last, p + 1) - max(first, p)) / (last - first)) for p in inside]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("downsample", ["max", "area"])
@pytest.mark.parametrize("norm_over", ["labels", "parts"])
def test_reference(activation, norm, downsample, norm_over):
    logits, parts = draw(2, 5, 8, 3), (3, 0, 4)
    options = (activation, norm, downsample, norm_over)
    maps, visibility = part_maps(logits, parts, (3, 2), *options)
    for image in range(2):
        slow = slow_part_maps(logits[image].tolist(), parts, (3, 2), *options)
        torch.testing.assert_close(maps[image], slow[0])
        torch.testing.assert_close(visibility[image], torch.tensor(slow[1]).double())


def layouts(logits):
    """Return the same values contiguous, channels last, in steps, shifted and expanded."""
    b, n, h, w = logits.shape
    frame = torch.full((b, n + 1, 2 * h, 3 * w + 1), torch.nan, dtype=logits.dtype)
    frame[:, 1:, ::2, 1::3] = logits
    shifted = torch.full((logits.numel() + 1,), torch.nan, dtype=logits.dtype)
    shifted[1:] = logits.flatten()
    return (
        logits,
        logits.contiguous(memory_format=torch.channels_last),
        frame[:, 1:, ::2, 1::3],
        shifted[1:].view(b, n, h, w),
        logits[:1].expand(b, n, h, w),
        logits[:, :1].expand(b, n, h, w),
        logits[..., :1].expand(b, n, h, w),
    )


# A number near the least, one near the least norm, one near 1, and one near the largest.
MAGNITUDES = {
    torch.float16: [1e-7, 1.0, 6e4],
    torch.bfloat16: [1e-30, 1e-6, 1.0, 1e38],
    torch.float32: [1e-40, 1e-6, 1.0, 1e38],
    torch.float64: [1e-300, 1e-6, 1.0, 1e300],
}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_input(data):
    """Any shape, layout, dtype and mode; labels that are masked out; extreme logits."""
    b, n, height, width = (data.draw(st.integers(1, most)) for most in (2, 4, 6, 6))
    size = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    parts = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(list(MAGNITUDES)))
    magnitude = data.draw(st.sampled_from(MAGNITUDES[dtype]))
    choices = (ACTIVATIONS, NORMS, ["max", "area"], ["labels", "parts"])
    options = [data.draw(st.sampled_from(choice)) for choice in choices]
    logits = draw(b, n, height, width, seed=data.draw(st.integers(0, 99)), scale=1.0)
    logits = (logits.clamp(-1, 1) * magnitude).to(dtype)
    if options[0] is None:  # probabilities
        logits = (logits / magnitude if magnitude > 1 else logits).abs()
    elif n > 1 and data.draw(st.booleans()):
        logits[:, 0] = -torch.inf
    logits = layouts(logits)[data.draw(st.integers(0, 6))].requires_grad_()
    if n > 1 and logits.isinf().all():  # an expanded one: every label is masked out
        return

    maps, visibility = part_maps(logits, parts, size, *options)
    rounding = torch.finfo(dtype).eps + 2e-6
    for image in range(b):
        slow = slow_part_maps(logits[image].tolist(), parts, size, *options)
        torch.testing.assert_close(maps[image].double(), slow[0], rtol=rounding, atol=2e-7)
        seen = torch.tensor(slow[1]).double()
        torch.testing.assert_close(visibility[image].double(), seen, rtol=2e-6, atol=2e-7)
    grads = [draw(*x.shape, seed=1).to(x.dtype) for x in (maps, visibility)]
    (given,) = torch.autograd.grad((maps, visibility), logits, grads)
    # Where all scores are 0 or nearly so, the slope is 1e6: more than float16 can hold.
    assert given.isfinite().all() or (dtype == torch.float16 and magnitude < 1)
    # Half precision is float32, rounded once; strides may change the order of its sums.
    if dtype in (torch.float16, torch.bfloat16):
        wide = logits.detach().float().requires_grad_()
        results = part_maps(wide, parts, size, *options)
        grads = [grad.float() for grad in grads]
        (expected,) = torch.autograd.grad(results, wide, grads)
        finfo, most = torch.finfo(dtype), expected.abs().max().item()
        least = finfo.smallest_normal * finfo.eps + 1e-6 * most
        held = expected.abs() < 0.99 * finfo.max
        near = {"rtol": finfo.eps, "atol": least}
        torch.testing.assert_close(given[held].float(), expected[held], **near)


def test_no_more_than_the_activations(shapes_of):
    """Nothing larger than the logits is made, or than the maps where their grid is finer."""
    b, n, k, side = 2, 5, 3, 12
    logits = draw(b, n, side, side, dtype=torch.float32).requires_grad_()
    options = itertools.product(ACTIVATIONS, NORMS, ["max", "area"], ["labels", "parts"])
    for option in options:
        for cells in (5, 17):
            most = b * max(n * side**2, k * cells**2)
            with shapes_of([logits]) as shapes:
                results = part_maps(logits, (0, 3, 1), cells, *option)
                sum(result.sin().sum() for result in results).backward()
            assert 0 < shapes.largest <= most, (option, cells)
    with shapes_of([logits]) as shapes:  # what it forbids
        (logits[:, :, None] * torch.ones(k, 1, 1)).sum(1)
    assert shapes.largest == b * n * k * side**2


@pytest.mark.parametrize("downsample", ["max", "area"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bits_and_inputs_as_they_were(downsample, dtype):
    logits = draw(3, 6, 20, 17).to(dtype).requires_grad_()
    before = logits.detach().clone()

    def derivatives(activation):
        found = part_maps(logits, (4, 1), 7, activation, downsample=downsample)
        loss = found.maps.sin().sum() + found.visibility.sin().sum()
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        return *found, first, *torch.autograd.grad(first.square().sum(), logits)

    for activation in ACTIVATIONS:
        one, other = derivatives(activation), derivatives(activation)
        assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
        assert torch.equal(logits, before)


@pytest.mark.parametrize("downsample", ["max", "area"])
def test_background_cells_stay_dark(downsample):
    logits = torch.zeros(1, 11, 128, 128)
    logits[:, 0] = math.log(0.99 / 0.01 * 10)
    assert logits.softmax(1)[:, 0].min() >= 0.99 - 1e-6
    six = HELEN.select("skin", "left_eye", "right_eye", "nose", "upper_lip", "lower_lip")
    assert part_maps(logits, six, 28, downsample=downsample).maps.max() <= 0.02
    # The other reading of the paper, which lights them up: this test can fail.
    over_parts = part_maps(logits, six, 28, downsample=downsample, norm_over="parts").maps
    assert over_parts.min() > 0.4


@pytest.mark.parametrize("downsample", ["max", "area"])
def test_a_part_without_pixels_has_no_mass(downsample):
    labels = torch.zeros(1, 128, 128, dtype=torch.long)
    labels[:, 30:90, 30:90] = 1
    labels[:, 50:60, 40:50] = 4
    maps, visibility = part_maps(faces(labels, 12.0), (1, 4, 5), 28, downsample=downsample)
    mass = maps.mean((2, 3))[0]
    assert mass[2] <= 1e-3
    assert mass[1] > 3e-3
    assert visibility[0, :2].min() > 0.99
    assert visibility[0, 2] < 0.01


def test_area_keeps_the_mean():
    logits = draw(1, 6, 128, 128, dtype=torch.float32)
    coarse = part_maps(logits, range(6), 28, downsample="area", norm=None).maps
    means = logits.double().softmax(1).mean((2, 3))
    assert ((coarse.double().mean((2, 3)) - means).abs() / means).max() < 1e-6


def test_gradient_of_ties_goes_to_the_first_pixel():
    logits = torch.zeros(1, 2, 4, 4, requires_grad=True)
    part_maps(logits, (1,), 2, norm=None).maps.sum().backward()
    assert logits.grad[0, 1].nonzero().tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    logits.grad = None
    part_maps(logits, (1,), 2).visibility.sum().backward()
    assert logits.grad[0, 1].nonzero().tolist() == [[0, 0]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    order=st.permutations(range(4)),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    downsample=st.sampled_from(["max", "area"]),
    activation=st.sampled_from(["softmax", "sigmoid"]),
)
def test_properties(seed, order, size, downsample, activation):
    logits = draw(2, 4, 7, 6, seed=seed, scale=20.0)
    options = {"activation": activation, "downsample": downsample}
    maps, visibility = part_maps(logits, range(4), size, **options)
    permuted = part_maps(logits, order, size, **options)
    assert torch.equal(permuted.maps, maps[:, order])
    assert torch.equal(permuted.visibility, visibility[:, order])
    assert maps.min() >= 0
    assert maps.max() <= 1 + 1e-9
    # At every pixel the unit vector holds all labels; a cell's average cannot be longer.
    if downsample == "area":
        assert maps.square().sum(1).max() <= 1 + 1e-9
    constant = logits[:, :, :1, :1].expand(-1, -1, 7, 6)
    flat = part_maps(constant, range(4), size, **options).maps
    torch.testing.assert_close(flat, flat[:, :, :1, :1].expand_as(flat))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_dtypes(dtype, scale):
    logits = draw(2, 5, 9, 9, scale=scale).to(dtype)
    maps, visibility = part_maps(logits, (1, 2), 4)
    assert maps.dtype == dtype
    assert visibility.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = part_maps(logits.double(), (1, 2), 4)
    rounding = torch.finfo(dtype).eps + 1e-6
    torch.testing.assert_close(maps.double(), expected.maps, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("active", [torch.float16, torch.bfloat16])
def test_autocast(active):
    logits = draw(2, 5, 9, 9, dtype=torch.float32)
    plain = part_maps(logits, (1, 2), 4, downsample="area")
    with torch.autocast("cpu", dtype=active):
        maps, visibility = part_maps(logits, (1, 2), 4, downsample="area")
        with torch.autocast("cpu", enabled=False):
            off = part_maps(logits, (1, 2), 4, downsample="area")
    assert torch.equal(off.maps, plain.maps)
    assert torch.equal(maps, plain.maps.to(active))  # rounded once, at the end
    assert torch.equal(visibility, plain.visibility)


def test_layouts():
    logits = draw(2, 5, 8, 8)
    wide = torch.zeros(2, 5, 8, 12, dtype=logits.dtype)
    wide[..., 3:11] = logits
    expected = part_maps(logits, (1, 4), 3)
    for other in (logits.contiguous(memory_format=torch.channels_last), wide[..., 3:11]):
        found = part_maps(other, (1, 4), 3)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    shared = logits[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(part_maps(shared, (1, 4), 3).maps[1], expected.maps[0])


def test_labels_that_are_masked_out():
    logits = draw(1, 4, 6, 6)
    logits[:, 2] = -torch.inf
    logits.requires_grad_()
    maps, visibility = part_maps(logits, (1, 2), 3)
    assert maps[:, 1].max() == 0
    assert visibility[0, 1] == 0
    maps.sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(activation, norm):
    logits = draw(1, 3, 3, 2).requires_grad_()
    for downsample, over in itertools.product(("max", "area"), ("labels", "parts")):

        def maps(scores, downsample=downsample, over=over):
            return tuple(part_maps(scores, (2, 0), 2, activation, norm, downsample, over))

        assert torch.autograd.gradcheck(maps, logits)
        assert torch.autograd.gradgradcheck(maps, logits)


@pytest.mark.parametrize("norm", ["l2", "sum"])
def test_least_norm(norm):
    """Scores are divided by their norm, but by no less than 1e-6."""
    scores = torch.tensor([3.0, 4.0]).view(1, 2, 1, 1)
    length = 5.0 if norm == "l2" else 7.0
    for unit in (1e-30, 1e-7, 1.4e-7, 2.1e-7, 1.0):
        maps, _ = part_maps(scores * unit, (0, 1), 1, activation=None, norm=norm)
        expected = scores.double() * unit / max(length * unit, 1e-6)
        torch.testing.assert_close(maps.double(), expected, rtol=1e-6, atol=0)


def test_no_nan_where_all_scores_are_zero():
    logits = torch.zeros(1, 3, 2, 2, requires_grad=True)
    for norm in ("l2", "sum"):
        maps, _ = part_maps(logits, (0, 1), 1, activation=None, norm=norm)
        (first,) = torch.autograd.grad(maps.square().sum(), logits, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), logits, allow_unused=True)
        assert maps.eq(0).all()
        assert first.isfinite().all()
        assert second.isfinite().all()


def test_module():
    parts = HELEN.select("left_eye", "nose")
    layer = PartMaps(parts, (5, 7), "sigmoid", "sum", "area", "parts", "torch")
    logits = draw(2, 11, 16, 16)
    expected = part_maps(logits, parts, (5, 7), "sigmoid", "sum", "area", "parts", "torch")
    assert isinstance(expected, MapsAndVisibility)
    rebuilt = eval(repr(layer))
    for module in (layer, rebuilt):
        torch.testing.assert_close(module(logits), expected, rtol=0, atol=0)
    assert repr(rebuilt) == repr(layer)
    assert repr(layer) == (
        f"PartMaps(parts={parts.indices}, size=(5, 7), activation='sigmoid', norm='sum', "
        "downsample='area', norm_over='parts', implementation='torch')"
    )


GOOD = {"logits": torch.zeros(2, 4, 8, 8), "parts": (1, 2), "size": 4}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"logits": torch.zeros(2, 4, 8)},
            ValueError,
            "logits must be [b, n, h, w], none of them 0; got [2, 4, 8]",
        ),
        (
            {"logits": torch.zeros(0, 4, 8, 8)},
            ValueError,
            "logits must hold at least one image; got an empty batch",
        ),
        (
            {"logits": torch.zeros(2, 4, 8, 8, dtype=torch.long)},
            TypeError,
            "logits must be floating point; got torch.int64: for label images pass one-hot maps "
            "as float, with activation=None",
        ),
        (
            {"logits": torch.full((1, 4, 8, 8), torch.nan)},
            ValueError,
            "logits must be finite; got NaN or infinity in the activations of the parts: look for "
            "a division by zero or an overflow before this layer (logits.isfinite() shows where)",
        ),
        ({"parts": ()}, ValueError, "parts must name at least one label; got none"),
        (
            {"parts": (1, 4, -1)},
            ValueError,
            "parts must be label indices from 0 to 3 (logits hold 4 labels); got 4, -1: select "
            "parts from the parser's own label set",
        ),
        *(
            (
                {"size": size},
                ValueError,
                f"size must be two positive whole numbers (height, width); got {shown}",
            )
            for size, shown in [(0, "(0, 0)"), ((2,), "(2,)"), (2.5, "2.5"), ((2, -1), "(2, -1)")]
        ),
        *(
            (
                {"parts": parts},
                TypeError,
                "parts must be label indices, or a selection from a LabelSet; got "
                f'{parts!r}: for names pass the selection, such as HELEN.select("nose")',
            )
            for parts in (("nose",), "nose", 3, (1, 2.0))
        ),
        (
            {"activation": "relu"},
            ValueError,
            "activation must be 'softmax', 'sigmoid' or None; got 'relu'",
        ),
        ({"norm": "l1"}, ValueError, "norm must be 'l2', 'sum' or None; got 'l1'"),
        ({"norm_over": "all"}, ValueError, "norm_over must be 'labels' or 'parts'; got 'all'"),
        ({"downsample": "avg"}, ValueError, "downsample must be 'area' or 'max'; got 'avg'"),
        (
            {"implementation": "triton"},
            NotImplementedError,
            "implementation='triton': part_maps needs logits on a CUDA or ROCm device; got cpu: "
            "move it there, or use implementation='auto' or 'torch'",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation must be 'auto', 'torch' or 'triton'; got 'cuda'",
        ),
    ],
)
def test_errors(monkeypatch, change, error, message):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    part_maps(**GOOD)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        part_maps(**GOOD | change)


@pytest.mark.parametrize("activation", ["sigmoid", None])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_outside_of_the_parts(activation, norm, value):
    """Labels that are not selected take part in the norm of those that are."""
    logits = draw(2, 4, 8, 8).abs()
    logits[1, 3, 5, 5] = value
    if value == torch.inf and activation == "sigmoid":  # an ordinary 1
        assert part_maps(logits, (0, 1), 4, activation, norm).maps.isfinite().all()
        return
    message = "logits must be finite; got NaN or infinity in the activations of all labels"
    with pytest.raises(ValueError, match=message):
        part_maps(logits, (0, 1), 4, activation, norm)


def test_module_checks_when_built(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match="size must be two positive whole numbers"):
        PartMaps((1, 2), size=(2,))
    with pytest.raises(TypeError, match="parts must be label indices"):
        PartMaps(("nose",), size=2)


def test_compile():
    script = """
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from partlocal.part_maps import PartMaps

logits = [torch.randn(b, 4, 12, 12, requires_grad=True) for b in (2, 5, 3, 8)]
for options in ({"norm": "sum", "downsample": "area", "activation": "sigmoid"}, {}):
    layer = PartMaps((1, 3), 5, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for x in logits:
        both = [f(x) for f in (compiled, layer)]
        torch.testing.assert_close(*both)
        losses = [maps.sin().sum() + visibility.sin().sum() for maps, visibility in both]
        torch.testing.assert_close(*(torch.autograd.grad(loss, x) for loss in losses))
    assert counter.frame_count <= 2, counter.frame_count

batch = torch.export.Dim("b")
program = torch.export.export(layer, (logits[0].detach(),), dynamic_shapes=({0: batch},))
assert "adaptive_max" not in program.graph_module.code
for found, expected in zip(program.module()(logits[1].detach()), layer(logits[1])):
    assert torch.equal(found, expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
