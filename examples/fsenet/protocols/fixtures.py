"""Small made-up worlds in the file layouts of protocols whose data are no longer given out.

    python examples/fsenet/protocols/fixtures.py megaface folder/
    python examples/fsenet/evaluate.py folder/features.npz --protocol megaface --faces folder/ \
        --megaface.distractors 400
    python examples/fsenet/evaluate.py runs/default-0/network --protocol megaface \
        --faces folder/ --megaface.distractors 400

The lists are those that the protocol reads, the pictures drawn faces. `features.npz` holds other
embeddings than a network's: a direction a person and noise.
"""

import io
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.listed import ALIGNED
from data.procedural import render, render_many
from limits import check_numbers
from PIL import Image

from protocols.bins import write_bin
from protocols.devkit import write_feature
from protocols.ijb import GALLERIES, IjbProtocol, Name, People
from protocols.ijba import Faces, IjbaProtocol, Split, picture_of
from protocols.lfw_lists import format_pairs
from protocols.megaface import MegafaceProtocol
from protocols.pair_lists import ANNOTATED, Listed, PairList, write_pairs
from protocols.pairs import FOLDS, Pairs
from protocols.ytf import YtfProtocol

Kind = Literal[
    "lfw", "cfp_ff", "cfp_fp", "agedb_30", "calfw", "cplfw", "bin",
    "ijba", "ijbb", "ijbc", "ytf", "megaface",
]  # fmt: skip
D = 16  # numbers of an embedding
NOISE = 0.7  # of each number of it, where the directions of people have 1
SAMPLES = 4  # pictures of each of twenty people
IJBA_SAMPLES = 12  # different pictures of a person; there are more faces, and they repeat


@dataclass(frozen=True)
class Arguments:
    """Write a small made-up world in the layout of a protocol.

    Args:
        protocol: whose.
        folder: that is made, and must not be there.
        seed: of all that is made up.
    """

    protocol: Annotated[Kind, tyro.conf.Positional]
    folder: Annotated[Path, tyro.conf.Positional]
    seed: int = 0


def main(arguments: Arguments) -> None:
    """Write the lists and `features.npz`."""
    check_numbers(arguments)
    _make(arguments.folder)
    names, features = WRITERS[arguments.protocol](arguments.folder, arguments.seed)
    np.savez(arguments.folder / "features.npz", names=np.array(names), embeddings=features)
    print(f"{arguments.folder}: lists of {arguments.protocol}, and {len(names)} embeddings")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise FileExistsError(f"{folder} exists: name another folder, or remove it") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be made ({error.strerror}): name another folder") from None


