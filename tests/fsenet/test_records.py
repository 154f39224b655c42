"""insightface's records: bytes worked by hand, both layouts, large numbers, and damage."""

import io
import multiprocessing
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch
from data import identity_records, records
from data.archives import DamagedImage
from data.damage import Damage
from data.identity_records import IdentityRecords
from data.records import MAGIC, Head, RecordFile, RecordWriter, pack, unpack
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

WORD = struct.pack("<I", MAGIC)


def write(path, items):
    """Write (key, payload) pairs."""
    with RecordWriter(path) as writer:
        for key, payload in items:
            writer.write(key, payload)
    return path


def layout(sizes, picture=b"jpeg"):
    """insightface's layout: identities of so many pictures, record 0 last in the file."""
    key, items, ranges = 1, [], []
    for label, size in enumerate(sizes):
        ranges.append((float(key), float(key + size)))
        items += [
            (key + i, pack((float(label),), picture + bytes([label, i]))) for i in range(size)
        ]
        key += size
    items += [(key + i, pack(border)) for i, border in enumerate(ranges)]
    return [*items, (0, pack((float(key), float(key + len(sizes)))))]


def lying(*ranges):
    """Two identities of three pictures, and records of identities that say another thing."""
    identities = [(7 + i, pack(borders)) for i, borders in enumerate(ranges)]
    return [*layout([3, 3])[:6], *identities, (0, pack((7.0, 7.0 + len(ranges))))]


def test_worked_bytes(tmp_path):
    """A payload of 9 bytes; and one with the magic number at 4 (cut there) and at 9 (kept)."""
    plain, cut = b"123456789", b"abcd" + WORD + b"x" + WORD
    path = write(tmp_path / "a.rec", [(7, plain), (8, cut)])
    assert path.read_bytes() == (
        WORD + bytes([9, 0, 0, 0]) + plain + b"\0\0\0"
        + WORD + bytes([4, 0, 0, 1 << 5]) + b"abcd"
        + WORD + bytes([5, 0, 0, 3 << 5]) + b"x" + WORD + b"\0\0\0"
    )  # fmt: skip
    assert path.with_suffix(".idx").read_text() == "7\t0\n8\t20\n"
    file = RecordFile(path)
    assert [file.payload(i) for i in range(2)] == [plain, cut]


pieces = st.one_of(st.binary(max_size=9), st.sampled_from([WORD, WORD * 2, b"\0\0\0\0"]))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(pieces, max_size=6).map(b"".join), max_size=5))
def test_any_payload(tmp_path_factory, payloads):
    path = tmp_path_factory.mktemp("records") / "a.rec"
    write(path, enumerate(payloads))
    assert [RecordFile(path).payload(i) for i in range(len(payloads))] == payloads
    path.with_suffix(".idx").unlink()
    scanned = RecordFile(path)
    assert [scanned.payload(i) for i in range(len(scanned))] == payloads


def test_headers():
    header = struct.pack("<IfQQ", 0, 3.0, 5, 0)
    assert pack((3.0,), b"x", 5) == header + b"x"
    assert pack((1.0, 2.0)) == struct.pack("<IfQQff", 2, 0.0, 0, 0, 1.0, 2.0)
    assert unpack(pack((1.0, 2.0), b"y")) == ((1.0, 2.0), b"y", 2)


@pytest.mark.parametrize("header", ["last", "first"])
@pytest.mark.parametrize("index", [True, False])
def test_insightface(tmp_path, index, header):
    """With keys or, where there are none, by order: record 0 is written last, or stands first."""
    items = layout([3, 1, 2])
    path = write(tmp_path / "train.rec", items if header == "last" else sorted(items))
    if not index:
        path.with_suffix(".idx").unlink()
    for given_path in (path, tmp_path):
        people = IdentityRecords(given_path)
        assert people.identities == ("0000000", "0000001", "0000002")
        assert people.labels.tolist() == [0, 0, 0, 1, 2, 2]
        assert [people.read(i)[-2:] for i in range(6)] == [
            bytes(x) for x in ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1))
        ]
        assert people.name(4) == "0000002/00000005.jpg"
    some = IdentityRecords(path, ["0000002"])
    assert (some.labels.tolist(), some.paths) == (
        [0, 0],
        ("0000002/00000005.jpg", "0000002/00000006.jpg"),
    )
    with pytest.raises(ValueError, match="holds no pictures of '0000009'"):
        IdentityRecords(path, ["0000009"])


