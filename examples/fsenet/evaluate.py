"""Evaluate a trained network, or anybody's embeddings, and print JSON.

    python examples/fsenet/evaluate.py runs/default-0/network --protocol procedural
    python examples/fsenet/evaluate.py runs/lfw-0/network --protocol lfw --faces lfw112.zip
    python examples/fsenet/evaluate.py embeddings.npz --protocol lfw --faces lfw112.zip
    python examples/fsenet/evaluate.py runs/lfw-0/network --protocol bin --faces cfp_fp.bin
    python examples/fsenet/evaluate.py features.npz --protocol ijbc --faces IJBC/
    python examples/fsenet/evaluate.py features.npz --protocol ytf --faces splits.txt

An .npz holds `embeddings`, float `n d`, and `names`, n strings: the pictures' paths below the
folder of identities (`Abel_Pacheco/Abel_Pacheco_0001.jpg`), or the numbers of those of a `.bin`,
from `0` on; for IJB, whose pictures are named as in its lists, embeddings keep their length, which
counts. With `--all-folds` LFW's ten folds are evaluated as published; only for networks that were
not trained on people of LFW.
"""

import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import numpy as np
import torch
import tyro
from arms import measure
from data.faces import (
    TEST_FROM,
    TestSet,
    bin_test_set,
    draw_faces,
    drawn_test_set,
    lfw_test_set,
)
from describe import TestTime, describe
from fit import Workplace
from limits import check_numbers
from machine import choose_precision, to_json, versions, write_json
from model import load_network
from protocols.ijb import IjbProtocol
from protocols.lfw import LfwProtocol
from protocols.ytf import YtfProtocol
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Arguments:
    """Evaluate a network or embeddings.

    Args:
        checkpoint: the `network/` or `baseline/` folder of a run, or an `.npz` of embeddings.
        protocol: `procedural` draws its pictures; `lfw` and `bin` read them from `--faces`; `ijbb`,
            `ijbc` and `ytf` take an `.npz` of embeddings alone, and read their lists there.
        faces: LFW as a folder or zip with its lists; one of insightface's `.bin` files; or the
            folder that holds IJB's lists, or their `meta/`, or YTF's `splits.txt`.
        unit_features: bring IJB's embeddings to length 1 first (insightface's N0).
        detector_scores: weigh IJB's embeddings with the scores of the detector (D1).
        all_folds: LFW's ten folds instead of the two that `train.py` leaves untrained.
        output: write the JSON there instead of printing it.
        seed: of the drawn people.
        identities: drawn people.
        samples: pictures of each.
        test_time: `concatenation` of the vectors of a picture and its mirror image, or their `sum`.
        precision: `fp32`, or `bf16` autocast; `auto` takes bf16 where the machine computes in it.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    protocol: Literal["procedural", "lfw", "bin", "ijbb", "ijbc", "ytf"]
    faces: Path | None = None
    unit_features: bool = False
    detector_scores: bool = True
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
    if arguments.protocol in ("ijbb", "ijbc", "ytf"):
        give(evaluate_features(arguments), arguments.output)
        return
    net = None
    if arguments.checkpoint.suffix != ".npz":
        net = load_network(arguments.checkpoint)
    test = load_test_set(arguments)
    made = {}
    if net is None:
        vectors = {"embeddings": F.normalize(read_embeddings(arguments.checkpoint, test.names))}
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        place = Workplace(Path(), device, choose_precision(arguments.precision, device))
        described = describe(net.to(device), test.images, place, test_time=arguments.test_time)
        vectors = {"global half": described.global_half}
        if described.local_half is not None:
            vectors["local half"] = described.local_half
            vectors["both"] = described.join(described.local_half)
        how = {"concatenation": "concatenated", "sum": "added"}[arguments.test_time]
        made["test_time"] = f"original and mirrored {how}, then L2"
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
    """Compare templates or videos of embeddings that were made before.

    Raises:
        ValueError: there are none, or the lists are not there.
    """
    name, path = arguments.protocol, arguments.faces
    if path is None or arguments.checkpoint.suffix != ".npz":
        raise ValueError(
            f"--protocol {name} needs an .npz of embeddings, and --faces: the folder that holds "
            + ("splits.txt" if name == "ytf" else f"{name}_face_tid_mid.txt and the other lists")
        )
    if arguments.all_folds:
        raise ValueError("--all-folds is for --protocol lfw: leave it out")
    flags: dict[str, Any] = {"name": name, "similarity": "cosine"}
    if name == "ytf":
        videos = YtfProtocol.read(path)
        names, features = load_embeddings(arguments.checkpoint)
        flags |= {"list_sha256": videos.sha256, "video": "mean of unit frames, then L2"}
        found: dict[str, Any] = videos.evaluate(names, features)
    else:
        lists = IjbProtocol.read(path, name)
        features = read_embeddings(arguments.checkpoint, lists.names).numpy()
        unit, detector = arguments.unit_features, arguments.detector_scores
        how = {"feature_norm": "N0" if unit else "N1", "detector_score": "D1" if detector else "D0"}
        flags |= how | {"list_sha256": lists.hashes, "media": "mean", "template": "sum, then L2"}
        found = lists.evaluate(features, unit, detector)
    return {
        "checkpoint": str(arguments.checkpoint),
        "protocol": flags,
        "versions": versions(),
        "arms": {"embeddings": found},
    }


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
    if output is not None and not output.parent.is_dir():
        raise FileNotFoundError(f"--output: {output.parent} is no folder: make it first")


def load_test_set(arguments: Arguments) -> TestSet:
    """Draw or read the pictures of the protocol.

    Raises:
        ValueError: an option is missing, or is for the other protocol, or there are too few people.
    """
    if arguments.protocol == "procedural":
        if arguments.faces is not None or arguments.all_folds:
            raise ValueError("--faces and --all-folds are for other protocols: leave them out")
        if arguments.identities < 20 or arguments.samples < 2:
            raise ValueError(
                "--identities must be at least 20, and --samples at least 2: ten folds need two "
                f"people each; got {arguments.identities} and {arguments.samples}"
            )
        people = range(TEST_FROM, TEST_FROM + arguments.identities)
        faces = draw_faces(arguments.seed, people, arguments.samples)
        return drawn_test_set(faces, arguments.seed)
    if arguments.faces is None:
        kind = {"lfw": "LFW as a folder or zip with its lists", "bin": "a .bin of insightface"}
        name = arguments.protocol
        raise ValueError(f"--protocol {name} needs --faces: {kind[name]}")
    if arguments.protocol == "bin":
        if arguments.all_folds:
            raise ValueError("--all-folds is for --protocol lfw: a .bin always has ten folds")
        return bin_test_set(arguments.faces)
    protocol = LfwProtocol.read(arguments.faces)
    folds = range(10) if arguments.all_folds else (8, 9)
    return lfw_test_set(arguments.faces, protocol, folds)


def load_embeddings(path: Path) -> tuple[list[str], np.ndarray]:
    """Return names and embeddings as they are stored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no .npz with as many different `names` as finite `embeddings`.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found, embeddings = arrays["names"], arrays["embeddings"]
    except (KeyError, TypeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} holds no arrays 'embeddings' and 'names' ({error})") from None
    if found.ndim != 1:
        raise ValueError(f"{path}: names must be a list of strings; got {list(found.shape)}")
    if embeddings.dtype.kind not in "fiu":
        raise ValueError(f"{path}: embeddings must be real numbers; got dtype {embeddings.dtype}")
    names = list(map(str, found))
    if len(set(names)) < len(names):
        row = {name: number for number, name in enumerate(names)}
        twice = next(name for number, name in enumerate(names) if row[name] != number)
        raise ValueError(f"{path} holds two embeddings of {twice}")
    if embeddings.ndim != 2 or len(names) != len(embeddings):
        raise ValueError(
            f"{path} must hold one embedding a picture, [n, d] with n = {len(names)} names; got "
            f"{list(embeddings.shape)}"
        )
    return names, embeddings


def read_embeddings(path: Path, names: tuple[str, ...]) -> Tensor:
    """Return the embeddings of the named pictures, in their order and of their length.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: see `load_embeddings`, or a picture has none.
    """
    found, embeddings = load_embeddings(path)
    row = {name: number for number, name in enumerate(found)}
    if missing := [name for name in names if name not in row]:
        raise ValueError(
            f"{path}: {len(missing)} pictures of the protocol have no embedding, first "
            f"{', '.join(missing[:5])}"
        )
    vectors = torch.from_numpy(embeddings[[row[name] for name in names]]).float()
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{path} holds embeddings that are not finite")
    return vectors


if __name__ == "__main__":
    try:
        main(tyro.cli(Arguments))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
