"""Whole networks: what parts cost beside a network without them."""

from collections.abc import Callable, Iterator

import iresnet  # noqa: F401  (registers FSENet's backbones with timm)
import torch
from model import GlobalNet
from peers.provider import Provider
from rows import Row
from torch import Tensor, nn

from partlocal import ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS


def model_rows(device: torch.device, quick: bool) -> Iterator[Row]:
    """Yield inference and a training step, eager and compiled; the first provider has no parts.

    FSENet's own backbone and map, in bf16 and channels last on a GPU; a smaller backbone on a CPU
    with `quick`.
    """
    on_gpu = device.type == "cuda"
    small = quick and not on_gpu
    name, batch = "iresnet18" if small else "iresnet50", 256 if on_gpu else 2 if small else 8
    layout = torch.channels_last
    images = torch.randint(0, 256, (batch, 3, 112, 112), dtype=torch.uint8, device=device)
    parser = ParsingNet.pretrained().freeze()
    net = PartLocalNet(Backbone(name, map_size=28), parser, FSENET_PARTS)
    net = net.to(device=device, memory_format=layout)
    alone = GlobalNet(Backbone(name, map_size=28)).to(device=device, memory_format=layout)
    with torch.no_grad():
        maps, visibility = net.eval().parse(images)

    def in_half(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.autocast(device.type, torch.bfloat16)(run) if on_gpu else run

    def global_only(images: Tensor, maps: Tensor, visibility: Tensor) -> Tensor:
        return alone(images)

    def ready_maps(images: Tensor, maps: Tensor, visibility: Tensor) -> Tensor:
        return net(images, maps, visibility)

    def with_parser(images: Tensor, maps: Tensor, visibility: Tensor) -> Tensor:
        return net(images)

    def parse(images: Tensor) -> Tensor:
        return parser(images)

    shape, inputs = f"{name} b={batch} 112x112", (images, maps, visibility)
    runs = {"global only": global_only, "ready maps": ready_maps, "with the parser": with_parser}
    for compiled in (False,) if quick else (False, True):
        how = ", compiled" if compiled else ""
        one = [Provider("ParsingNet", in_half(parse), compiled=compiled)]
        yield Row(f"ParsingNet{how}", f"b={batch} 112x112", (images,), one, compiled=compiled)
        for training in (False, True):
            alone.train(training)
            net.train(training)
            step = _training_step if training else lambda run, net: run
            providers = [
                Provider(title, step(in_half(run), owner), compiled=compiled)
                for (title, run), owner in zip(runs.items(), (alone, net, net), strict=True)
            ]
            kind = "training step" if training else "inference"
            yield Row(f"FSENet {kind}{how}", shape, inputs, providers, compiled=compiled)


def _training_step(run: Callable[..., Tensor], net: nn.Module) -> Callable[..., Tensor]:
    """Return forward and backward; the loss is what any head's gradient would come through."""
    parameters = [p for p in net.parameters() if p.requires_grad]

    def step(*inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            loss = run(*inputs).float().square().mean()
        return torch.autograd.grad(loss, parameters, allow_unused=True)[0]

    return step
