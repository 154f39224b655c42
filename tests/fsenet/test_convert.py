"""Formats into each other and back, byte for byte; tars; and what must be refused."""

import io
import struct
import subprocess
import sys
import tarfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from data import convert as conversion
from data.archives import DamagedImage, Source
from data.faces import picture_sets
from data.images import IdentityFolder
from data.pictures import enough_images, open_pictures
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples/fsenet/data/convert.py"


def convert(*arguments):
    """Run the script's `main` here: a process of its own takes seconds to start."""
    code = 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            conversion.main(tyro.cli(conversion.Arguments, args=[*map(str, arguments)]))
        except (OSError, ValueError) as error:
            print(f"error: {error}", file=sys.stderr)
            code = 1
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def picture(rng, side=8, file_format="JPEG"):
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


@pytest.fixture
def faces(tmp_path):
    """A folder of five people with one to five pictures."""
    rng = np.random.default_rng(0)
    for person in range(5):
        for number in range(person + 1):
            path = tmp_path / f"faces/p{person}/{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(rng))
    return tmp_path / "faces"


def contents(path):
    pictures = open_pictures(path)
    return [(int(pictures.labels[i]), pictures.read(i)) for i in range(len(pictures))]


def test_around(faces, tmp_path):
    """Through every format the bytes, who they belong to, and names stay, by a .rec's list too."""
    before, last = contents(faces), faces
    (tmp_path / "rec").mkdir()
    targets = ("a.tar", "s-%03d.tar", "a.zip", "a.parquet", "unpacked", "rec/train.rec", "r-%d.tar")
    targets = (*targets, "b.parquet", "b.tar")
    for target in targets:
        done = convert(last, tmp_path / target)
        assert done.returncode == 0, done.stderr
        assert (
            done.stdout == f"{tmp_path / target}: 15 pictures of 5 identities; read again, equal\n"
        )
        last = tmp_path / target
        assert sorted(contents(last)) == sorted(before)
        if target == "unpacked":
            assert open_pictures(last).paths == open_pictures(faces).paths
    assert (tmp_path / "rec/property").read_text() == "5,8,8\n"
    assert sorted(open_pictures(last).paths) == sorted(open_pictures(faces).paths)
    assert "property" not in done.stderr
    (tmp_path / "rec/property").write_text("6,8,8\r\n")
    done = convert(tmp_path / "rec", tmp_path / "again")
    assert (
        f"warning: {tmp_path}/rec/property says 6 identities, and train.rec holds 5" in done.stderr
    )
    for text in ("", "5,8", "-5,8,8", "5,8,8,8", "\xff" * 2000):
        (tmp_path / "rec/property").write_text(text)
        done = convert(tmp_path / "rec", tmp_path / "never")
        assert done.stderr.count("property") == done.stderr.count("\n") == 1


def test_flat(faces, tmp_path):
    """A flat .rec holds pictures alone, by hand and read; back through both layouts bytes stay."""
    before = contents(faces)
    flat, sides = tmp_path / "flat.rec", {}
    assert convert(faces, flat, "--flat").stdout.endswith("identities; read again, equal\n")
    data, at, records = flat.read_bytes(), 0, []
    while at < len(data):
        magic, length, flag, label, key, _ = struct.unpack_from("<IIIfQQ", data, at)
        assert (magic, flag, key) == (0xCED7230A, 0, len(records))
        records.append((at, int(label), data[at + 32 : at + 8 + length]))
        at += 8 + (length + 3) // 4 * 4
    assert sorted(record[1:] for record in records) == sorted(before)
    assert [record[1:] for record in records] != before  # shuffled
    lines = [f"{key}\t{offset}\n" for key, (offset, *_) in enumerate(records)]
    assert flat.with_suffix(".idx").read_text() == "".join(lines)
    assert (tmp_path / "property").read_text() == "5,8,8\n"

    read = [record[1:] for record in records]
    assert contents(flat) == read
    flat.with_suffix(".idx").unlink()
    assert contents(flat) == read  # read through instead
    for side, options in (("sorted", ()), ("again", ("--flat",))):
        (tmp_path / side).mkdir()
        sides[side] = tmp_path / side / "train.rec"
        assert convert(flat, sides[side], *options).returncode == 0
        assert sorted(contents(sides[side])) == sorted(before)
    sizes = [file.stat().st_size for file in sides.values()]
    assert sizes[0] - sizes[1] == 6 * 40  # a header, and whose pictures are where


