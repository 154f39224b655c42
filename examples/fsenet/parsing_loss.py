"""Losses of a parser against labels that may be coarser than its own.

Of a pixel that a set calls "mouth" one knows that the parser's upper lip, inner mouth and lower
lip together should be certain, not which of them. A 0/1 matrix says which of the parser's n labels
each of the set's g labels stands for; with the identity every loss here is the ordinary one.
"""

from typing import Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

IGNORE = 255  # a label that says nothing
EPS = 1e-6

LossName = Literal["cross-entropy", "binary", "heatmap"]


def parsing_loss(
    logits: Float[Tensor, "b n h w"],
    target: Shaped[Tensor, "b *g h w"],
    groups: Float[Tensor, "g n"],
    weight: Float[Tensor, " g"] | None = None,
    kind: LossName = "cross-entropy",
) -> Float[Tensor, ""]:
    """Return the loss of this kind; see the three functions."""
    if kind == "cross-entropy":
        return group_cross_entropy(logits, target, groups, weight)
    if kind == "binary":
        return group_binary_cross_entropy(logits, target, groups, weight)
    return group_heatmap_error(logits, target, groups, weight)


def group_log_probabilities(
    logits: Float[Tensor, "b n h w"], groups: Float[Tensor, "g n"]
) -> Float[Tensor, "b g h w"]:
    """Return the logarithm of the probability that each group holds the label of a pixel.

    >>> logits = torch.tensor([0.1, 0.2, 0.7]).log().view(1, 3, 1, 1)
    >>> groups = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    >>> group_log_probabilities(logits, groups).exp().flatten()
    tensor([0.1000, 0.9000])

    It is a difference of two logsumexps: a sum of probabilities that have become zero would have
    no logarithm, and no gradient to come back by.

    Args:
        logits: of n labels.
        groups: 0/1, at least one 1 a row; on the CPU, as its numbers choose what is computed.
    """
    logits = logits.float()
    scores = [
        logits[:, own[0]] if len(own) == 1 else logits[:, own].logsumexp(1)
        for own in _members(groups)
    ]
    return torch.stack(scores, 1) - logits.logsumexp(1, keepdim=True)


def group_cross_entropy(
    logits: Float[Tensor, "b n h w"],
    target: Shaped[Tensor, "b *g h w"],
    groups: Float[Tensor, "g n"],
    weight: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over pixels of -log of the summed probability of what is meant.

    >>> logits = torch.tensor([0.1, 0.2, 0.7]).log().view(1, 3, 1, 1)
    >>> groups = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    >>> group_cross_entropy(logits, torch.tensor([[[1]]]), groups).exp()
    tensor(1.1111)

    Args:
        logits: of the parser's n labels.
        target: labels `b h w` from 0 to g - 1, or 255 where nothing is known; or probabilities
            `b g h w`, all zeros where nothing is known.
        groups: see `group_log_probabilities`; the identity makes this the ordinary cross-entropy.
        weight: of each of the g labels; the mean is then the weighted one.
    """
    log_q = group_log_probabilities(logits, groups)
    if target.is_floating_point():
        share = target if weight is None else target * weight.view(-1, 1, 1)
        return -(share * log_q).sum() / share.sum().clamp_min(EPS)
    known = target != IGNORE
    label = torch.where(known, target, 0).long()
    share = known.float() if weight is None else known * weight[label]
    picked = log_q.gather(1, label.unsqueeze(1)).squeeze(1)
    return -(share * picked).sum() / share.sum().clamp_min(EPS)


def group_binary_cross_entropy(
    logits: Float[Tensor, "b n h w"],
    target: Shaped[Tensor, "b *g h w"],
    groups: Float[Tensor, "g n"],
    weight: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over pixels and labels of the loss of a sigmoid a label.

    A group is there where one of its labels is, with probability 1 - (1 - p) (1 - p') ... of
    labels that are independent, as sigmoids have it; its logit is softplus backwards of the sum of
    their softplus.

    Args:
        logits, target, groups, weight: see `group_cross_entropy`.
    """
    logits = logits.float()
    scores = [
        logits[:, own[0]] if len(own) == 1 else _unsoftplus(F.softplus(logits[:, own]).sum(1))
        for own in _members(groups)
    ]
    share, known = _as_probabilities(target, len(groups))
    losses = F.binary_cross_entropy_with_logits(torch.stack(scores, 1), share, reduction="none")
    return _mean(losses, known, weight)


def group_heatmap_error(
    heat: Float[Tensor, "b n h w"],
    target: Shaped[Tensor, "b *g h w"],
    groups: Float[Tensor, "g n"],
    weight: Float[Tensor, " g"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean squared error of heat maps; a group's heat is the sum of its labels' heat.

    Args:
        heat: what the parser returns, taken as it is.
        target, groups, weight: see `group_cross_entropy`.

    Source: Newell, Yang, Deng, "Stacked hourglass networks for human pose estimation", ECCV 2016.
    """
    share, known = _as_probabilities(target, len(groups))
    total = torch.einsum("gn,bnhw->bghw", groups.to(heat.device), heat.float())
    return _mean((total - share).square(), known, weight)


def group_dice_loss(
    logits: Float[Tensor, "b n h w"],
    target: Shaped[Tensor, "b *g h w"],
    groups: Float[Tensor, "g n"],
) -> Float[Tensor, ""]:
    """Return one minus the mean Dice overlap of the labels that occur, over the whole batch.

    Args:
        logits, target, groups: see `group_cross_entropy`.

    Source: Milletari, Navab, Ahmadi, "V-Net", 3DV 2016, with sums instead of sums of squares.
    """
    share, known = _as_probabilities(target, len(groups))
    found = group_log_probabilities(logits, groups).exp() * known.unsqueeze(1)
    true = share.sum((0, 2, 3))
    overlap = 2 * (found * share).sum((0, 2, 3)) / (found.sum((0, 2, 3)) + true).clamp_min(EPS)
    occurs = true > 0
    return ((1 - overlap) * occurs).sum() / occurs.sum().clamp_min(1)


def _members(groups: Tensor) -> list[list[int]]:
    return [[j for j, held in enumerate(row) if held] for row in groups.tolist()]


def _as_probabilities(target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return probabilities `b g h w`, and `b h w` where something is known."""
    if target.is_floating_point():
        return target, target.sum(1) > 0
    known = target != IGNORE
    hot = F.one_hot(torch.where(known, target, 0).long(), count).movedim(-1, 1)
    return (hot * known.unsqueeze(1)).float(), known


def _mean(losses: Tensor, known: Tensor, weight: Tensor | None) -> Tensor:
    if weight is not None:
        losses = losses * weight.view(-1, 1, 1)
    return (losses.mean(1) * known).sum() / known.sum().clamp_min(1)


def _unsoftplus(x: Tensor) -> Tensor:
    x = x.clamp_min(1e-37)  # what has underflown is far from any label
    return x + (-torch.expm1(-x)).log()
