"""The report of a run: what it says, that it holds together, and what it refuses."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from data.procedural import render_many
from report import main, write_report
from reporting.figures import Series, chart, heat_overlay, label_overlay, roc
from reporting.inputs import read_run
from reporting.words import compare, maps_verdict, paired_sentence, what_they_are

from partlocal import HELEN
from partlocal.labels import FSENET_PARTS

ARM_ACCURACY = {
    "untrained": 0.553,
    "global only": 0.912,
    "joint: global half": 0.903,
    "joint: local half": 0.887,
    "joint: both": 0.934,
    "control: mean maps": 0.921,
    "control: another person's maps": 0.909,
    "control: uniform maps": 0.902,
}


def write_run(folder: Path, protocol: str = "procedural", people: int = 4) -> Path:
    """Leave what train.py leaves, from a fixed seed."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    same = np.arange(2000) % 2 == 0
    names = list(ARM_ACCURACY)
    gaps = {name: 3.2 * (2 * a - 1) for name, a in ARM_ACCURACY.items()}
    scores = np.stack([0.14 * rng.normal(size=2000) + 0.14 * gaps[n] * same for n in names])
    np.savez(
        folder / "scores.npz",
        same=same,
        arm_names=np.array(names),
        scores=scores.astype(np.float32),
    )

    identity = np.repeat(np.arange(people) + 1000, 2)
    faces = render_many(0, identity, np.arange(len(identity)))
    images, labels = faces.image, faces.labels
    k = len(FSENET_PARTS)
    masks = np.stack([labels == HELEN.index(n) for n in FSENET_PARTS], 1).astype(float)
    maps = masks.reshape(len(identity), k, 28, 4, 28, 4).max((3, 5)) * 0.96

    def near(*shape):
        own = rng.normal(size=(people, *shape)).repeat(2, 0)
        return own + 0.5 * rng.normal(size=own.shape)

    parts = near(k, 16) + 0.8
    parts[1, 1] = 0  # the left eye of one picture is hidden
    vectors = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (near(32), near(48))]
    visibility = np.full((len(identity), k), 0.98)
    visibility[1, 1] = 0.03
    np.savez(
        folder / "faces.npz",
        images=images,
        maps=maps.astype(np.float16),
        labels=labels,
        identity=identity,
        part_names=np.array(FSENET_PARTS),
        parts=parts.astype(np.float32),
        visibility=visibility.astype(np.float32),
        **{"global": vectors[0].astype(np.float32), "local": vectors[1].astype(np.float32)},
    )

    with (folder / "history.jsonl").open("w") as file:
        for stage, steps, start in (
            ("parser", 350, 2.4),
            ("joint", 230, 38.0),
            ("global", 230, 19.0),
        ):
            for step in range(steps):
                loss = start * np.exp(-3 * step / steps) * rng.uniform(0.9, 1.1)
                line = {"stage": stage, "step": step, "steps": steps, "loss": loss, "lr": 0.1}
                if stage == "joint":
                    line |= {"global_loss": 0.45 * loss, "local_loss": 0.55 * loss}
                file.write(json.dumps(line) + "\n")
    (folder / "metrics.json").write_text(json.dumps(metrics(protocol), indent=1))
    return folder


