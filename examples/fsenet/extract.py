"""Describe pictures of any number with a trained network, and keep the embeddings on disk.

    python examples/fsenet/extract.py runs/lfw-0/network --faces lfw112.zip --output features/
    python examples/fsenet/extract.py runs/lfw-0/network --faces train.rec --output features/
    torchrun --nproc-per-node=2 examples/fsenet/extract.py NETWORK --faces IJBC/ --output features/

Reads a folder, zip or tar of aligned faces at any depth, a `.rec`, WebDataset's shards, Hugging
Face's Parquet, or IJB's loose crops with their list of points, from which it cuts the faces.
`features/` holds `embeddings.npy`, which can be mapped into memory, and `embeddings.txt`, a name a
line; `evaluate.py` takes it wherever it takes an `.npz`. The same command again goes on where a
kill has left it, with any number of processes; on a CPU the result is bit for bit that of a run
that was not stopped.
"""

import hashlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import iresnet  # noqa: F401  (registers the recipe's backbones with timm)
import numpy as np
import torch
import tyro
from data.archives import DamagedImage
from data.batches import worker_errors
from data.damage import Damage
from data.faces import SIZE
from data.images import IdentityFolder, IdentityPictures
from data.loose import LoosePictures
from data.pictures import open_pictures, reader_of
from describe import GLOBAL, LOCAL, TestTime, describe, whole
from errors import one_line_errors
from feature_folder import FeatureFolder, hash_names
from limits import check_numbers
from machine import keep_freed_memory
from model import GlobalNet, load_network
from protocols.crops import LooseCrops, holds_crops
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from workplace import Workplace, this_process

from partlocal import PartLocalNet


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """How pictures are described.

    Args:
        vectors: the network's whole descriptor, or one half of it; a network without parts has the
            global half alone.
        test_time: `concatenation` of the vectors of a picture and its mirror image, or their `sum`.
        dtype: of the numbers on disk.
        precision: `fp32`, or `bf16` autocast; `auto` takes bf16 where the machine computes in it.
        batch_size: pictures a step.
        workers: processes that decode pictures.
        damaged: pictures that may be damaged, in each process, those that opening a set finds
            among them; they have no embedding.
        flush_seconds: between two marks of what is done; what a kill costs at most.
    """

    vectors: Literal["both", "global", "local"] = "both"
    test_time: TestTime = "concatenation"
    dtype: Literal["fp16", "fp32"] = "fp16"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    batch_size: int = 100
    workers: int = 0
    damaged: int = 0
    flush_seconds: float = 20.0


@dataclass(frozen=True, kw_only=True)
class Arguments(Extraction):
    """Describe pictures with a trained network.

    Args:
        network: the `network/` or `baseline/` folder of a run.
        faces: aligned faces in a folder, zip or tar, a `.rec`, WebDataset's shards
            (`faces-%06d.tar`) or Hugging Face's Parquet; or IJB's folder.
        output: the folder to fill, or to go on with.
    """

    network: Annotated[Path, tyro.conf.Positional]
    faces: Path
    output: Path


def main(arguments: Arguments) -> None:
    """Open network and pictures, describe, say what is there."""
    check_numbers(arguments)
    pictures = open_to_describe(arguments.faces, arguments.damaged)
    folder = extract(arguments.network, pictures, arguments.output, arguments)
    left, lost = folder.undone(), pictures.damage.count
    print(
        f"{arguments.output}: {folder.count} pictures, {folder.damaged()} of them damaged"
        + (f"; {lost} more were left out on opening" if lost else "")
        + (f"; other processes are at {left} batches" if left else "")
    )


def open_to_describe(path: Path, damaged: int = 0) -> IdentityPictures:
    """Open whatever holds faces.

    Args:
        path: of it.
        damaged: how many pictures may be left out.

    Raises:
        FileNotFoundError, ValueError: see `open_pictures`, `LoosePictures` and `LooseCrops`.
    """
    if reader_of(path) is not IdentityFolder:
        return open_pictures(path, size=SIZE, damage=Damage(damaged))
    reader = LooseCrops if holds_crops(path) else LoosePictures
    return reader(path, size=SIZE)


