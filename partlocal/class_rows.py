"""The rows of a head, one a class: drawn, copied, and put in another order, in optimizers too."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn

from partlocal.shard import Shard

BLOCK = 4096  # rows drawn at a time


def draw_rows(rows: Tensor, shard: Shard, first: int = 0) -> None:
    """Fill the rows of the classes from `first` on with normal numbers, of norm near 1.

    All classes are drawn, and those of other ranks dropped: so a row depends on the generator and
    on its class alone.

    Args:
        rows: of this rank.
        shard: which classes they are.
        first: of the classes that are drawn.
    """
    for begin in range(first, shard.classes, BLOCK):
        end = min(begin + BLOCK, shard.classes)
        low, high = max(begin, shard.start), min(end, shard.stop)
        if (low, high) == (begin, end):
            block = rows[begin - shard.start : end - shard.start]
        else:
            block = rows.new_empty(end - begin, rows.shape[1])
        nn.init.normal_(block, std=rows.shape[1] ** -0.5)
        if low < high:
            rows[low - shard.start : high - shard.start] = block[low - begin : high - begin]


def copy_rows(rows: Tensor, shard: Shard, source: Tensor | Sequence[Tensor]) -> None:
    """Fill the rows of this rank from those of all classes, in one tensor or several.

    Raises:
        ValueError: there are more or fewer classes, or rows of another width.
        TypeError: they are no tensors.
    """
    given: object = source
    many = isinstance(given, Iterable) and not isinstance(given, Tensor | str)
    parts: list[Tensor] = list(given) if many else [given]  # type: ignore
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                f"rows must be a tensor [v, d] or several; got {type(part).__name__}: pass "
                "torch.as_tensor(rows), or read_rows(...) of partlocal.head_files for files"
            )
    shapes = [list(part.shape) for part in parts]
    count, width = sum(shape[0] for shape in shapes if shape), rows.shape[1]
    widths = {tuple(shape[1:]) for shape in shapes}
    if count != shard.classes or widths != {(width,)}:
        way = f"pass matrices of {width} columns"
        if widths == {(width,)}:
            way = f"build the head with num_classes={count}"
        elif [len(found) for found in widths] == [1]:
            way = (
                "pass the transposed matrix if it is [d, v], or build the head with "
                f"in_features={shapes[0][1]}, num_classes={count}"
            )
        raise ValueError(
            f"rows must be [{shard.classes}, {width}] in all (num_classes, in_features of this "
            f"head); got {shapes}: {way}"
        )
    begin = 0
    for part in parts:
        end = begin + len(part)
        low, high = max(begin, shard.start), min(end, shard.stop)
        if low < high:
            some = part[low - begin : high - begin]
            rows[low - shard.start : high - shard.start] = some.to(rows.device)
        begin = end


def pick_rows(tensor: Tensor, source: Tensor) -> Tensor:
    """Return rows of which row j is row `source[j]` of `tensor`, or zeros for -1.

    >>> pick_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([1, -1])).tolist()
    [[2.0], [0.0]]
    """
    source = source.to(tensor.device)
    fresh = (source < 0).view(-1, *[1] * (tensor.ndim - 1))
    return tensor.detach().index_select(0, source.clamp(min=0)).masked_fill_(fresh, 0)


def check_size(name: str, size: object) -> None:
    """Refuse what is no whole number, or below 1.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below 1.
    """
    if not isinstance(size, Integral):
        raise TypeError(f"{name} must be a whole number; got {size!r}")
    if size < 1:
        raise ValueError(f"{name} must be at least 1; got {size}")


def check_order(indices: Tensor | Sequence[int], classes: int) -> Tensor:
    """Return which classes are kept, or refuse what names them wrongly.

    Raises:
        ValueError: there are none, one is out of range or named twice.
        TypeError: they are a mask, or no whole numbers.
    """
    try:
        order = torch.as_tensor(indices).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"indices must be whole numbers, such as [3, 1, 4]; got {indices!r:.60}"
        ) from None
    if order.numel() and order.dtype == torch.bool:
        raise TypeError("indices must be whole numbers; got a mask: pass mask.nonzero()[:, 0]")
    if order.numel() and (order.is_floating_point() or order.is_complex()):
        raise TypeError(f"indices must be whole numbers; got {order.dtype}: pass indices.long()")
    order = order.long()
    if order.ndim != 1 or len(order) == 0:
        raise ValueError(f"indices must name at least one class; got {list(order.shape)}")
    if order.min() < 0 or order.max() >= classes:
        wrong = order[(order < 0) | (order >= classes)][0]
        raise ValueError(f"indices must be in [0, {classes}); got {int(wrong)}")
    if len(order.unique()) < len(order):
        raise ValueError("indices must name each class once; got one twice")
    return order


def check_optimizer(optimizer: torch.optim.Optimizer | None, weight: Tensor) -> None:
    """Refuse an optimizer that does not hold `weight`.

    Raises:
        ValueError: so it is.
    """
    if optimizer is None:
        return
    if not any(p is weight for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "optimizer must hold this head's weight; got one without it: pass the one that was "
            "built with head.parameters()"
        )


def hand_over(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    moved: Callable[[Tensor], Tensor],
) -> None:
    """Let an optimizer step `new` in place of `old`, with what it remembers of each row.

    Args:
        optimizer: that holds `old`.
        old: whose rows are its first axis.
        new: the same rows in another order.
        moved: from something of every row, in the old order, to the new one.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    if hasattr(old, "stepped_by_rows"):
        new.stepped_by_rows = True  # type: ignore[attr-defined]
    if old in optimizer.state:
        optimizer.state[new] = {
            key: moved(x) if isinstance(x, Tensor) and x.ndim and len(x) == len(old) else x
            for key, x in optimizer.state.pop(old).items()
        }
