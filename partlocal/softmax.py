"""The margin softmax over identities, without the samples x classes matrix it is defined on.

With unit embeddings and class rows and their cosines c_ij, a margin touches the target alone:
`loss_i = softplus(N_i - scale * phi(c_iy))`, `N_i = logsumexp_{j != y_i} scale * c_ij`. This is
the cross entropy for every margin phi, so one operation, N, serves the whole family.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from partlocal.kernels import Implementation
from partlocal.logsumexp import Negatives, choose, negatives
from partlocal.margins import Margin
from partlocal.numerics import accumulation_dtype

Reduction = Literal["mean", "sum", "none"]


class Diagnostics(NamedTuple):
    """What a trainer wants to see of a batch: means over its samples that are not ignored.

    Args:
        accuracy: the share whose own class has the largest cosine of all, before the margin; in a
            sampled step, of those that were drawn, which is more.
        angle: between embedding and own row, in radians.
        beyond: the share whose angle the margin moves past pi (theta > pi - m); 0 for margins that
            move no angle.
    """

    accuracy: Float[Tensor, ""]
    angle: Float[Tensor, ""]
    beyond: Float[Tensor, ""]


def margin_softmax(  # noqa: PLR0913
    embeddings: Float[Tensor, "b d"],
    weight: Float[Tensor, "v d"],
    labels: Shaped[Tensor, " b"],
    margin: Margin,
    scale: float,
    norm: Float[Tensor, " b"] | None = None,
    reduction: Reduction = "mean",
    *,
    ignore_index: int = -1,
    recompute: bool = True,
    implementation: Implementation = "auto",
) -> Float[Tensor, ""] | Float[Tensor, " b"]:
    """Return the cross entropy of scaled cosines whose target went through `margin`.

    >>> from partlocal.margins import ArcFace
    >>> embeddings, weight = torch.eye(2), torch.eye(2)
    >>> margin_softmax(embeddings, weight, torch.tensor([0, 1]), ArcFace(0.5), scale=1.0)
    tensor(0.3477)

    Args:
        embeddings: of any norm; they and the rows of `weight` are made unit vectors. The loss of
            one that is not finite is NaN, and it has no part in the gradient of `weight`.
        weight: one row a class.
        labels: the class of each sample, or `ignore_index`.
        margin: see `partlocal.margins`; its `penalty`, if it has one, is added to each loss.
        scale: the logits are this times the cosines.
        norm: what the margin takes for the embeddings' norms, if those are unit vectors already.
        reduction: `"mean"` over the samples that are not ignored, `"sum"`, or `"none"`.
        ignore_index: samples with this label have loss 0 and gradient 0.
        recompute: see `negative_logsumexp`.
        implementation: see `negative_logsumexp`.

    Raises:
        ValueError: as `negative_logsumexp`; or `norm` is not `[b]`.
        TypeError: labels are no whole numbers, or embeddings are not floating point.
        NotImplementedError: as `negative_logsumexp`.

    Source: https://arxiv.org/abs/1801.07698, equation 3, in the form above
    """
    check_reduction(reduction)
    how = choose(embeddings, weight, scale, recompute, implementation=implementation)
    found = negatives(embeddings, weight, labels, how, ignore_index)
    ignored = labels.long() == ignore_index
    norm = norms(embeddings, ignored) if norm is None else norm
    check_norm(norm, labels)
    return reduce(losses(found, norm, ignored, margin, scale), ignored, reduction)


def losses(
    found: Negatives, norm: Tensor, ignored: Tensor, margin: Margin, scale: float
) -> Float[Tensor, " b"]:
    """Return the loss of each sample from what is known of its cosines; 0 if it is ignored."""
    # Before anything is computed: NaN of an ignored sample would be multiplied by a gradient of 0.
    lse, cos_target, norm = (x.masked_fill(ignored, 0) for x in (found.lse, found.cos_target, norm))
    # The default threshold of 20 would be off by e^-20, which is far above fp64 rounding.
    loss = F.softplus(lse - scale * margin(cos_target, norm), threshold=40)
    if hasattr(margin, "penalty"):
        loss = loss + margin.penalty(norm)
    return loss.masked_fill(ignored, 0)


def reduce(loss: Float[Tensor, " b"], ignored: Tensor, reduction: Reduction) -> Tensor:
    """Return the losses, their sum, or their mean over the samples that are not ignored."""
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum().clamp(min=1)


def diagnose(found: Negatives, norm: Tensor, ignored: Tensor, margin: Margin) -> Diagnostics:
    """Return the `Diagnostics` of a batch, from numbers that its loss needed anyway."""
    cos = found.cos_target.detach()
    nobody = torch.zeros_like(ignored)
    past = margin.past_pi(cos, norm.detach()) if hasattr(margin, "past_pi") else nobody
    angle = cos.clamp(-1, 1).acos()
    count = (~ignored).sum().clamp(min=1)
    return Diagnostics(
        *(
            values.masked_fill(ignored, 0).sum() / count
            for values in (cos > found.hardest, angle, past)
        )
    )


def norms(embeddings: Float[Tensor, "b d"], ignored: Tensor) -> Float[Tensor, " b"]:
    """Return the lengths, wide; 0 for ignored samples, of which no NaN may come back."""
    wide = embeddings.to(accumulation_dtype(embeddings.dtype))
    return torch.linalg.vector_norm(wide.masked_fill(ignored[:, None], 0), dim=1)


def check_reduction(reduction: str) -> None:
    """Refuse an unknown one."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")


def check_norm(norm: Tensor, labels: Tensor) -> None:
    """Refuse norms that are not one a sample."""
    if norm.shape != labels.shape:
        raise ValueError(f"norm must be [b] with b = {len(labels)}; got {list(norm.shape)}")


def refuse_lost(embeddings: Float[Tensor, "b d"]) -> None:
    """Name the embeddings that are not finite; waits for the device.

    >>> refuse_lost(torch.tensor([[1.0], [torch.nan]]))
    Traceback (most recent call last):
    ValueError: embeddings must be finite; got NaN or infinity in row 1 (1 of 2): look at its image, or at the layers before the head

    Raises:
        ValueError: there are some.
    """  # noqa: E501
    wrong = (~embeddings.detach().isfinite()).any(1).nonzero()[:, 0].tolist()
    if wrong:
        raise ValueError(
            f"embeddings must be finite; got NaN or infinity in row {wrong[0]} ({len(wrong)} of "
            f"{len(embeddings)}): look at its image, or at the layers before the head"
        )
