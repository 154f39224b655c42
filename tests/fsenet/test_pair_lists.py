"""CALFW, CPLFW and CFP from their folders, with drawn faces, against pairs looked up by hand."""

import functools
import io
import json
import re
import shutil
import zipfile
from typing import get_args

import evaluate
import numpy as np
import pytest
from data.loose import LoosePictures
from data.pair_sets import published_test_set
from evaluate_options import Arguments
from PIL import Image
from protocols.bins import write_bin
from protocols.fixtures import write_pair_set
from protocols.pair_lists import Listed, contiguous_folds, read_pairs, write_pairs


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """A folder a set, with the embeddings of its pictures."""
    found = {}
    for name in get_args(Listed):
        folder = tmp_path_factory.mktemp(name)
        names, features = write_pair_set(name, folder)
        np.savez(folder / "e.npz", names=np.array(names), embeddings=features)
        found[name] = folder, dict(zip(names, features.astype(float), strict=True))
    return found


def person(path):
    return re.findall(r"\d+", path.partition("_112x112/")[2] or path)[0]


@pytest.mark.parametrize("name", get_args(Listed))
def test_reference(worlds, name, capsys):
    """Cosines and the accuracy of each fold at the best threshold of the others, by loops."""
    folder, features = worlds[name]
    evaluate.main(Arguments(folder / "e.npz", name, folder))
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"]["name"] == name
    assert found["protocol"]["pairs"] == 40
    assert len(found["protocol"]["list_sha256"]) == {"cfp_ff": 21, "cfp_fp": 22}.get(name, 1)

    test = published_test_set(folder, name, ())
    scores = []
    for i, j, same in zip(test.pairs.first, test.pairs.second, test.pairs.same, strict=True):
        a, b = test.names[i], test.names[j]
        assert same == (person(a) == person(b))
        if name == "cfp_fp":
            assert ("frontal" in a, "profile" in b) == (True, True)
        if name == "cfp_ff":
            assert "frontal" in a
            assert "frontal" in b
        x, y = features[a], features[b]
        scores.append(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    scores, same, fold = np.array(scores), test.pairs.same, test.pairs.fold
    assert np.bincount(fold).tolist() == [4] * 10
    rates = []
    for k in range(10):
        rest = fold != k

        def right(threshold, rest=rest):
            return np.sum((scores[rest] >= threshold) == same[rest])

        best = max(sorted({*scores[rest], np.inf}, reverse=True), key=right)  # the first of equals
        rates.append(np.mean((scores[~rest] >= best) == same[~rest]))
    numbers = found["arms"]["embeddings"]
    assert numbers["accuracy"] == pytest.approx(np.mean(rates))
    assert 0.6 < numbers["accuracy"] < 1
    assert 0.5 < numbers["insightface"]["accuracy"] <= 1
    assert "rank_1" not in numbers  # who is who is not said
    place = folder / "Data" if name.startswith("cfp") else folder
    pixels = np.asarray(Image.open(place / test.names[7]))
    np.testing.assert_array_equal(test.images[7].permute(1, 2, 0), pixels)


@pytest.mark.parametrize("name", get_args(Listed))
def test_round_trip(worlds, name, tmp_path):
    read = read_pairs(worlds[name][0], name)
    write_pairs(tmp_path, name, read)
    again = read_pairs(tmp_path, name)
    assert again.pictures == read.pictures
    for a, b in zip(vars(again.pairs).values(), vars(read.pairs).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    if not name.startswith("cfp"):  # whose numbers count pictures that are in no pair too
        assert again.hashes == read.hashes


def test_folds():
    """As the published sets have them: 3,000 genuine pairs, then as many others."""
    folds = contiguous_folds(np.repeat([True, False], 3000))
    assert folds.tolist() == [fold for _ in range(2) for fold in range(10) for _ in range(300)]


def test_pictures(worlds, tmp_path):
    """From an archive; those that are aligned before others; all that lack are told."""
    folder, _ = worlds["calfw"]
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, f"calfw/{path.relative_to(folder)}")
    packed = published_test_set(tmp_path / "c.zip", "calfw", ())
    plain = published_test_set(folder, "calfw", ())
    assert (packed.images == plain.images).all()
    assert packed.names == plain.names

    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    shutil.copytree(copied / "aligned images", copied / "images")
    for path in (copied / "images").iterdir():
        Image.new("RGB", (50, 50)).save(path)
    assert (published_test_set(copied, "calfw", ()).images == plain.images).all()
    (copied / "aligned images").rename(copied / "other")
    with pytest.raises(ValueError, match=r"holds 2 pictures Person_00_0001\.jpg, as images/.* and"):
        published_test_set(copied, "calfw", ())
    shutil.rmtree(copied / "images")
    for number in ("03_0001", "05_0002"):
        (copied / f"other/Person_{number}.jpg").unlink()
    message = r"lacks 2 of the 40 pictures that the pairs name: Person_03_0001\.jpg, Person_05_0002"
    with pytest.raises(ValueError, match=message):
        published_test_set(copied, "calfw", ())


def test_loose(tmp_path):
    """Names leave out one folder around all, and no other; a part keeps its order."""
    for name in ("all/a/1.png", "all/a/b/2.png", "all/c/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (int(name[-5]), 0, 0)).save(tmp_path / name)
    pictures = LoosePictures(tmp_path)
    assert pictures.paths == ("a/1.png", "a/b/2.png", "c/3.png")
    part = pictures.take(np.array([2, 0]))
    assert part.paths == ("c/3.png", "a/1.png")
    assert [int(part.load(i)[0, 0, 0]) for i in range(2)] == [3, 1]
    assert part.where(0) == f"{tmp_path}:all/c/3.png"
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    assert LoosePictures(tmp_path).paths[0] == "0.png"
    assert LoosePictures(tmp_path / "all/a/b").paths == ("2.png",)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no pictures \(0 files\)"):
        LoosePictures(tmp_path / "none")


@pytest.mark.parametrize("name", ["lfw", "cfp_fp", "agedb_30", "calfw", "cplfw", "bin"])
def test_bins(tmp_path, name):
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112)).save(buffer, "PNG")
    write_bin(tmp_path / "a.bin", [buffer.getvalue()] * 40, [True, False] * 10)
    test = published_test_set(tmp_path / "a.bin", name, ())
    assert test.flags["name"] == name
    assert test.flags["pairs"] == 20
    assert len(test.flags["sha256"]) == 64


