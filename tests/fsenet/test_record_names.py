"""Names of a .rec's pictures from the list beside it."""

import io
import pickle
import re

import numpy as np
import pytest
from data.identity_records import IdentityRecords
from data.record_layouts import write_flat, write_identities
from PIL import Image


def picture(grey):
    buffer = io.BytesIO()
    Image.new("L", (2, 2), grey).save(buffer, "PNG")
    return buffer.getvalue()


NAMES = ("Zoe/a.jpg", "Zoe/b.jpg", "Ann/a.jpg", "Ann/José 2.png")
ITEMS = [(name, picture(grey)) for grey, name in enumerate(NAMES)]
LINES = ["1\t0\tZoe/a.jpg", "2\t0\tZoe/b.jpg", "3\t1\tAnn/a.jpg", "4\t1\tAnn/José 2.png"]


@pytest.fixture
def path(tmp_path):
    write_identities(tmp_path / "train.rec", ITEMS)
    return tmp_path / "train.rec"


def named(pictures):
    return {pictures.name(i): pictures.read(i) for i in range(len(pictures))}


def test_example(path):
    """MXNet's form, by hand; people are sorted by their names, whatever numbers they have."""
    assert path.with_suffix(".lst").read_text(encoding="utf-8") == "\n".join([*LINES, ""])
    pictures = IdentityRecords(path)
    assert pictures.identities == ("Ann", "Zoe")
    assert pictures.labels.tolist() == [1, 1, 0, 0]
    assert named(pictures) == dict(ITEMS)
    assert named(pickle.loads(pickle.dumps(pictures))) == dict(ITEMS)
    assert named(pictures.keep(["Ann"])) == dict(ITEMS[2:])
    assert named(pictures.take(np.array([3, 1]))) == dict([ITEMS[3], ITEMS[1]])
    path.with_suffix(".lst").unlink()
    assert IdentityRecords(path).paths[:3] == (
        "0000000/00000001.jpg", "0000000/00000002.jpg", "0000001/00000003.jpg"
    )  # fmt: skip


def test_flat(tmp_path):
    write_flat(tmp_path / "flat.rec", ITEMS[::-1], ["Ann", "Zoe"])
    assert (tmp_path / "flat.lst").read_text(encoding="utf-8").startswith("0\t0\tAnn/José 2.png\n")
    assert named(IdentityRecords(tmp_path / "flat.rec")) == dict(ITEMS)


def test_lists_of_others(path):
    """In another order, with other pictures too, with folders above, and labels as im2rec has."""
    lines = [line.replace("\t0\t", "\t0.000000\t/data/x/") for line in LINES]
    text = "\r\n".join([*lines[::-1], "9\t7\tBob/1.jpg", ""])
    path.with_suffix(".lst").write_bytes(text.encode())
    assert named(IdentityRecords(path)) == dict(ITEMS)
    more = [line.replace("\tZoe", "\t0\tZoe") for line in LINES]  # of several labels the first
    path.with_suffix(".lst").write_bytes("\n".join(more).encode())
    assert named(IdentityRecords(path)) == dict(ITEMS)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda lines: ["1\t/a/0.jpg\t0", *lines[1:]], r"line 1 should be 'key label .*'1"),
        (lambda lines: [*lines[:3], "4\t1\tx.jpg"], r"line 4 should be 'key label identity/pic"),
        (lambda lines: [*lines[:3], "4\tinf\tAnn/x.jpg"], r"line 4 should be 'key label identity"),
        (lambda lines: lines[:3], "it has other keys or labels"),
        (lambda lines: [*lines[:3], "4\t0\tAnn/x.jpg"], "it has other keys or labels"),
        (lambda lines: [*lines[:3], "4\t1\tBob/x.jpg"], "a label has two names, or a name two"),
        (lambda lines: [x.replace("Ann", "Zoe") for x in lines], "a label has two names, or a na"),
        (lambda lines: [x.replace("Ann", "..") for x in lines], r"nobody can be called '\.\.'"),
        (lambda lines: [], "it is empty"),
    ],
)
def test_passed_over(path, change, why, capsys):
    """Another list than that of the file is said to be, and numbers stand for names."""
    path.with_suffix(".lst").write_text("\n".join(change(LINES)), encoding="utf-8")
    assert IdentityRecords(path).paths[0] == "0000000/00000001.jpg"
    said = capsys.readouterr().err
    begin = f"{path.with_suffix('.lst')} is no list of train.rec's names: "
    assert said.startswith(begin)
    assert said.endswith("; numbers stand for them\n")
    assert re.match(why, said.removeprefix(begin)), said


def test_names_that_lead_out(path):
    """No file is called so: the key stands for it."""
    for name in ("..", ".hidden", "a\\b.jpg", "C:x", "\x1b.jpg"):
        lines = [*LINES[:3], f"4\t1\tAnn/{name}"]
        path.with_suffix(".lst").write_text("\n".join(lines), encoding="utf-8")
        assert IdentityRecords(path).paths[2:] == ("Ann/a.jpg", "Ann/00000004.jpg")
