"""The parser alone: trained, written for the package, resumed; and what its loss weighs."""

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data.faces import draw_faces
from data.mixture import Ingredient
from data.procedural import render
from data.vocabularies import KINDS, Vocabulary
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from train_parser import (
    Arguments,
    DrawnPairs,
    ParserOptions,
    TrainedParser,
    check,
    label_shares,
    main,
    train_parser,
)
from workplace import Workplace

from partlocal import HELEN, ParsingNet
from partlocal.labels import LabelSet

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
    more = run(tmp_path, "--parser.steps=3", "--resume", "--workers=1", "--score=nowhere:lapa")
    assert more.stderr == "error: nowhere does not exist: pass a folder, a .zip or a .tar\n"

    wrong = run(tmp_path, "--parser.lr=nan", "--output=nan")
    assert wrong.stderr == "error: --parser.lr must be between 0 and 1000; got nan\n"
    assert not (tmp_path / "nan").exists()

    other = run(tmp_path, "--parser.steps=2", "--resume")
    assert other.returncode == 1
    assert "parser-0 was started with parser {" in other.stderr
    assert other.stderr.count("\n") == 1


def photographs(path):
    """Drawn faces as if they were photographs, with FASSEG's coarser labels."""
    table = KINDS["fasseg"].merge(HELEN).argmax(0).byte().numpy()
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(6):
            face, split = render(1, number, 0), ("train", "test")[number % 2]
            for folder, array in (("images", face.image), ("labels", table[face.labels])):
                with archive.open(f"{folder}/{split}_{number}.png", "w") as file:
                    Image.fromarray(array).save(file, "PNG")
    return path


def test_a_mixture(tmp_path, monkeypatch, capsys):
    """Trained with a coarser set, and scored on its other half."""
    path = photographs(tmp_path / "set.zip")
    monkeypatch.setattr("train_parser.draw_faces", lambda *_: draw_faces(0, range(2), 2, 0))
    how = ParserOptions(8, 1, 32, 3, 4, loss="binary", dice=1.0)
    how = replace(how, mix=(f"{path}:fasseg:train:0.5",))
    arguments = Arguments(parser=how, score=(f"{path}:fasseg:test",), workers=0)
    check(arguments)
    main(arguments, Workplace(tmp_path, torch.device("cpu")))
    about = json.loads(capsys.readouterr().out)
    assert about["options"]["parser"]["mix"] == ["set.zip:fasseg:train:0.5"]
    assert about["data"][1] == "set.zip:FASSEG:train, 2 of a batch"
    scores = about["scores"]["set.zip:FASSEG:test"]
    assert (scores["pictures"], scores["split"]) == (3, "test")
    assert set(scores["f1"]) == {"background", "skin", "hair", "eyes", "nose", "mouth"}
    assert str(tmp_path) not in json.dumps(about), "no path of a machine in what is published"
    assert ParsingNet.load_compact(tmp_path / "parsing_net.safetensors").labels == HELEN


def test_a_mixture_that_cannot_be(tmp_path):
    """Refused before anything is drawn; and weights of photographs are not put into the package."""
    path = photographs(tmp_path / "set.zip")
    for mix, export, error in (
        (f"{path}:fasseg:train:0.1", True, "--export ships a parser of drawn faces alone: leave"),
        (f"{path}:fasseg:train:2", False, "the mix must be PATH:KIND:SPLITS:SHARE with a share"),
        (f"{path}:hats:train:1", False, "kind must be one of fasseg, helen, lapa, celebamask"),
    ):
        with pytest.raises(ValueError, match=error):
            check(Arguments(parser=ParserOptions(mix=(mix,)), export=export))
    with pytest.raises(ValueError, match="holds no split 'val'"):
        check(Arguments(score=(f"{path}:fasseg:val",)))


