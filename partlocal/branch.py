"""LocalBranch: features and part maps to one vector of the parts and how they relate."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from partlocal.correlation import StructureCorrelation, present_numbers
from partlocal.masked_norm import MaskedBatchNorm
from partlocal.numerics import accumulation_dtype
from partlocal.pooling import PartMaskPool

BranchNorm = Literal["batch"]


class LocalFeatures(NamedTuple):
    """The unit local vector, and the parts it was made of."""

    vector: Float[Tensor, "b l"]
    parts: Float[Tensor, "b k c"]
    mass: Float[Tensor, "b k"]
    visibility: Float[Tensor, "b k"]


class LocalBranch(nn.Module):
    """Pool features over part maps and describe how the parts relate: one unit vector a picture.

    >>> branch = LocalBranch(channels=8, num_parts=3).eval()
    >>> features, maps = torch.rand(2, 8, 7, 7), torch.rand(2, 3, 7, 7)
    >>> branch(features, maps).vector.shape  # 3 parts x (8 features + 2 x 2 relations)
    torch.Size([2, 36])

    Args:
        channels: of the feature map.
        num_parts: maps a picture.
        part_dim: width of a part's vector; None keeps the features' own, otherwise one bias-free
            linear map, shared by the parts, follows the pooling.
        norm: `"batch"` standardises every number of the local vector over the pictures of the
            batch that show its parts (`MaskedBatchNorm`) before its L2 norm. Distances between
            parts are all positive and would otherwise make the vectors of different people look
            alike. None: the paper.
        pool: the pooling layer.
        correlation: the relation layer; False leaves the parts' own vectors alone.

    Source: FSENet, 3.4 to 3.6, equations 6 to 8.
    """

    def __init__(
        self,
        channels: int,
        num_parts: int,
        *,
        part_dim: int | None = None,
        norm: BranchNorm | None = "batch",
        pool: PartMaskPool | None = None,
        correlation: StructureCorrelation | Literal[False] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm not in ("batch", None):
            raise ValueError(f"norm must be 'batch' or None; got {norm!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.channels, self.num_parts, self.part_dim, self.norm = (
            channels,
            num_parts,
            part_dim,
            norm,
        )
        self.pool = PartMaskPool() if pool is None else pool
        self.correlation = None if correlation is False else correlation or StructureCorrelation()
        width = channels if part_dim is None else part_dim
        relations = 0 if self.correlation is None else 2 * (num_parts - 1)
        self.out_features = num_parts * (width + relations)
        self.projection: nn.Module = nn.Identity()
        if part_dim is not None:
            self.projection = nn.Linear(channels, part_dim, bias=False, **factory)
        self.standardize = None
        if norm == "batch":
            self.standardize = MaskedBatchNorm(self.out_features, **factory)

    def forward(
        self,
        features: Float[Tensor, "b c h w"],
        maps: Float[Tensor, "b k hm wm"],
        visibility: Float[Tensor, "b k"] | None = None,
    ) -> LocalFeatures:
        """Describe `features` over `maps`; `visibility` is the peak of each part's probability."""
        if features.shape[1] != self.channels or maps.shape[1] != self.num_parts:
            raise ValueError(
                f"features and maps must be [b, {self.channels}, h, w] and "
                f"[b, {self.num_parts}, h, w]; got {list(features.shape)} and {list(maps.shape)}"
            )
        if self.standardize is not None and self.training and len(features) == 1:
            raise ValueError(
                "features must hold at least two images in training, over which norm='batch' "
                "standardises; got a batch of 1: call .eval(), or take norm=None"
            )
        pooled = self.pool(features, maps, visibility)
        parts = self.projection(pooled.parts)
        described = parts
        if self.correlation is not None:
            described = self.correlation(parts, pooled.visibility)
        local = described.flatten(1)
        if self.standardize is not None:
            # a part's own numbers come first, so without relations these are the first columns
            there = present_numbers(parts, pooled.visibility)[..., : described.shape[2]]
            local = self.standardize(local, there.flatten(1))
        local = F.normalize(local.to(accumulation_dtype(local.dtype)), dim=1)
        return LocalFeatures(local, parts, pooled.mass, pooled.visibility)

    def extra_repr(self) -> str:
        """Show the arguments that are not modules."""
        return (
            f"channels={self.channels}, num_parts={self.num_parts}, "
            f"part_dim={self.part_dim}, norm={self.norm!r}"
        )
