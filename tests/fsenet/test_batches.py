"""Batches are a function of (seed, step): epochs, ranks, workers, and going on at any step."""

import itertools

import pytest
import torch
from data.archives import DamagedImage
from data.batches import BatchPlan, StepSampler, generator, load_batches
from data.faces import draw_faces
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

sizes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.integers(0, 99))


def indices(length, plan, first=0):
    return list(StepSampler(length, plan, first))


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
    batch, world, rest, seed = sizes
    per_epoch, batches = 3, batch * world
    length = per_epoch * batches + rest % batches
    plans = [BatchPlan(batches, 7, seed, rank, world) for rank in range(world)]
    shares = [indices(length, plan) for plan in plans]
    together = indices(length, BatchPlan(batches, 7, seed))
    for step in range(7):
        # the shares of the ranks are disjoint, and together the batch of one process
        mine = [index for share in shares for index in share[step]]
        assert len(mine) == len(set(mine)) == batches
        assert sorted(mine) == sorted(together[step])
    for epoch in (together[:3], together[3:6]):  # no picture twice; all of them when none is left
        flat = [*itertools.chain(*epoch)]
        assert len(set(flat)) == len(flat) == length - rest % batches
        assert set(flat) <= set(range(length))
    for first in range(8):  # going on at a step is the same as having come there
        assert indices(length, plans[-1], first) == shares[-1][first:]


def test_seeds_and_keys_differ():
    assert indices(64, BatchPlan(64, 1, 0)) != indices(64, BatchPlan(64, 1, 1))
    draws = [
        torch.rand(1, generator=generator(*key)).item()
        for key in [(0,), (1,), *itertools.product(range(5), repeat=2), (0, 0, 0), (0, 0, 1)]
    ]
    assert len(set(draws)) == len(draws)


def load(workers, first=0, rank=0, steps=5):
    data = TensorDataset(torch.arange(26).view(13, 2), torch.arange(13))
    plan = BatchPlan(6, steps, seed=1, rank=rank, world=2, workers=workers)
    return [
        (torch.rand(2, generator=rng).tolist(), images.tolist(), index.tolist())
        for rng, (images, index) in load_batches(data, plan, first)
    ]


def test_loading():
    """Batches and generators: the same with workers, from any step, and each rank its own."""
    state = torch.get_rng_state()
    alone = load(0)
    assert torch.equal(torch.get_rng_state(), state), "the main generator was drawn from"
    assert len(alone) == 5
    for draw, images, index in alone:
        assert images == [[2 * i, 2 * i + 1] for i in index]
        assert draw not in [other for other, _, _ in load(0, rank=1)]
    assert len({tuple(draw) for draw, _, _ in alone}) == 5
    assert load(0, first=3) == alone[3:]
    assert load(2) == alone
    assert load(2, first=2) == alone[2:]
    assert torch.equal(torch.get_rng_state(), state)


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
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes; got 5"):
        StepSampler(6, BatchPlan(5, 1, 0, world=2))
