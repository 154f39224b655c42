"""Descriptors of every arm, and the numbers on them, against formulas and loops."""

import copy
import itertools

import numpy as np
import pytest
import torch
from arms import arm_vectors, measure, score_pairs
from data.faces import TestSet as Faces
from describe import Described, describe
from energy import energy_shares
from model import GlobalNet, TrainedFSENet
from protocols.pairs import draw_pairs
from torch.nn import functional as F
from workplace import Workplace

from partlocal import HELEN, ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS

PARTS = HELEN.select(*FSENET_PARTS)
PLACE = Workplace(None, torch.device("cpu"))
STRANGERS = torch.tensor([1, 2, 3, 4, 0])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    parser = ParsingNet(HELEN, 8, 1, grid=32)
    net = PartLocalNet("resnet10t", parser, FSENET_PARTS, local_weight=0.6)
    images = torch.randint(0, 256, (8, 3, 112, 112), dtype=torch.uint8)
    for _ in range(3):  # BatchNorms that have seen pictures
        net.train().forward_parts(images)
    return net.eval()


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (5, 3, 112, 112), dtype=torch.uint8, generator=rng)


@pytest.fixture(scope="module")
def mean_maps(net):
    rng = torch.Generator().manual_seed(2)
    return torch.rand(len(PARTS), *net.backbone.map_size, generator=rng)


@pytest.fixture(scope="module")
def described(net, images, mean_maps):
    return describe(net, images, PLACE, mean_maps=mean_maps, strangers=STRANGERS, batch_size=2)


@pytest.fixture
def choosy(net, images):
    """The same network where the parts below a visibility, a third of these, are absent."""
    with torch.inference_mode():
        visibility = torch.cat([net.parse(view)[1] for view in (images, images.flip(-1))])
    pool, before = net.branch.pool, net.branch.pool.min_visibility
    pool.min_visibility = visibility.quantile(1 / 3).item()
    yield net
    pool.min_visibility = before


def unit(rng, n, d):
    return F.normalize(torch.from_numpy(rng.normal(size=(n, d))).float(), dim=1)


def test_the_joined_score():
    """(g + w^2 l) / (1 + w^2), g and l the cosines of the halves."""
    rng = np.random.default_rng(0)
    faces = Described(unit(rng, 6, 8), unit(rng, 6, 20), {"x": unit(rng, 6, 20)}, 0.6)
    arms = arm_vectors(faces, Described(unit(rng, 6, 8), None, {}, 0.0))
    pairs = draw_pairs(np.repeat(np.arange(2), 3), 6, 0, folds=1)
    scores = {name: score_pairs(vectors, pairs) for name, vectors in arms.items()}
    joined = (scores["joint: global half"] + 0.36 * scores["joint: local half"]) / 1.36
    np.testing.assert_allclose(scores["joint: both"], joined, atol=1e-6)
    assert list(arms) == [
        "global only",
        "joint: global half",
        "joint: local half",
        "joint: both",
        "control: x",
    ]
    a, b = pairs.first[0], pairs.second[0]
    own = (faces.global_half[a] @ faces.global_half[b]).item()
    control = (faces.controls["x"][a] @ faces.controls["x"][b]).item()
    np.testing.assert_allclose(scores["control: x"][0], (own + 0.36 * control) / 1.36, atol=1e-6)
    assert not torch.equal(arms["global only"], arms["joint: global half"])
    assert next(iter(arm_vectors(faces, faces, faces))) == "untrained"


