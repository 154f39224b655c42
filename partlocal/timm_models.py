"""Build, adopt and probe timm models: what a `Backbone` must know before it can tap one."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

# Arguments of timm.create_model that say where weights and their description come from.
SOURCES = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


@dataclass(frozen=True)
class Tap:
    """A place where a feature map can be taken, as one forward pass found it."""

    index: int
    channels: int
    height: int
    width: int


class Probe(NamedTuple):
    """What one forward pass tells: the taps, the global width, whether `norm=True` is taken."""

    taps: tuple[Tap, ...]
    global_dim: int
    norm: bool


def build(
    name: str, size: tuple[int, int], pretrained: bool, args: dict[str, Any]
) -> tuple[nn.Module, Probe, dict[str, Any] | None]:
    """Build a model by name so that it runs on `size`; also return the arguments that rebuild it.

    These name no source of weights; they are None where timm cannot rebuild the model so.

    Raises:
        ValueError: the name is unknown, timm refuses `args`, or the model cannot run on `size`;
            the last names sizes that work.
    """
    import timm  # noqa: PLC0415  (two seconds)

    if "pretrained" in args:
        raise ValueError("args must not hold 'pretrained': pass pretrained=True beside them")

    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(
            name.partition(".")[0], timm.list_models(), n=3, cutoff=0.5
        )
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists them"
        raise ValueError(
            f"model: timm knows no {name!r}: {hint} (a model of your own is known once the file "
            "that registers it is imported)"
        )
    rng = torch.get_rng_state()
    found = _first_that_runs(name, size, args)
    if isinstance(found, Exception):
        works = [s for s in _other_sizes(name, size) if _runs(name, s, args)]
        torch.set_rng_state(rng)
        raise ValueError(_refusal(name, size, found, works)) from found
    model, probed, used = found
    if pretrained:
        # Only now, so that a failed download is never taken for a refused size.
        torch.set_rng_state(rng)
        model = timm.create_model(name, pretrained=True, **used)
    if ":" in name or any(source in args for source in SOURCES):
        return model, probed, instance_args(model, used)
    return model, probed, used


def check_saved(config: Mapping[str, Any]) -> None:
    """Refuse a saved configuration from which timm would read or download anything.

    Raises:
        ValueError: it holds other keys than those written, a name outside timm's registry, or
            an argument that says where weights come from.
    """
    written = {"model", "args", "tap", "image_size", "input"}
    if set(config) != written:
        raise ValueError(
            f"the config of Backbone must hold {', '.join(sorted(written))}; "
            f"got {', '.join(sorted(map(str, config)))}"
        )
    name, args = config["model"], config["args"]
    if not isinstance(name, str) or ":" in name:
        raise ValueError(
            f"the config of Backbone must name a model of timm's registry, whose building reads "
            f"nothing; got {name!r}: pass that to Backbone in code if you trust it"
        )
    if not isinstance(args, Mapping):
        raise ValueError(f"the config of Backbone must hold args by name; got {args!r}")
    if found := [source for source in SOURCES if source in args]:
        raise ValueError(
            "the config of Backbone must not say where weights come from, for they are saved "
            f"beside it; args hold {', '.join(found)}: remove that, or build the backbone in code"
        )


def _first_that_runs(
    name: str, size: tuple[int, int], args: dict[str, Any]
) -> tuple[nn.Module, Probe, dict[str, Any]] | Exception:
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
                    f"timm cannot build {name} with {args}: {first_line(error)}"
                ) from error
            continue
        try:
            return model, probe(model, size), used
        except Exception as error:
            failure = failure or error
    assert failure is not None
    return failure


def _runs(name: str, size: tuple[int, int], args: dict[str, Any]) -> bool:
    return not isinstance(_first_that_runs(name, size, args), Exception)


def _other_sizes(name: str, size: tuple[int, int]) -> list[tuple[int, int]]:
    """List sizes worth trying: the multiples of 32 around the wanted one, and the native one."""
    import timm  # noqa: PLC0415

    cfg = timm.get_pretrained_cfg(name) if ":" not in name else None
    return _candidates(size, cfg.input_size[1:] if cfg else None)


def _candidates(size: tuple[int, int], native: tuple[int, int] | None) -> list[tuple[int, int]]:
    down = (max(32, size[0] // 32 * 32), max(32, size[1] // 32 * 32))
    up = (-(-size[0] // 32) * 32, -(-size[1] // 32) * 32)
    tried = [down, up] + ([native] if native else [])
    return [s for i, s in enumerate(tried) if s != size and s not in tried[:i]]


def adopt(model: nn.Module, size: tuple[int, int]) -> Probe:
    """Check that an instance speaks timm's language, drop its classifier, and probe it.

    Raises:
        TypeError: it is no module, or lacks timm's methods.
        ValueError: it cannot run on `size`.
    """
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
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is not None and getattr(model, "num_classes", 0) != 0:
        reset(0)
    try:
        return probe(model, size)
    except Exception as error:
        works = []
        for other in _candidates(size, _native(model)):
            try:
                probe(model, other)
                works.append(other)
            except Exception:
                continue
        raise ValueError(
            _refusal(model_name(model), size, error, works)
            + ", or pass the model's name, so that timm may build it for this size"
        ) from error


def probe(model: Any, size: tuple[int, int]) -> Probe:
    """Run one black picture through the model: no mode, buffer or random state is changed."""
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
    return Probe(taps, int(vector.shape[1]), norm)


def _refusal(
    name: str, size: tuple[int, int], error: Exception, works: list[tuple[int, int]]
) -> str:
    sizes = " or ".join(as_argument(s) for s in works)
    way_out = f"use image_size={sizes}" if works else "no size tried works"
    return f"{name} cannot run on {by(size)} pictures ({first_line(error)}): {way_out}"


def instance_args(model: nn.Module, used: Mapping[str, Any]) -> dict[str, Any] | None:
    """Find the arguments that rebuild an instance, or None if a rebuilt one would differ.

    Older timm records no arguments, and a user may have changed the model: so build and compare.
    `used` are the arguments that are known.
    """
    name = architecture_name(model)
    if name is None:
        return None
    import timm  # noqa: PLC0415

    recorded: Any = getattr(model, "_model_args", {})
    args = {key: value for key, value in {**recorded, **used}.items() if key not in SOURCES}
    try:
        with torch.device("meta"):  # no memory, no random numbers
            rebuilt = timm.create_model(name, **args)
    except Exception:
        return None
    same = repr(rebuilt) == repr(model) and {
        key: value.shape for key, value in rebuilt.state_dict().items()
    } == {key: value.shape for key, value in model.state_dict().items()}
    return args if same else None


def architecture(model: nn.Module, args: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what a config file stores of a model, or None if it could not be rebuilt."""
    name = architecture_name(model)
    if name is None or args is None:
        return None
    try:
        return {"name": name, "args": json.loads(json.dumps(args))}
    except TypeError:  # a class or a function among the arguments
        return None


