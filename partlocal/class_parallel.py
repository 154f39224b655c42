"""Classes spread over the ranks of a process group, each of which holds some rows.

Every rank gathers the embeddings of all, takes the sums over its own classes, and exchanges three
numbers a sample. So all ranks compute the same losses of the global batch, whatever the margin;
backward, the embeddings' gradients, of which each rank has the share of its own classes, are summed
and sent back to where the embeddings came from. Gradients of the rows need no exchange.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from partlocal.logsumexp import (
    How,
    Negatives,
    backward,
    class_indices,
    forward,
    without_autocast,
)
from partlocal.shard import Shard


@dataclass(frozen=True)
class Batch:
    """The samples of all ranks, in rank order, without gradients.

    Args:
        group: whose ranks gathered them.
        embeddings: [n, d].
        labels: [n].
        norm: [n].
        sizes: how many are of each rank.
    """

    group: dist.ProcessGroup
    embeddings: Tensor
    labels: Tensor
    norm: Tensor
    sizes: tuple[int, ...]

    @property
    def own(self) -> slice:
        """The place of this rank's samples."""
        rank = dist.get_rank(self.group)
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def classes(self, v: int, ignore_index: int) -> Tensor:
        """Return the labels with -1 for the ignored ones, or name the rank of one that is wrong."""
        try:
            return class_indices(self.labels, v, ignore_index)
        except ValueError:
            for rank, labels in enumerate(self.labels.split(self.sizes)):
                try:
                    class_indices(labels, v, ignore_index)
                except ValueError as error:
                    raise ValueError(f"{error} of rank {rank}") from None
            raise

    def negatives(self, embeddings: Tensor, rows: Tensor, targets: Tensor, how: How) -> Negatives:
        """Return `Negatives` of all samples, the same on all ranks.

        Args:
            embeddings: of this rank; they get the gradient of the losses of all samples.
            rows: of this rank's classes.
            targets: of the samples of all ranks: a row of this rank, or -1.
            how: as in `negative_logsumexp`.
        """
        return Negatives(*_Spread.apply(embeddings, rows, targets, self, how))

    def with_own(self, norm: Tensor) -> Tensor:
        """Return the norms of all samples; the gradient of its own part goes to `norm`.

        What follows is computed alike on all ranks, so nothing is summed on the way back.
        """
        return _WithOwn.apply(norm, self)

    def own_part(self, losses: Tensor) -> Tensor:
        """Return the losses of this rank's samples; backward, all ranks learn all gradients."""
        return _OwnPart.apply(losses, self)


