"""The protocols that compare sets of pictures, behind one interface.

Each is made of the lists that it reads, and compares embeddings, wherever they lie; and each says
which pictures a network must describe for it, and where these lie beside the lists.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from data.faces import SIZE
from data.images import IdentityPictures
from data.listed import ALIGNED, ListedPictures, holds_folder
from embeddings import ABSENT, NamedRows, embedding_rows, load_embeddings
from protocols.crops import CROPS, LooseCrops
from protocols.devkit import FeatureFiles, write_results
from protocols.ijb import IjbProtocol, Name
from protocols.ijba import IjbaProtocol, Pooling, picture_of, refuse_two
from protocols.lists import listing
from protocols.megaface import Cleaning, MegafaceProtocol
from protocols.ytf import FramePairs, YtfProtocol, video_of

Found = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class FeatureProtocol(ABC):
    """A protocol, and how it is evaluated.

    Args:
        path: folder or archive that holds its lists.
    """

    path: Path
    folders: ClassVar[Mapping[str, str]] = {"": ALIGNED}  # of pictures, by those of embeddings
    alignment: ClassVar[str] = f"as in {ALIGNED}/"
    dtype: ClassVar[Literal["fp16", "fp32"]] = "fp32"  # of a network's embeddings on disk

    @abstractmethod
    def pictures(self) -> dict[str, IdentityPictures]:
        """Return what a network must describe, by the folder that its embeddings go to.

        Raises:
            FileNotFoundError, ValueError: pictures are missing.
        """

    @abstractmethod
    def evaluate(self, embeddings: Path) -> Found:
        """Return what is printed beside the numbers, and the numbers.

        Args:
            embeddings: of the pictures.

        Raises:
            FileNotFoundError, ValueError: some are missing, or are no vectors.
        """

    def holds_pictures(self) -> bool:
        """Tell whether the pictures lie beside the lists."""
        return all(holds_folder(self.path, folder) for folder in self.folders.values())


@dataclass(frozen=True)
class Ytf(FeatureProtocol):
    """Videos, of which each is the mean of its frames, or is compared frame by frame."""

    lists: YtfProtocol
    frame_pairs: FramePairs = "none"

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return the frames of the pairs' videos."""
        frames = ListedPictures(self.path, ALIGNED, size=SIZE)
        self.lists.check_videos(frames.paths)
        inside = [video_of(name) in self.lists.videos for name in frames.paths]
        return {"": frames.take(np.flatnonzero(inside))}

    def evaluate(self, embeddings: Path) -> Found:
        """See there; frames that could not be read are left out and counted."""
        found = load_embeddings(embeddings)
        names = list(found.names)
        self.lists.check_videos(names)
        rows = [n for n, name in enumerate(names) if video_of(name) in self.lists.videos]
        read = [row for row in rows if row not in found.lost]
        how = "mean of unit frames, then L2"
        if self.frame_pairs != "none":
            how = f"{self.frame_pairs} of the squared distances of all pairs of unit frames"
        flags = {"list_sha256": self.lists.hashes, "video": how}
        flags |= {"lost_frames": len(rows) - len(read)}
        some = found.rows(np.array(read, dtype=np.int64))
        return flags, self.lists.evaluate([names[row] for row in read], some, self.frame_pairs)


