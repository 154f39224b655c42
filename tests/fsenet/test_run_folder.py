"""The folder of a run: found, refused, resumed; and the cache of maps that lies in it."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import maps
import numpy as np
import pytest
import run_folder
import torch
from data.augment import Augmentation
from data.faces import TrainingSet
from maps import cached_maps, mean_maps
from options import DEFAULT, PROFILES, parse_options
from results import print_results, speed, write_results
from run_folder import bind, discard_unused, hold, plain, workplace
from telemetry import Fitted
from torch.utils.data import TensorDataset
from train_parser import ParserOptions
from workplace import Workplace

from partlocal import HELEN, ParsingNet, PartLocalNet
from partlocal.labels import FSENET_PARTS


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def having(**changed):
    return dataclasses.replace(DEFAULT, **changed)


def opened(options, name):
    """A workplace whose folder nobody holds."""
    with ExitStack() as stack:
        return run_folder.open_workplace(options, name, stack)


def open_folder(options):
    return run_folder.open_folder(options.output, options.profile, plain(options), options.resume)


def test_the_next_free_folder():
    assert open_folder(DEFAULT) == Path("runs/default-0")
    assert open_folder(DEFAULT) == Path("runs/default-1")
    assert open_folder(PROFILES["lfw"]) == Path("runs/lfw-0")
    assert open_folder(DEFAULT) == Path("runs/default-2")
    assert open_folder(having(resume=True)) == Path("runs/default-2")  # the newest
    Path("runs/default-1/options.json").unlink()
    Path("runs/default-1").rmdir()
    Path("runs/default-old").mkdir()
    assert open_folder(having(resume=True)) == Path("runs/default-2")
    assert open_folder(DEFAULT) == Path("runs/default-3")  # numbers are not used again
    assert json.loads(Path("runs/lfw-0/options.json").read_text()) == plain(PROFILES["lfw"])


def test_resume(tmp_path):
    output = tmp_path / "deep" / "run"
    options = having(output=output, lr=0.3, milestones=(0.5,))
    assert open_folder(options) == output
    before = (output / "options.json").read_bytes()
    with pytest.raises(FileExistsError, match="run holds a run: pass --resume, or another --outp"):
        open_folder(options)
    assert open_folder(dataclasses.replace(options, resume=True)) == output
    other_machine = dataclasses.replace(options, resume=True, workers=3, parsing=Path("x.zip"))
    assert open_folder(other_machine) == output
    other = dataclasses.replace(
        options, resume=True, lr=0.2, steps=7, augmentation=Augmentation(flip=0.1)
    )
    with pytest.raises(ValueError, match=f"was started with steps {options.steps}") as caught:
        open_folder(other)
    text = str(caught.value)
    assert "lr 0.3 (now 0.2)" in text
    assert "augmentation {'flip': 0.5" in text
    assert "milestones" not in text
    assert text.endswith(": resume it with the same options")
    assert "\n" not in text
    assert (output / "options.json").read_bytes() == before


def test_errors(tmp_path, monkeypatch):
    message = "default-0 does not exist: leave --resume out to begin a run"
    with pytest.raises(FileNotFoundError, match=message):
        open_folder(having(resume=True))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="holds no run to resume: leave --resume out"):
        open_folder(having(resume=True, output=empty))
    assert list(empty.iterdir()) == []

    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=r"cannot be written \(.+\): pass another --output"):
            open_folder(having(output=output))

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(OSError, match=r"empty cannot be written \(Permission denied\): pass anot"):
        open_folder(having(output=empty))
    assert list(empty.iterdir()) == []

    (empty / "options.json").write_text("{")
    with pytest.raises(ValueError, match=r"options.json is damaged \(.*\): pass another --output"):
        open_folder(having(resume=True, output=empty))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match=r"cannot be written \(Permission denied\)"):
        open_folder(having(output=tmp_path / "run"))


def test_discard_unused(tmp_path):
    """A run that left nothing but its options is forgotten; one that left more is not."""
    place = opened(having(output=tmp_path / "run", precision="fp32"), "default")
    assert (place.precision, place.rank, place.world) == ("fp32", 0, 1)
    (tmp_path / "run" / "joint.pt").write_bytes(b"")
    discard_unused(place)
    assert (tmp_path / "run" / "options.json").exists()
    (tmp_path / "run" / "joint.pt").unlink()
    discard_unused(dataclasses.replace(place, rank=1))
    assert (tmp_path / "run" / "options.json").exists()
    discard_unused(place)
    assert not (tmp_path / "run").exists()

    # what was there before stays
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    discard_unused(opened(having(output=tmp_path / "mine"), "default"))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    place = opened(having(output=tmp_path / "mine"), "default")
    (tmp_path / "mine" / "maps-0.npz").write_bytes(b"")
    (tmp_path / "mine" / "tensorboard").mkdir()
    (tmp_path / "mine" / "tensorboard" / "events").write_bytes(b"")
    discard_unused(place)  # maps and curves alone are no run to go on with
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]

    # a checkpoint of nobody knows what is not gone on with, and nobody's files are deleted
    for name in ("joint.pt", "history.jsonl", "starts.jsonl", "maps-1.npz", "tensorboard"):
        lost = tmp_path / f"lost-{name}"
        lost.mkdir()
        (lost / name).write_bytes(b"")
        message = rf"{name} was left by a run whose options.json is gone: delete it, or pass"
        with pytest.raises(FileExistsError, match=message):
            opened(having(output=lost), "default")
        assert [path.name for path in lost.iterdir()] == [name]


def test_one_run_at_a_time(tmp_path):
    """Another process that lives keeps the folder; one that was killed does not."""
    holder = (
        "import sys, time; from pathlib import Path; from run_folder import hold\n"
        "with hold(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    )
    with workplace(having(output=tmp_path / "run"), "default") as place:
        (place.folder / "last.pt").touch()
    other = subprocess.Popen(
        [sys.executable, "-c", holder, place.folder], stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(run_folder.__file__).parent)},
    )  # fmt: skip
    try:
        assert other.stdout.readline() == b"held\n"
        starts = (place.folder / "starts.jsonl").read_text()
        again = having(output=place.folder, resume=True)
        with pytest.raises(BlockingIOError, match=r"run is written by another process: end it, or"):
            opened(again, "default")
        assert (place.folder / "starts.jsonl").read_text() == starts
    finally:  # or the test would wait for it
        other.kill()
        other.communicate()
    opened(again, "default")
    with hold(place.folder):  # the process that has it itself
        opened(again, "default")


def test_a_run_says_how_it_began(tmp_path, monkeypatch):
    """A line each time; nothing in the folder names a folder of this machine."""
    faces = tmp_path / "somebody" / "lfw.zip"
    options = having(output=tmp_path / "run", faces=faces, seed=3, precision="fp32")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py"), f"--faces={faces}", "--seed=3"])
    opened(options, "default")
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume", "--output", str(tmp_path / "run")])
    moved = dataclasses.replace(options, faces=Path("elsewhere/lfw.zip"), resume=True)
    opened(moved, "default")
    rows = [json.loads(line) for line in (tmp_path / "run/starts.jsonl").open()]
    assert [row["command"] for row in rows] == [
        "train.py --faces=lfw.zip --seed=3",
        "train.py --resume --output run",
    ]
    assert [row["resumed"] for row in rows] == [False, True]
    for row in rows:
        assert (row["seed"], row["processes"], row["precision"]) == (3, 1, "fp32")
        assert {"commit", "torch", "timm", "python"} <= row["versions"].keys()
        assert row["device"]
    for path in (tmp_path / "run").iterdir():
        assert "somebody" not in path.read_text()
        assert str(tmp_path) not in path.read_text()
    with pytest.raises(ValueError, match=r"started with faces lfw.zip \(now other.zip\)"):
        opened(dataclasses.replace(moved, faces=Path("other.zip")), "default")


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, RuntimeError, KeyboardInterrupt])
def test_whatever_ends_a_run_at_once(tmp_path, error):
    """What the user did not mend and what nobody foresaw: the folder is gone either way."""
    options = having(output=tmp_path / "run")

    def end(left):
        with workplace(options, "default") as place:
            assert (place.folder / "options.json").exists()
            (place.folder / left).write_bytes(b"")
            (place.folder / "history.jsonl").write_text("")
            (place.folder / "tensorboard/parser").mkdir(parents=True)
            raise error("no")

    with pytest.raises(error):
        end("maps-0.npz")
    assert not (tmp_path / "run").exists()
    with pytest.raises(error):
        end("joint.pt")
    assert (tmp_path / "run" / "options.json").exists()


def test_the_precision_is_held_to(tmp_path, monkeypatch):
    """`auto` is written down as what it was: another machine must not go on in another."""
    options = having(output=tmp_path / "run")
    monkeypatch.setattr("machine.computes_in_bf16", lambda _: False)
    assert opened(options, "default").precision == "fp32"
    written = json.loads((tmp_path / "run" / "options.json").read_text())
    assert (written["precision"], written["processes"]) == ("fp32", 1)
    again = dataclasses.replace(options, resume=True)
    assert opened(again, "default").precision == "fp32"
    monkeypatch.setattr("machine.computes_in_bf16", lambda _: True)
    with pytest.raises(ValueError, match=r"started with precision fp32 \(now bf16\): resume it"):
        opened(again, "default")
    opened(dataclasses.replace(again, precision="fp32"), "default")
    (tmp_path / "run" / "options.json").write_text(json.dumps({**written, "processes": 2}))
    # the number of processes may change
    opened(dataclasses.replace(again, precision="fp32", accumulate=2), "default")


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc is told")
def test_freed_memory_is_kept():
    """Blocks that are freed and taken again cost no page faults; in a process of its own."""
    code = """
