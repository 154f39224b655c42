"""MegaFace: is a person found among a million strangers?

Of every person of FaceScrub each ordered pair of pictures counts: one is looked for, the other is
put among the distractors. It is found at rank k if fewer than k distractors are ahead of it.
Verification: every such pair is genuine, and every picture with every distractor an impostor pair.

The lists are those of the devkit, `facescrub_features_list.json` (paths and ids) and
`megaface_features_list.json_{size}_{set}` (paths); wrong pictures are named in
`facescrub_noises.txt` and `megaface_noises.txt`, and cleaning means one of:

- `none`: nothing.
- `leave_out`: they take no part.
- `insightface`: a wrong picture of FaceScrub becomes the sum of its person's others, moved by up to
  0.001 at random, so that its pairs are easier than anybody's; a wrong distractor is moved so far
  away that it is never found, and still counts among the impostors.
- `facex`: the sum without the random move; a wrong distractor becomes a vector of zeros, which is
  ahead of whatever scores below 0.

Source: Kemelmacher-Shlizerman and others, CVPR 2016.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from tqdm import tqdm

from partlocal.evaluation import Highest, Nearest, score_blocks, tar_above_impostors
from partlocal.evaluation.search import Vectors
from protocols.directions import check_directions
from protocols.megaface_lists import DISTRACTORS, MegafaceLists
from protocols.rates import IMPOSTOR_MODES, named

Cleaning = Literal["none", "leave_out", "insightface", "facex"]
FARS = (1e-6, 1e-5, 1e-4)
RANKS = (1, 10, 100, 1000)
_POINTS = 1000  # of the ROC curve that is written


def search(
    vectors: Float[np.ndarray, "n d"], gallery: "Shown", impostors: int
) -> tuple[Nearest, Highest]:
    """Compare all probes with all distractors, and keep what the rates need.

    Args:
        vectors: of the probes, of length 1.
        gallery: the distractors.
        impostors: pairs of both that there are said to be.

    Returns:
        the best of each probe, and the highest of all scores.
    """
    nearest = Nearest(len(vectors), min(max(RANKS), gallery.shape[0]))
    highest = Highest(int(max(FARS) * impostors) + 1)
    bar = tqdm(total=gallery.shape[0], desc="searching", unit=" distractors", mininterval=1.0)
    with bar:
        for rows, columns, scores in score_blocks(vectors, gallery):
            nearest.add(rows, columns, scores)
            highest.add(scores)
            if rows.stop == len(vectors):
                bar.update(columns.stop - columns.start)
    return nearest, highest


class Curves(NamedTuple):
    """What the devkit's file of results holds."""

    cmc: list[Any]
    roc: list[Any]


