"""Evaluating a saved network or anybody's embeddings, as a user calls it."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from data.faces import TestSet as Faces
from embeddings import read_embeddings
from evaluate_options import Arguments, check
from feature_protocols import MegafaceOptions
from machine import choose_precision
from model import GlobalNet, load_network
from protocols import fixtures
from protocols.pairs import draw_pairs

from partlocal import HELEN, ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS

PEOPLE, SAMPLES = 20, 2
NAMES = tuple(f"P{i:02}/P{i:02}_{k}.jpg" for i in range(PEOPLE) for k in range(SAMPLES))


@pytest.fixture
def test_set(monkeypatch):
    """A protocol on noise, in place of pictures that take long to draw."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (len(NAMES), 3, 112, 112), dtype=torch.uint8, generator=rng)
    pairs = draw_pairs(np.repeat(np.arange(PEOPLE), SAMPLES), 4, 0)
    faces = Faces(lambda: images, NAMES, pairs, {"name": "noise"})
    monkeypatch.setattr(evaluate, "load_test_set", lambda _: faces)
    return faces


def save(path, names, embeddings):
    np.savez(path, names=np.array(names), embeddings=embeddings)
    return path


def by_person(spoilt=0):
    """A direction a person; the first `spoilt` people's second pictures show the next person."""
    who = np.repeat(np.arange(PEOPLE), SAMPLES)
    who[1 : 2 * spoilt : 2] += 1
    return np.eye(PEOPLE)[who]


def test_example(tmp_path, test_set, capsys):
    """By hand: 4 of 20 people are taken for their neighbours, so rank 1 is 16 of 20."""
    order = np.random.default_rng(0).permutation(len(NAMES) + 3)
    names = np.array([*NAMES, "Extra/1.jpg", "Extra/2.jpg", "Extra/3.jpg"])[order]
    vectors = np.concatenate([by_person(4), np.ones((3, PEOPLE))])[order]
    path = save(tmp_path / "e.npz", names, vectors * 7)
    evaluate.main(Arguments(path, "procedural"))
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["protocol"] == {"name": "noise", "similarity": "cosine"}
    assert "precision" not in found  # of embeddings that were computed elsewhere
    arm = found["arms"]["embeddings"]
    assert arm["rank_1"] == pytest.approx(16 / 20)
    title, *lines = printed.err.splitlines()  # for people
    assert title.split() == ["noise,", "%", "embeddings"]
    rates = f"{100 * arm['accuracy']:.2f} ± {100 * arm['standard_error']:.2f}"
    assert lines[0].split() == ["accuracy", *rates.split()]
    assert lines[2].split() == ["rank", "1", "80.00"]
    same = test_set.pairs.same
    cosines = by_person(4)[test_set.pairs.first] * by_person(4)[test_set.pairs.second]
    s = cosines.sum(1)
    wins = [(g > i) + 0.5 * (g == i) for g in s[same] for i in s[~same]]
    assert arm["auc"] == pytest.approx(np.mean(wins), abs=1e-6)

    output = tmp_path / "found.json"
    save(path, NAMES, by_person().astype(np.float16))
    evaluate.main(Arguments(path, "procedural", output=output))
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "accuracy                 100.00 ±  0.00\n" in printed.err
    assert json.loads(output.read_text())["arms"]["embeddings"]["accuracy"] == 1


def test_paths_are_looked_at_first(tmp_path, monkeypatch):
    """Before pictures are drawn or read for a minute, not after."""
    monkeypatch.setattr(evaluate, "load_test_set", lambda *_, **__: pytest.fail("too late"))
    path = save(tmp_path / "e.npz", NAMES, by_person())
    arguments = Arguments(path, "procedural", output=tmp_path / "no" / "e.json")
    with pytest.raises(FileNotFoundError, match=r"--output: .*no is no folder: make it first"):
        evaluate.main(arguments)
    with pytest.raises(IsADirectoryError, match=r"--output: .* is a folder: name a file in it"):
        evaluate.main(dataclasses.replace(arguments, output=tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no.npz does not exist: pass the network/ or"):
        evaluate.main(Arguments(tmp_path / "no.npz", "procedural"))
    with pytest.raises(ValueError, match=r"^--seed must be between 0 and 4294967295; got -1$"):
        evaluate.main(Arguments(path, "procedural", seed=-1))
    (tmp_path / "network").mkdir()
    with pytest.raises(FileNotFoundError, match="config"):  # from the network, which is loaded
        evaluate.main(Arguments(tmp_path / "network", "procedural"))


def test_embeddings(tmp_path):
    vectors = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]])
    path = save(tmp_path / "e.npz", ["a/1", "b/1", "c/1"], vectors)
    found = read_embeddings(path, ("b/1", "a/1"))
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    whole = save(tmp_path / "i.npz", ["a/1"], np.array([[3, 4]], dtype=np.int32))
    torch.testing.assert_close(read_embeddings(whole, ("a/1",)), torch.tensor([[3.0, 4.0]]))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    net = PartLocalNet("resnet10t", ParsingNet(HELEN, 8, 1, grid=32), FSENET_PARTS)
    net.save_pretrained(folder / "network")
    GlobalNet(Backbone("resnet10t")).save_pretrained(folder / "baseline")
    return folder


