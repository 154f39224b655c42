"""What several ranks do together, each a process of its own: scenarios.py RANK RANKS FOLDER.

A scenario gets a group of some ranks and compares what it finds with one process that sees all
samples and all classes. What it found is written to FOLDER, one file a
rank; the first one that fails ends all.
"""

import json
import os
import sys
import time
import traceback
from copy import deepcopy
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from partlocal import AdaFace, ArcFace, ArcFaceHead, CosFace, MagFace
from partlocal.optim import SGD, AdamW, clip_grad_norm
from partlocal.shard import Shard

D, V = 6, 11
MARGINS = {
    "arc": lambda: ArcFace(0.5),
    "detached": lambda: ArcFace(0.5, grad="detached", beyond="none"),
    "cos": CosFace,
    "mag": MagFace,
    "ada": lambda: AdaFace(momentum=0.5),
}


def batch(group, seed=0, classes=V, dtype=torch.float64, ignored=True):
    """All samples, and the slice of this rank: the batches are unequal, the last one empty."""
    rng = torch.Generator().manual_seed(1000 + seed)
    sizes = [*[5, 2, 4, 3][: group.size() - 1], 0]
    x = 12 * torch.randn(sum(sizes), D, dtype=torch.float64, generator=rng)
    labels = torch.randint(classes, (len(x),), generator=rng)
    if ignored:
        labels[1] = -1
    start = sum(sizes[: group.rank()])
    return x.to(dtype), labels, slice(start, start + sizes[group.rank()])


def heads(group, seed=0, margin=None, dtype=torch.float64, **options):
    """The spread head, and one alone with the same rows."""
    found = []
    for spread in (group, None):
        torch.manual_seed(seed)
        chosen = MARGINS["arc"]() if margin is None else margin()
        head = ArcFaceHead(
            D, options.get("num_classes", V), 16.0, chosen, process_group=spread, dtype=dtype,
            **{k: v for k, v in options.items() if k != "num_classes"},
        )  # fmt: skip
        found.append(head)
    return found


def close(found, expected, rtol=1e-12, atol=1e-12):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def own_rows(head, whole):
    shard = Shard(len(whole), head.process_group.rank(), head.process_group.size())
    return whole[shard.start : shard.stop]


