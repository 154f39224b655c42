"""Parsing logits to normalised part maps on the grid of a feature map (FSENet, section 3.5)."""

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlocal.kernels import MAX_LABELS, Implementation, check_implementation, runs_kernel
from partlocal.labels import Parts
from partlocal.numerics import (
    EPS,
    accumulation_dtype,
    check_tensor,
    refuse_non_finite,
    result_dtype,
)
from partlocal.resize import Downsample, check_downsample, resize_maps, side_or_size

Activation = Literal["softmax", "sigmoid"]
Norm = Literal["l2", "sum"]
NormOver = Literal["labels", "parts"]


class MapsAndVisibility(NamedTuple):
    """What `part_maps` returns."""

    maps: Float[Tensor, "b k h w"]
    visibility: Float[Tensor, "b k"]


def part_maps(
    logits: Float[Tensor, "b n sh sw"],
    parts: Parts | Sequence[int],
    size: int | tuple[int, int],
    activation: Activation | None = "softmax",
    norm: Norm | None = "l2",
    downsample: Downsample = "max",
    norm_over: NormOver = "labels",
    implementation: Implementation = "auto",
) -> MapsAndVisibility:
    """Turn the logits of a parser into the maps of some parts, on a coarser grid.

    >>> logits = torch.tensor([4.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    >>> maps, visibility = part_maps(logits, parts=(0, 2), size=2)
    >>> maps.shape, [round(p, 3) for p in visibility[0].tolist()]
    (torch.Size([1, 2, 2, 2]), [0.965, 0.018])

    Args:
        logits: scores of all n labels.
        parts: the labels to keep, in order: a selection from a `LabelSet`, or label indices.
        size: grid of the maps, in cells: (height, width), or one number for both.
        activation: `"softmax"` over the n labels, `"sigmoid"` of each, or None for scores that
            are probabilities already.
        norm: divides each pixel by the `"l2"` norm, or the `"sum"` of magnitudes, of its
            activations; None keeps them.
        downsample: `"max"` (the paper, 4.7.3) or `"area"`; see `resize_maps`.
        norm_over: the norm runs over all n `"labels"`, before the selection. Over the selected
            `"parts"` alone, cells of pure background would be blown up to 1.
        implementation: `"torch"` is this definition; `"triton"` its kernel, on a GPU, for at most
            1,024 labels in float32 or half precision; `"auto"` the kernel on NVIDIA's GPUs.

    Returns:
        maps, in the dtype of the logits (or autocast's), and the visibility of each part: the
        peak of its activation over all pixels, before the norm, in float32 (float64 for float64).

    Raises:
        ValueError: wrong shape, an empty batch, no part, a part that the logits do not hold, a
            size that is no grid, an unknown option, or logits that are not finite (checked in
            eager mode on a CPU; -inf masks a label before softmax and sigmoid).
        TypeError: the logits are not floating point, or parts are no label indices.
        NotImplementedError: `implementation="triton"` where the kernel cannot run.

    Source: FSENet, section 3.5 (down-sampling module) and 4.7.3 (max pooling).
    """
    check_implementation(implementation, "part_maps")
    _check_options(activation, norm, norm_over)
    indices = _check_inputs(logits, parts)
    size = side_or_size(size)
    check_downsample(downsample)
    if runs_kernel(implementation, "part_maps", logits.shape[1] <= MAX_LABELS, logits=logits):
        from partlocal.kernels.part_maps import maps_and_visibility  # noqa: PLC0415

        over_parts, dtype = norm_over == "parts", result_dtype(logits)
        how = (activation, norm, downsample, over_parts, dtype)
        return MapsAndVisibility(*maps_and_visibility(logits, indices, size, *how))

    scores = logits.to(accumulation_dtype(logits.dtype))
    if activation == "softmax":
        scores = scores.softmax(1)
    elif activation == "sigmoid":
        scores = scores.sigmoid()
    selected = scores.index_select(1, torch.tensor(indices, device=logits.device))
    # A maximum over one flat axis gives the gradient of a tie to the first pixel.
    visibility = selected.flatten(2).max(2).values
    refuse_non_finite(visibility, "logits", "the activations of the parts")
    # Softmax carries a NaN to all labels of its pixel; without it, one outside of the parts stays.
    if activation != "softmax":
        refuse_non_finite(scores.detach().sum((1, 2, 3)), "logits", "the activations of all labels")
    if norm is not None:
        selected = selected * _inverse_norm(scores if norm_over == "labels" else selected, norm)
    maps = resize_maps(selected, size, downsample)
    return MapsAndVisibility(maps.to(result_dtype(logits)), visibility)


