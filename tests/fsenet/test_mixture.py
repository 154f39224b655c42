"""Batches mixed of sets with labels of their own: how many of each, which, and their flips."""

import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from data.augment import NUMBERS, Augmentation
from data.batches import BatchPlan
from data.mixture import Ingredient, augment_step, mix, mixed_batches, open_mix
from data.procedural import render
from data.vocabularies import KINDS, Vocabulary
from PIL import Image
from torch.utils.data import TensorDataset

from partlocal.labels import CELEBAMASK_HQ_FARL, HELEN, IBUGMASK_14

OWN = Vocabulary(HELEN)


def ingredient(size, count, kind="helen", tag=0):
    """Pictures whose first pixel says who they are."""
    images = torch.full((size, 3, 4, 4), tag, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(size)
    targets = torch.arange(size).byte().view(-1, 1, 1).expand(-1, 4, 4) % 6
    return Ingredient(TensorDataset(images, targets), KINDS[kind], count)


SETS = [ingredient(40, 5, tag=1), ingredient(12, 2, "fasseg", 2), ingredient(9, 1, "lapa", 3)]


def steps(plan, first=0, sets=SETS):
    """For each step and set: who is there, and the first random number."""
    return [
        [
            (i[:, 0, 0, 0].tolist(), i[0, 1, 0, 0].item(), numbers[0, 0].item())
            for numbers, i, _ in step
        ]
        for step in mixed_batches(sets, plan, first)
    ]


def test_example():
    """Five, two and one of each step, every set shuffled by itself and none twice an epoch."""
    seen = steps(BatchPlan(8, 9, seed=3))
    assert len(seen) == 9
    for step in seen:
        assert [len(who) for who, _, _ in step] == [5, 2, 1]
        assert [tag for _, tag, _ in step] == [1, 2, 3]
    assert sorted(who for step in seen[:6] for who in step[1][0]) == [*range(12)]
    assert sorted(who for step in seen for who in step[2][0]) == [*range(9)]
    draws = [draw for step in seen for _, _, draw in step]
    assert len(set(draws)) == len(draws)  # nothing is drawn twice


def test_a_function_of_seed_and_step():
    plan = BatchPlan(8, 9, seed=3)
    straight = steps(plan)
    assert steps(plan) == straight
    assert steps(replace(plan, seed=4)) != straight
    for first in (1, 4, 8):
        assert steps(plan, first) == straight[first:]
    # alone, the first set is what it is without a mixture
    alone = steps(replace(plan, batch_size=5), 0, SETS[:1])
    assert [step[:1] for step in straight] == alone


def test_ranks_share_every_set():
    sets = [ingredient(40, 6), ingredient(12, 2, "fasseg")]
    plan = BatchPlan(8, 5, seed=1)
    together = steps(plan, 0, sets)
    apart = [steps(replace(plan, rank=rank, world=2), 0, sets) for rank in range(2)]
    for whole, *halves in zip(together, *apart, strict=True):
        for number in range(2):
            mine = [who for half in halves for who in half[number][0]]
            assert sorted(mine) == sorted(whole[number][0])
            assert len(halves[0][number][0]) == len(halves[1][number][0])


def test_flips():
    """Each set swaps its own left and right: by hand for a viewer's, an odd and a soft set."""
    still, flip = Augmentation(flip=0), Augmentation(flip=1)
    left, right = (CELEBAMASK_HQ_FARL.index(f"{side}_brow") for side in ("left", "right"))
    celeba = torch.tensor([[[left, 0, 255, 18]]], dtype=torch.uint8)
    fasseg = torch.tensor([[[3, 0, 5, 1]]], dtype=torch.uint8)
    soft = torch.zeros(1, 11, 1, 4, dtype=torch.uint8)
    soft[0, HELEN.index("left_eye"), 0, 0] = 204
    soft[0, HELEN.index("skin"), 0, 0] = 51
    image = torch.zeros(1, 3, 1, 4, dtype=torch.uint8)
    image[..., 0] = 255
    targets = {"celebamask-hq-farl": celeba, "fasseg": fasseg, "helen": soft}
    sets = [Ingredient(TensorDataset(), KINDS[kind], 1) for kind in targets]
    step = [(torch.rand(NUMBERS, 1), image, target) for target in targets.values()]

    pictures, *same = augment_step(sets, step, still)
    assert torch.equal(pictures[1] * 255, image[0].float())
    assert torch.equal(same[0], celeba)
    pictures, one, two, three = augment_step(sets, step, flip)
    assert pictures.shape == (3, 3, 1, 4)
    assert pictures[..., 3].min() == 1
    assert pictures[..., :3].max() == 0
    assert one.tolist() == [[[18, 255, 0, right]]]
    assert two.tolist() == [[[1, 5, 0, 3]]]
    assert three.dtype == torch.float32
    assert three[0, HELEN.index("right_eye"), 0, 3] == pytest.approx(0.8)
    assert three[0, HELEN.index("skin"), 0, 3] == pytest.approx(0.2)
    assert three.sum().item() == pytest.approx(1)


KIND = "celebamask-hq-farl"


def write(path, people=6):
    """Drawn faces in `images/` and `labels/`, half of them in each of two splits."""
    table = HELEN.remap(CELEBAMASK_HQ_FARL).argmax(0).byte().numpy()
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(people):
            face, split = render(0, number, 0), ("one", "two")[number % 2]
            add(archive, f"{split}_{number}", face.image, table[face.labels])
    return path


def add(archive, name, image, labels):
    for folder, array in (("images", image), ("labels", labels)):
        with archive.open(f"{folder}/{name}.png", "w") as file:
            Image.fromarray(array).save(file, "PNG")


def test_mix(tmp_path):
    """What two sets leave of a batch is drawn; their faces are aligned."""
    path = write(tmp_path / "set.zip")
    shares = open_mix([f"{path}:{KIND}:one:0.25", f"{path}:{KIND}:one,two:0.3"], 8)
    assert [(share.count, len(share.pairs)) for share in shares] == [(2, 3), (2, 6)]
    drawn = ingredient(40, 8)
    sets = mix(drawn, shares)
    assert [one.count for one in sets] == [4, 2, 2]
    assert [one.in_memory for one in sets] == [False, True, True]
    assert sets[0].dataset is drawn.dataset
    assert [len(one.dataset) for one in sets[1:]] == [3, 6]
    image, target = sets[2].dataset[0]
    assert (image.shape, target.shape) == ((3, 112, 112), (112, 112))
    assert {image.dtype, target.dtype} == {torch.uint8}
    (only,) = mix(ingredient(40, 6), open_mix([f"{path}:{KIND}::1"], 6))
    assert (only.count, only.in_memory) == (6, True)


@pytest.mark.parametrize(
    ("shares", "world", "counts"),
    [
        ((0.25,), 1, [5]),
        ((0.15,), 1, [3]),
        ((0.3,), 2, [6]),
        ((0.2, 0.4), 4, [4, 8]),
        ((0.333, 0.333, 0.334), 1, [7, 6, 7]),  # rounded together, and the batch is full
        ((0.45, 0.1, 0.45), 1, [9, 2, 9]),
    ],
)
def test_shares(shares, world, counts, tmp_path):
    """Rounded such that they sum up; 20 pictures a batch, on any number of processes."""
    path = write(tmp_path / "set.zip", people=12)
    found = open_mix([f"{path}:{KIND}::{share}" for share in shares], 20, world)
    assert [share.count for share in found] == counts


@pytest.mark.parametrize(("share", "world", "count"), [(0.01, 1, 0), (0.25, 2, 5), (0.3, 4, 6)])
def test_shares_that_cannot_be(share, world, count, tmp_path):
    path = write(tmp_path / "set.zip", people=12)
    message = f"a batch of 20 would have {count} of its pictures, which must be a multiple of the"
    with pytest.raises(ValueError, match=message):
        open_mix([f"{path}:{KIND}::{share}"], 20, world)


def test_folding(tmp_path):
    """Ears are skin to some sets and background to others: they are ignored."""
    face = render(0, 0, 0)
    labels = face.labels.copy()
    labels[:8], labels[8] = IBUGMASK_14.index("left_ear"), 255
    (tmp_path / "train").mkdir()
    for suffix, array in ((".jpg", face.image), (".png", labels)):
        Image.fromarray(array).save(tmp_path / "train" / f"a{suffix}")
    drawn, one = mix(ingredient(40, 8), open_mix([f"{tmp_path}:ibugmask-14:train:0.1"], 8))
    target = one.dataset[0][1]
    assert (target == 255).any()
    assert target[target != 255].max() < 11
    assert (drawn.count, one.count) == (7, 1)


def test_errors(tmp_path, capsys):
    path = write(tmp_path / "set.zip")
    for choice, text in {
        f"{path}:{KIND}": "the mix must be PATH:KIND:SPLITS:SHARE with a share above 0, at most 1",
        f"{path}:{KIND}:one:0": "with a share above 0, at most 1; got",
        f"{path}:{KIND}:one:nan": "with a share above 0, at most 1; got",
        f"{path}:{KIND}:one:1.5": "with a share above 0, at most 1; got",
        f"{path}:{KIND}:three:0.5": "holds no split 'three'; it holds one, two",
        f"{path}:{KIND}:one:0.5": "a batch takes 4 pictures and there are 3: lower the share",
        "0.5": "a parsing set is written PATH:KIND:SPLITS",
    }.items():
        with pytest.raises(ValueError, match=text):
            open_mix([choice], 8)
    with pytest.raises(ValueError, match="the mix asks for 10 pictures in batches of 8"):
        open_mix([f"{path}:{KIND}:one,two:0.4"] * 3, 8)
    # six of them, of which one shows no eyes: found out when they are aligned
    blind = np.zeros((112, 112), np.uint8)
    with zipfile.ZipFile(path, "a") as archive:
        add(archive, "blind_0", blind, blind)
    shares = open_mix([f"{path}:{KIND}::1"], 7)
    with pytest.raises(ValueError, match="a batch takes 7 pictures and there are 6: lower"):
        mix(ingredient(40, 7), shares)
    assert "1 of 7 pictures left out, which do not show both eyes" in capsys.readouterr().err
