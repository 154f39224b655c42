"""Arguments of the wrong kind: what a caller is told, whichever layer meets them."""

import jaxtyping
import numpy as np
import pytest
import torch

from partlocal import (
    HELEN,
    ArcFaceHead,
    LogitsAdapter,
    PartLocalNet,
    part_maps,
    part_mask_pool,
    structure_correlation,
)
from partlocal.local import LocalOptions

NUMBERS, TENSOR = np.ones((1, 3, 4, 4), np.float32), torch.ones(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: part_maps([[1.0]], (0,), 4), "logits must be a torch.Tensor; got a list"),
        (lambda: part_mask_pool(NUMBERS, TENSOR), "features must be a torch.Tensor; got a ndarray"),
        (lambda: part_mask_pool(TENSOR, NUMBERS), "maps must be a torch.Tensor; got a ndarray"),
        (lambda: structure_correlation(NUMBERS), "parts must be a torch.Tensor; got a ndarray"),
        (lambda: ArcFaceHead(4, 5)(NUMBERS, None), "embeddings must be a torch.Tensor; got a nda"),
        (lambda: ArcFaceHead(4, 5)(torch.ones(1, 4), [0]), "labels must be a torch.Tensor; got a"),
        (lambda: ArcFaceHead(4, 5, margin=0.5), r"such as ArcFace\(0.5\); got 0.5"),
        (lambda: ArcFaceHead(4, 5.0), "num_classes must be a whole number; got 5.0"),
        (
            lambda: PartLocalNet("resnet10t", None, ("a",), options={"pool": "max"}),
            "options must be LocalOptions; got a dict",
        ),
    ],
)
def test_wrong_kinds_of_argument(call, message, monkeypatch):
    """Arrays, lists and numbers where something else is needed are named as the caller did."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    "name", ["activation", "map_norm", "norm_over", "downsample", "pool", "branch_norm"]
)
def test_unknown_local_options(name, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=f"^{name} must be one of .*; got 'avg'$"):
        LocalOptions(**{name: "avg"})


def test_parts_of_another_label_set():
    with pytest.raises(ValueError, match="parts are of Helen, which has 11 labels, and the logits"):
        part_maps(torch.zeros(1, 19, 8, 8), HELEN.select("nose"), 4)


def test_constants_of_other_pixels():
    """Of pixels up to 255, where the adapter has them in [0, 1]."""
    with pytest.raises(
        ValueError, match=r"must be of pixels in \[0, 1\]; got \(123\.0, 116\.0, 103\.0\)"
    ):
        LogitsAdapter(torch.nn.Identity(), HELEN, (123.0, 116.0, 103.0), (58.0, 57.0, 57.0), 64)
