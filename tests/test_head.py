import math
import subprocess
import sys
from copy import deepcopy

import jaxtyping
import pytest
import torch
from pytorch_metric_learning import losses
from torch.nn import functional as F

from partlocal.head import ArcFaceHead
from partlocal.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    MagFace,
    NormFace,
    SphereFace,
)
from partlocal.optim import AdamW
from partlocal.softmax import margin_softmax

FAMILY = {
    "norm": NormFace(),
    "arc": ArcFace(0.5),
    "arc-insightface": ArcFace(0.5, grad="detached", beyond="none"),
    "cos": CosFace(0.35),
    "sphere": SphereFace(4.0, annealing=5.0),
    "sphere-r": SphereFace(1.5, form="clamped", grad="detached"),
    "combined": CombinedMargin(1.2, 0.3, 0.2),
    "mag": MagFace(),
    "ada": AdaFace().eval(),
}
family = pytest.mark.parametrize("margin", FAMILY.values(), ids=FAMILY.keys())


def problem(b=8, d=6, v=20, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    x = 12 * torch.randn(b, d, dtype=torch.float64, generator=generator)
    weight = torch.randn(v, d, dtype=torch.float64, generator=generator)
    labels = torch.randint(v, (b,), generator=generator)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), labels


def materialised(x, weight, labels, margin, scale):
    cos = F.normalize(x) @ F.normalize(weight).T
    own = F.one_hot(labels, len(weight)).to(cos.dtype)
    target, norm = (cos * own).sum(1), x.norm(dim=1)
    changed = cos + own * (margin(target, norm) - target)[:, None]
    penalty = margin.penalty(norm) if hasattr(margin, "penalty") else 0
    return F.cross_entropy(scale * changed, labels, reduction="none") + penalty


def test_example():
    # One negative at cosine 0: softplus(0 - 2 cos(60 degrees + 0.5)).
    x = torch.tensor([[0.5, math.sqrt(0.75), 0.0]], dtype=torch.float64)
    weight = torch.eye(3, dtype=torch.float64)[[0, 2]]
    loss = margin_softmax(x, weight, torch.tensor([0]), ArcFace(0.5), 2.0)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2 * math.cos(math.pi / 3 + 0.5))))


def test_example_that_a_corrected_logsumexp_loses():
    # scale 64, margin 0.5, target cosine 0.5, and 100,000 negatives at cosine N / 64: an
    # ordinary log-sum-exp is 32 + 1e-7, and nothing of the negatives is left in fp32.
    v, target, negative = 100_001, 0.5, 0.0625
    tall = math.sqrt(1 - target**2 - negative**2)
    x = torch.tensor([[target, negative, tall]])
    weight = torch.tensor([[0.0, 1.0, 0.0]]).repeat(v, 1)
    weight[7] = torch.tensor([1.0, 0.0, 0.0])
    loss = margin_softmax(x, weight, torch.tensor([7]), ArcFace(0.5), 64.0)
    gap = math.log(v - 1) + 64 * negative - 64 * math.cos(math.pi / 3 + 0.5)
    assert gap == pytest.approx(14.00, abs=0.01)
    assert loss.item() == pytest.approx(gap + math.log1p(math.exp(-gap)), rel=1e-6)
    ordinary = torch.logsumexp(64 * (F.normalize(x) @ F.normalize(weight).T), 1)
    corrected = ordinary.exp() - torch.tensor([64 * target]).exp()
    assert corrected.clamp(min=1e-30).log().item() != pytest.approx(gap, abs=1)


@pytest.mark.parametrize(
    ("margin", "scale", "oracle"),
    [
        (ArcFace(0.5), 64.0, lambda: losses.ArcFaceLoss(20, 6, math.degrees(0.5), scale=64)),
        (ArcFace(1.5), 64.0, lambda: losses.ArcFaceLoss(20, 6, math.degrees(1.5), scale=64)),
        (CosFace(0.35), 30.0, lambda: losses.CosFaceLoss(20, 6, margin=0.35, scale=30)),
        (SphereFace(4.0), 8.0, lambda: losses.SphereFaceLoss(20, 6, margin=4, scale=8)),
    ],
    ids=["arc", "arc-paper", "cos", "sphere"],
)
def test_reference(margin, scale, oracle):
    x, weight, labels = problem()
    oracle = oracle()
    oracle.W.data = weight.detach().T.clone()
    loss = margin_softmax(x, weight, labels, margin, scale)
    # SphereFace there multiplies the logits by the embeddings' norms: it is given unit ones.
    expected = oracle(F.normalize(x), labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-14)
    grads = torch.autograd.grad(loss, (x, weight))
    theirs = torch.autograd.grad(expected, (x, oracle.W))
    torch.testing.assert_close(grads[0], theirs[0], rtol=0, atol=1e-13)
    torch.testing.assert_close(grads[1], theirs[1].T, rtol=0, atol=1e-12)