def metrics(protocol="procedural"):
    arms = {
        name: {
            "accuracy": accuracy,
            "standard_error": 0.006,
            "auc": accuracy + 0.04,
            "auc_interval": [accuracy + 0.03, accuracy + 0.05],
            "tar_at_far": {"strict": {"0.01": accuracy - 0.2}},
            "rank_1": accuracy - 0.1,
        }
        for name, accuracy in ARM_ACCURACY.items()
    }
    rivals = ("global only", *(name for name in arms if name.startswith("control")))
    tests = [
        {
            "a": "joint: both",
            "b": rival,
            "difference": ARM_ACCURACY["joint: both"] - ARM_ACCURACY[rival],
            "standard_error": 0.004,
            "p_value": 0.0004 if rival != "control: mean maps" else 0.072,
        }
        for rival in rivals
    ]
    f1 = {label: 0.97 - 0.01 * i for i, label in enumerate(HELEN.labels)}
    shortcut = {"part colours": 0.641, "grey pixels": 0.583, "hair": 0.507}
    shortcut |= {"glasses": 0.498, "background": 0.531}
    return {
        "protocol": {"name": protocol, "pairs": 2000, "lists": {"sha": "ab12"}},
        "config": {"seed": 3, "local_weight": 0.6, "parser_options": {"width": 48}},
        "versions": {"partlocal": "0.1.0", "torch": "2.14", "commit": "abcdef012345"},
        "seconds": {"parser": 101.2, "joint": 160.9, "global": 120.0, "evaluation": 41.5},
        "parser": {"macro_f1": 0.912, "mean_f1": 0.9, "miou": 0.84, "f1": f1,
                   "fasseg": {"split": "frontal", "pictures": 20,
                              "f1": {"skin": 0.71, "eyes": 0.43}}},
        "shortcuts": {n: {"accuracy": a, "standard_error": 0.011} for n, a in shortcut.items()},
        "arms": arms,
        "paired_tests": tests,
        "energy": {
            "at initialisation": {"features": 0.11, "distances": 0.79, "cosines": 0.1,
                                  "impostor_cosine_mean": 0.83, "impostor_cosine_std": 0.05,
                                  "standardized_impostor_cosine_mean": 0.03,
                                  "standardized_impostor_cosine_std": 0.12},
            "after training": {"features": 0.86, "distances": 0.07, "cosines": 0.07,
                               "impostor_cosine_mean": 0.02, "impostor_cosine_std": 0.14,
                               "standardized_impostor_cosine_mean": 0.01,
                               "standardized_impostor_cosine_std": 0.11},
        },
        "training": {"joint": {"steps_per_second": 1.814, "data_wait_share": 0.02}},
        "peak_memory_gb": 1.27,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder; tests that change it take a `copy`."""
    return write_run(tmp_path_factory.mktemp("run") / "procedural")


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


def edit(folder, change):
    path = folder / "metrics.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_arrays(path, **changes):
    with np.load(path) as archive:
        arrays = {**archive, **changes}
    np.savez(path, **arrays)


class Page(HTMLParser):
    """The elements of a page; reading one whose tags do not close in order fails."""

    VOID = ("meta", "link", "img")

    def __init__(self, text):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, *tags):
        return [attrs for tag, attrs in self.elements if tag in tags]


def text_of(page):
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S).split())


def test_example(page):
    text = text_of(page)
    assert "joint: both 93.4 ± 0.6 % 0.974 0.964 to 0.984 73.4 % 83.4 %" in text
    assert "joint: both is 2.2 ± 0.4 points above global only" in text
    assert "background 53.1 ± 1.1 % 48 to 52 % outside" in text
    assert "part colours 64.1 ± 1.1 % at most 70 % within" in text
    assert "At initialisation 11.0 % 79.0 % 10.0 % 0.830 ± 0.050 0.030 ± 0.120" in text
    assert "At initialisation 11.0 % 79.0 % 10.0 % 0.830 ± 0.050" in text
    assert "nose 0.910" in text
    assert "photographs of FASSEG, frontal, 20 pictures skin 0.710 eyes 0.430" in text
    assert "Joint network: 1.81 steps a second, 2.0 % of the time spent waiting" in text
    assert "memory at its peak 1.3 GB" in text


def test_page_needs_nothing_else(page):
    parsed = Page(page)
    assert parsed.all("script", "iframe", "object") == []
    sources = [attrs["src"] for attrs in parsed.all("img")]
    assert len(sources) >= 4 * 4 + 2 * 7 + 4
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    links = [attrs["href"] for attrs in parsed.all("a", "link")]
    ids = [attrs["id"] for _, attrs in parsed.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert all(link == "data:," or link[1:] in ids for link in links)
    assert "url(" not in page
    assert "@import" not in page
    assert "http://" not in page


def test_page_can_be_read_aloud(page):
    parsed = Page(page)
    assert all(attrs.get("alt", "").strip() for attrs in parsed.all("img"))
    assert all(
        attrs.get("aria-label") or attrs.get("aria-hidden") == "true" for attrs in parsed.all("svg")
    )
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= level + 1 for level, later in itertools.pairwise(levels))
    assert all(attrs.get("scope") for attrs in parsed.all("th"))


def test_every_text_is_escaped(copy):
    evil = "\"'><script>alert(1)</script><img src=x>"

    def poison(value):
        if isinstance(value, dict):
            keep = {"name", "accuracy", "f1", "a", "b", "difference", "p_value"}
            return {k if k in keep else k + evil: poison(v) for k, v in value.items()}
        if isinstance(value, list):
            return [poison(v) for v in value]
        return value + evil if isinstance(value, str) else value

    def change(data):
        for key in list(data):
            data[key] = poison(data[key])
        data["parser"] = {"f1": {evil: 0.5}, "fasseg": {evil: 0.5}}
        data["versions"] = {"commit": evil, "torch": evil}

    edit(copy, change)
    with (copy / "history.jsonl").open("a") as file:
        file.write(json.dumps({"stage": evil, "step": 0, "loss": 1.0, "lr": evil}) + "\n")
    names = np.array([evil + str(i) for i in range(6)])
    edit_arrays(copy / "faces.npz", part_names=names)
    edit_arrays(copy / "scores.npz", arm_names=np.array([evil + str(i) for i in range(8)]))
    page = write_report(copy).read_text()
    assert page.count("alert(1)") > 20
    parsed = Page(page)
    assert parsed.all("script") == []
    assert all(attrs["src"].startswith("data:") for attrs in parsed.all("img"))


def test_it_says_what_the_numbers_are(page, copy):
    assert "Synthetic faces" in page
    assert "One seed (3)." in page
    assert "99 %" not in page
    edit(copy, lambda data: data.update(protocol={"name": "lfw"}))
    lfw = text_of(write_report(copy).read_text())
    assert "not comparable to the published 99 % on LFW" in lfw
    assert "One seed (3)." in lfw
    assert "Synthetic faces" not in lfw
    assert what_they_are({"name": "other"}, {})[0].startswith("Protocol 'other'")
    sized = {"name": "held-out identities", "trained_on": "9 pictures of 3 people", "pairs": 600}
    assert what_they_are(sized, {})[1] == "Trained on 9 pictures of 3 people; tested on 600 pairs."
    sized["tested_on"] = "8 pictures of 2 people"
    assert what_they_are({**sized, "name": "lfw"}, {})[1] == (
        "Trained on 9 pictures of 3 people; tested on 600 pairs of 8 pictures of 2 people, none of "
        "them trained on."
    )


@pytest.mark.parametrize(("after", "kind"), [(0.62, "open"), (0.66, "good"), (None, "good")])
def test_networks_that_learned_nothing(after, kind):
    """Two standard errors of a difference of two accuracies that have 2 % each are 5.7 %."""
    error = {"standard_error": 0.02}
    arms = {"untrained": {"accuracy": 0.6, **error}, "joint: both": {"accuracy": after, **error}}
    tests = [{"a": "joint: both", "b": "control: mean maps", "difference": 0.1, "p_value": 1e-9}]
    found, sentence = maps_verdict({**arms, "control: mean maps": {}}, tests)
    assert found == kind
    assert ("says nothing about what its part maps add" in sentence) == (kind == "open")


def test_differences_of_nothing_are_not_told(copy):
    """A network at the untrained one's accuracy: its paired tests have no direction."""
    assert "more than the choice of pairs explains" in text_of(write_report(copy).read_text())
    edit(copy, lambda data: data["arms"]["untrained"].update(accuracy=0.93))
    text = text_of(write_report(copy).read_text())
    assert "The trained network is no better than the untrained one on these pairs" in text
    assert "Paired tests" not in text
    assert "explains" not in text


@pytest.mark.parametrize(
    ("faces", "parser", "left_out"),
    [
        ([], "train", {"min_images", "damaged"}),
        ([], "pretrained", {"min_images", "damaged", "parser_options.width"}),
        (["a.zip"], "train", set()),
        (["a.zip"], "pretrained", {"identities", "samples", "parser_options.width"}),
    ],
)
def test_options_without_a_part_are_not_shown(copy, faces, parser, left_out):
    numbers = {"identities": 9, "samples": 8, "min_images": 7, "damaged": 6, "lr": 5}
    config = {**numbers, "faces": faces, "parser": parser, "parser_options": {"width": 4}}
    edit(copy, lambda data: data.update(config=config))
    text = text_of(write_report(copy).read_text()).partition("Config Setting Value ")[2]
    shown = {name for name in (*numbers, "parser_options.width") if f" {name} " in f" {text}"}
    assert shown == {*numbers, "parser_options.width"} - left_out


def test_how_it_was_started(copy):
    assert "<code>" not in write_report(copy).read_text()
    rows = [{"command": "train.py --faces 'a b.zip'"}, {}, {"command": "train.py --resume"}]
    path = copy / "starts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    page = write_report(copy).read_text()
    assert re.findall("<code>(.*?)</code>", page) == [
        "train.py --faces &#x27;a b.zip&#x27;",
        "train.py --resume",
    ]
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"^starts.jsonl line 1 is damaged"):
        write_report(copy)


