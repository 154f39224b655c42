"""Procedural faces: labels and landmarks agree, nothing depends on order, people are not leaked."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data.face_geometry import FIVE_POINTS, fit_similarity
from data.face_params import Identity, Nuisance, NuisanceRanges, draw_identity, draw_nuisance
from data.procedural import (
    Arguments,
    ProceduralFaces,
    contact_sheet,
    main,
    overlay,
    render,
    render_many,
)
from PIL import Image

from partlocal import HELEN

ROOT = Path(__file__).resolve().parents[2]
BARE = NuisanceRanges(bald=1.0, hat=0.0, occluder=0.0, glasses=0.0)
SHARP = dataclasses.replace(BARE, blur=0.0, noise=0.0, low_resolution=0.0, jpeg=0.0, light=0.3)


@pytest.fixture(scope="module")
def bare_faces():
    """Faces with nothing before them, so that all points can be looked up in the labels."""
    return [render(3, i, i, ranges=BARE) for i in range(60)]


def test_example():
    face = render(0, 1, 2)
    assert face.image.shape == (112, 112, 3)
    assert face.image.dtype == np.uint8
    assert face.labels.shape == (112, 112)
    assert face.labels.dtype == np.uint8
    assert face.points5.shape == (5, 2)
    assert face.points68.shape == (68, 2)
    assert face.image.std() > 10


def test_labels_follow_helen():
    faces = render_many(1, range(40), [0] * 40)
    counts = np.bincount(faces.labels.ravel(), minlength=11)
    assert len(counts) == len(HELEN.labels) == 11
    assert (counts > 40).all()
    assert HELEN.side == "viewer"
    for left, right in (("left_brow", "right_brow"), ("left_eye", "right_eye")):
        columns = [
            np.nonzero(faces.labels == HELEN.index(name))[2].mean() for name in (left, right)
        ]
        assert columns[0] < 56 < columns[1]


def test_five_points_are_aligned(bare_faces):
    """Undoing a least-squares fit on the template changes little: jitter is all that is left."""
    for face in bare_faces:
        a, b = fit_similarity(face.points5, FIVE_POINTS)
        assert abs(a - 1) < 0.08
        assert abs(a * (56 + 70j) + b - (56 + 70j)) < 2.5


def centroid(mask):
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def test_points_agree_with_labels(bare_faces):
    for face in bare_faces:
        labels, five = face.labels, face.points5
        for point, name in zip(five[:2], ("left_eye", "right_eye"), strict=True):
            mask = labels == HELEN.index(name)
            assert np.linalg.norm(centroid(mask) - point) < 2.5
        assert labels[tuple(np.rint(five[2]).astype(int)[::-1])] == HELEN.index("nose")
        y, x = np.nonzero(np.isin(labels, [HELEN.index(n) for n in ("upper_lip", "lower_lip")]))
        for point, column in ((five[3], x.min()), (five[4], x.max())):
            assert abs(point[0] - column) < 2.5
            assert np.abs(y[x == column] - point[1]).min() < 3.0


def test_landmarks_lie_on_their_parts(bare_faces):
    """Brow points in the brows, lid and lip points on the edge of eyes and mouth."""
    parts = {
        "left_brow": range(17, 22),
        "right_brow": range(22, 27),
        "nose": [30, 33],
        "left_eye": range(36, 42),
        "right_eye": range(42, 48),
    }
    groups = {name: [HELEN.index(name)] for name in parts}
    groups["mouth"] = [HELEN.index(n) for n in ("upper_lip", "inner_mouth", "lower_lip")]
    parts["mouth"] = range(48, 68)
    for face in bare_faces:
        for name, points in parts.items():
            y, x = np.nonzero(np.isin(face.labels, groups[name]))
            for point in face.points68[list(points)]:
                assert np.hypot(x - point[0], y - point[1]).min() < 2.6, (name, point)


def test_landmarks_order(bare_faces):
    for face in bare_faces:
        p = face.points68
        assert (np.diff(p[17:27, 0]) > 0).all()  # brows, left to right
        assert (np.diff(p[27:31, 1]) > 0).all()  # ridge, downwards
        assert (np.diff(p[31:36, 0]) > 0).all()
        assert (np.diff(p[48:55, 0]) > 0).all()
        assert (np.diff(p[54:60, 0]) < 0).all()
        assert p[8, 1] > p[57, 1] > p[51, 1]
        assert p[0, 0] < p[36, 0] < p[45, 0] < p[16, 0]


def test_labels_lie_on_edges_of_the_picture():
    """Colour changes where labels change, and less where the label edges are moved."""
    here, moved = [], []
    for i in range(40):
        face = render(4, i, 0, ranges=dataclasses.replace(SHARP, bald=0.0))
        grey = face.image.astype(float).mean(2)
        step = np.abs(np.diff(grey, axis=0))
        edge = np.diff(face.labels.astype(int), axis=0) != 0
        here.append(step[edge].mean())
        moved.append(step[np.roll(edge, 4, axis=0)].mean())
    assert np.mean(here) > 1.5 * np.mean(moved)


def test_flip():
    face = render(0, 2, 1)
    mirrored = face.flip()
    assert np.array_equal(mirrored.image, face.image[:, ::-1])
    assert mirrored.labels.tolist() == HELEN.flip(as_tensor(face.labels)).tolist()
    assert mirrored.points5[0, 0] < mirrored.points5[1, 0]
    again = mirrored.flip()
    assert np.array_equal(again.labels, face.labels)
    assert np.allclose(again.points68, face.points68, atol=1e-4)
    assert np.allclose(again.points5, face.points5, atol=1e-4)


def as_tensor(array):
    import torch  # noqa: PLC0415

    return torch.from_numpy(array.astype(np.int64))


def test_mirrored_faces_keep_the_agreement(bare_faces):
    mirrored = [face.flip() for face in bare_faces[:30]]
    test_points_agree_with_labels(mirrored)
    test_landmarks_lie_on_their_parts(mirrored)
    test_landmarks_order(mirrored)


def digest(face):
    parts = (face.image, face.labels, face.points5, face.points68)
    return hashlib.sha256(b"".join(p.tobytes() for p in parts)).hexdigest()


def test_same_in_any_order_and_process():
    wanted = [(0, 3, 1), (0, 0, 9), (7, 3, 1)]
    forwards = [digest(render(*key)) for key in wanted]
    backwards = [digest(render(*key)) for key in reversed(wanted)][::-1]
    assert forwards == backwards
    assert len(set(forwards)) == 3
    code = (
        "import sys; sys.path[:0] = ['examples/fsenet', 'tests/fsenet', '.']\n"
        "from test_procedural import digest, render\n"
        f"print(*[digest(render(*key)) for key in {wanted[::-1]}])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert output.stdout.split()[::-1] == forwards


def test_data_set_depends_on_seed_and_index_alone():
    data = ProceduralFaces(5, identities=4, samples_per_identity=3, size=112)
    assert len(data) == 12
    item = data[7]
    assert item["identity"] == 2
    assert item["image"].shape == (3, 112, 112)
    face = render(5, 2, 1)
    assert np.array_equal(item["image"].permute(1, 2, 0).numpy(), face.image)
    assert np.array_equal(item["labels"].numpy(), face.labels)
    shifted = ProceduralFaces(5, 2, 3, first_identity=2)
    assert np.array_equal(shifted[1]["image"].numpy(), item["image"].numpy())
    assert shifted[1]["identity"] == 0


def test_render_many_stacks():
    faces = render_many(0, [1, 2], [3, 4], size=64)
    assert faces.image.shape == (2, 64, 64, 3)
    assert np.array_equal(faces.labels[1], render(0, 2, 4, size=64).labels)


def test_sizes_show_the_same_face():
    """Twice the size has the same points on the doubled grid and nearly the same labels."""
    small, large = render(0, 4, 0, 112), render(0, 4, 0, 224)
    assert np.allclose((large.points68 + 0.5) / 2 - 0.5, small.points68, atol=1e-3)
    parts = [2, 3, 4, 5, 6, 7, 9]
    both = np.isin(small.labels, parts) & np.isin(large.labels[::2, ::2], parts)
    assert (small.labels == large.labels[::2, ::2])[both].mean() > 0.9


def numbers(item):
    """All scalar numbers of a parameter record."""
    values = []
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if not isinstance(value, str) and field.name != "textures":
            values.extend(np.atleast_1d(np.asarray(value, float)).ravel())
    return values


def test_circumstances_do_not_depend_on_people():
    """No nuisance number correlates with any identity number, or clusters by person."""
    people, count = 60, 20
    who = np.array([numbers(draw_identity(0, i)) for i in range(people)])
    seen = np.array(
        [[numbers(draw_nuisance(0, i, j)) for j in range(count)] for i in range(people)]
    )
    varying = seen.std((0, 1)) > 0
    seen = seen[:, :, varying]
    means = seen.mean(1)
    z = (means - means.mean(0)) / means.std(0)
    w = (who - who.mean(0)) / who.std(0)
    correlation = z.T @ w / people
    assert np.abs(correlation).max() < 4.8 / np.sqrt(people)
    between = count * means.var(0, ddof=1) / seen.var(1, ddof=1).mean(0)  # F, 1 by chance
    assert 0.9 < between.mean() < 1.1
    assert between.max() < 2.2


def test_people_differ_and_samples_do_not_change_them():
    assert draw_identity(0, 1) == draw_identity(0, 1)
    assert draw_identity(0, 1) != draw_identity(0, 2)
    assert draw_identity(1, 1) != draw_identity(0, 1)
    for field in dataclasses.fields(Identity):
        low, high = field.metadata["range"]
        values = [getattr(draw_identity(0, i), field.name) for i in range(200)]
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high


def test_nuisance_strength_is_adjustable():
    calm = NuisanceRanges(yaw=0, pitch=0, roll=0, jitter=0, expression=0, light=0, glasses=0)
    for j in range(20):
        seen = draw_nuisance(0, 0, j, calm)
        assert isinstance(seen, Nuisance)
        assert seen.yaw == seen.pitch == seen.roll == seen.mouth_open == seen.smile == 0
        assert not seen.glasses
        assert np.abs(seen.jitter).max() == 0
    assert draw_nuisance(0, 0, 1, dataclasses.replace(calm, glasses=1.0)).glasses


def test_contact_sheet():
    assert contact_sheet(0, 2, 3, 48).shape == (96, 144, 3)
    assert contact_sheet(0, 2, 3, 48, labels=True).shape == (192, 144, 3)
    assert overlay(render(0, 0, 0)).shape == (112, 112, 3)


def test_errors():
    with pytest.raises(ValueError, match="must be >= 0; got 0, -1 and 2"):
        render(0, -1, 2)
    with pytest.raises(ValueError, match="size must be at least 16 pixels; got 8"):
        render(0, 0, 0, size=8)
    with pytest.raises(IndexError, match="index must be below 6; got 6"):
        ProceduralFaces(0, 2, 3)[6]


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("x/a.png", {}, "x is no folder: make it first"),
        ("a.xyz", {}, "a.xyz must end in the suffix of a picture's format, such as .png"),
        ("a.psd", {}, "a.psd must end in the suffix of a picture's format"),  # which Pillow reads
        ("a", {}, "a must end in the suffix of a picture's format"),
        ("a.png", {"samples": 0}, "--samples must be between 1 and"),
        ("a.png", {"identities": 0}, "--identities must be between 2 and"),
        ("a.png", {"size": 9}, "--size must be between 16 and"),
    ],
)
def test_sheet_errors(tmp_path, name, how, message):
    with pytest.raises((OSError, ValueError), match=message):
        main(Arguments(tmp_path / name, **how))


def test_sheet(tmp_path, capsys):
    path = tmp_path / "a.png"
    main(Arguments(path, 3, identities=2, samples=3, size=32, labels=True))
    sheet = np.asarray(Image.open(path))
    assert sheet.shape == (4 * 32, 3 * 32, 3)
    assert np.array_equal(sheet[64:96, 32:64], render(3, 1, 1, 32).image)
    assert "2 people, 3 pictures each" in capsys.readouterr().out
