"""A stage that goes on with another number of processes, or after one is gone, is the same stage.

The network has no BatchNorm, whose statistics each process takes over its own pictures.
"""

import errno
import json
import os
import re

import pytest
import torch
from checkpoint import load_checkpoint

STEPS = 26
pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or not torch.distributed.is_available(), reason="needs fork and gloo"
)

# Each trial is one or more forked processes, which may kill themselves at a step. Its losses are
# written as they come, and what a process says when it ends.
TRIALS = """
import os, resource, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # what every trial would else import for itself, at its first step
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from data.augment import Augmentation, augment
from data.batches import BatchPlan, generator, load_batches
from data.damage import Damage
from fit import fit
from schedule import Schedule
from workplace import Workplace
from model import GlobalNet, TrainedGlobalNet
from partlocal import HELEN
from partlocal.backbone import Backbone
from partlocal.shard import local_part
from errors import one_line_errors
from run_folder import bind
from spread import spread_names

torch.set_num_threads(1)
STEPS, top = int(sys.argv[1]), Path(sys.argv[2])
HOW = Augmentation(shift=0.1, rotation=10, brightness=0.3, grey=0.2)
rng = generator(1)
data = TensorDataset(
    torch.randint(0, 256, (52, 3, 32, 32), dtype=torch.uint8, generator=rng),
    torch.arange(52) % 13,
)

def train(folder, rank, world, end=None, accumulate=1, workers=0, clip_norm=0.0, lost=None):
    torch.manual_seed(0)
    net = GlobalNet(Backbone("test_vit", map_size=2, image_size=32))
    module = TrainedGlobalNet(net, 13, 0.2, 16.0, spread=world > 1)
    plan = BatchPlan(12, STEPS, 4, rank, world, workers, accumulate)
    losses = (top / f"{folder.name}.losses").open("a")
    at = -1

    def rate(done):
        nonlocal at
        at = round(done * STEPS)
        if at == end:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.003 * (1 - done)

    def write(module, inputs, found):
        if rank == 0:
            print(os.getpid(), at, found.loss.item(), file=losses, flush=True)

    def batches(first):
        for numbers, (images, identities) in load_batches(data, plan, first):
            yield images, identities, numbers

    def prepare(images, identities, numbers):
        return augment(images, None, HELEN, HOW, numbers).images, None, identities

    module.register_forward_hook(write)
    optimizer = torch.optim.SGD(module.parameters(), 0.003, 0.9, weight_decay=1e-4)

    def lose(*_):
        if rank == 1 and at == lost:
            for name in spread_names(module):  # rows that no other process has
                local_part(module.get_parameter(name)).data.fill_(float("inf"))

    optimizer.register_step_post_hook(lose)
    # other machines have no such folder
    here = folder if rank == 0 else Path("/nowhere")
    place = Workplace(here, torch.device("cpu"), "fp32", rank, world, -1.0, 1.0)
    schedule = Schedule(STEPS, rate, optimizer, accumulate, clip_norm)
    fit("joint", module, batches, schedule, place, prepare)
    torch.save(net.state_dict(), top / f"{folder.name}-{rank}.pt")

def bound(folder, rank, world, end, pictures):
    place = Workplace(folder, torch.device("cpu"), "fp32", rank, world)
    bind(place, {"pictures": pictures[rank], "sha256": "1"})

def damaged(folder, rank, world, end):
    damage = Damage(5)
    damage.share(9)
    for number in ([0, 7], [7, 8])[rank]:
        damage.add("x", number)
    damage.gather()
    (top / f"{folder.name}-{rank}.count").write_text(str(damage.count))

def trial(name, world=1, code=0, ends=(), file_size=None, do=train, **how):
    # `ends`: the step at which each process kills itself
    folder, pids = top / name, []
    folder.mkdir(exist_ok=True)
    store = top / f"store-{time.monotonic_ns()}"
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # torch's pool is made anew, before two threads ask for it
            said = os.open(top / f"{name}-{rank}.err", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            os.dup2(said, 2)
            code = 1
            try:
                if world > 1:
                    distributed.init_process_group(
                        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
                    )
                if file_size is not None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
                with one_line_errors():
                    do(folder, rank, world, dict(ends).get(rank), **how)
                code = 0
            except SystemExit as error:
                print(error.code, file=sys.stderr)
            finally:
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
    found = [os.waitpid(pid, 0)[1] for pid in pids]
    expected = [signal.SIGKILL if rank in dict(ends) else code for rank in range(world)]
    assert found == expected, (name, found, (top / f"{name}-0.err").read_text()[-3000:])

FAILED = 256  # an exit with 1
trial("whole")

# of one process, two, two again, and one with other workers and micro-batches
trial("moved", ends={0: 5})
trial("moved", 2, FAILED, ends={1: 14})
trial("moved", 2, ends={0: 18, 1: 18})
trial("moved", accumulate=3, workers=2)

# the newest checkpoint is cut short, and the one before is gone on from; then both
trial("damaged", 2, ends={0: 23, 1: 23})
path = top / "damaged/joint.pt"
os.truncate(path, path.stat().st_size // 2)
trial("damaged", 2)
for path in (top / "damaged").glob("*.pt"):
    os.truncate(path, 1000)
trial("damaged", 2, FAILED)

# the disk is full when the second checkpoint is written
trial("full", ends={0: 1})
size = (top / "full/joint.pt").stat().st_size
trial("full", 2, FAILED, file_size=size // 2)
trial("full", 2)

# the second process alone has weights that are lost, when the second checkpoint is due
trial("lost", 2, FAILED, lost=10)

# a machine has other files; a run is gone on with on others
trial("differ", 2, FAILED, do=bound, pictures=["9 pictures of 3 people", "8 pictures of 3 people"])
trial("bound", 2, do=bound, pictures=["9 pictures of 3 people"] * 2)
trial("bound", 2, FAILED, do=bound, pictures=["8 pictures of 3 people"] * 2)
trial("met", 2, do=damaged)

# micro-batches: processes exchange gradients once a step
calls, no_sync = [], DistributedDataParallel.no_sync
def counted(self):
    calls.append(1)
    if len(calls) == 2 * STEPS:
        (top / "micro.counted").write_text("")
    return no_sync(self)
DistributedDataParallel.no_sync = counted
trial("micro", 2, accumulate=3)
DistributedDataParallel.no_sync = no_sync

# a gradient that is clipped, rows that are spread among it
trial("clipped", clip_norm=0.5)
trial("clipped-two", 2, accumulate=2, clip_norm=0.5)
"""


