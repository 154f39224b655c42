"""The face backbone: its size against numbers worked from the description, and timm's contract."""

import pytest
import timm
import torch
from iresnet import NAMES, Block, IResNet, PReLU, checkpoint_filter_fn
from timm.optim import param_groups_weight_decay
from torch import nn

DEPTHS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
WIDTHS = (64, 128, 256, 512)


def worked_size(depths, flatten):
    """Parameters and multiply-adds of the convolutions and the linear layer, from the text."""
    parameters = 3 * 9 * 64 + 2 * 64 + 64
    macs = 112 * 112 * 3 * 9 * 64
    inputs, side = 64, 112
    for depth, width in zip(depths, WIDTHS, strict=True):
        for block in range(depth):
            out = side // 2 if block == 0 else side
            convolutions = 9 * inputs * width + 9 * width * width
            parameters += convolutions + 2 * inputs + 2 * width + width + 2 * width
            macs += 9 * inputs * width * side**2 + 9 * width * width * out**2
            if block == 0:
                parameters += inputs * width + 2 * width
                macs += inputs * width * out**2
            inputs, side = width, out
    parameters += 2 * 512
    if flatten:
        parameters += 512 * 7 * 7 * 512 + 512 + 2 * 512
        macs += 512 * 7 * 7 * 512
    return parameters, macs


def counted_macs(net, image):
    total = 0

    def count(module, inputs, output):
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += module.weight.numel()

    hooks = [m.register_forward_hook(count) for m in net.modules()]
    with torch.no_grad():
        net(image)
    for hook in hooks:
        hook.remove()
    return total


def test_example():
    parameters, macs = worked_size(DEPTHS["iresnet50"], flatten=True)
    assert round(parameters / 1e6, 2) == 43.59  # the published figures of ArcFace's r50
    assert round(macs / 1e9, 1) == 6.3


@pytest.mark.parametrize(
    ("name", "global_pool"),
    [("iresnet18", "avg"), ("iresnet34", "avg"), ("iresnet50", "flatten"), ("iresnet100", "avg")],
)
def test_size(name, global_pool):
    net = timm.create_model(name, global_pool=global_pool, device="meta")
    parameters, macs = worked_size(DEPTHS[name], global_pool == "flatten")
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert counted_macs(net.eval(), torch.zeros(1, 3, 112, 112, device="meta")) == macs


def test_block():
    """A block equals its formula, written out with functions; nothing follows the sum."""
    torch.manual_seed(0)
    block = Block(4, 6, 2).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 4, 8, 8, dtype=torch.double)

    def bn(x, layer):
        mean, var = x.mean((0, 2, 3), True), x.var((0, 2, 3), correction=0, keepdim=True)
        scale, shift = layer.weight.view(1, -1, 1, 1), layer.bias.view(1, -1, 1, 1)
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    conv = nn.functional.conv2d
    y = bn(conv(bn(x, block.bn1), block.conv1.weight, padding=1), block.bn2)
    y = y.clamp(min=0) + block.prelu.weight.view(1, -1, 1, 1) * y.clamp(max=0)
    y = bn(conv(y, block.conv2.weight, stride=2, padding=1), block.bn3)
    shortcut = bn(conv(x, block.downsample[0].weight, stride=2), block.downsample[1])
    torch.testing.assert_close(block(x), y + shortcut)
    assert (block(x) < 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5, 7)])
