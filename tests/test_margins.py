import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses

from partlocal.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    MagFace,
    NormFace,
    SphereFace,
    margin_config,
    margin_from_config,
)

SIXTY = math.pi / 3
FAMILY = {
    "norm": NormFace(),
    "arc": ArcFace(0.5),
    "arc-paper": ArcFace(1.5),
    "arc-insightface": ArcFace(0.5, grad="detached", beyond="none"),
    "cos": CosFace(0.35),
    "sphere": SphereFace(4.0, annealing=5.0),
    "sphere-r": SphereFace(1.5, form="clamped", grad="detached"),
    "combined": CombinedMargin(1.2, 0.3, 0.2),
    "mag": MagFace(),
    "ada": AdaFace(),
}
family = pytest.mark.parametrize("margin", FAMILY.values(), ids=FAMILY.keys())


def phi(margin, cos, norm=20.0):
    cos = torch.tensor([cos], dtype=torch.float64)
    return margin(cos, torch.full_like(cos, norm)).item()


def slope(margin, cos):
    norm = torch.full_like(cos, 20.0)
    cos = cos.detach().requires_grad_()
    return torch.autograd.grad(margin(cos, norm).sum(), cos)[0]


@pytest.mark.parametrize(
    ("margin", "cos", "expected"),
    [
        (NormFace(), 0.5, 0.5),
        (CosFace(0.35), 0.5, 0.15),
        # cos 60 cos .5 - sin 60 sin .5
        (ArcFace(0.5), 0.5, 0.5 * 0.8775825618903728 - 0.8660254037844386 * 0.479425538604203),
        (ArcFace(0.5), -1.0, -1 - 0.5 * 0.479425538604203),
        (ArcFace(0.5, beyond="none"), -1.0, -0.8775825618903728),
        (ArcFace(1.5), 0.0, -0.9974949866040544),  # 90 degrees is still below pi - 1.5
        (SphereFace(4.0), 0.0, -3.0),  # 4 * 90 = 360 degrees, k = 2: 1 - 4
        (SphereFace(4.0), 0.5, -1.5),  # 240 degrees, k = 1: -cos 240 - 2
        (SphereFace(4.0), -1.0, -7.0),
        (SphereFace(4.0, annealing=5.0), 0.5, 1 / 6),  # (-1.5 + 5 / 2) / 6
        (SphereFace(1.5, form="clamped"), 0.5, 0.0),  # 90 degrees
        (SphereFace(1.5, form="clamped"), -0.8660254037844386, -1.0),  # 225 degrees, held at 180
        (CombinedMargin(2.0, 0.0, 0.0), 0.5, -0.5),
        (CombinedMargin(1.0, 0.3, 0.2), 0.5, math.cos(SIXTY + 0.3) - 0.2),
    ],
    ids=str,
)
def test_example(margin, cos, expected):
    assert phi(margin, cos) == pytest.approx(expected, abs=1e-14)


def test_example_of_the_combined_margin_that_others_get_wrong():
    # insightface ignores m1 and m2 once m3 > 0, and finds 19.2
    assert 64 * phi(CombinedMargin(1.0, 0.3, 0.2), 0.5) == pytest.approx(1.391, abs=1e-3)


def test_example_of_the_norm():
    assert phi(MagFace(), 0.5, norm=60.0) == pytest.approx(math.cos(SIXTY + 0.625), abs=1e-14)
    assert phi(MagFace(), 0.5, norm=1.0) == phi(ArcFace(0.45), 0.5)
    assert phi(MagFace(), -0.99, norm=999.0) == phi(ArcFace(0.8), -0.99)
    ada = AdaFace(m=0.4, h=0.5).eval()
    ada.mean.fill_(40.0)
    ada.std.fill_(10 - 1e-3)  # so that std + 0.001 is 10
    half = math.cos(SIXTY - 0.4 * 0.5) - 0.4 * 1.5  # z = 0.5 (50 - 40) / 10
    assert phi(ada, 0.5, norm=50.0) == pytest.approx(half, abs=1e-7)
    assert phi(ada, 0.5, norm=90.0) == pytest.approx(math.cos(SIXTY - 0.4) - 0.8, abs=1e-7)
    assert phi(ada, 0.5, norm=0.01) == pytest.approx(math.cos(SIXTY + 0.4), abs=1e-7)


def test_magface_penalty():
    margin = MagFace(l_a=10.0, u_a=100.0, weight=2.0)
    norm = torch.tensor([1.0, 10.0, 50.0, 100.0, 1e4], dtype=torch.float64, requires_grad=True)
    penalty = margin.penalty(norm)
    torch.testing.assert_close(
        penalty, 2 * torch.tensor([0.101, 0.101, 0.025, 0.02, 0.02], dtype=torch.float64)
    )
    (grad,) = torch.autograd.grad(penalty.sum(), norm)
    assert grad[2].item() == pytest.approx(2 * (1e-4 - 1 / 2500))  # 1/u^2 - 1/a^2
    assert grad[0] == grad[4] == 0