@pytest.fixture(scope="module")
def trials(tmp_path_factory, run_code):
    folder = tmp_path_factory.mktemp("trials")
    run_code(TRIALS, STEPS, folder)
    return folder


def losses(folder, name):
    """What each attempt had as the losses of its steps."""
    attempts: dict[str, dict[int, list[float]]] = {}
    for line in (folder / f"{name}.losses").read_text().splitlines():
        process, step, loss = line.split()
        attempts.setdefault(process, {}).setdefault(int(step), []).append(float(loss))
    return [
        {step: sum(micro) / len(micro) for step, micro in steps.items()}
        for steps in attempts.values()
    ]


def said(folder, name):
    """What the processes said; it may stand behind a progress bar that a kill left."""
    text = "".join(path.read_text() for path in sorted(folder.glob(f"{name}-?.err")))
    assert "Traceback" not in text
    return re.findall(r"(?:error|warning): .*", text)


def same_end(folder, name, whole="whole", ranks=1):
    for rank in range(ranks):
        found, expected = (
            load_checkpoint(folder / f"{n}.pt") for n in (f"{name}-{rank}", f"{whole}-0")
        )
        for key in expected:
            torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=1e-5)


def same_rows(folder, name, whole="whole"):
    found, expected = (
        [json.loads(line) for line in (folder / n / "history.jsonl").open()] for n in (name, whole)
    )
    steps = [*range(0, STEPS, 10), STEPS - 1]
    assert [row["step"] for row in found] == [row["step"] for row in expected] == steps
    for row, other in zip(found, expected, strict=True):
        for key in ("lr", "loss", "global_loss", "grad_norm"):
            assert row[key] == pytest.approx(other[key], rel=1e-4), key
        assert row["images_per_second"] > 0


def test_another_number_of_processes(trials):
    """Killed at 5, 14 and 18 of 26 steps, on one, two, two and one: the losses are as if not."""
    (whole,) = losses(trials, "whole")
    assert list(whole) == [*range(STEPS)]
    assert whole[STEPS - 1] < whole[0] * 0.8
    attempts = losses(trials, "moved")
    # two processes write a checkpoint every tenth step, one after each
    assert [[min(steps), max(steps)] for steps in attempts] == [[0, 4], [5, 13], [11, 17], [11, 25]]
    for steps in attempts:
        for step, loss in steps.items():
            assert loss == pytest.approx(whole[step], rel=1e-5), step
    same_end(trials, "moved")
    same_rows(trials, "moved")


