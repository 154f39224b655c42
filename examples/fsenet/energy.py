"""Which of features, distances and cosines makes up the local vector, and what that costs."""

import torch
from describe import view
from fit import Workplace
from torch import Tensor
from torch.nn import functional as F

from partlocal import PartLocalNet


@torch.inference_mode()
def energy_shares(
    net: PartLocalNet, images: Tensor, strangers: Tensor, place: Workplace
) -> dict[str, dict[str, float]]:
    """Return shares of the local vector's squared length, and the cosines between strangers.

    Args:
        net: whose local branch is looked at.
        images: a few hundred pictures, uint8 `n 3 h w`.
        strangers: for each the index of a picture of somebody else.
        place: device and precision.

    Returns:
        for the vector as the paper has it (`"plain"`), and with every number standardised over
        these pictures as `norm="batch"` does (`"batch norm"`; an untrained branch has no running
        statistics): shares that sum to 1, mean and spread of impostor cosines.
    """
    net.eval()
    raw, k = [], len(net.parts)
    for chunk in range(0, len(images), 100):
        rows = slice(chunk, chunk + 100)
        with place.autocast():
            described = net.forward_parts(view(images, rows, False, place))
            raw.append(net.branch.correlation(described.parts, described.visibility).float())
    plain = torch.cat(raw)
    standardized = (plain - plain.mean(0)) / plain.std(0).clamp(min=1e-5)
    variants = {"plain": plain, "batch norm": standardized}
    return {name: _shares(vector, strangers, k) for name, vector in variants.items()}


def _shares(vector: Tensor, strangers: Tensor, k: int) -> dict[str, float]:
    squared = vector.square().mean(0)
    width = vector.shape[-1] - 2 * (k - 1)
    features, relations = squared[:, :width], squared[:, width:]
    parts = {
        "features": features.sum(),
        "distances": relations[:, 0::2].sum(),
        "cosines": relations[:, 1::2].sum(),
    }
    total = sum(parts.values())
    unit = F.normalize(vector.flatten(1), dim=1)
    cosines = (unit * unit[strangers.to(unit.device)]).sum(1)
    return {name: (value / total).item() for name, value in parts.items()} | {
        "impostor_cosine_mean": cosines.mean().item(),
        "impostor_cosine_std": cosines.std().item(),
    }
