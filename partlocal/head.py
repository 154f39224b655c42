"""The margin softmax over identities, without the samples x classes matrix it is defined on.

With unit embeddings and class rows and their cosines c_ij, a margin touches the target alone:
`loss_i = softplus(N_i - scale * phi(c_iy))`, `N_i = logsumexp_{j != y_i} scale * c_ij`. This is
the cross entropy for every margin phi, so one operation, N, serves the whole family.
"""

import math
from numbers import Integral
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from partlocal.hub import HubModule, check_keys
from partlocal.kernels import Implementation, check_implementation
from partlocal.logsumexp import (
    check_embeddings,
    check_inputs,
    check_scale,
    class_indices,
    negative_logsumexp,
    unit_rows,
    without_autocast,
)
from partlocal.margins import ArcFace, Margin, margin_config, margin_from_config
from partlocal.numerics import accumulation_dtype, check_tensor, refuse_non_finite

Reduction = Literal["mean", "sum", "none"]


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

    >>> embeddings, weight = torch.eye(2), torch.eye(2)
    >>> margin_softmax(embeddings, weight, torch.tensor([0, 1]), ArcFace(0.5), scale=1.0)
    tensor(0.3477)

    Args:
        embeddings: of any norm; they and the rows of `weight` are made unit vectors.
        weight: one row a class.
        labels: the class of each sample, or `ignore_index`.
        margin: see `partlocal.margins`; its `penalty`, if it has one, is added to each loss.
        scale: the logits are this times the cosines.
        norm: what the margin takes for the embeddings' norms, if those are unit vectors already.
        reduction: `"mean"` over the samples that are not ignored, `"sum"`, or `"none"`.
        ignore_index: samples with this label have loss 0 and gradient 0.
        recompute: see `negative_logsumexp`.
        implementation: `"auto"` or `"torch"`.

    Raises:
        ValueError: as `negative_logsumexp`; or `norm` is not `[b]`, or on a CPU, embeddings,
            weight or norm are not finite.
        TypeError: labels are no whole numbers, or embeddings are not floating point.

    Source: https://arxiv.org/abs/1801.07698, equation 3, in the form above
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    lse, cos_target = negative_logsumexp(
        embeddings,
        weight,
        labels,
        scale,
        ignore_index=ignore_index,
        recompute=recompute,
        implementation=implementation,
    )
    length = torch.linalg.vector_norm(embeddings.to(lse.dtype), dim=1)
    refuse_non_finite(length, "embeddings", "their norms")
    refuse_non_finite(lse.where(lse != -math.inf, 0), "weight", "the log-sum-exp")
    norm = length if norm is None else norm
    if norm.shape != labels.shape:
        raise ValueError(f"norm must be [b] with b = {len(labels)}; got {list(norm.shape)}")
    ignored = labels.long() == ignore_index
    norm = norm.masked_fill(ignored, 0)
    refuse_non_finite(norm, "norm", "its values")
    # The default threshold of 20 would be off by e^-20, which is far above fp64 rounding.
    loss = F.softplus(lse - scale * margin(cos_target, norm), threshold=40)
    if hasattr(margin, "penalty"):
        loss = loss + margin.penalty(norm)
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum().clamp(min=1)