def verdict(*results):
    """The verdict where each control's test gave (difference, p), None for no test."""
    names = ["control: mean maps", "control: uniform maps"][: len(results)]
    tests = [
        {"a": name, "b": "joint: both", "difference": -result[0], "p_value": result[1]}
        for name, result in zip(names, results, strict=True)
        if result
    ]
    return maps_verdict({key: {} for key in ["joint: both", *names]}, tests)


def test_verdict_on_the_maps():
    both = "mean maps and uniform maps"
    assert verdict((0.03, 0.001), (0.02, 0.04)) == (
        "good",
        f"Real part maps beat all 2 controls: {both}.",
    )
    assert verdict((0.03, 0.06), (-0.02, 0.001)) == (
        "bad",
        f"Real part maps do not beat {both}: what the local half adds here does not depend on "
        "where the maps point.",
    )
    assert verdict((0.03, 0.001), (0.02, 0.4)) == (
        "bad",
        "Real part maps beat mean maps, but not uniform maps.",
    )
    assert verdict((0.03, 0.001), None) == (
        "open",
        "Real part maps beat mean maps. No paired test was run against uniform maps.",
    )
    assert verdict(None, None)[0] == "open"
    assert verdict()[1].startswith("The run holds no control")


def test_paired_test_is_turned_round():
    test = {"a": "x", "b": "y", "difference": 0.02, "standard_error": 0.01, "p_value": 0.03}
    assert compare([test], "x", "y").difference == 0.02
    assert compare([test], "y", "x").difference == -0.02
    assert compare([test], "x", "z") is None
    below = paired_sentence({**test, "difference": -0.02, "p_value": 0.2})
    assert "is 2.0 ± 1.0 points below" in below
    assert "cannot tell them apart" in below


