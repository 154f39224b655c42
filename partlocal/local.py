"""PartLocalNet: the four layers assembled over any timm backbone (FSENet, 3.2)."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn import functional as F

from partlocal.backbone import Backbone
from partlocal.branch import BranchNorm, LocalBranch
from partlocal.correlation import StructureCorrelation
from partlocal.hub import HubModule, check_keys
from partlocal.kernels import Implementation
from partlocal.numerics import accumulation_dtype, check_tensor
from partlocal.parsing import ParsingNet
from partlocal.part_maps import Activation, Norm, NormOver, PartMaps
from partlocal.pooling import Mode, PartMaskPool
from partlocal.resize import Downsample
from partlocal.segmenters import LogitsAdapter


class PartDescriptor(NamedTuple):
    """Everything between a picture and its descriptor, for training, pictures, explanations."""

    maps: Float[Tensor, "b k h w"]
    mass: Float[Tensor, "b k"]
    visibility: Float[Tensor, "b k"]
    parts: Float[Tensor, "b k c"]
    local_vector: Float[Tensor, "b l"]
    global_vector: Float[Tensor, "b g"]
    norm: Float[Tensor, " b"]
    descriptor: Float[Tensor, "b d"]


_CHOICES: dict[str, tuple[str | None, ...]] = {
    "activation": (*get_args(Activation), None),
    "map_norm": (*get_args(Norm), None),
    "norm_over": get_args(NormOver),
    "downsample": get_args(Downsample),
    "pool": get_args(Mode),
    "branch_norm": (*get_args(BranchNorm), None),
}


@dataclass(frozen=True)
class LocalOptions:
    """How maps are made and parts are pooled; the defaults are FSENet's.

    Args:
        activation: of the parsing logits, as in `part_maps`.
        map_norm: over the labels at each pixel, as in `part_maps`.
        norm_over: `"labels"` or `"parts"`, as in `part_maps`.
        downsample: from the parser's grid to the features', as in `part_maps`.
        pool: `"sum"`, `"mean"` or `"max"`, as in `part_mask_pool`.
        normalize: divide the pooled features by the part's mass.
        min_visibility: a part whose peak probability is lower counts as absent.
        correlation: add the distances and cosines between parts (FSENet, table 13).
        branch_norm: `"batch"`, or None for the paper to the letter, as in `LocalBranch`.

    Raises:
        ValueError: an option is unknown.
    """

    activation: Activation | None = "softmax"
    map_norm: Norm | None = "l2"
    norm_over: NormOver = "labels"
    downsample: Downsample = "max"
    pool: Mode = "sum"
    normalize: bool = True
    min_visibility: float = 0.0
    correlation: bool = True
    branch_norm: BranchNorm | None = "batch"

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(repr, known))}; "
                    f"got {getattr(self, name)!r}"
                )


class PartLocalNet(HubModule):
    """A backbone with a parser beside it: pictures in, global and local descriptor out.

    >>> from partlocal import HELEN, ParsingNet
    >>> from partlocal.labels import FSENET_PARTS
    >>> parser = ParsingNet(HELEN, width=16, num_stacks=1, grid=32)
    >>> net = PartLocalNet("resnet10t", parser, FSENET_PARTS, map_size=28).eval()
    >>> with torch.no_grad():
    ...     net(torch.rand(2, 3, 112, 112)).shape  # 512 + 6 x (64 + 10)
    torch.Size([2, 956])

    The parser sees the same pictures, each network with its own pixel constants. With `maps` the
    caller brings the parts (ground truth, SAM, CLIP, ...) and no parser is needed or run.

    Args:
        backbone: a timm model, its name, or a `Backbone` (for its further arguments, such as
            `pretrained=True`).
        parser: `ParsingNet`, `LogitsAdapter`, or None when every call brings maps.
        parts: names of the parser's labels or groups, in the order of the descriptor.
        tap: index of the backbone's feature map, or None to choose by `map_size`.
        map_size: the feature map nearest to this many cells a side; None: a quarter of the
            picture's side, FSENet's 28 at 112.
        image_size: side of the pictures in pixels, or `(h, w)`.
        global_dim: width of the global vector; None keeps the backbone's own.
        part_dim: width of a part's vector; None keeps the feature map's own.
        local_weight: of the unit local vector beside the unit global one (FSENet, table 8).
        options: how maps are made and pooled.
        implementation: of every layer, as in their functions.

    Source: FSENet, 3.2 to 3.7; docs/paper.md says how each sentence is read.
    """

    def __init__(  # noqa: PLR0913
        self,
        backbone: str | nn.Module | Backbone,
        parser: ParsingNet | LogitsAdapter | None,
        parts: Sequence[str],
        *,
        tap: int | None = None,
        map_size: int | tuple[int, int] | None = None,
        image_size: int | tuple[int, int] = 112,
        global_dim: int | None = None,
        part_dim: int | None = None,
        local_weight: float = 0.6,
        options: LocalOptions | None = None,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        options = LocalOptions() if options is None else options
        if isinstance(backbone, Backbone):
            if tap is not None or map_size is not None:
                raise ValueError("backbone is a Backbone: pass tap and map_size to it instead")
            self.backbone = backbone
        else:
            self.backbone = Backbone(backbone, tap=tap, map_size=map_size, image_size=image_size)
        if parser is not None and not isinstance(parser, ParsingNet | LogitsAdapter):
            raise TypeError(
                f"parser must be a ParsingNet, a LogitsAdapter or None; got a "
                f"{type(parser).__name__}: wrap it, LogitsAdapter(module, labels, mean, std, size)"
            )
        if not isinstance(options, LocalOptions):
            raise TypeError(
                f"options must be LocalOptions; got a {type(options).__name__}: pass "
                "LocalOptions(pool='max'), for instance"
            )
        if isinstance(parts, str):
            raise ValueError(f"parts must be a list of names; got {parts!r}: pass [{parts!r}]")
        if not parts or len(set(parts)) < len(parts):
            raise ValueError(f"parts must be different names, at least one; got {parts!r}")
        for name, width in (("global_dim", global_dim), ("part_dim", part_dim)):
            if width is not None and width < 1:
                raise ValueError(f"{name} must be at least 1, or None; got {width}")
        if not math.isfinite(local_weight):
            raise ValueError(f"local_weight must be a finite number; got {local_weight}")
        self.parser = parser
        selected = None if parser is None else parser.labels.select(*parts)
        self.parts = tuple(parts) if selected is None else selected.names
        self.local_weight = local_weight
        self.options = options
        self.implementation = implementation
        self.part_maps = None
        if selected is not None:
            self.part_maps = PartMaps(
                selected,
                self.backbone.map_size,
                activation=options.activation,
                norm=options.map_norm,
                norm_over=options.norm_over,
                downsample=options.downsample,
                implementation=implementation,
            )
        self.branch = LocalBranch(
            self.backbone.feature_channels,
            len(self.parts),
            part_dim=part_dim,
            norm=options.branch_norm,
            pool=PartMaskPool(
                options.pool,
                normalize=options.normalize,
                min_visibility=options.min_visibility,
                implementation=implementation,
            ),
            correlation=options.correlation and StructureCorrelation(implementation),
        )
        self.global_projection: nn.Module = nn.Identity()
        if global_dim is not None:
            self.global_projection = nn.Linear(self.backbone.global_dim, global_dim, bias=False)
        self.global_dim = self.backbone.global_dim if global_dim is None else global_dim
        self.local_dim = self.branch.out_features

    def forward(
        self,
        images: Num[Tensor, "b 3 h w"],
        maps: Float[Tensor, "b k hm wm"] | None = None,
        visibility: Float[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b d"]:
        """Return `[global, local_weight * local]`, each half L2-normalised.

        Args: those of `forward_parts`.
        """
        return self.forward_parts(images, maps, visibility).descriptor

    def forward_parts(
        self,
        images: Num[Tensor, "b 3 h w"],
        maps: Float[Tensor, "b k hm wm"] | None = None,
        visibility: Float[Tensor, "b k"] | None = None,
    ) -> PartDescriptor:
        """Return the descriptor with everything that it was made of.

        Args:
            images: pictures.
            maps: ready maps of the parts; None has the parser make them.
            visibility: of the parts in ready maps, for instance what `parse` returned with them;
                None takes the peak of each map.

        Raises:
            ValueError: neither a parser nor maps, maps of another batch or number of parts, or a
                visibility without maps.
        """
        if maps is None:
            if visibility is not None:
                raise ValueError("visibility is that of ready maps: pass maps=[b, k, h, w] with it")
            maps, visibility = self.parse(images)
        else:
            self._check_maps(images, maps)
        tapped = self.backbone(images)
        local = self.branch(tapped.features, maps, visibility)
        raw = self.global_projection(tapped.global_vector)
        raw = raw.to(accumulation_dtype(raw.dtype))
        norm = raw.norm(dim=1)
        unit = F.normalize(raw, dim=1)
        descriptor = torch.cat([unit, self.local_weight * local.vector], dim=1)
        return PartDescriptor(
            maps, local.mass, local.visibility, local.parts, local.vector, unit, norm, descriptor
        )

    def parse(
        self, images: Num[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b k hm wm"], Float[Tensor, "b k"]]:
        """Return the part maps of `images` on the feature grid, and each part's visibility."""
        if self.parser is None or self.part_maps is None:
            raise ValueError(
                "this PartLocalNet has no parser: call it with maps=[b, k, h, w], or build it "
                "with parser=ParsingNet.pretrained()"
            )
        result = self.part_maps(self.parser(images))
        return result.maps, result.visibility

    def _check_maps(self, images: Tensor, maps: Tensor) -> None:
        check_tensor("images", images)
        check_tensor("maps", maps)
        expected = [images.shape[0], len(self.parts)]
        if maps.ndim != 4 or list(maps.shape[:2]) != expected:
            raise ValueError(
                f"maps must be [b, k, h, w] with b = {expected[0]} (as images) and "
                f"k = {expected[1]} (parts {', '.join(self.parts)}); got {list(maps.shape)}"
            )

    def config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this network, as JSON holds them."""
        if self.parser is not None and not isinstance(self.parser, ParsingNet):
            raise ValueError(
                f"the parser is a {type(self.parser).__name__} around a module of another "
                "library, which a loader could not rebuild: save the network with parser=None "
                "and bring maps, or save net.state_dict() yourself"
            )
        projected = isinstance(self.global_projection, nn.Linear)
        return {
            "backbone": self.backbone.config(),
            "parser": None if self.parser is None else self.parser.config(),
            "parts": list(self.parts),
            "global_dim": self.global_dim if projected else None,
            "part_dim": self.branch.part_dim,
            "local_weight": self.local_weight,
            "options": asdict(self.options),
            "implementation": self.implementation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PartLocalNet":
        """Build the network with fresh weights from what `config()` returned.

        The parser is frozen if it was, see `ParsingNet.from_config`. An option that is missing
        did not exist when the network was saved and takes its default.

        Raises:
            ValueError: a key is missing or unknown, or a value is refused.
        """
        own = ["global_dim", "part_dim", "local_weight"]
        needed = ["backbone", "parser", "parts", *own, "options"]
        check_keys("PartLocalNet", config, needed, ["implementation"])
        check_keys("LocalOptions", config["options"], [], [f.name for f in fields(LocalOptions)])
        parser = config["parser"]
        return cls(
            Backbone.from_config(config["backbone"]),
            None if parser is None else ParsingNet.from_config(parser),
            config["parts"],
            options=LocalOptions(**config["options"]),
            implementation=config.get("implementation", "auto"),
            **{name: config[name] for name in own},
        )

    def extra_repr(self) -> str:
        """Show the arguments that are not modules."""
        return f"parts={self.parts}, local_weight={self.local_weight}"