def check_group(group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuse what is no group, or one that cannot exchange tensors of this device.

    Raises:
        TypeError: it is no group.
        ValueError: the rank is not in the group, or its backend is for other devices.
    """
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("process_group must hold this rank: build the head on its members alone")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group must be a torch.distributed.ProcessGroup; got {group!r}: pass "
            "dist.group.WORLD, dist.new_group(...) or mesh.get_group()"
        )
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    if device.type not in backends and device.type != "meta":
        raise ValueError(
            f"process_group must have a backend for {device.type} tensors; got {backends}: move "
            "the head, or pass dist.new_group(backend='nccl') for GPUs, 'gloo' for CPUs"
        )


@contextmanager
def together(group: dist.ProcessGroup) -> Iterator[None]:
    """Say what it means when a collective fails: another rank is gone.

    Raises:
        RuntimeError: it did; the other ranks fail too, at the latest after the group's timeout.
    """
    try:
        yield
    except RuntimeError as error:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        raise RuntimeError(
            f"class-parallel head: rank {rank} of {ranks} got no answer from another one, which "
            f"has stopped or is doing something else ({str(error).splitlines()[0]}): look for the "
            "first error among the ranks, and start them all again from the last checkpoint"
        ) from error


def gather_rows(
    tensors: Sequence[Tensor], sizes: Sequence[int], group: dist.ProcessGroup
) -> list[Tensor]:
    """Return the rows of all ranks in rank order.

    Args:
        tensors: of equal length on one rank; their rows travel as bytes, side by side.
        sizes: how many rows each rank has.
        group: whose ranks call this together.
    """
    flat = [t.detach().flatten(1) if t.ndim > 1 else t.detach()[:, None] for t in tensors]
    rows = torch.cat([t.contiguous().view(torch.uint8) for t in flat], 1)
    most = max(sizes)
    found = _all_gather(_padded(rows, most), group)
    if min(sizes) < most:
        found = torch.cat([f[:n] for f, n in zip(found.split(most), sizes, strict=True)])
    widths = [t.shape[1] * t.element_size() for t in flat]
    return [
        part.flatten().clone().view(t.dtype).view(-1, *t.shape[1:])  # a clone lies evenly
        for part, t in zip(found.split(widths, 1), tensors, strict=True)
    ]


def _padded(rows: Tensor, count: int) -> Tensor:
    """Return `count` rows, of which the last ones are zeros: exchanges are of equal shapes."""
    return torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])


def _all_gather(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the tensors of all ranks, of equal shapes, one after another."""
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its newer name
    out = tensor.new_empty(dist.get_world_size(group) * len(tensor), *tensor.shape[1:])
    with together(group):
        gather(out, tensor, group=group)
    return out


def gather_batch(
    embeddings: Tensor,
    labels: Tensor,
    norm: Tensor | None,
    group: dist.ProcessGroup,
    device: torch.device,
    problem: Exception | None = None,
) -> tuple[Tensor, Tensor, Batch]:
    """Return this rank's embeddings and norms, and the samples of all ranks.

    Args:
        embeddings: of this rank. If others need a gradient, what is returned takes part.
        labels: of this rank.
        norm: of this rank; None if there is a problem.
        group: whose ranks call this together.
        device: of the rows.
        problem: why this rank's samples are refused, if they are.

    Raises:
        Exception: `problem`, on its rank.
        ValueError: another rank has a problem, or embeddings are of unlike types.
    """
    facts = [0, 0, 0]
    if norm is not None:
        row = embeddings.shape[1] * embeddings.element_size()
        facts = [len(embeddings), int(embeddings.requires_grad), row]
    sizes, wanted, rows = _told(problem, facts, "samples", group, device)
    norm = cast(Tensor, norm)  # without a problem there is one
    if len(set(rows)) > 1:
        raise ValueError(
            f"embeddings must be of one dtype on all ranks; got rows of {rows} bytes: cast them"
        )
    if any(wanted) and not embeddings.requires_grad:
        embeddings = embeddings.detach().requires_grad_()  # its backward is an exchange
    gathered = gather_rows([embeddings, labels.long(), norm], sizes, group)
    batch = Batch(group, gathered[0], gathered[1], gathered[2], tuple(sizes))
    return embeddings, norm, batch


def _told(
    problem: Exception | None, facts: list[int], what: str, group: dist.ProcessGroup,
    device: torch.device,
) -> list[list[int]]:  # fmt: skip
    """Return each fact of all ranks, or raise on all of them if one has a problem.

    Raises:
        Exception: `problem`, on its rank.
        ValueError: another rank refused `what` it was given.
    """
    row = torch.tensor([[int(problem is not None), *facts]], device=device)
    failed, *found = _all_gather(row, group).T.tolist()
    if problem is not None:
        raise problem
    if any(failed):
        raise ValueError(
            f"class-parallel head: rank {failed.index(1)} refused its {what}; its own error says "
            "why"
        )
    return found


def agreed(
    name: str, make: Callable[[], Tensor], optimizer: bool, group: dist.ProcessGroup,
    device: torch.device,
) -> Tensor:  # fmt: skip
    """Return the order of classes that `make` returns, if it is the same on all ranks.

    Args:
        name: of the argument that it is made of.
        make: which refuses it by an error where it is wrong.
        optimizer: whether this rank moves the rows of one too.
        group: whose ranks call this together.
        device: of the rows.

    Raises:
        Exception: that of `make`, on its rank.
        ValueError: another rank has a problem, or the ranks do not agree.
    """
    order, problem = torch.empty(0, dtype=torch.long), None
    try:
        order = make()
    except (ValueError, TypeError) as error:  # the others must hear of it
        problem = error
    digest = hashlib.blake2b(order.cpu().numpy().tobytes(), digest_size=8).digest()
    facts = [len(order), int.from_bytes(digest, "little", signed=True), int(optimizer)]
    counts, digests, optimizers = _told(problem, facts, "arguments", group, device)
    if len(set(digests)) > 1:
        raise ValueError(
            f"{name} must be the same on all ranks; got what leads to {counts} classes, rank by "
            "rank, which are not the same: let one rank choose, and broadcast"
        )
    if len(set(optimizers)) > 1:
        raise ValueError(
            f"optimizer must be passed on all ranks or on none; got one on the ranks "
            f"{[rank for rank, passed in enumerate(optimizers) if passed]} alone: pass it on all"
        )
    return order


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, embeddings: Tensor, rows: Tensor, targets: Tensor, batch: Batch, how: How
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(embeddings):
            *own, kept = forward(batch.embeddings, rows, targets, how)
        packed = torch.stack(own)
        of_all = _all_gather(packed, batch.group).view(len(batch.sizes), *packed.shape)
        lse = of_all[:, 0].logsumexp(0)
        hardest = of_all[:, 2].amax(0)
        ctx.save_for_backward(rows, targets, lse, kept)
        ctx.batch, ctx.how, ctx.dtype = batch, how, embeddings.dtype
        ctx.mark_non_differentiable(hardest)
        return lse, of_all[:, 1].sum(0), hardest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor, grad_cos: Tensor, _: Tensor) -> tuple:
        batch = ctx.batch
        with without_autocast(grad_lse):
            rows, targets, lse, kept = ctx.saved_tensors
            grad_x, grad_rows = backward(
                grad_lse, grad_cos, batch.embeddings, rows, targets, lse, kept, ctx.how
            )
        return _sum_and_scatter(grad_x, batch).to(ctx.dtype), grad_rows, None, None, None


