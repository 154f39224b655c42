"""Evaluate a trained network, or anybody's embeddings, and print JSON.

    python examples/fsenet/evaluate.py runs/default-0/network --protocol procedural
    python examples/fsenet/evaluate.py runs/lfw-0/network --protocol lfw --faces lfw112.zip
    python examples/fsenet/evaluate.py embeddings.npz --protocol lfw --faces lfw112.zip
    python examples/fsenet/evaluate.py runs/lfw-0/network --protocol bin --faces cfp_fp.bin
    python examples/fsenet/evaluate.py runs/lfw-0/network --protocol calfw --faces CALFW/
    python examples/fsenet/evaluate.py runs/lfw-0/network --protocol ijbc --faces IJBC/
    python examples/fsenet/evaluate.py features.npz --protocol ytf --faces splits.txt
    python examples/fsenet/evaluate.py features/ --protocol megaface --faces devkit/

Embeddings come as an `.npz` of `embeddings`, float `n d`, and `names`, n strings, or as an `.npy`
of any size that stays on disk, such as the folder that `extract.py` leaves. Pictures are called by
their paths below the folder of identities (`Abel_Pacheco/Abel_Pacheco_0001.jpg`), those of a `.bin`
by their numbers from `0` on, and those of IJB, YouTube Faces and MegaFace as in the lists.
Embeddings of IJB keep their length, which counts. With `--all-folds` LFW's ten folds are evaluated
as published; only for networks that were not trained on people of LFW.
"""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import tyro
from arms import measure
from data.faces import TEST_FROM, TestSet, draw_faces, drawn_test_set
from data.pair_sets import SOURCES, in_two_parts, published_test_set
from describe import TestTime, describe
from embeddings import read_embeddings
from extract import Extraction, extract
from feature_protocols import (
    FeatureProtocol,
    Ijb,
    Ijba,
    Megaface,
    MegafaceOptions,
    Ytf,
    read_megaface,
)
from limits import check_numbers
from machine import to_json, versions, write_json
from model import load_network
from protocols.ijb import IjbProtocol
from protocols.ijba import IjbaProtocol, Pooling
from protocols.ytf import FramePairs, YtfProtocol
from run_folder import one_line_errors
from torch.nn import functional as F
from workplace import this_process

LISTS = {  # of the protocols that compare sets of pictures
    "ijba": "verify_metadata_1.csv and the other lists",
    "ijbb": "ijbb_face_tid_mid.txt and the other lists",
    "ijbc": "ijbc_face_tid_mid.txt and the other lists",
    "ytf": "splits.txt",
    "megaface": "facescrub_features_list.json and the other lists",
}
OPTIONS = {  # that other protocols would not heed
    "faces": tuple({**SOURCES, **LISTS}),
    "unit_features": ("ijba", "ijbb", "ijbc"),
    "detector_scores": ("ijbb", "ijbc"),
    "pooling": ("ijba",),
    "frame_pairs": ("ytf",),
    "megaface": ("megaface",),
    "features": tuple(LISTS),
    "workers": tuple(LISTS),
    "damaged": tuple(LISTS),
    "all_folds": ("lfw",),
    "seed": ("procedural", "megaface"),
    "identities": ("procedural",),
    "samples": ("procedural",),
}
OF_NETWORKS = ("features", "workers", "damaged", "test_time", "precision")
TEST_TIME = {
    "concatenation": "original and mirrored concatenated, then L2",
    "sum": "original and mirrored added, then L2",
}
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


def main(arguments: Arguments) -> None:
    """Describe the pictures, score the pairs, write the numbers."""
    check_numbers(arguments)
    check_paths(arguments)
    check_options(arguments)
    if arguments.protocol in LISTS:
        give(evaluate_features(arguments), arguments.output)
        return
    net = None
    if not holds_embeddings(arguments.checkpoint):
        net = load_network(arguments.checkpoint)
    test = load_test_set(arguments)
    made = {}
    if net is None:
        vectors = {"embeddings": F.normalize(read_embeddings(arguments.checkpoint, test.names))}
    else:
        place = this_process(arguments.precision)
        described = describe(
            net.to(place.device), test.images, place, test_time=arguments.test_time
        )
        vectors = {"global half": described.global_half}
        if described.local_half is not None:
            vectors["local half"] = described.local_half
            vectors["both"] = described.join(described.local_half)
        made["test_time"] = TEST_TIME[arguments.test_time]
        made["precision"] = place.precision
    result = {
        "checkpoint": str(arguments.checkpoint),
        "protocol": {**test.flags, "similarity": "cosine"},
        **made,
        "versions": versions(),
        "arms": measure(vectors, test)[0],
    }
    give(result, arguments.output)


def give(result: dict[str, Any], output: Path | None) -> None:
    """Print a result, or write it."""
    if output is None:
        print(to_json(result))
    else:
        write_json(result, output)


