"""Ways to make part maps, and the structure between parts, without this library."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from partlocal import part_maps, part_mask_pool, structure_correlation
from partlocal.kernels import Implementation
from partlocal.resize import Downsample
from peers.pooling import bmm_sum, broadcast_sum
from peers.provider import Provider, own_providers, with_compiled

PARTS = (1, 4, 5, 6, 8, 10)  # six of eleven labels


def own_maps(downsample: Downsample, implementation: Implementation) -> Callable[[Tensor], Tensor]:
    """Our maps at the grid of FSENet."""
    return lambda logits: (
        part_maps(logits, PARTS, 28, downsample=downsample, implementation=implementation).maps
    )


def plain_maps(logits: Tensor) -> Tensor:
    """The same by one PyTorch function after another."""
    return F.adaptive_max_pool2d(_normed(logits), (28, 28))


def area_maps(logits: Tensor) -> Tensor:
    """Means by exact area: one matrix product an axis, of the averages over a common finer grid."""
    side = logits.shape[2]
    fine = torch.eye(side, device=logits.device, dtype=logits.dtype)
    fine = fine.repeat_interleave(math.lcm(side, 28) // side, 0)
    weights = fine.unflatten(0, (28, -1)).mean(1)
    return weights @ _normed(logits) @ weights.T


def adaptive_maps(logits: Tensor) -> Tensor:
    """Means by PyTorch's bins, which overlap."""
    return F.adaptive_avg_pool2d(_normed(logits), (28, 28))


def adaptive_oracle(logits: Tensor) -> Tensor:
    """The same cell by cell."""
    normed, side = _normed(logits), logits.shape[2]
    bins = [(i * side // 28, -(-(i + 1) * side // 28)) for i in range(28)]
    cells = [
        normed[:, :, top:bottom, left:right].mean((2, 3))
        for top, bottom in bins
        for left, right in bins
    ]
    return torch.stack(cells, 2).unflatten(2, (28, 28))


def _normed(logits: Tensor) -> Tensor:
    return F.normalize(logits.softmax(1), dim=1)[:, PARTS]


def own_structure(implementation: Implementation) -> Callable[[Tensor], Tensor]:
    """Our descriptor of parts."""
    return lambda parts: structure_correlation(parts, implementation=implementation)


def broadcast_structure(parts: Tensor) -> Tensor:
    """Distances and cosines of all pairs from tensors of every pair x channel."""
    distance = (parts[:, :, None] - parts[:, None]).square().sum(3).clamp(min=1e-24).sqrt()
    cosine = F.cosine_similarity(parts[:, :, None], parts[:, None], dim=3)
    return _described(parts, distance, cosine)


def cdist_structure(parts: Tensor) -> Tensor:
    """Distances by `torch.cdist`, from differences, and cosines as a product of unit vectors."""
    wide = parts.float() if parts.is_cuda else parts  # there cdist takes no half precision
    distance = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    unit = F.normalize(parts, dim=2)
    return _described(parts, distance.to(parts.dtype), unit @ unit.mT)


def _described(parts: Tensor, distance: Tensor, cosine: Tensor) -> Tensor:
    """Return each part followed by its pairs with the others."""
    b, k = parts.shape[:2]
    pairs = torch.stack([distance, cosine], 3)
    # The k x k table is read from its second entry in rows of k + 1, which all end on the diagonal.
    shifted = pairs.flatten(1, 2)[:, 1:].unflatten(1, (k - 1, k + 1))
    return torch.cat([parts, shifted[:, :, :k].reshape(b, k, 2 * (k - 1))], 2)


def own_chain(implementation: Implementation) -> Callable[[Tensor, Tensor], Tensor]:
    """Logits to descriptor by our three layers."""

    def chain(features: Tensor, logits: Tensor) -> Tensor:
        maps, seen = part_maps(logits, PARTS, 28, implementation=implementation)
        pooled = part_mask_pool(features, maps, visibility=seen, implementation=implementation)
        return structure_correlation(pooled.parts, implementation=implementation)

    return chain


def plain_chain(features: Tensor, logits: Tensor) -> Tensor:
    """Logits to descriptor by PyTorch functions, the fastest way of each."""
    return cdist_structure(bmm_sum(features, plain_maps(logits)))


def broadcast_chain(features: Tensor, logits: Tensor) -> Tensor:
    """The same by the broadcast product."""
    return broadcast_structure(broadcast_sum(features, plain_maps(logits)))


def maps_providers(device: torch.device, downsample: Downsample) -> list[Provider]:
    """Return who makes maps."""
    own = own_providers(partial(own_maps, downsample), device)
    if downsample == "area":
        return [
            *own,
            *with_compiled("PyTorch", area_maps),
            Provider("adaptive average (other result)", adaptive_maps, adaptive_oracle),
        ]
    return [
        *own,
        *with_compiled("PyTorch", plain_maps),
    ]


def correlation_providers(device: torch.device) -> list[Provider]:
    """Return who describes the structure between parts."""
    return [
        *own_providers(own_structure, device, "triton"),
        Provider("cdist", cdist_structure),
        *with_compiled("broadcast", broadcast_structure, 1),
    ]


def chain_providers(device: torch.device) -> list[Provider]:
    """Return who goes from logits to the descriptor."""
    return [
        *own_providers(own_chain, device),
        *with_compiled("bmm and cdist", plain_chain),
        *with_compiled("broadcast", broadcast_chain, 1),
    ]