@family
@pytest.mark.parametrize("recompute", [True, False])
def test_reference_of_the_family(margin, recompute):
    x, weight, labels = problem()
    loss = margin_softmax(x, weight, labels, margin, 16.0, reduction="none", recompute=recompute)
    expected = materialised(x, weight, labels, margin, 16.0)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    grads = torch.autograd.grad(loss.sum(), (x, weight))
    theirs = torch.autograd.grad(expected.sum(), (x, weight))
    torch.testing.assert_close(grads, theirs, rtol=0, atol=2e-12)
    assert grads[0].norm() > 1e-3


def test_detached_is_the_gradient_of_the_cosine():
    x, weight, labels = problem()
    margin = ArcFace(0.5, grad="detached", beyond="none")
    cos = (F.normalize(x) @ F.normalize(weight).T).detach().requires_grad_()
    target = cos.gather(1, labels[:, None])
    phi = margin(target[:, 0], x.norm(dim=1))
    F.cross_entropy(64 * cos.scatter(1, labels[:, None], phi[:, None]), labels).backward()
    logits = 64 * cos.detach().scatter(1, labels[:, None], phi.detach()[:, None])
    share = logits.softmax(1) - F.one_hot(labels, 20)
    torch.testing.assert_close(cos.grad, 64 * share / 8)
    (grad,) = torch.autograd.grad(margin_softmax(x, weight, labels, margin, 64.0), weight)
    rows = F.normalize(weight.detach())
    pulled = cos.grad.T @ F.normalize(x.detach())
    pulled = (pulled - (pulled * rows).sum(1, keepdim=True) * rows) / weight.norm(dim=1)[:, None]
    torch.testing.assert_close(grad, pulled.detach())


# The others' gradient is, by intent, not that of their value.
@pytest.mark.parametrize("name", ["norm", "arc", "cos", "sphere", "combined", "mag"])
def test_gradcheck(name):
    x, weight, labels = problem(4, 5, 6)

    def function(x, weight):
        return margin_softmax(x, weight, labels, FAMILY[name], 4.0, reduction="none")

    assert torch.autograd.gradcheck(function, (x, weight))


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_aligned_embeddings(margin, dtype):
    # Duplicates of the class row, its opposite, and zeros: cosines 1, -1 and 0.
    weight = F.normalize(torch.randn(5, 16, generator=torch.Generator().manual_seed(0)))
    x = torch.stack([weight[0], 20 * weight[1], -weight[2], torch.zeros(16)])
    x, weight = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
    loss = margin_softmax(x, weight, torch.arange(4), margin, 64.0)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (x, weight)))


def test_ignored_samples_and_reductions():
    x, weight, labels = problem()
    some = labels.clone()
    some[[1, 4]] = 99
    options = {"margin": MagFace(), "scale": 16.0, "ignore_index": 99}
    each = margin_softmax(x, weight, some, reduction="none", **options)
    kept = some != 99
    assert (each[~kept] == 0).all()
    alone = margin_softmax(x[kept], weight, labels[kept], reduction="none", **options)
    torch.testing.assert_close(each[kept], alone)
    total = margin_softmax(x, weight, some, reduction="sum", **options)
    mean = margin_softmax(x, weight, some, **options)
    torch.testing.assert_close(total, alone.sum())
    torch.testing.assert_close(mean, alone.mean())
    grads = torch.autograd.grad(mean, (x, weight))
    expected = torch.autograd.grad(alone.mean(), (x, weight))
    torch.testing.assert_close(grads, expected)
    nobody = margin_softmax(x, weight, torch.full_like(labels, 99), **options)
    assert nobody == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(nobody, (x, weight)))


def test_one_class_has_nothing_to_learn():
    x, weight, labels = problem(v=1)
    loss = margin_softmax(x, weight, labels, ArcFace(), 64.0)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (x, weight)))


