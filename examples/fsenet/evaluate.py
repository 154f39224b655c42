"""Evaluate a trained network, or anybody's embeddings, and print JSON.

    python examples/fsenet/evaluate.py runs/default-0/network --protocol procedural
    python examples/fsenet/evaluate.py runs/lfw-0/network --protocol lfw --faces lfw112.zip
    python examples/fsenet/evaluate.py embeddings.npz --protocol lfw --faces lfw112.zip

An .npz holds `embeddings`, float `n d`, and `names`, n strings: the pictures' paths below the
folder of identities (`Abel_Pacheco/Abel_Pacheco_0001.jpg`). With `--all-folds` LFW's ten folds
are evaluated as published; only for networks that were not trained on people of LFW.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import numpy as np
import torch
import tyro
from arms import measure
from data.faces import TEST_FROM, draw_faces, picture_data, procedural_pairs
from describe import describe
from fit import Workplace
from model import load_network
from protocols.procedural import Pairs
from run_folder import versions
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Arguments:
    """Evaluate a network or embeddings.

    Args:
        checkpoint: the `network/` or `baseline/` folder of a run, or an `.npz` of embeddings.
        protocol: `procedural` draws its pictures; `lfw` reads them from `--faces`.
        faces: LFW as a folder or zip with its lists.
        all_folds: LFW's ten folds instead of the two that `train.py` leaves untrained.
        output: write the JSON there instead of printing it.
        seed: of the drawn people.
        identities: drawn people.
        samples: pictures of each.
        precision: `fp32` or `bf16` autocast.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional]
    protocol: Literal["procedural", "lfw"]
    faces: Path | None = None
    all_folds: bool = False
    output: Path | None = None
    seed: int = 0
    identities: int = 200
    samples: int = 6
    precision: Literal["fp32", "bf16"] = "fp32"


def main(arguments: Arguments) -> None:
    """Describe the pictures, score the pairs, write the numbers."""
    images, names, pairs, protocol = load_protocol(arguments)
    if arguments.checkpoint.suffix == ".npz":
        vectors = {"embeddings": read_embeddings(arguments.checkpoint, names)}
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        place = Workplace(Path(), device, arguments.precision)
        net = load_network(arguments.checkpoint).to(device)
        described = describe(net, images(), place)
        vectors = {"global half": described.global_half}
        if described.local_half is not None:
            vectors["local half"] = described.local_half
            vectors["both"] = described.join(described.local_half)
    numbers, _, _ = measure(vectors, pairs)
    text = json.dumps(
        {
            "checkpoint": str(arguments.checkpoint),
            "protocol": {**protocol, "test_time": "original and mirrored, concatenated, L2"},
            "precision": arguments.precision,
            "versions": versions(),
            "arms": numbers,
        },
        indent=2,
    )
    if arguments.output is None:
        print(text)
    else:
        arguments.output.write_text(text + "\n")