@dataclass(frozen=True, eq=False)
class MegafaceProtocol:
    """The lists.

    Args:
        probes: paths of FaceScrub's pictures, `Person/picture.png`.
        people: whom each shows.
        distractors: paths of MegaFace's pictures, `a/b/picture.jpg`.
        noisy_probes: names of wrong pictures of FaceScrub, without their folder.
        noisy_distractors: paths of wrong pictures of MegaFace.
        hashes: sha256 of each list file.
    """

    probes: tuple[str, ...]
    people: Int[np.ndarray, " n"]
    distractors: tuple[str, ...]
    noisy_probes: frozenset[str]
    noisy_distractors: frozenset[str]
    hashes: dict[str, str]

    @classmethod
    def read(cls, path: str | Path, size: int = 10**6, number: int = 1) -> "MegafaceProtocol":
        """Read the lists anywhere in a folder, zip or tar; those of noises may lack.

        Args:
            path: where they lie.
            size: distractors.
            number: of the set of so many distractors.

        Raises:
            FileNotFoundError: a list is not there.
            ValueError: it is not as it should be.
        """
        lists = MegafaceLists(path)
        probes, who = lists.paths("facescrub_features_list.json")
        distractors, _ = lists.paths(lists.of_distractors(size, number))
        people = np.unique(who or [name.split("/")[0] for name in probes], return_inverse=True)[1]
        if len(distractors) != size:
            raise ValueError(f"{path}: the list of {size} distractors holds {len(distractors)}")
        if np.bincount(people).max() < 2:
            raise ValueError(f"{path}: nobody has two pictures in facescrub_features_list.json")
        noises = (lists.noises(f"{name}_noises.txt") for name in ("facescrub", "megaface"))
        return cls(probes, people, distractors, *noises, lists.hashes)

    def check_cleaning(self, path: str | Path, cleaning: Cleaning) -> None:
        """Refuse a cleaning for which the lists of noises lack, or name nothing that there is.

        Args:
            path: that the lists were read from.
            cleaning: what is asked for.

        Raises:
            FileNotFoundError: a list of noises is not there.
            ValueError: they name no picture of the other lists, or leave nothing to compare.
        """
        if cleaning == "none":
            return
        there = {place.rpartition("/")[2] for place in self.hashes}
        for file in ("facescrub_noises.txt", "megaface_noises.txt"):
            if file not in there:
                raise FileNotFoundError(
                    f"--megaface.cleaning {cleaning} needs {file}, and {path} holds none: add it, "
                    "or use --megaface.cleaning none"
                )
        if not self.wrong_probes().any() and not self.wrong_distractors().any():
            raise ValueError(
                f"--megaface.cleaning {cleaning}: the lists of noises in {path} name no picture of "
                "its other lists"
            )
        self._check_what_is_left(cleaning, f" in {path}")

    def _check_what_is_left(self, cleaning: Cleaning, place: str = "") -> None:
        pictures = np.bincount(self.people[~self.wrong_probes()], minlength=1).max()
        what = ""
        if cleaning in ("leave_out", "insightface") and self.wrong_distractors().all():
            what = "distractor"
        if cleaning == "leave_out" and pictures < 2:
            what = "person with two pictures"
        if what:
            raise ValueError(
                f"--megaface.cleaning {cleaning}: the lists of noises{place} leave no {what}: use "
                "another cleaning"
            )

    def wrong_probes(self) -> Bool[np.ndarray, " n"]:
        """Tell which pictures of FaceScrub are wrong."""
        return np.array([name.rpartition("/")[2] in self.noisy_probes for name in self.probes])

    def wrong_distractors(self) -> Bool[np.ndarray, " d"]:
        """Tell which distractors are wrong."""
        return np.array([name in self.noisy_distractors for name in self.distractors])

    def write(self, folder: str | Path, number: int = 1) -> None:
        """Write the lists as the devkit has them."""
        folder = Path(folder)
        (folder / "templatelists").mkdir(parents=True, exist_ok=True)
        lists = {
            "facescrub_features_list.json": {"id": self.people.tolist(), "path": self.probes},
            f"{DISTRACTORS}{len(self.distractors)}_{number}": {"path": self.distractors},
        }
        for name, content in lists.items():
            (folder / "templatelists" / name).write_text(json.dumps(content))
        for name, noises in (
            ("facescrub", self.noisy_probes),
            ("megaface", self.noisy_distractors),
        ):
            lines = ["# wrong pictures", *sorted(noises)]
            (folder / f"{name}_noises.txt").write_text("\n".join(lines) + "\n")

    def evaluate(
        self, probes: Vectors, distractors: Vectors, cleaning: Cleaning = "none", seed: int = 0
    ) -> tuple[dict[str, Any], Curves]:
        """Return all rates, and the curves of the devkit's file.

        `strict` counts a distractor with the same score as ahead and accepts no more impostors than
        asked for; `parity` counts it as behind, and accepts as many as come nearest.

        Args:
            probes: a row a picture of FaceScrub, in the lists' order, of any length but zero.
            distractors: a row a distractor; read a block at a time.
            cleaning: see above.
            seed: of insightface's random moves.

        Raises:
            ValueError: numbers of rows and names differ, a vector is zero or not finite, or
                cleaning leaves nothing to compare.
        """
        if len(probes) != len(self.probes) or len(distractors) != len(self.distractors):
            raise ValueError(
                f"there must be a row a picture, {len(self.probes)} and {len(self.distractors)}; "
                f"got {len(probes)} and {len(distractors)}"
            )
        vectors = _unit(
            np.asarray(probes[:], dtype=np.float32), "probes", np.arange(len(self.probes))
        )
        self._check_what_is_left(cleaning)
        wrong, bad = self.wrong_probes(), self.wrong_distractors()
        people = self.people
        if cleaning == "leave_out":
            vectors, people = vectors[~wrong], people[~wrong]
        elif cleaning != "none":
            jitter = 0.001 if cleaning == "insightface" else 0.0
            _replace(vectors, people, wrong, jitter, np.random.default_rng(seed))
        zeros = bad & (cleaning == "facex")
        shown = np.flatnonzero(~bad | (cleaning in ("none", "facex")))
        impostors = len(vectors) * (len(shown) if cleaning == "leave_out" else len(bad))

        kept = min(max(RANKS), len(shown))
        nearest, highest = search(vectors, Shown(distractors, shown, zeros), impostors)
        genuine, ahead, level = _pairs(vectors, people, nearest.scores)
        top = highest.scores()
        # A wrong distractor of insightface's is the last of all: below every score there is.
        top = np.append(top, np.full(max(0, highest.size - len(top)), np.float32(-2)))
        cmc = {
            mode: np.cumsum(np.bincount(places, minlength=kept + 1)[:kept]) / len(genuine)
            for mode, places in (("strict", ahead + level), ("parity", ahead))
        }
        found: dict[str, Any] = {
            "identities": len(np.unique(people)),
            "pairs": len(genuine),
            "distractors": len(shown) if cleaning == "leave_out" else len(bad),
            "impostor_pairs": impostors,
            "noisy": {"facescrub": int(wrong.sum()), "megaface": int(bad.sum())},
            "rank": {m: {str(k): float(x[k - 1]) for k in RANKS if k <= kept}
                     for m, x in cmc.items()},
            "tar_at_far": {},
        }  # fmt: skip
        for name, mode in IMPOSTOR_MODES:
            rates = tar_above_impostors(genuine, top, np.array(FARS), mode, impostors)
            found["tar_at_far"][name] = named(FARS, rates)
        curve = [list(range(kept)), cmc["parity"].tolist()]
        return found, Curves(curve, _roc(genuine, top, impostors))


