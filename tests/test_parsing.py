import copy
import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from partlocal import PartLocalNet, parsing
from partlocal.labels import HELEN, LAPA, LabelSet
from partlocal.parsing import ParsingNet

ROOT = Path(__file__).parent.parent
SMALL = {"width": 8, "num_stacks": 1, "input_size": 32, "grid": 16, "bottleneck_size": 4}


def small(labels=HELEN, **changes):
    torch.manual_seed(0)
    return ParsingNet(labels, **{**SMALL, **changes})


def multiply_adds(module, size=112):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module.eval()(torch.rand(1, 3, size, size))
    return counter.get_total_flops() / 2


def test_example():
    # A single 1x1 path worked by hand: logits of a constant picture are the head's bias where the
    # head's weights are zero, at every pixel, whatever the input size.
    net = small(3).eval()
    nn.init.zeros_(net.stacks[0].head.weight)
    net.stacks[0].head.bias.data = torch.tensor([1.0, -2.0, 0.5])
    logits = net(torch.rand(2, 3, 20, 30))
    assert logits.shape == (2, 3, 32, 32)
    expected = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("size", [(96, 96), (112, 112), (160, 160), (224, 224), (256, 128)])
def test_input_sizes(size):
    assert small(width=4)(torch.rand(2, 3, *size)).shape == (2, 11, 32, 32)


@pytest.mark.parametrize(("input_size", "grid", "bottleneck"), [(112, 28, 4), (50, 25, 2)])
def test_no_divisibility_rule(input_size, grid, bottleneck):
    net = small(input_size=input_size, grid=grid, bottleneck_size=bottleneck)
    assert net(torch.rand(2, 3, 112, 112)).shape == (2, 11, input_size, input_size)


@pytest.mark.parametrize("grid", [32, 64, 128])
@pytest.mark.parametrize("bottleneck", [8, 4, 2])
def test_levels(grid, bottleneck):
    net = ParsingNet(width=2, num_stacks=1, grid=grid, bottleneck_size=bottleneck).eval()
    seen = []
    net.stem.register_forward_hook(lambda *hook: seen.append(hook[2].shape[-2:]))
    net.stacks[0].middle.register_forward_hook(lambda *hook: seen.append(hook[2].shape[-2:]))
    net(torch.rand(1, 3, 64, 64))
    assert seen == [(grid, grid), (bottleneck, bottleneck)]


@pytest.mark.parametrize("num_stacks", [1, 2, 3])
@pytest.mark.parametrize("bottleneck", [8, 4, 2])
@pytest.mark.parametrize("supervision", ["last", "all"])
def test_every_parameter_learns(num_stacks, bottleneck, supervision):
    net = small(num_stacks=num_stacks, bottleneck_size=bottleneck)
    images = torch.rand(4, 3, 32, 32)
    outputs = net.forward_stacks(images) if supervision == "all" else [net(images)]
    target = torch.randint(0, 11, (4, 32, 32))
    sum(nn.functional.cross_entropy(logits, target) for logits in outputs).backward()
    # Not merely "not None": a bias in front of a BatchNorm has a gradient of rounding errors.
    still = [n for n, p in net.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-6]
    assert still == []


def test_stacks():
    net = small(num_stacks=3).eval()
    images = torch.rand(2, 3, 40, 40)
    stacks = net.forward_stacks(images)
    assert [tuple(logits.shape) for logits in stacks] == [(2, 11, 32, 32)] * 3
    torch.testing.assert_close(stacks[-1], net(images))
    assert not torch.allclose(stacks[0], stacks[-1])
    assert [tuple(x.shape[-2:]) for x in net.forward_stacks(images, size=16)] == [(16, 16)] * 3
    # Each stack sees what the one before it found.
    net.stacks[0].head.weight.data[0] += 1.0
    assert not torch.allclose(net(images), stacks[-1])


