"""The networks of the arms, and the losses that they are trained with."""

import torch
from jaxtyping import Float, Int, Num
from model import GlobalNet, TrainedFSENet, TrainedGlobalNet
from options import Options
from torch import Tensor, nn
from torch.nn import functional as F

from ablation.arms import Arm
from partlocal import CosFace, ParsingNet, PartLocalNet, SphereFace
from partlocal.backbone import Backbone, BackboneOutput

EMBEDDING = 512  # numbers of the vector that is made of the parser's own features


def build_network(
    arm: Arm, options: Options, parser: ParsingNet, landmarks: ParsingNet | None = None
) -> PartLocalNet | GlobalNet:
    """Return the network of an arm with fresh weights.

    Args:
        arm: which.
        options: of the run: backbone, size of the feature map, weight of the local half.
        parser: frozen, with part maps.
        landmarks: frozen, with one heat map a point; only for `landmarks`.
    """
    map_size = arm.map_size or options.map_size
    if arm.kind == "wide":
        return GlobalNet(_wide(options, parser, arm))
    if arm.kind == "parsing":
        return GlobalNet(ParserFeatures(parser))
    backbone = Backbone(options.backbone, map_size=map_size)
    if arm.kind == "global":
        return GlobalNet(backbone)
    if arm.kind == "fsenet":
        return _fsenet(backbone, parser, arm, options)
    guide = parser if arm.kind == "guided" else landmarks
    if guide is None:
        raise ValueError(f"landmarks must be a ParsingNet for the arm {arm.kind!r}; got None")
    return GlobalNet(GuidedBackbone(backbone, guide, points=arm.kind == "landmarks"))


def supervise(
    arm: Arm, net: PartLocalNet | GlobalNet, identities: int, options: Options, steps: int
) -> TrainedFSENet | TrainedGlobalNet:
    """Return the network with the losses of its arm.

    Args:
        arm: which.
        net: what `build_network` returned.
        identities: people to tell apart.
        options: margin, scale and weight of the losses.
        steps: of the training, over which A-softmax anneals.
    """
    margin = options.margin if arm.margin is None else arm.margin
    how = (identities, options.margin if arm.supervision != "arcface" else margin, options.scale)
    if isinstance(net, PartLocalNet):
        trained = TrainedFSENet(net, *how, options.local_loss_weight)
        heads = {"global_head": net.global_dim, "local_head": net.local_dim}
    else:
        trained = TrainedGlobalNet(net, *how)
        heads = {"global_head": net.backbone.global_dim}
    for name, width in heads.items():
        head = getattr(trained, name)
        if arm.supervision == "softmax":
            setattr(trained, name, PlainSoftmax(width, identities))
        elif arm.supervision == "cosface":
            head.margin = CosFace(margin)
        elif arm.supervision == "a-softmax":
            head.margin = AnnealedSphereFace(steps)
    return trained


class PlainSoftmax(nn.Module):
    """Cross-entropy of a linear layer with bias, on vectors whose length is free.

    Args:
        in_features: width of the vectors.
        num_classes: identities.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)

    def forward(
        self,
        unit: Float[Tensor, "b d"],
        labels: Int[Tensor, " b"],
        norm: Float[Tensor, " b"] | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss; `norm` is the length that the vectors had before they were made unit.

        Without it the length is that of d numbers of variance 1, which the local branch has
        standardised.
        """
        length = unit.shape[1] ** 0.5 if norm is None else norm[:, None]
        return F.cross_entropy(self.linear(unit * length).float(), labels)


class AnnealedSphereFace(nn.Module):
    """A-softmax: SphereFace with m = 4, blended with the plain cosine, ever less.

    Args:
        steps: of the training. The blend starts at 1000 and falls to 5 as 1000 / (1 + 0.12 i) does
            in the authors' 28,000 steps i, run through in these.

    Source: https://arxiv.org/abs/1704.08063, and the authors' configuration.
    """

    step: Tensor

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]) -> Tensor:
        """Return phi; in training mode each call is a step."""
        done = 28_000 * int(self.step) / self.steps
        if self.training:
            self.step += 1
        return SphereFace(4.0, annealing=max(5.0, 1000 / (1 + 0.12 * done)))(cos_target, norm)


