"""The protocols that compare sets of pictures, behind one interface.

Each is made of the lists that it reads, and compares embeddings, wherever they lie; and each says
which pictures a network must describe for it, and where these lie beside the lists.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from data.faces import SIZE
from data.images import IdentityPictures, without_suffix
from data.listed import ALIGNED, ListedPictures, holds_folder
from embeddings import embedding_rows, load_embeddings
from protocols.crops import CROPS, LooseCrops
from protocols.devkit import FeatureFiles, write_results
from protocols.ijb import IjbProtocol, Name
from protocols.ijba import IjbaProtocol, Pooling
from protocols.megaface import Cleaning, MegafaceProtocol
from protocols.ytf import FramePairs, YtfProtocol, video_of
from stored import Rows

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

    @cached_property
    @abstractmethod
    def protocol(self) -> Any:
        """The lists, read and checked."""

    @abstractmethod
    def pictures(self) -> dict[str, IdentityPictures]:
        """Return what a network must describe, by the folder that its embeddings go to.

        Raises:
            FileNotFoundError, ValueError: a list is damaged, or pictures are missing.
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

    frame_pairs: FramePairs = "none"

    @cached_property
    def protocol(self) -> YtfProtocol:
        """The pairs of videos."""
        return YtfProtocol.read(self.path)

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return the frames of the pairs' videos."""
        frames = ListedPictures(self.path, ALIGNED, size=SIZE)
        inside = [video_of(name) in self.protocol.videos for name in frames.paths]
        return {"": frames.take(np.flatnonzero(inside))}

    def evaluate(self, embeddings: Path) -> Found:
        """See there."""
        names, features, lost = load_embeddings(embeddings)
        if lost:
            raise ValueError(f"{embeddings} lacks {len(lost)} frames, which could not be read")
        how = "mean of unit frames, then L2"
        if self.frame_pairs != "none":
            how = f"{self.frame_pairs} of the squared distances of all pairs of unit frames"
        flags = {"list_sha256": self.protocol.sha256, "video": how}
        return flags, self.protocol.evaluate(list(names), features, self.frame_pairs)


@dataclass(frozen=True)
class Ijb(FeatureProtocol):
    """Templates of IJB-B or IJB-C, compared, and looked for in both galleries."""

    name: Name = "ijbc"
    unit: bool = False
    detector: bool = True
    folders: ClassVar = {"": CROPS}
    alignment = "five points to 112x112, bilinear, pixel centres whole, outside black"

    @cached_property
    def protocol(self) -> IjbProtocol:
        """The lists."""
        return IjbProtocol.read(self.path, self.name)

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return the faces, cut from the loose crops."""
        assert self.protocol  # a damaged list is told before hours of describing
        return {"": LooseCrops(self.path, size=SIZE, protocol=self.name)}

    def evaluate(self, embeddings: Path) -> Found:
        """See there."""
        features = embedding_rows(embeddings, self.protocol.names)
        how = {
            "feature_norm": "N0" if self.unit else "N1",
            "detector_score": "D1" if self.detector else "D0",
        }
        flags = how | {"list_sha256": self.protocol.hashes, "media": "mean"}
        found = self.protocol.evaluate(features, self.unit, self.detector)
        return flags | {"template": "sum, then L2"}, found


@dataclass(frozen=True)
class Ijba(FeatureProtocol):
    """Templates of IJB-A's splits, compared, and looked for in their galleries."""

    unit: bool = False
    pooling: Pooling = "faces"

    @cached_property
    def protocol(self) -> IjbaProtocol:
        """The lists of all splits."""
        return IjbaProtocol.read(self.path)

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return the faces that were found in the pictures; of FILE#SIGHTING_ID, FILE's suffix."""
        called = {}
        for name in self.protocol.names:
            file, mark, sighting = name.partition("#")
            called[f"{without_suffix(file)}{mark}{sighting}" if mark else file] = name
        return {"": ListedPictures(self.path, ALIGNED, called, SIZE)}

    def evaluate(self, embeddings: Path) -> Found:
        """See there."""
        loaded, names = load_embeddings(embeddings), self.protocol.names
        rows = dict(zip(names, loaded.find(names).tolist(), strict=True))
        if max(rows.values()) < 0:
            raise ValueError(
                f"{embeddings} holds no embedding of a face of the lists: they are called by their "
                f"FILE, as {names[0]!r} and {names[1]!r}"
            )
        how = {"faces": "mean of its faces, then L2", "media": "mean of its media's means, then L2"}
        flags = {"feature_norm": "N0" if self.unit else "N1", "template": how[self.pooling]}
        flags |= {"empty_template": "below all others", "list_sha256": self.protocol.hashes}
        return flags, self.protocol.evaluate(rows, loaded.vectors, self.unit, self.pooling)


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

    options: MegafaceOptions = field(default_factory=MegafaceOptions)
    seed: int = 0  # of `cleaning` as insightface has it
    folders: ClassVar = {"facescrub": "facescrub_images", "megaface": "megaface_images"}
    alignment = f"as in {' and '.join(f'{folder}/' for folder in folders.values())}"

    @cached_property
    def protocol(self) -> MegafaceProtocol:
        """The lists; that a result can be written is checked too."""
        options = self.options
        protocol = MegafaceProtocol.read(self.path, options.distractors, options.distractor_set)
        protocol.check_cleaning(self.path, options.cleaning)
        if options.results is not None and not options.results.is_dir():
            raise FileNotFoundError(f"{options.results} is no folder: make it first")
        return protocol

    def pictures(self) -> dict[str, IdentityPictures]:
        """Return FaceScrub's and MegaFace's, in the order of their lists."""
        names = {"facescrub": self.protocol.probes, "megaface": self.protocol.distractors}
        found = {}
        for part, folder in self.folders.items():
            called = {name: name for name in names[part]}
            pictures = ListedPictures(self.path, folder, called, SIZE)
            if pictures.missing:
                raise FileNotFoundError(
                    f"{self.path}: {folder}/ lacks {len(pictures.missing)} of the "
                    f"{len(called)} pictures of its list, first {', '.join(pictures.missing[:5])}"
                )
            found[part] = pictures
        return found

    def evaluate(self, embeddings: Path) -> Found:
        """See there."""
        options, protocol = self.options, self.protocol

        def rows(part: str, names: tuple[str, ...]) -> Rows | FeatureFiles:
            inside = embeddings / part
            if not inside.is_dir():
                return embedding_rows(embeddings, names)
            if (inside / "embeddings.npy").exists():
                return embedding_rows(inside, names)
            return FeatureFiles(inside, names, options.algorithm)

        probes = rows("facescrub", protocol.probes)
        distractors = rows("megaface", protocol.distractors)
        found, curves = protocol.evaluate(probes, distractors, options.cleaning, self.seed)
        size, number = options.distractors, options.distractor_set
        flags = {"distractors": size, "distractor_set": number, "cleaning": options.cleaning}
        if options.cleaning == "insightface":
            flags["seed"] = self.seed
        if options.results is not None:
            write_results(options.results, f"{options.algorithm}_{size}_{number}", *curves)
        return flags | {"feature_norm": "unit", "list_sha256": protocol.hashes}, found
