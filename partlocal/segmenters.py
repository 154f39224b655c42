"""What every parser can do, and an adapter that makes a parser of another library's segmenter."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from jaxtyping import Float, Num
from torch import Tensor, nn

from partlocal.hourglass import resize_bilinear
from partlocal.labels import LabelSet
from partlocal.pixels import Pixels
from partlocal.resize import side_or_size

T = TypeVar("T", bound="Freezable")


class Freezable(nn.Module):
    """A network that can be fixed: `freeze()` holds through a later `train()` of its owner."""

    frozen = False

    def freeze(self: T, frozen: bool = True) -> T:
        """Fix the network, or with `False` let it learn again; returns the network.

        A fixed network stays in eval mode and its parameters take no gradient. Its output is an
        ordinary tensor: it may weigh features that are being learned, and carries gradients to
        the pictures if these ask for them. `ParsingNet.config()` says whether it is fixed, so
        that a saved network comes back as it was; single parameters fixed by hand do not.
        """
        self.frozen = frozen
        self.requires_grad_(not frozen)
        return self.train(not frozen)

    def train(self: T, mode: bool = True) -> T:
        """Set training mode, which a frozen network declines."""
        return super().train(mode and not self.frozen)


class LogitsAdapter(Freezable):
    """Give any other segmentation network the interface of `ParsingNet`.

    >>> import torch
    >>> from partlocal import HELEN
    >>> segmenter = torch.nn.Conv2d(3, 11, 3, stride=4)
    >>> mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    >>> LogitsAdapter(segmenter, HELEN, mean, std, size=64)(torch.rand(2, 3, 112, 112)).shape
    torch.Size([2, 11, 64, 64])

    Args:
        module: returns logits `b n h w` on any grid: as a tensor, first in a tuple or list, or
            under `out` or `logits` of a dict or object.
        labels: the label set that says what its n channels are.
        mean: what it subtracts from pixels in [0, 1], one number a channel.
        std: what it divides by.
        size: rows and columns at which it takes its pictures, and of the logits returned.
        input: `"pixels"`, or `"normalized"` to leave the pictures as they are.

    Raises:
        TypeError: the module returns none of these.
        ValueError: its number of channels is not that of `labels`, `size` is no grid, or the
            constants are of pixels beyond 1.
    """

    def __init__(
        self,
        module: nn.Module,
        labels: LabelSet,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | tuple[int, int],
        *,
        input: str = "pixels",
    ) -> None:
        super().__init__()
        if max(mean) > 1 or max(std) > 1:
            raise ValueError(
                f"mean and std must be of pixels in [0, 1]; got {tuple(mean)} and {tuple(std)}: "
                "divide those of pixels up to 255 by 255"
            )
        self.module = module
        self.labels = labels
        self.size = side_or_size(size)
        self.pixels = Pixels(mean, std, input)

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> Float[Tensor, "b n s1 s2"]:
        """Return the module's logits at `size`."""
        logits = _find_logits(
            self.module(resize_bilinear(self.pixels(images), self.size, antialias=True))
        )
        if logits.ndim != 4 or logits.shape[1] != len(self.labels):
            raise ValueError(
                f"{type(self.module).__name__} must return [b, n, h, w] with n = "
                f"{len(self.labels)} (as {self.labels.name}); got {list(logits.shape)}"
            )
        return resize_bilinear(logits, self.size)

    def extra_repr(self) -> str:
        """Show the arguments that are no modules."""
        return f"labels={self.labels.name}, size={self.size}"


def _find_logits(output: object) -> Tensor:
    found = output
    if isinstance(found, tuple | list) and found and not hasattr(found, "_fields"):
        found = found[0]
    for key in ("out", "logits"):
        if isinstance(found, Mapping):
            found = found.get(key, found)
        elif not isinstance(found, Tensor):
            found = getattr(found, key, found)
    if isinstance(found, tuple | list) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise TypeError(
            "module must return logits as a tensor, first in a tuple or list, or under 'out' or "
            f"'logits'; got {type(output).__name__}: wrap it in a module that returns one of these"
        )
    return found