def same_rows_as_one_process(group):
    """Rows depend on the class alone, though the ranks' generators are in different states."""
    torch.manual_seed(100 + dist.get_rank())
    torch.rand(dist.get_rank())
    state = torch.get_rng_state()
    head = ArcFaceHead(D, 5000, process_group=group)
    if group.rank():
        assert torch.equal(torch.get_rng_state(), state)
    first = dist.get_global_rank(group, 0)
    torch.manual_seed(100 + first)
    torch.rand(first)
    alone = ArcFaceHead(D, 5000)
    assert torch.equal(head.all_rows(), alone.weight)
    assert torch.equal(head.weight.to_local(), own_rows(head, alone.weight))
    assert len(head.weight.to_local()) <= -(-5000 // group.size())


def loss_and_gradients(group):
    """Loss, gradients of embeddings and rows, of every margin, reduction and kind of norm."""
    for name, margin in MARGINS.items():
        for reduction in ("mean", "sum", "none"):
            for averaged in (False, True):
                head, alone = heads(group, margin=margin, averaged=averaged)
                x, labels, own = batch(group)
                mine, whole = x[own].clone().requires_grad_(), x.clone().requires_grad_()
                loss = head(mine, labels[own], reduction=reduction)
                expected = alone(whole, labels, reduction=reduction)
                weights = torch.linspace(-1, 2, len(x), dtype=x.dtype)
                if reduction == "none":
                    close(loss, expected[own])
                    loss, expected = (loss * weights[own]).sum(), (expected * weights).sum()
                else:
                    close(loss, expected)
                loss.backward()
                expected.backward()
                factor = group.size() if averaged else 1
                close(mine.grad, factor * whole.grad[own])
                close(head.weight.grad.to_local(), own_rows(head, alone.weight.grad))
                close(head.state_dict().get("margin.mean"), alone.state_dict().get("margin.mean"))
                assert name != "ada" or head.margin.mean != 20


def given_norms(group):
    """Norms that are passed get their gradient, as MagFace needs."""
    head, alone = heads(group, margin=MagFace, averaged=False)
    x, labels, own = batch(group)
    norm = x.norm(dim=1)
    mine, whole = norm[own].clone().requires_grad_(), norm.clone().requires_grad_()
    close(head(x[own], labels[own], mine), alone(x, labels, whole))
    head(x[own], labels[own], mine).backward()
    alone(x, labels, whole).backward()
    close(mine.grad, whole.grad[own])
    assert own.stop == own.start or mine.grad.abs().max() > 0


def half_precision(group):
    """Embeddings and rows of bfloat16 travel as they are, and sums stay float32."""
    head, alone = heads(group, dtype=torch.bfloat16)
    x, labels, own = batch(group, dtype=torch.bfloat16)
    mine, whole = x[own].clone().requires_grad_(), x.clone().requires_grad_()
    loss, expected = head(mine, labels[own]), alone(whole, labels)
    assert loss.dtype == torch.float32
    close(loss, expected, 1e-6, 1e-6)
    loss.backward()
    expected.backward()
    close(mine.grad / group.size(), whole.grad[own], 1e-2, 1e-4)
    close(head.weight.grad.to_local(), own_rows(head, alone.weight.grad), 1e-2, 1e-4)


def diagnostics(group):
    """The numbers of the global batch, on every rank."""
    head, alone = heads(group)
    x, labels, own = batch(group)
    loss, found = head(x[own], labels[own], diagnostics=True)
    expected = alone(x, labels, diagnostics=True)
    close(loss, expected[0])
    close(tuple(found), tuple(expected[1]))


def without_samples_or_classes(group):
    """All samples ignored; no sample at all; fewer classes than ranks."""
    head, alone = heads(group, num_classes=1)
    x, labels, own = batch(group, classes=1)
    close(head(x[own], labels[own]), alone(x, labels))
    head, _ = heads(group)
    for part in (x[own], x[:0]):
        some = part.clone().requires_grad_()
        loss = head(some, torch.full((len(some),), -1))
        loss.backward()
        assert loss == 0
        assert some.grad.eq(0).all()
        assert head.weight.grad.to_local().eq(0).all()


def one_sample(group):
    """One sample in all, on one rank; and none anywhere."""
    for dtype, width in ((torch.float64, D), (torch.bfloat16, 7)):
        torch.manual_seed(0)
        head = ArcFaceHead(width, V, 16.0, process_group=group, dtype=dtype)
        torch.manual_seed(0)
        alone = ArcFaceHead(width, V, 16.0, dtype=dtype)
        x = torch.randn(1, width).to(dtype)
        own = slice(0, 1 if group.rank() == group.size() - 1 else 0)
        close(head(x[own], torch.tensor([3])[own]), alone(x, torch.tensor([3])), 1e-6, 1e-6)
        assert head(x[:0], torch.tensor([3])[:0]) == 0


def a_gradient_on_one_rank(group):
    """Frozen rows, and embeddings of which one rank's alone want a gradient."""
    head, alone = heads(group, averaged=False)
    head.requires_grad_(False)
    x, labels, own = batch(group)
    mine, whole = x[own].clone(), x.clone().requires_grad_()
    mine.requires_grad_(group.rank() == 0)
    head(mine, labels[own]).backward()
    alone(whole, labels).backward()
    if group.rank() == 0:
        close(mine.grad, whole.grad[own])


def copied(group):
    """A copy shares the group alone."""
    head, _ = heads(group, margin=AdaFace)
    copy = deepcopy(head)
    x, labels, own = batch(group)
    close(copy(x[own], labels[own]), head(x[own], labels[own]))
    with torch.no_grad():
        copy.weight.mul_(2)
    assert not torch.equal(copy.all_rows(), head.all_rows())


def train(spread, alone, optimizers, group, steps, each):
    """Train a network and a head on the samples of this rank, and others on those of all."""
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        x = torch.randn(each * group.size(), D, dtype=torch.float64, generator=rng)
        labels = torch.randint(V, (len(x),), generator=rng)
        own = slice(each * group.rank(), each * group.rank() + each)
        (net, head), (lone, whole) = spread, alone
        losses = head(net(x[own]), labels[own]), whole(lone(x), labels)
        close(*losses, 1e-9, 1e-9)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def ten_steps(group):
    """SGD with momentum and AdamW, with a backbone in DDP: the weights of one process."""
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        lambda p: torch.optim.AdamW(p, lr=1e-2),
    ):
        head, alone = heads(group)
        nets = []
        for _ in range(2):
            torch.manual_seed(1)
            nets.append(nn.Linear(D, D).double())
        net, lone = DistributedDataParallel(nets[0], process_group=group), nets[1]
        optimizers = [
            make([*a.parameters(), *b.parameters()]) for a, b in ((net, head), (lone, alone))
        ]
        train((net, head), (lone, alone), optimizers, group, steps=10, each=3)
        close(list(nets[0].parameters()), list(lone.parameters()), 1e-8, 1e-8)
        close(head.all_rows(), alone.weight, 1e-8, 1e-8)


