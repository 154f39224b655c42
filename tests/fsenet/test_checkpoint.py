"""Checkpoints: whole after SIGKILL, refused when damaged, and never code."""

import os
import pickle
import random
import signal
import time

import pytest
import torch
from checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, whole_file


def state(value):
    return {"module": {"w": torch.full((200, 100), value)}, "steps": value, "rng": torch.arange(9)}


def test_example(tmp_path):
    path = tmp_path / "joint.pt"
    save_checkpoint(state(1.0), path)
    save_checkpoint(state(2.0), path)
    loaded = load_checkpoint(path)
    assert loaded["steps"] == 2.0
    assert torch.equal(loaded["module"]["w"], state(2.0)["module"]["w"])
    assert load_checkpoint(tmp_path / "joint-before.pt")["steps"] == 1.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["joint-before.pt", "joint.pt"]


def test_a_whole_file(tmp_path):
    """The name shows the old content until the block has ended, and after one that failed."""
    path = tmp_path / "history.jsonl"
    with whole_file(path) as file:
        file.write(b"old")
        assert not path.exists()

    def half():
        with whole_file(path) as file:
            file.write(b"ne")
            file.flush()
            assert path.read_bytes() == b"old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "joint.pt"
    save_checkpoint(state(1.0), path)

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, disk_full)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(state(2.0), path)
        assert load_checkpoint(path)["steps"] == 1.0
        assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("links", [True, False])
def test_the_last_two(tmp_path, monkeypatch, capsys, links):
    """The newest that is whole, on file systems with links and without; a line says which."""

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    path, before = tmp_path / "joint.pt", tmp_path / "joint-before.pt"
    assert newest_checkpoint(path) is None
    for value in (1.0, 2.0, 3.0):
        save_checkpoint(state(value), path)
    found = newest_checkpoint(path)
    assert found[0] == path
    assert found[1]["steps"] == 3.0
    assert load_checkpoint(before)["steps"] == 2.0

    good = path.read_bytes()
    path.write_bytes(good[:5000])
    assert load_checkpoint(before)["steps"] == 2.0  # another file, not the same one
    assert capsys.readouterr().err == ""
    assert newest_checkpoint(path)[1]["steps"] == 2.0
    said = capsys.readouterr().err
    assert said.startswith(f"warning: {path} is damaged or no checkpoint (")
    assert said.endswith("); going on from the one before\n")
    assert said.count("\n") == 1
    path.unlink()  # killed between two names, where there are no links
    assert newest_checkpoint(path)[1]["steps"] == 2.0
    before.write_bytes(b"")
    with pytest.raises(ValueError, match=r"joint-before.pt is damaged or no checkpoint"):
        newest_checkpoint(path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_writer_leaves_a_whole_one(tmp_path):
    """Kill a writer at arbitrary moments: what is there can be read, and is never older."""
    path, rng, newest, mid_write = tmp_path / "joint.pt", random.Random(0), 0.0, 0
    save_checkpoint(state(0.0), path)
    for _ in range(12):
        pid = os.fork()
        if pid == 0:  # never returns into pytest
            value = newest
            while True:
                value += 1.0
                save_checkpoint(state(value), path)
        time.sleep(rng.uniform(0.01, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        mid_write += any(p.name.startswith(".") for p in tmp_path.iterdir())
        loaded = load_checkpoint(path)
        assert loaded["module"]["w"].unique().tolist() == [loaded["steps"]]
        assert loaded["steps"] >= newest
        newest = loaded["steps"]
    assert newest > 0
    assert mid_write, "no kill came while a checkpoint was being written"
    save_checkpoint(state(-1.0), path)
    # what kills left is gone
    assert sorted(p.name for p in tmp_path.iterdir()) == ["joint-before.pt", "joint.pt"]


def damaged(path, seed):
    """Cut the file, or overwrite a stretch of it."""
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    if seed % 2:
        return bytes(data[: rng.randrange(len(data))])
    # the pickled structure lies at the front, the zip's index at the end
    for at in (rng.randrange(1000), len(data) - 1 - rng.randrange(1000)):
        data[at : at + 3] = rng.randbytes(3)
    return bytes(data)


def test_errors(tmp_path):
    path = tmp_path / "joint.pt"
    small = {"module": {"w": torch.zeros(3)}, "fitted": {"history": [{"loss": 1.0}], "steps": 3}}
    save_checkpoint(small, path)
    refused = 0
    cases = [damaged(path, seed) for seed in range(60)]
    save_checkpoint(state(1.0), path)  # cut far from its end it fails in another way
    cases += [path.read_bytes()[:length] for length in (5000, 30_000, 70_000)]
    for data in [b"", b"\0" * 500, b"no checkpoint", path.read_bytes()[:-1], *cases]:
        path.write_bytes(data)
        try:
            load_checkpoint(path)
        except ValueError as error:
            text = str(error)
            assert text.startswith(f"{path} is damaged or no checkpoint ("), text
            assert text.endswith("); delete it")
            assert "\n" not in text
            refused += 1
        # a flipped bit in a number is not noticed: the format has no use for its checksums
    assert refused >= 40
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match=r"no checkpoint \(it holds a list\); delete it"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nothing.pt")


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_cannot_run_code(tmp_path):
    path, boom = tmp_path / "joint.pt", tmp_path / "boom"
    torch.save({"module": Bomb(boom)}, path)
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps({"module": Bomb(boom)}))
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        load_checkpoint(path)
    assert not boom.exists()
