"""The recipe with heads spread over two processes takes the steps of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch import distributed

RECIPE = Path(__file__).parents[2] / "examples/fsenet"
pytestmark = pytest.mark.skipif(not distributed.is_available(), reason="torch has no distributed")

# A network without BatchNorm, whose statistics two processes would take over half the batch.
TRAIN = """
import json, sys, time
from pathlib import Path
import torch
from torch import distributed
from torch.utils.data import TensorDataset
from data.batches import BatchPlan, load_batches
from fit import fit
from schedule import Schedule
from workplace import Workplace
from model import GlobalNet, TrainedGlobalNet
from partlocal.backbone import Backbone

rank, world, steps, folder, pause = *map(int, sys.argv[1:4]), Path(sys.argv[4]), float(sys.argv[5])
torch.set_num_threads(1)
store = f"file://{folder / 'store'}-{world}-{sys.argv[6]}"
if world > 1:
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
torch.manual_seed(0)
net = GlobalNet(Backbone("test_vit", map_size=2, image_size=32))
module = TrainedGlobalNet(net, 13, 0.2, 16.0, spread=world > 1)
rng = torch.Generator().manual_seed(1)
data = TensorDataset(
    torch.randint(0, 256, (52, 3, 32, 32), dtype=torch.uint8, generator=rng),
    torch.arange(52) % 13,
)
plan = BatchPlan(8, steps, 4, rank, world)
losses = []
module.register_forward_hook(lambda m, i, out: losses.append(out.loss.item()))

def batches(first):
    for _, (images, identities) in load_batches(data, plan, first):
        time.sleep(pause)
        yield images, None, identities

optimizer = torch.optim.SGD(module.parameters(), 0.003, 0.9, weight_decay=1e-4)
place = Workplace(folder, torch.device("cpu"), "fp32", rank, world, checkpoint_seconds=0.5)
fit("joint", module, batches, Schedule(steps, lambda t: 0.003 * (1 - t), optimizer), place)
(folder / f"losses-{rank}-of-{world}.json").write_text(json.dumps(losses))
"""


def start(folder, world, steps, pause=0.0, name="a"):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(RECIPE), str(RECIPE.parents[1])])}
    numbers = [str(n) for n in (world, steps, folder, pause)]
    return [
        subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(rank), *numbers, name],
            env=env, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(world)
    ]  # fmt: skip


def finish(processes):
    for process in processes:
        error = process.communicate(timeout=200)[1]
        # What is left is read below; gloo's threads sometimes abort a process that is ending.
        aborted = "terminate called without an active exception" in error
        assert process.returncode == 0 or aborted, error[-3000:]


def test_two_hundred_steps(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    finish(start(tmp_path / "one", 1, 200))
    finish(start(tmp_path / "two", 2, 200))
    alone = json.loads((tmp_path / "one/losses-0-of-1.json").read_text())
    assert len(alone) == 200
    assert alone[-1] < alone[0] / 2
    for rank in range(2):
        spread = json.loads((tmp_path / f"two/losses-{rank}-of-2.json").read_text())
        assert spread == pytest.approx(alone, rel=1e-5)


def test_killed_and_resumed(tmp_path):
    """One process is killed; both start again from the checkpoint, and end in the same bits."""
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    finish(start(tmp_path / "whole", 2, 60))
    processes = start(tmp_path / "cut", 2, 60, pause=0.05)
    while not (tmp_path / "cut/joint.pt").exists():
        time.sleep(0.05)
        assert processes[1].poll() is None
    processes[1].send_signal(signal.SIGKILL)
    error = processes[0].communicate(timeout=100)[1]
    assert processes[0].returncode not in (0, None)
    assert "Connection" in error or "got no answer from another one" in error, error[-2000:]
    processes[1].communicate()
    assert not (tmp_path / "cut/losses-0-of-2.json").exists()
    finish(start(tmp_path / "cut", 2, 60, name="b"))
    whole, cut = (
        json.loads((tmp_path / f"{name}/losses-0-of-2.json").read_text())
        for name in ("whole", "cut")
    )
    assert 0 < len(cut) < 60
    assert cut == whole[-len(cut) :]
