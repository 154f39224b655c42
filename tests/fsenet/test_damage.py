"""Damaged pictures of a run: named, counted once, replaced alike by everybody, up to a number."""

import io
import pickle
import tarfile
import zipfile
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from data import faces
from data.archives import Source
from data.batches import BatchPlan, load_batches
from data.damage import Damage
from data.faces import picture_sets
from data.images import IdentityFolder, decode_all
from PIL import Image

PEOPLE, SAMPLES = 130, 3


def make(path, damaged):
    """A zip of faces whose colour is their place in it; `damaged` are cut short."""
    with zipfile.ZipFile(path, "w") as archive:
        for place in range(PEOPLE * SAMPLES):
            owner, number = divmod(place, SAMPLES)
            buffer = io.BytesIO()
            Image.new("RGB", (4, 4), (owner, number, 0)).save(buffer, "PNG")
            data = buffer.getvalue()
            archive.writestr(f"P{owner:03}/{number}.png", data[:40] if place in damaged else data)
    return path


def places(images):
    return [SAMPLES * int(i[0, 0, 0]) + int(i[1, 0, 0]) for i in images]


def test_example(capsys):
    damage = Damage(2)
    damage.add("a.zip:1 is damaged")
    damage.share(10)
    damage.add("a.zip:2 is damaged", 7)
    damage.add("a.zip:2 is damaged", 7)
    assert damage.count == 2
    assert capsys.readouterr().err == "left out: a.zip:1 is damaged\nleft out: a.zip:2 is damaged\n"
    with pytest.raises(
        ValueError, match=r"^a.zip:3 is damaged; that makes 3 damaged, and 2 allowed$"
    ):
        damage.add("a.zip:3 is damaged", 8)
    with pytest.raises(ValueError, match=r"^x; that makes 1 damaged, and 0 allowed$"):
        Damage().add("x", 3)
    with pytest.raises(
        ValueError, match=r"^x; each picture of the protocol counts, none may be left out$"
    ):
        Damage(None).add("x", 3)
    assert pickle.loads(pickle.dumps(damage)).count == 3


