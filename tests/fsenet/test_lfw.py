"""LFW's protocol on a made-up set of the same layout, against slow loops; its real lists too."""

import hashlib
import itertools
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from protocols import lfw
from protocols.lfw import LfwProtocol
from protocols.lfw_lists import format_pairs, parse_pairs
from protocols.rates import fold_rates

REAL = Path(__file__).parents[2] / "../shared/data/lfw112.zip"
FOLDS, EACH, PICTURES = 4, 6, 4


def lists():
    """Four folds of five people with four pictures each, and one person in no pair."""
    pairs, people = [f"{FOLDS}\t{EACH}"], ["# name fold n_images", "Nobody -1 2"]
    rng = np.random.default_rng(0)
    for fold in range(FOLDS):
        names = [f"P{fold}{i}_J._Doe" for i in range(5)]
        people += [f"{name} {fold} {PICTURES}" for name in names]
        for k in range(EACH):
            pairs.append(f"{names[k % 5]}\t{1 + k // 5}\t{3 + k // 5}")
        for k in range(EACH):
            i, j = rng.integers(1, PICTURES + 1, 2)
            pairs.append(f"{names[k % 5]}\t{i}\t{names[(k + 1 + k // 5) % 5]}\t{j}")
    return {"pairs.txt": "\n".join(pairs) + "\n", "identity_folds.txt": "\n".join(people) + "\n"}


def write(path, texts):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in texts.items():
                archive.writestr(name, text)
    else:
        path.mkdir()
        for name, text in texts.items():
            (path / name).write_text(text)
    return path


@pytest.fixture
def protocol(tmp_path):
    return LfwProtocol.read(write(tmp_path / "lfw.zip", lists()))


def embed(protocol, noise, seed=0):
    rng = np.random.default_rng(seed)
    names = protocol.test_paths(range(FOLDS))
    centre = {name.split("/")[0]: rng.normal(size=16) for name in names}
    vectors = np.stack([centre[n.split("/")[0]] + noise * rng.normal(size=16) for n in names])
    return names, vectors * rng.uniform(0.1, 9, (len(names), 1))  # lengths do not matter


def test_example(tmp_path, protocol):
    assert protocol.first[0] == "P00_J._Doe/P00_J._Doe_0001.jpg"
    assert protocol.second[0] == "P00_J._Doe/P00_J._Doe_0003.jpg"
    assert len(protocol.first) == len(protocol.second) == FOLDS * EACH * 2
    assert protocol.same.tolist() == ([True] * EACH + [False] * EACH) * FOLDS
    assert protocol.fold.tolist() == [f for f in range(FOLDS) for _ in range(2 * EACH)]
    assert protocol.held_out((1, 3)).tolist() == [*range(12, 24), *range(36, 48)]
    train = protocol.train_identities((1, 3))
    assert train == ("Nobody", *(f"P{f}{i}_J._Doe" for f in (0, 2) for i in range(5)))
    test = protocol.test_paths((1, 3))
    assert len(test) == 2 * 5 * PICTURES
    assert not {path.split("/")[0] for path in test} & set(train)
    texts = lists()
    for name, digest in protocol.hashes.items():
        assert digest == hashlib.sha256(texts[name].encode()).hexdigest()
    loose = LfwProtocol.read(write(tmp_path / "lfw", texts))
    assert loose.first == protocol.first
    assert loose.hashes == protocol.hashes


def test_scores(protocol):
    names, vectors = embed(protocol, 1.0)
    scores = protocol.scores(names, vectors)
    for pair in range(len(scores)):
        a = vectors[names.index(protocol.first[pair])]
        b = vectors[names.index(protocol.second[pair])]
        expected = a @ b / np.sqrt((a @ a) * (b @ b))
        assert scores[pair] == pytest.approx(expected, abs=1e-12)
    some = np.array([5, 2])
    np.testing.assert_array_equal(protocol.scores(names, vectors, some), scores[some])
    # other people's files name pictures in other ways, in another order
    order = np.random.default_rng(1).permutation(len(names))
    other = [f"images/{names[i]}" if i % 2 else names[i].split("/")[1][:-4] for i in order]
    np.testing.assert_allclose(protocol.scores(other, vectors[order]), scores, atol=1e-12)


