"""Extraction as a user calls it: resumed, shared by processes, with damaged pictures."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import extract
import feature_folder
import numpy as np
import pytest
import torch
from data.pictures import open_pictures
from data.record_layouts import write_identities
from data.shards import write_shards
from data.tables import write_table
from describe import describe
from embeddings import Embeddings, embedding_rows, load_embeddings
from extract import Extraction, open_to_describe
from feature_folder import FeatureFolder
from model import GlobalNet, load_network
from PIL import Image
from stored import Rows, Stored
from workplace import this_process

from partlocal import HELEN, ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS

RECIPE = Path(extract.__file__).parent
COUNT, BATCH = 11, 3
FP32 = Extraction(dtype="fp32", batch_size=BATCH, precision="fp32")


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    parser = ParsingNet(HELEN, 8, 1, grid=32)
    PartLocalNet("resnet10t", parser, FSENET_PARTS).save_pretrained(folder / "network")
    GlobalNet(Backbone("resnet10t")).save_pretrained(folder / "baseline")
    return folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """Noise at several depths, as PNG, which keeps it."""
    folder = tmp_path_factory.mktemp("faces")
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        path = folder / f"{n % 2}/{n % 3}@N00/{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (112, 112, 3), np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def whole(networks, faces, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features") / "whole"
    extract.extract(networks / "network", open_to_describe(faces), folder, FP32)
    return folder


def bits(folder):
    return [(folder / name).read_bytes() for name in ("embeddings.npy", "embeddings.txt")]


def test_reference(networks, faces, whole):
    """Each picture described on its own, in another order."""
    net, names = load_network(networks / "network"), sorted(map(str, faces.rglob("*.png")))[::-1]
    pictures = torch.stack(
        [torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1) for name in names]
    )
    found = describe(net, pictures, this_process("fp32"))
    rows = embedding_rows(whole, [str(Path(name).relative_to(faces)) for name in names])
    expected = found.join(found.local_half).numpy()
    np.testing.assert_allclose(rows[:], expected, atol=1e-5)
    stored = np.load(whole / "embeddings.npy", mmap_mode="r")
    assert stored.shape == (COUNT, expected.shape[1])
    np.testing.assert_array_equal(load_embeddings(whole).vectors[2:5], stored[2:5])


@pytest.mark.parametrize("vectors", ["both", "global", "local"])
def test_vectors(networks, faces, whole, tmp_path, vectors):
    how = Extraction(vectors=vectors, test_time="sum", batch_size=BATCH, precision="fp32")
    pictures = open_to_describe(faces)
    extract.extract(networks / "network", pictures, tmp_path / "f", how)
    found = load_embeddings(tmp_path / "f").vectors
    assert found.dtype == np.float16
    np.testing.assert_allclose(np.linalg.norm(found[:].astype(np.float32), axis=1), 1, atol=1e-3)
    assert found.shape[1] <= Stored(whole / "embeddings.npy").shape[1] // 2
    if vectors == "local":
        with pytest.raises(ValueError, match="the network has no parts; use --vectors global"):
            extract.extract(networks / "baseline", pictures, tmp_path / "g", how)
    elif vectors == "both":  # half precision moves a cosine by less than a thousandth
        exact = tmp_path / "g"
        extract.extract(
            networks / "network", pictures, exact, dataclasses.replace(how, dtype="fp32")
        )
        a, b = (np.asarray(x[:], np.float64) for x in (found, load_embeddings(exact).vectors))
        np.testing.assert_allclose(a @ a.T, b @ b.T, atol=1e-3)


@pytest.mark.parametrize("stop", range(1, 4))
def test_resumed(networks, faces, whole, tmp_path, monkeypatch, stop):
    """Stopped after some batches, of which those not yet flushed are lost: the same bits."""
    write, target = FeatureFolder.write, tmp_path / "f"

    def killed(self, batch, vectors, damaged=()):
        if batch == stop:
            raise KeyboardInterrupt
        write(self, batch, vectors, damaged)
        if batch == 0:
            self.flush()

    pictures = open_to_describe(faces)
    monkeypatch.setattr(FeatureFolder, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        extract.extract(networks / "network", pictures, target, FP32)
    with pytest.raises(ValueError, match="is not filled to the end: 3 of 4 batches are missing"):
        load_embeddings(target)
    monkeypatch.undo()
    seen = []
    monkeypatch.setattr(
        FeatureFolder, "write", lambda self, *rest: (seen.append(rest[0]), write(self, *rest))
    )
    extract.extract(networks / "network", pictures, target, FP32)
    assert seen == [1, 2, 3]
    assert bits(target) == bits(whole)
    again = extract.extract(networks / "network", pictures, target, FP32)  # nothing is left to do
    assert seen == [1, 2, 3]
    assert not len(again.todo())


def test_killed(networks, faces, whole, tmp_path):
    """SIGKILL at a moment nobody chose, in a process of its own."""
    target = tmp_path / "f"
    command = [
        sys.executable, RECIPE / "extract.py", networks / "network", "--faces", faces,
        "--output", target, "--dtype", "fp32", "--batch-size", BATCH, "--precision", "fp32",
        "--flush-seconds", 0,
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # or sums would differ
    process = subprocess.Popen(
        list(map(str, command)), stderr=subprocess.PIPE, env={**os.environ, **threads}
    )
    while process.poll() is None and not _some_done(target):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    extract.extract(networks / "network", open_to_describe(faces), target,
                    dataclasses.replace(FP32, flush_seconds=0))  # fmt: skip
    assert bits(target) == bits(whole)


def _some_done(folder):
    try:
        return Stored(folder / "done.npy")[:].any()
    except (ValueError, OSError):
        return False


def test_processes(networks, faces, whole, tmp_path, monkeypatch):
    """Two ranks, one after the other, then another number: shares are apart and fill all."""
    target, pictures = tmp_path / "f", open_to_describe(faces)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, left in ((0, 2), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        folder = extract.extract(networks / "network", pictures, target, FP32)
        assert len(folder.todo()) == left
        if rank == 0:
            np.testing.assert_array_equal(folder.todo(1, 2), folder.todo())
    assert bits(target) == bits(whole)
    for world in (1, 2, 3, 5):
        shares = [FeatureFolder(target, folder.options, [], 0).todo(r, world) for r in range(world)]
        assert not np.concatenate(shares).size


def test_first_process_lays_out(tmp_path, monkeypatch):
    """Others wait for it, and say so when it does not come."""
    monkeypatch.setattr(feature_folder, "_PATIENCE", 0.1)
    options = {"pictures": 2, "width": 3, "batch_size": 2, "dtype": "fp32"}
    with pytest.raises(TimeoutError, match=r"options\.json is not there after 0 s: has rank 0"):
        FeatureFolder(tmp_path / "f", options, ["a", "b"], rank=1)
    FeatureFolder(tmp_path / "f", options, ["a", "b"])
    FeatureFolder(tmp_path / "f", options, [], rank=1)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged(networks, faces, whole, tmp_path, capfd, workers):
    """Named, counted over interruptions, and without an embedding."""
    broken = tmp_path / "faces"
    shutil.copytree(faces, broken)
    names = sorted(str(x.relative_to(broken)) for x in broken.rglob("*.png"))
    for row in (0, 4, 5):
        (broken / names[row]).write_bytes(b"no picture")
    how = dataclasses.replace(FP32, damaged=1, workers=workers)
    target, pictures = tmp_path / "f", open_to_describe(broken)
    with pytest.raises(ValueError, match=r"3 damaged pictures, and --damaged allows 1: .* goes on"):
        extract.extract(networks / "network", pictures, target, how)
    assert capfd.readouterr().err.count("left out: ") == 3
    with pytest.raises(ValueError, match="3 damaged pictures, and --damaged allows 1"):
        extract.extract(networks / "network", pictures, target, how)  # though nothing new is met
    folder = extract.extract(
        networks / "network", pictures, target, dataclasses.replace(how, damaged=3)
    )
    assert folder.damaged() == 3
    found = load_embeddings(target)
    assert found.lost == {0, 4, 5}
    assert found.find(names).tolist() == [-1, 1, 2, 3, -1, -1, *range(6, COUNT)]
    rest = [1, 2, 3, *range(6, COUNT)]  # are what they are without damaged neighbours
    np.testing.assert_array_equal(found.vectors[:][rest], load_embeddings(whole).vectors[:][rest])
    with pytest.raises(
        ValueError, match=f"1 pictures of .* could not be read when described: {names[4]}"
    ):
        embedding_rows(target, names[1:5])


def test_replaced(networks, faces, whole, tmp_path):
    """Damaged pictures that were replaced do not count when they are tried again."""
    broken = tmp_path / "faces"
    shutil.copytree(faces, broken)
    names = sorted(str(x.relative_to(broken)) for x in broken.rglob("*.png"))
    for row in (0, 9):
        (broken / names[row]).write_bytes(b"no picture")
    how = dataclasses.replace(FP32, damaged=2, flush_seconds=0)
    for allowed in (2, 0):  # and the second time they are whole
        described = dataclasses.replace(how, damaged=allowed)
        extract.extract(networks / "network", open_to_describe(broken), tmp_path / "f", described)
        for row in (0, 9):
            shutil.copy(faces / names[row], broken / names[row])
    assert bits(tmp_path / "f") == bits(whole)


def test_damaged_on_opening(networks, faces, tmp_path, capsys):
    """A sample of a shard without an identity, and a picture: one number allows both."""
    good = next(faces.rglob("*.png")).read_bytes()
    files = {"0.png": good, "0.cls": b"0", "1.png": b"no picture", "1.cls": b"0", "2.png": good,
             "3.png": good, "3.cls": b"1"}  # fmt: skip
    with tarfile.open(tmp_path / "s-0.tar", "w") as archive:
        for name, data in files.items():
            (tmp_path / "x").write_bytes(data)
            archive.add(tmp_path / "x", name)
    arguments = extract.Arguments(
        network=networks / "baseline", faces=tmp_path / "s-0.tar", output=tmp_path / "f"
    )
    with pytest.raises(ValueError, match=r"; that makes \d damaged, and 0 allowed"):
        extract.main(arguments)
    with pytest.raises(ValueError, match="2 damaged pictures, and --damaged allows 1"):
        extract.main(dataclasses.replace(arguments, damaged=1))
    extract.main(dataclasses.replace(arguments, damaged=2))
    said = "3 pictures, 1 of them damaged; 1 more were left out on opening\n"
    assert capsys.readouterr().out.endswith(said)


def test_one_line(tmp_path, monkeypatch):
    """What is missing to read a table is said in one line."""
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name, rest in (("extract", ["--output", "o"]), ("evaluate", ["--protocol", "lfw"])):
        if name == "evaluate":
            monkeypatch.setattr("data.pair_sets.published_test_set", open_pictures)
        embeddings = tmp_path / "e.npz"
        embeddings.touch()
        command = [name, embeddings, "--faces", tmp_path / "t.parquet", *rest]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        with pytest.raises(SystemExit, match=r"^error: .*t\.parquet needs pyarrow: pip install"):
            runpy.run_path(str(RECIPE / f"{name}.py"), run_name="__main__")


def test_sources(networks, faces, whole, tmp_path):
    """An archive with a folder around all, and insightface's records."""
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as archive:
        for path in faces.rglob("*.png"):
            archive.write(path, f"images/{path.relative_to(faces)}")
    extract.extract(networks / "network", open_to_describe(tmp_path / "f.zip"),
                    tmp_path / "zip", FP32)  # fmt: skip
    assert bits(tmp_path / "zip") == bits(whole)
    names = [name for name in load_embeddings(whole).names if name.startswith("0/")]
    items = [("-".join(name.split("/")[:2]) + f"/{Path(name).name}", (faces / name).read_bytes())
             for name in names]  # fmt: skip
    write_identities(tmp_path / "train.rec", items)
    extract.extract(networks / "network", open_to_describe(tmp_path), tmp_path / "rec", FP32)
    found = load_embeddings(tmp_path / "rec")
    assert len(set(found.names)) == len(names)
    np.testing.assert_allclose(found.vectors[:], embedding_rows(whole, names)[:], atol=1e-5)
    people = sorted({name.split("/")[0] for name, _ in items})
    write_shards(tmp_path / "s-%d.tar", items, people)
    write_table(tmp_path / "t.parquet", items, people)
    for source in ("s-%d.tar", "t.parquet"):
        target = tmp_path / source.partition(".")[0]
        extract.extract(networks / "network", open_to_describe(tmp_path / source), target, FP32)
        found = load_embeddings(target)
        assert len(set(found.names)) == len(names)
        np.testing.assert_allclose(found.vectors[:], embedding_rows(whole, names)[:], atol=1e-5)


