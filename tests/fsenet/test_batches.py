"""Batches are a function of (seed, step): epochs, ranks, workers, and going on at any step."""

import itertools

import pytest
import torch
from data.archives import DamagedImage
from data.augment import NUMBERS
from data.batches import BatchPlan, StepSampler, generator, load_batches
from data.faces import draw_faces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

sizes = st.tuples(*(st.integers(1, high) for high in (4, 3, 3)), *(st.integers(0, 99),) * 2)


def indices(length, plan, first=0):
    return list(StepSampler(length, plan, first))


def steps(batches, accumulate):
    """The micro-batches of each step, one behind the other."""
    starts = range(0, len(batches), accumulate)
    return [[*itertools.chain(*batches[at : at + accumulate])] for at in starts]


def test_example():
    """Five pictures, two a step: each epoch shows four of them, and the shuffles differ."""
    seen = indices(5, BatchPlan(2, 40, seed=3))
    epochs = [[*seen[i], *seen[i + 1]] for i in range(0, 40, 2)]
    assert all(len(set(epoch)) == 4 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 10
    assert set(itertools.chain(*epochs)) == set(range(5))  # whom one epoch leaves out, another has
    assert len(StepSampler(5, BatchPlan(2, 40, seed=3), 30)) == 10


@settings(max_examples=40, deadline=None)
@given(sizes)
def test_properties(sizes):
    batch, world, accumulate, rest, seed = sizes
    per_epoch, size = 3, batch * world * accumulate
    length = per_epoch * size + rest % size
    plans = [BatchPlan(size, 7, seed, rank, world, 0, accumulate) for rank in range(world)]
    shares = [indices(length, plan) for plan in plans]
    together = indices(length, BatchPlan(size, 7, seed))
    assert all(len(micro) == batch for share in shares for micro in share)
    for step in range(7):
        # the shares of the ranks are disjoint, and together the batch of one process
        mine = [i for share in shares for i in steps(share, accumulate)[step]]
        assert len(mine) == len(set(mine)) == size
        assert sorted(mine) == sorted(together[step])
    for epoch in (together[:3], together[3:6]):  # no picture twice; all of them when none is left
        flat = [*itertools.chain(*epoch)]
        assert len(set(flat)) == len(flat) == length - rest % size
        assert set(flat) <= set(range(length))
    for first in range(8):  # going on at a step is the same as having come there
        assert indices(length, plans[-1], first) == shares[-1][first * accumulate :]
        assert len(StepSampler(length, plans[-1], first)) == (7 - first) * accumulate


def test_seeds_and_keys_differ():
    assert indices(64, BatchPlan(64, 1, 0)) != indices(64, BatchPlan(64, 1, 1))
    draws = [
        torch.rand(1, generator=generator(*key)).item()
        for key in [(0,), (1,), *itertools.product(range(5), repeat=2), (0, 0, 0), (0, 0, 1)]
    ]
    assert len(set(draws)) == len(draws)


DATA = TensorDataset(torch.arange(26).view(13, 2), torch.arange(13))


def load(workers=0, first=0, **how):
    plan = BatchPlan(6, 5, seed=1, workers=workers, **how)
    return [
        (numbers.T.tolist(), images.tolist(), index.tolist())
        for numbers, (images, index) in load_batches(DATA, plan, first)
    ]


def test_loading():
    """The same with workers, and from any step; the main generator is left alone."""
    state = torch.get_rng_state()
    for how in ({}, {"rank": 1, "world": 2}, {"rank": 0, "world": 3, "accumulate": 2}):
        alone = load(**how)
        accumulate = how.get("accumulate", 1)
        assert len(alone) == 5 * accumulate
        for numbers, images, index in alone:
            assert images == [[2 * i, 2 * i + 1] for i in index]
            assert len(numbers) == len(index)
            assert len(numbers[0]) == NUMBERS
        assert load(0, first=3, **how) == alone[3 * accumulate :]
        assert load(2, **how) == alone
        assert load(2, first=2, **how) == alone[2 * accumulate :]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_picture_keeps_its_random_numbers(accumulate):
    """In each step, whichever process and micro-batch has the picture."""
    alone = [dict(zip(index, numbers, strict=True)) for numbers, _, index in load()]
    assert len({tuple(map(tuple, step.values())) for step in alone}) == 5
    shared = [{} for _ in alone]
    for rank in range(2):
        share = load(rank=rank, world=2, accumulate=accumulate)
        for call, (numbers, _, index) in enumerate(share):
            shared[call // accumulate].update(zip(index, numbers, strict=True))
    assert shared == alone


class Damaged(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise DamagedImage("a.zip:Ann/1.png is damaged: replace or remove it")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_one_line(workers):
    """Torch hands on what a worker raised with its whole traceback as the message."""
    with pytest.raises(ValueError, match=r"^a.zip:Ann/1.png is damaged: replace or remove it$"):
        next(load_batches(Damaged(), BatchPlan(2, 1, 0, workers=workers), 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_face_that_cannot_be_drawn_is_one_line(workers):
    with pytest.raises(ValueError, match=r"^seed, identity and sample must be >= 0; got -1[^\n]*$"):
        draw_faces(-1, range(1), 1, workers)


def test_errors():
    message = "batch_size must be at most the number of pictures, 5; got 6"
    with pytest.raises(ValueError, match=message):
        StepSampler(5, BatchPlan(6, 1, 0, world=2))
    StepSampler(6, BatchPlan(6, 1, 0, world=2))
    with pytest.raises(ValueError, match="a multiple of 2 processes x 1 micro-batches; got 5"):
        StepSampler(6, BatchPlan(5, 1, 0, world=2))
    with pytest.raises(ValueError, match="a multiple of 2 processes x 3 micro-batches; got 4"):
        StepSampler(6, BatchPlan(4, 1, 0, world=2, accumulate=3))
