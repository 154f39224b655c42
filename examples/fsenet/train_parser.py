"""Stage 1: train the face parser on drawn faces, which carry exact label maps.

    python examples/fsenet/train_parser.py

makes the parser that partlocal ships: it draws fresh faces for every step and, when it is done,
writes parsing_net.safetensors and its JSON into the run's folder, the next free runs/parser-<n>;
`--export` writes them into partlocal/weights/. `--resume` goes on where a run was killed.
`train.py` runs the same stage, shorter, on the faces that it draws anyway.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import tyro
from data.augment import Augmentation
from data.batches import BatchPlan
from data.face_params import WILD
from data.faces import TEST_FROM, draw_faces
from data.mixture import Ingredient, augment_step, mix, mixed_batches, open_mix
from data.procedural import ProceduralFaces
from data.vocabularies import Vocabulary
from errors import one_line_errors
from fit import Batch, fit
from limits import check_batch, check_numbers
from machine import finite, to_json, versions
from parsing_loss import IGNORE, LossName, group_dice_loss, parsing_loss
from run_folder import plain, workplace
from schedule import Schedule
from score_parser import open_sets, score_parser, score_parsing_set
from telemetry import Fitted, check_tensorboard
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from workplace import Workplace

from partlocal import HELEN, ParsingNet
from partlocal.parsing import PRETRAINED

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
        loss: `cross-entropy` of a softmax, `binary` of a sigmoid a label, or squared error of a
            `heatmap`.
        dice: weight of the Dice loss beside it.
        mix: sets that train beside the drawn faces, `PATH:KIND:SPLITS:SHARE` each, with their share
            of every batch.
        damaged: how many pictures of such a set, or of one that is scored, may be damaged; each is
            named and left out.
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
    loss: LossName = "cross-entropy"
    dice: float = 0.0
    mix: tuple[str, ...] = ()
    damaged: int = 0

    def rate(self, done: float) -> float:
        """Return the learning rate when the fraction `done` of the training is over."""
        return self.lr * min(1.0, done / 0.15 + 1e-2) * (1 - done) ** 0.9


class ParsingLoss(NamedTuple):
    """The weighted loss, mean over pictures and stacks."""

    loss: Tensor


class TrainedParser(nn.Module):
    """A parser with its loss at every stack (FSENet, 3.5), on sets with labels of their own.

    Args:
        parser: to train.
        groups: for each set the 0/1 matrix `g n` from the parser's labels to the set's.
        shares: for each set the share `g` of each label among its pixels. The loss weighs a label
            by share^-0.35: at equal weights a short training never learns the mouth's inside, at
            1 / sqrt(share) parts come out too large.
        loss, dice: see `ParserOptions`.
    """

    def __init__(
        self,
        parser: ParsingNet,
        groups: Sequence[Tensor],
        shares: Sequence[Tensor],
        loss: LossName = "cross-entropy",
        dice: float = 0.0,
    ) -> None:
        super().__init__()
        self.parser, self.groups, self.loss, self.dice = parser, tuple(groups), loss, dice
        for number, share in enumerate(shares):
            weights = share.clamp(min=1e-4) ** -0.35
            weights = weights / (weights * share).sum()
            self.register_buffer(f"weights_{number}", weights, persistent=False)

    def forward(self, images: Tensor, *targets: Tensor) -> ParsingLoss:
        """Return the loss at `LOSS_SIZE`, every picture counting alike.

        Args:
            images: floats `b 3 h w`, those of the first set first.
            targets: of each set, labels `b h w` or probabilities `b g h w`.
        """
        stacks = self.parser.forward_stacks(images, size=LOSS_SIZE)
        sizes = [len(target) for target in targets]
        loss = images.new_zeros(())
        for number, target in enumerate(map(_shrink, targets)):
            own = [logits.split(sizes)[number] for logits in stacks]
            mean = torch.stack([self._loss(logits, target, number) for logits in own]).mean()
            loss = loss + mean * (sizes[number] / len(images))
        return ParsingLoss(loss)

    def _loss(self, logits: Tensor, target: Tensor, number: int) -> Tensor:
        groups, weights = self.groups[number], self.get_buffer(f"weights_{number}")
        loss = parsing_loss(logits, target, groups, weights, self.loss)
        if self.dice:
            loss = loss + self.dice * group_dice_loss(logits, target, groups)
        return loss


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
    """Train `parser`, then freeze it.

    Args:
        parser: on the device.
        faces: drawn ones (image uint8 3 h w, labels uint8 h w), which fill what `options.mix`
            leaves of a batch.
        options: the training.
        seed: of order and augmentation.
        place: see `fit`.
        workers: processes that draw.
    """
    shares = open_mix(options.mix, options.batch_size, place.world)
    drawn = Ingredient(faces, Vocabulary(HELEN), options.batch_size)
    sets = mix(drawn, shares, options.damaged)
    groups = [one.vocabulary.groups(parser.labels) for one in sets]
    pixels = [label_shares(one) for one in sets]
    module = TrainedParser(parser, groups, pixels, options.loss, options.dice)
    module = module.to(place.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(module.parameters(), lr=options.lr, weight_decay=1e-4)

    plan = BatchPlan(options.batch_size, options.steps, seed, place.rank, place.world, workers)

    def batches(first: int) -> Iterator[Batch]:
        for step in mixed_batches(sets, plan, first):
            yield [tensor for of_a_set in step for tensor in of_a_set]

    def prepare(*tensors: Tensor) -> Batch:
        step = zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True)
        return augment_step(sets, list(step), options.augmentation)

    schedule = Schedule(options.steps, options.rate, optimizer)
    fitted = fit("parser", module, batches, schedule, place, prepare)
    parser.freeze()
    return fitted


def label_shares(one: Ingredient) -> Tensor:
    """Return the share of each label among the pixels of up to 200 pictures across a set."""
    data, count = one.dataset, len(one.vocabulary.labels)
    spread = np.linspace(0, len(data) - 1, min(200, len(data))).astype(int).tolist()
    sample = torch.stack([torch.as_tensor(data[i][1]) for i in spread])
    if sample.ndim == 4:
        pixels = sample.double().sum((0, 2, 3))
    else:
        pixels = torch.bincount(sample[sample != IGNORE].long(), minlength=count)
    return (pixels / pixels.sum()).float()


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
        score: sets on which the parser is scored too, `PATH:KIND:SPLITS` each.
        tensorboard: write TensorBoard's events into the run's folder.
    """

    output: Path | None = None
    resume: bool = False
    export: bool = False
    seed: int = 0
    parser: ParserOptions = field(default_factory=ParserOptions)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    workers: int = 1
    score: tuple[str, ...] = ()
    tensorboard: bool = False