def test_pixels():
    net = small().eval()
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    normalized = ParsingNet(**SMALL, input="normalized").eval()
    normalized.load_state_dict(net.state_dict())
    byte, unit = net(images), net(images.float() / 255)
    standard = normalized((images.float() - 127.5) / 128)
    torch.testing.assert_close(byte, unit)
    torch.testing.assert_close(byte, standard)
    with pytest.raises(ValueError, match=r"images must be floats in \[0, 1\]"):
        net(images.float())


def test_antialias():
    # Alternate columns are grey when shrunk by two; taking every second one would see one colour.
    stripes = torch.zeros(1, 3, 64, 64)
    stripes[..., ::2] = 1
    net, seen = small().eval(), []
    net.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(stripes)
    inner = seen[0][..., 1:-1]  # the outermost columns have a neighbour on one side alone
    torch.testing.assert_close(inner, torch.zeros_like(inner), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype(dtype):
    net = small(dtype=dtype)
    assert {p.dtype for p in net.parameters()} == {dtype}
    assert net(torch.rand(2, 3, 48, 48)).dtype == dtype
    assert small(device="meta").stem.layers[0].weight.device.type == "meta"


def test_autocast_and_layout():
    net = small().eval()
    images = torch.rand(2, 3, 32, 32)
    exact = net(images)
    torch.testing.assert_close(net(images.contiguous(memory_format=torch.channels_last)), exact)
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(images), exact, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(net(images).float(), exact, atol=0.1, rtol=0.1)


def test_learns():
    # To find the bright square takes the picture, to name it takes the position.
    torch.manual_seed(0)
    labels = LabelSet("toy", ("background", "left_square", "right_square"))
    net, weight = small(labels), torch.tensor([0.2, 1.0, 1.0])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)

    def batch(count):
        images, target = 0.3 * torch.rand(count, 3, 32, 32), torch.zeros(count, 32, 32).long()
        for i in range(count):
            row, column = torch.randint(0, 24, (2,)).tolist()
            images[i, :, row : row + 8, column : column + 8] += 0.6
            target[i, row : row + 8, column : column + 8] = 1 if column < 12 else 2
        return images, target

    for _ in range(60):
        images, target = batch(16)
        loss = nn.functional.cross_entropy(net(images), target, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    images, target = batch(64)
    predicted = net.eval()(images).argmax(1)
    for label in (1, 2):
        both = ((predicted == label) & (target == label)).sum()
        f1 = 2 * both / ((predicted == label).sum() + (target == label).sum())
        assert f1 > 0.8


def test_cost():
    net = ParsingNet()
    assert sum(p.numel() for p in net.parameters()) < 1.4e6
    # 6.3e9 multiply-adds are those of ArcFace's 50-layer network at 112x112.
    assert multiply_adds(net) <= 0.1 * 6.3e9
    timm = pytest.importorskip("timm")
    path = ROOT / "examples" / "fsenet" / "iresnet.py"
    if not path.is_file():
        pytest.skip("examples/fsenet/iresnet.py is absent")
    spec = importlib.util.spec_from_file_location("iresnet_for_cost", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    backbone = multiply_adds(timm.create_model("iresnet50"))
    assert 5e9 < backbone < 7.5e9
    assert multiply_adds(net) <= 0.1 * backbone


def test_freeze():
    parser = small()
    parser(torch.rand(4, 3, 32, 32))  # one batch in training mode
    assert parser.freeze() is parser
    owner = nn.Sequential(parser, nn.Conv2d(11, 1, 1)).train()
    assert not any(module.training for module in parser.modules())
    before = copy.deepcopy(parser.state_dict())
    images = torch.rand(4, 3, 32, 32, requires_grad=True)
    maps = parser(images)
    features = torch.rand(4, 11, 32, 32, requires_grad=True)
    (maps * features).sum().backward()
    assert not maps.is_inference()
    torch.testing.assert_close(features.grad, maps.detach())
    assert images.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in parser.parameters())
    owner(images)
    assert all(torch.equal(before[name], t) for name, t in parser.state_dict().items())
    parser.freeze(False)
    assert all(p.requires_grad for p in parser.parameters())
    owner.train()
    assert parser.training
    assert copy.deepcopy(parser.freeze()).train().training is False


@pytest.mark.parametrize("owned", [True, False])
def test_a_saved_parser_stays_frozen(owned, tmp_path):
    parser = small()
    parser(torch.rand(4, 3, 32, 32))
    parser.freeze()
    images = torch.rand(4, 3, 64, 64)
    saved = parser
    if owned:
        saved = PartLocalNet("resnet10t", parser, ("nose",), image_size=64)
    saved.save_pretrained(tmp_path)
    loaded = type(saved).from_pretrained(tmp_path).train()
    again = loaded.parser if owned else loaded
    assert again.frozen
    assert not any(module.training for module in again.modules())
    assert not any(p.requires_grad for p in again.parameters())
    assert not owned or all(p.requires_grad for p in loaded.backbone.parameters())
    before = copy.deepcopy(again.state_dict())
    loaded(images)
    assert all(torch.equal(before[name], t) for name, t in again.state_dict().items())
    assert again.config() == parser.config()

    parser.freeze(False)
    saved.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    arguments = config["arguments"]["parser"] if owned else config["arguments"]
    for old in (False, True):  # the first versions did not write whether it was frozen
        if old:
            assert arguments.pop("frozen") is False
            path.write_text(json.dumps(config))
        loaded = type(saved).from_pretrained(tmp_path).train()
        again = loaded.parser if owned else loaded
        assert not again.frozen
        assert again.training
        assert all(p.requires_grad for p in again.parameters())


def test_warns_once_when_untrained():
    parser = small().freeze()
    with pytest.warns(UserWarning, match="frozen but was never trained: its parts are noise") as w:
        parser(torch.rand(1, 3, 32, 32))
    assert len(w) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parser(torch.rand(1, 3, 32, 32))
        small().eval()(torch.rand(1, 3, 32, 32))  # not frozen
        trained = small()
        trained(torch.rand(4, 3, 32, 32))
        loaded = small().freeze()
        loaded.load_state_dict(trained.state_dict())
        loaded(torch.rand(1, 3, 32, 32))
        trained.freeze()(torch.rand(1, 3, 32, 32))


def test_module(tmp_path):
    parser = small(LAPA, num_stacks=2)
    parser(torch.rand(4, 3, 32, 32))
    parser.save_pretrained(tmp_path)
    again = ParsingNet.from_pretrained(tmp_path)
    assert again.config() == parser.config() == json.loads(json.dumps(parser.config()))
    assert again.labels == LAPA
    assert again.trained
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again(images), parser.eval()(images))
    assert "labels=LaPa, width=8, num_stacks=2" in repr(again)
    weights = again.stem.layers[0].weight.clone()
    again.reset_parameters()
    assert not torch.equal(weights, again.stem.layers[0].weight)


