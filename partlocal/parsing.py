"""ParsingNet, a stacked hourglass of residual bottlenecks: pictures in, part logits out.

Newell, Yang, Deng, "Stacked Hourglass Networks for Human Pose Estimation", ECCV 2016; the same
network predicts parts (one map a label) and landmarks (one heat map a point).
"""

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from partlocal.hourglass import Hourglass, Stem, resize_bilinear
from partlocal.hub import HubModule, check_keys, load_weights, save_tensors, scratch_folder
from partlocal.labels import HELEN, LabelSet
from partlocal.pixels import Pixels
from partlocal.resize import check_size
from partlocal.segmenters import Freezable

PRETRAINED = Path(__file__).parent / "weights" / "parsing_net.safetensors"


class ParsingNet(Freezable, HubModule):
    """Predict logits for every part at every pixel.

    >>> parser = ParsingNet(HELEN, width=16)
    >>> parser(torch.rand(2, 3, 112, 112)).shape
    torch.Size([2, 11, 128, 128])
    >>> from partlocal.landmarks import soft_argmax
    >>> landmarks = ParsingNet(5, width=16, grid=32)  # five heat maps
    >>> soft_argmax(landmarks(torch.rand(2, 3, 112, 112)), size=(112, 112)).shape
    torch.Size([2, 5, 2])

    Args:
        labels: the label set of the maps, or just their number, which names them `map_0`, ...
        width: channels at every level; even.
        num_stacks: how many hourglasses follow one another, each correcting the one before it.
        bottleneck_size: rows and columns at the narrowest level, reached from `grid` by halving.
        input_size: rows and columns to which pictures of any size are resized, and of the logits.
        grid: rows and columns at which the stacks work, reached from `input_size` by halving;
            128 is the paper's, 64 and 32 cost about a quarter and a sixteenth of it.
        input: `"pixels"` for RGB in [0, 1] or uint8, `"normalized"` for (x - 127.5) / 128.

    Raises:
        ValueError: a size cannot be reached by halving, or a count is too small.
        TypeError: `labels` is neither a label set nor a number.

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
        if isinstance(labels, int):
            names = tuple(f"map_{i}" for i in range(labels))
            if not names:
                raise ValueError(f"labels must be a LabelSet or a number >= 1; got {labels}")
            labels = LabelSet(f"{labels} maps", names)
        if not isinstance(labels, LabelSet):
            raise TypeError(
                f"labels must be a LabelSet or a number >= 1; got {labels!r}: pass the set itself, "
                "such as partlocal.HELEN"
            )
        self.labels = labels
        self.width = width
        self.num_stacks = num_stacks
        self.bottleneck_size = bottleneck_size
        self.input_size = input_size
        self.grid = grid
        self._warned = False
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
        self.stem = Stem(width, halvings, **dd)
        self.stacks = nn.ModuleList(
            Hourglass(width, len(labels), depth, last=i == num_stacks - 1, **dd)
            for i in range(num_stacks)
        )

    def reset_parameters(self) -> None:
        """Draw fresh weights, such that features keep their scale and logits start small."""
        for module in self.modules():
            if isinstance(module, Stem | Hourglass):
                module.reset_parameters()

    @property
    def trained(self) -> bool:
        """Whether the network ever saw a batch in training mode, here or before it was saved."""
        return any(bool(b) for name, b in self.named_buffers() if name.endswith("_tracked"))

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> Float[Tensor, "b n s s"]:
        """Return the logits of the last stack."""
        return resize_bilinear(self._grid_logits(images)[-1], (self.input_size, self.input_size))

    def forward_stacks(
        self, images: Num[Tensor, "b 3 h w"], size: int | None = None
    ) -> list[Float[Tensor, "b n s s"]]:
        """Return the logits of every stack, for a loss on each.

        Args:
            images: pictures of any size.
            size: rows and columns of the logits, by default `input_size`. Where the stacks work
                on a small grid, a loss at full size costs as much as the stacks.

        Raises:
            ValueError: `size` is no positive whole number.
        """
        size = self.input_size if size is None else size
        grid = check_size((size, size))
        return [resize_bilinear(logits, grid) for logits in self._grid_logits(images)]

    def _grid_logits(self, images: Tensor) -> list[Tensor]:
        if self.frozen and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            if not self.trained:
                warnings.warn(
                    "this ParsingNet is frozen but was never trained: its parts are noise; load "
                    "one with ParsingNet.pretrained() or ParsingNet.from_pretrained(folder)",
                    stacklevel=3,
                )
        x = resize_bilinear(self.pixels(images), (self.input_size, self.input_size), antialias=True)
        if x.device.type == "cpu":  # 1.5 times faster there, and only the input need be converted
            x = x.contiguous(memory_format=torch.channels_last)
        x = self.stem(x)
        outputs = []
        for stack in self.stacks:
            x, logits = stack(x)
            outputs.append(logits)
        return outputs

    def config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this network, as JSON holds them."""
        return {
            "labels": self.labels.to_dict(),
            "width": self.width,
            "num_stacks": self.num_stacks,
            "bottleneck_size": self.bottleneck_size,
            "input_size": self.input_size,
            "grid": self.grid,
            "input": self.pixels.input,
            "frozen": self.frozen,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ParsingNet":
        """Build a network with fresh weights from what `config()` returned, frozen if it was.

        A configuration without `frozen`, as the first versions wrote it, gives a network that is
        free to learn, as it always did: call `freeze()` where that was meant.

        Raises:
            ValueError: a key is missing or unknown, or a value is refused.
        """
        names = ["labels", "width", "num_stacks", "bottleneck_size", "input_size", "grid", "input"]
        check_keys("ParsingNet", config, names, ["frozen"])
        arguments = {name: config[name] for name in names}
        parser = cls(**{**arguments, "labels": LabelSet.from_dict(arguments["labels"])})
        return parser.freeze() if config.get("frozen", False) else parser

    def save_compact(self, path: str | Path, about: Mapping[str, Any] | None = None) -> None:
        """Write the convolutions in half precision, and the configuration as JSON beside them.

        Args:
            path: where the `.safetensors` goes, for `load_compact`.
            about: what a reader should know of these weights (recipe, seed, scores).

        Raises:
            ValueError: the path ends otherwise, or a weight is beyond half precision's range.
            OSError: its folder cannot be made or written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"path must end in .safetensors, beside which a .json goes; got {path}"
            )
        tensors = {
            # Statistics and offsets stay as they are: they are few and may exceed half's range.
            name: (t.half() if t.ndim == 4 and "pixels" not in name else t).contiguous().cpu()
            for name, t in ((name, t.detach()) for name, t in self.state_dict().items())
        }
        if bad := [name for name, t in tensors.items() if not t.isfinite().all()]:
            raise ValueError(f"weights are not finite in half precision: {', '.join(bad)}")
        text = json.dumps({"arguments": self.config(), "about": dict(about or {})}, indent=2)
        with scratch_folder(path.parent, "path") as scratch:
            save_tensors(tensors, Path(scratch) / path.name)
            (Path(scratch) / "config.json").write_text(text + "\n", encoding="utf-8")
            os.replace(Path(scratch) / path.name, path)
            os.replace(Path(scratch) / "config.json", path.with_suffix(".json"))

    @classmethod
    def load_compact(cls, path: str | Path) -> "ParsingNet":
        """Load what `save_compact` wrote, in eval mode, frozen if it was.

        Raises:
            FileNotFoundError: the weights or the JSON beside them are missing.
            ValueError: a file is damaged, or they do not belong together.
        """
        path = Path(path)
        for file in (path, path.with_suffix(".json")):
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file} is missing: ParsingNet.save_compact writes a .safetensors and a .json"
                )
        config = path.with_suffix(".json")
        try:
            arguments = dict(json.loads(config.read_text(encoding="utf-8"))["arguments"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{config} is damaged ({error!r}): load what save_compact wrote"
            ) from None
        parser = cls._build(config, arguments)
        load_weights(parser, path)
        return parser.eval()

    @classmethod
    def pretrained(cls) -> "ParsingNet":
        """Load the parser that ships with the package, trained on procedural faces alone.

        It is in eval mode and not frozen, whatever it was when it was written: `freeze()` keeps
        it fixed while its owner trains.

        Raises:
            FileNotFoundError: this copy of the package holds no weights.
        """
        if not PRETRAINED.is_file():
            raise FileNotFoundError(
                f"this copy of partlocal holds no weights/{PRETRAINED.name}: install a release, "
                "or train a parser and pass its folder to ParsingNet.from_pretrained"
            )
        return cls.load_compact(PRETRAINED).freeze(False).eval()

    def extra_repr(self) -> str:
        """Show the arguments."""
        return (
            f"labels={self.labels.name}, width={self.width}, num_stacks={self.num_stacks}, "
            f"bottleneck_size={self.bottleneck_size}, input_size={self.input_size}, "
            f"grid={self.grid}"
        )


def _halvings(name: str, size: int, start_name: str, start: int) -> int:
    sizes = [start]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)  # what a 3x3 convolution of stride 2 leaves
    if size not in sizes:
        raise ValueError(
            f"{name} must be {start_name} = {start} halved some times, one of {sizes}; got {size}"
        )
    return sizes.index(size)