@pytest.mark.parametrize("name", ["network", "baseline"])
def test_networks(networks, test_set, name, capsys):
    evaluate.main(Arguments(networks / name, "procedural"))
    found = json.loads(capsys.readouterr().out)
    assert found["precision"] == choose_precision("auto", torch.device("cpu"))
    arms = found["arms"]
    halves = ["global half", "local half", "both"] if name == "network" else ["global half"]
    assert list(arms) == halves
    assert found["test_time"] == "original and mirrored concatenated, then L2"
    evaluate.main(Arguments(networks / name, "procedural", test_time="sum"))
    added = json.loads(capsys.readouterr().out)
    assert added["test_time"] == "original and mirrored added, then L2"
    assert added["arms"] != arms
    assert all(0 <= arm["accuracy"] <= 1 for arm in arms.values())


def test_load_network(networks, tmp_path):
    assert isinstance(load_network(networks / "network"), PartLocalNet)
    assert isinstance(load_network(networks / "baseline"), GlobalNet)
    with pytest.raises(FileNotFoundError, match="is no folder: pass the network/ folder that a"):
        load_network(tmp_path / "nothing")
    # a broken FSENet below a folder of the baseline's name is reported as what it is
    folder = tmp_path / "GlobalNet"
    load_network(networks / "network").save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_network(folder)


def test_procedural_protocol():
    """Twenty people drawn: ten folds whose people are apart, names that tell them."""
    arguments = Arguments(None, "procedural", identities=20, samples=2)
    test = evaluate.load_test_set(arguments)
    assert test.images.shape[:2] == (40, 3)
    assert test.names[:3] == ("1000000/0", "1000000/1", "1000001/0")
    people = {}
    for i, j, fold in zip(test.pairs.first, test.pairs.second, test.pairs.fold, strict=True):
        for picture in (i, j):
            people.setdefault(test.names[picture].split("/")[0], set()).add(fold)
    assert all(len(folds) == 1 for folds in people.values())
    assert set.union(*people.values()) == set(range(10))
    again = evaluate.load_test_set(arguments)
    assert torch.equal(again.images, test.images)
    other = evaluate.load_test_set(dataclasses.replace(arguments, seed=1))
    assert not torch.equal(other.images, test.images)


@pytest.mark.parametrize("kind", ["procedural", "lfw", "calfw", "bin"])
def test_names_come_before_pictures(tmp_path, monkeypatch, capsys, kind):
    """Of embeddings none is drawn or decoded: what is wrong with them is said at once."""
    world, faces = tmp_path / "w", tmp_path / "w"
    if kind == "procedural":
        faces, names = None, [f"{1_000_000 + i // 6}/{i % 6}" for i in range(1200)]
    else:
        fixtures.main(fixtures.Arguments(kind, world))
        names = np.load(world / "features.npz")["names"].tolist()
    if kind == "bin":
        faces = world / "pairs.bin"
    for path in world.rglob("*.jpg"):
        path.write_bytes(b"no picture")
    monkeypatch.setattr("data.faces.draw_faces", lambda *_: pytest.fail("drawn"))
    monkeypatch.setattr("data.faces.load_rgb", lambda *_: pytest.fail("decoded"))
    vectors = np.random.default_rng(0).normal(size=(len(names), 3))
    path = save(tmp_path / "e.npz", names, vectors)
    capsys.readouterr()
    evaluate.main(Arguments(path, kind, faces))
    whole = json.loads(capsys.readouterr().out)
    assert whole["protocol"]["name"] == kind
    assert 0.2 < whole["arms"]["embeddings"]["accuracy"] < 0.8
    save(path, [f"lfw/{name}" for name in names], vectors)
    with pytest.raises(ValueError, match=r"have no embedding \(names there are such as 'lfw/"):
        evaluate.main(Arguments(path, kind, faces))
    vectors[-4] = np.nan
    with pytest.raises(ValueError, match=r"1 embeddings are not finite: "):
        evaluate.main(Arguments(save(path, names, vectors), kind, faces))


