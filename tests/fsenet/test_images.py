"""Identity folders and zips: order, labels, forks, and everything a stranger's archive may hold."""

import doctest
import io
import multiprocessing
import os
import pickle
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from data import images
from data.archives import DamagedImage, Source
from data.decode import load_rgb
from data.images import IdentityFolder, decode_all
from PIL import Image

LFW = Path(__file__).parents[2] / "../shared/data/lfw112.zip"
FILES = {
    "Bob/Bob_0002.png": (20, 30, 40),
    "Bob/Bob_0001.png": (1, 2, 3),
    "Ann/Ann_0001.png": (200, 100, 0),
}


def encode(colour, size=(4, 6), file_format="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, file_format)
    return buffer.getvalue()


def make(path, files):
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def pictures(prefix=""):
    return {prefix + name: encode(colour) for name, colour in FILES.items()}


@pytest.mark.parametrize("prefix", ["", "images/", "lfw-deepfunneled/"])
@pytest.mark.parametrize("kind", ["faces", "faces.zip"])
def test_example(tmp_path, kind, prefix):
    files = pictures(prefix) | {"README.txt": b"hello", "__MACOSX/Ann/._Ann_0001.png": b"junk"}
    folder = IdentityFolder(make(tmp_path / kind, files))
    assert folder.paths == ("Ann/Ann_0001.png", "Bob/Bob_0001.png", "Bob/Bob_0002.png")
    assert folder.labels.tolist() == [0, 1, 1]
    assert folder.identities == ("Ann", "Bob")
    assert len(folder) == 3
    picture, label = folder[2]
    assert picture.shape == (3, 6, 4)
    assert picture.dtype == torch.uint8
    assert picture[:, 5, 3].tolist() == [20, 30, 40]
    assert label == 1
    assert folder.source.text("README.txt") == "hello"
    assert doctest.testmod(images).failed == 0


def test_identities(tmp_path):
    path = make(tmp_path / "faces.zip", pictures())
    folder = IdentityFolder(path, ["Bob"])
    assert folder.paths == ("Bob/Bob_0001.png", "Bob/Bob_0002.png")
    assert folder.labels.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"holds no pictures of 'Cid', 'Dan': of the 3 "):
        IdentityFolder(path, ["Cid", "Dan", "Bob"])


def _hash(folder):
    return [zlib.crc32(folder.load(i).tobytes()) for i in range(len(folder))] * 20


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes(tmp_path, method):
    """Workers that inherit or receive an open reader read at the same time as each other."""
    rng = np.random.default_rng(0)
    files = {}
    for index in range(8):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        files[f"A/{index}.png"] = buffer.getvalue()
    folder = IdentityFolder(make(tmp_path / "faces.zip", files))
    expected = _hash(folder)  # the zip is open from here on
    if method == "spawn":
        assert _hash(pickle.loads(pickle.dumps(folder))) == expected
        return
    # inherited, not pickled: this is how DataLoader's workers get their data set
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    first = folder.load(0).tobytes()
    folder.load(7)
    # processes that share an open file share its position, which a reader moves
    position = os.lseek(folder.source._archive().fp.fileno(), 0, os.SEEK_CUR)
    worker = context.Process(target=lambda: queue.put(folder.load(0).tobytes()))
    worker.start()
    assert queue.get(timeout=60) == first
    worker.join()
    assert os.lseek(folder.source._archive().fp.fileno(), 0, os.SEEK_CUR) == position


def test_decode_all(tmp_path):
    folder = IdentityFolder(make(tmp_path / "faces.zip", pictures()))
    same, decoded = decode_all(folder, progress=False)
    assert same is folder
    assert decoded.shape == (3, 3, 6, 4)
    assert decoded.is_contiguous(memory_format=torch.channels_last)
    for index in range(3):
        assert torch.equal(decoded[index], folder[index][0])
    odd = make(tmp_path / "odd.zip", pictures() | {"Zoe/1.png": encode((0, 0, 0), (9, 6))})
    with pytest.raises(
        ValueError, match=r"Zoe/1.png is 9x6 and Ann/Ann_0001.png is 4x6: pass size"
    ):
        decode_all(IdentityFolder(odd), progress=False)


def test_sizes(tmp_path):
    """Square pictures of any sizes become one size without aliasing; to stretch is refused."""
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    buffer = io.BytesIO()
    Image.fromarray(stripes).save(buffer, "PNG")
    files = {"A/1.png": buffer.getvalue(), "B/1.png": encode((9, 8, 7), (5, 5))}
    path = make(tmp_path / "faces.zip", files | {"C/1.png": encode((1, 2, 3), (16, 16))})
    folder = IdentityFolder(path, size=16)
    same, decoded = decode_all(folder, progress=False)
    assert same is folder
    assert decoded.shape == (3, 3, 16, 16)
    for index in range(3):
        assert torch.equal(decoded[index], folder[index][0])
    assert (decoded[0].float() - 127.5).abs().max() < 40  # every fourth column alone is all white
    assert decoded[1, :, 8, 8].tolist() == [9, 8, 7]
    assert torch.equal(decoded[2], IdentityFolder(path)[2][0])

    odd = IdentityFolder(make(tmp_path / "odd.zip", {"D/1.png": encode((0, 0, 0), (9, 6))}), size=6)
    message = r"odd.zip:D/1.png is 9x6, not square: cut out and align the faces first \(docs/how-to"
    with pytest.raises(ValueError, match=message):
        odd[0]


def test_modes():
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        buffer = io.BytesIO()
        Image.new(mode, (3, 2)).save(buffer, "TIFF")
        assert load_rgb(buffer.getvalue()).shape == (2, 3, 3)


