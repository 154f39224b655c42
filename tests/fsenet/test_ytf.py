"""YouTube Faces' list and measure against a loop."""

import hashlib
import json
import os
import re

import evaluate
import numpy as np
import pytest
from evaluate_options import Arguments
from protocols.ytf import YtfProtocol

from partlocal.evaluation import auc


def world(path):
    """Twenty people with two videos of one to four frames; ten folds of two and two pairs."""
    rng = np.random.default_rng(0)
    names, features = [], []
    for person in range(20):
        centre = rng.normal(size=5)
        for video in range(2):
            for frame in range(rng.integers(1, 5)):
                names.append(f"P{person}/{video}/{frame}.jpg")
                features.append(rng.uniform(1, 9) * (centre + 0.6 * rng.normal(size=5)))
    lines = ["split number, pair number, first, second, is same, note"]
    for fold in range(10):
        a, b = 2 * fold, 2 * fold + 1
        pairs = [(a, 0, a, 1, 1), (b, 0, b, 1, 1), (a, 0, b, 0, 0), (a, 1, b, 1, 0)]
        for number, (p, i, q, j, same) in enumerate(pairs, 1):
            lines.append(f"{fold + 1}, {number}, P{p}/{i}, P{q}/{j},  x, {same}")
    path.write_text("\n".join(lines) + "\n\n")
    return names, np.array(features)


def test_against_a_loop(tmp_path, capsys):
    names, features = world(tmp_path / "splits.txt")
    protocol = YtfProtocol.read(tmp_path)
    assert (len(protocol.same), protocol.first[5], protocol.fold[5]) == (40, "P3/0", 1)
    scores = []
    for pair in zip(protocol.first, protocol.second, strict=True):
        a, b = (
            np.mean([f / np.linalg.norm(f) for n, f in zip(names, features, strict=True)
                     if n.startswith(video + "/")], 0)
            for video in pair
        )  # fmt: skip
        scores.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    accuracies = []
    for fold in range(10):
        test = protocol.fold == fold
        train = [(s, y) for s, y, t in zip(scores, protocol.same, test, strict=True) if not t]
        right, threshold = max((np.mean([(s >= t) == y for s, y in train]), t) for t, _ in train)
        assert right > 0.5
        accuracies.append(np.mean((np.array(scores)[test] >= threshold) == protocol.same[test]))
    found = protocol.evaluate(names, features)
    assert found["accuracy"] == pytest.approx(np.mean(accuracies))
    assert 0.6 < found["accuracy"] < 1
    assert found["auc"] == auc(np.array(scores), protocol.same)

    def distances(pair):
        a, b = (np.array([f / np.linalg.norm(f) for n, f in zip(names, features, strict=True)
                          if n.startswith(video + "/")]) for video in pair)  # fmt: skip
        return [((x - y) ** 2).sum() for x in a for y in b]

    every = [distances(pair) for pair in zip(protocol.first, protocol.second, strict=True)]
    for how, reduce in (("min", np.min), ("mean", np.mean), ("max", np.max)):
        expected = auc(-np.array([reduce(x) for x in every]), protocol.same)
        assert protocol.evaluate(names, features, how)["auc"] == expected

    order = np.random.default_rng(1).permutation(len(names))
    np.savez(tmp_path / "e.npz", names=np.array(names)[order], embeddings=features[order])
    for faces in (tmp_path, tmp_path / "splits.txt"):
        evaluate.main(Arguments(tmp_path / "e.npz", "ytf", faces))
        printed = json.loads(capsys.readouterr().out)
        assert printed["arms"]["embeddings"]["accuracy"] == found["accuracy"]
        assert printed["protocol"]["video"] == "mean of unit frames, then L2"


def test_errors(tmp_path):
    path = tmp_path / "splits.txt"
    names, features = world(path)
    begin = "of the list's 40 videos have no frame, which is named Name/video/frame"
    message = f"3 {begin} (there are such as {names[8]!r}): P0/0, P0/1"
    with pytest.raises(ValueError, match=re.escape(message)):
        YtfProtocol.read(path).evaluate(names[8:], features[8:])
    np.savez(tmp_path / "e.npz", names=[f"ytf/{name}" for name in names], embeddings=features)
    message = f"40 {begin} (there are such as 'ytf/{names[0]}'): "
    with pytest.raises(ValueError, match=re.escape(message)):
        evaluate.main(Arguments(tmp_path / "e.npz", "ytf", path))
    with pytest.raises(ValueError, match=f"40 {begin}: P0/0"):
        YtfProtocol.read(path).check_videos([])
    whole = path.read_text()
    for line in ("1, 2, a/0, b/0, 2", "x, 2, a/0, b/0, 1", "1, 2, a/0, 1"):
        path.write_text(whole + line)
        with pytest.raises(ValueError, match=r"splits.txt line 43 should be 'split, pair"):
            YtfProtocol.read(path)
    for text in (whole.partition("\n")[2], ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="must begin with a line of titles, 'split number, p"):
            YtfProtocol.read(path)
    path.write_text("split\n")
    with pytest.raises(ValueError, match="holds no pairs"):
        YtfProtocol.read(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no splits\.txt"):
        YtfProtocol.read(tmp_path)


def test_list(tmp_path, monkeypatch):
    """Read once, no larger than a list may be, and of several that lie equally deep none."""
    path = tmp_path / "splits.txt"
    world(path)
    protocol, data = YtfProtocol.read(path), path.read_bytes()
    assert protocol.hashes == {"splits.txt": hashlib.sha256(data).hexdigest()}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/splits.txt").write_text("another, which lies deeper")
    assert YtfProtocol.read(tmp_path).hashes == protocol.hashes
    (tmp_path / "b").mkdir()
    path.rename(tmp_path / "b/splits.txt")
    message = (
        r"holds splits\.txt 2 times, pass the folder that holds one of them: a/splits\.txt, b/"
    )
    with pytest.raises(ValueError, match=message):
        YtfProtocol.read(tmp_path)
    path = tmp_path / "b/splits.txt"
    monkeypatch.setattr("protocols.lists.LARGEST", len(data))
    YtfProtocol.read(path)
    monkeypatch.setattr("protocols.lists.LARGEST", len(data) - 1)
    size = len(data)
    with pytest.raises(
        ValueError, match=rf"s.txt is refused: {size} bytes are more than {size - 1}$"
    ):
        YtfProtocol.read(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"splits\.txt is no regular file: pass the list"):
        YtfProtocol.read(path)
