"""Tapping timm models: what the maps and vectors hold, not their shapes alone."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from partlocal.backbone import Backbone

DOCS = Path(__file__).parent.parent / "docs" / "backbones.py"
FAMILIES = {
    "resnet18": "plain CNN",
    "mobilenetv3_small_050": "efficientnet wrapper; global width is not num_features",
    "convnext_atto": "first tap at stride 4",
    "legacy_seresnet18": "older CNN",
    "inception_next_atto": "floors odd sizes",
    "mambaout_femto": "NHWC",
    "swinv2_cr_tiny_224": "needs img_size; window attention",
    "mvitv2_tiny": "builds with img_size and then fails",
    "vit_tiny_patch16_224": "class token and final norm",
    "deit_tiny_distilled_patch16_224": "two prefix tokens, two heads",
    "vit_wee_patch16_reg1_gap_256": "register token, no class token",
    "levit_128s": "tokens in stages",
    "gmlp_ti16_224": "no attention",
    "xcit_nano_12_p8_224": "stride 8 tokens",
}
# Where timm's feature_info names no module that exists or runs.
TAPPED_MODULE = {
    "mvitv2_tiny": "stages.{}",
    "twins_svt_small": "blocks.{}.1",
    "gemma4_vit_167m": "encoder.blocks.{}",
}


def load_survey():
    spec = importlib.util.spec_from_file_location("backbones_survey", DOCS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SURVEY = load_survey()


def quarters_brightened():
    """A picture of noise, and the same with one quarter brightened, for the four quarters."""
    pictures = torch.rand(1, 3, 112, 112).mul(0.3).add(0.2).repeat(5, 1, 1, 1)
    corners = [(row, column) for row in (0, 56) for column in (0, 56)]
    for picture, (row, column) in zip(pictures[1:], corners, strict=True):
        picture[:, row : row + 56, column : column + 56] += 0.4
    return pictures


def calibrated(name):
    """A random model whose BatchNorm statistics fit its input, so that activations stay sane."""
    torch.manual_seed(0)
    backbone = Backbone(name)
    norms = [m for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        with torch.no_grad():
            backbone.train()(quarters_brightened())
    return backbone.eval()


def check_contract(backbone):
    """Attributes, the oracle for the global vector, and batch independence."""
    model = backbone.model
    images = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(1))
    output, alone = backbone(images), backbone(images[:1])
    pixels = backbone.pixels(images)
    expected = model.forward_head(model.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(output.global_vector, expected)
    for both, one in zip(output, alone, strict=True):
        scale = both.abs().max().item()
        torch.testing.assert_close(one, both[:1], rtol=1e-3, atol=1e-4 * scale)
    differs = (output.features[0] - output.features[1]).abs().max()
    assert differs > 1e-5 * output.features.abs().max()  # else the comparison proves nothing
    assert output.features.shape == (2, backbone.feature_channels, *backbone.map_size)
    assert output.global_vector.shape == (2, backbone.global_dim)
    assert backbone.global_dim == model.head_hidden_size
    assert [tap.channels for tap in backbone.taps] == [i["num_chs"] for i in model.feature_info]


def check_tapped_layer(backbone, name):
    """The map is what the tapped module gave, laid out as NCHW, with or without the last norm."""
    model, index = backbone.model, backbone.tap
    path = TAPPED_MODULE.get(name, model.feature_info[index]["module"]).format(index)
    caught = []
    handle = model.get_submodule(path).register_forward_hook(lambda m, i, out: caught.append(out))
    features = backbone(torch.rand(2, 3, 112, 112)).features
    handle.remove()
    outputs = caught[-1] if isinstance(caught[-1], (tuple, list)) else [caught[-1]]
    found = [out for out in outputs if torch.is_tensor(out)]
    layouts = [*found, *(out.movedim(-1, 1) for out in found), *(o.movedim(1, -1) for o in found)]
    for norm in _final_norms(model):
        for out in layouts:
            with contextlib.suppress(RuntimeError):  # not the layout it takes
                found.append(norm(out))
    assert any(
        candidate.shape == features.shape and torch.allclose(candidate, features, atol=1e-5)
        for out in found
        for candidate in _as_nchw(out, features.shape)
    ), [tuple(f.shape) for f in found]


def _final_norms(model):
    paths = {key: key.split(".") for key, _ in model.named_modules()}
    names = {"norm", "neck"}
    return [model.get_submodule(k) for k, p in paths.items() if len(p) <= 2 and names & {*p}]


def _as_nchw(out, shape):
    if out.ndim == 4:
        return [out, out.permute(0, 3, 1, 2)]
    if out.ndim == 3 and out.shape[1] >= shape[2] * shape[3]:
        tokens = out[:, out.shape[1] - shape[2] * shape[3] :]
        return [tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *shape[2:])]
    return []


def check_positions(backbone):
    """Brightening a quarter of the picture changes that quarter of the map most.

    Tried at the first tap of the chosen size, which is laid out as the chosen one: the last layers
    of a random transformer spread a change everywhere.
    """
    size = backbone.map_size
    backbone.tap = next(t.index for t in backbone.taps if (t.height, t.width) == size)
    features = backbone(quarters_brightened()).features
    change = (features[1:] - features[:1]).abs().mean(1)
    h, w = size[0] // 2, size[1] // 2
    top, bottom, left, right = slice(h), slice(-h, None), slice(w), slice(-w, None)
    cells = [(top, left), (top, right), (bottom, left), (bottom, right)]
    table = torch.stack([change[:, r, c].mean((1, 2)) for r, c in cells], dim=1)
    assert table.argmax(1).tolist() == [0, 1, 2, 3], table


@torch.no_grad()
def check_everything(name):
    backbone = calibrated(name)
    check_contract(backbone)
    check_tapped_layer(backbone, name)
    check_positions(backbone)


def test_example():
    backbone = Backbone("resnet18", map_size=14)
    assert (backbone.tap, backbone.map_size, backbone.reduction) == (2, (14, 14), 8.0)
    images = torch.rand(2, 3, 112, 112)
    output = backbone.eval()(images)
    x = backbone.model.conv1((images - backbone.pixels.mean) / backbone.pixels.std)
    x = backbone.model.maxpool(backbone.model.act1(backbone.model.bn1(x)))
    features = backbone.model.layer2(backbone.model.layer1(x))
    torch.testing.assert_close(output.features, features)
    pooled = backbone.model.layer4(backbone.model.layer3(features)).mean((2, 3))
    torch.testing.assert_close(output.global_vector, pooled)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    check_everything(name)


@pytest.mark.slow
@pytest.mark.parametrize("module", SURVEY.MODELS)
def test_every_module(module):
    name = SURVEY.MODELS[module]
    page = SURVEY.PAGE.read_text(encoding="utf-8")
    row = SURVEY.survey(module, name)
    if SURVEY.versions() in page:
        assert row.text in page.splitlines(), "docs/backbones.md is stale: docs/backbones.py"
    if row.works:
        check_everything(name)
    else:
        assert "use image_size=" in row.text


@pytest.mark.slow
def test_every_module_is_listed():
    missing = set(timm.list_modules()) - set(SURVEY.MODELS)
    assert not missing, f"add one small model of each to docs/backbones.py: {sorted(missing)}"
    for module, name in SURVEY.MODELS.items():
        assert name in timm.list_models(module=module)


def test_normalisation_is_timms():
    """Bit for bit what timm.data.create_transform does, with each model's own constants."""
    pictures = torch.randint(0, 256, (3, 112, 112), dtype=torch.uint8)
    image = Image.fromarray(pictures.permute(1, 2, 0).numpy())
    seen = set()
    for name in ("resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "mambaout_femto"):
        backbone = Backbone(name)
        config = timm.data.resolve_data_config(model=backbone.model)
        config.update(input_size=(3, 112, 112), crop_pct=1.0)
        expected = timm.data.create_transform(**config)(image)
        assert torch.equal(backbone.pixels(pictures[None])[0], expected)
        assert torch.equal(backbone.pixels(pictures[None] / 255)[0], expected)
        seen.add(tuple(config["mean"]))
    assert len(seen) > 1  # the models do differ


def test_final_norm_and_prefix_tokens():
    """The last map of a ViT is its own normalised patch tokens, row by row."""
    for name, prefix in (("vit_tiny_patch16_224", 1), ("deit_tiny_distilled_patch16_224", 2)):
        backbone = Backbone(name).eval()
        images = torch.rand(2, 3, 112, 112)
        tokens = backbone.model.forward_features(backbone.pixels(images))  # ends with the norm
        grid = tokens[:, prefix:].reshape(2, 7, 7, -1).permute(0, 3, 1, 2)
        torch.testing.assert_close(backbone(images).features, grid)


@pytest.mark.parametrize(
    ("name", "wanted", "tap", "size"),
    [
        ("resnet18", 28, 1, 28),
        ("resnet18", 56, 0, 56),
        ("resnet18", 20, 1, 28),  # 14 and 28 are 1.43 and 1.4 times away
        ("resnet18", 1, 4, 4),
        ("inception_next_atto", 3, 3, 3),
        ("vit_tiny_patch16_224", 28, 11, 7),  # one size: the last block
        ("mobilenetv3_small_050", (14, 14), 2, 14),
    ],
)
def test_map_size_chooses_the_tap(name, wanted, tap, size):
    backbone = Backbone(name, map_size=wanted)
    assert (backbone.tap, backbone.map_size) == (tap, (size, size))
    assert backbone(torch.rand(1, 3, 112, 112)).features.shape[-2:] == (size, size)


def test_default_is_a_quarter_of_the_side():
    assert Backbone("resnet18").map_size == (28, 28)
    tall = Backbone("resnet18", image_size=(256, 128))
    assert (tall.map_size, tall.reduction) == ((64, 32), 4.0)
    assert tall(torch.rand(1, 3, 256, 128)).features.shape == (1, 64, 64, 32)


def test_negative_tap_counts_from_the_end():
    assert Backbone("resnet18", tap=-1).tap == Backbone("resnet18", tap=4).tap == 4


def test_building_leaves_no_trace():
    """The probing forward changes neither weights, buffers, modes nor the random state."""
    for name in ("resnet18", "mvitv2_tiny"):  # the second is built twice
        torch.manual_seed(3)
        plain = timm.create_model(name, num_classes=0)
        state = torch.get_rng_state()
        torch.manual_seed(3)
        backbone = Backbone(name)
        assert torch.equal(torch.get_rng_state(), state)
        for key, value in plain.state_dict().items():
            assert torch.equal(backbone.model.state_dict()[key], value), key
    model = timm.create_model("resnet18").train()
    model.layer2.eval()
    modes = [module.training for module in model.layer2.modules()]
    state, buffers = torch.get_rng_state(), [b.clone() for b in model.buffers()]
    backbone = Backbone(model)
    assert backbone.model is model
    assert model.training
    assert not any(modes)
    assert [module.training for module in model.layer2.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_classifier_is_dropped_and_gradients_reach_all_weights():
    args = {"zero_init_last": False}  # else the residual branches have no gradient at first
    for backbone in (
        Backbone("resnet18", args=args),
        Backbone(timm.create_model("resnet18", num_classes=7, **args)),
    ):
        vector, features = backbone(torch.rand(2, 3, 112, 112))
        (vector.square().sum() + features.square().sum()).backward()
        assert "model.fc.weight" not in backbone.state_dict()
        for name, parameter in backbone.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_one_forward_pass():
    backbone = Backbone("resnet18")
    calls = []
    backbone.model.layer4.register_forward_hook(lambda *_: calls.append(1))
    backbone(torch.rand(1, 3, 112, 112))
    assert len(calls) == 1


def test_other_picture_sizes_where_the_model_takes_them():
    assert Backbone("resnet18")(torch.rand(1, 3, 96, 128)).features.shape == (1, 64, 24, 32)
    dynamic = Backbone("vit_tiny_patch16_224", args={"dynamic_img_size": True})
    assert dynamic(torch.rand(1, 3, 96, 128)).features.shape == (1, 192, 6, 8)


def test_config_rebuilds_the_backbone():
    for backbone in (
        Backbone("vit_tiny_patch16_224", tap=5, image_size=(128, 64), input="normalized"),
        Backbone(timm.create_model("resnet18", output_stride=8), map_size=14),
    ):
        config = json.loads(json.dumps(backbone.config()))
        again = Backbone.from_config(config)
        again.load_state_dict(backbone.state_dict(), strict=True)
        assert again.config() == config
        assert (again.taps, again.tap) == (backbone.taps, backbone.tap)
        assert repr(again) == repr(backbone)
        images = torch.rand(1, 3, *backbone.image_size)
        for a, b in zip(again.eval()(images), backbone.eval()(images), strict=True):
            assert torch.equal(a, b)
    assert Backbone("vit_tiny_patch16_224").architecture == {
        "name": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "args": {"num_classes": 0, "img_size": 112},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "hf-hub:owner/name"}, "name a model of timm's registry, .*; got 'hf-hub:owner/"),
        ({"model": "local-dir:/folder"}, "name a model of timm's registry, .*; got 'local-dir:/f"),
        ({"model": "owner/name"}, "timm knows no 'owner/name'"),
        ({"model": 3}, "name a model of timm's registry, .*; got 3: pass that to Backbone in code"),
        (
            {"args": {"pretrained": True}},
            "must not say where weights come from, .* hold pretrained:",
        ),
        (
            {"args": {"checkpoint_path": "a.pth"}},
            "args hold checkpoint_path: remove that, or build",
        ),
        (
            {"args": {"pretrained_cfg": {"url": "a"}, "cache_dir": "b"}},
            "pretrained_cfg, cache_dir:",
        ),
        ({"args": {"pretrained_cfg_overlay": {"file": "a"}}}, "args hold pretrained_cfg_overlay: "),
        ({"args": ["pretrained"]}, r"the config of Backbone must hold args by name; got \['pretr"),
        (
            {"pretrained": True},
            "must hold args, image_size, input, model, tap; got .*, pretrained,",
        ),
    ],
)
def test_a_config_reads_and_downloads_nothing(change, message, monkeypatch):
    """One from elsewhere is refused before timm builds, and so reads, anything."""
    config = {**Backbone("resnet18").config(), **change}
    asked = []
    monkeypatch.setattr(timm, "create_model", lambda *args, **_: asked.append(args))
    with pytest.raises(ValueError, match=message) as caught:
        Backbone.from_config(config)
    assert "\n" not in str(caught.value)
    assert asked == []