def test_deep_grey():
    """Sixteen bits of a PNG become eight, black to white; what has no known white is refused."""
    deep = np.array([[0, 128, 129, 257, 32_896, 65_406, 65_407, 65_535]], dtype=np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(deep).save(buffer, "PNG")
    expected = [0, 0, 1, 1, 128, 254, 255, 255]
    assert load_rgb(buffer.getvalue()).tolist() == [[[grey] * 3 for grey in expected]]
    for mode in ("I;16", "I;16B", "I", "F"):
        buffer = io.BytesIO()
        Image.new(mode, (3, 2), 300).save(buffer, "TIFF")
        with pytest.raises(DamagedImage, match=rf"x is a TIFF of mode {mode}, whose white is not"):
            load_rgb(buffer.getvalue(), "x")


def test_damaged_tiff():
    """A tag of another kind than its meaning has; Pillow ends in a TypeError."""
    data = bytearray(encode((1, 2, 3), file_format="TIFF"))
    (at,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, at)
    tags = {
        struct.unpack_from("<H", data, at + 2 + 12 * i)[0]: at + 2 + 12 * i for i in range(count)
    }
    struct.pack_into("<H", data, tags[273] + 2, 11)  # where the rows begin, as a float
    with pytest.raises(DamagedImage, match=r"Ann/1 is damaged \("):
        load_rgb(bytes(data), "Ann/1")


@pytest.mark.parametrize("file_format", ["EPS", "GIF", "PPM"])
def test_other_formats(file_format):
    """What the suffixes do not stand for is not opened: EPS would start Ghostscript."""
    data = encode((1, 2, 3), (32, 32), file_format)
    with pytest.raises(DamagedImage, match="x is no picture of JPEG, PNG, BMP, WEBP, TIFF, or a"):
        load_rgb(data, "x")


def test_errors(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist: pass a folder, a .zip or a .tar"
    ):
        IdentityFolder(tmp_path / "nowhere")
    (tmp_path / "broken.zip").write_bytes(make(tmp_path / "a.zip", pictures()).read_bytes()[:200])
    with pytest.raises(ValueError, match=r"broken.zip is no zip file, or a damaged one"):
        IdentityFolder(tmp_path / "broken.zip")
    with pytest.raises(ValueError, match=r"holds no pictures \(1 files\): expected <identity>/"):
        IdentityFolder(make(tmp_path / "b.zip", {"a/readme.txt": b""}))
    for files in ({"x.png": b""}, {"a/b/c/x.png": b""}, {"a/b/x.png": b"", "c/y.png": b""}):
        with pytest.raises(ValueError, match=r"which is not <identity>/<image>: move it"):
            IdentityFolder(make(tmp_path / "c.zip", files))


def test_damaged_members(tmp_path):
    path = make(tmp_path / "faces.zip", pictures())
    data = bytearray(path.read_bytes())
    at = data.index(encode(FILES["Bob/Bob_0002.png"]))
    data[at + 60] ^= 0xFF
    path.write_bytes(data)
    folder = IdentityFolder(path)
    bad = folder.paths.index("Bob/Bob_0002.png")
    with pytest.raises(DamagedImage, match=r"faces.zip:Bob/Bob_0002.png is damaged in the archive"):
        folder.load(bad)
    folder.load(0)  # the others are still read
    with pytest.raises(DamagedImage, match=r"Eve/1\.png does not exist"):
        folder.source.read("Eve/1.png")
    loose = IdentityFolder(make(tmp_path / "faces", pictures()))
    (tmp_path / "faces/Ann/Ann_0001.png").unlink()
    with pytest.raises(DamagedImage, match=r"Ann_0001\.png does not exist"):
        loose.load(0)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "WEBP", "TIFF"])
def test_truncated(file_format):
    """At every length the reader decodes the picture or names it, and says nothing else."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    noise = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, file_format)
    data = buffer.getvalue()
    refused = []
    for length in range(0, len(data), 37):
        try:
            load_rgb(data[:length], "Ann/1")
        except DamagedImage as error:
            refused.append(str(error))
    assert all(text.startswith("Ann/1 is ") and "\n" not in text for text in refused)
    assert len(refused) > 0.9 * (len(data) // 37)


def test_bombs(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    def png(width, height):
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", b"")
            + chunk(b"IEND", b"")
        )

    with pytest.raises(
        DamagedImage, match=r"x is refused: 10000x10000 is more than 64000000 pixels"
    ):
        load_rgb(png(10_000, 10_000), "x")
    with pytest.raises(DamagedImage, match=r"x is refused: more than 64000000 pixels"):
        load_rgb(png(60_000, 60_000), "x")
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("A/1.png", bytes(1_000_000))
    assert path.stat().st_size < 2000
    source = Source(path)
    with pytest.raises(
        DamagedImage, match=r"A/1.png is refused: 1000000 bytes are more than 99999"
    ):
        source.read("A/1.png", limit=99_999)
    # a member that lies about its size is cut there, and its checksum fails
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[central + 24 : central + 28] = struct.pack("<I", 10)
    path.write_bytes(data)
    with pytest.raises(DamagedImage, match="damaged in the archive"):
        Source(path).read("A/1.png")


@pytest.mark.skipif(not LFW.exists(), reason="needs ../shared/data/lfw112.zip")
def test_lfw():
    folder = IdentityFolder(LFW)
    assert len(folder) == 13_233
    assert len(folder.identities) == 5_749
    assert folder.paths[0] == "AJ_Cook/AJ_Cook_0001.jpg"
    picture, label = folder[0]
    assert picture.shape == (3, 112, 112)
    assert label == 0
    assert 20 < picture.float().std() < 120