def test_resumed(tmp_path, monkeypatch):
    """Stopped after two of four steps and gone on with: the weights of a run that was not."""
    photographs(tmp_path / "set.zip")
    options = ParserOptions(4, 1, 8, 4, 4, mix=(f"{tmp_path}/set.zip:fasseg:train:0.5",))
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 112, 112), generator=rng).byte()
    faces = TensorDataset(images, torch.randint(0, 11, (16, 112, 112), generator=rng).byte())

    def train(folder, stop=None):
        torch.manual_seed(0)
        parser = ParsingNet(HELEN, 4, 1, bottleneck_size=4, input_size=32, grid=8)
        place = Workplace(
            tmp_path / folder, torch.device("cpu"), checkpoint_seconds=0, checkpoint_share=1
        )
        place.folder.mkdir(exist_ok=True)
        forward, calls = TrainedParser.forward, []

        def counted(self, *batch):
            calls.append(0)
            if len(calls) == stop:
                raise KeyboardInterrupt
            return forward(self, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(TrainedParser, "forward", counted)
            train_parser(parser, faces, options, 0, place)
        return parser.state_dict(), len(calls)

    straight, steps = train("straight")
    assert steps == 4
    with pytest.raises(KeyboardInterrupt):
        train("killed", stop=3)
    resumed, steps = train("killed")
    assert steps == 2
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_the_loss_of_a_mixture():
    """By torch's own losses: two pictures with labels, one with merged ones, one with shares."""
    torch.manual_seed(0)
    parser = ParsingNet(HELEN, 4, 2, bottleneck_size=4, input_size=64, grid=16).eval()
    groups = [torch.eye(11), KINDS["fasseg"].groups(HELEN), torch.eye(11)]
    shares = [torch.rand(len(matrix)).softmax(0) for matrix in groups]
    images = torch.rand(4, 3, 64, 64)
    labels = torch.randint(0, 11, (2, 64, 64)).byte()
    coarse = torch.randint(0, 6, (1, 64, 64)).byte()
    soft = torch.rand(1, 11, 64, 64).softmax(1)
    module = TrainedParser(parser, groups, shares)
    found = module(images, labels, coarse, soft).loss

    weights = [module.get_buffer(f"weights_{number}") for number in range(3)]
    expected = []
    for logits in parser.forward_stacks(images, size=64):
        first = F.cross_entropy(logits[:2], labels.long(), weights[0])
        merged = torch.einsum("gn,bnhw->bghw", groups[1], logits[2:3].softmax(1)).log()
        second = F.nll_loss(merged, coarse.long(), weights[1])
        share = soft * weights[2].view(-1, 1, 1)
        third = -(share * logits[3:].log_softmax(1)).sum() / share.sum()
        expected.append((2 * first + second + third) / 4)
    torch.testing.assert_close(found, torch.stack(expected).mean())

    dice = TrainedParser(parser, groups, shares, "binary", dice=0.5)(images, labels, coarse, soft)
    assert (
        dice.loss
        > TrainedParser(parser, groups, shares, "binary")(images, labels, coarse, soft).loss
    )
    dice.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in parser.parameters())


class Halves(torch.utils.data.Dataset):
    """The first half of the items shows skin alone, the second half hair alone."""

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        label = 1 if index < 500 else 10
        return torch.zeros(3, 16, 16, dtype=torch.uint8), torch.full((16, 16), label).byte()


def test_labels_are_counted_over_the_whole_set(tmp_path, monkeypatch):
    seen = []

    def spy(self, parser, groups, shares, *how):
        seen.extend(shares)
        original(self, parser, groups, shares, *how)

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
    found = TrainedParser(parser, [torch.eye(3)], [shares]).get_buffer("weights_0")
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_label_shares():
    """Of labels, what is unknown left out; of probabilities, their sums."""
    labels = torch.tensor([[[0, 1, 1, 255]], [[255, 1, 2, 0]]], dtype=torch.uint8)
    images = torch.zeros(2, 3, 1, 4, dtype=torch.uint8)
    own = Vocabulary(LabelSet("own", ("background", "skin", "nose")))
    found = label_shares(Ingredient(TensorDataset(images, labels), own, 2))
    np.testing.assert_allclose(found, np.array([2, 3, 1]) / 6, rtol=1e-6)
    soft = torch.tensor([[255, 0], [0, 51], [0, 204]], dtype=torch.uint8).view(1, 3, 1, 2)
    found = label_shares(Ingredient(TensorDataset(images[:1], soft), own, 2))
    np.testing.assert_allclose(found, [0.5, 0.1, 0.4], rtol=1e-6)


def test_every_face_is_somebody_else():
    faces = DrawnPairs(0, 4)
    images = [faces[i][0] for i in range(4)]
    assert len(faces) == 4
    assert all(not torch.equal(images[0], other) for other in images[1:])
    assert pytest.approx(0) == (faces[1][0].float() - images[1].float()).abs().max().item()