class Shown:
    """Unit vectors of the distractors that take part, made a block at a time.

    Args:
        vectors: of all distractors, of any length but zero.
        index: of those that take part.
        zeros: whether each of all becomes a vector of zeros.
    """

    def __init__(self, vectors: Vectors, index: np.ndarray, zeros: np.ndarray) -> None:
        self.vectors, self.index, self.zeros = vectors, index, zeros
        self.shape = (len(index), vectors.shape[1])

    def __getitem__(self, rows: slice) -> np.ndarray:
        some = self.index[rows]
        block = _unit(np.asarray(self.vectors[some], dtype=np.float32), "distractors", some)
        block[self.zeros[some]] = 0
        return block


def _unit(vectors: np.ndarray, name: str, rows: np.ndarray) -> np.ndarray:
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    check_directions(lengths, lambda bad: [f"row {row}" for row in rows[bad]], name)
    return vectors / lengths[:, None]


def _replace(
    vectors: np.ndarray,
    people: np.ndarray,
    wrong: np.ndarray,
    jitter: float,
    rng: np.random.Generator,
) -> None:
    """Put in the place of wrong pictures the direction of their person's others."""
    totals = np.zeros((people.max() + 1, vectors.shape[1]), np.float32)
    np.add.at(totals, people[~wrong], vectors[~wrong])
    for row in np.flatnonzero(wrong):
        moved = totals[people[row]] + rng.uniform(-jitter, jitter, vectors.shape[1])
        length = np.linalg.norm(moved)
        if not totals[people[row]].any():
            raise ValueError(
                f"all pictures of person {people[row]} are wrong: use --megaface.cleaning leave_out"
            )
        vectors[row] = moved / length


def _pairs(
    vectors: np.ndarray, people: np.ndarray, best: Float[np.ndarray, "n k"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return of each ordered pair the score, and how many distractors are ahead, and level."""
    genuine, ahead, level = [], [], []
    rising = -best  # searchsorted wants it so
    order = np.argsort(people, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(people[order])) + 1):
        scores = vectors[rows] @ vectors[rows].T
        for column, probe in enumerate(rows):
            mates = np.delete(scores[:, column], column)
            before = np.searchsorted(rising[probe], -mates, side="left")
            genuine.append(mates)
            ahead.append(before)
            level.append(np.searchsorted(rising[probe], -mates, side="right") - before)
    return np.concatenate(genuine), np.concatenate(ahead), np.concatenate(level)


def _roc(genuine: np.ndarray, top: np.ndarray, impostors: int) -> list[Any]:
    places = np.geomspace(1, len(top), _POINTS).round().astype(int)
    asked = np.round(np.array(FARS) * impostors).astype(int)
    places = np.unique(np.append(places, asked[(asked > 0) & (asked <= len(top))]))
    ranked = np.sort(genuine)
    true = 1 - np.searchsorted(ranked, top[places - 1], side="left") / len(ranked)
    return [(places / impostors).tolist(), true.tolist()]
