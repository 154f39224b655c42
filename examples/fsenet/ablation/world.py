"""What the arms of one seed train and test on: a drawn world, or some of LFW's own folds."""

from dataclasses import dataclass
from pathlib import Path

import torch
from data.faces import (
    SIZE,
    TEST_FROM,
    TestSet,
    TrainingSet,
    draw_faces,
    drawn_test_set,
    in_memory,
    lfw_test_set,
)
from data.images import decode_all
from data.pictures import open_pictures
from options import Options
from protocols.lfw import LfwProtocol
from torch import Tensor

from ablation.arms import People

FEW = 4  # pictures of a drawn person that `enough` leaves out
ENOUGH = 5  # of a person of LFW


@dataclass(frozen=True)
class World:
    """The data of one seed.

    Args:
        seed: of everything random.
        images: uint8 `n 3 112 112`, to train on.
        identities: whose they are, n.
        enough: whether their person has many pictures, n.
        test: people that are not among them, and their pairs.
        usual: who trains where an arm does not say.
    """

    seed: int
    images: Tensor
    identities: Tensor
    enough: Tensor
    test: TestSet
    usual: People

    def train(self, people: People | None) -> TrainingSet:
        """Return the pictures of some of the people, numbered anew."""
        people = people or self.usual
        keep = torch.ones_like(self.enough) if people == "all" else self.enough
        share = {"half": 2, "quarter": 4}.get(people, 1)
        chosen = self.identities[keep].unique()[::share].contiguous()
        rows = torch.isin(self.identities, chosen).nonzero().flatten()
        numbers = torch.searchsorted(chosen, self.identities[rows])
        if len(rows) == len(self.images):
            return in_memory(self.images, numbers)
        return in_memory(self.images[rows], numbers)


def drawn_world(seed: int, options: Options) -> World:
    """Draw the people of a seed: many pictures of most, few of a quarter as many others."""
    people = options.identities
    many = draw_faces(seed, range(people), options.samples)
    few = draw_faces(seed, range(people, people + people // 4), FEW)
    test = draw_faces(
        seed, range(TEST_FROM, TEST_FROM + options.test_identities), options.test_samples
    )
    return World(
        seed,
        torch.cat([many.images, few.images]),
        torch.cat([many.identities, few.identities + people]),
        torch.arange(len(many.images) + len(few.images)) < len(many.images),
        drawn_test_set(test, seed),
        "enough",
    )


def test_folds(seed: int) -> tuple[int, int]:
    """Return the two of LFW's folds that a seed tests.

    >>> test_folds(4)
    (8, 9)
    """
    first = 2 * seed % 10
    return first, first + 1


def lfw_world(seed: int, path: Path) -> World:
    """Split LFW by its folds: those of a seed test, so that five seeds test all ten.

    All people of the other folds and of none train; those with many pictures are marked.
    """
    folds = test_folds(seed)
    protocol = LfwProtocol.read(path)
    test = lfw_test_set(path, protocol, folds)
    pictures, images = decode_all(open_pictures(path, protocol.train_identities(folds), SIZE))
    identities = torch.from_numpy(pictures.labels)
    enough = torch.bincount(identities)[identities] >= ENOUGH
    return World(seed, images, identities, enough, test, "all")
