"""Margins: what a softmax head does to the cosine between an embedding and its own class.

A margin is any callable `margin(cos_target, norm) -> phi`, one number a sample; the head puts
`scale * phi` where `scale * cos_target` stood. `norm` is the embedding's length before it was
made a unit vector (0 for a sample that is ignored). A margin may also have `penalty(norm)`,
which is added to the loss, and `past_pi(cos_target, norm)`, which tells whose angle passes pi.
Angles are in radians and computed in fp32 (fp64 for fp64).
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

Margin = Callable[[Tensor, Tensor], Tensor]
Gradient = Literal["exact", "detached"]


@dataclass(frozen=True)
class NormFace:
    """No margin: the softmax on scaled cosines.

    >>> NormFace()(torch.tensor([0.5]), torch.ones(1))
    tensor([0.5000])

    Source: https://arxiv.org/abs/1704.06369
    """

    def __call__(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return `cos_target`."""
        return _full(cos_target)


@dataclass(frozen=True)
class ArcFace:
    """Add an angle: `phi = cos(theta + m)`.

    >>> ArcFace(m=math.pi / 6)(torch.tensor([0.5]), torch.ones(1)).abs() < 1e-6
    tensor([True])

    Args:
        m: the angle, in radians.
        grad: `"exact"`, or `"detached"` for the gradient of `cos(theta)` (insightface's own since
            December 2022: the margin moves the value alone).
        beyond: where theta > pi - m, `cos(theta + m)` would grow again with theta. `"linear"`
            takes `cos(theta) - m sin(m)` there; `"none"` leaves it (insightface).

    Raises:
        ValueError: `m` is outside [0, pi), or an option is unknown.

    Source: https://arxiv.org/abs/1801.07698, equation 3
    """

    m: float = 0.5
    grad: Gradient = "exact"
    beyond: Literal["linear", "none"] = "linear"

    def __post_init__(self) -> None:
        _check_angle("m", self.m)
        _check_option("grad", self.grad, ("exact", "detached"))
        _check_option("beyond", self.beyond, ("linear", "none"))

    def __call__(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return `cos(theta + m)`."""
        cos = _full(cos_target)
        if self.beyond == "linear":
            phi = _add_angle(cos, torch.full_like(cos, self.m))
        else:
            phi = torch.cos(_angle(cos) + self.m)
        return _with_gradient(phi, cos, self.grad)

    def past_pi(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Bool[Tensor, " b"]:
        """Tell which angles are above pi - m."""
        return _angle(_full(cos_target)) > math.pi - self.m


@dataclass(frozen=True)
class CosFace:
    """Subtract from the cosine: `phi = cos(theta) - m`.

    >>> CosFace(m=0.25)(torch.tensor([0.5]), torch.ones(1))
    tensor([0.2500])

    Raises:
        ValueError: `m` is negative or not finite.

    Source: https://arxiv.org/abs/1801.09414, equation 4
    """

    m: float = 0.35

    def __post_init__(self) -> None:
        _check_at_least("m", self.m, 0.0)

    def __call__(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return `cos_target - m`."""
        return _full(cos_target) - self.m


@dataclass(frozen=True)
class SphereFace:
    """Multiply the angle: `phi = cos(m theta)`, continued so that it falls all the way to pi.

    >>> SphereFace(m=2.0)(torch.tensor([0.0]), torch.ones(1))
    tensor([-1.])

    Args:
        m: the factor, at least 1; whole numbers in the first paper, any in the second.
        annealing: the paper's lambda: `phi = (psi + lambda cos(theta)) / (1 + lambda)`. Training
            starts near 1000 and falls to 5: `head.margin = replace(head.margin, annealing=...)`.
        form: `"monotonic"`, the first paper's `psi = (-1)^k cos(m theta) - 2k` with
            `k = floor(m theta / pi)`; `"clamped"`, SphereFace-R's `psi = cos(min(m theta, pi))`,
            whose exact gradient is 0 beyond pi / m: the paper trains it with `grad="detached"`.
        grad: `"exact"`, or `"detached"` for the gradient of `cos(theta)`.

    Raises:
        ValueError: `m` is below 1, `annealing` is negative, or an option is unknown.

    Source: https://arxiv.org/abs/1704.08063, equation 7; https://arxiv.org/abs/2109.05565
    """

    m: float = 4.0
    annealing: float = 0.0
    form: Literal["monotonic", "clamped"] = "monotonic"
    grad: Gradient = "exact"

    def __post_init__(self) -> None:
        _check_at_least("m", self.m, 1.0)
        _check_at_least("annealing", self.annealing, 0.0)
        _check_option("form", self.form, ("monotonic", "clamped"))
        _check_option("grad", self.grad, ("exact", "detached"))

    def __call__(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return `psi(m theta)`, blended with `cos_target` by `annealing`."""
        cos = _full(cos_target)
        angle = _angle(cos) * self.m
        if self.form == "clamped":
            psi = angle.clamp(max=math.pi).cos()
        else:
            k = (angle.detach() / math.pi).floor()
            psi = (1 - 2 * (k % 2)) * angle.cos() - 2 * k
        phi = (psi + self.annealing * cos) / (1 + self.annealing)
        return _with_gradient(phi, cos, self.grad)

    def past_pi(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Bool[Tensor, " b"]:
        """Tell which angles are above pi / m."""
        return _angle(_full(cos_target)) * self.m > math.pi


@dataclass(frozen=True)
class CombinedMargin:
    """All three at once, as the formula stands: `phi = cos(m1 theta + m2) - m3`.

    >>> CombinedMargin(1.0, math.pi / 6, 0.2)(torch.tensor([0.5]), torch.ones(1))
    tensor([-0.2000])

    Nothing is changed where `m1 theta + m2` passes pi and the cosine grows again; `ArcFace`
    has `beyond` for that.

    Args:
        m1: the factor of the angle, at least 1 would be usual; any positive number works.
        m2: the angle added, in radians.
        m3: what is subtracted from the cosine.

    Raises:
        ValueError: `m1` is not positive, `m2` is outside [0, pi), or `m3` is negative.

    Source: https://arxiv.org/abs/1801.07698, equation 4
    """

    m1: float = 1.0
    m2: float = 0.3
    m3: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.m1 < math.inf:
            raise ValueError(f"m1 must be positive and finite; got {self.m1}: 1 is no change")
        _check_angle("m2", self.m2)
        _check_at_least("m3", self.m3, 0.0)

    def __call__(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return `cos(m1 theta + m2) - m3`."""
        return torch.cos(self.m1 * _angle(_full(cos_target)) + self.m2) - self.m3

    def past_pi(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Bool[Tensor, " b"]:
        """Tell which angles are above (pi - m2) / m1."""
        return self.m1 * _angle(_full(cos_target)) + self.m2 > math.pi


@dataclass(frozen=True)
class MagFace:
    """ArcFace whose angle grows with the embedding's norm, and a penalty that lengthens it.

    `m(a)` goes linearly from `l_m` at norm `l_a` to `u_m` at norm `u_a`; the penalty is
    `weight * (a / u_a^2 + 1 / a)`. Norms are clamped to [l_a, u_a] in both.

    >>> MagFace().penalty(torch.tensor([110.0])) * 110 / 35
    tensor([2.])

    Raises:
        ValueError: the norms are not `0 < l_a < u_a`, the angles are not
            `0 <= l_m <= u_m < pi`, or `weight` is negative.

    Source: https://arxiv.org/abs/2103.06627, equations 3 to 5
    """

    l_a: float = 10.0
    u_a: float = 110.0
    l_m: float = 0.45
    u_m: float = 0.8
    weight: float = 35.0

    def __post_init__(self) -> None:
        if not 0 < self.l_a < self.u_a < math.inf:
            raise ValueError(f"norms must be 0 < l_a < u_a; got l_a={self.l_a}, u_a={self.u_a}")
        _check_angle("l_m", self.l_m)
        _check_angle("u_m", self.u_m)
        if self.l_m > self.u_m:
            raise ValueError(f"l_m must be at most u_m; got l_m={self.l_m}, u_m={self.u_m}")
        _check_at_least("weight", self.weight, 0.0)

    def __call__(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return `cos(theta + m(norm))`; the gradient reaches the norm too."""
        cos = _full(cos_target)
        return _add_angle(cos, self._added(norm.to(cos.dtype)))

    def past_pi(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Bool[Tensor, " b"]:
        """Tell which angles are above pi - m(norm)."""
        cos = _full(cos_target)
        return _angle(cos) > math.pi - self._added(norm.to(cos.dtype))

    def _added(self, norm: Tensor) -> Tensor:
        slope = (self.u_m - self.l_m) / (self.u_a - self.l_a)
        return self.l_m + slope * (norm.clamp(self.l_a, self.u_a) - self.l_a)

    def penalty(self, norm: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Return what each sample adds to its loss."""
        length = _full(norm).clamp(self.l_a, self.u_a)
        return self.weight * (length / self.u_a**2 + 1 / length)


class AdaFace(nn.Module):
    """A margin that follows picture quality, read from the embedding's norm.

    With `z = clip(h (norm - mean) / std, -1, 1)`: `phi = cos(theta - m z) - m (1 + z)`. The mean
    and std of the norms are running ones, updated by every batch in training mode and saved
    with the head; no gradient passes through the norm. Norms of 0 are not counted.

    >>> margin = AdaFace(m=0.4).eval()
    >>> margin(torch.tensor([0.5]), torch.tensor([20.0]))  # a norm at the mean: z = 0
    tensor([0.1000])

    Args:
        m: the margin: an angle in radians, and a cosine.
        h: the z-score of the norm is multiplied by this before it is clipped.
        momentum: the share of a batch in the running mean and std.

    Raises:
        ValueError: `m` is outside [0, pi), `h` is negative, or `momentum` is outside (0, 1].

    Source: https://arxiv.org/abs/2204.00964, equations 12 to 17
    """

    mean: Tensor
    std: Tensor

    def __init__(self, m: float = 0.4, h: float = 0.333, momentum: float = 0.01) -> None:
        super().__init__()
        _check_angle("m", m)
        _check_at_least("h", h, 0.0)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be in (0, 1]; got {momentum}")
        self.m, self.h, self.momentum = m, h, momentum
        # The authors' starting point: a wide std keeps z near 0 until norms have been seen.
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        """Return phi; in training mode the statistics are updated first."""
        cos, length = _full(cos_target), _full(norm.detach())
        if self.training:
            # An embedding that is not finite has no part in the statistics, like one of norm 0.
            self._update(length.clamp(1e-3, 100.0), (length > 0) & length.isfinite())
        z = self._quality(length).to(cos.dtype)
        angle = (_angle(cos) - self.m * z).clamp(1e-3, math.pi - 1e-3)
        return angle.cos() - self.m * (1 + z)

    def past_pi(
        self, cos_target: Float[Tensor, " b"], norm: Float[Tensor, " b"]
    ) -> Bool[Tensor, " b"]:
        """Tell which angles are above pi + m z."""
        cos = _full(cos_target)
        return _angle(cos) - self.m * self._quality(_full(norm)).to(cos.dtype) > math.pi

    def _quality(self, length: Tensor) -> Tensor:
        length = length.clamp(1e-3, 100.0)
        return ((length - self.mean) / (self.std + 1e-3) * self.h).clamp(-1, 1)

    @torch.no_grad()
    def _update(self, length: Tensor, known: Tensor) -> None:
        # Sums under a mask and not a selection: no shape depends on the data, so it compiles.
        count = known.sum()
        mean = length.where(known, 0).sum() / count.clamp(min=1)
        squares = (length - mean).square().where(known, 0).sum()
        std = (squares / (count - 1).clamp(min=1)).sqrt()
        for running, batch in ((self.mean, mean), (self.std, std)):
            running.lerp_(batch.to(running.dtype).where(count > 1, running), self.momentum)

    def extra_repr(self) -> str:
        """Show the arguments."""
        return f"m={self.m}, h={self.h}, momentum={self.momentum}"


_MARGINS: dict[str, type] = {
    cls.__name__: cls
    for cls in (AdaFace, ArcFace, CombinedMargin, CosFace, MagFace, NormFace, SphereFace)
}


def margin_config(margin: Margin) -> dict[str, Any]:
    """Describe one of this file's margins so that JSON can hold it.

    >>> margin_config(CosFace(m=0.25))
    {'name': 'CosFace', 'm': 0.25}

    Raises:
        TypeError: `margin` is of another class.
    """
    name = type(margin).__name__
    if _MARGINS.get(name) is not type(margin):
        raise TypeError(
            f"margin must be one of {', '.join(_MARGINS)} to be saved; got {name}: save the "
            "head's state_dict() and build the head in code"
        )
    return {"name": name} | {key: getattr(margin, key) for key in _arguments(type(margin))}


def margin_from_config(config: dict[str, Any]) -> Margin:
    """Build the margin that `margin_config` described.

    >>> margin_from_config({"name": "CosFace", "m": 0.25})
    CosFace(m=0.25)

    Raises:
        ValueError: the name is unknown, or the arguments are not those of its class.
    """
    arguments = dict(config)
    name = arguments.pop("name", None)
    if name not in _MARGINS:
        raise ValueError(f"margin name must be one of {', '.join(_MARGINS)}; got {name!r}")
    unknown = sorted(arguments.keys() - set(_arguments(_MARGINS[name])))
    if unknown:
        raise ValueError(f"{name} takes {_arguments(_MARGINS[name])}; got also {unknown}")
    return _MARGINS[name](**arguments)


def _arguments(cls: type) -> list[str]:
    return list(inspect.signature(cls).parameters)


def _full(values: Tensor) -> Tensor:
    """At bf16 precision cos 0.999 becomes cos(theta + 0.5) = 0.879, where 0.855 is true."""
    return values if values.dtype == torch.float64 else values.float()


def _angle(cos: Tensor) -> Tensor:
    """The angle, with gradient 0 at |cos| >= 1, where acos has an infinite one.

    The embedding's own gradient vanishes there too: the class lies along it. The inner `where`
    is needed because an infinite gradient times the outer one's 0 would be NaN.
    """
    inside = ~(cos.abs() >= 1)  # a NaN counts as inside, and stays one
    ends = (cos < 0).to(cos.dtype) * math.pi
    return torch.where(inside, torch.acos(torch.where(inside, cos, 0)), ends)


def _add_angle(cos: Tensor, m: Tensor) -> Tensor:
    """cos(theta + m), and cos(theta) - m sin(m) where theta + m has passed pi."""
    angle = _angle(cos)
    return torch.where(angle <= math.pi - m, torch.cos(angle + m), cos - m * torch.sin(m))


def _with_gradient(phi: Tensor, cos: Tensor, grad: Gradient) -> Tensor:
    return phi if grad == "exact" else cos + (phi - cos).detach()


def _check_angle(name: str, value: float) -> None:
    if not 0 <= value < math.pi:
        raise ValueError(
            f"{name} must be an angle in [0, pi) radians; got {value}: "
            "degrees become radians with math.radians"
        )


def _check_at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least {least:g}; got {value}")


def _check_option(name: str, value: str, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}; got {value!r}")