def write_megaface(folder: Path, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Twelve people, 400 distractors, a few of both wrong; the devkit's feature files too."""
    rng = np.random.default_rng(seed)
    people = np.repeat(np.arange(12), rng.integers(2, 7, 12))
    probes = [f"Person_{who:02d}/Person_{who:02d}_{n}.png" for n, who in enumerate(people)]
    distractors = [f"{n % 3}/{n % 7}@N00/{n}.jpg" for n in range(400)]
    centres = rng.normal(size=(12, D))
    features = np.concatenate([centres[people], np.zeros((400, D))])
    features += NOISE * rng.normal(size=features.shape)
    wrong = rng.choice(len(people), 4, replace=False)
    features[wrong] = rng.normal(size=(4, D))
    bad = rng.choice(400, 10, replace=False)  # pictures of FaceScrub's people among strangers
    features[len(people) + bad] = centres[rng.integers(12, size=10)]
    protocol = MegafaceProtocol(
        tuple(probes), people, tuple(distractors),
        frozenset(probes[i].rpartition("/")[2] for i in wrong),
        frozenset(distractors[i] for i in bad), {},
    )  # fmt: skip
    protocol.write(folder)
    parts = [("facescrub", name) for name in probes] + [("megaface", name) for name in distractors]
    for (part, name), vector in zip(parts, features, strict=True):
        write_feature(folder / f"features/{part}/{name}_partlocal.bin", vector)
    faces = _draw(seed, (*people.tolist(), *range(12, 412)))
    _save(folder / "facescrub_images", probes, faces)
    _save(folder / "megaface_images", distractors, faces[len(probes) :])
    return probes + distractors, features.astype(np.float32)


def write_ijba(folder: Path, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Ten splits of 24 people; faces share pictures and shots, and some have no embedding."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(24, D))
    names, shown, splits, sighting = list[str](), list[int](), {}, 0

    def faces(templates: range, subjects: np.ndarray) -> Faces:
        nonlocal sighting
        rows = []
        for template, subject in zip(templates, subjects, strict=True):
            for _ in range(rng.integers(1, 4)):
                sighting += 1
                still = bool(rng.integers(2))
                for frame in range(1 if still else rng.integers(1, 4)):
                    file = f"img/{sighting}.jpg" if still else f"frame/{sighting}_{frame:05d}.png"
                    rows.append((template, subject, file, sighting // 2, sighting))
                    if rng.uniform() < 0.9 and template != templates[0]:
                        tag = f"#{sighting}" if sighting % 5 == 0 else ""
                        names.append(file + tag)
                        shown.append(subject)
        template, subject, files, media, seen = zip(*rows, strict=True)
        return Faces(*map(np.array, (template, subject)), files, *map(np.array, (media, seen)))

    for n in range(1, 11):
        who = rng.permutation(24)
        compared = faces(range(0, 48), np.repeat(who, 2))
        gallery, probes = faces(range(100, 116), who[:16]), faces(range(200, 248), np.tile(who, 2))
        first, second = np.triu_indices(48, 1)
        splits[n] = Split(compared, first, second, gallery, probes)
    IjbaProtocol(splits, {}).write(folder)
    features = _embed(rng, centres[shown])
    faces = _draw(seed, tuple(np.repeat(np.arange(24), IJBA_SAMPLES).tolist()))
    files = [picture_of(name) + ".jpg" * ("#" in name) for name in names]
    pictures = [faces[who * IJBA_SAMPLES + n % IJBA_SAMPLES] for n, who in enumerate(shown)]
    _save(folder / ALIGNED, files, pictures)
    return names, features


def make_ijb(name: Name, seed: int = 0, people: int = 30) -> tuple[IjbProtocol, np.ndarray]:
    """Return two templates a person, each of one to five faces in one to three media."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(people, D))
    rows, features = [], []
    for template in range(2 * people):
        for _ in range(rng.integers(1, 6)):
            rows.append((100 + template, rng.integers(3)))
            features.append(centres[template // 2] + 1.4 * NOISE * rng.normal(size=D))
    order = rng.permutation(len(rows))  # the lists are not sorted by template
    ids, media = np.array(rows)[order].T
    first, second = np.triu_indices(2 * people, 1)
    half = np.arange(0, 2 * people, 2)
    cuts = np.array_split(half[: 4 * people // 5], 2)  # the last fifth are strangers to both
    galleries = {
        x: People(100 + some, some // 2) for x, some in zip(GALLERIES[name], cuts, strict=True)
    }
    points = rng.uniform(0, 99, (len(rows), 5, 2)).astype(np.float32)
    protocol = IjbProtocol(
        tuple(f"{i}.jpg" for i in range(len(rows))), ids, media, points,
        rng.uniform(0.5, 1, len(rows)), 100 + first, 100 + second, first // 2 == second // 2,
        galleries, People(101 + half, half // 2), {},
    )  # fmt: skip
    return protocol, np.array(features, dtype=np.float32)[order]


def write_ijb(name: Name, folder: Path, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Ten people: the lists in `meta/`, and drawn faces larger, off centre, in `loose_crop/`."""
    protocol, features = make_ijb(name, seed, people=10)
    who = (protocol.templates - 100) // 2
    rng, taken = np.random.default_rng(seed), np.zeros(10, int)
    for place in ("meta", "loose_crop"):
        (folder / place).mkdir(parents=True)
    for row, person in enumerate(who):
        face = render(seed, int(person), int(taken[person]))
        taken[person] += 1
        scale, (left, top) = rng.uniform(1.2, 2), rng.integers(0, 60, 2)
        side = round(112 * scale)
        canvas = Image.new("RGB", (side + 80, side + 70), (90, 90, 90))
        picture = Image.fromarray(face.image).resize((side, side), Image.Resampling.BICUBIC)
        canvas.paste(picture, (int(left), int(top)))
        canvas.save(folder / "loose_crop" / protocol.names[row], quality=95)
        # pixel centres have whole coordinates, corners halves
        protocol.points[row] = (face.points5 + 0.5) * (side / 112) - 0.5 + (left, top)
    protocol.write(folder / "meta", name)
    return list(protocol.names), features


def write_pair_set(name: Listed, folder: Path, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """The people of `_twenty`, in the folders that the pictures of a set come in."""
    views, names = ("frontal", "profile"), list[str]()
    for person, sample in np.ndindex(2 * FOLDS, SAMPLES):
        if name in ANNOTATED:
            names.append(f"{name}_112x112/Person_{person:02d}_{sample + 1:04d}.jpg")
        elif name.startswith("cfp"):
            names.append(f"{person + 1:03d}/{views[sample // 2]}/{sample % 2 + 1:02d}.jpg")
        else:
            names.append(f"Person_{person:02d}_{sample + 1:04d}.jpg")
    pairs, pictures, features = _twenty(seed, 2 if name == "cfp_fp" else 1)  # 2 is a profile
    places = {"calfw": "aligned images/", "cplfw": "aligned images/"}
    place = "" if name in ANNOTATED else places.get(name, "Data/Images/")
    _save(folder / place, names, pictures)
    write_pairs(folder, name, PairList(tuple(names), pairs, {}))
    around = "Images/" if name.startswith("cfp") else place  # as `LoosePictures` calls them
    return [around + x for x in names], features


def write_lfw(folder: Path, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """The people of `_twenty`, in the folders that LFW is given out in, with its `pairs.txt`."""
    pairs, pictures, features = _twenty(seed)
    names = [
        f"Person_{person:02d}/Person_{person:02d}_{sample + 1:04d}.jpg"
        for person, sample in np.ndindex(2 * FOLDS, SAMPLES)
    ]
    _save(folder, names, pictures)
    first, second = (tuple(names[i] for i in side) for side in (pairs.first, pairs.second))
    (folder / "pairs.txt").write_text(format_pairs(first, second, pairs.same, pairs.fold))
    return names, features


def write_bin_set(folder: Path, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """The pairs of `_twenty`, fold by fold, in one of insightface's files, `pairs.bin`."""
    pairs, pictures, features = _twenty(seed)
    order = np.lexsort((~pairs.same, pairs.fold))
    rows = np.stack([pairs.first[order], pairs.second[order]], 1).ravel()
    folder.mkdir(parents=True, exist_ok=True)
    write_bin(folder / "pairs.bin", [pictures[row] for row in rows], pairs.same[order].tolist())
    return list(map(str, range(len(rows)))), features[rows]


def write_ytf(folder: Path, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Ten folds of two people with two videos each."""
    rng = np.random.default_rng(seed)
    rows, names = list[str](), list[str]()
    for fold in range(1, 11):
        a, b = (f"Person_{2 * fold + x:02d}" for x in range(2))
        for person in (a, b):
            rows.append(f"{fold}, {len(rows) + 1}, {person}/0, {person}/1, 1")
            names += [f"{person}/{video}/{frame}.jpg" for video, frame in np.ndindex(2, 3)]
        for x in range(2):
            rows.append(f"{fold}, {len(rows) + 1}, {a}/{x}, {b}/{x}, 0")
    people = np.repeat(np.arange(2 * FOLDS), 2 * 3)
    features = _embed(rng, rng.normal(size=(2 * FOLDS, D))[people])
    _save(folder / ALIGNED, names, _draw(seed, tuple(people.tolist())))
    titles = "split number, pair number, first name, second name, is same"
    (folder / "splits.txt").write_text("\n".join([titles, *rows]) + "\n")
    YtfProtocol.read(folder)
    return names, features


def _twenty(seed: int, second: int = 1) -> tuple[Pairs, list[bytes], np.ndarray]:
    """Return twenty people, two a fold, who have `SAMPLES` pictures each and are in four pairs.

    Args:
        seed: of faces and embeddings.
        second: which of a person's pictures is compared with the first one.

    Returns:
        Pairs, of which each person has one of each kind; pictures; embeddings.
    """
    rng, people = np.random.default_rng(seed), np.repeat(np.arange(2 * FOLDS), SAMPLES)
    first = SAMPLES * np.arange(2 * FOLDS)
    others = first.reshape(-1, 2)[:, ::-1].ravel()  # of the same fold
    pairs = Pairs(
        np.tile(first, 2),
        np.concatenate([first, others]) + second,
        np.repeat([True, False], len(first)),
        np.tile(np.arange(2 * FOLDS) // 2, 2),
        None,
    )
    features = _embed(rng, rng.normal(size=(2 * FOLDS, D))[people])
    return pairs, _draw(seed, tuple(people.tolist())), features


def _embed(rng: np.random.Generator, directions: np.ndarray) -> np.ndarray:
    return (directions + NOISE * rng.normal(size=directions.shape)).astype(np.float32)


@lru_cache(maxsize=1)
def _draw(seed: int, people: tuple[int, ...]) -> list[bytes]:
    """Draw one more picture of somebody for each time that their number occurs."""
    taken, samples = dict.fromkeys(people, 0), []
    for person in people:
        samples.append(taken[person])
        taken[person] += 1
    return [_jpeg(Image.fromarray(face)) for face in render_many(seed, people, samples).image]


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _save(folder: Path, names: Iterable[str], pictures: Iterable[bytes]) -> None:
    for name, picture in zip(names, pictures, strict=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)


WRITERS: dict[str, Callable[[Path, int], tuple[list[str], np.ndarray]]] = {
    "lfw": write_lfw,
    **{name: partial(write_pair_set, name) for name in get_args(Listed) if name != "lfw"},
    "bin": write_bin_set,
    "ijba": write_ijba,
    **{name: partial(write_ijb, name) for name in get_args(Name)},
    "megaface": write_megaface,
    "ytf": write_ytf,
}


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
