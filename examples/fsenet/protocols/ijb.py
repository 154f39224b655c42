"""IJB-B and IJB-C: sets of pictures compared with each other, and looked for in two galleries.

The lists are those that insightface's evaluation reads: `ijbc_face_tid_mid.txt` (face, template,
medium), `ijbc_name_5pts_score.txt` (face, five points, the detector's score),
`ijbc_template_pair_label.txt`, and as CSV `ijbc_1N_gallery_G1`, `_G2` (IJB-B: `_S1`, `_S2`) and
`ijbc_1N_probe_mixed`.

Source: Whitelam and others, CVPR workshops 2017, and Maze and others, ICB 2018.
"""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from partlocal.evaluation import Highest, auc, score_blocks, standings
from protocols.lists import ListFiles, listing
from protocols.rates import MODES, named, tar_at_fars
from protocols.templates import pair_scores, template_subjects, template_vectors

Name = Literal["ijbb", "ijbc"]
GALLERIES: dict[str, tuple[str, str]] = {"ijbb": ("S1", "S2"), "ijbc": ("G1", "G2")}
FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
FPIRS = (1e-2, 1e-1)
RANKS = (1, 5, 10)


class People(NamedTuple):
    """Templates, and whom each shows."""

    templates: Int[np.ndarray, " t"]
    subjects: Int[np.ndarray, " t"]