def slow_accuracy(scores, same, fold):
    """The best threshold of the other folds, tried one by one, then counted on this one."""
    correct = {}
    for test in sorted(set(fold)):
        rest = [i for i in range(len(scores)) if fold[i] != test]
        best = max(
            (sum((scores[i] >= t) == same[i] for i in rest), t)
            for t in [np.inf, *(scores[i] for i in rest)]
        )[1]
        for i in range(len(scores)):
            if fold[i] == test:
                correct[i] = (scores[i] >= best) == same[i]
    return np.array([correct[i] for i in range(len(scores))])


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_reference(protocol, noise):
    names, vectors = embed(protocol, noise)
    scores = protocol.scores(names, vectors)
    correct = slow_accuracy(scores, protocol.same, protocol.fold)
    report, _ = fold_rates(scores, protocol.same, protocol.fold)
    by_fold = correct.reshape(FOLDS, -1).mean(1)
    assert report["accuracy"] == pytest.approx(by_fold.mean())
    assert report["standard_error_over_folds"] == pytest.approx(by_fold.std(ddof=1) / FOLDS**0.5)

    index = protocol.held_out((1, 3))
    correct = slow_accuracy(scores[index], protocol.same[index], protocol.fold[index])
    _, decided = fold_rates(scores[index], protocol.same[index], protocol.fold[index])
    np.testing.assert_array_equal(decided.correct, correct)
    report = protocol.evaluate_held_out(names, vectors, (1, 3), resamples=50)
    p = correct.mean()
    assert report["accuracy"] == pytest.approx(p)
    assert report["standard_error"] == pytest.approx((p * (1 - p) / len(index)) ** 0.5)

    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = [
        i for i, name in enumerate(names) if protocol.identity_fold[name.split("/")[0]] in (1, 3)
    ]
    genuine, impostors = [], []
    for i, j in itertools.combinations(rows, 2):
        one = names[i].split("/")[0] == names[j].split("/")[0]
        (genuine if one else impostors).append(unit[i] @ unit[j])
    wins = np.mean([(g > i) + 0.5 * (g == i) for g in genuine for i in impostors])
    assert report["all_pairs"] == len(genuine) + len(impostors)
    assert report["all_pairs_genuine"] == len(genuine)
    assert report["auc_all_pairs"] == pytest.approx(wins, abs=1e-9)
    low, high = report["auc_all_pairs_interval95"]
    assert low <= report["auc_all_pairs"] <= high
    assert (low < high) == (wins < 1)


def test_report_is_json(protocol):
    names, vectors = embed(protocol, 1.0)
    report = protocol.evaluate_held_out(names, vectors, tuple(np.array([0, 2])), resamples=5)
    assert json.loads(json.dumps(report)) == report
    assert report["list_sha256"] == protocol.hashes
    assert report["test_folds"] == [0, 2]
    assert report["comparable_with_published"] is False
    again = protocol.evaluate_held_out(names, vectors, (0, 2), resamples=5)
    assert again == report


def test_held_out_ignores_the_rest(protocol):
    """Only pictures of the test folds count, and only they are needed."""
    names, vectors = embed(protocol, 1.0)
    report = protocol.evaluate_held_out(names, vectors, (1, 3), resamples=5)
    test = set(protocol.test_paths((1, 3)))
    keep = [i for i, name in enumerate(names) if name in test]
    few = protocol.evaluate_held_out([names[i] for i in keep], vectors[keep], (1, 3), resamples=5)
    assert few == report


def test_embedding_errors(protocol, monkeypatch):
    names, vectors = embed(protocol, 1.0)
    with pytest.raises(
        ValueError, match=r"embeddings must be \[n, d\] with n = 80 .*got \[79, 16\]"
    ):
        protocol.scores(names, vectors[1:])
    with pytest.raises(
        ValueError,
        match=r"names lack 2 pictures of the protocol, .*: P00_J._Doe_0001, P00_J._Doe_0002$",
    ):
        protocol.scores(names[2:], vectors[2:])
    with pytest.raises(
        ValueError, match=r"names must be different pictures; got 'x/P00_J._Doe_0001.png' twice"
    ):
        protocol.scores([*names, "x/P00_J._Doe_0001.png"], np.ones((81, 2)))
    for bad, what in ((0.0, "zero, and have no cosine"), (np.nan, "not finite"),
                      (np.inf, "not finite")):  # fmt: skip
        broken = vectors.copy()
        broken[[3, 4]] = bad
        message = f"2 embeddings are {what}: {names[3]}, {names[4]}$"
        with pytest.raises(ValueError, match=message):
            protocol.scores(names, broken)
    with pytest.raises(ValueError, match=r"folds must be among \[0, 1, 2, 3\]; got \[8, 9\]"):
        protocol.evaluate_held_out(names, vectors)
    monkeypatch.setattr(lfw, "MAX_ALL_PAIRS", 100)
    with pytest.raises(ValueError, match="test_folds hold 40 pictures, 780 pairs, more than 100"):
        protocol.evaluate_held_out(names, vectors, (1, 3))


