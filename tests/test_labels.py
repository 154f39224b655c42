import json
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from partlocal.labels import (
    CELEBAMASK_HQ,
    CELEBAMASK_HQ_BISENET,
    CELEBAMASK_HQ_FARL,
    FSENET_NINE,
    FSENET_PARTS,
    HELEN,
    IBUGMASK,
    IBUGMASK_14,
    LAPA,
    LIP,
    LabelSet,
    Parts,
)

SETS = [
    HELEN,
    LAPA,
    IBUGMASK,
    IBUGMASK_14,
    CELEBAMASK_HQ,
    CELEBAMASK_HQ_BISENET,
    CELEBAMASK_HQ_FARL,
    LIP,
]
each_set = pytest.mark.parametrize("labels", SETS, ids=lambda labels: labels.name)


def test_example():
    assert HELEN.index("background") == 0
    assert HELEN.select(*FSENET_PARTS).indices == (1, 4, 5, 6, 7, 9)
    assert HELEN.select(*FSENET_NINE).indices == (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert HELEN.select("brows", "nose").names == ("left_brow", "right_brow", "nose")
    maps = torch.tensor([[1, 2, 3], [4, 255, 10]], dtype=torch.uint8)
    expected = torch.tensor([[2, 3, 1], [10, 255, 5]], dtype=torch.uint8)
    assert torch.equal(HELEN.flip(maps), expected)


# The short names that the files and codes of each data set use, in index order.
ORDERS = {
    "Helen": "bg skin l_brow r_brow l_eye r_eye nose u_lip mouth l_lip hair",
    "LaPa": "bg skin l_brow r_brow l_eye r_eye nose u_lip mouth l_lip hair",
    "iBugMask": "bg skin l_brow r_brow l_eye r_eye nose u_lip mouth l_lip hair",
    "iBugMask-14": "bg skin l_brow r_brow l_eye r_eye nose u_lip mouth l_lip hair "
    "l_ear r_ear eye_g",
    "CelebAMask-HQ": "bg skin nose eye_g l_eye r_eye l_brow r_brow l_ear r_ear mouth u_lip l_lip "
    "hair hat ear_r neck_l neck cloth",
    "CelebAMask-HQ (BiSeNet order)": "bg skin l_brow r_brow l_eye r_eye eye_g l_ear r_ear ear_r "
    "nose mouth u_lip l_lip neck neck_l cloth hair hat",
    "CelebAMask-HQ (FaRL order)": "bg neck skin cloth l_ear r_ear l_brow r_brow l_eye r_eye nose "
    "mouth l_lip u_lip hair eye_g hat ear_r neck_l",
    "LIP": "Background Hat Hair Glove Sunglasses Upper-clothes Dress Coat Socks Pants Jumpsuits "
    "Scarf Skirt Face Left-arm Right-arm Left-leg Right-leg Left-shoe Right-shoe",
}
LONG = {
    "bg": "background",
    "l_lip": "lower_lip",
    "u_lip": "upper_lip",
    "mouth": "inner_mouth",
    "eye_g": "glasses",
    "sunglasses": "glasses",
    "ear_r": "earring",
    "neck_l": "necklace",
    "cloth": "clothes",
}


@each_set
def test_reference(labels):
    short = ORDERS[labels.name].lower().replace("-", "_").split()
    names = [LONG.get(s, s) for s in short]
    names = [n.replace("l_", "left_", 1) if n.startswith("l_") else n for n in names]
    names = [n.replace("r_", "right_", 1) if n.startswith("r_") else n for n in names]
    assert labels.labels == tuple(names)


@each_set
def test_left_right(labels):
    count = {"LIP": 3, "CelebAMask-HQ": 3}.get(labels.name.split(" (")[0], 2)
    count += labels is IBUGMASK_14
    assert len(labels.left_right) == count
    assert all(b == a.replace("left", "right") for a, b in labels.left_right)
    moved = [i for i, j in enumerate(labels.mirrored) if i != j]
    assert len(moved) == 2 * count


@each_set
def test_groups(labels):
    for name, members in labels.groups.items():
        assert labels.select(name).names == members
    if labels is LIP:
        ids = {g: set(labels.select(g).indices) for g in labels.groups}
        assert ids.pop("foreground") == set(range(1, 20))
        assert ids == {
            "head": {1, 2, 4, 13},
            "upper": {3, 5, 6, 7, 10, 11, 14, 15},
            "lower": {9, 12, 16, 17},
            "shoes": {8, 18, 19},
        }
    else:
        inner = set(labels.select("inner").names)
        assert inner == set(labels.select("eyes", "brows", "nose", "mouth").names)


@given(st.sampled_from(SETS), st.integers(0, 2**31), st.booleans())
def test_properties(labels, seed, batched):
    generator = torch.Generator().manual_seed(seed)
    n = len(labels)
    shape = (2, 3, 5) if batched else (3, 5)
    ids = torch.randint(0, n, shape, generator=generator)
    ids[..., 0, 0] = 255
    assert torch.equal(labels.flip(labels.flip(ids)), ids)
    assert not torch.equal(labels.flip(ids), ids)
    known = ids.where(ids < n, 0)
    one_hot = torch.nn.functional.one_hot(known, n).movedim(-1, -3)
    # Both forms of the same picture flip alike.
    assert torch.equal(labels.flip(one_hot.float()).argmax(-3), labels.flip(known))
    assert torch.equal(labels.flip(one_hot.bool()), labels.flip(one_hot.float()).bool())
    everything = labels.select(*labels.labels)
    assert torch.equal(everything.flip(one_hot.float()), labels.flip(one_hot.float()))


@given(st.permutations(FSENET_PARTS))
def test_parts(order):
    parts = HELEN.select(*order)
    assert len(parts) == 6
    assert [HELEN.labels[i] for i in parts.indices] == list(order)
    logits = torch.rand(2, 11, 3, 4)
    # Selecting and flipping commute.
    selected = logits[:, list(parts.indices)]
    flipped = HELEN.flip(logits)[:, list(parts.indices)]
    assert torch.equal(parts.flip(selected), flipped)
    assert torch.equal(parts.flip(parts.flip(selected)), selected)
    assert Parts.from_dict(json.loads(json.dumps(parts.to_dict()))) == parts
    assert hash(parts) == hash(HELEN.select(*order))


def test_remap_orders():
    orders = [CELEBAMASK_HQ, CELEBAMASK_HQ_BISENET, CELEBAMASK_HQ_FARL]
    for a in orders:
        for b in orders:
            there, back = a.remap(b), b.remap(a)
            assert torch.equal(back @ there, torch.eye(19))
            table = there.argmax(0)
            assert [b.labels[i] for i in table] == list(a.labels)
    assert torch.equal(CELEBAMASK_HQ.remap(CELEBAMASK_HQ), torch.eye(19))
    assert CELEBAMASK_HQ.remap(CELEBAMASK_HQ_FARL).argmax(0)[12] == 12  # l_lip is the lower lip


def test_remap_absent_and_coarse():
    table = CELEBAMASK_HQ.remap(HELEN).argmax(0)
    assert table[CELEBAMASK_HQ.index("hat")] == 0
    assert table[CELEBAMASK_HQ.index("hair")] == 10
    probabilities = torch.rand(2, 19, 3, 3).softmax(1)
    mapped = torch.einsum("mn,bnhw->bmhw", CELEBAMASK_HQ.remap(HELEN), probabilities)
    torch.testing.assert_close(mapped.sum(1), torch.ones(2, 3, 3))

    coarse = LabelSet("coarse", ("background", "skin", "hair", "eyes", "nose", "mouth", "inner"))
    table = HELEN.remap(coarse, into={"left_brow": "hair"}).argmax(0)
    # The right brow is in `brows`, which coarse lacks, and in `inner`; the eyes in both it has.
    assert table.tolist() == [0, 1, 2, 6, 3, 3, 4, 5, 5, 5, 2]
    ears = CELEBAMASK_HQ.remap(LAPA, into={"left_ear": "skin"}).argmax(0)
    assert [ears[i].item() for i in CELEBAMASK_HQ.select("ears").indices] == [1, 0]


def test_remap_sides():
    mine = LabelSet("mine", HELEN.labels, groups=HELEN.groups, side="subject")
    table = HELEN.remap(mine).argmax(0)
    assert table[HELEN.index("left_eye")] == mine.index("right_eye")
    assert table[HELEN.index("nose")] == mine.index("nose")
    assert torch.equal(mine.remap(HELEN) @ HELEN.remap(mine), torch.eye(11))
    # into names labels of the other set as they stand there
    assert HELEN.remap(mine, into={"left_eye": "left_eye"}).argmax(0)[4] == 4


@each_set
def test_dict(labels):
    again = LabelSet.from_dict(json.loads(json.dumps(labels.to_dict())))
    assert again == labels
    assert pickle.loads(pickle.dumps(labels)) == labels
    assert {labels: 1}[again] == 1
    with pytest.raises(AttributeError):
        labels.name = "other"


def test_explicit_pairs():
    points = LabelSet("points", ("a", "b", "c"), left_right=(("a", "c"),))
    assert points.mirrored == (2, 1, 0)
    assert LabelSet("none", ("left_a", "right_a"), left_right=()).mirrored == (0, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HELEN.index("beard"), "Helen has no label 'beard'; its labels are background, sk"),
        (lambda: HELEN.select("beard"), "Helen has no label 'beard'"),
        (HELEN.select, "select at least one part of Helen"),
        (lambda: HELEN.select("eyes", "left_eye"), "got more than once: left_eye"),
        (
            lambda: HELEN.select("left_eye").flip(torch.rand(1, 2, 2)),
            "'left_eye' has no mirror image among the parts: select 'right_eye' too",
        ),
        (
            lambda: HELEN.flip(torch.rand(2, 6, 4, 4)),
            r"maps must be \[..., n, h, w\] with n = 11 \(as Helen\); got \[2, 6, 4, 4\]",
        ),
        (
            lambda: HELEN.select("nose").flip(torch.rand(2, 6, 4, 4)),
            r"with k = 1 \(as these parts of Helen\); got \[2, 6, 4, 4\]",
        ),
        (
            lambda: HELEN.flip(torch.zeros(1, 1, 4, 4, dtype=torch.long)),
            r"integer label maps must be \[h, w\] or \[b, h, w\]; got \[1, 1, 4, 4\]",
        ),
        (
            lambda: HELEN.remap(LabelSet("few", ("skin",))),
            "few has no place for 'background' of Helen and no background: .*into=",
        ),
        (lambda: HELEN.remap(LAPA, into={"beard": "skin"}), "Helen has no label 'beard'"),
        (lambda: HELEN.remap(LAPA, into={"skin": "beard"}), "LaPa has no label 'beard'"),
        (lambda: LabelSet("x", ("a", "a")), "labels of x must be different names"),
        (lambda: LabelSet("x", ()), "labels of x must be different names"),
        (lambda: LabelSet("x", ("a",), groups={"g": ("b",)}), r"name no label: \['b'\]"),
        (lambda: LabelSet("x", ("a",), groups={"a": ("a",)}), r"called like labels: \['a'\]"),
        (lambda: LabelSet("x", ("a", "b"), (("a", "b"), ("b", "a"))), "hold each label once"),
        (lambda: LabelSet("x", ("a",), side="left"), "side must be 'subject' or 'viewer'; got 'l"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_string_labels():
    with pytest.raises(Exception, match="labels"):
        LabelSet("x", "abc")