@dataclass(frozen=True, eq=False)
class IjbProtocol:
    """The lists of IJB-B or IJB-C.

    Args:
        names: of the faces.
        templates: of each face.
        media: of each face.
        points: five of each face, x and y in its loose crop, or zeros.
        detector: the score of each face's detection.
        first: template of each pair.
        second: the other.
        same: whether both show one person.
        galleries: the two.
        probes: that are looked for in each.
        hashes: sha256 of each list file.
    """

    names: tuple[str, ...]
    templates: Int[np.ndarray, " n"]
    media: Int[np.ndarray, " n"]
    points: Float[np.ndarray, "n 5 2"]
    detector: Float[np.ndarray, " n"]
    first: Int[np.ndarray, " p"]
    second: Int[np.ndarray, " p"]
    same: Bool[np.ndarray, " p"]
    galleries: dict[str, People]
    probes: People
    hashes: dict[str, str]

    @classmethod
    def read(cls, path: str | Path, name: Name) -> "IjbProtocol":
        """Read the lists in a folder, zip or tar, wherever they lie in it.

        Raises:
            FileNotFoundError: a list is not there.
            ValueError: a line is not as it should be, or lists do not belong together.
        """
        lists = IjbLists(path, name)
        faces = lists.rows("face_tid_mid.txt", 3)
        named, points, detector = lists.points()
        pairs = lists.numbers("template_pair_label.txt", 3)
        names = tuple(row[0] for row in faces)
        if named != names:
            raise ValueError(f"{path}: the faces of {name}_face_tid_mid.txt and of "
                             f"{name}_name_5pts_score.txt differ")  # fmt: skip
        try:
            templates, media = np.array([row[1:] for row in faces], dtype=np.int64).T
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {name}_face_tid_mid.txt holds no number ({error})") from None
        if not np.isin(pairs[:, 2], (0, 1)).all():
            raise ValueError(f"{path}: {name}_template_pair_label.txt has labels beside 0 and 1")
        galleries = {x: lists.people(f"1N_gallery_{x}.csv") for x in GALLERIES[name]}
        probes = lists.people("1N_probe_mixed.csv")
        protocol = cls(
            names, templates, media, points, detector, pairs[:, 0], pairs[:, 1], pairs[:, 2] == 1,
            galleries, probes, lists.hashes,
        )  # fmt: skip
        if missing := protocol.without_faces():
            raise ValueError(
                f"{path}: {len(missing)} templates have no face, the lists do not belong together: "
                f"{listing(missing)}"
            )
        return protocol

    def without_faces(self) -> list[int]:
        """Return all templates that are used and have no face."""
        galleries = (people.templates for people in self.galleries.values())
        used = np.concatenate([self.first, self.second, self.probes.templates, *galleries])
        return np.setdiff1d(used, self.templates).tolist()

    def take(self, faces: Int[np.ndarray, " m"]) -> "IjbProtocol":
        """Return the protocol with some of its faces alone.

        Raises:
            ValueError: templates are left with none.
        """
        names = tuple(self.names[face] for face in faces.tolist())
        rest = (x[faces] for x in (self.templates, self.media, self.points, self.detector))
        templates, media, points, detector = rest
        found = replace(
            self, names=names, templates=templates, media=media, points=points, detector=detector
        )
        if missing := found.without_faces():
            raise ValueError(
                f"{len(missing)} templates are left without a face that could be read: "
                f"{listing(missing)}"
            )
        return found

    def write(self, folder: str | Path, name: Name) -> None:
        """Write the lists, in the layout that they are read from."""
        folder = Path(folder)
        faces = zip(self.names, self.templates, self.media, self.points, self.detector, strict=True)
        lines: dict[str, list[str]] = {"face_tid_mid.txt": [], "name_5pts_score.txt": []}
        for face, template, medium, points, score in faces:
            lines["face_tid_mid.txt"].append(f"{face} {template} {medium}")
            lines["name_5pts_score.txt"].append(
                " ".join([face, *map(str, points.ravel()), str(score)])
            )
        pairs = zip(self.first, self.second, self.same.astype(int), strict=True)
        lines["template_pair_label.txt"] = [" ".join(map(str, pair)) for pair in pairs]
        everybody = {f"gallery_{x}": people for x, people in self.galleries.items()}
        for kind, people in (everybody | {"probe_mixed": self.probes}).items():
            rows = [f"{t},{s}" for t, s in zip(*people, strict=True)]
            lines[f"1N_{kind}.csv"] = ["TEMPLATE_ID,SUBJECT_ID", *rows]
        for file, rows in lines.items():
            (folder / f"{name}_{file}").write_text("\n".join(rows) + "\n")

    def evaluate(
        self, features: np.ndarray, unit: bool = False, detector: bool = True
    ) -> dict[str, Any]:
        """Return all rates of features, one row a face in the order of `names`.

        Args:
            features: of any length; usually original and mirrored picture added.
            unit: bring each to length 1 first (insightface's N0; else N1).
            detector: weigh each with the detector's score (D1; else D0).

        Raises:
            ValueError: see `template_vectors`.
        """
        weights = self.detector if detector else None
        ids, vectors = template_vectors(features, self.templates, self.media, weights, unit)
        first, second = np.searchsorted(ids, self.first), np.searchsorted(ids, self.second)
        scores = pair_scores(vectors, first, second)
        return {
            "pairs": len(scores),
            "auc": auc(scores, self.same),
            "tar_at_far": tar_at_fars(scores, self.same, FARS),
            **self._open_set(ids, vectors),
            "insightface_ijb_1n": self._closed_set(ids, vectors),
        }

    def _open_set(self, ids: np.ndarray, vectors: np.ndarray) -> dict[str, Any]:
        """Look for all probes in each gallery, which lacks the people of the other."""
        probes = vectors[np.searchsorted(ids, self.probes.templates)]
        tpir: dict[str, list[np.ndarray]] = {mode: [] for mode in MODES}
        hits, mated = np.zeros(len(RANKS)), 0
        for gallery in self.galleries.values():
            entries = vectors[np.searchsorted(ids, gallery.templates)]
            found_in = standings(probes, entries, gallery.subjects, self.probes.subjects)
            for mode in MODES:
                tpir[mode].append(found_in.tpir_at_fpir(np.array(FPIRS), mode))
            has = np.count_nonzero(found_in.mated)
            ranks = np.minimum(RANKS, found_in.entries)
            mated, hits = mated + has, hits + has * found_in.of(found_in.mated).rank_k(ranks)
        return {
            "tpir_at_fpir": {mode: named(FPIRS, np.mean(x, 0)) for mode, x in tpir.items()},
            "rank": named(RANKS, hits / mated),
        }

    def _closed_set(self, ids: np.ndarray, vectors: np.ndarray) -> dict[str, Any]:
        """Look in both galleries together for those who are in one, as `ijb_1n.py` does.

        Its threshold at a rate f is the score of impostor number f x probes, counted from the
        highest of the impostors of all probes: far above that of an open set.
        """
        columns = zip(*self.galleries.values(), strict=True)
        templates, subjects = (np.concatenate(column) for column in columns)
        mated = np.isin(self.probes.subjects, subjects)
        probes = vectors[np.searchsorted(ids, self.probes.templates[mated])]
        entries, who = vectors[np.searchsorted(ids, templates)], self.probes.subjects[mated]
        found = standings(probes, entries, subjects, who)
        places = np.ceil(np.array(FPIRS) * len(who)).astype(int)
        impostors = Highest(int(places.max()))
        for rows, some, scores in score_blocks(probes, entries):
            impostors.add(scores[who[rows, None] != subjects[None, some]])
        highest = np.append(impostors.scores(), -np.inf)  # who has no impostor is accepted
        thresholds = highest[np.minimum(places, len(highest)) - 1]
        return {
            "probes": len(who),
            "rank": named(RANKS, found.rank_k(np.minimum(RANKS, found.entries))),
            "recall": named(FPIRS, (found.mate[:, None] > thresholds).mean(0)),
        }


