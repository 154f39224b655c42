"""The training loop of all three stages: progress, history, and checkpoints to resume from."""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, save_checkpoint
from spread import load_module, load_optimizer, spread_names, whole
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from partlocal.shard import local_part


@dataclass(frozen=True)
class Workplace:
    """Where a run computes and what it leaves behind.

    Args:
        folder: of the run; rank 0 alone writes to it.
        device: of this process.
        precision: `"fp32"` or `"bf16"` (autocast).
        rank: of this process among `world`.
        world: number of processes.
        checkpoint_seconds: between two checkpoints; what a kill costs at most.
    """

    folder: Path
    device: torch.device
    precision: str = "fp32"
    rank: int = 0
    world: int = 1
    checkpoint_seconds: float = 20.0

    def agree(self, decision: bool) -> bool:
        """Return what the first process decides; all call this together."""
        if self.world == 1:
            return decision
        sent = torch.tensor(decision, device=self.device)
        distributed.broadcast(sent, 0)
        return bool(sent)

    def autocast(self) -> torch.autocast:
        """Return the context in which networks run."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False
        )


@dataclass(frozen=True)
class Schedule:
    """Optimisation of one stage.

    Args:
        steps: number of updates.
        lr: rate at the fraction of the training that is over, 0 to 1.
        optimizer: built over the module's parameters.
    """

    steps: int
    lr: Callable[[float], float]
    optimizer: torch.optim.Optimizer


@dataclass
class Fitted:
    """What a stage reports: its curve and how fast it went."""

    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    wait_seconds: float = 0.0
    steps: int = 0


def fit(
    stage: str,
    module: nn.Module,
    batches: Callable[[int], Iterator[Sequence[Tensor | None]]],
    schedule: Schedule,
    place: Workplace,
) -> Fitted:
    """Train `module`, whose call on a batch returns a NamedTuple with the loss first.

    The stage goes on from its checkpoint in `place.folder` when there is one, and is not repeated
    when that checkpoint is its last.

    Args:
        stage: its name in the progress bar, the history and the checkpoint's file.
        module: on `place.device`.
        batches: from a first step, an iterator over the batches of that and the later steps.
        schedule: steps, rate, optimizer.
        place: device, precision, folder.

    Raises:
        FloatingPointError: the loss or a weight is not finite; the message names the step. No
            checkpoint holds such a state.
        ValueError: the checkpoint is damaged, of another architecture or of a longer training, or
            `module` refuses a batch; the message names the stage and the step.
    """
    path = place.folder / f"{stage}.pt"
    optimizer, fitted = schedule.optimizer, Fitted()
    if path.exists():
        _restore(path, module, optimizer, fitted)
    if fitted.steps > schedule.steps:
        raise ValueError(
            f"{path} is {fitted.steps} steps into a training of {schedule.steps}: "
            "resume with the options that the run was started with"
        )
    if fitted.steps == schedule.steps:
        return fitted
    trained = data_parallel(module) if place.world > 1 else module
    module.train()
    source = batches(fitted.steps)
    bar = tqdm(
        initial=fitted.steps,
        total=schedule.steps,
        desc=f"{stage:>7}",
        unit="step",
        disable=place.rank > 0,
        mininterval=1.0 if os.isatty(2) else 15.0,
    )
    saved = time.monotonic()
    while fitted.steps < schedule.steps:
        step, started = fitted.steps, time.monotonic()
        batch = [None if part is None else part.to(place.device) for part in next(source)]
        fitted.wait_seconds += time.monotonic() - started

        lr = schedule.lr(step / schedule.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad(set_to_none=True)
        try:
            with place.autocast():
                losses = trained(*batch)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"stage {stage}, step {step}: {reason}") from error
        losses.loss.backward()
        optimizer.step()
        fitted.steps += 1
        fitted.seconds += time.monotonic() - started

        if step % 10 == 0 or fitted.steps == schedule.steps:
            values = {name: value.item() for name, value in losses._asdict().items()}
            _refuse_non_finite(f"the loss of stage {stage}", [losses.loss], step)
            fitted.history.append(
                {"stage": stage, "step": step, "steps": schedule.steps, "lr": lr, **values}
            )
            bar.set_postfix(loss=f"{values['loss']:.3f}", lr=f"{lr:.1g}", refresh=False)
        bar.update()
        due = time.monotonic() - saved > place.checkpoint_seconds
        if place.agree(due) or fitted.steps == schedule.steps:
            held = map(local_part, module.state_dict().values())
            _refuse_non_finite(f"a weight of stage {stage}", held, step)
            _save(path, module, optimizer, fitted, place)
            saved = time.monotonic()
    bar.close()
    if place.world > 1:
        # each rank ran the last batch of its own through its BatchNorms; a run that is resumed
        # has rank 0's numbers everywhere, and the next stage must not see a difference
        for buffer in module.buffers():
            distributed.broadcast(buffer, 0)
        distributed.barrier()
    return fitted


def data_parallel(module: nn.Module) -> nn.Module:
    """Average the gradients over processes, but for parameters that are spread over them."""
    # Not a public name, and the only way to wrap a module that holds its loss.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
        module, spread_names(module)
    )
    return DistributedDataParallel(module)


def _refuse_non_finite(what: str, tensors: Iterable[Tensor], step: int) -> None:
    for tensor in tensors:
        if not tensor.isfinite().all():
            value = tensor.flatten()[~tensor.flatten().isfinite()][0].item()
            raise FloatingPointError(
                f"{what} is {value} at step {step}: lower --lr, or use --precision fp32"
            )


def _save(
    path: Path,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    fitted: Fitted,
    place: Workplace,
) -> None:
    """Gather what is spread over processes, of which the first one writes."""
    state = {
        "module": whole(module.state_dict()),
        "optimizer": whole(optimizer.state_dict()),
        "rng": torch.get_rng_state(),
        "fitted": vars(fitted),
    }
    if place.rank == 0:
        save_checkpoint(state, path)


def _restore(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, fitted: Fitted
) -> None:
    state = load_checkpoint(path)
    missing = {"module", "optimizer", "rng", "fitted"} - state.keys()
    if missing:
        raise ValueError(f"{path} is no checkpoint of a stage (no {min(missing)}); delete it")
    try:
        load_module(module, state["module"])
        load_optimizer(optimizer, state["optimizer"])
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{path} was saved by another architecture ({reason}): "
            "resume with the options that the run was started with"
        ) from None
    torch.set_rng_state(state["rng"])
    vars(fitted).update(state["fitted"])
