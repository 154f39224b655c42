"""Where a process of a run computes, and what the processes of a run say to each other."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import choose_precision
from torch import Tensor, distributed


@dataclass(frozen=True)
class Workplace:
    """Where a run computes and what it leaves behind.

    Args:
        folder: of the run; rank 0 alone reads it to go on, and writes to it.
        device: of this process.
        precision: `"fp32"` or `"bf16"` (autocast).
        rank: of this process among `world`.
        world: number of processes.
        checkpoint_seconds: between two checkpoints, at least; what a kill costs.
        checkpoint_share: of the time may go into writing them, where they are large.
        tensorboard: whether to write TensorBoard's events too.
    """

    folder: Path
    device: torch.device
    precision: str = "fp32"
    rank: int = 0
    world: int = 1
    checkpoint_seconds: float = 20.0
    checkpoint_share: float = 0.05
    tensorboard: bool = False

    def agree(self, decision: bool) -> bool:
        """Return what the first process decides; all call this together."""
        if self.world == 1:
            return decision
        sent = torch.tensor(decision)
        distributed.broadcast(sent, 0)
        return bool(sent)

    def means(self, numbers: Tensor) -> list[float]:
        """Return each number's mean over the processes; all call this together."""
        if self.world > 1:
            numbers = numbers.clone()
            distributed.all_reduce(numbers)
        return (numbers / self.world).tolist()

    def put(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device, without waiting for what a GPU still computes."""
        if self.device.type == "cuda" and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """Return the context in which networks run."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )


def this_process(precision: str) -> Workplace:
    """Return device and rank of this process, by itself or started by `torchrun`; no folder.

    Args:
        precision: `"fp32"`, `"bf16"`, or `"auto"` for bf16 where the device computes in it.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return Workplace(Path(), device, choose_precision(precision, device), rank, world)
