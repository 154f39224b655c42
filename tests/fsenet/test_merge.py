"""Several sources as one: who is who, what a list says, and that no picture changes its owner."""

import io
import os
import tarfile
import zipfile

import numpy as np
import pytest
from data import merge
from data.damage import Damage
from data.merge import MergedPictures, read_identity_list
from data.pictures import open_pictures, open_sources
from data.record_layouts import write_identities
from data.tables import write_table
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def picture(number):
    buffer = io.BytesIO()
    Image.new("RGB", (3, 3), (number % 256, number // 256, 9)).save(buffer, "PNG")
    return buffer.getvalue()


def folder(path, people, first=0):
    """Write `{identity: pictures}`; every picture is another one."""
    for name, count in people.items():
        for number in range(count):
            file = path / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(first))
            first += 1
    return path


def owners(pictures):
    """Return whose each picture is, by its bytes."""
    return {pictures.read(i): pictures.identities[label] for i, label in enumerate(pictures.labels)}


@pytest.fixture
def two(tmp_path):
    a = folder(tmp_path / "a", {"Ann": 2, "Bob": 1, "Cid": 3})
    b = folder(tmp_path / "b", {"Ann": 1, "Dan": 2, "Eve": 2}, 100)
    return a, b


def test_example(two, capsys):
    """One name is one person; pictures keep their bytes, and their place says where they lie."""
    merged = open_sources(two)
    assert merged.identities == ("Ann", "Bob", "Cid", "Dan", "Eve")
    assert np.bincount(merged.labels).tolist() == [3, 1, 3, 2, 2]
    assert owners(merged) == owners(open_pictures(two[0])) | owners(open_pictures(two[1]))
    assert merged.where(6) == f"{two[1]}:Ann/0.png"
    assert merged.paths[5:8] == ("Cid/2.png", "Ann/0.png", "Dan/0.png")
    few = merged.keep(["Dan", "Ann"])
    assert few.paths == ("Ann/0.png", "Ann/1.png", "Ann/0.png", "Dan/0.png", "Dan/1.png")
    assert few.labels.tolist() == [0, 0, 0, 1, 1]
    assert capsys.readouterr().err == (
        f"source 1: IdentityFolder('{two[0]}'): 6 pictures of 3 identities, 3 new, 0 left out\n"
        f"source 2: IdentityFolder('{two[1]}'): 5 pictures of 3 identities, 2 new, 0 left out\n"
    )


def test_list(two, tmp_path, capsys):
    """Joined, renamed, left out, in one source or in all; names that are nowhere are told."""
    listed = tmp_path / "list.tsv"
    listed.write_text("Cid\tDan\n2/Ann\tAnn2\nBob\t-\n\nZoe\tZ\n3/Ann\tX\n")
    merged = open_sources(two, identity_list=listed)
    assert merged.identities == ("Ann", "Ann2", "Dan", "Eve")
    assert np.bincount(merged.labels).tolist() == [2, 1, 5, 2]
    assert merged.paths[2:6] == ("Dan/0.png", "Dan/1.png", "Dan/2.png", "Ann2/0.png")
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("2 new, 1 left out")
    assert said[2] == "2 identities of the list are not there: 3/Ann, Zoe"
    alone = open_sources([two[0]], identity_list=listed)
    assert alone.identities == ("Ann", "Dan")
    listed.write_text("Ann\t-\nBob\t-\nCid\t-\n")
    with pytest.raises(ValueError, match="the list leaves out every identity"):
        open_sources([two[0]], identity_list=listed)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Ann", "line 2: expected identity <tab> name, or - to leave it out; got 'Ann'"),
        ("Ann\t../x", r"line 2: expected identity <tab> name"),
        ("Ann\tBob\tCid", r"line 2: expected identity <tab> name"),
        ("Bob\tDan", r"line 2: 'Bob' was 'Eve' before"),
    ],
)
def test_damaged_list(tmp_path, line, message):
    (tmp_path / "list.tsv").write_text(f"Bob\tEve\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_identity_list(tmp_path / "list.tsv")


def test_list_of_no_text(tmp_path):
    """Two names in Latin-1 must not become one; UTF-8 keeps them apart."""
    text, listed = (
        "\n".join(("Bob\tEve", "Cid\tJos\xe9", "Dan\tJos\xe8", "")),
        tmp_path / "list.tsv",
    )
    listed.write_bytes(text.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"list.tsv, line 2: expected UTF-8; got b'Cid.*: save it as"
    ):
        read_identity_list(listed)
    listed.write_bytes(text.replace("\n", "\r\n").encode())
    assert read_identity_list(listed) == {"Bob": "Eve", "Cid": "Jos\xe9", "Dan": "Jos\xe8"}


def test_numbers_mean_nothing_elsewhere(tmp_path):
    """The twelfth person of one file is not the twelfth of another."""
    for name in "ab":
        (tmp_path / name).mkdir()
        pictures = [(f"P{i}/x.png", picture(50 * ord(name) + i)) for i in range(3)]
        write_identities(tmp_path / name / "train.rec", pictures)
        (tmp_path / name / "train.lst").unlink()
    c = folder(tmp_path / "c", {"Ann": 1, "7": 2}, 900)
    sources = [tmp_path / "a", c, tmp_path / "b"]
    merged = open_sources(sources)
    numbers = [f"{source}-000000{i}" for source in (1, 3) for i in range(3)]
    assert merged.identities == (*numbers, "7", "Ann")
    assert open_sources(sources[:1]).identities == ("0000000", "0000001", "0000002")
    (tmp_path / "list").write_text("1/0000001\tAnn\n3/0000002\t7\n0000000\tZoe\n")
    merged = open_sources(sources, identity_list=tmp_path / "list")
    assert merged.identities == ("1-0000002", "3-0000001", "7", "Ann", "Zoe")
    assert np.bincount(merged.labels).tolist() == [1, 1, 3, 2, 2]
    folder(c, {"3-0000001": 1}, 990)
    with pytest.raises(ValueError, match="'3-0000001' is somebody's name in another source: name"):
        open_sources(sources)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.dictionaries(st.sampled_from("ABCD"), st.integers(1, 3), min_size=1),
        min_size=1,
        max_size=3,
    ),
    st.dictionaries(st.sampled_from(["A", "B", "1/C", "2/A", "3/D"]), st.sampled_from("ABXY-")),
)
def test_properties(tmp_path_factory, sets, names):
    """Against a loop over all pictures of all sources."""
    root, expected, sources = tmp_path_factory.getbasetemp(), [], []
    for number, people in enumerate(sets, 1):
        path = root / f"merged{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, count in people.items():
                for i in range(count):
                    archive.writestr(f"{name}/{i}.png", f"{number} {name} {i}")
        source = open_pictures(path)
        sources.append(source)
        for i in range(len(source)):
            one = source.name(i).split("/")[0]
            name = names.get(f"{number}/{one}", names.get(one, one))
            if name != "-":
                expected.append((name, source.read(i)))
    if not expected:
        with pytest.raises(ValueError, match="leaves out every identity"):
            MergedPictures(sources, names)
        return
    merged = MergedPictures(sources, names)
    assert merged.identities == tuple(sorted({name for name, _ in expected}))
    found = [(merged.identities[k], merged.read(i)) for i, k in enumerate(merged.labels)]
    assert found == expected


