"""Which numbers the options may hold, looked at before anything is made."""

import os
from dataclasses import fields, is_dataclass
from itertools import pairwise
from typing import Any

MANY = 10**9

LIMITS = {  # of the options of every script: lowest and highest
    "seed": (0, 2**32 - 1),
    "identities": (2, 10**6),  # those from there on are tested, see data/faces.py
    "samples": (1, MANY),
    "min_images": (1, MANY),
    "damaged": (0, MANY),
    "table": (5, 14),
    "seeds": (1, 1000),
    "flush_seconds": (0, MANY),
    "distractors": (1, MANY),
    "distractor_set": (1, MANY),
    "test_identities": (20, MANY),  # ten folds need two people each,
    "test_samples": (2, MANY),  # and every person two pictures
    "size": (16, 1024),
    "map_size": (1, 1024),
    "part_dim": (1, 10**5),
    "steps": (1, MANY),
    "batch_size": (2, MANY),  # BatchNorm needs two pictures
    "accumulate": (1, 10**6),
    "clip_norm": (0, MANY),
    "ema": (0, 0.999999),
    "lr": (0, 1000),
    "milestones": (0, 1),
    "warmup": (0, 1),
    "momentum": (0, 1),
    "weight_decay": (0, 1000),
    "margin": (0, 3.14),
    "scale": (1e-3, 1e4),
    "local_loss_weight": (0, 1000),
    "local_weight": (0, 1000),
    "workers": (0, 1024),
    "width": (2, 10**4),
    "num_stacks": (1, 100),
    "grid": (4, 1024),
    "dice": (0, 1000),
    "augmentation.flip": (0, 1),
    "augmentation.shift": (0, 1),
    "augmentation.scale": (0, 0.99),  # at 1 a face would be a point
    "augmentation.rotation": (0, 180),
    "augmentation.brightness": (0, 1),
    "augmentation.contrast": (0, 1),
    "augmentation.grey": (0, 1),
}


def check_numbers(options: Any, group: str = "") -> None:
    """Refuse numbers out of `LIMITS`, those of nested options too.

    Args:
        options: a dataclass of options.
        group: the name of the option that holds them, when they are nested.

    Raises:
        ValueError: a number is too small, too large, or not a number; the message names its option.
    """
    for field in fields(options):
        value, name = getattr(options, field.name), f"{group}{field.name}"
        if is_dataclass(value):
            check_numbers(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            inner = ".".join(name.split(".")[-2:])
            low, high = LIMITS[inner] if inner in LIMITS else LIMITS[field.name]
            if not low <= number <= high:  # as every comparison with NaN
                raise ValueError(
                    f"--{name.replace('_', '-')} must be between {low} and {high}; got {number}"
                )


def check_milestones(milestones: tuple[float, ...]) -> None:
    """Refuse milestones that are no fractions of the training, or do not ascend.

    >>> check_milestones((0.7, 0.9))
    """
    ascend = all(a < b for a, b in pairwise(milestones))
    if not ascend or not all(0 <= milestone <= 1 for milestone in milestones):
        raise ValueError(
            "--milestones must be fractions of the training between 0 and 1, each larger than the "
            f"one before, such as 0.7 0.9; got {' '.join(map(str, milestones))}"
        )


def check_batch(option: str, size: int, pictures: int | None = None, accumulate: int = 1) -> None:
    """Refuse a batch that the processes of `torchrun` cannot share, or that pictures cannot fill.

    Args:
        option: its name on the command line.
        size: of the batch.
        pictures: there are to train on, where that is known.
        accumulate: micro-batches in which each process takes its share.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    pieces = world * accumulate
    if size % pieces or size < 2 * pieces:
        shared = f"the {world} processes" + (f" x {accumulate} micro-batches" * (accumulate > 1))
        raise ValueError(f"{option} must be a multiple of {shared}, at least 2 each; got {size}")
    if pictures is not None and size > pictures:
        raise ValueError(f"{option} must be at most the number of pictures, {pictures}; got {size}")
