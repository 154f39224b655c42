"""The hourglass of `ParsingNet`: down by strided convolutions, up to each skip's size, summed.

Newell, Yang, Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016, with strided
convolutions for its max pooling and bilinear for its nearest upsampling; resizing to the skip's
size instead of by two makes every grid work.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def resize_bilinear(
    x: Float[Tensor, "b c h w"], size: tuple[int, int], antialias: bool = False
) -> Float[Tensor, "b c h2 w2"]:
    """Resize maps unless they have that size.

    >>> resize_bilinear(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    tensor([[[[0., 1., 3., 4.]]]])
    """
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    wide = x.to(torch.promote_types(x.dtype, torch.float32)) if antialias else x  # no half on CPUs
    return F.interpolate(wide, size, mode="bilinear", antialias=antialias).to(x.dtype)


class Residual(nn.Module):
    """Pre-activation bottleneck: 1x1 to half the width, 3x3, 1x1 back, added to the input.

    >>> Residual(8)(torch.rand(2, 8, 7, 7)).shape
    torch.Size([2, 8, 7, 7])
    """

    def __init__(
        self,
        width: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            *_norm_conv(width, half, 1, 1, device, dtype),
            *_norm_conv(half, half, 3, 1, device, dtype),
            *_norm_conv(half, width, 1, 1, device, dtype),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        _reset(self)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Add the branch to `x`."""
        return x + self.branch(x)


class Stem(nn.Module):
    """From a picture to features at the grid of the stacks, by convolutions of stride 2.

    >>> Stem(width=8, halvings=2)(torch.rand(2, 3, 64, 64)).shape
    torch.Size([2, 8, 16, 16])
    """

    def __init__(
        self,
        width: int,
        halvings: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Full resolution is dear: only the last of several convolutions has all the channels.
        widths = [width // 2] * (halvings - 1) + [width]
        layers: list[nn.Module] = [
            nn.Conv2d(
                3, widths[0], 3, min(halvings, 1) + 1, 1, bias=False, device=device, dtype=dtype
            )
        ]
        for before, after in pairwise(widths):
            layers += _norm_conv(before, after, 3, 2, device, dtype)
        self.layers = nn.Sequential(*layers, Residual(width, device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        _reset(self)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c h2 w2"]:
        """Return the features."""
        return self.layers(images)


class Hourglass(nn.Module):
    """One hourglass: its logits, and the features that the next one is given.

    >>> features, logits = Hourglass(8, num_labels=11, depth=3)(torch.rand(2, 8, 28, 28))
    >>> features.shape, logits.shape
    (torch.Size([2, 8, 28, 28]), torch.Size([2, 11, 28, 28]))

    Args:
        width: channels at every level.
        num_labels: maps to predict.
        depth: how often the grid is halved.
        last: no hourglass follows: features come back as they came, without unused parameters.
        device: where the parameters are made.
        dtype: and in which precision.
    """

    def __init__(
        self,
        width: int,
        num_labels: int,
        depth: int,
        last: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def pointwise(channels: int, out: int, bias: bool = False) -> nn.Conv2d:
            return nn.Conv2d(channels, out, 1, bias=bias, device=device, dtype=dtype)

        self.skips = nn.ModuleList(Residual(width, device, dtype) for _ in range(depth))
        self.downs = nn.ModuleList(
            nn.Sequential(*_norm_conv(width, width, 3, 2, device, dtype)) for _ in range(depth)
        )
        self.middle = Residual(width, device, dtype)
        self.ups = nn.ModuleList(Residual(width, device, dtype) for _ in range(depth))
        self.norm = nn.BatchNorm2d(width, device=device, dtype=dtype)
        # Before the last, a bias would reach the result only through a BatchNorm, which removes it.
        self.head = pointwise(width, num_labels, bias=last)
        self.remap_features = None if last else pointwise(width, width)
        self.remap_logits = None if last else pointwise(num_labels, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights."""
        _reset(self)
        nn.init.normal_(self.head.weight, std=0.1)
        if self.head.bias is not None:
            nn.init.zeros_(self.head.bias)

    def forward(
        self, x: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b n h w"]]:
        """Return (features for the next hourglass, logits)."""
        inner, kept = x, []
        for skip, down in zip(self.skips, self.downs, strict=True):
            kept.append(skip(inner))
            inner = down(inner)
        inner = self.middle(inner)
        for up in self.ups:
            side = kept.pop()
            inner = side + resize_bilinear(up(inner), (side.shape[-2], side.shape[-1]))
        features = F.relu(self.norm(inner))
        logits = self.head(features)
        if self.remap_features is not None and self.remap_logits is not None:
            x = x + self.remap_features(features) + self.remap_logits(logits)
        return x, logits


def _norm_conv(
    before: int,
    after: int,
    size: int,
    stride: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> list[nn.Module]:
    # No bias: every path from here meets a BatchNorm, which would subtract it again.
    return [
        nn.BatchNorm2d(before, device=device, dtype=dtype),
        nn.ReLU(),
        nn.Conv2d(before, after, size, stride, size // 2, bias=False, device=device, dtype=dtype),
    ]


def _reset(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
    for module in root.modules():
        if isinstance(module, Residual):
            # Small, so that a deep sum keeps its scale; not zero, so that all layers learn at once.
            with torch.no_grad():
                for weight in module.branch[-1].parameters():
                    weight.mul_(0.1)
