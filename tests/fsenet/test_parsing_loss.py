"""Losses over groups: ordinary ones where the matrix is the identity, slow sums elsewhere."""

import doctest
import math

import numpy as np
import parsing_loss
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kornia.losses import dice_loss
from parsing_loss import (
    group_binary_cross_entropy,
    group_cross_entropy,
    group_dice_loss,
    group_heatmap_error,
    group_log_probabilities,
)
from parsing_loss import parsing_loss as named_loss
from torch.nn import functional as F

N = 5
IDENTITY = torch.eye(N)
GROUPS = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 1]]).float()
LOSSES = (group_cross_entropy, group_binary_cross_entropy, group_heatmap_error)


def batch(seed=0, labels=N, b=2, size=4):
    rng = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(b, N, size, size, generator=rng)
    target = torch.randint(0, labels, (b, size, size), generator=rng)
    weight = torch.rand(labels, generator=rng) + 0.1
    return logits, target, weight


def hot(target, labels):
    return F.one_hot(target, labels).movedim(-1, 1).float()


def test_example():
    """By hand: 0.1 + 0.3 of a mouth that is 0.4 in all costs -log 0.4."""
    logits = torch.tensor([0.6, 0.1, 0.3]).log().view(1, 3, 1, 1)
    groups = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    for target in (torch.tensor([[[1]]]), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)):
        assert group_cross_entropy(logits, target, groups).item() == pytest.approx(-math.log(0.4))
    assert doctest.testmod(parsing_loss).failed == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_identity(weighted):
    """With a label for each label these are torch's own losses."""
    logits, target, weight = batch()
    target[0, 0, 0] = 255
    weight = weight if weighted else None
    expected = F.cross_entropy(logits, target, weight, ignore_index=255)
    torch.testing.assert_close(group_cross_entropy(logits, target, IDENTITY, weight), expected)

    logits, target, _ = batch(1)
    share, scale = hot(target, N), 1 if weight is None else weight.view(-1, 1, 1)
    binary = F.binary_cross_entropy_with_logits(logits, share, reduction="none") * scale
    found = group_binary_cross_entropy(logits, target, IDENTITY, weight)
    torch.testing.assert_close(found, binary.mean())
    found = group_heatmap_error(logits, target, IDENTITY, weight)
    torch.testing.assert_close(found, ((logits - share).square() * scale).mean())


def test_soft_targets_are_torchs():
    logits, _, _ = batch()
    soft = torch.rand(2, N, 4, 4).softmax(1)
    expected = F.cross_entropy(logits, soft)
    torch.testing.assert_close(group_cross_entropy(logits, soft, IDENTITY), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_merged_probabilities(seed):
    """A slow sum of probabilities, pixel by pixel; overlapping groups too."""
    rng = np.random.default_rng(seed)
    groups = (rng.random((3, N)) < 0.5).astype(np.float32)
    groups[np.arange(3), rng.integers(0, N, 3)] = 1
    logits, target, weight = batch(seed, labels=3)
    p = logits.double().softmax(1).numpy()
    s = torch.sigmoid(logits.double()).numpy()
    cross, total, binary = 0.0, 0.0, []
    for b, y, x in np.ndindex(*target.shape):
        own = target[b, y, x].item()
        mass = sum(p[b, j, y, x] for j in range(N) if groups[own, j])
        cross -= weight[own].item() * math.log(mass)
        total += weight[own].item()
        for g in range(3):
            nobody = math.prod(1 - s[b, j, y, x] for j in range(N) if groups[g, j])
            chance = 1 - nobody if g == own else nobody
            binary.append(-weight[g].item() * math.log(chance))
    matrix = torch.from_numpy(groups)
    for what in (target, hot(target, 3)):
        found = group_cross_entropy(logits, what, matrix, weight).item()
        assert found == pytest.approx(cross / total, rel=1e-4)
        found = group_binary_cross_entropy(logits, what, matrix, weight).item()
        assert found == pytest.approx(np.mean(binary), rel=1e-3)


def test_merging_first_is_the_same():
    """Cross-entropy of merged probabilities, written the short way."""
    logits, target, weight = batch(2, labels=3)
    merged = torch.einsum("gn,bnhw->bghw", GROUPS, logits.softmax(1)).log()
    expected = F.nll_loss(merged, target, weight)
    torch.testing.assert_close(group_cross_entropy(logits, target, GROUPS, weight), expected)
    heat = torch.einsum("gn,bnhw->bghw", GROUPS, logits)
    expected = F.mse_loss(heat, hot(target, 3))
    torch.testing.assert_close(group_heatmap_error(logits, target, GROUPS), expected)


@pytest.mark.parametrize("loss", [*LOSSES, group_dice_loss])
def test_gradcheck(loss, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    logits, target, _ = batch(3, labels=3, size=2)
    logits = logits.double().requires_grad_()
    target[0, 0] = 255
    assert torch.autograd.gradcheck(lambda x: loss(x, target, GROUPS.double()), logits)


@pytest.mark.parametrize("loss", [*LOSSES, group_dice_loss])
def test_what_is_unknown_says_nothing(loss):
    logits, target, _ = batch(4, labels=3)
    target[:, 1] = 255
    soft = hot(torch.where(target == 255, 0, target), 3) * (target != 255).unsqueeze(1)
    expected = loss(logits, target, GROUPS)
    torch.testing.assert_close(loss(logits, soft, GROUPS), expected)
    other = logits.clone()
    other[:, :, 1] = 7 * torch.randn(2, N, 4)
    torch.testing.assert_close(loss(other, target, GROUPS), expected)
    nothing = torch.full_like(target, 255)
    assert loss(logits.requires_grad_(), nothing, GROUPS).item() == 0


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits(loss, size):
    """Certain of another label: finite, and with a gradient that points away from it."""
    logits = torch.tensor([size, -size, -size, -size, -size]).view(1, N, 1, 1).requires_grad_()
    value = loss(logits, torch.tensor([[[1]]]), GROUPS)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 0].item() > 0
    if loss is group_cross_entropy:
        assert value.item() == pytest.approx(2 * size - math.log(2), rel=1e-4)
        assert logits.grad[0, 1].item() == pytest.approx(-0.5, rel=1e-3)
    log_q = group_log_probabilities(logits, GROUPS).flatten().tolist()
    assert log_q == pytest.approx([0, math.log(2) - 2 * size, math.log(2) - 2 * size], abs=1e-2)


def test_dice():
    """Against kornia's, of one picture in which every label occurs."""
    logits, target, _ = batch(5, b=1, size=8)
    assert len(target.unique()) == N
    expected = dice_loss(logits, target, average="macro")
    torch.testing.assert_close(group_dice_loss(logits, target, IDENTITY), expected)
    # a label that does not occur is no label that was missed
    target[target == 4] = 3
    perfect = 200 * hot(target, N)
    assert group_dice_loss(perfect, target, IDENTITY).item() == pytest.approx(0, abs=1e-5)


def test_names():
    logits, target, weight = batch(6, labels=3)
    for kind, loss in zip(("cross-entropy", "binary", "heatmap"), LOSSES, strict=True):
        found = named_loss(logits, target, GROUPS, weight, kind)
        torch.testing.assert_close(found, loss(logits, target, GROUPS, weight))
