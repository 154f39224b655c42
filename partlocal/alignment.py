"""Bring faces to one pose: a similarity transform from five points, and the warp.

Pixel convention: by default coordinates count from the corner of the picture, so that the centre
of its first pixel is (0.5, 0.5), for the points of the faces and of the template alike.
"""

from typing import Literal

import torch
from jaxtyping import Float, Real, Shaped
from torch import Tensor

ARCFACE_TEMPLATE = (
    *((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366)),
    *((41.5493, 92.3655), (70.7299, 92.2041)),
)
"""Where five points (x, y) come to lie in a 112x112 picture: the eyes, the nose, the corners of
the mouth; left in the picture first."""


def similarity_from_points(
    source: Float[Tensor, "b p 2"], target: Float[Tensor, "p 2"] | Float[Tensor, "b p 2"]
) -> Float[Tensor, "b 2 3"]:
    """Find the rotation, scale and shift that bring points nearest to others (least squares).

    >>> source = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]])
    >>> target = torch.tensor([[5.0, 5.0], [5.0, 6.0], [4.0, 5.0]])  # a quarter turn, half as big
    >>> similarity_from_points(source, target)
    tensor([[[ 0.0000, -0.5000,  5.0000],
             [ 0.5000,  0.0000,  5.0000]]])

    Never a reflection: the best similarity without one is linear in its four numbers, so that no
    singular value decomposition is needed and gradients are finite everywhere.

    Args:
        source: points (x, y) of b pictures.
        target: where they should come to lie, for all pictures alike or for each.

    Returns:
        matrices that take (x, y, 1) of the source to (x, y) of the target.

    Raises:
        ValueError: shapes disagree, points are not finite, there are fewer than two, or all
            points of one picture are one point.
        TypeError: the source is not floating point.

    Source: Umeyama, "Least-squares estimation of transformation parameters between two point
        patterns", TPAMI 13 (1991), in the plane.
    """
    if source.ndim != 3 or source.shape[-1] != 2 or source.shape[1] < 2:
        raise ValueError(
            f"source must be [b, p, 2] with at least 2 points; got {list(source.shape)}"
        )
    if target.shape not in (source.shape, source.shape[1:]):
        raise ValueError(
            f"target must be {list(source.shape[1:])} or {list(source.shape)} (as source); "
            f"got {list(target.shape)}"
        )
    if not source.is_floating_point():
        raise TypeError(f"source must be floating point; got {source.dtype}: pass source.float()")
    target = target.to(source).expand_as(source)
    _refuse_degenerate(source, "source")
    _refuse_degenerate(target, "target")

    from_centre, to_centre = source.mean(1), target.mean(1)
    x, y = (source - from_centre[:, None]).unbind(-1)
    u, v = (target - to_centre[:, None]).unbind(-1)
    spread = (x * x + y * y).sum(1)
    cosine = (x * u + y * v).sum(1) / spread  # both times the scale
    sine = (x * v - y * u).sum(1) / spread
    centre_x, centre_y = from_centre.unbind(-1)
    shift_x = to_centre[:, 0] - cosine * centre_x + sine * centre_y
    shift_y = to_centre[:, 1] - sine * centre_x - cosine * centre_y
    return torch.stack([cosine, -sine, shift_x, sine, cosine, shift_y], 1).unflatten(1, (2, 3))


def align_faces(
    images: Real[Tensor, "b c h w"],
    points: Float[Tensor, "b 5 2"],
    size: int = 112,
    template: Shaped[Tensor, "5 2"] | tuple[tuple[float, float], ...] = ARCFACE_TEMPLATE,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    pixel_centers: Literal["half", "integer"] = "half",
) -> Real[Tensor, "b c {size} {size}"]:
    """Warp faces so that their five points lie on the template, as recognition networks expect.

    >>> images = torch.rand(1, 3, 250, 250)
    >>> points = torch.tensor(ARCFACE_TEMPLATE)[None] * 2 + 10  # twice as big, elsewhere
    >>> align_faces(images, points).shape
    torch.Size([1, 3, 112, 112])

    Runs batched on the device of the images; differentiable in images and points. What lies
    outside the picture is 0.

    Args:
        images: floats of any range, or uint8, which stays uint8.
        points: pixel coordinates (x, y) in the template's order.
        size: height and width of the result; the template is scaled with it.
        template: five points in a 112x112 picture.
        interpolation: `"bicubic"` is sharper; its overshoot is cut to the range of each picture.
        pixel_centers: where the first pixel's centre is, `"half"` (0.5, 0.5) or `"integer"`
            (0, 0). OpenCV's warp, and with it insightface, means the latter; it moves a face by
            half a pixel times (1 - scale).

    Raises:
        ImportError: kornia is not installed.
        ValueError: shapes disagree, the batch is empty, or points are not finite or all in one
            place.
        TypeError: images are neither floats nor uint8.
    """
    if images.ndim != 4:
        raise ValueError(f"images must be [b, c, h, w]; got {list(images.shape)}")
    if not len(images):
        raise ValueError("images must hold at least one picture; got an empty batch")
    if points.shape != (len(images), 5, 2):
        raise ValueError(
            f"points must be [b, 5, 2] with b = {len(images)} (as images); got {list(points.shape)}"
        )
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"images must be floats or uint8; got {images.dtype}")
    if interpolation not in ("bilinear", "bicubic"):
        raise ValueError(f"interpolation must be 'bilinear' or 'bicubic'; got {interpolation!r}")
    if pixel_centers not in ("half", "integer"):
        raise ValueError(f"pixel_centers must be 'half' or 'integer'; got {pixel_centers!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")
    try:
        from kornia.geometry.transform import warp_affine  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "align_faces needs kornia: pip install kornia, or warp with the matrices of "
            "similarity_from_points"
        ) from error

    # Coordinates in half precision are off by up to a quarter of a pixel at 250.
    dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
    pixels, points = images.to(dtype), points.to(images.device, dtype)
    offset = 0.5 if pixel_centers == "half" else 0.0
    goal = torch.as_tensor(template, dtype=dtype, device=images.device) * (size / 112)
    matrices = similarity_from_points(points - offset, goal - offset)
    aligned = warp_affine(
        pixels, matrices, (size, size), interpolation, padding_mode="zeros", align_corners=True
    )
    if interpolation == "bicubic":
        low, high = pixels.flatten(1).aminmax(dim=1)  # with 0, the colour of the outside
        low, high = low.clamp(max=0).view(-1, 1, 1, 1), high.clamp(min=0).view(-1, 1, 1, 1)
        aligned = aligned.maximum(low).minimum(high)
    if images.dtype == torch.uint8:
        return aligned.round().to(torch.uint8)
    return aligned.to(images.dtype)


def _refuse_degenerate(points: Tensor, name: str) -> None:
    points = points.detach()
    finite = points.isfinite().flatten(1).all(1)
    if not finite.all():
        raise ValueError(
            f"{name} points must be finite; those of picture {int(finite.int().argmin())} are not: "
            "leave out pictures in which no face was found"
        )
    # Points apart by no more than rounding are one point; NaN and inf are gone by now.
    size = points.abs().amax((1, 2))
    spread = (points - points.mean(1, keepdim=True)).abs().amax((1, 2))
    apart = spread > 8 * torch.finfo(points.dtype).eps * size
    if not apart.all():
        raise ValueError(
            f"{name} points of picture {int(apart.int().argmin())} are all one point, which fixes "
            "no rotation or scale: leave out pictures in which no face was found"
        )
