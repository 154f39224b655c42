"""The protocols that compare sets of pictures, from a network in one go."""

import dataclasses
import json
import shutil

import evaluate
import extract
import numpy as np
import pytest
import torch
from data.listed import ListedPictures
from describe import describe
from evaluate import open_protocol
from evaluate_options import Arguments
from feature_protocols import MegafaceOptions
from model import GlobalNet, load_network
from PIL import Image
from protocols import fixtures
from protocols.devkit import write_feature
from protocols.ijb import IjbProtocol
from protocols.megaface import MegafaceProtocol
from protocols.ytf import YtfProtocol
from workplace import this_process

from partlocal.backbone import Backbone

FEW = MegafaceOptions(distractors=400)


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network") / "baseline"
    torch.manual_seed(0)
    GlobalNet(Backbone("resnet10t")).save_pretrained(folder)
    return folder


def world(kind, folder):
    fixtures.main(fixtures.Arguments(kind, folder))
    return folder


def evaluated(capsys, *arguments, **options):
    evaluate.main(Arguments(*arguments, precision="fp32", **options))
    return json.loads(capsys.readouterr().out)


def thin(folder, keep, count=200):
    """Remove all pictures but some, for these have to be described."""
    paths = sorted(folder.rglob("*.*"), key=lambda path: path != folder / keep)
    for path in paths[count:]:
        path.unlink()


def described(network, paths):
    """The embeddings of picture files, without the readers and folders of an extraction."""
    pictures = np.stack([np.asarray(Image.open(path)) for path in paths])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    return describe(load_network(network), images, this_process("fp32")).global_half.numpy()


def test_ytf(baseline, tmp_path, capsys):
    folder = world("ytf", tmp_path / "w")
    (folder / "aligned/Nobody/0").mkdir(parents=True)
    shutil.copy(folder / "aligned/Person_02/0/0.jpg", folder / "aligned/Nobody/0/0.jpg")
    protocol = YtfProtocol.read(folder)
    names = [str(path.relative_to(folder / "aligned"))
             for path in sorted((folder / "aligned").glob("Person*/*/*.jpg"))]  # fmt: skip
    features = described(baseline, [folder / "aligned" / name for name in names])
    for how in ("none", "min"):
        capsys.readouterr()
        found = evaluated(capsys, baseline, "ytf", folder, frame_pairs=how)
        expected = protocol.evaluate(names, features, how)
        assert found["arms"]["global half"]["auc"] == pytest.approx(expected["auc"], abs=0.01)
        assert found["alignment"] == "as in aligned/"
    opened = open_protocol(Arguments(None, "ytf"), folder, unit=True)
    assert len(opened.pictures()[""]) == len(names) == 120
    shutil.rmtree(folder / "aligned/Person_03/1")
    shutil.rmtree(folder / "aligned/Person_05/0")
    with pytest.raises(
        ValueError, match=r"^2 of the list's 40 videos .*: Person_03/1, Person_05/0$"
    ):
        evaluated(capsys, baseline, "ytf", folder)


def test_ijba(baseline, tmp_path, capsys):
    """Two people of one picture have files of their own; faces that were not found are counted."""
    folder = world("ijba", tmp_path / "w")
    capsys.readouterr()
    protocol = open_protocol(Arguments(None, "ijba"), folder, unit=True)
    pictures = protocol.pictures()[""]
    names = np.load(folder / "features.npz")["names"].tolist()
    assert sorted(pictures.paths) == sorted(names)
    shared = next(name for name in names if "#" in name)
    place = shared.replace(".jpg#", "#").replace(".png#", "#")
    at = pictures.paths.index(shared)
    assert pictures.where(at) == f"{folder}:aligned/{place}.jpg"
    thin(folder / "aligned", keep=f"{place}.jpg")
    found = evaluated(capsys, baseline, "ijba", folder)
    numbers = found["arms"]["global half"]
    few = protocol.pictures()[""]
    assert len(few) == 200
    rows = {name: row for row, name in enumerate(few.paths)}
    places = [folder / few.where(row).partition(":")[2] for row in range(200)]
    features = described(baseline, places)
    expected = protocol.lists.evaluate(rows, features)
    for split, one in expected["splits"].items():
        assert numbers["splits"][split]["faces_without_embedding"] == one["faces_without_embedding"]
        assert numbers["splits"][split]["empty_templates"] == one["empty_templates"] > 0
    assert numbers["mean"]["rank"]["10"] == pytest.approx(expected["mean"]["rank"]["10"], abs=0.02)


