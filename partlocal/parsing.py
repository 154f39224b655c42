"""ParsingNet, a stacked hourglass of residual bottlenecks: pictures in, part logits out.

Newell, Yang, Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016; the same
network predicts parts (one map a label) and landmarks (one heat map a point).
"""

import json
import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Num
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from partlocal.hub import HubModule, load_weights
from partlocal.labels import HELEN, LabelSet
from partlocal.pixels import Pixels

PRETRAINED = Path(__file__).parent / "weights" / "parsing_net.safetensors"

T = TypeVar("T", bound="Freezable")


class Freezable(nn.Module):
    """A network that can be fixed: `freeze()` holds through a later `train()` of its owner."""

    frozen = False

    def freeze(self: T, frozen: bool = True) -> T:
        """Fix the network, or with `False` let it learn again; returns the network.

        A fixed network stays in eval mode and its parameters take no gradient. Its output is an
        ordinary tensor: it may weigh features that are being learned, and carries gradients to
        the pictures if these ask for them.
        """
        self.frozen = frozen
        self.requires_grad_(not frozen)
        return self.train(not frozen)

    def train(self: T, mode: bool = True) -> T:
        """Set training mode, which a frozen network declines."""
        return super().train(mode and not self.frozen)


class ParsingNet(Freezable, HubModule):
    """Predict logits for every part at every pixel.

    >>> parser = ParsingNet(HELEN, width=16)
    >>> parser(torch.rand(2, 3, 112, 112)).shape
    torch.Size([2, 11, 128, 128])
    >>> landmarks = ParsingNet(5, width=16, grid=32)  # five heat maps
    >>> soft_argmax(landmarks(torch.rand(2, 3, 112, 112)), size=(112, 112)).shape
    torch.Size([2, 5, 2])

    Args:
        labels: the label set of the maps, or just their number.
        width: channels at every level; even.
        num_stacks: how many hourglasses follow one another, each correcting the one before it.
        bottleneck_size: rows and columns at the narrowest level, reached from `grid` by halving.
        input_size: rows and columns to which pictures of any size are resized, and of the logits.
        grid: rows and columns at which the stacks work, reached from `input_size` by halving;
            128 is the paper's, 64 and 32 cost about a quarter and a sixteenth of it.
        input: `"pixels"` for RGB in [0, 1] or uint8, `"normalized"` for (x - 127.5) / 128.

    Raises:
        ValueError: a size cannot be reached by halving, or a count is too small.

    Source: FSENet, sections 3.2 and 4.7.3 (two hourglasses down to 4x4 on 128x128 pictures).
    """

    def __init__(
        self,
        labels: LabelSet | int = HELEN,
        width: int = 64,
        num_stacks: int = 2,
        bottleneck_size: int = 4,
        input_size: int = 128,
        grid: int = 64,
        *,
        input: str = "pixels",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.labels = labels
        self.num_labels = labels if isinstance(labels, int) else len(labels)
        self.width = width
        self.num_stacks = num_stacks
        self.bottleneck_size = bottleneck_size
        self.input_size = input_size
        self.grid = grid
        self._warned = False
        if self.num_labels < 1:
            raise ValueError(f"labels must be a LabelSet or a number >= 1; got {labels}")
        if width < 2 or width % 2:
            raise ValueError(f"width must be even and at least 2; got {width}")
        if num_stacks < 1:
            raise ValueError(f"num_stacks must be at least 1; got {num_stacks}")
        if bottleneck_size < 2:  # a single cell has no variance for BatchNorm
            raise ValueError(f"bottleneck_size must be at least 2; got {bottleneck_size}")
        halvings = _halvings("grid", grid, "input_size", input_size)
        depth = _halvings("bottleneck_size", bottleneck_size, "grid", grid)

        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pixels = Pixels((127.5 / 255,) * 3, (128 / 255,) * 3, input).to(**dd)
        self.stem = _stem(width, halvings, dd)
        self.stacks = nn.ModuleList(
            _Stack(width, self.num_labels, depth, last=i == num_stacks - 1, dd=dd)
            for i in range(num_stacks)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh weights, such that features keep their scale and logits start near zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, _Residual):
                # Not zero: then nothing before this layer would learn from the first step.
                nn.init.kaiming_normal_(module.branch[-1].weight, a=3.0)
            elif isinstance(module, _Stack):
                nn.init.normal_(module.head.weight, std=0.01)
                nn.init.zeros_(module.head.bias)

    @property
    def trained(self) -> bool:
        """Whether the network ever saw a batch in training mode, here or before it was saved."""
        return any(bool(b) for name, b in self.named_buffers() if name.endswith("_tracked"))

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> Float[Tensor, "b n s s"]:
        """Return the logits of the last stack."""
        return _resize(self._grid_logits(images)[-1], (self.input_size, self.input_size))

    def forward_stacks(self, images: Num[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b n s s"]]:
        """Return the logits of every stack, for a loss on each."""
        size = (self.input_size, self.input_size)
        return [_resize(logits, size) for logits in self._grid_logits(images)]

    def _grid_logits(self, images: Tensor) -> list[Tensor]:
        if self.frozen and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            if not self.trained:
                warnings.warn(
                    "this ParsingNet is frozen but was never trained: its parts are noise; load "
                    "one with ParsingNet.pretrained() or ParsingNet.from_pretrained(folder)",
                    stacklevel=3,
                )
        x = _resize(self.pixels(images), (self.input_size, self.input_size), antialias=True)
        x = self.stem(x)
        outputs = []
        for stack in self.stacks:
            x, logits = stack(x)
            outputs.append(logits)
        return outputs

    def config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this network, as JSON holds them."""
        labels = self.labels if isinstance(self.labels, int) else self.labels.to_dict()
        return {
            "labels": labels,
            "width": self.width,
            "num_stacks": self.num_stacks,
            "bottleneck_size": self.bottleneck_size,
            "input_size": self.input_size,
            "grid": self.grid,
            "input": self.pixels.input,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ParsingNet":
        """Build a network with fresh weights from what `config()` returned."""
        labels = config["labels"]
        labels = labels if isinstance(labels, int) else LabelSet.from_dict(labels)
        return cls(**{**config, "labels": labels})

    def save_compact(
        self, path: str | Path = PRETRAINED, about: Mapping[str, Any] | None = None
    ) -> None:
        """Write the convolutions in half precision, and the configuration as JSON beside them.

        Args:
            path: where the `.safetensors` goes; `load_compact` and, at the default, `pretrained`
                read it.
            about: what a reader should know of these weights (recipe, seed, scores).
        """
        path = Path(path)
        tensors = {
            # Statistics and offsets stay as they are: they are few and may exceed half's range.
            name: (t.half() if t.ndim == 4 and "pixels" not in name else t).contiguous().cpu()
            for name, t in ((name, t.detach()) for name, t in self.state_dict().items())
        }
        if bad := [name for name, t in tensors.items() if not t.isfinite().all()]:
            raise ValueError(f"weights are not finite in half precision: {', '.join(bad)}")
        config = {
            "class": type(self).__name__,
            "arguments": self.config(),
            "about": dict(about or {}),
        }
        text = json.dumps(config, indent=2) + "\n"
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            save_file(tensors, Path(scratch) / path.name)
            (Path(scratch) / "config.json").write_text(text, encoding="utf-8")
            os.replace(Path(scratch) / path.name, path)
            os.replace(Path(scratch) / "config.json", path.with_suffix(".json"))

    @classmethod
    def load_compact(cls, path: str | Path) -> "ParsingNet":
        """Load what `save_compact` wrote, in eval mode.

        Raises:
            FileNotFoundError: the weights or the JSON beside them are missing.
            ValueError: a file is damaged, or they do not belong together.
        """
        path = Path(path)
        for file in (path, path.with_suffix(".json")):
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: ParsingNet.save_compact writes it")
        config = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        parser = cls.from_config(config["arguments"])
        load_weights(parser, path)
        return parser.eval()

    @classmethod
    def pretrained(cls) -> "ParsingNet":
        """Load the parser that ships with the package, trained on procedural faces alone.

        Raises:
            FileNotFoundError: this copy of the package holds no weights.
        """
        if not PRETRAINED.is_file():
            raise FileNotFoundError(
                f"this copy of partlocal holds no weights/{PRETRAINED.name}: install a release, "
                "or train a parser and pass its folder to ParsingNet.from_pretrained"
            )
        return cls.load_compact(PRETRAINED)

    def extra_repr(self) -> str:
        """Show the arguments."""
        labels = self.labels if isinstance(self.labels, int) else self.labels.name
        return (
            f"labels={labels}, width={self.width}, num_stacks={self.num_stacks}, "
            f"bottleneck_size={self.bottleneck_size}, input_size={self.input_size}, "
            f"grid={self.grid}"
        )


class LogitsAdapter(Freezable):
    """Give any other segmentation network the interface of `ParsingNet`.

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
        ValueError: its number of channels is not that of `labels`.
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
        self.module = module
        self.labels = labels
        self.num_labels = len(labels)
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        self.pixels = Pixels(mean, std, input)

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> Float[Tensor, "b n s1 s2"]:
        """Return the module's logits at `size`."""
        logits = _find_logits(self.module(_resize(self.pixels(images), self.size, antialias=True)))
        if logits.ndim != 4 or logits.shape[1] != self.num_labels:
            raise ValueError(
                f"{type(self.module).__name__} must return [b, n, h, w] with n = "
                f"{self.num_labels} (as {self.labels.name}); got {list(logits.shape)}"
            )
        return _resize(logits, self.size)

    def extra_repr(self) -> str:
        """Show the arguments that are no modules."""
        return f"labels={self.labels.name}, size={self.size}"


def soft_argmax(
    heatmaps: Float[Tensor, "b n h w"], size: tuple[int, int] | None = None
) -> Float[Tensor, "b n 2"]:
    """Return each heat map's point (x, y): the mean position under a softmax over its cells.

    >>> heatmaps = torch.zeros(1, 1, 4, 4)
    >>> heatmaps[0, 0, 1, 2] = 100
    >>> soft_argmax(heatmaps), soft_argmax(heatmaps, size=(8, 8))
    (tensor([[[2., 1.]]]), tensor([[[4.5000, 2.5000]]]))

    Args:
        heatmaps: logits, one map a point.
        size: rows and columns of the picture in which the points are wanted, by default those of
            the maps; the centre of the first pixel is (0, 0).
    """
    rows, columns = heatmaps.shape[-2:]
    height, width = size or (rows, columns)
    probability = heatmaps.float().flatten(2).softmax(-1).unflatten(2, (rows, columns))
    y = (torch.arange(rows, device=heatmaps.device) + 0.5) * (height / rows) - 0.5
    x = (torch.arange(columns, device=heatmaps.device) + 0.5) * (width / columns) - 0.5
    return torch.stack([probability.sum(-2) @ x, probability.sum(-1) @ y], dim=-1)


def _halvings(name: str, size: int, start_name: str, start: int) -> int:
    sizes = [start]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)  # what a 3x3 convolution of stride 2 leaves
    if size not in sizes:
        raise ValueError(
            f"{name} must be {start_name} = {start} halved some times, one of {sizes}; got {size}"
        )
    return sizes.index(size)


def _resize(x: Tensor, size: tuple[int, int], antialias: bool = False) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=antialias)


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


def _norm_conv(in_width: int, out_width: int, size: int, stride: int, dd: dict) -> list[nn.Module]:
    # No bias: the BatchNorm that every later layer starts with would subtract it again.
    return [
        nn.BatchNorm2d(in_width, **dd),
        nn.ReLU(),
        nn.Conv2d(in_width, out_width, size, stride, size // 2, bias=False, **dd),
    ]


def _stem(width: int, halvings: int, dd: dict) -> nn.Sequential:
    first = width // 2 if halvings > 1 else width
    layers: list[nn.Module] = [
        nn.Conv2d(3, first, 3, 2 if halvings else 1, 1, bias=False, **dd),
    ]
    for i in range(1, halvings):
        last = i == halvings - 1
        layers += _norm_conv(first, width if last else first, 3, 2, dd)
    return nn.Sequential(*layers, _Residual(width, dd))


class _Residual(nn.Module):
    """Pre-activation bottleneck: 1x1 to half the width, 3x3, 1x1 back."""

    def __init__(self, width: int, dd: dict) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            *_norm_conv(width, half, 1, 1, dd),
            *_norm_conv(half, half, 3, 1, dd),
            *_norm_conv(half, width, 1, 1, dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class _Stack(nn.Module):
    """One hourglass, its logits, and what the next one is given."""

    def __init__(self, width: int, num_labels: int, depth: int, last: bool, dd: dict) -> None:
        super().__init__()
        self.skips = nn.ModuleList(_Residual(width, dd) for _ in range(depth))
        self.downs = nn.ModuleList(
            nn.Sequential(*_norm_conv(width, width, 3, 2, dd)) for _ in range(depth)
        )
        self.middle = _Residual(width, dd)
        self.ups = nn.ModuleList(_Residual(width, dd) for _ in range(depth))
        self.norm = nn.Sequential(nn.BatchNorm2d(width, **dd), nn.ReLU())
        self.head = nn.Conv2d(width, num_labels, 1, **dd)
        # After the last stack they would be parameters without a gradient.
        self.remap_features = None if last else nn.Conv2d(width, width, 1, bias=False, **dd)
        self.remap_logits = None if last else nn.Conv2d(num_labels, width, 1, bias=False, **dd)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner, kept = x, []
        for skip, down in zip(self.skips, self.downs, strict=True):
            kept.append(skip(inner))
            inner = down(inner)
        inner = self.middle(inner)
        for up in self.ups:
            side = kept.pop()
            inner = side + _resize(up(inner), side.shape[-2:])
        features = self.norm(inner)
        logits = self.head(features)
        if self.remap_features is not None and self.remap_logits is not None:
            x = x + self.remap_features(features) + self.remap_logits(logits)
        return x, logits