def extract(
    network: Path, pictures: IdentityPictures, output: Path, how: Extraction
) -> FeatureFolder:
    """Describe pictures into a folder, or those of them that it lacks; each process its share.

    Args:
        network: folder of a trained one.
        pictures: which.
        output: the folder.
        how: see there.

    Raises:
        FileExistsError, ValueError: see `FeatureFolder`; or more pictures are damaged than may be.
    """
    keep_freed_memory()
    net, place = load_network(network), this_process(how.precision)
    net.to(place.device)
    blank = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    options = {
        **{k: v for k, v in asdict(how).items() if k in ("vectors", "test_time", "dtype")},
        "batch_size": how.batch_size,
        "precision": place.precision,
        "device": place.device.type,
        "pictures": len(pictures),
        "width": _vectors(net, blank, place, how).shape[1],
        "network_sha256": _hash_of(network),
        "names_sha256": hash_names(map(pictures.name, range(len(pictures)))),
    }
    if isinstance(pictures, LooseCrops):  # other points are other pictures
        options["points_sha256"] = pictures.points_sha256
    names = map(pictures.name, range(len(pictures)))
    folder = FeatureFolder(output, options, names, place.rank)
    todo = folder.todo(place.rank, place.world)
    loader = DataLoader(
        _Readable(pictures), batch_sampler=_Batches(folder, todo), num_workers=how.workers
    )
    total = folder.pictures(folder.share(place.rank, place.world))
    done = total - folder.pictures(todo.tolist())
    if done and place.rank == 0:
        print(f"{output}: {done} of {total} pictures are described already", file=sys.stderr)
    bar = tqdm(
        total=total, initial=done, desc="describing", unit="picture", disable=place.rank > 0,
        mininterval=1.0 if os.isatty(2) else 15.0,
    )  # fmt: skip
    flushed, lost = time.monotonic(), pictures.damage.count
    with bar, worker_errors():
        for batch, (images, problems) in zip(todo.tolist(), loader, strict=True):
            damaged = [place for place, problem in enumerate(problems) if problem]
            folder.write(batch, _vectors(net, images, place, how), damaged)
            lost += len(damaged)
            for number in damaged:
                bar.write(f"left out: {problems[number]}", file=sys.stderr)
            if damaged or time.monotonic() - flushed > how.flush_seconds:
                folder.flush()
                flushed = time.monotonic()
                _check_damage(lost, how.damaged)
            bar.update(len(images))
        folder.flush()
        _check_damage(lost, how.damaged)
    return folder


class _Readable(Dataset[tuple[Tensor, str]]):
    """Decoded pictures `3 h w`, black with a reason where one is damaged."""

    def __init__(self, pictures: IdentityPictures) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return self.pictures[index][0], ""
        except DamagedImage as error:
            return torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), str(error)


class _Batches(Sampler[list[int]]):
    """The pictures of each batch that is to be done."""

    def __init__(self, folder: FeatureFolder, todo: np.ndarray) -> None:
        self.folder, self.todo = folder, todo

    def __len__(self) -> int:
        return len(self.todo)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.todo.tolist():
            yield list(self.folder.rows(batch))


def _check_damage(count: int, allowed: int) -> None:
    """Refuse more damage than is allowed; what an earlier run met, this one has tried again."""
    if count > allowed:
        raise ValueError(
            f"{count} damaged pictures, and --damaged allows {allowed}: replace them, or allow "
            "more, and a folder that is kept goes on"
        )


def _vectors(
    net: PartLocalNet | GlobalNet, images: Tensor, place: Workplace, how: Extraction
) -> np.ndarray:
    arm = {"global": GLOBAL, "local": LOCAL, "both": whole(net)}[how.vectors]
    found = describe(net, images, place, test_time=how.test_time, batch_size=len(images)).arms
    if arm not in found:
        raise ValueError("--vectors local: the network has no parts; use --vectors global")
    return found[arm].numpy()


def _hash_of(network: Path) -> str:
    """Return a hash of a network's files: an embedding of another one is no embedding of it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in network.iterdir() if path.is_file()):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Arguments))
