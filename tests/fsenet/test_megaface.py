"""MegaFace against loops over every pair and every distractor, in the devkit's own layout."""

import json
import re
import shutil
import struct
import tarfile

import evaluate
import numpy as np
import pytest
from evaluate_options import Arguments
from feature_protocols import MegafaceOptions
from protocols.devkit import FeatureFiles, read_feature, write_feature
from protocols.fixtures import write_megaface
from protocols.megaface import FARS, MegafaceProtocol

from partlocal.evaluation import search


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("megaface")
    names, features = write_megaface(folder)
    np.savez(folder / "features.npz", names=np.array(names), embeddings=features)
    return folder, dict(zip(names, features.astype(float), strict=True))


def by_loops(protocol, features, cleaning):
    """Rank of each ordered pair among the distractors, and the rates of all pairs."""

    def unit(x):
        return x / np.linalg.norm(x)

    probes = [(person, name, unit(features[name]))
              for person, name in zip(protocol.people, protocol.probes, strict=True)]  # fmt: skip
    wrong = {name for name in protocol.probes if name.split("/")[1] in protocol.noisy_probes}
    distractors = {name: unit(features[name]) for name in protocol.distractors}
    impostors = len(probes) * len(distractors)
    if cleaning != "none":
        for name in protocol.noisy_distractors:
            distractors[name] = None if cleaning != "facex" else np.zeros(16)
        distractors = {name: x for name, x in distractors.items() if x is not None}
        if cleaning == "leave_out":
            probes = [probe for probe in probes if probe[1] not in wrong]
            impostors = len(probes) * len(distractors)
        else:
            probes = [
                (p, n, x if n not in wrong else unit(
                    sum(y for q, m, y in probes if q == p and m not in wrong)))
                for p, n, x in probes
            ]  # fmt: skip
    ahead, genuine = [], []
    strangers = np.array([[x @ y for y in distractors.values()] for _, _, x in probes])
    for i, (person, _, x) in enumerate(probes):
        for j, (other, _, y) in enumerate(probes):
            if i != j and person == other:
                genuine.append(x @ y)
                ahead.append(np.sum(strangers[j] > x @ y))
    return np.array(ahead), np.array(genuine), np.sort(strangers.ravel())[::-1], impostors


@pytest.mark.parametrize("cleaning", ["none", "leave_out", "insightface", "facex"])
def test_reference(world, cleaning, monkeypatch):
    monkeypatch.setattr(search, "ROWS", 7)
    monkeypatch.setattr(search, "COLUMNS", 33)
    monkeypatch.setattr("protocols.megaface.FARS", (1e-3, 1e-2, 1e-1))
    folder, features = world
    protocol = MegafaceProtocol.read(folder, 400)
    rows = [np.array([features[name] for name in side], np.float32)
            for side in (protocol.probes, protocol.distractors)]  # fmt: skip
    found, curves = protocol.evaluate(*rows, cleaning)
    ahead, genuine, strangers, impostors = by_loops(protocol, features, cleaning)
    # insightface's random moves of a thousandth change next to nothing
    near = {"abs": 0.01 if cleaning == "insightface" else 1e-9}
    assert (found["pairs"], found["impostor_pairs"]) == (len(genuine), impostors)
    for mode in ("strict", "parity"):
        assert found["rank"][mode]["1"] == pytest.approx(np.mean(ahead < 1), **near)
        assert found["rank"][mode]["10"] == pytest.approx(np.mean(ahead < 10), **near)
        assert list(found["rank"][mode]) == ["1", "10", "100"]  # of 400 distractors
    for far in (1e-3, 1e-2, 1e-1):
        strict = np.mean(genuine > strangers[int(far * impostors)])
        nearest = np.mean(genuine >= strangers[round(far * impostors) - 1])
        assert found["tar_at_far"]["strict"][str(far)] == pytest.approx(strict, **near)
        assert found["tar_at_far"]["parity"][str(far)] == pytest.approx(nearest, **near)
    ranks, rates = curves.cmc
    assert ranks == list(range(400 if cleaning in ("none", "facex") else 390))
    assert rates[7] == pytest.approx(np.mean(ahead <= 7), **near)
    fars, tars = curves.roc
    for far, tar in zip(fars[::50], tars[::50], strict=True):
        level = strangers[round(far * impostors) - 1]
        assert tar == pytest.approx(np.mean(genuine >= level), **near)
    assert 0.1 < found["rank"]["strict"]["1"] < found["rank"]["strict"]["10"] < 1
    # what is in use
    assert found["noisy"] == {"facescrub": 4, "megaface": 10}


