"""Tap any timm model: one forward pass gives the global vector and one feature map."""

import difflib
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from partlocal.pixels import Pixels


class BackboneOutput(NamedTuple):
    """What one forward pass of a `Backbone` gives."""

    global_vector: Float[Tensor, "b d"]
    features: Float[Tensor, "b c h w"]


class Tap(NamedTuple):
    """A place where a feature map can be taken, as one forward pass found it."""

    index: int
    channels: int
    height: int
    width: int


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
        args: further arguments for `timm.create_model`; only for a name.
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
        wanted = None if map_size is None else _pair("map_size", map_size)
        if isinstance(model, str):
            model, probe, used = _build(model, self.image_size, pretrained, dict(args or {}))
            self._args: dict[str, Any] | None = used
        else:
            if pretrained or args:
                raise ValueError(
                    "pretrained and args build a model from its name; this one is built already: "
                    "pass them to timm.create_model"
                )
            probe = _adopt(model, self.image_size)
            self._args = _instance_args(model)
        self.model = model
        self.pixels = _pixels(model, input)
        self.taps = probe.taps
        self.global_dim = probe.global_dim
        self._norm = probe.norm
        self.tap = self._choose(tap, wanted)
        chosen = self.taps[self.tap]
        self.map_size = (chosen.height, chosen.width)
        self.feature_channels = chosen.channels
        self.reduction = self.image_size[0] / chosen.height

    @property
    def architecture(self) -> dict[str, Any] | None:
        """Name and arguments that rebuild the model: `Backbone(name, args=args, ...)`.

        None for a model that timm cannot rebuild from a name.
        """
        name = _architecture_name(self.model)
        if name is None or self._args is None:
            return None
        return {"name": name, "args": dict(self._args)}

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> BackboneOutput:
        """Return the global vector and the feature map of each picture.

        Raises:
            ValueError: the pictures have another size than `image_size` and the model is bound
                to that one, or they are no valid pixels.
        """
        pixels = self.pixels(images)
        if torch.compiler.is_compiling() or tuple(images.shape[-2:]) == self.image_size:
            return self._run(pixels)
        try:
            return self._run(pixels)
        except torch.OutOfMemoryError:
            raise
        except (AssertionError, RuntimeError, ValueError) as error:
            size = tuple(images.shape[-2:])
            raise ValueError(
                f"images are {_by(size)}, but {_name(self.model)} was built for "
                f"{_by(self.image_size)} and cannot take them ({_first_line(error)}): resize "
                f"them, or build the backbone with image_size={_say(size)}"
            ) from error

    def _run(self, pixels: Tensor) -> BackboneOutput:
        final, maps = self.model.forward_intermediates(
            pixels, indices=[self.tap], norm=self._norm, output_fmt="NCHW"
        )
        return BackboneOutput(self.model.forward_head(final, pre_logits=True), maps[0])

    def _choose(self, tap: int | None, wanted: tuple[int, int] | None) -> int:
        if tap is not None:
            if not -len(self.taps) <= tap < len(self.taps):
                listed = ", ".join(
                    f"{t.index}: {t.channels} channels at {_by((t.height, t.width))}"
                    for t in self.taps
                )
                raise ValueError(
                    f"tap {tap} is out of range: {_name(self.model)} has {len(self.taps)} taps "
                    f"({listed})"
                )
            return tap % len(self.taps)
        height, width = wanted or (self.image_size[0] / 4, self.image_size[1] / 4)

        def distance(t: Tap) -> tuple[float, int, int]:
            ratio = abs(math.log(t.height / height)) + abs(math.log(t.width / width))
            return (round(ratio, 6), -t.height * t.width, -t.index)

        return min(self.taps, key=distance).index

    def extra_repr(self) -> str:
        """Show what was chosen."""
        return f"tap={self.tap}, map_size={self.map_size}, image_size={self.image_size}"


class _Probe(NamedTuple):
    taps: tuple[Tap, ...]
    global_dim: int
    norm: bool


def _build(
    name: str, size: tuple[int, int], pretrained: bool, args: dict[str, Any]
) -> tuple[nn.Module, _Probe, dict[str, Any]]:
    """Build a model by name so that it runs at `size`; say which arguments that took."""
    import timm  # noqa: PLC0415  (two seconds)

    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise ValueError(f"model: timm knows no {name!r}: {hint}")
    rng = torch.get_rng_state()
    found = _first_that_runs(name, size, args)
    if isinstance(found, Exception):
        works = [s for s in _other_sizes(name, size, args) if _runs(name, s, args)]
        torch.set_rng_state(rng)
        raise ValueError(_refusal(name, size, found, works)) from found
    model, probe, used = found
    if pretrained:
        # Only now, so that a failed download is never taken for a refused size.
        torch.set_rng_state(rng)
        model = timm.create_model(name, pretrained=True, **used)
    return model, probe, used


def _first_that_runs(
    name: str, size: tuple[int, int], args: dict[str, Any]
) -> tuple[nn.Module, _Probe, dict[str, Any]] | Exception:
    """Try with img_size, then without: some models need it, some build with it and then fail."""
    import timm  # noqa: PLC0415

    rng = torch.get_rng_state()
    square = size[0] if size[0] == size[1] else size
    attempts = [{"num_classes": 0, **args}]
    if "img_size" not in args:
        attempts.insert(0, {"num_classes": 0, "img_size": square, **args})
    failure: Exception | None = None
    for used in attempts:
        torch.set_rng_state(rng)  # a failed attempt leaves no trace in the weights
        try:
            model = timm.create_model(name, **used)
        except Exception as error:
            if used is attempts[-1]:
                raise ValueError(
                    f"timm cannot build {name} with {args}: {_first_line(error)}"
                ) from error
            continue
        try:
            return model, _probe(model, size), used
        except Exception as error:
            failure = failure or error
    assert failure is not None
    return failure


