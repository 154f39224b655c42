"""IJB's loose crops: cut by their points, described and evaluated in one go."""

import dataclasses
import json
import re
import shutil

import evaluate
import extract
import numpy as np
import pytest
import torch
from data.archives import DamagedImage
from describe import describe
from evaluate_options import Arguments
from extract import open_to_describe
from model import GlobalNet, load_network
from PIL import Image
from protocols.crops import LooseCrops, holds_crops
from protocols.fixtures import write_ijb
from protocols.ijb import IjbProtocol
from workplace import this_process

from partlocal.alignment import ARCFACE_TEMPLATE
from partlocal.backbone import Backbone


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ijbc")
    write_ijb("ijbc", folder)
    torch.manual_seed(0)
    GlobalNet(Backbone("resnet10t")).save_pretrained(folder / "baseline")
    return folder


def by_loops(picture, points):
    """Least squares for the four numbers of a similarity, then every pixel looked up."""
    rows, goal = [], []
    for (x, y), (u, v) in zip(points.astype(float), ARCFACE_TEMPLATE, strict=True):
        rows += [(x, -y, 1, 0), (y, x, 0, 1)]
        goal += [u, v]
    a, b, left, top = np.linalg.lstsq(np.array(rows), np.array(goal), rcond=None)[0]
    back = np.linalg.inv([[a, -b, left], [b, a, top], [0, 0, 1]])
    height, width = picture.shape[:2]
    padded = np.zeros((height + 2, width + 2, 3))
    padded[1:-1, 1:-1] = picture
    cut = np.zeros((112, 112, 3))
    for row, column in np.ndindex(112, 112):
        x, y, _ = back @ (column, row, 1)
        i, j = int(np.floor(y)), int(np.floor(x))
        if -1 <= i < height and -1 <= j < width:
            p, q = y - i, x - j
            near = padded[i + 1 : i + 3, j + 1 : j + 3]
            cut[row, column] = np.einsum("a,b,abc->c", [1 - p, p], [1 - q, q], near)
    return cut


def test_reference(world):
    crops, lists = LooseCrops(world, size=112), IjbProtocol.read(world, "ijbc")
    assert crops.paths == lists.names
    for row in (0, 5):
        picture = np.asarray(Image.open(world / "loose_crop" / lists.names[row]).convert("RGB"))
        expected = by_loops(picture, lists.points[row])
        found = crops.load(row)
        assert found.shape == (112, 112, 3)
        assert np.abs(found - expected).max() < 1  # rounded
        assert expected.std() > 20


@pytest.mark.parametrize("kept", [False, True])
def test_evaluate(world, tmp_path, capsys, kept):
    """A network on the crops, in one go; the embeddings thrown away or kept and used again."""
    place = tmp_path / "features" if kept else None
    arguments = Arguments(world / "baseline", "ijbc", world, features=place, precision="fp32")
    evaluate.main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["test_time"] == "original and mirrored concatenated, then L2"
    assert found["alignment"].startswith("five points to 112x112")
    numbers = found["arms"]["global half"]
    crops = LooseCrops(world, size=112)
    pictures = torch.stack([crops[row][0] for row in range(len(crops))])
    described = describe(load_network(world / "baseline"), pictures, this_process("fp32"))
    expected = IjbProtocol.read(world, "ijbc").evaluate(described.global_half.numpy())
    assert numbers["auc"] == pytest.approx(expected["auc"], abs=0.01)
    assert numbers["pairs"] == expected["pairs"] == 190
    if kept:
        evaluate.main(Arguments(place, "ijbc", world))
        again = json.loads(capsys.readouterr().out)
        assert again["arms"]["embeddings"] == numbers
        assert again["protocol"] == found["protocol"]
        assert again["test_time"] == found["test_time"]
        with pytest.raises(ValueError, match="--features is for networks: leave it out, the embed"):
            evaluate.main(Arguments(place, "ijbc", world, features=place))


def test_both_protocols(world, tmp_path):
    """Each is cut with its own points, and who names none is refused; so are two folders."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    lists = IjbProtocol.read(world, "ijbc")
    moved = dataclasses.replace(lists, points=lists.points + np.float32(7))
    moved.write(tmp_path / "meta", "ijbb")
    with pytest.raises(ValueError, match=r"holds ijbb_ and ijbc_name_5pts_score\.txt: pass what"):
        open_to_describe(tmp_path)
    expected = LooseCrops(world, size=112).load(0)
    found = {n: LooseCrops(tmp_path, size=112, protocol=n).load(0) for n in ("ijbb", "ijbc")}
    np.testing.assert_array_equal(found["ijbc"], expected)
    assert np.abs(found["ijbb"].astype(int) - expected).max() > 20
    (tmp_path / "more/loose_crop").mkdir(parents=True)
    (tmp_path / "more/loose_crop/0.jpg").touch()
    with pytest.raises(
        ValueError, match=r"2 folders loose_crop, loose_crop/ and more/loose_crop/: "
    ):
        LooseCrops(tmp_path, protocol="ijbc")


def test_damaged_lists_are_told_first(world, tmp_path, monkeypatch):
    """Not after hours of describing."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    (tmp_path / "meta/ijbc_1N_probe_mixed.csv").unlink()
    monkeypatch.setattr(evaluate, "extract", lambda *_: pytest.fail("too late"))
    with pytest.raises(FileNotFoundError, match=r"holds no ijbc_1N_probe_mixed\.csv"):
        evaluate.main(Arguments(world / "baseline", "ijbc", tmp_path))


def test_other_points(world, tmp_path):
    """An extraction does not go on with other points than it was begun with."""
    shutil.copytree(world, tmp_path / "w")
    how = extract.Extraction(precision="fp32")
    for _ in range(2):
        crops = open_to_describe(tmp_path / "w")
        extract.extract(world / "baseline", crops, tmp_path / "f", how)
    path = tmp_path / "w/meta/ijbc_name_5pts_score.txt"
    path.write_text(path.read_text().replace(" 1", " 2", 1))
    with pytest.raises(ValueError, match=r"was begun with other points of the faces: name"):
        extract.extract(world / "baseline", open_to_describe(tmp_path / "w"), tmp_path / "f", how)


def test_errors(world, tmp_path):
    assert holds_crops(world)
    assert not holds_crops(tmp_path)
    assert isinstance(open_to_describe(world), LooseCrops)
    with pytest.raises(FileNotFoundError, match=r"holds no ijbb_ or ijbc_name_5pts_score\.txt"):
        LooseCrops(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "loose_crop").mkdir()
    IjbProtocol.read(world, "ijbc").write(tmp_path / "meta", "ijbc")
    count = len(LooseCrops(world))
    with pytest.raises(
        FileNotFoundError, match=f"{count} of {count} faces have no picture in loos"
    ):
        LooseCrops(tmp_path)
    for name in LooseCrops(world).paths:
        (tmp_path / "loose_crop" / name).write_bytes(b"")
    first = tmp_path / "loose_crop" / LooseCrops(world).paths[0]
    crops = LooseCrops(tmp_path)
    with pytest.raises(DamagedImage, match=re.escape(str(crops.where(0)))):
        crops.load(0)
    Image.new("RGB", (60, 50)).save(first)
    path = tmp_path / "meta/ijbc_name_5pts_score.txt"
    text = path.read_text().splitlines()
    for points in ("5 5 " * 5, "nan 5 " * 5):
        path.write_text("\n".join([f"{LooseCrops(world).paths[0]} {points}1.0", *text[1:]]))
        with pytest.raises(DamagedImage, match=r"cannot be cut: source points"):
            LooseCrops(tmp_path).load(0)