@pytest.mark.parametrize("kind", ["lfw", "calfw"])
def test_a_damaged_picture_of_a_pair(networks, tmp_path, kind):
    """Nothing is said of `--damaged`, which these protocols refuse."""
    fixtures.main(fixtures.Arguments(kind, tmp_path / "w"))
    for path in (tmp_path / "w").rglob("*.jpg"):
        path.write_bytes(b"no picture")
    message = r"jpg is no picture of .*; each picture of the protocol counts, none may be left out$"
    with pytest.raises(ValueError, match=message):
        evaluate.main(Arguments(networks / "baseline", kind, tmp_path / "w"))


@pytest.mark.parametrize(
    ("name", "option", "value", "protocols"),
    [
        ("procedural", "faces", Path("x"), "lfw, cfp_ff, cfp_fp, agedb_30, calfw, cplfw, bin"),
        ("cplfw", "unit_features", True, "ijba, ijbb, ijbc"),
        ("ijba", "detector_scores", False, "ijbb, ijbc"),
        ("ijbc", "pooling", "media", "ijba"),
        ("ytf", "megaface", MegafaceOptions(cleaning="facex"), "megaface"),
        ("lfw", "features", Path("x"), "ijba, ijbb, ijbc, ytf, megaface"),
        ("lfw", "workers", 2, "ijba, ijbb, ijbc, ytf, megaface"),
        ("ijba", "frame_pairs", "min", "ytf"),
        ("ijbb", "all_folds", True, "lfw"),
        ("lfw", "seed", 1, "procedural, megaface"),
        ("agedb_30", "identities", 50, "procedural"),
        ("calfw", "samples", 2, "procedural"),
    ],
)
def test_options_of_other_protocols(tmp_path, name, option, value, protocols):
    """None is passed over in silence."""
    path = save(tmp_path / "e.npz", NAMES, by_person())
    flag = {"megaface": "megaface.cleaning"}.get(option, option.replace("_", "-"))
    message = rf"^--{flag} is for --protocol {protocols}.*: leave it out with {name}$"
    with pytest.raises(ValueError, match=message):
        evaluate.main(Arguments(path, name, **{option: value}))
    known = next(iter(protocols.split(", ")))
    ready = path if option == "unit_features" else tmp_path
    check(Arguments(ready, known, **{option: value}))
    for option, value in (("test_time", "sum"), ("precision", "fp32")):
        check(Arguments(tmp_path, name, **{option: value}))
        with pytest.raises(ValueError, match=r"^--(test-time|precision) is for networks"):
            evaluate.main(Arguments(path, name, **{option: value}))


