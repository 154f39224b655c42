"""Pictures to descriptors: both mirror images of each, under real and under control maps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from model import GlobalNet
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from workplace import Workplace

from partlocal import PartLocalNet

GLOBAL, LOCAL, BOTH = "global half", "local half", "both"  # as results call descriptors
TestTime = Literal["concatenation", "sum"]
Variant = tuple[Tensor, Tensor | None]  # maps, and the visibility of their parts


@dataclass(frozen=True)
class Described:
    """Unit vectors of n pictures, original and mirrored concatenated or added (eq. 5).

    Args:
        global_half: n x 2g, or n x g when they are added.
        local_half: n x 2l or n x l, or None for a network without parts.
        controls: the local half again, under maps that are not the picture's.
        local_weight: of the local half when both are joined.
    """

    global_half: Tensor
    local_half: Tensor | None
    controls: dict[str, Tensor]
    local_weight: float

    @property
    def arms(self) -> dict[str, Tensor]:
        """The unit descriptors by name: the halves that there are, and both joined."""
        if self.local_half is None:
            return {GLOBAL: self.global_half}
        both = self.join(self.local_half)
        return {GLOBAL: self.global_half, LOCAL: self.local_half, BOTH: both}

    def join(self, local: Tensor) -> Tensor:
        """Return unit descriptors of the global half and one of the local ones."""
        return F.normalize(torch.cat([self.global_half, self.local_weight * local], 1), dim=1)


@torch.inference_mode()
def describe(
    net: PartLocalNet | GlobalNet,
    images: Tensor,
    place: Workplace,
    *,
    mean_maps: Tensor | None = None,
    strangers: Tensor | None = None,
    test_time: TestTime = "concatenation",
    batch_size: int = 100,
) -> Described:
    """Describe pictures with a trained network, and with its part maps replaced by controls.

    Args:
        net: either network.
        images: uint8 `n 3 h w`.
        place: device and precision.
        mean_maps: `k h w`, the mean of the training set's maps, for the control of that name.
        strangers: for each picture the index of a picture of somebody else, for the others.
        test_time: what both views' unit vectors of a half become before the half's own L2 norm.
        batch_size: pictures a step.

    Raises:
        ValueError: a network with parts has no parser to find them.
    """
    net.eval()
    if isinstance(net, GlobalNet):
        views = [_global_only(net, images, mirror, place, batch_size) for mirror in (False, True)]
        return Described(_join_views(views, test_time), None, {}, 0.0)
    if net.parser is None:
        raise ValueError(
            "the network has no parser, and these pictures bring no part maps: "
            "save the network with the parser that makes its maps"
        )

    parts = net.parser.labels.select(*net.parts)
    found = [
        parse_pictures(net, images, place, mirror=mirror, size=batch_size)
        for mirror in (False, True)
    ]
    halves: dict[str, list[Tensor]] = {}
    for mirror, (own, visibility) in zip((False, True), found, strict=True):
        variants: dict[str, Variant] = {"own": (own, visibility)}
        if mean_maps is not None:
            mean = parts.flip(mean_maps) if mirror else mean_maps
            variants["mean maps"] = (mean.to(own).expand_as(own), None)
        if strangers is not None:
            variants["another person's maps"] = (own[strangers], visibility[strangers])
            variants["uniform maps"] = (torch.ones_like(own[:1]).expand_as(own), None)
        for name, vectors in _describe_view(net, images, mirror, variants, place, batch_size):
            halves.setdefault(name, []).append(vectors)
    unit = {name: _join_views(views, test_time) for name, views in halves.items()}
    local = unit.pop("own")
    return Described(unit.pop("global"), local, unit, net.local_weight)


def whole(net: PartLocalNet | GlobalNet) -> str:
    """Return what the whole descriptor of a network is called."""
    return GLOBAL if isinstance(net, GlobalNet) else BOTH


def view(images: Tensor, rows: slice, mirror: bool, place: Workplace) -> Tensor:
    """Return some of the pictures on the device, mirrored or not."""
    chosen = images[rows].to(place.device)
    return chosen.flip(-1) if mirror else chosen


def slices(n: int, size: int, title: str) -> Iterator[slice]:
    """Cut `range(n)` into pieces, with a progress bar if there are several."""
    pieces = range(0, n, size)
    alone = len(pieces) < 2
    for first in tqdm(
        pieces, desc=title, unit="batch", leave=False, mininterval=1.0, disable=alone
    ):
        yield slice(first, min(first + size, n))


def parse_pictures(
    net: PartLocalNet, images: Tensor, place: Workplace, *, mirror: bool = False, size: int = 100
) -> tuple[Tensor, Tensor]:
    """Return maps `n k h w`, and the visibility `n k` that only the probabilities before tell."""
    pieces = []
    for rows in slices(len(images), size, "parse"):
        with place.autocast():
            found = net.parse(view(images, rows, mirror, place))
        pieces.append([tensor.float().cpu() for tensor in found])
    maps, visibility = (torch.cat(column) for column in zip(*pieces, strict=True))
    return maps, visibility


def _join_views(views: list[Tensor], test_time: TestTime) -> Tensor:
    joined = torch.cat(views, 1) if test_time == "concatenation" else torch.stack(views).sum(0)
    return F.normalize(joined, dim=1)


def _global_only(
    net: GlobalNet, images: Tensor, mirror: bool, place: Workplace, size: int
) -> Tensor:
    with place.autocast():
        pieces = [
            net(view(images, s, mirror, place)) for s in slices(len(images), size, "describe")
        ]
    return torch.cat(pieces).float().cpu()


def _describe_view(
    net: PartLocalNet,
    images: Tensor,
    mirror: bool,
    variants: dict[str, Variant],
    place: Workplace,
    size: int,
) -> Iterator[tuple[str, Tensor]]:
    """Run the backbone once a picture and the local branch once a variant of its maps."""
    pieces: dict[str, list[Tensor]] = {}
    for rows in slices(len(images), size, "describe"):
        with place.autocast():
            tapped = net.backbone(view(images, rows, mirror, place))
            vector = F.normalize(net.global_projection(tapped.global_vector).float(), dim=1)
            pieces.setdefault("global", []).append(vector.cpu())
            for name, (maps, visibility) in variants.items():
                seen = None if visibility is None else visibility[rows].to(place.device)
                local = net.branch(tapped.features, maps[rows].to(place.device), seen)
                pieces.setdefault(name, []).append(local.vector.float().cpu())
    for name, vectors in pieces.items():
        yield name, torch.cat(vectors)
