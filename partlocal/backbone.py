"""Tap any timm model: one forward pass gives the global vector and one feature map."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from partlocal.pixels import Pixels
from partlocal.timm_models import (
    Tap,
    adopt,
    architecture,
    as_argument,
    build,
    by,
    check_saved,
    first_line,
    instance_args,
    model_name,
    pretrained_cfg,
)


class BackboneOutput(NamedTuple):
    """What one forward pass of a `Backbone` gives."""

    global_vector: Float[Tensor, "b d"]
    features: Float[Tensor, "b c h w"]


class Backbone(nn.Module):
    """Run a timm model once and return its global vector and the feature map at one tap.

    The global vector is what the model's own classifier would have received, so it equals
    `forward_head(forward_features(x), pre_logits=True)`. The map is NCHW for every model: those
    that work in NHWC are permuted, and tokens are laid out on their grid without class or
    register tokens and after the model's final norm.

    >>> backbone = Backbone("resnet18", image_size=112, map_size=28)
    >>> output = backbone(torch.zeros(2, 3, 112, 112))
    >>> output.global_vector.shape, output.features.shape
    (torch.Size([2, 512]), torch.Size([2, 64, 28, 28]))
    >>> backbone.tap, backbone.map_size, backbone.feature_channels, backbone.global_dim
    (1, (28, 28), 64, 512)

    A model whose architecture depends on the picture's size is built with `img_size=image_size`
    where it allows that. Building runs one picture through the model (in eval mode, without
    touching its weights, buffers, modes or the random state), so the sizes below are measured.

    Args:
        model: a name for `timm.create_model`, or a model that timm built, whose classifier is
            removed in place. Another library's model works when it follows timm's interface:
            `forward_intermediates`, `forward_head` and `pretrained_cfg`.
        tap: index into the model's taps, negative ones counted from the end; see `taps`.
        map_size: wanted side of the map in cells, or `(h, w)`. Picks the last tap of that size,
            else the nearest in ratio (the finer of two equally near); `map_size` then reports
            what was obtained. With neither `tap` nor `map_size` a quarter of the picture's side
            is wanted, FSENet's 28 at 112.
        image_size: side of the pictures in pixels, or `(h, w)`.
        pretrained: load timm's weights; only for a name.
        args: further arguments for `timm.create_model`; only for a name. Those that say where
            weights come from (`checkpoint_path`, ...) are not saved.
        input: `"pixels"` (RGB in [0, 1] or uint8, standardised here with the constants of the
            model's `pretrained_cfg`), or `"normalized"`.

    Attributes:
        taps: every `Tap` of the model at `image_size`, in the order of the network.
        tap: the index in use.
        map_size: `(h, w)` of the feature map at `image_size`.
        feature_channels: channels of the feature map.
        global_dim: width of the global vector.
        reduction: pixels a cell, by height, measured at `image_size`.

    Raises:
        TypeError: `model` is neither a name nor a module with timm's methods.
        ValueError: the name is unknown, the model cannot run at `image_size` (the error names
            sizes that work), the tap does not exist, or arguments contradict each other.
    """

    def __init__(
        self,
        model: str | nn.Module,
        tap: int | None = None,
        map_size: int | tuple[int, int] | None = None,
        image_size: int | tuple[int, int] = 112,
        pretrained: bool = False,
        args: Mapping[str, Any] | None = None,
        input: str = "pixels",
    ) -> None:
        super().__init__()
        if tap is not None and map_size is not None:
            raise ValueError(f"pass tap or map_size, not both; got tap={tap}, map_size={map_size}")
        self.image_size = _pair("image_size", image_size)
        wanted = (self.image_size[0] / 4, self.image_size[1] / 4)
        if map_size is not None:
            height, width = _pair("map_size", map_size)
            wanted = (float(height), float(width))
        if isinstance(model, str):
            model, probed, used = build(model, self.image_size, pretrained, dict(args or {}))
            self._args = used
        else:
            if pretrained or args:
                raise ValueError(
                    "pretrained and args build a model from its name; this one is built already: "
                    "pass them to timm.create_model"
                )
            probed = adopt(model, self.image_size)
            self._args = instance_args(model, {"num_classes": 0})
        self.model = model
        self.pixels = _pixels(model, input)
        self.taps = probed.taps
        self.global_dim = probed.global_dim
        self._norm = probed.norm
        self.tap = self._choose(tap, wanted)
        chosen = self.taps[self.tap]
        self.map_size = (chosen.height, chosen.width)
        self.feature_channels = chosen.channels
        self.reduction = self.image_size[0] / chosen.height

    @property
    def architecture(self) -> dict[str, Any] | None:
        """Timm's name and arguments of the model, None for one that timm could not rebuild."""
        return architecture(self.model, self._args)

    def config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this backbone, as JSON holds them.

        Raises:
            ValueError: the model is an instance that timm could not rebuild from a name.
        """
        built = self.architecture
        if built is None:
            raise ValueError(
                f"the backbone is a {type(self.model).__name__} that timm cannot rebuild from a "
                "name and plain arguments: register it with timm.models.register_model and pass "
                "its name (and args) to Backbone, or save backbone.state_dict() yourself"
            )
        return {
            "model": built["name"],
            "args": built["args"],
            "tap": self.tap,
            "image_size": list(self.image_size),
            "input": self.pixels.input,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Backbone":
        """Build a backbone with fresh weights from what `config()` returned.

        Raises:
            ValueError: it is something else; in particular nothing is read or downloaded from
                where a configuration of unknown origin says.
        """
        check_saved(config)
        return cls(**{**config, "image_size": tuple(config["image_size"])})

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> BackboneOutput:
        """Return the global vector and the feature map of each picture.

        Raises:
            TypeError: the pictures are neither uint8 nor floating point.
            ValueError: the pictures have another size than `image_size` and the model is bound
                to that one, they are no valid pixels, or in training there is but one and the
                model standardises single numbers over the batch.
        """
        pixels = self.pixels(images)
        if torch.compiler.is_compiling():
            return self._run(pixels)
        try:
            return self._run(pixels)
        except torch.cuda.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            if len(images) == 1 and "more than 1 value per channel" in str(error):
                raise ValueError(
                    "images must hold at least two pictures in training, over which a BatchNorm "
                    f"of {model_name(self.model)} standardises; got a batch of 1: call .eval(), "
                    "or leave out an incomplete last batch (drop_last=True)"
                ) from error
            size = tuple(images.shape[-2:])
            if size == self.image_size:
                raise
            raise ValueError(
                f"images are {by(size)}, but {model_name(self.model)} was built for "
                f"{by(self.image_size)} and cannot take them ({first_line(error)}): resize "
                f"them, or build the backbone with image_size={as_argument(size)}"
            ) from error

    def _run(self, pixels: Tensor) -> BackboneOutput:
        model: Any = self.model
        final, maps = model.forward_intermediates(
            pixels, indices=[self.tap], norm=self._norm, output_fmt="NCHW"
        )
        return BackboneOutput(model.forward_head(final, pre_logits=True), maps[0])

    def _choose(self, tap: int | None, wanted: tuple[float, float]) -> int:
        if tap is not None:
            if not -len(self.taps) <= tap < len(self.taps):
                listed = ", ".join(
                    f"{t.index}: {t.channels} channels at {by((t.height, t.width))}"
                    for t in self.taps
                )
                raise ValueError(
                    f"tap {tap} is out of range: {model_name(self.model)} has "
                    f"{len(self.taps)} taps ({listed})"
                )
            return tap % len(self.taps)

        def distance(t: Tap) -> tuple[float, int, int]:
            ratio = abs(math.log(t.height / wanted[0])) + abs(math.log(t.width / wanted[1]))
            return (round(ratio, 6), -t.height * t.width, -t.index)

        return min(self.taps, key=distance).index

    def extra_repr(self) -> str:
        """Show what was chosen."""
        return f"tap={self.tap}, map_size={self.map_size}, image_size={self.image_size}"


def _pixels(model: nn.Module, input: str) -> Pixels:
    cfg = pretrained_cfg(model)
    if "mean" not in cfg or "std" not in cfg:
        if input != "normalized":
            raise ValueError(
                f"model: {type(model).__name__} has no pretrained_cfg with mean and std: set "
                "model.pretrained_cfg = {'mean': ..., 'std': ...}, or pass input='normalized'"
            )
        return Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), input)
    return Pixels(cfg["mean"], cfg["std"], input)


def _pair(argument: str, size: int | tuple[int, int]) -> tuple[int, int]:
    pair = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{argument} must be a positive int or two of them (h, w); got {size!r}")
    return pair[0], pair[1]