def test_ties():
    """By hand: of two pictures of one person, one distractor is exactly as near, one nearer."""
    lists = (("a/1", "a/2"), np.zeros(2, int), ("x", "y", "z"), frozenset(), frozenset(), {})
    protocol = MegafaceProtocol(*lists)
    probes = np.array([[1, 0, 0], [0, 1, 0]])  # a cosine of 0
    distractors = np.array([[0, 0, 1], [0, 0, -1], [-1, -1, 0]])
    found, _ = protocol.evaluate(probes, distractors)
    assert found["rank"] == {"strict": {"1": 0.0}, "parity": {"1": 1.0}}
    found, curves = protocol.evaluate(probes, np.array([[1, 1, 0], [0, 0, -1], [-1, -1, 0]]))
    assert found["rank"]["parity"]["1"] == 0
    assert curves.cmc == [[0, 1, 2], [0.0, 1.0, 1.0]]
    assert found["tar_at_far"]["strict"]["1e-06"] == 0


def test_evaluate(world, tmp_path, capsys):
    """From an .npz, an .npy on disk, and the devkit's own files: the same numbers."""
    folder, features = world
    names = list(features)
    np.save(tmp_path / "f.npy", np.array(list(features.values()), np.float32)[::-1])
    (tmp_path / "f.txt").write_text("".join(f"{name}\n" for name in reversed(names)))
    found = []
    for place in (folder / "features.npz", tmp_path / "f.npy", folder / "features"):
        options = MegafaceOptions(400, cleaning="insightface", results=tmp_path)
        evaluate.main(Arguments(place, "megaface", folder, megaface=options))
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["arms"] == found[1]["arms"] == found[2]["arms"]
    flags = found[0]["protocol"]
    assert (flags["cleaning"], flags["distractors"], flags["seed"]) == ("insightface", 400, 0)
    assert len(flags["list_sha256"]) == 4
    written = json.loads(
        (tmp_path / "cmc_facescrub_megaface_partlocal-insightface_400_1.json").read_text()
    )
    assert written["cmc"][1][0] == found[0]["arms"]["embeddings"]["rank"]["parity"]["1"]
    assert len(written["roc"][0]) == len(written["roc"][1]) > 1
    assert set(FARS) == set(map(float, found[0]["arms"]["embeddings"]["tar_at_far"]["strict"]))


def test_archive(world, tmp_path):
    with tarfile.open(tmp_path / "lists.tar", "w") as archive:
        archive.add(world[0] / "templatelists", "devkit/templatelists")
    read = MegafaceProtocol.read(tmp_path / "lists.tar", 400)
    assert read.probes == MegafaceProtocol.read(world[0], 400).probes
    assert not read.noisy_probes  # the archive has no such list
    assert len(read.hashes) == 2


@pytest.mark.parametrize("cleaning", ["leave_out", "insightface", "facex"])
def test_cleaning_needs_lists(world, tmp_path, cleaning):
    """Without them, or with those of other pictures, the numbers would be those of `none`."""
    folder, _ = world
    shutil.copytree(folder / "templatelists", tmp_path / "templatelists")
    options = MegafaceOptions(400, cleaning=cleaning)
    arguments = Arguments(folder / "features.npz", "megaface", tmp_path, megaface=options)
    for name in ("facescrub", "megaface"):
        message = rf"--megaface\.cleaning {cleaning} needs {name}_noises\.txt, and .* holds none"
        with pytest.raises(FileNotFoundError, match=message):
            evaluate.main(arguments)
        (tmp_path / f"{name}_noises.txt").write_text("# of others\n7\tnobody.jpg\n")
    with pytest.raises(ValueError, match=r"the lists of noises in .* name no picture of its other"):
        evaluate.main(arguments)


