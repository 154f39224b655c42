"""Part vectors to a descriptor of the parts and of the structure between them."""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from partlocal.kernels import Implementation, check_implementation, runs_kernel
from partlocal.kernels.registration import derive
from partlocal.numerics import (
    NULL,
    accumulation_dtype,
    check_tensor,
    eager_on_cpu,
    finite_above,
    refuse_non_finite,
    result_dtype,
    wide_matmul,
)


def structure_correlation(
    parts: Float[Tensor, "b k c"],
    visibility: Float[Tensor, "b k"] | Bool[Tensor, "b k"] | None = None,
    implementation: Implementation = "auto",
) -> Float[Tensor, "b k f"]:
    """Append to each part its distance and cosine to every other part.

    >>> structure_correlation(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
    tensor([[[3., 0., 5., 0.],
             [0., 4., 5., 0.]]])

    Args:
        parts: one vector a part.
        visibility: how visible each part is. When given, a part counts as absent if its
            visibility is 0 or its vector is zero, as `part_mask_pool` returns absent parts (its
            length at most 1e-12), and the pairs of an absent part are 0: else the distance to it
            would be the length of the other part. None takes every vector as it is.
        implementation: `"auto"` and `"torch"` are this definition; `"triton"` is its kernel, on a
            GPU, in float32 or half precision and for at most 256 parts.

    Returns:
        For each part its own c numbers, then (Euclidean distance, cosine) to each other part in
        part order: c + 2(k-1) numbers, in the dtype of `parts` (or autocast's). The cosine with a
        vector of length at most 1e-12 is 0; the distance between equal vectors has the gradient 0.

    Raises:
        ValueError: wrong shape, an empty batch, no part, or parts or visibility that are not
            finite (checked in eager mode on a CPU).
        TypeError: the parts are not floating point.
        NotImplementedError: `implementation="triton"` where the kernel cannot run.

    Source: FSENet; its D_i is read as Euclidean distance, its A_i ("angle") as cosine.
    """
    check_implementation(implementation, "structure_correlation")
    _check_inputs(parts, visibility)
    if runs_kernel(implementation, "structure_correlation", parts=parts):
        from partlocal.kernels.structure_correlation import structure_correlation as kernel  # noqa: PLC0415

        return kernel(parts, visibility, result_dtype(parts))
    wide = parts.to(accumulation_dtype(parts.dtype))

    energy = wide.square().sum(2, keepdim=True)
    if finite_above(energy, NULL**2):
        unit = wide * energy.rsqrt()
    else:
        refuse_non_finite(energy, "parts", "their squared lengths")
        nonzero = _nonzero(energy)
        unit = wide * torch.where(nonzero, torch.where(nonzero, energy, 1).rsqrt(), 0)
    cosine = wide_matmul(unit, unit.mT)

    pairs = _off_diagonal(torch.stack([_distances(wide), cosine], dim=3))
    if visibility is not None:
        refuse_non_finite(visibility, "visibility", "its values")
        present = (visibility > 0) & _nonzero(energy)[:, :, 0]
        pairs = torch.where(_off_diagonal(_both(present))[..., None], pairs, 0)
    return torch.cat([wide, pairs.flatten(2)], dim=2).to(result_dtype(parts))


def present_numbers(
    parts: Float[Tensor, "b k c"], visibility: Float[Tensor, "b k"] | Bool[Tensor, "b k"]
) -> Bool[Tensor, "b k f"]:
    """Return which numbers of `structure_correlation` describe parts that are there.

    >>> present_numbers(torch.tensor([[[3.0], [0.0], [2.0]]]), torch.ones(1, 3)).int()
    tensor([[[1, 0, 0, 1, 1],
             [0, 0, 0, 0, 0],
             [1, 1, 1, 0, 0]]], dtype=torch.int32)

    Args:
        parts: one vector a part, zeros (a length of at most 1e-12) where it is absent.
        visibility: how visible each part is, 0 where it is absent.
    """
    energy = parts.to(accumulation_dtype(parts.dtype)).square().sum(2)
    present = (visibility > 0) & _nonzero(energy)
    own = present[..., None].expand_as(parts)
    return torch.cat([own, _off_diagonal(_both(present)).repeat_interleave(2, dim=2)], dim=2)


