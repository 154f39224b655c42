"""Heat maps, such as `ParsingNet` makes of landmarks, to points."""

import torch
from jaxtyping import Float
from torch import Tensor


def soft_argmax(
    heatmaps: Float[Tensor, "b n h w"], size: tuple[int, int] | None = None
) -> Float[Tensor, "b n 2"]:
    """Return each heat map's point (x, y): the mean position under a softmax over its cells.

    >>> heatmaps = torch.zeros(1, 1, 4, 4)
    >>> heatmaps[0, 0, 1, 2] = 100
    >>> soft_argmax(heatmaps), soft_argmax(heatmaps, size=(8, 8))
    (tensor([[[2., 1.]]]), tensor([[[4.5000, 2.5000]]]))

    Args:
        heatmaps: logits, one map a point.
        size: rows and columns of the picture in which the points are wanted, by default those of
            the maps; the centre of the first pixel is (0, 0).
    """
    rows, columns = heatmaps.shape[-2:]
    height, width = size or (rows, columns)
    probability = heatmaps.float().flatten(2).softmax(-1).unflatten(2, (rows, columns))
    y = (torch.arange(rows, device=heatmaps.device) + 0.5) * (height / rows) - 0.5
    x = (torch.arange(columns, device=heatmaps.device) + 0.5) * (width / columns) - 0.5
    return torch.stack([probability.sum(-2) @ x, probability.sum(-1) @ y], dim=-1)
