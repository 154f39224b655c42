"""Ways to compute ArcFace's loss of each sample: embeddings `b d`, rows `v d`, labels `b`."""

from typing import Any

import torch
from pytorch_metric_learning.losses import ArcFaceLoss
from pytorch_metric_learning.reducers import DoNothingReducer
from standing import OURS
from torch import Tensor
from torch.nn import functional as F

from partlocal import ArcFace, NormFace, margin_softmax
from partlocal.kernels import Implementation
from peers.provider import Provider, own_providers

SCALE, MARGIN = 64.0, 0.5


def own_loss(implementation: Implementation, recompute: bool = True) -> Any:
    """Ours, without a matrix of samples and classes, or keeping it for the backward."""

    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return margin_softmax(
            x, weight, labels, ArcFace(MARGIN), SCALE, reduction="none",
            recompute=recompute, implementation=implementation,
        )  # fmt: skip

    return loss


def materialised(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """All cosines, the margin on the targets, and PyTorch's cross entropy."""
    cos = F.normalize(x) @ F.normalize(weight).T
    target = cos.gather(1, labels[:, None]).float()
    angle = target.clamp(-1 + 1e-7, 1 - 1e-7).acos()
    moved = torch.where(
        angle <= torch.pi - MARGIN,
        (angle + MARGIN).cos(),
        target - MARGIN * torch.tensor(MARGIN).sin(),
    )
    logits = SCALE * cos.scatter(1, labels[:, None], moved.to(cos.dtype))
    return F.cross_entropy(logits.float(), labels, reduction="none")


def metric_learning(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """pytorch-metric-learning's ArcFaceLoss on the same rows."""
    degrees = MARGIN * 180 / torch.pi
    loss = ArcFaceLoss(len(weight), x.shape[1], degrees, SCALE, reducer=DoNothingReducer())
    found = torch.func.functional_call(loss, {"W": weight.T}, (x, labels))
    return found["loss"]["losses"]


class _PartialFC(torch.autograd.Function):
    """Softmax over all cosines, changed in place, and its gradient from the probabilities."""

    @staticmethod
    def forward(ctx: Any, cos: Tensor, labels: Tensor) -> Tensor:
        target = cos.gather(1, labels[:, None])
        logits = SCALE * cos.scatter(1, labels[:, None], (target.acos() + MARGIN).cos())
        logits -= logits.amax(1, keepdim=True)
        share = logits.exp_()
        share /= share.sum(1, keepdim=True)
        ctx.save_for_backward(share, labels)
        return -share.gather(1, labels[:, None])[:, 0].clamp(min=1e-30).log()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        share, labels = ctx.saved_tensors
        share = share.scatter_add(1, labels[:, None], -torch.ones_like(share[:, :1]))
        return SCALE * share * grad[:, None], None


def partial_fc(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """insightface's way on one device, all classes drawn: the margin moves the value alone."""
    return _PartialFC.apply(F.linear(F.normalize(x), F.normalize(weight)), labels)


def partial_fc_oracle(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The same with our margin that has no gradient of its own, one other form of the loss."""
    margin = ArcFace(MARGIN, grad="detached", beyond="none")
    return margin_softmax(x, weight, labels, margin, SCALE, reduction="none")


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """PyTorch's fused one, which has no margin."""
    return F.linear_cross_entropy(
        SCALE * F.normalize(x), F.normalize(weight), labels, reduction="none"
    )


def no_margin_oracle(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours without a margin."""
    return margin_softmax(x, weight, labels, NormFace(), SCALE, reduction="none")


def liger(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Liger's fused linear cross entropy, which has no margin."""
    from liger_kernel.transformers.functional import (  # noqa: PLC0415
        liger_fused_linear_cross_entropy,
    )

    return liger_fused_linear_cross_entropy(
        SCALE * F.normalize(x), F.normalize(weight), labels, reduction="none"
    )


def cut(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Apple's cut cross entropy, which has no margin, without its filter of gradients."""
    from cut_cross_entropy import linear_cross_entropy as run  # noqa: PLC0415

    return run(
        SCALE * F.normalize(x), F.normalize(weight), labels, reduction="none", impl="cce_exact"
    )


def providers(device: torch.device) -> list[Provider]:
    """Return who computes the loss, ourselves first."""
    no_margin = [("cut-cross-entropy", cut), ("Liger", liger)] if device.type == "cuda" else []
    if hasattr(F, "linear_cross_entropy"):
        no_margin.append(("linear_cross_entropy", linear_cross_entropy))
    return [
        *own_providers(own_loss, device),
        Provider(f"{OURS}, recompute=False", own_loss("auto", recompute=False), temporaries=1),
        Provider("materialised", materialised, temporaries=3),
        Provider("materialised, compiled", materialised, temporaries=2, compiled=True),
        Provider("pytorch-metric-learning", metric_learning, temporaries=6),
        Provider("PartialFC (other result)", partial_fc, partial_fc_oracle, temporaries=3),
        *(Provider(f"{name} (other result)", run, no_margin_oracle) for name, run in no_margin),
    ]