def test_roc_reference():
    rng = np.random.default_rng(1)
    same = rng.random(300) < 0.4
    scores = (rng.normal(size=300) + same).round(1)  # rounded: many ties
    far, tar = roc(scores, same, points=1000)
    rates = {
        (np.mean(scores[~same] >= t), np.mean(scores[same] >= t)) for t in np.unique(scores[~same])
    }
    assert set(zip(far.tolist(), tar.tolist(), strict=True)) == rates
    assert (np.diff(far) >= 0).all()
    assert far[-1] == 1


def test_similarity_reference(run, page):
    with np.load(run / "faces.npz") as file:
        faces = dict(file)
    parts, identity = faces["parts"].astype(float), faces["identity"]
    text = text_of(page)
    for k, name in enumerate(FSENET_PARTS):
        found = {True: [], False: []}
        for i in range(len(identity)):
            for j in range(i):
                a, b = parts[i, k], parts[j, k]
                if a.any() and b.any():
                    cosine = a @ b / np.sqrt((a @ a) * (b @ b))
                    found[bool(identity[i] == identity[j])].append(cosine)
        genuine, impostor = np.mean(found[True]), np.mean(found[False])
        row = f"{name.replace('_', ' ')} {genuine:.2f} {impostor:.2f} {genuine - impostor:.2f}"
        assert row.replace("-", "\N{MINUS SIGN}") in text
    assert "(4 genuine, 24 impostor)" in text


