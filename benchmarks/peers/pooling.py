"""Ways to pool features `b c h w` under maps `b k h w` into part vectors `b k c`.

Each is written from the formula that its project uses. Some define another result than
`part_mask_pool`: they bring an oracle of their own, and are timed for what they cost alone.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchvision.ops import roi_align

from partlocal import part_mask_pool
from partlocal.kernels import Implementation
from partlocal.pooling import Mode
from peers.provider import Provider, own_providers, with_compiled


def broadcast_sum(features: Tensor, maps: Tensor) -> Tensor:
    """The product of every map with every channel, as bpbreid's weighted average makes it."""
    product = features[:, None] * maps[:, :, None]
    return product.sum((3, 4)) / maps.sum((2, 3)).clamp(min=1e-6)[..., None]


def einsum_sum(features: Tensor, maps: Tensor) -> Tensor:
    """One contraction, and a division."""
    total = torch.einsum("bchw,bkhw->bkc", features, maps)
    return total / maps.sum((2, 3)).clamp(min=1e-6)[..., None]


def bmm_sum(features: Tensor, maps: Tensor) -> Tensor:
    """A batched matrix product, and a division."""
    total = torch.bmm(maps.flatten(2), features.flatten(2).mT)
    return total / maps.sum((2, 3)).clamp(min=1e-6)[..., None]


def bmm_mean(features: Tensor, maps: Tensor) -> Tensor:
    """A batched matrix product with the area, and divisions."""
    area, mass = (maps >= 0.5).to(features.dtype), maps.sum((2, 3))
    total = torch.bmm(area.flatten(2), features.flatten(2).mT)
    return total / (area.sum((2, 3)) * mass)[..., None]


def broadcast_mean(features: Tensor, maps: Tensor) -> Tensor:
    """The product of every area with every channel."""
    area, mass = (maps >= 0.5).to(features.dtype), maps.sum((2, 3))
    total = (features[:, None] * area[:, :, None]).sum((3, 4))
    return total / (area.sum((2, 3)) * mass)[..., None]


def pven(features: Tensor, maps: Tensor) -> Tensor:
    """PVEN: the average of the product, times the cells, over the mass and 1."""
    product = features[:, None] * maps[:, :, None]
    cells = maps[0, 0].numel()
    return product.mean((3, 4)) * (cells / (maps.sum((2, 3)) + 1))[..., None]


def pven_oracle(features: Tensor, maps: Tensor) -> Tensor:
    """The same number by number of parts."""
    totals = [(features * maps[:, k, None]).sum((2, 3)) for k in range(maps.shape[1])]
    return torch.stack(totals, 1) / (1 + maps.sum((2, 3)))[..., None]


def ocrnet(features: Tensor, maps: Tensor) -> Tensor:
    """OCRNet gathers by a softmax over the cells (of what are logits there)."""
    return maps.flatten(2).softmax(2) @ features.flatten(2).mT


def ocrnet_oracle(features: Tensor, maps: Tensor) -> Tensor:
    """The same part by part."""
    weights = maps.exp() / maps.exp().sum((2, 3), keepdim=True)
    return torch.stack([(features * w[:, None]).sum((2, 3)) for w in weights.unbind(1)], 1)


def fc_clip(features: Tensor, maps: Tensor) -> Tensor:
    """FC-CLIP averages where the map is positive, and gives the maps no gradient."""
    area = (maps > 0).to(maps.dtype)
    share = area / (area.sum((2, 3), keepdim=True) + 1e-8)
    return torch.einsum("bchw,bkhw->bkc", features, share)


def fc_clip_oracle(features: Tensor, maps: Tensor) -> Tensor:
    """The same part by part."""
    areas = [(maps[:, k, None] > 0).to(features.dtype) for k in range(maps.shape[1])]
    return torch.stack([(features * a).sum((2, 3)) / a.sum((2, 3)) for a in areas], 1)