@torch.inference_mode()
def test_describe(net, images, described):
    """Both views, each half a unit vector, concatenated: a loop over single pictures."""
    halves = {"global": [], "local": []}
    for image in images:
        views = [net.forward_parts(view[None]) for view in (image, image.flip(-1))]
        for name, parts in halves.items():
            joined = torch.cat([getattr(v, f"{name}_vector")[0] for v in views])
            parts.append(joined / joined.norm())
    torch.testing.assert_close(
        described.global_half, torch.stack(halves["global"]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        described.local_half, torch.stack(halves["local"]), atol=1e-4, rtol=0
    )
    assert described.local_weight == 0.6
    mirrored = describe(net, images.flip(-1), PLACE)
    half = described.global_half.shape[1] // 2
    turned = torch.cat([mirrored.global_half[:, half:], mirrored.global_half[:, :half]], 1)
    torch.testing.assert_close(turned, described.global_half, atol=1e-5, rtol=0)
    assert mirrored.controls == {}


@torch.inference_mode()
def test_controls(net, images, mean_maps, described):
    """Each control is the local half under the maps that its name says, mirrored with a swap."""

    def local(maps_of):
        rows = []
        for index in range(len(images)):
            views = []
            for mirror in (False, True):
                view = images[index].flip(-1) if mirror else images[index]
                maps = maps_of(index, mirror)
                views.append(net.branch(net.backbone(view[None]).features, maps[None]).vector[0])
            rows.append(F.normalize(torch.cat(views), dim=0))
        return torch.stack(rows)

    left, right = (PARTS.names.index(n) for n in ("left_eye", "right_eye"))

    def mean(_, mirror):
        maps = PARTS.flip(mean_maps) if mirror else mean_maps
        assert not mirror or torch.equal(maps[left], mean_maps[right].flip(-1))
        return maps

    def another(index, mirror):
        view = images[STRANGERS[index]]
        return net.parse((view.flip(-1) if mirror else view)[None])[0][0]

    def uniform(_, __):
        return torch.ones_like(mean_maps)

    expected = {"mean maps": mean, "another person's maps": another, "uniform maps": uniform}
    assert set(described.controls) == set(expected)
    for name, maps_of in expected.items():
        torch.testing.assert_close(described.controls[name], local(maps_of), atol=1e-4, rtol=0)
    every = [described.local_half, *described.controls.values()]
    for a, b in itertools.combinations(every, 2):
        assert (a - b).norm(dim=1).min() > 1e-3, "a control is the same as another"

    # without the mean of a training set, which a streamed one has not, the others are there
    some = describe(net, images, PLACE, strangers=STRANGERS)
    assert set(some.controls) == set(expected) - {"mean maps"}


@torch.inference_mode()
def test_visibility_is_the_parsers(choosy, images):
    """What is described is `net(images)`, whose absent parts the maps alone do not tell."""
    found = describe(choosy, images, PLACE, strangers=STRANGERS)
    expected, another = [], []
    for pictures in (images, images.flip(-1)):
        whole = choosy.forward_parts(pictures)
        maps, seen = choosy.parse(pictures[STRANGERS])
        features = choosy.backbone(pictures).features
        expected.append(whole.local_vector)
        another.append(choosy.branch(features, maps, seen).vector)
        assert not torch.allclose(whole.local_vector, choosy.branch(features, whole.maps).vector)
        assert (whole.parts == 0).all(2).any(), "all parts are there"
    for half, views in (
        (found.local_half, expected),
        (found.controls["another person's maps"], another),
    ):
        joined = F.normalize(torch.cat(views, 1), dim=1)
        torch.testing.assert_close(half, joined, atol=1e-4, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_visibility_alone_changes_nothing(net, images, training):
    """With min_visibility = 0, the default, each bit is that of the maps' own peaks."""
    with torch.no_grad():
        maps, seen = net.parse(images)
        features = net.backbone(images).features
        assert not torch.equal(seen, maps.amax((2, 3)))
        branches = [copy.deepcopy(net.branch).train(training) for _ in range(2)]
        a, b = branches[0](features, maps), branches[1](features, maps, seen)
    assert torch.equal(a.vector, b.vector)
    assert torch.equal(a.parts, b.parts)
    for x, y in zip(branches[0].buffers(), branches[1].buffers(), strict=True):
        assert torch.equal(x, y)


def test_the_loss_is_that_of_the_visible_parts(choosy, images):
    """Training with cached maps is training with the parser, where parts are absent too."""
    torch.manual_seed(0)
    trained = TrainedFSENet(choosy, 5, 0.1, 16.0).eval()
    identities = torch.arange(5)
    with torch.no_grad():
        maps, seen = choosy.parse(images)
        ready = trained(images, maps, identities, seen)
        assert ready == trained(images, None, identities)
        assert ready.local_loss != trained(images, maps, identities).local_loss


@torch.inference_mode()
def test_the_sum_of_both_views(net, images):
    """Eq. 5's other reading: half as many numbers, and a mirrored picture is the same."""
    found = describe(net, images, PLACE, test_time="sum", strangers=STRANGERS)
    views = [net.forward_parts(v) for v in (images, images.flip(-1))]
    for name in ("global", "local"):
        added = sum(getattr(v, f"{name}_vector") for v in views)
        half = getattr(found, f"{name}_half")
        torch.testing.assert_close(half, F.normalize(added, dim=1), atol=1e-4, rtol=0)
    mirrored = describe(net, images.flip(-1), PLACE, test_time="sum")
    torch.testing.assert_close(mirrored.local_half, found.local_half, atol=1e-5, rtol=0)
    torch.testing.assert_close(mirrored.global_half, found.global_half, atol=1e-5, rtol=0)
    assert found.controls["uniform maps"].shape == found.local_half.shape
    alone = GlobalNet(net.backbone).eval()
    added = describe(alone, images, PLACE, test_time="sum").global_half
    torch.testing.assert_close(added, F.normalize(alone(images) + alone(images.flip(-1)), dim=1))


def test_the_global_network(images):
    torch.manual_seed(0)
    net = GlobalNet(Backbone("resnet10t")).eval()
    found = describe(net, images, PLACE, batch_size=3)
    assert found.local_half is None
    with torch.inference_mode():
        views = torch.cat([net(images), net(images.flip(-1))], 1)
    torch.testing.assert_close(found.global_half, F.normalize(views, dim=1), atol=1e-5, rtol=0)


def test_a_network_without_a_parser_is_refused(images):
    net = PartLocalNet("resnet10t", None, ("nose", "hair"))
    with pytest.raises(ValueError, match="the network has no parser, and these pictures bring no"):
        describe(net, images, PLACE)


def faces(people=20, samples=4, seed=0):
    identities = np.repeat(np.arange(people), samples)
    pairs = draw_pairs(identities, 12, seed)
    names = tuple(f"{i}/{k}" for i in range(people) for k in range(samples))
    return Faces(torch.zeros(len(names), 3, 1, 1, dtype=torch.uint8), names, pairs, {})


def test_measure():
    """AUC and rank 1 against loops; a perfect arm is perfect, a random one is not."""
    test, rng = faces(), np.random.default_rng(0)
    who = torch.from_numpy(test.pairs.identities)
    perfect = F.one_hot(who, 20).float()
    arms = {
        "joint: both": perfect,
        "global only": F.normalize(perfect + 2 * unit(rng, 80, 20), dim=1),
        "control: mean maps": unit(rng, 80, 20),
    }
    numbers, tests, scores = measure(arms, test)
    assert numbers["joint: both"]["accuracy"] == numbers["joint: both"]["rank_1"] == 1
    assert (
        numbers["joint: both"]["auc"] == numbers["joint: both"]["tar_at_far"]["strict"]["0.01"] == 1
    )
    assert numbers["control: mean maps"]["accuracy"] < 0.7
    for name, vectors in arms.items():
        same, s = test.pairs.same, scores[name]
        wins = [(g > i) + 0.5 * (g == i) for g in s[same] for i in s[~same]]
        assert numbers[name]["auc"] == pytest.approx(np.mean(wins), abs=1e-6)
        hits = []
        for probe in range(80):
            if probe % 4:  # the first picture of everybody is enrolled
                hits.append(int((vectors[::4] @ vectors[probe]).argmax()) == probe // 4)
        assert numbers[name]["rank_1"] == pytest.approx(np.mean(hits))
        share = numbers[name]["accuracy"]
        error = np.sqrt(share * (1 - share) / len(same))
        assert numbers[name]["standard_error"] == pytest.approx(error, abs=1e-6)
        assert numbers[name]["auc_interval"][0] <= numbers[name]["auc"]
    assert [(t["a"], t["b"]) for t in tests] == [
        ("joint: both", "global only"),
        ("joint: both", "control: mean maps"),
    ]
    gain = 1 - numbers["control: mean maps"]["accuracy"]
    assert tests[1]["difference"] == pytest.approx(gain)


# what the report shows
ENERGY = {"features", "distances", "cosines", "impostor_cosine_mean", "impostor_cosine_std"}
ENERGY |= {"standardized_impostor_cosine_mean", "standardized_impostor_cosine_std"}


def test_energy(net, images):
    """Shares sum to one and are those of a loop over the columns of every part's row."""
    found = energy_shares(net, images, STRANGERS, PLACE)
    assert set(found) == ENERGY
    with torch.inference_mode():
        described = net.forward_parts(images)
        plain = net.branch.correlation(described.parts, described.visibility)
    k = len(PARTS)
    width = plain.shape[2] - 2 * (k - 1)
    sums = dict.fromkeys(("features", "distances", "cosines"), 0.0)
    for n, part, column in itertools.product(*(range(size) for size in plain.shape)):
        kind = "features"
        if column >= width:
            kind = "distances" if (column - width) % 2 == 0 else "cosines"
        sums[kind] += plain[n, part, column].item() ** 2
    for name, value in sums.items():
        assert found[name] == pytest.approx(value / sum(sums.values()), rel=1e-3)
    # a distance is at least 0 and a cosine between -1 and 1, wherever the layer puts them
    assert plain[:, :, width::2].min() >= 0
    assert plain[:, :, width + 1 :: 2].abs().max() <= 1 + 1e-5
    unit_ = F.normalize(plain.flatten(1), dim=1)
    cosines = torch.stack([unit_[i] @ unit_[j] for i, j in enumerate(STRANGERS.tolist())])
    assert found["impostor_cosine_mean"] == pytest.approx(cosines.mean().item(), abs=1e-4)
    assert found["impostor_cosine_std"] == pytest.approx(cosines.std().item(), abs=1e-4)
    numbers = plain.flatten(1).numpy()
    spread = np.maximum(numbers.std(0, ddof=1), 1e-5)
    normed = F.normalize(torch.from_numpy((numbers - numbers.mean(0)) / spread), dim=1)
    cosines = (normed * normed[STRANGERS]).sum(1).mean().item()
    assert found["standardized_impostor_cosine_mean"] == pytest.approx(cosines, abs=1e-3)
    assert sum(found[name] for name in sums) == pytest.approx(1, abs=1e-5)
