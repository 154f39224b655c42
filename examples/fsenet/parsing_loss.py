"""Losses of a parser against labels that may be coarser than its own.

Of a pixel that a set calls "mouth" one knows that the parser's upper lip, inner mouth and lower
lip together should be certain, not which of them. A 0/1 matrix says which of the parser's n labels
each of the set's g labels stands for; with the identity every loss here is the ordinary one.
"""

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

IGNORE = 255  # a label that says nothing

EPS = 1e-6


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
    members = [[j for j, held in enumerate(row) if held] for row in groups.tolist()]
    scores = [
        logits[:, own[0]] if len(own) == 1 else logits[:, own].logsumexp(1) for own in members
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