def test_a_process_is_gone(trials):
    """The other one says so in a line."""
    assert said(trials, "moved") == [
        "error: another process of this run has ended, see what it said: start all of them again "
        "with --resume"
    ]


def test_a_checkpoint_cut_short(trials):
    """Of two, the one before is gone on from, said once; two damaged ones are an error on all."""
    (whole,) = losses(trials, "whole")
    attempts = losses(trials, "damaged")
    assert [[min(steps), max(steps)] for steps in attempts] == [[0, 22], [11, 25]]
    for steps in attempts:
        assert list(steps.values()) == pytest.approx([whole[step] for step in steps], rel=1e-5)
    same_end(trials, "damaged", ranks=2)
    same_rows(trials, "damaged")
    warning, again, first, second = said(trials, "damaged")
    path = trials / "damaged/joint.pt"
    assert warning.startswith(f"warning: {path} is damaged or no checkpoint (")
    assert warning.endswith("); going on from the one before")
    assert again.startswith(f"warning: {path} is damaged")
    assert first.startswith(
        f"error: {trials}/damaged/joint-before.pt is damaged or no checkpoint ("
    )
    assert second == first


def test_a_full_disk(trials):
    """Both processes end with a line, the old checkpoint is whole, and with room it goes on."""
    (whole,) = losses(trials, "whole")
    attempts = losses(trials, "full")
    assert [[min(steps), max(steps)] for steps in attempts] == [[0, 0], [1, 10], [1, 25]]
    for steps in attempts:
        assert list(steps.values()) == pytest.approx([whole[step] for step in steps], rel=1e-5)
    same_end(trials, "full", ranks=2)
    first, second = said(trials, "full")
    path = trials / "full/joint.pt"
    told = "the last checkpoint is whole; make room, and pass --resume"
    assert first == f"error: {path} cannot be written ({os.strerror(errno.EFBIG)}): {told}"
    assert second.startswith("error: the first process cannot write ")
    assert not list((trials / "full").glob(".*"))


def test_lost_weights_of_one(trials):
    """Both processes say so, and the checkpoint before is kept."""
    message = "error: a weight of stage joint is inf at step 10: lower --lr, or use"
    assert [text.startswith(message) for text in said(trials, "lost")] == [True, True]
    assert load_checkpoint(trials / "lost/joint.pt")["fitted"]["steps"] == 1


def test_other_pictures(trials):
    """Of one machine, or of a run that is gone on with: all processes say so."""
    differ = (
        "error: --faces: process 1 has 8 pictures of 3 people, which are not the 9 pictures of 3 "
        "people of process 0: give all machines the same files"
    )
    assert said(trials, "differ") == [differ] * 2
    bound = (
        f"error: {trials}/bound/pictures.json names other pictures than the 8 pictures of 3 "
        "people that --faces holds now: resume with the files that the run was started with"
    )
    assert said(trials, "bound") == [bound] * 2


def test_damage_of_all(trials):
    """Pictures 0 and 7 here, 7 and 8 there: three."""
    assert [(trials / f"met-{rank}.count").read_text() for rank in range(2)] == ["3", "3"]


def test_micro_batches(trials):
    """Two processes x three micro-batches take the steps of one; a sum is exchanged once."""
    (whole,), (micro,) = losses(trials, "whole"), losses(trials, "micro")
    assert list(micro.values()) == pytest.approx(list(whole.values()), rel=1e-5)
    same_end(trials, "micro", ranks=2)
    same_rows(trials, "micro")
    assert (trials / "micro.counted").exists()


def test_clipping(trials):
    """The norm is that of everything, whoever holds it, and is what it was before clipping."""
    (free,), (one,), (two,) = (losses(trials, n) for n in ("whole", "clipped", "clipped-two"))
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-5)
    assert one[STEPS - 1] > free[STEPS - 1] * 1.01
    same_rows(trials, "clipped-two", "clipped")
    row = json.loads((trials / "clipped/history.jsonl").read_text().splitlines()[0])
    assert row["grad_norm"] > 1