def test_norm_can_be_given():
    x, weight, labels = problem()
    unit, norm = F.normalize(x), x.norm(dim=1)
    for margin in (AdaFace().eval(), MagFace()):
        whole = margin_softmax(x, weight, labels, margin, 16.0)
        torch.testing.assert_close(margin_softmax(unit, weight, labels, margin, 16.0, norm), whole)
        assert not torch.isclose(margin_softmax(unit, weight, labels, margin, 16.0), whole)


def test_ignored_samples_leave_adaface_statistics_alone():
    x, weight, labels = problem(dtype=torch.float32)
    one, two = AdaFace(momentum=1.0), AdaFace(momentum=1.0)
    margin_softmax(x[:5], weight, labels[:5], one, 16.0)
    labels[5:] = -1
    margin_softmax(x, weight, labels, two, 16.0)
    torch.testing.assert_close(one.state_dict(), two.state_dict())


@family
def test_module(margin):
    x, weight, labels = problem(dtype=torch.float32)
    head = ArcFaceHead(6, 20, 16.0, margin)
    with torch.no_grad():
        head.weight.copy_(weight)
    head.eval()
    assert torch.equal(head(x, labels), margin_softmax(x, weight, labels, margin, 16.0))
    labels[3] = -1
    loss = head(x, labels, reduction="sum")
    expected = F.cross_entropy(head.logits(x, labels), labels, ignore_index=-1, reduction="sum")
    if hasattr(margin, "penalty"):
        expected = expected + margin.penalty(x.norm(dim=1))[labels >= 0].sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head.logits(x), 16 * F.normalize(x) @ F.normalize(weight).T)


@family
def test_diagnostics(margin):
    """Worked by hand from the matrix of cosines."""
    x, weight, labels = problem(64, 3, 20)
    labels[5] = -1
    head = ArcFaceHead(3, 20, 16.0, margin, dtype=torch.float64).eval()
    head.load_rows(weight.detach())
    loss, found = head(x, labels, diagnostics=True)
    assert torch.equal(loss, head(x, labels))
    cos = (F.normalize(x) @ F.normalize(weight).T).detach()
    kept = labels >= 0
    angle = cos[kept, labels[kept]].acos()
    right = (cos.argmax(1) == labels)[kept].double().mean().item()
    assert found.accuracy.item() == pytest.approx(right)
    assert found.angle.item() == pytest.approx(angle.mean().item())
    # Where the margin has moved an angle past pi, phi as a cosine of it would grow again.
    added = {"arc": 0.5, "arc-insightface": 0.5}.get(
        next(name for name, m in FAMILY.items() if m is margin)
    )
    if added is not None:
        beyond = (angle > math.pi - added).double().mean().item()
        assert 0 < beyond < 1
        assert found.beyond.item() == pytest.approx(beyond)
    assert not any(number.requires_grad for number in found)


def test_angles_past_pi():
    cos, norm = torch.tensor([-0.99, -0.5, 0.5]), torch.full((3,), 110.0)
    past = [[True, False, False]] * 2 + [[True, True, True], [True, True, False]]
    margins = (ArcFace(0.5), MagFace(), SphereFace(4.0), CombinedMargin(1.4, 0.3, 0.2))
    assert [m.past_pi(cos, norm).tolist() for m in margins] == past
    ada = AdaFace(m=0.4).eval()  # a short embedding's angle grows by m
    assert ada.past_pi(cos, torch.full((3,), -1e9)).tolist() == [False] * 3
    ada.std.fill_(1.0)
    assert ada.past_pi(cos, torch.full((3,), 1.0)).tolist() == [True, False, False]
    assert ada.past_pi(cos, norm).tolist() == [False] * 3


