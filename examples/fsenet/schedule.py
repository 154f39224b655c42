"""How one stage is optimised."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.utils import ModelEmaV3
from torch import nn


class Average(NamedTuple):
    """A network that is trained, and the exponential moving average of its weights and buffers."""

    net: nn.Module
    ema: ModelEmaV3


@dataclass(frozen=True)
class Schedule:
    """Optimisation of one stage.

    Args:
        steps: number of updates.
        lr: rate at the fraction of the training that is over, 0 to 1.
        optimizer: built over the module's parameters.
        accumulate: batches whose mean gradient makes an update.
        clip_norm: largest norm of an update's gradient; 0 takes it as it is.
        average: moves along with a network, which holds its weights when the stage is over.
    """

    steps: int
    lr: Callable[[float], float]
    optimizer: torch.optim.Optimizer
    accumulate: int = 1
    clip_norm: float = 0.0
    average: Average | None = None
