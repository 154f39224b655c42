"""BatchNorm over the numbers that are there, for descriptors some of whose parts are absent."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from partlocal.numerics import accumulation_dtype


class MaskedBatchNorm(nn.BatchNorm1d):
    """Standardise every number over the batch, without learned scale or shift.

    A number that is absent takes no part in mean and variance, and comes out as 0, which is the
    mean of those that are there. Where all are there this is `nn.BatchNorm1d(affine=False)`, whose
    buffers it has.

    >>> norm = MaskedBatchNorm(1)
    >>> x, there = torch.tensor([[1.0], [3.0], [0.0]]), torch.tensor([[True], [True], [False]])
    >>> norm(x, there).round(decimals=3).flatten()
    tensor([-1.,  1.,  0.])

    Args:
        num_features: numbers a descriptor.
        eps: added to the variance.
        momentum: weight of a batch in the running statistics.
        device: where these live.
        dtype: their type.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine=False, device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "b d"], there: Bool[Tensor, "b d"]
    ) -> Float[Tensor, "b d"]:
        """Return the standardised numbers in fp32 (fp64 for fp64)."""
        wide = x.to(accumulation_dtype(x.dtype))
        mean, variance = self.running_mean.to(wide), self.running_var.to(wide)
        if self.training:
            count = there.sum(0)
            present = count.clamp(min=1)
            mean = torch.where(there, wide, 0).sum(0) / present
            variance = torch.where(there, wide - mean, 0).square().sum(0) / present
            self._remember(mean.detach(), variance.detach(), count)
        scaled = (wide - mean) * (variance + self.eps).rsqrt()
        return torch.where(there, scaled, 0)

    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Move the running statistics towards those of a batch, as `nn.BatchNorm1d` does."""
        self.num_batches_tracked.add_(1)
        # the variance of one number says nothing
        step = torch.where(count > 1, self.momentum, 0.0).to(mean)
        unbiased = variance * count / (count - 1).clamp(min=1)
        for running, batch in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(batch.to(running), step.to(running))
