"""IJB-A: sets of pictures, compared with each other and looked for in a gallery, in ten splits.

The lists are those that NIST gave out, CSV with a line of titles but for the comparisons:
`IJB-A_11_sets/split1/verify_metadata_1.csv` and `verify_comparisons_1.csv` (two templates a line),
and `IJB-A_1N_sets/split1/search_gallery_1.csv` and `search_probe_1.csv`. A face is a line there,
with TEMPLATE_ID, SUBJECT_ID, FILE, MEDIA_ID and SIGHTING_ID. Its embedding is called by its FILE
(`img/123.jpg`), or by FILE#SIGHTING_ID, which tells apart two people in one picture.

Faces without an embedding are left out and counted. A template that is left with none is empty: its
pairs score below all others, and as a probe it finds nobody and alarms nobody.

Source: Klare and others, CVPR 2015; the way of counting that is called `parity` is that of Shi and
Jain, ICCV 2019: the mean of a template's faces, and as many false accepts as come nearest.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from data.images import without_suffix
from jaxtyping import Int

from partlocal.evaluation import Standings, standings, tar_above_impostors
from partlocal.evaluation.search import Vectors
from protocols.lists import ListFiles, listing
from protocols.rates import IMPOSTOR_MODES, named
from protocols.templates import pair_scores, template_subjects, template_vectors

FARS = (1e-3, 1e-2, 1e-1)
FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 10)
EMPTY = -9999.0  # the score of a template without a face, as the peers have it
_COLUMNS = ("TEMPLATE_ID", "SUBJECT_ID", "FILE", "MEDIA_ID", "SIGHTING_ID")
Pooling = Literal["faces", "media"]


class Faces(NamedTuple):
    """The lines of a list; n faces.

    Args:
        templates: of each face.
        subjects: whom it shows.
        files: of its picture.
        media: it comes from.
        sightings: one for each person in a picture or a shot.
    """

    templates: Int[np.ndarray, " n"]
    subjects: Int[np.ndarray, " n"]
    files: tuple[str, ...]
    media: Int[np.ndarray, " n"]
    sightings: Int[np.ndarray, " n"]


@dataclass(frozen=True, eq=False)
class Split:
    """One of the ten.

    Args:
        faces: of the templates that are compared.
        first: template of each pair.
        second: the other.
        gallery: faces of the templates that are enrolled.
        probes: faces of those that are looked for.
    """

    faces: Faces
    first: Int[np.ndarray, " p"]
    second: Int[np.ndarray, " p"]
    gallery: Faces
    probes: Faces


@dataclass(frozen=True, eq=False)
class IjbaProtocol:
    """The lists of all splits, in order, and their hashes."""

    splits: dict[int, Split]
    hashes: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "IjbaProtocol":
        """Read the lists in a folder, zip or tar, wherever they lie in it.

        Raises:
            FileNotFoundError: there are none, or one of a split is missing, or a split before one
                that is there.
            ValueError: a line is not as it should be.
        """
        lists = _Lists(path)
        splits = {}
        for n in range(1, 11):
            if f"verify_metadata_{n}.csv" in lists:
                faces = lists.faces(f"verify_metadata_{n}.csv")
                pairs = lists.pairs(f"verify_comparisons_{n}.csv", set(faces.templates.tolist()))
                gallery = lists.faces(f"search_gallery_{n}.csv")
                probes = lists.faces(f"search_probe_{n}.csv")
                splits[n] = Split(faces, pairs[:, 0], pairs[:, 1], gallery, probes)
        if not splits:
            raise FileNotFoundError(f"{path} holds no verify_metadata_1.csv nor other lists")
        if missing := sorted(set(range(1, max(splits) + 1)) - set(splits)):
            raise FileNotFoundError(f"{path} lacks the lists of splits {listing(missing)}")
        return cls(splits, lists.hashes)

    def write(self, folder: str | Path) -> None:
        """Write the lists in the layout that they were given out in."""
        for n, split in self.splits.items():
            one, many = (Path(folder) / f"IJB-A_{x}_sets/split{n}" for x in ("11", "1N"))
            for place in (one, many):
                place.mkdir(parents=True, exist_ok=True)
            files = {
                one / f"verify_metadata_{n}.csv": split.faces,
                many / f"search_gallery_{n}.csv": split.gallery,
                many / f"search_probe_{n}.csv": split.probes,
            }
            for path, faces in files.items():
                rows = zip(*faces, strict=True)
                path.write_text("\n".join(",".join(map(str, row)) for row in [_COLUMNS, *rows]))
            pairs = zip(split.first, split.second, strict=True)
            path = one / f"verify_comparisons_{n}.csv"
            path.write_text("\n".join(f"{a},{b}" for a, b in pairs))

    @property
    def names(self) -> tuple[str, ...]:
        """Both names of each face of all splits, each name once."""
        found: dict[str, None] = {}
        for split in self.splits.values():
            for faces in (split.faces, split.gallery, split.probes):
                for file, sighting in zip(faces.files, faces.sightings.tolist(), strict=True):
                    found[file] = found[f"{file}#{sighting}"] = None
        return tuple(found)

    def evaluate(
        self,
        rows: dict[str, int],
        features: Vectors,
        unit: bool = False,
        pooling: Pooling = "faces",
    ) -> dict[str, Any]:
        """Return all rates of each split, and their mean and deviation.

        Args:
            rows: of `features`, by name; -1, or no entry, where there is no embedding.
            features: one row a picture, of any length.
            unit: bring each to length 1 first.
            pooling: a template is the mean of its `faces`, or of the means of its `media`.

        Raises:
            ValueError: a picture of several people has one embedding, a face has two, or see
                `template_vectors`.
        """
        self._check_names(rows)
        found = [_split(split, rows, features, unit, pooling) for split in self.splits.values()]
        counted = ("pairs", "empty_templates", "faces_without_embedding")
        numbers = [{k: v for k, v in one.items() if k not in counted} for one in found]
        return {
            "mean": _combine(numbers, np.mean),
            "std": _combine(numbers, lambda x: np.std(x, ddof=1) if len(x) > 1 else np.nan),
            "splits": dict(zip(map(str, self.splits), found, strict=True)),
        }

    def _check_names(self, rows: dict[str, int]) -> None:
        """Refuse to take the embedding of one person for that of another, or one of two."""
        seen: dict[str, int] = {}
        twice: dict[tuple[str, str], None] = {}
        for split in self.splits.values():
            for faces in (split.faces, split.gallery, split.probes):
                for file, sighting in zip(faces.files, faces.sightings.tolist(), strict=True):
                    shared = seen.setdefault(file, sighting) != sighting
                    if shared and rows.get(file, -1) >= 0:
                        raise ValueError(
                            f"{file} shows several people: name their embeddings {file}#{sighting} "
                            f"and {file}#{seen[file]}, after their SIGHTING_ID, and none {file}"
                        )
                    names = (file, f"{file}#{sighting}")
                    own = {rows.get(name, -1) for name in names}
                    if len(own) == 2 and min(own) >= 0:
                        twice[names] = None
        refuse_two(list(twice), "features")


def refuse_two(faces: Sequence[tuple[str, str]], where: str) -> None:
    """Refuse embeddings of one face under two names.

    Args:
        faces: both names of each that has two.
        where: they lie.

    Raises:
        ValueError: there are such faces; all are named.
    """
    if both := [f"{one} and {other}" for one, other in faces]:
        raise ValueError(
            f"{where}: {len(both)} faces have two embeddings, keep one of each: {listing(both)}"
        )


def picture_of(name: str) -> str:
    """Return the path of the picture that FILE or FILE#SIGHTING_ID calls, one a face.

    >>> picture_of("img/1.jpg"), picture_of("img/1.jpg#55")
    ('img/1.jpg', 'img/1#55')
    """
    file, mark, sighting = name.rpartition("#")
    return f"{without_suffix(file)}#{sighting}" if mark and sighting.isdigit() else name


def _split(
    split: Split, rows: dict[str, int], features: Vectors, unit: bool, pooling: Pooling
) -> dict[str, Any]:
    def described(faces: Faces) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Return templates, subjects, vectors (zero: empty), and how many faces are missing."""
        row = np.array([
            max(rows.get(file, -1), rows.get(f"{file}#{sighting}", -1))
            for file, sighting in zip(faces.files, faces.sightings.tolist(), strict=True)
        ])  # fmt: skip
        ids, where = np.unique(faces.templates, return_index=True)
        vectors = np.zeros((len(ids), features.shape[1]), np.float32)
        there = row >= 0
        if there.any():
            media = faces.media[there] if pooling == "media" else np.zeros(there.sum(), int)
            chosen = np.asarray(features[row[there]])  # type: ignore[index]
            some, means = template_vectors(chosen, faces.templates[there], media, unit=unit)
            vectors[np.searchsorted(ids, some)] = means
        return ids, faces.subjects[where], vectors, int((~there).sum())

    ids, subjects, vectors, missing = described(split.faces)
    a, b = np.searchsorted(ids, split.first), np.searchsorted(ids, split.second)
    scores, same = pair_scores(vectors, a, b), subjects[a] == subjects[b]
    empty = ~vectors.any(1)
    scores[empty[a] | empty[b]] = EMPTY
    _, enrolled, entries, no_entry = described(split.gallery)
    _, wanted, probes, no_probe = described(split.probes)
    found = standings(*_with_empty(probes, entries), enrolled, wanted)
    result: dict[str, Any] = {
        "pairs": len(scores),
        "empty_templates": int(sum((~x.any(1)).sum() for x in (vectors, entries, probes))),
        "faces_without_embedding": missing + no_entry + no_probe,
    }
    for name, mode in IMPOSTOR_MODES:
        tar = tar_above_impostors(scores[same], scores[~same], np.array(FARS), mode)
        tpir = found.tpir_at_fpir(np.array(FPIRS), mode)
        result.setdefault("tar_at_far", {})[name] = named(FARS, tar)
        result.setdefault("tpir_at_fpir", {})[name] = named(FPIRS, tpir)
    return result | {"rank": named(RANKS, _ranks(found))}