class PartMaps(nn.Module):
    """`part_maps` as a layer: logits in, maps and visibility out.

    >>> PartMaps(parts=(1, 2, 3), size=28)(torch.zeros(1, 4, 128, 128)).maps.shape
    torch.Size([1, 3, 28, 28])

    Args: those of `part_maps`, in the same order, without the logits.
    """

    def __init__(
        self,
        parts: Parts | Sequence[int],
        size: int | tuple[int, int],
        activation: Activation | None = "softmax",
        norm: Norm | None = "l2",
        downsample: Downsample = "max",
        norm_over: NormOver = "labels",
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        check_implementation(implementation, "part_maps")
        _check_options(activation, norm, norm_over)
        self.parts = _indices(parts)
        side_or_size(size)
        self.size = size
        self.activation = activation
        self.norm = norm
        self.downsample = downsample
        self.norm_over = norm_over
        self.implementation = implementation

    def forward(self, logits: Float[Tensor, "b n sh sw"]) -> MapsAndVisibility:
        """Return the maps and the visibility of the parts."""
        return part_maps(
            logits,
            parts=self.parts,
            size=self.size,
            activation=self.activation,
            norm=self.norm,
            downsample=self.downsample,
            norm_over=self.norm_over,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """Show the arguments that rebuild this layer."""
        return (
            f"parts={self.parts}, size={self.size}, activation={self.activation!r}, "
            f"norm={self.norm!r}, downsample={self.downsample!r}, "
            f"norm_over={self.norm_over!r}, implementation={self.implementation!r}"
        )


def _inverse_norm(scores: Tensor, norm: Norm) -> Tensor:
    if norm == "sum":
        return scores.abs().sum(1, keepdim=True).clamp(min=EPS).reciprocal()
    # The square is clamped, not the root: the root of 0 has no second derivative.
    return scores.square().sum(1, keepdim=True).clamp(min=EPS**2).rsqrt()


def _check_options(activation: str | None, norm: str | None, norm_over: str) -> None:
    if activation not in ("softmax", "sigmoid", None):
        raise ValueError(f"activation must be 'softmax', 'sigmoid' or None; got {activation!r}")
    if norm not in ("l2", "sum", None):
        raise ValueError(f"norm must be 'l2', 'sum' or None; got {norm!r}")
    if norm_over not in ("labels", "parts"):
        raise ValueError(f"norm_over must be 'labels' or 'parts'; got {norm_over!r}")


def _indices(parts: Parts | Sequence[int]) -> tuple[int, ...]:
    if isinstance(parts, Parts):
        return parts.indices
    indices = tuple(parts) if isinstance(parts, Iterable) else (None,)
    if isinstance(parts, str) or not all(isinstance(i, Integral) for i in indices):
        raise TypeError(
            f"parts must be label indices, or a selection from a LabelSet; got {parts!r}: for "
            'names pass the selection, such as HELEN.select("nose")'
        )
    return indices


def _check_inputs(logits: Tensor, parts: Parts | Sequence[int]) -> tuple[int, ...]:
    check_tensor("logits", logits)
    if not logits.is_floating_point():
        raise TypeError(
            f"logits must be floating point; got {logits.dtype}: for label images pass one-hot "
            "maps as float, with activation=None"
        )
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"logits must be [b, n, h, w], none of them 0; got {list(logits.shape)}")
    if logits.shape[0] == 0:
        raise ValueError("logits must hold at least one image; got an empty batch")
    indices = _indices(parts)
    if not indices:
        raise ValueError("parts must name at least one label; got none")
    n = logits.shape[1]
    if isinstance(parts, Parts) and len(parts.label_set) != n:
        raise ValueError(
            f"parts are of {parts.label_set.name}, which has {len(parts.label_set)} labels, and "
            f"the logits hold {n}: select parts from the label set of the parser that made them"
        )
    if wrong := [i for i in indices if not 0 <= i < n]:
        raise ValueError(
            f"parts must be label indices from 0 to {n - 1} (logits hold {n} labels); "
            f"got {', '.join(map(str, wrong))}: select parts from the parser's own label set"
        )
    return indices
