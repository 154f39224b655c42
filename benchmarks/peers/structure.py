"""Ways to make part maps, and the structure between parts, without this library."""

import torch
from torch import Tensor
from torch.nn import functional as F

from partlocal import part_maps, part_mask_pool, structure_correlation
from peers.pooling import broadcast_sum
from peers.provider import Provider

PARTS = (1, 4, 5, 6, 8, 10)  # six of eleven labels


def own_maps(logits: Tensor) -> Tensor:
    """Our maps at the grid of FSENet."""
    return part_maps(logits, PARTS, 28).maps


def plain_maps(logits: Tensor) -> Tensor:
    """The same by one PyTorch function after another."""
    normed = F.normalize(logits.softmax(1), dim=1)
    return F.adaptive_max_pool2d(normed[:, PARTS], (28, 28))


def own_structure(parts: Tensor) -> Tensor:
    """Our descriptor of parts."""
    return structure_correlation(parts)


def plain_structure(parts: Tensor) -> Tensor:
    """Distances and cosines of all pairs by broadcasting, without the pairs of one part."""
    b, k = parts.shape[:2]
    distance = (parts[:, :, None] - parts[:, None]).square().sum(3).clamp(min=1e-24).sqrt()
    cosine = F.cosine_similarity(parts[:, :, None], parts[:, None], dim=3)
    pairs = torch.stack([distance, cosine], 3).flatten(1, 2)
    off = ~torch.eye(k, dtype=torch.bool, device=parts.device).flatten()
    return torch.cat([parts, pairs[:, off].reshape(b, k, 2 * (k - 1))], 2)


def own_chain(features: Tensor, logits: Tensor) -> Tensor:
    """Logits to descriptor by our three layers."""
    maps, visibility = part_maps(logits, PARTS, 28)
    return structure_correlation(part_mask_pool(features, maps, visibility=visibility).parts)


def plain_chain(features: Tensor, logits: Tensor) -> Tensor:
    """Logits to descriptor by PyTorch functions and the broadcast product."""
    return plain_structure(broadcast_sum(features, plain_maps(logits)))


def providers(ours, plain, temporaries: int = 0) -> list[Provider]:
    """Return ourselves and the plain way, eager and compiled."""
    return [
        Provider("partlocal", ours),
        Provider("partlocal, compiled", ours, compiled=True),
        Provider("PyTorch", plain, temporaries=temporaries),
        Provider("PyTorch, compiled", plain, compiled=True),
    ]


MAPS = providers(own_maps, plain_maps)
STRUCTURE = providers(own_structure, plain_structure)
CHAIN = providers(own_chain, plain_chain, temporaries=1)