def shard(path, labels):
    """A shard of pictures of which None has no label."""
    with tarfile.open(path, "w:") as archive:
        for number, label in enumerate(labels):
            for suffix in ("jpg", "cls")[: 1 if label is None else 2]:
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = 1
                archive.addfile(member, io.BytesIO(str(label)[:1].encode()))
    return path


def test_one_number_for_all_damage(two, tmp_path):
    """Sources share what is allowed."""
    sources = [*two, *(shard(tmp_path / f"{name}.tar", [1, None, 2]) for name in "cd")]
    damage = Damage(2)
    merged = open_sources(sources, damage=damage)
    assert len(merged) == 15
    assert merged.damage is damage
    assert damage.count == 2
    with pytest.raises(ValueError, match=r"d.tar: sample '1' has no .*; that makes 2 damaged, and"):
        open_sources(sources, damage=Damage(1))


def test_pieces(two, tmp_path, monkeypatch):
    """Only where a source has pieces; a source without is one, or several when it is large."""
    assert open_sources(two).pieces is None
    monkeypatch.setattr("data.tables._ROWS", 2)
    monkeypatch.setattr("data.merge._PIECE", 4)
    pictures = [(f"Fay/{i}.png", picture(700 + i)) for i in range(5)]
    write_table(tmp_path / "c.parquet", pictures, ["Fay"])
    merged = open_sources([two[0], tmp_path / "c.parquet", two[1]])
    assert merged.pieces.number.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 5, 5, 5, 6]
    assert merged.pieces.together == open_pictures(tmp_path / "c.parquet").pieces.together
    assert merged.keep(["Fay", "Eve"]).pieces.number.tolist() == [2, 2, 3, 3, 4, 5, 6]


def test_a_list_that_does_not_end(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "list.tsv")
    with pytest.raises(ValueError, match=r"list.tsv is no regular file"):
        read_identity_list(tmp_path / "list.tsv")
    monkeypatch.setattr(merge, "_LARGEST_LIST", 3)
    (tmp_path / "large.tsv").write_text("a\tb\n")
    with pytest.raises(ValueError, match=r"large.tsv is refused: 4 bytes are more than 3$"):
        read_identity_list(tmp_path / "large.tsv")
    with pytest.raises(FileNotFoundError, match=r"^[^[]*no\.tsv does not exist: pass the list"):
        read_identity_list(tmp_path / "no.tsv")
    with pytest.raises(OSError, match=r"^[^[]*x cannot be read \(.*\)$"):
        read_identity_list(tmp_path / "large.tsv/x")
    with pytest.raises(ValueError, match=r"is no regular file: pass the list or set itself$"):
        read_identity_list(tmp_path)
