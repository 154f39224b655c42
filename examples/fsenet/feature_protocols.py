"""The protocols that compare sets of pictures: from embeddings alone, wherever they lie.

Each function returns what is printed beside the numbers, and the numbers.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embeddings import embedding_rows, load_embeddings
from protocols.devkit import FeatureFiles, write_results
from protocols.ijb import IjbProtocol
from protocols.ijba import IjbaProtocol, Pooling
from protocols.megaface import Cleaning, MegafaceProtocol
from protocols.ytf import YtfProtocol
from stored import Rows

Found = tuple[dict[str, Any], dict[str, Any]]


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


def evaluate_ytf(lists: Path, embeddings: Path) -> Found:
    """Compare videos, of which each is the mean of its frames."""
    videos = YtfProtocol.read(lists)
    names, features, lost = load_embeddings(embeddings)
    if lost:
        raise ValueError(f"{embeddings} lacks {len(lost)} frames, which could not be read")
    flags = {"list_sha256": videos.sha256, "video": "mean of unit frames, then L2"}
    return flags, videos.evaluate(list(names), features)


def evaluate_ijb(protocol: IjbProtocol, embeddings: Path, unit: bool, detector: bool) -> Found:
    """Compare the templates of IJB-B or IJB-C, and look for them in both galleries."""
    features = embedding_rows(embeddings, protocol.names)
    how = {"feature_norm": "N0" if unit else "N1", "detector_score": "D1" if detector else "D0"}
    flags = how | {"list_sha256": protocol.hashes, "media": "mean", "template": "sum, then L2"}
    return flags, protocol.evaluate(features, unit, detector)


def evaluate_ijba(lists: Path, embeddings: Path, unit: bool, pooling: Pooling) -> Found:
    """Compare the templates of IJB-A's splits, and look for them in their galleries."""
    protocol = IjbaProtocol.read(lists)
    loaded = load_embeddings(embeddings)
    names = protocol.names
    rows = dict(zip(names, loaded.find(names).tolist(), strict=True))
    if max(rows.values()) < 0:
        raise ValueError(
            f"{embeddings} holds no embedding of a face of the lists: they are called by their "
            f"FILE, as {names[0]!r} and {names[1]!r}"
        )
    how = {"faces": "mean of its faces, then L2", "media": "mean of its media's means, then L2"}
    flags = {"feature_norm": "N0" if unit else "N1", "template": how[pooling]}
    flags |= {"empty_template": "below all others", "list_sha256": protocol.hashes}
    return flags, protocol.evaluate(rows, loaded.vectors, unit, pooling)


def evaluate_megaface(lists: Path, features: Path, options: MegafaceOptions, seed: int) -> Found:
    """Look for FaceScrub's people among distractors.

    Args:
        lists: the devkit's folder.
        features: embeddings of both sets; or a folder that holds `facescrub` and `megaface`, each
            of them embeddings, or the devkit's feature files.
        options: see there.
        seed: of `cleaning` as insightface has it.
    """
    size, number = options.distractors, options.distractor_set
    protocol = MegafaceProtocol.read(lists, size, number)
    protocol.check_cleaning(lists, options.cleaning)
    if options.results is not None and not options.results.is_dir():
        raise FileNotFoundError(f"{options.results} is no folder: make it first")

    def rows(part: str, names: tuple[str, ...]) -> Rows | FeatureFiles:
        inside = features / part
        if not inside.is_dir():
            return embedding_rows(features, names)
        if (inside / "embeddings.npy").exists():
            return embedding_rows(inside, names)
        return FeatureFiles(inside, names, options.algorithm)

    probes, distractors = rows("facescrub", protocol.probes), rows("megaface", protocol.distractors)
    found, curves = protocol.evaluate(probes, distractors, options.cleaning, seed)
    flags = {"distractors": size, "distractor_set": number, "cleaning": options.cleaning}
    if options.cleaning == "insightface":
        flags["seed"] = seed
    if options.results is not None:
        write_results(options.results, f"{options.algorithm}_{size}_{number}", *curves)
    return flags | {"feature_norm": "unit", "list_sha256": protocol.hashes}, found