def test_damaged_and_few(faces, tmp_path):
    victim = faces / "p4/2.jpg"
    victim.write_bytes(victim.read_bytes()[:-20])
    target = tmp_path / "train.rec"
    done = convert(faces, target)
    assert done.returncode == 1
    assert f"\nerror: {faces}:p4/2.jpg is damaged" in done.stderr
    assert done.stderr.endswith("; that makes 1 damaged, and 0 allowed\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces"]  # nothing is left behind
    done = convert(faces, target, "--damaged", 1, "--min-images", 3)
    assert "--min-images 3: 2 of 5 identities left out, with 3 of 15 pictures\n" in done.stderr
    assert f"left out: {faces}:p4/2.jpg is damaged" in done.stderr
    assert "11 pictures of 3 identities, 1 damaged left out; read again, equal" in done.stdout


def test_refused(faces, tmp_path):
    (tmp_path / "train.idx").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/property").touch()
    cases = {
        f"{tmp_path}/train.idx exists: name another target": (faces, tmp_path / "train.rec"),
        f"{tmp_path}/full holds a .rec already, whose property says how many people it has: name "
        "a folder of its own for b.rec": (faces, tmp_path / "full/b.rec"),
        "gone does not exist: pass pictures of people": (
            tmp_path / "gone",
            tmp_path / "full/b.rec",
        ),
        "a.tgz: expected a folder, or one of .zip .tar %d.tar .parquet .rec": (
            faces,
            tmp_path / "a.tgz",
        ),
        "nowhere does not exist: pass pictures of people": (
            tmp_path / "nowhere",
            tmp_path / "train.rec",
        ),
        "a.zip: --flat is a layout of .rec; name one": (faces, tmp_path / "a.zip", "--flat"),
        "b: --flat is a layout of .rec; name one": (faces, tmp_path / "b", "--flat"),
        "is no folder: make it first": (faces, tmp_path / "no/b"),
        "--min-images 9: no identity has as many": (faces, tmp_path / "b", "--min-images", 9),
    }
    for message, arguments in cases.items():
        done = convert(*arguments)
        assert done.returncode == 1
        assert message in done.stderr
    command = [sys.executable, str(SCRIPT), str(tmp_path / "nowhere"), str(tmp_path / "b")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere does not exist")
    assert done.returncode == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["faces", "full", "train.idx"]


def test_what_was_written_is_compared(faces):
    """A byte, or an owner, that is another is seen."""
    written = conversion.Summary()
    for label, data in contents(faces):
        written.add(label, data)
    conversion.check(faces, written)
    (faces / "p1/0.jpg").rename(faces / "p0/1.jpg")
    with pytest.raises(ValueError, match="holds 15 pictures of 5 identities, other than written"):
        conversion.check(faces, written)
    (faces / "p0/1.jpg").rename(faces / "p1/0.jpg")
    victim = faces / "p4/2.jpg"
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match="other than written: is the disk damaged"):
        conversion.check(faces, written)