class StructureCorrelation(nn.Module):
    """`structure_correlation` as a layer.

    >>> StructureCorrelation()(torch.ones(1, 6, 128)).shape
    torch.Size([1, 6, 138])

    Args:
        implementation: `"auto"`, `"torch"` or `"triton"`.
    """

    def __init__(self, implementation: Implementation = "auto") -> None:
        super().__init__()
        check_implementation(implementation, "structure_correlation")
        self.implementation = implementation

    def forward(
        self,
        parts: Float[Tensor, "b k c"],
        visibility: Float[Tensor, "b k"] | Bool[Tensor, "b k"] | None = None,
    ) -> Float[Tensor, "b k f"]:
        """Return the parts with the structure between them."""
        return structure_correlation(
            parts, visibility=visibility, implementation=self.implementation
        )

    def extra_repr(self) -> str:
        """Show the arguments that rebuild this layer."""
        return f"implementation={self.implementation!r}"


def _nonzero(energy: Tensor) -> Tensor:
    """Return whether squared lengths are more than nothing; NaN is, as it must show up."""
    return ~(energy <= NULL**2)


def _distances(parts: Tensor) -> Tensor:
    """Return the distance between all parts, [b, k, k], from differences: the Gram form cancels."""
    if eager_on_cpu(parts):
        return _Distances.apply(parts)
    return _plain_distances(parts)


def _plain_distances(parts: Tensor) -> Tensor:
    squared = (parts[:, :, None] - parts[:, None]).square().sum(3)
    apart = squared != 0
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


class _Distances(torch.autograd.Function):
    """`torch.cdist`, with the second derivative that it lacks in torch 2.11 and before."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor) -> Tensor:
        distance = torch.cdist(parts, parts, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(parts, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts, distance = ctx.saved_tensors
        if torch.is_grad_enabled():
            return derive(_plain_distances, [parts], grad)[0]
        return torch.ops.aten._cdist_backward(grad + grad.mT, parts, parts, 2.0, distance)


def _off_diagonal(pairs: Tensor) -> Tensor:
    """Return of each row [b, i] the pairs with the other parts, in part order: k - 1 of k."""
    k = pairs.shape[1]
    # Without the first of all, every row of k + 1 ends with a pair of one part with itself.
    shifted = pairs.flatten(1, 2)[:, 1:].unflatten(1, (k - 1, k + 1))
    return shifted[:, :, :-1].flatten(1, 2).unflatten(1, (k, k - 1))


def _both(present: Tensor) -> Tensor:
    """Return at [b, i, j] whether the parts i and j are present."""
    return present[:, :, None] & present[:, None]


def _check_inputs(parts: Tensor, visibility: Tensor | None) -> None:
    check_tensor("parts", parts)
    if not parts.is_floating_point():
        raise TypeError(f"parts must be floating point; got {parts.dtype}: pass parts.float()")
    if parts.ndim != 3 or 0 in parts.shape[1:]:
        raise ValueError(f"parts must be [b, k, c], none of them 0; got {list(parts.shape)}")
    if parts.shape[0] == 0:
        raise ValueError("parts must hold at least one image; got an empty batch")
    if visibility is None:
        return
    if visibility.shape != parts.shape[:2]:
        raise ValueError(
            f"visibility must be [b, k] = {list(parts.shape[:2])} (as parts); "
            f"got {list(visibility.shape)}"
        )
    if visibility.device != parts.device:
        raise ValueError(
            f"visibility must be on {parts.device} (as parts); got {visibility.device}: "
            f"pass visibility.to({str(parts.device)!r})"
        )
