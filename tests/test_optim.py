"""Rows of a matrix are stepped as if each were a parameter of its own."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from partlocal.optim import SGD, AdamW, clip_grad_norm, grad_norm

CASES = {
    "sgd": (SGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "dampening": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "maximize": (SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "maximize": True}),
    "adamw": (AdamW, torch.optim.AdamW, {"lr": 0.1}),
    "adamw-decay": (
        AdamW,
        torch.optim.AdamW,
        {"lr": 0.1, "weight_decay": 0.3, "betas": (0.8, 0.9)},
    ),
    "adamw-maximize": (AdamW, torch.optim.AdamW, {"lr": 0.1, "maximize": True}),
}
cases = pytest.mark.parametrize(("ours", "theirs", "options"), CASES.values(), ids=CASES)


def problem():
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 4, dtype=torch.float64, generator=rng)
    other = torch.randn(3, 4, dtype=torch.float64, generator=rng)
    drawn = [torch.randperm(9, generator=rng)[:3] for _ in range(8)]
    return weight, other, drawn


def value(rows, other):
    return ((rows @ other.T).sin() * rows[:, :3]).sum()


@cases
def test_every_row_is_a_parameter_of_its_own(ours, theirs, options):
    weight, other, drawn = problem()
    whole, dense = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(other.clone())
    rows = [torch.nn.Parameter(row.clone()) for row in weight]
    same = torch.nn.Parameter(other.clone())
    optimizer = ours([whole, dense], **options)
    oracle = theirs([*rows, same], **options)
    for some in drawn:
        optimizer.zero_grad()
        oracle.zero_grad()
        value(F.embedding(some, whole, sparse=True), dense).backward()
        value(torch.stack([rows[i] for i in some]), same).backward()
        assert whole.grad.is_sparse
        optimizer.step()
        oracle.step()
        torch.testing.assert_close(whole.detach(), torch.stack(rows).detach())
        torch.testing.assert_close(dense, same)


@cases
def test_gradients_of_several_batches_add_up(ours, theirs, options):
    """A row that is drawn twice before a step is stepped once, by the sum."""
    weight, other, drawn = problem()
    results = []
    for sparse in (True, False):
        whole = torch.nn.Parameter(weight.clone())
        whole.by_rows = True
        optimizer = ours([whole], **options)
        for first, second in zip(drawn[::2], drawn[1::2], strict=True):
            optimizer.zero_grad()
            both = torch.cat([first, second]).unique()
            if sparse:
                value(F.embedding(first, whole, sparse=True), other).backward()
                value(F.embedding(second, whole, sparse=True), other).backward()
            else:
                part = whole.detach()[both].requires_grad_()
                places = [torch.searchsorted(both, some) for some in (first, second)]
                (value(part[places[0]], other) + value(part[places[1]], other)).backward()
                shape = whole.shape
                whole.grad = torch.sparse_coo_tensor(
                    both[None], part.grad, shape, check_invariants=True
                )
            optimizer.step()
        results.append(whole.detach())
    torch.testing.assert_close(*results)


@cases
def test_saved_and_loaded(ours, theirs, options):
    weight, other, drawn = problem()
    params = [torch.nn.Parameter(weight.clone()) for _ in range(2)]
    optimizers = [ours([p], **options) for p in params]

    def step(i, some):
        optimizers[i].zero_grad()
        value(F.embedding(some, params[i], sparse=True), other).backward()
        optimizers[i].step()

    for some in drawn[:4]:
        step(0, some)
    with torch.no_grad():
        params[1].copy_(params[0])
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    for some in drawn[4:]:
        step(0, some)
        step(1, some)
    assert torch.equal(*params)


def test_a_closure_is_called_once():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer, calls = SGD([weight], lr=0.5), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = F.embedding(torch.tensor([1]), weight, sparse=True).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    assert len(calls) == 1
    assert weight[:, 0].tolist() == [1, 0.5, 1]


def test_clipping():
    """As `torch.nn.utils.clip_grad_norm_` does, with a sparse gradient among them."""
    weight, other, drawn = problem()
    for limit in (0.1, 1e9):
        whole, dense = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(other.clone())
        none = torch.nn.Parameter(torch.ones(2))
        value(F.embedding(torch.cat([drawn[0], drawn[0]]), whole, sparse=True), dense).backward()
        same = [torch.nn.Parameter(torch.zeros_like(p)) for p in (whole, dense)]
        for p, q in zip(same, (whole, dense), strict=True):
            p.grad = q.grad.to_dense().clone()
        expected = torch.nn.utils.clip_grad_norm_(same, limit)
        measured = grad_norm(iter([whole, none, dense]))
        found = clip_grad_norm(iter([whole, none, dense]), limit)
        assert torch.equal(measured, found)
        torch.testing.assert_close(found, expected.float())
        for p, q in zip(same, (whole, dense), strict=True):
            torch.testing.assert_close(q.grad.to_dense(), p.grad, rtol=1e-6, atol=1e-9)
    assert clip_grad_norm([none], 1.0) == 0
    with pytest.raises(ValueError, match="max_norm must be positive and finite; got 0"):
        clip_grad_norm([none], 0.0)


def test_a_step_runs_its_hooks_once():
    torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)  # whose step is wrapped from now
    weight, calls = torch.nn.Parameter(torch.ones(3, 2)), []
    optimizer = SGD([weight], lr=0.5)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    weight.grad = torch.ones(3, 2)
    optimizer.step()
    assert calls == [1]
    assert weight.eq(0.5).all()


def test_no_momentum_no_memory():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = SGD([weight], lr=0.5)
    F.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    optimizer.step()
    assert list(optimizer.state[weight]) == ["step"]


@cases
def test_sampling_begins_later(ours, theirs, options):
    """A state that was made by dense steps counts them for every row."""
    weight, other, drawn = problem()
    whole = torch.nn.Parameter(weight.clone())
    rows = [torch.nn.Parameter(row.clone()) for row in weight]
    optimizer, oracle = ours([whole], **options), theirs(rows, **options)
    value(whole, other).backward()
    value(torch.stack(rows), other).backward()
    for _ in range(2):
        optimizer.step()
        oracle.step()
    for some in drawn:
        optimizer.zero_grad()
        oracle.zero_grad()
        value(F.embedding(some, whole, sparse=True), other).backward()
        value(torch.stack([rows[i] for i in some]), other).backward()
        optimizer.step()
        oracle.step()
    torch.testing.assert_close(whole.detach(), torch.stack(rows).detach())


def test_clipping_spreads_no_nan():
    one, two = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    one.grad, two.grad = torch.tensor([1.0, torch.nan]), torch.ones(2)
    assert clip_grad_norm([one, two], 0.1).isnan()
    assert torch.equal(two.grad, torch.ones(2))


def test_errors():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = AdamW([weight], amsgrad=True)
    F.embedding(torch.tensor([1]), weight, sparse=True).sum().backward()
    with pytest.raises(NotImplementedError, match="steps no rows with amsgrad=True: leave it out"):
        optimizer.step()
