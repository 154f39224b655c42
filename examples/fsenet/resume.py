"""What a stage goes on from: gathered and written by the first process, read by it for all."""

import io
import math
from pathlib import Path
from typing import Any

import torch
from checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from schedule import Schedule
from spread import load_module, load_optimizer, whole
from telemetry import Fitted
from torch import distributed, nn
from workplace import Workplace

from partlocal.shard import local_part


def save_stage(
    path: Path, module: nn.Module, schedule: Schedule, fitted: Fitted, place: Workplace
) -> None:
    """Gather what is spread over processes, of which the first one writes.

    Raises:
        FloatingPointError: a weight is not finite.
        OSError: the checkpoint cannot be written; the last one is whole.
    """
    lost = _lost_weight(module)
    if place.world > 1:  # all leave together
        (lost,) = place.means(torch.tensor([lost]))
    if not math.isfinite(lost):
        raise not_finite(f"a weight of stage {path.stem}", lost, fitted.steps - 1)
    state = {
        "module": whole(module.state_dict()),
        "optimizer": whole(schedule.optimizer.state_dict()),
        "rng": torch.get_rng_state(),
        "fitted": vars(fitted),
    }
    if schedule.average is not None:
        state["average"] = schedule.average.ema.module.state_dict()
    problem = None
    if place.rank == 0:
        try:
            save_checkpoint(state, path)
        except OSError as error:
            problem = error
    if not place.agree(problem is None):
        raise problem or OSError(f"the first process cannot write {path}")


def restore_stage(
    path: Path, module: nn.Module, schedule: Schedule, fitted: Fitted, place: Workplace
) -> None:
    """Take up a checkpoint, if there is one.

    Raises:
        ValueError: it is damaged, or of another architecture.
    """
    state = read_checkpoint(path, place)
    if state is None:
        return
    wanted = {"module", "optimizer", "rng", "fitted"}
    if schedule.average is not None:
        wanted.add("average")
    if missing := wanted - state.keys():
        raise ValueError(f"{path} is no checkpoint of a stage (no {min(missing)}); delete it")
    try:
        load_module(module, state["module"])
        load_optimizer(schedule.optimizer, state["optimizer"])
        if schedule.average is not None:
            schedule.average.ema.module.load_state_dict(state["average"])
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"{path} was saved by another architecture ({reason}): "
            "resume with the options that the run was started with"
        ) from None
    torch.set_rng_state(state["rng"])
    vars(fitted).update(state["fitted"])


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


def _lost_weight(module: nn.Module) -> float:
    """Return a weight of this process that is not finite; 0 where all are."""
    for tensor in map(local_part, module.state_dict().values()):
        if not tensor.isfinite().all():
            return tensor.flatten()[~tensor.flatten().isfinite()][0].item()
    return 0.0


def not_finite(what: str, value: float, step: int) -> FloatingPointError:
    """Return the error of a loss or a weight that is lost."""
    return FloatingPointError(
        f"{what} is {value} at step {step}: lower --lr, or use --precision fp32"
    )