@pytest.mark.parametrize("labels", [(4.0,), (4.0, 9.0, 9.0)])
def test_flat(tmp_path, labels):
    """Without a header every record is a picture, with several labels too."""
    others = [(1, pack((2.0,), b"b")), (2, pack((4.0,), b"c"))]
    people = IdentityRecords(write(tmp_path / "a.rec", [(0, pack(labels, b"a")), *others]))
    assert people.identities == ("0000002", "0000004")
    assert people.labels.tolist() == [1, 0, 1]
    assert [people.read(i) for i in range(3)] == [b"a", b"b", b"c"]


def test_pictures_are_decoded(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 100, 0)).save(buffer, "JPEG")
    write(tmp_path / "train.rec", layout([2, 2], buffer.getvalue()))
    picture, label = IdentityRecords(tmp_path, size=4)[3]
    assert (tuple(picture.shape), label) == ((3, 4, 4), 1)
    assert (picture.float().mean((1, 2)) - torch.tensor([200.0, 100, 0])).abs().max() < 8


class Many:
    """Records of an insightface file with more pictures than float32 counts, none of them there."""

    path = "train.rec"

    def __init__(self, sizes):
        self.ends = np.cumsum(sizes) + 1
        self.count = int(self.ends[-1]) - 1
        self.begins = self.ends - np.array(sizes)

    def __len__(self):
        return self.count + 1 + len(self.ends)

    def where(self, place):
        return f"key {place}"

    def head(self, place):
        if place <= self.count:
            return Head((float(np.searchsorted(self.ends, place, "right")),), 0, True)
        which = place - self.count - 1
        borders = tuple(float(np.float32(x)) for x in (self.begins[which], self.ends[which]))
        return Head(borders, 2, False)


def test_more_than_float32_counts():
    """Borders beyond 2**24 are rounded; the labels of the pictures tell where they are."""
    sizes = [2**24 - 4, 1, 1, 2, 1, 3, 1, 1, 1, 5, 1]
    many = Many(sizes)
    assert any(many.head(many.count + 1 + i).labels[1] != end for i, end in enumerate(many.ends))
    classes = identity_records._sorted_classes(many, many.count)
    assert np.bincount(classes).tolist() == sizes


