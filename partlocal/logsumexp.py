"""Log-sum-exp of each sample's cosines to all classes but its own, chunk by chunk.

The samples x classes matrix is never made: forward and backward go through the classes in
chunks, and the backward computes the cosines a second time. The target is left out inside the
sum, because taking it out of an ordinary log-sum-exp afterwards cancels in fp32.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from partlocal.kernels import Implementation, runs_kernel
from partlocal.numerics import NULL, accumulation_dtype, check_tensor

WORKSPACE = 2**24  # bytes that one chunk of classes may take; larger ones leave a CPU's caches
GPU_WORKSPACE = 2**27  # there a chunk must be large enough to fill the device
KEEP_LIMIT = 2**31  # bytes of logits that recompute=False may hold between forward and backward


class Negatives(NamedTuple):
    """What is known of each sample's cosines: all that a loss with a margin needs.

    Args:
        lse: log-sum-exp of the scaled cosines to all classes but its own, -inf if there are none.
        cos_target: the cosine to its own class, 0 without one.
        hardest: the largest cosine to another class, -inf where there is none; has no gradient.
    """

    lse: Float[Tensor, " b"]
    cos_target: Float[Tensor, " b"]
    hardest: Float[Tensor, " b"]


class How(NamedTuple):
    """How the sum over classes is taken."""

    scale: float
    workspace: int  # bytes a chunk of classes may take
    keep: bool  # the cosines, for the backward
    kernel: bool  # Triton's, or PyTorch


def negative_logsumexp(
    x: Float[Tensor, "b d"],
    weight: Float[Tensor, "v d"],
    labels: Shaped[Tensor, " b"],
    scale: float,
    *,
    ignore_index: int = -1,
    recompute: bool = True,
    workspace: int | None = None,
    implementation: Implementation = "auto",
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Return the log-sum-exp of each sample's scaled cosines to all classes but its own, and that.

    >>> x, weight = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> negative_logsumexp(x, weight, torch.tensor([1]), scale=64.0)
    (tensor([64.]), tensor([0.]))

    Memory beyond the gradients is a chunk of classes, never `b x v`: forward and backward go
    through the classes in chunks, and the backward computes the cosines again. Results are fp32
    (fp64 if an input is), under autocast too. Rows and embeddings of norm 0 have cosine 0 to
    all, and gradient 0. A sample whose embedding is not finite has a result and a gradient of
    NaN, and no part in the gradient of `weight`.

    Args:
        x: embeddings of any norm.
        weight: one row of any norm a class.
        labels: the class of each sample. Where it is `ignore_index` no class is left out,
            and the target's cosine is 0.
        scale: the cosines are multiplied by this.
        ignore_index: the label of samples without a class.
        recompute: `False` keeps the cosines for the backward (three matrix products, not four)
            where they take at most `KEEP_LIMIT` bytes; the kernel always recomputes.
        workspace: bytes a chunk of classes may take; None is 16 MiB, and 128 MiB on a GPU.
        implementation: `"torch"` is PyTorch; `"triton"` is the kernel, on a GPU, for embeddings
            and weight in float32 or half precision; `"auto"` is the kernel on NVIDIA's GPUs,
            unless the cosines are kept.

    Returns:
        N, -inf where there is no other class; and the cosine to the sample's own class.

    Raises:
        ValueError: shapes disagree, a label is out of range, or an option is unknown.
        TypeError: labels are no whole numbers.
        NotImplementedError: `implementation="triton"` where the kernel cannot run; or a second
            derivative is asked for.
    """
    how = choose(x, weight, scale, recompute, workspace, implementation)
    found = negatives(x, weight, labels, how, ignore_index)
    return found.lse, found.cos_target


def choose(
    x: Tensor,
    weight: Tensor,
    scale: float,
    recompute: bool = True,
    workspace: int | None = None,
    implementation: Implementation = "auto",
) -> How:
    """Return how the sum is taken; see `negative_logsumexp`."""
    dtype = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    keep = not recompute and len(x) * len(weight) * dtype.itemsize <= KEEP_LIMIT
    tensors = {"embeddings": x, "weight": weight}
    kernel = runs_kernel(implementation, "negative_logsumexp", not keep, **tensors)
    if workspace is None:
        workspace = WORKSPACE if x.device.type == "cpu" else GPU_WORKSPACE
    return How(scale, workspace, keep and not kernel, kernel)


def negatives(
    x: Tensor, weight: Tensor, labels: Tensor, how: How, ignore_index: int = -1
) -> Negatives:
    """Return what `negative_logsumexp` does, and the hardest other class."""
    check_inputs(x, weight, labels, how.scale)
    lse, cos_target, hardest, _ = _operation(x, weight, labels.long(), ignore_index, *how)
    return Negatives(lse, cos_target, hardest.detach())


# The operation. Opaque to torch.compile, which would unroll the loop over chunks; the plain
# functions do the work, so that tests can watch every tensor they make, and so that classes can
# be spread over ranks.