def _sum_and_scatter(grads: Tensor, batch: Batch) -> Tensor:
    """Return the sum over ranks of the gradients of this rank's samples."""
    most, ranks = max(batch.sizes), len(batch.sizes)
    if min(batch.sizes) < most:
        grads = torch.cat([_padded(share, most) for share in grads.split(batch.sizes)])
    out = grads.new_empty(len(grads) // ranks, grads.shape[1])
    scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)  # its newer name
    with together(batch.group):
        scatter(out, grads.contiguous(), group=batch.group)
    return out[: batch.sizes[dist.get_rank(batch.group)]]


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """Return `tensor`, whose gradient is multiplied by `factor` on its way back."""
    return _ScaleGradient.apply(tensor, factor)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


class _WithOwn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, batch: Batch) -> Tensor:
        ctx.own = batch.own
        return batch.norm.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.own], None


class _OwnPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return losses[batch.own].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        batch = ctx.batch
        return gather_rows([grad.contiguous()], batch.sizes, batch.group)[0], None


@contextmanager
def same_generator(group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Draw on all ranks what the first one would; where the states differed, go back after it.

    Raises:
        RuntimeError: another rank has stopped.
    """
    if device.type == "meta":
        yield
        return
    of = () if device.type == "cpu" else (device,)
    module = getattr(torch, device.type) if of else torch
    own = module.get_rng_state(*of)
    sent = own.to(device, copy=True)
    with together(group):
        dist.broadcast(sent, dist.get_global_rank(group, 0), group)
    first = sent.to(own.device)
    module.set_rng_state(first, *of)
    try:
        yield
    finally:
        if not torch.equal(own, first):
            module.set_rng_state(own, *of)


def as_shard(rows: Tensor, classes: int, group: dist.ProcessGroup) -> Tensor:
    """Return the DTensor of all classes of which `rows` are this rank's."""
    from torch.distributed.device_mesh import DeviceMesh  # noqa: PLC0415
    from torch.distributed.tensor import DTensor  # noqa: PLC0415
    from torch.distributed.tensor import Shard as Dimension  # noqa: PLC0415

    mesh = DeviceMesh.from_group(group, rows.device.type)
    shape = torch.Size([classes, *rows.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        rows, mesh, [Dimension(0)], run_check=False, shape=shape, stride=stride
    )


def move_rows(
    rows: Tensor, source: Tensor, old: Shard, new: Shard, group: dist.ProcessGroup
) -> Tensor:
    """Return the rows of a rank when class j is to be what class `source[j]` was, or zeros for -1.

    Args:
        rows: those of this rank, of `old`.
        source: [new.classes], the same on all ranks.
        old: which rows were whose.
        new: which rows will be.
        group: whose ranks call this together.
    """
    source = source.to(rows.device)

    def wanted(rank: int) -> Tensor:
        other = Shard(new.classes, rank, new.ranks)
        return source[other.start : other.stop]

    def held(want: Tensor, rank: int) -> Tensor:
        other = Shard(old.classes, rank, old.ranks)
        return ((want >= other.start) & (want < other.stop)).nonzero()[:, 0]

    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    sent = []
    for rank in range(new.ranks):
        want = wanted(rank)
        sent.append(want[held(want, old.rank)] - old.start)
    mine = wanted(new.rank)
    places = [held(mine, rank) for rank in range(old.ranks)]
    out = flat.new_zeros(new.count, flat.shape[1])
    received = flat.new_empty(sum(map(len, places)), flat.shape[1])
    with together(group):
        dist.all_to_all_single(
            received, flat[torch.cat(sent)], [*map(len, places)], [*map(len, sent)], group=group
        )
    out[torch.cat(places)] = received
    return out.view(new.count, *rows.shape[1:])


def first_rank_does(action: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """Let the first rank act; return what it returned there, and None on the others.

    Raises:
        Exception: the action's, on the first rank.
        RuntimeError: it failed, on the others.
    """
    result, error = None, None
    if dist.get_rank(group) == 0:
        try:
            result = action()
        except Exception as raised:
            error = raised
    said = [None if error is None else f"{type(error).__name__}: {error}"]
    with together(group):
        dist.broadcast_object_list(said, dist.get_global_rank(group, 0), group)
    if error is not None:
        raise error
    if said[0] is not None:
        raise RuntimeError(f"class-parallel head: the first rank failed: {said[0]}")
    return result