@pytest.mark.parametrize(
    ("name", "old", "new", "text"),
    [
        ("pairs.txt", "4\t6\n", "", "pairs.txt, line 1: expected 'folds pairs'"),
        ("pairs.txt", "4\t6\n", "4\t7\n", "announces 4 x 2 x 7 pairs and holds 48: cut short?"),
        (
            "pairs.txt",
            "P00_J._Doe\t1\t3",
            "P00_J._Doe\t1",
            "pairs.txt, line 2: expected 'name i j'",
        ),
        ("pairs.txt", "P00_J._Doe\t1\t3", "P00_J._Doe\t1\tx", "pairs.txt, line 2: expected whole"),
        (
            "identity_folds.txt",
            "P00_J._Doe 0 4",
            "P00_J._Doe 0",
            "identity_folds.txt, line 3: expec",
        ),
        (
            "identity_folds.txt",
            "P00_J._Doe 0 4",
            "P00_J._Doe 1 4",
            "the lists do not belong together",
        ),
        ("identity_folds.txt", "P00_J._Doe 0 4\n", "", "puts P00_J._Doe in fold None"),
    ],
)
def test_list_errors(tmp_path, name, old, new, text):
    texts = lists()
    assert old in texts[name]
    texts[name] = texts[name].replace(old, new)
    with pytest.raises(ValueError) as caught:
        LfwProtocol.read(write(tmp_path / "lfw.zip", texts))
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def official(around="lfw/", suffix=".jpg"):
    """What LFW gives out: the pairs and the pictures, here empty ones."""
    people = [line.split() for line in lists()["identity_folds.txt"].splitlines()[1:]]
    names = [f"{who}/{who}_{n:04d}" for who, _, count in people for n in range(1, int(count) + 1)]
    texts = dict.fromkeys([f"{around}{name}{suffix}" for name in names], "")
    return texts | {"pairs.txt": lists()["pairs.txt"]}


@pytest.mark.parametrize(("around", "suffix"), [("", ".jpg"), ("lfw/", ".png")])
def test_official(tmp_path, around, suffix):
    """Folds that the pairs imply and pictures that are there say what the list of people says."""
    texts = official(around, suffix)
    texts |= {"lfw/README_0001.jpg": "", "__MACOSX/Nobody/Nobody_0009.jpg": ""}  # no pictures of it
    bare = LfwProtocol.read(write(tmp_path / "a.zip", texts))
    listed = LfwProtocol.read(write(tmp_path / "b.zip", texts | lists()))
    assert list(listed.hashes) == ["pairs.txt", "identity_folds.txt"]
    assert bare.hashes == {"pairs.txt": listed.hashes["pairs.txt"]}
    assert bare.identity_fold == listed.identity_fold
    assert bare.identity_images == listed.identity_images
    assert (bare.first, bare.second) == (listed.first, listed.second)
    for folds in ((1, 3), range(FOLDS)):
        assert bare.train_identities(folds) == listed.train_identities(folds)
        assert bare.test_paths(folds) == listed.test_paths(folds)
    names, vectors = embed(listed, 1.0)
    one, other = (x.evaluate_held_out(names, vectors, (1, 3), 5) for x in (bare, listed))
    assert one | {"list_sha256": None} == other | {"list_sha256": None}


def lacks(path, texts):
    """Return the error of a set that is not whole."""
    with pytest.raises(ValueError) as caught:
        LfwProtocol.read(write(path, texts))
    return str(caught.value)