def test_prelu(dtype, shape):
    """The form for CPUs has the values and the gradients of torch's."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    mine, theirs = PReLU(3), nn.PReLU(3, dtype=dtype)
    for module in (mine, theirs):
        module.weight.data.copy_(torch.tensor([0.25, 1.5, -0.5]))
    y = mine(x)
    assert torch.equal(y, theirs(x))
    upstream = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, mine.weight), upstream)
    expected = torch.autograd.grad(theirs(x), (x, theirs.weight), upstream)
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {}
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.to(dtype), torchs, check_dtype=False, **tolerance)


@pytest.mark.parametrize("name", ["iresnet18", "iresnet10_small"])
def test_taps(name):
    net = timm.create_model(name).eval()
    image = torch.randn(2, 3, 112, 112)
    hooked = {}
    for info in net.feature_info:
        net.get_submodule(info["module"]).register_forward_hook(
            lambda _m, _i, out, key=info["module"]: hooked.__setitem__(key, out)
        )
    with torch.no_grad():
        final, maps = net.forward_intermediates(image)
        assert len(maps) == 4
        for info, tap, side in zip(net.feature_info, maps, (56, 28, 14, 7), strict=True):
            assert tap.shape == (2, info["num_chs"], side, side)
            assert side * info["reduction"] == 112
            assert tap is hooked[info["module"]]
        torch.testing.assert_close(final, net.forward_features(image), rtol=0, atol=0)
        torch.testing.assert_close(
            net.forward_head(final, pre_logits=True), net(image), rtol=0, atol=0
        )
        torch.testing.assert_close(net(image), net.norm(maps[3]).mean((2, 3)))
        assert net(image).shape == (2, net.num_features) == (2, net.head_hidden_size)


def test_intermediates_options():
    net = timm.create_model("iresnet10_small").eval()
    image = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        final, maps = net.forward_intermediates(image)
        (one,) = net.forward_intermediates(image, indices=[1], intermediates_only=True)
        last_two = net.forward_intermediates(image, indices=2, intermediates_only=True)
        normed = net.forward_intermediates(image, norm=True, intermediates_only=True)
        early, _ = net.forward_intermediates(image, indices=[1], stop_early=True)
    assert torch.equal(one, maps[1])
    assert torch.equal(early, maps[1])
    assert [m.shape for m in last_two] == [m.shape for m in maps[2:]]
    assert torch.equal(normed[3], final)
    assert torch.equal(normed[2], maps[2])
    assert not torch.equal(final, maps[3])


def test_features_only():
    net = timm.create_model("iresnet10_small", features_only=True, out_indices=(1, 3)).eval()
    assert net.feature_info.channels() == [32, 128]
    assert net.feature_info.reduction() == [4, 16]
    assert [x.shape[2] for x in net(torch.zeros(1, 3, 112, 112))] == [28, 7]


def test_pruned():
    net = timm.create_model("iresnet10_small").eval()
    image = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        before = net.forward_intermediates(image, [1], intermediates_only=True)[0]
        assert net.prune_intermediate_layers([1]) == [1]
        after = net.forward_intermediates(image, [1], intermediates_only=True)[0]
    assert torch.equal(before, after)
    assert not any(name.startswith(("layer3", "layer4")) for name, _ in net.named_parameters())


def test_gradient():
    torch.manual_seed(0)
    for global_pool in ("avg", "flatten"):
        net = timm.create_model("iresnet10_small", num_classes=5, global_pool=global_pool)
        final, maps = net.forward_intermediates(torch.randn(4, 3, 112, 112))
        loss = nn.functional.cross_entropy(net.forward_head(final), torch.arange(4))
        # the last biases of a block shift a whole channel, which the next BatchNorm takes out:
        # the global vector never sees them, the taps do
        loss = loss + sum((tap - 1).square().mean() for tap in maps)
        loss.backward()
        frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
        assert frozen == ({"pool.bn.weight"} if global_pool == "flatten" else set())
        invisible = {"pool.fc.bias", "norm.bias"} if global_pool == "flatten" else set()
        for name, parameter in net.named_parameters():
            if name not in frozen | invisible:
                assert parameter.grad.abs().max() > 1e-6, name


def test_checkpointing():
    torch.manual_seed(0)
    net = timm.create_model("iresnet10_small", drop_rate=0.0)
    image = torch.randn(2, 3, 112, 112)
    gradients = []
    for enable in (False, True):
        net.set_grad_checkpointing(enable)
        net.zero_grad()
        net(image).square().mean().backward()
        gradients.append(net.layer1[0].conv1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_classifier():
    net = timm.create_model("iresnet10_small", num_classes=7)
    image = torch.randn(2, 3, 112, 112)
    assert net(image).shape == (2, 7)
    assert net.get_classifier() is net.fc
    pooled = net.norm.weight.data_ptr()
    net.reset_classifier(0)
    assert net(image).shape == (2, 128)
    net.reset_classifier(3, "flatten")
    assert net(image).shape == (2, 3)
    assert net.head_hidden_size == 128
    embedding = net.pool.fc.weight
    net.reset_classifier(0)
    assert net.pool.fc.weight is embedding  # the trained embedding outlives its classifier
    net.reset_classifier(0, "")
    assert net(image).shape == (2, 128, 7, 7)
    assert net.norm.weight.data_ptr() == pooled
    net.reset_classifier(0, "catavgmax")
    assert net(image).shape == (2, net.head_hidden_size) == (2, 256)


def test_initialisation():
    """Unit-scale maps, He's norms, and nothing that weight decay would bias is decayed."""
    torch.manual_seed(0)
    net = timm.create_model("iresnet18")
    with torch.no_grad():
        _, maps = net.forward_intermediates(torch.randn(4, 3, 112, 112))
    for tap, depth in zip(maps, (2, 2, 2, 2), strict=True):
        # shortcut and branches each have variance 1 and are summed
        assert tap.var().item() == pytest.approx(depth + 1, rel=0.25)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            expected = (2 / (9 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1), name
    kept = net.no_weight_decay()
    assert len(kept) == 9
    plain, decayed = param_groups_weight_decay(net, 5e-4, no_weight_decay_list=kept)
    assert plain["weight_decay"] == 0
    assert all(p.ndim > 1 for p in decayed["params"])
    assert len(decayed["params"]) == sum(isinstance(m, nn.Conv2d) for m in net.modules())


def test_autocast():
    net = timm.create_model("iresnet10_small").to(memory_format=torch.channels_last).eval()
    image = torch.randn(2, 3, 112, 112).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        full = net(image)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(image)
            _, maps = net.forward_intermediates(image)
    assert maps[0].dtype == torch.bfloat16  # PReLU did not lift the stream back to fp32
    assert maps[0].is_contiguous(memory_format=torch.channels_last)
    cosine = nn.functional.cosine_similarity(full, half.float())
    assert cosine.min() > 0.999


@pytest.mark.parametrize("name", NAMES)
def test_registered(name):
    assert timm.is_model(name)
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg.mean == (127.5 / 255,) * 3
    assert cfg.std == (128 / 255,) * 3
    assert cfg.input_size == (3, 112, 112)
    net = timm.create_model(name, device="meta")
    assert net.num_classes == 0
    assert net.state_dict()[cfg.first_conv + ".weight"].shape[1] == 3


def test_insightface_names():
    """The keys and shapes of an insightface iresnet18 file load strictly."""
    net = timm.create_model("iresnet18", global_pool="flatten", device="meta")

    def bn(name, n):
        vectors = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (n,))
        return {
            f"{name}.{key}": shape for key, shape in (vectors | {"num_batches_tracked": ()}).items()
        }

    theirs = {"conv1.weight": (64, 3, 3, 3), "prelu.weight": (64,), **bn("bn1", 64)}
    inputs = 64
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(2):
            at = f"layer{stage}.{block}"
            theirs |= bn(f"{at}.bn1", inputs) | bn(f"{at}.bn2", width) | bn(f"{at}.bn3", width)
            theirs[f"{at}.conv1.weight"] = (width, inputs, 3, 3)
            theirs[f"{at}.conv2.weight"] = (width, width, 3, 3)
            theirs[f"{at}.prelu.weight"] = (width,)
            if block == 0:
                theirs[f"{at}.downsample.0.weight"] = (width, inputs, 1, 1)
                theirs |= bn(f"{at}.downsample.1", width)
            inputs = width
    theirs |= {"fc.weight": (512, 25088), "fc.bias": (512,)}
    theirs |= bn("bn2", 512) | bn("features", 512)
    state = {key: torch.zeros(shape, device="meta") for key, shape in theirs.items()}
    net.load_state_dict(checkpoint_filter_fn(state, net), strict=True)
    own = net.state_dict()
    assert checkpoint_filter_fn(own, net) is own


def test_errors():
    with pytest.raises(ValueError, match=r"num_classes=5 needs pooled features"):
        IResNet((1,), (8,), num_classes=5, global_pool="")
    net = IResNet((1, 1), (8, 8), global_pool="flatten", img_size=32).eval()
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 8)
    with pytest.raises(ValueError, match=r"built for pictures of \(32, 32\).*grid of \(10, 10\)"):
        net(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW'; got 'NLC'"):
        net.forward_intermediates(torch.zeros(1, 3, 32, 32), output_fmt="NLC")
