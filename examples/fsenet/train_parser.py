"""Stage 1: train the face parser on drawn faces, which carry exact label maps.

    python examples/fsenet/train_parser.py

makes the parser that partlocal ships: it draws fresh faces for every step and, when it is done,
writes parsing_net.safetensors and its JSON into the run's folder, the next free runs/parser-<n>;
`--export` writes them into partlocal/weights/. `--resume` goes on where a run was killed.
`train.py` runs the same stage, shorter, on the faces that it draws anyway.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tyro
from data.augment import Augmentation, augment
from data.batches import BatchPlan, load_batches
from data.face_params import WILD
from data.faces import TEST_FROM, draw_faces
from data.fasseg import FASSEG, ParsingPairs, aligned_pairs, helen_to_fasseg
from data.procedural import ProceduralFaces
from fit import Batch, Fitted, Schedule, Workplace, fit
from limits import check_batch, check_numbers
from machine import finite, to_json, versions
from run_folder import one_line_errors, workplace
from telemetry import check_tensorboard
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from partlocal import HELEN, ParsingNet
from partlocal.evaluation.parsing import ParsingScore
from partlocal.parsing import PRETRAINED

PARSING_SPLIT = "frontal02-test"  # of FASSEG; the parser is scored on it
LOSS_SIZE = 64  # rows and columns at which the loss is taken; 128 costs half as much again


@dataclass(frozen=True)
class ParserOptions:
    """How the parser is built and trained.

    Args:
        width: channels of the hourglasses.
        num_stacks: hourglasses.
        grid: resolution they work at.
        steps: updates.
        batch_size: faces an update, over all processes.
        lr: peak of the rate of AdamW, which rises for 15 % of the steps and then falls to 0.
        augmentation: photographs differ from drawn faces in light and framing more than in the
            order of the parts.
    """

    width: int = 64
    num_stacks: int = 2
    grid: int = 64
    steps: int = 1200
    batch_size: int = 32
    lr: float = 1e-2
    augmentation: Augmentation = field(
        default_factory=lambda: Augmentation(
            shift=0.05, scale=0.12, rotation=12, brightness=0.3, contrast=0.4, grey=0.15
        )
    )

    def rate(self, done: float) -> float:
        """Return the learning rate when the fraction `done` of the training is over."""
        return self.lr * min(1.0, done / 0.15 + 1e-2) * (1 - done) ** 0.9


class ParsingLoss(NamedTuple):
    """Weighted cross-entropy, mean over pixels and stacks."""

    loss: Tensor


class TrainedParser(nn.Module):
    """A parser with its loss at every stack (FSENet, 3.5).

    Args:
        parser: to train.
        shares: of each label among the pixels. The loss weighs a label by share^-0.35: at equal
            weights a short training never learns the mouth's inside, at 1 / sqrt(share) parts
            come out too large.
    """

    weights: Tensor

    def __init__(self, parser: ParsingNet, shares: Tensor) -> None:
        super().__init__()
        self.parser = parser
        weights = shares.clamp(min=1e-4) ** -0.35
        self.register_buffer("weights", weights / (weights * shares).sum(), persistent=False)

    def forward(self, images: Tensor, labels: Tensor) -> ParsingLoss:
        """Return the loss of floats `b 3 h w` against labels `b h w`, at the parser's grid."""
        stacks = self.parser.forward_stacks(images, size=LOSS_SIZE)
        target = F.interpolate(labels.unsqueeze(1).float(), LOSS_SIZE, mode="nearest-exact")
        target = target.squeeze(1).long()
        losses = [F.cross_entropy(logits.float(), target, self.weights) for logits in stacks]
        return ParsingLoss(torch.stack(losses).mean())


