"""ArcFace's improved residual network for 112x112 faces, as timm models (arXiv:1801.07698, 3.2).

    import iresnet, timm                       # the import registers the names
    net = timm.create_model("iresnet50")       # 512-wide global vectors, taps at 56, 28, 14, 7

`iresnet18`, `34`, `50` and `100` are the published ones; `iresnet10_small` is for CPUs. The head
is FSENet's (eq. 2: BatchNorm, then global average pooling, no fully connected layer);
`global_pool="flatten"` is ArcFace's (BatchNorm, dropout, flatten, linear, BatchNorm).
"""

import math
from collections import OrderedDict
from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn import functional as F


class PReLU(nn.PReLU):
    """`nn.PReLU` for CPUs too: autocast does not cast its slopes there, and it is slow.

    At 16 channels of 56x56 in bf16, 64 pictures, forward and backward take a sixth of the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Scale negative values by the slope of their channel."""
        slope = self.weight.to(x.dtype)
        if x.device.type != "cpu":
            return F.prelu(x, slope)
        positive = F.relu(x)
        return positive + slope.view(-1, *[1] * (x.ndim - 2)) * (x - positive)


class Block(nn.Module):
    """BN - conv3x3 - BN - PReLU - conv3x3(stride) - BN, added to a shortcut; no ReLU after."""

    def __init__(self, inputs: int, width: int, stride: int, early_stride: bool = False) -> None:
        super().__init__()
        first, second = (stride, 1) if early_stride else (1, stride)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, first, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.prelu = PReLU(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Add the residual branch to the shortcut."""
        branch = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(branch)) + self.downsample(x)


class IResNet(nn.Module):
    """Residual network for aligned faces, with the methods that timm's users expect.

    >>> net = iresnet18().eval()
    >>> net(torch.zeros(1, 3, 112, 112)).shape
    torch.Size([1, 512])
    >>> [tuple(x.shape[1:]) for x in net.forward_intermediates(
    ...     torch.zeros(1, 3, 112, 112), intermediates_only=True)]
    [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]

    Args:
        depths: blocks in each stage.
        widths: channels of each stage; the stem has those of the first.
        stem_stride: 1 as in ArcFace; 2 halves the picture in the stem instead of in stage 1.
        early_stride: halve in the first convolution of a stage, not the second: a third cheaper.
        num_classes: rows of a linear classifier; 0 for none.
        in_chans: channels of the picture.
        global_pool: `"avg"`, another of timm's pools, `"flatten"` (ArcFace's head), `""` for none.
        drop_rate: dropout before the classifier, or before ArcFace's linear layer.
        img_size: height and width of the picture; only `"flatten"` depends on it.
        device: where the weights live.
        dtype: their type.

    Raises:
        ValueError: a classifier without pooling, or (in the forward pass of `"flatten"`) a picture
            of another size than `img_size`.
    """

    def __init__(  # noqa: PLR0913, PLR0917  (timm passes the last seven by name)
        self,
        depths: tuple[int, ...] = (3, 4, 14, 3),
        widths: tuple[int, ...] = (64, 128, 256, 512),
        stem_stride: Literal[1, 2] = 1,
        early_stride: bool = False,
        num_classes: int = 0,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        img_size: int | tuple[int, int] = 112,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.in_chans = in_chans
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        self.grad_checkpointing = False
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_chans, widths[0], 3, stem_stride, padding=1, bias=False),
                bn1=nn.BatchNorm2d(widths[0]),
                prelu=PReLU(widths[0]),
            )
        )
        self.feature_info = []
        inputs = widths[0]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True), start=1):
            stride = 1 if stage == 1 and stem_stride == 2 else 2
            blocks = [Block(inputs, width, stride, early_stride)]
            blocks += [Block(width, width, 1) for _ in range(depth - 1)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            self.feature_info.append(
                {"num_chs": width, "reduction": 2**stage, "module": f"layer{stage}"}
            )
            inputs = width
        self.norm: nn.Module = nn.BatchNorm2d(inputs)
        self.num_features = inputs
        self.init_weights()
        self.reset_classifier(num_classes, global_pool)
        self.to(device=device, dtype=dtype)

    def init_weights(self) -> None:
        """He's initialisation by fan-out for every convolution.

        Every convolution feeds a BatchNorm, so the scale of its weight changes no output but sets
        its step (learning rate / norm^2): a common N(0, 0.1) would slow wide layers 23-fold.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier, and the pooling where one is named; the head starts afresh."""
        current: str | None = getattr(self, "global_pool", None)
        pool = global_pool if global_pool is not None else current or ""
        if pool == "" and num_classes > 0:
            raise ValueError(
                f"num_classes={num_classes} needs pooled features: pass global_pool='avg'"
            )
        like = next(self.parameters())
        self.num_classes, self.global_pool = num_classes, pool
        if pool != current:
            self.head_hidden_size, self.pool = self._make_pool(pool)
            self.pool.to(like.device, like.dtype).train(self.training)
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            self.fc = nn.Linear(self.head_hidden_size, num_classes)
            nn.init.normal_(self.fc.weight, std=0.01)
            nn.init.zeros_(self.fc.bias)
            self.fc.to(like.device, like.dtype)

    def get_classifier(self) -> nn.Module:
        """Return the classifier, an `nn.Identity` where there is none."""
        return self.fc

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute the blocks in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Name the parameter groups of a layer-wise learning rate."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def no_weight_decay(self) -> set[str]:
        """Name what decay would bias: PReLU slopes decayed to 0 turn into plain ReLU."""
        return {name for name, _ in self.named_parameters() if name.endswith("prelu.weight")}

    def forward_features(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d i j"]:
        """Return the last feature map, after its BatchNorm."""
        x = self.stem(x)
        for stage in self._stages():
            x = self._run(stage, x)
        return self.norm(x)

    def forward_head(self, x: Float[Tensor, "b d i j"], pre_logits: bool = False) -> Tensor:
        """Pool the map; apply the classifier unless `pre_logits`."""
        if self.global_pool == "flatten":
            self._check_grid(x)
            x = self.pool(x)
        else:
            x = self.pool(x)
            x = F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Tensor:
        """Return the global vector, or logits where there is a classifier."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Float[Tensor, "b c h w"],
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps of the stages `indices`, and the last map unless told otherwise.

        Args:
            x: pictures.
            indices: stages by number; an int for the last so many; None for all.
            norm: apply the final BatchNorm to the map of the last stage, too.
            stop_early: run no stage after the last one asked for.
            output_fmt: only `"NCHW"`.
            intermediates_only: return the list alone.

        Raises:
            ValueError: another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW'; got {output_fmt!r}")
        stages = self._stages()
        take, last = feature_take_indices(len(stages), indices)
        maps = {}
        x = self.stem(x)
        for index, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = self._run(stage, x)
            maps[index] = x
        final = self.norm(x) if index == len(stages) - 1 else x
        if norm and len(stages) - 1 in maps:
            maps[len(stages) - 1] = final
        # in the order of the stages, as timm's own networks do
        intermediates = [maps[index] for index in sorted(set(take))]
        return intermediates if intermediates_only else (final, intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages after the last of `indices`, and the head; return the stages kept."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for stage in range(last + 1, len(self.feature_info)):
            setattr(self, f"layer{stage + 1}", nn.Identity())
        # the last BatchNorm fits the last stage alone
        if prune_norm or last < len(self.feature_info) - 1:
            self.norm = nn.Identity()
        if prune_head:
            self.pool, self.fc = nn.Identity(), nn.Identity()
        return take

    def _stages(self) -> list[nn.Module]:
        return [getattr(self, info["module"]) for info in self.feature_info]

    def _run(self, stage: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and not torch.jit.is_scripting():
            return checkpoint_seq(stage, x)
        return stage(x)

    def _grid(self) -> tuple[int, int]:
        height, width = (math.ceil(size / 2 ** len(self.feature_info)) for size in self.img_size)
        return height, width

    def _make_pool(self, pool: str) -> tuple[int, nn.Module]:
        if pool != "flatten":
            layer = SelectAdaptivePool2d(pool_type=pool, flatten=bool(pool))
            return self.num_features * layer.feat_mult(), layer
        height, width = self._grid()
        linear = nn.Linear(self.num_features * height * width, self.num_features)
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)
        batch_norm = nn.BatchNorm1d(self.num_features)
        # the head that follows fixes the length of the vector; a free gain would fight it
        batch_norm.weight.requires_grad_(False)
        layers = OrderedDict(
            dropout=nn.Dropout(self.drop_rate), flatten=nn.Flatten(), fc=linear, bn=batch_norm
        )
        return self.num_features, nn.Sequential(layers)

    def _check_grid(self, x: Tensor) -> None:
        if tuple(x.shape[2:]) != self._grid():
            raise ValueError(
                f"global_pool='flatten' was built for pictures of {self.img_size}, a grid of "
                f"{self._grid()}; got a grid of {tuple(x.shape[2:])}: pass img_size, or use "
                "global_pool='avg'"
            )


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 0,
        "input_size": (3, 112, 112),
        "pool_size": (7, 7),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (127.5 / 255,) * 3,
        "std": (128 / 255,) * 3,
        "first_conv": "stem.conv1",
        "classifier": "fc",
    }


