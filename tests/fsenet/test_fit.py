"""The loop: a run that is killed and resumed ends in the same bits; two ranks end as one."""

import math
import os
import time
from typing import NamedTuple

import pytest
import torch
from checkpoint import last_but_one, load_checkpoint, save_checkpoint
from data.batches import BatchPlan, load_batches
from fit import fit
from schedule import Average, Schedule
from telemetry import CLOCKS, Fitted
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from workplace import Workplace

STEPS = 30
EVERY_STEP = {"checkpoint_seconds": -1.0, "checkpoint_share": 1.0}

# A process of its own that imports torch once and forks each trial, to be killed or not.
TRIALS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import torch._dynamo  # what every trial would else import for itself, at its first step
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from typing import NamedTuple
from data.augment import Augmentation, augment
from data.batches import BatchPlan, generator, load_batches
from fit import fit
from schedule import Schedule
from workplace import Workplace
from partlocal import HELEN

torch.set_num_threads(1)
STEPS, folder = int(sys.argv[1]), Path(sys.argv[2])
HOW = Augmentation(shift=0.1, rotation=10, brightness=0.3, grey=0.2)
data = TensorDataset(
    torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8, generator=generator(1)),
    torch.randint(0, 5, (50,), generator=generator(2)),
)

class Losses(NamedTuple):
    loss: torch.Tensor

class Net(nn.Module):
    def __init__(self, plain):
        super().__init__()
        # everything with a memory: BatchNorm's buffers, dropout's draws from the main generator
        between = nn.Identity() if plain else nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.3))
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, stride=2), between, nn.PReLU(6), nn.Flatten(), nn.Linear(150, 5)
        )
    def forward(self, images, labels):
        return Losses(F.cross_entropy(self.layers(images), labels))

def train(where, rank=0, world=1, plain=False, pause=0.0, batch=8):
    torch.manual_seed(0)
    module = Net(plain).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9, weight_decay=1e-3)
    plan = BatchPlan(batch, STEPS, 4, rank, world)
    def batches(first):
        for numbers, (images, labels) in load_batches(data, plan, first):
            time.sleep(pause)
            yield images, labels, numbers
    def prepare(images, labels, numbers):
        return augment(images, None, HELEN, HOW, numbers)[0], labels
    place = Workplace(where, torch.device("cpu"), "fp32", rank, world, 0.004, 1.0)
    schedule = Schedule(STEPS, lambda t: 0.1 * (1 - t), optimizer)
    fit("joint", module, batches, schedule, place, prepare)
    torch.save(module.state_dict(), where / f"end-{rank}.pt")

def start(*arguments, world=1, **more):
    pids = []
    (folder / arguments[0]).mkdir(exist_ok=True)
    store = folder / f"store-{time.monotonic_ns()}"
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)  # torch's pool is made anew, before two threads ask for it
            code = 1
            try:
                if world > 1:
                    distributed.init_process_group(
                        "gloo", init_method=f"file://{store}", rank=rank, world_size=world
                    )
                train(folder / arguments[0], rank, world, **more)
                if world > 1:
                    distributed.destroy_process_group()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    return pids

