"""FSENet and its baseline as trained: a network, and an ArcFace head for each vector it makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from partlocal import ArcFace, ArcFaceHead, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.hub import HubModule


class Losses(NamedTuple):
    """The loss that is minimised, and what it is the sum of (the baseline has no local loss)."""

    loss: Tensor
    global_loss: Tensor
    local_loss: Tensor


class GlobalNet(HubModule):
    """The baseline of table 7: the same backbone, trained alike, without parts."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        """Return unit global vectors, b d."""
        return F.normalize(self.backbone(images).global_vector.float(), dim=1)

    def config(self) -> dict[str, Any]:
        """Return what rebuilds the backbone."""
        return {"backbone": self.backbone.config()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "GlobalNet":
        """Build the network with fresh weights."""
        return cls(Backbone.from_config(config["backbone"]))


def build_head(
    net: nn.Module, width: int, identities: int, margin: float, scale: float, spread: bool
) -> ArcFaceHead:
    """Return a head where `net` is, its rows in this process or spread over all."""
    group = distributed.group.WORLD if spread else None
    device = next(net.parameters()).device
    return ArcFaceHead(
        width, identities, scale, ArcFace(margin), process_group=group, device=device
    )


@contextmanager
def compiled(net: PartLocalNet | GlobalNet, **how: Any) -> Iterator[None]:
    """Compile what a training step runs, for the block alone.

    Elsewhere batches have other sizes, each of which would be compiled anew. The heads are one
    operation already. Names and weights stay as they are.

    Args:
        net: FSENet, of which backbone and part branch are compiled, or its baseline.
        how: options of `torch.compile`.
    """
    parts = [net.backbone, *([net.branch] if isinstance(net, PartLocalNet) else [])]
    for part in parts:
        part.forward = torch.compile(part.forward, **how)
    try:
        yield
    finally:
        for part in parts:
            del part.forward


class TrainedGlobalNet(nn.Module):
    """The baseline with its head."""

    def __init__(
        self, net: GlobalNet, identities: int, margin: float, scale: float, spread: bool = False
    ) -> None:
        super().__init__()
        self.net = net
        self.global_head = build_head(
            net, net.backbone.global_dim, identities, margin, scale, spread
        )

    def forward(
        self,
        images: Tensor,
        maps: Tensor | None,
        identities: Tensor,
        visibility: Tensor | None = None,
    ) -> Losses:
        """Return the loss; parts are ignored, so that both networks train by the same loop."""
        loss = self.global_head(self.net(images), identities)
        return Losses(loss, loss, torch.zeros_like(loss))


class TrainedFSENet(nn.Module):
    """FSENet with a head on the global and a head on the local vector (eq. 3)."""

    def __init__(
        self,
        net: PartLocalNet,
        identities: int,
        margin: float,
        scale: float,
        local_loss_weight: float = 1.0,
        spread: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.local_loss_weight = local_loss_weight
        self.global_head = build_head(net, net.global_dim, identities, margin, scale, spread)
        self.local_head = build_head(net, net.local_dim, identities, margin, scale, spread)

    def forward(
        self,
        images: Tensor,
        maps: Tensor | None,
        identities: Tensor,
        visibility: Tensor | None = None,
    ) -> Losses:
        """Return the weighted sum of both losses; `visibility` is that of ready `maps`."""
        described = self.net.forward_parts(images, maps, visibility)
        global_loss = self.global_head(described.global_vector, identities, described.norm)
        local_loss = self.local_head(described.local_vector, identities)
        return Losses(global_loss + self.local_loss_weight * local_loss, global_loss, local_loss)


def load_network(folder: Path) -> PartLocalNet | GlobalNet:
    """Load a network that a run saved, whichever of the two it is."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: pass the network/ folder that a run left")
    if (folder / "network").is_dir():
        raise FileNotFoundError(f"{folder} is the folder of a run: pass {folder / 'network'}")
    try:
        return PartLocalNet.from_pretrained(folder)
    except ValueError as error:
        if "holds GlobalNet, not" in str(error):
            return GlobalNet.from_pretrained(folder)
        raise