NAMES = ("iresnet18", "iresnet34", "iresnet50", "iresnet100", "iresnet10_small")
default_cfgs = generate_default_cfgs({f"{name}.untrained": _cfg() for name in NAMES})


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename the tensors of an insightface `backbone.pth` (ArcFace's head) to those of IResNet."""
    names = {
        "conv1": "stem.conv1",
        "bn1": "stem.bn1",
        "prelu": "stem.prelu",
        "bn2": "norm",
        "fc": "pool.fc",
        "features": "pool.bn",
    }
    if "conv1.weight" not in state_dict:
        return state_dict
    renamed = {}
    for key, tensor in state_dict.items():
        first, dot, rest = key.partition(".")
        renamed[names.get(first, first) + dot + rest] = tensor
    return renamed


def _build(name: str, pretrained: bool, options: dict[str, Any], **shape: Any) -> IResNet:
    return build_model_with_cfg(
        IResNet,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        **{**shape, **options},
    )


@register_model
def iresnet18(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """Two blocks in each stage."""
    return _build("iresnet18", pretrained, kwargs, depths=(2, 2, 2, 2))


@register_model
def iresnet34(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """Blocks 3, 4, 6, 3."""
    return _build("iresnet34", pretrained, kwargs, depths=(3, 4, 6, 3))


@register_model
def iresnet50(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """Blocks 3, 4, 14, 3: FSENet's backbone."""
    return _build("iresnet50", pretrained, kwargs, depths=(3, 4, 14, 3))


@register_model
def iresnet100(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """Blocks 3, 13, 30, 3."""
    return _build("iresnet100", pretrained, kwargs, depths=(3, 13, 30, 3))


@register_model
def iresnet10_small(pretrained: bool = False, **kwargs: Any) -> IResNet:
    """One block in each stage, a quarter as wide, halving early: for two CPU cores.

    The stem starts at 56, since the map at 112 would cost most and say least.
    """
    return _build(
        "iresnet10_small",
        pretrained,
        kwargs,
        depths=(1, 1, 1, 1),
        widths=(16, 32, 64, 128),
        stem_stride=2,
        early_stride=True,
    )