def test_official_errors(tmp_path):
    """All pictures that are missing, and pairs that put a person into two folds."""
    texts = official()
    gaps = ["Nobody_0001", "P00_J._Doe_0002", "P00_J._Doe_0003"]
    for name in gaps:
        del texts[f"lfw/{name[:-5]}/{name}.jpg"]
    message = lacks(tmp_path / "a.zip", texts)
    assert message.startswith(
        f"{tmp_path}/a.zip lacks 3 pictures of 2 people, named in pairs.txt or"
    )
    assert message.endswith(f": {', '.join(gaps)}")

    gone = ("P10_J._Doe", "P31_J._Doe")  # and all that pairs.txt has of them
    texts = {name: text for name, text in texts.items() if not any(who in name for who in gone)}
    rows = [line.split("\t") for line in texts["pairs.txt"].splitlines()[1:]]
    sides = [(row[0], row[1]) for row in rows] + [(row[-2], row[-1]) for row in rows if row[3:]]
    sides += [(row[0], row[2]) for row in rows if not row[3:]]
    named = {f"{who}_{int(number):04d}" for who, number in sides if who in gone}
    assert len({name[:3] for name in named}) == 2
    message = lacks(tmp_path / "b.zip", texts)
    assert f" lacks {3 + len(named)} pictures of 4 people, " in message
    assert message.endswith(f": {', '.join(sorted([*gaps, *named]))}")
    assert "\n" not in message

    texts = official()
    last = re.search(r"(P\d+_J._Doe)\t\d\t4\n", texts["pairs.txt"])[1]
    del texts[f"lfw/{last}/{last}_0004.jpg"]  # no gap, but named
    assert lacks(tmp_path / "d.zip", texts).endswith(f" numbering: {last}_0004")

    texts = official()
    texts["pairs.txt"] = texts["pairs.txt"].replace("P00_J._Doe\t1\t3", "P10_J._Doe\t1\t3")
    message = r"pairs.txt itself puts P10_J._Doe in fold 1, but pairs.txt has them in fold 0"
    with pytest.raises(ValueError, match=message):
        LfwProtocol.read(write(tmp_path / "c.zip", texts))


def test_pairs_are_written_as_they_are_read():
    lines = ["2\t1", "Ann_B\t1\t12", "Ann_B\t3\tCy\t4", "Di\t5\t6", "Ed Jr.\t7\tDi\t1080"]
    first, second, same, fold = parse_pairs(lines)
    order = [3, 0, 2, 1]
    mixed = ([column[i] for i in order] for column in (first, second, same, fold))
    assert format_pairs(*mixed).splitlines() == lines


def test_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither identity_folds.txt at its top nor"):
        LfwProtocol.read(write(tmp_path / "a.zip", {"pairs.txt": lists()["pairs.txt"]}))
    with pytest.raises(FileNotFoundError, match=r"holds no pairs.txt at its top: it is not LFW's"):
        LfwProtocol.read(write(tmp_path / "b.zip", {"a/pairs.txt": ""}))
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        LfwProtocol.read(tmp_path / "nowhere")


@pytest.mark.skipif(not REAL.exists(), reason="needs ../shared/data/lfw112.zip")
def test_real(tmp_path):
    protocol = LfwProtocol.read(REAL)
    assert len(protocol.same) == 6_000
    assert np.bincount(protocol.fold, weights=protocol.same).tolist() == [300.0] * 10
    train = protocol.train_identities()
    assert len(train) == 4_859
    assert sum(protocol.identity_images[name] for name in train) == 10_562
    assert len(protocol.held_out()) == 1_200
    test = protocol.test_paths()
    assert len(test) == 13_233 - 10_562
    assert len(protocol.identity_fold) == 5_749
    with zipfile.ZipFile(REAL) as archive:
        stored = {name[len("images/") :] for name in archive.namelist()}
    assert {*protocol.first, *protocol.second, *test} <= stored
    assert not set(train) & {path.split("/")[0] for path in test}
    with zipfile.ZipFile(REAL) as archive:
        texts = dict.fromkeys(archive.namelist(), "") | {"pairs.txt": archive.read("pairs.txt")}
    del texts["identity_folds.txt"]
    bare = LfwProtocol.read(write(tmp_path / "bare.zip", texts))
    assert bare.identity_fold == protocol.identity_fold
    assert bare.identity_images == protocol.identity_images