def test_damage(tmp_path):
    path = write(tmp_path / "a.rec", [(i, pack((0.0,), b"jpeg" * 5)) for i in range(3)])
    whole, index = path.read_bytes(), path.with_suffix(".idx").read_text()

    def error(data=whole, lines=index, place=1):
        path.write_bytes(data)
        path.with_suffix(".idx").write_text(lines)
        with pytest.raises(ValueError) as caught:
            RecordFile(path).read(place)
        return str(caught.value).replace(str(tmp_path), "")

    second = "/a.rec: key 1 at offset 52"
    assert (
        error(whole[:70], index.replace("2\t104\n", "")) == f"{second} is cut short: 10 of 44 bytes"
    )
    assert error(whole[:52] + b"oops" + whole[56:]) == f"{second} does not begin as a record does"
    assert "its parts in another order" in error(whole[:59] + bytes([3 << 5]) + whole[60:])
    begun = WORD + bytes([4, 0, 0, 1 << 5]) + b"abcd"
    assert "its parts in another order" in error(begun + begun, "0\t0\n", 0)
    assert "is refused: 536870911 bytes" in error(whole[:56] + b"\xff\xff\xff\x1f" + whole[60:])
    assert "less than a header" in error(whole[:56] + bytes([9, 0, 0, 0]) + whole[60:])
    assert "should hold 9 labels" in error(whole[:60] + bytes([9]) + whole[61:])
    assert error(whole[:70]).startswith(
        "/a.idx has key 2 at offset 104, and /a.rec has 70 bytes: the two do not belong together"
    )
    assert "must hold a key and an offset a line" in error(lines="0\t0\n1\n")
    assert "must hold a key and an offset a line" in error(lines="\x80\x04import os")
    assert "whole numbers below 2**63" in error(lines="0\t99999999999999999999\n")
    assert "must hold a key and an offset a line" in error(lines="0\t-8\n1\t0\n")
    assert error(lines="0\t0\n0\t52\n").startswith("/a.idx has key 0 twice")
    path.with_suffix(".idx").unlink()
    path.write_bytes(whole[:70])
    with pytest.raises(ValueError, match=r"record 2 at 52 is cut short.*1 damaged, and 0 allowed"):
        RecordFile(path)
    os.mkfifo(path.with_suffix(".idx"))
    with pytest.raises(ValueError, match=r"a.idx is no regular file"):
        RecordFile(path)


def test_an_index_too_large(tmp_path, monkeypatch):
    path = write(tmp_path / "a.rec", layout([2]))
    monkeypatch.setattr(records, "_LARGEST_INDEX", 9)
    with pytest.raises(ValueError, match=r"a.idx is refused: [0-9]+ bytes are more than 9$"):
        RecordFile(path)


SIZES = [3, 1, 2]
PICTURES = {bytes([label, i]): label for label, size in enumerate(SIZES) for i in range(size)}


def flat_items():
    """The pictures of `layout`, each alone with its label."""
    return [(key - 1, payload) for key, payload in layout(SIZES)[:6]]


def opened(path, allowed):
    """Return what opens and can be read, by what it ends in, and how many were left out."""
    people = IdentityRecords(path, damage=Damage(allowed))
    found = {}
    for index, label in enumerate(people.labels.tolist()):
        try:
            found[people.read(index)[-2:]] = int(people.identities[label])
        except DamagedImage as error:
            people.damage.add(error)
    return found, people.damage.count


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("items", [flat_items(), layout(SIZES), sorted(layout(SIZES))])
def test_a_broken_record(tmp_path, capsys, items, index):
    """Whichever it is, it alone is lost, counted and named, and nobody gets another's label."""
    path = write(tmp_path / "a.rec", items)
    whole, file = path.read_bytes(), RecordFile(path)
    lines = path.with_suffix(".idx").read_text()
    payloads = [file.payload(place) for place in range(len(file))]
    for offset, payload in zip(file.offsets.tolist(), payloads, strict=True):
        path.write_bytes(whole[:offset] + b"oops" + whole[offset + 4 :])
        path.with_suffix(".idx").write_text(lines)
        if not index:
            path.with_suffix(".idx").unlink()
        lost = payload[-2:] if len(payload) == 30 else b""
        capsys.readouterr()
        found, count = opened(path, 1)
        assert found == {name: label for name, label in PICTURES.items() if name != lost}
        assert count == 1
        assert f"at offset {offset} does not begin" in (said := capsys.readouterr().err) or (
            f"at {offset} does not begin" in said
        )
        with pytest.raises(ValueError, match=r"that makes 1 damaged, and 0 allowed$"):
            opened(path, 0)


