"""Evaluate a trained network, or anybody's embeddings: JSON, and a table on standard error.

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

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import tyro
from arms import measure
from data.faces import TestSet, undrawn_test_set
from data.pair_sets import in_two_parts, published_test_set
from describe import describe, whole
from embeddings import read_embeddings
from errors import one_line_errors
from evaluate_options import OF_SETS, Arguments, check, faces_of, holds_embeddings
from extract import Extraction, extract
from feature_folder import read_options
from feature_protocols import FeatureProtocol, Ijb, Ijba, Megaface, Ytf, read_megaface
from machine import to_json, versions, write_json
from model import load_network
from protocols.ijb import IjbProtocol
from protocols.ijba import IjbaProtocol
from protocols.ytf import YtfProtocol
from results import table
from torch.nn import functional as F
from workplace import this_process

TEST_TIME = {
    "concatenation": "original and mirrored concatenated, then L2",
    "sum": "original and mirrored added, then L2",
}


def main(arguments: Arguments) -> None:
    """Describe the pictures, score the pairs, write the numbers."""
    check(arguments)
    if arguments.protocol in OF_SETS:
        give(evaluate_features(arguments), arguments.output)
        return
    net = None
    if not holds_embeddings(arguments.checkpoint):
        net = load_network(arguments.checkpoint)
    test = load_test_set(arguments)
    made = as_extracted(arguments.checkpoint)
    if net is None:
        vectors = {"embeddings": F.normalize(read_embeddings(arguments.checkpoint, test.names))}
    else:
        place = this_process(arguments.precision)
        described = describe(
            net.to(place.device), test.images, place, test_time=arguments.test_time
        )
        vectors = described.arms
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
    """Print a result, or write it, and tell its main figures on standard error."""
    if output is None:
        print(to_json(result), flush=True)
    else:
        write_json(result, output)
    print(table(result["protocol"]["name"], result["arms"]), file=sys.stderr)


def evaluate_features(arguments: Arguments) -> dict[str, Any]:
    """Compare templates or videos of embeddings that were made before, or of a network.

    Raises:
        ValueError: there are neither embeddings nor pictures, or the lists are not there.
    """
    name, path, features = arguments.protocol, faces_of(arguments), arguments.checkpoint
    describes, made = not holds_embeddings(features), as_extracted(features)
    unit = arguments.unit_features or describes or bool(made)
    protocol, arm = open_protocol(arguments, path, unit), "embeddings"
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
            arm = whole(load_network(arguments.checkpoint))
            made = describe_pictures(arguments, protocol, features)
        flags, found = protocol.evaluate(features)
    return {
        "checkpoint": str(arguments.checkpoint),
        "protocol": {"name": name, "similarity": "cosine", **flags},
        **made,
        "versions": versions(),
        "arms": {arm: found},
    }


def as_extracted(features: Path) -> dict[str, Any]:
    """Return how `extract.py` made embeddings, whose length is 1; nothing of those of others."""
    for folder in (features, features / "facescrub"):  # MegaFace's are two
        if (folder / "options.json").is_file() and (folder / "embeddings.npy").is_file():
            options = read_options(folder)
            made = {"test_time": TEST_TIME.get(options.get("test_time", ""))}
            return made | {name: options.get(name) for name in ("vectors", "precision", "dtype")}
    return {}


def open_protocol(arguments: Arguments, path: Path, unit: bool) -> FeatureProtocol:
    """Read the lists of a protocol that compares sets of pictures.

    Args:
        arguments: with the protocol's own options.
        path: of the lists.
        unit: whether embeddings get length 1; those of a network have it, but for rounding.
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
        dtype=protocol.dtype,
        precision=arguments.precision,
        workers=arguments.workers,
        damaged=arguments.damaged,
    )
    described = protocol.pictures()
    features.mkdir(exist_ok=True)
    for part, pictures in described.items():
        extract(arguments.checkpoint, pictures, features / part, how)
    return {"alignment": protocol.alignment, **as_extracted(features)}


def load_test_set(arguments: Arguments) -> TestSet:
    """Return the pairs of the protocol, and its pictures, not yet drawn or decoded.

    Raises:
        ValueError: an option is missing, or there are too few people.
    """
    if arguments.protocol == "procedural":
        if arguments.identities < 20 or arguments.samples < 2:
            raise ValueError(
                "--identities must be at least 20, and --samples at least 2: ten folds need two "
                f"people each; got {arguments.identities} and {arguments.samples}"
            )
        return undrawn_test_set(arguments.seed, arguments.identities, arguments.samples)
    name, path = arguments.protocol, faces_of(arguments)
    if arguments.all_folds and not in_two_parts(path):
        raise ValueError(
            "--all-folds is for LFW with its own lists: other sets always have ten folds"
        )
    folds = range(10) if arguments.all_folds else (8, 9)
    return published_test_set(path, name, folds)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