def test_where_weights_came_from_is_not_saved(tmp_path):
    """What is saved rebuilds the model from timm's registry alone, or saving is refused."""
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet18").state_dict(), weights)
    args = {"checkpoint_path": str(weights), "num_classes": 1000, "drop_rate": 0.1}
    backbone = Backbone("resnet18", args=args)
    config = backbone.config()
    assert config["args"] == {"num_classes": 1000, "drop_rate": 0.1}
    loaded = torch.load(weights, weights_only=True)
    assert torch.equal(backbone.model.conv1.weight, loaded["conv1.weight"])
    again = Backbone.from_config(config)
    again.load_state_dict(backbone.state_dict(), strict=True)

    folder = tmp_path / "model"
    folder.mkdir()
    described = {"architecture": "resnet18", "model_args": {"output_stride": 16}}
    described["pretrained_cfg"] = dict(Backbone("resnet18").model.pretrained_cfg)
    (folder / "config.json").write_text(json.dumps(described))
    torch.save(timm.create_model("resnet18").state_dict(), folder / "pytorch_model.bin")
    backbone = Backbone(f"local-dir:{folder}")
    assert [t.height for t in backbone.taps] == [56, 28, 14, 7, 7]
    again = Backbone.from_config(backbone.config())
    assert again.taps == backbone.taps
    again.load_state_dict(backbone.state_dict(), strict=True)

    overlay = {"pretrained_cfg_overlay": {"input_size": (1, 224, 224)}}
    with pytest.raises(ValueError, match="cannot run on 112 x 112 pictures"):  # one channel
        Backbone("resnet18", args=overlay)