import resource, sys, torch
from machine import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def step():
    blocks = [torch.ones(5_000_000) for _ in range(5)]  # 20 MB each, as a step's activations
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    recipe = Path(__file__).parents[2] / "examples/fsenet"
    faults = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, how],
                env={**os.environ, "PYTHONPATH": str(recipe)},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for how in ("keep", "return")
    ]
    assert faults[0] * 5 < faults[1], faults


def test_options():
    """A profile sets what the command line does not; options of the folder are not compared."""
    options = parse_options(["--profile", "lfw", "--lr", "0.3", "--parser-options.steps", "5"])
    expected = dataclasses.replace(PROFILES["lfw"], lr=0.3)
    assert dataclasses.replace(options, parser_options=expected.parser_options) == expected
    assert options.parser_options == dataclasses.replace(expected.parser_options, steps=5)
    assert parse_options([]) == DEFAULT
    assert parse_options(["--profile=paper"]) == PROFILES["paper"]
    assert all(profile.profile == name for name, profile in PROFILES.items())
    a, b = having(resume=True, output=Path("x")), having(faces=(Path("x"),))
    assert plain(a) == plain(DEFAULT) != plain(b)
    assert json.loads(json.dumps(plain(b))) == plain(b)


def test_the_paper_profile_is_the_table_of_its_sentences():
    """The options of the table, passed one by one, are the profile; each row has its sentence."""
    page = Path(__file__).resolve().parents[2] / "docs/paper.md"
    rows = re.findall(r"\| `(--\S+)` \| (.+?) \| .+\. \| .*\|", page.read_text(encoding="utf-8"))
    given = [word for option, value in rows for word in (option, *value.split())]
    read, paper = parse_options(given), PROFILES["paper"]
    moved = paper.parser_options.augmentation
    parser = dataclasses.replace(read.parser_options, augmentation=moved)
    assert dataclasses.replace(read, profile="paper", parser_options=parser) == paper
    assert moved == ParserOptions().augmentation