@pytest.mark.parametrize("name", ["ijba", "ijbb", "ijbc", "ytf", "megaface"])
def test_networks_are_told_what_to_do(tmp_path, name):
    options = MegafaceOptions(400) if name == "megaface" else MegafaceOptions()
    folders = {"megaface": "facescrub_images/ and megaface_images/", "ytf": "aligned/"}
    place = folders.get(name, "aligned/" if name == "ijba" else "loose_crop/")
    world, network = tmp_path / "w", tmp_path / "network"
    network.mkdir()
    fixtures.main(fixtures.Arguments(name, world))
    for folder in ("aligned", "loose_crop", "facescrub_images", "megaface_images"):
        shutil.rmtree(world / folder, ignore_errors=True)
    message = rf"^--protocol {name} of a network needs its pictures in {place} beside the lists in "
    with pytest.raises(ValueError, match=message) as caught:
        evaluate.main(Arguments(network, name, world, megaface=options))
    assert "describe them with extract.py" in str(caught.value)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="--protocol lfw needs --faces: LFW as a folder or zip"):
        evaluate.load_test_set(Arguments(None, "lfw"))
    for options in ({"identities": 19}, {"samples": 1}):
        with pytest.raises(ValueError, match="--identities must be at least 20, and --samples at"):
            evaluate.load_test_set(Arguments(None, "procedural", **options))
    path, boom = tmp_path / "e.npz", tmp_path / "boom"
    with pytest.raises(FileNotFoundError):
        read_embeddings(path, ("a/1",))

    two = np.ones((2, 3))

    def with_central(offset, value):
        """Change a byte of the first entry of a zip's central directory."""
        data = bytearray(save(path, NAMES, by_person()).read_bytes())
        data[data.index(b"PK\1\2") + offset] = value
        path.write_bytes(data)

    wrong = {
        "encrypted": lambda: with_central(8, 1),
        "compressed in no known way": lambda: with_central(10, 99),
        "of a later version": lambda: with_central(6, 255),
        "before its begin": lambda: with_central(45, 255),
        "unbalanced": lambda: path.write_bytes(
            save(path, NAMES, by_person()).read_bytes().replace(b"'shape': (", b"'shape':((")
        ),
        "no names": lambda: np.savez(path, embeddings=two),
        "no embeddings": lambda: np.savez(path, names=np.array(["a/1"])),
        "empty": lambda: path.write_bytes(b""),
        "junk": lambda: path.write_bytes(b"junk" * 100),
        "cut": lambda: path.write_bytes(save(path, NAMES, by_person()).read_bytes()[:-30]),
        "pickle": lambda: path.write_bytes(pickle.dumps(Bomb(boom))),
        "pickled names": lambda: np.savez(
            path, names=np.array([Bomb(boom)], dtype=object), embeddings=two
        ),
        "one array": lambda: np.lib.format.write_array(path.open("wb"), two),
        "damaged inside": lambda: path.write_bytes(
            save(path, NAMES, by_person()).read_bytes().replace(b"NUMPY", b"numpy")
        ),
    }
    for case, write in wrong.items():
        write()
        with pytest.raises(ValueError, match="holds no arrays 'embeddings' and 'names'") as caught:
            read_embeddings(path, ("a/1",))
        assert "\n" not in str(caught.value), case
        assert str(caught.value).startswith(str(path)), case
    assert not boom.exists()

    save(path, ["a/1", "b/1"], two)
    message = r"2 pictures of the protocol have no embedding \(names .* 'a/1'\): c/2, d/1$"
    with pytest.raises(ValueError, match=message):
        read_embeddings(path, ("a/1", "c/2", "d/1"))
    with pytest.raises(
        ValueError, match=r"have no embedding \(names there are such as 'b/2.npy'\)"
    ):
        read_embeddings(save(path, ["a/1", "b/2.npy"], two), ("x/b/2.npy",))
    with pytest.raises(ValueError, match=r"have no embedding \(there are no names\): a/1$"):
        read_embeddings(save(path, np.empty(0, str), np.empty((0, 2))), ("a/1",))
    save(path, ["a/1", "b/1"], two)
    for names, embeddings in ((["a/1"], two), (["a/1", "b/1"], two[0]), (["a/1"], two[None])):
        save(path, names, embeddings)
        with pytest.raises(ValueError, match=r"must hold one embedding a picture, \[n, d\] with n"):
            read_embeddings(path, ("a/1",))
    for embeddings in (np.array([["x"]]), np.array([[1j]])):
        save(path, ["a/1"], embeddings)
        with pytest.raises(ValueError, match="embeddings must be real numbers; got dtype"):
            read_embeddings(path, ("a/1",))
    save(path, "a/1", two)  # a name that is no list
    with pytest.raises(ValueError, match=r"names must be a list of strings; got \[\]"):
        read_embeddings(path, ("a/1",))
    save(path, ["a/1", "a/1"], two)
    message = r"must name every picture once; 1 are there more often, keep one .*: a/1$"
    with pytest.raises(ValueError, match=message):
        read_embeddings(path, ("a/1",))
    save(path, ["a/1"], np.array([[1.0, np.nan]]))
    with pytest.raises(ValueError, match="1 embeddings are not finite: a/1"):
        read_embeddings(path, ("a/1",))
    for small in (0, 1e-20):  # the cosine of which would be 0 with everybody
        save(path, ["a/1", "b/1", "c/1"], np.array([[1.0, 2.0], [0.0, small], [small, 0.0]]))
        with pytest.raises(
            ValueError, match=r"2 embeddings are zero, and have no cosine: c/1, b/1$"
        ):
            read_embeddings(path, ("a/1", "c/1", "b/1"))


def test_the_folder_of_a_run_is_no_network(tmp_path):
    (tmp_path / "network").mkdir()
    with pytest.raises(FileNotFoundError, match=r"is the folder of a run: pass .*network"):
        load_network(tmp_path)
