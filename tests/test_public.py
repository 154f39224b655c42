"""The promises of the package as a whole: names, imports, direction of dependencies."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import partlocal

PACKAGE = Path(partlocal.__file__).parent
HEAVY = ("triton", "kornia", "timm", "huggingface_hub", "torchvision", "torch.distributed.tensor")
# What a file may import of ours: everything else is a dependency in the wrong direction.
ALLOWED = {
    "labels": set(),
    "margins": {"numerics"},
    "numerics": set(),
    "pixels": {"numerics"},
    "resize": {"numerics"},
    "hub": set(),
    "hourglass": set(),
    "part_maps": {"kernels", "labels", "numerics", "resize"},
    "pooling": {"kernels", "masked_max", "numerics", "resize"},
    "correlation": {"kernels", "numerics"},
    "logsumexp": {"kernels", "numerics"},
    "softmax": {"kernels", "logsumexp", "margins", "numerics"},
    "shard": set(),
    "class_rows": {"shard"},
    "class_parallel": {"logsumexp", "shard"},
    "head": {
        *("class_parallel", "class_rows", "hub", "kernels", "logsumexp", "margins", "numerics"),
        "optim",
        "shard",
        "softmax",
    },
    "head_files": set(),
    "optim": {"numerics", "shard"},
    "segmenters": {"hourglass", "labels", "pixels", "resize"},
    "landmarks": set(),
    "parsing": {"hourglass", "hub", "labels", "pixels", "resize", "segmenters"},
    "backbone": {"pixels", "timm_models"},
    "timm_models": {"pixels"},
    "alignment": set(),
    "masked_max": {"numerics"},
    "masked_norm": {"numerics"},
    "branch": {"correlation", "masked_norm", "numerics", "pooling"},
    "local": {
        *("backbone", "branch", "correlation", "hub", "kernels", "labels", "numerics", "parsing"),
        "part_maps",
        "pooling",
        "resize",
        "segmenters",
    },
    "evaluation": {"evaluation"},
    "kernels": {"kernels", "numerics", "resize"},
}


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_public_names():
    """A name that disappears or appears is a decision, not an accident."""
    assert sorted(partlocal.__all__) == sorted(
        [
            "AdaFace",
            "ArcFace",
            "ArcFaceHead",
            "CELEBAMASK_HQ",
            "CombinedMargin",
            "CosFace",
            "HELEN",
            "IBUGMASK",
            "LAPA",
            "LIP",
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
    )
    for name in partlocal.__all__:
        assert getattr(partlocal, name) is not None
    assert callable(partlocal.part_maps), "the function, not the file of the same name"
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        partlocal.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "statement",
    [
        "import partlocal",
        "from partlocal import PartMaskPool, StructureCorrelation, part_maps",
    ],
)
def test_import_loads_nothing_heavy_and_is_quick(statement):
    code = f"""
import json, sys, time
import torch
before = set(sys.modules)
began = time.process_time()
{statement}
seconds = time.process_time() - began
print(json.dumps([seconds, [m for m in {HEAVY!r} if m in sys.modules and m not in before]]))
"""
    measured = [json.loads(run(code)) for _ in range(3)]
    assert measured[0][1] == []
    assert min(seconds for seconds, _ in measured) < 0.15  # CPU seconds beyond torch


def test_heavy_modules_would_be_noticed():
    """The test above can fail: the mixin loads the hub."""
    assert run(
        "import sys, partlocal; partlocal.ParsingNet; print('huggingface_hub' in sys.modules)"
    ) == ("True\n")


def test_everything_but_alignment_works_without_kornia():
    code = """
import sys
sys.modules["kornia"] = None  # as if it were not installed
import torch, partlocal
from partlocal.labels import FSENET_PARTS
parser = partlocal.ParsingNet(partlocal.HELEN, width=8, num_stacks=1, grid=32)
net = partlocal.PartLocalNet("resnet10t", parser, FSENET_PARTS).eval()
print(net(torch.rand(1, 3, 112, 112)).shape[0])
from partlocal.alignment import align_faces
try:
    align_faces(torch.rand(1, 3, 250, 250), 100 * torch.rand(1, 5, 2))
except ImportError as error:
    print(error)
"""
    lines = run(code).splitlines()
    assert lines[0] == "1"
    assert "kornia" in lines[1]
    assert "pip install" in lines[1]


def imports(path: Path) -> set[str]:
    """The files of the package that `path` imports, wherever the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            root, *rest = name.split(".")
            assert root not in ("examples", "benchmarks"), f"{path} imports {name}"
            if root == "partlocal" and rest:
                found.add(rest[0])
    return found


def test_imports_point_one_way():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if name != "__init__":
            unexpected = imports(path) - ALLOWED[name]
            assert not unexpected, f"{path.name} imports {sorted(unexpected)}"


def test_only_kernels_import_triton():
    for path in PACKAGE.rglob("*.py"):
        if "kernels" not in path.parts:
            assert "import triton" not in path.read_text()