def test_options_hold_no_folders():
    """Another machine may hold the files elsewhere: paths, and sets as `PATH:KIND:SPLITS:SHARE`."""
    sets = ("/a/b/set.zip:fasseg:train:0.25", "set.zip:/c/own.json::0.5")
    changed = having(
        faces=(Path("/a/faces.zip"),),
        parser_options=dataclasses.replace(DEFAULT.parser_options, mix=sets),
    )
    found = plain(changed)
    assert found["faces"] == ["faces.zip"]
    assert found["parser_options"]["mix"] == ["set.zip:fasseg:train:0.25", "set.zip:own.json::0.5"]


def test_the_rate():
    """By hand, for the paper: 0.1, a tenth from a quarter of the steps on, and so on."""
    paper = PROFILES["paper"]
    rates = [paper.rate(step / 400) for step in (0, 99, 100, 199, 200, 300, 399)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 1e-4, 1e-4])
    warm = having(lr=1.0, warmup=0.1, milestones=())
    np.testing.assert_allclose([warm.rate(d) for d in (0, 0.049, 0.2)], [0.01, 0.5, 1.0])


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return PartLocalNet("resnet10t", ParsingNet(HELEN, 8, 1, grid=32), FSENET_PARTS)


def test_the_cache_of_maps(tmp_path, net):
    """Read back bit for bit; another parser, other pictures or other options compute anew."""
    place = Workplace(tmp_path, torch.device("cpu"))
    images = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    maps, visibility = cached_maps(net, images, place, batch_size=2)
    assert maps.dtype == torch.float16
    with torch.inference_mode():
        own, seen = net.eval().parse(images)
    torch.testing.assert_close(maps.float(), own, atol=2e-3, rtol=0)
    torch.testing.assert_close(visibility, seen, atol=1e-6, rtol=0)
    assert (visibility - own.amax((2, 3))).abs().min() > 0.01, "the peak of the normalised map"
    (file,) = tmp_path.iterdir()

    def fail(_):
        raise AssertionError("parsed again")

    net.parse, parse = fail, net.parse
    again = cached_maps(net, images, place)
    assert torch.equal(again[0], maps)
    assert torch.equal(again[1], visibility)
    del net.parse
    assert net.parse == parse

    images[0, 0, 0, 0] ^= 1
    cached_maps(net, images, place)
    with torch.no_grad():
        next(net.parser.parameters())[0] += 1e-6
    cached_maps(net, images, place)
    other = PartLocalNet("resnet10t", net.parser, ("left_eye", "right_eye", "nose"))
    assert [found.shape[1] for found in cached_maps(other, images, place)] == [3, 3]
    assert len(list(tmp_path.iterdir())) == 4
    assert all(p.suffix == ".npz" for p in tmp_path.iterdir())
    cached_maps(net, images, dataclasses.replace(place, folder=tmp_path / "rank", rank=1))
    assert not (tmp_path / "rank").exists()

    for path in tmp_path.iterdir():
        path.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"maps-\w+.npz is damaged \(.*\): delete it"):
        cached_maps(net, images, place)