@dataclass(frozen=True)
class Ijb(FeatureProtocol):
    """Templates of IJB-B or IJB-C, compared, and looked for in both galleries."""

    lists: IjbProtocol
    name: Name
    unit: bool = False
    detector: bool = True
    folders: ClassVar = {"": CROPS}
    alignment = "five points to 112x112, bilinear, pixel centres whole, outside black"

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return the faces, cut from the loose crops."""
        return {"": LooseCrops(self.path, size=SIZE, protocol=self.name)}

    def evaluate(self, embeddings: Path) -> Found:
        """See there; faces that could not be read are left out and counted."""
        loaded = load_embeddings(embeddings)
        index = loaded.find(self.lists.names)
        loaded.refuse(ABSENT, self.lists.names, index)
        there = np.flatnonzero(index >= 0)
        lists = self.lists if len(there) == len(index) else self.lists.take(there)
        flags = {
            "feature_norm": "N0" if self.unit else "N1",
            "detector_score": "D1" if self.detector else "D0",
            "list_sha256": lists.hashes,
            "media": "mean",
            "template": "sum, then L2",
            "lost_faces": len(index) - len(there),
        }
        return flags, lists.evaluate(loaded.rows(index[there]), self.unit, self.detector)


@dataclass(frozen=True)
class Ijba(FeatureProtocol):
    """Templates of IJB-A's splits, compared, and looked for in their galleries."""

    lists: IjbaProtocol
    unit: bool = False
    pooling: Pooling = "faces"

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return the faces that were found in the pictures."""
        called = {picture_of(name): name for name in self.lists.names}
        return {"": ListedPictures(self.path, ALIGNED, called, SIZE)}

    def evaluate(self, embeddings: Path) -> Found:
        """See there."""
        loaded, names = load_embeddings(embeddings), self.lists.names
        plain, paths = (loaded.find(x) for x in (names, map(picture_of, names)))
        both = np.flatnonzero((plain >= 0) & (paths >= 0) & (plain != paths))
        refuse_two([(names[row], picture_of(names[row])) for row in both], str(embeddings))
        rows = dict(zip(names, np.maximum(plain, paths).tolist(), strict=True))
        if max(rows.values()) < 0:
            raise ValueError(
                f"{embeddings} holds no embedding of a face of the lists: they are called by their "
                f"FILE, as {names[0]!r} and {names[1]!r}; {loaded.example(names[0])}"
            )
        how = {"faces": "mean of its faces, then L2", "media": "mean of its media's means, then L2"}
        flags = {"feature_norm": "N0" if self.unit else "N1", "template": how[self.pooling]}
        flags |= {"empty_template": "below all others", "splits": len(self.lists.splits)}
        flags |= {"list_sha256": self.lists.hashes}
        everything = loaded.rows(np.arange(len(loaded.names)))
        return flags, self.lists.evaluate(rows, everything, self.unit, self.pooling)


@dataclass(frozen=True)
class MegafaceOptions:
    """How MegaFace is evaluated.

    Args:
        distractors: how many; a list of so many must be there.
        distractor_set: its number.
        cleaning: what becomes of pictures that the noise lists name: `none`, `leave_out`, or as
            `insightface` or `facex` have it.
        algorithm: as the devkit's feature files are called, `<picture>_<algorithm>.bin`.
        results: a folder to write the devkit's file of results into.
    """

    distractors: int = 10**6
    distractor_set: int = 1
    cleaning: Cleaning = "none"
    algorithm: str = "partlocal"
    results: Path | None = None


@dataclass(frozen=True)
class Megaface(FeatureProtocol):
    """FaceScrub's people, looked for among distractors.

    The embeddings are one file of both sets, or a folder that holds `facescrub` and `megaface`,
    each of them embeddings, or the devkit's feature files.
    """

    lists: MegafaceProtocol
    options: MegafaceOptions
    seed: int = 0  # of `cleaning` as insightface has it
    folders: ClassVar = {"facescrub": "facescrub_images", "megaface": "megaface_images"}
    alignment = f"as in {' and '.join(f'{folder}/' for folder in folders.values())}"
    dtype = "fp16"  # of a million distractors

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return FaceScrub's and MegaFace's, in the order of their lists."""
        names = {"facescrub": self.lists.probes, "megaface": self.lists.distractors}
        found = {}
        for part, folder in self.folders.items():
            called = {name: name for name in names[part]}
            pictures = ListedPictures(self.path, folder, called, SIZE)
            if pictures.missing:
                raise FileNotFoundError(
                    f"{self.path}: {folder}/ lacks {len(pictures.missing)} of the "
                    f"{len(called)} pictures of its list: {listing(pictures.missing)}"
                )
            found[part] = pictures
        return found

    def evaluate(self, embeddings: Path) -> Found:
        """See there."""
        options, lists = self.options, self.lists

        def rows(part: str, names: tuple[str, ...]) -> NamedRows | FeatureFiles:
            inside = embeddings / part
            if not inside.is_dir():
                return embedding_rows(embeddings, names)
            if (inside / "embeddings.npy").exists():
                return embedding_rows(inside, names)
            return FeatureFiles(inside, names, options.algorithm)

        probes = rows("facescrub", lists.probes)
        distractors = rows("megaface", lists.distractors)
        if probes.shape[1] != distractors.shape[1]:
            raise ValueError(
                f"{embeddings} holds embeddings of {probes.shape[1]} numbers of FaceScrub and of "
                f"{distractors.shape[1]} of MegaFace: describe both with one network"
            )
        found, curves = lists.evaluate(probes, distractors, options.cleaning, self.seed)
        size, number = options.distractors, options.distractor_set
        flags = {"distractors": size, "distractor_set": number, "cleaning": options.cleaning}
        if options.cleaning == "insightface":
            flags["seed"] = self.seed
        if options.results is not None:
            cleaned = "" if options.cleaning == "none" else f"-{options.cleaning}"
            name = f"{options.algorithm}{cleaned}_{size}_{number}"
            write_results(options.results, name, *curves)
        return flags | {"feature_norm": "unit", "list_sha256": lists.hashes}, found


def read_megaface(path: Path, options: MegafaceOptions) -> MegafaceProtocol:
    """Read MegaFace's lists, and refuse options that they do not allow.

    Raises:
        FileNotFoundError, ValueError: see `MegafaceProtocol`; or no folder for the results.
    """
    lists = MegafaceProtocol.read(path, options.distractors, options.distractor_set)
    lists.check_cleaning(path, options.cleaning)
    if options.results is not None and not options.results.is_dir():
        raise FileNotFoundError(f"{options.results} is no folder: make it first")
    return lists
