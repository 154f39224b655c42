"""What a run trains and tests on: drawn faces, or pictures of a folder or zip."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocols.lfw import LfwProtocol
from protocols.procedural import Pairs, draw_pairs
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from tqdm import tqdm

from data.images import IdentityFolder, decode_all
from data.procedural import ProceduralFaces

IN_MEMORY = 50_000  # pictures; at 112x112 that is 1.9 GB, and more are streamed


@dataclass(frozen=True)
class DrawnFaces:
    """Rendered pictures: images `n 3 h w` and label maps `n h w` (uint8), identities `n`."""

    images: Tensor
    labels: Tensor
    identities: Tensor


@dataclass(frozen=True)
class FaceData:
    """One data set for training and one protocol for testing, without a person in common.

    Args:
        train: items (image uint8 3 h w, identity, index).
        images: all training pictures `n 3 h w`, or None when they are streamed.
        num_identities: in training.
        test_images: uint8 `m 3 h w`.
        pairs: of test pictures.
        protocol: name, flags and hashes for metrics.json.
    """

    train: Dataset[tuple[Tensor, ...]]
    images: Tensor | None
    num_identities: int
    test_images: Tensor
    pairs: Pairs
    protocol: dict[str, Any]


def draw_faces(
    seed: int, identities: range, samples: int, title: str, workers: int | None = None
) -> DrawnFaces:
    """Render `samples` pictures of each of `identities`, in order."""
    faces = ProceduralFaces(seed, len(identities), samples, first_identity=identities.start)
    workers = min(2, os.cpu_count() or 1) if workers is None else workers
    loader = DataLoader(faces, batch_size=25, num_workers=workers)
    pieces: list[dict[str, Tensor]] = []
    with tqdm(total=len(faces), desc=title, unit="face", mininterval=1.0) as bar:
        for batch in loader:
            pieces.append({name: batch[name] for name in ("image", "labels")})
            bar.update(len(batch["image"]))
    return DrawnFaces(
        torch.cat([piece["image"] for piece in pieces]),
        torch.cat([piece["labels"] for piece in pieces]),
        torch.arange(len(identities)).repeat_interleave(samples),
    )


def procedural_data(train: DrawnFaces, test: DrawnFaces, seed: int, flags: dict[str, Any]) -> FaceData:
    """Train on some drawn people, verify others in ten folds."""
    pairs = draw_pairs(test.identities.numpy(), pairs_per_fold=300, seed=seed)
    return FaceData(
        in_memory(train.images, train.identities),
        train.images,
        int(train.identities.max()) + 1,
        test.images,
        pairs,
        {"name": "procedural", "folds": 10, "pairs": len(pairs.same), **flags},
    )


def picture_data(path: Path, seed: int, min_images: int = 1, progress: bool = True) -> FaceData:
    """Train on some people of a folder or zip and verify others.

    A set that brings LFW's lists is split by them: folds 0 to 7 and people of no fold train,
    folds 8 and 9 test. Of any other set a tenth of the people with two pictures or more test.
    """
    if LfwProtocol.is_at(path):
        protocol = LfwProtocol(path)
        train = IdentityFolder(path, protocol.train_identities)
        test = IdentityFolder(path, protocol.test_identities)
        pairs, flags = protocol.pairs(test.paths), protocol.flags()
    else:
        train, test, flags = _hold_out(path, seed)
        pairs = draw_pairs(test.labels, pairs_per_fold=100, seed=seed)
    images = decode_all(train, progress=progress) if len(train) <= IN_MEMORY else None
    labels = torch.from_numpy(train.labels)
    dataset = _Streamed(train) if images is None else in_memory(images, labels)
    tested = decode_all(test, progress=progress)
    return FaceData(dataset, images, len(train.identities), tested, pairs, flags)


def in_memory(images: Tensor, identities: Tensor) -> TensorDataset:
    """Return a data set of (image, identity, index)."""
    return TensorDataset(images, identities, torch.arange(len(images)))


class _Streamed(Dataset[tuple[Tensor, ...]]):
    """Decode each picture when it is asked for."""

    def __init__(self, folder: IdentityFolder) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return len(self.folder)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, identity = self.folder[index]
        return image, torch.tensor(identity), torch.tensor(index)


def _hold_out(path: Path, seed: int) -> tuple[IdentityFolder, IdentityFolder, dict[str, Any]]:
    everybody = IdentityFolder(path)
    names = np.array(everybody.identities)
    several = names[np.bincount(everybody.labels, minlength=len(names)) >= 2]
    count = max(40, len(several) // 10)
    if len(several) < count or len(names) < 2 * count:
        raise ValueError(
            f"{path} has {len(names)} identities, {len(several)} of them with two pictures or "
            f"more: testing needs {count} of these, and as many others to train on"
        )
    tested = set(np.random.default_rng(seed).choice(several, count, replace=False).tolist())
    flags = {"name": "held-out identities", "folds": 10, "identities": count, "seed": seed}
    train = IdentityFolder(path, set(names.tolist()) - tested)
    return train, IdentityFolder(path, tested), flags