def _runs(name: str, size: tuple[int, int], args: dict[str, Any]) -> bool:
    return not isinstance(_first_that_runs(name, size, args), Exception)


def _other_sizes(name: str, size: tuple[int, int], args: dict[str, Any]) -> list[tuple[int, int]]:
    """List sizes worth trying: the multiples of 32 around the wanted one, and the native one."""
    import timm  # noqa: PLC0415

    with torch.device("meta"):
        native = _native(timm.create_model(name, **{"num_classes": 0, **args}))
    return _candidates(size, native)


def _candidates(size: tuple[int, int], native: tuple[int, int] | None) -> list[tuple[int, int]]:
    down = (max(32, size[0] // 32 * 32), max(32, size[1] // 32 * 32))
    up = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    tried = [down, up] + ([native] if native else [])
    return [s for i, s in enumerate(tried) if s != size and s not in tried[:i]]


def _adopt(model: nn.Module, size: tuple[int, int]) -> _Probe:
    """Check that an instance speaks timm's language, drop its classifier, and probe it."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a timm model's name or an nn.Module; got {type(model).__name__}"
        )
    missing = [m for m in ("forward_intermediates", "forward_head") if not hasattr(model, m)]
    if missing:
        raise TypeError(
            f"model: {type(model).__name__} has no {' and no '.join(missing)}: pass a model of "
            "timm.create_model (without features_only), or give yours these methods"
        )
    if hasattr(model, "reset_classifier") and getattr(model, "num_classes", 0) != 0:
        model.reset_classifier(0)
    try:
        return _probe(model, size)
    except Exception as error:
        works = []
        for other in _candidates(size, _native(model)):
            try:
                _probe(model, other)
                works.append(other)
            except Exception:  # noqa: S112
                continue
        raise ValueError(_refusal(_name(model), size, error, works)) from error


def _probe(model: nn.Module, size: tuple[int, int]) -> _Probe:
    """Run one picture through the model and leave no trace."""
    modes = [(module, module.training) for module in model.modules()]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    picture = like.new_zeros((1, 3, *size))
    devices = [like.device] if like.device.type == "cuda" else []
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            try:
                norm = True
                final, maps = model.forward_intermediates(picture, norm=True, output_fmt="NCHW")
            except AssertionError:
                norm = False
                final, maps = model.forward_intermediates(picture, norm=False, output_fmt="NCHW")
            vector = model.forward_head(final, pre_logits=True)
    finally:
        for module, training in modes:
            module.training = training
    if vector.ndim != 2 or any(m.ndim != 4 for m in maps):
        raise ValueError(
            f"its vector is {list(vector.shape)} and its maps are "
            f"{[list(m.shape) for m in maps]}, not [b, d] and [b, c, h, w]"
        )
    taps = tuple(Tap(i, *(int(n) for n in m.shape[1:])) for i, m in enumerate(maps))
    return _Probe(taps, int(vector.shape[1]), norm)


def _refusal(
    name: str, size: tuple[int, int], error: Exception, works: list[tuple[int, int]]
) -> str:
    way_out = " or ".join(f"image_size={_say(s)}" for s in works)
    return f"{name} cannot run on {_by(size)} pictures ({_first_line(error)}): " + (
        f"use {way_out}" if way_out else "no size tried works"
    )


def _pixels(model: nn.Module, input: str) -> Pixels:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    if "mean" not in cfg or "std" not in cfg:
        if input != "normalized":
            raise ValueError(
                f"model: {type(model).__name__} has no pretrained_cfg with mean and std: set "
                "model.pretrained_cfg = {'mean': ..., 'std': ...}, or pass input='normalized'"
            )
        return Pixels((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), input)
    return Pixels(cfg["mean"], cfg["std"], input)


def _instance_args(model: nn.Module) -> dict[str, Any] | None:
    """Find the arguments that rebuild an instance, or None if a rebuilt one would differ."""
    import timm  # noqa: PLC0415

    name = _architecture_name(model)
    args = {**getattr(model, "_model_args", {}), "num_classes": 0}
    try:
        json.dumps(args)
        with torch.device("meta"):
            rebuilt = timm.create_model(name, **args)
    except Exception:
        return None
    same = repr(rebuilt) == repr(model) and {
        key: value.shape for key, value in rebuilt.state_dict().items()
    } == {key: value.shape for key, value in model.state_dict().items()}
    return args if same else None


def _architecture_name(model: nn.Module) -> str | None:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    name, tag = cfg.get("architecture"), cfg.get("tag")
    return f"{name}.{tag}" if name and tag else name


def _native(model: nn.Module) -> tuple[int, int] | None:
    shape = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
    return (int(shape[1]), int(shape[2])) if shape else None


def _name(model: nn.Module) -> str:
    return _architecture_name(model) or type(model).__name__


def _pair(argument: str, size: int | tuple[int, int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"{argument} must be a positive int or two of them (h, w); got {size!r}")
    return pair[0], pair[1]


def _by(size: tuple[int, ...]) -> str:
    return f"{size[0]} x {size[1]}"


def _say(size: tuple[int, ...]) -> str:
    return str(size[0]) if size[0] == size[1] else str(tuple(size))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
