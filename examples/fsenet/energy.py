"""Which of features, distances and cosines makes up the local vector, and what that costs."""

import torch
from describe import view
from torch import Tensor
from torch.nn import functional as F
from workplace import Workplace

from partlocal import PartLocalNet


@torch.inference_mode()
def energy_shares(
    net: PartLocalNet, images: Tensor, strangers: Tensor, place: Workplace
) -> dict[str, float]:
    """Return shares of the local vector's squared length, and the cosines between strangers.

    Args:
        net: whose local branch is looked at.
        images: a few hundred pictures, uint8 `n 3 h w`.
        strangers: for each the index of a picture of somebody else.
        place: device and precision.

    Returns:
        for the vector as the paper has it: shares that sum to 1, mean and spread of impostor
        cosines. And the cosines again with every number standardised over these pictures, as
        `norm="batch"` does (an untrained branch has no running statistics).
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

    squared = plain.square().mean(0)
    width = plain.shape[-1] - 2 * (k - 1)
    features, relations = squared[:, :width], squared[:, width:]
    energy = {
        "features": features.sum(),
        "distances": relations[:, 0::2].sum(),
        "cosines": relations[:, 1::2].sum(),
    }
    return {
        **{name: (value / squared.sum()).item() for name, value in energy.items()},
        **_cosines(plain, strangers, "impostor_cosine"),
        **_cosines(standardized, strangers, "standardized_impostor_cosine"),
    }


def _cosines(vectors: Tensor, strangers: Tensor, name: str) -> dict[str, float]:
    unit = F.normalize(vectors.flatten(1), dim=1)
    cosines = (unit * unit[strangers.to(unit.device)]).sum(1)
    return {f"{name}_mean": cosines.mean().item(), f"{name}_std": cosines.std().item()}
