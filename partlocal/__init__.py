"""Parsing-guided local features: pool the features of any backbone over semantic parts."""

from importlib import import_module
from typing import TYPE_CHECKING

from partlocal.correlation import StructureCorrelation, structure_correlation
from partlocal.labels import CELEBAMASK_HQ, HELEN, IBUGMASK, LAPA, LIP, LabelSet
from partlocal.margins import (
    AdaFace,
    ArcFace,
    CombinedMargin,
    CosFace,
    MagFace,
    NormFace,
    SphereFace,
)
from partlocal.part_maps import PartMaps, part_maps
from partlocal.pooling import PartMaskPool, part_mask_pool

if TYPE_CHECKING:
    from partlocal.branch import LocalBranch
    from partlocal.head import ArcFaceHead
    from partlocal.local import PartLocalNet
    from partlocal.logsumexp import negative_logsumexp
    from partlocal.parsing import ParsingNet
    from partlocal.segmenters import LogitsAdapter
    from partlocal.softmax import margin_softmax

__version__ = "0.1.0"

# These files import the Hugging Face hub or timm, which cost more than everything above together.
_LAZY = {
    "ArcFaceHead": "head",
    "margin_softmax": "softmax",
    "negative_logsumexp": "logsumexp",
    "LocalBranch": "branch",
    "PartLocalNet": "local",
    "LogitsAdapter": "segmenters",
    "ParsingNet": "parsing",
}

__all__ = [
    "CELEBAMASK_HQ",
    "HELEN",
    "IBUGMASK",
    "LAPA",
    "LIP",
    "AdaFace",
    "ArcFace",
    "ArcFaceHead",
    "CombinedMargin",
    "CosFace",
    "LabelSet",
    "LocalBranch",
    "LogitsAdapter",
    "MagFace",
    "NormFace",
    "ParsingNet",
    "PartLocalNet",
    "PartMaps",
    "PartMaskPool",
    "SphereFace",
    "StructureCorrelation",
    "margin_softmax",
    "negative_logsumexp",
    "part_maps",
    "part_mask_pool",
    "structure_correlation",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'partlocal' has no attribute {name!r}")
    value = getattr(import_module(f"partlocal.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
