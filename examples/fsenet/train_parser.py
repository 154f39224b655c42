"""Stage 1: train the face parser on drawn faces, which carry exact label maps.

    python examples/fsenet/train_parser.py --output runs/parser

makes the parser that partlocal ships: it draws fresh faces for every step and, when it is done,
writes parsing_net.safetensors and its JSON into the run's folder (`--export` writes them into
partlocal/weights/). `train.py` runs the same stage, shorter, on the faces that it draws anyway.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import tyro
from data.augment import Augmentation, augment
from data.batches import StepSampler, generator, load_batches
from data.faces import draw_faces
from data.procedural import ProceduralFaces
from fit import Fitted, Schedule, Workplace, fit
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from partlocal import HELEN, ParsingNet
from partlocal.evaluation.parsing import ParsingScore


@dataclass(frozen=True)
class ParserOptions:
    """How the parser is built and trained.

    Args:
        width: channels of the hourglasses.
        num_stacks: hourglasses.
        grid: resolution they work at.
        steps: updates.
        batch_size: faces an update, on each process.
        lr: peak of the rate of AdamW, which rises for a tenth of the steps and then falls to 0.
        augmentation: photographs differ from drawn faces in light and framing more than in the
            order of the parts.
    """

    width: int = 64
    num_stacks: int = 2
    grid: int = 32
    steps: int = 400
    batch_size: int = 32
    lr: float = 4e-3
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(
            shift=0.06, scale=0.15, rotation=15, brightness=0.3, contrast=0.4, grey=0.15
        )
    )

    def rate(self, done: float) -> float:
        """Return the learning rate when the fraction `done` of the training is over."""
        return self.lr * min(1.0, done / 0.1 + 1e-3) * (1 - done) ** 0.9


class ParsingLoss(NamedTuple):
    """Cross-entropy, mean over pixels and stacks."""

    loss: Tensor


class TrainedParser(nn.Module):
    """A parser with its loss at every stack (FSENet, 3.5)."""

    def __init__(self, parser: ParsingNet) -> None:
        super().__init__()
        self.parser = parser

    def forward(self, images: Tensor, labels: Tensor) -> ParsingLoss:
        """Return the loss of floats `b 3 h w` against labels `b h w`."""
        stacks = self.parser.forward_stacks(images)
        target = F.interpolate(labels.unsqueeze(1).float(), stacks[0].shape[-2:], mode="nearest")
        target = target.squeeze(1).long()
        losses = [F.cross_entropy(logits.float(), target) for logits in stacks]
        return ParsingLoss(torch.stack(losses).mean())


class DrawnPairs(Dataset[tuple[Tensor, Tensor]]):
    """Fresh faces without end: picture and label map, a new person every time."""

    def __init__(self, seed: int, length: int) -> None:
        self.faces = ProceduralFaces(seed, length, 1)

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        face = self.faces[index]
        return face["image"], face["labels"]


def train_parser(
    parser: ParsingNet,
    faces: Dataset[tuple[Tensor, ...]],
    options: ParserOptions,
    seed: int,
    place: Workplace,
    workers: int = 0,
) -> Fitted:
    """Train `parser` on items (image uint8 3 h w, labels uint8 h w), then freeze it."""
    module = TrainedParser(parser).to(place.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.lr, weight_decay=1e-4)

    def batches(first: int) -> Iterator[Sequence[Tensor | None]]:
        sampler = StepSampler(
            len(faces),  # type: ignore[arg-type]
            options.batch_size,
            (first, options.steps),
            seed,
            place.rank,
            place.world,
        )
        for step, batch in enumerate(load_batches(faces, sampler, workers), start=first):
            rng = generator(seed, step, place.rank)
            yield augment(batch[0], batch[1].long(), HELEN, options.augmentation, rng)

    schedule = Schedule(options.steps, options.rate, optimizer)
    fitted = fit("parser", module, batches, schedule, place)
    parser.freeze()
    return fitted


@torch.inference_mode()
def predict_labels(
    parser: ParsingNet, images: Tensor, place: Workplace, batch_size: int = 64
) -> np.ndarray:
    """Return the most probable label of each pixel, at the pictures' own size."""
    predicted = []
    for chunk in images.split(batch_size):
        with place.autocast():
            logits = parser(chunk.to(place.device)).float()
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", antialias=True)
        predicted.append(logits.argmax(1).cpu())
    return torch.cat(predicted).numpy()


def score_parser(
    parser: ParsingNet, images: Tensor, labels: Tensor, place: Workplace
) -> dict[str, Any]:
    """Score the parser on drawn faces that it was not trained on."""
    score = ParsingScore(parser.labels)
    score.update(predict_labels(parser, images, place), labels.numpy().astype(np.int64))
    return {
        "macro_f1": float(np.nanmean(list(score.f1.values()))),
        "mean_f1": score.mean_f1,
        "helen_overall_f1": score.overall_f1,
        "miou": score.mean_iou,
        "f1": score.f1,
    }


@dataclass(frozen=True)
class Arguments:
    """Train the parser that partlocal ships.

    Args:
        output: the run's folder; a run that was killed goes on from its checkpoint.
        export: write the weights into the package instead of the run's folder.
        seed: of the faces, the weights and the augmentation.
        parser: how the parser is built and trained.
        workers: processes that draw faces.
        parsing: a folder or zip of `images/` and `labels/` on which the parser is scored too.
    """

    output: Path = Path("runs/parser")
    export: bool = False
    seed: int = 0
    parser: ParserOptions = field(default_factory=lambda: ParserOptions(grid=64, steps=3000))
    workers: int = 1
    parsing: Path | None = None