def test_cleaning_leaves_something(tmp_path):
    """With nobody, or no distractor, left there would be rates of nothing."""
    lists = (("a/1", "a/2", "b/1", "b/2"), np.array([0, 0, 1, 1]), ("x", "y"))
    for noisy, what in (
        ((frozenset("1"), frozenset()), "person with two pictures"),
        ((frozenset("12"), frozenset()), "person with two pictures"),
        ((frozenset(), frozenset("xy")), "distractor"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        MegafaceProtocol(*lists, *noisy, {}).write(folder)
        arguments = Arguments(tmp_path, "megaface", folder, megaface=MegafaceOptions(
            2, cleaning="leave_out"))  # fmt: skip
        message = f"--megaface.cleaning leave_out: the lists of noises in .* leave no {what}: use"
        with pytest.raises(ValueError, match=message):
            evaluate.open_protocol(arguments, folder, False)
        message = f"leave_out: the lists of noises leave no {what}: use another cleaning$"
        with pytest.raises(ValueError, match=message):
            MegafaceProtocol(*lists, *noisy, {}).evaluate(np.ones((4, 3)), np.ones((2, 3)),
                                                          "leave_out")  # fmt: skip
    empty = MegafaceProtocol(*lists, frozenset(), frozenset("xy"), {})
    with pytest.raises(ValueError, match=r"insightface: the lists of .* leave no distractor"):
        empty.evaluate(np.ones((4, 3)), np.ones((2, 3)), "insightface")
    MegafaceProtocol(*lists, frozenset("1"), frozenset("x"), {}).check_cleaning("", "none")


def test_feature_files(tmp_path):
    """The bytes as OpenCV's matrix has them; damaged ones are named."""
    path = tmp_path / "a/1.jpg_x.bin"
    write_feature(path, np.array([0.5, -2.0]))
    assert path.read_bytes() == struct.pack("<4i2f", 2, 1, 4, 5, 0.5, -2.0)
    assert read_feature(path).tolist() == [0.5, -2.0]
    write_feature(tmp_path / "a/2.jpg_x.bin", np.array([1.0, 3.0]))
    files = FeatureFiles(tmp_path, ["a/1.jpg", "a/2.jpg"], "x")
    assert files[np.array([1, 0])].tolist() == [[1, 3], [0.5, -2]]
    assert files[1:].tolist() == [[1, 3]]
    with pytest.raises(
        FileNotFoundError,
        match=r"1 of 2 features are missing \(is --megaface.algorithm x right\? there are such as "
        r".*\.jpg_x\.bin\): .*3\.jpg_x",
    ):
        FeatureFiles(tmp_path, ["a/1.jpg", "a/3.jpg"], "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"x right\? there are none\): .*1\.jpg_x"):
        FeatureFiles(tmp_path / "empty", ["a/1.jpg"], "x")
    whole = path.read_bytes()
    huge, other_kind, negative = (
        struct.pack("<4i", *header) + bytes(8)
        for header in ((2**31 - 1, 1, 4, 5), (2, 1, 4, 6), (-1, 1, 4, 5))
    )
    for data in (whole[:-1], whole + b"x", b"", whole[:10], huge, other_kind, negative):
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is no feature of the devkit, or is cut short"):
            read_feature(path)
    write_feature(path, np.ones(2))
    write_feature(tmp_path / "a/2.jpg_x.bin", np.ones(3))
    with pytest.raises(ValueError, match="has 3 numbers, and the first feature 2"):
        files[:]


def test_errors(world, tmp_path):
    folder, features = world
    protocol = MegafaceProtocol.read(folder, 400)
    probes = np.array([features[name] for name in protocol.probes])
    distractors = np.array([features[name] for name in protocol.distractors])
    with pytest.raises(ValueError, match=r"there must be a row a picture, .* and 399"):
        protocol.evaluate(probes, distractors[1:])
    for value, what in ((0, "zero, and have"), (np.nan, "not finite"), (np.inf, "not finite")):
        broken = distractors.copy()
        broken[17] = value
        with pytest.raises(ValueError, match=f"distractors: 1 embeddings are {what}.*: row 17$"):
            protocol.evaluate(probes, broken)
        broken = probes.copy()
        broken[3] = value
        with pytest.raises(ValueError, match=f"probes: 1 embeddings are {what}.*: row 3$"):
            protocol.evaluate(broken, distractors)
    wrong = MegafaceProtocol(("a/1", "a/2"), np.zeros(2, int), ("x",), frozenset("12"),
                             frozenset(), {})  # fmt: skip
    with pytest.raises(
        ValueError, match=r"all pictures of person 0 are wrong: use --megaface\.cleaning"
    ):
        wrong.evaluate(np.eye(2), np.ones((1, 2)), "facex")
    message = (
        r"holds no megaface_features_list\.json_10_1: name with --megaface\.distractors and "
        r"--megaface\.distractor-set a list that it holds: megaface_features_list\.json_400_1$"
    )
    with pytest.raises(FileNotFoundError, match=message):
        MegafaceProtocol.read(folder, 10)
    alone = tmp_path / "alone"
    protocol.write(alone)
    (alone / "templatelists/megaface_features_list.json_400_1").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no megaface_features_list.json_10_1$"):
        MegafaceProtocol.read(alone, 10)
    protocol.write(tmp_path)
    path = tmp_path / "templatelists/facescrub_features_list.json"
    for content, message in (
        ("{", "has no list 'path'"),
        ("[1]", "has no list 'path'"),
        ("[" * 10**5, "has no list 'path'"),
        ('{"path": [1, 2]}', "must hold texts in 'path'"),
        ('{"path": []}', "must hold texts in 'path'"),
        ('{"path": ["a/1", "a/2"], "id": [1]}', "must hold texts in 'path'"),
        ('{"path": ["a/1", "a/1"]}', "names a picture twice"),
        ('{"path": ["a/1", "b/1"]}', "nobody has two pictures"),
        ('{"path": ["a/../../1", "a/1"]}', "leads out of its folder: 'a/../../1'"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(message)):
            MegafaceProtocol.read(tmp_path, 400)
    options = MegafaceOptions(400, results=tmp_path / "no")
    with pytest.raises(FileNotFoundError, match="no is no folder: make it first"):
        evaluate.main(Arguments(folder / "features.npz", "megaface", folder, megaface=options))
