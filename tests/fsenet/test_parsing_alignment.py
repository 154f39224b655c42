"""Faces of parsing sets on the template, against a face drawn where the template has it."""

import doctest
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data import parsing_alignment, parsing_sets
from data.archives import DamagedImage
from data.parsing_alignment import align_pair, aligned_pairs, points_from_labels
from data.parsing_sets import LabelledPairs, ParsingPair
from PIL import Image

from partlocal.alignment import ARCFACE_TEMPLATE
from partlocal.labels import HELEN, LabelSet

REAL = Path(__file__).parents[2] / "../shared/data/fasseg256.zip"
PARTS = {"eyes": 3, "nose": 4, "mouth": 5}


def draw(turn=0.0, scale=1.0, shift=(0.0, 0.0), side=112):
    """A label map with discs on the template, and a picture that shows each label as a colour."""
    (ax, ay), (bx, by), (nx, ny), (cx, cy), (dx, dy) = ARCFACE_TEMPLATE
    discs = [
        (56.0, 70.0, 50.0, 1),
        (ax, ay, 5.0, 3),
        (bx, by, 5.0, 3),
        (nx, ny - parsing_alignment._NOSE_RISE, 7.0, 4),
        ((cx + dx) / 2, (cy + dy) / 2, 9.0, 5),
    ]
    rows, columns = np.mgrid[:side, :side] + 0.5
    labels = np.zeros((side, side), np.uint8)
    for x, y, radius, label in discs:
        u = scale * (np.cos(turn) * x - np.sin(turn) * y) + shift[0]
        v = scale * (np.sin(turn) * x + np.cos(turn) * y) + shift[1]
        labels[(columns - u) ** 2 + (rows - v) ** 2 <= (scale * radius) ** 2] = label
    colours = np.array(
        [[0, 0, 0], [200, 150, 120], [0, 0, 0], [0, 0, 250], [250, 0, 0], [0, 250, 0]]
    )
    return colours.astype(np.uint8)[labels], labels


def encode(array, mode=None):
    buffer = io.BytesIO()
    image = Image.fromarray(array)
    if mode == "P":
        image.putpalette([7] * 768)
    image.save(buffer, "PNG")
    return buffer.getvalue()


def make(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_example(tmp_path):
    image, labels = draw()
    files = {}
    for name in ("train_2", "train_1", "test_1"):
        files[f"images/{name}.png"] = encode(image)
        files[f"labels/{name}.png"] = encode(labels, "P")
    pairs = LabelledPairs(make(tmp_path / "set.zip", files))
    assert pairs.names == ("test_1", "train_1", "train_2")
    assert np.array_equal(pairs[0][0], image)
    assert np.array_equal(pairs[0][1], labels)  # the palette's colours do not matter
    assert LabelledPairs(tmp_path / "set.zip", ["train"]).names == ("train_1", "train_2")
    assert pairs.title == "set.zip:FASSEG"
    for module in (parsing_alignment, parsing_sets):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("turn", "scale", "shift"),
    [(0.0, 1.0, (0, 0)), (0.4, 1.5, (90, 10)), (-0.7, 2.0, (10, 190)), (0.2, 0.7, (60, 40))],
)
def test_align(turn, scale, shift):
    """However a face lies in the picture, it comes to lie where it was drawn on the template."""
    upright, expected = draw()
    image, labels = draw(turn, scale, shift, side=380)
    aligned, map_ = align_pair(ParsingPair(image, labels))
    assert aligned.shape == (112, 112, 3)
    assert map_.dtype == np.uint8
    assert set(np.unique(map_)) == set(np.unique(expected))  # no label is mixed from others
    for label in (3, 4, 5):
        a, b = map_ == label, expected == label
        assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.9
    assert np.abs(aligned.astype(int) - upright).mean() < 6
    # the picture lies on its label map to a tenth of a pixel: both centroids of the red nose
    rows, columns = np.mgrid[:112, :112]
    red = np.clip(aligned[..., 0].astype(float) - 200, 0, 50) * (np.abs(rows - 66) < 14)
    centre = np.array([(columns * red).sum(), (rows * red).sum()]) / red.sum()
    nose = np.argwhere(map_ == 4).mean(0)[::-1]
    assert np.abs(centre - nose).max() < 0.35


def test_size():
    image, labels = draw()
    _, half = align_pair(ParsingPair(image, labels), size=56)
    assert half.shape == (56, 56)
    left, right, *_ = points_from_labels(half)
    np.testing.assert_allclose(left, np.array(ARCFACE_TEMPLATE[0]) / 2, atol=0.5)
    np.testing.assert_allclose(right, np.array(ARCFACE_TEMPLATE[1]) / 2, atol=0.5)


def test_sides():
    """Labelled sides are used as they are, whoever's sides they are."""
    _, labels = draw()
    columns = np.arange(112)[None]
    in_picture = np.where((labels == 3) & (columns > 56), 6, labels)
    viewer = LabelSet("v", ("background", "skin", "hair", "left_eye", "nose", "mouth", "right_eye"))
    viewer = LabelSet(viewer.name, viewer.labels, side="viewer")
    subject = LabelSet(
        "s",
        ("background", "skin", "hair", "right_eye", "nose", "mouth", "left_eye"),
        side="subject",
    )
    expected = points_from_labels(labels)
    for label_set in (viewer, subject):
        points = points_from_labels(in_picture.astype(np.uint8), label_set)
        np.testing.assert_array_equal(points, expected)