def _shrink(target: Tensor) -> Tensor:
    if target.is_floating_point():
        return F.interpolate(target, (LOSS_SIZE, LOSS_SIZE), mode="bilinear", antialias=True)
    small = F.interpolate(target.unsqueeze(1).float(), LOSS_SIZE, mode="nearest-exact")
    return small.squeeze(1).long()


def build_parser(how: ParserOptions) -> ParsingNet:
    """Return the parser with fresh weights."""
    return ParsingNet(HELEN, how.width, how.num_stacks, grid=how.grid)


def check_training(how: ParserOptions) -> None:
    """Refuse a parser that cannot be built, and sets that cannot be mixed."""
    build_parser(how)
    open_mix(how.mix, how.batch_size)


def check(arguments: Arguments) -> None:
    """Refuse what would fail only after minutes."""
    check_numbers(arguments)
    check_batch("--parser.batch-size", arguments.parser.batch_size)
    check_training(arguments.parser)
    if arguments.parser.mix and arguments.export:
        raise ValueError("--export ships a parser of drawn faces alone: leave --parser.mix out")
    open_sets(arguments.score)
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
    for title, pairs in open_sets(arguments.score).items():
        scores[title] = score_parsing_set(parser, pairs, place, how.damaged)
    mixed = [
        f"{share.pairs.title}, {share.count} of a batch"
        for share in open_mix(how.mix, how.batch_size, place.world)
    ]
    about = {
        "recipe": "examples/fsenet/train_parser.py",
        "options": {"seed": arguments.seed, "parser": plain(arguments)["parser"]},
        "data": ["procedural faces, a new person in every picture", *mixed],
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