def test_one_picture_in_training():
    """BatchNorm over single numbers is named, and not taken for a wrong size."""
    for name, built, size in (
        ("resnet18", 32, 32),  # its last map is one cell
        ("resnet18", 64, 32),
        ("mobilenetv4_conv_small_050", 112, 112),  # standardises its vector
    ):
        backbone = Backbone(name, image_size=built).train()
        backbone(torch.rand(2, 3, size, size))
        backbone.eval()(torch.rand(1, 3, size, size))
        with pytest.raises(
            ValueError,
            match=r"images must hold at least two pictures in training, over which a BatchNorm of "
            rf"{name}\S* standardises; got a batch of 1: call .eval\(\), or leave out",
        ) as caught:
            backbone.train()(torch.rand(1, 3, size, size))
        assert "\n" not in str(caught.value)


def test_instances_that_timm_cannot_rebuild():
    changed = timm.create_model("resnet18")
    changed.layer1 = nn.Identity()
    own = timm.create_model("resnet18", norm_layer=nn.BatchNorm2d)  # a class is no JSON
    for model in (changed, own):
        backbone = Backbone(model)
        assert backbone.architecture is None
        with pytest.raises(ValueError, match=r"register it with timm\.models\.register_model"):
            backbone.config()


class TwoTaps(nn.Module):
    """The least that another library's model must offer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(4, 6, 2, 2)

    def forward_intermediates(self, x, indices=None, norm=False, output_fmt="NCHW"):
        assert not norm, "no norm here"
        maps = [self.first(x)]
        maps.append(self.second(maps[0]))
        return maps[1], [maps[i] for i in (indices or (0, 1))]

    def forward_head(self, x, pre_logits=False):
        return x.mean((2, 3))


def test_pretrained_weights_are_loaded_once_the_arguments_are_known(monkeypatch):
    """Nothing is downloaded here: a stand-in writes down what timm is asked for."""
    asked, create = [], timm.create_model

    def stand_in(name, pretrained=False, **args):
        asked.append((name, pretrained, args))
        model = create(name, **args)
        if pretrained:
            nn.init.constant_(model.norm.bias, 7.0)
        return model

    monkeypatch.setattr(timm, "create_model", stand_in)
    backbone = Backbone("vit_tiny_patch16_224", pretrained=True)
    arguments = {"num_classes": 0, "img_size": 112}
    assert asked == [("vit_tiny_patch16_224", loaded, arguments) for loaded in (False, True)]
    assert backbone.model.norm.bias.eq(7.0).all()

    def offline(name, pretrained=False, **args):
        if pretrained:
            raise OSError("no network")
        return create(name, **args)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match="no network"):  # never taken for a refused size
        Backbone("vit_tiny_patch16_224", pretrained=True)


def test_model_of_another_library():
    model = TwoTaps()
    backbone = Backbone(model, input="normalized")
    output = backbone(torch.randn(2, 3, 112, 112))
    assert output.features.shape == (2, 4, 28, 28)
    assert output.global_vector.shape == (2, 6)
    with pytest.raises(ValueError, match=r"TwoTaps has no pretrained_cfg with mean and std"):
        Backbone(model)
    model.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    assert Backbone(model).pixels.std.flatten().tolist() == [0.25] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(model="resnt18"), ValueError, "timm knows no 'resnt18': did you mean resnet18"),
        (dict(model="~"), ValueError, r"timm knows no '~': timm.list_models\(\) lists them"),
        (dict(model="resnet18.nobody"), ValueError, r"Invalid pretrained tag \(nobody\)"),
        (
            dict(model="resnet18", args={"colour": 1}),
            ValueError,
            "timm cannot build resnet18 with {'colour': 1}: TypeError: .* argument 'colour'",
        ),
        (
            dict(model="resnet18", tap=5),
            ValueError,
            r"tap 5 is out of range: resnet18\S* has 5 taps \(0: 64 channels at 56 x 56, 1: ",
        ),
        (dict(model="resnet18", tap=-6), ValueError, "tap -6 is out of range"),
        (dict(model="resnet18", tap=1, map_size=28), ValueError, "pass tap or map_size, not both"),
        (
            dict(model="iresnet_of_mine"),
            ValueError,
            r"timm knows no 'iresnet_of_mine': .* \(a model of your own is known once the file",
        ),
        (
            dict(model="resnet18", args={"pretrained": True}),
            ValueError,
            "args must not hold 'pretrained': pass pretrained=True beside them",
        ),
        (dict(model="resnet18", image_size=0), ValueError, "image_size must be a positive int"),
        (dict(model="resnet18", map_size=-7), ValueError, "map_size must be a positive int"),
        (dict(model="resnet18", input="raw"), ValueError, "input must be 'pixels'"),
        (
            dict(model="coatnet_pico_rw_224"),
            ValueError,
            r"coatnet_pico_rw_224 cannot run on 112 x 112 pictures \(.*\): "
            r"use image_size=96 or 128 or 224$",
        ),
        (
            dict(model="hrnet_w18_small", image_size=100),
            ValueError,
            r"cannot run on 100 x 100 pictures \(.*\): use image_size=96 or 128 or 224$",
        ),
        (
            dict(model=nn.Linear(2, 2)),
            TypeError,
            "Linear has no forward_intermediates and no forward_head: pass a model of",
        ),
        (
            dict(model=TwoTaps(), pretrained=True),
            ValueError,
            "pretrained and args build a model from its name",
        ),
    ],
)
def test_errors(arguments, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        Backbone(**arguments)
    assert "\n" not in str(caught.value)
    if "cannot run" in message:  # several sizes were tried
        assert torch.equal(torch.get_rng_state(), state)


def test_instance_of_another_size():
    with pytest.raises(ValueError, match=r"use image_size=224, or pass the model's name"):
        Backbone(timm.create_model("vit_tiny_patch16_224"))


def test_pictures_of_a_size_the_model_cannot_take():
    backbone = Backbone("vit_tiny_patch16_224")
    with pytest.raises(
        ValueError,
        match=r"images are 128 x 96, but vit_tiny\S* was built for 112 x 112 and cannot take "
        r"them \(.*\): resize them, or build the backbone with image_size=\(128, 96\)",
    ):
        backbone(torch.rand(1, 3, 128, 96))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend):
    """In a process of its own, where annotations are not checked at run time."""
    script = """
import sys, torch
from partlocal.backbone import Backbone
assert "timm" not in sys.modules, "importing partlocal.backbone alone loads timm"
torch.manual_seed(0)
backbone = Backbone("resnet18").eval()
images = torch.rand(2, 3, 112, 112)
compiled = torch.compile(backbone, fullgraph=True, backend=sys.argv[1])
for a, b in zip(compiled(images), backbone(images), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
exported = torch.export.export(backbone, (images,)).module()
for a, b in zip(exported(images), backbone(images), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, backend],
        capture_output=True,
        text=True,
        check=False,
        cwd=DOCS.parent.parent,
    )
    assert run.returncode == 0, run.stderr[-2000:]
