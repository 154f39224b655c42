"""AdaFace through PartLocalNet: the norm that tells a picture's quality reaches the margin."""

import numpy as np
import pytest
import torch
from data.procedural import render_many
from torch.nn import functional as F

from partlocal import AdaFace, ArcFaceHead, PartLocalNet

LABELS = torch.arange(4)
SCALE = 8.0


@pytest.fixture(scope="module")
def described():
    """The same four faces sharp and blurred, described by one network."""
    torch.manual_seed(0)
    net = PartLocalNet("resnet10t", None, ("nose", "hair")).eval()
    drawn = render_many(0, identities=range(4), samples=[0] * 4).image
    sharp = torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 255
    blurred = F.avg_pool2d(F.pad(sharp, (4,) * 4, mode="replicate"), 9, 1)
    maps = torch.rand(4, 2, 28, 28)
    with torch.no_grad():
        return net.forward_parts(sharp, maps), net.forward_parts(blurred, maps)


@pytest.fixture(scope="module")
def head(described):
    """A head whose margin has seen the norms of these pictures."""
    margin = AdaFace(m=0.4, h=0.333, momentum=1.0)
    margin(torch.zeros(8), torch.cat([one.norm for one in described]))
    return ArcFaceHead(described[0].global_vector.shape[1], 4, SCALE, margin).eval()


def target_logit(head, found, norm):
    """What the margin made of each target's cosine, out of the loss: N - log(exp(loss) - 1)."""
    with torch.no_grad():
        loss = head(found.global_vector, LABELS, norm, reduction="none").double()
        logits = head.logits(found.global_vector).double()
    others = logits.masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf).logsumexp(1)
    return ((others - loss.expm1().log()) / SCALE).numpy(), logits.diag().numpy() / SCALE


def test_sharp_and_blurred_get_different_margins(described, head):
    """By hand: z is the norm's, and phi = cos(theta - m z) - m (1 + z)."""
    norms = np.concatenate([found.norm.numpy() for found in described])
    z = []
    for found in described:
        z.append(0.333 * (found.norm.numpy() - norms.mean()) / (norms.std(ddof=1) + 1e-3))
        phi, cosine = target_logit(head, found, found.norm)
        expected = np.cos(np.arccos(cosine) - 0.4 * z[-1]) - 0.4 * (1 + z[-1])
        np.testing.assert_allclose(phi, expected, atol=1e-4)
    # blurring lowers the norm, and with it the margin
    assert (z[0] > z[1] + 0.02).all()
    cosine = torch.full((4,), 0.3)
    assert (head.margin(cosine, described[0].norm) < head.margin(cosine, described[1].norm)).all()


def test_without_the_norm_all_are_alike(described, head):
    """The descriptor's halves are unit vectors: their own length says nothing of quality."""
    for found in described:
        alone, _ = target_logit(head, found, None)
        given, _ = target_logit(head, found, found.norm)
        assert np.abs(alone - given).max() > 0.01
        assert torch.allclose(found.global_vector.norm(dim=1), torch.ones(4), atol=1e-5)
        assert (found.norm - 1).abs().min() > 0.05
