"""Scores of a parser in the labels of a set, counted by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import score_parser
import torch
from data.parsing_alignment import AlignedPairs
from data.procedural import render
from data.vocabularies import KINDS
from PIL import Image
from score_parser import Arguments
from sklearn.metrics import f1_score
from workplace import Workplace

from partlocal.labels import CELEBAMASK_HQ, HELEN

SCRIPT = Path(__file__).parents[2] / "examples/fsenet/score_parser.py"
PLACE = Workplace(Path(), torch.device("cpu"))


class Told:
    """A parser whose answer is written into the red of its pictures."""

    labels = HELEN

    def __call__(self, images):
        return torch.nn.functional.one_hot(images[:, 0].long(), 11).movedim(-1, 1).float()


def score(kind, said, target, monkeypatch):
    images = torch.from_numpy(said).byte()[:, None].expand(-1, 3, -1, -1)
    aligned = AlignedPairs(images, target, tuple("ab"), ("c",), ("d is damaged",))
    monkeypatch.setattr(score_parser, "aligned_pairs", lambda pairs, damaged: aligned)
    pairs = SimpleNamespace(vocabulary=KINDS[kind], splits=("test", "more"))
    return score_parser.score_parsing_set(Told(), pairs, PLACE)


def test_fasseg(monkeypatch):
    """Against scikit-learn, after a table that says by name where HELEN's labels go."""
    rng = np.random.default_rng(0)
    said = rng.integers(0, 11, (2, 8, 8))
    target = torch.from_numpy(rng.integers(0, 6, (2, 8, 8))).byte()
    target[0, 0] = 255
    table = np.array([0, 1, 2, 2, 3, 3, 4, 5, 5, 5, 2])
    known = target.numpy() != 255
    expected = f1_score(target.numpy()[known], table[said][known], average=None)
    found = score("fasseg", said, target, monkeypatch)
    np.testing.assert_allclose(list(found["f1"].values()), expected)
    assert found["mean_f1"] == pytest.approx(expected[1:].mean())
    assert (found["pictures"], found["skipped"], found["damaged"]) == (2, 1, 1)
    assert found["split"] == "test, more"
    assert found["groups"] == {}


def test_celebamask(monkeypatch):
    """What the parser cannot know counts as background, and is in no mean."""
    rng = np.random.default_rng(1)
    truth = rng.integers(0, 19, (2, 8, 8))
    known = [HELEN.index(n) if n in HELEN.labels else 0 for n in CELEBAMASK_HQ.labels]
    said, target = np.array(known)[truth], torch.from_numpy(truth).byte()
    found = score("celebamask-hq", said, target, monkeypatch)
    assert set(found["f1"]) == set(HELEN.labels)
    assert found["mean_f1"] == found["miou"] == found["groups"]["inner"] == 1

    left, right = HELEN.index("left_eye"), HELEN.index("right_eye")
    found = score("celebamask-hq", np.where(said == left, right, said), target, monkeypatch)
    assert found["f1"]["left_eye"] == 0
    assert found["groups"]["eyes"] == 1  # one class, as Helen's benchmark counts them
    assert found["mean_f1"] == pytest.approx((8 + found["f1"]["right_eye"]) / 10)


def test_probabilities(monkeypatch):
    """The most probable label is the true one; a pixel of which nothing is known does not count."""
    soft = torch.zeros(2, 11, 1, 3, dtype=torch.uint8)
    soft[:, 1, 0, 0], soft[:, 10, 0, 0], soft[:, 6, 0, 1] = 120, 135, 255
    said = np.array([[[10, 6, 3]], [[10, 1, 3]]])
    found = score("helen", said, soft, monkeypatch)
    assert found["f1"] == {"skin": 0.0, "nose": pytest.approx(2 / 3), "hair": 1.0}


def test_script(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "nowhere.safetensors", "--score=nowhere.zip:lapa:val"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == "error: nowhere.zip does not exist: pass a folder, a .zip or a .tar\n"


def test_main(tmp_path, capsys):
    """The shipped parser on drawn faces that were packed as iBugMask is."""
    (tmp_path / "test").mkdir()
    for number in range(2):
        face = render(5, number, 0)
        for suffix, array in ((".jpg", face.image), (".png", face.labels)):
            Image.fromarray(array).save(tmp_path / "test" / f"{number}{suffix}")
    score_parser.main(Arguments(score=(f"{tmp_path}:ibugmask:test",), precision="fp32"))
    (found,) = json.loads(capsys.readouterr().out)["scores"].values()
    assert found["pictures"] == 2
    assert found["mean_f1"] > 0.6
    assert found["groups"]["inner"] > 0.6


def test_a_parser_is_one_file(tmp_path):
    """Neither the network of a run nor a checkpoint; what is not there is said to be missing."""
    (tmp_path / "network").mkdir()
    (tmp_path / "parser.pt").touch()
    for name in ("network", "parser.pt"):
        message = rf"{name} is no parser: pass the parsing_net\.safetensors that train_parser"
        with pytest.raises(ValueError, match=message):
            score_parser.open_parser(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors is missing: ParsingNet\.save_com"):
        score_parser.open_parser(tmp_path / "x.safetensors")
    assert score_parser.open_parser(None).labels == HELEN


def test_sets_have_names_of_their_own(tmp_path):
    """Results are called by them: of two sets of one name one would be lost."""
    image = np.zeros((8, 8), np.uint8)
    for folder in ("a", "b"):
        (tmp_path / folder / "set/test").mkdir(parents=True)
        for suffix in (".jpg", ".png"):
            Image.fromarray(image).save(tmp_path / folder / f"set/test/0{suffix}")
    one, other = (f"{tmp_path}/{folder}/set:ibugmask:test" for folder in ("a", "b"))
    assert list(score_parser.open_sets([one])) == ["set:iBugMask:test"]
    with pytest.raises(ValueError, match="--score names two sets set:iBugMask:test: rename"):
        score_parser.open_sets([one, other])
    with pytest.raises(ValueError, match="--score names no set: expected PATH:KIND:SPLITS"):
        score_parser.main(Arguments())