def test_command(networks, faces, tmp_path, capsys):
    arguments = extract.Arguments(
        network=networks / "baseline", faces=faces, output=tmp_path / "f", batch_size=4
    )
    extract.main(arguments)
    said = f"{tmp_path / 'f'}: {COUNT} pictures, 0 of them damaged\n"
    assert capsys.readouterr().out == said
    np.save(tmp_path / "f/done.npy", np.array([[1], [0], [1]], np.uint32))  # a batch is left
    capsys.readouterr()
    extract.main(arguments)
    printed = capsys.readouterr().err
    assert printed.startswith(f"{tmp_path / 'f'}: 7 of {COUNT} pictures are described already\n")
    bars = re.findall(r"(\d+)/(\d+) \[", printed)
    assert (bars[0], bars[-1]) == (("7", "11"), ("11", "11"))
    extract.main(arguments)
    printed = capsys.readouterr().err
    assert printed.startswith(f"{tmp_path / 'f'}: 11 of {COUNT} pictures are described already\n")
    assert re.findall(r"(\d+)/(\d+) \[", printed)[0] == ("11", "11")
    other = dataclasses.replace(arguments, batch_size=5)
    message = "was begun with batch_size 4, and this is 5: name another folder, or go on with"
    with pytest.raises(ValueError, match=message):
        extract.main(other)
    with pytest.raises(ValueError, match="--batch-size must be between 2 and"):
        extract.main(dataclasses.replace(arguments, batch_size=1))


