"""The frozen networks that arms look at: parsers of several sizes, and one of landmarks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from data.augment import augment, move_points
from data.batches import BatchPlan, load_batches
from data.faces import DrawnFaces
from data.procedural import FLIP68, ProceduralFaces
from fit import Batch, fit
from jaxtyping import Float
from options import Options, small_parser
from schedule import Schedule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset
from train_parser import train_parser
from workplace import Workplace

from ablation.arms import Arm
from partlocal import HELEN, ParsingNet

POINTS = 68
PARSER_STEPS = 600
SPREAD = 1.0  # of a point's target, in cells of the grid


def parser_of(
    arm: Arm, faces: DrawnFaces | None, options: Options, seed: int, place: Workplace
) -> ParsingNet:
    """Return the parser of an arm, frozen: the shipped one, or one trained for its sizes.

    Args:
        arm: which.
        faces: drawn, with exact labels; only for arms that bring a parser of their own.
        options: of the run.
        seed: of the training.
        place: where it is trained, in a folder of its own below `place.folder`.
    """
    if arm.parser is None:
        return ParsingNet.pretrained().freeze().to(place.device)
    if faces is None:
        raise ValueError(f"faces must be drawn ones to train the parser {arm.parser}; got None")
    stacks, bottleneck = arm.parser
    how = replace(small_parser(), num_stacks=stacks, steps=min(PARSER_STEPS, options.steps))
    torch.manual_seed(seed)
    parser = ParsingNet(HELEN, how.width, stacks, bottleneck, grid=how.grid).to(place.device)
    here = _below(place, f"parser-{stacks}-{bottleneck}-seed{seed}")
    train_parser(parser, TensorDataset(faces.images, faces.labels), how, seed, here)
    return parser


def landmarks_of(options: Options, seed: int, place: Workplace) -> ParsingNet:
    """Return a network that finds 68 landmarks, trained on drawn faces and frozen.

    Pictures are moved and lit as those of the parsers are, and points with them.
    """
    how = replace(small_parser(), steps=min(PARSER_STEPS, options.steps))
    torch.manual_seed(seed)
    net = ParsingNet(POINTS, how.width, how.num_stacks, grid=how.grid).to(place.device)
    module = TrainedLandmarks(net)
    optimizer = torch.optim.AdamW(module.parameters(), lr=how.lr, weight_decay=1e-4)
    plan = BatchPlan(how.batch_size, how.steps, seed)
    faces = DrawnLandmarks(seed, options.identities, options.samples)
    partners = FLIP68.tolist()

    def batches(first: int) -> Iterator[Batch]:
        for numbers, (images, points) in load_batches(faces, plan, first):
            yield images, points, numbers

    def prepare(images: Tensor, points: Tensor, numbers: Tensor) -> Batch:
        points = move_points(points, partners, images.shape[-1], how.augmentation, numbers)
        return augment(images, None, HELEN, how.augmentation, numbers).images, points

    here = _below(place, f"landmarks-seed{seed}")
    fit("landmarks", module, batches, Schedule(how.steps, how.rate, optimizer), here, prepare)
    return net.freeze()


class DrawnLandmarks(Dataset[tuple[Tensor, Tensor]]):
    """Pictures (uint8 3 112 112) of drawn people with their 68 points (x, y in pixels)."""

    def __init__(self, seed: int, identities: int, samples: int) -> None:
        self.faces = ProceduralFaces(seed, identities, samples)

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        face = self.faces[index]
        return face["image"], face["points68"]


class LandmarkLoss(NamedTuple):
    """Cross-entropy between heat maps and Gaussians, mean over points and stacks."""

    loss: Tensor


class TrainedLandmarks(nn.Module):
    """A network of heat maps with its loss at every stack.

    Args:
        net: one map a point.
    """

    def __init__(self, net: ParsingNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, points: Tensor) -> LandmarkLoss:
        """Return the loss of floats `b 3 h w` against points `b n 2` in their pixels."""
        target = gaussians(points, images.shape[-1], self.net.grid).flatten(2)
        stacks = self.net.forward_stacks(images, self.net.grid)
        losses = [
            F.cross_entropy(logits.float().flatten(0, 1).flatten(1), target.flatten(0, 1))
            for logits in stacks
        ]
        return LandmarkLoss(torch.stack(losses).mean())


def gaussians(
    points: Float[Tensor, "b n 2"], size: int, grid: int
) -> Float[Tensor, "b n {grid} {grid}"]:
    """Return for each point a Gaussian on the grid that sums to 1.

    >>> target = gaussians(torch.tensor([[[5.5, 1.5]]]), size=8, grid=4)
    >>> target.flatten().argmax()  # row 0 or 1, column 2 or 3
    tensor(2)

    Args:
        points: x, y in pixels; the centre of the first is (0, 0).
        size: pixels of the picture's side.
        grid: cells of a side.
    """
    cells = (torch.arange(grid, device=points.device) + 0.5) * (size / grid) - 0.5
    width = SPREAD * size / grid
    x, y = ((cells - points[..., axis, None]) / width for axis in (0, 1))
    energy = -(y.square()[..., :, None] + x.square()[..., None, :]) / 2
    return energy.flatten(2).softmax(2).unflatten(2, (grid, grid))


def _below(place: Workplace, name: str) -> Workplace:
    folder: Path = place.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    return replace(place, folder=folder)
