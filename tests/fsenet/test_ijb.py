"""IJB against loops that follow its descriptions, on a small world in its own layout."""

import dataclasses
import json

import evaluate
import numpy as np
import pytest
from evaluate_options import Arguments
from protocols import templates
from protocols.fixtures import make_ijb as world
from protocols.ijb import FARS, FPIRS, IjbProtocol
from protocols.templates import pair_scores, template_vectors
from sklearn.metrics import roc_auc_score, roc_curve

PEOPLE = 30


def by_loops(protocol, features, unit, detector):
    """The vectors, template by template and medium by medium."""
    found = {}
    for template in sorted(set(protocol.templates)):
        total = np.zeros(features.shape[1])
        for medium in sorted(set(protocol.media[protocol.templates == template])):
            vectors = []
            for i in np.flatnonzero((protocol.templates == template) & (protocol.media == medium)):
                vector = features[i] / np.linalg.norm(features[i]) if unit else features[i]
                vectors.append(vector * (protocol.detector[i] if detector else 1))
            total += np.mean(vectors, 0)
        found[template] = total / np.linalg.norm(total)
    return found


@pytest.mark.parametrize("block", [1, 7, 2**16])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("detector", [False, True])
def test_templates(unit, detector, block, monkeypatch):
    monkeypatch.setattr(templates, "BLOCK", block)
    protocol, features = world("ijbc")
    weights = protocol.detector if detector else None
    ids, vectors = template_vectors(features, protocol.templates, protocol.media, weights, unit)
    expected = by_loops(protocol, features, unit, detector)
    assert ids.tolist() == list(expected)
    np.testing.assert_allclose(vectors, list(expected.values()), atol=2e-6)
    scores = pair_scores(vectors, np.array([0, 3, 5]), np.array([1, 3, 0]))
    assert scores == pytest.approx([vectors[0] @ vectors[1], 1, vectors[5] @ vectors[0]], abs=1e-6)


def closed_set(found, protocol, vectors):
    """insightface's older measure: one gallery, and impostors of all probes in one heap."""
    gallery = {t: s for people in protocol.galleries.values() for t, s in zip(*people, strict=True)}
    genuine, impostors, hits = [], [], 0
    for template, subject in zip(*protocol.probes, strict=True):
        if subject in gallery.values():
            scores = {t: vectors[template] @ vectors[t] for t in gallery}
            mate = max(scores[t] for t in gallery if gallery[t] == subject)
            others = [scores[t] for t in gallery if gallery[t] != subject]
            genuine.append(mate)
            impostors += others
            hits += mate > max(others)
    impostors.sort(reverse=True)
    assert found["probes"] == len(genuine) == 4 * PEOPLE // 5
    assert found["rank"]["1"] == hits / len(genuine)
    for far in FPIRS:
        threshold = impostors[int(np.ceil(far * len(genuine))) - 1]
        assert found["recall"][str(far)] == np.mean(np.array(genuine) > threshold)


@pytest.mark.parametrize("name", ["ijbb", "ijbc"])
def test_rates(tmp_path, name):
    """Written and read again; then every rate counted by hand, strictly and as insightface does."""
    protocol, features = world(name)
    (tmp_path / "meta").mkdir()
    protocol.write(tmp_path / "meta", name)
    read = IjbProtocol.read(tmp_path, name)
    for field in dataclasses.fields(IjbProtocol):
        if field.name != "hashes":
            np.testing.assert_equal(getattr(read, field.name), getattr(protocol, field.name))
    found = read.evaluate(features)
    vectors = by_loops(protocol, features, unit=False, detector=True)
    scores = np.array([vectors[a] @ vectors[b]
                       for a, b in zip(protocol.first, protocol.second, strict=True)])  # fmt: skip
    genuine, impostors = scores[protocol.same], np.sort(scores[~protocol.same])[::-1]
    for far in FARS:
        allowed = int(far * len(impostors) + 1e-9)
        assert found["tar_at_far"]["strict"][str(far)] == np.mean(genuine > impostors[allowed])
    fars, tars, _ = roc_curve(protocol.same, scores)
    for far in FARS:
        nearest = np.abs(fars - far)
        parity = tars[nearest == nearest.min()].max()
        assert found["tar_at_far"]["parity"][str(far)] == parity
    assert found["auc"] == pytest.approx(roc_auc_score(protocol.same, scores), abs=1e-6)
    hits, mated, expected = np.zeros(3), 0, {mode: [] for mode in ("strict", "parity")}
    for people in protocol.galleries.values():
        tops, strangers = [], []
        for template, subject in zip(*protocol.probes, strict=True):
            row = np.array([vectors[template] @ vectors[g] for g in people.templates])
            mate = people.subjects == subject
            if not mate.any():
                strangers.append(row.max())
                continue
            mated += 1
            hits += (row[~mate] >= row[mate].max()).sum() < np.array([1, 5, 10])
            tops.append((row[mate].max(), row[~mate].max()))
        strangers = sorted(strangers, reverse=True)
        for mode, places in (
            ("strict", [int(x * len(strangers)) for x in FPIRS]),
            ("parity", [max(int(x * len(strangers)) - 1, 0) for x in FPIRS]),
        ):
            expected[mode].append(
                [np.mean([m > max(o, strangers[p]) for m, o in tops]) for p in places]
            )
    assert list(found["rank"].values()) == pytest.approx(hits / mated)
    for mode, rates in expected.items():
        np.testing.assert_allclose(list(found["tpir_at_fpir"][mode].values()), np.mean(rates, 0))
    closed_set(found["insightface_ijb_1n"], protocol, vectors)
    assert 0.2 < found["tar_at_far"]["strict"]["0.01"] < found["tar_at_far"]["strict"]["0.1"] < 1
    assert found["pairs"] == PEOPLE * (2 * PEOPLE - 1)