def end(pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0, "a trial failed"

def kill(pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    return all(os.waitpid(pid, 0)[1] == signal.SIGKILL for pid in pids)

def until_killed(times, name, **more):
    rng, path = random.Random(7), folder / name / "joint.pt"
    for _ in range(times):
        before = path.stat().st_mtime_ns if path.exists() else 0
        pids = start(name, pause=0.015, **more)
        deadline = time.monotonic() + 60
        while not path.exists() or path.stat().st_mtime_ns == before:  # it got further
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        assert kill(pids), "it had ended before it was killed"
    end(start(name, **more))

# killed at arbitrary moments or not, the end must be the same
end(start("whole"))
until_killed(4, "killed")
# two processes, and one with their batches together
end(start("ranks", world=2, plain=True))
end(start("alone", plain=True))
end(start("ranks-whole", world=2))
until_killed(2, "ranks-killed", world=2)
"""


@pytest.fixture(scope="module")
def trials(tmp_path_factory, run_code):
    if not hasattr(os, "fork") or not torch.distributed.is_available():
        pytest.skip("needs fork and gloo")
    folder = tmp_path_factory.mktemp("trials")
    run_code(TRIALS, STEPS, folder)
    return folder


def assert_bits(a, b, path="checkpoint"):
    assert type(a) is type(b), path
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, path
        assert a.stride() == b.stride(), path
        assert a.numpy().tobytes() == b.numpy().tobytes(), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for name in a:
            assert_bits(a[name], b[name], f"{path}.{name}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_bits(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def checkpoint(folder):
    state = load_checkpoint(folder / "joint.pt")
    for clock in ("seconds", "wait_seconds"):
        del state["fitted"][clock]
    state["fitted"]["history"] = timeless(state["fitted"]["history"])
    return state


def timeless(rows):
    return [{name: row[name] for name in row if name not in CLOCKS} for row in rows]


@pytest.mark.parametrize("name", ["", "ranks-"], ids=["one process", "two processes"])
def test_killed_and_resumed_is_bit_equal(trials, name):
    """Weights, BatchNorm's buffers, momentum, the generator and the curve, after every kill."""
    whole, resumed = checkpoint(trials / f"{name}whole"), checkpoint(trials / f"{name}killed")
    assert whole["fitted"]["steps"] == STEPS
    assert [row["step"] for row in whole["fitted"]["history"]] == [*range(0, STEPS, 10), STEPS - 1]
    assert "layers.1.0.running_mean" in whole["module"]
    assert whole["optimizer"]["state"][0]["momentum_buffer"].abs().sum() > 0
    assert_bits(resumed, whole)
    assert [p.name for p in (trials / f"{name}killed").glob(".*")] == []
    for rank in range(2 if name else 1):  # what fit leaves in the module, on every rank
        assert_bits(
            load_checkpoint(trials / f"{name}killed" / f"end-{rank}.pt"),
            load_checkpoint(trials / f"{name}whole" / f"end-{rank}.pt"),
        )


def test_two_processes(trials):
    """Both end in the same bits, BatchNorm's too, and where one with the whole batch ends."""
    for name in ("ranks", "ranks-whole"):
        first, second = (load_checkpoint(trials / name / f"end-{rank}.pt") for rank in (0, 1))
        assert_bits(first, second)
    two, one = (load_checkpoint(trials / name / "end-0.pt") for name in ("ranks", "alone"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-5)
    apart = [load_checkpoint(trials / n / "joint.pt")["fitted"]["history"] for n in ("alone",)]
    assert apart[0][-1]["loss"] < apart[0][0]["loss"]


class Losses(NamedTuple):
    loss: Tensor
    size: Tensor


class Scalar(nn.Module):
    """One weight w; the loss is w x mean(x)."""

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor, absent: Tensor | None) -> Losses:
        assert absent is None
        assert self.training
        return Losses(self.w * x.mean(), self.w.detach().clone())


def small(folder, steps=3, module=None, value=2.0, rate=0.1, **how):
    module = Scalar() if module is None else module
    optimizer = torch.optim.SGD(module.parameters(), lr=99.0)
    asked = []

    def batches(first):
        asked.append(first)
        for _ in range(first, steps):
            yield torch.full((2,), value), None

    schedule = Schedule(steps, lambda done: rate * (1 - done), optimizer)
    place = Workplace(folder, torch.device("cpu"), **how)
    return fit("alone", module, batches, schedule, place), module, asked


def test_example(tmp_path, capsys):
    """By hand: w falls by lr x 2 a step, with lr 0.1, 0.0667, 0.0333."""
    fitted, module, asked = small(tmp_path)
    assert math.isclose(module.w.item(), 1 - 0.2 * (1 + 2 / 3 + 1 / 3), rel_tol=1e-6)
    assert asked == [0]
    assert [(row["step"], row["steps"], row["stage"]) for row in fitted.history] == [
        (0, 3, "alone"),
        (2, 3, "alone"),
    ]
    assert fitted.history[0]["loss"] == 2.0
    assert fitted.history[0]["lr"] == 0.1
    assert math.isclose(fitted.history[1]["size"], 1 - 0.2 * (1 + 2 / 3), rel_tol=1e-6)
    assert fitted.steps == 3
    assert 0 <= fitted.wait_seconds <= fitted.seconds

    # a stage that is over is not repeated: no batch is asked for, the weights are those
    assert "trained already" not in capsys.readouterr().err
    again, other, asked = small(tmp_path, module=Scalar(7.0))
    assert asked == []
    assert other.w.item() == module.w.item()
    assert again == fitted
    assert f"stage alone is trained already: {tmp_path}/alone.pt" in capsys.readouterr().err


def test_half_a_stage_goes_on(tmp_path):
    """A checkpoint of step 2 of 3: the batches from there on are asked for, and no others."""
    module = Scalar(0.5)
    state = {
        "module": module.state_dict(),
        "optimizer": torch.optim.SGD(module.parameters(), lr=99.0).state_dict(),
        "rng": torch.Generator().manual_seed(5).get_state(),
        "fitted": vars(Fitted([{"loss": 1.0}], 10.0, 1.0, 2)),
    }
    save_checkpoint(state, tmp_path / "alone.pt")
    fitted, module, asked = small(tmp_path)
    assert asked == [2]
    assert math.isclose(module.w.item(), 0.5 - 0.2 / 3, rel_tol=1e-5)
    assert fitted.history[0] == {"loss": 1.0}
    assert fitted.seconds > 10.0


def micro(folder, accumulate, value, steps=3, **more):
    """As `small`, in micro-batches whose mean is `value`."""
    module = Scalar()
    optimizer = torch.optim.SGD(module.parameters(), lr=99.0)

    def batches(first):
        for _ in range(first, steps):
            for at in range(accumulate):
                yield torch.full((2,), value + at - (accumulate - 1) / 2), None

    rate = lambda done: 0.1 * (1 - done)  # noqa: E731
    schedule = Schedule(steps, rate, optimizer, accumulate, **more)
    return fit("alone", module, batches, schedule, Workplace(folder, torch.device("cpu"))), module


def test_micro_batches(tmp_path):
    """Their mean gradient makes a step, and their mean loss is told."""
    fitted, module = micro(tmp_path, 4, 2.0)
    assert math.isclose(module.w.item(), 1 - 0.2 * (1 + 2 / 3 + 1 / 3), rel_tol=1e-6)
    assert fitted.history[0]["loss"] == 2.0
    assert fitted.history[0]["grad_norm"] == 2.0
    assert fitted.images == 3 * 4 * 2


def test_clipping(tmp_path):
    """By hand: the gradient 2 becomes 0.5, of the sum and not of each micro-batch."""
    fitted, module = micro(tmp_path, 2, 2.0, clip_norm=0.5)
    assert math.isclose(module.w.item(), 1 - 0.05 * (1 + 2 / 3 + 1 / 3), rel_tol=1e-5)
    assert fitted.history[0]["grad_norm"] == 2.0


def test_what_does_not_move_does_not_count(tmp_path):
    """A gradient that is left in a frozen part is in no norm; none is left when a stage is over."""
    module = Scalar()
    module.frozen = nn.Parameter(torch.zeros(5), requires_grad=False)
    module.frozen.grad = torch.full((5,), 1e9)
    optimizer = torch.optim.SGD([module.w], lr=99.0)
    schedule = Schedule(1, lambda done: 0.1, optimizer, clip_norm=0.5)
    batches = lambda first: iter([(torch.full((2,), 2.0), None)])  # noqa: E731
    fitted = fit("alone", module, batches, schedule, Workplace(tmp_path, torch.device("cpu")))
    assert fitted.history[0]["grad_norm"] == 2.0
    assert math.isclose(module.w.item(), 0.95, rel_tol=1e-6)
    assert module.w.grad is None


def averaged(folder, steps=3, stop=None):
    """Train with an average of decay 0.5, up to an exception at step `stop`."""
    module = Scalar()
    optimizer = torch.optim.SGD(module.parameters(), lr=99.0)
    average = Average(module, ModelEmaV3(module, 0.5))

    def batches(first):
        for step in range(first, steps):
            if step == stop:
                raise KeyboardInterrupt
            yield torch.full((2,), 2.0), None

    schedule = Schedule(steps, lambda done: 0.1 * (1 - done), optimizer, average=average)
    place = Workplace(folder, torch.device("cpu"), **EVERY_STEP)
    fit("alone", module, batches, schedule, place)
    return module.w.item()


def test_the_average_of_weights(tmp_path):
    """By hand: w is 0.8, 2/3, 0.6; its average 0.9, 0.78333, 0.69167, after a kill too."""
    with pytest.raises(KeyboardInterrupt):
        averaged(tmp_path, stop=2)
    assert math.isclose(averaged(tmp_path), 0.6916667, rel_tol=1e-6)
    kept = load_checkpoint(tmp_path / "alone.pt")
    assert math.isclose(kept["module"]["w"].item(), 0.6, rel_tol=1e-6)
    assert math.isclose(kept["average"]["w"].item(), 0.6916667, rel_tol=1e-6)
    assert math.isclose(averaged(tmp_path), 0.6916667, rel_tol=1e-6)  # the stage is over
    del kept["average"]
    save_checkpoint(kept, tmp_path / "alone.pt")
    with pytest.raises(ValueError, match=r"no checkpoint of a stage \(no average\); delete it"):
        averaged(tmp_path)


def test_what_is_waited_for(tmp_path):
    """Batches are moved as they come, then prepared; only waiting for them is waiting."""
    moved = []

    class Place(Workplace):
        def put(self, tensor):
            moved.append(tensor.dtype)
            return super().put(tensor)

    def batches(first):
        for _ in range(first, 5):
            time.sleep(0.02)
            yield torch.ones(2, dtype=torch.uint8), None

    def prepare(x, absent):
        assert moved[-1] == torch.uint8
        time.sleep(0.02)
        return x.float(), absent

    module = Scalar()
    schedule = Schedule(5, lambda _: 0.0, torch.optim.SGD(module.parameters(), lr=1.0))
    fitted = fit("alone", module, batches, schedule, Place(tmp_path, torch.device("cpu")), prepare)
    assert moved == [torch.uint8] * 5
    assert fitted.wait_seconds >= 0.1
    assert fitted.seconds - fitted.wait_seconds >= 0.1


def test_large_checkpoints_are_rare(tmp_path, monkeypatch):
    """One that takes 30 ms comes after 570 ms again, and at the end."""
    written = []

    def slowly(state, path):
        written.append(state["fitted"]["steps"])
        time.sleep(0.03)

    monkeypatch.setattr("resume.save_checkpoint", slowly)
    small(tmp_path, 30, checkpoint_seconds=0.0)
    assert written == [1, 30]


def test_bf16(tmp_path):
    """Autocast is on in the module's call when the precision says so, and only then."""
    seen = []

    class Asks(Scalar):
        def forward(self, x: Tensor, absent: Tensor | None) -> Losses:
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x, absent)

    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        small(folder, steps=1, module=Asks(), precision=precision)
    assert seen == [False, True]


def test_one_network_trains_as_the_other(tmp_path):
    """Steps without `rank 0`'s pen: another rank writes no checkpoint."""
    small(tmp_path, rank=1)
    assert list(tmp_path.iterdir()) == []


class Breaks(Scalar):
    """Its loss, or its gradient with a finite loss, is NaN at one call."""

    def __init__(self, call, gradient_alone):
        super().__init__()
        self.call, self.gradient_alone, self.calls = call, gradient_alone, 0

    def forward(self, x: Tensor, absent: Tensor | None) -> Losses:
        loss, size = super().forward(x, absent)
        self.calls += 1
        if self.calls == self.call:
            root = (self.w - self.w.detach()).sqrt()  # 0, with a slope that is infinite
            loss = loss + (0 * root if self.gradient_alone else loss * math.nan)
        return Losses(loss, size)


@pytest.mark.parametrize("call", [3, 7])
@pytest.mark.parametrize("gradient_alone", [False, True])
def test_nothing_broken_is_saved(tmp_path, call, gradient_alone):
    """Between the steps whose loss is read, and at the last: the old checkpoint stays."""
    what = (
        "a weight of stage alone is nan"
        if gradient_alone
        else "(the loss|a weight) of stage alone is nan"
    )
    with pytest.raises(FloatingPointError, match=what) as caught:
        small(
            tmp_path, 7, Breaks(call, gradient_alone), checkpoint_seconds=-1.0, checkpoint_share=1.0
        )
    assert str(caught.value).endswith(": lower --lr, or use --precision fp32")
    kept = load_checkpoint(tmp_path / "alone.pt")
    assert kept["fitted"]["steps"] == call - 1
    assert kept["module"]["w"].isfinite()


def test_the_loss_is_not_read_every_step(tmp_path, monkeypatch):
    """Reading numbers waits for the GPU: those of three of 25 steps and of the last are read."""
    read, numbers = [], Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: read.append(t) or numbers(t))
    monkeypatch.setattr(Tensor, "item", lambda t: pytest.fail("read one by one"))
    small(tmp_path, 25, rank=1, **EVERY_STEP)
    assert len(read) == 4


