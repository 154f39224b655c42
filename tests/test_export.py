"""Exported programs: any batch, plain operations alone, and the same numbers elsewhere."""

import io
import subprocess
import sys
from functools import cache
from typing import NamedTuple

import jaxtyping
import onnxruntime
import pytest
import torch
from torch import nn

from partlocal import HELEN, ArcFaceHead, ParsingNet, PartLocalNet
from partlocal.correlation import StructureCorrelation
from partlocal.labels import FSENET_PARTS
from partlocal.local import LocalOptions, PartDescriptor
from partlocal.parsing import PRETRAINED
from partlocal.part_maps import PartMaps
from partlocal.pooling import PartMaskPool

BATCHES = (1, 3, 5)  # exported at 2
SAME = {"rtol": 1e-6, "atol": 1e-6}
CLOSE = {"rtol": 1e-5, "atol": 5e-6}
# onnxruntime places the pixels of an antialiased resize in fp32: from 112 to 128 it is off by
# 1e-5, which the parser and its softmax pass on to the maps. The descriptor is close again.
AFTER_RESIZE = {"rtol": 1e-5, "atol": 1e-4}


class Layers(nn.Module):
    """The layers of the library from logits and features, each of their modes."""

    def __init__(self, implementation):
        super().__init__()
        parts = HELEN.select(*FSENET_PARTS)
        self.maps = nn.ModuleList(
            PartMaps(parts, 28, downsample=how, implementation=implementation)
            for how in ("max", "area")
        )
        self.pools = nn.ModuleList(
            PartMaskPool(mode, min_visibility=0.1, implementation=implementation)
            for mode in ("sum", "mean", "max")
        )
        self.structure = StructureCorrelation(implementation)

    def forward(self, logits, features):
        by_max, by_area = (layer(logits) for layer in self.maps)
        pooled = [pool(features, *by_max) for pool in self.pools]
        structure = self.structure(pooled[0].parts, pooled[0].visibility)
        return (*by_max, *by_area, *(p.parts for p in pooled), pooled[0].mass, structure)


class Chain(nn.Module):
    """Pictures and features in, everything that the layers make of them out."""

    def __init__(self, parser, implementation):
        super().__init__()
        self.parser, self.layers = parser, Layers(implementation)

    def forward(self, images, features):
        return self.layers(self.parser(images), features)


class Network(nn.Module):
    """A `PartLocalNet` with all its results, as the plain tuple that a saved program returns."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return tuple(self.net.forward_parts(images))


class Exported(NamedTuple):
    """A module, five samples of its inputs, and what became of it when it was exported at two."""

    module: nn.Module
    inputs: tuple[torch.Tensor, ...]
    program: torch.export.ExportedProgram
    onnx: torch.onnx.ONNXProgram
    session: onnxruntime.InferenceSession
    tolerance: dict[str, float]


def export(module, inputs):
    batch = {0: torch.export.Dim("batch")}
    example = tuple(x[:2] for x in inputs)
    with pytest.MonkeyPatch.context() as patch:  # a check of shapes is no part of a program
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        return torch.export.export(module, example, dynamic_shapes=(batch,) * len(inputs))


def to_onnx(program):
    """Return the ONNX program and a session of onnxruntime that runs it, on one thread."""
    onnx = torch.onnx.export(program, dynamo=True, verbose=False)
    file, options = io.BytesIO(), onnxruntime.SessionOptions()
    onnx.save(file)
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    return onnx, session


def run(session, inputs):
    feeds = {put.name: x.numpy() for put, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, feeds)]


def operations(program):
    """Return the name spaces of all operations, those of nested graphs among them."""
    return {
        str(node.target).split(".")[0]
        for module in program.graph_module.modules()
        for node in module.graph.nodes
        if node.op == "call_function"
    } - {"<built-in function getitem>"}


CASES = ("chain", "network")


@pytest.fixture(scope="module")
def exported():
    """Return what exports a case at its first call: it takes seconds."""
    return cache(build)


def build(name):
    if not PRETRAINED.is_file():
        pytest.skip("this checkout holds no parser weights")
    torch.manual_seed(0)
    parser = ParsingNet.pretrained()
    if name == "chain":  # larger pictures, in floats: the parser shrinks them, without aliasing
        inputs = (torch.rand(5, 3, 160, 144), torch.rand(5, 16, 28, 28))
        module, asked = (Chain(parser, which).eval() for which in ("torch", "triton"))
        tolerance = CLOSE
    else:  # the maximum of features with a gradient: another way through the pooling
        inputs = (torch.randint(0, 256, (5, 3, 112, 112), dtype=torch.uint8),)
        options = LocalOptions(pool="max", min_visibility=0.1)
        shared = {"parser": parser, "parts": FSENET_PARTS, "options": options}
        net = PartLocalNet("resnet10t", map_size=28, **shared)
        triton = PartLocalNet(net.backbone, implementation="triton", **shared)
        module, asked, tolerance = Network(net).eval(), Network(triton).eval(), AFTER_RESIZE
    program = export(asked, inputs)
    return Exported(module, inputs, program, *to_onnx(program), tolerance)


def expected(case, batch):
    with torch.no_grad():
        return case.module(*(x[:batch] for x in case.inputs))


@pytest.mark.parametrize("name", CASES)
def test_reference(exported, name):
    """In onnxruntime and in the exported program: what eager mode gives."""
    case = exported(name)
    program = case.program.module()
    for batch in BATCHES:
        inputs, want = tuple(x[:batch] for x in case.inputs), expected(case, batch)
        found = run(case.session, inputs)
        torch.testing.assert_close(found, list(want), **case.tolerance)
        if isinstance(case.module, Network):
            vectors = [PartDescriptor(*results) for results in (found, want)]
            for field in ("descriptor", "local_vector", "global_vector", "norm"):
                torch.testing.assert_close(*(getattr(v, field) for v in vectors), **CLOSE)
        with torch.no_grad():
            torch.testing.assert_close(program(*inputs), want, **SAME)


@pytest.mark.parametrize("name", CASES)
def test_plain_operations(exported, name):
    """Also where a kernel was asked for, which a CPU could not run."""
    case = exported(name)
    assert operations(case.program) == {"aten"}
    assert {node.domain for node in case.onnx.model.graph} == {""}
    assert not case.onnx.model.functions


def test_runs_without_the_library(exported, tmp_path):
    """Programs are saved, and loaded where neither partlocal nor triton can be imported."""
    saved = []
    for case in map(exported, CASES):
        file = io.BytesIO()
        torch.export.save(case.program, file)
        batches = [(tuple(x[:b] for x in case.inputs), expected(case, b)) for b in BATCHES]
        saved.append((file.getvalue(), batches))
    torch.save((saved, SAME), tmp_path / "cases.pt")
    script = """