def forward(
    x: Tensor, weight: Tensor, targets: Tensor, how: How
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the three of `Negatives`, and the kept logits; a target is a row, or -1 for none."""
    dtype = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    (b, d), v = x.shape, weight.shape[0]
    unit, _ = unit_rows(x.to(dtype))
    # Also one so long that its norm is infinite: its cosines would be 0.
    lost = ~torch.linalg.vector_norm(x.to(dtype), dim=1).isfinite()
    own = unit if v == 0 else unit_rows(weight[targets.clamp(min=0)].to(dtype))[0]
    cos_target = (unit * own).sum(1).masked_fill(targets < 0, 0)
    if how.kernel:
        from partlocal.kernels.negative_logsumexp import sums  # noqa: PLC0415

        lse, top = sums(x, weight, targets, how.scale)
        return lse.masked_fill(lost, math.nan), cos_target, top / how.scale, unit.new_empty(0)
    top, total = unit.new_full((b,), -math.inf), unit.new_zeros(b)
    kept = unit.new_empty(b * v if how.keep else 0)
    scaled = how.scale * unit
    for part in _chunks(b, d, v, dtype, how.workspace):
        rows, _ = unit_rows(weight[part].to(dtype))
        out = kept[b * part.start : b * part.stop].view(b, -1) if how.keep else None
        logits = torch.mm(scaled, rows.t(), out=out)
        _set_target(logits, targets - part.start, -math.inf)
        largest = torch.maximum(top, logits.amax(1))
        shift = _finite(largest)
        shifted = logits - shift[:, None] if how.keep else logits.sub_(shift[:, None])
        total = total * (top - shift).exp() + shifted.exp_().sum(1)
        top = largest
    lse = (total.log() + _finite(top)).masked_fill(lost, math.nan)
    return lse, cos_target, top / how.scale, kept


def backward(
    grad_lse: Tensor,
    grad_cos: Tensor,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    lse: Tensor,
    kept: Tensor,
    how: How,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x, wide, and of weight."""
    dtype, (b, d), v = lse.dtype, x.shape, weight.shape[0]
    lost = lse.isnan()  # samples whose NaN may not reach the rows
    counts = lost & ((grad_lse != 0) | (grad_cos != 0))
    grad_lse, grad_cos = grad_lse.masked_fill(lost, 0), grad_cos.masked_fill(lost, 0)
    x = x.masked_fill(lost[:, None], 0)
    unit, inverse_norm = unit_rows(x.to(dtype))
    if how.kernel:
        from partlocal.kernels.negative_logsumexp import gradients  # noqa: PLC0415

        how_much = (grad_lse, grad_cos, lse.masked_fill(lost, 0))
        grad_x, grad_weight = gradients(*how_much, x, weight, targets, how.scale, how.workspace)
        grad_x.addcmul_((grad_x * unit).sum(1, keepdim=True), unit, value=-1)
        return grad_x.masked_fill_(counts[:, None], math.nan), grad_weight
    grad_unit, grad_weight = unit.new_zeros(b, d), weight.new_empty(v, d)
    # A sample without negatives has N = -inf, and no share to give: exp(-inf - 0) is that 0.
    shift = _finite(lse.masked_fill(lost, 0))[:, None]
    for part in _chunks(b, d, v, dtype, how.workspace):
        rows, inverse_row_norm = unit_rows(weight[part].to(dtype))
        if kept.numel():
            share = kept[b * part.start : b * part.stop].view(b, -1) - shift
            share.masked_fill_(lost[:, None], 0)
        else:
            share = torch.addmm(shift, unit, rows.t(), beta=-1, alpha=how.scale)
        share = share.exp_().mul_(how.scale * grad_lse[:, None])
        _set_target(share, targets - part.start, grad_cos[:, None])
        grad_unit.addmm_(share, rows)
        grad_rows = torch.mm(share.t(), unit)
        # Making a row a unit vector took its length away: so must the gradient lose its part
        # along the row.
        grad_rows.addcmul_((grad_rows * rows).sum(1, keepdim=True), rows, value=-1)
        grad_weight[part] = grad_rows.mul_(inverse_row_norm)
    grad_unit.addcmul_((grad_unit * unit).sum(1, keepdim=True), unit, value=-1)
    return grad_unit.mul_(inverse_norm).masked_fill_(counts[:, None], math.nan), grad_weight


@torch.library.custom_op("partlocal::negative_logsumexp", mutates_args=())
def _operation(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int,
    scale: float, workspace: int, keep: bool, kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    targets = class_indices(labels, weight.shape[0], ignore_index)
    with without_autocast(x):
        return forward(x, weight, targets, How(scale, workspace, keep, kernel))


@_operation.register_fake
def _(
    x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int,
    scale: float, workspace: int, keep: bool, kernel: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = accumulation_dtype(torch.promote_types(x.dtype, weight.dtype))
    lse, cos_target, hardest = (x.new_empty(x.shape[0], dtype=dtype) for _ in range(3))
    return lse, cos_target, hardest, lse.new_empty(x.shape[0] * weight.shape[0] if keep else 0)


@torch.library.custom_op("partlocal::negative_logsumexp_backward", mutates_args=())
def _backward_operation(  # noqa: PLR0913, PLR0917
    grad_lse: Tensor, grad_cos: Tensor, x: Tensor, weight: Tensor, targets: Tensor,
    lse: Tensor, kept: Tensor, scale: float, workspace: int, keep: bool, kernel: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    how = How(scale, workspace, keep, kernel)
    with without_autocast(x):
        grad_x, grad_weight = backward(grad_lse, grad_cos, x, weight, targets, lse, kept, how)
    return grad_x.to(x.dtype), grad_weight


@_backward_operation.register_fake
def _(  # noqa: PLR0913, PLR0917
    grad_lse: Tensor, grad_cos: Tensor, x: Tensor, weight: Tensor, targets: Tensor,
    lse: Tensor, kept: Tensor, scale: float, workspace: int, keep: bool, kernel: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, labels, ignore_index, *ctx.how = inputs
    lse, _, _, kept = output
    targets = labels.masked_fill(labels == ignore_index, -1)
    ctx.save_for_backward(x, weight, targets, lse, kept)
    ctx.set_materialize_grads(False)  # it would fill `b x v` zeros for `kept`


def _differentiate(
    ctx: Any, grad_lse: Tensor | None, grad_cos: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    zero = torch.zeros_like(ctx.saved_tensors[3])
    grads = (zero if grad is None else grad for grad in (grad_lse, grad_cos))
    return *_backward_operation(*grads, *ctx.saved_tensors, *ctx.how), *[None] * 6


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "negative_logsumexp has no second derivative (its first one is computed in chunks): "
        "take logits() and torch.nn.functional.cross_entropy for a problem that fits in memory"
    )


_operation.register_autograd(_differentiate, setup_context=_save)
_backward_operation.register_autograd(_refuse)


def _chunks(b: int, d: int, v: int, dtype: torch.dtype, workspace: int) -> list[slice]:
    # What a class takes: its logit, and a copy for safety; its row, gradient, and product.
    size = max(1, workspace // (dtype.itemsize * 3 * (b + d)))
    return [slice(start, min(start + size, v)) for start in range(0, v, size)]


def _finite(lse: Tensor) -> Tensor:
    """Return 0 for a sample without negatives, whose -inf cannot be subtracted."""
    return lse.masked_fill(lse == -math.inf, 0)


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and the inverse norms; both 0 where the norm is."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    null = norm <= NULL
    inverse = norm.masked_fill(null, 1).reciprocal().masked_fill(null, 0)
    return rows * inverse, inverse


def _set_target(chunk: Tensor, column: Tensor, value: Tensor | float) -> None:
    """Write `value` at each sample's own class if it is in this chunk; waits for no device."""
    inside = ((column >= 0) & (column < chunk.shape[1]))[:, None]
    column = column.clamp(0, chunk.shape[1] - 1)[:, None]
    chunk.scatter_(1, column, torch.where(inside, value, chunk.gather(1, column)))


def without_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their operands."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def check_inputs(x: Tensor, weight: Tensor, labels: Tensor, scale: float) -> None:
    """Refuse shapes, dtypes and devices that do not belong together."""
    check_scale(scale)
    check_embeddings(x, weight)
    check_labels(labels, x)


def check_labels(labels: Tensor, x: Tensor) -> None:
    """Refuse labels that are no whole numbers, one for each embedding."""
    check_tensor("labels", labels)
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"labels must be [b] with b = {x.shape[0]} (as embeddings); got {list(labels.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"labels must be whole numbers; got {labels.dtype}: pass labels.long()")
    if labels.device != x.device:
        raise ValueError(
            f"labels must be on {x.device} (as embeddings); got {labels.device}: "
            f"pass labels.to({str(x.device)!r})"
        )


def check_embeddings(x: Tensor, weight: Tensor, least: int = 1) -> None:
    """Refuse embeddings that are no floating-point rows of the width and device of `weight`."""
    check_tensor("embeddings", x)
    if not x.is_floating_point():
        raise TypeError(
            f"embeddings must be floating point; got {x.dtype}: pass embeddings.float()"
        )
    if x.ndim != 2 or x.shape[0] < least:
        raise ValueError(f"embeddings must be [b, d] with b at least 1; got {list(x.shape)}")
    if weight.ndim != 2 or weight.shape[1] != x.shape[1] or weight.shape[0] < least:
        raise ValueError(
            f"weight must be [v, d] with v at least 1 and d = {x.shape[1]} (as embeddings); "
            f"got {list(weight.shape)}"
        )
    if x.device != weight.device:
        raise ValueError(
            f"embeddings must be on {weight.device} (as weight); got {x.device}: "
            f"pass embeddings.to({str(weight.device)!r})"
        )


def check_scale(scale: float) -> None:
    """Refuse a scale that is no positive number."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite; got {scale}")


def class_indices(labels: Tensor, v: int, ignore_index: int) -> Tensor:
    """Return the labels with -1 for the ignored ones, or refuse those that are no class."""
    ignored = labels == ignore_index
    wrong = ((labels < 0) | (labels >= v)) & ~ignored
    if wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be in [0, {v}), the rows of weight, or ignore_index = {ignore_index}; "
            f"got {int(labels[position])} at position {position}"
        )
    return labels.masked_fill(ignored, -1)
