"""The protocols that compare sets of pictures, from a network in one go."""

import dataclasses
import json
import shutil

import evaluate
import numpy as np
import pytest
import torch
from data.listed import ListedPictures
from describe import describe
from evaluate import Arguments
from feature_protocols import Ijba, Megaface, MegafaceOptions, Ytf
from model import GlobalNet, load_network
from PIL import Image
from protocols import fixtures
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
        assert found["arms"]["whole descriptor"]["auc"] == pytest.approx(expected["auc"], abs=0.01)
        assert found["alignment"] == "as in aligned/"
    assert len(Ytf(folder).pictures()[""]) == len(names) == 120
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
    protocol = Ijba(folder)
    pictures = protocol.pictures()[""]
    names = np.load(folder / "features.npz")["names"].tolist()
    assert sorted(pictures.paths) == sorted(names)
    shared = next(name for name in names if "#" in name)
    place = shared.replace(".jpg#", "#").replace(".png#", "#")
    at = pictures.paths.index(shared)
    assert pictures.where(at) == f"{folder}:aligned/{place}.jpg"
    for name in names:  # but for the last few
        if name != shared and names.index(name) < len(names) - 200:
            file, mark, sighting = name.partition("#")
            stem = file.rpartition(".")[0]
            (folder / "aligned" / (f"{stem}#{sighting}.jpg" if mark else file)).unlink()
    found = evaluated(capsys, baseline, "ijba", folder)
    numbers = found["arms"]["whole descriptor"]
    few = protocol.pictures()[""]
    assert len(few) == 201
    rows = {name: row for row, name in enumerate(few.paths)}
    places = [folder / few.where(row).partition(":")[2] for row in range(201)]
    features = described(baseline, places)
    expected = protocol.protocol.evaluate(rows, features)
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
    numbers = found["arms"]["whole descriptor"]
    assert numbers["pairs"] == expected["pairs"]
    for rank, share in expected["rank"]["strict"].items():
        assert numbers["rank"]["strict"][rank] == pytest.approx(share, abs=0.03)
    evaluate.main(Arguments(kept, "megaface", folder, megaface=FEW))
    again = json.loads(capsys.readouterr().out)
    assert again["arms"]["embeddings"] == numbers
    assert found["alignment"] == "as in facescrub_images/ and megaface_images/"

    path = folder / "facescrub_images" / protocol.probes[3]
    path.rename(path.with_suffix(".webp"))  # aligned, and saved as something else
    assert Megaface(folder, FEW).pictures()["facescrub"].paths == protocol.probes
    path.with_suffix(".webp").unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of the .* list, first {path.name[:6]}"):
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


def test_options():
    """Each protocol gets its own."""
    arguments = Arguments(None, "ijba", unit_features=True, pooling="media")
    assert evaluate.open_protocol(arguments, "x") == Ijba("x", True, "media")
    other = dataclasses.replace(arguments, protocol="ytf", frame_pairs="max")
    assert evaluate.open_protocol(other, "x") == Ytf("x", "max")
    more = dataclasses.replace(arguments, protocol="megaface", megaface=FEW, seed=3)
    assert evaluate.open_protocol(more, "x") == Megaface("x", FEW, 3)
