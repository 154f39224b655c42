"""Batches as a function of (seed, step): any step can be reached again, at any time, bit for bit."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler


class StepSampler(Sampler[list[int]]):
    """The indices of each step: epochs are shuffled by (seed, epoch), ranks take turns.

    Args:
        length: of the data set.
        batch_size: on this rank.
        steps: `(first, last)`; iteration begins at `first`, which is how a run is resumed.
        seed: of the shuffles.
        rank: of this process among `world`.
        world: number of processes, each of which sees its own share of every global batch.
    """

    def __init__(  # noqa: PLR0913
        self,
        length: int,
        batch_size: int,
        steps: tuple[int, int],
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if length < batch_size * world:
            raise ValueError(
                f"batch_size must be at most the number of pictures, {length}; "
                f"got {batch_size} x {world} processes"
            )
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.seed, self.rank, self.world = seed, rank, world
        self.steps_per_epoch = length // (batch_size * world)

    def __len__(self) -> int:
        return self.steps[1] - self.steps[0]

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.long)
        for step in range(*self.steps):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = torch.randperm(self.length, generator=generator(self.seed, epoch))
            first = (step % self.steps_per_epoch) * self.batch_size * self.world
            share = order[first + self.rank : first + self.batch_size * self.world : self.world]
            yield share.tolist()


def generator(*key: int) -> torch.Generator:
    """Return a generator seeded by a tuple of numbers, such as (seed, step, rank).

    >>> torch.rand(1, generator=generator(0, 7)) == torch.rand(1, generator=generator(0, 7))
    tensor([True])
    """
    mixed = 0
    for number in key:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed)


def load_batches(
    dataset: Dataset[tuple[Tensor, ...]], sampler: StepSampler, workers: int = 0
) -> Iterator[Sequence[Tensor]]:
    """Iterate over the batches of `sampler`, decoded by `workers` processes."""
    return iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=workers,
            # without one of its own the loader draws from the main generator, and a run that is
            # resumed would not be the run that was not interrupted
            generator=generator(sampler.seed, sampler.steps[0]),
            persistent_workers=workers > 0,
        )
    )