import io, sys
sys.modules["partlocal"] = sys.modules["triton"] = None  # an import raises
import torch
saved, tolerance = torch.load("cases.pt")
for program, batches in saved:
    module = torch.export.load(io.BytesIO(program)).module()
    for inputs, expected in batches:
        torch.testing.assert_close(module(*inputs), expected, **tolerance)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_implementation_is_the_definition():
    inputs = (torch.randn(2, 11, 32, 32), torch.rand(2, 8, 28, 28))
    programs = [export(Layers(which).eval(), inputs) for which in ("torch", "triton")]
    assert programs[0].graph_module.code == programs[1].graph_module.code
    with pytest.raises(NotImplementedError, match="on a CUDA or ROCm device; got cpu"):
        Layers("triton")(*inputs)


class Pools(nn.Module):
    """Every mode of the pooling, under maps and visibilities that are given."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            PartMaskPool(mode, min_visibility=0.3) for mode in ("sum", "mean", "max")
        )
        self.structure = StructureCorrelation()

    def forward(self, features, maps, visibility):
        parts = [layer(features, maps, visibility).parts for layer in self.layers]
        return (*parts, self.structure(parts[0], visibility))


def test_absent_parts_are_zero():
    """By their map, by their visibility, and where no cell reaches the threshold."""
    torch.manual_seed(0)
    features = torch.randn(3, 8, 7, 7) - 3
    maps, visibility = torch.rand(3, 4, 7, 7), torch.full((3, 4), 0.9)
    maps[:, 1], visibility[:, 2], maps[:, 3] = 0, 0.2, maps[:, 3] / 4
    inputs = (features, maps, visibility)
    _, session = to_onnx(export(Pools().eval(), inputs))
    for batch in (1, 3):
        some = tuple(x[:batch] for x in inputs)
        found = run(session, some)
        torch.testing.assert_close(found, list(Pools()(*some)), **CLOSE)
        absent = torch.tensor([False, True, True, False]), torch.tensor([False, True, True, True])
        for parts, gone in zip(found[:3], (absent[0], absent[1], absent[1]), strict=True):
            assert torch.equal(parts.eq(0).all(2), gone.expand(batch, 4))
            assert torch.equal(parts.eq(0).any(2), gone.expand(batch, 4))
        # Of parts 0 and 3 their own eight numbers and their pair with each other are left.
        left = found[3].ne(0)
        assert torch.equal(left.any(2), ~absent[0].expand(batch, 4))
        assert left[:, 0, 8:].int().tolist() == [[0, 0, 0, 0, 1, 1]] * batch
        assert left[:, 3, 8:].int().tolist() == [[1, 1, 0, 0, 0, 0]] * batch


def test_ready_maps():
    """A network without a parser; the maps lie on a grid of their own."""
    net = PartLocalNet("resnet10t", None, ("head", "torso"), image_size=(64, 32)).eval()
    inputs = (torch.rand(5, 3, 64, 32), torch.rand(5, 2, 30, 20), torch.rand(5, 2))
    program = export(net, inputs).module()
    with torch.no_grad():
        for batch in BATCHES:
            some = tuple(x[:batch] for x in inputs)
            torch.testing.assert_close(program(*some), net(*some), **SAME)


def test_losses_stay_here():
    """The log-sum-exp of the heads is for training: its operation is opaque, and so no such
    program leaves this library. The logits do."""

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = ArcFaceHead(8, num_classes=5)

        def forward(self, embeddings):
            return self.head.logits(embeddings)

    logits, embeddings = Logits().eval(), torch.randn(5, 8)
    assert "partlocal" in operations(export(logits.head, (embeddings, torch.arange(5))))
    program = export(logits, (embeddings,))
    assert "partlocal" not in operations(program)
    torch.testing.assert_close(program.module()(embeddings[:1]), logits(embeddings[:1]))