class ParserFeatures(nn.Module):
    """The parser's last features before its logits, averaged per label, to one vector.

    Args:
        parser: frozen.
    """

    def __init__(self, parser: ParsingNet) -> None:
        super().__init__()
        self.parser = parser
        self.global_dim = EMBEDDING
        self.linear = nn.Linear(len(parser.labels) * parser.width, EMBEDDING)

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> BackboneOutput:
        """Return the vector of each picture, and the features that it was made of."""
        kept: list[Tensor] = []
        # what the last stack hands to the layer that makes its logits
        seen = self.parser.stacks[-1].head.register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0])
        )
        with seen, torch.no_grad():
            logits = self.parser.forward_stacks(images, self.parser.grid)[-1]
        (features,) = kept
        maps = logits.float().softmax(1)
        sums = torch.einsum("bnhw,bchw->bnc", maps, features.float())
        means = sums / maps.sum((2, 3))[..., None]
        return BackboneOutput(self.linear(means.flatten(1)), features)


class GuidedBackbone(nn.Module):
    """A backbone whose stages after the tap see the maps of a frozen network beside the features.

    Args:
        backbone: one of the recipe's residual networks, tapped before its last stage.
        guide: frozen; its maps go through a softmax: over the labels at each pixel for parts, over
            the pixels of each map (brought to a peak of 1) for points.
        points: whether it has a heat map a point.
    """

    def __init__(self, backbone: Backbone, guide: ParsingNet, points: bool) -> None:
        super().__init__()
        self.backbone, self.guide = backbone, guide
        self.global_dim = backbone.global_dim
        self.points = points
        model = backbone.model
        name = model.feature_info[backbone.tap + 1]["module"]
        first = getattr(model, name)[0]
        block = type(first)(
            first.bn1.num_features + len(guide.labels),
            first.conv1.out_channels,
            2,
            early_stride=first.conv1.stride == (2, 2),
        )
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        getattr(model, name)[0] = block

    def forward(self, images: Num[Tensor, "b 3 h w"]) -> BackboneOutput:
        """Return the global vector and the features at the tap, without the maps."""
        with torch.no_grad():
            maps = self.guide(images).float()
            maps = self._peaks(maps) if self.points else maps.softmax(1)
            maps = F.interpolate(maps, self.backbone.map_size, mode="bilinear", antialias=True)
        model = self.backbone.model
        x = model.stem(self.backbone.pixels(images))
        for index, info in enumerate(model.feature_info):
            x = getattr(model, info["module"])(x)
            if index == self.backbone.tap:
                features, x = x, torch.cat([x, maps.to(x.dtype)], 1)
        return BackboneOutput(model.forward_head(model.norm(x), pre_logits=True), features)

    @staticmethod
    def _peaks(logits: Tensor) -> Tensor:
        return (logits - logits.amax((2, 3), keepdim=True)).exp()


def _fsenet(backbone: Backbone, parser: ParsingNet, arm: Arm, options: Options) -> PartLocalNet:
    return PartLocalNet(
        backbone,
        parser,
        arm.parts,
        part_dim=options.part_dim,
        local_weight=options.local_weight,
        options=arm.local,
    )


def _wide(options: Options, parser: ParsingNet, arm: Arm) -> Backbone:
    """Return the backbone with as many numbers as FSENet's descriptor, made by its last stage."""
    with torch.random.fork_rng(devices=[]):  # or its weights would not be drawn like the others'
        plain = Backbone(options.backbone, map_size=options.map_size)
        net = _fsenet(plain, parser, arm, options)
    stages = [info["num_chs"] for info in plain.model.feature_info]
    widths = (*stages[:-1], net.global_dim + net.local_dim)
    return Backbone(options.backbone, map_size=options.map_size, args={"widths": widths})
