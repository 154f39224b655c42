"""The training loop of all three stages, and the checkpoints that it goes on from."""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext

import torch
from resume import not_finite, restore_stage, save_stage
from schedule import Schedule
from spread import spread_names
from telemetry import Fitted, Logbook
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from workplace import Workplace

from partlocal.optim import clip_grad_norm, grad_norm

Batch = Sequence[Tensor | None]


def fit(
    stage: str,
    module: nn.Module,
    batches: Callable[[int], Iterator[Batch]],
    schedule: Schedule,
    place: Workplace,
    prepare: Callable[..., Batch] = lambda *batch: batch,
) -> Fitted:
    """Train `module`, whose call on a batch returns a NamedTuple with the loss first.

    The stage goes on from its checkpoint in `place.folder` when there is one, and is not repeated
    when that checkpoint is its last.

    Args:
        stage: its name in the progress bar, the history and the checkpoint's file.
        module: on `place.device`.
        batches: from a first step, an iterator over the batches of that and the later steps,
            `schedule.accumulate` each.
        schedule: steps, rate, optimizer.
        place: device, precision, folder.
        prepare: makes of a batch, there on the device, what `module` is called with.

    Raises:
        FloatingPointError: the loss or a weight is not finite; the message names the step. No
            checkpoint holds such a state.
        ValueError: the checkpoint is damaged, of another architecture or of a longer training, or
            `module` refuses a batch; the message names the stage and the step.
        OSError: a checkpoint cannot be written; the last one is whole.
    """
    path, optimizer, fitted = place.folder / f"{stage}.pt", schedule.optimizer, Fitted()
    restore_stage(path, module, schedule, fitted, place)
    if fitted.steps > schedule.steps:
        raise ValueError(
            f"{path} is {fitted.steps} steps into a training of {schedule.steps}: "
            "resume with the options that the run was started with"
        )
    if fitted.steps == schedule.steps and place.rank == 0:
        print(f"stage {stage} is trained already: {path}", file=sys.stderr)
    trained = data_parallel(module) if place.world > 1 else module
    module.train()
    source = batches(fitted.steps)
    saved, took = time.monotonic(), 0.0
    with closing(Logbook(stage, schedule.steps, fitted, place)) as logbook:
        while fitted.steps < schedule.steps:
            step, began = fitted.steps, time.monotonic()
            lr = schedule.lr(step / schedule.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad(set_to_none=True)
            try:
                values = _add_gradients(trained, source, schedule, place, prepare, fitted)
            except ValueError as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"stage {stage}, step {step}: {reason}") from error
            fitted.steps += 1
            last = fitted.steps == schedule.steps
            told = step % 10 == 0 or last
            values |= _step(schedule, measured=told)
            if told:
                row = _read(stage, step, values, place)
            fitted.seconds += time.monotonic() - began
            if told:
                logbook.note(step, {"lr": lr, **row})
            logbook.bar.update()

            # the larger a checkpoint is, the rarer; processes that ask each other wait, too
            pause = max(place.checkpoint_seconds, took * (1 / place.checkpoint_share - 1))
            due = time.monotonic() - saved > pause
            if last or ((told or place.world == 1) and place.agree(due)):
                began = time.monotonic()
                save_stage(path, module, schedule, fitted, place)
                saved = time.monotonic()
                took = saved - began
    optimizer.zero_grad(set_to_none=True)  # nobody needs the last gradient
    if schedule.average is not None:
        schedule.average.net.load_state_dict(schedule.average.ema.module.state_dict())
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


def _add_gradients(
    trained: nn.Module,
    source: Iterator[Batch],
    schedule: Schedule,
    place: Workplace,
    prepare: Callable[..., Batch],
    fitted: Fitted,
) -> dict[str, Tensor]:
    """Add the gradients of an update's batches up; return the means of what `trained` returns."""
    values: dict[str, Tensor] = {}
    for left in reversed(range(schedule.accumulate)):
        began = time.monotonic()
        raw = next(source)
        fitted.wait_seconds += time.monotonic() - began
        batch = prepare(*(None if part is None else place.put(part) for part in raw))
        fitted.images += place.world * len(batch[0])
        # processes exchange the sum alone
        with trained.no_sync() if left and place.world > 1 else nullcontext():
            with place.autocast():
                losses = trained(*batch)
            (losses.loss / schedule.accumulate).backward()
        for name, value in losses._asdict().items():
            values[name] = values.get(name, 0) + value.detach() / schedule.accumulate
    return values


def _step(schedule: Schedule, measured: bool) -> dict[str, Tensor]:
    """Move the weights, and their average; return the gradient's norm if it is asked for."""
    # and no others of the module, which may hold a gradient of somebody else
    moved = [p for group in schedule.optimizer.param_groups for p in group["params"]]
    told = {}
    if schedule.clip_norm:
        told["grad_norm"] = clip_grad_norm(moved, schedule.clip_norm)
    elif measured:
        told["grad_norm"] = grad_norm(moved)
    schedule.optimizer.step()
    if schedule.average is not None:
        schedule.average.ema.update(schedule.average.net)
    return told


def _read(stage: str, step: int, values: dict[str, Tensor], place: Workplace) -> dict[str, float]:
    """Return numbers, of which the loss is finite; this waits for a GPU."""
    means = place.means(torch.stack([value.float() for value in values.values()]))
    row = dict(zip(values, means, strict=True))
    if not math.isfinite(row["loss"]):
        raise not_finite(f"the loss of stage {stage}", row["loss"], step)
    return row
