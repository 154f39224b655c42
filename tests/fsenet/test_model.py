"""The trained networks, compiled: the same steps, the same names, and no break in a graph."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Without the checks of shapes that the tests put around every call.
COMPILED = """
import torch
import iresnet
from model import GlobalNet, TrainedFSENet, TrainedGlobalNet, compiled
from partlocal import HELEN, ParsingNet, PartLocalNet
from partlocal.backbone import Backbone
from partlocal.labels import FSENET_PARTS

torch.manual_seed(0)
torch.set_num_threads(1)
images, maps, visibility = torch.rand(4, 3, 112, 112), torch.rand(4, 6, 28, 28), torch.rand(4, 6)
labels = torch.tensor([0, 1, 2, 1])
parser = ParsingNet(HELEN, 8, 1, grid=32).freeze()
small = lambda: Backbone("iresnet10_small", map_size=28)
for net, trained, precision in (
    (PartLocalNet(small(), parser, FSENET_PARTS), TrainedFSENet, "bf16"),
    (GlobalNet(small()), TrainedGlobalNet, "fp32"),
):
    module = trained(net, 3, 0.1, 16.0)
    names = list(module.state_dict())
    before = {name: t.clone() for name, t in module.state_dict().items()}

    def step():
        module.load_state_dict(before)
        module.train()
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = module(images, maps, labels, visibility).loss
        loss.backward()
        return loss, {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    eager, calls = step(), 0

    def backend(graph, inputs):  # a break would be an error by `fullgraph`
        global calls
        calls += 1
        return graph

    with compiled(net, backend=backend, fullgraph=True):
        fast = step()
        assert list(module.state_dict()) == names
    made = calls
    assert made == (2 if trained is TrainedFSENet else 1), made
    torch.testing.assert_close(fast, eager, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(step(), eager, rtol=0, atol=0)
    assert calls == made, "compiled outside of the block"
    assert "forward" not in vars(net.backbone)
print("compiled")
"""


def test_compiled():
    run = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT / "examples/fsenet"), str(ROOT)]),
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "compiled" in run.stdout, run.stderr[-3000:]