def test_hidden_part_has_no_cosine(copy):
    with np.load(copy / "faces.npz") as file:
        parts = file["parts"]
    parts[:, 3] = 0
    edit_arrays(copy / "faces.npz", parts=parts)
    assert text_of(write_report(copy).read_text()).count("nose absent") == 3  # both pairs, means


def test_overlays():
    image = np.full((112, 112, 3), (200, 100, 0), np.uint8)
    labels = np.zeros((112, 112), np.uint8)
    labels[:, 56:] = 1
    shown = label_overlay(image, labels, ["#000000", "#ff0000"])
    grey = 0.299 * 200 + 0.587 * 100
    assert (shown[:, :56] == round(grey)).all()
    assert (shown[0, 100] == np.round([0.38 * grey + 0.62 * 255, 0.38 * grey, 0.38 * grey])).all()

    part_map = np.zeros((28, 28), np.float16)
    part_map[:14] = 1  # the upper half glows, and only that
    heat = heat_overlay(image, part_map).astype(int).sum(-1)
    assert heat[:50].min() > 2 * heat[62:].max()


def test_chart_places_points():
    line = Series("x", np.array([0.01, 1.0]), np.array([0.0, 1.0]))
    svg = chart([line], "a < b", "x", "y", (0.01, 1.0), (0.0, 1.0), log_x=True)
    assert 'points="44.0,212.0 348.0,22.0"' in svg
    assert 'aria-label="a &lt; b"' in svg
    assert [t for t in re.findall(r'middle">([^<]*)<', svg)] == ["0.01", "0.1", "1", "x"]


def test_what_was_not_measured_is_left_out(copy):
    (copy / "metrics.json").write_text(
        '{"protocol": {"name": "lfw"}, "arms": {"new arm": {"accuracy": 0.7, "auc": NaN}}}'
    )
    (copy / "history.jsonl").write_text('{"stage": "joint", "step": 0, "loss": NaN, "lr": 0.1}\n')
    scores = np.full((8, 2000), 0.5, np.float32)  # constant, and one arm diverged
    scores[0] = np.nan
    edit_arrays(copy / "scores.npz", scores=scores)
    with np.load(copy / "faces.npz") as file:
        alone = {name: array[:1] for name, array in file.items() if name != "part_names"}
    edit_arrays(copy / "faces.npz", **alone)
    page = write_report(copy).read_text()
    text = text_of(page)
    assert "new arm 70.0 % \N{EN DASH} \N{EN DASH}" in text
    assert "No finite loss was recorded" in text
    assert "Scores that are not finite kept out: untrained." in text
    assert text.count("The run holds none.") == 2
    assert 'id="energy"' not in page
    assert 'id="shortcuts"' not in page
    assert "nan" not in re.sub(r'src="[^"]*"', "", page).lower()


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("metrics.json", lambda p: p.write_text('{"arms": '), "metrics.json is damaged: Expecting"),
        ("metrics.json", lambda p: p.write_bytes(b"\xff\xfe\x00"), "metrics.json is damaged"),
        ("metrics.json", lambda p: p.write_text("[1]"), "metrics.json must be a JSON object"),
        ("metrics.json", lambda p: p.write_text("{}"), "metrics.json holds no 'protocol'"),
        (
            "metrics.json",
            lambda p: p.write_text('{"protocol": {}, "arms": {"a": 3}}'),
            "metrics.json: arms['a'] must be a JSON object; got int",
        ),
        (
            "metrics.json",
            lambda p: p.write_text('{"protocol": {}, "arms": {}}'),
            "metrics.json: arms is empty",
        ),
        (
            "history.jsonl",
            lambda p: p.write_text('{"stage": "joint"}\n{"stage'),
            "history.jsonl line 2 is damaged",
        ),
        ("scores.npz", lambda p: p.write_bytes(p.read_bytes()[:900]), "scores.npz is damaged"),
        ("scores.npz", lambda p: p.write_bytes(b""), "scores.npz is damaged"),
        ("scores.npz", lambda p: np.savez(p, same=np.ones(3, bool)), "scores.npz lacks arm_names"),
        (
            "scores.npz",
            lambda p: edit_arrays(p, same=np.ones(7, bool)),
            "scores.npz: scores must be [a = 8, p = 7]; got [8, 2000]",
        ),
        (
            "faces.npz",
            lambda p: edit_arrays(p, maps=np.zeros((8, 6, 28), np.float16)),
            "faces.npz: maps must be [m = 8, k, h, w]; got [8, 6, 28]",
        ),
        (
            "faces.npz",
            lambda p: edit_arrays(p, images=np.zeros((8, 112, 112, 3))),
            "faces.npz: images must hold unsigned integers; got float64",
        ),
    ],
)
def test_errors(copy, name, damage, message):
    (copy / "report.html").write_text("the old one")
    damage(copy / name)
    with pytest.raises(ValueError) as caught:
        write_report(copy)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (copy / "report.html").read_text() == "the old one"
    assert not list(copy.glob(".report*"))