def test_sampled_classes():
    """The sum runs over the batch's own classes and as many others as were asked for."""
    x, _, labels = problem(b=5, v=200, dtype=torch.float32)
    labels[2] = -1
    head = ArcFaceHead(6, 200, 16.0, sample_rate=0.1)
    torch.manual_seed(0)
    losses, drawn = [], []
    for _ in range(3):
        loss, found = head(x, labels, diagnostics=True)
        (grad,) = torch.autograd.grad(loss, head.weight)
        rows = grad.coalesce().indices()[0]
        assert len(rows) == 20
        assert set(labels[labels >= 0].tolist()) <= set(rows.tolist())
        places = torch.where(labels < 0, -1, torch.searchsorted(rows, labels))
        expected = margin_softmax(x, head.weight[rows], places, ArcFace(0.5), 16.0)
        torch.testing.assert_close(loss, expected)
        (dense,) = torch.autograd.grad(expected, head.weight)
        torch.testing.assert_close(grad.to_dense(), dense)
        assert 0 <= found.accuracy <= 1
        losses.append(loss.item())
        drawn.append(rows)
    assert len(set(losses)) == 3
    head.eval()
    torch.testing.assert_close(
        head(x, labels), margin_softmax(x, head.weight, labels, ArcFace(0.5), 16.0)
    )
    many = torch.arange(5)
    head = ArcFaceHead(6, 9, 16.0, sample_rate=0.1)  # more classes in the batch than the share
    (grad,) = torch.autograd.grad(head(x, many), head.weight)
    drawn = grad.coalesce().indices()[0].tolist()
    assert drawn[:5] == [0, 1, 2, 3, 4]
    assert len(drawn) == 6


def _drawn(rows, head):
    return torch.autograd.grad(rows.sum(), head.weight)[0].coalesce().indices()


def test_classes_are_drawn_alike():
    """Each of the others is as likely as any."""
    head = ArcFaceHead(2, 50, sample_rate=0.2)
    torch.manual_seed(0)
    count = torch.zeros(50)
    for _ in range(2000):
        rows, _ = head._sample(torch.tensor([7, -1, 7]))
        count += torch.isin(torch.arange(50), _drawn(rows, head))
    assert count[7] == 2000
    others = count[torch.arange(50) != 7] / 2000
    assert (others - 9 / 49).abs().max() < 4 * (0.18 * 0.82 / 2000) ** 0.5


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_classes_come_and_go(make):
    """What an optimizer remembers of a row stays with it: two heads, one of which had all along."""
    options = {"lr": 0.1} | ({"momentum": 0.9} if make is torch.optim.SGD else {})
    x, _, labels = problem(dtype=torch.float32)
    torch.manual_seed(0)
    head = ArcFaceHead(6, 20, 16.0)
    optimizer = make(head.parameters(), **options)

    def step(head, optimizer, labels):
        optimizer.zero_grad()
        head(x, labels).backward()
        optimizer.step()

    step(head, optimizer, labels)
    before = head.weight.detach().clone()
    key = "momentum_buffer" if make is torch.optim.SGD else "exp_avg"
    moment = optimizer.state[head.weight][key].clone()
    head.extend(3, optimizer)
    assert head.num_classes == 23
    assert torch.equal(head.weight[:20], before)
    assert head.weight[20:].norm(dim=1).min() > 0
    assert torch.equal(optimizer.state[head.weight][key], torch.cat([moment, torch.zeros(3, 6)]))
    assert [p for g in optimizer.param_groups for p in g["params"]] == [head.weight]
    order = torch.tensor([21, 4, 19, 0])
    rows = head.weight.detach().clone()
    head.keep(order, optimizer)
    assert torch.equal(head.weight, rows[order])
    assert torch.equal(
        optimizer.state[head.weight][key], torch.cat([moment, torch.zeros(3, 6)])[order]
    )
    start = head.weight.detach().clone()
    step(head, optimizer, labels % 4)
    assert (head.weight != start).all()
    head.keep([2])
    head.extend(1)
    assert head.weight.shape == (2, 6)