class ArcFaceHead(HubModule):
    """One row a class, trained with `margin_softmax`; `margin` chooses the family's member.

    >>> head = ArcFaceHead(8, num_classes=100)
    >>> head(torch.randn(4, 8), torch.tensor([3, 1, 4, 1])).shape
    torch.Size([])
    >>> head.logits(torch.randn(4, 8)).shape
    torch.Size([4, 100])

    Args:
        in_features: width of the embeddings.
        num_classes: identities.
        scale: the logits are this times the cosines.
        margin: one of `partlocal.margins`, or any callable like them (which cannot be saved).
        ignore_index: samples with this label do not count.
        recompute: `False` is faster and keeps the `b x v` cosines between forward and backward.
        implementation: `"auto"` or `"torch"`.
        device: where the rows are made.
        dtype: of the rows.

    Raises:
        ValueError: a size is below 1, `scale` is not positive, or an option is unknown.
        TypeError: a size is no whole number, or `margin` no margin.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        scale: float = 64.0,
        margin: Margin = ArcFace(0.5),  # noqa: B008 (frozen)
        *,
        ignore_index: int = -1,
        recompute: bool = True,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_implementation(implementation, "ArcFaceHead")
        check_scale(scale)
        for name, size in (("in_features", in_features), ("num_classes", num_classes)):
            if not isinstance(size, Integral):
                raise TypeError(f"{name} must be a whole number; got {size!r}")
            if size < 1:
                raise ValueError(f"{name} must be at least 1; got {size}")
        if not callable(margin):
            raise TypeError(
                f"margin must be a margin, such as ArcFace(0.5); got {margin!r}: build one of "
                "partlocal.margins"
            )
        self.in_features, self.num_classes, self.scale = in_features, num_classes, scale
        self.margin = margin.to(device) if isinstance(margin, nn.Module) else margin
        self.ignore_index, self.recompute = ignore_index, recompute
        self.implementation = implementation
        self.weight = nn.Parameter(
            torch.empty(num_classes, in_features, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw rows of random direction and a norm near 1.

        The norm has no part in the loss but sets the pace: a step turns a row by lr / norm^2.
        """
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(
        self,
        embeddings: Float[Tensor, "b d"],
        labels: Shaped[Tensor, " b"],
        norm: Float[Tensor, " b"] | None = None,
        reduction: Reduction = "mean",
    ) -> Float[Tensor, ""] | Float[Tensor, " b"]:
        """Return the loss; see `margin_softmax`."""
        self._check_width(embeddings)
        return margin_softmax(
            embeddings,
            self.weight,
            labels,
            margin=self.margin,
            scale=self.scale,
            norm=norm,
            reduction=reduction,
            ignore_index=self.ignore_index,
            recompute=self.recompute,
            implementation=self.implementation,
        )

    def logits(
        self, embeddings: Float[Tensor, "b d"], labels: Shaped[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b v"]:
        """Return the `b x v` scaled cosines; with labels, the target's after the margin.

        Raises:
            ValueError: as `forward`.
            TypeError: as `forward`.
        """
        self._check_width(embeddings)
        if labels is None:
            check_embeddings(embeddings, self.weight)
        else:
            check_inputs(embeddings, self.weight, labels, self.scale)
        dtype = accumulation_dtype(torch.promote_types(embeddings.dtype, self.weight.dtype))
        with without_autocast(embeddings):
            unit, rows = unit_rows(embeddings.to(dtype))[0], unit_rows(self.weight.to(dtype))[0]
            cos = unit @ rows.t()
        length = torch.linalg.vector_norm(embeddings.to(dtype), dim=1)
        refuse_non_finite(length, "embeddings", "their norms")
        refuse_non_finite(cos.detach().sum(1), "weight", "the cosines")
        if labels is None:
            return self.scale * cos
        targets = class_indices(labels.long(), self.num_classes, self.ignore_index)
        norm = length.masked_fill(targets < 0, 0)
        index = targets.clamp(min=0)[:, None]
        cos_target = cos.gather(1, index)
        phi = self.margin(cos_target[:, 0], norm)[:, None]
        return self.scale * cos.scatter(
            1, index, torch.where(index == targets[:, None], phi, cos_target)
        )

    def _check_width(self, embeddings: Tensor) -> None:
        check_tensor("embeddings", embeddings)
        if embeddings.ndim == 2 and embeddings.shape[1] != self.in_features:
            raise ValueError(
                f"embeddings must be [b, {self.in_features}] (in_features of this head); "
                f"got {list(embeddings.shape)}"
            )

    def config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this head."""
        return {
            "in_features": self.in_features,
            "num_classes": self.num_classes,
            "scale": self.scale,
            "margin": margin_config(self.margin),
            "ignore_index": self.ignore_index,
            "recompute": self.recompute,
            "implementation": self.implementation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ArcFaceHead":
        """Build a head with fresh rows from what `config()` returned."""
        check_keys(
            "ArcFaceHead",
            config,
            ["in_features", "num_classes", "scale", "margin"],
            ["ignore_index", "recompute", "implementation"],
        )
        return cls(**{**config, "margin": margin_from_config(config["margin"])})

    def extra_repr(self) -> str:
        """Show the arguments; a margin with state is listed below them as a module."""
        margin = "" if isinstance(self.margin, nn.Module) else f", margin={self.margin}"
        return f"{self.in_features}, {self.num_classes}, scale={self.scale}{margin}"