def test_compact(tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    parser = small()
    parser(torch.rand(4, 3, 32, 32))
    parser.save_compact(path, about={"seed": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.json", "net.safetensors"]
    assert json.loads(path.with_suffix(".json").read_text())["about"] == {"seed": 1}
    again = ParsingNet.load_compact(path)
    assert again.trained
    assert not again.training
    assert next(again.parameters()).dtype == torch.float32
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(again(images), parser.eval()(images), atol=2e-2, rtol=2e-2)
    monkeypatch.setattr(parsing, "PRETRAINED", path)
    assert torch.equal(ParsingNet.pretrained()(images), again(images))
    parser.freeze().save_compact(path)
    assert ParsingNet.load_compact(path).train().frozen
    shipped = ParsingNet.pretrained()  # free, whatever it was when it was written
    assert not shipped.training
    assert shipped.train().training
    assert all(p.requires_grad for p in shipped.parameters())
    parser.freeze(False)

    ParsingNet().save_compact(tmp_path / "default.safetensors")
    assert (tmp_path / "default.safetensors").stat().st_size <= 3e6

    size = path.stat().st_size
    parser.stem.layers[0].weight.data[0] = 1e6
    with pytest.raises(ValueError, match=r"not finite in half precision: stem\.layers\.0\.weight"):
        parser.save_compact(path)
    assert path.stat().st_size == size


def test_compact_errors(tmp_path, monkeypatch):
    path = tmp_path / "new" / "net.safetensors"  # the folder is made
    with pytest.raises(ValueError, match=r"path must end in \.safetensors, .*; got .*net\.json"):
        small().save_compact(path.with_suffix(".json"))  # which would be both files
    monkeypatch.setattr(parsing, "PRETRAINED", path)
    with pytest.raises(FileNotFoundError, match=r"holds no weights/net\.safetensors: install a r"):
        ParsingNet.pretrained()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"path must lead to a folder .* choose another"):
        small().save_compact(tmp_path / "file" / "net.safetensors")
    small().save_compact(path)
    config = path.with_suffix(".json")
    text = config.read_text()
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"net\.json is missing: .*save_compact writes a"):
        ParsingNet.load_compact(path)
    config.write_text(text.replace('"width": 8', '"width": 16'))
    with pytest.raises(ValueError, match="does not fit this ParsingNet"):
        ParsingNet.load_compact(path)
    for damaged in (text[:40], "[]", "{}", '{"arguments": 3}'):
        config.write_text(damaged)
        with pytest.raises(ValueError, match=r"net\.json is damaged .*: load what save_compact wr"):
            ParsingNet.load_compact(path)
    config.write_text(text.replace('"width"', '"breadth"'))
    with pytest.raises(
        ValueError, match=r"net\.json describes no ParsingNet .* lacks width and has .* breadth\)"
    ):
        ParsingNet.load_compact(path)
    config.write_text(text)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        ParsingNet.load_compact(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": 0}, "labels must be a LabelSet or a number >= 1; got 0"),
        ({"width": 7}, "width must be even and at least 2; got 7"),
        ({"num_stacks": 0}, "num_stacks must be at least 1; got 0"),
        ({"bottleneck_size": 1}, "bottleneck_size must be at least 2; got 1"),
        (
            {"grid": 48},
            r"grid must be input_size = 128 halved some times, one of \[128, 64, 32, 16, 8, 4, 2\]"
            "; got 48",
        ),
        (
            {"bottleneck_size": 5},
            r"bottleneck_size must be grid = 64 halved some times, one of .*; got 5",
        ),
        ({"input": "bgr"}, "input must be 'pixels' or 'normalized'; got 'bgr'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParsingNet(**arguments)


def test_errors_of_kinds(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    for labels in ("helen", None):
        message = f"labels must be a LabelSet or a number >= 1; got {labels!r}: pass the set itself"
        with pytest.raises(TypeError, match=message):
            ParsingNet(labels)
    net, images = small().eval(), torch.rand(1, 3, 16, 16)
    for size in (-1, 0, 2.5):
        with pytest.raises(ValueError, match=r"size must be two positive whole numbers .*; got \("):
            net.forward_stacks(images, size)
    with pytest.raises(ValueError, match=r"images must hold at least one pixel; got \[1, 3, 0, 0"):
        net(images[..., :0, :0])
    with pytest.raises(ValueError, match=r"images must be on cpu \(as the network\); got meta"):
        net(images.to("meta"))


def test_numbered_labels():
    net = small(3)
    assert net.labels.labels == ("map_0", "map_1", "map_2")
    assert ParsingNet.from_config(net.config()).config() == net.config()


def test_compile():
    # In a process of its own: the runtime check of shapes breaks graphs.
    code = """
import torch
from partlocal.parsing import ParsingNet
net = ParsingNet(width=4, num_stacks=1, input_size=16, grid=8, bottleneck_size=4)
net(torch.rand(2, 3, 20, 20))
net.freeze()
images = torch.rand(2, 3, 20, 20)
compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(images), net(images))
program = torch.export.export(net, (images,), dynamic_shapes=({0: torch.export.Dim("b")},))
more = torch.rand(5, 3, 20, 20)
torch.testing.assert_close(program.module()(more), net(more))
"""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