def test_errors_of_changing_classes(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    head = ArcFaceHead(6, 20)
    other = torch.optim.SGD(ArcFaceHead(6, 20).parameters(), lr=0.1)
    for call, message in (
        (lambda: head.extend(0), "n must be at least 1; got 0"),
        (lambda: head.extend(1, other), "optimizer must hold this head's weight"),
        (lambda: head.keep([]), "indices must name at least one class"),
        (lambda: head.keep([3, 20]), r"indices must be in \[0, 20\); got 20"),
        (lambda: head.keep([3, 3]), "indices must name each class once; got one twice"),
        (
            lambda: head.load_rows(torch.ones(21, 6)),
            r"rows must be \[20, 6\] in all .*; got \[\[21, 6\]\]: build .* with num_classes=21$",
        ),
        (
            lambda: head.load_rows([torch.ones(9, 5), torch.ones(11, 5)]),
            "pass the transposed .*, or build the head with in_features=5, num_classes=20$",
        ),
        (lambda: head.load_rows([]), r"got \[\]: pass matrices of 6 columns$"),
        (lambda: head.load_rows(torch.ones(20)), r"got \[\[20\]\]: pass matrices of 6 columns$"),
        (lambda: ArcFaceHead(6, 20, sample_rate=0.0), r"sample_rate must be in \(0, 1\]; got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call, message in (
        (lambda: head.keep(torch.ones(20) > 0), r"got a mask: pass mask.nonzero\(\)\[:, 0\]"),
        (lambda: head.keep([0.5]), r"got torch.float32: pass indices.long\(\)"),
        (lambda: head.keep(torch.ones(1) + 0j), "indices must be whole numbers; got torch.compl"),
        (lambda: head.keep("one"), r"indices must be whole numbers, such as .*; got 'one'"),
        (lambda: head.extend(2.5), "n must be a whole number; got 2.5"),
        (lambda: head.extend("3"), "n must be a whole number; got '3'"),
        (lambda: head.load_rows("."), r"rows must be a tensor .*; got str: .*, or read_rows"),
        (lambda: head.load_rows([[1.0]]), r"rows must be a tensor \[v, d\] or several; got list"),
        (lambda: head.load_rows(None), r"rows must be a tensor \[v, d\] or several; got NoneType"),
        (lambda: ArcFaceHead(6, 20, sample_rate="0.1"), "sample_rate must be a number; got '0.1'"),
        (lambda: ArcFaceHead(6, 20, sample_rate=None), "sample_rate must be a number; got None"),
    ):
        with pytest.raises(TypeError, match=message):
            call()
    assert head.weight.shape == (20, 6)


def test_rows_depend_on_their_class_alone():
    """A head of more classes begins with the same rows, block by block."""
    heads = []
    for classes in (100, 9000):
        torch.manual_seed(0)
        heads.append(ArcFaceHead(16, classes).weight)
    assert torch.equal(heads[0], heads[1][:100])


def test_module_learns():
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    head = ArcFaceHead(16, 30)
    assert head.weight.norm(dim=1).mean().item() == pytest.approx(1, abs=0.1)
    x = torch.randn(30, 16, generator=generator)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    start = head(x, torch.arange(30)).item()
    for _ in range(60):
        optimizer.zero_grad()
        head(x, torch.arange(30)).backward()
        optimizer.step()
    assert head(x, torch.arange(30)).item() < start / 10
    assert (head.logits(x).argmax(1) == torch.arange(30)).all()


@pytest.mark.parametrize(
    "margin", [ArcFace(0.4, grad="detached"), AdaFace(0.3)], ids=["arc", "ada"]
)
def test_save_and_load(margin, tmp_path):
    head = ArcFaceHead(6, 20, 30.0, margin, ignore_index=-7, recompute=False)
    x, _, labels = problem(dtype=torch.float32)
    head(x, labels)  # moves AdaFace's statistics
    head.save_pretrained(tmp_path / "head")
    copy = ArcFaceHead.from_pretrained(tmp_path / "head")
    assert copy.config() == head.config()
    assert copy.state_dict().keys() == head.state_dict().keys()
    assert all(map(torch.equal, copy.state_dict().values(), head.state_dict().values()))
    assert torch.equal(copy(x, labels), head.eval()(x, labels))
    if isinstance(margin, AdaFace):
        assert set(head.state_dict()) == {"weight", "margin.mean", "margin.std"}
        assert copy.margin.mean != 20


def test_save_refuses_a_margin_of_ones_own(tmp_path):
    head = ArcFaceHead(6, 20, margin=lambda cos_target, norm: cos_target - 0.1)
    with pytest.raises(TypeError, match="to be saved; got function: save the head's state_dict"):
        head.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_repr():
    assert repr(ArcFaceHead(4, 9, margin=CosFace(0.2))) == (
        "ArcFaceHead(4, 9, scale=64.0, margin=CosFace(m=0.2))"
    )


def test_autocast_and_low_precision():
    x, weight, labels = problem(dtype=torch.float32)
    plain = margin_softmax(x, weight, labels, ArcFace(), 64.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(margin_softmax(x, weight, labels, ArcFace(), 64.0), plain)
    head = ArcFaceHead(6, 20, dtype=torch.bfloat16)
    loss = head(x.bfloat16(), labels)
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.weight.grad.dtype == torch.bfloat16


COMPILE = """
import torch
from torch._dynamo.testing import CompileCounter
from partlocal.head import ArcFaceHead
from partlocal.margins import AdaFace, MagFace

for margin in (MagFace(), AdaFace()):
    torch._dynamo.reset()
    head = ArcFaceHead(8, 30, margin=margin).eval()
    counter = CompileCounter()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    counted = torch.compile(head, fullgraph=True, backend=counter)
    for b in (3, 5, 8):
        x = (9 * torch.randn(b, 8)).requires_grad_()
        labels = torch.arange(b)
        labels[0] = -1
        loss, expected = compiled(x, labels), head(x, labels)
        torch.testing.assert_close(loss, expected)
        wanted = (x, head.weight)
        torch.testing.assert_close(
            torch.autograd.grad(loss, wanted), torch.autograd.grad(expected, wanted)
        )
        counted(x, labels)
    assert counter.frame_count <= 2, counter.frame_count
    try:
        compiled(x, labels + 30)
    except ValueError as error:
        assert "got 31 at position 1" in str(error), error
    else:
        raise AssertionError("a label out of range went through")
print("compiled")
"""


def test_compile():
    run = subprocess.run(
        [sys.executable, "-c", COMPILE], check=False, capture_output=True, text=True
    )
    assert "compiled" in run.stdout, run.stderr[-2000:]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, x, y: h(x, y + 20), r"labels must be in \[0, 20\), .*; got 3\d at position 0"),
        (lambda h, x, y: h.logits(x, y + 20), r"labels must be in \[0, 20\), the rows of weight"),
        (lambda h, x, y: h.logits(x * math.inf), "embeddings must be finite; got NaN or infinity"),
        (lambda h, x, y: ArcFaceHead(0, 5), "in_features must be at least 1; got 0"),
        (lambda h, x, y: ArcFaceHead(5, 0), "num_classes must be at least 1; got 0"),
        (
            lambda h, x, y: ArcFaceHead(5, 5, scale=-1.0),
            "scale must be positive and finite; got -1",
        ),
    ],
)
def test_errors(call, message):
    x, _, labels = problem(dtype=torch.float32)
    labels[0] = 15
    with pytest.raises(ValueError, match=message):
        call(ArcFaceHead(6, 20), x, labels)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda x: x[:, :5],
            ValueError,
            r"embeddings must be \[b, 6\] \(in_features of this head\); got \[8, 5\]",
        ),
        (lambda x: x[0], ValueError, r"embeddings must be \[b, d\] with b at least 1; got \[6\]"),
        (lambda x: x[None], ValueError, r"embeddings must be \[b, d\] .*; got \[1, 8, 6\]"),
        (lambda x: x[:0], ValueError, r"embeddings must be \[b, d\] .*; got \[0, 6\]"),
        (lambda x: x.long(), TypeError, r"must be floating point; got torch\.int64: pass embed"),
        (lambda x: x + 0j, TypeError, r"must be floating point; got torch\.complex64: pass embed"),
        (
            lambda x: x.to("meta"),
            ValueError,
            "embeddings must be on cpu .as weight.; got meta: pas",
        ),
    ],
)
def test_errors_of_embeddings(monkeypatch, change, error, message):
    """`logits` refuses what `forward` does, and a margin that counts sees none of it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    x, _, labels = problem(dtype=torch.float32)
    x = change(x.detach())
    labels = labels[: len(x)] if x.ndim == 2 else labels
    head = ArcFaceHead(6, 20, margin=AdaFace())
    before = {name: t.clone() for name, t in head.state_dict().items()}
    for call in (head.logits, lambda x: head.logits(x, labels), lambda x: head(x, labels)):
        with pytest.raises(error, match=message) as caught:
            call(x)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[name]) for name, t in head.state_dict().items())


@family
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("recompute", [True, False])
def test_what_is_not_finite_reaches_no_row(margin, value, recompute):
    """Its loss is NaN, and its own gradient; the rows learn from the others alone."""
    x, weight, labels = problem()
    options = {"margin": margin, "scale": 16.0, "recompute": recompute}
    good = torch.arange(8) != 3
    with torch.no_grad():
        x[3, 2] = value
    each = margin_softmax(x, weight, labels, reduction="none", **options)
    assert torch.equal(each.isfinite(), good)
    mean = margin_softmax(x, weight, labels, **options)
    assert mean.isnan()
    grad_x, grad_weight = torch.autograd.grad(mean, (x, weight))
    alone = margin_softmax(x[good], weight, labels[good], reduction="sum", **options) / 8
    expected_x, expected_weight = torch.autograd.grad(alone, (x, weight))
    torch.testing.assert_close(grad_weight, expected_weight)
    torch.testing.assert_close(grad_x[good], expected_x[good])
    assert grad_x[3].isnan().all()
    if margin is FAMILY["arc"]:
        labels[3] = -1  # an ignored one harms nobody
        mean = margin_softmax(x, weight, labels, **options)
        assert mean.isfinite()
        assert all(g.isfinite().all() for g in torch.autograd.grad(mean, (x, weight)))


def test_debug_names_the_embedding():
    x, _, labels = problem(dtype=torch.float32)
    x = x.detach()
    x[3, 2], x[5, 0] = math.nan, math.inf
    head = ArcFaceHead(6, 20, margin=AdaFace(), debug=True)
    message = (
        r"embeddings must be finite; got NaN or infinity in row 3 \(2 of 8\): look at its image"
    )
    with pytest.raises(ValueError, match=message):
        head(x, labels)
    assert head.margin.mean == 20
    ignored = labels.clone()
    ignored[[3, 5]] = -1
    assert ArcFaceHead(6, 20, debug=True)(x, ignored).isfinite()
    head.debug = False
    assert head(x, labels).isnan()
    assert head.margin.mean.isfinite()  # the statistics of the others
    assert head.margin.mean != 20


def test_what_is_lost_in_every_corner():
    """No negatives; a norm beyond float32; an ignored sample whose norm would have a gradient."""
    x, weight, labels = problem(v=1, dtype=torch.float32)
    with torch.no_grad():
        x[0, 0] = math.nan
    loss = margin_softmax(x, weight, labels, ArcFace(), 64.0, reduction="none")
    assert loss.isnan().tolist() == [True] + [False] * 7
    assert torch.autograd.grad(loss.sum(), weight)[0].isfinite().all()
    x, weight, labels = problem(dtype=torch.float32)
    with torch.no_grad():
        x[0] = 3e38
    loss = margin_softmax(x, weight, labels, ArcFace(), 64.0, reduction="none")
    assert loss.isnan().tolist() == [True] + [False] * 7
    with torch.no_grad():
        x[0] = math.nan
    labels[0] = -1
    loss = margin_softmax(x, weight, labels, MagFace(), 64.0)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (x, weight)))


def test_labels_of_any_kind_of_whole_number():
    x, _, labels = problem(v=300, dtype=torch.float32)
    labels[0] = 255  # which as an unsigned byte equals -1
    head = ArcFaceHead(6, 300)
    expected = head(x, labels, reduction="none")
    assert torch.equal(head(x, labels.clamp(max=255).byte(), reduction="none")[:1], expected[:1])
    assert torch.equal(head(x, labels.int(), reduction="none"), expected)


def test_logits_leave_statistics_alone():
    x, _, labels = problem(dtype=torch.float32)
    head = ArcFaceHead(6, 20, margin=AdaFace())
    head.logits(x, labels)
    assert head.margin.mean == 20


def test_copy():
    x, _, labels = problem(dtype=torch.float32)
    head = ArcFaceHead(6, 20, 16.0, AdaFace(), sample_rate=0.5)
    copy = deepcopy(head)
    optimizer = AdamW(copy.parameters())
    for module in (copy, copy.eval(), copy.train()):
        optimizer.zero_grad()
        module(x, labels).backward()
        optimizer.step()
    assert not torch.equal(copy.weight, head.weight)
    assert copy.margin.mean != 20
    assert head.margin.mean == 20


def test_weight_that_is_not_finite():
    x, _, labels = problem(dtype=torch.float32)
    head = ArcFaceHead(6, 20)
    for value in (math.nan, math.inf):
        with torch.no_grad():
            head.weight[3, 2] = value
        assert head(x, labels).isnan()
        for given in (None, labels):
            with pytest.raises(ValueError, match="weight must be finite; got NaN or infinity"):
                head.logits(x, given)


def test_errors_of_types():
    x, _, labels = problem(dtype=torch.float32)
    with pytest.raises(TypeError, match=r"labels must be whole numbers; got torch\.float32"):
        ArcFaceHead(6, 20)(x, labels.float())
    with pytest.raises(NotImplementedError, match="needs embeddings on a CUDA or ROCm device"):
        ArcFaceHead(6, 20, implementation="triton")(x, labels)