def fully_sharded(group):
    """The same with a backbone in FSDP2."""
    head, alone = heads(group)
    torch.manual_seed(1)
    net = nn.Linear(D, D).double()
    lone = nn.Linear(D, D).double()
    lone.load_state_dict(net.state_dict())
    fully_shard(net, mesh=DeviceMesh.from_group(group, "cpu"))
    optimizers = [
        torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1, momentum=0.9)
        for a, b in ((net, head), (lone, alone))
    ]
    train((net, head), (lone, alone), optimizers, group, steps=4, each=2)
    close(head.all_rows(), alone.weight, 1e-9, 1e-9)
    close(net.weight.full_tensor(), lone.weight, 1e-9, 1e-9)


def clipped(group):
    """The norm of all gradients, of which each rank holds a part."""
    head, alone = heads(group)
    x, labels, own = batch(group)
    net, lone = (nn.Linear(D, D).double() for _ in range(2))
    lone.load_state_dict(net.state_dict())
    for parameter in net.parameters():
        dist.broadcast(parameter.data, dist.get_global_rank(group, 0), group)
    lone.load_state_dict(net.state_dict())
    trained = DistributedDataParallel(net, process_group=group)
    head(trained(x[own]), labels[own]).backward()
    alone(lone(x), labels).backward()
    for limit in (0.01, 1e9):
        found = clip_grad_norm([*net.parameters(), *head.parameters()], limit)
        expected = nn.utils.clip_grad_norm_([*lone.parameters(), *alone.parameters()], limit)
        close(found.double(), expected, 1e-6, 1e-6)
        close(head.weight.grad.full_tensor(), alone.weight.grad, 1e-6, 1e-9)
        close(net.weight.grad, lone.weight.grad, 1e-6, 1e-9)