class IjbLists(ListFiles):
    """The lists whose names begin with that of the protocol."""

    def __init__(self, path: str | Path, name: str) -> None:
        super().__init__(path)
        self.name = name

    @classmethod
    def find(cls, path: str | Path) -> "IjbLists":
        """Return the lists of whichever of the protocols is there.

        Raises:
            FileNotFoundError: none is.
            ValueError: both are, and their faces have the same names.
        """
        files = ListFiles(path)
        found = [name for name in GALLERIES if f"{name}_name_5pts_score.txt" in files]
        if not found:
            raise FileNotFoundError(f"{path} holds no ijbb_ or ijbc_name_5pts_score.txt")
        if len(found) > 1:
            raise ValueError(
                f"{path} holds ijbb_ and ijbc_name_5pts_score.txt: pass what holds one of them"
            )
        return cls(path, found[0])

    def __contains__(self, file: str) -> bool:
        return super().__contains__(f"{self.name}_{file}")

    def place(self, file: str) -> str:
        """Return where a list lies."""
        return super().place(f"{self.name}_{file}")

    def rows(self, file: str, width: int, separator: str | None = None) -> list[list[str]]:
        """Return the fields of each line."""
        rows = [line.split(separator) for line in self.text(file).splitlines() if line.strip()]
        for number, row in enumerate(rows, 1):
            if len(row) != width:
                raise ValueError(
                    f"{self.source.path}: {self.name}_{file} line {number} should have {width} "
                    f"fields; got {len(row)}"
                )
        return rows

    def points(self) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
        """Return the faces' names, five points and score of each.

        Raises:
            ValueError: a line is not as it should be.
        """
        rows = self.rows("name_5pts_score.txt", 12)
        try:
            numbers = np.array([row[1:] for row in rows], dtype=np.float64).reshape(-1, 11)
        except ValueError as error:
            raise ValueError(
                f"{self.source.path}: {self.name}_name_5pts_score.txt holds no number ({error})"
            ) from None
        points = numbers[:, :10].astype(np.float32).reshape(-1, 5, 2)
        return tuple(row[0] for row in rows), points, numbers[:, 10]

    def numbers(self, file: str, width: int) -> np.ndarray:
        """Return the whole numbers of each line, of which there may be 16 million.

        Raises:
            ValueError: a line does not hold as many.
        """
        data = self.read(file)
        lines = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="replace")
        try:
            if not data.strip():
                raise ValueError("it is empty")
            found = np.loadtxt(lines, dtype=np.int64, comments=None, ndmin=2)
            if found.shape[1] != width:
                raise ValueError(f"line 1 holds {found.shape[1]}")
        except ValueError as error:
            raise ValueError(
                f"{self.source.path}: {self.name}_{file} must hold {width} whole numbers a line "
                f"({error})"
            ) from None
        return found

    def people(self, file: str) -> People:
        """Return each template once; the lists name it once a face, after a line of titles.

        Raises:
            ValueError: there are no titles, a line is not as it should be, or a template shows two.
        """
        where = f"{self.source.path}: {self.name}_{file}"
        titles, *lines = self.text(file).splitlines() or [""]
        if not titles.lstrip('\ufeff" ').upper().startswith("TEMPLATE"):
            raise ValueError(
                f"{where} must begin with a line of titles, 'TEMPLATE_ID,SUBJECT_ID'; got "
                f"{titles[:80]!r}"
            )
        try:
            rows = np.array([line.split(",")[:2] for line in lines if line], dtype=np.int64)
            templates, subjects = rows.reshape(-1, 2).T
        except (ValueError, OverflowError) as error:
            raise ValueError(
                f"{where} must begin with template and subject, whole numbers ({error})"
            ) from None
        try:
            return People(*template_subjects(templates, subjects))
        except ValueError as error:
            raise ValueError(f"{where} has {error}") from None