def evaluate_features(arguments: Arguments) -> dict[str, Any]:
    """Compare templates or videos of embeddings that were made before, or of a network.

    Raises:
        ValueError: there are neither embeddings nor pictures, or the lists are not there.
    """
    name, path, features = arguments.protocol, arguments.faces, arguments.checkpoint
    if path is None:
        raise ValueError(
            f"--protocol {name} needs --faces: the folder or archive that holds {LISTS[name]}"
        )
    describes = not holds_embeddings(features)
    protocol = open_protocol(arguments, path, arguments.unit_features or describes)
    made, arm = dict[str, Any](), "embeddings"
    with TemporaryDirectory() as scratch:
        if describes:
            if not protocol.holds_pictures():
                folders = " and ".join(f"{folder}/" for folder in protocol.folders.values())
                raise ValueError(
                    f"--protocol {name} of a network needs its pictures in {folders} beside the "
                    f"lists in {path}; or describe them with extract.py, and pass the folder that "
                    "it leaves"
                )
            features = arguments.features or Path(scratch) / "features"
            made, arm = describe_pictures(arguments, protocol, features), "whole descriptor"
        flags, found = protocol.evaluate(features)
    return {
        "checkpoint": str(arguments.checkpoint),
        "protocol": {"name": name, "similarity": "cosine", **flags},
        **made,
        "versions": versions(),
        "arms": {arm: found},
    }


def open_protocol(arguments: Arguments, path: Path, unit: bool) -> FeatureProtocol:
    """Read the lists of a protocol that compares sets of pictures.

    Args:
        arguments: with the protocol's own options.
        path: of the lists.
        unit: whether descriptors get length 1; those of a network have it.
    """
    match arguments.protocol:
        case "ytf":
            return Ytf(path, YtfProtocol.read(path), arguments.frame_pairs)
        case "ijba":
            return Ijba(path, IjbaProtocol.read(path), unit, arguments.pooling)
        case "megaface":
            lists = read_megaface(path, arguments.megaface)
            return Megaface(path, lists, arguments.megaface, arguments.seed)
        case "ijbb" | "ijbc" as name:
            return Ijb(path, IjbProtocol.read(path, name), name, unit, arguments.detector_scores)
        case other:
            raise ValueError(f"{other} compares single pictures")


def describe_pictures(
    arguments: Arguments, protocol: FeatureProtocol, features: Path
) -> dict[str, Any]:
    """Describe what a protocol compares into `features`, and return how."""
    how = Extraction(
        test_time=arguments.test_time,
        dtype="fp32",
        precision=arguments.precision,
        workers=arguments.workers,
        damaged=arguments.damaged,
    )
    described = protocol.pictures()
    features.mkdir(exist_ok=True)
    for part, pictures in described.items():
        folder = extract(arguments.checkpoint, pictures, features / part, how)
    return {
        "alignment": protocol.alignment,
        "test_time": TEST_TIME[arguments.test_time],
        "precision": folder.options["precision"],
    }


def holds_embeddings(path: Path) -> bool:
    """Tell embeddings, in a file or a folder, from a trained network."""
    parts = (path, path / "facescrub", path / "megaface")
    return path.suffix in (".npz", ".npy") or (
        (path / "embeddings.npy").exists() or all(part.is_dir() for part in parts)
    )


def check_paths(arguments: Arguments) -> None:
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


def check_options(arguments: Arguments) -> None:
    """Refuse options that would change nothing.

    Raises:
        ValueError: one is for other protocols, or for networks alone.
    """
    name, ready = arguments.protocol, holds_embeddings(arguments.checkpoint)
    for option in changed(arguments):
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


def changed(options: Any) -> list[str]:
    """Return the names of the options that do not have their defaults, nested ones with a dot."""
    found = []
    for one in fields(options):
        value = getattr(options, one.name)
        if is_dataclass(value):
            found += [f"{one.name}.{inner}" for inner in changed(value)]
        elif value != one.default:
            found.append(one.name)
    return found


def load_test_set(arguments: Arguments) -> TestSet:
    """Draw or read the pictures of the protocol.

    Raises:
        ValueError: an option is missing, or there are too few people.
    """
    if arguments.protocol == "procedural":
        if arguments.identities < 20 or arguments.samples < 2:
            raise ValueError(
                "--identities must be at least 20, and --samples at least 2: ten folds need two "
                f"people each; got {arguments.identities} and {arguments.samples}"
            )
        people = range(TEST_FROM, TEST_FROM + arguments.identities)
        faces = draw_faces(arguments.seed, people, arguments.samples)
        return drawn_test_set(faces, arguments.seed)
    name, path = arguments.protocol, arguments.faces
    if path is None:
        raise ValueError(f"--protocol {name} needs --faces: {SOURCES[name]}")
    if arguments.all_folds and not in_two_parts(path):
        raise ValueError(
            "--all-folds is for LFW with its own lists: other sets always have ten folds"
        )
    folds = range(10) if arguments.all_folds else (8, 9)
    return published_test_set(path, name, folds)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