def test_skipped(tmp_path):
    image, labels = draw()
    columns = np.arange(112)[None]
    hidden = np.where((labels == 3) & (columns > 56), 1, labels).astype(np.uint8)
    speckled = hidden.copy()
    speckled[50, 90] = 3
    for label in (4, 5):
        without = np.where(labels == label, 1, labels).astype(np.uint8)
        assert align_pair(ParsingPair(image, without)) is None
    files = {}
    for name, map_ in {"a": labels, "b": hidden, "c": speckled}.items():
        files |= {f"images/{name}.png": encode(image), f"labels/{name}.png": encode(map_)}
    found = aligned_pairs(LabelledPairs(make(tmp_path / "set.zip", files)), progress=False)
    assert found.names == ("a",)
    assert found.skipped == ("b", "c")
    assert found.images.shape == (1, 3, 112, 112)
    assert found.targets.dtype == torch.uint8
    del files["images/a.png"], files["labels/a.png"]
    with pytest.raises(ValueError, match="none of 2 label maps shows two eyes, nose and mouth"):
        aligned_pairs(LabelledPairs(make(tmp_path / "none.zip", files)), progress=False)


def test_parts_in_one_place():
    """Rings around one point say where a face is, and not how it lies."""
    rows, columns = np.mgrid[:41, :41] - 20
    ring = np.hypot(rows, columns).astype(int)
    labels = np.zeros((41, 41), np.uint8)
    for radius, name in ((3, "left_eye"), (6, "right_eye"), (9, "nose"), (12, "upper_lip")):
        labels[ring == radius] = HELEN.index(name)
    assert points_from_labels(labels, HELEN) is None


def test_processes(tmp_path, monkeypatch):
    """Many pictures are aligned by several processes: the same faces in the same order."""
    files = {}
    for number in range(5):
        image, labels = draw(0.1 * number, 1.5, (30, 10), side=220)
        files[f"images/{number}.png"] = encode(image)
        files[f"labels/{number}.png"] = encode(labels) if number != 2 else b""
    pairs = LabelledPairs(make(tmp_path / "set.zip", files))
    alone = aligned_pairs(pairs, damaged=1, progress=False)
    monkeypatch.setattr(parsing_alignment, "_FEW", 2)
    monkeypatch.setattr(parsing_alignment, "DRAWERS", 2)
    together = aligned_pairs(pairs, damaged=1, progress=False)
    assert together.names == alone.names == ("0", "1", "3", "4")
    assert together.lost == alone.lost
    assert torch.equal(together.images, alone.images)
    assert torch.equal(together.targets, alone.targets)
    assert len({picture.sum().item() for picture in alone.images}) == 4


def test_errors(tmp_path):
    image, labels = draw()
    good = {"images/a_1.png": encode(image), "labels/a_1.png": encode(labels)}
    with pytest.raises(
        ValueError, match=r"1 of 2 files have no label map of the same name: images/b_1.png$"
    ):
        LabelledPairs(make(tmp_path / "1.zip", good | {"images/b_1.png": encode(image)}))
    more = {"labels/b_1.png": b"", "labels/c_1.png": b""}
    message = r"2 of 3 files have no picture of the same name: labels/b_1.png, labels/c_1.png$"
    with pytest.raises(ValueError, match=message):
        LabelledPairs(make(tmp_path / "2.zip", good | more))
    with pytest.raises(ValueError, match=r"holds no split 'b'; it holds a$"):
        LabelledPairs(make(tmp_path / "3.zip", good), ["b"])
    with pytest.raises(ValueError, match=r"holds no pairs images/NAME and labels/NAME\.png"):
        LabelledPairs(make(tmp_path / "4.zip", {"x/y.png": b""}))
    for bad, text in {
        encode(image): "has mode RGB: label maps are PNGs of mode P or L",
        encode(labels + 6): "holds label 6: FASSEG has 0 to 5, and 255 for ignore",
        encode(labels[:50]): "the picture is 112x112, its label map 112x50",
        encode(labels)[:90]: "labels/a_1.png is damaged",
    }.items():
        pairs = LabelledPairs(make(tmp_path / "5.zip", good | {"labels/a_1.png": bad}))
        with pytest.raises(DamagedImage, match=text):
            pairs[0]
    ignored = labels.copy()
    ignored[0] = 255
    pairs = LabelledPairs(make(tmp_path / "6.zip", good | {"labels/a_1.png": encode(ignored)}))
    assert pairs[0][1][0].tolist() == [255] * 112


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/fasseg256.zip")
def test_real():
    assert len(LabelledPairs(REAL)) == 344
    found = aligned_pairs(LabelledPairs(REAL, ["frontal02-test"]), progress=False)
    assert len(found.names) == 50
    assert found.skipped == ()
    points = np.stack([points_from_labels(m.numpy().astype(np.uint8)) for m in found.targets])
    eyes = np.array(ARCFACE_TEMPLATE[:2])
    assert np.linalg.norm(points[:, :2].mean(0) - eyes, axis=1).max() < 3
    assert (np.linalg.norm(points[:, :2] - eyes, axis=2) < 3).mean() > 0.9
    # eyes are darker than the skin around them: pictures and maps lie on each other
    grey = found.images.float().mean(1)
    eye, skin = found.targets == 3, found.targets == 1
    assert grey[eye].mean() < 0.8 * grey[skin].mean()
    profiles = aligned_pairs(LabelledPairs(REAL, ["multipose01-test"]), progress=False)
    assert len(profiles.names) + len(profiles.skipped) == 92
    assert 20 <= len(profiles.skipped) <= 35
    assert all(name.endswith(("60", "75", "90")) for name in profiles.skipped)