@pytest.mark.parametrize("block", [4, 8, 2**20])
def test_a_broken_record_in_parts(tmp_path, monkeypatch, block):
    """Without an index what follows its first part is not taken for other records."""
    monkeypatch.setattr(records, "_BLOCK", block)
    in_parts = pack((0.0,), b"abcd" + WORD + b"x" * 4 + WORD)
    path = write(tmp_path / "a.rec", [(0, in_parts), (1, pack((7.0,), b"y"))])
    path.with_suffix(".idx").unlink()
    data = path.read_bytes()
    assert data.count(WORD) > 3, "three parts, and another record"
    path.write_bytes(b"oops" + data[4:])
    assert opened(path, 1) == ({b"y": 7}, 1)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("items", [flat_items(), layout(SIZES), sorted(layout(SIZES))])
def test_a_file_cut_short(tmp_path, items, index):
    """What lies before the cut is kept, and each key behind it counted."""
    path = write(tmp_path / "a.rec", items)
    whole, file = path.read_bytes(), RecordFile(path)
    if not index:
        path.with_suffix(".idx").unlink()
    order = sorted(range(len(file)), key=lambda place: file.offsets[place])
    payloads = [file.payload(place) for place in order]
    for behind in range(1, len(order)):
        kept = payloads[:behind]
        wanted = {p[-2:]: PICTURES[p[-2:]] for p in kept if len(p) == 30}
        path.write_bytes(whole[: int(file.offsets[order[behind]]) + 6])  # inside of a header
        if not wanted:
            with pytest.raises(ValueError, match="holds no records of pictures"):
                opened(path, 99)
            continue
        found, count = opened(path, 99)
        assert found == wanted
        assert count == (len(order) - behind if index else 1)
        with pytest.raises(ValueError, match=f"makes {count} damaged, and {count - 1} allowed"):
            opened(path, count - 1)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "holds no records"),
        ([(0, pack((float("inf"),), b"x"))], "key 0 at offset 0 has label inf: a class is a whole"),
        ([(0, pack((float("nan"),), b"x"))], "key 0 at offset 0 has label nan: a class is a whole"),
        (lying((1.0, 5.0), (4.0, 7.0)), "gives identity 0 keys 1 to 4 of 6, of which the last has"),
        (lying((1.0, 4.0), (3.0, 7.0)), "keys from 3, where those before it end at 3 of 6"),
        (lying((1.0, 4.0), (5.0, 7.0)), "keys from 5, where those before it end at 3 of 6"),
        (lying((1.0, 4.0), (4.0, 9.0)), "gives identity 1 keys 4 to 8 of 6, of which the last has"),
        (lying((1.0, 4.0), (4.0, 7.0), (7.0, 8.0)), "from 7, where those before it end at 6 of 6"),
        (lying((1.0, 4.5), (4.0, 7.0)), "should say which keys are an identity's"),
        (lying((1.0, float("inf")), (4.0, 7.0)), "should say which keys are an identity's"),
        ([(0, pack((0.5,), b"x"))], "key 0 at offset 0 has label 0.5: a class is a whole number"),
        ([(0, pack((2.0**24,), b"x"))], "has label 16777216.0: a class is a whole number"),
        (layout([2, 1])[:-3] + layout([2, 1])[-2:], "has 5 records, and keys up to 5"),
        ([*layout([2, 1])[:3], (4, pack((1.0, 3.0))), (5, pack((3.0,))), (0, pack((4.0, 6.0)))],
         "should say which keys are an identity's"),
        ([*layout([2, 1])[:3], (4, pack((1.0, 3.0))), (0, pack((4.0, 5.0)))],
         "has 3 pictures, and its identities have 2"),
    ],
)  # fmt: skip
def test_files_of_another_kind(tmp_path, items, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        IdentityRecords(write(tmp_path / "a.rec", items))


def test_processes(tmp_path):
    """A worker opens the file anew, forked or sent."""
    people = IdentityRecords(write(tmp_path / "a.rec", layout([2, 2])))
    first = people.read(0)
    assert pickle.loads(pickle.dumps(people)).read(3) == people.read(3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=lambda: queue.put((people.read(0), people._records._open._pid)))
    worker.start()
    found, pid = queue.get(timeout=60)
    worker.join()
    assert found == first
    assert pid == worker.pid
