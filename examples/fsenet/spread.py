"""States of modules and optimizers of which some tensors are spread over processes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from partlocal.shard import local_part


def spread_names(module: nn.Module) -> list[str]:
    """Return the names of the parameters that are spread over processes."""
    return [name for name, p in module.named_parameters() if isinstance(p, DTensor)]


def whole(state: Any) -> Any:
    """Return a state with every tensor as one; all processes call this together."""
    return _map(lambda t: t.full_tensor() if isinstance(t, DTensor) else t, state)


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