def test_megaface(baseline, tmp_path, capsys):
    folder = world("megaface", tmp_path / "w")
    capsys.readouterr()
    protocol = MegafaceProtocol.read(folder, 400)
    kept = tmp_path / "features"
    found = evaluated(capsys, baseline, "megaface", folder, features=kept, megaface=FEW)
    sides = (
        described(baseline, [folder / place / name for name in names])
        for place, names in (
            ("facescrub_images", protocol.probes),
            ("megaface_images", protocol.distractors),
        )
    )
    expected, _ = protocol.evaluate(*sides)
    numbers = found["arms"]["global half"]
    assert numbers["pairs"] == expected["pairs"]
    for rank, share in expected["rank"]["strict"].items():
        assert numbers["rank"]["strict"][rank] == pytest.approx(share, abs=0.03)
    evaluate.main(Arguments(kept, "megaface", folder, megaface=FEW))
    again = json.loads(capsys.readouterr().out)
    assert again["arms"]["embeddings"] == numbers
    assert found["alignment"] == "as in facescrub_images/ and megaface_images/"

    path = folder / "facescrub_images" / protocol.probes[3]
    path.rename(path.with_suffix(".webp"))  # aligned, and saved as something else
    opened = open_protocol(Arguments(None, "megaface", megaface=FEW), folder, unit=True)
    assert opened.pictures()["facescrub"].paths == protocol.probes
    path.with_suffix(".webp").unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the .* list: .*{path.name}"):
        evaluated(capsys, baseline, "megaface", folder, megaface=FEW)


@pytest.mark.parametrize("kind", ["ytf", "megaface"])
def test_lists_come_first(baseline, tmp_path, monkeypatch, kind):
    """Not after hours of describing."""
    folder = world(kind, tmp_path / "w")
    lists = [*folder.glob("*.txt"), *folder.glob("templatelists/*"), *folder.glob("IJB*/split1/*")]
    for path in lists:
        path.write_text("")
    monkeypatch.setattr(evaluate, "extract", lambda *_: pytest.fail("too late"))
    with pytest.raises((FileNotFoundError, ValueError), match=r"splits|titles|has no list 'path'"):
        evaluate.main(Arguments(baseline, kind, folder, megaface=FEW if kind == "megaface" else
                                MegafaceOptions()))  # fmt: skip


def test_listed_pictures(tmp_path):
    """From an archive as from a folder; a name with two files that fit is refused."""
    folder = world("ytf", tmp_path / "w")
    archive = shutil.make_archive(str(tmp_path / "w"), "zip", tmp_path, "w")
    wanted = {"Person_04/1/2.png": "two", "Person_02/0/0.jpg": "one", "Person_00/0/0.jpg": "none"}
    found = [ListedPictures(path, "aligned", wanted, 112) for path in (folder, archive)]
    for pictures in found:
        assert pictures.paths == ("two", "one")
        assert pictures.missing == ("Person_00/0/0.jpg",)
        expected = np.asarray(Image.open(folder / "aligned/Person_02/0/0.jpg"))
        np.testing.assert_array_equal(pictures.load(1), expected)
    assert found[1].where(0) == f"{archive}:w/aligned/Person_04/1/2.jpg"
    taken = found[0].take(np.array([1]))
    assert taken.where(0).endswith("aligned/Person_02/0/0.jpg")
    Image.new("RGB", (9, 9)).save(folder / "aligned/Person_02/0/0.png")
    exact = ListedPictures(folder, "aligned", {"Person_02/0/0.png": "x"})
    assert exact.load(0).shape == (9, 9, 3)
    with pytest.raises(ValueError, match=r"0\.jpg and Person_02/0/0\.png for Person_02/0/0$"):
        ListedPictures(folder, "aligned", {"Person_02/0/0": "x"})
    with pytest.raises(FileNotFoundError, match="none of the pictures that the lists name lies in"):
        ListedPictures(folder, "aligned", {"x": "x"})
    with pytest.raises(FileNotFoundError, match=r"lies in elsewhere/"):
        ListedPictures(folder, "elsewhere")
    shutil.copytree(folder / "aligned/Person_02", folder / "more/aligned/P")
    with pytest.raises(ValueError, match=r"holds 2 folders aligned, aligned/ and more/aligned/: "):
        ListedPictures(folder, "aligned")


@pytest.mark.parametrize("kind", ["ytf", "ijbc", "ijba", "megaface"])
def test_damaged(baseline, tmp_path, capsys, kind):
    """Left out and counted within the budget, but for MegaFace, where each picture counts."""
    folder = world(kind, tmp_path / "w")
    names = {
        "ytf": "aligned/Person_03/1/0.jpg",
        "ijbc": f"loose_crop/{crowded(folder)}" if kind == "ijbc" else "",
        "ijba": "aligned/img/100#100.jpg",
        "megaface": "megaface_images/0/0@N00/0.jpg",
    }
    path = folder / names[kind]
    if kind == "ijba":
        thin(folder / "aligned", keep="img/100#100.jpg")
    whole = path.read_bytes()
    path.write_bytes(whole[:300])
    kept, more = tmp_path / "kept", {"megaface": FEW} if kind == "megaface" else {}
    how = dict(features=kept, **more)
    with pytest.raises(
        ValueError, match=r"^1 damaged pictures, and --damaged allows 0: replace th"
    ):
        evaluated(capsys, baseline, kind, folder, **how)
    capsys.readouterr()
    if kind == "megaface":
        with pytest.raises(ValueError, match=r"1 pictures .* could not be read .*: 0/0@N00/0.jpg$"):
            evaluated(capsys, baseline, kind, folder, damaged=1, **how)
    else:
        found = evaluated(capsys, baseline, kind, folder, damaged=1, **how)
        numbers = found["arms"]["global half"]
        if kind == "ijba":
            faces = [one["faces_without_embedding"] for one in numbers["splits"].values()]
        else:
            assert found["protocol"][{"ytf": "lost_frames", "ijbc": "lost_faces"}[kind]] == 1
    path.write_bytes(whole)  # and described again, with its neighbours in the batch
    capsys.readouterr()
    found = evaluated(capsys, baseline, kind, folder, **how)
    if kind == "ijba":
        again = found["arms"]["global half"]["splits"].values()
        assert sum(one["faces_without_embedding"] for one in again) == sum(faces) - 1
    elif kind != "megaface":
        assert found["protocol"][{"ytf": "lost_frames", "ijbc": "lost_faces"}[kind]] == 0


