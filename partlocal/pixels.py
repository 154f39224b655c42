"""Pixels in, standardised tensor out: every network carries the constants it was trained with."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Num
from torch import Tensor, nn

from partlocal.numerics import check_tensor


class Pixels(nn.Module):
    """Standardise RGB pictures, float in [0, 1] or uint8, with saved constants.

    >>> pixels = Pixels(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    >>> pixels(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).unique()
    tensor([1.])

    Args:
        mean: one number a channel, on the [0, 1] scale.
        std: one number a channel, on the [0, 1] scale.
        input: `"pixels"`, or `"normalized"` for pictures that are standardised already, which
            pass through unchanged.

    Raises:
        TypeError: the pictures are neither uint8 nor floating point.
        ValueError: a constant is missing; the pictures are not `[b, 3, h, w]`, empty, on another
            device than the constants, or floats that are not finite or outside [0, 1]. Values are
            looked at in every call on a CPU, and in the first call on other devices, where the
            check would stall the queue; never while compiling or exporting.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float | int],
        std: Sequence[float | int],
        input: str = "pixels",
    ) -> None:
        super().__init__()
        if input not in ("pixels", "normalized"):
            raise ValueError(f"input must be 'pixels' or 'normalized'; got {input!r}")
        self.input = input
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std must be three numbers each, std above 0; got {tuple(mean)} and "
                f"{tuple(std)}"
            )
        for name, values in (("mean", mean), ("std", std)):
            constants = torch.tensor([float(value) for value in values]).view(1, 3, 1, 1)
            self.register_buffer(name, constants)
        self._range_checked = False

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> Num[Tensor, "b 3 h w"]:
        """Standardise `images`; the result has the dtype of the constants."""
        self._check(images)
        if self.input == "normalized":
            return images
        scaled = images.to(self.mean.dtype)
        if images.dtype == torch.uint8:
            scaled = scaled / 255
        return (scaled - self.mean) / self.std

    def _check(self, images: Tensor) -> None:
        check_tensor("images", images)
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be [b, 3, h, w]; got {list(images.shape)}: one picture is "
                "images[None], NHWC is images.permute(0, 3, 1, 2), grey is "
                "images.expand(-1, 3, -1, -1)"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise TypeError(
                f"images must be uint8 or floating point; got {images.dtype}: "
                "pass images.to(torch.uint8) or images.float() / 255"
            )
        if self.input == "normalized" and images.dtype == torch.uint8:
            raise TypeError("images must be floating point where input='normalized'; got uint8")
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return
        if images.shape[0] == 0:
            raise ValueError("images must hold at least one picture; got an empty batch")
        if 0 in images.shape:
            raise ValueError(f"images must hold at least one pixel; got {list(images.shape)}")
        if self.input == "normalized":
            return
        if images.device != self.mean.device:
            raise ValueError(
                f"images must be on {self.mean.device} (as the network); got {images.device}: "
                f"pass images.to({str(self.mean.device)!r}), or move the network"
            )
        if images.dtype == torch.uint8 or images.is_meta:
            return
        if images.device.type == "cpu" or not self._range_checked:
            low, high = (value.item() for value in images.detach().aminmax())
            if not math.isfinite(high - low):
                raise ValueError(
                    f"images must be finite; got values from {low:.4g} to {high:.4g}: find the "
                    "pictures with images.isfinite(), and leave them out or read them again"
                )
            if not (low >= -1e-3 and high <= 1 + 1e-3):
                raise ValueError(
                    f"images must be floats in [0, 1]; got values from {low:.4g} to {high:.4g}: "
                    "divide by 255, or pass input='normalized' to the network if they are "
                    "standardised already"
                )
            self._range_checked = True

    def extra_repr(self) -> str:
        """Show the constants as they were given."""
        mean, std = (tuple(buffer.flatten().tolist()) for buffer in (self.mean, self.std))
        return f"mean={mean}, std={std}, input={self.input!r}"