def pack_tar(path, members, mode="w:"):
    with tarfile.open(path, mode) as archive:
        for member, data in members:
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_tar(tmp_path):
    """Links and devices are passed over, names that lead out and compressed files are refused."""
    link = tarfile.TarInfo("a/link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("a/device.jpg")
    device.type = tarfile.CHRTYPE
    rng = np.random.default_rng(0)
    files = [(tarfile.TarInfo(f"./a/{i}.png"), picture(rng, 4, "PNG")) for i in range(2)]
    path = pack_tar(tmp_path / "a.tar", [(link, b""), (device, b""), *files])
    assert Source(path).names == ("a/0.png", "a/1.png")
    assert [IdentityFolder(path).read(i) for i in range(2)] == [data for _, data in files]
    for name in ("../a.png", "/a/b.png", "a/../../b.png"):
        unsafe = pack_tar(tmp_path / "b.tar", [(tarfile.TarInfo(name), b"x")])
        with pytest.raises(ValueError, match="holds the unsafe name"):
            Source(unsafe)
    pack_tar(tmp_path / "c.tar", files, "w:gz")
    with pytest.raises(ValueError, match="is no plain tar file, or a damaged one"):
        Source(tmp_path / "c.tar")
    source = Source(path)
    path.write_bytes(path.read_bytes()[: source._members["a/1.png"][0] + 3])
    with pytest.raises(DamagedImage, match=r"a.tar:a/1.png is cut short: 3 of \d+ bytes"):
        Source.read(source, "a/1.png")


def test_trained_from_either(tmp_path, capsys):
    """The recipe sees the same pictures and people in a .rec as in the folder it was made of."""
    rng = np.random.default_rng(0)
    for person in range(130):
        for number in range(2 + person % 2):
            path = tmp_path / f"faces/{person:03d}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(rng, 112, "PNG"))
    assert convert(tmp_path / "faces", tmp_path / "train.rec").returncode == 0
    (train, test), (other_train, other_test) = (
        picture_sets([tmp_path / name], seed=0) for name in ("faces", "train.rec")
    )
    assert torch.equal(train.images, other_train.images)
    assert torch.equal(test.images, other_test.images)
    assert torch.equal(train.dataset.tensors[1], other_train.dataset.tensors[1])
    assert (test.pairs.first == other_test.pairs.first).all()
    few, _ = picture_sets([tmp_path / "train.rec"], seed=0, min_images=3)
    assert "of 70 identities left out" in capsys.readouterr().err
    assert few.num_identities == sum(np.bincount(train.dataset.tensors[1]) == 3)
    with pytest.raises(ValueError, match="--min-images 4: no identity has as many; most have 3"):
        enough_images(open_pictures(tmp_path / "faces"), 4)


def test_several_sources(tmp_path):
    """Written once: names that two sources use for two pictures, copies, and who is who."""
    rng = np.random.default_rng(0)
    for source, people in (
        ("a", {"Ann": 2, "Bob": 1, "Cid": 3}),
        ("b", {"Ann": 1, "Dan": 2, "Eve": 2}),
    ):
        for name, count in people.items():
            (tmp_path / source / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / source / name / f"{number}.png").write_bytes(picture(rng, 4, "PNG"))
    two = (tmp_path / "a", tmp_path / "b")
    (two[1] / "Ann/7.png").write_bytes((two[0] / "Ann/1.png").read_bytes())
    (two[1] / "Eve/7.png").write_bytes((two[0] / "Ann/1.png").read_bytes())  # not Ann's
    (tmp_path / "list").write_text("Bob\tDan\n")
    done = convert(*two, tmp_path / "all", "--identity-list", tmp_path / "list")
    assert done.stdout == f"{tmp_path / 'all'}: 13 pictures of 4 identities; read again, equal\n"
    files = sorted(str(f.relative_to(tmp_path / "all")) for f in (tmp_path / "all").rglob("*.png"))
    assert files[:5] == ["Ann/0.png", "Ann/1.png", "Ann/2-0.png", "Ann/7.png", "Cid/0.png"]
    assert (tmp_path / "all/Ann/2-0.png").read_bytes() == (two[1] / "Ann/0.png").read_bytes()
    for target in ("few.tar", "few-%d.tar", "few.parquet", "few.zip"):
        done = convert(*two, tmp_path / target, "--deduplicate", "--min-images", 2)
        assert "--deduplicate: 1 of 13 pictures left out\n" in done.stderr
        assert "--min-images 2: 1 of 5 identities left out, with 1 of 12 pictures" in done.stderr
        assert ": 11 pictures of 4 identities; read again, equal" in done.stdout
        assert open_pictures(tmp_path / target).identities == ("Ann", "Cid", "Dan", "Eve")
    assert (
        convert(tmp_path / "few.tar").stderr == "error: expected a source and a target: name both\n"
    )