def crowded(folder):
    """A face of a template that has others."""
    lists = IjbProtocol.read(folder, "ijbc")
    count = np.bincount(lists.templates)[lists.templates]
    return lists.names[int(np.argmax(count))]


def test_extracted_first(baseline, tmp_path, capsys):
    """As with several GPUs: the folder that extract.py leaves gives the same numbers."""
    folder = world("ijba", tmp_path / "w")
    thin(folder / "aligned", keep="img/100#100.jpg")
    plain = [path for path in (folder / "aligned").rglob("*.*") if "#" not in path.name]
    for path in plain:
        path.rename(path.with_suffix(".jpeg"))
    assert len(plain) > 50
    how = extract.Extraction(dtype="fp32", precision="fp32")
    pictures = extract.open_to_describe(folder / "aligned")
    extract.extract(baseline, pictures, tmp_path / "f", how)
    capsys.readouterr()
    evaluate.main(Arguments(tmp_path / "f", "ijba", folder))
    first = json.loads(capsys.readouterr().out)
    found = evaluated(capsys, baseline, "ijba", folder)
    one, two = first["arms"]["embeddings"], found["arms"]["global half"]
    assert first["protocol"] == found["protocol"]
    assert found["protocol"]["feature_norm"] == "N0"
    made = ("test_time", "vectors", "precision", "dtype")
    assert [first[name] for name in made] == [found[name] for name in made]
    assert one["mean"]["rank"] == pytest.approx(two["mean"]["rank"], abs=0.01)
    for split, numbers in one["splits"].items():
        assert numbers["faces_without_embedding"] == two["splits"][split]["faces_without_embedding"]


def test_mixed_widths(tmp_path):
    folder = world("megaface", tmp_path / "w")
    found = np.load(folder / "features.npz")
    names, vectors = found["names"], found["embeddings"]
    for part, some, width in (("facescrub", slice(46), 16), ("megaface", slice(46, None), 8)):
        (tmp_path / "f" / part).mkdir(parents=True)
        for name, vector in zip(names[some], vectors[some], strict=True):
            write_feature(tmp_path / "f" / part / f"{name}_partlocal.bin", vector[:width])
    with pytest.raises(ValueError, match=r"of 16 numbers of FaceScrub and of 8 of MegaFace: descr"):
        evaluate.main(Arguments(tmp_path / "f", "megaface", folder, megaface=FEW))


def test_bad_embeddings_are_named(tmp_path):
    folder = world("ytf", tmp_path / "w")
    found = np.load(folder / "features.npz")
    for value, what in ((0, "zero, and have no cosine"), (np.nan, "not finite")):
        vectors = found["embeddings"].copy()
        vectors[7] = value
        path = tmp_path / "e.npz"
        np.savez(path, names=found["names"], embeddings=vectors)
        for how in ("none", "max"):
            with pytest.raises(ValueError, match=f"1 embeddings are {what}: {found['names'][7]}$"):
                evaluate.main(Arguments(path, "ytf", folder, frame_pairs=how))


def test_paths_and_options(baseline, tmp_path):
    (tmp_path / "file").touch()
    arguments = Arguments(baseline, "ytf", tmp_path, features=tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"^--features: .*file is a file: name a folder$"):
        evaluate.main(arguments)
    arguments = dataclasses.replace(arguments, features=tmp_path / "no/x")
    with pytest.raises(FileNotFoundError, match=r"^--features: .*no is no folder: make it first$"):
        evaluate.main(arguments)
    with pytest.raises(
        ValueError, match=r"^--unit-features: leave it out, a network's descriptors"
    ):
        evaluate.main(Arguments(baseline, "ijbc", tmp_path, unit_features=True))
    with pytest.raises(ValueError, match=r"^--seed is for --megaface.cleaning insightface: leave"):
        evaluate.main(Arguments(baseline, "megaface", tmp_path, seed=1))
