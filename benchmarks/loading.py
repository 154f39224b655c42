"""How many pictures a second the recipe reads from each format, beside torchvision and Pillow.

    python benchmarks/loading.py                     # 3,000 drawn faces as JPEG, 0, 1 and 2 workers
    python benchmarks/loading.py --faces lfw112.zip  # pictures of your own

Every way reads the same pictures, shuffled as in training, decodes them with Pillow into uint8
tensors and stacks batches of 64: `torchvision` is its `ImageFolder`, `pillow` a list of files. The
ways take turns; the median of five rounds is printed, and written to loading.json, by default in
benchmarks/results/<machine>/. The files are in the system's cache, so it is not the disk that is
measured.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples/fsenet"
sys.path[:0] = [str(RECIPE), str(ROOT / "benchmarks")]

import numpy as np
import pyarrow as pa
import torch
from common import write_result
from data.batches import shuffled
from data.pictures import open_pictures
from data.procedural import ProceduralFaces
from PIL import Image
from pyarrow import parquet
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

ROUNDS = 5
TARGETS = {
    "folder": "folder",
    "zip": "a.zip",
    "tar": "a.tar",
    "rec": "rec/train.rec",
    "shards": "shards-%06d.tar",
    "parquet": "a.parquet",
    "arrow": "arrow",
}


def main() -> None:
    """Print pictures a second by format and number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--faces", type=Path, help="a folder, zip, tar or .rec; else drawn ones")
    parser.add_argument("--pictures", type=int, default=3000, help="drawn ones")
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder for loading.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        source = options.faces or draw(made / "drawn", options.pictures)
        sets = readers(source, made)
        print("way", *(f"{count} workers" for count in options.workers), sep="\t")
        rates: dict[str, list[int]] = {name: [] for name in sets}
        for workers in options.workers:
            times: dict[str, list[float]] = {name: [] for name in sets}
            for _ in range(ROUNDS):
                for name, pictures in sets.items():
                    times[name].append(seconds(pictures, workers))
            for name, pictures in sets.items():
                rates[name].append(round(len(pictures) / statistics.median(times[name])))
        for name, found in rates.items():
            print(name, *found, sep="\t")
        count = len(next(iter(sets.values())))
        found = {"pictures": count, "workers": options.workers, "pictures_per_second": rates}
        print(write_result("loading", found, options.output))


def draw(folder: Path, count: int) -> Path:
    """Draw 100 people's faces, and write so many pictures of them."""
    faces = ProceduralFaces(0, 100, 6)
    drawn = [Image.fromarray(faces[i]["image"].permute(1, 2, 0).numpy()) for i in range(600)]
    for number in range(count):
        path = folder / f"{number % 100:03d}/{number // 100}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn[6 * (number % 100) + number // 100 % 6].save(path, quality=95)
    return folder


def readers(source: Path, folder: Path) -> dict[str, Dataset]:
    """Convert the pictures to every format and open them."""
    (folder / "rec").mkdir()
    for target in (target for name, target in TARGETS.items() if name != "arrow"):
        command = [sys.executable, str(RECIPE / "data/convert.py"), source, folder / target]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (folder / "arrow").mkdir()  # as `save_to_disk` of Hugging Face's datasets leaves it
    table = parquet.read_table(folder / "a.parquet")
    with pa.ipc.new_stream(folder / "arrow/data-00000-of-00001.arrow", table.schema) as writer:
        writer.write_table(table, 1000)
    found: dict[str, Dataset] = {name: open_pictures(folder / x) for name, x in TARGETS.items()}
    plain = ImageFolder(folder / "folder", PILToTensor(), loader=read)
    return {"torchvision": plain, "pillow": Files(plain.samples)} | found


def read(path: str) -> Image.Image:
    """Return what a file holds, in colour."""
    return Image.open(path).convert("RGB")


class Files(Dataset[tuple[torch.Tensor, int]]):
    """Files and whose they are, without anything of torchvision's."""

    def __init__(self, samples: Sequence[tuple[str, int]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        path, owner = self.samples[index]
        return torch.from_numpy(np.array(read(path))).permute(2, 0, 1), owner


def seconds(pictures: Dataset, workers: int) -> float:
    """Return how long one pass takes, from the first batch on: workers have started by then."""
    pieces = getattr(pictures, "pieces", None)  # torchvision's have none
    order = shuffled(len(pictures), torch.Generator().manual_seed(0), pieces).tolist()
    batches = iter(DataLoader(pictures, batch_size=64, sampler=order, num_workers=workers))
    first, _ = next(batches)
    began, count = time.perf_counter(), 0
    for images, _ in batches:
        count += len(images)
    return (time.perf_counter() - began) * len(pictures) / (len(pictures) - len(first))


if __name__ == "__main__":
    main()