def sampled(group):
    """Each rank draws from its own classes; the loss is that over the drawn ones."""
    for make in (
        lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
        lambda p: AdamW(p, lr=1e-2),
    ):
        classes = 60
        head, _ = heads(group, num_classes=classes, sample_rate=0.3)
        x, labels, own = batch(group, classes=classes)
        with pytest.raises(RuntimeError, match="is spread over ranks is stepped by"):
            head(x[own], labels[own])
        optimizer = make(head.parameters())
        before = head.all_rows().detach().clone()
        seen = torch.zeros(classes, dtype=torch.bool)
        for step in range(3):
            torch.manual_seed(10 * step + group.rank())
            x, labels, own = batch(group, seed=step, classes=classes)
            mine = x[own].clone().requires_grad_()
            rows = head.all_rows().detach()
            loss = head(mine, labels[own])
            optimizer.zero_grad()
            loss.backward()
            grad = head.weight.row_grad.coalesce()
            drawn = torch.zeros(classes, dtype=torch.bool)
            start = Shard(classes, group.rank(), group.size()).start
            drawn[start + grad.indices()[0]] = True
            of_all = torch.stack([torch.empty_like(drawn)] * group.size())
            dist.all_gather_into_tensor(of_all.view(-1), drawn, group)
            drawn = of_all.any(0)
            assert drawn[labels[labels >= 0]].all()  # positives are kept
            # The sum over the drawn rows alone, by one process.
            places = torch.where(labels < 0, -1, drawn.long().cumsum(0)[labels] - 1)
            alone = ArcFaceHead(D, int(drawn.sum()), 16.0, ArcFace(0.5), dtype=torch.float64)
            alone.load_rows(rows[drawn])
            whole = x.clone().requires_grad_()
            expected = alone(whole, places)
            expected.backward()
            close(loss, expected)
            close(mine.grad, group.size() * whole.grad[own])
            wide = torch.zeros(classes, D, dtype=torch.float64)
            wide[drawn] = alone.weight.grad
            close(grad.to_dense(), own_rows(head, wide))
            optimizer.step()
            seen |= drawn
        after = head.all_rows().detach()
        assert torch.equal(after[~seen], before[~seen])
        assert (after[seen] != before[seen]).any(1).all()


def arguments_that_differ(group):
    """Every rank refuses to change the classes where the ranks do not mean the same."""
    first = group.rank() == 0
    head, _ = heads(group)
    optimizer = SGD(head.parameters(), lr=0.1)
    for call, message in (
        (lambda: head.extend(3 if first else 4), r"n must be the same .* leads to \[14, 15"),
        (lambda: head.keep([0, 1] if first else [0]), "indices must be the same on all ranks"),
        (
            lambda: head.keep([0, 1] if first else [1, 0]),
            r"leads to \[2, 2.*which are not the same",
        ),
        (
            lambda: head.extend(3, optimizer if first else None),
            r"optimizer must be passed on all ranks or on none; got one on the ranks \[0\] alone",
        ),
        (
            lambda: head.keep([V] if first else [0]),
            f"got {V}$" if first else "rank 0 refused its arguments; its own error says why",
        ),
        (
            lambda: head.extend(0 if first else 1),
            "n must be at least 1; got 0" if first else "rank 0 refused its arguments",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert head.num_classes == V == len(head.weight)
    head.extend(2, optimizer)
    head.keep(range(1, V + 2) if first else torch.arange(1, V + 2), optimizer)  # the same ones
    assert head.num_classes == V + 1
    with pytest.raises(TypeError, match=r"got 'world': pass dist\.group\.WORLD"):
        ArcFaceHead(D, V, process_group="world")


def step_once(head, optimizer, group, seed):
    x, labels, own = batch(group, seed=seed, classes=head.num_classes)
    optimizer.zero_grad()
    head(x[own], labels[own]).backward()
    optimizer.step()


def save(head, optimizer, folder):
    model, state = get_state_dict(head, optimizer)
    held = {"head": model, "optimizer": state}
    dcp.save(held, checkpoint_id=folder, process_group=head.process_group)


def load(head, optimizer, folder):
    model, state = get_state_dict(head, optimizer)
    held = {"head": model, "optimizer": state}
    dcp.load(held, checkpoint_id=folder, process_group=head.process_group)
    set_state_dict(head, optimizer, model_state_dict=model, optim_state_dict=state)


def remembered(head, optimizer):
    """All rows, and what the optimizer remembers of each."""
    state = [v for v in optimizer.state[head.weight].values() if v.ndim]
    return [head.all_rows().detach().clone(), *(v.full_tensor() for v in state)]


def moved_to_other_ranks(group):
    """From four ranks to three, from these to one, and back to four: the same next step."""
    if group.size() < 4:
        return
    folder = Path(sys.argv[3]) / "checkpoint"
    for name, make, options in (
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), {}),
        ("adamw", lambda p: torch.optim.AdamW(p, lr=0.1), {}),
        ("rows", lambda p: AdamW(p, lr=0.1), {"sample_rate": 0.5}),
    ):
        head, _ = heads(group, **options)
        optimizer = make(head.parameters())
        for seed in range(3):
            step_once(head, optimizer, group, seed)
        save(head, optimizer, folder / f"{name}-4")
        expected = remembered(head, optimizer)
        assert len(expected) == {"sgd": 2, "adamw": 3, "rows": 4}[name]
        for before, size in ((4, 3), (3, 1), (1, 4)):
            other = GROUPS[size]
            if not isinstance(other, int):  # else this rank is none of its members
                moved, _ = heads(other, seed=7, **options)
                again = make(moved.parameters())
                load(moved, again, folder / f"{name}-{before}")
                assert all(map(torch.equal, remembered(moved, again), expected))
                save(moved, again, folder / f"{name}-{size}")
            dist.barrier(group)
        step_once(head, optimizer, group, 9)
        if not options:  # samples that are drawn differ
            step_once(moved, again, group, 9)
            assert all(map(torch.equal, remembered(moved, again), remembered(head, optimizer)))
            if group.rank() == 0:  # and one process takes the step of four
                alone, _ = heads(GROUPS[1], seed=7)
                again = make(alone.parameters())
                load(alone, again, folder / f"{name}-1")
                x, labels, _ = batch(group, seed=9)
                alone(x, labels).backward()
                again.step()
                rows = alone.all_rows().detach()
                torch.save(rows, folder / f"{name}.pt")
            dist.barrier(group)
            rows = torch.load(folder / f"{name}.pt", weights_only=True)
            close(head.all_rows().detach(), rows)


