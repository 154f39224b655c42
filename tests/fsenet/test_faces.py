"""What a run trains and tests on: people are held out, and every picture keeps its owner."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data import convert, faces
from data.faces import (
    TEST_FROM,
    DrawnFaces,
    draw_faces,
    drawn_sets,
    drawn_test_set,
    is_lfw,
    lfw_test_set,
    picture_sets,
)
from data.images import IdentityFolder
from PIL import Image

LFW = Path(__file__).parents[2] / "../shared/data/lfw112.zip"


def picture(owner, number, shade=7):
    """A picture that says whose it is."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (owner, number, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def make(path, people, samples, shade=7):
    """`samples` pictures of each person, or as many as it says for each."""
    counts = [samples] * people if isinstance(samples, int) else samples
    with zipfile.ZipFile(path, "w") as archive:
        for owner in range(people):
            for number in range(counts[owner]):
                archive.writestr(f"P{owner:03}/{number}.png", picture(owner, number, shade))
    return path


def owners(images):
    return set(images[:, 0, 0, 0].tolist())


def test_drawn_faces():
    drawn = draw_faces(3, range(TEST_FROM, TEST_FROM + 2), 2, workers=0)
    assert drawn.images.shape[:2] == (4, 3)
    assert drawn.images.dtype == drawn.labels.dtype == torch.uint8
    assert drawn.labels.shape == (4, *drawn.images.shape[2:])
    assert drawn.identities.tolist() == [0, 0, 1, 1]
    # a face is a function of who it is: the second person alone is the same, with workers too
    alone = draw_faces(3, range(TEST_FROM + 1, TEST_FROM + 2), 2, workers=1)
    assert torch.equal(alone.images, drawn.images[2:])
    assert torch.equal(alone.labels, drawn.labels[2:])
    assert not torch.equal(draw_faces(3, range(1), 2, workers=0).images, drawn.images[:2])


def drawn(people, samples):
    n = people * samples
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 3, 2, 2)
    return DrawnFaces(images, images[:, 0], torch.arange(people).repeat_interleave(samples))


