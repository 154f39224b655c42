"""Labeled Faces in the Wild, View 2: 6,000 pairs in ten folds that share no person.

Its ten folds are for embeddings that were trained elsewhere, and are counted as those of any other
pairs (`rates.py`). Held out is for networks that were trained inside LFW on the people of the other
folds: such numbers are not comparable with published 99 % results, and every report says so.

Source: Huang, Ramesh, Berg, Learned-Miller, UMass Amherst TR 07-49 (2007).
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data.archives import Source
from jaxtyping import Bool, Float, Int, Shaped

from partlocal.evaluation import auc, auc_interval, ten_fold_accuracy
from protocols.directions import check_directions
from protocols.lfw_lists import count_pictures, owner_of, parse_identities, parse_pairs, stem_of
from protocols.lists import listing

MAX_ALL_PAIRS = 2 * 10**7  # 2 GB of working memory for the AUC over all pairs of pictures


@dataclass(frozen=True, eq=False)  # arrays have no single truth
class LfwProtocol:
    """The pairs, who is in which fold, and hashes of the lists that say so.

    Args:
        first: picture of each pair, as `Name/Name_0001.jpg`.
        second: the other picture.
        same: whether both show one person.
        fold: of each pair, from 0.
        identity_fold: fold of each person, -1 for people in no pair.
        identity_images: number of pictures of each person.
        hashes: sha256 of each list file that was there.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    same: Bool[np.ndarray, " p"]
    fold: Int[np.ndarray, " p"]
    identity_fold: dict[str, int]
    identity_images: dict[str, int]
    hashes: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "LfwProtocol":
        """Read `pairs.txt` at the top of a folder or zip, and whose pictures lie there.

        People and their folds are those of `identity_folds.txt` beside it; without it, as LFW is
        given out, folds are those of the pairs, and people those whose pictures lie there.

        Raises:
            FileNotFoundError: the folder, the zip or a list is not there.
            ValueError: a line is not as it should be; the message names list and line. Or pictures
                are missing; it names all.
        """
        source = Source(path)
        if "pairs.txt" not in source:
            raise FileNotFoundError(f"{path} holds no pairs.txt at its top: it is not LFW's")
        texts, hashes = {}, {}
        for name in ("pairs.txt", "identity_folds.txt"):
            if name in source:
                data = source.read(name)
                hashes[name] = hashlib.sha256(data).hexdigest()
                texts[name] = data.decode("utf-8", errors="replace").splitlines()
        first, second, same, fold = parse_pairs(texts["pairs.txt"])
        if "identity_folds.txt" in texts:
            folds, images = parse_identities(texts["identity_folds.txt"])
            said = "identity_folds.txt puts"
        else:
            images = count_pictures(source, first + second)
            folds = dict.fromkeys(images, -1)
            folds |= {
                owner_of(a): number for a, number in zip(first + second, fold * 2, strict=True)
            }
            said = "pairs.txt itself puts"
        protocol = cls(first, second, np.array(same), np.array(fold), folds, images, hashes)
        for number, (a, b) in enumerate(zip(first, second, strict=True)):
            for person in (owner_of(a), owner_of(b)):
                if folds.get(person) != fold[number]:
                    raise ValueError(
                        f"{said} {person} in fold {folds.get(person)}, but pairs.txt has them in "
                        f"fold {fold[number]}: the lists do not belong together"
                    )
        return protocol

    def train_identities(self, test_folds: Sequence[int] = (8, 9)) -> tuple[str, ...]:
        """Return the people of all other folds and of no fold, sorted."""
        self._check_folds(test_folds)
        return tuple(sorted(p for p, fold in self.identity_fold.items() if fold not in test_folds))

    def test_paths(self, folds: Sequence[int] = (8, 9)) -> tuple[str, ...]:
        """Return all pictures of the people of these folds, in pairs or not, sorted."""
        self._check_folds(folds)
        return tuple(
            f"{person}/{person}_{number:04d}.jpg"
            for person in sorted(p for p, fold in self.identity_fold.items() if fold in folds)
            for number in range(1, self.identity_images[person] + 1)
        )

    def held_out(self, test_folds: Sequence[int] = (8, 9)) -> Int[np.ndarray, " q"]:
        """Return which pairs lie in these folds."""
        self._check_folds(test_folds)
        return np.flatnonzero(np.isin(self.fold, test_folds))

    def scores(
        self,
        names: Sequence[str],
        embeddings: Float[np.ndarray, "n d"],
        index: Int[np.ndarray, " q"] | None = None,
    ) -> Float[np.ndarray, " q"]:
        """Return the cosine of each pair.

        Args:
            names: of the pictures; folders and suffix do not matter (`Name_0001` is enough).
            embeddings: one row a name, of any length but zero.
            index: which pairs; None for all.

        Raises:
            ValueError: names repeat or a picture of the pairs has none, or embeddings are not
                finite or are zero.
        """
        pairs = np.arange(len(self.same)) if index is None else index
        rows = _rows(names, embeddings)
        unit = _unit(names, embeddings)
        a = _find(rows, [self.first[i] for i in pairs])
        b = _find(rows, [self.second[i] for i in pairs])
        return np.einsum("qd,qd->q", unit[a], unit[b])

    def evaluate_held_out(
        self,
        names: Sequence[str],
        embeddings: Float[np.ndarray, "n d"],
        test_folds: Sequence[int] = (8, 9),
        resamples: int = 400,
    ) -> dict[str, Any]:
        """Score a network that was trained on `train_identities(test_folds)`.

        Args:
            names: of all pictures of the people of `test_folds` (`test_paths`), at least.
            embeddings: one row a name.
            test_folds: folds whose people were not trained on; each is judged at the threshold of
                the others.
            resamples: of the identity bootstrap around the AUC over all pairs of pictures.

        Raises:
            ValueError: see `scores`; or too many pictures for all their pairs.
        """
        index = self.held_out(test_folds)
        scores, same = self.scores(names, embeddings, index), self.same[index]
        result = ten_fold_accuracy(scores, same, self.fold[index])
        accuracy = float(result.correct.mean())
        return {
            "protocol": "lfw-held-out-folds",
            "comparable_with_published": False,
            "note": "trained inside LFW on the people of the other folds: not comparable with "
            "published results, which train on millions of outside pictures",
            "test_folds": [int(fold) for fold in test_folds],
            "train": "people of all other folds and of no fold",
            "similarity": "cosine",
            "threshold": "best on the other test folds",
            "pairs": len(scores),
            "accuracy": accuracy,
            "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / len(scores))),
            "fold_accuracies": result.accuracies.tolist(),
            "fold_thresholds": result.thresholds.tolist(),
            "auc": auc(scores, same),
            **self.evaluate_all_pairs(names, embeddings, test_folds, resamples),
            "list_sha256": self.hashes,
        }

    def evaluate_all_pairs(
        self,
        names: Sequence[str],
        embeddings: Float[np.ndarray, "n d"],
        test_folds: Sequence[int] = (8, 9),
        resamples: int = 400,
    ) -> dict[str, Any]:
        """Return the AUC over all pairs of pictures of the people of some folds.

        Args, Raises: see `evaluate_held_out`.
        """
        paths = self.test_paths(test_folds)
        scores, identities = self._all_pairs(names, embeddings, paths)
        same = identities[:, 0] == identities[:, 1]
        return {
            "auc_all_pairs": auc(scores, same),
            "auc_all_pairs_interval95": list(auc_interval(scores, identities, resamples)),
            "all_pairs": len(scores),
            "all_pairs_genuine": int(same.sum()),
            "all_pairs_pictures": len(paths),
        }

    def _all_pairs(
        self, names: Sequence[str], embeddings: np.ndarray, paths: Sequence[str]
    ) -> tuple[Float[np.ndarray, " q"], Int[np.ndarray, "q 2"]]:
        count = len(paths) * (len(paths) - 1) // 2
        if count > MAX_ALL_PAIRS:
            raise ValueError(
                f"test_folds hold {len(paths)} pictures, {count} pairs, more than {MAX_ALL_PAIRS}: "
                "name fewer folds"
            )
        unit = _unit(names, embeddings)[_find(_rows(names, embeddings), paths)]
        people = [owner_of(path) for path in paths]
        _, person = np.unique(people, return_inverse=True)
        scores = np.empty(count)
        identities = np.empty((count, 2), dtype=np.int32)
        at = 0
        for row in range(len(paths) - 1):
            rest = len(paths) - 1 - row
            scores[at : at + rest] = unit[row + 1 :] @ unit[row]
            identities[at : at + rest, 0] = person[row]
            identities[at : at + rest, 1] = person[row + 1 :]
            at += rest
        return scores, identities

    def _check_folds(self, folds: Sequence[int]) -> None:
        there = sorted(set(self.fold.tolist()))
        if not folds or not set(folds) <= set(there):
            raise ValueError(f"folds must be among {there}; got {list(folds)}")


def _rows(names: Sequence[str], embeddings: Shaped[np.ndarray, "n d"]) -> dict[str, int]:
    if np.ndim(embeddings) != 2 or len(names) != len(embeddings):
        raise ValueError(
            f"embeddings must be [n, d] with n = {len(names)} (as names); "
            f"got {list(np.shape(embeddings))}"
        )
    rows: dict[str, int] = {}
    for row, name in enumerate(names):
        if rows.setdefault(stem_of(str(name)), row) != row:
            raise ValueError(f"names must be different pictures; got {name!r} twice")
    return rows


def _unit(names: Sequence[str], embeddings: np.ndarray) -> Float[np.ndarray, "n d"]:
    vectors = np.asarray(embeddings, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    check_directions(norms[:, 0], lambda bad: [names[row] for row in bad], "embeddings")
    return vectors / norms


def _find(rows: dict[str, int], paths: Iterable[str]) -> Int[np.ndarray, " n"]:
    wanted = [stem_of(path) for path in paths]
    missing = sorted({name for name in wanted if name not in rows})
    if missing:
        raise ValueError(
            f"names lack {len(missing)} pictures of the protocol, embed all pictures of the test "
            f"folds: {listing(missing)}"
        )
    return np.array([rows[name] for name in wanted])
