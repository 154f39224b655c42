"""The layer of the margin softmax: one row a class, here or spread over ranks, all or a sample."""

import copy
import math
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from partlocal.class_rows import (
    check_optimizer,
    check_order,
    check_size,
    copy_rows,
    draw_rows,
    hand_over,
    pick_rows,
)
from partlocal.hub import HubModule, check_keys
from partlocal.kernels import Implementation, check_implementation
from partlocal.logsumexp import (
    Negatives,
    check_embeddings,
    check_inputs,
    check_labels,
    check_scale,
    choose,
    class_indices,
    negatives,
    unit_rows,
    without_autocast,
)
from partlocal.margins import ArcFace, Margin, margin_config, margin_from_config
from partlocal.numerics import accumulation_dtype, check_tensor, refuse_non_finite
from partlocal.optim import take_rows
from partlocal.shard import Shard, local_part
from partlocal.softmax import (
    Diagnostics,
    Reduction,
    check_norm,
    check_reduction,
    diagnose,
    losses,
    norms,
    reduce,
    refuse_lost,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from partlocal.class_parallel import Batch


class ArcFaceHead(HubModule):
    """One row a class, trained with `margin_softmax`; `margin` chooses the family's member.

    >>> head = ArcFaceHead(8, num_classes=100)
    >>> head(torch.randn(4, 8), torch.tensor([3, 1, 4, 1])).shape
    torch.Size([])
    >>> head.logits(torch.randn(4, 8)).shape
    torch.Size([4, 100])

    With a process group the rows are spread over its ranks; see the docs, "Training with millions
    of identities". All ranks then call `forward` together, each with its own samples, and get the
    same loss, that of all samples. Wrap the backbone alone in DDP or FSDP2, not the head.

    Args:
        in_features: width of the embeddings.
        num_classes: identities.
        scale: the logits are this times the cosines.
        margin: one of `partlocal.margins`, or any callable like them (which cannot be saved).
        sample_rate: below 1, a training step takes the classes of its batch and so many of the
            others, drawn anew each time, that the sum runs over this share of all. The gradient of
            `weight` is that of these rows: train with `partlocal.optim.SGD` or `AdamW`.
        ignore_index: samples with this label do not count.
        recompute: `False` is faster and keeps the `b x v` cosines between forward and backward.
        process_group: whose ranks hold the rows, in equal shares.
        averaged: whether the backbone's gradients are averaged over ranks, as DDP and FSDP2 do; the
            embeddings' are multiplied by the number of ranks then. False if they are summed.
        debug: name the first embedding that is not finite, unless its sample is ignored; waits for
            the device in every step.
        implementation: see `negative_logsumexp`.
        device: where the rows are made.
        dtype: of the rows.

    Raises:
        ValueError: a size is below 1, `scale` is not positive, `sample_rate` is outside (0, 1], an
            option is unknown, or `process_group` has no backend for the device.
        TypeError: a size is no whole number, `sample_rate` no number, `margin` no margin, or
            `process_group` no group.
    """

    weight: nn.Parameter

    def __init__(  # noqa: PLR0913
        self,
        in_features: int,
        num_classes: int,
        scale: float = 64.0,
        margin: Margin = ArcFace(0.5),  # noqa: B008 (frozen)
        *,
        sample_rate: float = 1.0,
        ignore_index: int = -1,
        recompute: bool = True,
        process_group: "ProcessGroup | None" = None,
        averaged: bool = True,
        debug: bool = False,
        implementation: Implementation = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_implementation(implementation, "negative_logsumexp")
        check_scale(scale)
        check_size("in_features", in_features)
        check_size("num_classes", num_classes)
        if not isinstance(sample_rate, float | Real):
            raise TypeError(f"sample_rate must be a number; got {sample_rate!r}: 1 takes all")
        if not 0 < sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1]; got {sample_rate}: 1 takes all")
        if not callable(margin):
            raise TypeError(
                f"margin must be a margin, such as ArcFace(0.5); got {margin!r}: build one of "
                "partlocal.margins"
            )
        self.in_features, self.num_classes, self.scale = in_features, num_classes, scale
        self.margin = margin.to(device) if isinstance(margin, nn.Module) else margin
        self.sample_rate, self.ignore_index, self.recompute = sample_rate, ignore_index, recompute
        self.process_group, self.averaged, self.debug = process_group, averaged, debug
        self.implementation = implementation
        if process_group is not None:
            from partlocal.class_parallel import as_shard, check_group  # noqa: PLC0415

            check_group(process_group, torch.empty(0, device=device).device)
        rows = torch.empty(self._shard().count, in_features, device=device, dtype=dtype)
        self._hold(rows if process_group is None else as_shard(rows, num_classes, process_group))
        self.reset_parameters()

    def _hold(self, rows: Tensor) -> None:
        """Make `rows`, a DTensor if they are spread, the parameter."""
        self.weight = nn.Parameter(rows)
        self.weight.by_rows = self.sample_rate < 1  # type: ignore[attr-defined]

    def _shard(self) -> Shard:
        if self.process_group is None:
            return Shard(self.num_classes, 0, 1)
        group = self.process_group
        return Shard(self.num_classes, group.rank(), group.size())

    def _rows(self) -> Tensor:
        """Return the rows of this rank, as the parameter's own memory."""
        local = getattr(self.weight, "to_local", None)
        return self.weight if local is None else local()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw rows of random direction and a norm near 1, the same on any number of ranks.

        The norm has no part in the loss but sets the pace: a step turns a row by lr / norm^2.
        """
        self._draw(0)

    def _draw(self, first: int) -> None:
        """Draw all rows from class `first` on, and keep those of this rank."""
        rows = self._rows().detach()
        if rows.is_meta:
            return
        if self.process_group is None:
            draw_rows(rows, self._shard(), first)
            return
        from partlocal.class_parallel import same_generator  # noqa: PLC0415

        with same_generator(self.process_group, rows.device):
            draw_rows(rows, self._shard(), first)

    def forward(
        self,
        embeddings: Float[Tensor, "b d"],
        labels: Shaped[Tensor, " b"],
        norm: Float[Tensor, " b"] | None = None,
        reduction: Reduction = "mean",
        diagnostics: bool = False,
    ) -> Tensor | tuple[Tensor, Diagnostics]:
        """Return the loss; see `margin_softmax`.

        Args:
            embeddings: of any norm; of this rank's samples, of which there may be none.
            labels: the class of each, or `ignore_index`.
            norm: what the margin takes for the norms.
            reduction: over the samples of all ranks; `"none"` returns those of this rank.
            diagnostics: return a pair, the loss and `Diagnostics`.
        """
        check_reduction(reduction)
        found, norm, ignored, batch = self._negatives(embeddings, labels, norm)
        loss = losses(found, norm, ignored, self.margin, self.scale)
        if batch is not None and reduction == "none":
            loss = batch.own_part(loss)
        loss = reduce(loss, ignored, reduction)
        return (loss, diagnose(found, norm, ignored, self.margin)) if diagnostics else loss

    def _negatives(
        self, embeddings: Tensor, labels: Tensor, norm: Tensor | None
    ) -> tuple[Negatives, Tensor, Tensor, "Batch | None"]:
        """Return what is known of the samples of all ranks, their norms, and who is ignored."""
        if self.process_group is None:
            self._check(embeddings, labels, norm)
            targets, ignore_index = labels.long(), self.ignore_index
            rows, ignored = self._rows(), targets == ignore_index
            norm = norms(embeddings, ignored) if norm is None else norm
            if self._samples:
                targets = class_indices(targets, self.num_classes, ignore_index)
                (rows, targets), ignore_index = self._sample(targets), -1
            how = choose(embeddings, rows, self.scale, self.recompute, None, self.implementation)
            return negatives(embeddings, rows, targets, how, ignore_index), norm, ignored, None

        from partlocal.class_parallel import gather_batch, scale_gradient  # noqa: PLC0415

        shard, problem, length = self._shard(), None, None
        try:
            self._check(embeddings, labels, norm)
            length = norms(embeddings, labels.long() == self.ignore_index) if norm is None else norm
            if self.averaged:
                embeddings, length = (scale_gradient(x, shard.ranks) for x in (embeddings, length))
        except (ValueError, TypeError) as error:  # the others must hear of it
            problem = error
        embeddings, norm, batch = gather_batch(
            embeddings, labels, length, self.process_group, self._rows().device, problem
        )
        classes = batch.classes(self.num_classes, self.ignore_index)
        here = (classes >= shard.start) & (classes < shard.stop)
        rows, targets = self._rows(), torch.where(here, classes - shard.start, -1)
        if self._samples:
            rows, targets = self._sample(targets)
        how = choose(batch.embeddings, rows, self.scale, self.recompute, None, self.implementation)
        found = batch.negatives(embeddings, rows, targets, how)
        return found, batch.with_own(norm), classes < 0, batch

    def _check(self, embeddings: Tensor, labels: Tensor, norm: Tensor | None) -> None:
        self._check_width(embeddings)
        check_embeddings(embeddings, self._rows(), least=int(self.process_group is None))
        check_labels(labels, embeddings)
        if norm is not None:
            check_norm(norm, labels)
        if self.debug:
            ignored = labels.long() == self.ignore_index
            refuse_lost(embeddings.masked_fill(ignored[:, None], 0))

    @property
    def _samples(self) -> bool:
        return self.training and self.sample_rate < 1

    def _sample(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of this step's classes, those of the batch included, and new targets."""
        # Again, because a copied parameter has lost it.
        self.weight.by_rows = True  # type: ignore[attr-defined]
        own, held = targets[targets >= 0].unique(), self._shard().count
        # One more than the batch's own at least, or a batch of one class would learn nothing.
        count = min(held, max(len(own) + 1, math.ceil(self.sample_rate * held)))
        order = torch.rand(held, device=targets.device)
        order[own] = 2
        chosen = order.topk(count, sorted=False).indices.sort().values
        places = torch.searchsorted(chosen, targets).masked_fill(targets < 0, -1)
        return take_rows(self.weight, chosen), places

    def logits(
        self, embeddings: Float[Tensor, "b d"], labels: Shaped[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b v"]:
        """Return the `b x v` scaled cosines; with labels, the target's after the margin.

        With a process group all rows are gathered on each rank, and get no gradient. A margin with
        statistics leaves them as they are.

        Raises:
            ValueError: as `forward`.
            TypeError: as `forward`.
        """
        self._check_width(embeddings)
        weight = self.all_rows() if self.process_group is None else self.all_rows().detach()
        if labels is None:
            check_embeddings(embeddings, weight)
        else:
            check_inputs(embeddings, weight, labels, self.scale)
        dtype = accumulation_dtype(torch.promote_types(embeddings.dtype, weight.dtype))
        with without_autocast(embeddings):
            unit, rows = unit_rows(embeddings.to(dtype))[0], unit_rows(weight.to(dtype))[0]
            cos = unit @ rows.t()
        length = torch.linalg.vector_norm(embeddings.to(dtype), dim=1)
        refuse_non_finite(length, "embeddings", "their norms")
        refuse_non_finite(cos.detach().sum(1), "weight", "the cosines")
        if labels is None:
            return self.scale * cos
        targets = class_indices(labels.long(), self.num_classes, self.ignore_index)
        norm = length.masked_fill(targets < 0, 0)
        index = targets.clamp(min=0)[:, None]
        cos_target = cos.gather(1, index)
        margin = self.margin
        if isinstance(margin, nn.Module):
            margin = copy.deepcopy(margin).eval()
        phi = margin(cos_target[:, 0], norm)[:, None]
        return self.scale * cos.scatter(
            1, index, torch.where(index == targets[:, None], phi, cos_target)
        )

    def all_rows(self) -> Float[Tensor, "v d"]:
        """Return the rows of all ranks, which call this together."""
        whole = getattr(self.weight, "full_tensor", None)
        return self.weight if whole is None else whole()

    @torch.no_grad()
    def load_rows(self, rows: Tensor | Sequence[Tensor]) -> None:
        """Copy the rows of all classes, each rank its own.

        Args:
            rows: [v, d], or several tensors whose rows follow each other. They may lie in a file
                that is mapped into memory: what other ranks hold is not read.

        Raises:
            ValueError: there are more or fewer classes, or rows of another width.
            TypeError: they are no tensors.
        """
        copy_rows(self._rows().detach(), self._shard(), rows)

    @torch.no_grad()
    def extend(self, n: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Add `n` classes behind the others, with fresh rows.

        An AdamW of `torch.optim` counts the steps of all rows together: new ones move by up to
        three times the rate at first.

        Args:
            n: how many; on all ranks the same.
            optimizer: which trains this head; it takes the new parameter in place of the old one,
                and what it remembers of a row stays with it.

        Raises:
            ValueError: `n` is below 1 or not the same on all ranks, or `optimizer` does not hold
                this head's weight.
            TypeError: `n` is no whole number.
        """
        old = self.num_classes

        def order() -> Tensor:
            check_size("n", n)
            return torch.cat([torch.arange(old), torch.full((n,), -1)])

        self._rearrange("n", order, optimizer)
        self._draw(old)

    def keep(
        self, indices: Int[Tensor, " n"] | Sequence[int],
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:  # fmt: skip
        """Keep some classes, in this order: class `indices[j]` becomes class j.

        Args:
            indices: different classes; on all ranks the same.
            optimizer: as in `extend`.

        Raises:
            ValueError: there are none, one is out of range or named twice, they are not the same on
                all ranks, or `optimizer` does not hold this head's weight.
            TypeError: they are a mask, or no whole numbers.
        """
        self._rearrange("indices", lambda: check_order(indices, self.num_classes), optimizer)

    @torch.no_grad()
    def _rearrange(
        self, name: str, order: Callable[[], Tensor], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Make class j what class `order()[j]` was, in an optimizer too; -1 leaves zeros.

        `name` is that of the argument that `order` reads, and refuses where it is wrong.
        """
        old, weight, group = self._shard(), self.weight, self.process_group

        def checked() -> Tensor:
            check_optimizer(optimizer, weight)
            return order()

        if group is None:
            source = checked()

            def moved(tensor: Tensor) -> Tensor:
                return pick_rows(tensor, source)

        else:
            from partlocal.class_parallel import agreed, as_shard, move_rows  # noqa: PLC0415

            source = agreed(name, checked, optimizer is not None, group, local_part(weight).device)
            new = Shard(len(source), old.rank, old.ranks)

            def moved(tensor: Tensor) -> Tensor:
                rows = move_rows(local_part(tensor), source, old, new, group)
                return as_shard(rows, new.classes, group)

        self.num_classes = len(source)
        self._hold(moved(weight))
        self.weight.requires_grad_(weight.requires_grad)
        if optimizer is not None:
            hand_over(optimizer, weight, self.weight, moved)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the rows of all ranks as one head; all ranks call this, the first one writes.

        Each rank gathers all rows for it.
        """
        if self.process_group is None:
            return super().save_pretrained(save_directory, **kwargs)
        from partlocal.class_parallel import first_rank_does  # noqa: PLC0415

        rows = self.all_rows().detach()

        def save() -> str | None:
            whole = ArcFaceHead.from_config({**self.config(), "num_classes": 1})
            whole.num_classes, whole.weight = self.num_classes, nn.Parameter(rows.cpu())
            if isinstance(self.margin, nn.Module):
                whole.margin = copy.deepcopy(self.margin).cpu()
            return whole.save_pretrained(save_directory, **kwargs)

        return first_rank_does(save, self.process_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget all gradients, those of sampled rows too."""
        super().zero_grad(set_to_none)
        self.weight.row_grad = None  # type: ignore[attr-defined]

    def __deepcopy__(self, memo: dict[int, Any]) -> "ArcFaceHead":
        """Copy all but the process group, which both heads use."""
        memo[id(self.process_group)] = self.process_group
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def _check_width(self, embeddings: Tensor) -> None:
        check_tensor("embeddings", embeddings)
        if embeddings.ndim == 2 and embeddings.shape[1] != self.in_features:
            raise ValueError(
                f"embeddings must be [b, {self.in_features}] (in_features of this head); "
                f"got {list(embeddings.shape)}"
            )

    def config(self) -> dict[str, Any]:
        """Return the arguments that rebuild this head; how it is spread is not among them."""
        return {
            "in_features": self.in_features,
            "num_classes": self.num_classes,
            "scale": self.scale,
            "margin": margin_config(self.margin),
            "sample_rate": self.sample_rate,
            "ignore_index": self.ignore_index,
            "recompute": self.recompute,
            "implementation": self.implementation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "ArcFaceHead":
        """Build a head with fresh rows from what `config()` returned."""
        check_keys(
            "ArcFaceHead",
            config,
            ["in_features", "num_classes", "scale", "margin"],
            ["sample_rate", "ignore_index", "recompute", "implementation"],
        )
        return cls(**{**config, "margin": margin_from_config(config["margin"])})

    def extra_repr(self) -> str:
        """Show the arguments; a margin with state is listed below them as a module."""
        margin = "" if isinstance(self.margin, nn.Module) else f", margin={self.margin}"
        sampled = f", sample_rate={self.sample_rate}" if self.sample_rate < 1 else ""
        shard = self._shard()
        spread = f", rank={shard.rank} of {shard.ranks}" if self.process_group is not None else ""
        return (
            f"{self.in_features}, {self.num_classes}, scale={self.scale}{margin}{sampled}{spread}"
        )
