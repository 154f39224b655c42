"""insightface's .bin files: read without running anything, and counted as insightface counts."""

import io
import json
import os
import pickle
import struct

import evaluate
import numpy as np
import pytest
from evaluate_options import Arguments
from PIL import Image
from protocols import bins
from protocols.bins import read_bin, write_bin
from protocols.rates import as_insightface

PICTURES = [bytes([i]) * 3 for i in range(24)]
SAME = [i % 3 == 0 for i in range(12)]


def dump(path, content, protocol=2):
    path.write_bytes(pickle.dumps(content, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("arrays", [False, True])
def test_forms(tmp_path, protocol, arrays):
    """Every protocol of pickle; bytes or arrays of them, bools or arrays."""
    content = (PICTURES, SAME)
    if arrays:
        content = ([np.frombuffer(x, np.uint8) for x in PICTURES], np.array(SAME))
    found = read_bin(dump(tmp_path / "a.bin", content, protocol))
    assert found.pictures == tuple(PICTURES)
    assert found.same.tolist() == SAME


def test_python_2(tmp_path):
    """Where bytes are strings: written here by hand, opcode by opcode."""
    short = b"".join(b"U" + bytes([len(x)]) + x for x in PICTURES)
    answers = b"".join(b"\x88" if x else b"\x89" for x in SAME)
    data = b"\x80\x02](" + short + b"e](" + answers + b"e\x86."
    (tmp_path / "a.bin").write_bytes(data)
    found = read_bin(tmp_path / "a.bin")
    assert (found.pictures, found.same.tolist()) == (tuple(PICTURES), SAME)


def test_written(tmp_path):
    write_bin(tmp_path / "a.bin", PICTURES, SAME)
    assert pickle.loads((tmp_path / "a.bin").read_bytes()) == (PICTURES, SAME)
    assert read_bin(tmp_path / "a.bin").pictures == tuple(PICTURES)


def test_insightfaces_grid():
    """Squared distances 0.008 and 0.012 lie on both sides of 0.01; 0.012 and 0.018 do not."""
    same, fold = np.array([True, False] * 20), np.repeat(np.arange(10), 4)
    for cosines, accuracy in (((0.996, 0.994), 1.0), ((0.994, 0.991), 0.5)):
        assert as_insightface(np.array(cosines * 20), same, fold)["accuracy"] == accuracy


class Call:
    def __init__(self, *what):
        self.what = what

    def __reduce__(self):
        return self.what


def test_nothing_is_run(tmp_path):
    """Neither a command, nor a large array, nor one of objects, nor a codec of choice."""
    mark = tmp_path / "ran"
    core = np.zeros(1).__reduce__()[0]
    cases = {
        "posix.system": Call(os.system, (f"touch {mark}",)),
        "__builtin__.eval": Call(eval, (f"open({str(mark)!r}, 'w')",)),
        "__builtin__.getattr": Call(getattr, ("x", "upper")),
        "numpy.load": Call(np.load, ("x",)),
        "a call of numpy.ndarray": Call(np.ndarray, ((2**40,), np.dtype("u1"), b"x", 0, (0,))),
        "an array that is not empty": Call(core, (np.ndarray, (2**40,), b"b")),
        "an array of object": np.array([None]),
        "the codec 'zip'": Call(__import__("_codecs").encode, ("x", "zip")),
    }
    for name, content in cases.items():
        with pytest.raises(ValueError, match=f"is refused: it asks for .*{name}"):
            read_bin(dump(tmp_path / "a.bin", (PICTURES, content)))
    assert not mark.exists()


def test_memory(tmp_path, monkeypatch):
    """A few bytes that stand for more than there is memory are refused before any is taken."""
    doubled = [True]
    for _ in range(40):
        doubled = [doubled, doubled]
    rows = np.zeros((2**40, 0), np.uint8)
    large = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (2**40,), (0,))
    for content in ((PICTURES, doubled), (rows, SAME), (PICTURES, rows), (7, SAME)):
        with pytest.raises(ValueError, match=r"a\.bin holds something else than pictures"):
            read_bin(dump(tmp_path / "a.bin", content, 4))
    with pytest.raises(TypeError, match=f"a picture has {2**40} bytes"):
        bins._encoded(large)

    def full(self):
        raise MemoryError

    monkeypatch.setattr(bins._Plain, "load", full, raising=False)
    with pytest.raises(ValueError, match="is refused: it asks for more memory than there is"):
        read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize("kind", [bytes, np.array])
def test_a_picture_that_stands_there_often(tmp_path, kind):
    """It is held once, whatever the number of its places."""
    picture = kind(np.zeros(10**6, np.uint8))
    path = dump(tmp_path / "a.bin", ([picture] * 24, SAME))
    pictures = read_bin(path).pictures
    assert (len(pictures), len(pictures[0])) == (24, 10**6)
    assert len({id(x) for x in pictures}) == 1


def again(opcodes, times):
    """A pickle of pictures that `opcodes` make: first what stands there once, then each."""
    pictures = opcodes[0] + b"](" + opcodes[1] * times + b"e"
    return b"\x80\x05" + pictures + b"](" + b"\x88" * (times // 2) + b"e\x86."


def test_many_of_one_object(tmp_path):
    """Arrays on the same bytes, and bytes of the same text: refused before the memory is taken."""
    size = struct.pack("<I", 10**6)
    text = b"X" + size + b"x" * 10**6 + b"q\x00" + b"0"
    dtype = b"0cnumpy\ndtype\n(X\x02\0\0\0u1tRq\x02"
    arrays = b"cnumpy.core.numeric\n_frombuffer\nq\x01" + dtype
    arrays += b"0B" + size + b"x" * 10**6 + b"q\x00" + b"0"
    shape = b"J" + size + b"\x85"
    each = b"h\x01(h\x00h\x02" + shape + b"X\x01\0\0\0CtR"
    (tmp_path / "a.bin").write_bytes(again((arrays, each), 24))
    with pytest.raises(ValueError, match="their arrays come to more bytes than the file has"):
        read_bin(tmp_path / "a.bin")
    encode = b"c_codecs\nencode\nq\x01" + b"0"
    each = b"h\x01(h\x00X\x06\0\0\0latin1tR"
    (tmp_path / "a.bin").write_bytes(again((encode + text, each), 24))
    with pytest.raises(ValueError, match="is refused: it asks for more bytes than it has"):
        read_bin(tmp_path / "a.bin")


@pytest.mark.parametrize("name", ["dtype", "ndarray", "_reconstruct"])
def test_nothing_is_changed(tmp_path, name):
    """A state is that of arrays: what the reader itself is made of gets no attributes."""
    state = b"}X\x0c\0\0\0__defaults__X\x01\0\0\0a\x85s"
    known = bins._Plain(b"").find_class("numpy", name)
    for build in (b"N" + state + b"\x86b", state + b"b"):  # to be set, or to be updated
        data = b"\x80\x02cnumpy\n" + name.encode() + b"\n" + build + b"."
        (tmp_path / "a.bin").write_bytes(data)
        with pytest.raises(
            ValueError, match=r"is refused: it asks for a change of (function|type)"
        ):
            read_bin(tmp_path / "a.bin")
    assert getattr(known, "__defaults__", None) is None


def test_errors(tmp_path):
    path = tmp_path / "a.bin"
    whole = pickle.dumps((PICTURES, SAME))
    cases = {
        "is no verification set, or a damaged one": whole[:40],
        "must hold pictures and answers; got int": pickle.dumps(7),
        "a picture is int, not bytes": pickle.dumps(([1] * 24, SAME)),
        "an array of float32, not of encoded bytes": pickle.dumps(
            ([np.ones(3, np.float32)] * 24, SAME)
        ),
        "got 23 pictures and answers [12]": pickle.dumps((PICTURES[1:], SAME)),
        "got 18 pictures and answers [9]": pickle.dumps((PICTURES[:18], SAME[:9])),
        "which is True or False": pickle.dumps((PICTURES, [2] * 12)),
    }
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(ValueError) as caught:
            read_bin(path)
        assert message in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"pass one of insightface's \.bin files"):
        read_bin(tmp_path / "nowhere.bin")
    for data in (b"\n", b"", b"junk"):  # of which the first is no opcode, and raised its number
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"damaged one, and cannot be read to its end: pass "):
            read_bin(path)
    # A header that promises more than there is.
    path.write_bytes(b"\x80\x04B" + struct.pack("<I", 2**31) + b"x")
    with pytest.raises(ValueError, match="damaged"):
        read_bin(path)


