import json

import jaxtyping
import pytest
import timm
import torch
from torch import nn

from partlocal import HELEN, LocalBranch, LogitsAdapter, ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS
from partlocal.local import LocalOptions

PARTS = ("skin", "left_eye", "right_eye", "nose", "upper_lip", "lower_lip")


def small_parser() -> ParsingNet:
    return ParsingNet(HELEN, width=8, num_stacks=1, grid=32)


def small_net(**options) -> PartLocalNet:
    torch.manual_seed(0)
    return PartLocalNet("resnet10t", small_parser(), FSENET_PARTS, **options).eval()


@pytest.fixture(scope="module")
def net() -> PartLocalNet:
    return small_net()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(1))


def test_example(net, images):
    """The numbers of the descriptor, put together by hand from the layers below."""
    found = net.forward_parts(images)
    tapped = net.backbone(images)
    assert found.descriptor.shape == (3, 512 + 6 * (64 + 10))
    torch.testing.assert_close(found.norm, tapped.global_vector.norm(dim=1))
    torch.testing.assert_close(
        found.global_vector, tapped.global_vector / tapped.global_vector.norm(dim=1, keepdim=True)
    )
    torch.testing.assert_close(found.local_vector.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(found.descriptor[:, :512], found.global_vector)
    torch.testing.assert_close(found.descriptor[:, 512:], 0.6 * found.local_vector)
    skin = (tapped.features * found.maps[:, :1]).sum((2, 3)) / found.maps[:, :1].sum((2, 3))
    torch.testing.assert_close(found.parts[:, 0], skin)
    torch.testing.assert_close(net(images), found.descriptor)


def test_ready_maps_take_the_place_of_the_parser(net, images):
    maps, _ = net.parse(images)
    torch.testing.assert_close(net(images, maps=maps), net(images))
    finer = maps.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(net(images, maps=finer), net(images), atol=1e-5, rtol=1e-5)
    bare = PartLocalNet("resnet10t", None, PARTS).eval()
    assert bare(images, maps=maps).shape == (3, 956)
    with pytest.raises(ValueError, match="has no parser: call it with maps="):
        bare(images)


def test_mirrored_pairs_are_as_similar_as_the_pairs(net, images):
    """Both views of a picture joined: a mirror then changes nothing about a similarity."""

    def describe(x):
        return torch.cat([net(x), net(x.flip(-1))], 1)

    straight, mirrored = describe(images), describe(images.flip(-1))
    torch.testing.assert_close(
        straight[0] @ straight[1], mirrored[0] @ mirrored[1], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("options", "local_dim"),
    [
        ({"part_dim": 5}, 6 * 15),
        ({"map_size": 14}, 6 * (128 + 10)),
        ({"tap": 1}, 6 * (64 + 10)),
        ({"options": LocalOptions(branch_norm=None, pool="max", normalize=False)}, 6 * 74),
        ({"options": LocalOptions(correlation=False)}, 6 * 64),
    ],
)
def test_options_change_the_width_and_survive_saving(options, local_dim, tmp_path, images):
    net = small_net(global_dim=32, **options)
    assert (net.global_dim, net.local_dim) == (32, local_dim)
    net.save_pretrained(tmp_path)
    loaded = PartLocalNet.from_pretrained(tmp_path)
    assert not loaded.training
    torch.testing.assert_close(loaded(images), net(images), atol=0, rtol=0)
    assert loaded.config() == net.config()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_transformers(name):
    net = PartLocalNet(name, small_parser(), FSENET_PARTS, image_size=112).eval()
    assert torch.isfinite(net(torch.rand(2, 3, 112, 112))).all()


def test_both_networks_get_their_own_constants():
    """uint8 and [0, 1] floats of the same picture give the same descriptor."""
    net = small_net()
    pixels = torch.randint(0, 256, (2, 3, 112, 112), dtype=torch.uint8)
    torch.testing.assert_close(net(pixels), net(pixels.float() / 255))
    assert net.backbone.pixels.mean.flatten()[0] != net.parser.pixels.mean.flatten()[0]


@pytest.mark.filterwarnings("ignore:this ParsingNet is frozen but was never trained")
def test_gradients_reach_the_backbone_and_not_a_frozen_parser(images):
    net = small_net()
    net.parser.freeze()
    net.train()
    net(images).sum().backward()
    assert all(p.grad is None for p in net.parser.parameters())
    stem = next(net.backbone.model.parameters())
    assert stem.grad is not None
    assert stem.grad.abs().sum() > 0


def test_branch_norm_spreads_impostors():
    """Positive distances make all local vectors alike; standardising over a batch mends it."""
    torch.manual_seed(0)
    features, maps = torch.rand(64, 16, 7, 7), torch.rand(64, 6, 7, 7)

    def mean_cosine(norm):
        branch = LocalBranch(16, 6, norm=norm).train()
        vectors = branch(features, maps).vector
        cosines = vectors @ vectors.T
        return cosines[~torch.eye(64, dtype=torch.bool)].mean()

    assert mean_cosine(None) > 0.9
    assert mean_cosine("batch").abs() < 0.1


@pytest.mark.parametrize("training", [True, False])
def test_absent_parts_stay_out_of_the_local_vector(training):
    torch.manual_seed(0)
    branch = LocalBranch(5, 3).train(training)
    branch.standardize.running_mean.uniform_(-1, 1)
    features, maps = torch.rand(4, 5, 4, 4), torch.rand(4, 3, 4, 4)
    maps[1, 2] = 0  # picture 1 lacks part 2
    vector = branch(features, maps).vector.view(4, 3, 5 + 2 * 2)

    zero = vector == 0
    expected = torch.zeros_like(zero)
    expected[1, 2] = True  # part 2 itself
    expected[1, :2, 5 + 2 :] = True  # its pairs: the last of the two others of parts 0 and 1
    assert torch.equal(zero, expected)
    assert torch.allclose(vector.flatten(1).norm(dim=1), torch.ones(4))


@pytest.mark.parametrize("training", [True, False])
def test_without_relations_the_local_vector_is_that_of_the_parts(training):
    torch.manual_seed(0)
    branch = LocalBranch(5, 3, correlation=False).train(training)
    features, maps = torch.rand(4, 5, 4, 4), torch.rand(4, 3, 4, 4)
    maps[1, 2] = 0  # picture 1 lacks part 2
    found = branch(features, maps)

    parts = found.parts.double()
    expected = torch.zeros(4, 15, dtype=torch.double)
    for column in range(15):
        shown = [i for i in range(4) if maps[i, column // 5].any()]
        numbers = torch.stack([parts[i].flatten()[column] for i in shown])
        mean, variance = 0.0, 1.0
        if training:
            mean, variance = numbers.mean(), numbers.var(correction=0)
        for i, number in zip(shown, numbers, strict=True):
            expected[i, column] = (number - mean) / (variance + 1e-5) ** 0.5
    expected = torch.nn.functional.normalize(expected, dim=1).float()
    torch.testing.assert_close(found.vector, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_absent_parts_do_not_make_strangers_alike(share):
    """Complete faces stay apart however many others in the batch lack parts."""
    torch.manual_seed(0)
    features, maps = torch.rand(200, 16, 7, 7), torch.rand(200, 6, 7, 7)
    absent = torch.rand(200, 6) < share
    absent[:60] = False
    maps[absent] = 0
    vectors = LocalBranch(16, 6).train()(features, maps).vector[:60]
    cosines = vectors @ vectors.T
    assert cosines[~torch.eye(60, dtype=torch.bool)].mean().abs() < 0.1


def test_visibility_of_ready_maps(images):
    """Maps of the parser, passed on with their visibility, give what the parser's own gave."""
    torch.manual_seed(0)
    options = LocalOptions(min_visibility=0.2)  # some parts of an untrained parser are below it
    net = PartLocalNet("resnet10t", small_parser(), PARTS, map_size=28, options=options).eval()
    with torch.inference_mode():
        own = net.forward_parts(images)
        maps, visibility = net.parse(images)
        assert torch.equal(visibility, own.visibility)
        assert torch.equal(net(images, maps, visibility), own.descriptor)
        peaks = net.forward_parts(images, maps)
    torch.testing.assert_close(peaks.visibility, maps.amax((2, 3)))
    with pytest.raises(ValueError, match="visibility is that of ready maps: pass maps="):
        net(images, visibility=visibility)


def test_double_precision_stays():
    net = small_net().double().eval()
    with torch.inference_mode():
        found = net.forward_parts(torch.rand(2, 3, 112, 112, dtype=torch.float64))
    assert found.descriptor.dtype == found.local_vector.dtype == torch.float64
    assert found.norm.dtype == torch.float64


def test_saving_refuses_what_loading_could_not_rebuild(tmp_path):
    class Segmenter(nn.Module):
        def forward(self, x):
            return x.new_zeros(x.shape[0], 11, 32, 32)

    adapter = LogitsAdapter(Segmenter(), HELEN, mean=(0.5,) * 3, std=(0.5,) * 3, size=64)
    net = PartLocalNet("resnet10t", adapter, FSENET_PARTS)
    with pytest.raises(ValueError, match="save the network with parser=None"):
        net.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

    model = timm.create_model("resnet10t", num_classes=0)
    del model.pretrained_cfg["architecture"]
    model.pretrained_cfg.pop("tag", None)
    net = PartLocalNet(model, None, PARTS)
    with pytest.raises(ValueError, match="timm cannot rebuild from a name"):
        net.save_pretrained(tmp_path / "instance")
    assert not (tmp_path / "instance").exists()


def test_loading_is_strict(tmp_path):
    small_net().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["arguments"]["part_dim"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="saved from another architecture"):
        PartLocalNet.from_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    config["arguments"]["part_dim"] = None
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        PartLocalNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds PartLocalNet, not ParsingNet"):
        ParsingNet.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        PartLocalNet.from_pretrained(tmp_path / "..")


def test_errors(net, images, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the hook
    with pytest.raises(ValueError, match=r"maps must be \[b, k, h, w\] with b = 3 \(as images\)"):
        net(images, maps=torch.rand(2, 6, 28, 28))
    with pytest.raises(ValueError, match=r"k = 6 \(parts skin, left_eye"):
        net(images, maps=torch.rand(3, 5, 28, 28))
    with pytest.raises(ValueError, match="has no label 'beak'"):
        PartLocalNet("resnet10t", small_parser(), ("beak",))
    with pytest.raises(TypeError, match=r"parser must be a ParsingNet, .*; got a Conv2d: wrap it"):
        PartLocalNet("resnet10t", torch.nn.Conv2d(3, 11, 1), PARTS)
    with pytest.raises(
        ValueError, match=r"parts must be a list of names; got 'nose': pass \['nose'\]"
    ):
        PartLocalNet("resnet10t", small_parser(), "nose")
    with pytest.raises(ValueError, match="part_dim must be at least 1, or None; got 0"):
        PartLocalNet("resnet10t", small_parser(), PARTS, part_dim=0)
    with pytest.raises(ValueError, match="global_dim must be at least 1, or None; got -1"):
        PartLocalNet("resnet10t", small_parser(), PARTS, global_dim=-1)
    with pytest.raises(ValueError, match="local_weight must be a finite number; got nan"):
        PartLocalNet("resnet10t", small_parser(), PARTS, local_weight=float("nan"))
    with pytest.raises(ValueError, match="norm must be 'batch' or None; got 'layer'"):
        LocalBranch(8, 3, norm="layer")
    with pytest.raises(ValueError, match=r"features and maps must be \[b, 8, h, w\]"):
        LocalBranch(8, 3)(torch.rand(2, 9, 7, 7), torch.rand(2, 3, 7, 7))
    with pytest.raises(ValueError, match="got a batch of 1: call"):
        LocalBranch(8, 3)(torch.rand(1, 8, 7, 7), torch.rand(1, 3, 7, 7))
    with pytest.raises(ValueError, match="images must be floats in"):
        net(255 * images)
    with pytest.raises(ValueError, match="pass tap and map_size to it instead"):
        PartLocalNet(Backbone("resnet10t"), None, PARTS, tap=1)