def refusal(folder):
    try:
        read_run(folder)
    except ValueError as error:
        return str(error)
    return None


def test_flipped_bytes_are_reported(copy):
    """Whatever byte of an archive is damaged, the error is ours or the page still stands."""
    for name in ("scores.npz", "faces.npz"):
        data = (copy / name).read_bytes()
        for at in np.random.default_rng(2).integers(0, len(data), 40):
            (copy / name).write_bytes(data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :])
            message = refusal(copy)
            assert message is None or re.fullmatch(f"{re.escape(name)}[^\n]+", message)
        (copy / name).write_bytes(data)


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_pickles_are_not_executed(copy, monkeypatch):
    monkeypatch.chdir(copy)
    edit_arrays(copy / "scores.npz", same=np.array([Bomb()], object))
    with pytest.raises(ValueError, match=r"scores\.npz is damaged: .*allow_pickle"):
        write_report(copy)
    assert not (copy / "exploded").exists()


def test_missing(copy):
    with pytest.raises(FileNotFoundError, match="nowhere is no folder: give the folder"):
        write_report(copy / "nowhere")
    for name in ("faces.npz", "scores.npz", "history.jsonl", "metrics.json"):
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"holds no {name}: the run did not finish"):
            write_report(copy)


def test_nothing_half_written(copy, monkeypatch):
    (copy / "report.html").write_text("the old one")

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("report.os.replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(copy)
    assert (copy / "report.html").read_text() == "the old one"
    assert not list(copy.glob(".report*"))


def test_command_line(copy, capsys):
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, root / "examples/fsenet/report.py", copy],
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(copy / "report.html"))
    assert main([str(copy / "nowhere")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("width", [375, 1200])
def test_browser(page, tmp_path, width):
    """No scroll sideways and no message on the console, in a frame as wide as a phone."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    frame = page.replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "frame.html").write_text(
        f'<iframe width="{width}" height="700" style="border:0" srcdoc="{frame}" onload="'
        "document.title = 'wide ' + this.contentDocument.documentElement.scrollWidth\"></iframe>"
    )
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         str(tmp_path / "frame.html")],
        check=False, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    found = re.search("<title>wide ([0-9]+)</title>", done.stdout)
    assert found
    assert width - 20 <= int(found[1]) <= width
    assert "CONSOLE" not in done.stderr