def test_evaluate(tmp_path, capsys):
    """By hand: of 20 pairs, one genuine pair looks like strangers; so 19 of 20 are right."""
    buffer = io.BytesIO()
    Image.new("RGB", (112, 112)).save(buffer, "PNG")
    same = [True, False] * 10
    write_bin(tmp_path / "a.bin", [buffer.getvalue()] * 40, same)
    embeddings = np.zeros((40, 2))
    embeddings[:, 0] = 1
    for pair, one in enumerate(same):
        if not one or pair == 6:
            embeddings[2 * pair + 1] = (0, 1)
    names = [str(i) for i in range(40)]
    np.savez(tmp_path / "e.npz", embeddings=embeddings, names=names)
    arguments = Arguments(tmp_path / "e.npz", "bin", tmp_path / "a.bin")
    evaluate.main(arguments)
    found = json.loads(capsys.readouterr().out)
    numbers = found["arms"]["embeddings"]
    assert numbers["accuracy"] == 0.95
    assert numbers["insightface"] == {"accuracy": 0.95, "std": pytest.approx(0.15)}
    assert "rank_1" not in numbers
    assert found["protocol"]["pairs"] == 20
    assert len(found["protocol"]["sha256"]) == 64
    for change, message in (
        ({"faces": None}, "--protocol bin needs --faces: a .bin of insightface"),
        ({"all_folds": True}, "--all-folds is for --protocol lfw: leave it out with bin"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.main(Arguments(**vars(arguments) | change))


def test_a_number_of_an_object_takes_no_memory(tmp_path):
    """Eight bytes that number a list 2**32 - 1: room for all before it would be 64 GB."""
    resource = pytest.importorskip("resource")
    (tmp_path / "a.bin").write_bytes(b"\x80\x02]r\xff\xff\xff\xff.")
    limit = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**34, limit[1]))
    try:
        with pytest.raises(ValueError, match="must hold pictures and answers; got list"):
            read_bin(tmp_path / "a.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