def more_and_fewer_classes(group):
    """`extend` and `keep`, with what optimizers remember, as of one process."""
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1),
    ):
        both = heads(group)
        optimizers = [make(head.parameters()) for head in both]

        def step(seed, both=both, optimizers=optimizers):
            x, labels, own = batch(group, seed=seed, classes=both[0].num_classes)
            for head, optimizer, part in zip(both, optimizers, (own, slice(None)), strict=True):
                optimizer.zero_grad()
                head(x[part], labels[part]).backward()
                optimizer.step()
            close(both[0].all_rows(), both[1].weight, 1e-9, 1e-9)

        step(0)
        for change in (
            lambda head, optimizer: head.extend(5, optimizer),
            lambda head, optimizer: head.keep([15, 2, 3, 0, 7, 9, 11], optimizer),
            lambda head, optimizer: head.keep(torch.tensor([4, 1]), optimizer),
            lambda head, optimizer: head.extend(9, optimizer),
        ):
            for head, optimizer in zip(both, optimizers, strict=True):
                torch.manual_seed(3)
                change(head, optimizer)
            close(both[0].all_rows(), both[1].weight, 1e-9, 1e-9)
            for seed in (1, 2):
                step(seed)


def one_file(group):
    """`save_pretrained` writes one head, which one process loads; `load_rows` spreads it again."""
    folder = Path(sys.argv[3]) / f"head-{group.size()}"
    head, _ = heads(group, dtype=torch.float32)
    head.save_pretrained(folder)
    alone = ArcFaceHead.from_pretrained(folder)
    assert torch.equal(alone.weight, head.all_rows())
    other, _ = heads(group, seed=5, dtype=torch.float32)
    other.load_rows(alone.weight)
    assert torch.equal(other.weight.to_local(), head.weight.to_local())
    other.reset_parameters()
    other.load_rows(alone.weight.split([4, 0, 1, 6]))
    assert torch.equal(other.weight.to_local(), head.weight.to_local())
    x, _, _ = batch(group, dtype=torch.float32)
    close(head.logits(x), alone.logits(x))
    assert f"rank={group.rank()} of {group.size()}" in repr(head)
    head, _ = heads(group, margin=AdaFace, dtype=torch.float32)
    x, labels, own = batch(group, dtype=torch.float32)
    head(x[own], labels[own])
    head.save_pretrained(folder)
    assert ArcFaceHead.from_pretrained(folder).margin.mean == head.margin.mean != 20
    head(x[own], labels[own])
    (folder / "file").touch()
    with pytest.raises(
        OSError if group.rank() == 0 else RuntimeError, match="must lead to a folder"
    ):
        head.save_pretrained(folder / "file")