def test_a_refused_batch_says_where(tmp_path):
    class Refuses(Scalar):
        def forward(self, x: Tensor, absent: Tensor | None) -> Losses:
            raise ValueError("x must be\n  larger")

    with pytest.raises(ValueError, match=r"^stage alone, step 0: x must be larger$"):
        small(tmp_path, module=Refuses())


def test_errors(tmp_path):
    with pytest.raises(
        FloatingPointError,
        match=r"the loss of stage alone is inf at step 0: lower --lr, or use --precision fp32",
    ):
        small(tmp_path, value=math.inf)
    assert list(tmp_path.iterdir()) == []

    # the loss of the last step is finite, and the weight that the step leaves is not
    with pytest.raises(FloatingPointError, match=r"a weight of stage alone is -?inf at step 0"):
        small(tmp_path, steps=1, rate=math.inf)
    assert list(tmp_path.glob("*.pt")) == []

    path = tmp_path / "alone.pt"
    small(tmp_path)
    with pytest.raises(ValueError, match=r"alone.pt is \d+ steps into a training of 1: resume"):
        small(tmp_path, steps=1)
    with pytest.raises(ValueError, match="saved by another architecture") as caught:
        small(tmp_path, module=nn.Linear(3, 4))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("resume with the options that the run was started with")

    class Wider(Scalar):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"another architecture \(size mismatch for w"):
        small(tmp_path, module=Wider())

    save_checkpoint({"module": {}}, path)
    with pytest.raises(ValueError, match=r"is no checkpoint of a stage \(no fitted\); delete it"):
        small(tmp_path)
    path.write_bytes(b"junk")
    last_but_one(path).unlink()
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        small(tmp_path)


def test_the_recipes_batches_fit(tmp_path):
    """`load_batches` ends with the last step: the loop never asks for one more."""
    data = TensorDataset(torch.arange(5.0))
    module, plan = Scalar(), BatchPlan(2, 7, seed=0)
    batches = lambda first: ((x, None) for _, (x,) in load_batches(data, plan, first))  # noqa: E731
    schedule = Schedule(7, lambda _: 0.0, torch.optim.SGD(module.parameters(), lr=1.0))
    fitted = fit("alone", module, batches, schedule, Workplace(tmp_path, torch.device("cpu")))
    assert fitted.steps == 7
    assert module.w.item() == 1.0
