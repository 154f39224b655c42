"""The parser alone: trained, written for the package, resumed; and what its loss weighs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fit import Workplace
from train_parser import DrawnPairs, ParserOptions, TrainedParser, train_parser

from partlocal import HELEN, ParsingNet

SCRIPT = Path(__file__).parents[2] / "examples/fsenet/train_parser.py"
TINY = "--parser.width=8 --parser.num-stacks=1 --parser.grid=32 --parser.batch-size=4 --workers=0"


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *TINY.split(), *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run(tmp_path):
    done = run(tmp_path, "--parser.steps=3")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "parser-0"
    parser = ParsingNet.load_compact(folder / "parsing_net.safetensors")
    assert parser(torch.zeros(1, 3, 112, 112)).shape == (1, 11, 128, 128)
    about = json.loads((folder / "parsing_net.json").read_text())["about"]
    assert about == json.loads(done.stdout)
    assert about["options"]["parser"]["steps"] == 3
    assert 0 < about["scores"]["procedural"]["macro_f1"] < 1
    assert str(tmp_path) not in json.dumps(about), "no path of a machine in what is published"

    # what is trained can be written elsewhere and scored on more, by other processes
    more = run(tmp_path, "--parser.steps=3", "--resume", "--workers=1", "--parsing=nowhere")
    assert more.stderr == "error: nowhere does not exist: pass a folder, a .zip or a .tar\n"

    wrong = run(tmp_path, "--parser.lr=nan", "--output=nan")
    assert wrong.stderr == "error: --parser.lr must be between 0 and 1000; got nan\n"
    assert not (tmp_path / "nan").exists()

    other = run(tmp_path, "--parser.steps=2", "--resume")
    assert other.returncode == 1
    assert "parser-0 was started with parser {" in other.stderr
    assert other.stderr.count("\n") == 1


class Halves(torch.utils.data.Dataset):
    """The first half of the items shows skin alone, the second half hair alone."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        label = 1 if index < 500 else 10
        return torch.zeros(3, 16, 16, dtype=torch.uint8), torch.full((16, 16), label).byte()


def test_labels_are_counted_over_the_whole_set(tmp_path, monkeypatch):
    seen = []

    def spy(self, parser, shares):
        seen.append(shares)
        original(self, parser, shares)

    original = TrainedParser.__init__
    monkeypatch.setattr(TrainedParser, "__init__", spy)
    parser = ParsingNet(HELEN, 4, 1, bottleneck_size=4, input_size=16, grid=8)
    options = ParserOptions(steps=1, batch_size=2)
    train_parser(parser, Halves(), options, 0, Workplace(tmp_path, torch.device("cpu")))
    assert seen[0].tolist() == [0, 0.5, *[0] * 8, 0.5]
    assert parser.frozen


def test_weights():
    """By hand: share^-0.35, so that the mean weight over pixels is 1."""
    shares = torch.tensor([0.5, 0.25, 0.25])
    parser = ParsingNet(3, 4, 1, bottleneck_size=4, input_size=16, grid=8)
    raw = np.array([0.5, 0.25, 0.25]) ** -0.35
    expected = raw / (raw * shares.numpy()).sum()
    np.testing.assert_allclose(TrainedParser(parser, shares).weights, expected, rtol=1e-6)


def test_every_face_is_somebody_else():
    faces = DrawnPairs(0, 4)
    images = [faces[i][0] for i in range(4)]
    assert len(faces) == 4
    assert all(not torch.equal(images[0], other) for other in images[1:])
    assert pytest.approx(0) == (faces[1][0].float() - images[1].float()).abs().max().item()