def test_errors(networks, faces, whole, tmp_path):
    options = json.loads((whole / "options.json").read_text())
    other = load_network(networks / "network")
    torch.nn.init.zeros_(next(other.backbone.parameters()))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was begun with another network: name another folder"):
        extract.extract(tmp_path / "other", open_to_describe(faces), whole, FP32)
    shutil.copytree(faces, tmp_path / "faces")
    next((tmp_path / "faces").rglob("*.png")).rename(tmp_path / "faces/other.png")
    with pytest.raises(ValueError, match=r"was begun with other pictures, by their names: name an"):
        extract.extract(networks / "network", open_to_describe(tmp_path / "faces"), whole, FP32)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file: name a folder"):
        FeatureFolder(tmp_path / "file", options, [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(FileExistsError, match=r"holds thesis\.txt and is no folder of embeddings"):
        FeatureFolder(tmp_path / "mine", options, [])
    with pytest.raises(OSError, match=r"take \d+\.\d GB, and .* GB are free"):
        FeatureFolder(tmp_path / "huge", {**options, "pictures": 10**13}, [])
    with pytest.raises(ValueError, match="there are 11 pictures and 1 names"):
        FeatureFolder(tmp_path / "few", options, ["a"])
    with pytest.raises(ValueError, match=r"the name 'a\\nb' has more than one line"):
        FeatureFolder(tmp_path / "lines", options, ["a\nb"])
    with pytest.raises(FileNotFoundError, match=r"is no folder of embeddings: no options\.json"):
        load_embeddings(tmp_path / "mine")
    folder = FeatureFolder(tmp_path / "n", {**options, "width": 2, "dtype": "fp16"}, "abcdefghijk")
    for value in (np.nan, 1e6):
        vectors = np.ones((BATCH, 2), np.float32)
        vectors[1] = value
        with pytest.raises(ValueError, match="the embedding of picture 4 is not finite in float16"):
            folder.write(1, vectors)
    for text in ("{", "[]", "{}"):
        (tmp_path / "n/options.json").write_text(text)
        with pytest.raises(ValueError, match=r"options\.json is damaged"):
            load_embeddings(tmp_path / "n")


def test_rows_that_follow_each_other():
    """Are read in one piece, whichever way they are asked for; others by their numbers."""
    asked, numbers = [], np.arange(12).reshape(6, 2)

    class Seen:
        shape = numbers.shape

        def __getitem__(self, rows):
            asked.append(rows)
            return numbers[rows]

    rows = Rows(Seen(), np.array([1, 2, 3, 5, 0]))
    for some, whole in (
        (slice(0, 3), True), (slice(1, 2), True), (np.array([1, 2]), True), (slice(1, 4), False),
        (np.array([2, 1, 0]), False), (slice(3, 3), False),
    ):  # fmt: skip
        np.testing.assert_array_equal(rows[some], numbers[rows.index[some]])
        assert isinstance(asked[-1], slice) == whole


def test_npy(tmp_path):
    """Rows in any order from a file; one that is cut short or holds something else is refused."""
    numbers = np.arange(12, dtype=np.float32).reshape(4, 3)
    path = tmp_path / "f.npy"
    np.save(path, numbers)
    with pytest.raises(FileNotFoundError, match=r"f\.txt does not exist: it must name a picture"):
        load_embeddings(path)
    (tmp_path / "f.txt").write_text("a\nb\nc\nd\n")
    found = load_embeddings(path)
    assert (list(found.names), found.names[1]) == (list("abcd"), "b")
    rows = embedding_rows(path, ["d", "a"])
    assert rows[:].tolist() == numbers[[3, 0]].tolist()
    assert Rows(rows, np.array([1, 1, 0]))[1:].tolist() == numbers[[0, 3]].tolist()
    (tmp_path / "f.txt").write_text("a\nb\na\nd\n")
    embeddings_of_x = Embeddings(path, ["x.jpg", "x.png"], numbers[:2])
    with pytest.raises(ValueError, match="holds 2 embeddings of x"):
        embeddings_of_x.find(["x"])
    for names in ("a\nb\na\nb\n", "b\nb\nb\na\n"):
        (tmp_path / "f.txt").write_text(names)
        twice = ", ".join(sorted({n for n in names.split() if names.count(n) > 1}))
        message = rf"f\.txt must name every picture once; {len(twice.split())} are .*: {twice}$"
        with pytest.raises(ValueError, match=message):
            load_embeddings(path)
    (tmp_path / "f.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"n = 2 names in f\.txt; got \[4, 3\]"):
        load_embeddings(path)
    whole = path.read_bytes()
    unbalanced = whole.replace(b"'shape': (", b"'shape':((")
    for data in (whole[:-1], whole[:20], b"", b"junk" * 99, unbalanced):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=re.escape(f"{path} is no .npy of numbers, or a dam")):
            Stored(path)
    for array in (np.ones(3), np.array([["a"]]), np.asfortranarray(numbers)):
        np.save(path, array)
        with pytest.raises(ValueError, match="must hold one embedding a picture"):
            Stored(path)
    np.save(path, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"is no \.npy of numbers"):
        Stored(path)