def test_mean_maps(tmp_path, net, monkeypatch):
    """Of all where they are cached; else of some, spread evenly, parsed for it."""
    place = Workplace(tmp_path, torch.device("cpu"))
    images = torch.randint(0, 256, (7, 3, 64, 64), dtype=torch.uint8)
    held = TrainingSet(TensorDataset(images), images, 1)
    cached = cached_maps(net, images, place)
    net.train()
    found = mean_maps(net, held, cached, place)
    assert torch.equal(found, cached[0].float().mean(0))
    streamed = dataclasses.replace(held, images=None)
    torch.testing.assert_close(mean_maps(net, streamed, None, place), found, atol=1e-3, rtol=0)
    monkeypatch.setattr(maps, "MEAN_OF", 3)
    with torch.inference_mode():
        some = net.eval().parse(images[[0, 3, 6]])[0].mean(0)
    torch.testing.assert_close(mean_maps(net.train(), streamed, None, place), some)


def test_other_pictures(tmp_path):
    """What a run began with is noted, and other pictures are refused, also for a damaged note."""
    place = Workplace(tmp_path, torch.device("cpu"))
    pictures = {"pictures": "9 pictures of 3 people", "sha256": "1"}
    bind(place, pictures)
    assert json.loads((tmp_path / "pictures.json").read_text()) == pictures
    bind(place, dict(pictures))
    for other in ({**pictures, "sha256": "2"}, {**pictures, "pictures": "8 pictures of 3 people"}):
        message = f"pictures.json names other pictures than the {other['pictures']} that --faces"
        with pytest.raises(ValueError, match=message):
            bind(place, other)
    (tmp_path / "pictures.json").write_text("{")
    with pytest.raises(ValueError, match="names other pictures than the 9"):
        bind(place, pictures)