def bad_input(group):
    """An error on one rank's samples is the same error on all ranks, and none hangs."""
    head, _ = heads(group)
    x, labels, own = batch(group)
    labels[0] = V
    with pytest.raises(ValueError, match=f"got {V} at position 0 of rank 0$"):
        head(x[own], labels[own])
    labels[0], labels[-1] = 0, -7
    rank = group.size() - 2  # the last one with samples
    with pytest.raises(ValueError, match=f"got -7 at position {[4, 1, 3][rank]} of rank {rank}$"):
        head(x[own], labels[own])
    labels[-1] = 0
    other = "rank 0 refused its samples; its own error says why"
    for wrong, kind, message in (
        (x[own, :3], ValueError, r"embeddings must be \[b, 6\]"),
        (x[own].long(), TypeError, "embeddings must be floating point"),
    ):
        first = group.rank() == 0
        with pytest.raises(kind if first else ValueError, match=message if first else other):
            head(wrong if group.rank() == 0 else x[own], labels[own])
    with pytest.raises(ValueError, match="embeddings must be of one dtype on all ranks"):
        head(x[own].float() if group.rank() == 0 else x[own], labels[own])
    x[0] = torch.nan
    mine = x[own].clone().requires_grad_()
    loss = head(mine, labels[own])
    loss.backward()
    assert loss.isnan()
    assert head.weight.grad.to_local().isfinite().all()
    assert mine.grad.isnan().any(1).tolist() == [i == 0 for i in range(own.start, own.stop)]
    with pytest.raises(ValueError, match=rf"rows must be \[{V}, {D}\] in all"):
        head.load_rows(torch.zeros(V + 1, D))


GROUPS: dict[int, dist.ProcessGroup] = {}
SCENARIOS = [
    same_rows_as_one_process,
    loss_and_gradients,
    given_norms,
    half_precision,
    diagnostics,
    without_samples_or_classes,
    one_sample,
    a_gradient_on_one_rank,
    copied,
    ten_steps,
    fully_sharded,
    clipped,
    sampled,
    moved_to_other_ranks,
    more_and_fewer_classes,
    arguments_that_differ,
    one_file,
    bad_input,
]


def killed(rank, folder):
    """Rank 1 is gone in the middle of a step; the others say so, and end."""
    torch.manual_seed(0)
    head = ArcFaceHead(D, V, process_group=dist.group.WORLD)
    x = torch.randn(4, D, requires_grad=True)
    head(x, torch.arange(4)).backward()
    loss = head(x, torch.arange(4))
    if rank == 1:
        os.kill(os.getpid(), 9)
    began = time.monotonic()
    try:
        loss.backward()
        head(x, torch.arange(4))
    except RuntimeError as error:
        (folder / f"error-{rank}.txt").write_text(f"{time.monotonic() - began:.1f} s: {error}")
        os._exit(3)  # a process group that has lost a rank cannot be destroyed together
    raise AssertionError("nobody missed rank 1")


def main():
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    if sys.argv[4:] == ["killed"]:
        killed(rank, folder)
    GROUPS.update({n: dist.new_group(list(range(n))) for n in range(1, ranks + 1)})
    results = {}
    for scenario in SCENARIOS:
        for size in range(2, ranks + 1):
            if rank < size:
                name, failed = f"{scenario.__name__}-{size}", ""
                try:
                    scenario(GROUPS[size])
                    dist.barrier(GROUPS[size])
                except Exception:
                    failed = traceback.format_exc()
                results[name] = failed
                (folder / f"results-{rank}.json").write_text(json.dumps(results))
                if failed:
                    os._exit(1)  # the others, who wait for this one, learn that it is gone
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