@pytest.mark.parametrize("options", [{}, {"unit_features": True, "detector_scores": False}])
def test_evaluate(tmp_path, capsys, options):
    """As a user calls it, with embeddings in another order than the lists'."""
    protocol, features = world("ijbc")
    protocol.write(tmp_path, "ijbc")
    order = np.random.default_rng(0).permutation(len(features))
    names = np.array(protocol.names)[order]
    np.savez(tmp_path / "e.npz", names=names, embeddings=features[order].astype(np.float32))
    evaluate.main(Arguments(tmp_path / "e.npz", "ijbc", tmp_path, **options))
    found = json.loads(capsys.readouterr().out)
    kind = ("N0", "D0") if options else ("N1", "D1")
    assert (found["protocol"]["feature_norm"], found["protocol"]["detector_score"]) == kind
    assert len(found["protocol"]["list_sha256"]) == 6
    expected = protocol.evaluate(features.astype(np.float32), bool(options), not options)
    assert found["arms"]["embeddings"] == json.loads(json.dumps(expected))
    with pytest.raises(ValueError, match=r"--protocol ijbc needs --faces: the folder or archive"):
        evaluate.main(Arguments(tmp_path / "e.npz", "ijbc"))


def test_errors(tmp_path, refused_when_changed):
    protocol, features = world("ijbc")
    protocol.write(tmp_path, "ijbc")
    cases = {
        "face_tid_mid.txt": [
            (lambda s: s.replace("0.jpg", "9999.jpg", 1), "name_5pts_score.txt differ"),
            (lambda s: s.replace(" ", " x", 1), "ijbc_face_tid_mid.txt holds no number"),
            (lambda s: "one two\n" + s, "line 1 should have 3 fields; got 2"),
        ],
        "name_5pts_score.txt": [
            (lambda s: s.replace(" ", " x", 1), "ijbc_name_5pts_score.txt holds no number"),
            (lambda s: s.replace(" ", " 1 ", 1), "line 1 should have 12 fields; got 13"),
        ],
        "template_pair_label.txt": [
            (lambda s: s + "100 101 2\n", "has labels beside 0 and 1"),
            (lambda s: s + "100 101\n", "must hold 3 whole numbers a line"),
            (lambda s: "a" + s, "must hold 3 whole numbers a line"),
            # as many numbers as there should be, in other lines
            (lambda s: s + "100 101\n1 100 102 0\n", "must hold 3 whole numbers a line"),
            (lambda s: s.replace("\n", " ", 1), "must hold 3 whole numbers a line (the number"),
            (lambda s: "1 2\n", "must hold 3 whole numbers a line (line 1 holds 2)"),
            (lambda s: "\n", "must hold 3 whole numbers a line (it is empty)"),
            (lambda s: f"{10**30} 1 1\n", "must hold 3 whole numbers a line"),
            (
                lambda s: s + "100 7 1\n100 8 1\n",
                "2 templates have no face, the lists do not belong together: 7, 8",
            ),
        ],
        "1N_gallery_G1.csv": [
            (lambda s: s + "x,y\n", "must begin with template and subject"),
            (lambda s: s + f"{10**30},1\n", "must begin with template and subject"),
            (lambda s: s.partition("\n")[2], "must begin with a line of titles, 'TEMPLATE_ID,SU"),
            (lambda s: s + "100,77\n", "ijbc_1N_gallery_G1.csv has two subjects in template 100"),
        ],
    }
    for file, changes in cases.items():
        path = tmp_path / f"ijbc_{file}"
        refused_when_changed(path, changes, lambda: IjbProtocol.read(tmp_path, "ijbc"))
    with pytest.raises(FileNotFoundError, match=r"holds no ijbb_face_tid_mid\.txt"):
        IjbProtocol.read(tmp_path, "ijbb")
    features[3] = np.nan
    with pytest.raises(ValueError, match="features must be finite; row 3 is not"):
        protocol.evaluate(features)
    with pytest.raises(ValueError, match="must have a row a face; got 3"):
        protocol.evaluate(features[:3])
    with pytest.raises(ValueError, match="template 100 has a vector of zero"):
        protocol.evaluate(np.zeros_like(features))