def test_results(tmp_path, capsys, monkeypatch):
    stage = Fitted([{"stage": "joint", "step": 0, "loss": 2.0}], 8.0, 2.0, 40, 320)
    assert speed(stage) == {
        "steps": 40,
        "seconds": 8.0,
        "steps_per_second": 5.0,
        "images_per_second": 40.0,
        "data_wait_share": 0.25,
    }
    assert speed(Fitted())["steps_per_second"] == 0
    arm = {"accuracy": 0.9, "standard_error": 0.01, "auc": 0.95, "rank_1": 0.5}
    metrics = {
        "shortcuts": {
            "hair": {"accuracy": 0.5, "standard_error": 0.02},
            "glasses": {"accuracy": None, "standard_error": None},
        },
        "parser": {"macro_f1": 0.8, "miou": 0.7, "fasseg": {"f1": {"skin": 0.91}}},
        "arms": {"joint: both": arm, "global only": {**arm, "accuracy": 0.85}},
        "paired_tests": [
            {"a": "a", "b": "b", "difference": 0.05, "standard_error": 0.02, "p_value": 0.01234}
        ],
        "seconds": {"total": 61.2},
        "peak_memory_gb": 1.26,
    }
    scores = {"joint: both": np.array([0.5, 0.1]), "global only": np.array([0.4, 0.2])}
    same = np.array([True, False])
    write_results(tmp_path, metrics, {"joint": stage}, same, scores, {"x": np.arange(3)})
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written == {**metrics, "training": {"joint": speed(stage)}}
    assert {p.name for p in tmp_path.iterdir()} == {
        *("metrics.json", "history.jsonl", "scores.npz", "faces.npz")
    }
    assert [json.loads(row) for row in (tmp_path / "history.jsonl").open()] == stage.history
    with np.load(tmp_path / "scores.npz") as table:
        assert table["same"].tolist() == [True, False]
        assert table["arm_names"].tolist() == list(scores)
        np.testing.assert_allclose(table["scores"], [[0.5, 0.1], [0.4, 0.2]])
    with np.load(tmp_path / "faces.npz") as faces:
        assert faces["x"].tolist() == [0, 1, 2]

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    # every file is there as a whole or not at all
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space"):
            write_results(tmp_path, {}, {}, same[:1], scores, {})
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    print_results({**metrics, "peak_memory_gb": None})
    assert "61 s, unknown memory at the peak" in capsys.readouterr().out
    print_results(metrics)
    printed = capsys.readouterr().out
    for text in (
        "shortcut: hair",
        "50.00 ± 2.00 %",
        "macro-F1 0.800, mIoU 0.700",
        "glasses                      too few pairs",
        "skin 0.91",
        "90.00 ± 1.00 %",
        "0.9500",
        "50.0 %",
        "a - b: +5.00 ± 2.00 %, p = 0.012",
        "61 s, 1.3 GB at the peak",
    ):
        assert text in printed, text

    # what learned nothing has no differences to tell
    print_results({**metrics, "arms": {"untrained": {**arm, "accuracy": 0.9}, "joint: both": arm}})
    printed = capsys.readouterr().out
    assert "The trained network is no better than the untrained one on these pairs" in printed
    assert "a - b" not in printed
