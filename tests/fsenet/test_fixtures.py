"""Every protocol runs on a made-up world in its layout."""

import json

import evaluate
import numpy as np
import pytest
from evaluate_options import Arguments
from feature_protocols import MegafaceOptions
from protocols import fixtures


@pytest.mark.parametrize("kind", fixtures.WRITERS)
def test_evaluates(tmp_path, capsys, kind):
    """Far better than chance and not perfect; what it stands on is printed with it."""
    folder = tmp_path / "world"
    fixtures.main(fixtures.Arguments(kind, folder))
    assert f"{folder}: lists of {kind}, and " in capsys.readouterr().out
    options = MegafaceOptions(**{"distractors": 400} if kind == "megaface" else {})
    more = {"all_folds": True} if kind == "lfw" else {}
    faces = folder / "pairs.bin" if kind == "bin" else folder
    evaluate.main(Arguments(folder / "features.npz", kind, faces, megaface=options, **more))
    found = json.loads(capsys.readouterr().out)
    assert found["protocol"]["name"] == kind
    assert found["protocol"].get("list_sha256") or found["protocol"]["sha256"]
    numbers = found["arms"]["embeddings"]
    if kind == "ijba":
        assert 0.3 < numbers["mean"]["tar_at_far"]["strict"]["0.1"] < 1
        assert 0.3 < numbers["mean"]["rank"]["1"] < 1
    elif kind == "megaface":
        assert 0.2 < numbers["rank"]["strict"]["1"] < 1
    elif kind.startswith("ijb"):
        assert 0.3 < numbers["tar_at_far"]["strict"]["0.1"] < 1
        assert 0.5 < numbers["rank"]["1"] < 1
    else:
        assert {"strict", "parity"} == set(numbers["tar_at_far"])
        assert 0.6 < numbers["accuracy"] < 1
        assert numbers["insightface"]["accuracy"] > 0.6


def test_same_again(tmp_path):
    """The same seed makes the same world, another seed another."""
    found = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        folder.mkdir()
        names, features = fixtures.write_ytf(folder, seed)
        found.append((names, features, (folder / "splits.txt").read_bytes()))
    assert found[0][0] == found[1][0]
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]
    assert not np.array_equal(found[0][1], found[2][1])


def test_errors(tmp_path):
    with pytest.raises(FileExistsError, match=r"^[^[]* exists: name another folder, or rem"):
        fixtures.main(fixtures.Arguments("ytf", tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"^[^[]*x cannot be made \(.*\): name another folder$"):
        fixtures.main(fixtures.Arguments("ytf", tmp_path / "file/x"))
    with pytest.raises(ValueError, match="--seed must be between 0 and"):
        fixtures.main(fixtures.Arguments("ytf", tmp_path / "x", seed=-1))
