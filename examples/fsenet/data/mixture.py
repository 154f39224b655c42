"""Batches mixed of sets whose labels differ: so many pictures of each, in every step.

Each set keeps its own labels, so that it is mirrored in its own terms, and its `Vocabulary` says
which of the parser's are meant.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from data.augment import Augmentation, augment
from data.batches import BatchPlan, generator, load_batches
from data.parsing_alignment import aligned_pairs
from data.parsing_layouts import open_parsing_set
from data.parsing_sets import ParsingSet
from data.vocabularies import Vocabulary


@dataclass(frozen=True)
class Ingredient:
    """One of the sets that are mixed.

    Args:
        dataset: items (image uint8 3 h w, target uint8: labels h w or 255ths g h w).
        vocabulary: of the targets.
        count: pictures of every batch, over all processes.
        in_memory: whether it needs no processes that read it.
    """

    dataset: Dataset[tuple[Tensor, ...]]
    vocabulary: Vocabulary
    count: int
    in_memory: bool = False


@dataclass(frozen=True)
class Share:
    """A set that is asked for and its share of each batch, as `PATH:KIND:SPLITS:SHARE` says it."""

    pairs: ParsingSet
    count: int
    option: str


def open_mix(choices: Sequence[str], batch_size: int, world: int = 1) -> list[Share]:
    """Open the sets that are mixed in, and count how many pictures of each a batch has.

    Counts do not depend on the number of processes, and fill the batch if the shares do.

    Args:
        choices: `PATH:KIND:SPLITS:SHARE` each, see `open_parsing_set`; the share is one of the
            batch, and what the shares leave is drawn.
        batch_size: over all processes.
        world: number of processes, among which the pictures of each set must be shared evenly.

    Raises:
        FileNotFoundError, ValueError: see `open_parsing_set`; or a share is no number between 0
            and 1, there are more than 1 in all, processes cannot share a set evenly, or a set
            has fewer pictures than a batch needs.
    """
    found: list[Share] = []
    total = 0.0
    for choice in choices:
        which, _, text = choice.rpartition(":")
        try:
            share = float(text)
        except ValueError:
            share = 0.0
        if not 0 < share <= 1:
            raise ValueError(
                f"the mix must be PATH:KIND:SPLITS:SHARE with a share above 0, at most 1; "
                f"got {choice!r}"
            )
        pairs = open_parsing_set(which)
        before, total = round(total * batch_size), total + share
        count = round(total * batch_size) - before
        if count < 1 or count % world:
            raise ValueError(
                f"{choice}: a batch of {batch_size} would have {count} of its pictures, which "
                f"must be a multiple of the {world} processes: change the share"
            )
        _refuse_few(len(pairs), count, choice)
        found.append(Share(pairs, count, choice))
    if (asked := sum(share.count for share in found)) > batch_size:
        raise ValueError(f"the mix asks for {asked} pictures in batches of {batch_size}")
    return found


def mix(drawn: Ingredient, shares: Sequence[Share], damaged: int = 0) -> list[Ingredient]:
    """Align the sets that are mixed in; what they leave of a batch is drawn.

    Args:
        drawn: what a batch consists of without them, in the parser's labels.
        shares: of `open_mix`.
        damaged: how many pictures of a set may be; each is named and left out.

    Raises:
        ValueError: see `aligned_pairs`; or too few pictures of a set can be aligned.
    """
    left = drawn.count - sum(share.count for share in shares)
    found = [replace(drawn, count=left)] if left else []
    for share in shares:
        aligned = aligned_pairs(share.pairs, damaged=damaged)
        if left_out := len(aligned.skipped):
            print(
                f"{share.pairs.title}: {left_out} of {len(share.pairs)} pictures left out, which "
                "do not show both eyes, nose and mouth",
                file=sys.stderr,
            )
        _refuse_few(len(aligned), share.count, share.option)
        own = share.pairs.vocabulary
        data = TensorDataset(aligned.images, own.fold(aligned.targets, drawn.vocabulary.labels))
        found.append(Ingredient(data, own, share.count, in_memory=True))
    return found


def mixed_batches(
    ingredients: Sequence[Ingredient], plan: BatchPlan, first: int
) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """Yield for each step from `first` on a list of (numbers, images, targets), one a set.

    The numbers are random ones, for `augment`.
    """
    sources = []
    for number, ingredient in enumerate(ingredients):
        seed = generator(plan.seed, number).initial_seed() if number else plan.seed
        workers = 0 if ingredient.in_memory else plan.workers
        part = replace(plan, batch_size=ingredient.count, seed=seed, workers=workers)
        sources.append(load_batches(ingredient.dataset, part, first))
    for step in zip(*sources, strict=True):
        yield [(numbers, *batch) for numbers, batch in step]


def augment_step(
    ingredients: Sequence[Ingredient],
    step: Sequence[tuple[Tensor, Tensor, Tensor]],
    how: Augmentation,
) -> tuple[Tensor, ...]:
    """Return all pictures of a step, moved at random, and the targets of each set with its own.

    Returns:
        pictures `b 3 h w`, those of the first set first; then for each set labels `c h w` or
        probabilities `c g h w`.
    """
    pictures, targets = [], []
    for one, (numbers, images, target) in zip(ingredients, step, strict=True):
        known = target.float() / 255 if target.ndim == 4 else target
        moved = augment(images, known, one.vocabulary.labels, how, numbers)
        assert moved.maps is not None
        pictures.append(moved.images)
        targets.append(moved.maps)
    return torch.cat(pictures), *targets


def _refuse_few(pictures: int, count: int, option: str) -> None:
    if pictures < count:
        raise ValueError(
            f"{option}: a batch takes {count} pictures and there are {pictures}: lower the share"
        )
