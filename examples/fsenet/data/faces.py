"""What a run trains and tests on: drawn faces, or pictures that are read."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocols.bins import read_bin
from protocols.lfw import LfwProtocol
from protocols.lists import listing
from protocols.pairs import Pairs, draw_pairs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from data.archives import DamagedImage, Source
from data.batches import worker_errors
from data.damage import Damage
from data.decode import load_rgb
from data.images import IdentityFolder, IdentityPictures, decode_all, without_suffix
from data.pictures import enough_images, open_pictures, open_sources, reader_of
from data.procedural import DRAWERS, ProceduralFaces

TEST_FROM = 1_000_000  # drawn identities from here on are never trained on
SIZE = 112  # of every picture, drawn or read; networks and report count on it
IN_MEMORY = 50_000  # pictures; at 112x112 that is 1.9 GB, and more are streamed
MAX_TESTED = 500  # people of a folder or zip; their pictures are held in memory always


@dataclass(frozen=True)
class DrawnFaces:
    """Rendered pictures: images `n 3 h w` and label maps `n h w` (uint8), identities `n`."""

    images: Tensor
    labels: Tensor
    identities: Tensor


@dataclass(frozen=True)
class TestSet:
    """Pictures of people that no training saw, and the pairs to verify.

    Args:
        decode: returns the pictures, uint8 `m 3 h w`.
        names: of the pictures.
        pairs: of pictures.
        flags: name, options and hashes of the protocol, for metrics.json.
        lfw: LFW's lists, when these are its held-out folds: all pairs of pictures count there.
    """

    decode: Callable[[], Tensor]
    names: tuple[str, ...]
    pairs: Pairs
    flags: dict[str, Any]
    lfw: LfwProtocol | None = None

    @property
    def size(self) -> str:
        """How many pictures of how many people these are, in words."""
        who = self.pairs.identities
        people = "" if who is None else f" of {len(np.unique(who))} people"
        return f"{len(self.names)} pictures{people}"

    @cached_property
    def images(self) -> Tensor:
        """The pictures, which are decoded or drawn when somebody first asks for them."""
        return self.decode()


@dataclass(frozen=True)
class TrainingSet:
    """Pictures to train on.

    Args:
        dataset: items (image uint8 3 h w, identity, index).
        images: all of them `n 3 h w`, or None when they are streamed.
        num_identities: people.
        damage: what was left out of pictures that were read.
        fingerprint: of pictures that were read; of drawn ones the options say all.
    """

    dataset: Dataset[tuple[Tensor, ...]]
    images: Tensor | None
    num_identities: int
    damage: Damage = field(default_factory=Damage)
    fingerprint: str | None = None

    @property
    def size(self) -> str:
        """How many pictures of how many people these are, in words."""
        count = len(self.dataset)  # type: ignore[arg-type]
        return f"{count} pictures of {self.num_identities} people"


def draw_faces(seed: int, identities: range, samples: int, workers: int = DRAWERS) -> DrawnFaces:
    """Render `samples` pictures of each of `identities`, in order.

    Raises:
        ValueError: a face cannot be drawn.
    """
    faces = ProceduralFaces(seed, len(identities), samples, first_identity=identities.start)
    pieces = []
    bar = tqdm(total=len(faces), desc="drawing", unit="face", mininterval=1.0)
    with worker_errors(), bar:
        for batch in DataLoader(faces, batch_size=25, num_workers=workers):
            pieces.append((batch["image"], batch["labels"]))
            bar.update(len(batch["image"]))
    images, labels = (torch.cat(column) for column in zip(*pieces, strict=True))
    return DrawnFaces(images, labels, torch.arange(len(identities)).repeat_interleave(samples))


def drawn_sets(train: DrawnFaces, test: DrawnFaces, seed: int) -> tuple[TrainingSet, TestSet]:
    """Train on some drawn people, verify others in ten folds."""
    return in_memory(train.images, train.identities), drawn_test_set(test, seed)


def drawn_test_set(faces: DrawnFaces, seed: int) -> TestSet:
    """Pair drawn people in ten folds of 300 pairs, or fewer where there are not as many."""
    people = int(faces.identities.max()) + 1
    return _drawn_test_set(lambda: faces.images, people, len(faces.identities) // people, seed)


def undrawn_test_set(seed: int, people: int, samples: int) -> TestSet:
    """Return the same before anything is drawn: pairs and names do not depend on the pictures."""
    tested = range(TEST_FROM, TEST_FROM + people)
    return _drawn_test_set(lambda: draw_faces(seed, tested, samples).images, people, samples, seed)


def picture_sets(
    paths: Sequence[Path], seed: int, min_images: int = 1, damaged: int = 0
) -> tuple[TrainingSet, TestSet]:
    """Train on some people of one or several sources of pictures, and verify others.

    Pictures are faces brought to the recognition template; square ones of another size than 112
    are resized, others count as damaged.

    A set that brings LFW's lists is split by them: folds 0 to 7 and people of no fold train,
    folds 8 and 9 test. Of any other set a tenth of the people with two pictures or more test, at
    least 60 and at most `MAX_TESTED`. People with fewer than `min_images` pictures do not train.

    Up to `damaged` pictures may be. Of those that are held in memory they are left out; when
    pictures are streamed, the next one of the set stands in, so that batches have their size.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: there are no pictures sorted by person, too few people, too many damaged
            pictures, or not those of LFW's lists.
    """
    damage = Damage(damaged)
    everybody = open_sources(paths, SIZE, damage)
    if isinstance(everybody, IdentityFolder) and "pairs.txt" in everybody.source:
        protocol = LfwProtocol.read(*paths)
        test = lfw_test_set(*paths, protocol, (8, 9))
        train = everybody.keep(protocol.train_identities((8, 9)))
    else:
        train, tested = _hold_out(everybody, seed)
        tested, decoded = decode_all(tested)
        pairs = draw_pairs(tested.labels, 300, seed)
        flags = {"name": "held-out identities", "seed": seed, "folds": 10}
        flags |= {"identities": len(tested.identities), "pairs": len(pairs.same)}
        test = TestSet(lambda: decoded, tested.paths, pairs, flags)
    train = enough_images(train, min_images)
    fingerprint = train.fingerprint()
    if len(train) <= IN_MEMORY:
        train, images = decode_all(train)
        held = in_memory(images, torch.from_numpy(train.labels))
        return replace(held, damage=damage, fingerprint=fingerprint), test
    streamed = _Streamed(train)
    return TrainingSet(streamed, None, len(train.identities), damage, fingerprint), test


def is_lfw(paths: Sequence[Path]) -> bool:
    """Return whether this is one set, which brings LFW's lists.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no set of pictures, or a damaged archive.
    """
    if len(paths) != 1 or reader_of(paths[0]) is not IdentityFolder:
        return False
    if paths[0].is_dir():  # which may hold millions of files
        return (paths[0] / "pairs.txt").is_file()
    return "pairs.txt" in Source(paths[0], lambda _: None)  # damage is the reader's matter


def lfw_test_set(path: Path, protocol: LfwProtocol, folds: Sequence[int]) -> TestSet:
    """Return the pairs of some of LFW's folds, and all pictures of their people.

    The lists name JPEGs; the pictures may be of another format.
    """
    paths = protocol.test_paths(folds)
    people = {name.split("/")[0] for name in paths}
    pictures = open_pictures(path, people, SIZE, Damage(None))
    row = {without_suffix(name): number for number, name in enumerate(pictures.paths)}
    index = protocol.held_out(folds)
    sides = [[without_suffix(side[i]) for i in index] for side in (protocol.first, protocol.second)]
    if missing := sorted({name for side in sides for name in side} - set(row)):
        raise ValueError(
            f"{path} lacks {len(missing)} of the pictures that the pairs name: {listing(missing)}"
        )
    first, second = (np.array([row[name] for name in side]) for side in sides)
    pairs = Pairs(first, second, protocol.same[index], protocol.fold[index], pictures.labels)
    flags: dict[str, Any] = {
        "name": "lfw",
        "test_folds": list(folds),
        "list_sha256": protocol.hashes,
    }
    published = set(folds) == set(protocol.fold.tolist())
    flags |= {"pairs": len(index), "comparable_with_published": published}
    # all pairs of all of LFW's pictures are too many; of two folds they are 3.6 million
    lists = None if published else protocol
    return TestSet(lambda: decode_all(pictures)[1], pictures.paths, pairs, flags, lists)


def bin_test_set(path: Path) -> TestSet:
    """Return the pairs of a `.bin`; its pictures are faces of 112 x 112.

    Raises:
        ValueError: see `read_bin`; or later, a picture is damaged or of another size.
    """
    found = read_bin(path)
    flags = {"name": "bin", "file": path.name, "sha256": found.sha256, "folds": 10}
    flags |= {"pairs": len(found.same)}
    names = tuple(map(str, range(len(found.pictures))))
    return TestSet(lambda: _decode_bin(path, found.pictures), names, found.pairs(), flags)


def in_memory(images: Tensor, identities: Tensor) -> TrainingSet:
    """Return a training set of pictures that are there already."""
    dataset = TensorDataset(images, identities, torch.arange(len(images)))
    return TrainingSet(dataset, images, int(identities.max()) + 1)


class _Streamed(Dataset[tuple[Tensor, ...]]):
    """Decode each picture when it is asked for; for a damaged one the next stands in."""

    def __init__(self, folder: IdentityPictures) -> None:
        self.folder, self.pieces = folder, folder.pieces
        folder.damage.share(len(folder))

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        for place in chain(range(index, len(self)), range(index)):
            try:
                image, identity = self.folder[place]
            except DamagedImage as error:
                self.folder.damage.add(error, place)
            else:
                return image, torch.tensor(identity), torch.tensor(place)
        raise ValueError(f"{self.folder.path} holds no picture that can be decoded")


def _drawn_test_set(images: Callable[[], Tensor], people: int, samples: int, seed: int) -> TestSet:
    pairs = draw_pairs(np.arange(people).repeat(samples), 300, seed)
    flags = {"name": "procedural", "seed": seed, "identities": people, "samples": samples}
    names = tuple(f"{TEST_FROM + i}/{j}" for i in range(people) for j in range(samples))
    return TestSet(images, names, pairs, {**flags, "folds": 10, "pairs": len(pairs.same)})


def _decode_bin(path: Path, pictures: Sequence[bytes]) -> Tensor:
    images = np.empty((len(pictures), SIZE, SIZE, 3), dtype=np.uint8)
    for index, data in enumerate(tqdm(pictures, desc="decoding", unit="picture")):
        picture = load_rgb(data, f"{path}: picture {index}")
        if picture.shape != images.shape[1:]:
            raise ValueError(
                f"{path}: picture {index} is {picture.shape[1]}x{picture.shape[0]}, not "
                f"{SIZE}x{SIZE}: align the faces first (docs/how-to/alignment.md)"
            )
        images[index] = picture
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _hold_out(everybody: IdentityPictures, seed: int) -> tuple[IdentityPictures, IdentityPictures]:
    names = np.array(everybody.identities)
    several = names[np.bincount(everybody.labels, minlength=len(names)) >= 2]
    count = min(max(60, len(several) // 10), MAX_TESTED)
    if len(several) < count or len(names) < 2 * count:
        raise ValueError(
            f"{everybody.path} has {len(names)} identities, {len(several)} of them with two "
            f"pictures or more: testing needs {count} of these, and as many others to train on"
        )
    tested = set(np.random.default_rng(seed).choice(several, count, replace=False).tolist())
    others = set(names.tolist()) - tested
    return everybody.keep(others), everybody.keep(tested)