@settings(max_examples=40, deadline=None)
@given(theta=st.floats(0.0, math.pi), m=st.floats(0.0, 3.0))
def test_properties(theta, m):
    cos = math.cos(theta)
    assert phi(ArcFace(m), cos) <= cos + 1e-12
    assert phi(ArcFace(m, grad="detached"), cos) == pytest.approx(phi(ArcFace(m), cos), abs=1e-15)
    plain = phi(ArcFace(m, beyond="none"), cos)
    assert phi(CombinedMargin(1.0, m, 0.0), cos) == pytest.approx(plain, abs=1e-12)
    assert phi(CombinedMargin(1.0, 0.0, m), cos) == pytest.approx(phi(CosFace(m), cos), abs=1e-12)
    assert phi(SphereFace(1.0), cos) == pytest.approx(cos, abs=1e-12)
    assert phi(SphereFace(1 + m, annealing=1e12), cos) == pytest.approx(cos, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(m=st.floats(1.0, 6.0), form=st.sampled_from(["monotonic", "clamped"]))
def test_properties_sphereface_falls(m, form):
    cos = torch.linspace(0, math.pi, 500, dtype=torch.float64).cos()
    steps = SphereFace(m, form=form)(cos, cos).diff()
    assert (steps < 1e-12).all()
    assert steps.min() > -0.1  # and has no jump


@pytest.mark.parametrize(
    ("margin", "oracle"),
    [
        (ArcFace(0.5), losses.ArcFaceLoss(2, 2, margin=math.degrees(0.5))),
        (ArcFace(1.5), losses.ArcFaceLoss(2, 2, margin=math.degrees(1.5))),
        (CosFace(0.35), losses.CosFaceLoss(2, 2, margin=0.35)),
        (SphereFace(4.0), losses.SphereFaceLoss(2, 2, margin=4)),
        (SphereFace(3.0), losses.SphereFaceLoss(2, 2, margin=3)),
    ],
    ids=str,
)
def test_reference(margin, oracle):
    cos = torch.linspace(-0.9995, 0.9995, 1001, dtype=torch.float64, requires_grad=True)
    theirs = oracle.modify_cosine_of_target_classes(cos)
    ours = margin(cos, torch.ones_like(cos))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-14)
    (expected,) = torch.autograd.grad(theirs.sum(), cos)
    (grad,) = torch.autograd.grad(ours.sum(), cos)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-11)


def test_slope():
    theta = torch.tensor([0.05, 0.5, 1.0, 1.5, 2.8], dtype=torch.float64)
    exact = 64 * slope(ArcFace(0.5, beyond="none"), theta.cos())
    torch.testing.assert_close(exact, 64 * (theta + 0.5).sin() / theta.sin())
    assert exact.round().tolist() == [669, 112, 76, 58, -30]
    assert slope(ArcFace(0.5), theta.cos())[4] == 1  # beyond pi - m the gradient is the cosine's
    assert (slope(ArcFace(0.5, grad="detached", beyond="none"), theta.cos()) == 1).all()
    assert (slope(SphereFace(4.0, grad="detached"), theta.cos()) == 1).all()


@family
def test_gradcheck(margin):
    if isinstance(margin, AdaFace):
        margin = AdaFace().double().eval()
    generator = torch.Generator().manual_seed(1)
    cos = torch.rand(12, dtype=torch.float64, generator=generator) * 1.9 - 0.95
    norm = torch.rand(12, dtype=torch.float64, generator=generator) * 80 + 15
    if getattr(margin, "grad", "exact") == "detached":
        assert (slope(margin, cos) == 1).all()
    else:
        frozen = isinstance(margin, AdaFace)
        inputs = (cos.requires_grad_(), norm.requires_grad_(not frozen))
        assert torch.autograd.gradcheck(margin, inputs)
        assert torch.autograd.gradgradcheck(margin, inputs)


@family
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_ends(margin, dtype):
    # Rounding carries cosines of equal vectors past 1.
    edge = torch.tensor([1.0, -1.0, 1.000001, -1.000001, 1 - 6e-8, -1 + 6e-8, 0.0]).to(dtype)
    cos, norm = edge.clone().requires_grad_(), torch.full_like(edge, 20.0).requires_grad_()
    result = margin(cos, norm)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    result.sum().backward()
    assert result.isfinite().all()
    assert cos.grad.isfinite().all()
    assert norm.grad is None or norm.grad.isfinite().all()
    assert (result[1] < result[0]).item()


@family
def test_low_precision_is_widened_first(margin):
    margin = margin.eval() if isinstance(margin, AdaFace) else margin
    cos, norm = torch.linspace(-1, 1, 99).bfloat16(), torch.linspace(5, 120, 99).bfloat16()
    assert torch.equal(margin(cos, norm), margin(cos.float(), norm.float()))