def test_errors(worlds, tmp_path, refused_when_changed):
    with pytest.raises(FileNotFoundError, match=r"holds no agedb_30_ann\.txt"):
        published_test_set(tmp_path, "agedb_30", ())
    for name in ("calfw", "cfp_fp"):
        with pytest.raises(FileNotFoundError, match=r"holds no (pairs_CALFW|Pair_list_F)"):
            published_test_set(tmp_path, name, ())
    with pytest.raises(ValueError, match="--protocol cplfw needs --faces: CPLFW's folder with"):
        evaluate.main(Arguments(worlds["calfw"][0] / "e.npz", "cplfw"))
    with pytest.raises(ValueError, match="--all-folds is for --protocol lfw: leave it out"):
        evaluate.main(Arguments(worlds["calfw"][0] / "e.npz", "cplfw", tmp_path, all_folds=True))
    cases = {
        ("calfw", "pairs_CALFW.txt"): [
            (lambda s: "x\n" + s, r"pairs_CALFW.txt line 1 should be 'picture number'; got 'x'"),
            (lambda s: s.replace(" 1\n", " yes\n", 1), "line 1 should be 'picture number'; got"),
            (lambda s: s.replace(" 1\n", " 0\n", 1), "lines 1 and 2 are one pair, and their numbe"),
            (lambda s: s + "a.jpg 1\n", "must hold two lines a pair, and 10 pairs of each kind"),
            (lambda s: "", "must hold two lines a pair, and 10 pairs of each kind"),
            (lambda s: s.replace(" 0\n", " 3\n"), "must hold two lines a pair, and 10 pairs of e"),
        ],
        ("cfp_fp", "Protocol/Pair_list_P.txt"): [
            (
                lambda s: s.replace("1 ../", "one ../", 1),
                "Pair_list_P.txt line 1 should be 'number",
            ),
            (
                lambda s: s.replace("2 ../", "1 ../", 1),
                "Pair_list_P.txt line 2 should have a number of its own; 1 is ",
            ),
            (
                lambda s: s.replace("4 ../", "400 ../", 1),
                "should be two numbers of Pair_list_F and",
            ),
        ],
        ("cfp_fp", "Protocol/Split/FP/03/diff.txt"): [
            (
                lambda s: "7;8\n" + s,
                "Split/FP/03/diff.txt line 1 should be two numbers of Pair_list",
            ),
            (lambda s: ",\n" + s, "Split/FP/03/diff.txt line 1 should be two numbers of Pair_list"),
        ],
    }
    blank = tmp_path / "blank"
    shutil.copytree(worlds["cfp_fp"][0] / "Protocol", blank / "Protocol")
    for path in blank.rglob("Pair_list_*.txt"):
        path.write_text(path.read_text().replace("\n", "\n\n"))
    assert (
        read_pairs(blank, "cfp_fp").pictures == read_pairs(worlds["cfp_fp"][0], "cfp_fp").pictures
    )
    place = blank / "Protocol/Split/FP/03/diff.txt"
    place.write_text(",\n" + place.read_text())
    with pytest.raises(ValueError, match="line 1 should be two numbers of Pair_list_F"):
        read_pairs(blank, "cfp_fp")
    cases["agedb_30", "agedb_30_ann.txt"] = [
        (
            lambda s: "2 a b\n" + s,
            "agedb_30_ann.txt line 1 should be 'same path path', same 0 or 1",
        ),
        (lambda s: s + "1 a\n", "agedb_30_ann.txt line 41 should be 'same path path'"),
        (lambda s: s.replace("\n0 ", "\n1 "), "must hold 10 pairs of each kind at least; got 40"),
    ]
    for (name, file), changes in cases.items():
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        write_pairs(place, name, read_pairs(worlds[name][0], name))
        read = functools.partial(read_pairs, place, name)
        refused_when_changed(place / file, changes, read)
    listed = read_pairs(worlds["calfw"][0], "calfw")
    with pytest.raises(ValueError, match="pictures of CFP lie in <person>/frontal/ or"):
        write_pairs(tmp_path, "cfp_fp", listed._replace(pictures=tuple(
            f"x/y/{picture}" for picture in listed.pictures)))  # fmt: skip
