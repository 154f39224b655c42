"""The options of `evaluate.py`, and which of them go together."""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from data.pair_sets import SOURCES
from describe import TestTime
from feature_protocols import MegafaceOptions
from limits import check_numbers
from protocols.ijba import Pooling
from protocols.ytf import FramePairs

OF_SETS = {  # what the protocols need that compare sets of pictures
    "ijba": "the folder or archive that holds verify_metadata_1.csv and the other lists",
    "ijbb": "the folder or archive that holds ijbb_face_tid_mid.txt and the other lists",
    "ijbc": "the folder or archive that holds ijbc_face_tid_mid.txt and the other lists",
    "ytf": "the folder or archive that holds splits.txt",
    "megaface": "the folder or archive that holds facescrub_features_list.json and the other lists",
}
FACES = {**SOURCES, **OF_SETS}
OPTIONS = {  # that other protocols would not heed
    "faces": tuple(FACES),
    "unit_features": ("ijba", "ijbb", "ijbc"),
    "detector_scores": ("ijbb", "ijbc"),
    "pooling": ("ijba",),
    "frame_pairs": ("ytf",),
    "megaface": ("megaface",),
    "features": tuple(OF_SETS),
    "workers": tuple(OF_SETS),
    "damaged": tuple(OF_SETS),
    "all_folds": ("lfw",),
    "seed": ("procedural", "megaface"),
    "identities": ("procedural",),
    "samples": ("procedural",),
}
OF_NETWORKS = ("features", "workers", "damaged", "test_time", "precision")
Protocol = Literal[
    "procedural", "lfw", "cfp_ff", "cfp_fp", "agedb_30", "calfw", "cplfw", "bin",
    "ijba", "ijbb", "ijbc", "ytf", "megaface",
]  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Evaluate a network or embeddings.

    Args:
        checkpoint: the `network/` or `baseline/` folder of a run, or embeddings: an `.npz`, an
            `.npy` with its names in a `.txt`, or the folder that `extract.py` left.
        protocol: `procedural` draws its pictures; `lfw` to `bin` read pairs of them from `--faces`;
            `ijba` to `megaface` compare sets of them, or of their embeddings, by lists from there.
        faces: the set as a folder, zip or tar with its lists, or one of insightface's `.bin` files.
        unit_features: bring IJB's embeddings to length 1 first (insightface's N0), which those of
            a network have.
        detector_scores: weigh those of IJB-B and IJB-C with the scores of the detector (D1).
        pooling: a template of IJB-A is the mean of its `faces`, or of the means of its `media`.
        frame_pairs: videos of YouTube Faces are as far apart as the nearest pair of their frames
            (`min`), the farthest, or the mean of all pairs; `none` compares their mean vectors.
        megaface: how MegaFace is evaluated.
        features: for `ijba` to `megaface` from a network: where to keep the embeddings, from which
            a run that was stopped goes on; else they are thrown away at the end.
        workers: processes that decode the pictures of these.
        damaged: pictures of these that may be damaged; they are left out and counted, but for
            MegaFace, where each counts.
        all_folds: LFW's ten folds instead of the two that `train.py` leaves untrained.
        output: write the JSON there instead of printing it.
        seed: of the drawn people, and of MegaFace's cleaning as insightface has it.
        identities: drawn people.
        samples: pictures of each.
        test_time: `concatenation` of the vectors of a picture and its mirror image, or their `sum`.
        precision: `fp32`, or `bf16` autocast; `auto` takes bf16 where the machine computes in it.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    protocol: Protocol
    faces: Path | None = None
    unit_features: bool = False
    detector_scores: bool = True
    pooling: Pooling = "faces"
    frame_pairs: FramePairs = "none"
    megaface: MegafaceOptions = field(default_factory=MegafaceOptions)
    features: Path | None = None
    workers: int = 0
    damaged: int = 0
    all_folds: bool = False
    output: Path | None = None
    seed: int = 0
    identities: int = 200
    samples: int = 6
    test_time: TestTime = "concatenation"
    precision: Literal["auto", "fp32", "bf16"] = "auto"


def check(arguments: Arguments) -> None:
    """Refuse options that are wrong, or do not go together, before anything is read.

    Raises:
        FileNotFoundError, FileExistsError, IsADirectoryError, ValueError: naming the option.
    """
    check_numbers(arguments)
    _check_paths(arguments)
    _check_protocol(arguments)


def faces_of(arguments: Arguments) -> Path:
    """Return where the pictures or the lists of a protocol lie.

    Raises:
        ValueError: nobody said it.
    """
    if arguments.faces is None:
        name = arguments.protocol
        raise ValueError(f"--protocol {name} needs --faces: {FACES[name]}")
    return arguments.faces


def holds_embeddings(path: Path) -> bool:
    """Tell embeddings, in a file or a folder, from a trained network."""
    parts = (path, path / "facescrub", path / "megaface")
    return path.suffix in (".npz", ".npy") or (
        (path / "embeddings.npy").exists() or all(part.is_dir() for part in parts)
    )


def _check_paths(arguments: Arguments) -> None:
    """Refuse what would fail only after the pictures are drawn or read."""
    checkpoint, output = arguments.checkpoint, arguments.output
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"{checkpoint} does not exist: pass the network/ or baseline/ folder that a run left, "
            "or an .npz of embeddings"
        )
    if output is not None and output.is_dir():
        raise IsADirectoryError(f"--output: {output} is a folder: name a file in it")
    for option, path in (("output", output), ("features", arguments.features)):
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"--{option}: {path.parent} is no folder: make it first")
    if arguments.features is not None and arguments.features.is_file():
        raise FileExistsError(f"--features: {arguments.features} is a file: name a folder")


def _check_protocol(arguments: Arguments) -> None:
    """Refuse options that would change nothing with the protocol, or with embeddings."""
    name, ready = arguments.protocol, holds_embeddings(arguments.checkpoint)
    for option in _changed(arguments):
        known = OPTIONS.get(option.partition(".")[0])
        flag = f"--{option.replace('_', '-')}"
        if known is not None and name not in known:
            raise ValueError(
                f"{flag} is for --protocol {', '.join(known)}: leave it out with {name}"
            )
        if ready and option in OF_NETWORKS:
            raise ValueError(
                f"{flag} is for networks: leave it out, the embeddings are there already"
            )
        if option == "unit_features" and not ready:
            raise ValueError(f"{flag}: leave it out, a network's descriptors have length 1")
        if option == "seed" and name == "megaface" and arguments.megaface.cleaning != "insightface":
            raise ValueError(f"{flag} is for --megaface.cleaning insightface: leave it out")


def _changed(options: Any) -> list[str]:
    """Return the names of the options that do not have their defaults, nested ones with a dot."""
    found = []
    for one in fields(options):
        value = getattr(options, one.name)
        if is_dataclass(value):
            found += [f"{one.name}.{inner}" for inner in _changed(value)]
        elif value != one.default:
            found.append(one.name)
    return found
