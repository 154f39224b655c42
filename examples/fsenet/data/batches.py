"""Batches as a function of (seed, step): any step can be reached again, bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.augment import NUMBERS
from data.images import Pieces


@dataclass(frozen=True)
class BatchPlan:
    """Which pictures each step sees.

    Args:
        batch_size: of an update, which all processes share evenly.
        steps: of the whole training.
        seed: of the shuffles and of what is done at random to a batch.
        rank: of this process among `world`.
        world: number of processes.
        workers: processes that decode pictures for this one.
        accumulate: micro-batches in which a process takes its share of an update.
    """

    batch_size: int
    steps: int
    seed: int
    rank: int = 0
    world: int = 1
    workers: int = 0
    accumulate: int = 1

    def share(self, micro: int) -> slice:
        """Return which pictures of an update are in a micro-batch of this process."""
        return slice(micro * self.world + self.rank, self.batch_size, self.world * self.accumulate)


class StepSampler(Sampler[list[int]]):
    """The indices of each micro-batch of each step: epochs are shuffled by (seed, epoch).

    The pictures of a step are the same for any number of processes, micro-batches and workers.

    Args:
        length: of the data set.
        plan: sizes and seed.
        first: the step to begin at, which is how a run is resumed.
        pieces: see `shuffled`.
    """

    def __init__(
        self, length: int, plan: BatchPlan, first: int = 0, pieces: Pieces | None = None
    ) -> None:
        if plan.batch_size % (plan.world * plan.accumulate):
            raise ValueError(
                f"batch_size must be a multiple of {plan.world} processes x {plan.accumulate} "
                f"micro-batches; got {plan.batch_size}"
            )
        if length < plan.batch_size:
            raise ValueError(
                f"batch_size must be at most the number of pictures, {length}; "
                f"got {plan.batch_size}"
            )
        self.length, self.plan, self.first, self.pieces = length, plan, first, pieces

    def __len__(self) -> int:
        return (self.plan.steps - self.first) * self.plan.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        size = self.plan.batch_size
        steps_per_epoch = self.length // size
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(self.first, self.plan.steps):
            if step // steps_per_epoch != epoch:
                epoch = step // steps_per_epoch
                rng = generator(self.plan.seed, epoch)
                order = shuffled(self.length, rng, self.pieces)
            begin = (step % steps_per_epoch) * size
            batch = order[begin : begin + size]
            for micro in range(self.plan.accumulate):
                yield batch[self.plan.share(micro)].tolist()


def shuffled(length: int, rng: torch.Generator, pieces: Pieces | None = None) -> Tensor:
    """Return all indices in a random order, n.

    Args:
        length: of the data set.
        rng: the same state gives the same order.
        pieces: when pictures are read together, whole pieces are shuffled, and then the pictures
            of so many of them as memory holds: each piece is read once by everybody who needs it.
    """
    order = torch.randperm(length, generator=rng)
    if pieces is None:
        return order
    _, piece = torch.from_numpy(pieces.number).unique(return_inverse=True)
    window = torch.randperm(int(piece.max()) + 1, generator=rng) // pieces.together
    return order[window[piece[order]].argsort(stable=True)]


def generator(*key: int) -> torch.Generator:
    """Return a generator seeded by a tuple of numbers, such as (seed, epoch).

    >>> torch.rand(1, generator=generator(0, 7)) == torch.rand(1, generator=generator(0, 7))
    tensor([True])
    """
    mixed = 0
    for number in key:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed)


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise what a loader's worker raised in one line: torch hands on its whole traceback."""
    try:
        yield
    except ValueError as error:
        text = str(error).strip()
        if text.startswith("Caught "):  # and at its end "class: message"
            text = text.splitlines()[-1].partition(": ")[2]
        raise ValueError(text) from error


def load_batches(
    dataset: Dataset[tuple[Tensor, ...]], plan: BatchPlan, first: int
) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """Yield each micro-batch from step `first` on, with the random numbers of its augmentation.

    The numbers are those of the picture's place in the whole batch, `NUMBERS b`: any number of
    processes and micro-batches augments the same pictures alike.

    Raises:
        ValueError: a picture cannot be decoded, or there are fewer than a batch needs.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=StepSampler(
            len(dataset),  # type: ignore[arg-type]
            plan,
            first,
            getattr(dataset, "pieces", None),
        ),
        num_workers=plan.workers,
        pin_memory=torch.cuda.is_available(),
        # without one of its own the loader draws from the main generator, and a run that is
        # resumed would not be the run that was not interrupted
        generator=generator(plan.seed, first),
    )
    with worker_errors():
        for call, batch in enumerate(loader, start=first * plan.accumulate):
            step, micro = divmod(call, plan.accumulate)
            rng = generator(plan.seed, step, 0)  # two numbers are an epoch's
            numbers = torch.rand(NUMBERS, plan.batch_size, generator=rng)
            yield numbers[:, plan.share(micro)], batch