def test_held_in_memory(tmp_path, capsys):
    """Those that train and those that test are left out, and everybody keeps their pictures."""
    damaged = {0, 100, 101, 102, 389}
    path = make(tmp_path / "faces.zip", damaged)
    with pytest.raises(
        ValueError, match=r"0.png is no picture of .*; that makes 1 damaged, and 0 a"
    ):
        picture_sets([path], 0)
    with pytest.raises(ValueError, match=r"; that makes 5 damaged, and 4 allowed$"):
        picture_sets([path], 0, damaged=4)
    capsys.readouterr()
    train, test = picture_sets([path], 0, damaged=5)
    assert train.damage.count == 5
    assert capsys.readouterr().err.count("left out: ") == 5
    seen = [*places(train.images), *places(test.images)]
    assert sorted(seen) == sorted(set(range(PEOPLE * SAMPLES)) - damaged)
    names = [f"P{place // 3:03}/{place % 3}.png" for place in places(test.images)]
    assert test.names == tuple(names)
    _, labels, index = train.dataset.tensors
    owners = [place // 3 for place in places(train.images)]
    assert len(set(zip(owners, labels.tolist(), strict=True))) == train.num_identities
    assert len(set(owners)) == train.num_identities
    assert index.tolist() == list(range(len(train.images)))


def test_nobody_is_left(tmp_path):
    """An identity of whom nothing can be decoded is none."""
    folder = IdentityFolder(make(tmp_path / "faces.zip", {3, 4, 5}), damage=Damage(6))
    kept, images = decode_all(folder, progress=False)
    assert kept.identities == tuple(f"P{i:03}" for i in range(PEOPLE) if i != 1)
    assert kept.labels.tolist() == [i for i in range(PEOPLE - 1) for _ in range(SAMPLES)]
    assert kept.paths[3] == "P002/0.png"
    assert len(images) == len(kept) == PEOPLE * SAMPLES - 3
    with pytest.raises(ValueError, match="holds no picture that can be decoded"):
        decode_all(folder.keep(["P001"]), progress=False)


def batches(path, workers=0, rank=0, first=0, world=1, damaged=9):
    train, _ = picture_sets([path], 0, damaged=damaged)
    assert train.images is None
    plan = BatchPlan(70, 9, seed=1, rank=rank, world=world, workers=workers)
    rows = [
        (places(images), identities.tolist(), index.tolist())
        for _, (images, identities, index) in load_batches(train.dataset, plan, first)
    ]
    return rows, train


def test_streamed(tmp_path, monkeypatch, capsys):
    """The next picture stands in, for one process as for two, with workers and after resuming."""
    monkeypatch.setattr(faces, "IN_MEMORY", 100)
    whole, train = batches(make(tmp_path / "faces.zip", set()))
    folder = train.dataset.folder  # of those who train
    number = {name: 3 * int(name[1:4]) + int(name[5]) for name in folder.paths}
    train_places = [number[name] for name in folder.paths]
    victims = [5, 70, 71, 209]  # two in a row, and the last
    path = make(tmp_path / "damaged.zip", {train_places[i] for i in victims})
    capsys.readouterr()
    found, train = batches(path)
    assert train.damage.count == 4
    assert capsys.readouterr().err.count("left out: ") == 4  # though in three epochs each
    stand_in = {5: 6, 70: 72, 71: 72, 209: 0}
    for (seen, labels, index), (_, _, wanted) in zip(found, whole, strict=True):
        assert index == [stand_in.get(i, i) for i in wanted]
        assert seen == [train_places[i] for i in index]
        assert labels == [int(train.dataset.folder.labels[i]) for i in index]
    with_workers, train = batches(path, workers=2)
    assert with_workers == found
    assert train.damage.count == 4  # counted in the workers, known here
    assert batches(path, workers=1, first=4)[0] == found[4:]
    shares = [batches(path, rank=rank, world=2)[0] for rank in range(2)]
    for step, (_, _, index) in enumerate(found):
        assert sorted(shares[0][step][2] + shares[1][step][2]) == sorted(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(faces, "IN_MEMORY", 100)
    train, _ = picture_sets([make(tmp_path / "faces.zip", set())], 0)
    names = [train.dataset.folder.name(i) for i in (5, 70, 71, 209)]
    path = make(tmp_path / "damaged.zip", {3 * int(n[1:4]) + int(n[5]) for n in names})
    with pytest.raises(ValueError, match=r"; that makes [34] damaged, and 2 allowed$") as error:
        batches(path, workers, damaged=2)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^[^\n]*; that makes 1 damaged, and 0 allowed$"):
        batches(path, workers, damaged=0)


def test_spawned_workers_share():
    """What is sent to another process, and not inherited, is the same memory too."""
    damage = Damage(3)
    damage.share(5)
    sent = pickle.loads(ForkingPickler.dumps(damage))  # as `DataLoader` does, by torch's rules
    sent.add("x", 4)
    assert damage.count == 1


def test_not_square(tmp_path, monkeypatch, capsys):
    """It is left out and counted, held in memory or streamed."""
    path = make(tmp_path / "faces.zip", set())
    with zipfile.ZipFile(path, "a") as archive:
        buffer = io.BytesIO()
        Image.new("RGB", (112, 113)).save(buffer, "PNG")
        archive.writestr("P000/9.png", buffer.getvalue())
    message = "P000/9.png is 112x113, not square: cut out and align the faces first"
    with pytest.raises(ValueError, match=rf"{message}.*that makes 1 damaged, and 0 allowed$"):
        decode_all(IdentityFolder(path, size=112), progress=False)
    folder = IdentityFolder(path, size=112, damage=Damage(1))
    kept, images = decode_all(folder, progress=False)
    assert len(images) == len(kept) == PEOPLE * SAMPLES
    assert message in capsys.readouterr().err
    folder = IdentityFolder(path, size=112, damage=Damage(1))
    streamed = faces._Streamed(folder)
    place = folder.paths.index("P000/9.png")
    assert torch.equal(streamed[place][0], folder[place + 1][0])
    assert folder.damage.count == 1


def test_tar_cut_short(tmp_path, capsys):
    """What lies before the cut is kept."""
    path = tmp_path / "faces.tar"
    with tarfile.open(path, "w:") as archive:
        for name in ("Ann/1.png", "Ann/2.png", "Bob/1.png"):
            member = tarfile.TarInfo(name)
            member.size = 700
            archive.addfile(member, io.BytesIO(bytes([len(name)]) * 700))
    path.write_bytes(path.read_bytes()[: 2 * 1536 + 520])
    with pytest.raises(
        ValueError, match=r"faces.tar is cut short at byte 3592, inside 'Bob/1.png'"
    ):
        IdentityFolder(path)
    capsys.readouterr()
    folder = IdentityFolder(path, damage=Damage(1))
    assert folder.paths == ("Ann/1.png", "Ann/2.png")
    assert folder.read(1) == bytes([9]) * 700
    assert folder.damage.count == 1
    assert "faces.tar is cut short at byte 3592, inside 'Bob/1.png'" in capsys.readouterr().err


def test_lists_are_looked_up(tmp_path, monkeypatch):
    """A set is listed once, also to see whether it is LFW."""
    opened, begin = [], Source.__init__
    monkeypatch.setattr(Source, "__init__", lambda *of: (opened.append(of), begin(*of))[1])
    picture_sets([make(tmp_path / "faces.zip", ())], 0)
    assert len(opened) == 1
