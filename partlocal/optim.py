"""Optimizers for parameters of which a step touches some rows: those of a sampled head.

A row moves, decays, and gathers momentum in the steps that give it a gradient, and rests in the
others: as if every row were a parameter of its own whose `.grad` is None where it was not drawn.
All other parameters are updated as by the optimizer of the same name in `torch.optim`.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from partlocal.numerics import accumulation_dtype
from partlocal.shard import local_part


class _ByRows(torch.optim.Optimizer):
    """Take out the parameters with row gradients, step the rest as usual, and then these."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, and note on each that its rows can be stepped."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            p.stepped_by_rows = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for p in group["params"]:
                p.row_grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        taken = [(group, p, p.grad, grad) for group, p, grad in self._by_rows()]
        for group, _, _, _ in taken:
            self._check_rows(group)
        try:
            for _, p, _, _ in taken:
                p.grad = None
            # Without its hooks and profiler, which are around this step already.
            inspect.unwrap(super().step.__func__)(self)  # type: ignore[attr-defined]
        finally:
            for _, p, dense, _ in taken:
                p.grad = dense
        for group, p, _, grad in taken:
            self._step_rows(local_part(p), *_rows_of(grad), self._state_of(p, group), group)
        return loss

    def _by_rows(self) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
        for group in self.param_groups:
            for p in group["params"]:
                grad = _gradient_of(p)
                if grad is not None and (getattr(p, "by_rows", False) or grad.is_sparse):
                    yield group, p, grad

    def _state_of(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """Return the state of a parameter, this rank's part, made at its first step."""
        state, before = self.state[p], self.state[p].get("step")
        if before is None or before.ndim == 0:
            # All rows have made the steps that were made without sampling.
            steps = _one_a_row(p)
            held = any(state.get(name) is not None for name in self._moments(group))
            state["step"] = steps + (int(held) if before is None else int(before))
        state["step"] = state["step"].to(p.device)  # loading a state leaves it where it was
        for name in self._moments(group):
            if state.get(name) is None:
                state[name] = torch.zeros_like(p, memory_format=torch.contiguous_format)
        return {key: local_part(value) for key, value in state.items() if value is not None}

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        raise NotImplementedError

    def _check_rows(self, group: dict[str, Any]) -> None:
        """Refuse what rows cannot be stepped by."""

    def _step_rows(
        self, p: Tensor, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        raise NotImplementedError


class SGD(_ByRows, torch.optim.SGD):
    """`torch.optim.SGD` that also steps rows.

    >>> weight = torch.nn.Parameter(torch.ones(4, 2))
    >>> optimizer = SGD([weight], lr=0.5, momentum=0.9)
    >>> torch.nn.functional.embedding(torch.tensor([2]), weight, sparse=True).sum().backward()
    >>> optimizer.step()
    >>> weight[:, 0].tolist()
    [1.0, 1.0, 0.5, 1.0]
    """

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("momentum_buffer",) if group["momentum"] else ()

    def _step_rows(
        self, p: Tensor, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        grad = -grad if group["maximize"] else grad
        own = p[rows]
        if group["weight_decay"]:
            grad = grad + group["weight_decay"] * own
        if group["momentum"]:
            first = (state["step"][rows] == 0)[:, None]
            moment = state["momentum_buffer"][rows] * group["momentum"]
            moment = torch.where(first, grad, moment + (1 - group["dampening"]) * grad)
            state["momentum_buffer"][rows] = moment
            grad = grad + group["momentum"] * moment if group["nesterov"] else moment
        state["step"][rows] += 1
        p[rows] = own - group["lr"] * grad


class AdamW(_ByRows, torch.optim.AdamW):
    """`torch.optim.AdamW` that also steps rows; each counts its own steps.

    >>> weight = torch.nn.Parameter(torch.zeros(4, 2))
    >>> optimizer = AdamW([weight], lr=0.5)
    >>> torch.nn.functional.embedding(torch.tensor([2]), weight, sparse=True).sum().backward()
    >>> optimizer.step()
    >>> weight[:, 0].round(decimals=6).tolist()
    [0.0, 0.0, -0.5, 0.0]

    Raises:
        NotImplementedError: `amsgrad=True` with a parameter that is stepped by rows.
    """

    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _check_rows(self, group: dict[str, Any]) -> None:
        if group["amsgrad"]:
            raise NotImplementedError(
                "AdamW steps no rows with amsgrad=True: leave it out, or train with sample_rate=1"
            )

    def _step_rows(
        self, p: Tensor, rows: Tensor, grad: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> None:
        grad = -grad if group["maximize"] else grad
        first, second = group["betas"]
        state["step"][rows] += 1
        steps = state["step"][rows].to(p.dtype)[:, None]
        mean = torch.lerp(state["exp_avg"][rows], grad, 1 - first)
        square = second * state["exp_avg_sq"][rows] + (1 - second) * grad.square()
        state["exp_avg"][rows], state["exp_avg_sq"][rows] = mean, square
        scale, root = group["lr"] / _corrected(first, steps), _corrected(second, steps).sqrt()
        own = p[rows] * (1 - group["lr"] * group["weight_decay"])
        p[rows] = own - scale * mean / (square.sqrt() / root + group["eps"])


def _one_a_row(p: Tensor) -> Tensor:
    """Return a 0 for each row of a parameter, spread like it."""
    spread: Any = p
    local = local_part(p)
    zeros = torch.zeros(len(local), dtype=torch.int32, device=local.device)
    if local is p:
        return zeros
    from torch.distributed.tensor import DTensor  # noqa: PLC0415

    shape = torch.Size([len(p)])
    return DTensor.from_local(
        zeros, spread.device_mesh, spread.placements, run_check=False, shape=shape, stride=(1,)
    )


def _corrected(beta: float, steps: Tensor) -> Tensor:
    """Return `1 - beta ** steps`, which would cancel for small numbers of steps."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)


def take_rows(weight: Tensor, index: Tensor) -> Tensor:
    """Return some of the rows that this rank holds; backward, their gradient alone is kept.

    It is a sparse `.grad`, or for a DTensor, which can have none, `.row_grad`, which the optimizers
    here read.

    Args:
        weight: a parameter [v, d], or a DTensor of which this rank holds some rows.
        index: different rows, in increasing order.

    Raises:
        RuntimeError: `weight` is a DTensor, and no optimizer of this file was made for it.
    """
    if not hasattr(weight, "_local_tensor"):
        return torch.nn.functional.embedding(index, weight, sparse=True)
    trains = torch.is_grad_enabled() and weight.requires_grad
    if trains and not getattr(weight, "stepped_by_rows", False):
        raise RuntimeError(
            "a sampled head that is spread over ranks is stepped by partlocal.optim.SGD or AdamW "
            "alone: build one with head.parameters() before the first step"
        )
    return _TakeRows.apply(weight, index)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, index: Tensor) -> Tensor:
        ctx.weight, ctx.index = weight, index
        return local_part(weight)[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        weight, shape = ctx.weight, local_part(ctx.weight).shape
        found = torch.sparse_coo_tensor(
            ctx.index[None], grad, shape, check_invariants=False, is_coalesced=True
        )
        before = getattr(weight, "row_grad", None)
        weight.row_grad = found if before is None else before + found
        return None, None


def _gradient_of(p: Tensor) -> Tensor | None:
    """Return what this rank holds of a gradient."""
    rows, dense = getattr(p, "row_grad", None), None if p.grad is None else local_part(p.grad)
    if rows is None or dense is None:
        return dense if rows is None else rows
    return rows.to_dense() + dense


def _rows_of(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows have a gradient, each once, and these."""
    if not grad.is_sparse:
        return torch.arange(len(grad), device=grad.device), grad
    grad = grad.coalesce()
    return grad.indices()[0], grad.values()


@torch.no_grad()
def grad_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of all gradients as one vector, in fp32, without waiting for the device.

    All ranks call this together where a parameter is spread over them.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> grad_norm([weight])
    tensor(5.)

    Args:
        parameters: as those of `clip_grad_norm`.
    """
    grads = [(p, grad) for p in parameters if (grad := _gradient_of(p)) is not None]
    if not grads:
        return torch.zeros(())
    return torch.stack([_squared_norm(p, grad) for p, grad in grads]).sum().sqrt()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients so that their common norm is at most `max_norm`; return what it was.

    Where it is not finite the gradients stay as they are: one NaN would reach all of them.

    `torch.nn.utils.clip_grad_norm_` refuses parameters of which some are DTensors and some are not,
    or some gradients sparse. All ranks call this together where a parameter is spread over them.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm([weight], max_norm=1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))

    Args:
        parameters: with gradients or without; averaged over ranks already, if they are plain.
        max_norm: of all gradients as one vector, in fp32.

    Raises:
        ValueError: `max_norm` is not positive.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(f"max_norm must be positive and finite; got {max_norm}")
    held = list(parameters)
    norm = grad_norm(held)
    if not norm.isfinite():
        return norm
    factor = (max_norm / norm.clamp(min=max_norm)).item()
    for p in held:
        for grad in (p.grad, getattr(p, "row_grad", None)):
            if grad is not None:
                local_part(grad).mul_(factor)
    return norm


def _squared_norm(p: Tensor, grad: Tensor) -> Tensor:
    values = grad.coalesce().values() if grad.is_sparse else grad
    wide = accumulation_dtype(values.dtype)
    square = torch.linalg.vector_norm(values, dtype=wide).square().float()
    for dimension, placement in enumerate(getattr(p, "placements", ())):
        if placement.is_shard():  # each rank holds a part
            group = p.device_mesh.get_group(dimension)  # type: ignore[attr-defined]
            torch.distributed.all_reduce(square, group=group)
    return square