def boxes_of(maps: Tensor) -> Tensor:
    """Return for each part of each image (image, left, top, right, bottom) of its area, cells."""
    b, k, h, w = maps.shape
    area = maps >= 0.5
    rows, columns = area.any(3), area.any(2)
    top, left = rows.int().argmax(2), columns.int().argmax(2)
    bottom = h - rows.flip(2).int().argmax(2)
    right = w - columns.flip(2).int().argmax(2)
    image = torch.arange(b, device=maps.device)[:, None].expand(b, k)
    return torch.stack([image, left, top, right, bottom], 2).to(maps.dtype)


def with_boxes(features: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `roi` takes: its boxes are made before, as a detector would have made them."""
    return features, boxes_of(maps.detach())


def roi(features: Tensor, boxes: Tensor) -> Tensor:
    """torchvision's `roi_align` of the boxes `b k 5` of the parts, one bin each."""
    pooled = roi_align(features, boxes.flatten(0, 1), (1, 1), aligned=True)
    return pooled.flatten(1).unflatten(0, boxes.shape[:2])


def roi_oracle(features: Tensor, maps: Tensor) -> Tensor:
    """The mean of the cells of each box."""
    found = []
    for image, left, top, right, bottom in boxes_of(maps).long().flatten(0, 1).tolist():
        found.append(features[image, :, top:bottom, left:right].mean((1, 2)))
    return torch.stack(found).unflatten(0, maps.shape[:2])


def loop_max(features: Tensor, maps: Tensor) -> Tensor:
    """The maximum under one part after another."""
    hidden = [
        features.masked_fill(maps[:, k, None] < 0.5, -torch.inf) for k in range(maps.shape[1])
    ]
    return torch.stack([x.amax((2, 3)) for x in hidden], 1) / maps.sum((2, 3))[..., None]


def broadcast_max(features: Tensor, maps: Tensor) -> Tensor:
    """The maximum of all features under all parts at once."""
    under = torch.where(maps[:, :, None] >= 0.5, features[:, None], -torch.inf)
    return under.amax((3, 4)) / maps.sum((2, 3))[..., None]


def bpbreid_max(features: Tensor, maps: Tensor) -> Tensor:
    """bpbreid's maximum: of the product, so that hidden cells count as 0."""
    return (features[:, None] * maps[:, :, None]).amax((3, 4))


def bpbreid_max_oracle(features: Tensor, maps: Tensor) -> Tensor:
    """The same part by part."""
    return torch.stack(
        [(features * maps[:, k, None]).amax((2, 3)) for k in range(maps.shape[1])], 1
    )


def ours(mode: Mode, implementation: Implementation) -> Callable[..., Tensor]:
    """`part_mask_pool`, which returns mass and visibility too."""
    return lambda features, maps: (
        part_mask_pool(features, maps, mode, implementation=implementation).parts
    )


def providers(mode: Mode, device: torch.device, maps_too: bool = False) -> list[Provider]:
    """Return who pools by `mode`, ourselves first; of some the maps get no gradient."""
    own = own_providers(partial(ours, mode), device)
    if mode == "max":
        return [
            *own,
            *with_compiled("loop over parts", loop_max),
            *with_compiled("broadcast", broadcast_max, 1),
            Provider("bpbreid (other result)", bpbreid_max, bpbreid_max_oracle, temporaries=1),
        ]
    if mode == "mean":
        return [
            *own,
            *with_compiled("bmm", bmm_mean),
            *with_compiled("broadcast", broadcast_mean, 1),
        ]
    found = [
        *with_compiled("bmm", bmm_sum),
        *with_compiled("einsum", einsum_sum),
        *with_compiled("broadcast (bpbreid)", broadcast_sum, 1),
        Provider("PVEN (other result)", pven, pven_oracle, temporaries=1),
        Provider("OCRNet (other result)", ocrnet, ocrnet_oracle),
        Provider("FC-CLIP (other result)", fc_clip, fc_clip_oracle),
        Provider("roi_align (other result)", roi, roi_oracle, prepare=with_boxes),
    ]
    return own + [p for p in found if not (maps_too and p.run in (fc_clip, roi))]
