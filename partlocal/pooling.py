"""Feature map and part maps to one vector a part (FSENet, eq. 6 and section 4.7.4)."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from partlocal.kernels import Implementation, check_implementation, runs_kernel
from partlocal.masked_max import masked_max
from partlocal.numerics import (
    EPS,
    accumulation_dtype,
    check_tensor,
    finite_above,
    refuse_non_finite,
    result_dtype,
    wide_matmul,
)
from partlocal.resize import check_size, resize_maps

Mode = Literal["sum", "mean", "max"]


class PartFeatures(NamedTuple):
    """What `part_mask_pool` returns."""

    parts: Float[Tensor, "b k c"]
    mass: Float[Tensor, "b k"]
    visibility: Float[Tensor, "b k"]


def part_mask_pool(
    features: Float[Tensor, "b c h w"] | Float[Tensor, "b hw c"],
    maps: Float[Tensor, "b k mh mw"],
    mode: Mode = "sum",
    normalize: bool = True,
    visibility: Float[Tensor, "b k"] | None = None,
    min_visibility: float = 0.0,
    area_threshold: float = 0.5,
    grid: tuple[int, int] | None = None,
    implementation: Implementation = "auto",
) -> PartFeatures:
    """Pool the features of each part under its map.

    >>> features = torch.tensor([[[[1.0, 3.0, 5.0, 7.0]]]])
    >>> maps = torch.tensor([[[[1.0, 1.0, 0.0, 0.0]], [[0.0, 0.0, 0.5, 1.0]]]])
    >>> parts, mass, visibility = part_mask_pool(features, maps)
    >>> parts[0, :, 0], mass[0]
    (tensor([2.0000, 6.3333]), tensor([2.0000, 1.5000]))

    Args:
        features: a feature map in any memory layout, read where it lies (half precision is
            widened once); pass NHWC as `features.permute(0, 3, 1, 2)`. Or the tokens of a vision
            transformer, without its prefix tokens.
        maps: weights of the parts, usually in [0, 1]. From another grid they are brought to that
            of the features by exact area; for their maximum pass
            `resize_maps(maps, (h, w), mode="max")`.
        mode: `"sum"` weighs the features by the map; `"mean"` and `"max"` take them as they are,
            over the cells where the map is at least `area_threshold`.
        normalize: divide by the mass of the part, in every mode (the paper's table 13).
        visibility: of each part, as `part_maps` returns it; None takes the peak of each map.
        min_visibility: parts below it are absent; 0 keeps all (the paper).
        area_threshold: the border of the area in `"mean"` and `"max"`.
        grid: (height, width) of the tokens; not for feature maps.
        implementation: `"torch"` is this definition; `"triton"` its kernel, on a GPU, for features
            in float32 or half precision; `"auto"` the kernel on NVIDIA's GPUs.

    Returns:
        parts, in the dtype of the features (or autocast's), the mass (sum of the map over the
        cells of the features) and the visibility, both in float32 (float64 for float64). A part
        is absent when its mass is at most 1e-6, its visibility below `min_visibility`, or its
        area empty (`"mean"` and `"max"`): then its vector and all its gradients are 0.

    Raises:
        ValueError: wrong shapes or devices, an empty batch, no part, an unknown mode, or maps,
            visibility or features that are not finite, or whose sums pass float32 (checked in
            eager mode on a CPU, features as far as they reach a part). A part that only half
            precision cannot hold, as a sum without `normalize` may be, is infinite instead.
        TypeError: features or maps are not floating point.
        NotImplementedError: `implementation="triton"` where the kernel cannot run.

    Source: FSENet, eq. 6 and section 4.7.4 (sum, mean and max "under the masked area").
    """
    check_implementation(implementation, "part_mask_pool")
    _check_mode(mode)
    features = _as_map(features, grid)
    _check_inputs(features, maps, visibility)
    wide = accumulation_dtype(features.dtype)

    # A part that has a mass has a peak: only one from elsewhere, or a limit, can hide it.
    may_hide = visibility is not None or min_visibility > 0
    visibility = (maps.amax((2, 3)) if visibility is None else visibility).to(wide)
    maps = maps.to(wide)
    if maps.shape[2:] != features.shape[2:]:
        maps = resize_maps(maps, (features.shape[2], features.shape[3]))
    if runs_kernel(implementation, "part_mask_pool", features=features, maps=maps):
        from partlocal.kernels.part_mask_pool import pool  # noqa: PLC0415

        seen = visibility.detach()
        pooled = pool(features, maps, seen, mode, normalize, min_visibility, area_threshold)
        return PartFeatures(pooled[0].to(result_dtype(features)), pooled[1], visibility)
    mass = maps.sum((2, 3))
    present = _present(mass, visibility if may_hide else None, min_visibility)
    divisor, weights = mass if normalize else None, maps
    if mode != "sum":
        area = maps >= area_threshold
        weights = area.to(wide)
        count = weights.sum((2, 3))
        if not finite_above(count, 0.0):
            present = count > 0 if present is None else present & (count > 0)
        if mode == "mean":
            divisor = count if divisor is None else divisor * count
    if divisor is not None:
        # That of an absent part must be harmless, or its gradient would be 0 * inf.
        divisor = _if_present(present, divisor, 1.0)
    if mode == "max":
        found = _if_present(present, masked_max(features, area).to(wide), 0.0)
        parts = found if divisor is None else found / divisor[..., None]
    else:
        parts = _if_present(present, _divided_sum(features, weights, divisor), 0.0)
    refuse_non_finite(parts, "features", "the pooled parts")
    return PartFeatures(parts.to(result_dtype(features)), mass, visibility)


class PartMaskPool(nn.Module):
    """`part_mask_pool` as a layer: features and maps in, part vectors out.

    >>> PartMaskPool(mode="max")(torch.ones(1, 64, 28, 28), torch.ones(1, 6, 28, 28)).parts.shape
    torch.Size([1, 6, 64])

    Args: those of `part_mask_pool`, in the same order, without the tensors and their grid.
    """

    def __init__(
        self,
        mode: Mode = "sum",
        normalize: bool = True,
        min_visibility: float = 0.0,
        area_threshold: float = 0.5,
        implementation: Implementation = "auto",
    ) -> None:
        super().__init__()
        check_implementation(implementation, "part_mask_pool")
        _check_mode(mode)
        self.mode = mode
        self.normalize = normalize
        self.min_visibility = min_visibility
        self.area_threshold = area_threshold
        self.implementation = implementation

    def forward(
        self,
        features: Float[Tensor, "b c h w"] | Float[Tensor, "b hw c"],
        maps: Float[Tensor, "b k mh mw"],
        visibility: Float[Tensor, "b k"] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> PartFeatures:
        """Return the vector, mass and visibility of each part."""
        return part_mask_pool(
            features,
            maps,
            mode=self.mode,
            normalize=self.normalize,
            visibility=visibility,
            min_visibility=self.min_visibility,
            area_threshold=self.area_threshold,
            grid=grid,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        """Show the arguments that rebuild this layer."""
        return (
            f"mode={self.mode!r}, normalize={self.normalize}, "
            f"min_visibility={self.min_visibility}, area_threshold={self.area_threshold}, "
            f"implementation={self.implementation!r}"
        )


def _present(mass: Tensor, visibility: Tensor | None, min_visibility: float) -> Tensor | None:
    """Return which parts have a mass and are visible; None where a look shows that all do."""
    seen = visibility is None or finite_above(visibility, min_visibility)
    if seen and finite_above(mass, EPS):
        return None
    refuse_non_finite(mass, "maps", "their mass")
    # Not `>`, which is False for NaN: where nobody looks, NaN must show up and not be an absence.
    absent = mass <= EPS
    if visibility is not None:
        refuse_non_finite(visibility, "visibility", "its values")
        absent = absent | (visibility < min_visibility)
    return ~absent


def _if_present(present: Tensor | None, values: Tensor, otherwise: float) -> Tensor:
    """Return the values of the parts that are present, all if `present` is None."""
    if present is None:
        return values
    return torch.where(present if values.ndim == 2 else present[..., None], values, otherwise)


def _divided_sum(features: Tensor, weights: Tensor, divisor: Tensor | None) -> Tensor:
    """Return the weighted sum over `divisor`, which goes into the smaller of weights and result."""
    if divisor is None:
        return _weighted_sum(features, weights)
    if features.shape[2] * features.shape[3] < features.shape[1]:
        return _weighted_sum(features, weights / divisor[..., None, None])
    return _weighted_sum(features, weights) / divisor[..., None]


def _weighted_sum(features: Tensor, weights: Tensor) -> Tensor:
    """Return `sum_p weights[b, k, p] features[b, c, p]`, summed in the dtype of `weights`."""
    features = features.to(weights.dtype)
    height, width, stride = features.shape[2], features.shape[3], features.stride()
    if height == 1 or width == 1 or stride[2] == width * stride[3]:
        return wide_matmul(weights.flatten(2), features.flatten(2).mT)
    # The rows of a crop are not evenly spaced, and flattening would copy it: one row at a time.
    rows = zip(weights.unbind(2), features.unbind(2), strict=True)
    total = weights.new_zeros(())
    for weight, row in rows:
        total = total + wide_matmul(weight, row.mT)
    return total


def _as_map(features: Tensor, grid: tuple[int, int] | None) -> Tensor:
    check_tensor("features", features)
    if not features.is_floating_point():
        raise TypeError(
            f"features must be floating point; got {features.dtype}: pass features.float()"
        )
    if features.ndim == 4:
        if grid is not None:
            raise ValueError(
                "grid is for tokens [b, hw, c]; got features [b, c, h, w], which have their own: "
                "leave it out"
            )
        return features
    if features.ndim != 3:
        raise ValueError(
            f"features must be [b, c, h, w], or tokens [b, hw, c] with grid=(h, w); "
            f"got {list(features.shape)}"
        )
    tokens = features.shape[1]
    if grid is None:
        raise ValueError(
            f"tokens [b, hw, c] = {list(features.shape)} need grid=(h, w) with h * w = {tokens}"
        )
    grid = check_size(grid, "grid")
    if grid[0] * grid[1] != tokens:
        raise ValueError(
            f"grid must have h * w = {tokens} cells (as the tokens); got {grid}: "
            "drop prefix tokens first"
        )
    return features.unflatten(1, grid).permute(0, 3, 1, 2)


def _check_mode(mode: str) -> None:
    if mode not in ("sum", "mean", "max"):
        raise ValueError(f"mode must be 'sum', 'mean' or 'max'; got {mode!r}")


def _check_inputs(features: Tensor, maps: Tensor, visibility: Tensor | None) -> None:
    batch = features.shape[0]
    if batch == 0:
        raise ValueError("features must hold at least one image; got an empty batch")
    if 0 in features.shape[1:]:
        raise ValueError(f"features must hold no empty axis; got {list(features.shape)}")
    check_tensor("maps", maps)
    if not maps.is_floating_point():
        raise TypeError(f"maps must be floating point; got {maps.dtype}: pass maps.float()")
    if maps.ndim != 4 or maps.shape[0] != batch or 0 in maps.shape[2:]:
        raise ValueError(
            f"maps must be [b, k, h, w] with b = {batch} (as features); got {list(maps.shape)}"
        )
    if maps.shape[1] == 0:
        raise ValueError(f"maps must hold at least one part; got {list(maps.shape)}")
    if visibility is not None and visibility.shape != maps.shape[:2]:
        raise ValueError(
            f"visibility must be [b, k] = {list(maps.shape[:2])} (as maps); "
            f"got {list(visibility.shape)}"
        )
    for name, tensor in (("maps", maps), ("visibility", visibility)):
        if tensor is not None and tensor.device != features.device:
            raise ValueError(
                f"{name} must be on {features.device} (as features); got {tensor.device}: "
                f"pass {name}.to({str(features.device)!r})"
            )
