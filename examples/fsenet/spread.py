"""States of modules and optimizers of which some tensors are spread over processes."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, newest_checkpoint
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from workplace import Workplace

from partlocal.shard import local_part


def spread_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are spread over processes."""
    return [name for name, p in module.named_parameters() if isinstance(p, DTensor)]


def whole(state: Any) -> Any:
    """Return a state with every tensor as one; all processes call this together."""
    return _map(lambda t: t.full_tensor() if isinstance(t, DTensor) else t, state)


def read_checkpoint(path: Path, place: Workplace) -> dict[str, Any] | None:
    """Return the newest checkpoint at `path`, which the first process alone reads for all.

    The folder need not be there on the machines of the others.

    Raises:
        ValueError: what there is is damaged; on all processes.
    """
    if place.world == 1:
        found = newest_checkpoint(path)
        return None if found is None else found[1]
    told: list[Any] = [None]  # a size, or what is wrong
    if place.rank == 0:
        try:
            found = newest_checkpoint(path)
            told = [0 if found is None else found[0].stat().st_size]
        except (ValueError, OSError) as error:
            told = [str(error)]
    distributed.broadcast_object_list(told)
    if isinstance(told[0], str):
        raise ValueError(told[0])
    if told[0] == 0:
        return None
    if place.rank == 0:
        data = torch.from_file(str(found[0]), size=told[0], dtype=torch.uint8)
    else:
        data = torch.empty(told[0], dtype=torch.uint8)
    for piece in data.split(2**28):
        distributed.broadcast(piece, 0)
    return found[1] if place.rank == 0 else load_checkpoint(io.BytesIO(data.numpy().data))


def load_module(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Load a whole state, each process its part."""
    own = module.state_dict()
    module.load_state_dict({k: _like(t, own[k]) if k in own else t for k, t in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state, each process its part."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = {
        place: _map(lambda t, p=parameters[place]: _like(t, p), values)
        for place, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": parts})


def _like(tensor: Tensor, own: Tensor) -> Tensor:
    """Return a whole tensor, or this process's part of it if `own` is a part and of its shape."""
    if not isinstance(own, DTensor) or tensor.shape != own.shape:
        return tensor
    on_device = tensor.to(local_part(own).device)
    return distribute_tensor(on_device, own.device_mesh, own.placements, src_data_rank=None)


def _map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {key: _map(function, value) for key, value in state.items()}
    return [_map(function, x) for x in state] if isinstance(state, list) else state