class DrawnPairs(Dataset[tuple[Tensor, Tensor]]):
    """Picture and label map of a new person every time, half of them under wild circumstances."""

    def __init__(self, seed: int, length: int) -> None:
        self.mild = ProceduralFaces(seed, length, 1)
        self.wild = ProceduralFaces(seed, length, 1, ranges=WILD)

    def __len__(self) -> int:
        return len(self.mild)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        face = (self.wild if index % 2 else self.mild)[index]
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
    spread = np.linspace(0, len(faces) - 1, min(200, len(faces))).astype(int).tolist()
    sample = torch.stack([torch.as_tensor(faces[i][1]) for i in spread])
    shares = torch.bincount(sample.flatten().long(), minlength=len(parser.labels)) / sample.numel()
    module = TrainedParser(parser, shares).to(place.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.lr, weight_decay=1e-4)

    plan = BatchPlan(options.batch_size, options.steps, seed, place.rank, place.world, workers)

    def batches(first: int) -> Iterator[Batch]:
        for numbers, (images, labels) in load_batches(faces, plan, first):
            yield images, labels, numbers

    def prepare(images: Tensor, labels: Tensor, numbers: Tensor) -> Batch:
        return augment(images, labels, HELEN, options.augmentation, numbers)[:2]

    schedule = Schedule(options.steps, options.rate, optimizer)
    fitted = fit("parser", module, batches, schedule, place, prepare)
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


def score_parsing_set(parser: ParsingNet, path: Path, place: Workplace) -> dict[str, Any]:
    """Score the parser on FASSEG, its eleven labels merged to FASSEG's classes."""
    pairs = aligned_pairs(ParsingPairs(path, PARSING_SPLIT))
    score = ParsingScore(FASSEG)
    predicted = predict_labels(parser, pairs.images, place)
    score.update(predicted, pairs.labels.numpy(), merge=helen_to_fasseg())
    return {
        "split": PARSING_SPLIT,
        "pictures": len(pairs.names),
        "skipped": len(pairs.skipped),
        "f1": score.f1,
        "mean_f1": score.mean_f1,
    }


@dataclass(frozen=True)
class Arguments:
    """Train the parser that partlocal ships.

    Args:
        output: the run's folder; by default the next free `runs/parser-<number>`.
        resume: go on with `output`, or with the newest run.
        export: write the weights into the package instead of the run's folder.
        seed: of the faces, the weights and the augmentation.
        parser: how the parser is built and trained.
        precision: `fp32`, or `bf16` autocast; `auto` takes bf16 where the machine computes in it.
        workers: processes that draw faces.
        parsing: a folder or zip of `images/` and `labels/` on which the parser is scored too.
        tensorboard: write TensorBoard's events into the run's folder.
    """

    output: Path | None = None
    resume: bool = False
    export: bool = False
    seed: int = 0
    parser: ParserOptions = field(default_factory=ParserOptions)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 1
    parsing: Path | None = None
    tensorboard: bool = False


def build_parser(how: ParserOptions) -> ParsingNet:
    """Return the parser with fresh weights."""
    return ParsingNet(HELEN, how.width, how.num_stacks, grid=how.grid)


def check(arguments: Arguments) -> None:
    """Refuse what would fail only after minutes."""
    check_numbers(arguments)
    build_parser(arguments.parser)
    check_batch("--parser.batch-size", arguments.parser.batch_size)
    if arguments.parsing is not None:
        ParsingPairs(arguments.parsing, PARSING_SPLIT)
    if arguments.tensorboard:
        check_tensorboard()


def main(arguments: Arguments, place: Workplace) -> None:
    """Train, score, and write the weights."""
    how = arguments.parser
    torch.manual_seed(arguments.seed)
    parser = build_parser(how).to(place.device)
    faces = DrawnPairs(arguments.seed, how.steps * how.batch_size)
    fitted = train_parser(parser, faces, how, arguments.seed, place, arguments.workers)
    if place.rank > 0:
        return

    test = draw_faces(arguments.seed, range(TEST_FROM, TEST_FROM + 600), 1)
    scores = {"procedural": score_parser(parser, test.images, test.labels, place)}
    if arguments.parsing is not None:
        scores["fasseg"] = score_parsing_set(parser, arguments.parsing, place)
    about = {
        "recipe": "examples/fsenet/train_parser.py",
        "options": {"seed": arguments.seed, "parser": asdict(how)},
        "data": "procedural faces alone, a new person in every picture",
        "seconds": round(fitted.seconds),
        "precision": place.precision,
        "processes": place.world,
        "versions": versions(),
        "scores": scores,
    }
    path = PRETRAINED if arguments.export else place.folder / PRETRAINED.name
    parser.save_compact(path, finite(about))
    print(to_json(about))


if __name__ == "__main__":
    with one_line_errors():
        chosen = tyro.cli(Arguments)
        check(chosen)
        with workplace(chosen, "parser") as place:
            main(chosen, place)
