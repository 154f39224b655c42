"""Folders and archives of strangers: names that repeat, lead out or hide, and what is no file."""

import io
import os
import signal
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest
from data.archives import DamagedImage, Source
from data.damage import Damage
from data.images import IdentityFolder
from data.pictures import open_pictures

FILES = {"Bob/2.png": b"b2", "Bob/1.png": b"b1", "Ann/1.png": b"a1"}


def make(path, files):
    if path.suffix == ".zip":
        return repeat(path, files.items())
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:/x.png", "..\\x.png", "\\\\host\\x.png"]
)
def test_unsafe_names(tmp_path, name):
    path = make(tmp_path / "evil.zip", FILES | {name: b""})
    with pytest.raises(ValueError, match=r"holds the unsafe name .*leads out of the archive"):
        Source(path)


def repeat(path, members):
    """Write members one after the other, some of one name."""
    if path.suffix == ".zip":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore", UserWarning)  # of the names that repeat
            for name, data in members:
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w") as archive:
            for name, data in members:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["faces.zip", "faces.tar"])
@pytest.mark.parametrize("spelt", ["Ann/1.png", "./Ann/1.png"])
def test_repeated_names(tmp_path, kind, spelt, capsys):
    """Each time that a name comes once more is counted and told; the last of it is read."""
    members = [("Ann/1.png", b"first"), (spelt, b"second"), ("Bob/1.png", b"his")]
    path = repeat(tmp_path / kind, [*members, (spelt, b"last")])
    with pytest.raises(ValueError, match=rf"{kind} holds 'Ann/1.png' more than once: pack it"):
        Source(path)
    with pytest.raises(ValueError, match=r"'Ann/1.png' more than once.* makes 2 damaged, and 1 al"):
        IdentityFolder(path, damage=Damage(1))
    damage = Damage(2)
    folder = IdentityFolder(path, damage=damage)
    assert damage.count == 2
    assert folder.paths == ("Ann/1.png", "Bob/1.png")
    assert [folder.read(i) for i in range(2)] == [b"last", b"his"]
    said = capsys.readouterr().err.splitlines()
    line = f"left out: {path} holds 'Ann/1.png' more than once, and the last alone is read"
    assert said[-2:] == [line, line]


@pytest.mark.parametrize("kind", ["faces.zip", "faces.tar"])
def test_dots(tmp_path, kind):
    """`./` before a name, as `tar c .` and some zips have it, hides nobody."""
    names = ("./Ann/1.png", "././Bob/1.png", "./Cid/./1.png", "Dan/1.png")
    path = repeat(tmp_path / kind, [(name, name.encode()) for name in names])
    folder = IdentityFolder(path)
    assert folder.identities == ("Ann", "Bob", "Cid", "Dan")
    assert [folder.read(i).decode() for i in range(4)] == list(names)
    with pytest.raises(ValueError, match=r"unsafe name '\.\./x.png'"):
        Source(repeat(tmp_path / f"evil-{kind}", [("./../x.png", b"")]))


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (6, 200, r"faces.zip cannot be unpacked \(zip file version 20.0\): pack it again"),
        (8, 1, r"Ann/1.png cannot be unpacked \(.*encrypted"),
        (10, 97, r"Ann/1.png cannot be unpacked \(.*compression"),
    ],
)
def test_odd_zips(tmp_path, at, value, message):
    """Of another version, encrypted, or packed in an unknown way, as its directory says."""
    path = make(tmp_path / "faces.zip", {"Ann/1.png": b"x" * 99})
    data = bytearray(path.read_bytes())
    central, shift = data.index(b"PK\x01\x02"), {6: 0, 8: 2, 10: 2}[at]
    data[central + at] = value
    if shift:  # the header of the file says it too, two bytes before
        data[at - shift] = value
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        Source(path).read("Ann/1.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("where", ["directory", "header"])
def test_names_of_no_text(tmp_path, where):
    path = make(tmp_path / "faces.zip", {"Bj\xf6rn/1.png": b"x", "Ann/1.png": b"a"})
    data = bytearray(path.read_bytes())
    name = "Bj\xf6rn".encode()
    at = data.rindex(name) if where == "directory" else data.index(name)
    data[at + 2] = 0xFF  # where UTF-8 never has one
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"faces.zip.* damaged"):
        Source(path).read("Bj\xf6rn/1.png")


@pytest.fixture
def in_time():
    """Fail what waits for longer than five seconds."""

    def late(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs Linux")
def test_not_files(tmp_path, in_time):
    """Pipes do not hold a reader up; devices and files that do not know their size have an end."""
    path = make(tmp_path / "faces", {"Ann/1.png": b"0123456789"})
    os.mkfifo(path / "Ann/2.png")
    (path / "Ann/3.png").symlink_to("/dev/zero")
    (path / "Ann/4.png").symlink_to("/proc/version")  # of zero bytes, it says
    source = Source(path)
    assert source.read("Ann/1.png", limit=10) == b"0123456789"
    for number in (2, 3):
        with pytest.raises(DamagedImage, match=rf"faces/Ann/{number}.png is no regular file"):
            source.read(f"Ann/{number}.png")
    with pytest.raises(DamagedImage, match=r"4.png is refused: it holds more than 10 bytes"):
        source.read("Ann/4.png", limit=10)
    for suffix in (".tar", ".zip"):
        os.mkfifo(tmp_path / f"pipe{suffix}")
        with pytest.raises(ValueError, match=rf"pipe{suffix} is no regular file: pass a folder"):
            open_pictures(tmp_path / f"pipe{suffix}")


def test_unlisted_folders(tmp_path, monkeypatch):
    """What cannot be looked into is told: its people would be missing."""
    path = make(tmp_path / "faces", FILES)

    def scandir(place, list_it=os.scandir):
        if str(place).endswith("Bob"):
            raise PermissionError(13, "Permission denied", str(place))
        return list_it(place)

    monkeypatch.setattr(os, "scandir", scandir)  # the rights of a file do not bind root
    with pytest.raises(ValueError, match=r"faces/Bob cannot be listed \(Permission denied\): make"):
        Source(path)


def test_depth(tmp_path):
    """Eight folders deep is read; deeper, and a ring of links, are told."""
    deep = "/".join("abcdefgh")
    path = make(tmp_path / "faces", {f"{deep}/1.png": b"x"})
    assert Source(path).names == (f"{deep}/1.png",)
    make(path, {f"{deep}/i/1.png": b"x"})
    with pytest.raises(ValueError, match=rf"faces/{deep}/i lies more than 8 folders deep: move it"):
        Source(path)
    ring = make(tmp_path / "ring", FILES)
    (ring / "Ann/back").symlink_to(ring)
    with pytest.raises(ValueError, match=r"8 folders deep: .*, or remove the link that leads"):
        Source(ring)