def _with_empty(probes: np.ndarray, entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add numbers to both by which an empty one scores `EMPTY` with everybody, or less."""
    no_probe, no_entry = ~probes.any(1)[:, None], ~entries.any(1)[:, None]
    more = (np.where(no_probe, EMPTY, 0), np.ones_like(no_probe))
    less = (np.ones_like(no_entry), np.where(no_entry, EMPTY, 0))
    return (
        np.concatenate([probes, *more], 1).astype(np.float32),
        np.concatenate([entries, *less], 1).astype(np.float32),
    )


def _ranks(found: Standings) -> np.ndarray:
    ranks = np.minimum(RANKS, found.entries)
    return np.asarray(found.of(found.mated).rank_k(ranks))


def _combine(found: list[Any], combine: Any) -> Any:
    if isinstance(found[0], dict):
        return {key: _combine([one[key] for one in found], combine) for key in found[0]}
    return float(combine(found))


class _Lists(ListFiles):
    def rows(self, file: str) -> list[list[str]]:
        return [row for row in csv.reader(self.text(file).splitlines()) if row]

    def faces(self, file: str) -> Faces:
        titles, *rows = self.rows(file) or [[]]
        titles = [title.strip() for title in titles]
        if lacking := [name for name in _COLUMNS if name not in titles]:
            raise ValueError(
                f"{self.source.path}: {file} must begin with a line of titles, among them "
                f"{lacking[0]}; got {','.join(titles)[:80]!r}"
            )
        columns = [titles.index(name) for name in _COLUMNS]
        try:
            template, subject, files, media, sighting = zip(
                *([row[column].strip() for column in columns] for row in rows), strict=True
            )
            numbers = (np.array(x, dtype=np.int64) for x in (template, subject, media, sighting))
            templates, subjects, medium, sightings = numbers
        except (ValueError, IndexError, OverflowError) as error:
            raise ValueError(
                f"{self.source.path}: {file} must hold a face a line, whole numbers but for its "
                f"FILE ({error})"
            ) from None
        found = Faces(templates, subjects, files, medium, sightings)
        try:
            template_subjects(templates, subjects)
        except ValueError as error:
            raise ValueError(f"{self.source.path}: {file} has {error}") from None
        return found

    def pairs(self, file: str, templates: set[int]) -> Int[np.ndarray, "p 2"]:
        try:
            pairs = np.array(self.rows(file), dtype=np.int64).reshape(-1, 2)
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{self.source.path}: {file} must hold two templates a line ({error})"
            ) from None
        if missing := sorted(set(pairs.ravel().tolist()) - templates):
            raise ValueError(
                f"{self.source.path}: {file} names {len(missing)} templates without a "
                f"face, the lists do not belong together: {listing(missing)}"
            )
        return pairs
