"""Ways to make part maps, and the structure between parts, without this library."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from partlocal import part_maps, part_mask_pool, structure_correlation
from partlocal.kernels import Implementation
from peers.pooling import bmm_sum, broadcast_sum
from peers.provider import Provider, own_providers

PARTS = (1, 4, 5, 6, 8, 10)  # six of eleven labels


def own_maps(implementation: Implementation) -> Callable[[Tensor], Tensor]:
    """Our maps at the grid of FSENet."""
    return lambda logits: part_maps(logits, PARTS, 28, implementation=implementation).maps


def plain_maps(logits: Tensor) -> Tensor:
    """The same by one PyTorch function after another."""
    normed = F.normalize(logits.softmax(1), dim=1)
    return F.adaptive_max_pool2d(normed[:, PARTS], (28, 28))


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
    off = ~torch.eye(k, dtype=torch.bool, device=parts.device).flatten()
    pairs = torch.stack([distance, cosine], 3).flatten(1, 2)
    return torch.cat([parts, pairs[:, off].reshape(b, k, 2 * (k - 1))], 2)


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


def maps_providers(device: torch.device) -> list[Provider]:
    """Return who makes maps."""
    return [
        *own_providers(own_maps, device),
        Provider("PyTorch", plain_maps),
        Provider("PyTorch, compiled", plain_maps, compiled=True),
    ]


def correlation_providers(device: torch.device) -> list[Provider]:
    """Return who describes the structure between parts."""
    return [
        *own_providers(own_structure, device),
        Provider("cdist", cdist_structure),
        Provider("broadcast", broadcast_structure, temporaries=1),
        Provider("broadcast, compiled", broadcast_structure, compiled=True),
    ]


def chain_providers(device: torch.device) -> list[Provider]:
    """Return who goes from logits to the descriptor."""
    return [
        *own_providers(own_chain, device),
        Provider("bmm and cdist", plain_chain),
        Provider("bmm and cdist, compiled", plain_chain, compiled=True),
        Provider("broadcast", broadcast_chain, temporaries=1),
        Provider("broadcast, compiled", broadcast_chain, compiled=True),
    ]