def test_drawn_sets():
    train, test = drawn_sets(drawn(5, 4), drawn(30, 3), seed=0)
    assert train.num_identities == 5
    assert len(train.dataset) == 20
    for index in (0, 7, 19):
        image, identity, number = train.dataset[index]
        assert (image[0, 0, 0], identity, number) == (index, index // 4, index)
    assert test.names[3:5] == ("1000001/0", "1000001/1")
    assert test.flags["pairs"] == len(test.pairs.same) == 10 * 18  # 3 people, 3 pairs of each
    assert test.flags["identities"] == 30
    assert len(drawn_test_set(drawn(200, 6), 0).pairs.same) == 3000
    pairs = drawn_test_set(drawn(20, 2), 0).pairs
    assert len(pairs.same) == 10 * 4


def check_held_out(train, test, people):
    assert train.images is not None
    assert owners(train.images) & owners(test.images) == set()
    assert owners(train.images) | owners(test.images) == set(range(people))
    assert train.num_identities == len(owners(train.images))
    _, identities, index = train.dataset.tensors
    assert index.tolist() == list(range(len(train.images)))
    assert sorted(set(identities.tolist())) == list(range(train.num_identities))
    # one label is one person, in both sets
    for images, labels in ((train.images, identities), (test.images, test.pairs.identities)):
        pairs = {(int(i[0, 0, 0]), int(k)) for i, k in zip(images, labels, strict=True)}
        assert len(pairs) == len(owners(images)) == len({k for _, k in pairs})
    for name, image in zip(test.names, test.images, strict=True):
        assert name == f"P{image[0, 0, 0]:03}/{image[1, 0, 0]}.png"
    same = [
        test.names[i].split("/")[0] == test.names[j].split("/")[0]
        for i, j in zip(test.pairs.first, test.pairs.second, strict=True)
    ]
    assert same == test.pairs.same.tolist()
    assert np.unique(test.pairs.fold).tolist() == list(range(10))


@pytest.mark.parametrize("samples", [2, 5])
def test_a_folder_of_pictures(tmp_path, samples):
    """130 people of whom 60 test, with as few as two pictures each."""
    path = make(tmp_path / "faces.zip", 130, samples)
    train, test = picture_sets([path], seed=0)
    check_held_out(train, test, 130)
    assert train.images.shape[2:] == test.images.shape[2:] == (112, 112)
    assert test.flags["identities"] == len(owners(test.images)) == 60
    assert len(test.pairs.same) == 10 * {2: 12, 5: 120}[samples]
    assert test.lfw is None
    again, other = picture_sets([path], seed=0)[1], picture_sets([path], seed=1)[1]
    assert again.names == test.names
    assert np.array_equal(again.pairs.first, test.pairs.first)
    assert set(other.names) != set(test.names)


def test_people_with_one_picture_only_train(tmp_path):
    path = make(tmp_path / "faces.zip", 140, [1 if i % 2 else 4 for i in range(140)])
    train, test = picture_sets([path], seed=0)
    check_held_out(train, test, 140)
    assert {i % 2 for i in owners(test.images)} == {0}


def test_of_many_people_some_test(tmp_path, monkeypatch):
    """Their pictures are held in memory, so of a large set a tenth would be too many."""
    path = make(tmp_path / "faces.zip", 640, 2)
    monkeypatch.setattr(faces, "MAX_TESTED", 62)
    train, test = picture_sets([path], seed=0)
    assert (train.num_identities, test.flags["identities"]) == (640 - 62, 62)


def test_streamed(tmp_path, monkeypatch):
    """More pictures than memory shall hold are read when they are asked for: the same items.

    They are 4x4 in the zip and, held or streamed, 112x112 for the network.
    """
    path = make(tmp_path / "faces.zip", 121, 2)
    held, _ = picture_sets([path], seed=0)
    monkeypatch.setattr(faces, "IN_MEMORY", 100)
    streamed, _ = picture_sets([path], seed=0)
    assert streamed.images is None
    assert streamed.num_identities == held.num_identities
    assert len(streamed.dataset) == len(held.dataset) == 2 * 61
    for index in (0, 50, 121):
        pairs = zip(held.dataset[index], streamed.dataset[index], strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert streamed.dataset[index][0].shape == (3, 112, 112)


def test_fingerprints(tmp_path, monkeypatch):
    """Of the same pictures it is the same, held or streamed; of any other set it is another."""

    def fingerprint(samples=2, **how):
        return picture_sets([make(tmp_path / "faces.zip", 121, samples, **how)], 0)[0].fingerprint

    first = fingerprint()
    monkeypatch.setattr(faces, "IN_MEMORY", 100)
    assert fingerprint() == first
    others = (fingerprint([3] * 60 + [2] * 61), fingerprint([2] * 61 + [3] * 60), fingerprint(3))
    assert len({first, *others, fingerprint(shade=8)}) == 5
    # whose they are counts where people and bytes are the same
    for number, counts in enumerate(((1, 2), (2, 1))):
        with zipfile.ZipFile(tmp_path / f"{number}.zip", "w") as archive:
            for owner, count in enumerate(counts):
                for place in range(count):
                    archive.writestr(f"P{owner}/{place}.png", picture(0, 0))
    one, other = (IdentityFolder(tmp_path / f"{number}.zip").fingerprint() for number in range(2))
    assert one != other


def test_the_same_people_in_every_format(tmp_path):
    """Names or numbers: their order decides who is held out, and convert.py keeps it."""
    source = make(tmp_path / "faces.zip", 130, 2)
    expected = owners(picture_sets([source], 0)[1].images)
    assert len(expected) == 60
    for name in ("folder", "faces.rec", "faces-%06d.tar"):
        convert.main(convert.Arguments((source, tmp_path / name)))
        assert owners(picture_sets([tmp_path / name], 0)[1].images) == expected


def test_lfws_lists_decide(tmp_path, lfw_like):
    """Folds 8 and 9 test, everybody else trains; the pairs are the lists', in their order."""
    train, test = picture_sets([lfw_like(tmp_path / "lfw.zip")], seed=0)
    assert {name.split("/")[0] for name in test.names} == {f"P{i:03}" for i in range(16, 20)}
    assert train.num_identities == 18
    near = {round(int(red) / 10) for red in owners(train.images)}
    assert near == {*range(16), 20, 21}
    assert train.images.shape[2:] == test.images.shape[2:] == (112, 112)
    assert [test.names[i] for i in test.pairs.first[:4]] == [
        "P016/P016_0001.jpg",
        "P017/P017_0002.jpg",
        "P016/P016_0001.jpg",
        "P016/P016_0002.jpg",
    ]
    assert [test.names[i] for i in test.pairs.second[:3]] == [
        "P016/P016_0002.jpg",
        "P017/P017_0003.jpg",
        "P017/P017_0001.jpg",
    ]
    assert test.pairs.same.tolist() == [True, True, False, False] * 2
    assert test.pairs.fold.tolist() == [8] * 4 + [9] * 4
    assert test.flags["comparable_with_published"] is False
    assert test.flags["pairs"] == 8
    assert test.lfw is not None

    # all ten folds are the published protocol, whose pairs alone are scored
    protocol = test.lfw
    every = lfw_test_set(tmp_path / "lfw.zip", protocol, range(10))
    assert every.flags["comparable_with_published"] is True
    assert len(every.pairs.same) == 40
    assert every.lfw is None


def test_what_is_lfw(tmp_path, lfw_like):
    own, other = lfw_like(tmp_path / "lfw.zip"), make(tmp_path / "other.zip", 2, 1)
    with zipfile.ZipFile(own) as archive:
        archive.extractall(tmp_path / "folder")
    assert is_lfw([own])
    assert is_lfw([tmp_path / "folder"])
    (tmp_path / "folder/pairs.txt").unlink()
    for paths in ([other], [own, other], [tmp_path / "folder"], []):
        assert not is_lfw(paths)


def test_errors(tmp_path):
    path = make(tmp_path / "few.zip", 119, 2)
    message = r"few.zip has 119 identities, 119 of them with two pictures or more: testing needs 60"
    with pytest.raises(ValueError, match=message):
        picture_sets([path], 0)
    path = make(tmp_path / "single.zip", 130, 1)
    with pytest.raises(ValueError, match="has 130 identities, 0 of them with two pictures"):
        picture_sets([path], 0)
    for people, samples, found in ((19, 4, "6 genuine and 0"), (30, 1, "0 genuine and 3")):
        message = f"a fold of 10 has {found} impostor pairs; it needs two people"
        with pytest.raises(ValueError, match=message):
            drawn_test_set(drawn(people, samples), 0)


def changed_copy(original, path, change):
    """An archive with the files renamed, or left out where `change` returns None."""
    with zipfile.ZipFile(original) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if changed := change(name):
                new.writestr(changed, old.read(name))
    return path


def test_lfw_in_another_format(tmp_path, lfw_like):
    """The lists name JPEGs; aligned copies are often PNGs."""
    original = lfw_like(tmp_path / "original.zip")
    path = changed_copy(original, tmp_path / "lfw.zip", lambda name: name.replace(".jpg", ".png"))
    _, test = picture_sets([path], 0)
    assert test.names[test.pairs.first[0]] == "P016/P016_0001.png"


def test_lfw_as_it_is_given_out(tmp_path, lfw_like):
    """Without a list of people, the pairs and the pictures' names make the same sets."""
    original = lfw_like(tmp_path / "original.zip")
    path = changed_copy(
        original, tmp_path / "lfw.zip", lambda name: None if name.startswith("identity") else name
    )
    (train, test), (listed, expected) = (picture_sets([x], 0) for x in (path, original))
    assert train.num_identities == listed.num_identities == 18
    assert torch.equal(train.images, listed.images)
    assert test.names == expected.names
    assert test.pairs.first.tolist() == expected.pairs.first.tolist()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_repeats(tmp_path):
    """In a zip that is not LFW's it is one damaged picture, which may be let pass."""
    path = make(tmp_path / "faces.zip", 130, 2)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("P007/1.png", picture(7, 1))
    with pytest.raises(ValueError, match=r"'P007/1.png' more than once.* 1 damaged, and 0 allowed"):
        picture_sets([path], 0)
    train, _ = picture_sets([path], 0, damaged=1)
    assert train.damage.count == 1


def test_lfw_lacks_a_picture(tmp_path, lfw_like):
    original = lfw_like(tmp_path / "original.zip")
    path = changed_copy(
        original, tmp_path / "lfw.zip", lambda name: None if "P018_0002" in name else name
    )
    message = r"lfw.zip lacks 1 of the pictures that the pairs name: P018/P018_0002$"
    with pytest.raises(ValueError, match=message):
        picture_sets([path], 0)


@pytest.mark.slow
@pytest.mark.skipif(not LFW.exists(), reason="needs LFW at 112x112")
def test_lfw():
    train, test = picture_sets([LFW], seed=0)
    tested = {name.split("/")[0] for name in test.names}
    with zipfile.ZipFile(LFW) as archive:
        everybody = {name.split("/")[-2] for name in archive.namelist() if name.endswith(".jpg")}
    assert train.num_identities == len(everybody - tested)
    assert len(test.pairs.same) == 1200
    assert test.pairs.same.sum() == 600
    assert len(train.images) + len(test.images) == 13233
    seen = {hashlib.sha256(image.numpy().tobytes()).digest() for image in train.images}
    shared = sum(hashlib.sha256(i.numpy().tobytes()).digest() in seen for i in test.images)
    assert shared == 0