def pretrained_cfg(model: nn.Module) -> dict[str, Any]:
    """Return timm's description of a model, empty for other models."""
    cfg: Any = getattr(model, "pretrained_cfg", None)
    return cfg or {}


def architecture_name(model: nn.Module) -> str | None:
    """Return timm's name of a model, with its tag where timm knows that tag."""
    cfg = pretrained_cfg(model)
    name, tag = cfg.get("architecture"), cfg.get("tag")
    if not (name and tag):
        return name
    import timm  # noqa: PLC0415

    try:
        timm.get_pretrained_cfg(f"{name}.{tag}", allow_unregistered=False)
    except RuntimeError:  # the tag of somebody's own weights on the hub
        return name
    return f"{name}.{tag}"


def _native(model: nn.Module) -> tuple[int, int] | None:
    shape = pretrained_cfg(model).get("input_size")
    return (int(shape[1]), int(shape[2])) if shape else None


def model_name(model: nn.Module) -> str:
    """Name a model in an error."""
    return architecture_name(model) or type(model).__name__


def by(size: tuple[int, ...]) -> str:
    """Write a size as `112 x 96`."""
    return f"{size[0]} x {size[1]}"


def as_argument(size: tuple[int, ...]) -> str:
    """Write a size as it may be passed."""
    return str(size[0]) if size[0] == size[1] else str(tuple(size))


def first_line(error: Exception) -> str:
    """Reduce another library's error to one line."""
    return f"{type(error).__name__}: {error}".rstrip(": ").splitlines()[0]