def test_nan_stays():
    nan = torch.tensor([math.nan])
    assert all(margin(nan, torch.ones(1)).isnan().all() for margin in FAMILY.values())


def test_adaface_statistics():
    margin, generator = AdaFace(momentum=0.25), torch.Generator().manual_seed(0)
    mean, std = 20.0, 100.0
    for _ in range(3):
        norm = torch.rand(9, generator=generator) * 30
        shown = norm.requires_grad_()
        cos = torch.rand(9, generator=generator)
        result = margin(cos, shown)
        mean = 0.75 * mean + 0.25 * norm.mean().item()
        std = 0.75 * std + 0.25 * norm.std().item()
        z = ((norm.detach() - mean) / (std + 1e-3) * 0.333).clamp(-1, 1)
        expected = (cos.acos() - 0.4 * z).clamp(1e-3, math.pi - 1e-3).cos() - 0.4 - 0.4 * z
        torch.testing.assert_close(result, expected)
        assert not result.requires_grad
    assert margin.mean.item() == pytest.approx(mean)
    assert margin.std.item() == pytest.approx(std)
    before = margin.state_dict()
    assert set(before) == {"mean", "std"}
    before = {name: value.clone() for name, value in before.items()}
    margin.eval()(torch.zeros(4), torch.full((4,), 90.0))
    assert all(torch.equal(before[name], value) for name, value in margin.state_dict().items())


def test_adaface_counts_no_zeros():
    some, all_of_them = AdaFace(momentum=1.0), AdaFace(momentum=1.0)
    some(torch.zeros(5), torch.tensor([0.0, 10.0, 0.0, 20.0, 60.0]))
    all_of_them(torch.zeros(3), torch.tensor([10.0, 20.0, 60.0]))
    assert some.mean == all_of_them.mean == 30
    torch.testing.assert_close(some.std, torch.tensor([10.0, 20.0, 60.0]).std())
    torch.testing.assert_close(some.std, all_of_them.std)
    some(torch.zeros(2), torch.tensor([0.0, 5.0]))  # one norm has no spread: nothing is learnt
    assert some.mean == 30


@family
def test_config(margin):
    config = margin_config(margin)
    copy = margin_from_config(json.loads(json.dumps(config)))
    assert margin_config(copy) == config
    assert type(copy) is type(margin)
    assert isinstance(margin, AdaFace) or copy == margin
    assert config["name"] == type(margin).__name__


def test_module():
    assert replace(SphereFace(annealing=1000.0), annealing=5.0) == SphereFace(annealing=5.0)
    assert repr(AdaFace()) == "AdaFace(m=0.4, h=0.333, momentum=0.01)"
    with pytest.raises(AttributeError):
        ArcFace().m = 1.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ArcFace(28.6), r"m must be an angle in \[0, pi\) radians; got 28.6: degrees"),
        (lambda: ArcFace(math.nan), r"m must be an angle in \[0, pi\) radians; got nan"),
        (lambda: CosFace(-0.1), "m must be finite and at least 0; got -0.1"),
        (lambda: SphereFace(0.5), "m must be finite and at least 1; got 0.5"),
        (lambda: SphereFace(annealing=-1.0), "annealing must be finite and at least 0; got -1.0"),
        (lambda: CombinedMargin(m1=0.0), "m1 must be positive and finite; got 0.0"),
        (lambda: CombinedMargin(m2=4.0), r"m2 must be an angle in \[0, pi\) radians; got 4.0"),
        (lambda: MagFace(l_a=20.0, u_a=10.0), "0 < l_a < u_a; got l_a=20.0, u_a=10.0"),
        (lambda: MagFace(l_m=0.9), "l_m must be at most u_m; got l_m=0.9, u_m=0.8"),
        (lambda: AdaFace(momentum=0.0), r"momentum must be in \(0, 1\]; got 0.0"),
        (lambda: margin_from_config({"name": "Mystery"}), "margin name must be one of AdaFace, "),
        (lambda: margin_from_config({"name": "CosFace", "s": 1}), r"CosFace takes \['m'\]; got"),
    ],
)
def test_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_errors_of_unknown_options():
    # The runtime type check would refuse these first, so they are asked for behind its back.
    arc, sphere = ArcFace(), SphereFace()
    object.__setattr__(arc, "beyond", "wrap")
    object.__setattr__(sphere, "form", "soft")
    with pytest.raises(ValueError, match="beyond must be one of 'linear', 'none'; got 'wrap'"):
        arc.__post_init__()
    with pytest.raises(ValueError, match="form must be one of 'monotonic', 'clamped'; got 'soft'"):
        sphere.__post_init__()


def test_errors_of_an_unknown_class():
    with pytest.raises(TypeError, match=r"margin must be one of AdaFace, .* to be saved; got func"):
        margin_config(phi)
