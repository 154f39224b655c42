"""WebDataset's shards: against `tarfile` and `webdataset`, and all that a stranger's may hold."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from data.damage import Damage
from data.file_sets import files_of
from data.pictures import open_pictures
from data.shards import IdentityShards, write_shards
from data.tars import BLOCK, DamagedTar, Member, tar_members
from hypothesis import given, settings
from hypothesis import strategies as st

PEOPLE = ("Ann", "Bob", "Cid")


def pack(path, members, **options):
    """Write a tar with `tarfile`, the oracle of what a tar is."""
    with tarfile.open(path, "w:", **options) as archive:
        for name, data in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def sample(key, label=None, /, **about):
    """Return the members of a sample; its picture is its key, as nothing here decodes it."""
    members = [(f"{key}.jpg", key.encode())]
    if label is not None:
        members.append((f"{key}.cls", str(label).encode()))
    if about:
        members.append((f"{key}.json", json.dumps(about).encode()))
    return members


def found(pictures):
    return [
        (pictures.identities[label], pictures.read(i)) for i, label in enumerate(pictures.labels)
    ]


def members_of(path):
    with open(path, "rb") as file:
        return [*tar_members(file)]


def test_example(tmp_path):
    pictures = [(f"{PEOPLE[i % 3]}/{i}.png", bytes([i])) for i in range(7)]
    write_shards(tmp_path / "faces-%06d.tar", pictures, PEOPLE)
    shards = IdentityShards(tmp_path / "faces-%06d.tar")
    assert shards.identities == PEOPLE
    assert shards.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert shards.paths == tuple(name for name, _ in pictures)
    assert [shards.read(i) for i in range(7)] == [data for _, data in pictures]
    assert shards.where(3) == f"{tmp_path}/faces-000000.tar:00000003.png at offset 9728"
    few = shards.keep({"Cid", "Bob"})
    assert found(few) == [("Bob", b"\1"), ("Cid", b"\2"), ("Bob", b"\4"), ("Cid", b"\5")]
    assert few.name(1) == "Cid/2.png"
    assert found(pickle.loads(pickle.dumps(few))) == found(few)  # as spawned workers get it


def test_many_shards(tmp_path, monkeypatch):
    """However many there are, and however they are called, they are one set."""
    monkeypatch.setattr("data.shards._PER_SHARD", 3)
    pictures = [(f"{PEOPLE[i % 3]}/{i}.jpg", bytes([i])) for i in range(7)]
    write_shards(tmp_path / "a-%02d.tar", pictures, PEOPLE)
    assert [len(members_of(tmp_path / f"a-0{i}.tar")) for i in range(3)] == [9, 9, 3]
    for path in ("a-%02d.tar", "a-%d.tar", "a-{00..02}.tar", "."):
        assert found(open_pictures(tmp_path / path)) == [(n[:3], d) for n, d in pictures]
    assert found(open_pictures(tmp_path / "a-01.tar")) == [(n[:3], d) for n, d in pictures[3:6]]
    assert len(open_pictures(tmp_path / "a-{01..02}.tar")) == 4
    with pytest.raises(FileNotFoundError, match=r"a-03.tar does not exist"):
        open_pictures(tmp_path / "a-{02..04}.tar")
    with pytest.raises(FileNotFoundError, match=r"b-%d.tar holds no .tar files"):
        open_pictures(tmp_path / "b-%d.tar")
    for braces in ("{5..1}", "{0..9999999}"):
        with pytest.raises(ValueError, match="must run from a number to a larger one"):
            files_of(tmp_path / f"a-{braces}.tar", ".tar")


def test_webdataset_reads_ours(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pictures = [(f"{PEOPLE[i % 3]}/{i}.v1.jpg", bytes([i])) for i in range(7)]
    write_shards(tmp_path / "a-%06d.tar", pictures, PEOPLE)
    samples = webdataset.WebDataset(str(tmp_path / "a-000000.tar"), shardshuffle=False)
    read = [
        (about["identity"] + "/" + about["name"], data, int(label), about["label"])
        for data, label, about in ((x["jpg"], x["cls"], json.loads(x["json"])) for x in samples)
    ]
    assert read == [(n, d, i % 3, i % 3) for i, (n, d) in enumerate(pictures)]


def test_ours_reads_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    pattern = f"{tmp_path}/a-%04d.tar"
    with webdataset.ShardWriter(pattern, maxcount=4, verbose=0) as writer:
        for i in range(10):
            key = f"part{i % 2}/{i:04d}"  # with a folder, and attributes of the time behind
            writer.write({"__key__": key, "jpg": bytes([i, 7]), "cls": 40 - i % 3, "txt": "hm"})
    shards = open_pictures(pattern)
    assert shards.identities == ("0000038", "0000039", "0000040")
    assert shards.labels.tolist() == [2 - i % 3 for i in range(10)]
    assert [shards.read(i) for i in range(10)] == [bytes([i, 7]) for i in range(10)]
    assert shards.name(3) == "0000040/part1-0003.jpg"


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(st.tuples(st.text("aé/.ü\\ ", min_size=1, max_size=240), st.integers(0, 1500))),
    st.floats(0, 1e9),
)
def test_members_are_tarfiles(tmp_path_factory, layout, files, mtime):
    path = tmp_path_factory.getbasetemp() / "members.tar"
    with tarfile.open(path, "w:", format=layout) as archive:
        for name, size in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = size, mtime if layout == tarfile.PAX_FORMAT else 7
            try:
                archive.addfile(member, io.BytesIO(bytes(size)))
            except ValueError:  # a name that is too long for the layout
                continue
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]

    def plain(members):
        """Drop folders called "." and empty ones: the two readers drop others of them."""
        return [([x for x in n.split("/") if x not in ("", ".")], *place) for n, *place in members]

    assert plain(members_of(path)) == plain(expected)


def header(name=b"a.jpg", size=b"00000000001", kind=b"0"):
    block = bytearray(BLOCK)
    block[: len(name)], block[124 : 124 + len(size)], block[156:157] = name, size, kind
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


def test_hostile_headers(tmp_path):
    """Sizes that lead back, beyond the end or into memory; what is no file is passed over."""
    path, end = tmp_path / "a.tar", bytes(2 * BLOCK)
    attributes = b"99 path=x\n".ljust(BLOCK, b"\0")
    cases = {
        "no tar header at byte 0": b"",
        "no tar header at byte 0 ": b"\x89PNG" * 300,
        "no tar header at byte 512": header(size=b"0") + bytes([7]) * BLOCK,
        "no tar header at byte 0  ": header(size=b"-0000001000"),
        "no tar header at byte  0": header()[:-1] + b"x",  # its sum is another
        "no tar header at byte 0   ": header(size=b"1_000"),
        "cut short at byte 1536, inside 'a.jpg'": header(size=b"77777777777") + end,
        "cut short at byte 1536, inside  'a.jpg'": header(size=b"\x80" + b"\xff" * 11) + end,
        "attributes of 4194304 bytes at byte 0": header(size=b"00020000000", kind=b"L"),
        "attributes of 4194304  bytes at byte 0": header(size=b"00020000000", kind=b"x"),
        "damaged attributes at byte 0": header(size=b"12", kind=b"x") + attributes + end,
        "cut short at byte 1024": header() + b"x".ljust(BLOCK, b"\0"),
    }
    for length in range(3):  # too short for its own digit and the space: 0 would never end
        line = f"{length} a=b\n".encode().ljust(BLOCK, b"\0")
        spaces = " " * (length + 1)
        cases[f"damaged attributes{spaces} at byte 0"] = header(size=b"6", kind=b"x") + line + end
    for message, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(DamagedTar) as caught:
            members_of(path)
        assert str(caught.value).startswith(" ".join(message.split()))
    kinds = b"".join(header(kind=bytes([kind]), size=b"0") for kind in b"123456SV")
    path.write_bytes(kinds + header(b"b.jpg", b"0") + end)
    assert members_of(path) == [Member("b.jpg", 9 * BLOCK, 0)]


def damaged_cases():
    fine = sample("fine", 3, identity="Cid")
    bad = {
        "sample 'x' has no label: expected .cls or .json": sample("x"),
        "sample 'x' has no pictures: expected one": sample("x", 3)[1:],
        "sample 'x' has 2 pictures: expected one": [*sample("x", 3), ("x.png", b"")],
        "sample 'x' has the label 'Ann': expected a whole": sample("x", "Ann"),
        "sample 'x' has the label '-1': expected a whole": sample("x", -1),
        "sample 'x' has the label '\ufffd\ufffd': expected": sample("x", "²"),
        "sample 'x' has the label 1.5: expected a whole": sample("x", None, label=1.5),
        "sample 'x' has the label True: expected a whole": sample("x", None, label=True),
        "sample 'x' has the labels 3 and 4": sample("x", 3, label=4, identity="Cid"),
        "sample 'x' has a .json that is no object": [*sample("x"), ("x.json", b"[" * 60_000)],
        "sample 'x' is refused: 65537 bytes beside": [*sample("x"), ("x.json", b" " * 65_537)],
        "sample 'x' has the identity '../..': expected a": sample("x", 5, identity="../.."),
        "sample 'x' has the identity '': expected a": sample("x", 5, identity=""),
        "sample 'x' has the identity 7: expected a name": sample("x", 5, identity=7),
        "sample 'x' has the identity '\\ud800': expected": sample("x", 5, identity="\ud800"),
        "sample 'x' says that 3 is 'Ann', which was 'Cid'": sample("x", 3, identity="Ann"),
        "sample 'x' says that 'Cid' is 4, who was 3 before": sample("x", 4, identity="Cid"),
        "sample 'x' says that 3 is '0000003', which was 'Cid'": sample("x", 3),
        "a.tar:fine.jpg at offset 3584 has the key of a picture in": fine,
    }
    return [pytest.param(message, [*fine, *more], id=message) for message, more in bad.items()]


@pytest.mark.parametrize(("message", "members"), damaged_cases())
def test_damaged_samples(tmp_path, capsys, message, members):
    """Each is an error, or counted and named when it may be left out; the others stay."""
    path = pack(tmp_path / "a.tar", members)
    with pytest.raises(ValueError, match=r"; that makes 1 damaged, and 0 allowed$") as said:
        IdentityShards(path)
    assert message in str(said.value)
    shards = IdentityShards(path, damage=Damage(1))
    assert found(shards) == [("Cid", b"fine")]
    assert shards.damage.count == 1
    assert message in capsys.readouterr().err


def test_same_key_in_two_shards(tmp_path):
    for name in ("a-0.tar", "a-1.tar"):
        pack(tmp_path / name, [*sample("00", 1), *sample(f"{name[2]}x", 2)])
    with pytest.raises(ValueError, match=r"a-1.tar:00.jpg at offset 512 has the key of a picture"):
        IdentityShards(tmp_path)
    assert len(IdentityShards(tmp_path, damage=Damage(1))) == 3


def test_cut_short(tmp_path, capsys):
    """At every length: whole pictures alone, in their order, and never without a word."""
    members = [member for i in range(4) for member in sample(f"{i:02d}", i)]
    whole = pack(tmp_path / "whole.tar", members).read_bytes()
    everything = found(IdentityShards(tmp_path / "whole.tar"))
    path, counts, refused = tmp_path / "a.tar", set(), []
    for length in range(0, 16 * BLOCK + 1, 64):
        path.write_bytes(whole[:length])
        try:
            shards = IdentityShards(path, damage=Damage(1))
        except ValueError as error:
            refused.append(str(error))
            continue
        assert shards.damage.count == 1
        assert "is cut short at byte" in capsys.readouterr().err
        assert found(shards) == everything[: len(shards)]
        counts.add(len(shards))
    assert counts == {1, 2, 3}
    assert all("no tar header" in text or "holds no pictures" in text for text in refused)
    path.write_bytes(whole[: 17 * BLOCK])  # one of the two headers of zeros
    assert found(IdentityShards(path)) == everything


def test_names_that_lead_out(tmp_path):
    """A key is never a path, and the name of a picture is taken only when it is one."""
    names = ["../../x.jpg", "/etc/x.jpg", "a/b.jpg", ".hidden.jpg", "x.exe", "", 7, "n.jpg"]
    members = [m for i, n in enumerate(names) for m in sample(f"../{i}", 1, identity="A", name=n)]
    shards = IdentityShards(pack(tmp_path / "a.tar", members))
    assert shards.paths == (*(f"A/{i:08d}.jpg" for i in range(7)), "A/n.jpg")


def test_no_pictures_and_no_tar(tmp_path):
    pack(tmp_path / "a-0.tar", [("x.txt", b"")])
    with pytest.raises(ValueError, match=r"holds no pictures with a label: expected KEY.jpg and"):
        IdentityShards(tmp_path)
    (tmp_path / "a-1.tar").write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(ValueError, match=r"a-1.tar is no plain tar file, or a damaged one \(no"):
        IdentityShards(tmp_path, damage=Damage(9))
